"""Images as arrays from a folder or ZIP, with labels and conditions, and the order of training.

A data set is a folder or ZIP of images of one size: pictures that Pillow reads as gray ('L') or
RGB, or arrays (.npy) with any number of channels. It may also be an .npz, see images/npz_files.py.
Images are numbered in the sorted order of their names. Labels are in `dataset.json` and condition
images in cond/, see images/image_files.py. Class numbers become one-hot vectors. "scale" and
"cond_scale" in `dataset.json` map arrays to the network's scale (images/scaling.py).

Training reads one endless stream of images. Position p of the stream is image

    permutation_e[p mod size],    e = p div size,

where permutation_e depends only on (seed, e). Batch size, world size and resuming therefore change
which process reads an image, but never the order of the images.
"""

import contextlib
import dataclasses
import functools
import itertools
import operator
import os
import socket
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data

from dnnlib import console
from dnnlib.atomic import remove_stale
from dnnlib.cli import describe, shown_name
from dnnlib.ordered_pool import num_cores
from dnnlib.progress import FIRST_LINE_SEC, Progress, stage
from dnnlib.util import EasyDict, cache_dir, shown_bytes
from images import data_cache
from images.dicom_files import is_dicom
from images.given_images import GivenImages
from images.image_files import (
    CONDITIONS,
    DAMAGE,
    GENERATE_RECORD,
    LABELS_NAME,
    Folder,
    NoImagesError,
    check_matched,
    collector_paused,
    label_array,
    match_names,
    parse_class_names,
    parse_json,
    parse_labels,
    sort_names,
)
from images.npz_files import open_files
from images.scaling import Moments, Scaling, Spread, image_means, recorded_scaling
from images.tensor_files import SUFFIXES as TENSOR_SUFFIXES
from images.uniform_images import READER_VERSION, UniformImages
from torch_utils import distributed
from torch_utils.loading import read_in_processes

_DATA_TAG = int.from_bytes(b"data", "big")  # separates this stream from other uses of the seed
_MEASURE_BYTES = 1 << 24  # size of the chunks in which data are measured
_MEASURE_ALONE = 2048  # fewer images are measured faster than processes start
_LOOKED_AT = 16  # files inspected when a folder has no images
_MEASURE_SEED = int.from_bytes(b"measure", "big")  # of the random subset that is measured


class ImageFolderDataset(torch.utils.data.Dataset):
    """The images of a folder, ZIP or .npz as (image [C, H, W], float32 label [label_dim]) pairs.

    Images are uint8, uint16 or float32, as they are stored. `scaling` maps them to the network's
    scale. With `use_conditions`, a third item is the condition image, which has `cond_scaling`.

    Opening a data set reads only the names, the labels and the header of the first image. All other
    images must have the same format, which is verified when they are read (see `check_uniform`).

    Args:
        path: a folder, a ZIP or an .npz, or images in memory.
        resolution: required size of the images, a side or [height, width]. None accepts any.
        use_pyspng: unused; accepted because EDM's configurations have it.
        max_size: maximum number of images. Of more, `random_seed` chooses a random subset.
        use_labels: read the labels. Otherwise `label_dim` is 0.
        xflip: append a mirrored copy of every image.
        random_seed: any integer.
        cache: read pixels from a packed copy, see `pack`.
        use_conditions: read the condition images. Each image must have one.
        any_size: allow images of different sizes. `get_batch` then takes only indices of one size,
            and the data set can't be packed.
        patch: read squares of this side instead of whole images, see `get_batch`.

    Attributes:
        image_shape: [C, H, W] of patches, or else of images (of the first if sizes differ).
        stored_shape: [C, H, W] of whole images.
        patch: the side of patches, or None for whole images.
        scaling: scaling of the images.
        cond_shape: [C, H, W] of the condition images; None if they are not read.
        cond_scaling: scaling of the condition images; None if they are not read.
        class_names: names of the classes; None if there are no labels or no names.

    Raises:
        OSError: the path does not exist or can't be read.
        ValueError: it is not a data set as described above, or an image is damaged.
    """

    def __init__(self, path: str | os.PathLike, resolution: int | Sequence[int] | None = None,
                 use_pyspng: bool = True, max_size: int | None = None, use_labels: bool = False,
                 xflip: bool = False, random_seed: int = 0, cache: bool = False,
                 use_conditions: bool = False, any_size: bool = False, patch: int | None = None):
        self.path = Path(path)
        self._any_size, self.patch = any_size, patch
        self.name = Path(os.path.abspath(path)).stem
        self._is_fingerprint_shared = False
        with stage(f"Opening {self.path}"):
            self._files = path if isinstance(path, GivenImages) else open_files(self.path)
            self._open(resolution, max_size, use_labels, xflip, random_seed, use_conditions)
        if cache:
            self.pack()

    def _open(self, resolution: int | Sequence[int] | None, max_size: int | None, use_labels: bool,
              xflip: bool, random_seed: int, use_conditions: bool) -> None:
        self._names, self._cond_names, *_ = sort_names(self._files.names)
        if not self._names:
            raise NoImagesError(f"{self.path}: no images found{self._way_to_images()}")
        self._kept = _subset(len(self._names), max_size, random_seed)  # raw indices, rising
        self._images = UniformImages(self.path, self._files, self._names, self._kept,
                                     self._any_size)
        self.stored_shape = list(self._images.format.shape)
        self._check_resolution(resolution)
        self.image_shape = self._shape_read(self._images)
        self.scaling = recorded_scaling(self._files, self._images.format, "scale", self.path)
        self._stacks = [self._images]
        self.cond_shape: list[int] | None = None
        self.cond_scaling: Scaling | None = None
        if use_conditions:
            conditions = self._open_conditions()
            self._stacks.append(conditions)
            self.cond_shape = self._shape_read(conditions)
            self.cond_scaling = recorded_scaling(self._files, conditions.format, "cond_scale",
                                                 self.path)
        self.class_names: list[str] | None = None
        labels = self._load_labels() if use_labels else None
        self._labels = np.zeros([len(self._names), 0], np.float32) if labels is None else labels
        self._copies = 2 if xflip else 1
        self._subset_key = "" if max_size is None else f"-{len(self._kept)}-{random_seed}"

    def _way_to_images(self) -> str:
        """Returns advice if the first files look like a source that can be converted."""
        for name in sort_names(self._files.names).others[:_LOOKED_AT]:
            if name.lower().endswith(TENSOR_SUFFIXES) or is_dicom(name, self._files.open):
                return f"; convert files such as {shown_name(name)} with dataset_tool.py first"
        return ""

    def __len__(self) -> int:
        return len(self._kept) * self._copies

    def __getitem__(self, idx: int) -> tuple[np.ndarray, ...]:
        return tuple(array[0] for array in self.get_batch([operator.index(idx)]))

    def get_batch(self, indices: Sequence[int], offsets: np.ndarray | None = None
                  ) -> tuple[np.ndarray, ...]:
        """Returns images [B, C, H, W], float32 labels [B, label_dim] and, if read, conditions.

        Images are copied in the type in which they are stored.

        Args:
            indices: indices of the images.
            offsets: the first row and column of the patch in each image, [B, 2]. None takes the
                patches at the center.
        """
        rows, mirrored = self.locate(indices)
        if self.patch is None:
            images, *conditions = (stack.get(rows) for stack in self._stacks)
        else:
            corners = self.corners(mirrored, offsets)
            images, *conditions = (stack.get_patches(rows, corners, self.patch)
                                   for stack in self._stacks)
        for array in (images, *conditions):
            array[mirrored] = array[mirrored, :, :, ::-1]
        return images, self.labels_of(rows), *conditions

    def corners(self, mirrored: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
        """Returns the first row and column of patches within the stored images, [B, 2].

        Args:
            mirrored: whether each image is mirrored, [B].
            offsets: see `get_batch`.
        """
        limits = np.array(self.stored_shape[1:]) - self.patch
        corners = np.array(np.broadcast_to(limits // 2 if offsets is None else offsets,
                                           [len(mirrored), 2]))
        corners[mirrored, 1] = limits[1] - corners[mirrored, 1]
        return corners

    def get_scored(self, indices: Sequence[int]) -> np.ndarray:
        """Returns images for detectors: uint8, or otherwise float32 in the network's scale."""
        images = self.get_batch(indices)[0]
        if self.scaling.is_8bit:
            return images
        return self.scaling.to_network(torch.from_numpy(images)).numpy()

    def measure(self, max_images: int | None = None) -> tuple[Moments, Spread]:
        """Returns the moments of the images, in the data's units, and how much images differ.

        Args:
            max_images: maximum number of images to measure. Of more, a random subset with a fixed
                seed is taken.

        Raises:
            ValueError: an image can't be read.
        """
        rows = _subset(len(self._kept), max_images, _MEASURE_SEED)
        size = max(_MEASURE_BYTES // self._images.format.num_bytes, 1)
        parts = [rows[i:i + size] for i in range(0, len(rows), size)]
        workers = min(num_cores(), len(parts)) if len(rows) >= _MEASURE_ALONE else 0
        moments, spread = None, Spread()
        with Progress(len(rows), f"Measuring {self.path}", delay=1,
                      first_line_sec=FIRST_LINE_SEC) as progress:
            for found in read_in_processes(_Measured(self._images, self.scaling), parts,
                                           workers=workers):
                count, *of_channels, of_images = (array.numpy() for array in found)
                part = Moments(int(count[0]), *of_channels)
                moments = moments.merge(part) if moments else part
                spread.add(of_images)
                progress.update(len(of_images))
        return moments, spread

    @property
    def dtype(self) -> np.dtype:
        """The type of the images as they are read: uint8, uint16 or float32."""
        return np.dtype(self._images.format.dtype)

    @property
    def scale(self) -> dict[str, Any] | None:
        """`scaling` as plain data; None for 8-bit images, which all have the same."""
        return None if self.scaling.is_8bit else self.scaling.to_dict()

    def sample_records(self) -> dict[str, dict[str, Any]]:
        """Returns generate.py's records in this data set, by folder ('' or ending in '/')."""
        found = {}
        for name in self._files.names:
            folder, _, last = name.rpartition("/")
            if last != GENERATE_RECORD:
                continue
            with contextlib.suppress(*DAMAGE), self._files.open(name) as file:
                record = parse_json(file.read(), name)
                if isinstance(record, dict):
                    found[f"{folder}/" if folder else ""] = record
        return found

    @property
    def has_conditions(self) -> bool:
        """Whether the data set has condition images, even if they are not read."""
        return bool(self._cond_names)

    @property
    def cond_channels(self) -> int:
        """Number of channels of the condition images, or 0 if they are not read."""
        return self.cond_shape[0] if self.cond_shape else 0

    def _shape_read(self, images: UniformImages) -> list[int]:
        """Returns [C, H, W] of the images or patches that are read."""
        channels, height, width = images.format.shape
        if self.patch is None:
            return [channels, height, width]
        side = min(height, width)
        if not 1 <= self.patch <= side:
            raise ValueError(f"{self.path}: images are {width}x{height}, too small for patches of "
                             f"{self.patch}x{self.patch}; give --patch={side} or less")
        return [channels, self.patch, self.patch]

    def _check_resolution(self, resolution: int | Sequence[int] | None) -> None:
        if resolution is None:
            return
        height, width = self.stored_shape[1:]
        expected = [resolution] * 2 if isinstance(resolution, int) else list(resolution)
        if expected != [height, width]:
            raise ValueError(f"{self.path}: images are {width}x{height}, but "
                             f"{expected[1]}x{expected[0]} is expected")

    def _open_conditions(self) -> UniformImages:
        if not self._cond_names:
            raise ValueError(f"{self.path}: has no condition images; add them with dataset_tool.py "
                             "--cond-source")
        found, extra = match_names([CONDITIONS + name for name in self._names], self._cond_names)
        check_matched(self._names, found, extra, str(self.path))
        conditions = UniformImages(self.path, self._files, found, self._kept, self._any_size)
        if conditions.format.shape[1:] != self._images.format.shape[1:]:
            raise ValueError(f"{conditions.where(0)} is {conditions.format}, but {self._names[0]} "
                             f"is {self._images.format}; condition images must have the size of "
                             "their images")
        return conditions

    def get_label(self, idx: int) -> np.ndarray:
        """Returns the label of one image as float32 [label_dim]."""
        return self.labels_of(self.locate([idx])[0])[0]

    def get_details(self, idx: int) -> EasyDict:
        """Returns raw_idx (among all sorted names), xflip, and raw_label (a number or vector)."""
        rows, mirrored = self.locate([idx])
        raw_idx = int(self._kept[rows[0]])
        return EasyDict(raw_idx=raw_idx, xflip=int(mirrored[0]),
                        raw_label=self._labels[raw_idx].copy())

    @property
    def is_packed(self) -> bool:
        """Whether images are read from the packed copy instead of files."""
        return all(stack.packed is not None for stack in self._stacks)

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """The height and width of each image, [len]. Nothing is read if all have one size.

        Raises:
            ValueError: an image can't be read or has another kind, or the size of a condition
                image that is read differs from that of its image.
        """
        found, *of_conditions = (stack.sizes() for stack in self._stacks)
        for conditions in of_conditions:
            for number, size, other in zip(self._kept, found, conditions, strict=True):
                if size != other:
                    raise ValueError(f"{self._images.where(number)} is {size[1]}x{size[0]}, but "
                                     f"its condition image is {other[1]}x{other[0]}; they must "
                                     "have the same size")
        return found * self._copies

    @property
    def all_names(self) -> Sequence[str]:
        """The names of all images, in order, including those that `max_size` leaves out."""
        return self._names

    @property
    def num_channels(self) -> int:
        """1 for gray, 3 for RGB, any number for arrays."""
        return self.image_shape[0]

    @property
    def resolution(self) -> int | list[int]:
        """The side of square images, or [height, width]: the networks' `img_resolution`."""
        height, width = self.image_shape[1:]
        return height if height == width else [height, width]

    @functools.cached_property
    def label_dim(self) -> int:
        """Length of a label; the number of classes, or 0 without labels."""
        if self.has_onehot_labels:
            return int(self._labels.max()) + 1
        return self._labels.shape[1]

    @property
    def has_labels(self) -> bool:
        """Whether labels were asked for and found."""
        return self.label_dim != 0

    @property
    def has_onehot_labels(self) -> bool:
        """Whether the labels are class numbers."""
        return self._labels.ndim == 1

    @property
    def class_numbers(self) -> np.ndarray:
        """The class of each image, int64 [len]; only where `has_onehot_labels`."""
        return np.tile(self._labels[self._kept], self._copies)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A sha256 of the names, sizes and CRCs of images and labels. Copies have the same.

        A ZIP lists these. The files of a folder are read once for it, and the cache keeps the value
        until a file changes.
        """
        return data_cache.fingerprint(self._files, self._stamped_names, self._listing,
                                      str(self.path))

    @property
    def content_key(self) -> str:
        """A key for data derived from the images: fingerprint, subset, reader, mirroring."""
        mirrored = "-xflip" if self._copies == 2 else ""
        return f"{self.fingerprint}{self._subset_key}-{READER_VERSION}{mirrored}"

    @property
    def known_fingerprint(self) -> str | None:
        """The fingerprint if it is known without reading images, else None."""
        if "fingerprint" in self.__dict__ or self._listing is None:
            return self.fingerprint
        return data_cache.known_fingerprint(self._listing)

    def share_fingerprint(self) -> None:
        """Finds the fingerprint once for all ranks. All ranks must call this.

        Rank 0 reads a folder. So does the first rank of another node if names, sizes or times
        differ there, and a rank whose path differs from that of the first rank of its node.
        """
        if self._is_fingerprint_shared:  # on all ranks or on none
            return
        places = distributed.gather_objects(os.path.realpath(self.path))
        leader = distributed.node_leader()
        if places[leader] != places[distributed.get_rank()]:
            leader = distributed.get_rank()

        def look() -> tuple[str | None, str | None]:
            listing = self._listing.digest if self._listing else None
            return listing, self.fingerprint if distributed.get_rank() == 0 else None

        own = distributed.run_by(leader, look)
        first = distributed.broadcast_object(own)

        def find() -> str:
            is_first = own[0] is not None and own[0] == first[0]
            return first[1] if is_first else self.fingerprint

        self.__dict__["fingerprint"] = distributed.run_by(leader, find)
        self._is_fingerprint_shared = True

    @functools.cached_property
    def _listing(self) -> data_cache.Listing | None:
        if not isinstance(self._files, Folder):
            return None
        return data_cache.list_folder(self.path, self._stamped_names)

    @property
    def _stamped_names(self) -> list[str]:
        there, others = set(self._files.names), [LABELS_NAME]
        if not self.scaling.is_8bit:
            others.append(GENERATE_RECORD)  # it holds the scale of generated arrays
        return sorted([*self._names, *self._cond_names, *filter(there.__contains__, others)])

    def check_uniform(self) -> None:
        """Reads the header of every picture that is used, and all values of floating-point arrays.

        Raises:
            ValueError: an image, which the message names, has another mode or size than the first,
                or a value that is not finite.
        """
        for stack in self._stacks:
            stack.check_uniform()

    @property
    def arrays(self) -> list[np.ndarray]:
        """The packed images [n, C, H, W] and, if read, condition images. Needs `is_packed`."""
        return [stack.packed for stack in self._stacks]

    def locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the row of each index in the packed copy, and whether it is mirrored."""
        indices = np.asarray(indices, dtype=np.int64)
        if ((indices < 0) | (indices >= len(self))).any():
            raise IndexError(f"{self.path}: index out of range; there are {len(self)} images")
        return indices % len(self._kept), indices >= len(self._kept)

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the labels for rows of the packed copy, float32 [B, label_dim]."""
        labels = self._labels[self._kept[rows]]
        if not self.has_onehot_labels:
            return labels
        onehot = np.zeros([len(labels), self.label_dim], np.float32)
        onehot[np.arange(len(labels)), labels] = 1
        return onehot

    def close(self) -> None:
        """Closes the ZIP. Reading opens it again."""
        self._files.close()

    @collector_paused()
    def _load_labels(self) -> np.ndarray | None:
        if LABELS_NAME not in self._files.names:
            return None
        where = f"{self.path}: {LABELS_NAME}"
        try:
            with self._files.open(LABELS_NAME) as file:
                text = file.read()
        except DAMAGE as error:
            raise ValueError(f"{where} can't be read: {error}") from error
        labels = parse_labels(text, where)
        self.class_names = parse_class_names(text, where)
        return None if labels is None else label_array(self._names, labels, where)

    def pack(self) -> None:
        """Reads pixels from a packed copy in the cache folder from now on, if possible.

        The copy is made on first use by the first rank of each node, or of all nodes that share the
        cache folder. Every process maps it into memory. All ranks must call this. If there is no
        space for the copy, or if the folder can't be written, a warning is printed and images are
        still read from their files (see `is_packed`).

        Raises:
            ValueError: an image can't be read, or its format differs from that of the first.
        """
        self.share_fingerprint()
        packer = _first_with_this_cache()
        problem = distributed.run_by(packer, self._make_packed)
        paths = self._packed_paths(self.fingerprint)
        is_whole = list(map(UniformImages.open_packed, self._stacks, paths))
        if problem is None and not all(is_whole):
            packer = distributed.get_rank()
            problem = f"{paths[is_whole.index(False)]}: rank {packer} does not find it"
        if problem is not None and packer == distributed.get_rank():
            print(f"Warning: {self.path} is not packed ({problem}): loader processes decode its "
                  "images in every epoch instead, as with --cache=0. --cache-dir names another "
                  "folder", file=sys.stderr, flush=True)
        if self.is_packed:
            self.close()  # the list of a ZIP's members is larger than everything else

    def packing(self) -> list[tuple[Path, int, bool]]:
        """Returns (path, bytes, whether it exists) of each file that `pack` would make.

        If a folder has never been read, the path is that of the cache folder.
        """
        fingerprint = self.known_fingerprint
        if fingerprint is None:
            return [(cache_dir(data_cache.PACKED), stack.packed_bytes, False)
                    for stack in self._stacks]
        return [(path, stack.packed_bytes, stack.is_packed_at(path))
                for stack, path in zip(self._stacks, self._packed_paths(fingerprint), strict=True)]

    def _packed_paths(self, fingerprint: str) -> list[Path]:
        key = f"{fingerprint}{self._subset_key}-{READER_VERSION}"
        return [cache_dir(data_cache.PACKED) / f"{key}{suffix}.npy"
                for _, suffix in zip(self._stacks, ("", "-cond"), strict=False)]

    def _make_packed(self) -> str | None:
        """Writes missing packed files. Returns the reason if that fails, else None."""
        missing = [(stack, path) for stack, path in zip(
            self._stacks, self._packed_paths(self.fingerprint), strict=True)
            if not stack.is_packed_at(path)]
        with contextlib.suppress(OSError):
            remove_stale(cache_dir(data_cache.PACKED))
        if not missing:
            return None
        folder, size = missing[0][1].parent, sum(stack.packed_bytes for stack, _ in missing)
        try:
            free = data_cache.make_room(folder, size)
            where = f"{folder} on {socket.gethostname()}" if distributed.get_rank() else str(folder)
            console.say(f"Packing {self.path}: {shown_bytes(size)} into {where}, where "
                        f"{shown_bytes(free)} are free")
            for stack, path in missing:
                stack.write_packed(path, self.name)
                data_cache.note_packed(path, self.path, len(self._kept))
        except OSError as error:  # damaged images are ValueErrors
            return describe(error)
        return None


class _Measured:
    """Measures batches of a data set's images."""

    def __init__(self, images: UniformImages, scaling: Scaling):
        self._images, self._scaling = images, scaling

    def get_batch(self, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Returns the fields of `Moments`, and the argument of `Spread.add` for each image."""
        values = self._images.get(np.asarray(indices))
        count, *of_channels = dataclasses.astuple(Moments.of(values))
        return np.array([count]), *of_channels, image_means(values, self._scaling)


def _first_with_this_cache() -> int:
    """Returns the first rank that uses this node's cache folder. All ranks must call this.

    The first rank of each node leaves a mark in its folder, and the others look for it in theirs.
    """
    own, leader = distributed.get_rank(), distributed.node_leader()
    leaders = sorted(set(distributed.gather_objects(leader)))
    if len(leaders) == 1:
        return leader
    mark = cache_dir(data_cache.PACKED) / f".{uuid.uuid4().hex}"
    if own == leader:
        with contextlib.suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    marks = distributed.gather_objects(mark.name)
    first = next((rank for rank in leaders if mark.with_name(marks[rank]).exists()), leader)
    firsts = distributed.gather_objects(first)
    if own == leader:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
    return firsts[leader]


class TrainingOrder(torch.utils.data.Sampler):
    """The endless training order: for each step, the indices that this rank reads.

    Step k covers the stream positions start + k*batch ... start + (k+1)*batch - 1, where `start` is
    the number of images seen before. Rank r takes the r-th of `world_size` contiguous slices of
    these positions and yields it as `rounds` lists. Each list is the micro-batch of one round of
    gradient accumulation. The data set has `size` images, and `seed` must not be negative.
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
        for positions in self.positions():
            yield order_at(self._size, self._seed, positions).tolist()

    def positions(self) -> Iterator[range]:
        """Yields the stream positions of each list."""
        for position in itertools.count(self._start + self._offset, self._batch):
            for i in range(self._rounds):
                first = position + i * self._micro_batch
                yield range(first, first + self._micro_batch)


def order_at(size: int, seed: int, positions: Iterable[int]) -> np.ndarray:
    """Returns the image index at each position of the training stream, int64."""
    positions = np.asarray(positions, dtype=np.int64)
    epochs, offsets = np.divmod(positions, size)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        indices[inside] = _permutation(size, seed, int(epoch))[offsets[inside]]
    return indices


@functools.lru_cache(maxsize=4)  # two streams; a batch may span the end of an epoch
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, unlike Generator, guarantees the same stream in every NumPy version.
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch, _DATA_TAG]))
    return np.random.RandomState(bits).permutation(size)


def _subset(size: int, max_size: int | None, seed: int) -> np.ndarray:
    """Returns the rising indices of the images to keep, the same as EDM's for the same seed."""
    indices = np.arange(size, dtype=np.int64)
    if max_size is None or max_size >= size:
        return indices
    if max_size < 1:
        raise ValueError(f"max_size={max_size}: must be positive")
    np.random.RandomState(seed % (1 << 31)).shuffle(indices)
    return np.sort(indices[:max_size])
