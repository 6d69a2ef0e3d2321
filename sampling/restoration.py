"""The flags of restoration: noise levels in the data's units, and what --measure names.

See pfgmpp/measurement.py for the mathematics of the latter.
"""

import dataclasses
import io
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
from pfgmpp.measurement import MeasuredDenoiser, Operator, denoise, downsample, inpaint
from pfgmpp.sizes import Padding, size_multiple
from sampling.seed_images import SeedImages, UsageError
from torch_utils import distributed

_WHITE = 0.5  # of the range of a picture; from there on it is measured


def sigma_of_level(flag: str, level: float, scaling: Scaling) -> float:
    """Returns the noise level in the network's scale of one in the data's own units.

    Raises:
        UsageError: channels are scaled differently, so that no one level stands for all.
    """
    if len(set(scaling.spread)) > 1:
        raise UsageError(f"{flag}={level:g}: the channels of these data have scales of their own, "
                         f"so one level in their units is not one for the network; give it in the "
                         f"network's scale by {flag.replace('-level', '-sigma')}")
    return level / scaling.spread[0]


def shown_level(sigma: float, scaling: Scaling) -> str:
    """Returns a noise level in words, in both scales where the data have one of their own."""
    if len(set(scaling.spread)) > 1:
        return f"sigma {sigma:.4g}"
    unit = "of 255 gray levels" if scaling.is_8bit else "in the data's units"
    return f"sigma {sigma:.4g}, which is {sigma * scaling.spread[0]:.4g} {unit}"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is known of the images of --init-image, as `samplers.Measure`.

    `starts` says whether sampling begins with them; else it begins with noise.
    """

    kind: str
    sigma: float
    method: str
    starts: bool
    factor: int = 1  # the sides of images over those of their measurements
    mask: torch.Tensor | None = None  # bool [1 or C, H, W], for kind 'inpaint'

    def __call__(self, net: Any, v: torch.Tensor) -> tuple[Callable, torch.Tensor | None]:
        """Returns the denoiser that knows measurements v, and from what it starts."""
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
        """Raises UsageError if the mask is not of the size of all images.

        It warns of a start from which pixels that were not measured can't be restored.
        """
        if self.mask is None:
            return
        if self.starts and first_level < sigma_data:
            distributed.warn0(
                f"--measure=inpaint: sampling starts at sigma {first_level:.3g}, below sigma_data "
                f"= {sigma_data:g}: too low for pixels that were not measured, which begin in the "
                "middle of the data's range; start higher, or from noise")
        size = tuple(self.mask.shape[1:])
        others = [other for other in inits.sizes if other != size]
        if others:
            height, width = others[0]
            raise UsageError(f"--measure=inpaint: the mask is {size[1]}x{size[0]}, but images of "
                             f"--init-image={source} are {width}x{height}; give a mask of their "
                             "size")

    @property
    def settings(self) -> dict[str, Any]:
        """What generate.json records, plain JSON data."""
        record = {"measure": self.kind, "measure_sigma": self.sigma, "measure_by": self.method}
        if self.factor > 1:
            record["measure_factor"] = self.factor
        if self.mask is not None:
            record["mask"] = self.mask_digest
        return record

    @property
    def mask_digest(self) -> str:
        """A sha256 over the mask."""
        from checkpoints.checkpoint import digest
        return digest({"mask": self.mask.to(torch.uint8)})


def open_measurement(
    measure: str | None, sigma: float | None, level: float | None, method: str | None,
    channels: int, scaling: Scaling, *, starts: bool,
    mask: np.ndarray | PIL.Image.Image | None = None,
) -> Measurement | None:
    """Returns what the flags say, None if they say nothing.

    Args:
        measure: 'denoise', 'inpaint:MASK' or 'downsample:K'.
        sigma: noise of the measurement, in the network's scale.
        level: the same in the data's units.
        method: a name in `measurement.METHODS`; None is guidance.
        channels: of the images.
        scaling: of the data that the network was trained on.
        starts: see `Measurement`.
        mask: where pixels were measured, in place of the MASK of 'inpaint:MASK'.

    Raises:
        UsageError: flags that do not go together, or of another form.
        OSError: the mask can't be read.
        ValueError: it is no mask for such images.
    """
    if mask is not None and measure != "inpaint":
        raise UsageError(f"mask: is for measure='inpaint', but measure is {measure!r}; leave mask "
                         "out, or change measure")
    if measure is None:
        for flag, value in (("--measure-sigma", sigma), ("--measure-level", level),
                            ("--measure-by", method)):
            if value is not None:
                raise UsageError(f"{flag}={value} without --measure: say what was measured by "
                                 "--measure=denoise|inpaint:MASK|downsample:K")
        return None
    if (sigma is None) == (level is None):
        raise UsageError(f"--measure={measure}: needs the noise of the measurement; give "
                         "--measure-sigma in the network's scale or --measure-level in the data's "
                         "units (one of them, 0 for none)")
    sigma = sigma if level is None else sigma_of_level("--measure-level", level, scaling)
    kind, _, what = measure.partition(":")
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
                     "number K from 2 on")


def _read_mask(source: str | np.ndarray | PIL.Image.Image, channels: int) -> torch.Tensor:
    """Returns the mask in a file, an array or a picture, bool [1 or C, H, W].

    Raises:
        OSError, ValueError: it can't be read, or has another number of channels, or one value.
    """
    path = source if isinstance(source, str) else "mask"
    if isinstance(source, str):
        content = Path(path).read_bytes()
        source = np.load(io.BytesIO(content), allow_pickle=False) if is_array(path) else \
            read_picture(content)
    is_picture = isinstance(source, PIL.Image.Image)
    mask = torch.from_numpy(_mask_in_picture(source) if is_picture else _mask_in_array(source))
    if mask.ndim != 3 or len(mask) not in (1, channels):
        raise ValueError(f"{path}: a mask of shape {list(mask.shape)}; must be [H, W], or "
                         f"[C, H, W] with C = 1 or the images' {channels}")
    if not mask.any():
        raise ValueError(f"{path}: nothing is measured; a mask is white where pixels are known")
    return mask


def _mask_in_array(array: np.ndarray) -> np.ndarray:
    """Returns where an array [H, W], [C, H, W] or [H, W, C] of any numbers is not 0."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError("must be an array of numbers or of truth values")
    if not np.isfinite(array).all():
        raise ValueError("has values that are not finite; give 0 where nothing is measured")
    if array.ndim == 3 and is_channels_last(array.shape):
        array = array.transpose(2, 0, 1)
    return (array if array.ndim > 2 else array[None]) != 0


def _mask_in_picture(image: PIL.Image.Image) -> np.ndarray:
    """Returns where a picture of any mode is white, or nearer to white than to black."""
    if image.mode in DEEP_MODES:
        values = np.asarray(image).astype(np.float64)
        return (values >= _WHITE * max(values.max(), 1))[None]
    return (np.asarray(image.convert("L")) >= _WHITE * 255)[None]
