"""A data set looked at as a whole: what is wrong with it, the statistics of its pixels, a picture.

Every image is decoded once, by several processes, and nothing of it is kept but mode, size and the
histogram of its pixels. Sums of histograms are exact, so the statistics don't depend on the order.
"""

import collections
import dataclasses
import io
import itertools
import json
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from tqdm import tqdm

from torch_utils.ordered_pool import ordered_map
from training.grid import image_grid, square_grid
from training.image_files import (
    DAMAGE,
    LABELS_NAME,
    Folder,
    check_file_size,
    is_image,
    label_array,
    label_problem,
    name_problem,
    open_files,
    parse_labels,
    shown_label,
)
from training.sources import Item

MAX_PROBLEMS = 50  # that are listed
_LEVELS = 256
_MAX_ROWS, _COLUMNS, _SQUARE = 16, 8, 64  # images in the picture, with classes and without
_MAX_SIDE = 128  # pixels; larger images are shown smaller

Kind = tuple[str, int, int]  # Pillow's mode, width, height


class Inspected(NamedTuple):
    """One image: what is wrong with it, or else its kind and histogram [bands * 256]."""

    name: str
    problem: str | None
    kind: Kind | None = None
    histogram: np.ndarray | None = None


@dataclasses.dataclass
class Report:
    """What is in a data set, and what is wrong with it; of the problems the first are kept."""

    num_images: int
    kind: Kind | None = None  # of most images
    label_dim: int | None = None  # length of label vectors; None for class numbers
    classes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    problems: list[str] = dataclasses.field(default_factory=list)
    num_problems: int = 0


class _DataSet:
    """The images of a folder or ZIP in the reader's order, and the text of the labels."""

    def __init__(self, path: Path):
        self.path = path
        self.files = open_files(path)
        self.names = sorted(filter(is_image, self.files.names))
        if not self.names:
            raise ValueError(f"{path}: no images found")

    def item(self, name: str) -> Item:
        """Returns a file, or its content out of a ZIP, which is read in one place.

        Raises:
            ValueError: it can't be read; without its name.
        """
        if isinstance(self.files, Folder):
            return Item(name, self.path / name)
        try:
            check_file_size(self.files.size(name))
            with self.files.open(name) as file:
                return Item(name, file.read())
        except DAMAGE as error:
            raise ValueError(f"can't be read: {error}") from error

    def labels(self) -> dict[str, Any] | None:
        """Returns the labels by name.

        Raises:
            ValueError: dataset.json can't be read or is malformed.
        """
        if LABELS_NAME not in self.files.names:
            return None
        try:
            content = self.item(LABELS_NAME).content()
        except ValueError as error:
            raise ValueError(f"{LABELS_NAME}: {error}") from error
        return parse_labels(content, LABELS_NAME)


def _inspect_all(data: _DataSet, workers: int) -> Iterator[Inspected]:
    """Yields what became of every image, in order."""
    results = ordered_map(_inspect, _items(data), min(workers, len(data.names)))
    return iter(tqdm(results, total=len(data.names), unit="img", disable=None, leave=False))


def _items(data: _DataSet) -> Iterator[Item | Inspected]:
    for name in data.names:
        try:
            yield data.item(name)
        except ValueError as error:
            yield Inspected(name, str(error))


def _inspect(item: Item | Inspected) -> Inspected:
    """Returns what is in an image; what is known to be unreadable stays so."""
    if isinstance(item, Inspected):
        return item
    try:
        image = _decode(item.content())
    except ValueError as error:
        return Inspected(item.name, str(error).removeprefix(f"{item.name}: "))
    histogram = np.array(image.histogram(), np.uint32)
    return Inspected(item.name, None, (image.mode, *image.size), histogram)


def _decode(content: bytes) -> PIL.Image.Image:
    """Returns the image with its pixels; raises ValueError if it is damaged or too large."""
    bombs = (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(io.BytesIO(content))
            if image.format == "EPS":  # Pillow would start Ghostscript
                raise ValueError("PostScript isn't supported")
            image.verify()  # the checksums of PNG, some of which decoding passes over
            image = PIL.Image.open(io.BytesIO(content))
            image.load()
    except bombs as error:
        raise ValueError(f"more pixels than the {PIL.Image.MAX_IMAGE_PIXELS} allowed") from error
    except DAMAGE as error:
        problem = "not an image" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise ValueError(f"can't be read: {problem}") from error
    return image


# ------------------------------------------------------------------------------------- check


class _Problems:
    """The first problems of one sort, by the number of their image, and how many there are."""

    def __init__(self) -> None:
        self.count, self.first = 0, []

    def add(self, number: int, text: str) -> None:
        self.count += 1
        if self.count <= MAX_PROBLEMS:
            self.first.append((number, text))


def check_dataset(path: Path, workers: int) -> Report:
    """Returns what is in a data set and what is wrong with it, image by image.

    Raises:
        OSError: there is none, or it can't be read.
        ValueError: it can't be opened as one, or has no images.
    """
    data = _DataSet(path)
    report = Report(len(data.names))
    unreadable, kinds = _Problems(), collections.defaultdict(_Problems)
    for i, inspected in enumerate(_inspect_all(data, workers)):
        if inspected.problem:
            unreadable.add(i, inspected.problem)
        else:
            kinds[inspected.kind].add(i, "")
    report.kind = max(filter(_is_usable, kinds), key=lambda kind: kinds[kind].count, default=None)
    found = [unreadable, _check_names(data), _check_labels(data, report)]
    found += [_unlike(kind, problems, report.kind) for kind, problems in kinds.items()
              if kind != report.kind]
    report.num_problems = sum(problems.count for problems in found)
    first = sorted(itertools.chain.from_iterable(problems.first for problems in found))
    report.problems = [f"{data.names[i]} (image {i}): {text}" if i < len(data.names) else text
                       for i, text in first[:MAX_PROBLEMS]]
    return report


def _is_usable(kind: Kind) -> bool:
    mode, width, height = kind
    return mode in ("L", "RGB") and width == height


def _unlike(kind: Kind, problems: _Problems, usual: Kind | None) -> _Problems:
    """Returns the images of this kind with what is wrong with them."""
    text = "is {} {}x{}".format(*kind) + (
        ", but most are {} {}x{}".format(*usual) if _is_usable(kind) else
        "; images must be square, gray (L) or RGB: convert them with dataset_tool.py")
    problems.first = [(i, text) for i, _ in problems.first]
    return problems


def _check_names(data: _DataSet) -> _Problems:
    problems = _Problems()
    for i, name in enumerate(data.names):
        problem = name_problem(name)
        if not isinstance(data.files, Folder) and stat.S_ISLNK(data.files.mode(name)):
            problem = "is a symbolic link"
        if problem:
            problems.add(i, problem)
    return problems


def _check_labels(data: _DataSet, report: Report) -> _Problems:
    """Returns what is wrong with the labels, and puts the classes into the report."""
    problems, last = _Problems(), len(data.names)  # what belongs to no image comes last
    try:
        labels = data.labels()
    except ValueError as error:
        problems.add(last, str(error))
        return problems
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
    for name in labels:  # what is left
        problems.add(last, f"{LABELS_NAME}: {json.dumps(name)[:80]} has a label, but isn't there")
    return problems


def _usual_label(labels: Iterable[Any]) -> Any:
    """Returns a label to compare the others with: one of the form that most have."""
    counts, examples = collections.Counter(), {}
    for label in labels:
        if label_problem(label, label) is None:
            form = len(label) if isinstance(label, list) else None
            counts[form] += 1
            examples.setdefault(form, label)
    return examples[counts.most_common(1)[0][0]] if counts else None


# -------------------------------------------------------------------------------------- show


def pixel_statistics(path: Path, workers: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns mean [C], standard deviation [C] and that of all channels together, of x/127.5 - 1.

    Raises:
        OSError, ValueError: it isn't a data set, or an image is damaged or unlike the first.
    """
    data, first, total = _DataSet(path), None, 0
    for i, inspected in enumerate(_inspect_all(data, workers)):
        where = f"{path}: {inspected.name} (image {i})"
        if inspected.problem:
            raise ValueError(f"{where}: {inspected.problem}; dataset_tool.py check lists all")
        first = first or inspected.kind
        if inspected.kind != first or not _is_usable(first):
            raise ValueError("{} is {} {}x{}; all images must be square, gray or RGB, and of one "
                             "size: dataset_tool.py check lists all".format(where, *inspected.kind))
        total = total + inspected.histogram.astype(np.int64)
    histograms = total.reshape(-1, _LEVELS)
    means, stds = zip(*map(_moments, histograms), strict=True)
    return np.array(means), np.array(stds), _moments(histograms.sum(axis=0))[1]


def _moments(histogram: np.ndarray) -> tuple[float, float]:
    """Returns mean and standard deviation of values given by how often each level occurs."""
    values = np.arange(_LEVELS) / 127.5 - 1
    mean = np.average(values, weights=histogram)
    return float(mean), float(np.sqrt(np.average((values - mean) ** 2, weights=histogram)))


def sample_grid(path: Path) -> tuple[PIL.Image.Image, str]:
    """Returns a picture of some images, a class a row where there are classes, and what it shows.

    Raises:
        OSError, ValueError: it isn't a data set, or its labels are invalid.
    """
    data = _DataSet(path)
    labels = data.labels()
    classes = None if labels is None else label_array(data.names, labels, f"{path}: {LABELS_NAME}")
    if classes is None or classes.ndim == 2:
        numbers = _spread(np.arange(len(data.names)), _SQUARE)
        return square_grid(np.stack([_small_pixels(data, i) for i in numbers])), \
            f"{len(numbers)} of {len(data.names)} images"
    present = np.unique(classes)
    rows = _spread(present, _MAX_ROWS)
    members = [_spread(np.flatnonzero(classes == row), _COLUMNS) for row in rows]
    picture = image_grid([[_small_pixels(data, i) for i in row] for row in members],
                         [str(row) for row in rows])
    return picture, f"{len(rows)} of {len(present)} classes, up to {_COLUMNS} images each"


def _spread(values: np.ndarray, num: int) -> np.ndarray:
    """Returns `num` of the values at equal distances, all if there are fewer."""
    return values[np.arange(num) * len(values) // num] if len(values) > num else values


def _small_pixels(data: _DataSet, number: int) -> np.ndarray:
    """Returns an image as uint8 [C, H, W], reduced if it is large."""
    image = _decode(data.item(data.names[number]).content())
    if image.width > _MAX_SIDE:
        image = image.resize((_MAX_SIDE, _MAX_SIDE), PIL.Image.Resampling.LANCZOS)
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def show_path(data: Path, out: str | None) -> Path:
    """Returns where the picture goes: beside the data set unless `out` says where.

    Raises:
        ValueError: inside the data set, of which it would become an image.
    """
    absolute = Path(os.path.abspath(data))
    name = absolute.name if data.is_dir() else absolute.stem
    path = Path(out) if out else absolute.with_name(f"{name}-show.png")
    if data.is_dir() and path.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--out={path}: lies inside the data set; give a path outside of it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
