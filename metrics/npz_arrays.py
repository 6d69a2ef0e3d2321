"""Arrays of an .npz, which nothing unpickles and whose sizes are checked before memory is taken."""

import math
import zipfile

import numpy as np

from dnnlib.npy_header import read_npy_header

MAX_FEATURES = 1 << 14  # a covariance of 2 GiB
_KINDS = {"f": "floats", "i": "integers", "U": "text"}


def read_npz_array(archive: zipfile.ZipFile, name: str, kind: str,
                   most_rows: int = MAX_FEATURES, most_bytes: int = MAX_FEATURES) -> np.ndarray:
    """Returns one array of an .npz after its header has been found plausible.

    Args:
        archive: the .npz.
        name: of the array, without '.npy'.
        kind: of its type, as NumPy calls it: 'f', 'i' or 'U'.
        most_rows: the most that its first dimension may have; the second has MAX_FEATURES at most.
        most_bytes: the most that one number or text may have.

    Raises:
        KeyError: there is no such array.
        ValueError: it is another array than it should be.
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
            raise ValueError(f"{name} has shape {list(shape)}, but not the bytes of it")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
