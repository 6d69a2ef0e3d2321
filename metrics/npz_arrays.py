"""Arrays of an .npz, read without unpickling and with sizes checked before memory is allocated."""

import math
import zipfile

import numpy as np

from dnnlib.npy_header import read_npy_header

MAX_FEATURES = 1 << 14  # a covariance of 2 GiB
_KINDS = {"f": "floats", "i": "integers", "U": "text"}


def read_npz_array(archive: zipfile.ZipFile, name: str, kind: str,
                   most_rows: int = MAX_FEATURES, most_bytes: int = MAX_FEATURES) -> np.ndarray:
    """Returns one array of an .npz after checking its header.

    Args:
        archive: the .npz.
        name: name of the array, without '.npy'.
        kind: NumPy's character for its kind of type: 'f', 'i' or 'U'.
        most_rows: maximum of the first dimension; that of the second is MAX_FEATURES.
        most_bytes: maximum size of one number or text.

    Raises:
        KeyError: there is no such array.
        ValueError: the array has another type, or is too large or damaged.
    """
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        shape, _, dtype = read_npy_header(member)
        if dtype.kind != kind:
            raise ValueError(f"{name} has type {dtype}, expected {_KINDS[kind]}")
        rows, columns = (*shape, 0, 0)[:2]
        if len(shape) > 2 or rows > most_rows or columns > MAX_FEATURES:
            raise ValueError(f"{name} has shape {list(shape)}, at most {MAX_FEATURES} features")
        if dtype.itemsize > most_bytes:
            raise ValueError(f"{name} has type {dtype}, at most {most_bytes} bytes")
        if member.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{name} has shape {list(shape)}, but another number of bytes")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
