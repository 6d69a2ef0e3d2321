"""Images as NumPy arrays in files: one image a .npy, or many in one.

    image    [H, W], one channel, or [C, H, W]
    stack    [n, H, W] or [n, C, H, W]

Types are uint8, uint16, int16, float16, float32 and float64. In memory there are three: uint8 and
uint16 stay, all else becomes float32. Nothing is unpickled, and a file must have the bytes of the
shape that it claims.
"""

import io
import math
from pathlib import Path
from typing import IO

import numpy as np

from dnnlib.npy_header import read_npy_header
from images.image_files import ImageFormat

MAGIC = b"\x93NUMPY"
_STORED = {"uint8": "uint8", "uint16": "uint16", "int16": "float32", "float16": "float32",
           "float32": "float32", "float64": "float32"}


def read_format(file: IO[bytes]) -> ImageFormat:
    """Returns the format of the image in a .npy file, of which only the header is read.

    Raises:
        ValueError: it holds no image.
    """
    shape, _, dtype = read_npy_header(file)
    return array_format(shape, dtype)


def decode(data: bytes) -> tuple[np.ndarray, ImageFormat]:
    """Returns the image in a .npy file as uint8, uint16 or float32 [C, H, W], and its format.

    Raises:
        ValueError: it holds no image, is cut short, or has values that are not finite.
    """
    file = io.BytesIO(data)
    shape, is_fortran, dtype = read_npy_header(file)
    image_format = array_format(shape, dtype)
    if len(data) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {list(shape)}, but not the bytes of it")
    values = np.frombuffer(data, dtype, offset=file.tell())
    values = values.reshape(shape[::-1]).T if is_fortran else values.reshape(shape)
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


def encode(values: np.ndarray) -> bytes:
    """Returns a .npy file of values [C, H, W]."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def open_stack(path: Path) -> np.ndarray:
    """Returns the images of one .npy file, [n, C, H, W] of its own type, mapped from the disk.

    Raises:
        OSError: it can't be read.
        ValueError: it holds no images.
    """
    with open(path, "rb") as file:
        shape, _, dtype = read_npy_header(file)
    if len(shape) not in (3, 4):
        raise ValueError(f"an array of shape {list(shape)}; images are [n, H, W] or [n, C, H, W]")
    array_format(shape[1:], dtype)
    stack = np.load(path, mmap_mode="r", allow_pickle=False)
    return stack[:, None] if stack.ndim == 3 else stack


def array_format(shape: tuple[int, ...], dtype: np.dtype) -> ImageFormat:
    """Returns the format of images that are arrays of this shape and type.

    Raises:
        ValueError: they are no images.
    """
    name = dtype.newbyteorder("=").name
    if len(shape) not in (2, 3) or 0 in shape or name not in _STORED:
        raise ValueError(f"a {name} array of shape {list(shape)}; images are [H, W] or [C, H, W] "
                         f"of {', '.join(_STORED)}")
    channels, height, width = (1, *shape)[-3:]
    plural = "" if channels == 1 else "s"
    mode = f"{channels} channel{plural} of {name}"
    return ImageFormat(mode, channels, width, height, _STORED[name])
