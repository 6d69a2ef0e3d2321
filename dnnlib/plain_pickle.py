"""Pickles of plain values and byte arrays, read by a small machine; nothing in them is run.

A pickle is a program. This machine knows the instructions that dicts, lists, tuples, numbers, texts
and NumPy arrays of bytes consist of, looks no name up, and refuses everything else, naming it.
Every instruction pushes at most one small object, so what a file can ask for is bounded by the
number of instructions; arrays are views of the bytes that are there.
"""

import io
import math
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from dnnlib.util import require

MAX_OPCODES = 1_000_000  # a batch of CIFAR-10 has about 60,000

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_FRESH = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE",
           "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = (str, bytes, int)
_BYTE_DTYPES = ("u1", "uint8")
_MAX_DIMS = 8
# What may go wrong in a damaged file beyond what is checked explicitly.
_DAMAGED = (IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError)


class ByteArray:
    """A uint8 array of the file, empty until its state is known."""

    def __init__(self) -> None:
        self._state: tuple | None = None

    def set_state(self, state: tuple) -> None:
        self._state = state

    def numpy(self) -> np.ndarray:
        """Returns the array, which can't be written to.

        Raises:
            ValueError: it isn't of bytes, or its shape doesn't fit them.
        """
        if not (isinstance(self._state, tuple) and len(self._state) == 5):
            raise ValueError("has an array without content")
        _, shape, dtype, is_fortran, data = self._state
        require(isinstance(dtype, _Dtype) and dtype.name in _BYTE_DTYPES, "has an array that "
                "isn't of bytes")
        data = data.encode("latin-1") if isinstance(data, str) else data
        require(isinstance(data, bytes) and isinstance(shape, tuple) and len(shape) <= _MAX_DIMS
                and all(type(size) is int and size >= 0 for size in shape)
                and math.prod(shape) == len(data), "has an array whose shape doesn't fit")
        order = "F" if is_fortran else "C"
        return np.frombuffer(data, np.uint8).reshape(shape, order=order)


class _Dtype:
    """A NumPy type of the file: its name."""

    def __init__(self, name: Any, *_: Any):
        self.name = name

    def set_state(self, state: Any) -> None:
        pass  # byte order and alignment, which bytes don't have


class _Name:
    """A global that the file asks for; only those of `_CALLS` can be called."""

    def __init__(self, name: str):
        self.name = name


def _reconstruct(*_: Any) -> ByteArray:
    return ByteArray()


def _encode(text: str, encoding: str) -> str:
    """Stands for bytes that Python 3 wrote as text; they stay text until they are needed."""
    require(isinstance(text, str) and encoding in ("latin1", "latin-1"), "isn't plain data")
    return text


_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray _reconstruct": _reconstruct,
    "numpy._core.multiarray _reconstruct": _reconstruct,
    "numpy dtype": _Dtype,
    "_codecs encode": _encode,
}


def loads(data: bytes) -> Any:
    """Returns the object in a pickle; texts of Python 2 are read as Latin-1.

    Raises:
        ValueError: damaged, or anything but plain values and arrays of bytes; one line.
    """
    machine = _Machine()
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            require(count < MAX_OPCODES, f"has more than {MAX_OPCODES} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, arg)
    except _DAMAGED as error:
        raise ValueError(f"damaged ({type(error).__name__})") from None
    raise ValueError("has no end")


class _Machine:
    """The stack, the marks in it, and the objects that later instructions refer to."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        """Does one instruction of pickle."""
        stack = self.stack
        if name in _VALUES:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[arg])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in _TUPLES:
            stack[-_TUPLES[name]:] = [tuple(stack[-_TUPLES[name]:])]
        elif name in ("APPEND", "APPENDS"):
            values = self._since_mark() if name == "APPENDS" else [stack.pop()]
            require(type(stack[-1]) is list, "appends to what isn't a list")
            stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            require(type(stack[-1]) is dict, "sets items of what isn't a dict")
            # Hashing a tuple of tuples of tuples ... would overflow the stack of C.
            require(all(type(key) in _KEYS for key in values[::2]), "has keys that aren't texts")
            stack[-1].update(zip(values[::2], values[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_Name(arg))
        elif name == "STACK_GLOBAL":
            member, module = stack.pop(), stack.pop()
            stack.append(_Name(f"{module} {member}"))
        elif name == "REDUCE":
            self._call()
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].set_state(state)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"has the instruction {name}, which plain data doesn't need")

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        name = function.name if isinstance(function, _Name) else type(function).__name__
        if name not in _CALLS:
            raise ValueError(f"asks for {ascii(name)[1:-1][:80].replace(' ', '.')}")
        self.stack.append(_CALLS[name](*args))

