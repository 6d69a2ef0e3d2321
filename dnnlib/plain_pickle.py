"""Reads pickles of plain values and of NumPy arrays of numbers, such as those of public data sets.

CIFAR-10 was written by Python 2, whose texts are bytes. They are read as Latin-1, which keeps every
byte; an array's content may be such a text. Nothing in a file is run, see `dnnlib.pickle_reader`.
Arrays are views of the file's bytes.
"""

import math
from typing import Any

import numpy as np

from dnnlib.pickle_reader import Budget, Global, Reader, Stateful, reporting_damage
from dnnlib.util import require

MAX_OPCODES = 1_000_000  # a batch of CIFAR-10 has about 60,000

_DTYPES = ("u1", "uint8", "i4", "i8", "f2", "f4", "f8")  # names of types of numbers
_ORDERS = "<>|="  # of bytes
_MAX_DIMS = 8


def loads(data: bytes) -> Any:
    """Returns the object in a pickle; texts of Python 2 are read as Latin-1.

    Raises:
        ValueError: damaged, or anything but plain values and arrays of numbers; one line.
    """
    budget = Budget(MAX_OPCODES, f"has more than {MAX_OPCODES} instructions")
    reader = _Reader(memoryview(data), _NAMES, budget)
    with reporting_damage():
        value = reader.read()
    require(reader.pos == len(data), f"has {len(data) - reader.pos} bytes after its end")
    return value


class Array(Stateful):
    """An array of the file, empty until its state is known."""

    _state: Any = None

    def set_state(self, state: Any) -> None:
        self._state = state

    def numpy(self) -> np.ndarray:
        """Returns the array, read-only.

        Raises:
            ValueError: it isn't of numbers, or its shape doesn't fit its bytes.
        """
        require(type(self._state) is tuple and len(self._state) == 5,
                "has an array without content")
        _, shape, dtype, is_fortran, data = self._state
        require(isinstance(dtype, _DType), "has an array without a type")
        number, data = dtype.numpy(), data.encode("latin-1") if isinstance(data, str) else data
        require(isinstance(data, bytes) and type(shape) is tuple and len(shape) <= _MAX_DIMS
                and all(type(size) is int and size >= 0 for size in shape)
                and math.prod(shape) * number.itemsize == len(data),
                "has an array whose shape doesn't fit")
        order = "F" if is_fortran else "C"
        return np.frombuffer(data, number).reshape(shape, order=order)


class _DType(Stateful):
    """A NumPy type of the file: its name, and the order of bytes."""

    _order = "="

    def __init__(self, name: Any):
        self.name = name

    def set_state(self, state: Any) -> None:
        require(type(state) is tuple and len(state) > 1 and type(state[1]) is str
                and len(state[1]) == 1 and state[1] in _ORDERS, "has a type that isn't supported")
        self._order = state[1]

    def numpy(self) -> np.dtype:
        """Returns it as NumPy's own; raises ValueError if it isn't one of numbers."""
        require(self.name in _DTYPES, "has an array that isn't of numbers")
        return np.dtype(self.name).newbyteorder(self._order)


class _Reader(Reader):
    """The machine with the texts of Python 2, and with bytes as Python's own type."""

    opcodes = Reader.opcodes | {
        ord("U"): lambda r: r.push(str(r.take(r.byte()), "latin-1")),
        ord("T"): lambda r: r.push(str(r.take(r.number(4)), "latin-1")),
        ord("B"): lambda r: r.push(bytes(r.take(r.number(4)))),
        ord("C"): lambda r: r.push(bytes(r.take(r.byte()))),
        0x96: lambda r: r.push(bytes(r.take(r.number(8)))),  # a bytearray, of protocol 5
    }
    key_types = (str, bytes)

    strange_opcode = "has the instruction {name}, which plain data doesn't need"
    strange_key = "has keys that aren't texts"
    cut_short = "pickle exhausted before seeing STOP"

    def check_name(self, name: Global) -> None:
        pass  # an array also names its class; only what is called matters

    def reduce(self) -> None:
        called = self.stack[-2]
        if type(called) is Global and called not in self.names:
            raise ValueError(f"asks for {ascii('.'.join(called))[1:-1][:80]}")
        super().reduce()


def _array(reader: Reader, args: tuple) -> Array:
    return Array()  # its content follows as its state


def _array_of_buffer(reader: Reader, args: tuple) -> Array:
    """Returns an array of protocol 5, which comes with its content."""
    data, dtype, shape, order = args
    array = Array()
    array.set_state((1, shape, dtype, order == "F", data))
    return array


def _dtype(reader: Reader, args: tuple) -> _DType:
    return _DType(args[0])


def _encode(reader: Reader, args: tuple) -> str:
    """Stands for bytes that Python 3 wrote as text; they stay text until they are needed."""
    text, encoding = args
    require(isinstance(text, str) and encoding in ("latin1", "latin-1"), "isn't plain data")
    return text


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy.core.numeric", "_frombuffer"): _array_of_buffer,
    ("numpy._core.numeric", "_frombuffer"): _array_of_buffer,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
