"""Scores of several runs side by side, as plain data; no PyTorch is needed.

Only scores of one kind are compared: one metric, detector, number of images, reference, and the
sampler's settings but steps, alpha and bits. The base point of a kind is alpha = 0, 32 bits and its
most frequent number of steps, at the last kimg that a run was scored at. Around it, one setting
varies at a time.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from training.run_record import FULL_BITS, RunRecord, Score

_USUAL_STEPS = 18  # of EDM and PFGM++ on CIFAR-10: where two numbers are equally frequent
_METRIC_TITLES = {
    "fid": "FID", "kid": "KID", "is": "Inception score", "frechet_distance": "Frechet distance",
    "kernel_distance": "kernel distance", "precision": "precision", "recall": "recall"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What scores must share to be compared."""

    metric: str
    detector: str
    num: int | None
    reference: str
    other: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, score: Score) -> "Kind":
        """Returns the kind of a score; references are told apart by their content where known."""
        return cls(score.metric, score.detector, score.num,
                   score.reference_sha256 or score.reference, score.other)

    @property
    def title(self) -> str:
        """Its name for readers."""
        name = _METRIC_TITLES.get(self.metric, self.metric.replace("_", " "))
        is_fid = self.metric in ("fid", "kid")
        return name if is_fid or not self.detector else f"{name} ({self.detector})"

    @property
    def evaluations(self) -> Callable[[int], int]:
        """How often a number of steps evaluates the network: Heun's last step is an Euler step."""
        if ("solver", "euler") in self.other:
            return lambda num_steps: num_steps
        return lambda num_steps: 2 * num_steps - 1


@dataclasses.dataclass(frozen=True)
class Spread:
    """Values of one point over seed ranges."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return math.fsum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)


@dataclasses.dataclass(frozen=True)
class Curve:
    """The scores of one run over one setting."""

    run: int
    D: float | None
    kimg: float | None
    points: dict[float, Spread]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores of one kind around its base point.

    Attributes:
        kind: what they share.
        reference: the reference as it was given.
        num_steps: of the base point.
        over_D: each run's base point by its D, one curve of one point a run.
        over: curves over 'noise_alpha', 'num_steps' and 'bits', where a run has two points.
    """

    kind: Kind
    reference: str
    num_steps: int | None
    over_D: list[Curve]
    over: dict[str, list[Curve]]


def compare(runs: Sequence[RunRecord]) -> list[Comparison]:
    """Returns the comparisons of every kind of score, the most frequent kind first."""
    kinds: dict[Kind, list[tuple[int, Score]]] = collections.defaultdict(list)
    for i, run in enumerate(runs):
        for score in run.scores:
            if not score.metric.endswith("_std"):
                kinds[Kind.of(score)].append((i, score))
    ranked = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return [_compare(kind, scores) for kind, scores in ranked]


def over_kimg(run: RunRecord) -> list[tuple[Kind, int | None, dict[float, Spread]]]:
    """Returns (kind, steps, scores by kimg) of a run's networks, without noise and rounding."""
    found: dict[tuple, list[Score]] = collections.defaultdict(list)
    for score in run.scores:
        if score.is_plain and score.kimg is not None and not score.metric.endswith("_std"):
            found[Kind.of(score), score.num_steps].append(score)
    return [(*key, _spreads(scores, lambda score: score.kimg)) for key, scores in found.items()]


def _compare(kind: Kind, scores: list[tuple[int, Score]]) -> Comparison:
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
                     and score.noise_alpha == 0]}
        for axis, chosen in slices.items():
            points = _spreads(chosen, lambda score, axis=axis: getattr(score, axis))
            if points:
                curves[axis].append(Curve(run, own[0].D, own[0].kimg, points))
    over = {axis: curves[axis] for axis in ("noise_alpha", "num_steps", "bits")
            if any(len(curve.points) > 1 for curve in curves[axis])}
    return Comparison(kind, scores[-1][1].reference, num_steps, curves["D"], over)


def _age(score: Score) -> float:
    return -1.0 if score.kimg is None else score.kimg


def _base_steps(scores: Iterable[Score]) -> int | None:
    counts = collections.Counter(score.num_steps for score in scores)
    return max(counts, key=lambda steps: (counts[steps], steps == _USUAL_STEPS, steps or 0))


def _spreads(scores: Iterable[Score], key: Callable[[Score], float]) -> dict[float, Spread]:
    """Returns the values at each key by rising key; of the same seeds the last score counts."""
    values: dict[float, dict[str, float]] = collections.defaultdict(dict)
    for score in scores:
        values[key(score)][score.seeds] = score.value
    known = [x for x in values if x is not None]
    return {x: Spread(tuple(values[x].values())) for x in sorted(known)}
