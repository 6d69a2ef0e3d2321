"""The console output of scoring commands: scores as they come, a table, and warnings."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dnnlib import console
from dnnlib.util import format_ranges, format_table
from metrics.detectors import Detector
from metrics.distances import SUBSET_SIZE
from metrics.evaluator import Evaluator, check_asked
from metrics.metrics import METRICS, FeatureSet, metrics_that_need
from metrics.per_class import mean_over_classes
from metrics.score_log import Score, ScoreLog
from metrics.scoring import Scored, open_evaluator
from torch_utils import distributed as dist
from torch_utils.misc import configure_backends

_FEW_IMAGES = 2048  # with fewer images, the covariance of Inception's features is singular
_MEAN = "mean"  # stands for the mean over classes, in place of a class number


class Job(NamedTuple):
    """A set of images to score; the seed ranges of one network share a `group`."""

    path: str
    label: str
    group: str = ""


class ScoreReport:
    """The scores of one command, against one reference: computed, printed and recorded.

    Under torchrun every method is called on all ranks.

    Args:
        detector, reference, metrics, device, sets, batch, workers: see `open_evaluator`.
        num: the number of images of each score.
        is_single: whether there is only one score to print.
        bootstrap: draws for the interval of a Frechet distance; None for no interval.
        per_class: whether each class is also scored separately.
    """

    def __init__(self, detector: str, reference: str | None, metrics: tuple[str, ...],
                 device: torch.device, sets: dict[str, Scored], num: int, *, batch: int,
                 workers: int, is_single: bool, bootstrap: int | None = None,
                 per_class: bool = False):
        configure_backends("fp32")
        with console.timed("detector and reference"):
            self._evaluator = open_evaluator(detector, reference, metrics, device, sets,
                                             batch=batch, workers=workers, by_class=per_class)
        self._metrics, self._is_single = metrics, is_single
        self._bootstrap, self._per_class = bootstrap, per_class
        self._log = ScoreLog(self._evaluator)
        self._num_lost = 0  # scores that could not be recorded
        warn_if_few(num, self.detector.name, metrics, self._evaluator.reference_count)
        _warn_of_small_subsets(self._evaluator, num)

    @property
    def detector(self) -> Detector:
        """The detector that computes the features."""
        return self._evaluator.detector

    @property
    def is_per_class(self) -> bool:
        """Whether each class is also scored separately."""
        return self._per_class

    @property
    def keeps_features(self) -> bool:
        """Whether the features themselves are needed, even if no metric needs them."""
        return self._bootstrap is not None or self._per_class

    def check(self, images: Scored, name: str) -> None:
        """Raises ValueError if images can't be scored; the message calls them `name`."""
        self._evaluator.check(images.image_shape, name, images.scale)

    @staticmethod
    def needs_asked(metrics: Iterable[str]) -> bool:
        """Whether metrics need the intended class of each image."""
        return bool(metrics_that_need("hits", metrics))

    def check_asked(self, num_classes: int, images: str, *, is_part: bool = False) -> None:
        """Raises ValueError if class accuracy is requested and the detector has other classes.

        For the arguments see `evaluator.check_asked`.
        """
        if self.needs_asked(self._metrics):
            check_asked(self.detector, num_classes, images, is_part=is_part)

    def missing(self, job: Job, facts: dict[str, Any], path: Path | None, *,
                again: bool) -> tuple[str, ...]:
        """Returns the metrics whose values for a job are missing in a file.

        If none is missing, the values are printed, and the job is done.

        Args:
            job: the images.
            facts: what the record says about them.
            path: the file, or None.
            again: ignore the values in the file.
        """
        return dist.run_on_rank0(self._missing, job, facts, path, again)

    def _missing(self, job: Job, facts: dict[str, Any], path: Path | None, again: bool
                 ) -> tuple[str, ...]:
        names = _value_names(self._metrics)
        there = {} if again else self._log.recorded(path, names, facts, self._bootstrap)
        by_class = self._log.recorded_classes(path, names, facts) if self._per_class else {}
        if self._per_class:
            there = {name: record for name, record in there.items()
                     if name in by_class.get(_MEAN, ())}
        missing = tuple(metric for metric in self._metrics
                        if not there.keys() >= set(METRICS[metric].values))
        if not missing:
            console.say(f"Recorded   {job.label}: in {path}; --again computes it again")
            self._tell(job, there)
            if self._per_class:
                self._tell_classes(job, by_class)
        return missing

    def add(self, job: Job, found: FeatureSet, facts: dict[str, Any], path: Path | None,
            classes: Sequence[int] | None = None) -> None:
        """Scores the features of a job, prints its distance like EDM and PFGM++, and records all.

        Args:
            job: the images.
            found: what all metrics, or only the missing ones, need of the images.
            facts: what else the record says about the images.
            path: the file that gets a JSON line per value, or None.
            classes: the class of each image, if classes are scored separately.
        """
        with console.timed("distances"):
            values = self._evaluator.evaluate(found)
        extra: dict[str, Any] = {}
        if self._bootstrap and "fid" in values:
            with console.timed("interval"):
                interval = self._evaluator.interval(found, self._bootstrap)
            extra = {"std_error": interval.std_error, "interval": [interval.low, interval.high],
                     "bootstrap": self._bootstrap}
        names = _value_names(self._metrics)
        if dist.get_rank() == 0:
            rest = [name for name in names if name not in values]
            records = self._log.recorded(path, rest, facts, self._bootstrap)
            records |= {name: {"value": value} for name, value in values.items()}
            if extra:
                records["fid"] |= extra
            self._num_lost += not self._log.record(path, values, facts, fid=extra)
            self._tell(job, {name: records[name] for name in names})
        if not self._per_class:
            return
        by_class = self._evaluator.evaluate_classes(found, classes)
        if dist.get_rank() == 0:
            earlier = self._log.recorded_classes(path, rest, facts) if rest else {}
            self._record_classes(by_class, facts, path)
            means = {_MEAN: mean_over_classes(by_class)}
            self._tell_classes(job, {number: earlier.get(number, {}) | of_class for number, of_class
                                     in (by_class | means).items()})

    def _record_classes(self, by_class: dict[int, dict[str, float]], facts: dict[str, Any],
                        path: Path | None) -> None:
        for number, values in by_class.items():
            self._num_lost += not self._log.record(path, values, {**facts, "of_class": number})
        means = mean_over_classes(by_class)
        classes = {name: {"classes": format_ranges(k for k in by_class if name in by_class[k])}
                   for name in means}  # a class may have too few images for a metric
        self._num_lost += not self._log.record(path, means, {**facts, "of_class": _MEAN}, **classes)

    def check_classes(self, classes: Sequence[int]) -> None:
        """Warns of classes with too few images; raises ValueError if all have too few."""
        self._evaluator.check_classes(classes, self._metrics)

    def _tell(self, job: Job, records: dict[str, dict[str, Any]]) -> None:
        values = {name: record["value"] for name, record in records.items()}
        if "fid" not in values:
            self._log.add(Score(job.label, job.group, values))
            return
        text = f"{values['fid']:g}"
        if self._log.distance_name != "FID":
            text = f"{self._log.distance_name}: {text}"
        if not self._is_single:
            text = f"path:{job.path}, {text}" if os.path.isdir(job.path) else f"{job.label}: {text}"
        console.result(text)
        if self._bootstrap:
            low, high = records["fid"]["interval"]
            values["fid_std"] = records["fid"]["std_error"]
            console.result(f"95% interval {low:g} to {high:g}, standard error "
                           f"{values['fid_std']:.2g}")
        self._log.add(Score(job.label, job.group, values))

    def _tell_classes(self, job: Job, values: dict[int | str, dict[str, float]]) -> None:
        """Prints the scores of the classes and their mean as a table."""
        names, called = _value_names(self._metrics), self._evaluator.class_names or ()
        rows = [["class", *map(self._log.title, names)]]
        for number, of_class in values.items():
            known = isinstance(number, int) and number < len(called)
            text = f"{number} {called[number]}" if known else str(number)
            rows.append([text, *(f"{of_class[name]:.5g}" if name in of_class else ""
                                 for name in names)])
        heading = "" if self._is_single else f"{job.label}\n"
        console.result(f"\n{heading}{format_table(rows)}\n")

    def print_table(self) -> None:
        """Prints a table of all scores if there are several values."""
        if dist.get_rank() == 0 and self._log.has_more_than_one_value:
            console.result("\n" + self._log.table())

    @property
    def has_lost_scores(self) -> bool:
        """Whether a score could not be recorded, the same on all ranks."""
        return dist.broadcast_object(self._num_lost > 0)


def _value_names(metrics: Sequence[str]) -> list[str]:
    return [name for metric in metrics for name in METRICS[metric].values]


def warn_if_few(count: int, detector: str, metrics: Sequence[str],
                num_reference: int | None = None) -> None:
    """Warns if there are too few images, or too few reference images, for an FID."""
    if "fid" not in metrics:
        return
    is_reference_small = num_reference is not None and num_reference < _FEW_IMAGES
    if count >= _FEW_IMAGES:
        if is_reference_small:
            dist.warn0(f"the reference has {num_reference} images, fewer than {_FEW_IMAGES}, so "
                       "the distance is biased upwards; compare only with the same reference")
    else:
        reason = f"are fewer than {_FEW_IMAGES}, so the distance is biased upwards"
        if detector == "inception":
            reason = (f"are fewer than the {_FEW_IMAGES} features, so their covariance is singular "
                      "and FID is biased upwards")
        more = f" and with this reference of {num_reference} images" if is_reference_small else ""
        dist.warn0(f"{count} images {reason}; compare only at equal numbers{more}")


def _warn_of_small_subsets(evaluator: Evaluator, num: int) -> None:
    """Warns if there are too few images for the subsets of KID."""
    kept = evaluator.num_reference_features
    if kept is not None and "kid" in evaluator.metrics and min(kept, num) < SUBSET_SIZE:
        dist.warn0(f"KID is computed on subsets of {min(kept, num)} images instead of "
                   f"{SUBSET_SIZE}, because there are no more; compare only at equal numbers")
