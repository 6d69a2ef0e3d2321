"""A trained network as one object for Python, `pfgmpp.load`: it samples, measures and is scored.

It gives the settings of the scripts to the classes that they use themselves, so that results are
theirs: `sample` makes generate.py's images, `likelihood` the values of likelihood.py, `score` those
of `fid.py gen`. It lies in this room because it needs both the sampler and the scores.
"""

import dataclasses
import difflib
import inspect
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from checkpoints.names import find_network
from dnnlib.progress import Progress
from dnnlib.util import format_ranges
from images.given_images import GivenImages, as_numpy, given_images
from images.scaling import Scaling
from metrics.evaluator import check_asked
from metrics.metrics import METRICS, metrics_that_compare, metrics_that_need
from metrics.score_names import recorded_name
from metrics.score_report import warn_if_few
from metrics.scoring import network_features, open_evaluator
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.networks import Precond
from pfgmpp.samplers import SamplerConfig
from sampling.latents import Latents, joined
from sampling.network_likelihood import LikelihoodData, Measured, NetworkLikelihood
from sampling.network_sampler import (
    NetworkFile,
    NetworkSampler,
    open_network,
    recorded_class_names,
    recorded_label_kind,
    recorded_scaling,
)
from sampling.samples import Samples
from torch_utils import distributed
from torch_utils.misc import configure_backends

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_NUM_SEEDS = 16  # that are sampled where none are named
_NUM_SCORED = 50_000  # of a score, as in papers
_NUM_MEASURED = 64  # images of a data set whose likelihood is measured
_MAX_NAMED = 6  # seeds in a message
# Flags of generate.py whose keywords of `NetworkSampler.open` have other names.
_FLAGS = {"steps": "num_steps", "alpha": "noise_alpha", "disc": "discretization",
          "labels": "label_source", "compile": "compiled"}
_OF_NETWORK = ("source", "device", "key", "pfgmpp", "aug_dim", "precision", "built")  # of `load`
_Images = Any  # a data set's path, or images in memory, see images/given_images.py
_Seeds = int | Iterable[int] | None


def load(source: str | os.PathLike, device: str | torch.device = "auto", *,
         key: str | None = None, pfgmpp: bool | None = None, aug_dim: float | None = None,
         precision: str = "fp32") -> "Model":
    """Returns a trained network, ready to use; no code of the file is run.

    Args:
        source: a snapshot, a training state, a published file, or the address of one; of a run
            directory the newest network is taken.
        device: 'cpu', 'cuda', 'cuda:1', or 'auto' for a GPU if there is one.
        key: which network of a file that holds several, see `checkpoint.load`.
        pfgmpp: for files that do not record D, see `checkpoint.resolve_D`.
        aug_dim: likewise.
        precision: arithmetic inside the network: 'fp32', 'tf32', 'bf16' or 'fp16'.

    Raises:
        OSError: it can't be read.
        ValueError: it holds no network, or an argument does not fit.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}")
    place = _device(device)
    file = NetworkFile.read(distributed.run_on_rank0(find_network, os.fspath(source)), key)
    configure_backends(precision)
    content, net = open_network(file, device=place, pfgmpp=pfgmpp, aug_dim=aug_dim,
                                precision=precision, compiled=False)
    return Model(file, content, net, place, precision,
                 recorded_scaling(content, file.source, "scale", net.img_channels))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Model:
    """A network of a file, on a device; made by `load`.

    Seeds are a number n, which stands for the seeds 0 to n - 1, or any whole numbers. Images are
    the path of a data set, or pictures, arrays or tensors, see images/given_images.py: 8-bit, or
    floats in the units of the network's data. Floats for a network of 8-bit images go from -1 to 1.

    `options` are the flags of generate.py, with _ for -, such as `S_churn=40` or `guidance=2`; only
    --class is `class_idx`. Errors name the flags.

    Attributes:
        net: the averaged network, a denoiser (x, sigma, class_labels) of images about [-1, 1].
        device: where it computes.
        precision: its arithmetic.
        scaling: from the units of its data to [-1, 1] and back.
    """

    file: NetworkFile
    content: dict[str, Any]
    net: Precond
    device: torch.device
    precision: str
    scaling: Scaling

    @property
    def D(self) -> float:
        """Augmented dimensions, inf for diffusion."""
        return self.net.D

    @property
    def kernel(self) -> PerturbationKernel:
        """The noise that the network was trained with."""
        return PerturbationKernel(self.D)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return tuple(self.net.image_shape)

    @property
    def sigma_data(self) -> float | None:
        """The deviation of the data that it assumes; None of a preconditioner that assumes none."""
        return getattr(self.net, "sigma_data", None)

    @property
    def num_classes(self) -> int:
        """How many classes it knows; 0 without labels, and where they are vectors."""
        return self.net.label_dim if recorded_label_kind(self.content) == "classes" else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, () without names."""
        return recorded_class_names(self.content)

    @property
    def is_few_step(self) -> bool:
        """Whether it is no denoiser, but makes images in a few evaluations."""
        return self.net.few_step is not None

    @property
    def kimg(self) -> float | None:
        """Thousands of images that it was trained on; None where the file does not say."""
        nimg = (self.content.get("progress") or {}).get("cur_nimg")
        return None if nimg is None else nimg / 1000

    def __repr__(self) -> str:
        kind = f"few steps ({self.net.few_step.method})" if self.is_few_step else "denoiser"
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        kimg = "" if self.kimg is None else f", {self.kimg:g} kimg"
        return (f"Model({self.file.source}: {kind}, D = {self.D:g}, "
                f"{'x'.join(map(str, self.image_shape))}{classes}{kimg}, on {self.device})")

    def sample(self, seeds: _Seeds = None, steps: int | None = None, solver: str | None = None, *,
               class_idx: int | str | None = None, batch: int = 64, **options: Any) -> Samples:
        """Returns the images that generate.py makes of the same seeds and settings.

        Args:
            seeds: one for each image; None is 16, or one for each given image or latent.
            steps: number of noise levels; None is 18, or a few-step network's own number.
            solver: None is Heun's method, or 'consistency' for few-step networks.
            class_idx: a class number, 'uniform' or 'data'.
            batch: the most images at a time.
            options: see `Model`. Images may be in memory: `init_image`, `cond_image`. So may
                `labels` of seeds, and `latents` of `encode`.

        Raises:
            ValueError: a setting does not fit, or an image has values that are not finite.
            OSError: a file can't be read.
            TypeError: there is no such option.
        """
        sampler = self._sampler(steps=steps, solver=solver, class_idx=class_idx, **options)
        own = sampler.latents if sampler.latents is not None else sampler.inputs
        numbers = _numbers(seeds, _NUM_SEEDS if own is None else len(own))
        sampler.check_seeds(numbers)
        sampler.image_shape  # noqa: B018 - refuses images of several sizes
        done = []
        with Progress(len(numbers), "Sampling", delay=1) as progress:
            for found in sampler.images(sampler.batches(numbers, _positive(batch)), most=batch):
                done.append(found)
                progress.update(len(found.seeds))
        samples = Samples.of_batches(done, self.scaling, class_names=sampler.class_names,
                                     have_classes=sampler.label_kind == "classes")
        _refuse_lost(samples)
        return samples

    def restore(self, images: _Images, *, level: float | None = None, sigma: float | None = None,
                measure: str | None = None, mask: Any = None, seeds: _Seeds = None,
                steps: int | None = None, solver: str | None = None, **options: Any) -> Samples:
        """Returns restored images: of noisy ones, or of what was measured of them.

        Without `measure`, sampling starts at the images themselves, which must be about as noisy as
        is said (--init-image --init-noise=0); with it, their noise may be 0.

        Args:
            images: the noisy images or measurements, of one size.
            level: their noise, a deviation in the data's units, such as 40 of 255.
            sigma: the same in the network's scale.
            measure: 'denoise', 'inpaint' or 'downsample:K', see docs/restoration.md.
            mask: of 'inpaint': an array, picture or file, white or not 0 where pixels are known.
            seeds: one for each result; seed k restores image k mod n of n. None is one for each.
            steps: see `sample`.
            solver: likewise.
            options: likewise.

        Raises:
            ValueError, OSError, TypeError: as for `sample`.
        """
        if measure is None:
            how = {"init_noise": 0, "init_level": level, "init_sigma": sigma, "mask": mask}
        else:
            how = {"measure": measure, "measure_level": level, "measure_sigma": sigma, "mask": mask}
        return self.sample(seeds, steps, solver, **{"init_image": images, **how, **options})

    def encode(self, images: _Images, steps: int | None = None, solver: str | None = None, *,
               batch: int = 64, **options: Any) -> Latents:
        """Returns the latents from which `sample(latents=...)` comes back to these images.

        Args:
            images: of the network's size. A network with classes needs their labels: those of the
                data set, `labels` or `class_idx`.
            steps: more of them bring images back better; see `sample`.
            solver: see `sample`.
            batch: likewise.
            options: likewise.

        Raises:
            ValueError, OSError, TypeError: as for `sample`.
        """
        sampler = self._sampler(steps=steps, solver=solver, encode=images, **options)
        numbers = range(len(sampler.encoded))
        parts = distributed.split_for_rank(numbers, _positive(batch))
        return joined([(part, sampler.encode(part)) for part in parts], numbers)

    def likelihood(self, images: _Images, labels: Any = None, *, count: int | None = None,
                   steps: int = 32, batch: int = 16, seed: int = 0, **options: Any) -> Measured:
        """Returns how likely images are, as likelihood.py: `mean`, `stderr`, `unit`, `values`.

        Args:
            images: whole numbers for bits/dim.
            labels: of images in memory, if the network takes them; a data set has its own.
            count: how many to measure, chosen by the seed; None is all that are in memory, and 64
                of a data set.
            steps: of the Runge-Kutta method, an even number.
            batch: the most images at a time.
            seed: of the choice of images, the noise and the random vectors.
            options: `probes`, `exact`, `dequantize`, `cond`, as the flags of likelihood.py.

        Raises:
            ValueError, OSError, TypeError: as for `sample`.
        """
        _check_names(options, NetworkLikelihood.open, "likelihood")
        data = given_images(_values(images), as_numpy(labels))
        if count is None:
            count = len(data) if isinstance(data, GivenImages) else _NUM_MEASURED
        measure = NetworkLikelihood.open(
            self.file, self.device, steps=steps, seed=seed, precision=self.precision,
            built=(self.content, self.net), **options)
        return measure.measure(LikelihoodData(data, measure, count, seed), _positive(batch))

    def score(self, ref: _Images = None, *, metrics: str | Sequence[str] = "fid",
              detector: str = "inception", seeds: _Seeds = _NUM_SCORED, batch: int = 64,
              workers: int = 0, **options: Any) -> dict[str, float]:
        """Returns the scores of `fid.py gen` for the same settings, by the names that it records.

        Only of Inception's features a distance is called fid, else frechet_distance.

        Args:
            ref: reference statistics or the data set; not needed by 'is', 'ca', and other metrics
                with needs_reference=False.
            metrics: 'fid', 'kid', 'pr', 'dc', 'is', 'ca': one, several with commas, or a list.
            detector: what makes features of images, as --detector of fid.py.
            seeds: one for each image.
            batch: the most images at a time.
            workers: processes that read the images of a data set ahead.
            options: `steps`, `solver` and those of `sample`.

        Raises:
            ValueError, OSError, TypeError: as for `sample`.
        """
        names = _metric_names(metrics, ref)
        sampler = self._sampler(**options)
        numbers = _numbers(seeds, _NUM_SCORED)
        if len(numbers) < 2:
            raise ValueError(f"seeds: {len(numbers)} image, at least 2 needed")
        sampler.check_seeds(numbers)
        asked = None
        if asking := metrics_that_need("hits", names):
            if sampler.label_kind != "classes":
                raise ValueError(f"metrics={asking[0]}: {self.file.source} has no classes; "
                                 f"leave {asking[0]} out")
            asked = sampler.classes(numbers)
        configure_backends("fp32")
        evaluator = open_evaluator(detector, _given(ref), names, self.device,
                                   {self.file.source: sampler}, batch=_positive(batch),
                                   workers=workers)
        if asked is not None:
            check_asked(evaluator.detector, self.net.label_dim, self.file.source)
        warn_if_few(len(numbers), evaluator.detector.name, names, evaluator.reference_count)
        configure_backends(self.precision)
        try:
            found = network_features(sampler, numbers, evaluator.detector, metrics=names,
                                     batch=batch, title="Scoring", asked=asked)
        finally:
            configure_backends("fp32")
        return {recorded_name(name, evaluator.detector.name): value
                for name, value in evaluator.evaluate(found).items()}

    def _sampler(self, **options: Any) -> NetworkSampler:
        """Returns the network with settings that have been checked, by the names of the flags."""
        named = {_FLAGS.get(name, name): value for name, value in options.items()}
        _check_names(named, NetworkSampler.open, "sample", SamplerConfig)
        named = {name: value for name, value in named.items() if value is not None}
        for name in _IN_MEMORY.keys() & named.keys():
            named[name] = _IN_MEMORY[name](named[name])
        if isinstance(named.get("mask"), (str, os.PathLike)) and named.get("measure") == "inpaint":
            named["measure"] = f"inpaint:{os.fspath(named.pop('mask'))}"  # as the flag has it
        is_own = {"bits", "compiled"} & named.keys()  # these change the network itself
        return NetworkSampler.open(self.file, self.device, precision=self.precision,
                                   built=None if is_own else (self.content, self.net), **named)


def _device(device: str | torch.device) -> torch.device:
    """Returns the device of this name; raises ValueError if there is none."""
    try:
        place = distributed.choose_device(str(device))
    except RuntimeError:
        raise ValueError(f"device={str(device)!r}: must be 'cpu', 'cuda', 'cuda:N' or 'auto'"
                         ) from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r}: there are {torch.cuda.device_count()} GPUs, "
                         "numbered from 0; name one of these")
    return place


def _numbers(seeds: _Seeds, default: int) -> list[int]:
    """Returns seeds as a list; raises ValueError for none, TypeError for what are no integers."""
    seeds = default if seeds is None else as_numpy(seeds)
    try:
        count = operator.index(seeds)
    except TypeError:
        found = [operator.index(seed) for seed in seeds]
    else:
        found = list(range(count))
    if not found:
        raise ValueError(f"seeds={seeds}: names none; give a number of images, 1 or more, or seeds "
                         "such as range(16)")
    return found


def _positive(batch: int) -> int:
    if batch < 1:
        raise ValueError(f"batch={batch}: must be 1 or more")
    return batch


def _values(images: _Images) -> _Images:
    """Returns the images of samples in the units of their data; all else as it is."""
    return images.data() if isinstance(images, Samples) else images


def _labels(labels: Any) -> Any:
    """Returns labels in memory as lists, of which errors show one line; a path as it is."""
    labels = as_numpy(labels)
    return labels.tolist() if isinstance(labels, np.ndarray) else labels


def _file(network: Any) -> Any:
    """Returns the file of a model; all else as it is."""
    return network.file if isinstance(network, Model) else network


def _given(images: _Images) -> _Images:
    return given_images(_values(images))


# How options become what `NetworkSampler.open` takes, where they may be in memory.
_IN_MEMORY = {"init_image": _given, "cond_image": _given, "encode": _given, "mask": as_numpy,
              "label_source": _labels, "gnet": _file}


def _metric_names(metrics: str | Sequence[str], ref: _Images) -> tuple[str, ...]:
    """Returns the names of metrics; raises ValueError for others, or without their reference."""
    names = tuple(dict.fromkeys(metrics.split(",") if isinstance(metrics, str) else metrics))
    if not names or not set(names) <= set(METRICS):
        raise ValueError(f"metrics={','.join(names)}: must be of {', '.join(METRICS)}")
    comparing = metrics_that_compare(names)
    if ref is None and comparing:
        raise ValueError(f"ref: {', '.join(comparing)} needs reference statistics or the data set")
    return names


def _check_names(options: dict[str, Any], function: Any, method: str, config: type | None = None
                 ) -> None:
    """Raises TypeError for options that neither a function nor a dataclass of settings takes."""
    names = {parameter.name for parameter in inspect.signature(function).parameters.values()
             if parameter.kind is not inspect.Parameter.VAR_KEYWORD} - set(_OF_NETWORK)
    names |= {field.name for field in dataclasses.fields(config)} | set(_FLAGS) if config else set()
    for name in options:
        if name in _OF_NETWORK:
            raise TypeError(f"{method}() takes no {name!r}; give it to pfgmpp.load")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{method}() has no option {name!r}{hint}")


def _refuse_lost(samples: Samples) -> None:
    """Raises ValueError for images whose values are not finite."""
    finite = samples.images.isfinite().flatten(1).all(dim=1).tolist()
    lost = [seed for seed, is_finite in zip(samples.seeds, finite, strict=True) if not is_finite]
    if lost:
        more = ", ..." if len(lost) > _MAX_NAMED else ""
        raise ValueError(f"{len(lost)} of {len(samples)} images have values that are not finite: "
                         f"seeds {format_ranges(lost[:_MAX_NAMED])}{more}; the network may have "
                         "diverged, or its precision may be too low for it")
