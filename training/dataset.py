"""Images as uint8 arrays from a folder or ZIP, a packed copy of them, and the order of training.

A data set is a folder or a ZIP of square images of one size, gray ('L') or RGB, that Pillow reads,
and optionally `dataset.json` at its root:

    {"labels": [["00000/img00000000.png", 6], ...]}    or    {"labels": null}

Integers are class numbers and become one-hot vectors; lists are vectors of numbers. Images are
numbered by their sorted names.

Training sees one endless stream of images. Position p of the stream is image

    permutation_e[p mod size],    e = p div size,

where permutation_e is drawn from (seed, e) alone. So batch size, world size and resuming change
who reads an image, never which one comes next.
"""

import contextlib
import functools
import hashlib
import io
import math
import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image
import torch.utils.data
from tqdm import tqdm

from dnnlib.util import EasyDict, cache_dir
from torch_utils.atomic import atomic_write
from torch_utils.distributed import get_rank, rank0_first
from torch_utils.loading import read_in_processes
from torch_utils.ordered_pool import num_cores
from training.image_files import (
    DAMAGE,
    LABELS_NAME,
    is_image,
    label_array,
    open_files,
    parse_labels,
)

_CHANNELS = {"L": 1, "RGB": 3}  # by Pillow's mode
_PACK_BYTES = 1 << 22  # images decoded at a time while packing
_PACK_ALONE = 2048  # fewer images are packed sooner than processes start
_DATA_TAG = int.from_bytes(b"data", "big")  # sets this stream apart from other uses of the seed

_DAMAGE = (*DAMAGE, PIL.Image.DecompressionBombError)


class ImageFolderDataset(torch.utils.data.Dataset):
    """The images of a folder or ZIP as (uint8 [C, H, W], float32 label [label_dim]) pairs.

    Opening looks at the names, the labels and the header of the first image; every other image
    must have its mode and size, which is verified when it is read (see `check_uniform`).

    Args:
        path: a folder or a ZIP.
        resolution: the size that the images must have; None takes any.
        use_pyspng: unused; accepted because configurations of EDM carry it.
        max_size: keep a random subset of this size, chosen by `random_seed`.
        use_labels: read the labels; without them `label_dim` is 0.
        xflip: append a mirrored copy of the whole set.
        random_seed: any integer.
        cache: read pixels from a packed copy that is built on first use in
            `dnnlib.util.cache_dir("packed")` and then memory-mapped by every process.

    Raises:
        OSError: there is no such file, or it can't be read.
        ValueError: not a data set as described above, or a damaged image.
    """

    def __init__(self, path: str | os.PathLike, resolution: int | None = None,
                 use_pyspng: bool = True, max_size: int | None = None, use_labels: bool = False,
                 xflip: bool = False, random_seed: int = 0, cache: bool = False):
        self.path = Path(path)
        self.name = Path(os.path.abspath(path)).stem
        self._files = open_files(self.path)
        self._names = sorted(filter(is_image, self._files.names))
        if not self._names:
            raise ValueError(f"{self.path}: no images found")

        self._header = self._read_header(0)
        mode, width, height = self._header
        if mode not in _CHANNELS or width != height:
            raise ValueError(f"{self._where(0)} is {_format_header(self._header)}; images must be "
                             "square, gray (L) or RGB: convert them with dataset_tool.py")
        if resolution is not None and resolution != height:
            raise ValueError(f"{self.path}: images are {width}x{height}, "
                             f"expected {resolution}x{resolution}")
        self.image_shape = [_CHANNELS[mode], height, width]

        labels = self._load_labels() if use_labels else None
        self._labels = np.zeros([len(self._names), 0], np.float32) if labels is None else labels
        self._kept = _subset(len(self._names), max_size, random_seed)  # raw indices, rising
        self._copies = 2 if xflip else 1
        self._subset_key = "" if max_size is None else f"-{len(self._kept)}-{random_seed}"
        self._packed: np.ndarray | None = None  # [len(_kept), C, H, W]
        self._packed_path: Path | None = None
        if cache:
            self._open_packed()

    def __len__(self) -> int:
        return len(self._kept) * self._copies

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = self.get_batch([operator.index(idx)])
        return images[0], labels[0]

    def get_batch(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint8 images [B, C, H, W] and float32 labels [B, label_dim]; both are copies."""
        rows, mirrored = self._locate(indices)
        if self._packed is not None:
            images = self._packed[rows]
        else:
            images = self._decode_batch(self._kept[rows])
        images[mirrored] = images[mirrored, :, :, ::-1]
        return images, self._encode_labels(self._kept[rows])

    def get_label(self, idx: int) -> np.ndarray:
        """Returns the label of one image as float32 [label_dim]."""
        return self._encode_labels(self._kept[self._locate([idx])[0]])[0]

    def get_details(self, idx: int) -> EasyDict:
        """Returns raw_idx (among all sorted names), xflip, and raw_label (a number or vector)."""
        rows, mirrored = self._locate([idx])
        raw_idx = int(self._kept[rows[0]])
        return EasyDict(raw_idx=raw_idx, xflip=int(mirrored[0]),
                        raw_label=self._labels[raw_idx].copy())

    def image_name(self, idx: int) -> str:
        """Returns the name of image `idx` inside the folder or ZIP."""
        return self._names[self._kept[self._locate([idx])[0][0]]]

    @property
    def is_packed(self) -> bool:
        """Whether images come from an array instead of files."""
        return self._packed is not None

    @property
    def all_names(self) -> Sequence[str]:
        """The names of all images, in order, of which `max_size` may have chosen a part."""
        return self._names

    @property
    def num_channels(self) -> int:
        """1 or 3."""
        return self.image_shape[0]

    @property
    def resolution(self) -> int:
        """Width and height."""
        return self.image_shape[1]

    @functools.cached_property
    def label_dim(self) -> int:
        """Length of a label; the number of classes, or 0 without labels."""
        if self.has_onehot_labels:
            return int(self._labels.max()) + 1
        return self._labels.shape[1]

    @property
    def has_labels(self) -> bool:
        """Whether labels were asked for and are there."""
        return self.label_dim != 0

    @property
    def has_onehot_labels(self) -> bool:
        """Whether the labels are class numbers."""
        return self._labels.ndim == 1

    @property
    def class_numbers(self) -> np.ndarray:
        """The class of each image, int64 [len]; for `has_onehot_labels` alone."""
        return np.tile(self._labels[self._kept], self._copies)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A sha256 over the names, sizes and CRCs of images and labels; a copy has the same.

        A ZIP lists them; the files of a folder are read for it.
        """
        digest = hashlib.sha256()
        for name in sorted({*self._names, LABELS_NAME} & set(self._files.names)):
            digest.update(f"{name}\0{self._files.stamp(name)}\n".encode())
        return digest.hexdigest()

    def check_uniform(self) -> None:
        """Reads the header of every image used.

        Raises:
            ValueError: naming the first image whose mode or size differs.
        """
        for raw_idx in tqdm(self._kept, desc="Checking images", unit="img", disable=None,
                            leave=False, delay=1):
            self._check_header(raw_idx, self._read_header(raw_idx))

    def close(self) -> None:
        """Closes the ZIP; reading opens it again."""
        self._files.close()

    def _locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the position of each index in `_kept`, and whether it is a mirrored copy."""
        indices = np.asarray(indices, dtype=np.int64)
        if ((indices < 0) | (indices >= len(self))).any():
            raise IndexError(f"{self.path}: index beyond the {len(self)} images")
        return indices % len(self._kept), indices >= len(self._kept)

    def _where(self, raw_idx: int) -> str:
        return f"{self.path}: {self._names[raw_idx]} (image {raw_idx})"

    @contextlib.contextmanager
    def _open_image(self, raw_idx: int) -> Iterator[IO[bytes]]:
        try:
            with self._files.open(self._names[raw_idx]) as file:
                yield file
        except _DAMAGE as error:
            raise ValueError(f"{self._where(raw_idx)} can't be read: {error}") from error

    def _read_header(self, raw_idx: int) -> tuple[str, int, int]:
        """Returns Pillow's mode, width and height without decoding the pixels."""
        with self._open_image(raw_idx) as file, PIL.Image.open(file) as image:
            return image.mode, *image.size

    def _check_header(self, raw_idx: int, header: tuple[str, int, int]) -> None:
        if header != self._header:
            raise ValueError(
                f"{self._where(raw_idx)} is {_format_header(header)}, but {self._names[0]} is "
                f"{_format_header(self._header)}; all images must agree: "
                "convert them with dataset_tool.py")

    def _decode(self, raw_idx: int) -> np.ndarray:
        """Returns one image as uint8 [C, H, W]."""
        pixels = None
        # Reading to the end makes zipfile verify the CRC too.
        with self._open_image(raw_idx) as file, \
                PIL.Image.open(io.BytesIO(file.read())) as image:
            header = image.mode, *image.size
            if header == self._header:
                pixels = np.asarray(image)
        self._check_header(raw_idx, header)
        return np.atleast_3d(pixels).transpose(2, 0, 1)

    def _decode_batch(self, raw_indices: Sequence[int]) -> np.ndarray:
        images = np.empty([len(raw_indices), *self.image_shape], np.uint8)
        for image, raw_idx in zip(images, raw_indices, strict=True):
            image[:] = self._decode(raw_idx)
        return images

    def _load_labels(self) -> np.ndarray | None:
        if LABELS_NAME not in self._files.names:
            return None
        where = f"{self.path}: {LABELS_NAME}"
        try:
            with self._files.open(LABELS_NAME) as file:
                text = file.read()
        except _DAMAGE as error:
            raise ValueError(f"{where} can't be read: {error}") from error
        labels = parse_labels(text, where)
        return None if labels is None else label_array(self._names, labels, where)

    def _encode_labels(self, raw_idx: np.ndarray) -> np.ndarray:
        labels = self._labels[raw_idx]
        if not self.has_onehot_labels:
            return labels
        onehot = np.zeros([len(labels), self.label_dim], np.float32)
        onehot[np.arange(len(labels)), labels] = 1
        return onehot

    def _open_packed(self) -> None:
        path = cache_dir("packed") / f"{self.fingerprint}{self._subset_key}.npy"
        with rank0_first():
            self._packed = self._map_packed(path)
            if self._packed is None:
                try:
                    self._write_packed(path)
                    self._packed = self._map_packed(path)
                except OSError as error:  # damaged images are ValueErrors
                    self._packed = np.concatenate(list(self._decode_all()))
                    if get_rank() == 0:
                        warnings.warn(f"{path} can't be written ({error}): every process keeps "
                                      "the images in its own memory", stacklevel=3)
                    return
        self._packed_path = path

    def _map_packed(self, path: Path) -> np.ndarray | None:
        """Returns the memory-mapped copy, or None where it is missing or isn't whole."""
        try:
            packed = np.load(path, mmap_mode="r", allow_pickle=False)
            whole = (packed.dtype == np.uint8 and packed.flags.c_contiguous
                     and packed.shape == (len(self._kept), *self.image_shape)
                     and os.path.getsize(path) == packed.offset + packed.nbytes)
        except (OSError, ValueError, EOFError):
            return None
        return packed.view(np.ndarray) if whole else None

    def _write_packed(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"descr": "|u1", "fortran_order": False,
                  "shape": (len(self._kept), *self.image_shape)}
        with atomic_write(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for images in self._decode_all():
                file.write(images)

    def _decode_all(self) -> Iterator[np.ndarray]:
        """Yields the images in order as uint8 [B, C, H, W], decoded on all cores."""
        size = max(_PACK_BYTES // math.prod(self.image_shape), 1)
        batches = np.split(self._kept, range(size, len(self._kept), size))
        workers = num_cores() if len(self._kept) >= _PACK_ALONE else 0
        with tqdm(total=len(self._kept), desc=f"Packing {self.name}", unit="img", disable=None,
                  leave=False, delay=1) as bar:
            for images, in read_in_processes(_RawImages(self), batches, workers=workers):
                yield images.numpy()
                bar.update(len(images))

    def __getstate__(self) -> dict[str, Any]:
        # A mapped copy is mapped anew by the process that unpickles.
        return self.__dict__ | ({"_packed": None} if self._packed_path else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._packed_path:
            self._packed = np.load(self._packed_path, mmap_mode="r").view(np.ndarray)


class _RawImages:
    """Images by their number among all sorted names, from their files."""

    def __init__(self, dataset: ImageFolderDataset):
        self._dataset = dataset

    def get_batch(self, indices: Sequence[int]) -> tuple[np.ndarray]:
        return (self._dataset._decode_batch(indices),)


class TrainingOrder(torch.utils.data.Sampler):
    """The endless training order: for each step, the indices that this rank reads.

    Step k covers the stream positions start + k*batch ... start + (k+1)*batch - 1. Rank r takes
    the r-th of `world_size` contiguous slices of them and yields it as `rounds` lists, so that
    one list is the micro-batch of one round of gradient accumulation.

    Args:
        size: number of images in the data set.
        seed: a non-negative integer.
        batch: images per step over all ranks and rounds.
        start: stream position of the first image; the images seen so far when resuming.
        rank: this process.
        world_size: the number of processes.
        rounds: the number of lists per step.
    """

    def __init__(self, size: int, seed: int, batch: int, *, start: int = 0, rank: int = 0,
                 world_size: int = 1, rounds: int = 1):
        if size < 1 or batch < 1 or start < 0:
            raise ValueError(f"size={size}, batch={batch}, start={start}: "
                             "size and batch must be positive, start not negative")
        if batch % (world_size * rounds) != 0:
            raise ValueError(f"batch={batch}: must be a multiple of world size x rounds, "
                             f"{world_size} x {rounds}")
        self._size, self._seed, self._batch, self._start = size, seed, batch, start
        self._rounds, self._micro_batch = rounds, batch // (world_size * rounds)
        self._offset = rank * rounds * self._micro_batch

    def __iter__(self) -> Iterator[list[int]]:
        position = self._start + self._offset
        while True:
            for i in range(self._rounds):
                first = position + i * self._micro_batch
                positions = np.arange(first, first + self._micro_batch)
                yield order_at(self._size, self._seed, positions).tolist()
            position += self._batch


def order_at(size: int, seed: int, positions: Iterable[int]) -> np.ndarray:
    """Returns the image index at each position of the training stream, int64."""
    positions = np.asarray(positions, dtype=np.int64)
    epochs, offsets = np.divmod(positions, size)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        indices[inside] = _permutation(size, seed, int(epoch))[offsets[inside]]
    return indices


@functools.lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, unlike Generator, is promised to give the same stream in every NumPy version.
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch, _DATA_TAG]))
    return np.random.RandomState(bits).permutation(size)


def _format_header(header: tuple[str, int, int]) -> str:
    return "{} {}x{}".format(*header)


def _subset(size: int, max_size: int | None, seed: int) -> np.ndarray:
    """Returns the rising indices of the images to keep: EDM's choice for the same seed."""
    indices = np.arange(size, dtype=np.int64)
    if max_size is None or max_size >= size:
        return indices
    if max_size < 1:
        raise ValueError(f"max_size={max_size}: must be positive")
    np.random.RandomState(seed % (1 << 31)).shuffle(indices)
    return np.sort(indices[:max_size])
