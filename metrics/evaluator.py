"""A detector, a reference and metrics: what scores images, checked before anything is computed.

Under torchrun every method is called on all ranks; the reference is on rank 0.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dnnlib.util import cache_dir
from metrics.detectors import FEATURES_VERSION, Detector, build_detector, describe_detector
from metrics.metrics import METRICS, FeatureSet, Images, dataset_features, no_images
from metrics.references import MAX_BANK, Reference, load_reference, save_reference
from torch_utils import distributed as dist


class Evaluator:
    """Scores sets of images by `metrics` against one reference, by a detector of `build_detector`.

    The reference is a file or address of statistics, a data set, or None where no metric needs one.
    Errors call it `name`.

    Raises:
        ValueError: detector, reference and metrics do not fit.
        OSError: a file can't be read.
    """

    def __init__(self, detector: str, reference: str | Images | None, metrics: Iterable[str],
                 device: torch.device, name: str | None = None):
        self.metrics = tuple(metrics)
        self._name = name or str(reference)
        self._data: Images | None = None
        self._reference: Reference | None = None
        self._digest: str | None = None
        if isinstance(reference, str):
            self._load(reference, detector)
        else:
            self._data = reference
        with dist.rank0_first():  # one download for all
            self.detector = build_detector(detector, device)
        if "is" in self.metrics:
            self.detector.logits(torch.empty([0, self.detector.feature_dim or 0], device=device))

    def _load(self, path: str, detector: str) -> None:
        self._reference = dist.run_on_rank0(load_reference, path)
        self._digest = self._reference.digest
        check_made_for(self._reference, path, detector, self.metrics)

    def check(self, image_shape: Sequence[int], images: str,
              scale: dict[str, Any] | None = None) -> None:
        """Raises ValueError if images of this shape, called `images`, can't be scored.

        `scale` is that of images that are not 8-bit. It must be the reference's.
        """
        try:
            dim = self.detector(no_images(image_shape, scale is None)).shape[1]
        except ValueError as error:
            raise ValueError(f"{images}: {error}") from error
        compared = self._reference or self._data
        if compared:
            check_alike(compared, self._name, image_shape, images, scale)
        if self._reference and dim != len(self._reference.mu):
            raise ValueError(f"{self._name}: statistics of {len(self._reference.mu)} features, but "
                             f"detector {self.detector.name} gives {dim} for the "
                             f"{'x'.join(map(str, image_shape))} images of {images}")

    def prepare(self, batch: int, workers: int) -> None:
        """Computes the statistics of a reference that is a data set, or takes them from the cache.

        One rank takes up to `batch` images at a time; `workers` processes read ahead.
        """
        if self._data is not None:
            self._data.share_fingerprint()
            needed = any(METRICS[name].needs_reference_features for name in self.metrics)
            self._reference = cached_reference(self._data, self.detector, with_features=needed,
                                               batch=batch, workers=workers)
            self._digest = self._data.fingerprint

    def evaluate(self, images: FeatureSet) -> dict[str, float]:
        """Returns the values of the metrics that images were gathered for, the same on every rank.

        Raises:
            ValueError: too few images.
        """
        return dist.run_on_rank0(self._evaluate, images)

    def _evaluate(self, images: FeatureSet) -> dict[str, float]:
        values: dict[str, float] = {}
        for metric in (METRICS[name] for name in self.metrics if name in images.metrics):
            values |= zip(metric.values, metric.compute(images, self._reference), strict=True)
        return values

    @property
    def reference_count(self) -> int | None:
        """The number of images of the reference, on rank 0 and if known; None elsewhere."""
        return self._reference.count if self._reference else None

    @property
    def num_reference_features(self) -> int | None:
        """The number of images whose features the reference keeps, on rank 0; None elsewhere."""
        features = self._reference.features if self._reference else None
        return None if features is None else len(features)

    @property
    def record(self) -> dict[str, Any]:
        """What is recorded of the reference beside each score, as plain JSON data."""
        return {"reference": self._name if self._digest else None, "reference_sha256": self._digest,
                "reference_num": self.reference_count}


def check_made_for(reference: Reference, path: str, detector: str, metrics: Iterable[str]) -> None:
    """Raises ValueError if statistics are of another detector, or lack what metrics need."""
    name, _ = describe_detector(detector)
    if reference.detector != name:
        raise ValueError(f"{path}: made with detector {reference.detector}, but "
                         f"--detector={detector} is {name}; give --detector={reference.detector}")
    for metric in metrics:
        if METRICS[metric].needs_reference_features and reference.features is None:
            raise ValueError(
                f"{path}: holds no features, which --metrics={metric} needs; give the data "
                "set itself as --ref, or make the file by 'fid.py ref --features'")


def check_alike(reference: Reference | Images, name: str, image_shape: Sequence[int], images: str,
                scale: dict[str, Any] | None) -> None:
    """Raises ValueError if a reference is of another size or scale than the images.

    Args:
        reference: statistics or a data set.
        name: what errors call it.
        image_shape: channels, height and width of the images.
        images: what errors call them.
        scale: that of the images, if they are not 8-bit.
    """
    known = reference.image_shape
    if reference.scale != scale:
        raise ValueError(f"{name}: of another scale than the images of {images}; give a "
                         "reference that dataset_tool.py made with the same --scale")
    if known and tuple(known[1:]) != tuple(image_shape[1:]):
        raise ValueError(f"{name}: of {known[2]}x{known[1]} images, but those of "
                         f"{images} are {image_shape[2]}x{image_shape[1]}; give a reference of "
                         "that size")


def dataset_reference(images: Images, detector: Detector, *, with_features: bool, batch: int,
                      workers: int) -> Reference:
    """Returns the statistics of a data set, on rank 0 with features if asked for.

    For a large data set, the features of 50,000 evenly spaced images are kept.

    Raises:
        ValueError: fewer than two images, or one that can't be read.
        OSError: likewise.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} image, at least 2 needed")
    metrics = ["fid", "kid"] if with_features else ["fid"]
    found = dataset_features(images, detector, metrics=metrics, batch=batch, workers=workers,
                             title="Reference")
    features = found.features
    if features is not None and len(features) > MAX_BANK:
        features = features[torch.linspace(0, len(features) - 1, MAX_BANK).long()]
    return Reference(
        found.moments.mean().cpu().numpy(), found.moments.cov().cpu().numpy(), detector.name,
        features, tuple(images.image_shape), len(images), images.fingerprint, images.scale)


def cached_reference(images: Images, detector: Detector, *, with_features: bool, batch: int,
                     workers: int) -> Reference | None:
    """Returns `dataset_reference` on rank 0, kept in the cache folder between calls."""
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
        dist.warn0(f"{path} can't be written ({error}): the reference will be computed again next "
                   "time")
    return reference
