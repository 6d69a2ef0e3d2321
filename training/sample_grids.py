"""Pictures of a run: its training images, and samples of fixed seeds in the same layout."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from images.dataset import ImageFolderDataset, order_at
from images.grid import image_grid, save_png
from pfgmpp.loss import LSUN_SIGMA_MAX
from pfgmpp.samplers import SamplerConfig, generate_images, to_uint8
from sampling.network_sampler import SeedImages
from torch_utils import distributed
from training.trainer import Trainer

_GRID_SEED = 0
_GRID_MAX_ROWS = 16


def sample_grid(trainer: Trainer) -> PIL.Image.Image | None:
    """Returns a grid of EMA samples of fixed seeds on rank 0; rows are classes if there are any.

    With condition images, row i has the condition image of training image i, then samples, then
    the image itself.
    """
    has_conditions = trainer.dataset.cond_channels > 0
    classes, rows, columns = _grid_layout(trainer)
    if rows == 0:
        return None
    sampler = SamplerConfig(sigma_max=LSUN_SIGMA_MAX if trainer.config.lsun else None)
    mine = {}
    for row in range(rows)[trainer.rank::trainer.world_size]:
        seeds = range(row * columns, (row + 1) * columns)
        number = row % len(trainer.dataset)
        given = _grid_condition(trainer, number) if has_conditions else {}
        [batch] = generate_images(
            trainer.ema, [seeds], sampler=sampler, device=trainer.device,
            **({"class_idx": classes[row] if classes else None} | given))
        mine[row] = [*to_uint8(batch.images).cpu().numpy()]
        if has_conditions:
            mine[row] = _with_truth(trainer.dataset, number, mine[row])
    pictures = {row: images for part in distributed.gather_objects(mine)
                for row, images in part.items()}
    if trainer.rank != 0:
        return None
    return image_grid([pictures[row] for row in range(rows)], list(map(str, classes)))


def _grid_condition(trainer: Trainer, number: int) -> dict[str, Any]:
    """Returns what `generate_images` is told to sample for the condition and class of an image."""
    label = trainer.dataset.get_label(number)
    of_seed = SeedImages.of_conditions(trainer.dataset)
    return {"conditions": lambda seeds: of_seed([number] * len(seeds)),
            "class_idx": int(label.argmax()) if trainer.dataset.has_onehot_labels else None}


def _with_truth(dataset: ImageFolderDataset, number: int,
                samples: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the condition image of an image, samples, and the image, to look at."""
    images, _, conditions = dataset.get_batch([number])
    return [dataset.cond_scaling.to_picture(conditions)[0], *samples,
            dataset.scaling.to_picture(images)[0]]


def save_real_grid(trainer: Trainer, path: Path) -> None:
    """Writes a grid of training images in the layout of the sample grids."""
    dataset = trainer.dataset
    classes, rows, columns = _grid_layout(trainer)
    if rows == 0:
        return
    order = order_at(len(dataset), _GRID_SEED, range(len(dataset)))
    if classes:
        labels = dataset.class_numbers[order]
        groups = [order[labels == k][:columns] for k in classes]
    else:
        groups = np.array_split(order[:rows * columns], rows)
    pictures = [dataset.scaling.to_picture(dataset.get_batch(group)[0]) for group in groups]
    save_png(path, image_grid(pictures, list(map(str, classes))))


def _grid_layout(trainer: Trainer) -> tuple[list[int], int, int]:
    """Returns (classes of the rows, if any, rows, columns) of about `config.samples` images.

    The classes are the first that have images, and none where there are condition images.
    """
    count = trainer.config.samples
    if count is None:
        count = 64 if trainer.device.type == "cuda" else 16
    if count == 0:
        return [], 0, 0
    classes = []
    if trainer.dataset.has_onehot_labels and not trainer.dataset.cond_channels:
        classes = np.unique(trainer.dataset.class_numbers)[:min(count, _GRID_MAX_ROWS)].tolist()
    rows = len(classes) or min(math.isqrt(count), _GRID_MAX_ROWS)
    return classes, rows, count // rows
