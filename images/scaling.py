"""Maps stored values v to the network's scale, x, channel by channel; and measures statistics.

    x = (v - center) / spread          v = spread x + center

8-bit images have center and spread 127.5. Floating-point and 16-bit data have those that
`dataset_tool.py --scale` chose, so that x is about [-1, 1]. Without a recorded scaling, floats are
used unchanged, and 16-bit values are mapped to [-1, 1]. PyTorch is needed only for tensors.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from images.image_files import (
    DAMAGE,
    GENERATE_RECORD,
    LABELS_NAME,
    Files,
    ImageFormat,
    error_prefix,
    parse_json,
)

if TYPE_CHECKING:
    import torch

STD = 0.5  # standard deviation of x with --scale=std: what networks assume by default
_MAX_CHANNELS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Scaling:
    """An affine map for each channel, or one for all channels.

    Raises:
        ValueError: a number is not finite, or a spread is not positive.
    """

    center: tuple[float, ...]  # the value that becomes 0, [1] or [C]
    spread: tuple[float, ...]  # the distance from center that becomes 1, [1] or [C]
    is_8bit: bool = False  # whether the data are whole numbers from 0 to 255

    def __post_init__(self):
        object.__setattr__(self, "center", tuple(map(float, self.center)))
        object.__setattr__(self, "spread", tuple(map(float, self.spread)))
        if not 0 < len(self.center) == len(self.spread) <= _MAX_CHANNELS or not all(
                math.isfinite(c) and 0 < s < math.inf
                for c, s in zip(self.center, self.spread, strict=True)):
            raise ValueError('must hold equally many finite numbers in "center" and positive ones '
                             'in "spread"')

    def equals(self, other: "Scaling") -> bool:
        """Whether another scaling has the same effect on images that both accept."""
        pairs = ((self.center, other.center), (self.spread, other.spread))
        return self.is_8bit == other.is_8bit and all(
            len({len(a), len(b)} - {1}) <= 1 and np.allclose(a, b, rtol=1e-6, atol=0)
            for a, b in pairs)

    def to_network(self, values: "torch.Tensor", dtype: "torch.dtype | None" = None
                   ) -> "torch.Tensor":
        """Returns values [..., C, H, W] of any type in the network's scale: float32, or `dtype`."""
        import torch

        dtype = torch.float32 if dtype is None else dtype
        if self.is_8bit:  # in EDM's order of operations, for bit-identical results
            return values.to(dtype) / 127.5 - 1
        center, spread = _columns(self, values.device)
        return ((values.to(torch.float64) - center) / spread).to(dtype)

    def to_data(self, images: "torch.Tensor") -> "torch.Tensor":
        """Returns images [..., C, H, W] in the data's own units: float32, or uint8 for 8 bits.

        8-bit images are clip(127.5 x + 128, 0, 255), truncated.
        """
        import torch

        if self.is_8bit:
            return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
        center, spread = _columns(self, images.device)
        return (images.to(torch.float64) * spread + center).to(torch.float32)

    def size_in_data(self, deviations: "torch.Tensor") -> "torch.Tensor":
        """Returns deviations [..., C, H, W] of images in the data's own units, float32."""
        return (deviations * _columns(self, deviations.device)[1]).float()

    def to_picture(self, values: np.ndarray) -> np.ndarray:
        """Returns data [..., C, H, W] as uint8 for display: x = -1 is black and x = 1 white."""
        import torch

        if self.is_8bit:
            return values
        return EIGHT_BIT.to_data(self.to_network(torch.from_numpy(values))).numpy()

    def __str__(self) -> str:
        if self.is_8bit:
            return "0 to 255 map to -1 to 1"
        ranges = [f"{c - s:.9g} to {c + s:.9g}" for c, s in zip(
            self.center, self.spread, strict=True)]
        return "; ".join(ranges) + " map to -1 to 1"

    def check_channels(self, channels: int) -> None:
        """Raises ValueError if the scaling does not fit data with this number of channels."""
        if len(self.center) not in (1, channels):
            raise ValueError(f"has {len(self.center)} channels, but the data have {channels}")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON files and checkpoints."""
        record = {"center": list(self.center), "spread": list(self.spread)}
        return record | ({"dtype": "uint8"} if self.is_8bit else {})

    @classmethod
    def of_range(cls, low: float, high: float) -> "Scaling":
        """Returns the scaling that maps these two values to -1 and 1 in all channels."""
        return cls(((low + high) / 2,), ((high - low) / 2,))

    @classmethod
    def from_dict(cls, record: Any) -> "Scaling":
        """Returns the scaling that `to_dict` wrote.

        Raises:
            ValueError: the record is malformed; the message does not say where it is.
        """
        record = record if isinstance(record, dict) else {}
        lists = [record.get(key) for key in ("center", "spread")]
        if not all(isinstance(numbers, list) and all(
                type(number) in (int, float) for number in numbers) for numbers in lists):
            raise ValueError('must be {"center": [...], "spread": [...]}')
        return cls(*map(tuple, lists), is_8bit=record.get("dtype") == "uint8")


@functools.lru_cache(maxsize=16)  # copying to the device would block in every step
def _columns(scaling: Scaling, device: "torch.device") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Returns center and spread as [C, 1, 1] float64 on the device."""
    import torch

    with torch.inference_mode(False):  # the cached tensors outlive the caller's mode
        return tuple(torch.tensor(numbers, dtype=torch.float64, device=device)[:, None, None]
                     for numbers in (scaling.center, scaling.spread))


def display_window(center: float, width: float) -> Scaling:
    """Returns the scaling whose `to_picture` shows a window of values, from black to white.

    As in radiology, the window has a center and a width. Values outside are black or white.
    """
    return Scaling((center,), (width / 2,))


EIGHT_BIT = Scaling((127.5,), (127.5,), is_8bit=True)
_UNSCALED = {"uint8": EIGHT_BIT, "uint16": Scaling((32767.5,), (32767.5,)),
             "float32": Scaling((0.0,), (1.0,))}


def default_scaling(dtype: Any) -> Scaling:
    """Returns the scaling of data of this NumPy type if none is recorded."""
    return _UNSCALED[str(np.dtype(dtype)) if np.dtype(dtype).kind == "u" else "float32"]


def recorded_scaling(
    files: Files, image_format: ImageFormat, key: str, path: Any
) -> Scaling:
    """Returns the scaling of the images of a data set, or of a folder that generate.py filled.

    dataset.json or generate.json records it under `key`, except for 8-bit images, which always have
    the same. `path` is the data set's name in errors.

    Raises:
        ValueError: the recorded scaling is invalid, or has another number of channels.
    """
    for name in (LABELS_NAME, GENERATE_RECORD):
        if image_format.dtype == "uint8" or name not in files.names:
            continue
        where = f"{path}: {name}"
        try:
            with files.open(name) as file:
                record = parse_json(file.read(), where)
        except DAMAGE as error:
            raise ValueError(f"{where} can't be read: {error}") from error
        if isinstance(record, dict) and record.get(key) is not None:
            with error_prefix(f'{where}: "{key}" '):
                scaling = Scaling.from_dict(record[key])
                scaling.check_channels(image_format.channels)
            return scaling
    return default_scaling(image_format.dtype)


@dataclasses.dataclass
class Moments:
    """Mean, variance and range of each channel of values that arrive in pieces, float64.

    Two pieces are merged by the sums of squares about their own means (Chan, Golub, LeVeque 1983),
    which stays accurate if the mean is much larger than the standard deviation.
    """

    count: int  # values per channel
    mean: np.ndarray  # [C]
    squares: np.ndarray  # [C], sum of (v - mean)^2
    low: np.ndarray  # [C]
    high: np.ndarray  # [C]

    @classmethod
    def of(cls, values: np.ndarray) -> "Moments":
        """Returns the moments of values [..., C, H, W]."""
        flat = np.moveaxis(values, -3, 0).reshape(values.shape[-3], -1).astype(np.float64)
        mean = flat.mean(axis=1)
        squares = np.square(flat - mean[:, None]).sum(axis=1)
        return cls(flat.shape[1], mean, squares, flat.min(axis=1), flat.max(axis=1))

    def merge(self, other: "Moments") -> "Moments":
        """Returns the moments of both sets of values together."""
        count = self.count + other.count
        step = other.mean - self.mean
        return Moments(count, self.mean + step * (other.count / count),
                       self.squares + other.squares + step**2 * (self.count * other.count / count),
                       np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of each channel, [C]."""
        return np.sqrt(self.squares / self.count)

    def scaled(self, scaling: Scaling) -> "Moments":
        """Returns the moments of the values in the network's scale."""
        center, spread = np.array(scaling.center), np.array(scaling.spread)
        low, mean, high = ((x - center) / spread for x in (self.low, self.mean, self.high))
        return Moments(self.count, mean, self.squares / spread**2, low, high)

    def overall_std(self) -> float:
        """Returns the standard deviation of all channels together."""
        return float(np.sqrt(np.mean(self.std**2) + np.var(self.mean)))


def image_means(values: np.ndarray, scaling: Scaling) -> np.ndarray:
    """Returns the mean of x and of x^2 of each image of values [B, C, H, W], float64 [B, 2]."""
    center, spread = np.array(scaling.center), np.array(scaling.spread)
    flat = values.reshape(*values.shape[:2], -1)
    mean = flat.mean(axis=2, dtype=np.float64)  # [B, C], of v
    square = np.stack([np.square(image, dtype=np.float64).mean(axis=1) for image in flat])
    # x = (v - c) / s, so x^2 = (v^2 - 2 c v + c^2) / s^2
    x = (mean - center) / spread
    x_square = (square - 2 * center * mean + center**2) / spread**2
    return np.stack([x.mean(axis=1), x_square.mean(axis=1)], axis=1)


class Spread:
    """How much images differ, for the error of a standard deviation measured on a sample.

    Let m_i and q_i be the means of x and x^2 over image i, and m and q their means over all images.
    The variance of the data is s^2 = q - m^2. Its error follows from f_i = q_i - 2 m m_i + m^2, the
    mean square of the image about m, because the error of m has no effect to first order in 1 / n.
    """

    def __init__(self):
        self._parts: list[np.ndarray] = []

    def add(self, means: np.ndarray) -> None:
        """Adds the means of some images, [B, 2], as `image_means` returns them."""
        self._parts.append(means)

    def relative_error(self, population: int) -> float:
        """Returns the standard error of s divided by s, or 0 if the whole population was measured.

        It is std(f) / (2 s^2 sqrt(n)) sqrt(1 - n / population) for a sample without repetition.
        """
        means = np.concatenate(self._parts)
        count, (mean, _) = len(means), means.mean(axis=0)
        if count >= population:
            return 0.0
        squares = means[:, 1] - 2 * mean * means[:, 0] + mean**2
        return float(squares.std(ddof=1) / (2 * squares.mean() * np.sqrt(count))
                     * np.sqrt(1 - count / population))


def scaling_by(rule: str | tuple[float, float], moments: Moments) -> Scaling:
    """Returns the scaling that a rule gives for data with these moments.

    'minmax' maps the least and largest value of each channel to -1 and 1. 'std' maps their mean to
    0 and their standard deviation to 0.5. (lo, hi) maps these two values to -1 and 1 in all
    channels.

    Raises:
        ValueError: a channel is constant, which neither 'minmax' nor 'std' can scale.
    """
    if not isinstance(rule, str):
        return Scaling.of_range(*rule)
    constant = np.flatnonzero(moments.low == moments.high)
    if len(constant):
        first = constant[0]
        raise ValueError(f"={rule}: channel {first} is {moments.low[first]:g} in all images; give "
                         "LO,HI, or leave the channel out")
    if rule == "std":
        return Scaling(tuple(moments.mean), tuple(moments.std / STD))
    return Scaling(tuple((moments.low + moments.high) / 2), tuple((moments.high - moments.low) / 2))
