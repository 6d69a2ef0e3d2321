"""Families of runs that differ only in their training seed, and their differences to D = inf.

    d_k    value at D minus value at D = inf, both for training seed k = 1..m
    s      standard deviation of d_1..d_m
    95% interval of the difference: mean(d) -+ t s / sqrt(m), t the 97.5% quantile of Student's t
    with m - 1 degrees of freedom

A difference is decided if that interval does not contain 0. It then holds for other training seeds
on the same data, but not necessarily for other data or networks. Differences that do not vary at
all are not decided, because scores that count images, such as class accuracy, can agree by chance.
"""

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.comparison import Comparison, Curve, Spread
from reports.run_record import RunRecord, read_json
from training.config import OPTIONS_FILE
from training.resume import RESUME_MAY_CHANGE

# Options that are compared although a resumed run may change them.
_DECIDES = {"duration", "transfer"}
_CONFIDENCE = 0.95
_NO_SPREAD = 1e-9  # relative to the mean; smaller variations of differences are rounding errors


@dataclasses.dataclass(frozen=True)
class Family:
    """Runs that differ only in their training seed: the number of each run, by seed."""

    runs: dict[str, int]


def families(runs: Sequence[RunRecord]) -> list[Family]:
    """Returns the families of runs, in the order of their first members.

    A run whose options are unknown forms its own family. So does each of several runs that also
    have the same seed.
    """
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for i, run in enumerate(runs):
        groups[_settings_key(run) if run.options else f"run {i}"].append(i)
    found = []
    for members in groups.values():
        seeds = [str(runs[i].options.get("seed", "")) for i in members]
        if len(set(seeds)) == len(seeds):
            found.append(Family(dict(zip(seeds, members, strict=True))))
        else:
            found += [Family({"": i}) for i in members]
    return sorted(found, key=lambda family: min(family.runs.values()))


def _settings_key(run: RunRecord) -> str:
    return json.dumps(_settings(run.options), sort_keys=True, default=str)


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of a run that all runs of a family share."""
    kept = {name: value for name, value in options.items()
            if name not in RESUME_MAY_CHANGE or name in _DECIDES}
    kept["data"] = Path(str(options.get("data"))).name  # the folders that hold it may differ
    if options.get("teacher"):
        # The few-step networks of a family have different teachers with the same settings.
        of_teacher = _options_of_network(Path(str(options["teacher"])))
        kept["teacher_sha256"] = _settings(of_teacher) if of_teacher else kept["teacher_sha256"]
    return kept


def _options_of_network(path: Path) -> dict[str, Any]:
    """Returns the options of the run that made a network, {} if they can't be read."""
    run_dir = path if path.is_dir() else path.parent
    options = read_json(run_dir / OPTIONS_FILE).get("options")
    return options if isinstance(options, dict) else {}


def over_training_seeds(comparison: Comparison, found: Sequence[Family]) -> Comparison:
    """Returns a comparison of families, whose curves have a value for each training seed.

    A value is the mean over seed ranges of the samples. At the base point these are the ranges that
    all runs have, if there are any. Points that a run of the family lacks are left out, and so are
    axes without points.
    """
    over = {axis: _merged(curves, found) for axis, curves in comparison.over.items()}
    return dataclasses.replace(
        comparison, over_D=_merged(_over_shared_ranges(comparison.over_D), found),
        over={axis: curves for axis, curves in over.items()
              if any(len(curve.points) > 1 for curve in curves)},
        has_training_seeds=True)


def _over_shared_ranges(curves: Sequence[Curve]) -> list[Curve]:
    """Returns curves of one point each, over the seed ranges that all share if there are any."""
    shared = set.intersection(*(set(curve.seeds) for curve in curves)) if curves else set()
    return [dataclasses.replace(curve, points={x: spread.over(shared) for x, spread
                                               in curve.points.items()})
            for curve in curves] if shared else list(curves)


def _merged(curves: Sequence[Curve], found: Sequence[Family]) -> list[Curve]:
    by_run, merged = {curve.run: curve for curve in curves}, []
    for number, family in enumerate(found):
        members = {seed: by_run[i] for seed, i in family.runs.items() if i in by_run}
        if not members:
            continue
        known = [curve.points for curve in members.values()]
        shared = [x for x in known[0] if all(x in points for points in known)]
        left_out = {x for points in known for x in points} - set(shared)
        first = next(iter(members.values()))
        merged.append(Curve(
            number, first.D,
            first.kimg if len({curve.kimg for curve in members.values()}) == 1 else None,
            {x: Spread({seed: curve.points[x].mean for seed, curve in members.items()})
             for x in shared},
            tuple(sorted(left_out.union(*(curve.left_out for curve in members.values())))),
            {x: deviation for x in shared
             if (deviation := _pooled([points[x].values for points in known])) is not None},
            first.seeds if len({curve.seeds for curve in members.values()}) == 1 else ()))
    return [curve for curve in merged if curve.points]


def _pooled(groups: Sequence[Sequence[float]]) -> float | None:
    """Returns the pooled standard deviation within groups; None if no group has two values."""
    known = [values for values in groups if len(values) > 1]
    if not known:
        return None
    squares = math.fsum((len(values) - 1) * statistics.variance(values) for values in known)
    return math.sqrt(squares / sum(len(values) - 1 for values in known))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Paired differences of two families by training seed."""

    by_seed: dict[str, float]

    @classmethod
    def of(cls, values: Mapping[str, float], others: Mapping[str, float]) -> "Difference":
        """Returns values minus others, for the training seeds that both have."""
        return cls({seed: values[seed] - others[seed] for seed in values if seed in others})

    @property
    def mean(self) -> float:
        """The mean over training seeds."""
        return math.fsum(self.by_seed.values()) / len(self.by_seed)

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95% t interval of the mean; None for fewer than two seeds."""
        return t_half_width(list(self.by_seed.values()))

    @property
    def is_decided(self) -> bool:
        """Whether the interval does not contain 0."""
        half = self.half_width
        return half is not None and abs(self.mean) > half > _NO_SPREAD * abs(self.mean)

    def verdict(self, is_lower_better: bool | None) -> str:
        """Returns 'better', 'worse', 'lower', 'higher' or 'not decided'."""
        if not self.is_decided:
            return "not decided"
        if is_lower_better is None:
            return "lower" if self.mean < 0 else "higher"
        return "better" if (self.mean < 0) == is_lower_better else "worse"


def t_half_width(values: Sequence[float]) -> float | None:
    """Returns half the width of the 95% t interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # Student's t quantile; importing scipy.stats takes a second
    t = float(stdtrit(len(values) - 1, (1 + _CONFIDENCE) / 2))
    return t * statistics.stdev(values) / math.sqrt(len(values))


def differences(curves: Sequence[Curve], x: float | None = None, base: float | None = None
                ) -> dict[int, Difference]:
    """Returns the differences to the family of D = inf, by number of the family.

    Args:
        curves: the curves of the families.
        x: the point; None means the first point of each curve, as in `Comparison.over_D`.
        base: if given, the change from this point to x is compared instead of the value at x.
    """
    known = {}
    for curve in curves:
        point = next(iter(curve.points)) if x is None else x
        spread = curve.points.get(point) if base is None else curve.change(point, base)
        if spread is not None:
            known[curve.run] = (curve.D, spread.by_seeds)
    diffusion = [(run, values) for run, (D, values) in known.items() if math.inf == D]
    if len(diffusion) != 1:  # with none or several families, there is nothing to compare with
        return {}
    [(of_inf, reference)] = diffusion
    found = {run: Difference.of(values, reference) for run, (D, values) in known.items()
             if run != of_inf and D is not None}
    return {run: difference for run, difference in found.items() if difference.by_seed}
