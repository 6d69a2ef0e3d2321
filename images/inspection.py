"""Inspects a whole data set: finds problems, measures pixel statistics, and draws a picture.

Several processes decode each image once and keep only its format and the moments of its channels.
These are merged in the order of the images, so the statistics do not depend on the number of
processes.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from dnnlib.ordered_pool import ordered_map
from dnnlib.progress import Progress
from images import array_files, pictures
from images.grid import class_label, image_grid, reduced, square_grid
from images.image_files import (
    CONDITIONS,
    DAMAGE,
    LABELS_NAME,
    Folder,
    ImageFormat,
    Zip,
    check_file_size,
    error_prefix,
    is_array,
    label_array,
    label_problem,
    match_names,
    member_problem,
    name_problem,
    parse_class_names,
    parse_json,
    parse_labels,
    shown_label,
    sort_names,
)
from images.npz_files import open_files
from images.scaling import Moments, Scaling, display_window, recorded_scaling
from images.sources import Item

MAX_PROBLEMS = 50  # problems to list
_MAX_ROWS, _COLUMNS, _SQUARE = 16, 8, 64  # size of the picture, with classes and without
_PAIRS = 32  # images in a picture with condition images
_MAX_SIDE = 128  # pixels; larger images are shrunk


class Inspected(NamedTuple):
    """The result for one image: a problem, or its format and the moments of its channels."""

    name: str
    problem: str | None
    format: ImageFormat | None = None
    moments: Moments | None = None


@dataclasses.dataclass
class Report:
    """The contents of a data set and its problems, of which only the first are kept."""

    num_images: int
    format: ImageFormat | None = None  # of most images
    cond_format: ImageFormat | None = None  # of most condition images; None if there are none
    label_dim: int | None = None  # length of label vectors; None for class numbers
    classes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    class_names: list[str] | None = None
    problems: list[str] = dataclasses.field(default_factory=list)
    num_problems: int = 0


class DataSet:
    """The images and conditions of a folder, ZIP or .npz in reading order, and the labels.

    Raises:
        OSError: the data set does not exist or can't be read.
        ValueError: it is not a ZIP, or has no images.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files = open_files(path)
        self.class_names: list[str] | None = None  # set by `labels`
        self.names, self.cond_names, *_ = sort_names(self.files.names)
        if not self.names:
            raise ValueError(f"{path}: no images found")

    def name_problem(self, name: str) -> str | None:
        """Returns what is wrong with the name or type of a file, or None if it is fine."""
        if isinstance(self.files, Zip):
            return member_problem(self.files.info(name))
        return name_problem(name)

    def item(self, name: str) -> Item:
        """Returns a file, or its content if only the main process can read it (ZIP, .npz).

        Raises ValueError, without the name, if it can't be read.
        """
        if isinstance(self.files, Folder):
            return Item(name, self.path / name)
        try:
            if isinstance(self.files, Zip):
                check_file_size(self.files.info(name).file_size)
            with self.files.open(name) as file:
                return Item(name, file.read())
        except DAMAGE as error:
            raise ValueError(f"can't be read: {error}") from error

    @functools.cache  # noqa: B019 - a process has one of these, for as long as it runs
    def scaling(self, image_format: ImageFormat, key: str) -> Scaling:
        """Returns the scaling of images of this format, see `recorded_scaling`."""
        return recorded_scaling(self.files, image_format, key, self.path)

    def limits(self, key: str) -> tuple[float, float] | None:
        """Returns the limits of values in dataset.json, or None if there are none.

        Raises ValueError, without the file's name, for anything but two rising numbers.
        """
        if LABELS_NAME not in self.files.names:
            return None
        record = parse_json(self.item(LABELS_NAME).content(), LABELS_NAME)
        limits = record.get(key) if isinstance(record, dict) else None
        if limits is None:
            return None
        if not (isinstance(limits, list) and len(limits) == 2
                and all(type(limit) in (int, float) for limit in limits)
                and limits[0] < limits[1]):
            raise ValueError(f'"{key}" must be two rising numbers')
        return tuple(limits)

    def labels(self) -> dict[str, Any] | None:
        """Returns the labels by name. Raises ValueError if dataset.json is damaged or malformed."""
        if LABELS_NAME not in self.files.names:
            return None
        with error_prefix(f"{LABELS_NAME}: "):
            content = self.item(LABELS_NAME).content()
        self.class_names = parse_class_names(content, LABELS_NAME)
        return parse_labels(content, LABELS_NAME)


def _inspect_all(data: DataSet, names: Sequence[str], workers: int) -> Iterator[Inspected]:
    """Yields the result for each image of these names, in order."""
    results = ordered_map(_inspect, _items(data, names), min(workers, len(names)))
    with Progress(len(names), "Inspecting") as progress:
        yield from progress.over(results)


def _items(data: DataSet, names: Sequence[str]) -> Iterator[Item | Inspected]:
    for name in names:
        try:
            yield data.item(name)
        except ValueError as error:
            yield Inspected(name, str(error))


def _inspect(item: Item | Inspected) -> Inspected:
    """Returns the result for an image. Images known to be unreadable are passed on."""
    if isinstance(item, Inspected):
        return item
    try:
        values, image_format = _decode(item)
    except ValueError as error:
        return Inspected(item.name, str(error).removeprefix(f"{item.name}: "))
    moments = Moments.of(values) if image_format.channels else None
    return Inspected(item.name, None, image_format, moments)


def _decode(item: Item) -> tuple[np.ndarray, ImageFormat]:
    """Returns an image as [C, H, W] and its format. Raises ValueError if it is damaged."""
    if is_array(item.name):
        return array_files.decode(item.content())
    return pictures.decode(item.content(), verify=True)


class _Problems:
    """The first problems of one kind, by image number, and the number of all."""

    def __init__(self) -> None:
        self.count, self.first = 0, []

    def add(self, number: int, text: str) -> None:
        self.count += 1
        if self.count <= MAX_PROBLEMS:
            self.first.append((number, text))


def check_dataset(path: Path, workers: int) -> Report:
    """Returns the contents of a data set and its problems, image by image.

    Raises:
        OSError: the data set does not exist or can't be read.
        ValueError: it can't be opened as a data set, or has no images.
    """
    data = DataSet(path)
    report = Report(len(data.names))
    report.format, found = _check_images(data, data.names, "clip", workers)
    found += [_check_names(data, data.names), _check_labels(data, report)]
    lists = [(data.names, found)]
    if data.cond_names:
        report.cond_format, found = _check_images(data, data.cond_names, "cond_clip", workers)
        found += [_check_names(data, data.cond_names), *_check_conditions(data, report)]
        lists.append((data.cond_names, found))
    if report.format:
        found.append(_check_scales(data, report))
    report.num_problems = sum(problems.count for _, found in lists for problems in found)
    for names, found in lists:
        first = sorted(itertools.chain.from_iterable(problems.first for problems in found))
        report.problems += [f"{names[i]} (image {i}): {text}" if i < len(names) else text
                            for i, text in first]
    report.problems = report.problems[:MAX_PROBLEMS]
    return report


def _check_images(data: DataSet, names: Sequence[str], key: str,
                  workers: int) -> tuple[ImageFormat | None, list[_Problems]]:
    """Returns the most common format of these images, and the problems of the others.

    `key` names the limits of their values in dataset.json.
    """
    unreadable, formats = _Problems(), collections.defaultdict(_Problems)
    beyond, limits = _Problems(), None
    with contextlib.suppress(*DAMAGE):  # reported with the labels or the scales
        limits = data.limits(key)
    for i, inspected in enumerate(_inspect_all(data, names, workers)):
        if inspected.problem:
            unreadable.add(i, inspected.problem)
            continue
        formats[inspected.format].add(i, "")
        if limits and inspected.moments:
            low, high = inspected.moments.low.min(), inspected.moments.high.max()
            if not np.float32(limits[0]) <= low <= high <= np.float32(limits[1]):  # as stored
                beyond.add(i, f'has values from {low:g} to {high:g}, but "{key}" in {LABELS_NAME} '
                              "is {:g} to {:g}".format(*limits))
    usual = max((one for one in formats if one.channels), key=lambda one: formats[one].count,
                default=None)
    others = f"but most are {usual}"
    if usual and 2 * formats[usual].count <= len(names):
        others = f"others {usual}; dataset_tool.py --resolution with --transform makes all alike"
    unlike = {one: problems for one, problems in formats.items() if one != usual}
    for one, problems in unlike.items():
        text = f"is {one}, {others}" if one.channels else (
            f"is {one}; images must be gray (L) or RGB, or arrays (.npy): convert them with "
            "dataset_tool.py")
        problems.first = [(i, text) for i, _ in problems.first]
    return usual, [unreadable, *unlike.values(), beyond]


def _check_conditions(data: DataSet, report: Report) -> list[_Problems]:
    """Returns the problems in matching images and condition images."""
    missing, extra, size = _Problems(), _Problems(), _Problems()
    last = len(data.cond_names)  # problems of no condition image come last
    found, others = match_names([CONDITIONS + name for name in data.names], data.cond_names)
    for name, condition in zip(data.names, found, strict=True):
        if condition is None:
            missing.add(last, f"{name}: has no condition image in {CONDITIONS}")
    numbers = {name: i for i, name in enumerate(data.cond_names)}
    for name in others:
        extra.add(numbers[name], "belongs to no image")
    formats = report.format, report.cond_format
    if all(formats) and formats[0].shape[1:] != formats[1].shape[1:]:
        size.add(last, f"condition images are {formats[1]}, but images are {formats[0]}")
    return [missing, extra, size]


def _check_scales(data: DataSet, report: Report) -> _Problems:
    """Returns the problems of the scalings and the limits of values in dataset.json."""
    problems = _Problems()
    for image_format, key, limits_key in ((report.format, "scale", "clip"),
                                          (report.cond_format, "cond_scale", "cond_clip")):
        try:
            _ = image_format and data.scaling(image_format, key)
            with error_prefix(f"{LABELS_NAME}: "):
                data.limits(limits_key)
        except ValueError as error:
            # A file that is not JSON is reported with the labels.
            if f'"{key}"' in str(error) or f'"{limits_key}"' in str(error):
                problems.add(len(data.files.names), str(error))
    return problems


def _check_names(data: DataSet, names: Sequence[str]) -> _Problems:
    problems = _Problems()
    for i, name in enumerate(names):
        if problem := data.name_problem(name):
            problems.add(i, problem)
    return problems


def _check_labels(data: DataSet, report: Report) -> _Problems:
    """Returns the problems of the labels, and adds the classes to the report."""
    problems, last = _Problems(), len(data.names)  # problems of no image come last
    try:
        labels = data.labels()
    except ValueError as error:
        problems.add(last, str(error))
        return problems
    report.class_names = data.class_names
    if labels is None:
        return problems
    usual = _usual_label(map(labels.get, data.names))
    for i, name in enumerate(data.names):
        label = labels.pop(name, None)
        if label is None:
            problems.add(i, f"has no label in {LABELS_NAME}")
        elif problem := label_problem(label, usual):
            problems.add(i, f"label {shown_label(label)} {problem}")
        elif isinstance(label, int):
            report.classes[label] += 1
        else:
            report.label_dim = len(label)
    for name in labels:  # those left over
        problems.add(last, f"{LABELS_NAME}: {json.dumps(name)[:80]} has a label but no file")
    return problems


def _usual_label(labels: Iterable[Any]) -> Any:
    """Returns a label to compare others with, in the form that most labels have."""
    counts, examples = collections.Counter(), {}
    for label in labels:
        if label_problem(label, label) is None:
            form = len(label) if isinstance(label, list) else None
            counts[form] += 1
            examples.setdefault(form, label)
    return examples[counts.most_common(1)[0][0]] if counts else None


def pixel_statistics(path: Path, workers: int) -> tuple[Moments, Scaling]:
    """Returns the moments of all images, in the data's units, and their scaling.

    Raises:
        OSError: the data set can't be read.
        ValueError: it is not a data set, or an image is damaged or differs from the first.
    """
    data, first, total = DataSet(path), None, None
    for i, inspected in enumerate(_inspect_all(data, data.names, workers)):
        where = f"{path}: {inspected.name} (image {i})"
        if inspected.problem:
            raise ValueError(f"{where}: {inspected.problem}; list all with dataset_tool.py check")
        first = first or inspected.format
        if inspected.format != first or not first.channels:
            raise ValueError(f"{where} is {inspected.format}; all images must be gray, RGB or "
                             "arrays of one type and size; list all with dataset_tool.py check")
        total = total.merge(inspected.moments) if total else inspected.moments
    return total, data.scaling(first, "scale")


def sample_grid(path: Path,
                window: tuple[float, float] | None = None) -> tuple[PIL.Image.Image, str]:
    """Returns a picture of some images, with a row per class if there are classes, and its caption.

    `window` is the center and width of the values shown from black to white, in the data's units,
    if they are not 8-bit. None shows -1 to 1 in the network's scale.

    Raises:
        OSError: the data set can't be read.
        ValueError: it is not a data set, or its labels are invalid.
    """
    data = DataSet(path)
    show = functools.partial(_small_pixels, data, window=window)
    if data.cond_names:
        return _pair_grid(data, show)
    labels = data.labels()
    classes = None if labels is None else label_array(data.names, labels, f"{path}: {LABELS_NAME}")
    if classes is None or classes.ndim == 2:
        numbers = _spread(np.arange(len(data.names)), _SQUARE)
        return square_grid(np.stack([show(data.names[i]) for i in numbers])), \
            f"{len(numbers)} of {len(data.names)} images"
    present = np.unique(classes)
    rows = _spread(present, _MAX_ROWS)
    members = [_spread(np.flatnonzero(classes == row), _COLUMNS) for row in rows]
    picture = image_grid([[show(data.names[i]) for i in row] for row in members],
                         [class_label(row, data.class_names) for row in rows])
    return picture, f"{len(rows)} of {len(present)} classes, up to {_COLUMNS} images each"


def _spread(values: np.ndarray, num: int) -> np.ndarray:
    """Returns `num` evenly spaced values, or all if there are fewer."""
    return values[np.arange(num) * len(values) // num] if len(values) > num else values


def _pair_grid(data: DataSet,
               show: Callable[[str], np.ndarray]) -> tuple[PIL.Image.Image, str]:
    """Returns a picture with rows of condition images, each above the row of their images."""
    found, _ = match_names([CONDITIONS + name for name in data.names], data.cond_names)
    paired = np.array([i for i, name in enumerate(found) if name], int)
    if not len(paired):
        raise ValueError(f"{data.path}: no condition image has the same name as an image")
    numbers = _spread(paired, _PAIRS)
    rows, labels = [], []
    for start in range(0, len(numbers), _COLUMNS):
        some = numbers[start:start + _COLUMNS]
        rows += [[show(found[i]) for i in some], [show(data.names[i]) for i in some]]
        labels += ["condition", "image"]
    return image_grid(rows, labels), f"{len(numbers)} of {len(data.names)} images, with conditions"


def _small_pixels(data: DataSet, name: str, *,
                  window: tuple[float, float] | None) -> np.ndarray:
    """Returns an image as uint8 [C, H, W], shrunk if it is large."""
    values, image_format = _decode(data.item(name))
    scaling = data.scaling(image_format, "cond_scale" if name.startswith(CONDITIONS) else "scale")
    if window and not scaling.is_8bit:
        scaling = display_window(*window)
    return reduced(scaling.to_picture(values), _MAX_SIDE)


def show_path(data: Path, out: str | None) -> Path:
    """Returns the path of the picture: `out`, or else a path beside the data set.

    Raises:
        ValueError: the path is inside the data set, so that the picture would become an image.
    """
    absolute = Path(os.path.abspath(data))
    name = absolute.name if data.is_dir() else absolute.stem
    path = Path(out) if out else absolute.with_name(f"{name}-show.png")
    if data.is_dir() and path.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--out={path}: lies inside the data set; give a path outside of it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
