"""Pairs of images and their truths: which belong together, and their scores.

Pairs are found by name, without the extension and, if that is unique, without the folder; or by
order. If generate.json in the images' folder says that generate.py named them by their seeds, seed
k belongs to truth k mod n of n, as with --init-image and --cond-image.

Values are compared in the units of the data, as they are stored. The measurement from which an
image was made can be scored beside it; it is called the input.
"""

import math
import os
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from dnnlib.cli import flag_errors
from dnnlib.progress import Progress
from images.dataset import ImageFolderDataset
from images.image_files import composed, error_prefix
from images.pairing import numbers_of, words_of
from images.scaling import Scaling, default_scaling
from metrics.paired import PairedMetric, as_number
from sampling.folders import image_name, seed_of
from sampling.seed_images import CONDITIONS_WORD

PAIRINGS = ("auto", "name", "order")
_REMEDY = "give a folder or ZIP of images"
_NUMBERED = re.compile(r"img\d{8}")  # names that dataset_tool.py gives to images of any data set
_UNIT_FACTOR = 50  # if spans differ by more, the units are different
_SURE_CORRELATION = 0.8  # above this correlation, the fitted line is trusted
_USUAL_SLOPES = 0.5, 2.0
_LIKE_SIDE = 16  # side to which images are reduced for comparison with other truths
_BLOCK, _NUM_BLOCKS = 32, 8  # consecutive images per compared block, and number of blocks
_LEAST_GAIN = 1e-3  # gain in correlation that another truth must give in any case
_OFFSET_SHARE = 0.1  # offsets above this share of the truths' span suggest another zero ...
_REST_SHARE = 0.1  # ... if the line leaves less than this share of the squared error


class Partners(NamedTuple):
    """The partner of each image among others, by number, and how it was found."""

    numbers: list[int]
    found_by: str  # 'name', 'order' or 'seed'
    doubt: str | None = None  # a line that says why the pairs may be wrong


class PairScore(NamedTuple):
    """The scores of one image and, if there is one, of its input."""

    name: str
    truth: str
    values: dict[str, float]
    of_input: dict[str, float] | None


class Summary(NamedTuple):
    """Scores of several images: mean and sample standard deviation of the finite ones."""

    mean: float  # inf if none is finite
    std: float | None  # None if fewer than two are finite
    num_finite: int
    num_infinite: int  # of images that equal their truth

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Returns the summary of at least one value."""
        finite = [value for value in values if math.isfinite(value)]
        std = statistics.stdev(finite) if len(finite) > 1 else None
        return cls(statistics.fmean(finite) if finite else math.inf, std, len(finite),
                   len(values) - len(finite))


class Pairs:
    """Images of one folder or ZIP with their truths in another and, if given, their inputs.

    Args:
        images: the images to score.
        truth: the truths. If it is a paired data set, they are its images.
        input: the measurements from which the images were made, or 'cond' for the condition images
            of `truth`.
        by: one of `PAIRINGS`; see `partners`.

    Raises:
        OSError: one of them can't be read.
        ValueError: one holds no images, sizes, channels or kinds differ, or partners are missing.
    """

    def __init__(self, images: str | os.PathLike, truth: str | os.PathLike,
                 input: str | os.PathLike | None = None, by: str = "auto"):
        self._images, self._truth = _Source("--images", images), _Source("--truth", truth)
        self.partners = partners(self._images, self._truth, by)
        self._sources = {self._images: range(len(self)), self._truth: self.partners.numbers}
        self._doubts = [self.partners.doubt]
        self._input: _Source | None = None
        if input == CONDITIONS_WORD:
            self._input = _Source("--truth", truth, conditions=True)
            self._sources[self._input] = self.partners.numbers
        elif input is not None:
            self._input = _Source("--input", input)
            found = partners(self._images, self._input, by)
            self._sources[self._input] = found.numbers
            self._doubts.append(found.doubt)
        for source in self._sources:
            source.check_kind(self._truth)
        self.sizes = self._images.dataset.sizes
        for source, numbers in self._sources.items():
            self._check_sizes(source, numbers)

    def __len__(self) -> int:
        return len(self._images.dataset)

    @property
    def images(self) -> ImageFolderDataset:
        """The images that are scored."""
        return self._images.dataset

    @property
    def truth(self) -> ImageFolderDataset:
        """The truths; there may be more of them than images."""
        return self._truth.dataset

    @property
    def has_input(self) -> bool:
        """Whether there are inputs."""
        return self._input is not None

    def read(self, number: int) -> list[np.ndarray]:
        """Returns an image, its truth and, if there are any, its input: float64 [C, H, W].

        Raises:
            ValueError: one of them can't be read.
        """
        return [source.read(numbers[number]) for source, numbers in self._sources.items()]

    def score(self, metrics: Mapping[str, PairedMetric], value_range: tuple[float, float], *,
              clip: bool = False) -> tuple[list[PairScore], list[str]]:
        """Returns the scores of all images, in order, and warnings about what looks wrong.

        Args:
            metrics: the metrics by name.
            value_range: the smallest and the largest value of the data.
            clip: clip images, truths and inputs to the range first.

        Raises:
            ValueError: an image can't be read, units differ, or a metric returns no number.
        """
        compared = [source for source in self._sources if source != self._truth]
        found, checks = [], [_UnitCheck() for _ in compared]
        likenesses = [_Likeness(len(self)) for _ in compared]
        with Progress(len(self), "Scoring") as progress:
            for number in progress.over(range(len(self))):
                image, truth, *inputs = self.read(number)
                for check, likeness, values in zip(checks, likenesses, (image, *inputs),
                                                   strict=True):
                    check.add(values, truth)
                    likeness.add(number, values, truth)
                if clip:
                    image, truth, *inputs = (np.clip(values, *value_range)
                                             for values in (image, truth, *inputs))
                name, name_of_truth = (source.dataset.all_names[self._sources[source][number]]
                                       for source in (self._images, self._truth))
                with error_prefix(f"{name}: "):
                    own, *of_inputs = (
                        {metric: as_number(function(values, truth, value_range), metric)
                         for metric, function in metrics.items()} for values in (image, *inputs))
                found.append(PairScore(name, name_of_truth, own, of_inputs[0] if inputs else None))
        warnings = []
        for check, likeness, source in zip(checks, likenesses, compared, strict=True):
            check.raise_if_other(source.where, self._truth.where)
            warnings += check.warnings(source.where, self._truth.where)
            warnings += self._warnings_of_likeness(source, likeness)
        return found, warnings

    def warnings_of_partners(self) -> list[str]:
        """Returns warnings that pairs may be wrong, one line each."""
        return list(filter(None, (*self._doubts, self._warning_of_source())))

    def _warning_of_source(self) -> str | None:
        """Returns a line if images seem to be made from another paired data set than the truths.

        generate.py records its source. A folder of measurements has no truths, so if the record
        doesn't say whether the source was a paired data set, names that are numbers must tell.
        """
        if not self.truth.has_conditions:
            return None
        is_numbered = self.partners.found_by == "name" and all(
            _NUMBERED.fullmatch(PurePosixPath(name).stem) for name in self.images.all_names)
        for record in self.images.sample_records().values():
            made_of = {record.get(key) for key in ("init_image", "cond_image")} - {None}
            is_of_pairs = "init_of" in record and self.partners.found_by != "name"
            if made_of and (is_numbered or is_of_pairs) and not any(
                    source.dataset.fingerprint in made_of
                    for source in filter(None, (self._truth, self._input))):
                return (f"{self._images.where}: generate.json says that they were made from "
                        f"another data set than {self._truth.where}, but they are paired by "
                        "numbers; are these their truths?")
        return None

    def _warnings_of_likeness(self, source: "_Source", likeness: "_Likeness") -> Iterator[str]:
        if better := likeness.better():
            number, other, own_value, value = better[0]
            name = source.dataset.all_names[self._sources[source][number]]
            truth = self.truth.all_names[self.partners.numbers[other]]
            yield (f"{source.where}: {len(better)} of {likeness.count} images are clearly more "
                   f"like another image's truth than their own, such as {name} like {truth} "
                   f"(correlation {value:.3f}, with its own {own_value:.3f}); are they paired "
                   "rightly?")

    def _check_sizes(self, source: "_Source", numbers: Sequence[int]) -> None:
        for number, (own, other) in enumerate(zip(
                self.sizes, map(source.dataset.sizes.__getitem__, numbers), strict=True)):
            if own != other:
                raise ValueError(
                    f"{self._images.where}: {self.images.all_names[number]} is {own[1]}x{own[0]}, "
                    f"but {source.dataset.all_names[numbers[number]]} of {source.where} is "
                    f"{other[1]}x{other[0]}; pairs must be of one size")


class _Source:
    """The images of a folder or ZIP, or its condition images, as errors call them."""

    def __init__(self, flag: str, path: str | os.PathLike, *, conditions: bool = False):
        self.where = f"--input={CONDITIONS_WORD}" if conditions else f"{flag}={path}"
        with flag_errors(flag, path, _REMEDY):
            self.dataset = ImageFolderDataset(path, any_size=True, use_conditions=conditions)
        self._is_of_conditions = conditions

    @property
    def channels(self) -> int:
        return self.dataset.cond_channels if self._is_of_conditions else self.dataset.num_channels

    @property
    def scaling(self) -> Scaling:
        return self.dataset.cond_scaling if self._is_of_conditions else self.dataset.scaling

    def read(self, number: int) -> np.ndarray:
        """Returns one image as float64 [C, H, W]."""
        images, _, *conditions = self.dataset.get_batch([number])
        return (conditions[0] if conditions else images)[0].astype(np.float64)

    def check_kind(self, truth: "_Source") -> None:
        """Raises ValueError if the images can't be compared with the truths."""
        if self.channels != truth.channels:
            raise ValueError(f"{self.where}: {_channels(self.channels)}, but {truth.where} has "
                             f"{truth.channels}; both must have the same channels")
        if self.scaling.is_8bit and not truth.scaling.is_8bit:
            raise ValueError(f"{self.where}: 8-bit images, but those of {truth.where} have more "
                             "bits and so another unit; give both in the units of the data")


def _channels(count: int) -> str:
    return f"{count} channel{'' if count == 1 else 's'}"


class _UnitCheck:
    """Checks whether images, which are added one by one, seem to have the unit of their truths.

    A line is fitted to all pixels by least squares, image ~ slope * truth + offset.
    """

    def __init__(self) -> None:
        self._ends = [math.inf, -math.inf], [math.inf, -math.inf]  # of the images, of the truths
        self._count = self._num_equal = self._num_pixels = 0
        self._means = np.zeros(2)  # of the images, of the truths
        self._scatter = np.zeros([2, 2])  # sums of products of deviations from the means

    def add(self, image: np.ndarray, truth: np.ndarray) -> None:
        """Takes an image and its truth."""
        for ends, values in zip(self._ends, (image, truth), strict=True):
            ends[:] = min(ends[0], float(values.min())), max(ends[1], float(values.max()))
        self._count += 1
        self._num_equal += np.array_equal(image, truth)
        values = np.stack([image.ravel(), truth.ravel()])
        means = values.mean(axis=1)
        shift, total = means - self._means, self._num_pixels + image.size
        values -= means[:, None]
        # The merge of two sets by Chan et al. 1983, which subtracts no large sums.
        self._scatter += values @ values.T + (
            np.outer(shift, shift) * self._num_pixels * image.size / total)
        self._means += shift * image.size / total
        self._num_pixels = total

    def raise_if_other(self, where: str, truth: str) -> None:
        """Raises ValueError if one set spans far more than the other."""
        own, other = ((high - low) for low, high in self._ends)
        if other and not 1 / _UNIT_FACTOR <= own / other <= _UNIT_FACTOR:
            (low, high), (true_low, true_high) = self._ends
            raise ValueError(f"{where}: values from {low:.6g} to {high:.6g}, but those of {truth} "
                             f"are from {true_low:.6g} to {true_high:.6g}; both must be in the "
                             "units of the data, in which generate.py writes images")

    def warnings(self, where: str, truth: str) -> Iterator[str]:
        """Yields warnings, one line each."""
        if self._num_equal:
            yield (f"{where}: {self._num_equal} of {self._count} images equal their truths of "
                   f"{truth} in every value; are they the truths themselves?")
        slope, offset, correlation = self._line()
        if self._is_other(slope, correlation):
            yield (f"{where}: values are about {slope:.4g} times those of {truth} {offset:+.5g} "
                   f"(correlation {correlation:.3f}); are they in the same unit?")

    def _line(self) -> tuple[float, float, float]:
        """Returns slope, offset and correlation of the line; the correlation is 0 if undefined."""
        (of_images, of_both), (_, of_truths) = self._scatter
        if not of_images or not of_truths:
            return 1.0, 0.0, 0.0
        slope = of_both / of_truths
        return slope, self._means[0] - slope * self._means[1], (
            of_both / math.sqrt(of_images * of_truths))

    def _is_other(self, slope: float, correlation: float) -> bool:
        """Whether a line of this slope and correlation indicates another unit or zero."""
        if abs(correlation) <= _SURE_CORRELATION:
            return False
        if not _USUAL_SLOPES[0] <= slope <= _USUAL_SLOPES[1]:
            return True
        # The shift at the mean of the truths, not at 0: lower contrast is not another zero.
        shift = self._means[0] - self._means[1]
        (of_images, of_both), (_, of_truths) = self._scatter
        squares = of_images - 2 * of_both + of_truths + self._num_pixels * shift**2
        low, high = self._ends[1]
        return (abs(shift) > _OFFSET_SHARE * (high - low)
                and of_images * (1 - correlation**2) < _REST_SHARE * squares)


class _Likeness:
    """Checks whether images, added one by one, resemble truths of others more than their own.

    Reduced images of one shape are correlated with all truths. If there are many images, only
    blocks of consecutive ones are compared.

    Args:
        num: how many images there will be.
    """

    def __init__(self, num: int):
        self._stride = max(-(-num // _NUM_BLOCKS), _BLOCK)
        self._found: dict[tuple, list[tuple[int, np.ndarray, np.ndarray]]] = {}
        self.count = 0

    def add(self, number: int, image: np.ndarray, truth: np.ndarray) -> None:
        """Adds the image with this number and its truth, both [C, H, W]."""
        if number % self._stride >= _BLOCK:
            return
        self.count += 1
        reduced = _reduced(image), _reduced(truth)
        if all(values.any() for values in reduced):
            self._found.setdefault(image.shape, []).append((number, *reduced))

    def better(self) -> list[tuple[int, int, float, float]]:
        """Returns the images that resemble another truth more than their own, in order.

        Each is (its number, the number of the other truth, the correlation with its own truth, the
        correlation with the other truth). The other truth must at least halve the distance of the
        correlation from 1, both for this image and for its own image, because truths that resemble
        each other prove nothing.
        """
        found = []
        for group in self._found.values():
            numbers, images, truths = zip(*group, strict=True)
            values = np.array(images) @ np.array(truths).T
            own = values.diagonal()
            for i, j in enumerate(values.argmax(axis=1)):
                limit = min((1 - own[i]) / 2, (1 - own[j]) / 2, 1 - own[i] - _LEAST_GAIN)
                if values[i, j] > _SURE_CORRELATION and 1 - values[i, j] < limit:
                    found.append((numbers[i], numbers[j], own[i], values[i, j]))
        return sorted(found)


def _reduced(values: np.ndarray) -> np.ndarray:
    """Returns means over blocks of [C, H, W] as a vector of mean 0 and length 1.

    Noise averages out in them. The vector is 0 if all means are equal.
    """
    for axis in (1, 2):
        side = values.shape[axis]
        edges = np.arange(min(side, _LIKE_SIDE)) * side // min(side, _LIKE_SIDE)
        counts = np.diff([*edges, side])
        values = np.add.reduceat(values, edges, axis) / (counts[:, None] if axis == 1 else counts)
    vector = values.ravel() - values.mean()
    length = np.linalg.norm(vector)
    return vector / length if length > 1e-9 * np.abs(values).max() else np.zeros_like(vector)


def partners(images: _Source, others: _Source, by: str = "auto") -> Partners:
    """Returns the partners of images among others.

    With 'auto' images are paired by name if every image has a partner of its name. They are paired
    by seed if all are named by seeds. They are paired by order if no image has a partner of its
    name and nothing shows that the order differs.

    Raises:
        ValueError: an image has no partner, or there is more than one way to find it.
    """
    names, there = images.dataset.all_names, others.dataset.all_names
    by_name, num_named = _by_name(names, there)
    by_order = _by_order(images.dataset, len(there))
    counts = (f"{images.where} has {len(names)} images, {others.where} has {len(there)}, and "
              f"{num_named} have a partner of the same name")
    if by == "auto" and by_name and by_order and by_order.found_by == "seed" \
            and by_name.numbers != by_order.numbers:
        raise ValueError(f"{images.where}: names and seeds give images different partners in "
                         f"{others.where} (by seed, image 0 is that of seed 0); give "
                         "--pair-by=name or --pair-by=order")
    if by_name and by != "order":
        return by_name
    if by_order and (by == "order" or (by == "auto" and (
            by_order.found_by == "seed" or not num_named))):
        if by == "auto" and by_order.found_by == "order":
            _refuse_lost_seeds(images)
            return by_order._replace(doubt=_doubt_of_order(images, others))
        return by_order
    raise ValueError(f"{counts}; give each image a partner of the same name (extensions are "
                     "ignored), or equally many images and --pair-by=order")


def _by_name(names: Sequence[str], others: Sequence[str]) -> tuple[Partners | None, int]:
    """Returns partners by name, or None if an image has none, and the number that have one."""
    keys: tuple[Callable[[str], str], ...] = (
        lambda name: composed(os.path.splitext(name)[0]),
        lambda name: composed(PurePosixPath(name).stem))
    most = 0
    for key in keys:
        numbers = {key(name): number for number, name in enumerate(others)}
        own = list(map(key, names))
        if len(numbers) < len(others) or len(set(own)) < len(own):
            continue  # names are unique only with folders or extensions
        found = [numbers.get(name) for name in own]
        most = max(most, len(found) - found.count(None))
        if None not in found:
            return Partners(found, "name"), most
    return None, most


def _by_order(images: ImageFolderDataset, num_others: int) -> Partners | None:
    """Returns partners by seed if all images are named by seeds, else by order.

    By order, both sides must have equally many images; otherwise None is returned.
    """
    records = images.sample_records()
    seeds = [seed_of(name, records) for name in images.all_names]
    if None not in seeds:
        return Partners([seed % num_others for seed in seeds], "seed")
    return Partners(list(range(num_others)), "order") if len(seeds) == num_others else None


def _refuse_lost_seeds(images: _Source) -> None:
    """Raises ValueError for images that seem to be named by seeds without a record that says so.

    Seeds 0 to n - 1 in order are accepted, because order and seeds then give the same partners.
    """
    records, names = images.dataset.sample_records(), images.dataset.all_names
    if named := [name for name in names if seed_of(name, records) is not None]:
        raise ValueError(f"{images.where}: {len(named)} of {len(names)} images are named by seeds, "
                         f"such as {named[0]}, and the others are not; score them separately, "
                         "or give --pair-by=order")
    files = [name.rpartition("/")[2] for name in names]
    stems = [os.path.splitext(file)[0] for file in files]
    is_seed = [stem.isascii() and stem.isdecimal()
               and stem == image_name(int(stem), subdirs=False, extension="") for stem in stems]
    if not all(is_seed) or list(map(int, stems)) == list(range(len(stems))):
        return
    is_named = any(record.get("names") == "inputs" for record in records.values())
    if not is_named:
        raise ValueError(
            f"{images.where}: {names[0]} and the others seem to be named by seeds that are not 0 "
            f"to {len(names) - 1}, but there is no generate.json that says so; keep it beside "
            "them, or give --pair-by=order or --pair-by=name")


def _doubt_of_order(images: _Source, others: _Source) -> str | None:
    """Returns a line unless names on both sides are numbers that rise in the same steps."""
    sides = [[os.path.splitext(name)[0] for name in source.dataset.all_names]
             for source in (images, others)]
    if len(sides[0]) == 1:
        return None
    example = f"{images.dataset.all_names[0]} with {others.dataset.all_names[0]}"
    remedy = f"such as {example}; if this is right, give --pair-by=order"
    if any(len(set(map(words_of, side))) > 1 or not numbers_of(side[0]) for side in sides):
        return (f"{images.where}: no image has a partner of the same name in {others.where}, so "
                f"they are paired in the order of their names, {remedy}")
    own, other = ([numbers_of(name) for name in side] for side in sides)
    steps = {a[-1] - b[-1] for a, b in zip(own, other, strict=True)}
    if len(steps) > 1 or own != sorted(own) or other != sorted(other):
        return (f"{images.where}: the numbers in its names do not match those of {others.where}, "
                f"and images are paired in the order of their names, {remedy}")
    return None


def value_range_of(scaling: Scaling) -> tuple[float, float]:
    """Returns the range of the data: the values that become -1 and 1 for networks.

    They are 0 and 255 for 8 bits, and 0 and 65535 for 16 bits without a recorded scale.

    Raises:
        ValueError: floating-point data have no recorded scale, or the ranges of channels differ.
            The message does not name the file.
    """
    if scaling == default_scaling(np.float32):
        raise ValueError("the floating-point images have no recorded scale, which would give the "
                         "range of their values")
    if scaling.is_8bit:
        return 0.0, 255.0
    ends = {(center - spread, center + spread)
            for center, spread in zip(scaling.center, scaling.spread, strict=True)}
    if len(ends) > 1:
        raise ValueError("the channels have different scales, and so no common range")
    return ends.pop()
