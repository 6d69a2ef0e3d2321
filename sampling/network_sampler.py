"""Sampling from a trained network: reads its file, checks the settings, makes the images."""

import contextlib
import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from checkpoints import checkpoint
from checkpoints.checkpoint import highest_level
from checkpoints.names import find_network
from dnnlib import console
from dnnlib.cli import flag_errors
from dnnlib.registry import origin_record
from dnnlib.util import format_ranges, json_value
from images.dataset import ImageFolderDataset
from images.given_images import GivenImages
from images.image_files import error_prefix
from images.scaling import EIGHT_BIT, Scaling
from pfgmpp.few_steps import FewStep
from pfgmpp.guidance import EVERYWHERE, GuidedDenoiser, guided
from pfgmpp.networks import MODELS, PRECONDS, Precond
from pfgmpp.samplers import (
    CONSISTENCY,
    ImagesOfSeeds,
    SampleBatch,
    SamplerConfig,
    draw_latents,
    encode,
    generate_images,
    trajectory,
)
from pfgmpp.schedules import default_range
from pfgmpp.sizes import TiledDenoiser, size_multiple
from pfgmpp.solvers import MULTISTEP, SOLVERS
from sampling.labels import (
    DrawnClasses,
    GivenLabels,
    SeedLabels,
    classes_with_images,
    read_labels,
)
from sampling.latents import Latents, check_lengths, read_latents
from sampling.quantization import quantise_
from sampling.restoration import (
    Measurement,
    open_measurement,
    shown_level,
    sigma_of_level,
)
from sampling.seed_images import (
    CONDITIONS_WORD,
    SeedImages,
    UsageError,
    check_pairs,
    open_conditions,
    open_inits,
)
from sampling.sweeps import FULL_BITS
from torch_utils import distributed
from torch_utils.misc import compile_network, compute_dtype, configure_backends

_FLAGS = {"noise_alpha": "--alpha", "num_steps": "--steps", "discretization": "--disc",
          "stop_sigma": "--stop-sigma", "init_noise": "--init-noise",
          **{name: f"--{name}" for name in ("solver", "order", "schedule", "scaling", "S_churn",
                                            "S_noise", "sigma_min", "sigma_max", "rho", "sigmas",
                                            "last", "blend")}}
# Settings that are recorded only if they are used, since older records lack them.
_UNUSED = {"noise_alpha": 0, "order": None, "sigmas": None, "last": None, "stop_sigma": None,
           "init_noise": 1, "blend": 1}
_REMEDY = "name a data set, a folder or ZIP of images"
_LOST_SIGMAS = 5  # multiple of sigma_data at which noise leaves little of an image
_MAX_CLASS_NAMES = 8  # in a message
_Images = str | GivenImages  # a folder or ZIP, or images in memory
_OpenNetwork = Callable[..., tuple[dict[str, Any], Precond]]


@dataclasses.dataclass(frozen=True)
class NetworkFile:
    """A network's file, read once for any number of samplers.

    Under torchrun, every rank holds a copy.
    """

    source: str  # its path or address
    content: dict[str, Any]  # the parts that sampling needs
    digest: str  # hash of the sampled weights

    @classmethod
    def read(cls, source: "str | NetworkFile", key: str | None = None) -> "NetworkFile":
        """Returns the file. A file that has been read already is returned unchanged.

        Args:
            source: a path or address. In a run directory, the newest network is used.
            key: which network of a file that holds several, see `checkpoint.load`.

        Raises:
            OSError: the file can't be read.
            ValueError: it does not hold a network.
        """
        if isinstance(source, NetworkFile):
            return source
        content = distributed.run_on_rank0(load_network, source, key)
        return cls(source, content, checkpoint.digest(checkpoint.sampling_weights(content)))


@dataclasses.dataclass(frozen=True)
class NetworkSampler:
    """A network with sampler settings that have been checked against it."""

    net: Precond | GuidedDenoiser | TiledDenoiser  # averaged weights, on `device`, evaluation mode
    sampler: SamplerConfig
    device: torch.device
    class_idx: int | None  # the class to sample; None if the seeds draw it
    settings: dict[str, Any]  # everything but the seed that affects an image; plain JSON data
    conditions: ImagesOfSeeds | None = None  # None for a network without condition images
    inits: SeedImages | None = None  # images from which sampling starts; None for pure noise
    scaling: Scaling = EIGHT_BIT  # of the data that the network was trained on
    one_size: bool = False  # pad short batches, so that the network sees only one size
    labels: SeedLabels | None = None  # labels by seed, unless they are classes that seeds draw
    label_kind: str | None = None  # 'classes' or 'vectors'; None without labels
    class_names: tuple[str, ...] = ()  # names of the classes, if they have any
    latents: Latents | None = None  # latents by seed, instead of those that the seeds draw
    encoded: SeedImages | None = None  # images whose latents are to be found
    inputs: SeedImages | None = None  # images that give the results their sizes and names
    measurement: Measurement | None = None  # set if `inits` are measurements of the images
    average: int = 1  # number of samples per input whose mean is the image

    @classmethod
    def open(cls, source: str | NetworkFile, device: torch.device, *,
             class_idx: int | str | None = None,
             label_source: str | Sequence | None = None,
             pfgmpp: bool | None = None, aug_dim: float | None = None, precision: str = "fp32",
             bits: int = FULL_BITS, rounding_seed: int | None = None,
             guidance: float = 1.0, gnet: str | NetworkFile | None = None,
             guidance_interval: tuple[float, float] | None = None,
             cond_image: _Images | None = None,
             init_image: _Images | None = None, init_sigma: float | None = None,
             init_level: float | None = None, average: int | None = None, tile: int | None = None,
             measure: str | None = None, measure_sigma: float | None = None,
             measure_level: float | None = None, measure_by: str | None = None,
             mask: np.ndarray | PIL.Image.Image | None = None,
             latents: str | Latents | None = None, encode: _Images | None = None,
             key: str | None = None, compiled: bool = False,
             built: tuple[dict[str, Any], Precond] | None = None, **sampler_options: Any
             ) -> "NetworkSampler":
        """Returns the network of a snapshot or training state, ready to sample.

        Args:
            source: a path, an address, or a file that has been read. In a run directory, the newest
                network is used.
            device: where to sample.
            class_idx: the class to sample; 'data' for classes as often as in the data; None or
                'uniform' for all classes that have images, equally often.
            label_source: a file, data set or list of labels by seed, see `labels.read_labels`.
            pfgmpp: for files that do not record D, see `checkpoint.resolve_D`.
            aug_dim: for files that do not record D, see `checkpoint.resolve_D`.
            precision: precision of the network's arithmetic. PyTorch's settings for TF32 and for
                sums in half precision are changed accordingly for the whole process.
            bits: number of bits to round the weights to, see sampling/quantization.py.
            rounding_seed: rounds at random with this seed; None rounds to the nearest level. With
                32 bits nothing is rounded, and the seed is not recorded.
            guidance: strength of guidance, see pfgmpp/guidance.py; 1 is none.
            gnet: the guide, given like `source`; None is the network without its labels.
            guidance_interval: noise levels (lo, hi] at which to guide; None guides everywhere.
            cond_image: folder or ZIP of condition images, or images in memory, see `SeedImages`.
            init_image: folder or ZIP of images to start from, or images in memory.
            init_sigma: noise level at which to start from them.
            init_level: the same in the data's own units.
            average: make each image the mean of this many samples. Those of input k of n have the
                seeds k, k + n, k + 2n, ...
            tile: run the network on square tiles of this side, see pfgmpp/sizes.py.
            measure: how `init_image` measures the images, see sampling/restoration.py.
            measure_sigma: noise of the measurement, in the network's scale.
            measure_level: the same in the data's own units.
            measure_by: how the measurement is used, see pfgmpp/measurement.py.
            mask: mask for measure='inpaint', instead of the file in 'inpaint:MASK'.
            latents: latents by seed, or a file of them, see `latents.read_latents`. Seeds get their
                labels unless others are given. Their numbers select condition images.
            encode: images for `encode`, with their labels: a folder or ZIP, or images in memory.
            key: which network of a file that holds several, see `checkpoint.load`.
            compiled: compile the network and pad all batches to one size.
            built: what `open_network` returned for the file at this precision, not compiled. None
                calls it. Rounding changes its weights.
            sampler_options: fields of `SamplerConfig`.

        Raises:
            ValueError: the file or a setting does not fit.
            UsageError: a flag does not fit the network or the other flags.
            OSError: a file can't be read.
        """
        if precision == "fp16" and device.type != "cuda":
            distributed.print0("Note: fp16 needs a GPU; on the CPU the network runs in fp32")
        configure_backends(precision)
        open_one = functools.partial(open_network, device=device, pfgmpp=pfgmpp, aug_dim=aug_dim,
                                     precision=precision, compiled=compiled)
        file = NetworkFile.read(source, key)
        source = file.source
        content, net = open_one(file) if built is None else built
        quantise_(net, bits, rounding_seed)
        scaling = recorded_scaling(content, source, "scale", net.img_channels)
        init_sigma, level_flag = _first_level(init_sigma, init_level, scaling)
        _check_starts(sampler_options, init_image, init_sigma, level_flag, measure)
        try:
            sampler = _sampler_config(content, source, sampler_options, init_image, init_sigma,
                                      level_flag)
            sampler.check_solver()
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(_in_flags(error)) from error
        _check_is_denoiser(net, source, encode, measure)
        kind = recorded_label_kind(content)
        _check_begins({"--encode": encode, "--latents": latents, "--init-image": init_image})
        starts = None
        if latents is not None:
            shown = "given latents" if isinstance(latents, Latents) else latents
            with flag_errors("--latents", shown, "name a file that --encode has written"):
                starts = distributed.run_on_rank0(read_latents, latents, net.image_shape)
                check_lengths(starts, net.D)
        if encode is not None:
            _check_encoding(sampler)
            if kind is not None and class_idx is None and label_source is None:
                label_source = distributed.run_on_rank0(_labelled, encode)
        if kind == "classes":
            class_idx = _class_choice(class_idx, net.label_dim, recorded_class_names(content))
        labels, of_labels = _choose_labels(net, source, content, kind, class_idx, label_source,
                                           starts)
        class_idx = class_idx if isinstance(class_idx, int) else None
        settings = {"weights": file.digest, "network": checkpoint.digest(net.config)[:16],
                    "class": class_idx, "precision": precision, "device": device.type, "D": net.D,
                    **_recorded_sampler(sampler, net),
                    **_recorded_rounding(bits, rounding_seed),
                    **plugin_record(net), **origin_record((SOLVERS, sampler.solver),
                                                          (MULTISTEP, sampler.solver)),
                    **({"compile": True} if compiled else {})}
        _warn_of_init_sigma(net, init_sigma, scaling)
        denoiser, extra = _with_guidance(net, source, guidance, gnet, guidance_interval,
                                         open_one, scaling, kind)
        _check_lowest(sampler, init_sigma, level_flag, scaling)
        try:
            sampler.check(denoiser)
        except ValueError as error:
            text = _in_flags(error)
            if init_sigma is not None:  # the start is the highest level
                text = text.replace("--sigma_max=", f"{level_flag} is --init-sigma="
                                    if init_level is not None else "--init-sigma=")
            raise ValueError(text) from error
        if tile is not None:
            try:
                denoiser = TiledDenoiser(denoiser, tile)
            except ValueError as error:
                raise UsageError(f"--{error}") from error
            extra["tile"] = tile
        extra |= {} if scaling.is_8bit else {"scale": scaling.to_dict()}
        conditions, inits = _open_inputs(net, source, content, init_image, cond_image, scaling)
        for name, images in (("cond_image", conditions), ("init_image", inits)):
            extra |= {name: images.fingerprint} if images else {}
        if inits is not None and inits.are_conditions:
            extra["init_of"] = "conditions"  # of the data set that has the fingerprint
        measurement = open_measurement(measure, measure_sigma, measure_level, measure_by,
                                       net.img_channels, scaling, starts=init_sigma is not None
                                       or sampler.last is not None, mask=mask)
        if measurement is not None:
            measurement.check(inits, init_image, sampler.levels(net)[0].item(),
                              _sigma_data(net))
            extra |= measurement.settings
        check_pairs(inits, conditions, 1 if measurement is None else measurement.factor)
        if average is not None:
            _check_average(average, inits, conditions, sampler, measurement,
                           is_from_latents=latents is not None or encode is not None)
            extra["average"] = average
        encoded = None
        if encode is not None:
            encoded = SeedImages.open("--encode", encode, net.img_channels, scaling,
                                      size=net.image_shape[1:])
            extra["encode"] = encoded.fingerprint
        inputs = max(filter(None, (inits, conditions)), key=len, default=None)
        if starts is not None or encode is not None:
            _check_size_of_latents(net, conditions)
            inputs = None
        if starts is not None:
            extra["latents"] = starts.digest
            conditions = conditions and _of_numbers(conditions, starts)
        if inits is not None and (sampler.last is not None or level_flag == "--init-level"):
            distributed.print0(
                f"Start      at {shown_level(sampler.levels(net)[0].item(), scaling)}")
        settings = json_value(settings | of_labels | extra)
        opened = cls(denoiser, sampler, device, class_idx, settings, conditions, inits, scaling,
                     one_size=compiled, labels=labels, label_kind=kind,
                     class_names=recorded_class_names(content),
                     latents=starts, encoded=encoded, inputs=inputs, measurement=measurement,
                     average=average or 1)
        if inputs is not None:
            _tell_sizes(net, opened)
        return opened

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images.

        Raises:
            ValueError: their sizes differ, because those of the inputs do.
        """
        if self.inputs is None:
            return self.net.image_shape
        shapes = {self.shape_of(k) for k in range(len(self.inputs))}
        if len(shapes) > 1:
            (_, height, width), (_, other_height, other_width), *_ = sorted(shapes)
            raise ValueError(f"the images are of {len(shapes)} sizes, such as {width}x{height} and "
                             f"{other_width}x{other_height}, but must all be of one size here")
        return shapes.pop()

    def shape_of(self, seed: int) -> tuple[int, int, int]:
        """Returns channels, height and width of a seed's image."""
        if self.inputs is None:
            return self.net.image_shape
        sizes = (self.inits or self.inputs).sizes  # condition images have the size of the result
        height, width = (side * self._factor for side in sizes[seed % len(sizes)])
        return self.net.image_shape[0], height, width

    @property
    def _factor(self) -> int:
        return 1 if self.measurement is None else self.measurement.factor

    def batches(self, seeds: Sequence[int], size: int) -> list[list[int]]:
        """Returns this rank's batches of these seeds. All images of a batch have one size.

        A batch has at most `size` samples, and accordingly fewer images if they are means.
        """
        groups: dict[tuple, list[int]] = {}
        for seed in seeds:
            groups.setdefault(self.shape_of(seed), []).append(seed)
        size = max(size // self.average, 1)
        batches = [batch for group in groups.values()
                   for batch in distributed.split_for_all_ranks(group, size) if batch]
        return batches[distributed.get_rank()::distributed.get_world_size()]

    def check_seeds(self, seeds: Sequence[int]) -> None:
        """Raises UsageError for means with seeds beyond the inputs, which repeat other samples."""
        if self.average > 1 and max(seeds) >= len(self.inputs):
            raise UsageError(f"--seeds: names seed {max(seeds)}, but --average makes one mean for "
                             f"each of {len(self.inputs)} inputs; name seeds below "
                             f"{len(self.inputs)}, or leave --seeds out")

    @property
    def scale(self) -> dict[str, Any] | None:
        """`scaling` as plain data; None for 8-bit images."""
        return None if self.scaling.is_8bit else self.scaling.to_dict()

    def images(self, batches: Iterable[Sequence[int]], most: int = 0) -> Iterator[SampleBatch]:
        """Yields the images of each batch of seeds. All images of a batch must have one size.

        All samples of a mean have the label of the mean's own seed.

        Args:
            batches: seeds.
            most: maximum number of samples to make at a time for means; at least one per mean.

        Raises:
            ValueError: seeds of means are beyond the inputs, so that samples would be repeated.
        """
        largest = 0
        for seeds in filter(None, batches):
            largest = max(largest, len(seeds)) if self.one_size else len(seeds)
            filled = [*seeds, *[seeds[-1]] * (largest - len(seeds))]
            if self.average == 1:
                [full] = generate_images(self.net, [filled], **self._how())
                yield full[:len(seeds)]
            else:
                yield self._mean(filled, most)[:len(seeds)]

    def _mean(self, seeds: Sequence[int], most: int = 0) -> SampleBatch:
        """Returns the means of `average` samples per input, and their standard deviations."""
        self.check_seeds(seeds)
        count = len(self.inputs)  # seeds k, k + count, ... have the same inputs
        labels = self.labels_of(seeds)
        together = _divisor(self.average, most // len(seeds))  # samples per mean at a time
        fixed = None if labels is None else lambda *_: labels.repeat(together, 1)
        how = self._how() | {"labels": fixed, "class_idx": None}
        mean = squares = torch.zeros([], dtype=torch.float64, device=self.device)
        for first in range(0, self.average, together):
            numbers = range(first, first + together)
            own = [seed + number * count for number in numbers for seed in seeds]
            [samples] = generate_images(self.net, [own], **how)
            for number, images in zip(numbers, samples.images.split(len(seeds)), strict=True):
                step = images - mean
                mean = mean + step / (number + 1)
                squares = squares + step * (images - mean)
        return SampleBatch(list(seeds), mean, labels, (squares / (self.average - 1)).sqrt())

    def encode(self, seeds: Sequence[int]) -> Latents:
        """Returns the latents, with labels, of images `seeds` of those to encode.

        The seeds become the latents' numbers, which select their condition images.
        """
        images = self.encoded(seeds).to(self.device)
        labels = self.labels_of(seeds)
        condition = None if self.conditions is None else self.conditions(seeds).to(self.device)
        with torch.inference_mode():
            found = encode(self.net, images, labels, config=self.sampler, condition=condition)
        return Latents(found.cpu(), self.encoded.names(seeds),
                       None if labels is None else labels.cpu(), tuple(map(int, seeds)))

    def draw(self, seeds: Sequence[int]) -> Latents:
        """Returns the latents from which seeds start, with their labels."""
        found, labels, _ = draw_latents(self.net, seeds, self.device, self.class_idx, self.labels,
                                        self.latents)
        names = tuple(map(str, seeds)) if self.latents is None else tuple(
            self.latents.names[seed % len(self.latents)] for seed in seeds)
        numbers = seeds if self.latents is None else self.latents.numbers_of(seeds)
        return Latents(found.cpu(), names, None if labels is None else labels.cpu(),
                       tuple(map(int, numbers)))

    def decode(self, latents: Latents, seeds: Sequence[int]) -> torch.Tensor:
        """Returns the images [B, C, H, W] of latents, with the condition images of `seeds`."""
        labels = None if latents.labels is None else latents.labels.to(self.device)
        condition = None if self.conditions is None else self.conditions(seeds).to(self.device)
        with torch.inference_mode():
            return self.sampler.sample(self.net, latents.latents.to(self.device), labels,
                                       torch.randn_like, condition=condition)

    def starting_from(self, latents: Latents, seeds: Sequence[int]) -> "NetworkSampler":
        """Returns this sampler with other latents and their labels.

        Seed k of the new sampler uses latent k, with the condition image of seeds[k] of this one.

        Raises:
            ValueError: condition images have another size than latents.
        """
        if self.inputs is not None:
            _check_size_of_latents(self.net, self.inputs)
        labels = self.labels if latents.labels is None else latents.labels_of
        conditions = self.conditions and (
            lambda own: self.conditions([seeds[k % len(seeds)] for k in own]))
        return dataclasses.replace(
            self, latents=latents, labels=labels, class_idx=None, conditions=conditions,
            inputs=None, settings=self.settings | {"latents": latents.digest})

    def trajectory(self, seeds: Sequence[int], window: Scaling | None = None
                   ) -> list[torch.Tensor]:
        """Returns the images along the sampler's path, see `samplers.trajectory`.

        `window` maps the values to show, in the data's own units, to -1 to 1.
        """
        def show(x: torch.Tensor) -> torch.Tensor:
            return EIGHT_BIT.to_data(x if window is None else
                                     window.to_network(self.scaling.to_data(x)))

        shown = trajectory(self.net, seeds, **self._how(), show=show)
        if self.average > 1:  # the path is that of the first sample
            shown[-1] = show(self._mean(seeds).images).cpu()
        return shown

    def classes(self, seeds: Sequence[int]) -> list[int] | None:
        """Returns the classes of the images of `seeds`, or None if labels are not classes."""
        return self.recorded_labels(self.labels_of(seeds)) if self.label_kind == "classes" else None

    def labels_of(self, seeds: Sequence[int]) -> torch.Tensor | None:
        """Returns the labels of the images of `seeds`, [B, label_dim], or None without labels."""
        return draw_latents(self.net, seeds, self.device, self.class_idx, self.labels)[1]

    def recorded_labels(self, labels: torch.Tensor) -> list[Any]:
        """Returns labels [B, label_dim] in the form of dataset.json: class numbers or lists."""
        is_classes = self.label_kind == "classes"
        return labels.argmax(dim=1).tolist() if is_classes else labels.tolist()

    def _how(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "device": self.device, "class_idx": self.class_idx,
                "conditions": self.conditions, "inits": self.inits, "labels": self.labels,
                "latents": self.latents, "measure": self.measurement, "factor": self._factor}


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor of a number that is at most `most`; at least 1."""
    return max(k for k in range(1, number + 1) if number % k == 0 and k <= max(most, 1))


def open_network(
    file: NetworkFile, *, device: torch.device, pfgmpp: bool | None, aug_dim: float | None,
    precision: str, compiled: bool,
) -> tuple[dict[str, Any], Precond]:
    """Returns the content of a file and its network, ready to be evaluated.

    Args:
        file: the network's file.
        device: where to evaluate it.
        pfgmpp: for files that do not record D, see `checkpoint.resolve_D`.
        aug_dim: for files that do not record D, see `checkpoint.resolve_D`.
        precision: precision of the network's arithmetic.
        compiled: compile the network.

    Raises:
        ValueError: the file does not fit.
    """
    content = checkpoint.resolve_D(file.content, file.source, pfgmpp, aug_dim)
    net = checkpoint.build_ema(content).to(device)
    net.compute_dtype = compute_dtype(precision)
    if compiled:
        compile_network(net.model, graphs=device.type == "cuda")
    return content, net


def load_network(source: str, key: str | None = None) -> dict[str, Any]:
    """Returns the parts of a file that sampling needs, with averaged weights if there are any.

    It prints a note or warning if there are none.
    """
    found = find_network(source)
    content = checkpoint.with_average(checkpoint.load(found, key), found)
    if "ema_source" in content:
        console.say(f"Note: {found} has no averaged weights; those of {content['ema_source']} are "
                    "sampled")
    elif content.get("ema") is None:
        distributed.warn0(f"{found}: has no averaged weights, and there is no network-snapshot of "
                          "the same number beside it; the plain weights are used, which sample "
                          "worse")
    if content["network"].get("cond_c_in") and "dataset" not in content:  # a foreign file
        distributed.warn0(f"{found}: does not record the scale of its data and conditions or the "
                          "level at which sampling starts; 8-bit images are assumed; "
                          "checkpoint_tool.py convert records them with --scale, --cond-scale and "
                          "--sigma-max")
    unused = {"optimizer", "net"} if content.get("ema") is not None else {"optimizer"}
    return {key: value for key, value in content.items() if key not in unused}


def _dataset_record(content: dict[str, Any]) -> dict[str, Any]:
    record = content.get("dataset")
    return record if isinstance(record, dict) else {}


def recorded_scaling(content: dict[str, Any], source: str, key: str, channels: int) -> Scaling:
    """Returns the scaling of a network's data or conditions; 8-bit if none is recorded.

    Raises:
        ValueError: the recorded scaling is invalid, or has another number of channels.
    """
    record = _dataset_record(content).get(key)
    if record is None:
        return EIGHT_BIT
    with error_prefix(f'{source}: "{key}" of its data '):
        scaling = Scaling.from_dict(record)
        scaling.check_channels(channels)
    return scaling


def _sampler_config(
    content: dict[str, Any], source: str, options: dict[str, Any], init_image: str | None,
    init_sigma: float | None, level_flag: str,
) -> SamplerConfig:
    """Returns the sampler's settings, with the highest level that the network or start requires."""
    if content["network"].get("few_step") is not None:
        few_step = FewStep.from_dict(content["network"]["few_step"])
        if init_sigma is not None:
            if options.get("sigmas") is not None:
                raise UsageError(f"{level_flag} with --sigmas: both say where sampling starts; "
                                 f"leave {level_flag} out")
            options = options | {"sigmas": (init_sigma,)}
        return _few_step_config(few_step, source, options,
                                "--sigmas" if init_sigma is None else level_flag)
    if options.get("solver") == CONSISTENCY and options.get("sigmas") is None:
        raise UsageError(f"--solver={CONSISTENCY}: {source} is not a few-step network; leave "
                         "--solver out, or give its noise levels with --sigmas")
    sampler = SamplerConfig(**options)
    if sampler.sigmas is not None:
        if init_sigma is not None:
            raise UsageError(f"{level_flag} with --sigmas: both say where sampling starts; leave "
                             f"{level_flag} out")
        return sampler
    if init_sigma is not None:
        if sampler.sigma_max is not None:
            raise UsageError(f"--sigma_max={sampler.sigma_max:g} with {level_flag}: both say where "
                             "sampling starts; leave --sigma_max out")
        lowest = {"sigma_min": init_sigma} if sampler.num_steps == 1 and init_sigma < _lowest(
            sampler) else {}  # a single level is also the lowest
        return dataclasses.replace(sampler, sigma_max=init_sigma, **lowest)
    is_edm_grid = sampler.discretization in (None, "edm")
    if is_edm_grid and sampler.sigma_max is None:
        return dataclasses.replace(sampler, sigma_max=highest_level(content))
    return sampler


def _lowest(sampler: SamplerConfig) -> float:
    """Returns the lowest level of a grid."""
    if sampler.sigma_min is not None:
        return sampler.sigma_min
    return default_range(sampler.discretization or "edm")[0]


def _check_lowest(sampler: SamplerConfig, init_sigma: float | None, level_flag: str,
                  scaling: Scaling) -> None:
    """Raises UsageError if sampling would start below the lowest level."""
    if init_sigma is None or sampler.sigmas is not None or init_sigma >= _lowest(sampler):
        return
    raise UsageError(f"{level_flag}: starts at {shown_level(init_sigma, scaling)}, below the "
                     f"lowest level, {shown_level(_lowest(sampler), scaling)}; give a smaller "
                     "--sigma_min, or --steps=1")


def _first_level(init_sigma: float | None, init_level: float | None, scaling: Scaling
                 ) -> tuple[float | None, str]:
    """Returns the level at which to start from images, in the network's scale, and its flag."""
    for flag, level in (("--init-sigma", init_sigma), ("--init-level", init_level)):
        if level is not None and not level > 0:
            raise UsageError(f"{flag}={level:g}: must be positive")
    if init_level is None:
        return init_sigma, "--init-sigma"
    if init_sigma is not None:
        raise UsageError(f"--init-level={init_level:g} with --init-sigma={init_sigma:g}: both say "
                         "where sampling starts; leave one of them out")
    return sigma_of_level("--init-level", init_level, scaling), "--init-level"


def _recorded_sampler(sampler: SamplerConfig, net: Precond) -> dict[str, Any]:
    """Returns the sampler's settings as they are recorded."""
    settings = {name: value for name, value in dataclasses.asdict(sampler).items()
                if name not in _UNUSED or value != _UNUSED[name]}
    if "sigmas" in settings:
        settings["sigmas"] = list(settings["sigmas"])  # as it reads back from JSON
    settings["nfe"] = sampler.nfe
    if net.few_step is not None:
        settings |= {"few_step": net.few_step.method, "levels": sampler.levels(net)[:-1].tolist()}
    return settings


def plugin_record(net: Precond, key: str = "network_plugin") -> dict[str, str]:
    """Returns the record, under `key`, of the plugin that defines a network's classes."""
    return origin_record((PRECONDS, type(net).__name__), (MODELS, net.model_type), key=key)


def _check_is_denoiser(net: Precond, source: str, encode: str | None, measure: str | None) -> None:
    """Raises UsageError if a few-step network can't do what is asked."""
    if net.few_step is None:
        return
    for flag, value, reason in (
            ("--encode", encode, "which can't map images to latents"),
            ("--measure", measure, "which predicts no mean for a measurement to correct")):
        if value is not None:
            raise UsageError(f"{flag}={value}: {source} is a few-step network "
                             f"({net.few_step.method}), {reason}; use the denoiser it was "
                             "made from")


def _check_starts(options: dict[str, Any], init_image: str | None, init_sigma: float | None,
                  level_flag: str, measure: str | None) -> None:
    """Raises UsageError if the flags for starting from images contradict each other."""
    last = options.get("last")
    if init_image is None:
        given = {level_flag: init_sigma, "--last": last, "--measure": measure}
        for name in ("init_noise", "blend"):
            if options.get(name, 1) != 1:
                given[_FLAGS[name]] = options[name]
        for flag, value in given.items():
            if value is not None:
                raise UsageError(f"{flag} without --init-image: there are no images to start from; "
                                 f"give them with --init-image=DIR|ZIP, or leave {flag} out")
        return
    starts = [flag for flag, value in ((level_flag, init_sigma), ("--last", last),
                                       ("--sigmas", None if measure else options.get("sigmas")))
              if value is not None]
    if not starts and measure is None:
        raise UsageError("--init-image: needs the level at which to start; give --init-sigma, "
                         "--init-level, --sigmas or --last")
    if level_flag in starts and "--last" in starts:
        raise UsageError(f"{level_flag} with --last: both say where sampling starts; leave one of "
                         "them out")
    if measure is not None and options.get("blend", 1) != 1:
        raise UsageError("--blend with --measure: every evaluation already uses the measurement; "
                         "leave one of them out")
    if measure is not None and not starts and options.get("init_noise", 1) != 1:
        raise UsageError("--init-noise with --measure: sampling starts from pure noise; give "
                         "--init-sigma or --last to start from the measurement, or leave "
                         "--init-noise out")


def _open_inputs(
    net: Precond, source: str, content: dict[str, Any], init_image: str | None,
    cond_image: str | None, scaling: Scaling,
) -> tuple[SeedImages | None, SeedImages | None]:
    """Returns the condition images and the images to start from, each None if not given."""
    conditions = None
    if net.cond_channels:
        cond_scaling = recorded_scaling(content, source, "cond_scale", net.cond_channels)
        conditions = open_conditions(net.cond_channels, source, cond_image, cond_scaling)
    elif cond_image is not None and init_image != CONDITIONS_WORD:
        raise UsageError(f"--cond-image={cond_image}: {source} takes no condition image; leave "
                         "--cond-image out")
    return conditions, open_inits(net.img_channels, net.cond_channels, init_image, cond_image,
                                  scaling)


def _check_average(average: int, inits: SeedImages | None, conditions: SeedImages | None,
                   sampler: SamplerConfig, measurement: Measurement | None, *,
                   is_from_latents: bool) -> None:
    """Raises UsageError if there are no samples to average, or if they would all be equal."""
    flag = f"--average={average}"
    if is_from_latents:
        raise UsageError(f"{flag}: each latent makes one image; leave --average out")
    if inits is None and conditions is None:
        raise UsageError(f"{flag}: averages the samples of each input, but there are no inputs; "
                         "give them with --init-image or --cond-image")
    starts_with_noise = inits is None or sampler.init_noise or (
        measurement is not None and not measurement.starts)
    steps_draw = sampler.S_churn or sampler.noise_alpha or (
        sampler.solver == CONSISTENCY and sampler.num_steps > 1)
    if not starts_with_noise and not steps_draw:
        raise UsageError(f"{flag}: nothing is random with --init-noise=0, so all samples of an "
                         "input are equal; leave --average out, or add some noise")


def _check_size_of_latents(net: Precond, conditions: SeedImages | None) -> None:
    """Raises ValueError if condition images have another size than latents."""
    own = net.image_shape[1:]
    for size in conditions.sizes if conditions else ():
        if size != own:
            raise ValueError(f"--cond-image={conditions.path}: images are {size[1]}x{size[0]}, but "
                             f"latents are {own[1]}x{own[0]} like the network; give images of "
                             "that size")


def _tell_sizes(net: Precond, sampler: "NetworkSampler") -> None:
    """Prints the sizes of the images if they are not the network's own, and if they are padded."""
    shapes = {sampler.shape_of(k)[1:] for k in range(len(sampler.inputs))}
    if shapes == {net.image_shape[1:]}:
        return
    def shown(size):
        return f"{size[1]}x{size[0]}"
    of_sizes = shown(min(shapes)) if len(shapes) == 1 else \
        f"{len(shapes)} sizes from {shown(min(shapes))} to {shown(max(shapes))}"
    multiple = size_multiple(net)
    padded = any(side % multiple for size in shapes for side in size)
    relation = "as the inputs" if sampler.shape_of(0)[1:] in sampler.inputs.sizes[:1] else \
        f"{sampler.measurement.factor} times the sides of the inputs"
    distributed.print0(
        f"Size       {of_sizes}, {relation}; the network was trained on "
        f"{shown(net.image_shape[1:])}" + (
            f". Sides that are no multiples of {multiple} are padded by reflection, then cropped"
            if padded else ""))


def _few_step_config(few_step: FewStep, source: str, options: dict[str, Any], start_flag: str
                     ) -> SamplerConfig:
    """Returns the settings of a few-step network: its own levels unless others are given.

    It warns, naming `start_flag`, if sampling starts above the network's highest level.
    """
    solver = options.get("solver")
    if solver not in (None, CONSISTENCY):
        raise UsageError(f"--solver={solver}: {source} is a few-step network "
                         f"({few_step.method}), which needs no ODE solver; leave --solver out")
    try:
        asked = SamplerConfig(**options | {"solver": CONSISTENCY})
        asked.check_solver()
    except ValueError as error:
        if solver is not None:
            raise
        text = str(error).replace(f"solver={CONSISTENCY}", "a few-step network")
        raise ValueError(text) from error
    if asked.sigmas is not None:
        if asked.sigmas[0] > few_step.levels[0]:
            distributed.warn0(f"{start_flag}: sampling starts at sigma {asked.sigmas[0]:g}, above "
                              f"{few_step.levels[0]:g}, the highest level of {source}, so images "
                              "may be poor")
        return asked
    return SamplerConfig.of_few_steps(few_step, options.get("num_steps"))


def _in_flags(error: ValueError) -> str:
    """Returns the error of a sampler setting, with names replaced by command-line flags."""
    text = str(error)
    for name, flag in _FLAGS.items():
        text = re.sub(rf"(?<!-)\b{name}(=|\b out|$)", rf"{flag}\1", text)
    return text


def recorded_label_kind(content: dict[str, Any]) -> str | None:
    """Returns 'classes' or 'vectors' as the file records it; 'classes' if it does not."""
    if not content["network"].get("label_dim"):
        return None
    return "vectors" if _dataset_record(content).get("label_kind") == "vectors" else "classes"


def recorded_class_names(content: dict[str, Any]) -> tuple[str, ...]:
    """Returns the class names in a file, or () if there are none."""
    return tuple(_dataset_record(content).get("class_names") or ())


def _class_choice(choice: Any, label_dim: int, names: Sequence[str]) -> int | str | None:
    """Returns a class number, 'uniform', 'data' or None for what a user gave as a class."""
    if choice is None or isinstance(choice, str) and choice in ("uniform", "data"):
        return choice
    if isinstance(choice, str) and choice in names:
        return names.index(choice)
    with contextlib.suppress(TypeError):
        if not isinstance(choice, bool):
            return operator.index(choice)
    shown = ", ".join(names[:_MAX_CLASS_NAMES]) + (", ..." if len(names) > _MAX_CLASS_NAMES else "")
    raise UsageError(f"--class={choice}: must be a class number from 0 to {label_dim - 1}, uniform "
                     f"or data{f', or a name: {shown}' if names else ''}; --labels takes one class "
                     "for each seed")


def _choose_labels(
    net: Precond, source: str, content: dict[str, Any], kind: str | None,
    choice: int | str | None, label_source: str | Sequence | None, latents: Latents | None,
) -> tuple[SeedLabels | None, dict[str, Any]]:
    """Returns the labels of seeds, or None for classes that the seeds draw; and their record.

    The labels of `latents` are used, if they have any, when no labels are asked for.
    """
    if kind is None:
        for flag, value in (("class", choice), ("labels", label_source)):
            if value is not None:
                raise UsageError(f"--{flag}={value}: {source} is unconditional; leave --{flag} out")
        return None, {}
    if label_source is not None:
        if choice is not None:
            raise UsageError(f"--class={choice} with --labels={label_source}: give one of them")
        labels = distributed.run_on_rank0(read_labels, label_source, net.label_dim, kind)
        counts = _class_counts(content, net.label_dim) if kind == "classes" else None
        if counts and (unseen := sorted({int(row.argmax()) for row in labels if not counts[
                row.argmax()]})):
            raise UsageError(f"--labels={label_source}: the training data have no images of class "
                             f"{format_ranges(unseen)}")
        given = GivenLabels(labels)
        return given, {"labels": given.digest}
    if latents is not None and latents.labels is not None and choice is None:
        if latents.labels.shape[1] != net.label_dim:
            raise ValueError(f"--latents: their labels have {latents.labels.shape[1]} numbers, but "
                             f"the network takes {net.label_dim}; give --class or --labels")
        return latents.labels_of, {}
    if kind == "vectors":
        asked = "" if choice is None else f"--class={choice}: "
        raise UsageError(f"{asked}{source} was trained on label vectors of {net.label_dim} "
                         "numbers; give them with --labels=FILE|DATASET")
    counts = _class_counts(content, net.label_dim)
    if isinstance(choice, int):
        if not 0 <= choice < net.label_dim:
            raise UsageError(f"--class={choice}: must be between 0 and {net.label_dim - 1}")
        if counts and not counts[choice]:
            present = [number for number, count in enumerate(counts) if count]
            raise UsageError(f"--class={choice}: the training data have no images of this class; "
                             f"they have classes {format_ranges(present)}")
        return None, {}
    if choice == "data":
        if not counts:
            raise UsageError(f"--class=data: {source} does not record how many images each class "
                             "has; leave --class out for equal shares")
        return DrawnClasses(counts), {"class": "data",
                                      "class_counts": checkpoint.digest(counts)[:16]}
    labels = classes_with_images(counts)
    empty = [number for number, count in enumerate(counts or ()) if not count]
    return labels, {"empty_classes": len(empty), "empty_class_numbers": format_ranges(empty)
                    } if labels else {}


def _labelled(path: _Images) -> _Images:
    """Returns the path of images to encode. Raises UsageError unless they have labels."""
    with flag_errors("--encode", path, _REMEDY):
        has_labels = ImageFolderDataset(path, use_labels=True).has_labels
    if not has_labels:
        raise UsageError(f"--encode={path}: has no labels, but the network needs them; give "
                         "--class or --labels")
    return path


def _check_begins(given: dict[str, str | None]) -> None:
    """Raises UsageError if several flags say what sampling starts from."""
    flags = [flag for flag, value in given.items() if value is not None]
    if len(flags) > 1:
        raise UsageError(f"{' and '.join(flags)}: each says what to start from; give one of them")


def _check_encoding(sampler: SamplerConfig) -> None:
    try:
        sampler.check_encoding()
    except ValueError as error:
        raise UsageError(_in_flags(error)) from error


def _class_counts(content: dict[str, Any], label_dim: int) -> list[int] | None:
    """Returns the number of training images of each class, or None if it is not recorded."""
    counts = _dataset_record(content).get("class_counts")
    is_valid = isinstance(counts, list) and len(counts) == label_dim and any(counts) and all(
        type(count) is int and count >= 0 for count in counts)
    return counts if is_valid else None


def _recorded_rounding(bits: int, seed: int | None) -> dict[str, int]:
    """Returns the settings that record the rounding of weights; none if they are not rounded."""
    if bits >= FULL_BITS:
        return {}
    return {"bits": bits} | ({} if seed is None else {"rounding_seed": seed})


def _with_guidance(
    net: Precond, source: str, guidance: float, gnet: str | NetworkFile | None,
    interval: tuple[float, float] | None, open_one: _OpenNetwork, scaling: Scaling,
    kind: str | None,
) -> tuple[Precond | GuidedDenoiser, dict[str, Any]]:
    """Returns the network with guidance and the settings that record it; none without guidance."""
    if guidance == 1:
        for flag, value in (("--gnet", gnet), ("--guidance-interval", interval)):
            if value is not None:
                raise UsageError(f"{flag} without --guidance: the guide would not be used; give "
                                 "--guidance=W with W other than 1")
        return net, {}
    if net.few_step is not None:
        raise UsageError(f"--guidance={guidance:g}: {source} is a few-step network, which can't be "
                         "guided; leave --guidance out")
    settings: dict[str, Any] = {"guidance": guidance}
    guide = None
    if gnet is not None:
        file = NetworkFile.read(gnet)
        gnet = file.source
        content, guide = open_one(file)
        if recorded_scaling(content, gnet, "scale", guide.img_channels) != scaling:
            raise ValueError(f"--gnet={gnet}: was trained on data of another scale than {source}")
        if guide.label_dim and net.label_dim and recorded_label_kind(content) != kind:
            raise ValueError(f"--gnet={gnet}: was trained on {recorded_label_kind(content)}, but "
                             f"{source} on {kind}; give a guide with the same kind of labels, or "
                             "without labels")
        settings |= {"gnet": file.digest,
                     "gnet_network": checkpoint.digest(guide.config)[:16],
                     **plugin_record(guide, "gnet_plugin")}
    elif not net.label_dim:
        raise UsageError(f"--guidance={guidance:g}: {source} has no labels to guide with; give a "
                         "second network with --gnet")
    elif not net.config.get("label_dropout"):
        distributed.warn0(f"--guidance={guidance:g}: {source} was trained without --label-dropout, "
                          "so it has not learned to denoise without a label; --gnet guides with a "
                          "second network")
    try:
        denoiser = guided(net, guidance=guidance, gnet=guide, interval=interval or EVERYWHERE)
    except ValueError as error:
        raise ValueError(f"{source}, --gnet={gnet}: {error}" if guide else str(error)) from None
    if interval is not None:
        settings["guidance_interval"] = [json_value(float(end)) for end in interval]
    return denoiser, settings


def _of_numbers(conditions: ImagesOfSeeds, latents: Latents) -> ImagesOfSeeds:
    """Returns condition images selected by the numbers of the latents."""
    return lambda seeds: conditions(latents.numbers_of(seeds))


def _warn_of_init_sigma(net: Precond, init_sigma: float | None, scaling: Scaling) -> None:
    """Warns of a noise level that leaves little of an image."""
    sigma_data = _sigma_data(net)
    if init_sigma is None or init_sigma <= _LOST_SIGMAS * sigma_data:
        return
    in_data = "" if scaling.is_8bit else \
        f", {init_sigma * scaling.spread[0]:.4g} in the units of the data"
    distributed.warn0(f"--init-sigma={init_sigma:g}: is {init_sigma / sigma_data:.3g} times "
                      f"sigma_data{in_data}, so little is left of the images; the level is in the "
                      "networks' scale, where the data have a standard deviation of "
                      f"{sigma_data:g}")


def _sigma_data(net: Precond) -> float:
    """Returns the standard deviation that a network assumes for its data; 0.5 if not stated."""
    return getattr(net, "sigma_data", 0.5)
