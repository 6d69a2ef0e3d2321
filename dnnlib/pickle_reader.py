"""Reads pickles without running anything in them.

A pickle is a program for a small machine. `Reader` is such a machine, but it only knows the
instructions that build plain values; it refuses any other and names it. A name in the file never
leads to an object of that name: the caller's table says which small function stands in for it.

    dict, list, tuple, str, int, bool, None   themselves
    bytes                                     a memoryview of the file
    a name                                    a Global

What a file can ask for is bounded by its size and by a budget of instructions: every length is
checked against the bytes that are left, and an instruction makes at most one small object.
"""

import pickletools
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from dnnlib.util import require, shown

_MAX_NAME = 256  # characters of a module's or class's name
_MAX_MARKS = 500  # collections that are open at once; genuine files have about 30
_MAX_LONG = 16  # bytes of an integer
_MAX_KEY = 1 << 20  # of whole numbers that are keys: indices of parameters
_LONG_TEXT = 1 << 20  # longer ones can only be bytes written as Latin-1
_PROTO, _STOP = 0x80, ord(".")


class Global(NamedTuple):
    """A name in the file: a text in two parts, which leads to nothing."""

    module: str
    name: str


class Stateful:
    """An object of the file that may be given a state, by the instruction BUILD."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        """Sets the state; raises ValueError for one that the object can't have."""
        raise NotImplementedError


class Budget:
    """How much of one thing a file may still ask for; nested files share what is left."""

    def __init__(self, amount: int, problem: str):
        self._left, self._problem = amount, problem

    def spend(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise ValueError(self._problem)


@contextmanager
def reporting_damage() -> Iterator[None]:
    """Turns errors of damaged files that no check has caught into ValueError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError, MemoryError, OverflowError,
            BufferError, struct.error) as error:
        raise ValueError(f"damaged ({type(error).__name__})") from None


class Reader:
    """The machine: a stack, the stacks below open marks, and a memo of objects to be used again.

    A subclass may add instructions and reword errors. `pos` is where the next pickle begins; `read`
    may be called again for pickles back to back.

    Args:
        data: the pickles.
        names: {(module, name): function that stands in for it}; it is called with this reader and
            a tuple of arguments. None is for names that can't be called.
        instructions: how many may still be executed.
    """

    key_types: tuple[type, ...] = (str,)  # besides small whole numbers

    strange_opcode = "uses the pickle instruction {name} (0x{code:02x})"
    strange_name = "asks for {name}"
    strange_key = "has {key} as a key"
    cut_short = "damaged (cut short at byte {pos})"

    def __init__(self, data: memoryview,
                 names: Mapping[tuple[str, str], Callable[[Any, tuple], Any] | None],
                 instructions: Budget):
        self.data, self.names, self.instructions, self.pos = data, names, instructions, 0

    def read(self) -> Any:
        """Returns the object of the pickle at `pos` and moves past its end.

        Raises:
            ValueError: it has an instruction or a name that is not on the lists, or is damaged.
        """
        self.stack: list[Any] = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}
        require(self.byte() == _PROTO and self.byte() in (2, 3, 4, 5),
                "is not a pickle of protocol 2 to 5")
        while (code := self.byte()) != _STOP:
            self.instructions.spend(1)
            step = self.opcodes.get(code)
            if step is None:
                self.refuse(code)
            step(self)
        require(len(self.stack) == 1 and not self.marks, "damaged (the pickle ends too early)")
        return self.stack.pop()

    def refuse(self, code: int) -> None:
        if chr(code) == "i":  # INST carries the name of a class
            self.find(self.line(), self.line())
        known = pickletools.code2op.get(chr(code))
        name = known.name if known else "unknown"
        raise ValueError(self.strange_opcode.format(name=name, code=code))

    # ------------------------------------------------------------------------- what the file holds

    def take(self, count: int) -> memoryview:
        """Returns the next `count` bytes."""
        start = self.pos
        self.pos = stop = start + count
        if stop > len(self.data):
            raise ValueError(f"damaged (cut short: {count} bytes needed at {start}, "
                             f"{len(self.data) - start} are left)")
        return self.data[start:stop]

    def byte(self) -> int:
        """Returns the next byte."""
        pos = self.pos
        if pos >= len(self.data):
            raise ValueError(self.cut_short.format(pos=pos))
        self.pos = pos + 1
        return self.data[pos]

    def number(self, size: int, *, signed: bool = False) -> int:
        """Returns the next whole number, of `size` bytes."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def long(self) -> int:
        """Returns the next whole number, which its size precedes."""
        size = self.byte()
        require(size <= _MAX_LONG, f"has an integer of {size} bytes")
        return self.number(size, signed=True)

    def text(self, size: int) -> str:
        """Returns the next `size` bytes as text."""
        raw = self.take(size)
        # A few wide characters would make Python store the whole text in four bytes each.
        if size > _LONG_TEXT and re.search(rb"[\xc4-\xff]", raw):
            raise ValueError("has a long text that is not Latin-1")
        return _decode(raw)

    def line(self) -> str:
        """Returns the text up to the next line feed."""
        raw = bytes(self.data[self.pos:self.pos + _MAX_NAME + 1])
        length = raw.find(b"\n")
        require(length >= 0, "damaged (a name without an end)")
        self.pos += length + 1
        return _decode(raw[:length])

    # ---------------------------------------------------------------- stack, marks, memo and lists

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        require(len(self.marks) < _MAX_MARKS, "is nested too deeply")
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list:
        """Returns what was pushed since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop_pair(self) -> list:
        """Returns the two objects on top, the upper one last."""
        upper, lower = self.stack.pop(), self.stack.pop()
        return [lower, upper]

    def memoize(self, index: int) -> None:
        require(index not in self.memo, "writes a memo entry twice")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        require(index in self.memo, "damaged (a memo entry that does not exist)")
        self.stack.append(self.memo[index])

    def pack(self, count: int) -> None:
        require(len(self.stack) >= count, "damaged (stack)")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError(f"appends to {shown(target)}")
        target.extend(items)

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError(f"sets items of {shown(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashes of large numbers can be made to collide, those of tuples in tuples to recurse.
            if not self.is_key(key):
                raise ValueError(self.strange_key.format(key=shown(key)))
            if key in target:
                raise ValueError(f"has the key {shown(key)} twice")
            target[key] = value

    def is_key(self, value: Any) -> bool:
        """Says whether a value may be a key: a text, or a whole number of the size of indices."""
        return type(value) in self.key_types or (type(value) is int and 0 <= value < _MAX_KEY)

    # --------------------------------------------------------------------------- names and objects

    def find(self, module: Any, name: Any) -> Global:
        """Returns a name that the file asks for."""
        require(type(module) is str and type(name) is str, "damaged (a name that is not a text)")
        found = Global(module, name)
        self.check_name(found)
        return found

    def check_name(self, name: Global) -> None:
        if name not in self.names:
            raise ValueError(self.strange_name.format(name=shown(".".join(name))))

    def reduce(self) -> None:
        called, args = self.pop_pair()
        function = self.names.get(called) if type(called) is Global else None
        if function is None or type(args) is not tuple:
            raise ValueError(f"calls {shown_target(called)}")
        self.push(function(self, args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Stateful):
            raise ValueError(f"gives {shown(state)} as state to {shown(target)}")
        target.set_state(state)

    # Methods are looked up on the instance, so that a subclass can replace any of them.
    opcodes: Mapping[int, Callable[[Any], None]] = {
        ord(code): step for code, step in {
            "N": lambda r: r.push(None), "\x88": lambda r: r.push(True),
            "\x89": lambda r: r.push(False),
            "J": lambda r: r.push(r.number(4, signed=True)), "K": lambda r: r.push(r.byte()),
            "M": lambda r: r.push(r.number(2)), "\x8a": lambda r: r.push(r.long()),
            "X": lambda r: r.push(r.text(r.number(4))), "\x8c": lambda r: r.push(r.text(r.byte())),
            "B": lambda r: r.push(r.take(r.number(4))), "C": lambda r: r.push(r.take(r.byte())),
            "}": lambda r: r.push({}), "]": lambda r: r.push([]), ")": lambda r: r.push(()),
            "(": lambda r: r.mark(), "t": lambda r: r.push(tuple(r.pop_mark())),
            "\x85": lambda r: r.pack(1), "\x86": lambda r: r.pack(2), "\x87": lambda r: r.pack(3),
            "a": lambda r: r.append([r.stack.pop()]), "e": lambda r: r.append(r.pop_mark()),
            "s": lambda r: r.set_items(r.pop_pair()), "u": lambda r: r.set_items(r.pop_mark()),
            "c": lambda r: r.push(r.find(r.line(), r.line())),
            "\x93": lambda r: r.push(r.find(*r.pop_pair())),
            "R": lambda r: r.reduce(), "b": lambda r: r.build(),
            "h": lambda r: r.recall(r.byte()), "j": lambda r: r.recall(r.number(4)),
            "q": lambda r: r.memoize(r.byte()), "r": lambda r: r.memoize(r.number(4)),
            "\x94": lambda r: r.memoize(len(r.memo)),
            "\x95": lambda r: require(r.number(8) <= len(r.data) - r.pos,
                                      "damaged (cut short: a frame)"),
        }.items()
    }


def shown_target(value: Any) -> str:
    """Returns a short text for what a file calls: a name, unless it is damaged."""
    return shown(".".join(value) if type(value) is Global else value)


def _decode(raw: memoryview | bytes) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise ValueError("damaged (a text that is not UTF-8)") from None
