"""The metrics by name, and what each needs of the features, gathered in one pass over the images.

    fid    Frechet distance of mean and covariance             Heusel et al. 2017
    kid    kernel distance, mean and deviation over subsets    Binkowski et al. 2018
    pr     precision and recall                                Kynkaanniemi et al. 2019
    dc     density and coverage                                Naeem et al. 2020
    is     Inception score, mean and deviation over splits     Salimans et al. 2016
    ca     class accuracy: share of images that a classifier recognises as their intended class

docs/metrics.md defines them. Under torchrun every function here is called on all ranks, and rank 0
returns the scores.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dnnlib.progress import Progress
from dnnlib.registry import Registry
from metrics.detectors import Detector, no_images
from metrics.distances import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from metrics.references import Reference
from metrics.statistics import ClassHits, ClassStatistics, FeatureBank, FeatureStatistics, Sums
from torch_utils import distributed as dist
from torch_utils.loading import read_in_processes


class Images(Protocol):
    """A data set whose images are scored; `images.dataset.ImageFolderDataset` is one."""

    image_shape: Sequence[int]
    fingerprint: str
    content_key: str  # depends also on the subset, mirrored copies and how files are read
    scale: dict[str, Any] | None  # scale of the images; None if they are 8-bit
    has_onehot_labels: bool  # whether images have classes
    class_numbers: np.ndarray  # class of each image, [n]
    class_names: Sequence[str] | None  # None if the classes have no names

    def __len__(self) -> int: ...

    def share_fingerprint(self) -> None:
        """Computes the fingerprint once for all ranks, each of which must call it."""

    def get_scored(self, indices: Sequence[int]) -> np.ndarray:
        """Returns images [B, C, H, W]: uint8, or float32 in about [-1, 1] if `scale` is given."""


class FeatureSet:
    """What metrics need of one set of `count` images over all ranks.

    With `keeps_features` the features are kept even if no metric needs them. `asked` is the
    intended class of each image, [count], for class accuracy.
    """

    def __init__(self, count: int, detector: Detector, metrics: Iterable[str], *,
                 keeps_features: bool = False, asked: Sequence[int] | None = None):
        self.metrics = tuple(metrics)
        needs = {METRICS[name].needs for name in self.metrics}
        self.count, self.detector = count, detector
        self.moments = FeatureStatistics() if "moments" in needs else None
        self.bank = FeatureBank() if "bank" in needs or keeps_features else None
        self.classes = ClassStatistics(count) if "classes" in needs else None
        assert "hits" not in needs or len(asked) == count, "a class for each image"
        self.hits = ClassHits(asked) if "hits" in needs else None
        self.features: torch.Tensor | None = None  # [n, d] on rank 0, after `finish`
        self._are_finite = torch.tensor(True)  # read only at the end, to avoid device syncs

    def append(self, images: torch.Tensor, numbers: Sequence[int]) -> None:
        """Adds images [B, C, H, W], uint8 or float32, which have these numbers."""
        self.append_features(self.detector(images), numbers)

    def append_features(self, features: torch.Tensor, numbers: Sequence[int]) -> None:
        """Adds features [B, d] of the images with these numbers."""
        self._are_finite = torch.isfinite(features).all() & self._are_finite
        if self.moments:
            self.moments.append(features)
        if self.bank:
            self.bank.append(features, numbers)
        if self.classes or self.hits:
            logits = self.detector.logits(features)
            for sums in filter(None, (self.classes, self.hits)):
                sums.append(logits, numbers)

    def add(self, batches: Iterable[tuple[torch.Tensor, Sequence[int]]],
            progress: Progress) -> None:
        """Adds this rank's batches of images, each with the numbers of its images.

        Raises:
            ValueError, OSError: an image can't be read. All ranks raise the same error.
        """
        error = None
        try:
            for images, numbers in batches:
                self.append(images, numbers)
                progress.update(len(images) * dist.get_world_size())
        except (ValueError, OSError) as caught:
            error = caught
        dist.raise_first(error)

    def finish(self) -> None:
        """Merges what the ranks have.

        Raises:
            ValueError: features are not finite. All ranks raise it.
        """
        if not all(dist.gather_objects(bool(self._are_finite))):
            raise ValueError(f"detector {self.detector.name}: features of an image are not finite; "
                             "the detector's weights may be damaged")
        if self.moments:
            self.moments.all_reduce()
        for sums in filter(None, (self.classes, self.hits)):
            sums.all_reduce()
        if self.bank:
            self.features = self.bank.gather()

    @property
    def sums(self) -> dict[str, Sums]:
        """The sums over the images so far, by name."""
        kept = {"moments": self.moments, "bank": self.bank, "classes": self.classes,
                "hits": self.hits}
        return {name: sums for name, sums in kept.items() if sums is not None}


@dataclass(frozen=True)
class Metric:
    """A metric: what it needs, the names of its values, and how they are computed."""

    needs: str  # 'moments', 'bank', 'classes' or 'hits' of the images
    values: tuple[str, ...]  # recorded names of its values, for Inception's features
    needs_reference_features: bool  # whether the reference's mean and covariance are not enough
    compute: Callable[[FeatureSet, Reference], tuple[float, ...]]
    needs_reference: bool = True  # if False, `compute` may get None as the reference


def _frechet(images: FeatureSet, reference: Reference) -> tuple[float]:
    return (frechet_distance(images.moments.mean(), images.moments.cov(),
                             reference.mu, reference.sigma),)


def _kernel(images: FeatureSet, reference: Reference) -> tuple[float, float]:
    return kernel_distance(images.features, reference.features)


def _precision_recall(images: FeatureSet, reference: Reference) -> tuple[float, float]:
    return precision_recall(images.features, reference.features, device=images.detector.device)


def _density_coverage(images: FeatureSet, reference: Reference) -> tuple[float, float]:
    return density_coverage(images.features, reference.features, device=images.detector.device)


def _inception_score(images: FeatureSet, reference: Reference) -> tuple[float, float]:
    return images.classes.score()


def _class_accuracy(images: FeatureSet, reference: Reference) -> tuple[float]:
    return (images.hits.share(),)


METRICS: Registry[Metric] = Registry("metric", {
    "fid": Metric("moments", ("fid",), False, _frechet),
    "kid": Metric("bank", ("kid", "kid_std"), True, _kernel),
    "pr": Metric("bank", ("precision", "recall"), True, _precision_recall),
    "dc": Metric("bank", ("density", "coverage"), True, _density_coverage),
    "is": Metric("classes", ("is", "is_std"), False, _inception_score, needs_reference=False),
    "ca": Metric("hits", ("class_accuracy",), False, _class_accuracy, needs_reference=False),
})


def metrics_that_need(needed: str, metrics: Iterable[str]) -> list[str]:
    """Returns the metrics for which `Metric.needs` is `needed`."""
    return [name for name in metrics if METRICS[name].needs == needed]


def metrics_that_compare(metrics: Iterable[str]) -> list[str]:
    """Returns the metrics that compare the images with a reference."""
    return [name for name in metrics if METRICS[name].needs_reference]


def check_names() -> None:
    """Raises ValueError if an added metric uses the value name of another metric."""
    taken: dict[str, str] = {}
    for name, metric in METRICS.items():
        for value in metric.values:
            if value in taken:
                raise ValueError(f"metric {name}: its value {value!r} has the name of a value of "
                                 f"{taken[value]}; give it another name")
            taken[value] = name


def collect(batches: Iterable[tuple[torch.Tensor, Sequence[int]]], *, image_shape: Sequence[int],
            count: int, detector: Detector, metrics: Iterable[str], is_8bit: bool = True,
            title: str | None = None, keeps_features: bool = False,
            asked: Sequence[int] | None = None) -> FeatureSet:
    """Returns what `metrics` need of all images, which are split over the ranks.

    `batches` are this rank's images [B, C, H, W], uint8 or, unless `is_8bit`, float32. Each batch
    comes with the numbers of its images among 0 ... count-1, which all ranks share. `title` is the
    text before the progress bar. For `asked` see `FeatureSet`.

    Raises:
        ValueError, OSError: an image can't be read. All ranks raise the same error.
    """
    features = FeatureSet(count, detector, metrics, keeps_features=keeps_features, asked=asked)
    # No image: fixes the number of features on a rank that gets none.
    features.append(no_images(image_shape, is_8bit), [])
    with Progress(count, title or "") as progress:
        features.add(batches, progress)
    features.finish()
    return features


def dataset_features(images: Images, detector: Detector, *, metrics: Iterable[str] = ("fid",),
                     batch: int, workers: int, title: str | None = None,
                     keeps_features: bool = False, asked: Sequence[int] | None = None
                     ) -> FeatureSet:
    """Returns what `metrics` need of a data set, see `collect`.

    A rank processes up to `batch` images at a time. `workers` processes read ahead; with 0, images
    are read when they are needed.

    Raises:
        ValueError: the detector does not take such images, or an image can't be decoded.
        OSError: an image can't be read. All ranks raise the same error.
    """
    detector.dim_of(images.image_shape, images.scale)
    own = [numbers for numbers in dist.split_for_rank(range(len(images)), batch) if numbers]
    pixels = (read[0] for read in read_in_processes(_PixelsOnly(images), own, workers=workers))
    return collect(zip(pixels, own, strict=True), image_shape=images.image_shape,
                   count=len(images), detector=detector, metrics=metrics,
                   is_8bit=images.scale is None, title=title, keeps_features=keeps_features,
                   asked=asked)


class _PixelsOnly:
    """A data set without its labels, which detectors don't use."""

    def __init__(self, images: Images):
        self._images = images

    def get_batch(self, indices: Sequence[int]) -> tuple[np.ndarray]:
        return (self._images.get_scored(indices),)
