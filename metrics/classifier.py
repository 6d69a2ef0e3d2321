"""A classifier of small images, which is a multilayer perceptron on their pixels, and its file.

    B batch    N values of an image, scaled as for networks    K classes
    h_0 = x [B, N],    h_i = relu(h_(i-1) W_i + b_i),    logits = h_L W_(L+1) + b_(L+1) [B, K]

Its features are h_L. The file is a plain .npz with `format`, `image_shape` [3], `weights_1`,
`biases_1` and so on, the number of `held_out` images and the `accuracy` on them. For images that
are not 8-bit it also holds their `scale` [2, C or 1], which is (center, spread): center maps to 0,
and center + spread to 1. Nothing in it is unpickled, and sizes are checked before memory is
allocated.
"""

import math
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.atomic import atomic_write
from images.scaling import Scaling
from metrics.npz_arrays import read_npz_array

MAX_PIXELS = 3 * 64 * 64  # values per image
MAX_WIDTH, MAX_LAYERS = 4096, 8  # units of a layer; layers, including that of the classes
_FORMAT = "pfgmpp-classifier-1"


@dataclass(frozen=True)
class Perceptron:
    """A trained classifier.

    Raises:
        ValueError: the shapes of its layers don't match, or values are not finite.
    """

    weights: tuple[torch.Tensor, ...]  # W_i [in, out], float32
    biases: tuple[torch.Tensor, ...]  # b_i [out], float32
    image_shape: tuple[int, int, int]  # channels, height, width
    scale: dict[str, Any] | None  # scale of the images; None if they are 8-bit
    accuracy: float = 0.0  # share of held-out images whose class it recognises
    num_held_out: int = 0  # number of these images

    def __post_init__(self):
        width = math.prod(self.image_shape)
        if len(self.image_shape) != 3 or min(self.image_shape) < 1 or width > MAX_PIXELS:
            raise ValueError(f"image_shape is {list(self.image_shape)}, expected [C, H, W] of at "
                             f"most {MAX_PIXELS} values")
        if not 2 <= len(self.weights) <= MAX_LAYERS:
            raise ValueError(f"{len(self.weights)} layers, expected 2 to {MAX_LAYERS}")
        for number, (weights, biases) in enumerate(
                zip(self.weights, self.biases, strict=True), start=1):
            out = len(biases)
            if biases.ndim != 1 or weights.shape != (width, out) or not 0 < out <= MAX_WIDTH:
                raise ValueError(f"weights_{number} has shape {list(weights.shape)} and "
                                 f"biases_{number} {list(biases.shape)}, expected [{width}, n] "
                                 f"and [n], n at most {MAX_WIDTH}")
            if not (weights.isfinite().all() and biases.isfinite().all()):
                raise ValueError(f"layer {number} has values that are not finite")
            width = out
        if self.num_classes < 2:
            raise ValueError(f"{self.num_classes} class, at least 2 needed")
        if not 0 <= self.accuracy <= 1 or self.num_held_out < 0:
            raise ValueError("accuracy must be in [0, 1], and held_out a number of images")

    @property
    def feature_dim(self) -> int:
        """The number of units of the last hidden layer."""
        return len(self.weights[-1])

    @property
    def num_classes(self) -> int:
        """The number of classes that it distinguishes."""
        return len(self.biases[-1])

    def to(self, device: torch.device) -> "Perceptron":
        """Returns a copy on a device."""
        return replace(self, weights=tuple(w.to(device) for w in self.weights),
                       biases=tuple(b.to(device) for b in self.biases))

    @torch.no_grad()
    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Returns h_L [B, feature_dim] of flattened images [B, N], scaled as for networks."""
        for weights, biases in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = torch.addmm(biases, x, weights).relu()
        return x

    @torch.no_grad()
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Returns unnormalised log probabilities [B, K] of features [B, feature_dim]."""
        return torch.addmm(self.biases[-1], features, self.weights[-1])

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file, and creates its folder if needed.

        Raises:
            OSError: it can't be written; an existing file is then left unchanged.
        """
        arrays = {"format": np.array(_FORMAT), "image_shape": np.array(self.image_shape),
                  "accuracy": np.array(self.accuracy, np.float64),
                  "held_out": np.array(self.num_held_out)}
        if self.scale:
            arrays["scale"] = np.array([self.scale["center"], self.scale["spread"]], np.float64)
        for number, (weights, biases) in enumerate(
                zip(self.weights, self.biases, strict=True), start=1):
            arrays |= {f"weights_{number}": weights.numpy(), f"biases_{number}": biases.numpy()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Perceptron":
        """Reads a file that `save` wrote, onto the CPU.

        Raises:
            OSError: it can't be read.
            ValueError: it is not such a file.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                return _read(archive)
        # The last two are raised by an unknown compression method and an encrypted member.
        except (ValueError, TypeError, KeyError, EOFError, OverflowError, zipfile.BadZipFile,
                NotImplementedError, RuntimeError) as error:
            reason = str(error).strip("'\"").split("\n")[0] or type(error).__name__
            raise ValueError(f"{path}: not a classifier of 'fid.py classifier': {reason}"
                             ) from error


def _read(archive: zipfile.ZipFile) -> Perceptron:
    """Returns the classifier in an .npz; raises what `Perceptron.load` catches."""
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError("compressed")

    def array(name: str, kind: str, shape: tuple[int | None, ...]) -> np.ndarray:
        found = read_npz_array(archive, name, kind)
        if len(found.shape) != len(shape) or any(n not in (None, m) for n, m in zip(
                shape, found.shape, strict=True)):
            raise ValueError(f"{name} has shape {list(found.shape)}")
        return found

    if (version := str(array("format", "U", ()))) != _FORMAT:
        raise ValueError(f"format {version[:40]!r}, expected {_FORMAT!r}")
    there = set(archive.namelist())
    numbers = [k for k in range(1, MAX_LAYERS + 1) if f"weights_{k}.npy" in there]
    if f"weights_{MAX_LAYERS + 1}.npy" in there or numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f"layers are not numbered from 1 to {MAX_LAYERS} at most")
    layers = [[torch.from_numpy(array(f"{name}_{k}", "f", shape)).float()
               for name, shape in (("weights", (None, None)), ("biases", (None,)))]
              for k in numbers]
    scale = None
    shape = tuple(map(int, array("image_shape", "i", (3,))))
    if "scale.npy" in there:
        scaling = Scaling(*map(tuple, array("scale", "f", (2, None)).tolist()))
        scaling.check_channels(shape[0])
        scale = scaling.to_dict()
    return Perceptron(*zip(*layers, strict=True) if layers else ((), ()), shape, scale,
                      float(array("accuracy", "f", ())), int(array("held_out", "i", ())))
