"""The tables and pictures of docs/results.md and results/tables.md, from docs/results/.

    value     mean over seed ranges of the samples of a network, or over rounding draws
    cell      mean over training seeds +- their standard deviation
    damage    value at a harder setting minus value at the default setting, over the same seeds
    trend     slope of the damage over log2 D for finite D, computed for each training seed

Differences to D = inf are paired by training seed. Differences and trends have the 95% t interval
of the mean over training seeds (reports/training_seeds.py). They are decided if it excludes 0.
"""

import collections
import dataclasses
import io
import math
import re
import statistics
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dnnlib.atomic import atomic_write  # noqa: E402 - the path above
from dnnlib.cli import HELP_NAMES, UserError, user_errors  # noqa: E402
from metrics.score_names import SCORES_FILE  # noqa: E402
from reports.report_plots import look  # noqa: E402
from reports.run_record import RunRecord, read_scores  # noqa: E402
from reports.training_seeds import Difference  # noqa: E402
from training.config import OPTIONS_FILE  # noqa: E402

SAMPLES = "samples.npz"
FRECHET, KERNEL, ACCURACY, BITS_PER_DIM = (
    "frechet_distance", "kernel_distance", "class_accuracy", "bits_per_dim")
ALPHAS, ROUNDED = (0.1, 0.2, 0.4), (4, 5, 6, 8)
EVALUATIONS = (5, 7, 9, 13, 35)  # network evaluations per image
STEPS = {"heun": (3, 4, 5, 7, 18), "ipndm": EVALUATIONS}
ERRORS = ("gaussian", "kernel", "half", "twice", "uniform", "blur")
_ERROR_NAMES = {"gaussian": "Gaussian noise", "kernel": "kernel's noise", "half": "half the noise",
                "twice": "twice the noise", "uniform": "uniform noise", "blur": "blur"}
EARLY = (20, 40)  # kimg
KINDS = ("digits", "digits-small", "digits-ect")
_FEW_STEP = {"few_step": "ect", "solver": "consistency"}
LOW = 4  # below this D, the preconditioner's variance of the noise is wrong or infinite
Values = Mapping[float, Mapping[str, float]]  # by D, then by training seed
_LARGE = 1e5  # numbers from here on are shown with an exponent
_SIDE = 32  # side of a digit in the picture, in pixels
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)


@dataclasses.dataclass(frozen=True)
class Records:
    """The runs of the study by kind, 'digits', 'digits-small' and 'digits-ect'."""

    runs: dict[str, list[RunRecord]]
    held_out: dict[str, float]  # scores of held-out real digits

    @classmethod
    def read(cls, folder: Path) -> "Records":
        """Returns the records in a folder.

        Raises:
            OSError: a folder can't be read.
            ValueError: there are none, or one is damaged, or they do not agree.
        """
        runs: dict[str, list[RunRecord]] = {}
        for path in sorted(folder.glob("*-D*-seed*")):
            run = RunRecord.read(path)
            if problem := _problem(run):
                raise ValueError(f"{path}: {problem}; {_AGAIN}")
            runs.setdefault(path.name.rpartition("-D")[0], []).append(run)
        if "digits" not in runs:
            raise ValueError(f"{folder}: no records of runs; make them with python docs/study.py")
        for alike in runs.values():
            _check_agreement(alike)
        held_out = {score.metric: score.value for score in read_scores(folder / "held-out")}
        return cls(runs, held_out)

    def values(self, metric: str, kind: str = "digits", *, steps: int | None = 18,
               alpha: float = 0.0, bits: int = 32, kimg: int | None = None,
               is_first_range: bool = False, is_low: bool = False, **other: str) -> Values:
        """Returns the values of a point by D and training seed, by default of the newest networks.

        Args:
            metric: its recorded name.
            kind: the kind of the runs.
            steps: number of steps; None for scores without steps.
            alpha: strength of the noise before each step.
            bits: bits of the weights; fewer than 32 are rounded at random.
            kimg: kimg of earlier networks.
            is_first_range: use only the seeds that every point has.
            is_low: use only D below `LOW`, which are otherwise left out.
            other: other sampler settings.
        """
        found: dict[float, dict[str, float]] = {}
        for run in self.runs.get(kind, []):
            newest = max((score.kimg for score in run.scores if score.kimg), default=None)
            sought = {"metric": metric, "num_steps": steps, "noise_alpha": alpha, "bits": bits,
                      "other": tuple(sorted(other.items()))}
            values = [score.value for score in run.scores
                      if all(getattr(score, name) == value for name, value in sought.items())
                      and score.kimg in ((newest, None) if kimg is None else (kimg,))
                      and (score.rounding_seed is not None) == (bits < 32)
                      and (not is_first_range or score.seeds == self._first(run))]
            if values and (run.D < LOW) == is_low:
                found.setdefault(run.D, {})[str(run.options["seed"])] = statistics.fmean(values)
        return dict(sorted(found.items()))

    @staticmethod
    def _first(run: RunRecord) -> str:
        return next((score.seeds for score in run.scores
                     if score.metric == FRECHET and score.seeds.startswith("0-")), "")

    def damage(self, metric: str, **point) -> Values:
        """Returns the difference of a point from the default point, over the same seeds."""
        solver = {name: point[name] for name in ("solver",) if name in point}
        base_steps = point.pop("base_steps", 18)
        is_low = {"is_low": point.get("is_low", False)}
        base = self.values(metric, steps=base_steps, is_first_range=True, **solver, **is_low)
        hard = self.values(metric, is_first_range=True, **point)
        return {D: {seed: value - base[D][seed] for seed, value in by_seed.items()}
                for D, by_seed in hard.items()}


# What distinguishes the scores of a run.
_POINT = ("metric", "kimg", "num", "seeds", "num_steps", "noise_alpha", "bits", "rounding_seed",
          "detector", "reference", "other")
_NAME = re.compile(r".+-D(\d+(?:\.\d+)?|inf)-seed(\d+)")
_AGAIN = "make it anew with python docs/study.py"


def _points(run: RunRecord) -> list[tuple]:
    return [tuple(getattr(score, name) for name in _POINT) for score in run.scores]


def _shown(point: tuple) -> str:
    """Returns what a score is of, as text."""
    settings = dict(zip(_POINT, point, strict=True))
    other = settings.pop("other")
    return ", ".join(f"{name} {value}" for name, value in [*settings.items(), *other]
                     if value not in (None, ""))


def _problem(run: RunRecord) -> str | None:
    """Returns what is wrong with the files of a run: damage, or not those of the folder's name."""
    damage: list[str] = []
    read_scores(run.path, notes=damage)
    if damage:
        return damage[0]
    D, seed = run.D, run.options.get("seed")
    if D is None or seed is None:
        return f"{OPTIONS_FILE} is missing or damaged, or has no D and seed"
    name = _NAME.fullmatch(run.path.name)
    if not name or (float(name[1]), name[2]) != (D, str(seed)):
        return f"its options have D = {name_of(D)} and the seed {seed}, but its name differs"
    for score in run.scores:
        if score.D != D:
            return f"{SCORES_FILE} has a score of D = {name_of(score.D)}"
        if score.metric == FRECHET and score.value <= 0:
            return f"{SCORES_FILE} has a Frechet distance of {score.value:g}, which must be above 0"
    for point, number in collections.Counter(_points(run)).items():
        if number > 1:
            return f"{SCORES_FILE} has {number} scores of {_shown(point)}"
    return None


def _check_agreement(runs: Sequence[RunRecord]) -> None:
    """Raises ValueError unless runs of one kind have the same seeds and scores at every D."""
    seeds: dict[float, set[str]] = {}
    for run in runs:
        seeds.setdefault(run.D, set()).add(str(run.options["seed"]))
    usual = _most_common(map(frozenset, seeds.values()))
    for run in runs:
        if seeds[run.D] != usual:
            found, others = (", ".join(sorted(each)) for each in (seeds[run.D], usual))
            raise ValueError(f"{run.path}: D = {name_of(run.D)} has the training seeds {found}, but "
                             f"most others have {others}; complete them with python docs/study.py")
    for is_low in (False, True):
        points = {run.path: frozenset(_points(run)) for run in runs if (run.D < LOW) == is_low}
        usual = _most_common(points.values())
        for path, found in points.items():
            for what, others in (("has no score", usual - found), ("has a score", found - usual)):
                if others:
                    raise ValueError(f"{path}: unlike most others, it {what} of "
                                     f"{min(map(_shown, others))}; {_AGAIN}")


def _most_common(sets: Iterable[frozenset]) -> frozenset:
    return next((each for each, _ in collections.Counter(sets).most_common(1)), frozenset())


def check_complete(records: Records) -> None:
    """Raises ValueError unless the records have all that the tables and pictures show."""
    for kind in KINDS:
        dims = {run.D for run in records.runs.get(kind, [])}
        if math.inf not in dims or sum(LOW <= D < math.inf for D in dims) < 2:
            raise ValueError(f"{kind}-D*-seed*: needs runs of D = inf and of two finite D from "
                             f"{LOW} on; make them with python docs/study.py")
    for kind, metric, point in _needed(records):
        if not records.values(metric, kind, **point):
            names = {"is_low": f"D < {LOW}", "is_first_range": "seeds from 0"}
            settings = "".join(f", {names.get(name) or f'{name} {value}'}"
                               for name, value in point.items() if value is not False)
            raise ValueError(f"{kind}-D*-seed*: no scores of {metric}{settings}; make them with "
                             "python docs/study.py")


def _needed(records: Records) -> Iterator[tuple[str, str, dict]]:
    """Yields kind, metric and arguments of `Records.values` of all that is shown."""
    settings = [dict(score.other) for run in records.runs["digits"] for score in run.scores]
    for is_low in (False, True):
        for metric in (FRECHET, KERNEL, ACCURACY):
            yield "digits", metric, {"is_low": is_low}
        yield "digits", BITS_PER_DIM, {"is_low": is_low, **_likelihood_point(records)}
        for alpha in (0.0, *ALPHAS):
            yield "digits", ACCURACY, {"is_low": is_low, "alpha": alpha, "is_first_range": True}
    for metric in ("nearest_distance", "nearer_than_held_out", "c_t"):
        yield "digits", metric, {"steps": 9, "solver": "ipndm"}
    points = [{"alpha": alpha} for alpha in ALPHAS] + [{"bits": bits} for bits in ROUNDED]
    points += [{"steps": steps} | ({} if solver == "heun" else {"solver": solver})
               for solver in STEPS for steps in STEPS[solver]]
    for point in points:
        yield "digits", FRECHET, {**point, "is_first_range": True}
    for error in ERRORS:
        state = {"off_level": f"{error}, restored"}
        yield "digits", "psnr", {"steps": 9, **next(
            (each for each in settings if state.items() <= each.items()), state)}
    for metric in (FRECHET, ACCURACY):
        for kimg in EARLY:
            yield "digits", metric, {"kimg": kimg}
        yield "digits-small", metric, {}
        for steps in (1, 2):
            yield "digits-ect", metric, {"steps": steps, **_FEW_STEP}


def to_inf(values: Values) -> dict[float, Difference]:
    """Returns the differences to D = inf, paired by training seed."""
    return {D: Difference.of(by_seed, values[math.inf]) for D, by_seed in values.items()
            if math.inf != D and math.inf in values}


def trend(values: Values) -> Difference:
    """Returns the slope of values over log2 D for finite D from `LOW` on, by training seed."""
    dims = [D for D in values if LOW <= D < math.inf]
    seeds = set.intersection(*(set(values[D]) for D in dims))
    x = [math.log2(D) for D in dims]
    return Difference({seed: statistics.linear_regression(x, [values[D][seed] for D in dims]).slope
                       for seed in sorted(seeds)})


def logarithms(values: Values) -> Values:
    """Returns the base-2 logarithms of the values."""
    return {D: {seed: math.log2(value) for seed, value in by_seed.items()}
            for D, by_seed in values.items()}


def name_of(D: float) -> str:
    """Returns D as text."""
    return f"{D:g}"


# -------------------------------------------------------------------------------------- tables


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as a Markdown table; the first row has the titles."""
    head, *body = rows
    return "\n".join("| " + " | ".join(cells) + " |"
                     for cells in [head, ["---"] * len(head), *body])


def cell(by_seed: Mapping[str, float] | None, decimals: int) -> str:
    """Returns mean and standard deviation over training seeds; large means have fewer digits."""
    if not by_seed:
        return ""
    numbers = list(by_seed.values())
    mean = statistics.fmean(numbers)
    decimals = max(min(decimals, 4 - math.ceil(math.log10(max(abs(mean), 1)))), 0)
    style = f".{decimals}f" if abs(mean) < _LARGE else ".2g"
    spread = f" ± {statistics.stdev(numbers):{style}}" if len(numbers) > 1 else ""
    return f"{mean:{style}}{spread}"


def interval(difference: Difference | None, decimals: int) -> str:
    """Returns mean and half width of the interval, in bold if the difference is decided."""
    if difference is None or difference.half_width is None:
        return ""
    text = f"{difference.mean:+.{decimals}f} ± {difference.half_width:.{decimals}f}"
    return f"**{text}**" if difference.is_decided else text


def over_D(columns: Sequence[tuple[str, Values, int]]) -> str:
    """Returns a table with a row for each D; a column has its title, values and decimals."""
    dims = sorted({D for _, values, _ in columns for D in values})
    return markdown([["D (± deviation)", *(title for title, *_ in columns)],
                     *([name_of(D), *(cell(values.get(D), decimals)
                                      for _, values, decimals in columns)] for D in dims)])


def differences(columns: Sequence[tuple[str, Values, int]], *, has_trend: bool = True) -> str:
    """Returns a table of the differences to D = inf; the last row has the trend of each column."""
    found = [(title, to_inf(values), trend(values), decimals)
             for title, values, decimals in columns]
    dims = sorted({D for _, by_D, *_ in found for D in by_D})
    rows = [["D - inf (± 95%)", *(title for title, *_ in columns)]]
    rows += [[name_of(D), *(interval(by_D.get(D), decimals) for _, by_D, _, decimals in found)]
             for D in dims]
    if has_trend:
        rows.append(["a doubling", *(interval(slope, decimals + 1)
                                     for *_, slope, decimals in found)])
    return markdown(rows)


Table = Callable[[Records], str]


def _base(records: Records, **point) -> list[tuple[str, Values, int]]:
    return [("Frechet distance", records.values(FRECHET, **point), 3),
            ("kernel distance", records.values(KERNEL, **point), 4),
            ("class accuracy", records.values(ACCURACY, **point), 3)]


def _likelihood_point(records: Records) -> dict:
    """Returns the settings of the first likelihood, as arguments of `Records.values`."""
    return next(({"steps": score.num_steps, **dict(score.other)} for run in records.runs["digits"]
                 for score in run.scores if score.metric == BITS_PER_DIM), {"steps": None})


def _likelihood(records: Records, **point) -> list[tuple[str, Values, int]]:
    point |= _likelihood_point(records)
    return [("held-out bits/dim", records.values(BITS_PER_DIM, **point), 3)]


def _memorised(records: Records) -> list[tuple[str, Values, int]]:
    return [("median distance", records.values("nearest_distance", steps=9, solver="ipndm"), 3),
            ("nearer than 5% of held-out",
             records.values("nearer_than_held_out", steps=9, solver="ipndm"), 3),
            ("C_T", records.values("c_t", steps=9, solver="ipndm"), 1)]


def _noise(records: Records, metric: str, decimals: int, **point
           ) -> list[tuple[str, Values, int]]:
    return [(f"alpha {alpha:g}", records.damage(metric, alpha=alpha, **point), decimals)
            for alpha in ALPHAS]


def _rounding(records: Records, metric: str, decimals: int) -> list[tuple[str, Values, int]]:
    return [(f"{bits} bits", records.damage(metric, bits=bits), decimals) for bits in ROUNDED]


def _of_evaluations(records: Records, solver: str) -> dict[int, Values]:
    """Returns the Frechet distances by number of evaluations."""
    other = {} if solver == "heun" else {"solver": solver}
    return {evaluations: records.values(FRECHET, steps=steps, is_first_range=True, **other)
            for steps, evaluations in zip(STEPS[solver], EVALUATIONS, strict=True)}


def _evaluations(records: Records) -> list[tuple[str, Values, int]]:
    return [(f"{solver}, {evaluations}", values, 2) for solver in STEPS
            for evaluations, values in _of_evaluations(records, solver).items()]


def _few_steps(records: Records) -> list[tuple[str, Values, int]]:
    """Returns the scores of few-step networks."""
    return [(f"{what}, {steps} step{'s' if steps > 1 else ''}",
             records.values(metric, "digits-ect", steps=steps, **_FEW_STEP), decimals)
            for metric, what, decimals in ((FRECHET, "Frechet distance", 2),
                                           (ACCURACY, "class accuracy", 3)) for steps in (1, 2)]


def _few_steps_differences(records: Records) -> list[tuple[str, Values, int]]:
    """Returns the scores of few-step networks, distances as their logarithms."""
    return [(title, values, decimals) if "accuracy" in title else
            (f"log2 of the {title}", logarithms(values), decimals)
            for title, values, decimals in _few_steps(records)]


def _off_level(records: Records) -> list[tuple[str, Values, int]]:
    found = []
    for error in ERRORS:
        other = next(dict(score.other) for run in records.runs["digits"] for score in run.scores
                     if dict(score.other).get("off_level") == f"{error}, restored")
        found.append((error, records.values("psnr", steps=9, **other), 2))
    return found


def _equal_errors(records: Records) -> list[tuple[str, Values, int]]:
    """Returns the PSNRs for errors that do not depend on D, as noise of the kernel does."""
    return [column for column in _off_level(records) if column[0] != "kernel"]


def _early(records: Records) -> list[tuple[str, Values, int]]:
    found = [(f"{kimg} kimg", records.values(FRECHET, kimg=kimg), 3) for kimg in EARLY]
    return [*found, ("small network", records.values(FRECHET, "digits-small"), 3)]


def _early_accuracy(records: Records) -> list[tuple[str, Values, int]]:
    found = [(f"accuracy, {kimg} kimg", records.values(ACCURACY, kimg=kimg), 3) for kimg in EARLY]
    return [*found, ("accuracy, small network", records.values(ACCURACY, "digits-small"), 3)]


TABLES: dict[str, Table] = {
    "answers": lambda records: markdown([["question", "measured", "figure", "answer"],
                                         *_named_once(answers(records))]),
    "base": lambda records: over_D([*_base(records), *_likelihood(records)]),
    "base_differences": lambda records: differences([*_base(records), *_likelihood(records)]),
    "low": lambda records: over_D([
        *_base(records, is_low=True), *_likelihood(records, is_low=True),
        ("accuracy, change at alpha 0.4", records.damage(ACCURACY, alpha=0.4, is_low=True), 3)]),
    "memorised": lambda records: over_D(_memorised(records)),
    "noise": lambda records: over_D(_noise(records, FRECHET, 2)),
    "noise_accuracy": lambda records: over_D(_noise(records, ACCURACY, 3)),
    "noise_differences": lambda records: differences(
        [*_noise(records, FRECHET, 2), *((f"accuracy, {title}", values, 3) for title, values, _
                                         in _noise(records, ACCURACY, 3))]),
    "rounding": lambda records: over_D(_rounding(records, FRECHET, 3)),
    "rounding_differences": lambda records: differences(_rounding(records, FRECHET, 3)),
    "evaluations": lambda records: over_D(_evaluations(records)),
    "evaluations_differences": lambda records: differences(
        [(title, logarithms(values), decimals) for title, values, decimals
         in _evaluations(records)]),
    "few_steps": lambda records: over_D(_few_steps(records)),
    "few_steps_differences": lambda records: differences(_few_steps_differences(records)),
    "off_level": lambda records: over_D(_off_level(records)),
    "off_level_differences": lambda records: differences(_equal_errors(records)),
    "early": lambda records: over_D([*_early(records), *_early_accuracy(records)]),
    "early_differences": lambda records: differences(
        [*_early(records), *_early_accuracy(records)]),
}
# The tables of each page, whose names are relative to the folder of the pages.
PAGES = {"results.md": {"answers"}, "results/tables.md": set(TABLES) - {"answers"}}


# ------------------------------------------------------------------------------------- answers


def answers(records: Records) -> Iterator[list[str]]:
    """Yields rows of question, measured quantity, value and answer."""
    of_base = [*_base(records), *_likelihood(records)]
    for (title, values, decimals), is_lower_better in zip(
            of_base, (True, True, False, True), strict=True):
        yield _best("a. Is a finite D better than D = inf?", title, values, decimals,
                    is_lower_better)
    noise = "b. Does noise in every step do more damage at larger D?"
    for title, values, decimals in _noise(records, FRECHET, 2):
        yield _rises(noise, f"Frechet distance, {title}", values, decimals + 1, 1)
    title, values, decimals = _noise(records, ACCURACY, 3)[-1]
    yield _rises(noise, f"class accuracy, {title}", values, decimals + 1, -1)
    for title, values, decimals in _rounding(records, FRECHET, 3):
        yield _rises("c. Do rounded weights do more damage at larger D? (Frechet distance)",
                     title, values, decimals + 1, 1)
    for title, values, decimals in _evaluations(records):
        if not title.endswith(", 35"):
            yield _rises("d. Are images from few evaluations worse at larger D? (log2 of the "
                         "Frechet distance)", f"{title} evaluations", logarithms(values),
                         decimals + 1, 1)
    for title, values, decimals in _few_steps_differences(records):
        sign = -1 if "accuracy" in title else 1
        yield _rises("d. Are few-step networks worse at larger D?", title, values, decimals + 1,
                     sign)
    for title, values, decimals in _equal_errors(records):
        if title == "gaussian":  # this state is on its level
            continue
        yield _rises("e. Is an image off its level restored worse at larger D? (PSNR)",
                     _ERROR_NAMES[title], values, decimals + 1, -1)
    for title, values, decimals in _early(records):
        yield _rises("f. Are early or small networks worse at larger D? (Frechet distance)",
                     title, values, decimals + 1, 1)


def _named_once(rows: Iterable[list[str]]) -> Iterator[list[str]]:
    """Yields the rows, without the question where it is that of the row above."""
    above = None
    for question, *cells in rows:
        yield ["" if question == above else question, *cells]
        above = question


def _best(question: str, title: str, values: Values, decimals: int, is_lower_better: bool
          ) -> list[str]:
    """Returns a row that compares the finite D of the best mean with D = inf."""
    sign = 1 if is_lower_better else -1
    found = to_inf(values)
    D = min(found, key=lambda D: sign * found[D].mean)
    verdict = {"better": "yes", "worse": "no"}.get(found[D].verdict(is_lower_better), "not decided")
    return [question, f"{title}, D = {name_of(D)} minus inf", interval(found[D], decimals), verdict]


def _rises(question: str, title: str, values: Values, decimals: int, sign: int) -> list[str]:
    """Returns a row on whether damage rises with D; `sign` is -1 if a lower value is damage."""
    slope = trend(values)
    answer = "not decided" if not slope.is_decided else "yes" if sign * slope.mean > 0 else "no"
    return [question, title, interval(slope, decimals), answer]


# ------------------------------------------------------------------------------------ pictures


def draw(records: Records) -> bytes:
    """Returns one picture, as PNG, with a plot for each of the questions a to f."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.2), layout="constrained")
    _draw_base(axes[0, 0], records)
    of_noise = {0.0: _zero(records)} | {
        alpha: values for alpha, (_, values, _) in zip(ALPHAS, _noise(records, FRECHET, 2),
                                                       strict=True)}
    _draw_lines(axes[0, 1], of_noise, "b. noise in every step, alpha", "Frechet distance added")
    of_bits = {bits: values for bits, (_, values, _) in zip(
        ROUNDED, _rounding(records, FRECHET, 3), strict=True)}
    _draw_lines(axes[0, 2], of_bits, "c. bits of randomly rounded weights",
                "Frechet distance added")
    axes[0, 2].set_yscale("symlog", linthresh=0.1)
    for solver in STEPS:
        _draw_lines(axes[1, 0], _of_evaluations(records, solver), "d. evaluations (dotted: ipndm)",
                    "Frechet distance", ":" if solver == "ipndm" else "-",
                    has_legend=solver == "heun")
    axes[1, 0].set_xscale("log")
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_xticks(EVALUATIONS, map(str, EVALUATIONS))
    axes[1, 0].minorticks_off()
    _draw_over_D(axes[1, 1], [(_ERROR_NAMES[error], *rest) for error, *rest in _off_level(records)],
                 "e. PSNR of restored digits, dB")
    axes[1, 1].legend(fontsize=8, ncols=2, loc="center", bbox_to_anchor=(0.5, 0.78))  # in the gap
    _draw_over_D(axes[1, 2], [*_early(records), ("120 kimg", records.values(FRECHET), 3)],
                 "f. Frechet distance")
    axes[1, 2].set_yscale("log")
    axes[1, 2].legend(fontsize=8, loc="upper right")
    axes[1, 2].set_ylim(0.1, 10)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()


def _zero(records: Records) -> Values:
    return {D: dict.fromkeys(by_seed, 0.0) for D, by_seed in records.values(FRECHET).items()}


def _errorbar(ax, xs: Sequence[float], points: Sequence[Mapping[str, float]], **style) -> None:
    means = [statistics.fmean(by_seed.values()) for by_seed in points]
    spreads = [statistics.stdev(by_seed.values()) if len(by_seed) > 1 else 0 for by_seed in points]
    ax.errorbar(xs, means, spreads, capsize=3, **style)


def _places(dims: Sequence[float]) -> list[int]:
    return list(range(len(dims)))


def _draw_base(ax, records: Records) -> None:
    values = records.values(FRECHET)
    dims = list(values)
    _errorbar(ax, _places(dims), list(values.values()), marker="o", color="black",
              label="Frechet distance")
    ax.set_xticks(_places(dims), map(name_of, dims))
    ax.set_xlabel("a. D")
    ax.set_ylabel("Frechet distance")
    other = ax.twinx()
    accuracy = records.values(ACCURACY)
    _errorbar(other, _places(dims), list(accuracy.values()), marker="s", color="tab:blue",
              linestyle="--", label="class accuracy")
    other.set_ylabel("class accuracy", color="tab:blue")


def _draw_over_D(ax, columns: Sequence[tuple[str, Values, int]], label: str) -> None:
    for number, (title, values, _) in enumerate(columns):
        dims = list(values)
        style = look(number)
        _errorbar(ax, _places(dims), list(values.values()), label=title, marker=style.mark,
                  linewidth=1, markersize=4)
    ax.set_xticks(_places(dims), map(name_of, dims))
    ax.set_xlabel("D")
    ax.set_ylabel(label)
    ax.legend(fontsize=8, loc="center right")


def _draw_lines(ax, by_x: Mapping[float, Values], x_label: str, y_label: str,
                linestyle: str = "-", *, has_legend: bool = True) -> None:
    dims = list(next(iter(by_x.values())))
    for number, D in enumerate(dims):
        xs = [x for x, values in by_x.items() if D in values]
        _errorbar(ax, xs, [by_x[x][D] for x in xs], marker=look(number).mark, markersize=4,
                  linewidth=1, linestyle=linestyle, color=f"C{number}",
                  label=f"D = {name_of(D)}" if has_legend else None)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    if has_legend:
        ax.legend(fontsize=8)


def show_samples(path: Path) -> bytes:
    """Returns digits as PNG, one row per D: without noise at the left, with it at the right.

    Raises:
        ValueError: the file of the samples is damaged.
    """
    import numpy as np

    from images.grid import image_grid
    try:
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged; {_AGAIN}") from error
    shapes = {(rows.dtype.name, *rows.shape) for rows in found.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 5 or shape[0] != "uint8":
        raise ValueError(f"{path}: must have uint8 images [B, C, H, W] of one shape for each D; "
                         f"{_AGAIN}")
    dims = [name.removeprefix("D") for name in found]
    picture = image_grid([list(rows) for rows in found.values()], [f"D = {D}" for D in dims],
                         split=shape[1] // 2, min_side=_SIDE,
                         halves=["as usual", "with noise, alpha = 0.4"])
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def written(page: str, names: Collection[str], records: Records) -> str:
    """Returns the text of a page with updated tables.

    Raises:
        ValueError: it does not have each of the named tables once, or has others.
    """
    found = [match[2] for match in _TABLE.finditer(page)]
    if wrong := sorted(set(names) ^ set(found) | {name for name in found if found.count(name) > 1}):
        raise ValueError(f"tables that are missing, repeated or unknown: {', '.join(wrong)}; each "
                         "stands once, between <!-- table: NAME --> and <!-- end -->")
    return _TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]](records)}\n{match[3]}", page)


def pages(folder: Path, records: Records) -> dict[Path, bytes]:
    """Returns the texts of all pages with updated tables.

    Raises:
        UserError: a page is not there.
        ValueError: tables of a page are missing, repeated or unknown.
    """
    texts = {}
    for name, tables in PAGES.items():
        page = folder / name
        if not page.is_file():
            raise UserError(f"{page}: no such file; name the folder of results.md by --out")
        try:
            texts[page] = written(page.read_text(encoding="utf-8"), tables, records).encode()
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
    return texts


@click.command(context_settings=HELP_NAMES)
@click.option("--records", metavar="DIR", type=click.Path(path_type=Path), default="docs/results", show_default=True, help="Records of the runs, as docs/study.py keeps them.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), default="docs", show_default=True, help="Folder of the pictures, results.md and results/tables.md, whose tables are made anew.")
@click.option("--only", metavar="TABLE", type=click.Choice(list(TABLES)), help="Print this table only, and write nothing.")
def main(records: Path, out: Path, only: str | None) -> None:
    """Makes the tables and pictures of results.md and results/tables.md from the study's records."""
    with user_errors():
        found = Records.read(records)
        check_complete(found)
        if only:
            print(TABLES[only](found))
            return
        files = pages(out, found)
        if (records / SAMPLES).exists():
            files[out / "results-samples.png"] = show_samples(records / SAMPLES)
        files[out / "results-scores.png"] = draw(found)
        for path, content in files.items():
            with atomic_write(path) as file:
                file.write(content)
        print(f"{out}: wrote {', '.join(str(path.relative_to(out)) for path in files)}")


if __name__ == "__main__":
    main()
