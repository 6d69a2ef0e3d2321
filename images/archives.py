"""Images and labels from the published files of CIFAR-10, CIFAR-100 and LSUN.

CIFAR consists of a few pickles or binary files, in a .tar.gz or in the folder it unpacks to. LSUN
is an LMDB database of encoded images. Downloaded files are not trusted: nothing in them is executed
or extracted, and their unpacked size is limited.
"""

import contextlib
import functools
import gzip
import os
import tarfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dnnlib import plain_pickle
from images.image_files import DAMAGE, error_prefix, name_problem, read_regular

_NUM_IMAGES = 50_000  # training images of CIFAR
_PIXELS = 3 * 32 * 32
_MAX_MEMBER_BYTES = 192 << 20  # CIFAR-100's images have 155 MB
_MAX_BYTES = 512 << 20  # an archive of CIFAR has 186 MB
_MAX_MEMBERS = 100  # CIFAR-10 has 9
_MAX_READ = 64 << 10  # per read: tarfile reads nested headers whole and parses them
_FINE, _COARSE = "fine", "coarse"  # names of label sets; only CIFAR-100 has the second

_DAMAGE = (*DAMAGE, tarfile.TarError)


class Arrays(NamedTuple):
    """A whole data set: uint8 images [n, H, W, 3] or [n, H, W], class numbers, class names."""

    images: np.ndarray
    labels: np.ndarray | None  # None if none were read
    class_names: list[str] | None
    title: str  # name of the data set
    expected: int | None = None  # number of images as published; None if unknown
    facts: tuple[str, ...] = ()  # notes for the user
    padding: int = 0  # zeros to add on each side of each image
    label_sets: dict[str, tuple[np.ndarray, list[str] | None]] = {}  # other labels and names


class _Labels(NamedTuple):
    """Where a layout stores one set of labels and the names of its classes."""

    place: str | int  # the key in a pickle, or the byte of a record
    num_classes: int
    names: str  # the file with the names
    key: str | None = None  # key of the names in a pickle; None for a text file with one per line


class _Layout(NamedTuple):
    """One of the forms in which CIFAR is published."""

    title: str
    folder: str
    batches: tuple[str, ...]  # files of training images, in order
    label_sets: dict[str, _Labels]  # the first is the default

    @property
    def files(self) -> list[str]:
        """All files that are read."""
        return [*self.batches, *(labels.names for labels in self.label_sets.values())]


_LAYOUTS = (
    _Layout("CIFAR-10", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)),
            {_FINE: _Labels("labels", 10, "batches.meta", "label_names")}),
    _Layout("CIFAR-10", "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            {_FINE: _Labels(0, 10, "batches.meta.txt")}),
    _Layout("CIFAR-100", "cifar-100-python", ("train",),
            {_FINE: _Labels("fine_labels", 100, "meta", "fine_label_names"),
             _COARSE: _Labels("coarse_labels", 20, "meta", "coarse_label_names")}),
    _Layout("CIFAR-100", "cifar-100-binary", ("train.bin",),
            {_FINE: _Labels(1, 100, "fine_label_names.txt"),
             _COARSE: _Labels(0, 20, "coarse_label_names.txt")}),
)


def read_cifar(path: Path) -> Arrays:
    """Returns the training images of CIFAR-10 or CIFAR-100 from a .tar.gz, in published order.

    Raises:
        OSError: the file can't be read.
        ValueError: it is damaged, has another layout, or has unusual members.
    """
    with described(path):
        members = _read_members(path, {f"{layout.folder}/{name}" for layout in _LAYOUTS
                                       for name in layout.files})
        layout = max(_LAYOUTS, key=lambda one: sum(
            f"{one.folder}/{name}" in members for name in one.batches))
        for name in layout.batches:
            if f"{layout.folder}/{name}" not in members:
                raise ValueError(f"has no {layout.folder}/{name}; the only .tar.gz files supported "
                                 "are those of CIFAR-10 and CIFAR-100")
        return _of_layout(layout, {name: members.pop(f"{layout.folder}/{name}", None)
                                   for name in dict.fromkeys(layout.files)})


def find_cifar(names: Iterable[str]) -> list[str]:
    """Returns the folders, '' or ending in '/', that hold the files of CIFAR, sorted."""
    there = set(names)
    folders = {name.rpartition("/")[0] for name in there
               if name.rpartition("/")[2] in {layout.batches[0] for layout in _LAYOUTS}}
    tops = {f"{folder}/" if folder else "" for folder in folders}
    return sorted(top for top in tops if _layouts_of(top, there))


def _layouts_of(top: str, names: set[str]) -> list[_Layout]:
    """Returns layouts whose files are all in a folder, since a name like `train` is no proof."""
    return [layout for layout in _LAYOUTS if {top + name for name in layout.files} <= names]


def read_cifar_folder(path: Path) -> Arrays:
    """Returns the training images in a folder that `find_cifar` found, like `read_cifar`."""
    [layout, *_] = _layouts_of("", set(os.listdir(path)))
    found = {}
    for name in layout.files:
        with error_prefix(f"{path / name}: "):
            found[name] = read_regular(path / name)
            _check_size(len(found[name]))
    with described(path):
        return _of_layout(layout, found)


@contextlib.contextmanager
def open_lmdb(path: Path) -> Iterator[tuple[int, Iterator[tuple[str, bytes]]]]:
    """Yields the number of entries and an iterator over (key, value), sorted by key.

    Raises:
        OSError: the database can't be read, or the package `lmdb` is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise OSError(f"{path}: reading LMDB needs the package lmdb: pip install lmdb") from error
    try:
        with lmdb.open(str(path), readonly=True, lock=False, create=False) as database, \
                database.begin() as transaction:
            yield transaction.stat()["entries"], (
                (key.decode("ascii", "backslashreplace"), value)
                for key, value in transaction.cursor())
    except lmdb.Error as error:
        raise OSError(f"{path}: can't be read as an LMDB database ({error})") from error


@contextlib.contextmanager
def described(path: Path) -> Iterator[None]:
    """Prefixes error messages with the file's name."""
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"{path}: needs more memory than is available") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path}: {error or 'damaged'}") from error


class _Bounded:
    """A compressed file for tarfile that refuses long headers and too much unpacked data."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise ValueError(f"has a header of {size} bytes, which is too long")
        self._check(self.tell())
        return self._file.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self._file.seek(position)

    def _check(self, position: int) -> None:
        if not position <= _MAX_BYTES:
            raise ValueError(f"unpacks to more than the {_MAX_BYTES} bytes allowed")


def _read_members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Returns the wanted files of a .tar.gz. All other members are checked and skipped."""
    found, names = {}, set()
    with gzip.open(path) as unpacked:
        file = _Bounded(unpacked)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _check_member(member)
                if member.name in names:
                    raise ValueError(f"{_shown(member)} occurs twice")
                names.add(member.name)
                if len(names) > _MAX_MEMBERS:
                    raise ValueError(f"has more than {_MAX_MEMBERS} members")
                if member.name in wanted:
                    read = functools.partial(tar.extractfile(member).read, _MAX_READ)
                    found[member.name] = b"".join(iter(read, b""))
        while file.read(_MAX_READ):  # to the end, where gzip compares its checksum
            pass
    return found


def _shown(member: tarfile.TarInfo) -> str:
    return ascii(member.name)[1:-1][:80]


def _check_member(member: tarfile.TarInfo) -> None:
    if problem := name_problem(member.name):
        raise ValueError(f"{_shown(member)} {problem}")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        raise ValueError(f"{_shown(member)} is a link or special file")
    with error_prefix(f"{_shown(member)}: "):
        _check_size(member.size)


def _check_size(size: int) -> None:
    if not 0 <= size <= _MAX_MEMBER_BYTES:
        raise ValueError(f"{size} bytes are more than the {_MAX_MEMBER_BYTES} allowed")


def _of_layout(layout: _Layout, files: dict[str, bytes | None]) -> Arrays:
    """Returns the data set in these files. The files of names may be missing."""
    batches = []
    for name in layout.batches:
        with error_prefix(f"{name}: "):
            batches.append(_read_batch(layout, files.pop(name)))
    images = np.concatenate([pixels for pixels, _ in batches])
    label_sets = {}
    for key, labels in layout.label_sets.items():
        with error_prefix(f"{labels.names}: "):
            names = _read_names(labels, files[labels.names])
        label_sets[key] = np.concatenate([found[key] for _, found in batches]), names
    facts = ()
    if _COARSE in label_sets:
        facts = ("labels are the 100 fine classes unless --label-set=coarse takes the 20 coarse "
                 "ones",)
    return Arrays(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), *label_sets[_FINE],
                  layout.title, _NUM_IMAGES, facts, label_sets=label_sets)


def _read_batch(layout: _Layout, data: bytes) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns images [n, 3072] and the labels [n] of each label set."""
    is_pickle = isinstance(layout.label_sets[_FINE].place, str)
    pixels, found = (_read_pickle if is_pickle else _read_records)(data, layout.label_sets)
    for key, labels in layout.label_sets.items():
        check_labels(found[key], len(pixels), range(labels.num_classes))
    return pixels, {key: np.array(numbers, np.int64) for key, numbers in found.items()}


def _read_pickle(data: bytes,
                 label_sets: dict[str, _Labels]) -> tuple[np.ndarray, dict[str, list[int]]]:
    content = _plain_dict(data)
    pixels = content.get("data")
    found = {key: content.get(labels.place) for key, labels in label_sets.items()}
    for key, labels in label_sets.items():
        if not (isinstance(pixels, plain_pickle.Array) and isinstance(found[key], list)
                and all(type(label) is int for label in found[key])):
            raise ValueError(f'must have an array "data" and a list "{labels.place}" of '
                             "integers")
    images = pixels.numpy()
    if images.dtype != np.uint8:
        raise ValueError("holds an array that is not of bytes")
    if images.ndim != 2 or images.shape[1] != _PIXELS:
        raise ValueError(f"has data of shape {list(images.shape)}, expected [n, {_PIXELS}]")
    return images, found


def _read_records(data: bytes,
                  label_sets: dict[str, _Labels]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns images and labels from records: one byte for each label set, then the pixels."""
    size = len(label_sets) + _PIXELS
    if not data or len(data) % size:
        raise ValueError(f"has {len(data)} bytes, not a multiple of the record size {size}")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    return records[:, len(label_sets):], {key: records[:, labels.place]
                                          for key, labels in label_sets.items()}


def _read_names(labels: _Labels, data: bytes | None) -> list[str] | None:
    """Returns the names of classes, or None if there is no file of them."""
    if data is None:
        return None
    if labels.key is None:
        found = data.decode("latin-1").split("\n")
        names = [line.strip() for line in found if line.strip()]
    else:
        found = _plain_dict(data).get(labels.key)
        names = [name.decode("latin-1") if isinstance(name, bytes) else name
                 for name in (found if isinstance(found, list) else [])]
    if len(names) != labels.num_classes or not all(isinstance(name, str) for name in names):
        where = f'"{labels.key}"' if labels.key else "names in lines"
        raise ValueError(f"does not have {labels.num_classes} {where}")
    return [ascii(name)[1:-1] for name in names]


def _plain_dict(data: bytes) -> dict[str, Any]:
    content = plain_pickle.loads(data)
    if not isinstance(content, dict):
        raise ValueError("does not hold a dict")
    return {key.decode("latin-1") if isinstance(key, bytes) else key: value
            for key, value in content.items()}


def check_labels(labels: Collection[int], num_images: int, allowed: range) -> None:
    """Raises ValueError unless each image has an allowed label."""
    if len(labels) != num_images:
        raise ValueError(f"has {len(labels)} labels for {num_images} images")
    for i, label in enumerate(labels):
        if label not in allowed:
            raise ValueError(f"label {label} of image {i} must be in {allowed[0]}..{allowed[-1]}")
