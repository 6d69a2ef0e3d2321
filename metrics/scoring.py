"""Scores of a network: from seeds to features, without writing images."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from dnnlib.progress import Progress
from dnnlib.util import format_ranges, is_url
from images.dataset import ImageFolderDataset
from images.given_images import GivenImages
from images.npz_files import is_npz, npz_contents
from images.scaling import Scaling
from metrics import dinov2
from metrics.detectors import (
    Detector,
    DinoV2,
    Inception,
    build_detector,
    describe_detector,
    detector_class,
    no_images,
)
from metrics.evaluator import (
    Evaluator,
    check_alike,
    check_asked,
    check_classifies,
    check_made_for,
)
from metrics.metrics import FeatureSet, metrics_that_need
from metrics.references import Reference, load_reference
from metrics.unfinished import SAVE_SEC, UnfinishedSums
from pfgmpp.samplers import SampleBatch
from torch_utils import distributed as dist

_MAX_NAMED = 6  # seeds in a message


class NonFiniteSamplesError(ValueError):
    """An error for samples whose values are not finite, so that no score hides them."""


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
    detector: str, reference: str | GivenImages | None, metrics: Iterable[str],
    device: torch.device,
    sets: dict[str, Scored], *, batch: int, workers: int, by_class: bool = False,
) -> Evaluator:
    """Returns the evaluator for these sets of images, after checking that all can be scored.

    Args:
        detector: see `metrics.detectors.build_detector`.
        reference: statistics (.npz or .pkl, or their address), a data set (folder, .zip or .npz
            of images), images in memory, or None.
        metrics: names of the metrics.
        device: the device for the computation.
        sets: the images to score, by the names that errors use.
        batch: the maximum number of images of a reference data set at a time.
        workers: processes that read the images of a reference data set ahead.
        by_class: whether classes are scored separately. The reference must then be a data set with
            classes.

    Raises:
        ValueError: detector, reference, metrics and images do not match.
        OSError: a file can't be read.
    """
    for name, images in sets.items():  # before weights are downloaded
        try:
            detector_class(detector).check_kind(images.image_shape[0], images.scale is None)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    is_data = reference is not None and dist.broadcast_object(
        _is_data(reference))
    evaluator = Evaluator(
        detector, ImageFolderDataset(reference, use_labels=by_class) if is_data else reference,
        metrics, device, name=str(reference), by_class=by_class)
    for name, images in sets.items():
        evaluator.check(images.image_shape, name, images.scale)
    evaluator.prepare(batch, workers)
    return evaluator


def scored_name(name: str, patch: int | None) -> str:
    """Returns the name that errors use for the data of networks trained on images or patches."""
    return name if patch is None else f"{name} in patches (--patch={patch})"


def check_scoring(detector: str, reference: str, metrics: Iterable[str],
                  dataset: ImageFolderDataset, name: str) -> None:
    """Raises the errors of `open_evaluator` for networks trained on a data set called `name`.

    No detector is built. With a reference file, some weights are read to compute their hash.

    Raises:
        ValueError: detector, reference, metrics and images do not match.
        OSError: a file can't be read.
    """
    try:
        kind = detector_class(detector)
        kind.check_kind(dataset.num_channels, dataset.scale is None)
        check_classifies(detector, metrics)
        if kind is DinoV2:
            dinov2.require_package()
        elif kind is not Inception:  # Inception would load weights
            built = build_detector(detector, "cpu")
            built.dim_of(dataset.image_shape, dataset.scale)
        if metrics_that_need("hits", metrics) and not dataset.has_onehot_labels:
            raise ValueError("has no classes, which class accuracy needs")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if metrics_that_need("hits", metrics):
        check_asked(built, dataset.label_dim, name)
    if is_url(reference):
        return
    compared: Reference | ImageFolderDataset = ImageFolderDataset(reference) if _is_data(
        reference) else load_reference(reference, describe_detector(detector)[0])
    if isinstance(compared, Reference):
        check_made_for(compared, reference, detector, metrics)
    check_alike(compared, reference, dataset.image_shape, name, dataset.scale)


def _is_data(reference: str | GivenImages) -> bool:
    """Whether a reference is a data set; an .npz that holds both images and statistics is not."""
    if isinstance(reference, GivenImages):
        return True
    if os.path.isfile(reference) and is_npz(reference):
        with contextlib.suppress(OSError, ValueError):  # reported when statistics are read
            contents = npz_contents(reference)
            return "images" in contents and "statistics" not in contents
    return os.path.isdir(reference) or reference.endswith(".zip")


def network_features(
    sampler: Sampler, seeds: Sequence[int], detector: Detector, *, metrics: Iterable[str],
    batch: int, title: str | None = None, unfinished: UnfinishedSums | None = None,
    keeps_features: bool = False, asked: Sequence[int] | None = None,
) -> FeatureSet:
    """Returns what `metrics` need of the images of `seeds`, as if they were written and read.

    Args:
        sampler: the source of the images.
        seeds: one for each image.
        detector: the detector that computes their features.
        metrics: names of the metrics.
        batch: the maximum number of images at a time on one rank.
        title: the text before the progress bar.
        unfinished: where sums are saved every few minutes, and from where they are resumed.
        keeps_features: keep the features even if no metric needs them.
        asked: the class of the image of each seed, for class accuracy.

    Raises:
        NonFiniteSamplesError: images have values that are not finite. All ranks raise it.
    """
    scaling, lost = sampler.scaling, []
    unfinished = unfinished or UnfinishedSums(None, {})

    def empty() -> FeatureSet:
        features = FeatureSet(len(seeds), detector, metrics, keeps_features=keeps_features,
                              asked=asked)
        # No image: fixes the number of features on a rank that gets none.
        features.append(no_images(sampler.image_shape, scaling.is_8bit), [])
        return features

    features, done = unfinished.restored(empty)
    if done:
        dist.print0(f"Resume     {title or 'images'}: {done} of {len(seeds)} are done")
    rounds = _rounds(len(seeds), done, batch)
    own = [part[dist.get_rank()] for part in rounds]

    def batches() -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
        numbers = [part for part in own if part]
        samples = sampler.images([seeds[i] for i in part] for part in numbers)
        for part, sample in zip(numbers, samples, strict=True):
            finite = sample.images.isfinite().flatten(1).all(dim=1).tolist()
            lost.extend(seeds[i] for i, is_good in zip(part, finite, strict=True) if not is_good)
            images = scaling.to_data(sample.images)
            yield images if scaling.is_8bit else scaling.to_network(images), part

    stream = batches()
    with Progress(len(seeds), title or "", initial=done) as progress:
        at_once = 1 if unfinished.is_kept else len(rounds)
        while rounds:
            start = time.monotonic()
            part, rounds = rounds[:at_once], rounds[at_once:]
            count = sum(bool(ranks[dist.get_rank()]) for ranks in part)
            features.add(itertools.islice(stream, count), progress)
            _refuse_lost(lost, len(seeds))
            seconds = dist.broadcast_object(time.monotonic() - start)
            at_once = max(1, round(SAVE_SEC * len(part) / max(seconds, 1e-6)))
            if seconds >= SAVE_SEC / 2 and unfinished.is_kept:  # the next step may be killed too
                unfinished.save(features, rounds[0][0][0] if rounds else len(seeds))
    features.finish()
    return features


def _rounds(count: int, done: int, batch: int) -> list[list[list[int]]]:
    """Returns the batches of all ranks, round by round, of images from number `done` to `count`.

    If `done` is after whole rounds, the batches equal those of a command that begins at 0. This
    matters because images differ in the last digit if the size of their batch differs.
    """
    if done == count:
        return []
    world = dist.get_world_size()
    batches = dist.split_for_all_ranks(range(done, count), batch)
    return [batches[i:i + world] for i in range(0, len(batches), world)]


def _refuse_lost(lost: Sequence[int], count: int) -> None:
    """Raises NonFiniteSamplesError on all ranks if one of them has lost images, given by seed."""
    seeds = sorted(seed for part in dist.gather_objects(list(lost)) for seed in part)
    if seeds:
        more = ", ..." if len(seeds) > _MAX_NAMED else ""
        raise NonFiniteSamplesError(
            f"{len(seeds)} of {count} images have values that are not finite, so there is no "
            f"score: seeds {format_ranges(seeds[:_MAX_NAMED])}{more}; the network may have "
            "diverged, or --precision may be too low for it")
