"""The label that a conditional network is given for each seed: a class the seed draws, or your own.

Every seed draws a class number k of n uniformly, even if the number is not used, so that its other
random numbers stay the same. With class shares p_0 ... p_(n-1), the seed gets the class j with

    p_0 + ... + p_(j-1)  <=  (k + v) / n  <  p_0 + ... + p_j,

where v in [0, 1) is a second random number of the seed. With equal shares, j = k.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from checkpoints.checkpoint import digest
from dnnlib.npy_header import read_npy_header
from images.dataset import ImageFolderDataset
from images.given_images import GivenImages, as_numpy
from images.image_files import (
    error_prefix,
    label_array,
    parse_json,
    parse_labels,
    read_regular,
)

_TAG = int.from_bytes(b"class", "big")  # separates v from other uses of the seed


class DrawnClasses:
    """Labels of seeds whose classes have these shares. The shares need not add up to 1."""

    def __init__(self, shares: Sequence[float]):
        bounds = np.cumsum(np.asarray(shares, np.float64))
        self._bounds, self._last = bounds / bounds[-1], int(np.flatnonzero(shares)[-1])

    def __call__(self, seeds: Sequence[int], classes: torch.Tensor) -> torch.Tensor:
        """Returns the one-hot labels [B, n] for seeds and the class numbers [B] they draw."""
        own = [_own_number(seed) for seed in seeds]
        position = (classes.cpu().numpy() + own) / len(self._bounds)
        found = np.searchsorted(self._bounds, position, side="right").clip(max=self._last)
        return _one_hot(torch.from_numpy(found), len(self._bounds))


class GivenLabels:
    """Labels [n, label_dim] by seed: seed k has label k mod n."""

    def __init__(self, labels: np.ndarray):
        self._labels = torch.from_numpy(np.ascontiguousarray(labels, np.float32))

    def __call__(self, seeds: Sequence[int], classes: torch.Tensor) -> torch.Tensor:
        """Returns the labels [B, label_dim] of seeds. The classes that they draw are ignored."""
        return self._labels[[seed % len(self._labels) for seed in seeds]]

    @property
    def digest(self) -> str:
        """A sha256 over the labels."""
        return digest(self._labels)


SeedLabels = DrawnClasses | GivenLabels


def classes_with_images(counts: Sequence[int] | None) -> DrawnClasses | None:
    """Returns labels with equal shares of all classes that have images, or None if all have."""
    return None if counts is None or all(counts) else DrawnClasses([min(n, 1) for n in counts])


def _own_number(seed: int) -> float:
    """Returns the number v of a seed, uniform in [0, 1)."""
    raw = np.random.PCG64(np.random.SeedSequence([abs(seed), _TAG])).random_raw()
    return (raw >> 11) / (1 << 53)


def _one_hot(classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes.long(), num_classes).to(torch.float32)


def read_labels(path: str | os.PathLike | Sequence, label_dim: int, kind: str = "classes"
                ) -> np.ndarray:
    """Returns the labels in a file, data set or array, float32 [n, label_dim].

    Args:
        path: a data set (a folder or ZIP with dataset.json); a .npy or .json file of class numbers
            [n] or vectors [n, label_dim]; a dataset.json; or the numbers or vectors themselves.
        label_dim: length of the network's labels.
        kind: what the network was trained on, 'classes' or 'vectors'. For 'vectors', class numbers
            are refused.

    Raises:
        OSError: the file can't be read.
        ValueError: it does not hold such labels.
    """
    if not isinstance(path, (str, os.PathLike)):
        return _of_kind(_numbers(path), label_dim, kind, "labels")
    given, path = path, Path(path)
    if not path.exists() and not isinstance(given, GivenImages):
        raise FileNotFoundError(f"{path}: no such file or folder")
    if isinstance(given, GivenImages) or path.is_dir() or path.suffix.lower() == ".zip":
        dataset = ImageFolderDataset(given, use_labels=True)
        if not dataset.has_labels:
            raise ValueError(f"{path}: this data set has no labels")
        labels = dataset.class_numbers if dataset.has_onehot_labels else \
            dataset.labels_of(np.arange(len(dataset)))
    elif path.suffix.lower() == ".npy":
        with open(path, "rb") as file, error_prefix(f"{path}: "):
            shape, _, dtype = read_npy_header(file)
        if dtype.kind not in "iuf" or len(shape) not in (1, 2):
            raise ValueError(f"{path}: is a {dtype.name} array of shape {list(shape)}; labels must "
                             f"be class numbers [n] or vectors [n, {label_dim}]")
        labels = np.load(path, allow_pickle=False)
    else:
        labels = _json_labels(path)
    return _of_kind(labels, label_dim, kind, path)


def _of_kind(labels: np.ndarray, label_dim: int, kind: str, where: str | Path) -> np.ndarray:
    with error_prefix(f"{where}: "):
        if labels.ndim == 1 and kind == "vectors":
            raise ValueError("holds class numbers, but the network was trained on vectors of "
                             f"{label_dim} numbers")
        return _checked(labels, label_dim)


def _numbers(labels: Sequence) -> np.ndarray:
    """Returns labels in memory as an array [n] or [n, label_dim]."""
    try:
        array = np.asarray(as_numpy(labels))
    except ValueError:  # rows have different lengths
        array = np.array(None)
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2):
        raise ValueError("labels: must be class numbers [n] or vectors [n, label_dim]")
    return array


def _json_labels(path: Path) -> np.ndarray:
    content = parse_json(read_regular(path), str(path))
    if isinstance(content, dict) and isinstance(content.get("labels"), list):  # a dataset.json
        content = list((parse_labels(read_regular(path), str(path)) or {}).values())
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: must be a list of labels, or a dataset.json with labels")
    names = [f"label {i}" for i in range(len(content))]
    return label_array(names, dict(zip(names, content, strict=True)), str(path))


def _checked(labels: np.ndarray, label_dim: int) -> np.ndarray:
    if labels.ndim == 1:
        if labels.dtype.kind not in "iu":
            raise ValueError("class numbers must be whole numbers; vectors must be [n, label_dim]")
        if not len(labels) or not 0 <= labels.min() <= labels.max() < label_dim:
            raise ValueError(f"class numbers are {labels.min(initial=0)} to "
                             f"{labels.max(initial=0)}; the network takes 0 to {label_dim - 1}")
        return _one_hot(torch.from_numpy(labels.astype(np.int64)), label_dim).numpy()
    if not len(labels) or labels.shape[1] != label_dim:
            raise ValueError(f"labels have shape {list(labels.shape)}; the network takes "
                             f"[n, {label_dim}]")
    if not np.isfinite(labels).all():
        raise ValueError("labels must be finite numbers")
    return labels.astype(np.float32)
