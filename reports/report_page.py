"""A report of runs as one self-contained HTML page.

This module gathers the content. The template report.html.jinja lays it out and escapes all text.
Pictures, plots and CSV files are embedded, and the page has no scripts.
"""

import base64
import csv
import dataclasses
import io
import math
import statistics
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from images.image_files import DAMAGE
from images.pictures import open_picture
from metrics.score_names import title as score_title
from reports.comparison import Comparison, Curve, ScoreGroup, Spread, compare, over_kimg
from reports.report_plots import Axis, Level, Line, look, plot
from reports.run_record import RunRecord, Score
from reports.run_state import best_score
from reports.training_seeds import (
    Difference,
    Family,
    differences,
    families,
    over_training_seeds,
)
from sampling.sweeps import FULL_BITS

_MAX_GRIDS = 6  # grids of samples over time
_MAX_TICKS = 20  # ticks in the table of a run
_MAX_SIDE = 1024  # pixels of an embedded picture
_MAX_PAIRS = 10  # seeds whose images are compared
_MAX_NAME = 60  # characters of a run's name in legends and tables
_UNSHARED = ("started",)  # settings that differ between any two runs
_TICK_FIELDS = ("kimg", "loss", "lr", "bad_steps", "images_per_sec", "cpu_mem_gb", "gpu_mem_gb",
                "val_loss")
_TICK_PLOTS = (  # title, column, unit, whether from zero
    ("Loss", "loss", "loss, mean over a tick", False),
    ("Held-out loss", "val_loss", "loss of the averaged weights", False),
    ("Steps skipped", "bad_steps", "total steps without finite gradients", True),
    ("Learning rate", "lr", "learning rate", True),
    ("Speed", "images_per_sec", "images per second", True))
_MEMORY = {"main memory": "cpu_mem_gb", "GPU, peak of a tick": "gpu_mem_gb"}
_AXES = {  # title, axis label, column header, format of a value in words
    "noise_alpha": ("Noise before each step", "alpha, noise / noise level", "alpha", "alpha {:g}"),
    "num_steps": ("Steps", "network evaluations per image (NFE)", "steps (NFE)", "{:g} steps"),
    "bits": ("Rounded weights", f"bits of the weights; {FULL_BITS}: as trained", "bits",
             "{:g} bits"),
    "random_bits": ("Weights rounded at random", f"bits of the weights; {FULL_BITS}: as trained",
                    "bits", "{:g} bits at random")}
_KIMG = Axis("images seen, kimg")
_NO_RANKING = ("Losses at different D cannot be ranked, because noise at small D has heavy "
               "tails, and so does its loss.")
_OF_DIFFERENCES = (
    "Differences are paired by training seed, and shown as the mean and its 95% t interval over "
    "training seeds. A difference is not decided if the interval contains 0. Changes are relative "
    "to the default point, over the same samples.")
_SEVERAL_KINDS = ("Differences to D = inf are left out, because the networks with D = inf have "
                  "several settings, so there is no single one to compare with.")
_NBSP = "\u00a0"  # a space that does not break


class Card(NamedTuple):
    """A plot with its legend, table and texts.

    Attributes:
        title: heading.
        svg: the plot; '' if there is none.
        legend: names by series.
        levels: the series that are levels.
        header: header of the table of the same values, if there is one.
        rows: cells of the table; the second line of a text is styled differently.
        caption: text below the plot.
        notes: warnings.
    """

    title: str
    svg: str = ""
    legend: Mapping[int, str] = {}
    levels: Collection[int] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str | int]] = ()
    caption: str = ""
    notes: Sequence[str] = ()


def render(runs: Sequence[RunRecord], title: str | None = None) -> str:
    """Returns the page.

    Args:
        runs: the runs to report, in the order of the page.
        title: heading; by default the names of the runs.
    """
    names, comparisons, found = _names(runs), compare(runs), families(runs)
    groups, group_names = range(len(runs)), names
    if len(found) < len(runs):
        comparisons = [over_training_seeds(comparison, found) for comparison in comparisons]
        groups = [next(k for k, family in enumerate(found) if i in family.runs.values())
                  for i in range(len(runs))]
        group_names = _family_names(runs, found)
    return _TEMPLATES.get_template("report.html.jinja").render(
        title=title or "Report: " + ", ".join(_short(run.name) for run in runs),
        written=time.strftime("%Y-%m-%d %H:%M"),
        downloads=_downloads(runs),
        glance=[_glance(run) for run in runs],
        differing=_differing_settings(runs),
        training=_tick_cards(runs, group_names, groups) if len(runs) > 1 else [],
        groups=[_group(comparison, heading, group_names) for comparison, heading
                in zip(comparisons, _headings(comparisons), strict=True)],
        pairs=_pairs(runs, names),
        runs=[_run(run) for run in runs])


# ----------------------------------------------------------------------------- parts of a page


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[:_MAX_NAME - 1] + "…"


def _number(value: float | None, digits: int = 5) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _joined(settings: Iterable[tuple[str, str]]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
    lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
_TEMPLATES.filters |= {"short": _short, "number": _number, "joined": _joined, "look": look}


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the names of runs in legends, with D if the runs differ in D."""
    dims = [run.D for run in runs]
    if None in dims or len(set(dims)) == 1:
        return [_short(run.name) for run in runs]
    return [f"{_short(run.name)} ({_D_text(run.D)})" for run in runs]


def _D_text(D: float) -> str:
    return f"D{_NBSP}={_NBSP}{D:.15g}"


def _family_names(runs: Sequence[RunRecord], found: Sequence[Family]) -> list[str]:
    """Returns the names of families: D if that distinguishes them, else their runs."""
    first = [runs[min(family.runs.values())] for family in found]
    dims = [run.D for run in first]
    if None not in dims and len(set(dims)) == len(dims):
        return [_D_text(D) for D in dims]
    more = [len(family.runs) - 1 for family in found]
    return [f"{name} and {count} more" if count else name
            for name, count in zip(_names(first), more, strict=True)]


def _decimals(spreads: Iterable[Spread], digits: int = 4) -> int:
    """Returns the number of decimals that shows a typical value with `digits` digits.

    The typical value is the median of the largest values, because a failed network may have a huge
    score.
    """
    sizes = [size for spread in spreads if (size := max(map(abs, spread.values), default=0))]
    usual = statistics.median_high(sizes) if sizes else 0
    return min(max(digits - 1 - math.floor(math.log10(usual)), 0), 10) if usual else 0


def _spread(spread: Spread | None, decimals: int) -> str:
    if spread is None:
        return ""
    mean, low, high = (f"{x:.{decimals}f}" for x in (spread.mean, spread.low, spread.high))
    return mean if len(spread.values) == 1 else f"{mean}\n{low}..{high}"


def _seeds_text(seeds: Sequence[str], unit: str = "seed range") -> str:
    """Returns the number of seed ranges or training seeds, and the list of them, as text."""
    count = f"1 {unit}" if len(seeds) == 1 else f"{len(seeds)} {unit}s"
    return f"{count} ({', '.join(seeds)})" if all(seeds) else count


def _spaced(items: Sequence, count: int) -> list:
    """Returns at most `count` items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _line(points: dict[float, Spread], series: int = 0) -> Line:
    """Returns a line of means, with error bars from the lowest to the highest value."""
    means, lows, highs = zip(*((x.mean, x.low, x.high) for x in points.values()), strict=True)
    return Line(list(points), means, lows, highs, series)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _picture(path: Path, notes: list[str], alt: str) -> dict[str, Any] | None:
    """Returns the attributes of an <img> that embeds the picture, reduced to `_MAX_SIDE` pixels.

    If the picture can't be read, None is returned, and `notes` get a line.
    """
    try:
        with open(path, "rb") as file, open_picture(file) as image:
            image.load()
            image = image if image.mode in ("L", "RGB") else image.convert("RGB")
            image.thumbnail((_MAX_SIDE, _MAX_SIDE))
            buffer = io.BytesIO()
            image.save(buffer, "PNG", optimize=True)
    except DAMAGE:
        notes.append(f"{path.name} can't be read as a picture")
        return None
    return {"alt": alt, "width": image.width, "height": image.height,
            "src": _data_url("image/png", buffer.getvalue())}


# ------------------------------------------------------------------------------- all the runs


def _glance(run: RunRecord) -> dict[str, Any]:
    """Returns the summary of a run at the top: its latest samples, best score and loss."""
    kimg, path = run.samples[-1] if run.samples else (None, None)
    last, score = run.ticks[-1] if run.ticks else {}, best_score(run.scores)
    said = [_D_text(run.D)] if run.D is not None else []
    if score:
        at = f" at {score.kimg:g} kimg" if score.kimg is not None else ""
        said.append(f"best {score_title(score.metric, score.detector)} {score.value:.5g}{at}")
    if "loss" in last:
        said.append(f"loss {last['loss']:.5g} at {last['kimg']:g} kimg")
    return {"name": _short(run.name), "said": said, "kimg": kimg,
            "picture": path and _picture(path, [], f"{run.name}, samples at {kimg:g} kimg")}


def _downloads(runs: Sequence[RunRecord]) -> list[tuple[str, int, str]]:
    """Returns (name, count, URL) for scores and ticks; the URL contains them as a CSV file."""
    scores = [{"run": run.name, **vars(score), "other": _joined(score.other)}
              for run in runs for score in run.scores]
    ticks = [{"run": run.name, **tick} for run in runs for tick in run.ticks]
    found = []
    of_scores = [field.name for field in dataclasses.fields(Score)]
    for kind, fields, rows in (("scores", of_scores, scores), ("ticks", _TICK_FIELDS, ticks)):
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ["run", *fields], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        found.append((kind, len(rows), _data_url("text/csv", buffer.getvalue().encode())))
    return found


def _differing_settings(runs: Sequence[RunRecord]) -> list[list[str | None]]:
    """Returns (title, a value per run) of the settings that differ between runs."""
    titles = dict.fromkeys(title for run in runs for title in run.settings)
    rows = [[title, *(run.settings.get(title) for run in runs)] for title in titles]
    return [row for row in rows if row[0] not in _UNSHARED and len(set(row[1:])) > 1]


def _tick_cards(runs: Sequence[RunRecord], names: Sequence[str],
                groups: Sequence[int] = (0,)) -> list[Card]:
    """Returns a plot of each quantity of the ticks; several runs are plotted only if they differ.

    `groups` has the group number of each run, and `names` the name of each group.
    """
    cards = []
    for title, column, unit, from_zero in _TICK_PLOTS:
        found = {i: points for i, run in enumerate(runs) if (points := run.column(column))}
        is_zero = not any(y for points in found.values() for _, y in points)
        is_ranked = column not in ("loss", "val_loss") or len({runs[i].D for i in found}) == 1
        if not found or len(runs) > 1 and (is_zero or column == "lr"):
            continue
        if is_zero and column == "bad_steps":
            cards.append(Card(title, caption="None; the gradients of all steps were finite."))
            continue
        lines = [Line(*zip(*points, strict=True), series=groups[i])
                 for i, points in found.items()]
        cards.append(Card(title, plot(lines, _KIMG, unit, from_zero=from_zero),
                          {groups[i]: names[groups[i]] for i in found},
                          caption="" if is_ranked else _NO_RANKING))
    return cards


def _pairs(runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any] | None:
    """Returns the images of the same seeds by every run; None unless two runs have some."""
    found = [(name, run.sample_folder) for name, run in zip(names, runs, strict=True)
             if run.sample_folder]
    settings = found[0][1].settings if found else ()
    same = [(name, folder) for name, folder in found if folder.settings == settings]
    if len(same) < 2:
        return None
    notes = [f"{name}: left out, because its images were made with other sampler settings"
             for name, folder in found if folder.settings != settings]
    seeds = sorted(set.intersection(*(set(folder.paths) for _, folder in same)))[:_MAX_PAIRS]
    return {
        "seeds": seeds,
        "how": ", ".join(f"{key.replace('num_steps', 'steps')} {value}" for key, value in settings),
        "kimg": ", ".join(dict.fromkeys(f"{folder.kimg:g}" for _, folder in same)),
        "rows": [(name, [_picture(folder.paths[seed], notes, f"{name}, seed {seed}")
                         for seed in seeds]) for name, folder in same],
        "notes": notes,
    } if seeds else None


# ------------------------------------------------------------------- scores that are comparable


def _heading(group: ScoreGroup, num_steps: int | None = None) -> str:
    return ", ".join([group.title, *([f"{group.num} images"] if group.num else []),
                      *([f"{num_steps} steps"] if num_steps else []),
                      *(f"{key} {value}" for key, value in group.other)])


def _headings(comparisons: Sequence[Comparison]) -> list[str]:
    """Returns a heading for each, with the reference if nothing else distinguishes them."""
    plain = [_heading(comparison.group) for comparison in comparisons]
    return [heading if plain.count(heading) == 1 else
            f"{heading}, detector {comparison.group.detector or 'unknown'}, reference "
            f"{comparison.reference} {comparison.group.reference[:8]}"
            for heading, comparison in zip(plain, comparisons, strict=True)]


def _group(comparison: Comparison, heading: str, names: Sequence[str]) -> dict[str, Any]:
    """Returns the content of the page about one group of scores."""
    is_over_D = len(comparison.over_D) > 1 or comparison.has_training_seeds
    seeds = {curve.seeds for axis in comparison.hardest for curve in comparison.over[axis]}
    unit = "training seed" if comparison.has_training_seeds else "seed range"
    notes = []
    if len(comparison.kimgs) > 1:
        notes.append("The compared networks were trained for different kimg: " + ", ".join(
            "unknown" if kimg < 0 else _number(kimg) for kimg in comparison.kimgs))
    if comparison.has_training_seeds and [curve.D for curve in comparison.over_D].count(
            math.inf) > 1:
        notes.append(_SEVERAL_KINDS)
    return {
        "comparison": comparison,
        "heading": heading,
        "runs": [names[curve.run] for curve in comparison.over_D],
        "summary": _summary(comparison, names) if is_over_D else None,  # header, rows
        "hardest_seeds": _seeds_text(seeds.pop(), unit) if len(seeds) == 1 else "",
        "notes": notes,
        "cards": [*([_card_over_D(comparison, names)] if is_over_D else []),
                  *_difference_cards(comparison, names),
                  *(_card_over(axis, comparison, names, unit) for axis in comparison.over)],
    }


def _base_points(comparison: Comparison) -> list[tuple[Curve, Spread]]:
    return [(curve, next(iter(curve.points.values()))) for curve in comparison.over_D]


def _summary(comparison: Comparison, names: Sequence[str]) -> tuple[list[str], list[list]]:
    """Returns a table: the base point of each run and its changes at the hardest points."""
    hardest, known = comparison.hardest, _base_points(comparison)
    changes = [{curve.run: curve.change(x, comparison.base[axis])
                for curve in comparison.over[axis]} for axis, x in hardest.items()]
    decimals = _decimals(spread for _, spread in known)
    points = [_AXES[axis][-1].format(x) for axis, x in hardest.items()]
    count = "training seeds" if comparison.has_training_seeds else "seed ranges"
    return ["run", "score", count, *points], [
        [names[curve.run], _spread(base, decimals), len(base.values),
         *(_change(of_runs.get(curve.run), base, decimals) for of_runs in changes)]
        for curve, base in known]


def _change(change: Spread | None, base: Spread, decimals: int) -> str:
    if change is None:
        return ""
    lines = []
    if base.mean > 0:
        percent = f"{100 * change.mean / base.mean:+.1f}%"
        lines.append("0.0%" if percent in ("+0.0%", "-0.0%") else percent)
    if len(change.values) > 1:
        lines.append(f"{change.low:+.{decimals}f}..{change.high:+.{decimals}f}")
    return f"{change.mean:+.{decimals}f}\n{', '.join(lines)}"


def _card_over_D(comparison: Comparison, names: Sequence[str]) -> Card:
    """Returns finite D as points and D = inf as a level; without a finite D there is no plot."""
    known = [(curve.D, curve.run, spread) for curve, spread in _base_points(comparison)
             if curve.D is not None]
    levels = {run: Level(spread.mean, spread.low, spread.high, run)
              for D, run, spread in known if math.isinf(D)}
    finite = sorted((D, run, spread) for D, run, spread in known if run not in levels)
    lines = [Line([D for D, *_ in finite], [spread.mean for *_, spread in finite], series=None),
             *(_line({D: spread}, run) for D, run, spread in finite)]
    axis = Axis("augmented dimensions D", {D: f"{D:.15g}" for D, *_ in finite}, is_log=True)
    svg = plot(lines, axis, comparison.group.title, list(levels.values())) if finite else ""
    decimals = _decimals(spread for _, spread in _base_points(comparison))
    rows = [[names[curve.run], _number(curve.kimg),
             *(f"{x:.{decimals}f}" for x in (spread.mean, spread.low, spread.high)),
             len(spread.values)] for curve, spread in _base_points(comparison)]
    header = ["run", "kimg", "mean", "lowest", "highest", "ranges"]
    if comparison.has_training_seeds:
        header[-1:] = ["training seeds", "deviation over samples"]
        for row, (curve, _) in zip(rows, _base_points(comparison), strict=True):
            of_samples = next(iter(curve.of_samples.values()), None)
            row.append("" if of_samples is None else f"{of_samples:.{decimals}f}")
    ranges = _ranges(comparison.over_D)
    return Card("Over D", svg, {run: names[run] for _, run, _ in known}, levels, header, rows,
                f"Values{ranges}." if ranges else "")


def _difference_cards(comparison: Comparison, names: Sequence[str]) -> list[Card]:
    """Returns a table of paired differences to D = inf, if there are training seeds."""
    if not comparison.has_training_seeds:
        return []
    columns = [("score", differences(comparison.over_D))]
    for axis, curves in comparison.over.items():
        base = comparison.base[axis]
        for x in sorted({x for curve in curves for x in curve.points} - {base}):
            columns.append((f"change at {_AXES[axis][-1].format(x)}",
                            differences(curves, x, base)))
    columns = [(title, found) for title, found in columns if found]
    decimals = _decimals(spread for _, spread in _base_points(comparison))
    rows = [[names[curve.run], *(_difference(found.get(curve.run), decimals, comparison.group)
                                 for _, found in columns)]
            for curve in sorted(comparison.over_D, key=lambda curve: curve.D or 0)
            if any(curve.run in found for _, found in columns)]
    return [Card("Differences to D = inf", header=["run", *(title for title, _ in columns)],
                 rows=rows, caption=_OF_DIFFERENCES)] if rows else []


def _difference(difference: Difference | None, decimals: int, group: ScoreGroup) -> str:
    if difference is None:
        return ""
    if difference.half_width is None:
        return f"{difference.mean:+.{decimals}f}\none seed"
    if difference.half_width > 0:  # shown with two digits
        decimals = min(max(1 - math.floor(math.log10(difference.half_width)), 0), 10)
    return (f"{difference.mean:+.{decimals}f} ± {difference.half_width:.{decimals}f}\n"
            f"{difference.verdict(group.is_lower_better)}")


def _card_over(axis: str, comparison: Comparison, names: Sequence[str], unit: str) -> Card:
    title, label, head, _ = _AXES[axis]
    curves, group = comparison.over[axis], comparison.group
    values = sorted({x for curve in curves for x in curve.points})
    places, ticks = {x: x for x in values}, {}
    if axis == "num_steps":
        places = {x: group.evaluations(x) for x in values}
        ticks = {place: str(place) for place in places.values()}
    elif axis in ("bits", "random_bits"):  # evenly spaced, because 32 is far from the others
        places = {x: place for place, x in enumerate(values)}
        ticks = {place: f"{x:g}" for x, place in places.items()}
    lines = [_line({places[x]: spread for x, spread in curve.points.items()}, curve.run)
             for curve in curves]
    decimals = [_decimals(curve.points.values()) for curve in curves]
    rows = [[f"{x:g}" + (f" ({places[x]})" if axis == "num_steps" else ""),
             *(_spread(curve.points.get(x), digits)
               for curve, digits in zip(curves, decimals, strict=True))] for x in values]
    of_runs = {curve.run: names[curve.run] for curve in curves}
    caption, notes = _seeds_of(axis, curves, names, unit)
    if axis == "random_bits":
        numbers = " to ".join(map(str, sorted({min(comparison.num_draws),
                                               max(comparison.num_draws)})))
        caption += f" Every value for rounded weights is the mean of {numbers} random roundings."
    return Card(title, plot(lines, Axis(label, ticks), group.title), of_runs,
                header=[head, *of_runs.values()], rows=rows, caption=caption, notes=notes)


def _seeds_of(axis: str, curves: Sequence[Curve], names: Sequence[str], unit: str
              ) -> tuple[str, list[str]]:
    """Returns a text on the seeds of a card's values, '' if they differ by run, and notes."""
    why = ("its points share no seed range" if unit == "seed range"
           else "not every training seed has all points over the same samples")
    notes = [f"{names[curve.run]}: {why}; left out: "
             + ", ".join(_AXES[axis][-1].format(x) for x in curve.left_out)
             for curve in curves if curve.left_out]
    if len({curve.seeds for curve in curves}) == 1:
        return f"Every value is over {_seeds_text(curves[0].seeds, unit)}{_ranges(curves)}.", notes
    return "", ["The runs are scored over different seeds: " + "; ".join(
        f"{names[curve.run]} over {_seeds_text(curve.seeds, unit)}" for curve in curves), *notes]


def _ranges(curves: Sequence[Curve]) -> str:
    """Returns a text on the seed ranges of families' values, '' if these differ."""
    [ranges, *others] = {curve.ranges for curve in curves}
    return f", each over {_seeds_text(ranges)}" if ranges and not others else ""


# ------------------------------------------------------------------------------------- one run


def _run(run: RunRecord) -> dict[str, Any]:
    """Returns the content of the page about one run."""
    notes = list(run.notes)
    grids = [("training images", run.reals)] if run.reals else []
    # The latest one is shown at the top of the page.
    grids += [(f"{kimg:g} kimg", path) for kimg, path in _spaced(run.samples, _MAX_GRIDS)[:-1]]
    pictures = [(caption, _picture(path, notes, f"{run.name}, {caption}"))
                for caption, path in grids]
    return {
        "record": run,
        "notes": notes,
        "training": [*_tick_cards([run], [run.name]), *_memory_cards(run)],
        "ticks": _spaced(run.ticks, _MAX_TICKS),
        "pictures": [(caption, picture) for caption, picture in pictures if picture],
        "over_kimg": _kimg_cards(run),
    }


def _memory_cards(run: RunRecord) -> list[Card]:
    found = {name: run.column(column) for name, column in _MEMORY.items()}
    found = {name: points for name, points in found.items() if any(y for _, y in points)}
    lines = [Line(*zip(*points, strict=True), series=i) for i, points in enumerate(found.values())]
    title = "Memory" if len(found) > 1 else f"Memory: {next(iter(found), '')}"
    return [Card(title, plot(lines, _KIMG, "GiB of rank 0", from_zero=True),
                 dict(enumerate(found)))] if found else []


def _kimg_cards(run: RunRecord) -> list[Card]:
    """Returns a plot of each group of scores that several networks of the run have."""
    cards = []
    for group, num_steps, points in over_kimg(run):
        if len(points) > 1:
            is_over_equals = len({tuple(spread.by_seeds) for spread in points.values()}) == 1
            cards.append(Card(
                _heading(group, num_steps), plot([_line(points)], _KIMG, group.title),
                caption="" if is_over_equals else "The points are over different seeds."))
    return cards
