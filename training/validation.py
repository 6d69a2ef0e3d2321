"""The loss of the averaged weights on held-out images: always the same images, noise and levels.

    Loss/val = mean over images and pixels of weight(sigma) * (D_ema(y + n; sigma, labels) - y)^2

This is the loss that training minimises (docs/mathematics.md, section 9), without augmentation,
dropout or stable targets. Images are taken in chunks of a fixed size, and a chunk's draws depend
only on its number. So the value is the same, up to rounding, for every number of processes and
every --batch-gpu, and runs with different seeds are compared on the same draws. Levels and weights
are those of the run's loss: --precond, D, --lsun, --P_mean, --P_std and --sigma-data change them.
"""

import contextlib

import torch
import torch.nn.functional

from images.dataset import ImageFolderDataset
from images.patches import RandomPatches
from images.scaling import Scaling
from torch_utils import distributed
from torch_utils.loading import read_in_processes, read_in_threads
from torch_utils.misc import mix_seed
from training.config import TrainConfig
from training.trainer import Trainer

VALIDATION_LOSS = "Loss/val"  # in stats.jsonl
CHUNK = 64  # images that draw together; another number would change the draws
_SEED = int.from_bytes(b"val", "big")  # of the images chosen and their draws, the same in every run


def open_held_out(config: TrainConfig, dataset: ImageFolderDataset) -> ImageFolderDataset:
    """Returns the images of --val-data to use, with labels and conditions if training has them.

    They must be like `dataset`, the training data. The images themselves are not read yet.

    Raises:
        ValueError: it is not a data set, or not like the training data.
        OSError: it can't be read.
    """
    source = f"--val-data={config.val_data}"
    held_out = ImageFolderDataset(
        config.val_data, use_labels=config.cond, use_conditions=config.cond_image,
        max_size=config.val_num, random_seed=_SEED, patch=config.patch)
    kinds = [("images", dataset.image_shape, held_out.image_shape)]
    scales = [("images", dataset.scaling, held_out.scaling)]
    if config.cond_image:
        kinds.append(("condition images", dataset.cond_shape, held_out.cond_shape))
        scales.append(("condition images", dataset.cond_scaling, held_out.cond_scaling))
    for name, wanted, given in kinds:
        if list(wanted) != list(given):
            given, wanted = ("x".join(map(str, shape)) for shape in (given, wanted))
            raise ValueError(f"{source}: its {name} are {given} (channels x height x width), but "
                             f"those of the training data are {wanted}; convert them with "
                             "dataset_tool.py")
    for name, wanted, given in scales:
        if wanted != given:
            raise ValueError(f"{source}: its {name} have another scale than those of the training "
                             "data; convert both with the same dataset_tool.py --scale")
    check_labels(source, dataset, held_out)
    return held_out


def check_labels(source: str, dataset: ImageFolderDataset, held_out: ImageFolderDataset) -> None:
    """Raises ValueError unless the labels fit the training data's; some classes may be missing."""
    if not dataset.has_labels:
        return
    if not held_out.has_labels:
        raise ValueError(f"{source}: has no labels, which --cond=1 needs; add them to its "
                         "dataset.json or train with --cond=0")
    fits = held_out.label_dim <= dataset.label_dim if dataset.has_onehot_labels else (
        held_out.label_dim == dataset.label_dim)
    if held_out.has_onehot_labels != dataset.has_onehot_labels or not fits:
        given, wanted = (f"{data.label_dim} {kind}" for data in (held_out, dataset)
                         for kind in ["classes" if data.has_onehot_labels else "numbers each"])
        raise ValueError(f"{source}: its labels are {given}, but those of the training data are "
                         f"{wanted}; label it like the training data")


class Validation:
    """The loss of a run's averaged weights on held-out images."""

    def __init__(self, trainer: Trainer, held_out: ImageFolderDataset):
        self._trainer, self._data = trainer, held_out
        self._source = held_out if held_out.patch is None else RandomPatches(
            held_out, held_out, _SEED)
        self._rng = torch.Generator(trainer.device)

    @torch.no_grad()
    def __call__(self) -> float:
        """Returns the loss of the present weights, the same on every rank.

        Every rank must call it, within `Trainer.average_in_fp32`.
        """
        trainer, size = self._trainer, min(self._trainer.micro_batch, CHUNK)
        chunks = range(-(-len(self._data) // CHUNK))[trainer.rank::trainer.world_size]
        parts = [(chunk, part) for chunk in chunks for part in self._parts(chunk, size)]
        numbers = [range(chunk * CHUNK + part.start, chunk * CHUNK + part.stop)
                   for chunk, part in parts]
        read = read_in_threads if self._data.is_packed else read_in_processes
        batches = read(self._source, numbers, workers=trainer.config.workers,
                       pin_memory=trainer.device.type == "cuda")
        # Sum and number of pixels; float64 keeps a sum over all of them exact enough.
        total = torch.zeros([2], dtype=torch.float64, device=trainer.device)
        with contextlib.closing(batches):
            for (chunk, part), (images, labels, *conditions) in zip(parts, batches, strict=True):
                loss = self._loss(chunk, part, images, labels, conditions)
                total += torch.stack([loss.sum(dtype=torch.float64),
                                      torch.full_like(total[0], loss.numel())])
        total, count = distributed.all_reduce_sum_(total).tolist()
        return total / count

    def _parts(self, chunk: int, size: int) -> list[slice]:
        """Returns the slices of a chunk, of up to `size` images, the last chunk being shorter."""
        length = min(len(self._data) - chunk * CHUNK, CHUNK)
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    def _loss(self, chunk: int, part: slice, images: torch.Tensor, labels: torch.Tensor,
              conditions: list[torch.Tensor]) -> torch.Tensor:
        """Returns the unreduced loss of a part of a chunk, [B, C, H, W]."""
        trainer = self._trainer
        missing = trainer.net.label_dim - labels.shape[1]  # classes that only training has
        labels = torch.nn.functional.pad(labels, (0, missing)) if missing else labels
        rng = self._rng.manual_seed(mix_seed(_SEED, chunk))
        draws = trainer.loss_fn.draw((CHUNK, *self._data.image_shape), rng)[part]
        condition = self._to_network(conditions[0], self._data.cond_scaling) if conditions else None
        return trainer.loss_fn(
            trainer.ema, self._to_network(images, self._data.scaling),
            labels.to(trainer.device, non_blocking=True), draws=draws, condition=condition)

    def _to_network(self, images: torch.Tensor, scaling: Scaling) -> torch.Tensor:
        return scaling.to_network(images.to(self._trainer.device, non_blocking=True))
