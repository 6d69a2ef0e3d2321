"""Scoring of images with a detector, a reference and metrics, which are checked beforehand.

Under torchrun every method is called on all ranks. The reference is on rank 0.
"""

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dnnlib.progress import stage
from dnnlib.util import cache_dir, format_ranges
from metrics.bootstrap import FrechetInterval, bootstrap_frechet
from metrics.detectors import (
    FEATURES_VERSION,
    Detector,
    build_detector,
    describe_detector,
    detector_class,
)
from metrics.metrics import (
    METRICS,
    FeatureSet,
    Images,
    check_names,
    dataset_features,
    metrics_that_need,
)
from metrics.per_class import classes_to_score, scores_by_class
from metrics.references import MAX_BANK, Reference, load_reference, save_reference
from metrics.score_names import INCEPTION
from torch_utils import distributed as dist


class Evaluator:
    """Scores sets of images with `metrics` against one reference.

    `detector` is a name for `build_detector`. The reference is a file or address of statistics, a
    data set, or None where no metric needs one. Errors call it `name`. With `by_class` it must be a
    data set with classes.

    Raises:
        ValueError: detector, reference and metrics do not match.
        OSError: a file can't be read.
    """

    def __init__(self, detector: str, reference: str | Images | None, metrics: Iterable[str],
                 device: torch.device, name: str | None = None, *, by_class: bool = False):
        self.metrics, self._by_class = tuple(metrics), by_class
        self._name = name or str(reference)
        self._data: Images | None = None
        self._reference: Reference | None = None
        self._digest: str | None = None
        check_names()
        check_classifies(detector, self.metrics)
        if isinstance(reference, str):
            self._load(reference, detector)
        else:
            self._data = reference
        if by_class and not (self._data and self._data.has_onehot_labels):
            raise ValueError(f"--per-class: --ref={self._name} has no classes; give a data set "
                             "whose labels are class numbers")
        with dist.rank0_first():  # one download for all
            self.detector = build_detector(detector, device)

    def _load(self, path: str, detector: str) -> None:
        self._reference = dist.run_on_rank0(load_reference, path, describe_detector(detector)[0])
        self._digest = self._reference.digest
        with dist.rank0_first():  # weights are downloaded if their hash is needed
            check_made_for(self._reference, path, detector, self.metrics)

    def check(self, image_shape: Sequence[int], images: str,
              scale: dict[str, Any] | None = None) -> None:
        """Raises ValueError on all ranks if images of this shape can't be scored.

        Errors call the images `images`. `scale`, None for 8-bit images, must be the reference's.
        """
        error = None
        try:
            self._check(image_shape, images, scale)
        except ValueError as caught:  # only rank 0 has the reference
            error = caught
        dist.raise_first(error)

    def _check(self, image_shape: Sequence[int], images: str, scale: dict[str, Any] | None
               ) -> None:
        compared = self._reference or self._data
        if compared:
            check_alike(compared, self._name, image_shape, images, scale)
        try:
            dim = self.detector.dim_of(image_shape, scale)
        except ValueError as error:
            raise ValueError(f"{images}: {error}") from error
        if self._reference and dim != len(self._reference.mu):
            raise ValueError(f"{self._name}: statistics of {len(self._reference.mu)} features, but "
                             f"detector {self.detector.name} gives {dim} for the "
                             f"{'x'.join(map(str, image_shape))} images of {images}")

    def prepare(self, batch: int, workers: int) -> None:
        """Computes the statistics of a reference data set, or takes them from the cache.

        A rank processes up to `batch` images at a time, and `workers` processes read ahead.
        """
        if self._data is not None:
            self._data.share_fingerprint()
            needed = self._by_class or any(METRICS[name].needs_reference_features
                                           for name in self.metrics)
            self._reference = cached_reference(self._data, self.detector, with_features=needed,
                                               batch=batch, workers=workers)
            self._digest = self._data.fingerprint

    def evaluate(self, images: FeatureSet) -> dict[str, float]:
        """Returns the values of the metrics that `images` was made for, the same on every rank.

        Raises:
            ValueError: too few images.
        """
        return dist.run_on_rank0(self._evaluate, images)

    def _evaluate(self, images: FeatureSet) -> dict[str, float]:
        values: dict[str, float] = {}
        with stage("Computing scores"):
            for metric in (METRICS[name] for name in self.metrics if name in images.metrics):
                values |= zip(metric.values, metric.compute(images, self._reference), strict=True)
        return values

    def interval(self, images: FeatureSet, draws: int) -> FrechetInterval:
        """Returns the Frechet distance of images whose features are kept, with its interval.

        Raises:
            ValueError: too few images or draws.
        """
        return dist.run_on_rank0(lambda: bootstrap_frechet(
            images.features, self._reference.mu, self._reference.sigma, draws=draws,
            device=self.detector.device))

    def evaluate_classes(self, images: FeatureSet, classes: Sequence[int]
                         ) -> dict[int, dict[str, float]]:
        """Returns the values of each class separately, for images whose features are kept.

        Args:
            images: the images of all classes.
            classes: the class of each image.

        Raises:
            ValueError: no class has enough images on both sides.
        """
        return dist.run_on_rank0(lambda: scores_by_class(
            images.features, classes, self._reference.features, self._real_classes, self.detector,
            images.metrics))

    def check_classes(self, classes: Sequence[int], metrics: Iterable[str]) -> None:
        """Warns of classes that have too few images for a score of their own.

        Raises:
            ValueError: all classes have too few.
        """
        dist.run_on_rank0(self._check_classes, classes, metrics)

    def _check_classes(self, classes: Sequence[int], metrics: Iterable[str]) -> None:
        for name in metrics:
            _, left_out = classes_to_score(classes, self._real_classes, name)
            if left_out:
                dist.warn0(f"classes {format_ranges(left_out)} have too few generated or real "
                           f"images for {name} and are left out of it")

    @property
    def _real_classes(self) -> np.ndarray:
        """The classes of those reference images whose features are kept."""
        return self._data.class_numbers[kept_numbers(len(self._data))]

    @property
    def class_names(self) -> Sequence[str] | None:
        """The class names of a reference data set, if it has them."""
        return self._data and self._data.class_names

    @property
    def reference_count(self) -> int | None:
        """The number of images of the reference; None if unknown, and on other ranks than 0."""
        return self._reference.count if self._reference else None

    @property
    def num_reference_features(self) -> int | None:
        """The number of images whose features the reference keeps, on rank 0; None elsewhere."""
        features = self._reference.features if self._reference else None
        return None if features is None else len(features)

    @property
    def record(self) -> dict[str, Any]:
        """What is recorded about the reference with each score, as plain JSON data."""
        return {"reference": self._name if self._digest else None, "reference_sha256": self._digest,
                "reference_num": self.reference_count}


def check_classifies(detector: str, metrics: Iterable[str]) -> None:
    """Raises ValueError if a detector lacks the classes that metrics need."""
    if metrics_that_need("classes", metrics):
        detector_class(detector).check_classes()
    if metrics_that_need("hits", metrics):
        detector_class(detector).check_recognises()


def check_asked(detector: Detector, num_classes: int, images: str, *, is_part: bool = False
                ) -> None:
    """Raises ValueError if a detector does not know the intended classes of images.

    Args:
        detector: a detector that distinguishes the classes of the data.
        num_classes: the number of classes of the images.
        images: what errors call the images.
        is_part: whether the data may have more classes than these images.
    """
    known = detector.num_classes
    if num_classes > known or (num_classes < known and not is_part):
        raise ValueError(f"{images}: has {num_classes} classes, but detector {detector.name} knows "
                         f"{known}; give a classifier that was trained on the classes of these "
                         "images")


def check_made_for(reference: Reference, path: str, detector: str, metrics: Iterable[str]) -> None:
    """Raises ValueError if statistics belong to another detector, or lack what metrics need."""
    name, _ = describe_detector(detector)
    if reference.detector != name:
        is_of_hash = re.fullmatch(r"\w+:[0-9a-f]{16}", reference.detector)
        advice = ("the weights that have this hash" if is_of_hash
                  else f"--detector={reference.detector}")
        given = (f"the default is {INCEPTION}" if detector == INCEPTION else f"not {name}"
                 if detector == name else f"--detector={detector} is {name}")
        raise ValueError(f"{path}: made with the detector {reference.detector}; give {advice} "
                         f"({given})")
    for metric in metrics:
        if METRICS[metric].needs_reference_features and reference.features is None:
            raise ValueError(
                f"{path}: holds no features, which --metrics={metric} needs; give the data "
                "set itself as --ref, or make the file with 'fid.py ref --features'")


def check_alike(reference: Reference | Images, name: str, image_shape: Sequence[int], images: str,
                scale: dict[str, Any] | None) -> None:
    """Raises ValueError if a reference differs from the images in size or scale.

    Args:
        reference: statistics or a data set.
        name: what errors call the reference.
        image_shape: channels, height and width of the images.
        images: what errors call the images.
        scale: scale of the images; None if they are 8-bit.
    """
    known = reference.image_shape
    if reference.scale != scale:
        raise ValueError(f"{name}: has another scale than the images of {images}; give a "
                         "reference that dataset_tool.py made with the same --scale")
    if known and tuple(known[1:]) != tuple(image_shape[1:]):
        raise ValueError(f"{name}: its images are {known[2]}x{known[1]}, but those of "
                         f"{images} are {image_shape[2]}x{image_shape[1]}; give a reference of "
                         "that size")


def dataset_reference(images: Images, detector: Detector, *, with_features: bool, batch: int,
                      workers: int) -> Reference:
    """Returns the statistics of a data set, with features on rank 0 if `with_features` is set.

    For a large data set, the features of 50,000 evenly spaced images are kept.

    Raises:
        ValueError: there are fewer than two images, or an image can't be decoded.
        OSError: an image can't be read.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} image, at least 2 needed")
    metrics = ["fid", "kid"] if with_features else ["fid"]
    found = dataset_features(images, detector, metrics=metrics, batch=batch, workers=workers,
                             title="Reference")
    features = found.features
    if features is not None:
        features = features[kept_numbers(len(features))]
    return Reference(
        found.moments.mean().cpu().numpy(), found.moments.cov().cpu().numpy(), detector.name,
        features, tuple(images.image_shape), len(images), images.fingerprint, images.scale)


def kept_numbers(count: int) -> np.ndarray:
    """Returns the numbers of those of `count` reference images whose features are kept."""
    if count <= MAX_BANK:
        return np.arange(count)
    return torch.linspace(0, count - 1, MAX_BANK).long().numpy()


def cached_reference(images: Images, detector: Detector, *, with_features: bool, batch: int,
                     workers: int) -> Reference | None:
    """Returns `dataset_reference` on rank 0; the cache folder keeps it between calls."""
    key = f"{images.content_key}-{detector.name.replace(':', '-')}-{FEATURES_VERSION}"
    path = cache_dir("references") / f"{key}{'-features' if with_features else ''}.npz"
    reference = None
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged
            reference = replace(load_reference(str(path)), digest=images.fingerprint)
    if dist.broadcast_object(reference is not None):
        return reference
    reference = dataset_reference(images, detector, with_features=with_features, batch=batch,
                                  workers=workers)
    if dist.get_rank() != 0:
        return None
    try:
        save_reference(path, reference)
    except OSError as error:
        dist.warn0(f"{path} can't be written ({error}); the reference will be computed again next "
                   "time")
    return reference
