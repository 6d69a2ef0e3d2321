"""Scores of several runs side by side, as plain data; no PyTorch is needed.

Only scores of one group are compared. They share the metric, detector, number of images, reference
and all sampler settings except steps, alpha and bits. The base point of a group is alpha = 0,
32 bits and its most frequent number of steps, at the last kimg at which a run was scored. Around
it, one setting varies at a time, and all points of a curve use the same seeds. Of per-class scores,
only the mean over classes is compared.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from metrics.score_names import HIGHER_IS_BETTER, LIKELIHOODS, LOWER_IS_BETTER, title
from reports.run_record import MEAN_OF_CLASSES, RunRecord, Score
from sampling.sweeps import FULL_BITS

AXES = ("noise_alpha", "num_steps", "bits", "random_bits")
_USUAL_STEPS = 18  # of EDM and PFGM++ on CIFAR-10; breaks ties between equally frequent numbers


@dataclasses.dataclass(frozen=True)
class ScoreGroup:
    """The properties that scores must share to be compared."""

    metric: str
    detector: str
    num: int | None
    reference: str
    other: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, score: Score) -> "ScoreGroup":
        """Returns the group of a score; a reference is identified by its content, if known."""
        return cls(score.metric, score.detector, score.num,
                   score.reference_sha256 or score.reference, score.other)

    @property
    def is_lower_better(self) -> bool | None:
        """Whether lower values are better, None if unknown."""
        if self.metric in HIGHER_IS_BETTER:
            return False
        return True if self.metric in LOWER_IS_BETTER else None

    @property
    def title(self) -> str:
        """The title that readers see."""
        name = title(self.metric, self.detector)
        is_named = not self.detector or self.metric in LOWER_IS_BETTER  # title names the features
        return name if is_named else f"{name} ({self.detector})"

    @property
    def evaluations(self) -> Callable[[int], int]:
        """A function from a number of steps to network evaluations (Heun ends in an Euler step)."""
        if self.metric in LIKELIHOODS:  # four per step, and again with half the steps
            return lambda num_steps: 6 * num_steps
        if dict(self.other).get("solver", "heun") in ("heun", "ppfm"):
            return lambda num_steps: 2 * num_steps - 1
        return lambda num_steps: num_steps


@dataclasses.dataclass(frozen=True)
class Spread:
    """The values of one point, by seed range."""

    by_seeds: dict[str, float]

    @property
    def values(self) -> tuple[float, ...]:
        """The values without their seed ranges."""
        return tuple(self.by_seeds.values())

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return math.fsum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.values)

    def over(self, seeds: Iterable[str]) -> "Spread":
        """Returns the values of only some seed ranges."""
        chosen = set(seeds)
        return Spread({key: x for key, x in self.by_seeds.items() if key in chosen})


@dataclasses.dataclass(frozen=True)
class Curve:
    """The scores of one run over one setting, all over the same seed ranges."""

    run: int
    D: float | None
    kimg: float | None
    points: dict[float, Spread]
    left_out: tuple[float, ...] = ()  # values of the setting that were scored only over other seeds
    # For curves over training seeds: the standard deviation over seed ranges of the samples, if
    # known, and the ranges, if all runs have the same.
    of_samples: dict[float, float] = dataclasses.field(default_factory=dict)
    ranges: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[str, ...]:
        """The seed ranges of every point."""
        return tuple(next(iter(self.points.values())).by_seeds)

    def change(self, x: float, base: float | None) -> Spread | None:
        """Returns the score at x minus the score at the base; None if one of them is unknown."""
        if x not in self.points or base not in self.points:
            return None
        before = self.points[base].by_seeds
        return Spread({key: value - before[key] for key, value in self.points[x].by_seeds.items()})


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores of one group around its base point."""

    group: ScoreGroup
    reference: str  # as it was given
    num_steps: int | None  # of the base point
    over_D: list[Curve]  # the base point of each run, as a curve of one point over all its seeds
    # Curves over 'noise_alpha', 'num_steps', 'bits' (nearest rounding) and 'random_bits' (random
    # rounding), for runs with at least two points. The seeds are those that all points of all runs
    # share, or else those that all points of a run share.
    over: dict[str, list[Curve]]
    kimgs: tuple[float, ...] = ()  # kimg at which the runs were scored; -1 if unknown
    num_draws: tuple[int, ...] = ()  # numbers of random roundings over which values are averaged
    # Whether curves are of families, with values by training seed (reports/training_seeds.py).
    has_training_seeds: bool = False

    @property
    def base(self) -> dict[str, float | None]:
        """The value of each setting at the base point."""
        return {"noise_alpha": 0, "num_steps": self.num_steps, "bits": FULL_BITS,
                "random_bits": FULL_BITS}

    @property
    def hardest(self) -> dict[str, float]:
        """The strongest noise, the fewest steps and the fewest bits, except those of the base."""
        found = {}
        for axis, curves in self.over.items():
            values = {x for curve in curves for x in curve.points}
            value = max(values) if axis == "noise_alpha" else min(values)
            if value != self.base[axis] and (axis != "num_steps" or value < (self.num_steps or 0)):
                found[axis] = value
        return found


def compare(runs: Sequence[RunRecord]) -> list[Comparison]:
    """Returns the comparisons of every group of scores, the largest group first."""
    groups: dict[ScoreGroup, list[tuple[int, Score]]] = collections.defaultdict(list)
    for i, run in enumerate(runs):
        for score in filter(_is_compared, run.scores):
            groups[ScoreGroup.of(score)].append((i, score))
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [_compare(group, scores) for group, scores in ranked]


def over_kimg(run: RunRecord) -> list[tuple[ScoreGroup, int | None, dict[float, Spread]]]:
    """Returns (group, steps, scores by kimg) of a run's networks, without noise and rounding.

    Scores are over the seed ranges that all networks share. If they share none, each network's
    scores are over its own seed ranges.
    """
    found: dict[tuple, list[Score]] = collections.defaultdict(list)
    for score in run.scores:
        if score.is_plain and score.kimg is not None and _is_compared(score):
            found[ScoreGroup.of(score), score.num_steps].append(score)
    series = []
    for key, scores in found.items():
        points = _spreads(scores, lambda score: score.kimg)
        shared = _shared_seeds(points)
        series.append((*key, {x: s.over(shared) for x, s in points.items()} if shared else points))
    return series


def _is_compared(score: Score) -> bool:
    """Whether a score is neither a standard deviation nor a score of a single class."""
    return not score.metric.endswith("_std") and score.of_class in (None, MEAN_OF_CLASSES)


def _compare(group: ScoreGroup, scores: list[tuple[int, Score]]) -> Comparison:
    num_steps = _base_steps(score for _, score in scores)
    curves: dict[str, list[Curve]] = collections.defaultdict(list)
    for run in sorted({i for i, _ in scores}):
        own = [score for i, score in scores if i == run]
        base = [score for score in own if score.is_plain and score.num_steps == num_steps]
        kimg = max(_age(score) for score in base or own)
        own = [score for score in own if _age(score) == kimg]
        slices = {
            "D": [score for score in own if score.is_plain and score.num_steps == num_steps],
            "noise_alpha": [score for score in own if score.num_steps == num_steps
                            and score.bits == FULL_BITS],
            "num_steps": [score for score in own if score.is_plain and score.num_steps],
            "bits": [score for score in own if score.num_steps == num_steps
                     and score.noise_alpha == 0 and score.rounding_seed is None],
            "random_bits": [score for score in own if score.num_steps == num_steps
                            and score.noise_alpha == 0
                            and (score.rounding_seed is not None or score.bits == FULL_BITS)]}
        for axis, chosen in slices.items():
            field = "bits" if axis == "random_bits" else axis
            points = _spreads(chosen, lambda score, field=field: getattr(score, field))
            if points:
                curves[axis].append(Curve(run, own[0].D, own[0].kimg, points))
    over = {axis: _over_equal_seeds(curves[axis]) for axis in AXES
            if any(len(curve.points) > 1 for curve in curves[axis])}
    kimgs = sorted({-1.0 if curve.kimg is None else curve.kimg for curve in curves["D"]})
    return Comparison(group, scores[-1][1].reference, num_steps, curves["D"], over, tuple(kimgs),
                      _num_draws(scores))


def _num_draws(scores: Iterable[tuple[int, Score]]) -> tuple[int, ...]:
    """Returns the distinct numbers of random roundings, counted per run and number of bits."""
    draws: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
    for run, score in scores:
        if score.rounding_seed is not None:
            draws[run, score.bits].add(score.rounding_seed)
    return tuple(sorted({len(seeds) for seeds in draws.values()}))


def _over_equal_seeds(curves: Sequence[Curve]) -> list[Curve]:
    """Returns the curves over the seed ranges that all points share, else all points of each run.

    If the points of a run share no range, it keeps the points of its most frequent range.
    """
    shared = set.intersection(*(_shared_seeds(curve.points) for curve in curves))
    chosen = []
    for curve in curves:
        seeds = shared or _shared_seeds(curve.points) or _usual_seeds(curve.points)
        points = {x: spread.over(seeds) for x, spread in curve.points.items()}
        chosen.append(dataclasses.replace(
            curve, points={x: s for x, s in points.items() if s.by_seeds},
            left_out=tuple(x for x, s in points.items() if not s.by_seeds)))
    return chosen


def _shared_seeds(points: dict[float, Spread]) -> set[str]:
    return set.intersection(*(set(spread.by_seeds) for spread in points.values()))


def _usual_seeds(points: dict[float, Spread]) -> set[str]:
    counts = collections.Counter(key for spread in points.values() for key in spread.by_seeds)
    return {counts.most_common(1)[0][0]}


def _age(score: Score) -> float:
    return -1.0 if score.kimg is None else score.kimg


def _base_steps(scores: Iterable[Score]) -> int | None:
    counts = collections.Counter(score.num_steps for score in scores)
    return max(counts, key=lambda steps: (counts[steps], steps == _USUAL_STEPS, steps or 0))


def _spreads(scores: Iterable[Score], key: Callable[[Score], float]) -> dict[float, Spread]:
    """Returns the values at each key, in rising order; for equal seeds the last score counts.

    Several random roundings are averaged.
    """
    values: dict[float, dict[str, dict]] = collections.defaultdict(
        lambda: collections.defaultdict(dict))
    for score in scores:
        values[key(score)][score.seeds][score.rounding_seed] = score.value
    known = sorted(x for x in values if x is not None)
    return {x: Spread({seeds: statistics.fmean(draws.values())
                       for seeds, draws in values[x].items()}) for x in known}
