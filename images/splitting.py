"""Splits a data set into two: one for training, and one that is held out.

The split depends only on the seed, the names of the images and their classes. Images are sorted by

    SHA-256("SEED NAME")

and the first ones of each class are held out, in proportion to the size of the class. If num of
total images are held out, a class gets num size / total of them, rounded down or up by largest
remainders so that the sum is num. At least one image of each class is kept for training, even if
another class then gives more than its share.

Files are copied byte for byte under their names. PyTorch is not needed.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence

from dnnlib.progress import Progress
from images.image_files import (
    CONDITIONS,
    GENERATE_RECORD,
    LABELS_NAME,
    check_matched,
    error_prefix,
    label_array,
    match_names,
    parse_class_names,
    parse_json,
    parse_labels,
    sort_names,
)
from images.inspection import DataSet


@dataclasses.dataclass
class Part:
    """The contents of one of the two data sets."""

    images: list[str]  # their names, in order
    conditions: list[str]
    records: dict[str, bytes]  # dataset.json and generate.json by name, if the source has them
    classes: collections.Counter  # images of each class; empty without classes


@dataclasses.dataclass
class Split:
    """A data set split into two parts, and the files that belong to neither."""

    train: Part
    held_out: Part
    class_names: list[str] | None
    others: list[str]  # files that do not belong to a data set
    num_hidden: int  # hidden files and system files
    num_pictures: int  # grids and movies of generate.py


def plan_split(data: DataSet, val: float, seed: int) -> Split:
    """Returns the split of a data set that a seed gives.

    `val` is the number of images to hold out if it is an int, else a share between 0 and 1.

    Raises:
        OSError: a file can't be read.
        ValueError: labels or condition images do not match the images, a name can't be kept, or
            there are too few images for two parts.
    """
    _check_names(data)
    conditions = _match_conditions(data)
    *_, num_hidden, num_pictures, others = sort_names(data.files.names)
    text = _read(data, LABELS_NAME) if LABELS_NAME in others else b"{}"
    where = f"{data.path}: {LABELS_NAME}"
    labels, class_names = parse_labels(text, where), parse_class_names(text, where)
    has_classes = labels is not None and label_array(data.names, labels, where).ndim == 1
    classes = {name: labels[name] if has_classes else None for name in data.names}
    chosen = choose_held_out(classes, _num_held_out(data, val, classes), seed)
    records = {name: _read(data, name) for name in others
               if name.rpartition("/")[2] == GENERATE_RECORD}

    def part(is_held_out):
        images = [name for name in data.names if (name in chosen) == is_held_out]
        own = dict(records)
        if LABELS_NAME in others:
            own[LABELS_NAME] = text if labels is None else _labels_of(images, text)
        return Part(images, list(dict.fromkeys(conditions[name] for name in images if conditions)),
                    own, collections.Counter(classes[name] for name in images if has_classes))

    left_over = [name for name in others if name != LABELS_NAME and name not in records]
    return Split(part(False), part(True), class_names, left_over, num_hidden, num_pictures)


def choose_held_out(classes: Mapping[str, int | None], num: int, seed: int) -> set[str]:
    """Returns the names of `num` images to hold out, given the class of each image by its name.

    Without classes, all images have the same, such as None. `num` must leave an image per class.
    """
    due = _apportion(collections.Counter(classes.values()), num)
    chosen = set()
    for name in sorted(classes, key=functools.partial(_rank, seed)):
        if due[classes[name]]:
            due[classes[name]] -= 1
            chosen.add(name)
    return chosen


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def _apportion(sizes: Mapping[int | None, int], num: int) -> dict[int | None, int]:
    """Returns the number of held-out images per class, given the sizes of the classes."""
    total = sum(sizes.values())
    assert 0 <= num <= total - len(sizes)
    due = {label: num * size // total for label, size in sizes.items()}
    left = num - sum(due.values())
    by_remainder = sorted(sizes, key=lambda label: (-(num * sizes[label] % total), label))
    for label in itertools.cycle(by_remainder):  # once, unless small classes can't give their share
        if not left:
            break
        if due[label] < sizes[label] - 1:
            due[label] += 1
            left -= 1
    return due


def _num_held_out(data: DataSet, val: float, classes: Mapping[str, int | None]) -> int:
    """Returns the number of images to hold out. A share is rounded to the nearest, halves up."""
    total, num_classes = len(classes), len(set(classes.values()))
    num = val if isinstance(val, int) else math.floor(val * total + 0.5)
    most = total - num_classes
    if not most:
        raise ValueError(f"{data.path}: can't be split: it has only one image"
                         + (" of each class" if num_classes > 1 else ""))
    if not 1 <= num <= most:
        kept = "one" if num_classes == 1 else f"one of each of the {num_classes} classes"
        raise ValueError(f"--val={val}: would hold out {num} of {total} images; give a share or a "
                         f"number that holds out 1 to {most}, as training keeps at least {kept}")
    return num


def _check_names(data: DataSet) -> None:
    """Raises ValueError for links in ZIPs and for names that leave the data set or are not text."""
    for name in (*data.names, *data.cond_names):
        if problem := data.name_problem(name):
            raise ValueError(f"{data.path}: {name} {problem}")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{data.path}: the name {ascii(name)} is not UTF-8; rename the "
                             "file") from error


def _match_conditions(data: DataSet) -> dict[str, str]:
    """Returns the condition image of each image by name, or {} if there are none."""
    if not data.cond_names:
        return {}
    found, extra = match_names([CONDITIONS + name for name in data.names], data.cond_names)
    check_matched(data.names, found, extra, str(data.path))
    return dict(zip(data.names, found, strict=True))


def _labels_of(images: Sequence[str], text: bytes) -> bytes:
    """Returns a dataset.json with only the labels of these images. All other content is kept."""
    record, there = parse_json(text, LABELS_NAME), set(images)
    record["labels"] = [entry for entry in record["labels"] if entry[0] in there]
    return json.dumps(record).encode()


def _read(data: DataSet, name: str) -> bytes:
    with error_prefix(f"{data.path}: {name}: "):
        return data.item(name).content()


def write_split(data: DataSet, split: Split, write_train: Callable[[str, bytes], None],
                write_held_out: Callable[[str, bytes], None]) -> None:
    """Copies the images and conditions of both parts, then writes the records.

    Raises:
        OSError: a file can't be written.
        ValueError: an image can't be read.
    """
    total = len(data.names) + len(data.cond_names)
    with Progress(total, "Splitting") as progress:
        for part, write in ((split.train, write_train), (split.held_out, write_held_out)):
            for name in progress.over([*part.images, *part.conditions]):
                write(name, _read(data, name))
            for name, text in part.records.items():
                write(name, text)
