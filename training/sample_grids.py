"""Pictures of a run: its training images, and samples of fixed seeds in the same layout."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from images.dataset import ImageFolderDataset, order_at
from images.grid import class_label, image_grid, save_png
from images.scaling import Scaling, display_window
from pfgmpp.few_steps import FewStep
from pfgmpp.loss import LSUN_SIGMA_MAX
from pfgmpp.samplers import SamplerConfig, generate_images
from sampling.labels import GivenLabels, SeedLabels, classes_with_images
from sampling.seed_images import SeedImages
from torch_utils import distributed
from training.config import TrainConfig
from training.trainer import Trainer

_GRID_SEED = 0
_GRID_MAX_ROWS = 16


def sample_grid(trainer: Trainer) -> PIL.Image.Image | None:
    """Returns a grid of EMA samples of fixed seeds on rank 0; rows are classes if there are any.

    With condition images, row i has the condition image of training image i, then samples, then
    the image itself.
    """
    dataset = trainer.dataset
    classes, rows, columns = _grid_layout(trainer)
    if rows == 0:
        return None
    sampler, shown = sampler_of(trainer.config), _shown(dataset.scaling, trainer.config)
    mine = {}
    for row in range(rows)[trainer.rank::trainer.world_size]:
        seeds = range(row * columns, (row + 1) * columns)
        number = row % len(dataset)
        given = {"class_idx": classes[row]} if classes else {"labels": labels_of_seeds(dataset)}
        if dataset.cond_channels:
            given = _grid_condition(dataset, number)
        [batch] = generate_images(trainer.ema, [seeds], sampler=sampler, device=trainer.device,
                                  **given)
        made = dataset.scaling.to_data(batch.images).cpu().numpy()
        mine[row] = [*shown.to_picture(made)]
        if dataset.cond_channels:
            images, _, conditions = dataset.get_batch([number])
            condition = _shown(dataset.cond_scaling, trainer.config).to_picture(conditions)[0]
            mine[row] = [condition, *mine[row], shown.to_picture(images)[0]]
    pictures = {row: images for part in distributed.gather_objects(mine, in_training=True)
                for row, images in part.items()}
    if trainer.rank != 0:
        return None
    return image_grid([pictures[row] for row in range(rows)], _row_labels(trainer, classes))


def _shown(scaling: Scaling, config: TrainConfig) -> Scaling:
    """Returns the scaling that turns data into pictures; 8-bit data are shown as they are."""
    return scaling if config.window is None or scaling.is_8bit else display_window(*config.window)


def sampler_of(config: TrainConfig) -> SamplerConfig:
    """Returns the settings by which a run samples for grids and scores."""
    if config.method:
        return SamplerConfig.of_few_steps(FewStep.of(config.method, config.first_level),
                                          config.eval_steps)
    return SamplerConfig(num_steps=config.eval_steps,
                         solver=None if config.eval_solver == "heun" else config.eval_solver,
                         sigma_max=LSUN_SIGMA_MAX if config.lsun else None)


def _grid_condition(dataset: ImageFolderDataset, number: int) -> dict[str, Any]:
    """Returns keywords of `generate_images` for the condition and label of a training image."""
    of_seed = SeedImages.of_conditions(dataset)
    return {"conditions": lambda seeds: of_seed([number] * len(seeds)),
            "labels": GivenLabels(dataset.get_label(number)[None]) if dataset.has_labels else None}


def labels_of_seeds(dataset: ImageFolderDataset) -> SeedLabels | None:
    """Returns the labels of samples from a network that is trained on these data.

    Classes that have images are used equally often. With label vectors, seed k has that of image
    k mod n. None stands for classes drawn as usual, or for no labels.
    """
    if not dataset.has_labels:
        return None
    if not dataset.has_onehot_labels:
        return GivenLabels(dataset.labels_of(dataset.locate(range(len(dataset)))[0]))
    counts = np.bincount(dataset.class_numbers, minlength=dataset.label_dim)
    return classes_with_images(counts.tolist())


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
    shown = _shown(dataset.scaling, trainer.config)
    pictures = [shown.to_picture(dataset.get_batch(group)[0]) for group in groups]
    save_png(path, image_grid(pictures, _row_labels(trainer, classes)))


def _row_labels(trainer: Trainer, classes: list[int]) -> list[str]:
    return [class_label(number, trainer.dataset.class_names) for number in classes]


def _grid_layout(trainer: Trainer) -> tuple[list[int], int, int]:
    """Returns (classes of the rows, if any, rows, columns) of about `config.samples` images.

    The classes are the first that have images. With condition images, there are no classes.
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
    return classes, rows, -(-count // rows) if classes else count // rows
