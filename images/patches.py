"""Patches of images at random places: squares of P x P pixels, of an image and its condition alike.

Offsets are uniform on {0, ..., H - P} x {0, ..., W - P}, both ends included. Patch g has offsets
that are a function of the seed and g alone, so batch size, world size and resuming change who reads
a patch, never where it lies.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from images.dataset import ImageFolderDataset, order_at

_OFFSET_TAG = int.from_bytes(b"patch", "big")  # sets these draws apart from other uses of the seed
_DRAW_BLOCK = 256  # patches that draw together; another number would be other offsets


class PatchSource(Protocol):
    """What patches are read from: a data set that is read as patches, in files or on a device."""

    def get_batch(self, indices: Sequence[int], offsets: np.ndarray | None = None) -> tuple:
        """Returns patches of images, as `ImageFolderDataset.get_batch` does."""


class RandomPatches:
    """Patches by number: patch k is of image k, at a place that the seed draws.

    Args:
        source: where to read.
        dataset: the data set of `source`, which is read as patches.
        seed: not negative.
    """

    def __init__(self, source: PatchSource, dataset: ImageFolderDataset, seed: int):
        assert dataset.patch is not None
        self._source, self._seed = source, seed
        _, height, width = dataset.stored_shape
        self._limits = height - dataset.patch, width - dataset.patch

    def get_batch(self, numbers: Sequence[int]) -> tuple:
        """Returns images [B, C, P, P], labels and, if read, conditions."""
        numbers = np.asarray(numbers, np.int64)
        return self._source.get_batch(self._images_of(numbers),
                                      patch_offsets(self._seed, numbers, self._limits))

    def _images_of(self, numbers: np.ndarray) -> np.ndarray:
        return numbers


class TrainingPatches(RandomPatches):
    """The training stream in patches, `patches` of each image, one after the other.

    Patch g is of the image at position g div `patches` of the order that the seed gives.
    """

    def __init__(self, source: PatchSource, dataset: ImageFolderDataset, seed: int, patches: int):
        super().__init__(source, dataset, seed)
        self._size, self._patches = len(dataset), patches

    def _images_of(self, numbers):
        return order_at(self._size, self._seed, numbers // self._patches)


def patch_offsets(seed: int, numbers: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
    """Returns the first row and the first column of patches, int64 [B, 2].

    Args:
        seed: not negative.
        numbers: of the patches, [B].
        limits: the largest row and column, H - P and W - P.
    """
    blocks, places = np.divmod(np.asarray(numbers, np.int64), _DRAW_BLOCK)
    offsets = np.empty([len(blocks), 2], np.int64)
    for block in np.unique(blocks):
        inside = blocks == block
        offsets[inside] = _block_offsets(seed, int(block), limits)[places[inside]]
    return offsets


def _block_offsets(seed: int, block: int, limits: tuple[int, int]) -> np.ndarray:
    # RandomState, unlike Generator, is promised to give the same stream in every NumPy version.
    rng = np.random.RandomState(np.random.MT19937(
        np.random.SeedSequence([seed, block, _OFFSET_TAG])))
    return np.stack([rng.randint(0, limit + 1, _DRAW_BLOCK, np.int64) for limit in limits], axis=1)
