"""Foreign checkpoints as inert records: nothing in the file is run, imported or looked up.

A pickle is a program. This reader knows the few instructions and the few names that published EDM
and PFGM++ checkpoints consist of and refuses everything else, naming it. A name never leads to an
object of that name: it selects one of the small functions below, which build plain data.

    dict, list, tuple, set, str, int, float, bool, None   themselves
    bytes                                                 a memoryview of the file
    OrderedDict, EasyDict                                 a dict
    NumPy scalar                                          an int or float
    tensor, parameter                                     a contiguous tensor on the CPU
    persistent object, ModuleDict                         a Record: class name and state

Two containers are read: a raw pickle (protocol 2 to 5), whose tensors are nested pickles of one
storage each, and the ZIP of torch.save, whose tensors are members. What a file can make this reader
do is bounded by the file's size: every length is checked against the bytes that are there, the
tensors and texts together are no larger than the file, and the number of instructions is limited.
"""

import io
import math
import mmap
import os
import pickletools
import re
import stat
import struct
import zlib
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import torch

from dnnlib.util import require

ZIP_MAGIC = b"PK\x03\x04"
MAX_OPCODES = 2_000_000  # the largest published training states have about 400,000
_MAX_MARKS = 500  # collections that are open at once; genuine files have about 30
_TENSOR_COST = 50  # what building a tensor counts as
_MAX_LONG = 16  # bytes of an integer
_MAX_NAME = 256  # characters of a module's or class's name
_MAX_KEY = 1 << 20  # of whole numbers that are keys: indices of parameters
_MAX_DIMS = 8
_LONG_TEXT = 1 << 20  # longer ones can only be bytes written as Latin-1

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # opens a torch.save file of before 1.6
_LEGACY_VERSION = 1001

# What may go wrong in a damaged file beyond what is checked explicitly.
_DAMAGED = (IndexError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError,
            MemoryError, OverflowError, struct.error, zlib.error, BufferError)


class Record:
    """An object of the file: the name of its class and its state, a dict."""

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str, state: Any = None):
        self.class_name, self.state = class_name, state


class _Storage(NamedTuple):
    dtype: torch.dtype
    data: memoryview
    numel: int


class _Global(NamedTuple):
    """A known name; at most one of the three says what it is for."""

    name: str
    call: Callable[["_Reader", tuple], Any] | None = None
    new: Callable[[], Any] | None = None
    dtype: torch.dtype | None = None


class _Budget:
    """What a file may still ask for: instructions, bytes of text turned to bytes, tensor bytes."""

    def __init__(self, size: int):
        self.opcodes, self.encoded, self.tensors = MAX_OPCODES, size, size

    def spend_opcodes(self, count: int) -> None:
        self.opcodes -= count
        if self.opcodes < 0:
            raise ValueError(f"has more than {MAX_OPCODES} instructions")

    def spend_encoded(self, count: int) -> None:
        self.encoded -= count
        require(self.encoded >= 0, "asks for more bytes than the file has")

    def spend_tensors(self, count: int) -> None:
        self.tensors -= count
        require(self.tensors >= 0, "asks for more tensor data than the file has")


def load(source: str | os.PathLike | IO[bytes]) -> Any:
    """Returns the object in a checkpoint as plain data and records.

    Args:
        source: a path, or a binary file that can seek; it is read from its start.

    Raises:
        OSError: it can't be read.
        ValueError: damaged, or it asks for something that no known checkpoint contains; one line.
    """
    data = _contents(source)
    require(len(data) > 0, "empty")
    try:
        return _load_zip(data) if data[:4] == ZIP_MAGIC else _load_pickle(data)
    except _DAMAGED as error:
        raise ValueError(f"damaged ({type(error).__name__})") from None


def shown(value: Any) -> str:
    """Returns a short text for a value out of a file, one line of ASCII whatever the value is."""
    if type(value) is str:
        return ascii(value if len(value) <= 80 else value[:77] + "...")
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    return f"a {type(value).__name__}"


def _contents(source: str | os.PathLike | IO[bytes]) -> memoryview:
    """Returns the bytes of a file; mapped privately where that is possible, and so writable."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return _contents(file)
    if isinstance(source, io.BufferedReader) and isinstance(source.raw, io.FileIO):
        status = os.fstat(source.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size:
            return memoryview(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY))
    source.seek(0)
    return memoryview(bytearray(source.read()))


# ------------------------------------------------------------------------------------ containers


def _load_pickle(data: memoryview) -> Any:
    reader = _Reader(data, _Budget(len(data)))
    value = reader.read()
    require(reader.pos == len(data), f"has {len(data) - reader.pos} bytes after its end")
    return value


def _load_zip(data: memoryview) -> Any:
    members = _zip_members(data)
    root = next(iter(members)).partition("/")[0]
    for name in members:
        require(re.fullmatch(r"data\.pkl|data/\d{1,9}|version|byteorder|\.[\w./]{1,60}",
                             name.removeprefix(f"{root}/"))
                and name.startswith(f"{root}/") and ".." not in name,
                f"holds the ZIP member {shown(name)}, which torch.save does not write")
    if f"{root}/byteorder" in members:
        require(bytes(members[f"{root}/byteorder"].read()) == b"little",
                "was written on a big-endian machine")
    require(f"{root}/data.pkl" in members, "lacks the ZIP member data.pkl")
    stored: dict[str, _Storage] = {}

    def storage(pid: Any) -> _Storage:
        dtype, key, numel = _persistent_id(pid, 5)
        require(f"{root}/data/{key}" in members, f"lacks the ZIP member data/{key}")
        if key not in stored:
            stored[key] = _Storage(dtype, members[f"{root}/data/{key}"].read(), numel)
        known = stored[key]
        require(known.dtype == dtype and known.numel == numel
                and len(known.data) == numel * dtype.itemsize,
                f"storage {key} has {len(known.data)} bytes, not {numel} x {dtype}")
        return known

    reader = _Reader(members[f"{root}/data.pkl"].read(), _Budget(len(data)), storage)
    value = reader.read()
    require(reader.pos == len(reader.data), "has bytes after the end of data.pkl")
    return value


class _Member(NamedTuple):
    name: str
    data: memoryview
    crc: int

    def read(self) -> memoryview:
        require(zlib.crc32(self.data) == self.crc,
                f"damaged (the checksum of {shown(self.name)} does not match)")
        return self.data


_MAX_MEMBERS = 100_000
_END, _END64, _LOCATOR64, _ENTRY, _LOCAL = (
    struct.Struct(f"<{layout}") for layout in (
        "4s4H2LH", "4sQ2H2L4Q", "4sLQL", "4s6H3L5H2L", "4s5H3L2H"))
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # in place of a number that stands in a ZIP64 record


def _zip_members(data: memoryview) -> dict[str, _Member]:
    """Returns {name: member} of a ZIP whose members are all stored; nothing may stand around it."""
    start, end, count = _zip_directory(data)
    require(0 < count <= _MAX_MEMBERS, f"is a ZIP of {count} members")
    members, extents, pos = {}, [], start
    for _ in range(count):
        require(pos + _ENTRY.size <= end, "damaged (ZIP directory)")
        (magic, _, _, flags, method, _, _, crc, packed, size, name_len, extra_len, comment_len,
         _, _, _, offset) = _ENTRY.unpack_from(data, pos)
        pos += _ENTRY.size
        stop = pos + name_len + extra_len + comment_len
        require(magic == b"PK\x01\x02" and stop <= end, "damaged (ZIP directory)")
        raw = bytes(data[pos:pos + name_len])
        name = raw.decode("ascii", "backslashreplace")
        extra = data[pos + name_len:pos + name_len + extra_len]
        size, packed, offset = _zip64_numbers(extra, [size, packed, offset])
        pos = stop
        require(method == 0 and packed == size and not flags & 1,
                f"compresses or encrypts the ZIP member {shown(name)}")
        require(name not in members, f"holds the ZIP member {shown(name)} twice")
        begin = _local_data(data, offset, raw)
        require(begin + size <= start, f"damaged (ZIP member {shown(name)} is cut short)")
        members[name] = _Member(name, data[begin:begin + size], crc)
        extents.append((offset, begin + size))
    require(pos == end, "damaged (ZIP directory)")
    extents.sort()
    require(extents[0][0] == 0, "damaged (bytes before the first ZIP member)")
    require(all(one[1] <= two[0] for one, two in zip(extents, extents[1:], strict=False)),
            "holds ZIP members that overlap")
    return members


def _zip_directory(data: memoryview) -> tuple[int, int, int]:
    """Returns where a ZIP's directory starts and ends and how many entries it has."""
    at = len(data) - _END.size
    require(at >= 0, "damaged (cut short)")
    magic, disk, first_disk, here, count, size, start, comment = _END.unpack_from(data, at)
    require(magic == b"PK\x05\x06" and comment == 0,
            "damaged (the ZIP does not end with its directory: cut short, or bytes follow)")
    locator = at - _LOCATOR64.size
    if locator >= 0 and data[locator:locator + 4] == b"PK\x06\x07":
        _, _, at, _ = _LOCATOR64.unpack_from(data, locator)
        require(at + _END64.size == locator, "damaged (ZIP64 directory)")
        magic, _, _, _, disk, first_disk, here, count, size, start = _END64.unpack_from(data, at)
        require(magic == b"PK\x06\x06", "damaged (ZIP64 directory)")
    require(disk == first_disk == 0 and here == count and start + size == at,
            "damaged (ZIP directory)")
    return start, start + size, count


def _zip64_numbers(extra: memoryview, numbers: list[int]) -> list[int]:
    """Returns size, packed size and offset, those that are too large for 32 bits from `extra`."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = [int.from_bytes(extra[4 + i:12 + i], "little") for i in range(0, length, 8)]
        extra = extra[4 + length:]
    return [wide.pop(0) if number == _FULL32 else number for number in numbers]


def _local_data(data: memoryview, offset: int, name: bytes) -> int:
    """Returns where the content of a ZIP member begins."""
    require(offset + _LOCAL.size <= len(data), "damaged (ZIP member outside the file)")
    magic, _, flags, method, *_, name_len, extra_len = _LOCAL.unpack_from(data, offset)
    at = offset + _LOCAL.size
    require(magic == ZIP_MAGIC and method == 0 and not flags & 1
            and data[at:at + name_len] == name, "damaged (ZIP member without its header)")
    return at + name_len + extra_len


# ----------------------------------------------------------------------------------- the machine


class _Reader:
    """The pickle machine with the closed list of instructions.

    `pos` is where the next pickle begins; `read` may be called again for pickles back to back.
    """

    def __init__(self, data: memoryview, budget: _Budget,
                 storage: Callable[[Any], _Storage] | None = None,
                 names: dict[tuple[str, str], _Global] | None = None):
        self.data, self.budget, self.storage, self.pos = data, budget, storage, 0
        self.names = _GLOBALS if names is None else names

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
            self.budget.spend_opcodes(1)
            step = _OPCODES.get(code)
            if step is None:
                self.refuse(code)
            step(self)
        require(len(self.stack) == 1 and not self.marks, "damaged (the pickle ends too early)")
        return self.stack.pop()

    def refuse(self, code: int) -> None:
        if chr(code) == "i":  # INST carries the name of a class
            self.find(self.line(), self.line())
        known = pickletools.code2op.get(chr(code))
        name = known.name if known else "none that exists"
        raise ValueError(f"uses the pickle instruction {name} (0x{code:02x}), "
                         "which no known checkpoint does")

    def take(self, count: int) -> memoryview:
        """Returns the next `count` bytes."""
        start = self.pos
        self.pos = stop = start + count
        if stop > len(self.data):
            raise ValueError(f"damaged (cut short: {count} bytes wanted at {start}, "
                             f"{len(self.data) - start} are left)")
        return self.data[start:stop]

    def byte(self) -> int:
        """Returns the next byte."""
        pos = self.pos
        if pos >= len(self.data):
            raise ValueError(f"damaged (cut short at byte {pos})")
        self.pos = pos + 1
        return self.data[pos]

    def number(self, size: int, *, signed: bool = False) -> int:
        """Returns the next whole number, of `size` bytes."""
        return int.from_bytes(self.take(size), "little", signed=signed)

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

    def find(self, module: Any, name: Any) -> _Global:
        require(type(module) is str and type(name) is str, "damaged (a name that is not a text)")
        known = self.names.get((module, name))
        if known is None:
            raise ValueError(f"asks for {shown(f'{module}.{name}')}, "
                             "which no known checkpoint does; nothing was run")
        return known

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        require(len(self.marks) < _MAX_MARKS, "is nested too deeply")
        self.marks.append(self.stack)
        self.stack = []

    def memoize(self, index: int) -> None:
        require(index not in self.memo, "writes a memo entry twice")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        require(index in self.memo, "damaged (a memo entry that is not there)")
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
            if type(key) is not str and not (type(key) is int and 0 <= key < _MAX_KEY):
                raise ValueError(f"has {shown(key)} as a key")
            if key in target:
                raise ValueError(f"has the key {shown(key)} twice")
            target[key] = value

    def reduce(self) -> None:
        args, called = self.stack.pop(), self.stack.pop()
        if type(called) is not _Global or not called.call or type(args) is not tuple:
            raise ValueError(f"calls {_shown_target(called)}")
        self.push(called.call(self, args))

    def new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if type(cls) is not _Global or not cls.new or type(args) is not tuple or args:
            raise ValueError(f"makes an object of {_shown_target(cls)}")
        self.push(cls.new())

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is _DType:
            _check_dtype_state(state)
        elif type(target) is Record and target.state is None and type(state) is dict:
            target.state = state
        else:
            raise ValueError(f"gives {shown(state)} as state to {shown(target)}")

    def persistent(self) -> None:
        require(self.storage is not None, "refers to a storage outside itself")
        self.push(self.storage(self.stack.pop()))

    def frame(self) -> None:
        size = self.number(8)
        require(size <= len(self.data) - self.pos, "damaged (cut short: a frame)")

    def long(self) -> None:
        size = self.byte()
        require(size <= _MAX_LONG, f"has an integer of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))


def _decode(raw: memoryview | bytes) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise ValueError("damaged (a text that is not UTF-8)") from None


def _shown_target(value: Any) -> str:
    return shown(value.name) if type(value) is _Global else shown(value)


_PROTO, _STOP = 0x80, ord(".")
_OPCODES: dict[int, Callable[[_Reader], None]] = {
    ord(code): step for code, step in {
        "N": lambda r: r.push(None), "\x88": lambda r: r.push(True),
        "\x89": lambda r: r.push(False),
        "J": lambda r: r.push(r.number(4, signed=True)), "K": lambda r: r.push(r.byte()),
        "M": lambda r: r.push(r.number(2)),
        "G": lambda r: r.push(struct.unpack(">d", r.take(8))[0]),
        "\x8a": _Reader.long,
        "X": lambda r: r.push(r.text(r.number(4))), "\x8c": lambda r: r.push(r.text(r.byte())),
        "B": lambda r: r.push(r.take(r.number(4))),
        "C": lambda r: r.push(r.take(r.byte())),
        "}": lambda r: r.push({}), "]": lambda r: r.push([]), ")": lambda r: r.push(()),
        "\x8f": lambda r: r.push(set()),
        "(": _Reader.mark, "t": lambda r: r.push(tuple(r.pop_mark())),
        "\x85": lambda r: r.pack(1), "\x86": lambda r: r.pack(2), "\x87": lambda r: r.pack(3),
        "a": lambda r: r.append([r.stack.pop()]), "e": lambda r: r.append(r.pop_mark()),
        "s": lambda r: r.set_items([r.stack.pop(), r.stack.pop()][::-1]),
        "u": lambda r: r.set_items(r.pop_mark()),
        "c": lambda r: r.push(r.find(r.line(), r.line())),
        "\x93": lambda r: r.push(r.find(*[r.stack.pop(), r.stack.pop()][::-1])),
        "R": _Reader.reduce, "\x81": _Reader.new_object, "b": _Reader.build,
        "Q": _Reader.persistent,
        "h": lambda r: r.recall(r.byte()), "j": lambda r: r.recall(r.number(4)),
        "q": lambda r: r.memoize(r.byte()), "r": lambda r: r.memoize(r.number(4)),
        "\x94": lambda r: r.memoize(len(r.memo)),
        "\x95": _Reader.frame,
    }.items()
}


# ------------------------------------------------------------- what stands in for the known names


def _persistent_object(reader: _Reader, args: tuple) -> Record:
    meta = args[0] if len(args) == 1 and type(args[0]) is dict else {}
    require(meta.get("type") == "class" and meta.get("version") == 6,
            f"has a persistent object of type {shown(meta.get('type'))}, "
            f"version {shown(meta.get('version'))}; only classes of version 6 are known")
    name, state = meta.get("class_name"), meta.get("state")
    require(type(name) is str and len(name) <= _MAX_NAME and type(state) is dict,
            "has a persistent object without class name or state")
    return Record(name, state)  # its source code, module_src, is left where it is


def _ordered_dict(reader: _Reader, args: tuple) -> dict:
    require(not args, "gives arguments to OrderedDict")
    return {}


def _set(reader: _Reader, args: tuple) -> set:
    require(len(args) == 1 and type(args[0]) is list and not args[0],
            "has a set that is not empty")
    return set()


def _encode(reader: _Reader, args: tuple) -> memoryview:
    require(len(args) == 2 and type(args[0]) is str and args[1] == "latin1",
            "encodes something other than Latin-1 text")
    reader.budget.spend_encoded(len(args[0]))
    try:
        return memoryview(bytearray(args[0], "latin-1"))
    except UnicodeEncodeError:
        raise ValueError("encodes something other than Latin-1 text") from None


class _DType(NamedTuple):
    layout: str


_SCALARS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "u1": "<B", "b1": "<?"}


def _dtype(reader: _Reader, args: tuple) -> _DType:
    require(len(args) == 3 and type(args[0]) is str and args[0] in _SCALARS
            and args[1] is False and args[2] is True,
            f"asks for the NumPy type {shown(args[0]) if args else 'of nothing'}")
    return _DType(_SCALARS[args[0]])


def _check_dtype_state(state: Any) -> None:
    plain = type(state) is tuple and len(state) == 8 and all(
        type(item) in (int, str, type(None)) for item in state)
    require(plain and state[0] == 3 and state[1] in ("<", "|")
            and state[2:] == (None, None, None, -1, -1, 0), "has a NumPy type that is not plain")


def _scalar(reader: _Reader, args: tuple) -> int | float:
    require(len(args) == 2 and type(args[0]) is _DType and type(args[1]) is memoryview
            and len(args[1]) == struct.calcsize(args[0].layout),
            "has a NumPy scalar that is not a plain number")
    return struct.unpack(args[0].layout, args[1])[0]


def _parameter(reader: _Reader, args: tuple) -> torch.Tensor:
    require(len(args) == 3 and type(args[0]) is torch.Tensor and type(args[1]) is bool
            and type(args[2]) is dict and not args[2],
            "has a parameter that is not a plain tensor")
    return args[0]


def _persistent_id(pid: Any, length: int) -> tuple[torch.dtype, str, int]:
    """Returns (dtype, key, number of elements) of a reference to a storage."""
    require(type(pid) is tuple and len(pid) == length and type(pid[0]) is str
            and pid[0] == "storage" and type(pid[1]) is _Global and pid[1].dtype
            and type(pid[2]) is str and re.fullmatch(r"[0-9]{1,20}", pid[2])
            and type(pid[3]) is str and type(pid[4]) is int and 0 <= pid[4] < 1 << 48
            and pid[5:] in ((), (None,)), "refers to a storage in an unknown way")
    return pid[1].dtype, pid[2], pid[4]  # its device, pid[3], does not matter


def _nested_storage(reader: _Reader, args: tuple) -> _Storage:
    """Returns the storage in a torch.save file of before 1.6, five pickles and then the numbers."""
    require(len(args) == 1 and type(args[0]) is memoryview, "has a nested file that is not bytes")
    inner = _Reader(args[0], reader.budget, _nested_reference, _STORAGES)
    magic, version, system = inner.read(), inner.read(), inner.read()
    require(type(magic) is int and magic == _LEGACY_MAGIC and type(version) is int
            and version == _LEGACY_VERSION and type(system) is dict
            and system.get("little_endian") is True, "has a nested file of an unknown format")
    reference, keys = inner.read(), inner.read()
    require(type(reference) is _NestedReference and type(keys) is list and len(keys) == 1
            and type(keys[0]) is str and keys[0] == reference.key,
            "has a nested file that is not of one storage")
    require(inner.number(8) == reference.numel, "has a nested storage of two sizes")
    data = args[0][inner.pos:]
    require(len(data) == reference.numel * reference.dtype.itemsize,
            f"nested storage has {len(data)} bytes, not {reference.numel} x {reference.dtype}")
    return _Storage(reference.dtype, data, reference.numel)


class _NestedReference(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


def _nested_reference(pid: Any) -> _NestedReference:
    return _NestedReference(*_persistent_id(pid, 6))


def _tensor(reader: _Reader, args: tuple) -> torch.Tensor:
    """Returns a contiguous copy of what a tensor sees of its storage."""
    require(len(args) == 6, "has a tensor in an unknown form")
    storage, offset, size, stride, requires_grad, hooks = args
    require(type(storage) is _Storage and type(offset) is int and type(requires_grad) is bool
            and type(hooks) is dict and not hooks
            and type(size) is tuple and type(stride) is tuple
            and len(size) == len(stride) <= _MAX_DIMS
            and all(type(n) is int and 0 <= n < 1 << 48 for n in (*size, *stride, offset)),
            "has a tensor in an unknown form")
    count = math.prod(size)
    span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    require(offset + span <= storage.numel,
            f"has a tensor that ends at element {offset + span} of a storage of {storage.numel}")
    reader.budget.spend_opcodes(_TENSOR_COST)
    reader.budget.spend_tensors(max(span, count) * storage.dtype.itemsize)
    if not count:
        return torch.empty(size, dtype=storage.dtype)
    width = storage.dtype.itemsize
    raw = storage.data[offset * width:(offset + span) * width]
    # A copy, because in the file numbers need not stand where their type's alignment wants them.
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    if storage.dtype == torch.bool:
        flat = (flat != 0).view(torch.uint8)
    return flat.view(storage.dtype).as_strided(size, stride).contiguous()


_STORAGES = {
    ("torch", f"{name}Storage"): _Global(f"torch.{name}Storage", dtype=dtype) for name, dtype in {
        "Float": torch.float32, "Double": torch.float64, "Half": torch.float16,
        "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32,
        "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    }.items()
}
_GLOBALS = _STORAGES | {
    (module, name): _Global(f"{module}.{name}", call=call) for module, name, call in (
        ("torch_utils.persistence", "_reconstruct_persistent_obj", _persistent_object),
        ("collections", "OrderedDict", _ordered_dict),
        ("torch._utils", "_rebuild_parameter", _parameter),
        ("torch._utils", "_rebuild_tensor_v2", _tensor),
        ("torch.storage", "_load_from_bytes", _nested_storage),
        ("numpy.core.multiarray", "scalar", _scalar),
        ("numpy._core.multiarray", "scalar", _scalar),
        ("numpy", "dtype", _dtype),
        ("_codecs", "encode", _encode),
        ("builtins", "set", _set),
        ("__builtin__", "set", _set),
    )
} | {
    ("torch.nn.modules.container", "ModuleDict"):
        _Global("torch.nn.modules.container.ModuleDict", new=lambda: Record("ModuleDict")),
    ("dnnlib.util", "EasyDict"): _Global("dnnlib.util.EasyDict", new=dict),
}
