"""Images in one .npz, as guided-diffusion and consistency models write them; and `open_files`.

| member | holds |
|---|---|
| `arr_0` | images [n, H, W, C], [n, C, H, W] or [n, H, W], of a type in images/array_files.py |
| `arr_1` | optionally, their class numbers [n] |

Nothing is unpickled, and only one image is in memory at a time. An uncompressed member allows
random access. A compressed member is decompressed from its beginning, and again from its beginning
for an image further back.
"""

import io
import json
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dnnlib.npy_header import read_npy_header
from images import array_files
from images.image_files import (
    ARRAY_SUFFIX,
    DAMAGE,
    LABELS_NAME,
    MAX_CLASSES,
    Files,
    Folder,
    Zip,
    check_file_size,
    check_finished,
    error_prefix,
)

_IMAGES, _LABELS = "arr_0", "arr_1"
_LOCAL_HEADER = 30  # bytes before the name of a member, the last four of which are lengths
_MAX_IMAGES = 1 << 24  # compressed zeros could claim any number, and each image gets a name
_MAX_SHOWN = 5  # members in a message


def open_files(path: Path) -> Files:
    """Opens a folder, a ZIP or the images of an .npz.

    Raises:
        OSError: the path does not exist or can't be read.
        ValueError: it is not a ZIP, is an unfinished ZIP, has two members of the same name, or is
            an .npz without images.
    """
    check_finished(path)
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or ZIP")
    return Npz(path) if is_npz(path) else Zip(path)


def is_npz(path: str | os.PathLike) -> bool:
    """Whether a path has the extension of .npz files."""
    return os.fspath(path).lower().endswith(".npz")


def npz_contents(path: str | os.PathLike) -> frozenset[str]:
    """Returns what an .npz holds: a subset of 'images', 'statistics' and 'features'.

    Images are the member `arr_0`, statistics are `mu` and `sigma`, and features are `features`.
    Reference batches of guided-diffusion hold images and statistics. References written by
    `fid.py ref --features` hold statistics and features.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not an .npz.
    """
    with _open_zip(Path(path)) as archive:
        names = {name.removesuffix(ARRAY_SUFFIX) for name in archive.namelist()}
    kinds = {"images": {_IMAGES}, "statistics": {"mu", "sigma"}, "features": {"features"}}
    return frozenset(kind for kind, members in kinds.items() if members <= names)


class Npz:
    """The images of an .npz, by number or by name as if each were a .npy file in a folder.

    `labels` are the class numbers [n], or None if there are none or none are wanted. `layout` is
    explained in `array_files.first_channels`. The checksum of the images is verified if one process
    reads them all in order.

    Raises:
        OSError: the file can't be read.
        ValueError: it does not hold images, is damaged, or has images of ambiguous shape.
    """

    def __init__(self, path: Path, layout: str | None = None, *, with_labels: bool = True):
        self._path, self._layout = path, layout
        self._file, self._pid = None, None
        with _open_zip(path) as archive, error_prefix(f"{path}: "):
            self._images = _find_member(archive, _IMAGES)
            with error_prefix(f"{_IMAGES}: "):
                array_files.check_stack(self._images.shape, self._images.dtype, layout)
                check_file_size(self._images.item_bytes)
                if len(self) > _MAX_IMAGES:
                    raise ValueError(f"{len(self)} images are more than the {_MAX_IMAGES} allowed")
            self.labels: np.ndarray | None = None
            if with_labels and _has(archive, _LABELS):
                self.labels = _read_labels(archive, len(self))
                self._labels_info = archive.getinfo(_member(_LABELS))
            self._start = self._images.header_bytes
            if self._images.is_stored:  # its bytes can be read from the file
                self._start += _data_start(path, self._images.info)
            with archive.open(self._images.info) as member:
                self._header_crc = zlib.crc32(member.read(self._images.header_bytes))
        self._crc, self._summed = self._header_crc, 0
        self.names = [f"img{i:08d}{ARRAY_SUFFIX}" for i in range(len(self))]
        if self.labels is not None:
            self.names.append(LABELS_NAME)

    def __len__(self) -> int:
        return self._images.shape[0]

    def read(self, number: int) -> np.ndarray:
        """Returns one image [C, H, W] of the stored type.

        Raises:
            ValueError: it can't be read; the message lacks the file's name.
        """
        size = self._images.item_bytes
        try:
            file = self._open_member()
            file.seek(self._start + number * size)
            data = file.read(size)
        except DAMAGE as error:
            raise ValueError(f"{_IMAGES}: can't be read: {error or 'damaged'}") from error
        if len(data) != size:
            raise ValueError(f"{_IMAGES}: the file ends in image {number}")
        self._compare_checksum(number, data)
        image = np.frombuffer(data, self._images.dtype).reshape(1, *self._images.shape[1:])
        return array_files.as_stack(image, self._layout)[0]

    def open(self, name: str) -> IO[bytes]:
        """Returns the content of the file with this name, an image or dataset.json."""
        if name != LABELS_NAME:
            return io.BytesIO(array_files.encode(self.read(self._number(name))))
        labels = [[image, label] for image, label in
                  zip(self.names, self.labels.tolist(), strict=False)]
        return io.BytesIO(json.dumps({"labels": labels}).encode())

    def stamp(self, name: str) -> str:
        """Returns a string that changes with the content: size and checksum of the member."""
        info = self._labels_info if name == LABELS_NAME else self._images.info
        return f"{info.file_size} {info.CRC}"

    def close(self) -> None:
        """Closes the file. Reading opens it again."""
        if self._file is not None and self._pid == os.getpid():
            self._file.close()
        self._file, self._pid = None, None

    @staticmethod
    def _number(name: str) -> int:
        return int(name.removeprefix("img").removesuffix(ARRAY_SUFFIX))

    def _open_member(self) -> IO[bytes]:
        """Returns this process's handle: the file if images are uncompressed, else the member."""
        if self._file is None or self._pid != os.getpid():
            if self._images.is_stored:
                self._file = open(self._path, "rb")  # noqa: SIM115 - by close()
            else:
                self._file = zipfile.ZipFile(  # noqa: SIM115 - likewise
                    self._path).open(self._images.info)
            self._pid = os.getpid()
        return self._file

    def _compare_checksum(self, number: int, data: bytes) -> None:
        if number == 0:
            self._crc, self._summed = self._header_crc, 0
        if number != self._summed:
            return
        self._crc, self._summed = zlib.crc32(data, self._crc), self._summed + 1
        if self._summed == len(self) and self._crc != self._images.info.CRC:
            raise ValueError(f"{_IMAGES}: is damaged: its checksum does not match")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_pid": None}


class _Member(NamedTuple):
    """An array in an .npz whose header was read and is plausible."""

    info: zipfile.ZipInfo
    header_bytes: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def is_stored(self) -> bool:
        """Whether it is uncompressed."""
        return self.info.compress_type == zipfile.ZIP_STORED

    @property
    def item_bytes(self) -> int:
        """Bytes of one item of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def _open_zip(path: Path) -> zipfile.ZipFile:
    """Opens an .npz. Raises ValueError if it is damaged or not an .npz."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: is not an .npz, or is damaged ({error})") from error


def _member(name: str) -> str:
    return name + ARRAY_SUFFIX


def _has(archive: zipfile.ZipFile, name: str) -> bool:
    return _member(name) in archive.NameToInfo


def _find_member(archive: zipfile.ZipFile, name: str) -> _Member:
    """Returns an array in an .npz, whose size must match its header.

    Raises:
        ValueError: it does not exist, or is damaged.
    """
    if not _has(archive, name):
        there = [other.removesuffix(ARRAY_SUFFIX) for other in archive.namelist()]
        more = f" and {len(there) - _MAX_SHOWN} more" if len(there) > _MAX_SHOWN else ""
        raise ValueError(f"holds {', '.join(there[:_MAX_SHOWN]) or 'nothing'}{more}, but no "
                         f"images; np.savez(FILE, images) stores them as {_IMAGES}")
    info = archive.getinfo(_member(name))
    with error_prefix(f"{name}: "):
        try:
            with archive.open(info) as file:
                shape, is_fortran, dtype = read_npy_header(file)
                header_bytes = file.tell()
        except ValueError:
            raise
        except DAMAGE as error:  # also if it is encrypted or its compression is unknown
            raise ValueError(f"can't be read: {error or 'damaged'}") from error
        if is_fortran and len(shape) > 1:
            raise ValueError("is stored in column order; save np.ascontiguousarray of it")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or header_bytes + size != info.file_size:
            raise ValueError(f"has a header for an array of shape {list(shape)}, but "
                             "the wrong number of bytes")
    return _Member(info, header_bytes, shape, dtype)


def _read_labels(archive: zipfile.ZipFile, num_images: int) -> np.ndarray:
    """Returns the class numbers. Raises ValueError for anything else."""
    member = _find_member(archive, _LABELS)
    if member.shape != (num_images,) or member.dtype.kind not in "iu":
        raise ValueError(f"{_LABELS}: is a {member.dtype.name} array of shape "
                         f"{list(member.shape)}; labels must be {num_images} integers [n]")
    with error_prefix(f"{_LABELS}: "):
        try:
            with archive.open(member.info) as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
        except DAMAGE as error:
            raise ValueError(f"can't be read: {error or 'damaged'}") from error
        wrong = np.flatnonzero((labels < 0) | (labels >= MAX_CLASSES))
        if len(wrong):
            raise ValueError(f"label {labels[wrong[0]]} of image {wrong[0]} must be in "
                             f"0..{MAX_CLASSES - 1}")
    return labels


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Returns the position in the file of the bytes of an uncompressed member.

    Raises ValueError if the file is too short.
    """
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
        lengths = np.frombuffer(header[-4:], "<u2") if len(header) == _LOCAL_HEADER else [0]
        start = info.header_offset + _LOCAL_HEADER + int(sum(lengths))
        file.seek(0, os.SEEK_END)
        if not header.startswith(b"PK\3\4") or start + info.file_size > file.tell():
            raise ValueError(f"{_IMAGES}: is damaged: the file ends before it")
    return start
