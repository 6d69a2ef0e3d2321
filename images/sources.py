"""What `dataset_tool.py --source` may name: folders, ZIPs and the archives of published data sets.

| source | recognised by | labels |
|---|---|---|
| CIFAR-10 | a file *.tar.gz or *.tgz | its own |
| MNIST | a file *-images-idx3-ubyte.gz | the file *-labels-idx1-ubyte.gz beside it |
| LSUN | a folder *_lmdb | none |
| ZIP | a file *.zip | dataset.json |
| array | a file *.npy of [n, H, W] or [n, C, H, W] | none |
| folder | any other folder | dataset.json, else the folders at its top |

Images are named and counted here, and read one after the other when they are needed. Only those of
CIFAR-10 and MNIST, whose size is fixed, are kept in memory.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from images import archives, array_files
from images.image_files import (
    DAMAGE,
    LABELS_NAME,
    check_file_size,
    check_matched,
    error_prefix,
    is_array,
    is_image,
    label_array,
    match_names,
    member_problem,
    parse_labels,
    read_regular,
    split_conditions,
)


class Item(NamedTuple):
    """One image to convert: its name, and its file's content, its file, or its pixels."""

    name: str
    data: bytes | Path | np.ndarray

    def content(self) -> bytes | np.ndarray:
        """Returns the file's content or the pixels.

        Raises:
            ValueError: naming the file, which can't be read.
        """
        if not isinstance(self.data, Path):
            return self.data
        try:
            return read_regular(self.data)
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or error
            raise ValueError(f"{self.name}: can't be read: {problem}") from error


@dataclasses.dataclass
class Source:
    """Images to convert, numbered from 0 in their order."""

    num_images: int
    names: Sequence[str] | None  # None where they are known only after reading
    read: Callable[[Iterable[int]], Iterator[Item]]  # yields the images of these rising numbers
    labels: Callable[[int], list[Any]] | None = None  # of the first n images; None without labels
    class_names: Sequence[str] | None = None  # as the source calls them
    num_others: int = 0  # files that aren't images
    num_conditions: int = 0  # condition images, which are not taken along
    links: Sequence[str] = ()  # folders that are symbolic links, which aren't followed
    note: str = ""  # what a user may not expect


@contextlib.contextmanager
def open_source(path: Path, flag: str = "--source") -> Iterator[Source]:
    """Opens what `--source` or another flag names.

    Raises:
        OSError: it isn't there or can't be read.
        ValueError: it is of no supported kind, or malformed.
    """
    if not path.exists():
        raise FileNotFoundError(f"{flag}={path}: no such file or folder")
    opener = _opener(path)
    if opener is None:
        raise ValueError(f"{flag}={path}: not supported; allowed: folder, .zip, .npy, *_lmdb, "
                         f"cifar-10-python.tar.gz, *{archives.MNIST_IMAGES}")
    with opener(path) as source:
        if not source.num_images:
            linked = f"; {source.links[0]} is a link to a folder, and those aren't followed" \
                if source.links else ""
            raise ValueError(f"{flag}={path}: no images found{linked}")
        yield source


def condition_numbers(source: Source, conditions: Source) -> list[int]:
    """Returns for each image of a source the number of its condition image, by their names.

    Raises:
        ValueError: an image without a condition image or the other way round, or sources without
            names.
    """
    if source.names is None or conditions.names is None:
        raise ValueError("--cond-source: LMDB has no file names to find condition images by")
    found, extra = match_names(source.names, conditions.names)
    check_matched(source.names, found, extra, "--cond-source")
    numbers = {name: number for number, name in enumerate(conditions.names)}
    return [numbers[name] for name in found]


def _opener(path: Path) -> Callable[[Path], contextlib.AbstractContextManager[Source]] | None:
    name = os.path.basename(os.path.abspath(path)).lower()
    if path.is_dir():
        return _open_lmdb if name.endswith("_lmdb") else _open_folder
    if name.endswith((".tar.gz", ".tgz")):
        return _open_cifar10
    if path.name.endswith(archives.MNIST_IMAGES):
        return _open_mnist
    if is_array(name):
        return _open_array
    return _open_zip if name.endswith(".zip") else None


@contextlib.contextmanager
def _open_folder(path: Path) -> Iterator[Source]:
    def refuse(error):
        raise error

    names, links, others = [], [], 0
    for folder, subfolders, files in os.walk(path, onerror=refuse):
        inside = os.path.relpath(folder, path)
        prefix = "" if inside == os.curdir else inside.replace(os.sep, "/") + "/"
        links += [prefix + name for name in subfolders if os.path.islink(f"{folder}/{name}")]
        images = [prefix + name for name in files if is_image(name)]
        others += len(files) - len(images)
        names += images
    names, conditions = split_conditions(names)
    # By path component: "a/x" before "a-1/x". No name has a zero byte.
    names.sort(key=lambda name: name.replace("/", "\0"))
    source = Source(len(names), names,
                    lambda numbers: (Item(names[i], path / names[i]) for i in numbers),
                    num_others=others, num_conditions=len(conditions), links=sorted(links))
    labels_path = path / LABELS_NAME
    if labels_path.exists():
        source.num_others -= 1
        source.labels = _json_labels(names, Item(LABELS_NAME, labels_path).content(), path)
    if source.labels is None:
        source.labels, source.class_names = _folder_labels(names)
    yield source


def _folder_labels(names: list[str]) -> tuple[Callable[[int], list[int]] | None,
                                              list[str] | None]:
    """Returns the labels of the folders at the top and their names; None for fewer than two."""
    def top(name):
        folder, slash, _ = name.partition("/")
        return folder if slash else ""

    class_names = sorted(set(map(top, names)))
    if len(class_names) < 2:
        return None, None
    numbers = {name: i for i, name in enumerate(class_names)}
    return lambda num: [numbers[top(name)] for name in itertools.islice(names, num)], \
        [name or "top folder" for name in class_names]


def _json_labels(names: list[str], text: bytes, path: Path) -> Callable[[int], list[Any]] | None:
    """Returns what looks up labels in a dataset.json; None where it holds none."""
    where = f"{path}: {LABELS_NAME}"
    labels = parse_labels(text, where)
    if labels is None:
        return None

    def look_up(num):
        label_array(names[:num], labels, where)
        return [labels[name] for name in itertools.islice(names, num)]
    return look_up


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[Source]:
    def read(name):
        try:
            check_file_size(archive.getinfo(name).file_size)
            return archive.read(name)
        except DAMAGE as error:
            raise ValueError(f"{path}: {name} can't be read: {error}") from error

    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"--source={path}: not a ZIP, or a damaged one ({error})") from error
    with archive:
        files = [info.filename for info in archive.infolist() if not info.is_dir()]
        _check_members(path, archive)
        names, conditions = split_conditions(files)
        source = Source(len(names), names,
                        lambda numbers: (Item(names[i], read(names[i])) for i in numbers),
                        num_others=len(files) - len(names) - len(conditions),
                        num_conditions=len(conditions))
        if LABELS_NAME in files:
            source.num_others -= 1
            source.labels = _json_labels(names, read(LABELS_NAME), path)
        yield source


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises ValueError for names that lead elsewhere or occur twice, and for links."""
    for info in archive.infolist():
        if problem := member_problem(info):
            raise ValueError(f"{path}: {info.filename} {problem}")
    if len(archive.NameToInfo) != len(archive.infolist()):
        counts = collections.Counter(info.filename for info in archive.infolist())
        [(name, count)] = counts.most_common(1)
        raise ValueError(f"{path}: {name} is there {count} times")


@contextlib.contextmanager
def _open_array(path: Path) -> Iterator[Source]:
    with error_prefix(f"{path}: "):
        stack = array_files.open_stack(path)
    names = [f"image {i}" for i in range(len(stack))]
    yield Source(len(stack), names, lambda numbers: (
        Item(names[i], array_files.encode(stack[i])) for i in numbers))


def _of_arrays(arrays: archives.Arrays, name: str, expected: int) -> Source:
    """Returns a source of images in memory."""
    num = len(arrays.images)
    note = "" if num == expected else f"{name} has {expected} training images, this file {num}"
    names = [f"image {i}" for i in range(num)]
    return Source(num, names, lambda numbers: (Item(names[i], arrays.images[i]) for i in numbers),
                  lambda num: arrays.labels[:num].tolist(), arrays.class_names, note=note)


@contextlib.contextmanager
def _open_cifar10(path: Path) -> Iterator[Source]:
    yield _of_arrays(archives.read_cifar10(path), "CIFAR-10", archives.CIFAR10_SIZE)


@contextlib.contextmanager
def _open_mnist(path: Path) -> Iterator[Source]:
    yield _of_arrays(archives.read_mnist(path), "MNIST", archives.MNIST_SIZE)


@contextlib.contextmanager
def _open_lmdb(path: Path) -> Iterator[Source]:
    with archives.open_lmdb(path) as (num, items):
        # Without labels nothing is left out before --max-images: the numbers are 0, 1, 2, ...
        yield Source(num, None, lambda numbers: (
            Item(f"{path.name}: {key}", value)
            for _, (key, value) in zip(numbers, items, strict=False)))
