"""MNIST and data sets of its format, such as Fashion-MNIST and EMNIST: pairs of IDX files.

One file holds the images [n, 28, 28], and another beside it their class numbers [n]. Both may be
compressed with gzip. EMNIST stores images with rows and columns exchanged, and they are turned
upright here. The names of its classes are in a file emnist-SPLIT-mapping.txt.
"""

import gzip
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from images.archives import Arrays, check_labels, described
from images.image_files import error_prefix, read_regular

_NAME = re.compile(r"(?P<of>(?:.*-)?)images(?P<dot>[-.])idx3-ubyte(?P<gz>(?:\.gz)?)")
_EMNIST = re.compile(r"emnist-(?P<split>\w+)-(?:train|test)-")
_EMNIST_CLASSES = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26}  # others: 10
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
            "Bag", "Ankle boot")
_RAW = "raw"  # torchvision's subfolder within that of the data set
_NUM_CLASSES = 10
_SIZES = {"train-": 60_000, "t10k-": 10_000}  # images of MNIST, by the prefix of its files
_SIDE, _PADDING = 28, 2
_MAX_BYTES = 768 << 20  # EMNIST's largest file has 547 MB
_GZIP_MAGIC = b"\x1f\x8b"


def is_images(name: str) -> bool:
    """Whether a file with this name holds the images of a pair."""
    return _NAME.fullmatch(name.rpartition("/")[2]) is not None


def find_images(names: Iterable[str]) -> list[str]:
    """Returns the names of image files, sorted. If a file and its .gz exist, the .gz is ignored."""
    found = sorted(filter(is_images, names))
    there = set(found)
    return [name for name in found if name.removesuffix(".gz") == name
            or name.removesuffix(".gz") not in there]


def read(path: Path, *, with_labels: bool = True) -> Arrays:
    """Returns the images of a file, to be padded from 28x28 to 32x32, and their classes.

    Without labels, the file of labels need not exist.

    Raises:
        OSError: one of the files can't be read, or the file of labels does not exist.
        ValueError: a file is damaged or not an IDX file.
    """
    parts = _NAME.fullmatch(path.name)
    emnist = _EMNIST.fullmatch(parts["of"])
    names = _class_names(path, emnist and emnist["split"]) if with_labels else None
    first = 1 if emnist and emnist["split"] == "letters" else 0
    num_classes = len(names or ()) or _EMNIST_CLASSES.get(emnist and emnist["split"], _NUM_CLASSES)
    with described(path):
        images = _read_idx(path, 3)
        if images.shape[1:] != (_SIDE, _SIDE):
            raise ValueError("has images of {1}x{0}; must be 28x28".format(*images.shape[1:]))
    labels, facts = None, []
    if with_labels:
        labels_path = _find_labels(path, parts)
        with described(labels_path):
            labels = _read_idx(labels_path, 1).astype(np.int64)
            check_labels(labels, len(images), range(first, first + num_classes))
            labels -= first
    title = "Fashion-MNIST" if names else "MNIST"
    if emnist:
        title, images = "EMNIST", images.swapaxes(1, 2)
        facts.append("EMNIST's files hold images with rows and columns exchanged; they were "
                     "turned upright")
    if first and with_labels:
        facts.append(f"classes {first} to {num_classes} of the files became 0 to "
                     f"{num_classes - 1}")
    return Arrays(images, labels, names, title,
                  None if emnist else _SIZES.get(parts["of"]), tuple(facts), _PADDING)


def _find_labels(path: Path, parts: re.Match[str]) -> Path:
    """Returns the file of labels beside a file of images. Either may be compressed."""
    places = [path.with_name(f"{parts['of']}labels{dot}idx1-ubyte{gz}")
              for dot in sorted("-.", key=parts["dot"].__ne__)
              for gz in sorted(("", ".gz"), key=parts["gz"].__ne__)]
    found = next(filter(Path.exists, places), None)
    if found is None:
        raise FileNotFoundError(f"{places[0]}: no such file; put the labels beside {path.name}, or "
                                "give --label-column=none to convert without labels")
    return found


def _class_names(path: Path, split: str | None) -> list[str] | None:
    """Returns the names of classes, from the mapping of a split of EMNIST or of Fashion-MNIST.

    The files of Fashion-MNIST are named like MNIST's. Only their folder tells them apart.
    """
    if split is None:
        folder = Path(os.path.abspath(path)).parent
        folder = folder.parent if folder.name == _RAW else folder
        is_fashion = "fashion" in f"{folder.name}/{path.name}".lower()
        return list(_FASHION) if is_fashion else None
    mapping = path.with_name(f"emnist-{split}-mapping.txt")
    if not mapping.exists():
        return None
    with error_prefix(f"{mapping}: "):
        rows = [list(map(int, line.split())) for line in
                read_regular(mapping).decode("ascii", "replace").splitlines() if line.strip()]
        first = rows[0][0] if rows and rows[0] else 0
        for number, row in enumerate(rows, first):  # a class number and the codes of its letters
            if len(row) < 2 or row[0] != number or not all(32 < code < 127 for code in row[1:]):
                raise ValueError(f"line {number - first + 1} must be a class number, one above the "
                                 "previous, and codes of letters")
    return ["".join(map(chr, row[1:])) for row in rows] or None


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Returns the uint8 array of an IDX file."""
    with _open(path) as file:
        header = np.frombuffer(file.read(4 + 4 * num_dims), ">u4").tolist()
        if len(header) != 1 + num_dims or header[0] != 0x800 + num_dims:
            raise ValueError(f"is not an IDX file of bytes with {num_dims} dimensions")
        shape = header[1:]
        size = math.prod(shape)
        if size > _MAX_BYTES:
            raise ValueError(f"unpacks to more than the {_MAX_BYTES} bytes allowed")
        data = file.read(size + 1)  # one more: gzip compares its checksum at the end
        if len(data) != size:
            raise ValueError(f"has {'more' if len(data) > size else 'fewer'} than the {size} bytes "
                             f"that its header states")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _open(path: Path) -> IO[bytes]:
    """Opens a file, and decompresses it if it is compressed, whatever its name."""
    with open(path, "rb") as file:
        is_packed = file.read(2) == _GZIP_MAGIC
    return gzip.open(path) if is_packed else open(path, "rb")
