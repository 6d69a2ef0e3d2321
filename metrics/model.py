"""The Python interface to a trained network, `pfgmpp.load`: sampling, likelihoods and scores.

It passes the scripts' settings to the classes that the scripts use, so results are the same:
`sample` returns the images of generate.py, `likelihood` the values of likelihood.py, and `score`
those of `fid.py gen`. It is in this package because it needs both the sampler and the scores.
"""

import contextlib
import dataclasses
import difflib
import inspect
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np
import torch

from checkpoints.names import find_network
from dnnlib.progress import Progress
from dnnlib.util import format_ranges, shown
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
_NUM_SEEDS = 16  # seeds that are sampled by default
_NUM_SCORED = 50_000  # images of a score, as in papers
_NUM_MEASURED = 64  # images of a data set whose likelihood is measured by default
_MAX_NAMED = 6  # seeds in a message
# Flags of generate.py whose keywords of `NetworkSampler.open` have other names.
_FLAGS = {"steps": "num_steps", "alpha": "noise_alpha", "disc": "discretization",
          "labels": "label_source", "compile": "compiled"}
_OF_LABELS = ("class_idx", "label_source")  # options of `sample` for which others have `labels`
_OF_NETWORK = ("source", "device", "key", "pfgmpp", "aug_dim", "precision", "built")  # of `load`
_SEED_RANGE = 1 << 32  # beyond it, seeds repeat
_Images = Any  # a data set's path, or images in memory, see images/given_images.py
_Seeds = int | Iterable[int] | None


def load(source: str | os.PathLike, device: str | torch.device = "auto", *,
         key: str | None = None, pfgmpp: bool | None = None, aug_dim: float | None = None,
         precision: str = "fp32") -> "Model":
    """Returns a trained network, ready to use; no code in the file is run.

    Args:
        source: a snapshot, a training state, a published file, or the address of one. For a run
            directory, the newest network is loaded.
        device: 'cpu', 'cuda', 'cuda:1', or 'auto' for a GPU if there is one.
        key: which network to load from a file that holds several, see `checkpoint.load`.
        pfgmpp: whether a file that does not record D is of PFGM++, see `checkpoint.resolve_D`.
        aug_dim: the D of a file that does not record it, see `checkpoint.resolve_D`.
        precision: arithmetic inside the network: 'fp32', 'tf32', 'bf16' or 'fp16'.

    Raises:
        OSError: `source` can't be read.
        ValueError: it holds no network, or an argument does not match it.
        TypeError: an argument is of the wrong type.
    """
    source = _path("source", source, "the path or address of a network")
    aug_dim = None if aug_dim is None else _number("aug_dim", aug_dim)
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}")
    place = _device(device)
    file = NetworkFile.read(distributed.run_on_rank0(find_network, source), key)
    configure_backends(precision)
    content, net = open_network(file, device=place, pfgmpp=pfgmpp, aug_dim=aug_dim,
                                precision=precision, compiled=False)
    return Model(file, content, net, place, precision,
                 recorded_scaling(content, file.source, "scale", net.img_channels))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Model:
    """A trained network on a device; made by `load`.

    Seeds are a number n, which stands for the seeds 0 to n - 1, or any integers. Images are the
    path of a data set, or pictures, arrays or tensors (see images/given_images.py). They are 8-bit,
    or floats in the units of the network's data. Floats for a network of 8-bit images are in
    [-1, 1].

    `options` are the flags of generate.py with _ in place of -, such as `S_churn=40` or
    `guidance=2`, except that --class is `class_idx`. Errors name the flags.

    Attributes:
        net: the averaged network, a denoiser (x, sigma, class_labels) of images in about [-1, 1].
        device: the device of the network.
        precision: its arithmetic.
        scaling: the map from the units of its data to [-1, 1] and back.
    """

    file: NetworkFile
    content: dict[str, Any]
    net: Precond
    device: torch.device
    precision: str
    scaling: Scaling

    @property
    def D(self) -> float:
        """The number of augmented dimensions, inf for diffusion."""
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
        """The standard deviation of data that the preconditioner assumes; None if it has none."""
        return getattr(self.net, "sigma_data", None)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 without labels, and if labels are vectors."""
        return self.net.label_dim if recorded_label_kind(self.content) == "classes" else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; () if they have none."""
        return recorded_class_names(self.content)

    @property
    def is_few_step(self) -> bool:
        """Whether it makes images in a few evaluations, instead of being a denoiser."""
        return self.net.few_step is not None

    @property
    def kimg(self) -> float | None:
        """Thousands of images that it was trained on; None if the file does not record it."""
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
        """Returns the images that generate.py makes from the same seeds and settings.

        Args:
            seeds: one for each image; None means 16, or one for each given image or latent.
            steps: number of noise levels; None means 18, or a few-step network's own number.
            solver: None means Heun's method, or 'consistency' for few-step networks.
            class_idx: a class number or name, 'uniform' or 'data'. For one class per seed, give
                `labels`.
            batch: the maximum number of images at a time.
            options: see `Model`. The images `init_image` and `cond_image` may be in memory, and so
                may the `labels` of the seeds and the `latents` that `encode` returns.

        Raises:
            ValueError: a setting is not allowed, or an image has values that are not finite.
            OSError: a file can't be read.
            TypeError: there is no such option, or a value is of the wrong type.
        """
        return self._sample("sample", seeds, batch, steps=steps, solver=solver,
                            class_idx=class_idx, **options)

    def _sample(self, method: str, seeds: _Seeds, batch: int = 64, **options: Any) -> Samples:
        """Returns the images of `sample`; errors name the method."""
        batch = _at_least(1, "batch", batch)
        sampler = self._sampler(method, **options)
        own = sampler.latents if sampler.latents is not None else sampler.inputs
        numbers = _numbers(seeds, _NUM_SEEDS if own is None else len(own))
        sampler.check_seeds(numbers)
        sampler.image_shape  # noqa: B018 - refuses images of several sizes
        done = []
        with Progress(len(numbers), "Sampling", delay=1) as progress:
            for found in sampler.images(sampler.batches(numbers, batch), most=batch):
                done.append(found)
                progress.update(len(found.seeds))
        samples = Samples.of_batches(done, self.scaling, class_names=sampler.class_names,
                                     have_classes=sampler.label_kind == "classes")
        _refuse_lost(samples)
        return samples

    def restore(self, images: _Images, *, level: float | None = None, sigma: float | None = None,
                measure: str | None = None, mask: Any = None, seeds: _Seeds = None,
                steps: int | None = None, solver: str | None = None, **options: Any) -> Samples:
        """Returns images restored from noisy images or from measurements.

        Without `measure`, sampling starts at the images themselves (--init-image --init-noise=0),
        and `level` or `sigma` must be about their noise. With `measure`, the noise may be 0.

        Args:
            images: the noisy images or measurements, of one size.
            level: standard deviation of their noise in the data's units, such as 40 of 255.
            sigma: the same in the network's scale.
            measure: 'denoise', 'inpaint' or 'downsample:K', see docs/restoration.md.
            mask: for 'inpaint', an array, picture or file that is white or not 0 where pixels are
                known.
            seeds: one for each result; seed k restores image k mod n of n. None means one for each
                image.
            steps: see `sample`.
            solver: see `sample`.
            options: see `sample`.

        Raises:
            ValueError, OSError, TypeError: as for `sample`.
        """
        images = _values(images)
        level, sigma = (None if value is None else _number(name, value)
                        for name, value in (("level", level), ("sigma", sigma)))
        if measure is None:
            how = {"init_noise": 0, "init_level": level, "init_sigma": sigma, "mask": mask}
        else:
            how = {"measure": measure, "measure_level": level, "measure_sigma": sigma, "mask": mask}
        how = {"init_image": images, "steps": steps, "solver": solver, **how, **options}
        return self._sample("restore", seeds, **how)

    def encode(self, images: _Images, steps: int | None = None, solver: str | None = None, *,
               batch: int = 64, **options: Any) -> Latents:
        """Returns the latents from which `sample(latents=...)` reproduces these images.

        Args:
            images: images of the network's size. A network with classes needs their labels: those
                of the data set, `labels` or `class_idx`.
            steps: more steps reproduce the images more accurately; see `sample`.
            solver: see `sample`.
            batch: see `sample`.
            options: see `sample`.

        Raises:
            ValueError, OSError, TypeError: as for `sample`.
        """
        batch = _at_least(1, "batch", batch)
        sampler = self._sampler("encode", steps=steps, solver=solver, encode=_values(images),
                                **options)
        numbers = range(len(sampler.encoded))
        parts = distributed.split_for_rank(numbers, batch)
        return joined([(part, sampler.encode(part)) for part in parts], numbers)

    def likelihood(self, images: _Images, labels: Any = None, *, count: int | None = None,
                   steps: int = 32, batch: int = 16, seed: int = 0, **options: Any) -> Measured:
        """Returns the likelihood of images, as likelihood.py: `mean`, `stderr`, `unit`, `values`.

        Args:
            images: the images; bits/dim need integer values.
            labels: labels of images in memory, if the network takes them; a data set has its own.
            count: how many images to measure, chosen by the seed. None means all images in memory,
                or 64 images of a data set.
            steps: number of steps of the Runge-Kutta method, which must be even.
            batch: the maximum number of images at a time.
            seed: seed of the choice of images, the noise and the random vectors.
            options: `probes`, `exact`, `dequantize`, `cond`, as the flags of likelihood.py.

        Raises:
            ValueError, OSError, TypeError: as for `sample`.
        """
        options = _checked(options | {"steps": steps, "seed": _at_least(0, "seed", seed)},
                           "likelihood", NetworkLikelihood.open)
        batch = _at_least(1, "batch", batch)
        data = given_images(_values(images), as_numpy(labels), self._scale)
        if count is None:
            count = len(data) if isinstance(data, GivenImages) else _NUM_MEASURED
        count = _at_least(1, "count", count)
        measure = NetworkLikelihood.open(self.file, self.device, precision=self.precision,
                                         built=(self.content, self.net), **options)
        return measure.measure(LikelihoodData(data, measure, count, options["seed"]), batch)

    def score(self, ref: _Images = None, *, metrics: str | Sequence[str] = "fid",
              detector: str = "inception", seeds: _Seeds = _NUM_SCORED, batch: int = 64,
              workers: int = 0, **options: Any) -> dict[str, float]:
        """Returns the scores of `fid.py gen` for the same settings, by the names that it records.

        The distance is called fid for Inception's features, and frechet_distance for others.

        Args:
            ref: reference statistics or the data set. 'is', 'ca' and other metrics with
                needs_reference=False do not need it.
            metrics: 'fid', 'kid', 'pr', 'dc', 'is', 'ca': one, several with commas, or a list.
            detector: the detector, as --detector of fid.py.
            seeds: one for each image.
            batch: the maximum number of images at a time.
            workers: processes that read the images of a data set ahead.
            options: `steps`, `solver` and the options of `sample`.

        Raises:
            ValueError, OSError, TypeError: as for `sample`.
        """
        names = _metric_names(metrics, ref)
        detector = _path("detector", detector, "a name such as 'inception', or a path")
        batch, workers = _at_least(1, "batch", batch), _at_least(0, "workers", workers)
        sampler = self._sampler("score", **options)
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
        evaluator = open_evaluator(
            detector, None if ref is None else _given(ref, self._scale), names, self.device,
            {self.file.source: sampler}, batch=batch, workers=workers)
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

    @property
    def _scale(self) -> dict[str, Any] | None:
        """The scale of images in the units of the data, as `dataset.json` has it."""
        return None if self.scaling.is_8bit else self.scaling.to_dict()

    def _sampler(self, method: str, **options: Any) -> NetworkSampler:
        """Returns the sampler of the network, after checking the options of a method."""
        for flag, name in _FLAGS.items():
            if options.get(flag) is not None and options.get(name) is not None:
                raise TypeError(f"{flag} and {name} mean the same; give one of them")
        given = {name: value for name, value in options.items() if value is not None}
        given = _checked(given, method, NetworkSampler.open, SamplerConfig)
        named = {_FLAGS.get(name, name): value for name, value in given.items()}
        for name in _IN_MEMORY.keys() & named.keys():
            named[name] = _IN_MEMORY[name](named[name])
        if isinstance(named.get("mask"), (str, os.PathLike)) and named.get("measure") == "inpaint":
            named["measure"] = f"inpaint:{os.fspath(named.pop('mask'))}"  # the flag's syntax
        is_own = {"bits", "compiled"} & named.keys()  # these change the network itself
        return NetworkSampler.open(self.file, self.device, precision=self.precision,
                                   built=None if is_own else (self.content, self.net), **named)


def _device(device: str | torch.device) -> torch.device:
    """Returns the device of this name; raises ValueError if there is none."""
    try:
        place = distributed.choose_device(str(device))
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}: must be 'cpu', 'cuda', 'cuda:N' or 'auto'")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r}: there are {torch.cuda.device_count()} GPUs, "
                         "numbered from 0; give one of these")
    return place


def _numbers(seeds: _Seeds, default: int) -> list[int]:
    """Returns seeds as a list.

    Raises:
        ValueError: there are none, or one is out of range.
        TypeError: they are not whole numbers.
    """
    seeds = default if seeds is None else as_numpy(seeds)
    try:
        count = operator.index(seeds)
    except TypeError:
        try:
            found = [operator.index(seed) for seed in seeds]
        except TypeError:
            raise TypeError(f"seeds={seeds!r}: must be a number of images or whole numbers, such "
                            "as range(16)") from None
    else:
        if count > _SEED_RANGE:
            raise ValueError(f"seeds={count}: there are only {_SEED_RANGE} seeds; give fewer")
        found = list(range(count))
    if not found:
        raise ValueError(f"seeds={seeds}: there are no seeds; give a number of images, 1 or more, "
                         "or seeds such as range(16)")
    for seed in min(found), max(found):
        if not 0 <= seed < _SEED_RANGE:
            raise ValueError(f"seeds: {seed} is not a seed; must be 0 to {_SEED_RANGE - 1}")
    return found


def _number(name: str, value: Any) -> float:
    """Returns a number, also from an array or tensor of one. Raises TypeError for anything else."""
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, (str, bytes)):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return float(value)
    raise TypeError(f"{name}={shown(value)}: must be a number")


def _whole(name: str, value: Any) -> int:
    """Returns a whole number of any integer type. Raises TypeError for anything else."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool):
            return operator.index(value)
    raise TypeError(f"{name}={shown(value)}: must be a whole number")


def _at_least(lowest: int, name: str, value: Any) -> int:
    """Returns a whole number. Raises TypeError for anything else, ValueError if it is too low."""
    found = _whole(name, value)
    if found < lowest:
        raise ValueError(f"{name}={found}: must be {lowest} or more")
    return found


def _path(name: str, value: Any, allowed: str) -> str:
    """Returns a path as text. Raises TypeError for anything else; `allowed` says what it may be."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}={shown(value)}: must be {allowed}")
    return os.fspath(value)


def _values(images: _Images) -> _Images:
    """Returns the images of `Samples` in the units of their data; other images unchanged."""
    if images is None:
        raise ValueError("images=None: must be the path of a data set, pictures, arrays or tensors")
    return images.data() if isinstance(images, Samples) else images


def _labels(labels: Any) -> Any:
    """Returns labels in memory as lists, which errors show in one line; a path unchanged."""
    labels = as_numpy(labels)
    return labels.tolist() if isinstance(labels, np.ndarray) else labels


def _file(network: Any) -> Any:
    """Returns the file of a `Model`, or a path."""
    if isinstance(network, Model):
        return network.file
    return _path("gnet", network, "a Model, or the path or address of a network")


def _latents(latents: Any) -> Any:
    """Returns `Latents` unchanged, or a path."""
    return latents if isinstance(latents, Latents) else _path(
        "latents", latents, "what encode() has returned, or the path of a file of latents")


def _given(images: _Images, scale: dict[str, Any] | None = None) -> _Images:
    return given_images(_values(images), scale=scale)


# How options that may be in memory are converted for `NetworkSampler.open`.
_IN_MEMORY = {"init_image": _given, "cond_image": _given, "encode": _given, "mask": as_numpy,
              "label_source": _labels, "gnet": _file, "latents": _latents}


def _metric_names(metrics: str | Sequence[str], ref: _Images) -> tuple[str, ...]:
    """Returns the names of metrics; raises ValueError if one is unknown or lacks its reference."""
    try:
        names = tuple(dict.fromkeys(metrics.split(",") if isinstance(metrics, str) else metrics))
    except TypeError:
        names = (shown(metrics),)
    if not names or not set(names) <= set(METRICS):
        raise ValueError(f"metrics={','.join(map(str, names))}: must be among {', '.join(METRICS)}")
    comparing = metrics_that_compare(names)
    if ref is None and comparing:
        raise ValueError(f"ref: {', '.join(comparing)} needs a reference; give reference "
                         "statistics or the data set")
    return names


def _checked(options: dict[str, Any], method: str, *functions: Any) -> dict[str, Any]:
    """Returns the options of a method, with numbers as plain int or float.

    Raises:
        TypeError: none of `functions` takes an option, or it is not a number but must be one.
    """
    kinds = {parameter.name: parameter.annotation for function in functions
             for parameter in inspect.signature(function).parameters.values()
             if parameter.kind is not inspect.Parameter.VAR_KEYWORD}
    for name in _OF_NETWORK:
        kinds.pop(name, None)
    kinds |= {flag: kinds[name] for flag, name in _FLAGS.items() if name in kinds}
    found = dict(options)
    for name, value in options.items():
        if name in _OF_NETWORK:
            raise TypeError(f"{method}() takes no {name!r}; give it to pfgmpp.load")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            if name in _OF_LABELS:
                hint = "; give labels, one for each image"
            raise TypeError(f"{method}() has no option {name!r}{hint}")
        kind = set(get_args(kinds[name]) or [kinds[name]]) - {type(None)}
        if value is not None and kind in ({int}, {float}):
            found[name] = (_whole if kind == {int} else _number)(name, value)
    return found


def _refuse_lost(samples: Samples) -> None:
    """Raises ValueError for images whose values are not finite."""
    finite = samples.images.isfinite().flatten(1).all(dim=1).tolist()
    lost = [seed for seed, is_finite in zip(samples.seeds, finite, strict=True) if not is_finite]
    if lost:
        more = ", ..." if len(lost) > _MAX_NAMED else ""
        raise ValueError(f"{len(lost)} of {len(samples)} images have values that are not finite: "
                         f"seeds {format_ranges(lost[:_MAX_NAMED])}{more}; the network may have "
                         "diverged, or its precision may be too low for it")
