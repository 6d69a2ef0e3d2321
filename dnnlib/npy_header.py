"""Reads the header of a NumPy array file (.npy), which need not be trusted."""

import tokenize
from typing import IO

import numpy as np

_READERS = {(1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0}
# What NumPy's reader, which parses Python text, has been seen to raise for damaged headers.
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, SyntaxError, EOFError,
           OverflowError, RecursionError, MemoryError, tokenize.TokenError)


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns (shape, whether in Fortran order, type); the file is left before the values.

    Raises:
        ValueError: the file is not a NumPy array, or its header is damaged.
    """
    try:
        return _READERS[np.lib.format.read_magic(file)](file)
    except _DAMAGE as error:
        raise ValueError("not a NumPy array") from error
