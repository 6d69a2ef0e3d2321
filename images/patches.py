"""Random patches of images: squares of P x P pixels, the same for an image and its condition.

Offsets are uniform on {0, ..., H - P} x {0, ..., W - P}, both ends included. The offsets of patch g
depend only on the seed and g. Batch size, world size and resuming therefore change which process
reads a patch, but never its place.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from images.dataset import ImageFolderDataset, order_at

_OFFSET_TAG = int.from_bytes(b"patch", "big")  # separates these draws from other uses of the seed
_DRAW_BLOCK = 256  # patches drawn together; changing it changes all offsets


class PatchSource(Protocol):
    """A data set that is read as patches, from files or on a device."""

    def get_batch(self, indices: Sequence[int], offsets: np.ndarray | None = None) -> tuple:
        """Returns patches of images, see `ImageFolderDataset.get_batch`."""


class RandomPatches:
    """Patches by number: patch k comes from image k, at a place that the seed draws.

    Args:
        source: where patches are read.
        dataset: the data set of `source`, opened for patches.
        seed: a number of at least 0.
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
    """The training stream in patches: `patches` consecutive ones from each image.

    Patch g comes from the image at position g div `patches` of the seed's training order.
    """

    def __init__(self, source: PatchSource, dataset: ImageFolderDataset, seed: int, patches: int):
        super().__init__(source, dataset, seed)
        self._size, self._patches = len(dataset), patches

    def _images_of(self, numbers):
        return order_at(self._size, self._seed, numbers // self._patches)


def patch_offsets(seed: int, numbers: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
    """Returns the first row and the first column of patches, int64 [B, 2].

    Args:
        seed: a number of at least 0.
        numbers: numbers of the patches, [B].
        limits: the largest row and column, H - P and W - P.
    """
    blocks, places = np.divmod(np.asarray(numbers, np.int64), _DRAW_BLOCK)
    offsets = np.empty([len(blocks), 2], np.int64)
    for block in np.unique(blocks):
        inside = blocks == block
        offsets[inside] = _block_offsets(seed, int(block), limits)[places[inside]]
    return offsets


def _block_offsets(seed: int, block: int, limits: tuple[int, int]) -> np.ndarray:
    # RandomState, unlike Generator, guarantees the same stream in every NumPy version.
    rng = np.random.RandomState(np.random.MT19937(
        np.random.SeedSequence([seed, block, _OFFSET_TAG])))
    return np.stack([rng.randint(0, limit + 1, _DRAW_BLOCK, np.int64) for limit in limits], axis=1)
