"""Images as NumPy arrays in files: one image per .npy, or many in one.

    image    [H, W], one channel, or [C, H, W]
    stack    [n, H, W] or [n, C, H, W]

Channels may come last if the shape makes no sense otherwise, see `is_channels_last`. Supported
types are uint8, uint16, int8 to int64, float16, float32 and float64. In memory, uint8 and uint16
stay as they are, and all other types become float32. Nothing is unpickled, and the size of a file
must match the shape in its header.
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

    Images [H, W, C] have at most four channels and can't be read as square images [C, H, W]. The
    result is None if both readings are equally plausible, so that the user has to decide.
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
        layout: 'chw' or 'hwc', for an image with three axes. None infers it from the shape, and
            assumes channels first if the shape is ambiguous.
    """
    return (shape[2], *shape[:2]) if _is_last(shape, layout) else shape


def _is_last(shape: tuple[int, ...], layout: str | None) -> bool:
    """Whether an image with three axes has its channels last, by its layout or by its shape."""
    return bool(is_channels_last(shape) if layout is None else len(shape) == 3 and layout == "hwc")


def read_format(file: IO[bytes]) -> ImageFormat:
    """Returns the format of the image in a .npy file, reading only the header.

    Raises:
        ValueError: the file does not hold an image.
    """
    shape, _, dtype = read_npy_header(file)
    return array_format(first_channels(shape), dtype)


def decode(data: bytes, layout: str | None = None) -> tuple[np.ndarray, ImageFormat]:
    """Returns the image in a .npy file as uint8, uint16 or float32 [C, H, W], and its format.

    See `first_channels` for `layout`.

    Raises:
        ValueError: the file does not hold an image, is truncated, or has non-finite values.
    """
    file = io.BytesIO(data)
    shape, is_fortran, dtype = read_npy_header(file)
    is_last = _is_last(shape, layout)
    image_format = array_format(first_channels(shape, layout), dtype)
    if len(data) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"has a header for an array of shape {list(shape)}, but the "
                         "wrong number of bytes")
    values = np.frombuffer(data, dtype, offset=file.tell())
    values = values.reshape(shape[::-1]).T if is_fortran else values.reshape(shape)
    if is_last:
        values = values.transpose(2, 0, 1)
    return to_stored(values.reshape(image_format.shape)), image_format


def to_stored(values: np.ndarray) -> np.ndarray:
    """Returns values as uint8, uint16 or float32.

    Raises:
        ValueError: a value is not finite.
    """
    with np.errstate(over="ignore"):
        stored = np.array(values, _STORED[values.dtype.newbyteorder("=").name], order="C")
    if stored.dtype == np.float32 and not np.isfinite(stored).all():
        position = np.argwhere(~np.isfinite(stored))[0]
        raise ValueError(f"value {values[tuple(position)]} at {position.tolist()} (channel, row, "
                         "column); all must be finite float32 numbers")
    return stored


def read_shape_and_type(data: bytes) -> tuple[tuple[int, ...], str]:
    """Returns the shape of the array in a .npy file and the name of its type.

    Raises:
        ValueError: the file is not a .npy file.
    """
    shape, _, dtype = read_npy_header(io.BytesIO(data))
    return shape, dtype.name


def encode(values: np.ndarray) -> bytes:
    """Returns the content of a .npy file of values [C, H, W]."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def open_stack(path: Path, layout: str | None = None) -> np.ndarray:
    """Returns the images of one .npy file, [n, C, H, W] of its own type, memory-mapped.

    Args:
        path: the file.
        layout: 'chw' or 'hwc', for images with three axes. None infers it from the shape.

    Raises:
        OSError: the file can't be read.
        ValueError: it does not hold images, or its shape is ambiguous.
    """
    with open(path, "rb") as file:
        shape, _, dtype = read_npy_header(file)
    check_stack(shape, dtype, layout)  # before NumPy maps it, as NumPy's errors say less
    return as_stack(np.load(path, mmap_mode="r", allow_pickle=False), layout)


def as_stack(values: np.ndarray, layout: str | None = None) -> np.ndarray:
    """Returns values [n, H, W], [n, C, H, W] or [n, H, W, C] as a view [n, C, H, W].

    Raises:
        ValueError: they are not images, or their shape is ambiguous.
    """
    check_stack(values.shape, values.dtype, layout)
    if values.ndim == 3:
        return values[:, None]
    return values.transpose(0, 3, 1, 2) if _is_last(values.shape[1:], layout) else values


def check_stack(shape: tuple[int, ...], dtype: np.dtype, layout: str | None) -> None:
    """Raises ValueError if such arrays are not stacks of images, or if their shape is ambiguous."""
    if len(shape) not in (3, 4):
        raise ValueError(f"is an array of shape {list(shape)}; images must be [n, H, W], "
                         "[n, C, H, W] or [n, H, W, C]")
    if len(shape) == 3 and is_channels_last(shape):
        raise ValueError(f"is an array of shape {list(shape)}, which is one image; give a folder "
                         "with one .npy file per image")
    check_layout(shape[1:], layout)
    array_format(shape[1:], dtype)


def check_layout(shape: tuple[int, ...], layout: str | None) -> None:
    """Raises ValueError for an image with an ambiguous shape if no layout is given."""
    if layout is None and is_channels_last(shape) is None:
        raise ValueError(f"is an array of shape {list(shape)}, which may be channels x height x "
                         "width or height x width x channels; give --layout=chw or --layout=hwc")


def array_format(shape: tuple[int, ...], dtype: np.dtype) -> ImageFormat:
    """Returns the format of images that are arrays of this shape and type.

    Raises:
        ValueError: they are not images.
    """
    name = dtype.newbyteorder("=").name
    if len(shape) == 4:
        raise ValueError(f"is an array of shape {list(shape)}, which is several images; convert it "
                         "with dataset_tool.py --source=FILE.npy")
    if len(shape) not in (2, 3) or 0 in shape or name not in _STORED:
        raise ValueError(f"is a {name} array of shape {list(shape)}; images must be [H, W] or "
                         f"[C, H, W] of {', '.join(_STORED)}")
    channels, height, width = (1, *shape)[-3:]
    plural = "" if channels == 1 else "s"
    mode = f"{channels} channel{plural} of {name}"
    return ImageFormat(mode, channels, width, height, _STORED[name])
