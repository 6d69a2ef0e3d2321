"""Images and labels out of the archives in which CIFAR-10, MNIST and LSUN are published.

CIFAR-10 is a tar of pickles, MNIST a pair of IDX files, both compressed with gzip; LSUN is an LMDB
database of encoded images. The files are downloads and not trusted: nothing in them is run or
extracted, and what they unpack to is bounded.
"""

import contextlib
import functools
import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dnnlib import plain_pickle
from images.image_files import DAMAGE, error_prefix, name_problem

CIFAR10_SIZE, MNIST_SIZE = 50_000, 60_000  # training images
MNIST_IMAGES, MNIST_LABELS = "-images-idx3-ubyte.gz", "-labels-idx1-ubyte.gz"

_CIFAR10_FOLDER = "cifar-10-batches-py"
_CIFAR10_BATCHES = [f"{_CIFAR10_FOLDER}/data_batch_{i}" for i in range(1, 6)]
_CIFAR10_NAMES = f"{_CIFAR10_FOLDER}/batches.meta"
_NUM_CLASSES = 10
_MAX_MEMBER_BYTES = 64 << 20  # a batch has 31 MB
_MAX_BYTES = 512 << 20  # CIFAR-10 has 186 MB, MNIST 47 MB
_MAX_MEMBERS = 100  # CIFAR-10 has 9
_MAX_READ = 64 << 10  # at a time: tarfile reads headers of headers whole, and takes them apart

_DAMAGE = (*DAMAGE, tarfile.TarError)


class Arrays(NamedTuple):
    """A whole data set: uint8 images [n, H, W, 3] or [n, H, W], class numbers, class names."""

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str] | None = None


def read_cifar10(path: Path) -> Arrays:
    """Returns the training images of CIFAR-10, `data_batch_1` to `data_batch_5` in this order.

    Raises:
        OSError: it can't be read.
        ValueError: damaged, not an archive of this layout, or one that asks for anything unusual.
    """
    with _described(path):
        members = _read_members(path, {*_CIFAR10_BATCHES, _CIFAR10_NAMES})
        for name in _CIFAR10_BATCHES:
            if name not in members:
                raise ValueError(f"has no {name}; of .tar.gz files only CIFAR-10's "
                                 "cifar-10-python.tar.gz is supported")
        batches = [_cifar10_batch(name, members.pop(name)) for name in _CIFAR10_BATCHES]
        names = members.get(_CIFAR10_NAMES)
        class_names = None if names is None else _cifar10_names(names)
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Arrays(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, class_names)


def read_mnist(path: Path) -> Arrays:
    """Returns images padded with zeros from 28x28 to 32x32, and the labels of the file beside.

    Raises:
        OSError: one of the two files can't be read.
        ValueError: damaged, or not files of this kind.
    """
    labels_path = path.with_name(path.name.replace(MNIST_IMAGES, MNIST_LABELS))
    if not labels_path.exists():
        raise FileNotFoundError(f"{labels_path}: no such file; the labels must lie beside "
                                f"{path.name}")
    with _described(path):
        images = _read_idx(path, 3)
        if images.shape[1:] != (28, 28):
            raise ValueError("has images of {1}x{0}, expected 28x28".format(*images.shape[1:]))
    with _described(labels_path):
        labels = _read_idx(labels_path, 1).astype(np.int64)
        _check_labels(labels, len(images))
    return Arrays(np.pad(images, [(0, 0), (2, 2), (2, 2)]), labels)


@contextlib.contextmanager
def open_lmdb(path: Path) -> Iterator[tuple[int, Iterator[tuple[str, bytes]]]]:
    """Yields the number of entries and an iterator over (key, value) in the order of the keys.

    Raises:
        OSError: it can't be read, or the package `lmdb` isn't installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise OSError(f"{path}: reading LMDB needs another package: pip install lmdb") from error
    try:
        with lmdb.open(str(path), readonly=True, lock=False, create=False) as database, \
                database.begin() as transaction:
            yield transaction.stat()["entries"], (
                (key.decode("ascii", "backslashreplace"), value)
                for key, value in transaction.cursor())
    except lmdb.Error as error:
        raise OSError(f"{path}: can't be read as an LMDB database ({error})") from error


@contextlib.contextmanager
def _described(path: Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with it."""
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"{path}: asks for more memory than there is") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path}: {error or 'damaged'}") from error


class _Bounded:
    """A compressed file as tarfile reads it; refuses long headers and to unpack too much."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise ValueError(f"has a header of {size} bytes")
        self._check(self.tell())
        return self._file.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self._file.seek(position)

    def _check(self, position: int) -> None:
        if not position <= _MAX_BYTES:
            raise ValueError(f"unpacks to more than the {_MAX_BYTES} bytes allowed")


def _read_members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Returns the wanted files of a .tar.gz; every other member is checked and passed over."""
    found, names = {}, set()
    with gzip.open(path) as unpacked:
        file = _Bounded(unpacked)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _check_member(member)
                if member.name in names:
                    raise ValueError(f"{_shown(member)} is there twice")
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
    if not 0 <= member.size <= _MAX_MEMBER_BYTES:
        raise ValueError(f"{_shown(member)}: {member.size} bytes are more than the "
                         f"{_MAX_MEMBER_BYTES} allowed")


def _plain_dict(name: str, data: bytes) -> dict[str, Any]:
    with error_prefix(f"{name}: "):
        content = plain_pickle.loads(data)
        if not isinstance(content, dict):
            raise ValueError("not a dict")
    return {key.decode("latin-1") if isinstance(key, bytes) else key: value
            for key, value in content.items()}


def _cifar10_batch(name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns images [n, 3072] and labels [n]."""
    content = _plain_dict(name, data)
    pixels, labels = content.get("data"), content.get("labels")
    with error_prefix(f"{name}: "):
        if not (isinstance(pixels, plain_pickle.ByteArray) and isinstance(labels, list)
                and all(type(label) is int for label in labels)):
            raise ValueError('has no "data" that is an array and "labels" that are integers')
        images = pixels.numpy()
        _check_labels(labels, len(images) if images.ndim else 0)
        if images.ndim != 2 or images.shape[1] != 3 * 32 * 32:
            raise ValueError(f"has data of shape {list(images.shape)}, expected [n, 3072]")
    return images, np.array(labels, np.int64)


def _cifar10_names(data: bytes) -> list[str]:
    found = _plain_dict(_CIFAR10_NAMES, data).get("label_names")
    names = [name.decode("latin-1") if isinstance(name, bytes) else name
             for name in (found if isinstance(found, list) else [])]
    if len(names) != _NUM_CLASSES or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{_CIFAR10_NAMES}: has no {_NUM_CLASSES} "label_names"')
    return [ascii(name)[1:-1] for name in names]


def _check_labels(labels: Any, num_images: int) -> None:
    if len(labels) != num_images:
        raise ValueError(f"has {len(labels)} labels for {num_images} images")
    for i, label in enumerate(labels):
        if not 0 <= label < _NUM_CLASSES:
            raise ValueError(f"label {label} of image {i} must be in 0..{_NUM_CLASSES - 1}")


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Returns the uint8 array of an IDX file compressed with gzip."""
    with gzip.open(path) as file:
        header = np.frombuffer(file.read(4 + 4 * num_dims), ">u4").tolist()
        if len(header) != 1 + num_dims or header[0] != 0x800 + num_dims:
            raise ValueError(f"not an IDX file of bytes in {num_dims} dimensions")
        shape = header[1:]
        size = np.prod(shape, dtype=object)
        if size > _MAX_BYTES:
            raise ValueError(f"unpacks to more than the {_MAX_BYTES} bytes allowed")
        data = file.read(size + 1)  # one beyond: the end is where gzip compares its checksum
        if len(data) != size:
            raise ValueError(f"has {'more' if len(data) > size else 'fewer'} than the {size} bytes "
                             f"that its header promises")
    return np.frombuffer(data, np.uint8).reshape(shape)
