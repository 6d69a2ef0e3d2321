"""Images as NumPy arrays in files: one image a .npy, or many in one.

    image    [H, W], one channel, or [C, H, W]
    stack    [n, H, W] or [n, C, H, W]

Channels may come last where this is the only sensible reading of a shape, see `is_channels_last`.
Types are uint8, uint16, int8 to int64, float16, float32, float64. In memory there are three:
uint8 and uint16 stay, all else becomes float32. Nothing is unpickled, and a file must have the
bytes of the shape that it claims.
"""

import io
import math
from pathlib import Path
from typing import IO

import numpy as np

from dnnlib.npy_header import read_npy_header
from images.image_files import ImageFormat

MAGIC = b"\x93NUMPY"
_FEW_CHANNELS = 4
_STORED = {"uint8": "uint8", "uint16": "uint16", **dict.fromkeys(
    ["int8", "int16", "int32", "int64", "float16", "float32", "float64"], "float32")}


def is_channels_last(shape: tuple[int, ...]) -> bool | None:
    """Whether an image of this shape is [H, W, C] rather than [H, W] or [C, H, W].

    [H, W, C] has at most four channels and is not [C, H, W] of square images. None where either
    reading is as good, so that somebody has to say which it is.
    """
    if len(shape) != 3:
        return False
    first, middle, last = shape
    few_first, few_last = first <= _FEW_CHANNELS, last <= _FEW_CHANNELS
    if (middle == last and first != middle) or (few_first and not few_last):
        return False
    if few_first or few_last:
        return None if few_first else True
    return False if first < min(middle, last) else None


def first_channels(shape: tuple[int, ...], layout: str | None = None) -> tuple[int, ...]:
    """Returns the shape of an image with its channels first.

    Args:
        shape: [H, W], [C, H, W] or [H, W, C].
        layout: 'chw' or 'hwc', where the image has three axes; None goes by the shape, and takes
            the channels for the first axis where that says nothing.
    """
    return (shape[2], *shape[:2]) if _is_last(shape, layout) else shape


def _is_last(shape: tuple[int, ...], layout: str | None) -> bool:
    """Whether an image of three axes has its channels last, if that is its layout or likely."""
    return bool(is_channels_last(shape) if layout is None else len(shape) == 3 and layout == "hwc")


def read_format(file: IO[bytes]) -> ImageFormat:
    """Returns the format of the image in a .npy file, of which only the header is read.

    Raises:
        ValueError: it holds no image.
    """
    shape, _, dtype = read_npy_header(file)
    return array_format(first_channels(shape), dtype)


def decode(data: bytes, layout: str | None = None) -> tuple[np.ndarray, ImageFormat]:
    """Returns the image in a .npy file as uint8, uint16 or float32 [C, H, W], and its format.

    `layout` is that of `first_channels`.

    Raises:
        ValueError: it holds no image, is cut short, or has values that are not finite.
    """
    file = io.BytesIO(data)
    shape, is_fortran, dtype = read_npy_header(file)
    is_last = _is_last(shape, layout)
    image_format = array_format(first_channels(shape, layout), dtype)
    if len(data) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {list(shape)}, but not the bytes of it")
    values = np.frombuffer(data, dtype, offset=file.tell())
    values = values.reshape(shape[::-1]).T if is_fortran else values.reshape(shape)
    if is_last:
        values = values.transpose(2, 0, 1)
    return to_stored(values.reshape(image_format.shape)), image_format


def to_stored(values: np.ndarray) -> np.ndarray:
    """Returns values as uint8, uint16 or float32.

    Raises:
        ValueError: they are not finite.
    """
    with np.errstate(over="ignore"):
        stored = np.array(values, _STORED[values.dtype.newbyteorder("=").name], order="C")
    if stored.dtype == np.float32 and not np.isfinite(stored).all():
        position = np.argwhere(~np.isfinite(stored))[0]
        raise ValueError(f"value {values[tuple(position)]} at {position.tolist()} (channel, row, "
                         "column); all must be finite float32 numbers")
    return stored


def read_shape_and_type(data: bytes) -> tuple[tuple[int, ...], str]:
    """Returns the shape of the array in a .npy file, and the name of its type.

    Raises:
        ValueError: it is no such file.
    """
    shape, _, dtype = read_npy_header(io.BytesIO(data))
    return shape, dtype.name


def encode(values: np.ndarray) -> bytes:
    """Returns a .npy file of values [C, H, W]."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def open_stack(path: Path, layout: str | None = None) -> np.ndarray:
    """Returns the images of one .npy file, [n, C, H, W] of its own type, mapped from the disk.

    Args:
        path: the file.
        layout: 'chw' or 'hwc', where an image has three axes; None goes by the shape.

    Raises:
        OSError: it can't be read.
        ValueError: it holds no images, or its shape has two readings.
    """
    with open(path, "rb") as file:
        shape, _, dtype = read_npy_header(file)
    check_stack(shape, dtype, layout)  # before NumPy maps it, whose errors say less
    return as_stack(np.load(path, mmap_mode="r", allow_pickle=False), layout)


def as_stack(values: np.ndarray, layout: str | None = None) -> np.ndarray:
    """Returns values [n, H, W], [n, C, H, W] or [n, H, W, C] as a view [n, C, H, W].

    Raises:
        ValueError: they are no images, or their shape has two readings.
    """
    check_stack(values.shape, values.dtype, layout)
    if values.ndim == 3:
        return values[:, None]
    return values.transpose(0, 3, 1, 2) if _is_last(values.shape[1:], layout) else values


def check_stack(shape: tuple[int, ...], dtype: np.dtype, layout: str | None) -> None:
    """Raises ValueError if arrays of this shape and type are no images, or have two readings."""
    if len(shape) not in (3, 4):
        raise ValueError(f"an array of shape {list(shape)}; images are [n, H, W], [n, C, H, W] or "
                         "[n, H, W, C]")
    if len(shape) == 3 and is_channels_last(shape):
        raise ValueError(f"an array of shape {list(shape)} is one image, not several; put images "
                         "into a folder, a .npy each")
    check_layout(shape[1:], layout)
    array_format(shape[1:], dtype)


def check_layout(shape: tuple[int, ...], layout: str | None) -> None:
    """Raises ValueError for an image whose shape has two readings, if no layout is given."""
    if layout is None and is_channels_last(shape) is None:
        raise ValueError(f"an array of shape {list(shape)} may be channels x height x width or "
                         "height x width x channels; give --layout=chw or --layout=hwc")


def array_format(shape: tuple[int, ...], dtype: np.dtype) -> ImageFormat:
    """Returns the format of images that are arrays of this shape and type.

    Raises:
        ValueError: they are no images.
    """
    name = dtype.newbyteorder("=").name
    if len(shape) == 4:
        raise ValueError(f"an array of shape {list(shape)} is several images, not one; convert it "
                         "by dataset_tool.py --source=FILE.npy")
    if len(shape) not in (2, 3) or 0 in shape or name not in _STORED:
        raise ValueError(f"a {name} array of shape {list(shape)}; images are [H, W] or [C, H, W] "
                         f"of {', '.join(_STORED)}")
    channels, height, width = (1, *shape)[-3:]
    plural = "" if channels == 1 else "s"
    mode = f"{channels} channel{plural} of {name}"
    return ImageFormat(mode, channels, width, height, _STORED[name])
