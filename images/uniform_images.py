"""Images of one format in a folder or ZIP, by number: from their files, or from a packed copy.

Without a packed copy, images may have different sizes.

A packed copy is one .npy of all images, [n, C, H, W] uint8, uint16 or float32, which every process
maps into its memory.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from dnnlib.atomic import atomic_write
from dnnlib.npy_header import read_npy_header
from dnnlib.ordered_pool import num_cores
from dnnlib.progress import FIRST_LINE_SEC, Progress
from images import array_files, pictures
from images.image_files import DAMAGE, Files, ImageFormat, is_array
from torch_utils.loading import read_in_processes

READER_VERSION = 2  # of the conversion from files to pixels; 2 turns pictures by their EXIF data
_PACK_BYTES = 1 << 22  # size of the batches that are decoded while packing
_PACK_IMAGES = 4096  # maximum number per batch, so that progress is shown with tiny images
_PACK_ALONE = 2048  # fewer images are packed faster than processes start
_HEADER_BYTES = 128  # of a .npy, at most


class UniformImages:
    """Images in the format of the first image. Each is compared with it when it is read.

    `names` are the images among the files, in order. `kept` are the rising numbers of the images
    that are used, and rows count these. `path` is the folder or ZIP, for errors. With `any_size`,
    heights and widths may differ, but only images of one size can be read at a time.

    Raises:
        ValueError: the first image can't be read, or networks can't use its format.
    """

    def __init__(self, path: Path, files: Files, names: Sequence[str], kept: np.ndarray,
                 any_size: bool = False):
        self._path, self._files, self.names, self._kept = path, files, names, kept
        self._any_size = any_size
        self.format = self._read_format(0)
        if not self.format.channels:
            raise ValueError(f"{self.where(0)} is {self.format}; images must be gray (L) or RGB, "
                             "or arrays (.npy); convert them with dataset_tool.py")
        self.packed: np.ndarray | None = None  # the packed copy, [len(kept), C, H, W]
        self._packed_path: Path | None = None

    def get(self, rows: np.ndarray) -> np.ndarray:
        """Returns copies of images [B, C, H, W] in the type of their format."""
        if self.packed is not None:
            return self.packed[rows]
        return self.get_batch(self._kept[rows])[0]

    def get_patches(self, rows: np.ndarray, corners: np.ndarray, side: int) -> np.ndarray:
        """Returns copies of squares of images, [B, C, side, side]. If packed, only these are read.

        `corners` [B, 2] holds the first row and column of each. If consecutive rows are the same
        image, it is decoded once.
        """
        patches = np.empty([len(rows), self.format.channels, side, side], self.format.dtype)
        image, last = None, None
        for patch, row, (y, x) in zip(patches, rows, corners, strict=True):
            if row != last:
                image = self._decode(self._kept[row]) if self.packed is None else self.packed[row]
                last = row
            patch[:] = image[:, y:y + side, x:x + side]
        return patches

    def sizes(self) -> list[tuple[int, int]]:
        """Returns the height and width of each image that is used, from the files' headers."""
        if not self._any_size:
            return [self.format.shape[1:]] * len(self._kept)
        found = []
        for number in self._kept:
            image_format = self._read_format(number)
            self._check_format(number, image_format)
            found.append(image_format.shape[1:])
        return found

    def where(self, number: int) -> str:
        """Returns an image's name in errors, given its number among all names."""
        return f"{self._path}: {self.names[number]} (image {number})"

    def check_uniform(self) -> None:
        """Compares all images with the first, see `ImageFolderDataset.check_uniform`."""
        look = self._decode if self.format.dtype == "float32" else (
            lambda number: self._check_format(number, self._read_format(number)))
        with Progress(len(self._kept), "Checking images", delay=1,
                      first_line_sec=FIRST_LINE_SEC) as progress:
            for number in progress.over(self._kept):
                look(number)

    def get_batch(self, numbers: Sequence[int]) -> tuple[np.ndarray]:
        """Returns images from their files, given their numbers among all names."""
        if self._any_size and len(numbers):
            return (np.stack([self._decode(number) for number in numbers]),)
        images = np.empty([len(numbers), *self.format.shape], self.format.dtype)
        for image, number in zip(images, numbers, strict=True):
            image[:] = self._decode(number)
        return (images,)

    @contextlib.contextmanager
    def _open_image(self, number: int) -> Iterator[IO[bytes]]:
        try:
            with self._files.open(self.names[number]) as file:
                yield file
        except pictures.DamagedImageError as error:
            raise ValueError(f"{self.where(number)} {error}") from error
        except DAMAGE as error:
            raise ValueError(f"{self.where(number)} can't be read: {error}") from error

    def _read_format(self, number: int) -> ImageFormat:
        """Returns the format of an image without decoding the pixels."""
        with self._open_image(number) as file:
            if is_array(self.names[number]):
                return array_files.read_format(file)
            return pictures.read_format(file)

    def _check_format(self, number: int, found: ImageFormat) -> None:
        expected = self.format
        if self._any_size:
            expected = expected._replace(height=found.height, width=found.width)
        if found != expected:
            raise ValueError(
                f"{self.where(number)} is {found}, but {self.names[0]} is {self.format}; all "
                f"images must agree{' but for their size' if self._any_size else ''}; convert them "
                "with dataset_tool.py")

    def _decode(self, number: int) -> np.ndarray:
        """Returns one image as [C, H, W]."""
        # Reading to the end makes zipfile verify the CRC too.
        with self._open_image(number) as file:
            if is_array(self.names[number]):
                pixels, image_format = array_files.decode(file.read())
            else:
                pixels, image_format = pictures.decode(file.read())
        self._check_format(number, image_format)
        return pixels

    @property
    def packed_bytes(self) -> int:
        """The size of the packed copy, even if it does not exist."""
        return len(self._kept) * self.format.num_bytes + _HEADER_BYTES

    def is_packed_at(self, path: Path) -> bool:
        """Whether `path` is a complete packed copy."""
        return self._map_packed(path) is not None

    def open_packed(self, path: Path) -> bool:
        """Maps the packed copy at `path`. Returns whether it exists and is complete."""
        self.packed = self._map_packed(path)
        self._packed_path = path if self.packed is not None else None
        return self.packed is not None

    def _map_packed(self, path: Path) -> np.ndarray | None:
        """Returns the memory-mapped copy, or None if it is missing or incomplete."""
        try:
            with open(path, "rb") as file:
                read_npy_header(file)  # raises ValueErrors, unlike np.load
            packed = np.load(path, mmap_mode="r", allow_pickle=False)
            whole = (packed.dtype == self.format.dtype and packed.flags.c_contiguous
                     and packed.shape == (len(self._kept), *self.format.shape)
                     and os.path.getsize(path) == packed.offset + packed.nbytes)
        except (OSError, ValueError, EOFError):
            return None
        return packed.view(np.ndarray) if whole else None

    def write_packed(self, path: Path, title: str) -> None:
        """Writes the packed copy to `path`, whose folder must exist, decoding on several cores.

        Raises:
            ValueError: an image can't be read, or its format differs from that of the first.
            OSError: the copy can't be written.
        """
        header = {"descr": np.dtype(self.format.dtype).str, "fortran_order": False,
                  "shape": (len(self._kept), *self.format.shape)}
        with atomic_write(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for images in self._decode_all(title):
                file.write(images)

    def _decode_all(self, title: str) -> Iterator[np.ndarray]:
        """Yields the images in order as [B, C, H, W], decoded on all cores."""
        size = min(max(_PACK_BYTES // self.format.num_bytes, 1), _PACK_IMAGES)
        batches = [self._kept[i:i + size] for i in range(0, len(self._kept), size)]
        workers = num_cores() if len(self._kept) >= _PACK_ALONE else 0
        with Progress(len(self._kept), f"Packing {title}", delay=1,
                      first_line_sec=FIRST_LINE_SEC) as progress:
            for images, in read_in_processes(self, batches, workers=workers):
                yield images.numpy()
                progress.update(len(images))

    def __getstate__(self) -> dict[str, Any]:
        # The process that unpickles this maps the copy itself.
        return self.__dict__ | ({"packed": None} if self._packed_path else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._packed_path:
            self.packed = np.load(self._packed_path, mmap_mode="r").view(np.ndarray)
