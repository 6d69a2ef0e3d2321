"""A report of runs as one HTML page that refers to nothing outside of itself.

Pictures, plots and CSV files are inside. Every text that comes from a run's files goes through
`html.escape`; there is no script.
"""

import base64
import csv
import html
import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import PIL.Image

from images.image_files import DAMAGE
from reports.comparison import Comparison, Curve, ScoreGroup, Spread, compare, over_kimg
from reports.report_plots import Axis, Level, Line, look, plot
from reports.run_record import RunRecord
from sampling.sweeps import FULL_BITS

_MAX_GRIDS = 6  # of samples over time
_MAX_SIDE = 1024  # pixels of an embedded picture
_MAX_PAIRS = 10  # seeds
_MAX_NAME = 60  # characters of a run's name in legends and tables
_MAX_NARROW = 4  # runs whose tables fit three beside each other
_FEW_IMAGES = 2048  # of a score; below, its own noise is large. Inception has 2,048 features
_UNSHARED = ("started",)  # settings that differ between any two runs
_SCORE_FIELDS = ("metric", "value", "kimg", "D", "num", "seeds", "num_steps", "noise_alpha", "bits",
                 "detector", "reference", "reference_sha256", "network")
_TICK_FIELDS = ("kimg", "loss", "lr", "bad_steps", "images_per_sec", "cpu_mem_gb", "gpu_mem_gb")
_TICK_PLOTS = (  # title, column, unit, whether from zero
    ("Loss", "loss", "loss, mean over a tick", False),
    ("Steps skipped", "bad_steps", "steps without finite gradients, in all", True),
    ("Learning rate", "lr", "learning rate", True),
    ("Speed", "images_per_sec", "images a second", True))
_AXES = {
    "noise_alpha": ("Noise before each step", "alpha, noise / noise level"),
    "num_steps": ("Steps", "network evaluations per image (NFE)"),
    "bits": ("Rounded weights", f"bits of the weights; {FULL_BITS}: as trained"),
}
_POINTS = {"noise_alpha": "alpha {:g}", "num_steps": "{:g} steps", "bits": "{:g} bits"}
_NO_RANKING = ("Losses at different D are not to be ranked: noise of small D has heavy tails, and "
               "so has its loss.")

_NBSP = "\u00a0"  # a space that does not break

_text = html.escape
_CSS = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def render(runs: Sequence[RunRecord], title: str | None = None) -> str:
    """Returns the page.

    Args:
        runs: what to report, in the order of the page.
        title: heading; the names of the runs where there is none.
    """
    title = title or "Report: " + ", ".join(_short(run.name) for run in runs)
    body = [f"<h1>{_text(title)}</h1>", _downloads(runs)]
    if len(runs) > 1:
        links = "".join(f'<a href="#run{i}">{_text(_short(run.name))}</a>'
                        for i, run in enumerate(runs))
        body += [f'<nav><a href="#comparison">Comparison</a>{links}</nav>']
    comparisons = compare(runs)
    body += [*_overview(runs, comparisons), *_comparison(runs, comparisons), *_pairs(runs)]
    for i, run in enumerate(runs):
        body += _run_section(i, run)
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(title)}</title>\n<style>\n{_CSS}</style>\n</head>\n<body>\n"
            + "\n".join(body) + "\n</body>\n</html>\n")


# ---------------------------------------------------------------------------- parts of HTML


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[:_MAX_NAME - 1] + "…"


def _number(value: float | None, digits: int = 5) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _decimals(values: Iterable[float], digits: int = 4) -> int:
    """Returns the decimals that show the largest value with so many digits."""
    largest = max((abs(value) for value in values), default=0)
    return min(max(digits - 1 - math.floor(math.log10(largest)), 0), 10) if largest else 0


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Returns a table of plain texts, the first columns to the left."""
    head = "".join(f"<th>{_cell(cell)}</th>" for cell in header)
    lines = "".join(
        "<tr>" + "".join(f"<td{' class=text' if i < text_columns else ''}>{_cell(cell)}</td>"
                         for i, cell in enumerate(row)) + "</tr>\n" for row in rows)
    return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{lines}</tbody></table></div>")


def _cell(text: str) -> str:
    """Returns the text with its second line, if any, set apart; names and ranges may break."""
    first, line, second = text.replace(_NBSP, " ").partition("\n")
    second = _text(second).replace("..", "..<wbr>")
    return _text(first) + (f'<span class="soft">{second}</span>' if line else "")


def _card(title: str, *parts: str) -> str:
    return f'<figure class="card"><h4>{_text(title)}</h4>{"".join(parts)}</figure>'


def _caption(text: str) -> str:
    return f'<p class="soft">{_text(text)}</p>'


def _cards(cards: Sequence[str], *, is_wide: bool = False) -> list[str]:
    kind = "cards wide" if is_wide else "cards"
    return [f'<div class="{kind}">', *cards, "</div>"] if cards else []


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _notes(lines: Iterable[str]) -> list[str]:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return [f'<ul class="notes">{items}</ul>'] if items else []


def _legend(entries: Iterable[tuple[int, str, bool]]) -> str:
    """Returns the legend of (series, name, whether it is a level)."""
    items = []
    for series, name, is_level in entries:
        mark = "- -" if is_level else look(series).glyph
        items.append(f'<li><b style="color:var(--{look(series).colour})">{mark}</b> '
                     f"{_text(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>' if len(items) > 1 else ""


def _data_link(name: str, text: str, rows: Sequence[Sequence]) -> str:
    """Returns a link that saves rows as a CSV file, which is inside the page."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    data = base64.b64encode(buffer.getvalue().encode()).decode()
    return f'<a download="{name}" href="data:text/csv;base64,{data}">{text}</a>'


def _picture(path: Path, notes: list[str], alt: str) -> str | None:
    """Returns a picture of at most `_MAX_SIDE` pixels, None with a note where it can't be read."""
    try:
        with PIL.Image.open(path) as image:
            image.load()
            image = image if image.mode in ("L", "RGB") else image.convert("RGB")
            image.thumbnail((_MAX_SIDE, _MAX_SIDE))
            buffer = io.BytesIO()
            image.save(buffer, "PNG", optimize=True)
    except (*DAMAGE, PIL.Image.DecompressionBombError):
        notes.append(f"{path.name} can't be read as a picture")
        return None
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f'<img alt="{_text(alt)}" width="{image.width}" height="{image.height}" '
            f'src="data:image/png;base64,{data}">')


# ------------------------------------------------------------------------------- comparison


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Returns what runs are called in legends: their D where that tells them apart."""
    dims = [run.D for run in runs]
    if None not in dims and len(set(dims)) == len(dims):
        return [f"D{_NBSP}={_NBSP}{D:.15g}" for D in dims]
    return [_short(run.name) for run in runs]


def _downloads(runs: Sequence[RunRecord]) -> str:
    scores = [["run", *_SCORE_FIELDS, "other"]]
    ticks = [["run", *_TICK_FIELDS]]
    for run in runs:
        scores += [[run.name, *(getattr(score, name) for name in _SCORE_FIELDS),
                    " ".join(f"{key}={value}" for key, value in score.other)]
                   for score in run.scores]
        ticks += [[run.name, *(tick.get(name, "") for name in _TICK_FIELDS)] for tick in run.ticks]
    written = time.strftime("%Y-%m-%d %H:%M")
    return (f'<p class="soft">Written {written}. Numbers as CSV: '
            + _data_link("scores.csv", f"{len(scores) - 1} scores", scores) + ", "
            + _data_link("ticks.csv", f"{len(ticks) - 1} ticks", ticks) + ".</p>")


def _overview(runs: Sequence[RunRecord], comparisons: Sequence[Comparison]) -> list[str]:
    """Returns the scores in short, the table of runs, and the settings that differ."""
    if len(runs) == 1:
        return []
    parts = ['<h2 id="comparison">Comparison</h2>']
    for comparison, heading in zip(comparisons, _headings(comparisons), strict=True):
        if len(comparison.over_D) > 1:
            parts += [f"<h3>In short: {_text(heading)}</h3>", *_in_short(comparison, _names(runs))]
    rows = []
    for run in runs:
        last = run.ticks[-1] if run.ticks else {}
        rows.append([_short(run.name), "" if run.D is None else f"{run.D:.15g}",
                     *(_number(last.get(name)) for name in ("kimg", "loss", "bad_steps")),
                     _number(last.get("images_per_sec"), 4), str(len(run.scores))])
    parts += ["<h3>Runs</h3>", _table(
        ["run", "D", "kimg", "loss", "steps skipped", "images/s", "number of scores"], rows)]
    titles = dict.fromkeys(title for run in runs for title in run.settings)
    differing = [title for title in titles if title not in _UNSHARED
                 and len({run.settings.get(title) for run in runs}) > 1]
    if differing:
        parts += ["<h3>Settings that differ</h3>", _table(
            ["", *(_short(run.name) for run in runs)],
            [[title, *(run.settings.get(title, "") for run in runs)] for title in differing])]
    return parts


def _in_short(comparison: Comparison, names: Sequence[str]) -> list[str]:
    """Returns the base point of each run and its changes at the hardest points, as a table."""
    hardest = comparison.hardest
    changes = {axis: {curve.run: curve.change(x, comparison.base[axis])
                      for curve in comparison.over[axis]} for axis, x in hardest.items()}
    bases = {curve.run: spread for curve, spread in _base_points(comparison)}
    decimals = _decimals(x for spread in bases.values() for x in spread.values)
    rows = [[names[run], _spread(base, decimals), str(len(base.values)),
             *(_change(of_runs.get(run), base, decimals) for of_runs in changes.values())]
            for run, base in bases.items()]
    steps = f"{comparison.num_steps} steps, " if comparison.num_steps else ""
    text = (f"The score at {steps}no noise, weights as trained: mean and lowest..highest over all "
            "seed ranges.")
    if hardest:
        seeds = {curve.seeds for axis in hardest for curve in comparison.over[axis]}
        which = f", {_seeds_text(seeds.pop())}" if len(seeds) == 1 else ""
        text += (" Then its change at the strongest noise, the fewest steps and the fewest bits "
                 f"that were scored, over the same seeds at both ends{which}.")
    if comparison.group.is_lower_better is not None:
        text += f" {'Lower' if comparison.group.is_lower_better else 'Higher'} is better."
    header = ["run", "score", "seed ranges", *(_POINTS[axis].format(x)
                                               for axis, x in hardest.items())]
    return [f'<p class="soft">{_text(text)}</p>', *_notes(_few_images([comparison.group.num])),
            _table(header, rows)]


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


def _few_images(nums: Iterable[int | None]) -> list[str]:
    """Returns a note where a score is of few images."""
    few = sorted({num for num in nums if num and num < _FEW_IMAGES})
    return [f"Scores of few images ({', '.join(map(str, few))}, fewer than {_FEW_IMAGES:,}): "
            "differences within the spread of seed ranges, and somewhat beyond, tell nothing."
            ] if few else []


def _comparison(runs: Sequence[RunRecord], comparisons: Sequence[Comparison]) -> list[str]:
    """Returns the training of all runs, and per group of scores the plots and tables."""
    names, parts = _names(runs), []
    cards = [_card_of_all(runs, names, *which) for which in _TICK_PLOTS] if len(runs) > 1 else []
    if cards := list(filter(None, cards)):
        parts += ["<h3>Training</h3>", *_cards(cards)]
    for comparison, heading in zip(comparisons, _headings(comparisons), strict=True):
        cards = [_card_over_D(comparison, names)] if len(comparison.over_D) > 1 else []
        cards += [_card_over(axis, curves, comparison, names)
                  for axis, curves in comparison.over.items()]
        if cards:
            parts += _comparison_head(comparison, heading, names)
            parts += _cards(cards, is_wide=len(comparison.over_D) > _MAX_NARROW)
    return parts


def _headings(comparisons: Sequence[Comparison]) -> list[str]:
    """Returns a heading of each, with the reference where nothing else tells two apart."""
    plain = [_heading(comparison.group) for comparison in comparisons]
    return [heading if plain.count(heading) == 1 else
            f"{heading}, detector {comparison.group.detector or 'unknown'}, reference "
            f"{comparison.reference} {comparison.group.reference[:8]}"
            for heading, comparison in zip(plain, comparisons, strict=True)]


def _heading(group: ScoreGroup, num_steps: int | None = None) -> str:
    return ", ".join([group.title, *([f"{group.num} images"] if group.num else []),
                      *([f"{num_steps} steps"] if num_steps else []),
                      *(f"{key} {value}" for key, value in group.other)])


def _card_of_all(runs: Sequence[RunRecord], names: Sequence[str], title: str, column: str,
                 unit: str, from_zero: bool) -> str:
    """Returns a plot of one number of the ticks of all runs, '' where it tells nothing."""
    found = [(i, points) for i, run in enumerate(runs) if (points := run.column(column))]
    if column == "lr" or not any(value for _, points in found for _, value in points):
        return ""
    lines = [Line(*zip(*points, strict=True), series=i) for i, points in found]
    is_ranked = column != "loss" or len({runs[i].D for i, _ in found}) == 1
    return _card(title, _legend((i, names[i], False) for i, _ in found),
                 plot(lines, Axis("images seen, kimg"), unit, from_zero=from_zero),
                 "" if is_ranked else _caption(_NO_RANKING))


def _comparison_head(comparison: Comparison, heading: str, names: Sequence[str]) -> list[str]:
    group = comparison.group
    facts = [", ".join(names[curve.run] for curve in comparison.over_D),
             f"{group.num} images" if group.num else "", f"detector {group.detector}",
             f"reference {comparison.reference}" if comparison.reference else "",
             f"{comparison.num_steps} steps unless said otherwise" if comparison.num_steps else "",
             *(f"{key} {value}" for key, value in group.other)]
    kimgs = {curve.kimg for curve in comparison.over_D}
    notes = ["The networks compared are of different kimg: " + ", ".join(
        f"{_number(kimg)}" if kimg is not None else "unknown" for kimg in sorted(
            kimgs, key=lambda kimg: kimg or 0))] if len(kimgs) > 1 else []
    return [f"<h3>{_text(heading)}</h3>",
            _caption(f"{', '.join(filter(None, facts))}. Points are means over seed ranges, bars "
                     "and the second line of a cell reach from the lowest to the highest."),
            *_notes([*notes, *_few_images([group.num])])]


def _spread(spread: Spread | None, decimals: int) -> str:
    if spread is None:
        return ""
    mean, low, high = (f"{x:.{decimals}f}" for x in (spread.mean, spread.low, spread.high))
    return mean if len(spread.values) == 1 else f"{mean}\n{low}..{high}"


def _base_points(comparison: Comparison) -> list[tuple[Curve, Spread]]:
    return [(curve, next(iter(curve.points.values()))) for curve in comparison.over_D]


def _card_over_D(comparison: Comparison, names: Sequence[str]) -> str:
    known = _base_points(comparison)
    decimals = _decimals(x for _, spread in known for x in spread.values)
    rows = [[names[curve.run], _number(curve.kimg),
             *(f"{x:.{decimals}f}" for x in (spread.mean, spread.low, spread.high)),
             str(len(spread.values))] for curve, spread in known]
    legend = _legend((curve.run, names[curve.run], _is_diffusion(curve)) for curve, _ in known
                     if curve.D is not None)
    return _card("Over D", legend, _plot_over_D(known, comparison.group.title), _table(
        ["run", "kimg", "mean", "lowest", "highest", "ranges"], rows))


def _is_diffusion(curve: Curve) -> bool:
    return curve.D is not None and math.isinf(curve.D)


def _plot_over_D(known: Sequence[tuple[Curve, Spread]], y_label: str) -> str:
    """Returns finite D as points and D = inf as a level, '' where no D is finite."""
    finite = sorted(((curve.D, spread, curve.run) for curve, spread in known
                     if curve.D is not None and not _is_diffusion(curve)), key=lambda item: item[0])
    if not finite:
        return ""
    lines = [Line([D for D, *_ in finite], [spread.mean for _, spread, _ in finite], series=None)]
    lines += [Line([D], *_ends([spread]), run) for D, spread, run in finite]
    levels = [Level(spread.mean, spread.low, spread.high, curve.run) for curve, spread in known
              if _is_diffusion(curve)]
    ticks = {D: f"{D:.15g}" for D, *_ in finite}
    return plot(lines, Axis("augmented dimensions D", ticks, is_log=True), y_label, levels)


def _ends(spreads: Sequence[Spread]) -> tuple[list[float], list[float], list[float]]:
    return ([spread.mean for spread in spreads], [spread.low for spread in spreads],
            [spread.high for spread in spreads])


def _card_over(axis: str, curves: Sequence[Curve], comparison: Comparison,
               names: Sequence[str]) -> str:
    title, label = _AXES[axis]
    values = sorted({x for curve in curves for x in curve.points})
    shown, x_axis = _positions(axis, values, label, comparison.group.evaluations)
    lines = [Line([shown(x) for x in curve.points], *_ends(list(curve.points.values())), curve.run)
             for curve in curves]
    head = {"noise_alpha": "alpha", "num_steps": "steps (NFE)", "bits": "bits"}[axis]
    decimals = [_decimals(y for spread in curve.points.values() for y in spread.values)
                for curve in curves]
    rows = [[f"{x:g}" + (f" ({shown(x)})" if axis == "num_steps" else ""),
             *(_spread(curve.points.get(x), places)
               for curve, places in zip(curves, decimals, strict=True))] for x in values]
    return _card(title, _legend((curve.run, names[curve.run], False) for curve in curves),
                 plot(lines, x_axis, comparison.group.title),
                 _table([head, *(names[curve.run] for curve in curves)], rows),
                 *_seeds_of(axis, curves, names))


def _seeds_of(axis: str, curves: Sequence[Curve], names: Sequence[str]) -> list[str]:
    """Returns what the values of a card are over, with a note where that is not one thing."""
    notes = [f"{names[curve.run]}: its points share no seed range; left out: "
             + ", ".join(_POINTS[axis].format(x) for x in curve.left_out)
             for curve in curves if curve.left_out]
    kinds = dict.fromkeys(curve.seeds for curve in curves)
    if len(kinds) > 1:
        notes = ["The runs are scored over different seeds: " + "; ".join(
            f"{names[curve.run]} over {_seeds_text(curve.seeds)}" for curve in curves), *notes]
        return _notes(notes)
    return [_caption(f"Every value is over {_seeds_text(curves[0].seeds)}."), *_notes(notes)]


def _seeds_text(seeds: Sequence[str]) -> str:
    """Returns seed ranges in words: how many, and which."""
    count = "1 seed range" if len(seeds) == 1 else f"{len(seeds)} seed ranges"
    return f"{count} ({', '.join(seeds)})" if all(seeds) else count


def _positions(axis: str, values: Sequence[float], label: str,
               evaluations: Callable[[int], int]) -> tuple[Callable[[float], float], Axis]:
    """Returns (where a value is drawn, the axis); bits are evenly spaced, for 32 is far off."""
    if axis == "bits":
        places = {bits: place for place, bits in enumerate(values)}
        ticks = {place: f"{bits:g}" for bits, place in places.items()}
        return places.__getitem__, Axis(label, ticks)
    if axis == "num_steps":
        return evaluations, Axis(label, {evaluations(n): str(evaluations(n)) for n in values})
    return float, Axis(label)


def _pairs(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the images of the same seeds by every run, below each other."""
    found = [(name, run.sample_folder) for name, run in zip(_names(runs), runs, strict=True)
             if run.sample_folder]
    if not found:
        return []
    settings = found[0][1].settings
    same = [(name, folder) for name, folder in found if folder.settings == settings]
    notes = [f"{name}: left out, its images were made by other settings of the sampler"
             for name, folder in found if folder.settings != settings]
    seeds = sorted(set.intersection(*(set(folder.paths) for _, folder in same)))[:_MAX_PAIRS]
    rows = []
    for name, folder in same:
        cells = [f"<td>{_picture(folder.paths[seed], notes, f'{name}, seed {seed}') or ''}</td>"
                 for seed in seeds]
        rows.append(f"<tr><th>{_text(name)}</th>{''.join(cells)}</tr>")
    if len(same) < 2 or not seeds:
        return []
    head = "".join(f"<th>{seed}</th>" for seed in seeds)
    how = ", ".join(f"{key.replace('num_steps', 'steps')} {value}" for key, value in settings)
    kimg = ", ".join(dict.fromkeys(f"{folder.kimg:g}" for _, folder in same))
    return ["<h3>The same seeds at every D</h3>",
            f'<p class="soft">Draws are paired: seed k starts from the same direction of noise at '
            f"every D. Here: {_text(how)}, {kimg} kimg.</p>", *_notes(notes),
            f'<div class="card scroll"><table class="pairs"><thead><tr><th>seed</th>{head}</tr>'
            f"</thead><tbody>{''.join(rows)}</tbody></table></div>"]


# -------------------------------------------------------------------------------- one run


def _run_section(i: int, run: RunRecord) -> list[str]:
    notes = list(run.notes)
    pictures = _sample_cards(run, notes)
    settings = "".join(f"<div><dt>{_text(title)}</dt><dd>{_text(value)}</dd></div>"
                       for title, value in run.settings.items())
    parts = [f'<h2 id="run{i}">{_text(run.name)}</h2>',
             f'<p class="soft">{_text(str(run.path))}</p>', *_notes(notes)]
    parts += [f'<dl class="card settings">{settings}</dl>'] if settings else []
    if cards := _tick_cards(run):
        parts += ["<h3>Training</h3>", *_cards(cards), _ticks_table(run)]
    if pictures:
        parts += ["<h3>Samples over time</h3>", '<div class="pictures">', *pictures, "</div>"]
    if run.scores:
        parts += ["<h3>Scores</h3>", *_notes(_few_images(score.num for score in run.scores)),
                  *_cards(_kimg_cards(run)), _scores_table(run)]
    return parts


def _tick_cards(run: RunRecord) -> list[str]:
    axis, cards = Axis("images seen, kimg"), []
    for title, column, unit, from_zero in _TICK_PLOTS:
        points = run.column(column)
        if points and column == "bad_steps" and not any(y for _, y in points):
            cards.append(_card(title, _caption("None: the gradients of every step were finite.")))
        elif points:
            line = Line(*zip(*points, strict=True))
            cards.append(_card(title, plot([line], axis, unit, from_zero=from_zero)))
    memory = [(name, run.column(column)) for name, column in
              (("main memory", "cpu_mem_gb"), ("GPU, peak of a tick", "gpu_mem_gb"))]
    memory = [(name, points) for name, points in memory if any(y for _, y in points)]
    if memory:
        lines = [Line(*zip(*points, strict=True), series=i) for i, (_, points) in enumerate(memory)]
        legend = _legend((i, name, False) for i, (name, _) in enumerate(memory))
        title = "Memory" if len(memory) > 1 else f"Memory: {memory[0][0]}"
        cards.append(_card(title, legend, plot(lines, axis, "GiB of rank 0", from_zero=True)))
    return cards


def _spaced(items: Sequence, count: int) -> list:
    """Returns at most `count` items, evenly spaced, the first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _ticks_table(run: RunRecord) -> str:
    ticks = _spaced(run.ticks, 20)
    shown = f"{len(ticks)} of {len(run.ticks)} ticks" if len(ticks) < len(run.ticks) else "ticks"
    return _folded(f"Numbers of {shown}", _table(
        ["kimg", "loss", "learning rate", "steps skipped", "images/s", "memory, GiB", "GPU, GiB"],
        [[_number(tick.get(name)) for name in _TICK_FIELDS] for tick in ticks], text_columns=0))


def _sample_cards(run: RunRecord, notes: list[str]) -> list[str]:
    chosen = [("training images", run.reals)] if run.reals else []
    chosen += [(f"{kimg:g} kimg", path) for kimg, path in _spaced(run.samples, _MAX_GRIDS)]
    cards = []
    for caption, path in chosen:
        if picture := _picture(path, notes, f"{run.name}, {caption}"):
            cards.append(f'<figure class="card">{picture}<figcaption>{caption}</figcaption>'
                         "</figure>")
    return cards


def _kimg_cards(run: RunRecord) -> list[str]:
    cards = []
    for group, num_steps, points in over_kimg(run):
        if len(points) > 1:
            line = Line(list(points), *_ends(list(points.values())))
            is_over_equals = len({tuple(spread.by_seeds) for spread in points.values()}) == 1
            cards.append(_card(
                _heading(group, num_steps), plot([line], Axis("images seen, kimg"), group.title),
                "" if is_over_equals else _caption("The points are over different seeds.")))
    return cards


def _scores_table(run: RunRecord) -> str:
    header = ["metric", "detector", "reference", "seeds", "num", "kimg", "steps", "alpha", "bits",
              "other", "value"]
    rows = [[score.metric, score.detector, score.reference, score.seeds,
             "" if score.num is None else str(score.num), _number(score.kimg, 9),
             "" if score.num_steps is None else str(score.num_steps), f"{score.noise_alpha:g}",
             str(score.bits), " ".join(f"{k}={v}" for k, v in score.other), _number(score.value)]
            for score in run.scores]
    return _folded(f"All {len(rows)} scores", _table(header, rows, text_columns=4))
