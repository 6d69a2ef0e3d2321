"""Scores of a network: from seeds to features, without writing images."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from dnnlib.util import format_ranges, is_url
from images.dataset import ImageFolderDataset
from images.scaling import Scaling
from metrics.detectors import Detector, Inception, build_detector, detector_class
from metrics.evaluator import Evaluator, check_alike, check_made_for
from metrics.metrics import FeatureSet, collect, no_images
from metrics.references import Reference, load_reference
from pfgmpp.samplers import SampleBatch
from torch_utils import distributed as dist

_MAX_NAMED = 6  # seeds in a message


class NonFiniteSamplesError(ValueError):
    """Samples whose values are not finite, which no score should hide."""


class Scored(Protocol):
    """A source of images to score: a data set or a sampler."""

    image_shape: Sequence[int]
    scale: dict[str, Any] | None


class Sampler(Protocol):
    """A source of samples, such as `network_sampler.NetworkSampler`."""

    image_shape: tuple[int, int, int]
    scaling: Scaling

    def images(self, batches: Iterable[Sequence[int]]) -> Iterator[SampleBatch]:
        """Yields the images of each batch of seeds."""


def open_evaluator(
    detector: str, reference: str | None, metrics: Iterable[str], device: torch.device,
    sets: dict[str, Scored], *, batch: int, workers: int,
) -> Evaluator:
    """Returns the evaluator for images of these sets; what can't be scored is refused at once.

    Args:
        detector: see `metrics.detectors.build_detector`.
        reference: statistics (.npz, or their address), a data set (folder or .zip), or None.
        metrics: names of the metrics.
        device: where to compute.
        sets: the images to score, by what errors call them.
        batch: the most images of a reference data set at a time.
        workers: processes that read them ahead.

    Raises:
        ValueError: detector, reference, metrics and images do not fit.
        OSError: a file can't be read.
    """
    for name, images in sets.items():  # before weights are downloaded
        try:
            detector_class(detector).check_kind(images.image_shape[0], images.scale is None)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    is_data = reference is not None and dist.broadcast_object(
        _is_data(reference))
    evaluator = Evaluator(detector, ImageFolderDataset(reference) if is_data else reference,
                          metrics, device, name=reference)
    for name, images in sets.items():
        evaluator.check(images.image_shape, name, images.scale)
    evaluator.prepare(batch, workers)
    return evaluator


def scored_name(name: str, patch: int | None) -> str:
    """Returns what errors call the data of networks that are trained on them or on patches."""
    return name if patch is None else f"{name} in patches (--patch={patch})"


def check_scoring(detector: str, reference: str, metrics: Iterable[str],
                  dataset: ImageFolderDataset, name: str) -> None:
    """Refuses what `open_evaluator` would refuse for networks trained on a data set called `name`.

    Nothing is downloaded, and no weights of detectors are read.

    Raises:
        ValueError: detector, reference, metrics and images do not fit.
        OSError: a file can't be read.
    """
    try:
        detector_class(detector).check_kind(dataset.num_channels, dataset.scale is None)
        if not issubclass(detector_class(detector), Inception):  # which has weights
            built = build_detector(detector, "cpu")
            features = built(no_images(dataset.image_shape, dataset.scale is None))
            if "is" in metrics:
                built.logits(features)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if is_url(reference):
        return
    compared: Reference | ImageFolderDataset = ImageFolderDataset(reference) if _is_data(
        reference) else load_reference(reference)
    if isinstance(compared, Reference):
        check_made_for(compared, reference, detector, metrics)
    check_alike(compared, reference, dataset.image_shape, name, dataset.scale)


def _is_data(reference: str) -> bool:
    return os.path.isdir(reference) or reference.endswith(".zip")


def network_features(sampler: Sampler, seeds: Sequence[int], detector: Detector, *,
                     metrics: Iterable[str], batch: int, title: str | None = None) -> FeatureSet:
    """Returns what `metrics` need of the images of `seeds`, as they would be written and read.

    `batch` is the most images at a time on one rank, `title` the text before the progress bar.

    Raises:
        NonFiniteSamplesError: images have values that are not finite. All ranks raise it.
    """
    scaling, is_finite = sampler.scaling, []
    numbers = [own for own in dist.split_for_rank(range(len(seeds)), batch) if own]

    def data() -> Iterator[torch.Tensor]:
        for sample in sampler.images([seeds[i] for i in own] for own in numbers):
            is_finite.append(sample.images.isfinite().flatten(1).all(dim=1))
            yield scaling.to_data(sample.images)

    images = data() if scaling.is_8bit else map(scaling.to_network, data())
    found = collect(zip(images, numbers, strict=True), image_shape=sampler.image_shape,
                    count=len(seeds), detector=detector, metrics=metrics, is_8bit=scaling.is_8bit,
                    title=title)
    own = [seeds[i] for part in numbers for i in part]
    finite = torch.cat(is_finite).tolist() if is_finite else []
    lost = [seed for seed, is_good in zip(own, finite, strict=True) if not is_good]
    lost = sorted(seed for part in dist.gather_objects(lost) for seed in part)
    if lost:
        more = ", ..." if len(lost) > _MAX_NAMED else ""
        raise NonFiniteSamplesError(
            f"{len(lost)} of {len(seeds)} images have values that are not finite, so there is no "
            f"score: seeds {format_ranges(lost[:_MAX_NAMED])}{more}; the network may have "
            "diverged, or --precision may be too low for it")
    return found
