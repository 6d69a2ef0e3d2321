"""The likelihood of a data set under a trained network, in bits or nats a dimension.

8-bit data are whole numbers v, to which a density gives no mass. As usual it is averaged over the
bin of each, v + u with u uniform over [-w/2, w/2), which bounds the probability of the bin from
below (Theis et al. 2016, arXiv 1511.01844):

    bits/dim = -log2 p(x) / N + log2(127.5 / w)        x = (v + u)/127.5 - 1

w is 1, or the distance of two levels where the data have fewer (`bin_width`). Other data have a
density already: -ln p / N in nats, with p per unit of the data. u and the probes of the trace
depend on the seed and on the number of the image in the data set alone.
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
    recorded_label_kind,
    recorded_scaling,
)
from torch_utils.misc import configure_backends, mix_seed

_TAG = int.from_bytes(b"likelihood", "big")  # sets these draws apart from other uses of the seed
_MAX_STEPS = 127  # of an even grid from 0 to 255; with more of them, 8-bit levels are neighbours
_SURE_BITS = 20  # n levels at random lie on a grid of width w with a probability of about w**-n
_REPLICATED_BITS = (3, 5, 6)  # 1, 2 and 4 give whole distances, and 7 gives rounded ones
_MAX_LEVEL_IMAGES = 1000  # that are looked at for the levels of a data set
_REMEDY = "name a data set, a folder or ZIP of images"


class LikelihoodData:
    """Images of a data set as a network sees them, chosen by seed.

    Args:
        path: a folder or ZIP that `ImageFolderDataset` reads.
        likelihood: the network.
        count: how many images to take, one at least; all where there are fewer.
        seed: which.
        flag: what errors call it.

    Attributes:
        where: what errors call the data set, '--data=PATH'.
        numbers: of the images among all of the data set, by sorted name.
        available: how many there are.
        scaling: by which the network sees them.

    Raises:
        OSError: it can't be read.
        ValueError: not a data set, or not one for this network.
    """

    def __init__(self, path: str | os.PathLike, likelihood: "NetworkLikelihood", count: int,
                 seed: int = 0, flag: str = "--data"):
        self.path, self._flag = str(path), flag
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
                             f"{wanted}; give such images in the same units")
        if net.cond_channels and dataset.cond_channels != net.cond_channels:
            raise ValueError(f"{where}: condition images have {dataset.cond_channels} channels, "
                             f"the network takes {net.cond_channels}; give data like those of its "
                             "training")
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
        """The file of each image."""
        return [self._dataset.all_names[number] for number in self.numbers]

    @property
    def fingerprint(self) -> str:
        """A sha256 over the files; every rank must ask for it."""
        self._dataset.share_fingerprint()
        return self._dataset.fingerprint

    @property
    def stem(self) -> str:
        """The name of the folder or ZIP, without an ending."""
        return self._dataset.name

    @functools.cached_property
    def width(self) -> float:
        """The distance of two levels of the data, see `bin_width`; 1 where they are not 8-bit."""
        return bin_width(self.levels()) if self.scaling.is_8bit else 1.0

    def levels(self) -> np.ndarray:
        """Returns the values that 8-bit images have, of 1000 images of the whole set at most."""
        found = np.zeros(256, bool)
        with self._naming_flag():
            everything = ImageFolderDataset(self.path, max_size=_MAX_LEVEL_IMAGES)
            for i in range(len(everything)):
                found[everything.get_batch([i])[0].ravel()] = True
        return np.flatnonzero(found)

    def get(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None,
                                                  torch.Tensor | None]:
        """Returns images as stored, labels [B, label_dim] and conditions as networks see them."""
        with self._naming_flag():
            images, labels, *conditions = self._dataset.get_batch(indices)
        given = None
        if self._label_dim:
            given = torch.zeros(len(indices), self._label_dim)
            given[:, :labels.shape[1]] = torch.from_numpy(labels)  # later classes may be missing
        condition = None
        if conditions:
            condition = self._cond_scaling.to_network(torch.from_numpy(conditions[0]))
        return torch.from_numpy(images), given, condition


def _check_labels(where: str, dataset: ImageFolderDataset, label_dim: int, kind: str) -> None:
    """Raises ValueError unless a network can be told the labels of a data set."""
    if not dataset.has_labels:
        raise ValueError(f"{where}: has no labels, which the network was trained with; give data "
                         "with labels, or --cond=0 for a network trained with --label-dropout")
    own = "classes" if dataset.has_onehot_labels else "vectors"
    fits = dataset.label_dim <= label_dim if own == "classes" else dataset.label_dim == label_dim
    if own != kind or not fits:
        given, wanted = (f"{number} {'classes' if kind == 'classes' else 'numbers each'}"
                         for number, kind in ((dataset.label_dim, own), (label_dim, kind)))
        raise ValueError(f"{where}: labels are {given}, the network was trained on {wanted}; give "
                         "data with such labels")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Likelihoods of images, in bits or nats a dimension."""

    values: list[float]  # of the images, by the given number of steps
    halved: list[float]  # by half as many

    @property
    def mean(self) -> float:
        """The mean over images."""
        return float(np.mean(self.values))

    @property
    def stderr(self) -> float:
        """The standard error of the mean; NaN for one image."""
        count = len(self.values)
        return float(np.std(self.values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan

    @property
    def steps_error(self) -> float:
        """By how much half as many steps change the mean: far more than what is left."""
        return abs(self.mean - float(np.mean(self.halved)))


@dataclasses.dataclass(frozen=True)
class NetworkLikelihood:
    """A network with settings of the likelihood that have been checked against it."""

    net: Precond  # averaged, on `device`, in evaluation mode
    device: torch.device
    sigmas: tuple[float, ...]  # rising, an odd number
    scaling: Scaling
    cond_scaling: Scaling | None
    label_kind: str | None  # 'classes' or 'vectors'; None without labels
    uses_labels: bool
    probes: int | None  # None is the exact trace
    dequantize: bool
    seed: int
    settings: dict[str, Any]  # what decides a value, as plain JSON data

    @classmethod
    def open(cls, source: str, device: torch.device, *, steps: int = 32, probes: int = 1,
             exact: bool = False, dequantize: str | None = None, cond: bool = True, seed: int = 0,
             pfgmpp: bool | None = None, aug_dim: float | None = None,
             precision: str = "fp32", key: str | None = None) -> "NetworkLikelihood":
        """Returns the network of a snapshot or state, ready to measure.

        Args:
            source: a path or address; of a run directory the newest network is taken.
            device: where to compute.
            steps: of the Runge-Kutta method, an even number.
            probes: random vectors of each trace.
            exact: compute traces exactly, by N backward passes.
            dequantize: 'uniform' or 'none'; None is uniform for 8-bit data.
            cond: tell the network the labels.
            seed: of dequantisation and probes.
            pfgmpp: for files that do not record D, see `checkpoint.resolve_D`.
            aug_dim: likewise.
            precision: arithmetic inside the network.
            key: which network of a file that holds several, see `checkpoint.load`.

        Raises:
            ValueError: the file or a setting does not fit; UsageError for a flag.
            OSError: the file can't be read.
        """
        if type(steps) is not int or steps < 2 or steps % 2:
            raise UsageError(f"--steps={steps}: must be an even number, 2 at least, for the error "
                             "is found by halving it")
        if type(probes) is not int or probes < 1:
            raise UsageError(f"--probes={probes}: must be a whole number, 1 at least")
        if dequantize not in (None, "uniform", "none"):
            raise UsageError(f"--dequantize={dequantize}: must be uniform or none; leave "
                             "--dequantize out for uniform noise where data are 8-bit")
        configure_backends(precision)
        file = NetworkFile.read(source, key)
        content, net = open_network(file, device=device, pfgmpp=pfgmpp, aug_dim=aug_dim,
                                    precision=precision, compiled=False)
        if net.few_step is not None:
            raise UsageError(f"--network={source}: a few-step network ({net.few_step.method}) is "
                             "no denoiser, and no density follows from it; give the network that "
                             "it was made from")
        scaling = recorded_scaling(content, source, "scale", net.img_channels)
        if dequantize == "uniform" and not scaling.is_8bit:
            raise UsageError(f"--dequantize=uniform: {source} was trained on data that are not "
                             "8-bit and have a density as they are; leave --dequantize out")
        if not cond and not net.label_dim:
            raise UsageError(f"--cond=0: {source} is unconditional; leave --cond out")
        if not cond and not net.config.get("label_dropout"):
            raise UsageError(f"--cond=0: {source} was trained without --label-dropout, so it knows "
                             "no density without labels; leave --cond out")
        sigmas, *_ = sigma_grid("edm", net, steps + 1, None, checkpoint.highest_level(content), 7.0)
        rising = sigmas[:-1].flip(0).tolist()
        is_uniform = scaling.is_8bit and dequantize != "none"
        uses_labels = cond and net.label_dim > 0
        settings = {
            "weights": file.digest, "D": net.D,
            "num_steps": steps, "probes": None if exact else probes, "cond": uses_labels,
            "dequantize": "uniform" if is_uniform else "none", "seed": seed,
            **{name: float(f"{level:.9g}") for name, level in (
                ("sigma_min", rising[0]), ("sigma_max", rising[-1]))},
            "precision": precision, "device": device.type}
        cond_scaling = recorded_scaling(content, source, "cond_scale", net.cond_channels) \
            if net.cond_channels else None
        return cls(net, device, tuple(rising), scaling, cond_scaling,
                   recorded_label_kind(content),
                   uses_labels=uses_labels, probes=None if exact else probes,
                   dequantize=is_uniform, seed=seed, settings=settings)

    @property
    def unit(self) -> str:
        """What values are in, 'bits/dim' or 'nats/dim'."""
        return "bits/dim" if self.scaling.is_8bit else "nats/dim"

    @property
    def nfe(self) -> int:
        """Evaluations of the network for an image, those for the error included."""
        steps = len(self.sigmas) - 1
        return EVALUATIONS_A_STEP * (steps + steps // 2)

    def width_of(self, data: LikelihoodData) -> float:
        """Returns the width of a bin of these data; 1 where they are not dequantised."""
        return data.width if self.dequantize else 1.0

    def __call__(
        self, data: LikelihoodData, indices: Sequence[int], width: float | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> tuple[list[float], list[float]]:
        """Returns the values of some images, and those by half as many steps.

        Args:
            data: the images.
            indices: which.
            width: of a bin of 8-bit data; None is `width_of` these data.
            watch: called with the number of images after each evaluation of them.

        Raises:
            ValueError: the width is not a positive number.
        """
        width = self.width_of(data) if width is None else width
        if not 0 < width < math.inf:
            raise ValueError(f"width={width}: must be a positive number, such as 1 for 256 levels")
        stored, labels, condition = data.get(indices)
        keys = [mix_seed(_TAG, self.seed, data.numbers[i]) for i in indices]
        x = self._state(stored, keys, width).to(self.device)
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

        both = [self._in_units(solve(stride).log_p, x[0].numel(), width) for stride in (1, 2)]
        return both[0], both[1]

    def _state(self, stored: torch.Tensor, keys: Sequence[int], width: float) -> torch.Tensor:
        """Returns images as networks see them, float64, with u where they are dequantised."""
        if not self.scaling.is_8bit:
            return self.scaling.to_network(stored).to(torch.float64)
        values = stored.to(torch.float64)
        if self.dequantize:
            draws = StackedRandomGenerator("cpu", keys).rand(stored.shape, dtype=torch.float64)
            values = values + width * (draws - 0.5)
        return values / 127.5 - 1

    def _probes(self, keys: Sequence[int], place: int, x: torch.Tensor) -> Iterator[torch.Tensor]:
        rnd = StackedRandomGenerator(x.device, [mix_seed(key, place) for key in keys])
        for _ in range(self.probes):
            yield 2 * rnd.randint(2, size=x.shape, dtype=x.dtype) - 1

    def _in_units(self, log_p: torch.Tensor, N: int, width: float) -> list[float]:
        nats = -log_p / N
        if self.scaling.is_8bit:
            return (nats / math.log(2) + math.log2(127.5 / width)).tolist()
        return (nats + np.log(self.scaling.spread).mean()).tolist()


def bin_width(levels: np.ndarray) -> float:
    """Returns the distance of two levels of 8-bit data, given the values that occur: 1 of 256.

    Data of fewer levels, such as 4-bit or binary ones, have them at equal whole distances, or on
    an even grid 255 k/m of 2 to 128 levels, rounded to whole numbers, rounded down, or with the
    bits of k repeated. No two values that occur share a level of it. So few values that they could
    lie on the grid by chance don't count. Anything else is 8-bit.
    """
    levels = np.unique(np.asarray(levels, np.int64))
    if len(levels) < 2:
        return 1.0
    step = int(np.gcd.reduce(levels - levels[0]))
    if step > 1:
        return float(step)
    for m in range(2, _MAX_STEPS + 1):
        is_sure = len(levels) * math.log2(255 / m) >= _SURE_BITS
        if is_sure and (_is_on_grid(levels, m) or _is_replicated(levels, m)):
            return 255 / m
    return 1.0


def _is_on_grid(levels: np.ndarray, m: int) -> bool:
    """Whether these are 255 k/m, all rounded or all rounded down, each of a k of its own.

    A whole 255 k/m may have become one less, as rounding down makes of a float just below it.
    """
    scaled = levels * m
    for k, tolerance in (((2 * scaled + 255) // 510, m / 2), (-(-scaled // 255), m)):
        if len(np.unique(k)) == len(levels) and (np.abs(255 * k - scaled) <= tolerance).all():
            return True
    return False


def _is_replicated(levels: np.ndarray, m: int) -> bool:
    """Whether these are numbers of b bits, m = 2**b - 1, made 8-bit by repeating the bits."""
    bits = (m + 1).bit_length() - 1
    if bits not in _REPLICATED_BITS or m + 1 != 1 << bits:
        return False
    k = np.arange(m + 1)
    repeated = sum(k << (8 - bits * i) if bits * i <= 8 else k >> (bits * i - 8)
                   for i in range(1, 8 // bits + 2))
    return bool(np.isin(levels, repeated).all())
