"""The flags of restoration: noise levels in the data's units, and --measure.

pfgmpp/measurement.py has the mathematics of measurements.
"""

import dataclasses
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from dnnlib.cli import flag_errors
from images.array_files import is_channels_last
from images.image_files import is_array
from images.pictures import DEEP_MODES, read_picture
from images.scaling import Scaling
from pfgmpp.measurement import (
    METHODS,
    MeasuredDenoiser,
    Operator,
    denoise,
    downsample,
    inpaint,
)
from pfgmpp.sizes import Padding, size_multiple
from sampling.seed_images import SeedImages, UsageError
from torch_utils import distributed

_WHITE = 0.5  # share of a picture's range from which a pixel counts as measured


def sigma_of_level(flag: str, level: float, scaling: Scaling) -> float:
    """Converts a noise level from the data's own units to the network's scale.

    Raises:
        UsageError: channels are scaled differently, so that no single level applies to all.
    """
    if len(set(scaling.spread)) > 1:
        raise UsageError(f"{flag}={level:g}: the channels of these data are scaled differently, so "
                         f"one level in their units is not one level for the network; give it in "
                         f"the network's scale with {flag.replace('-level', '-sigma')}")
    return level / scaling.spread[0]


def shown_level(sigma: float, scaling: Scaling) -> str:
    """Returns a noise level in words, in the network's scale and in the data's units."""
    if len(set(scaling.spread)) > 1:
        return f"sigma {sigma:.4g}"
    unit = "of 255 gray levels" if scaling.is_8bit else "in the data's units"
    return f"sigma {sigma:.4g}, which is {sigma * scaling.spread[0]:.4g} {unit}"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The measurement that gave the images of --init-image, in the form of `samplers.Measure`.

    `starts` says whether sampling starts from these images. Otherwise it starts from noise.
    """

    kind: str
    sigma: float
    method: str
    starts: bool
    factor: int = 1  # the side of an image divided by that of its measurement
    mask: torch.Tensor | None = None  # bool [1 or C, H, W], for kind 'inpaint'

    def __call__(self, net: Any, v: torch.Tensor) -> tuple[Callable, torch.Tensor | None]:
        """Returns a denoiser that uses the measurements v, and the images to start from."""
        operator = self._operator(net, v.device)
        denoiser = MeasuredDenoiser(net, operator, v, self.sigma, self.method)
        return denoiser, operator.inverse(v) if self.starts else None

    def _operator(self, net: Any, device: torch.device) -> Operator:
        if self.kind == "denoise":
            return denoise()
        if self.kind == "downsample":
            return downsample(self.factor)
        padding = Padding(self.mask.shape[1:], size_multiple(net))
        return inpaint(padding.pad(self.mask[None].to(device, torch.float32)))

    def check(self, inits: SeedImages, source: str, first_level: float, sigma_data: float
              ) -> None:
        """Raises UsageError if the mask and the images have different sizes.

        It warns if sampling starts too low to restore pixels that were not measured.
        """
        if self.mask is None:
            return
        if self.starts and first_level < sigma_data:
            distributed.warn0(
                f"--measure=inpaint: sampling starts at sigma {first_level:.3g}, below sigma_data "
                f"= {sigma_data:g}, which is too low to restore pixels that were not measured and "
                "start at the middle of the data's range; start higher, or from noise")
        size = tuple(self.mask.shape[1:])
        others = [other for other in inits.sizes if other != size]
        if others:
            height, width = others[0]
            raise UsageError(f"--measure=inpaint: the mask is {size[1]}x{size[0]}, but images of "
                             f"--init-image={source} are {width}x{height}; give a mask of their "
                             "size")

    @property
    def settings(self) -> dict[str, Any]:
        """The record in generate.json, plain JSON data."""
        record = {"measure": self.kind, "measure_sigma": self.sigma, "measure_by": self.method}
        if self.factor > 1:
            record["measure_factor"] = self.factor
        if self.mask is not None:
            record["mask"] = self.mask_digest
        return record

    @property
    def mask_digest(self) -> str:
        """A sha256 of the mask."""
        from checkpoints.checkpoint import digest
        return digest({"mask": self.mask.to(torch.uint8)})


def open_measurement(
    measure: str | None, sigma: float | None, level: float | None, method: str | None,
    channels: int, scaling: Scaling, *, starts: bool,
    mask: np.ndarray | PIL.Image.Image | None = None,
) -> Measurement | None:
    """Returns the measurement that the flags describe, or None if there is none.

    Args:
        measure: 'denoise', 'inpaint:MASK' or 'downsample:K'.
        sigma: noise of the measurement, in the network's scale.
        level: the same in the data's units.
        method: a name in `measurement.METHODS`; None is guidance.
        channels: number of channels of the images.
        scaling: of the data that the network was trained on.
        starts: see `Measurement`.
        mask: where pixels were measured, instead of the MASK of 'inpaint:MASK'.

    Raises:
        UsageError: flags contradict each other or are malformed.
        OSError: the mask can't be read.
        ValueError: the mask does not fit the images.
    """
    if mask is not None and measure != "inpaint":
        raise UsageError(f"mask: needs measure='inpaint', but measure is {measure!r}; leave mask "
                         "out, or change measure")
    if measure is None:
        for flag, value in (("--measure-sigma", sigma), ("--measure-level", level),
                            ("--measure-by", method)):
            if value is not None:
                raise UsageError(f"{flag}={value} without --measure: give the kind of measurement "
                                 "with --measure=denoise|inpaint:MASK|downsample:K")
        return None
    if (sigma is None) == (level is None):
        raise UsageError(f"--measure={measure}: needs the noise of the measurement; give either "
                         "--measure-sigma in the network's scale or --measure-level in the data's "
                         "units (0 for no noise)")
    if method not in (None, *METHODS):
        raise UsageError(f"--measure-by={method}: must be one of {', '.join(METHODS)}")
    sigma = sigma if level is None else sigma_of_level("--measure-level", level, scaling)
    if not 0 <= sigma < math.inf:
        flag, value = ("level", level) if level is not None else ("sigma", sigma)
        raise UsageError(f"--measure-{flag}={value:g}: must be 0 or more, and finite")
    kind, _, what = str(measure).partition(":")
    rest = {"sigma": sigma, "method": method or "guidance", "starts": starts}
    if measure == "denoise":
        return Measurement("denoise", **rest)
    if kind == "downsample" and re.fullmatch(r"[1-9]\d{0,3}", what) and int(what) > 1:
        return Measurement("downsample", factor=int(what), **rest)
    if kind == "inpaint" and (what or mask is not None):
        remedy = "name a picture or array, white where pixels were measured"
        with flag_errors("--measure", measure, remedy):
            mask = distributed.run_on_rank0(_read_mask, mask if what == "" else what, channels)
        return Measurement("inpaint", mask=mask, **rest)
    raise UsageError(f"--measure={measure}: must be denoise, inpaint:MASK with a picture or array "
                     "that is white where pixels were measured, or downsample:K with a whole "
                     "number K of at least 2")


def _read_mask(source: str | np.ndarray | PIL.Image.Image, channels: int) -> torch.Tensor:
    """Returns the mask in a file, an array or a picture, bool [1 or C, H, W].

    Raises:
        OSError: the mask can't be read.
        ValueError: it can't be read, has the wrong number of channels, or is empty.
    """
    path = source if isinstance(source, str) else "mask"
    if isinstance(source, str):
        content = Path(path).read_bytes()
        source = np.load(io.BytesIO(content), allow_pickle=False) if is_array(path) else \
            read_picture(content)
    is_picture = isinstance(source, PIL.Image.Image)
    mask = torch.from_numpy(_mask_in_picture(source) if is_picture else _mask_in_array(source))
    if mask.ndim != 3 or len(mask) not in (1, channels):
        raise ValueError(f"{path}: is a mask of shape {list(mask.shape)}; must be [H, W], or "
                         f"[C, H, W] with C = 1 or the images' {channels}")
    if not mask.any():
        raise ValueError(f"{path}: no pixel is measured; a mask must be white where pixels are "
                         "known")
    return mask


def _mask_in_array(array: np.ndarray) -> np.ndarray:
    """Returns where an array of numbers, [H, W], [C, H, W] or [H, W, C], is not 0."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError("must be an array of numbers or booleans")
    if not np.isfinite(array).all():
        raise ValueError("has values that are not finite; give 0 where nothing is measured")
    if array.ndim == 3 and is_channels_last(array.shape):
        array = array.transpose(2, 0, 1)
    return (array if array.ndim > 2 else array[None]) != 0


def _mask_in_picture(image: PIL.Image.Image) -> np.ndarray:
    """Returns where a picture of any mode is closer to white than to black."""
    if image.mode in DEEP_MODES:
        values = np.asarray(image).astype(np.float64)
        return (values >= _WHITE * max(values.max(), 1))[None]
    return (np.asarray(image.convert("L")) >= _WHITE * 255)[None]
