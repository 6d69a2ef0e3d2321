"""The likelihood of a data set under a trained network, in bits or nats per dimension.

Data of 8 or 16 bits are whole numbers v, to which a density assigns no mass. As usual, the log
density is averaged over a bin around each, v + u with u uniform in [-w/2, w/2). This bounds the
probability of the bin from below (Theis et al. 2016, arXiv 1511.01844). With the scaling of each
channel (images/scaling.py; center and spread are 127.5 for 8 bits),

    bits/dim = -log2 p(x) / N + mean log2(spread / w)        x = (v + u - center)/spread

w is 1, or the distance between neighbouring levels if the data use fewer levels (`bin_width`).
Floating-point data have a density already: the result is -ln p(x) / N + mean ln spread in nats, per
unit of the data. u and the random vectors of the trace depend only on the seed and on the number of
the image in the data set.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from checkpoints import checkpoint
from dnnlib.cli import flag_errors
from images.dataset import ImageFolderDataset
from images.scaling import Scaling
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.likelihood import (
    EVALUATIONS_A_STEP,
    Likelihood,
    exact_trace,
    hutchinson,
    log_likelihood,
)
from pfgmpp.networks import Precond
from pfgmpp.samplers import StackedRandomGenerator
from pfgmpp.schedules import sigma_grid
from sampling.network_sampler import (
    NetworkFile,
    UsageError,
    open_network,
    plugin_record,
    recorded_label_kind,
    recorded_scaling,
)
from torch_utils import distributed
from torch_utils.misc import configure_backends, mix_seed

_TAG = int.from_bytes(b"likelihood", "big")  # separates these draws from other uses of the seed
# n random levels lie on a grid of width w with a probability of about w**-n. A grid is accepted if
# this is smaller than 1 / (number of grids) by so many bits.
_SURE_BITS = 13
_FEW_LEVELS = 32  # these are checked first, and rule out most grids
_MAX_LEVEL_IMAGES = 1000  # images searched for the levels of a data set
_REMEDY = "name a data set, a folder or ZIP of images"


class LikelihoodData:
    """Images of a data set, chosen by seed, for a network.

    Args:
        path: a folder or ZIP that `ImageFolderDataset` reads, or images in memory.
        likelihood: the network.
        count: maximum number of images, at least 1.
        seed: determines which images are chosen.
        flag: name of the data set's flag, for errors.

    Attributes:
        where: name of the data set in errors, '--data=PATH'.
        numbers: positions of the images in the data set, sorted by name.
        available: number of images in the data set.
        scaling: maps the data to the network's scale.
        are_whole: whether the images are stored as whole numbers of 8 or 16 bits.
        num_levels: number of values these can have; 0 for floating-point data.

    Raises:
        OSError: the data set can't be read.
        ValueError: it is no data set, or does not fit the network.
        UsageError: it can't be dequantised as `likelihood` demands.
    """

    def __init__(self, path: str | os.PathLike, likelihood: "NetworkLikelihood", count: int,
                 seed: int = 0, flag: str = "--data"):
        self._source, self.path, self._flag = path, str(path), flag
        net, self.where = likelihood.net, f"{flag}={path}"
        where = self.where
        if count < 1:
            raise ValueError(f"count={count}: must be 1 or more")
        with self._naming_flag():
            self._dataset = dataset = ImageFolderDataset(
                path, max_size=count, random_seed=seed, use_labels=likelihood.uses_labels,
                use_conditions=net.cond_channels > 0)
        self.numbers = [dataset.get_details(i).raw_idx for i in range(len(dataset))]
        self.available = len(dataset.all_names)
        self.scaling, self._cond_scaling = likelihood.scaling, likelihood.cond_scaling
        given, wanted = ("x".join(map(str, shape))
                         for shape in (dataset.image_shape, net.image_shape))
        if given != wanted:
            raise ValueError(f"{where}: images are {given} (channels x height x width), the "
                             f"network makes {wanted}; convert them with dataset_tool.py")
        if dataset.scaling.is_8bit != self.scaling.is_8bit:
            given, wanted = ("8-bit" if scaling.is_8bit else "floating-point or 16-bit"
                             for scaling in (dataset.scaling, self.scaling))
            raise ValueError(f"{where}: images are {given}, but the network was trained on "
                             f"{wanted} images; give such images in the same units")
        if dataset.scale is not None and not dataset.scaling.equals(self.scaling):
            raise ValueError(f"{where}: its values {dataset.scaling}, but the network was "
                             f"trained on data whose values {self.scaling}; give data that "
                             "dataset_tool.py converted with the same --scale")
        self.are_whole = dataset.dtype.kind == "u"
        self.num_levels = np.iinfo(dataset.dtype).max + 1 if self.are_whole else 0
        if likelihood.dequantize == "uniform" and not self.are_whole:
            raise UsageError(f"--dequantize=uniform: {where} holds floating-point values, which "
                             "already have a density; leave --dequantize out")
        if net.cond_channels and dataset.cond_channels != net.cond_channels:
            raise ValueError(f"{where}: condition images have {dataset.cond_channels} channels, "
                             f"but the network takes {net.cond_channels}; give data like those it "
                             "was trained on")
        self._label_dim = net.label_dim
        if likelihood.uses_labels:
            _check_labels(where, dataset, net.label_dim, likelihood.label_kind)
        self._uses_labels = likelihood.uses_labels

    def __len__(self) -> int:
        return len(self._dataset)

    def _naming_flag(self) -> contextlib.AbstractContextManager[None]:
        return flag_errors(self._flag, self.path, _REMEDY)

    @property
    def names(self) -> list[str]:
        """The file name of each image."""
        return [self._dataset.all_names[number] for number in self.numbers]

    @property
    def fingerprint(self) -> str:
        """A sha256 of the files. All ranks must access this."""
        self._dataset.share_fingerprint()
        return self._dataset.fingerprint

    @property
    def stem(self) -> str:
        """The name of the folder or ZIP without its extension."""
        return self._dataset.name

    @functools.cached_property
    def width(self) -> float:
        """The distance between neighbouring levels (`bin_width`); 1 for floating-point data."""
        return bin_width(self.levels(), self.num_levels - 1) if self.are_whole else 1.0

    def levels(self) -> np.ndarray:
        """Returns the whole numbers that occur in up to 1000 images of the whole data set."""
        found = np.zeros(self.num_levels, bool)
        with self._naming_flag():
            everything = ImageFolderDataset(self._source, max_size=_MAX_LEVEL_IMAGES)
            for i in range(len(everything)):
                found[everything.get_batch([i])[0].ravel()] = True
        return np.flatnonzero(found)

    def get(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None,
                                                  torch.Tensor | None]:
        """Returns images as stored, labels [B, label_dim] and conditions for the network."""
        with self._naming_flag():
            images, labels, *conditions = self._dataset.get_batch(indices)
        given = None
        if self._label_dim:
            given = torch.zeros(len(indices), self._label_dim)
            given[:, :labels.shape[1]] = torch.from_numpy(labels)  # the last classes may be missing
        condition = None
        if conditions:
            condition = self._cond_scaling.to_network(torch.from_numpy(conditions[0]))
        return torch.from_numpy(images), given, condition


def _check_labels(where: str, dataset: ImageFolderDataset, label_dim: int, kind: str) -> None:
    """Raises ValueError unless the labels of a data set fit the network."""
    if not dataset.has_labels:
        raise ValueError(f"{where}: has no labels, but the network was trained with labels; give "
                         "data with labels, or --cond=0 for a network trained with --label-dropout")
    own = "classes" if dataset.has_onehot_labels else "vectors"
    fits = dataset.label_dim <= label_dim if own == "classes" else dataset.label_dim == label_dim
    if own != kind or not fits:
        given, wanted = (f"{number} {'classes' if kind == 'classes' else 'numbers each'}"
                         for number, kind in ((dataset.label_dim, own), (label_dim, kind)))
        raise ValueError(f"{where}: labels are {given}, but the network was trained on {wanted}; "
                         "give data with such labels")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Likelihoods of images, in bits or nats per dimension."""

    values: list[float]  # of the images, with the given number of steps
    halved: list[float]  # with half as many steps
    unit: str  # 'bits/dim' or 'nats/dim'
    width: float  # of the bins, in units of the data

    @property
    def mean(self) -> float:
        """The mean over the images."""
        return float(np.mean(self.values))

    @property
    def stderr(self) -> float:
        """The standard error of the mean; NaN for one image."""
        count = len(self.values)
        return float(np.std(self.values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan

    @property
    def steps_error(self) -> float:
        """The change of the mean with half as many steps, far more than the remaining error."""
        return abs(self.mean - float(np.mean(self.halved)))


@dataclasses.dataclass(frozen=True)
class NetworkLikelihood:
    """A network with settings for the likelihood that have been checked against it."""

    net: Precond  # with averaged weights, on `device`, in evaluation mode
    device: torch.device
    sigmas: tuple[float, ...]  # rising, an odd number
    scaling: Scaling
    cond_scaling: Scaling | None
    label_kind: str | None  # 'classes' or 'vectors'; None without labels
    uses_labels: bool
    probes: int | None  # None for the exact trace
    dequantize: str | None  # 'uniform', 'none', or None for uniform if data are whole numbers
    seed: int
    settings: dict[str, Any]  # everything except the data that affects a value; plain JSON data

    @classmethod
    def open(cls, source: str | NetworkFile, device: torch.device, *, steps: int = 32,
             probes: int = 1, exact: bool = False, dequantize: str | None = None,
             cond: bool = True, seed: int = 0, pfgmpp: bool | None = None,
             aug_dim: float | None = None,
             precision: str = "fp32", key: str | None = None,
             built: tuple[dict[str, Any], Precond] | None = None) -> "NetworkLikelihood":
        """Returns the network of a snapshot or training state, ready to measure.

        Args:
            source: a path, an address, or a file that has been read. In a run directory, the newest
                network is used.
            device: where to compute.
            steps: number of Runge-Kutta steps, which must be even.
            probes: number of random vectors for each trace.
            exact: compute traces exactly, with N backward passes.
            dequantize: 'uniform', which is refused for floating-point data, or 'none'. None is
                uniform for whole numbers.
            cond: give the labels to the network.
            seed: determines the dequantisation noise and the random vectors.
            pfgmpp: for files that do not record D, see `checkpoint.resolve_D`.
            aug_dim: for files that do not record D, see `checkpoint.resolve_D`.
            precision: precision of the network's arithmetic.
            key: which network of a file that holds several, see `checkpoint.load`.
            built: what `open_network` returned for the file at this precision. None calls it.

        Raises:
            ValueError: the file or a setting does not fit.
            UsageError: a flag does not fit.
            OSError: the file can't be read.
        """
        if type(steps) is not int or steps < 2 or steps % 2:
            raise UsageError(f"--steps={steps}: must be an even number, at least 2; half as many "
                             "steps estimate the error")
        if type(probes) is not int or probes < 1:
            raise UsageError(f"--probes={probes}: must be a whole number, at least 1")
        if dequantize not in (None, "uniform", "none"):
            raise UsageError(f"--dequantize={dequantize}: must be uniform or none; leave "
                             "--dequantize out for uniform noise if data are whole numbers")
        configure_backends(precision)
        file = NetworkFile.read(source, key)
        source = file.source
        content, net = built or open_network(file, device=device, pfgmpp=pfgmpp, aug_dim=aug_dim,
                                             precision=precision, compiled=False)
        if net.few_step is not None:
            raise UsageError(f"--network={source}: is a few-step network ({net.few_step.method}), "
                             "which defines no density; give the denoiser it was made from")
        scaling = recorded_scaling(content, source, "scale", net.img_channels)
        if not cond and not net.label_dim:
            raise UsageError(f"--cond=0: {source} is unconditional; leave --cond out")
        if not cond and not net.config.get("label_dropout"):
            raise UsageError(f"--cond=0: {source} was trained without --label-dropout, so it can't "
                             "be evaluated without labels; leave --cond out")
        sigmas, *_ = sigma_grid("edm", net, steps + 1, None, checkpoint.highest_level(content), 7.0)
        rising = sigmas[:-1].flip(0).tolist()
        uses_labels = cond and net.label_dim > 0
        settings = {
            "weights": file.digest, "D": net.D,
            "num_steps": steps, "probes": None if exact else probes, "cond": uses_labels,
            "seed": seed,
            **{name: float(f"{level:.9g}") for name, level in (
                ("sigma_min", rising[0]), ("sigma_max", rising[-1]))},
            "precision": precision, "device": device.type, **plugin_record(net)}
        cond_scaling = recorded_scaling(content, source, "cond_scale", net.cond_channels) \
            if net.cond_channels else None
        return cls(net, device, tuple(rising), scaling, cond_scaling,
                   recorded_label_kind(content),
                   uses_labels=uses_labels, probes=None if exact else probes,
                   dequantize=dequantize, seed=seed, settings=settings)

    def dequantizes(self, data: LikelihoodData) -> bool:
        """Whether noise as wide as one level is added to these data."""
        return data.are_whole and self.dequantize != "none"

    def unit_of(self, data: LikelihoodData) -> str:
        """Returns the unit of the values of these data, 'bits/dim' or 'nats/dim'."""
        are_bits = self.scaling.is_8bit or self.dequantizes(data)
        return "bits/dim" if are_bits else "nats/dim"

    def settings_of(self, data: LikelihoodData) -> dict[str, Any]:
        """Returns `settings`, and whether these data are dequantised."""
        return self.settings | {"dequantize": "uniform" if self.dequantizes(data) else "none"}

    @property
    def nfe(self) -> int:
        """Network evaluations per image, including those for the error estimate."""
        steps = len(self.sigmas) - 1
        return EVALUATIONS_A_STEP * (steps + steps // 2)

    def width_of(self, data: LikelihoodData) -> float:
        """Returns the width of a bin of these data, or 1 if they are not dequantised."""
        return data.width if self.dequantizes(data) else 1.0

    def __call__(
        self, data: LikelihoodData, indices: Sequence[int], width: float | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> tuple[list[float], list[float]]:
        """Returns the values of some images, and those with half as many steps.

        Args:
            data: the images.
            indices: which of them to measure.
            width: width of the bins in units of the data. None is `width_of(data)`.
            watch: called after each evaluation with the number of images evaluated.

        Raises:
            ValueError: the width is not a positive number.
        """
        width = self.width_of(data) if width is None else width
        if not 0 < width < math.inf:
            raise ValueError(f"width={width}: must be a positive number, such as 1 if all whole "
                             "numbers occur")
        stored, labels, condition = data.get(indices)
        keys = [mix_seed(_TAG, self.seed, data.numbers[i]) for i in indices]
        noise = width if self.dequantizes(data) else 0.0
        x = self._state(stored, keys, noise).to(self.device)
        labels, condition = (None if given is None else given.to(self.device)
                             for given in (labels, condition))
        told = {} if condition is None else {"condition": condition}

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            if watch:
                watch(len(x))
            return self.net(x, sigma, labels, **told).to(torch.float64)

        def solve(stride: int) -> Likelihood:
            kernel = PerturbationKernel(self.net.D)
            trace = exact_trace if self.probes is None else hutchinson(
                lambda place: self._probes(keys, place, x))
            return log_likelihood(denoise, x, self.sigmas[::stride],
                                  lambda end: kernel.log_density(end, self.sigmas[-1]), trace,
                                  stride)

        # The density is per unit of x. A bin is width / spread units wide, in each channel.
        bins = float(np.log(np.array(self.scaling.spread) / width).mean())
        unit = math.log(2) if self.unit_of(data) == "bits/dim" else 1.0
        both = [((bins - solve(stride).log_p / x[0].numel()) / unit).tolist() for stride in (1, 2)]
        return both[0], both[1]

    def measure(self, data: LikelihoodData, batch: int,
                watch: Callable[[int], None] | None = None) -> Measured:
        """Returns the likelihoods of all images of `data`. All ranks must call this.

        Args:
            data: the images.
            batch: maximum batch size per rank.
            watch: called after each evaluation with the number of images evaluated.

        Raises:
            ValueError: a likelihood is not finite.
        """
        width, found = self.width_of(data), []
        for indices in filter(None, distributed.split_for_rank(range(len(data)), batch)):
            found += zip(indices, *self(data, indices, width, watch), strict=True)
        rows = sorted(row for part in distributed.gather_objects(found) for row in part)
        _, values, halved = map(list, zip(*rows, strict=True))
        if bad := sum(not math.isfinite(value) for value in values):
            raise ValueError(f"{data.where}: the likelihoods of {bad} of {len(rows)} images are "
                             "not finite; the network may have diverged, or --precision may be too "
                             "low")
        return Measured(values, halved, self.unit_of(data), width)

    def _state(self, stored: torch.Tensor, keys: Sequence[int], width: float) -> torch.Tensor:
        """Returns images in the network's scale, float64, with u of this width added unless 0."""
        values = stored.to(torch.float64)
        if width:
            draws = StackedRandomGenerator("cpu", keys).rand(stored.shape, dtype=torch.float64)
            values = values + width * (draws - 0.5)
        return self.scaling.to_network(values, torch.float64)

    def _probes(self, keys: Sequence[int], place: int, x: torch.Tensor) -> Iterator[torch.Tensor]:
        rnd = StackedRandomGenerator(x.device, [mix_seed(key, place) for key in keys])
        for _ in range(self.probes):
            yield 2 * rnd.randint(2, size=x.shape, dtype=x.dtype) - 1


def bin_width(levels: np.ndarray, top: int = 255) -> float:
    """Returns the distance between neighbouring levels, at least 1, given the values that occur.

    Data with fewer levels, such as 4-bit or binary data, have them either at equal whole distances
    or on an even grid top k/m of at most (top + 1)/2 levels. The levels of a grid may be rounded,
    rounded down, or formed by repeating the bits of k. A grid is accepted only if no two values
    share a level, and if there are too many values to lie on it by chance. Otherwise the distance
    is 1.

    Args:
        levels: the values that occur, from 0 to `top`.
        top: 2^b - 1 for numbers of b bits, 255 or 65535.
    """
    levels = np.unique(np.asarray(levels, np.int64))
    if len(levels) < 2:
        return 1.0
    step = int(np.gcd.reduce(levels - levels[0]))
    if step > 1:
        return float(step)
    closest, few = int(np.diff(levels).min()), levels[::len(levels) // _FEW_LEVELS + 1]
    num_grids = (top + 1) // 2  # with more steps than these, levels are neighbours
    sure_bits = _SURE_BITS + math.log2(num_grids)
    # Rounding brings two levels of a grid closer by at most 1, so a coarser grid would
    # put two values on one level.
    for m in range(max(2, math.ceil(top / (closest + 1))), num_grids):
        is_sure = len(levels) * math.log2(top / m) >= sure_bits
        if is_sure and all(_is_on_grid(some, m, top) or _is_replicated(some, m, top)
                           for some in (few, levels)):
            return top / m
    return 1.0


def _is_on_grid(levels: np.ndarray, m: int, top: int) -> bool:
    """Whether these are values top k/m, either all rounded or all rounded down.

    A whole top k/m may be 1 less, because rounding down does that to a float just below it.
    """
    scaled = levels * m
    return any((np.abs(top * k - scaled) <= tolerance).all() for k, tolerance in (
        ((2 * scaled + top) // (2 * top), m / 2), (-(-scaled // top), m)))


def _is_replicated(levels: np.ndarray, m: int, top: int) -> bool:
    """Whether these are numbers of b bits, m = 2**b - 1, extended to `top` by repeating bits."""
    bits, length = m.bit_length(), top.bit_length()
    if m + 1 != 1 << bits:
        return False
    k = np.arange(m + 1)
    repeated = sum(k << (length - bits * i) if bits * i <= length else k >> (bits * i - length)
                   for i in range(1, length // bits + 2))
    return bool(np.isin(levels, repeated).all())
