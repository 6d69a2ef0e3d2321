"""Training of a classifier of small images, with scikit-learn."""

import dataclasses
import importlib.util
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from images.dataset import ImageFolderDataset
from metrics.classifier import MAX_PIXELS, Perceptron

if TYPE_CHECKING:
    from sklearn.neural_network import MLPClassifier

_PASSES = 300  # maximum number of passes over the training images
_MAX_BYTES = 1 << 32  # of the training images and their shifted copies
_BATCH = 1024  # held-out images per batch


def require_package() -> None:
    """Raises OSError if scikit-learn isn't installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise OSError("fid.py classifier: needs scikit-learn: pip install scikit-learn")


def open_labelled(path: str, flag: str) -> ImageFolderDataset:
    """Returns a data set on which a classifier can be trained or evaluated.

    Raises:
        ValueError: its images have no classes or too many pixels. The message names the flag.
        OSError: it can't be read.
    """
    data = ImageFolderDataset(path, use_labels=True)
    if not data.has_onehot_labels:
        raise ValueError(f"{flag}={path}: has no class numbers; give a data set with classes")
    numbers = int(np.prod(data.image_shape))
    if numbers > MAX_PIXELS:
        raise ValueError(f"{flag}={path}: {numbers} values per image, but a classifier of single "
                         f"pixels takes at most {MAX_PIXELS} (64x64 RGB); make the images smaller "
                         "with dataset_tool.py --resolution")
    return data


def check_trainable(data: ImageFolderDataset, held_out: ImageFolderDataset, shift: int) -> None:
    """Raises ValueError unless a classifier can be trained on `data` and evaluated on `held_out`.

    Args:
        data: the training images, from `open_labelled`.
        held_out: the held-out images, from `open_labelled`.
        shift: see `train_classifier`.
    """
    counts = np.bincount(data.class_numbers)
    if len(counts) < 2 or not counts.all():
        raise ValueError(f"--data={data.path}: must have at least two classes, and images of every "
                         f"class from 0 to {len(counts) - 1}; renumber them with dataset_tool.py "
                         "--classes")
    num_bytes = 4 * len(data) * (5 if shift else 1) * int(np.prod(data.image_shape))
    if num_bytes > _MAX_BYTES:
        raise ValueError(f"--data={data.path}: takes {num_bytes >> 20} MiB of memory with the "
                         f"shifted copies, but at most {_MAX_BYTES >> 20} are allowed; give fewer "
                         "images (dataset_tool.py --max-images), or --shift=0")
    if held_out.image_shape != data.image_shape or held_out.scale != data.scale:
        raise ValueError(f"--val-data={held_out.path}: its images differ in shape or scale from "
                         f"those of --data={data.path}; give a part of the same data set, made by "
                         "'dataset_tool.py split'")
    if held_out.label_dim > len(counts):
        raise ValueError(f"--val-data={held_out.path}: has an image of class "
                         f"{held_out.label_dim - 1}, but --data={data.path} has classes 0 to "
                         f"{len(counts) - 1}")
    if shift >= min(data.image_shape[1:]):
        raise ValueError(f"--shift={shift}: must be smaller than the sides of the images, "
                         f"{data.image_shape[2]}x{data.image_shape[1]}")
    if held_out.path.resolve() == data.path.resolve() or held_out.fingerprint == data.fingerprint:
        raise ValueError(f"--val-data={held_out.path}: is --data itself, so nothing is held out; "
                         "'dataset_tool.py split' divides a data set")


def train_classifier(data: ImageFolderDataset, held_out: ImageFolderDataset, *,
                     hidden: Sequence[int], shift: int, alpha: float, seed: int) -> Perceptron:
    """Returns a classifier that was trained on the classes of a data set.

    Args:
        data: the training images, see `check_trainable`.
        held_out: the images on which its accuracy is measured.
        hidden: the number of units of each hidden layer.
        shift: pixels by which copies of the images are shifted to each side; 0 for no copies.
        alpha: weight of the squared weights in the loss.
        seed: seed of the initial weights and the order of the images.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    copies = moved_copies(_as_networks_see(data, range(len(data))), shift)
    model = MLPClassifier(tuple(hidden), alpha=alpha, max_iter=_PASSES, random_state=seed)
    with warnings.catch_warnings():  # full convergence isn't needed: the accuracy is measured
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(np.concatenate([copy.reshape(len(data), -1) for copy in copies]),
                  np.tile(data.class_numbers, len(copies)))
    trained = of_model(model, data)
    right = 0
    for start in range(0, len(held_out), _BATCH):
        numbers = range(start, min(start + _BATCH, len(held_out)))
        images = torch.from_numpy(_as_networks_see(held_out, numbers)).flatten(1)
        found = trained.logits(trained.hidden(images)).argmax(1).numpy()
        right += int((found == held_out.class_numbers[list(numbers)]).sum())
    return dataclasses.replace(trained, accuracy=right / len(held_out), num_held_out=len(held_out))


def of_model(model: "MLPClassifier", data: ImageFolderDataset) -> Perceptron:
    """Returns the classifier of a scikit-learn model that was fitted to a data set."""
    weights, biases = list(model.coefs_), list(model.intercepts_)
    if weights[-1].shape[1] == 1:  # two classes: it has only the second logit, the first is 0
        weights[-1] = np.pad(weights[-1], [(0, 0), (1, 0)])
        biases[-1] = np.pad(biases[-1], [(1, 0)])
    layers = [tuple(torch.tensor(array, dtype=torch.float32) for array in arrays)
              for arrays in (weights, biases)]
    return Perceptron(*layers, tuple(data.image_shape), data.scale)


def moved_copies(images: np.ndarray, shift: int) -> list[np.ndarray]:
    """Returns images [n, C, H, W], then copies shifted by `shift` pixels to each of the four sides.

    The pixels at the edge are repeated. With a shift of 0 only the images themselves are returned.
    """
    if shift == 0:
        return [images]
    height, width = images.shape[2:]
    padded = np.pad(images, [(0, 0), (0, 0), (shift, shift), (shift, shift)], mode="edge")
    corners = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    return [padded[:, :, shift * row:shift * row + height, shift * column:shift * column + width]
            for row, column in corners]


def _as_networks_see(data: ImageFolderDataset, numbers: Sequence[int]) -> np.ndarray:
    """Returns the images of these numbers as float32 [n, C, H, W], about [-1, 1]."""
    return data.scaling.to_network(torch.from_numpy(data.get_batch(numbers)[0])).numpy()
