"""Scores restoration while a run trains: PSNR and RMSE over the pairs of --eval-pairs.

A pair is an image y of a paired data set, the truth, and its condition image v, the measurement.
The averaged weights restore y as

    networks with a condition image    a sample given v, by --eval-solver and --eval-steps; pair k
                                       has seed k
    other networks                     D(v; s), one evaluation at the measurement itself, where
                                       s^2 is the mean of (v - y)^2 over all values of all pairs,
                                       in the network's scale

Images may be of any size. They are compared as by `generate.py` followed by `fid.py pairs`: in the
data's units, with PSNR over the range of the recorded scale.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.atomic import append_line
from dnnlib.cli import flag_errors
from dnnlib.progress import Progress
from dnnlib.util import json_value
from images.dataset import ImageFolderDataset
from images.image_files import error_prefix
from images.scaling import Scaling
from metrics.pair_files import summary_records
from metrics.paired import PAIRED_METRICS
from metrics.pairs import PairScore, value_range_of
from metrics.scoring import NonFiniteSamplesError
from pfgmpp.networks import Precond
from pfgmpp.samplers import CONSISTENCY, SamplerConfig, generate_images
from sampling.labels import GivenLabels
from sampling.seed_images import SeedImages
from torch_utils import distributed
from training.config import TrainConfig
from training.sample_grids import sampler_of
from training.trainer import Trainer
from training.validation import check_labels

METRICS = ("psnr", "rmse")
_BATCH = 64  # the most images at a time; fewer if --batch-gpu is smaller
_SEED = int.from_bytes(b"pairs", "big")  # of the choice of pairs, the same in every run


def open_pairs(config: TrainConfig, dataset: ImageFolderDataset) -> ImageFolderDataset:
    """Returns the pairs of --eval-pairs to use, with labels if training has them.

    They must be like `dataset`, the training data, except for their size. The images themselves
    are not read yet.

    Raises:
        ValueError: it is not a paired data set, or not like the training data.
        OSError: it can't be read.
    """
    source = f"--eval-pairs={config.eval_pairs}"
    with flag_errors("--eval-pairs", config.eval_pairs, "name a data set with condition images"):
        pairs = ImageFolderDataset(config.eval_pairs, use_labels=config.cond, use_conditions=True,
                                   max_size=config.eval_num, random_seed=_SEED, any_size=True)
    with error_prefix(f"{source}: of the training data, "):
        value_range_of(dataset.scaling)
    kinds = [("images", dataset.num_channels, dataset.scaling, pairs.num_channels, pairs.scaling)]
    if config.cond_image:
        kinds.append(("condition images", dataset.cond_channels, dataset.cond_scaling,
                      pairs.cond_channels, pairs.cond_scaling))
    elif pairs.cond_channels != pairs.num_channels \
            or pairs.cond_scaling.is_8bit != pairs.scaling.is_8bit:
        raise ValueError(f"{source}: its condition images are not of the same kind as its images, "
                         "so they can't be denoised; train with --cond-image=1, or give "
                         "measurements in the units of the images")
    for name, channels, scaling, given, own in kinds:
        if channels != given:
            raise ValueError(f"{source}: its {name} have {given} channels, but those of the "
                             f"training data have {channels}; convert them with dataset_tool.py")
        if scaling != own:
            raise ValueError(f"{source}: its {name} have another scale than those of the training "
                             "data; convert both with the same dataset_tool.py --scale")
    if config.method == "ipfm" and not config.cond_image:
        raise ValueError(f"{source} with --method=ipfm: a generator makes images from noise and "
                         "can't denoise a measurement; leave --eval-pairs out")
    check_labels(source, dataset, pairs)
    return pairs


def sampler_of_pairs(config: TrainConfig, net: Precond, pairs: ImageFolderDataset,
                     scaling: Scaling) -> SamplerConfig:
    """Returns the sampler that restores images from the measurements of pairs, on every rank.

    Args:
        config: the run's options.
        net: the run's network, whose noise levels are checked.
        pairs: see `open_pairs`.
        scaling: of the training data's images.

    Raises:
        ValueError: an image can't be read, measurements equal their truths, or their noise is one
            at which the network can't be evaluated.
    """
    if net.cond_channels:
        sampler = sampler_of(config)
    else:
        sampler = SamplerConfig(sigmas=(_noise_of_measurements(pairs, scaling),), init_noise=0,
                                solver=CONSISTENCY if config.method else None)
    with error_prefix(f"--eval-pairs={pairs.path}: "):
        sampler.check(net)
    return sampler


@functools.lru_cache(maxsize=1)  # called before the run directory is made, and then for scores
def _noise_of_measurements(pairs: ImageFolderDataset, scaling: Scaling) -> float:
    """Returns the root mean square of v - y over all pairs, in the network's scale."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()

    def sums() -> list[tuple]:
        found = []
        for number in range(len(pairs))[rank::world_size]:
            images, _, measured = pairs.get_batch([number])
            v, y = (scaling.to_network(torch.from_numpy(values)).double()
                    for values in (measured, images))
            found.append((number, float((v - y).square().sum()), images.size))
        return found

    found = _from_all_ranks(sums)
    sigma = math.sqrt(math.fsum(square for _, square, _ in found)
                      / sum(count for *_, count in found))
    if sigma == 0:
        raise ValueError(f"--eval-pairs={pairs.path}: its condition images equal its images; they "
                         "must be measurements of them")
    return sigma


class PairEvaluator:
    """PSNR and RMSE of the averaged weights on pairs.

    Each call appends one line per metric to `path`.

    Raises:
        ValueError: an image can't be read, or measurements equal their truths.
    """

    name, is_lower_better = "PSNR", False

    def __init__(self, trainer: Trainer, pairs: ImageFolderDataset, path: Path):
        self._trainer, self._pairs, self._path = trainer, pairs, path
        self._scaling = trainer.dataset.scaling
        self._range = value_range_of(self._scaling)
        self.sampler = sampler_of_pairs(trainer.config, trainer.ema, pairs, self._scaling)
        self._sizes = distributed.run_on_rank0(lambda: pairs.sizes)
        if trainer.net.cond_channels:
            self._given: dict[str, Any] = {
                "conditions": SeedImages(pairs, trainer.dataset.cond_scaling)}
            how = f"samples given the measurements, {self.sampler.nfe} evaluations each"
        else:
            self._given = {"inits": SeedImages(pairs, self._scaling)}
            how = (f"one evaluation at sigma {self.sampler.sigmas[0]:.4g}, the noise of the "
                   "measurements")
        if trainer.net.label_dim:
            missing = trainer.net.label_dim - pairs.label_dim  # classes that only training has
            labels = pairs.labels_of(pairs.locate(range(len(pairs)))[0])
            self._given["labels"] = GivenLabels(np.pad(labels, [(0, 0), (0, missing)]))
        low, high = self._range
        distributed.print0(f"Pairs      {len(pairs)} of {pairs.path}: {how}; PSNR over {low:g} to "
                           f"{high:g}")

    @functools.cached_property
    def compared_by(self) -> dict[str, Any]:
        """What two scores must share to be comparable, as plain data."""
        compared = {"metric": "psnr", "num": len(self._pairs), "range": list(self._range),
                    "precision": "fp32", "reference_sha256": self._pairs.fingerprint}
        if "conditions" in self._given:
            compared |= {"solver": self.sampler.solver, "num_steps": self.sampler.num_steps}
        return compared

    def __call__(self) -> dict[str, float]:
        """Returns the means by name, PSNR first, the same on every rank.

        Call it within `Trainer.average_in_fp32`.

        Raises:
            NonFiniteSamplesError: images have values that are not finite. All ranks raise it.
        """
        found = _from_all_ranks(self._scores)
        lost = sum(values is None for _, values in found)
        if lost:
            raise NonFiniteSamplesError(f"{lost} of {len(found)} restored images have values that "
                                        "are not finite, so there is no PSNR; the network may have "
                                        "diverged")
        records = summary_records([PairScore("", "", values, None) for _, values in found])
        if self._trainer.rank == 0:
            self._record(records)
        return {record["metric"]: float(record["value"]) for record in records}

    def _batches(self, most: int) -> list[list[int]]:
        """Returns the pairs of this rank in batches, each of images of one size."""
        world, batches = self._trainer.world_size, []
        for size in dict.fromkeys(self._sizes):
            numbers = [k for k, own in enumerate(self._sizes) if own == size]
            step = min(most, -(-len(numbers) // world))
            batches += [numbers[i:i + step] for i in range(0, len(numbers), step)]
        return batches[self._trainer.rank::world]

    def _scores(self) -> list[tuple[int, dict[str, float] | None]]:
        """Returns the number and metrics of each pair of this rank."""
        trainer, found = self._trainer, []
        batches = self._batches(min(trainer.micro_batch, _BATCH))
        images = generate_images(trainer.ema, batches, sampler=self.sampler, device=trainer.device,
                                 **self._given)
        with Progress(len(self._pairs), self.name) as progress:
            for numbers, batch in zip(batches, images, strict=True):
                found += [(number, self._score(number, image))
                          for number, image in zip(numbers, batch.images, strict=True)]
                progress.update(len(numbers) * trainer.world_size)
        return found

    def _score(self, number: int, image: torch.Tensor) -> dict[str, float] | None:
        """Returns the metrics of a restored image; None if it is not finite."""
        if not image.isfinite().all():
            return None
        restored = self._scaling.to_data(image).cpu().numpy().astype(np.float64)
        truth = self._pairs.get_batch([number])[0][0].astype(np.float64)
        return {name: PAIRED_METRICS[name](restored, truth, self._range) for name in METRICS}

    def _record(self, records: Sequence[dict[str, Any]]) -> None:
        trainer = self._trainer
        sampler = json_value({**dataclasses.asdict(self.sampler), "nfe": self.sampler.nfe,
                              "D": trainer.ema.D, "precision": "fp32"})
        facts = {"kimg": trainer.cur_nimg / 1e3, "num": len(self._pairs),
                 "range": list(self._range), "clip": False, "sampler": sampler,
                 "reference": str(self._pairs.path), "reference_num": len(self._pairs),
                 "reference_sha256": self._pairs.fingerprint,
                 "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            append_line(self._path, "\n".join(json.dumps(record | facts) for record in records))
        except OSError as error:
            distributed.warn0(f"{self._path} not written: {error}")


def _from_all_ranks(work: Callable[[], list[tuple]]) -> list[tuple]:
    """Returns the rows from `work` on all ranks, sorted by their first entries, on every rank.

    An error on one rank is raised on all.
    """
    rows, error = [], None
    try:
        rows = work()
    except (ValueError, OSError) as caught:
        error = caught
    parts = distributed.gather_objects((rows, error))
    for _, first in parts:
        if first is not None:
            raise first
    return sorted((row for rows, _ in parts for row in rows), key=lambda row: row[0])
