"""Reads foreign checkpoints as inert records: nothing in the file is run, imported or looked up.

This is the machine of `dnnlib.pickle_reader`, extended by the few instructions and names that
published checkpoints of EDM, PFGM++, ECT and IDMD use. A name never leads to an object of that
name: it selects one of the small functions below, which build plain data.

    dict, list, tuple, set, str, int, float, bool, None   themselves
    bytes                                                 a memoryview of the file
    OrderedDict, EasyDict                                 a dict
    NumPy scalar                                          an int or float
    tensor, parameter                                     a contiguous tensor on the CPU
    persistent object, ModuleDict                         a Record: class name and state
    method of a persistent object                         a BoundMethod: its name, nothing to call

Two containers are read: a raw pickle (protocol 2 to 5), whose tensors are nested pickles of one
storage each, and the ZIP of torch.save, whose tensors are members. What a file can make this reader
do is bounded by the file's size: every length is checked against the bytes that are left, the
tensors and texts together are no larger than the file, and the number of instructions is limited.

`load_loosely` is for files with weights that any program wrote, such as Lightning. It also reads
the files that torch.save wrote before PyTorch 1.6, accepts any name, and has two more stand-ins:

    tensor                                                a StoredTensor, read on demand
    any other object                                      an Opaque: the name of its class
"""

import functools
import io
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Callable, Collection
from typing import IO, Any, NamedTuple

import torch

from dnnlib.pickle_reader import Budget, Global, Reader, Stateful, reporting_damage, shown_target
from dnnlib.stored_zip import ZIP_MAGIC, Member, stored_members
from dnnlib.util import require, shown

MAX_OPCODES = 2_000_000  # the largest published training states have about 400,000
_TENSOR_COST = 50  # instructions that building a tensor counts as
_MAX_NAME = 256  # characters of a class's name
_MAX_DIMS = 8
_PENDING = 3  # on the stack while a value is read: its key, a class, its arguments

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins a torch.save file from before PyTorch 1.6
_LEGACY_VERSION = 1001
# Names that no program writes beside weights. Nothing would be run in any case, but a file that
# asks for them was made to do harm, which its owner should know.
_HARMFUL_MODULES = frozenset((
    "os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "pty", "runpy", "importlib",
    "ctypes", "webbrowser", "code", "codeop", "timeit", "commands", "multiprocessing", "asyncio",
    "pip", "pdb", "bdb", "cProfile", "profile", "trace"))
_BUILTINS = ("builtins", "__builtin__", "io", "_io")
_HARMFUL_BUILTINS = frozenset((
    "eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint", "globals",
    "setattr", "delattr", "vars"))


class Record(Stateful):
    """An object of the file: the name of its class and its state, a dict."""

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str, state: Any = None):
        self.class_name, self.state = class_name, state

    def set_state(self, state: Any) -> None:
        require(self.state is None and type(state) is dict,
                f"gives {shown(state)} as state to {shown(self)}")
        self.state = state


class BoundMethod:
    """A method of an object of the file: two names, which lead to nothing."""

    __slots__ = ("class_name", "name")

    def __init__(self, class_name: str, name: str):
        self.class_name, self.name = class_name, name


def load(source: str | os.PathLike | IO[bytes], leave_out: Collection[str] = ()) -> Any:
    """Returns the object in a checkpoint as plain data and records.

    Args:
        source: a path, or a binary file that can seek; it is read from its start.
        leave_out: keys of the outermost dictionary. Tensors below them are on the "meta" device,
            so that they take no memory, and so is every other mention of the same tensor.

    Raises:
        OSError: it can't be read.
        ValueError: it is damaged, or asks for something that no known checkpoint contains; one
            line.
    """
    data = _contents(source)
    require(len(data) > 0, "empty")
    with reporting_damage():
        read = _load_zip if data[:4] == ZIP_MAGIC else _load_pickle
        return read(data, leave_out)


class StoredTensor:
    """A tensor of a file that has not been read yet: its type, its shape and its place."""

    __slots__ = ("storage", "offset", "shape", "stride")

    def __init__(self, storage: "_Storage | _LaterStorage", offset: int, shape: tuple[int, ...],
                 stride: tuple[int, ...]):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return self.storage.dtype

    @property
    def span(self) -> int:
        """Number of elements of its storage from its first to its last, both included."""
        steps = zip(self.shape, self.stride, strict=True)
        return 1 + sum((n - 1) * step for n, step in steps) if math.prod(self.shape) else 0

    def is_at_place_of(self, other: "StoredTensor") -> bool:
        """Says whether the other is the same part of the file, and so has the same elements."""
        return self.storage is other.storage and (self.offset, self.shape, self.stride) == (
            other.offset, other.shape, other.stride)

    def read(self) -> torch.Tensor:
        """Returns a contiguous copy, which may be larger than the file if a stride is 0.

        Raises:
            ValueError: the file is damaged there.
        """
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        width = self.dtype.itemsize
        raw = self.storage.data[self.offset * width:(self.offset + self.span) * width]
        # A copy, because numbers in the file need not be aligned as their type requires.
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        if self.dtype == torch.bool:
            flat = (flat != 0).view(torch.uint8)
        return flat.view(self.dtype).as_strided(self.shape, self.stride).contiguous()


class Opaque(Stateful):
    """An object of which only the name of its class is kept, and whether it is a module."""

    __slots__ = ("class_name", "is_module")

    def __init__(self, class_name: str):
        self.class_name, self.is_module = class_name, False

    def set_state(self, state: Any) -> None:
        self.is_module = type(state) is dict and "_modules" in state


def load_loosely(source: str | os.PathLike | IO[bytes]) -> Any:
    """Returns the object in any file of torch.save or pickle, with `StoredTensor`s and `Opaque`s.

    Entries of dictionaries whose key is neither a text nor a small whole number are left out.

    Args:
        source: a path, or a binary file that can seek; it is read from its start.

    Raises:
        OSError: it can't be read.
        ValueError: it is damaged, or asks for something that can only do harm; one line.
    """
    data = _contents(source)
    require(len(data) > 0, "empty")
    with reporting_damage():
        read = _load_zip_loosely if data[:4] == ZIP_MAGIC else _load_pickle_loosely
        return read(data)


def _contents(source: str | os.PathLike | IO[bytes]) -> memoryview:
    """Returns the bytes of a file, writable; they are mapped privately if possible."""
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


def _load_pickle(data: memoryview, leave_out: Collection[str]) -> Any:
    reader = _Reader(data, _NAMES, _Budgets(len(data)), leave_out=leave_out)
    value = reader.read()
    require(reader.pos == len(data), f"has {len(data) - reader.pos} bytes after its end")
    return value


def _torch_members(data: memoryview) -> dict[str, Member]:
    """Returns {name below the root folder: member} of a ZIP of torch.save."""
    members = stored_members(data)
    root = next(iter(members)).partition("/")[0]
    for name in members:
        require(re.fullmatch(r"data\.pkl|data/\d{1,20}|version|byteorder|\.[\w./]{1,60}",
                             name.removeprefix(f"{root}/"))
                and name.startswith(f"{root}/") and ".." not in name,
                f"holds the ZIP member {shown(name)}, which torch.save does not write")
    members = {name.removeprefix(f"{root}/"): member for name, member in members.items()}
    if "byteorder" in members:
        require(bytes(members["byteorder"].read()) == b"little",
                "was written on a big-endian machine")
    require("data.pkl" in members, "lacks the ZIP member data.pkl")
    return members


def _load_zip(data: memoryview, leave_out: Collection[str]) -> Any:
    members = _torch_members(data)
    stored: dict[str, _Storage] = {}

    def storage(pid: Any) -> _Storage:
        dtype, key, numel = _persistent_id(pid, 5)
        require(f"data/{key}" in members, f"lacks the ZIP member data/{key}")
        if key not in stored:
            stored[key] = _Storage(dtype, members[f"data/{key}"].read(), numel)
        known = stored[key]
        require(known.dtype == dtype and known.numel == numel
                and len(known.data) == numel * dtype.itemsize,
                f"storage {key} has {len(known.data)} bytes, not {numel} x {dtype}")
        return known

    reader = _Reader(members["data.pkl"].read(), _NAMES, _Budgets(len(data)), storage, leave_out)
    value = reader.read()
    require(reader.pos == len(reader.data), "has bytes after the end of data.pkl")
    return value


def _load_zip_loosely(data: memoryview) -> Any:
    members = _torch_members(data)
    # A storage's checksum is compared when its first tensor is read.
    contents = {name.removeprefix("data/"): functools.cache(member.read)
                for name, member in members.items() if name.startswith("data/")}
    reader = _LooseReader(members["data.pkl"].read(), _Budgets(len(data)), 5, contents)
    value = reader.read()
    require(reader.pos == len(reader.data), "has bytes after the end of data.pkl")
    return value


def _load_pickle_loosely(data: memoryview) -> Any:
    contents: dict[str, Callable[[], memoryview]] = {}
    reader = _LooseReader(data, _Budgets(len(data)), 6, contents)
    value = reader.read()
    if type(value) is int and value == _LEGACY_MAGIC:
        value = _rest_of_legacy_file(reader, contents)
    require(reader.pos == len(data), f"has {len(data) - reader.pos} bytes after its end")
    return value


def _rest_of_legacy_file(reader: "_LooseReader", contents: dict[str, Callable[[], memoryview]]
                         ) -> Any:
    """Returns the object of a torch.save file from before PyTorch 1.6; storages go to `contents`.

    The file is five pickles (magic number, version, system, object, keys of the storages), followed
    by each storage's number of elements and its bytes.
    """
    version, system = reader.read(), reader.read()
    require(type(version) is int and version == _LEGACY_VERSION and type(system) is dict
            and system.get("little_endian") is True, "is a torch.save file of an unknown format")
    value, keys = reader.read(), reader.read()
    require(type(keys) is list and all(type(key) is str for key in keys)
            and set(keys) == reader.storages.keys(), "does not list its storages")
    for key in keys:
        storage = reader.storages[key]
        require(reader.number(8) == storage.numel, f"has a storage {shown(key)} with two sizes")
        content = reader.take(storage.numel * storage.dtype.itemsize)
        contents[key] = functools.partial(memoryview, content)
    return value


# ----------------------------------------------------------------------------------- the machine


class _Storage(NamedTuple):
    dtype: torch.dtype
    data: memoryview
    numel: int


class _LaterStorage:
    """A storage whose bytes are looked up when they are needed."""

    def __init__(self, dtype: torch.dtype, key: str, numel: int,
                 contents: dict[str, Callable[[], memoryview]]):
        self.dtype, self.numel, self._key, self._contents = dtype, numel, key, contents

    @property
    def data(self) -> memoryview:
        """Its bytes; raises ValueError if the file lacks them or has another number of them."""
        require(self._key in self._contents, f"lacks the storage {shown(self._key)}")
        data = self._contents[self._key]()
        require(len(data) == self.numel * self.dtype.itemsize,
                f"storage {self._key} has {len(data)} bytes, not {self.numel} x {self.dtype}")
        return data


class _Budgets:
    """What a file of `size` bytes may ask for, nested files included."""

    def __init__(self, size: int):
        self.instructions = Budget(MAX_OPCODES, f"has more than {MAX_OPCODES} instructions")
        self.encoded = Budget(size, "asks for more bytes than the file has")
        self.tensors = Budget(size, "asks for more tensor data than the file has")


class _Reader(Reader):
    """The machine with floats, sets, new objects and storages outside the pickle.

    Args:
        storage: returns the storage that a persistent id of the file refers to.
        leave_out: see `load`.
    """

    opcodes = Reader.opcodes | {
        ord("G"): lambda r: r.push(struct.unpack(">d", r.take(8))[0]),
        ord("\x8f"): lambda r: r.push(set()),
        ord("\x81"): lambda r: r.new_object(),
        ord("Q"): lambda r: r.persistent(),
        ord("0"): lambda r: r.discard(),
    }
    strange_opcode = Reader.strange_opcode + ", which no known checkpoint does"
    strange_name = Reader.strange_name + ", which no known checkpoint does; nothing was run"

    def __init__(self, data: memoryview, names: dict, budgets: _Budgets,
                 storage: Callable[[Any], Any] | None = None, leave_out: Collection[str] = ()):
        super().__init__(data, names, budgets.instructions)
        self.budgets, self.storage, self.leave_out = budgets, storage, leave_out

    def new_object(self) -> None:
        cls, args = self.pop_pair()
        new = _CLASSES.get(cls) if type(cls) is Global else None
        if new is None or type(args) is not tuple or args:
            raise ValueError(f"makes an object of {shown_target(cls)}")
        self.push(new())

    def discard(self) -> None:
        # An object with one of its own methods as an attribute is written within itself. Then the
        # outer copy is dropped, and the inner one is taken from the memo.
        value = self.stack.pop()
        require(type(value) is Record, f"discards {shown(value)}")

    def is_left_out(self) -> bool:
        """Says whether what is being read lies below a key of `leave_out`, if that can be told."""
        outermost = self.marks[1] if len(self.marks) > 1 else self.stack
        keys = [item for item in outermost[-_PENDING:] if type(item) is str]
        return bool(keys) and keys[-1] in self.leave_out

    def persistent(self) -> None:
        require(self.storage is not None, "refers to a storage outside itself")
        self.push(self.storage(self.stack.pop()))


class _LooseReader(_Reader):
    """The machine that accepts any name, keeps only plain data, and reads tensors on demand.

    Args:
        pid_length: how many parts a reference to a storage has.
        contents: where the bytes of storages will be found, by key.
    """

    opcodes = _Reader.opcodes | {
        ord("0"): lambda r: r.stack.pop(), ord("1"): lambda r: r.pop_mark(),
        ord("\x8f"): lambda r: r.push(Opaque("builtins.set")),
        ord("\x90"): lambda r: r.pop_mark(),
        ord("\x91"): lambda r: r.frozen_set(), ord("\x92"): lambda r: r.new_object_of_keywords(),
    }
    strange_name = Reader.strange_name + ", which has no place beside weights; nothing was run"

    def __init__(self, data: memoryview, budgets: _Budgets, pid_length: int,
                 contents: dict[str, Callable[[], memoryview]]):
        super().__init__(data, _LOOSE_NAMES, budgets)
        self._pid_length, self._contents = pid_length, contents
        self.storages: dict[str, _LaterStorage] = {}

    def check_name(self, name: Global) -> None:
        root = name.module.partition(".")[0]
        if root in _HARMFUL_MODULES or (
                root in _BUILTINS and name.name in _HARMFUL_BUILTINS):
            raise ValueError(self.strange_name.format(name=shown(".".join(name))))

    def reduce(self) -> None:
        called, args = self.pop_pair()
        function = self.names.get(called) if type(called) is Global else None
        if function is None or type(args) is not tuple:
            self.push(Opaque(_class_name(called)))
        else:
            self.push(function(self, args))

    def new_object(self) -> None:
        cls, _ = self.pop_pair()
        self.push({} if cls in _DICTS else Opaque(_class_name(cls)))

    def new_object_of_keywords(self) -> None:
        self.stack.pop()
        self.new_object()

    def frozen_set(self) -> None:
        self.pop_mark()
        self.push(Opaque("builtins.frozenset"))

    def build(self) -> None:
        if type(self.stack[-2]) is dict:
            self.stack.pop()  # attributes of an OrderedDict, such as those of a state_dict
        else:
            super().build()

    def append(self, items: list) -> None:
        if type(self.stack[-1]) is not Opaque:
            super().append(items)

    def set_items(self, items: list) -> None:
        if type(self.stack[-1]) is Opaque:
            return
        if len(items) % 2 == 0:
            items = [item for key, value in zip(items[::2], items[1::2], strict=True)
                     if self.is_key(key) for item in (key, value)]
        super().set_items(items)

    def persistent(self) -> None:
        pid = self.stack.pop()
        if type(pid) is tuple and len(pid) > 1 and type(pid[1]) is Global \
                and pid[1] not in _DTYPES:  # a module's class, or a type that is not known here
            self.push(pid[1] if pid[0] == "module" else Opaque(_class_name(pid[1])))
            return
        dtype, key, numel = _persistent_id(pid, self._pid_length)
        known = self.storages.setdefault(key, _LaterStorage(dtype, key, numel, self._contents))
        require(known.dtype == dtype and known.numel == numel, f"storage {key} has two types")
        self.push(known)


# ------------------------------------------------------------- what stands in for the known names


def _persistent_object(reader: _Reader, args: tuple) -> Record:
    meta = args[0] if len(args) == 1 and type(args[0]) is dict else {}
    require(meta.get("type") == "class" and meta.get("version") == 6,
            f"has a persistent object of type {shown(meta.get('type'))}, "
            f"version {shown(meta.get('version'))}; only classes of version 6 are known")
    name, state = meta.get("class_name"), meta.get("state")
    require(type(name) is str and len(name) <= _MAX_NAME and type(state) is dict,
            "has a persistent object without class name or state")
    return Record(name, state)  # its source code, module_src, is ignored


def _bound_method(reader: _Reader, args: tuple) -> BoundMethod:
    """Returns the stand-in for getattr(object of the file, method name); nothing is looked up."""
    require(len(args) == 2 and type(args[0]) is Record and type(args[1]) is str
            and re.fullmatch(r"(?!__)[A-Za-z_][A-Za-z0-9_]{0,63}", args[1]),
            f"asks for the attribute {shown(args[1] if len(args) > 1 else None)} of "
            f"{shown_target(args[0] if args else None)}, which no known checkpoint does")
    return BoundMethod(args[0].class_name, args[1])


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
    reader.budgets.encoded.spend(len(args[0]))
    try:
        return memoryview(bytearray(args[0], "latin-1"))
    except UnicodeEncodeError:
        raise ValueError("encodes something other than Latin-1 text") from None


class _DType(Stateful):
    """A NumPy type of the file: its format in `struct`."""

    def __init__(self, layout: str):
        self.layout = layout

    def set_state(self, state: Any) -> None:
        require(type(state) is tuple and len(state) == 8
                and all(type(item) in (int, str, type(None)) for item in state)
                and state[0] == 3 and state[1] in ("<", "|")
                and state[2:] == (None, None, None, -1, -1, 0),
                "has a NumPy type that is not plain")


_SCALARS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "u1": "<B", "b1": "<?"}


def _dtype(reader: _Reader, args: tuple) -> _DType:
    require(len(args) == 3 and type(args[0]) is str and args[0] in _SCALARS
            and args[1] is False and args[2] is True,
            f"asks for the NumPy type {shown(args[0]) if args else 'of nothing'}")
    return _DType(_SCALARS[args[0]])


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
            and pid[0] == "storage" and type(pid[1]) is Global and pid[1] in _DTYPES
            and type(pid[2]) is str and re.fullmatch(r"[0-9]{1,20}", pid[2])
            and type(pid[3]) is str and type(pid[4]) is int and 0 <= pid[4] < 1 << 48
            and pid[5:] in ((), (None,)), "refers to a storage in an unknown way")
    return _DTYPES[pid[1]], pid[2], pid[4]  # its device, pid[3], does not matter


def _nested_storage(reader: _Reader, args: tuple) -> _Storage:
    """Returns the storage in a torch.save file from before PyTorch 1.6: five pickles, numbers."""
    require(len(args) == 1 and type(args[0]) is memoryview, "has a nested file that is not bytes")
    inner = _Reader(args[0], _STORAGES, reader.budgets, _nested_reference)
    magic, version, system = inner.read(), inner.read(), inner.read()
    require(type(magic) is int and magic == _LEGACY_MAGIC and type(version) is int
            and version == _LEGACY_VERSION and type(system) is dict
            and system.get("little_endian") is True, "has a nested file of an unknown format")
    reference, keys = inner.read(), inner.read()
    require(type(reference) is _NestedReference and type(keys) is list and len(keys) == 1
            and type(keys[0]) is str and keys[0] == reference.key,
            "has a nested file that is not of one storage")
    require(inner.number(8) == reference.numel, "has a nested storage with two sizes")
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


def _stored_tensor(args: tuple) -> StoredTensor:
    require(len(args) == 6, "has a tensor in an unknown form")
    storage, offset, size, stride, requires_grad, hooks = args
    require(type(storage) in (_Storage, _LaterStorage) and type(offset) is int
            and type(requires_grad) is bool and type(hooks) is dict and not hooks
            and type(size) is tuple and type(stride) is tuple
            and len(size) == len(stride) <= _MAX_DIMS
            and all(type(n) is int and 0 <= n < 1 << 48 for n in (*size, *stride, offset)),
            "has a tensor in an unknown form")
    tensor = StoredTensor(storage, offset, size, stride)
    require(offset + tensor.span <= storage.numel,
            f"has a tensor that ends at element {offset + tensor.span} of a storage of "
            f"{storage.numel}")
    return tensor


def _tensor(reader: _Reader, args: tuple) -> torch.Tensor:
    """Returns a contiguous copy of a tensor's part of its storage."""
    stored = _stored_tensor(args)
    reader.budgets.instructions.spend(_TENSOR_COST)
    reader.budgets.tensors.spend(
        max(stored.span, math.prod(stored.shape)) * stored.dtype.itemsize)
    if reader.is_left_out():
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")
    return stored.read()


def _unread_tensor(reader: _LooseReader, args: tuple) -> StoredTensor | Opaque:
    if args and type(args[0]) is Opaque:  # a storage of a type that is not known here
        return args[0]
    reader.budgets.instructions.spend(_TENSOR_COST)
    return _stored_tensor(args)


def _unread_parameter(reader: _LooseReader, args: tuple) -> StoredTensor | Opaque:
    require(args and type(args[0]) in (StoredTensor, Opaque), "has a parameter without a tensor")
    return args[0]


def _class_name(cls: Any) -> str:
    return ".".join(cls) if type(cls) is Global else getattr(cls, "class_name", "unknown")


_DTYPES = {
    ("torch", f"{name}Storage"): dtype for name, dtype in {
        "Float": torch.float32, "Double": torch.float64, "Half": torch.float16,
        "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32,
        "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    }.items()
}
_CLASSES = {
    ("torch.nn.modules.container", "ModuleDict"): lambda: Record("ModuleDict"),
    ("dnnlib.util", "EasyDict"): dict,
}
_STORAGES = dict.fromkeys(_DTYPES)  # names that are referred to; nothing calls them
_NAMES = _STORAGES | dict.fromkeys(_CLASSES) | {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _nested_storage,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("builtins", "getattr"): _bound_method,
    ("__builtin__", "getattr"): _bound_method,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
}
_DICTS = (("dnnlib.util", "EasyDict"), ("collections", "OrderedDict"))
_LOOSE_NAMES = _STORAGES | {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_parameter"): _unread_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _unread_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _unread_tensor,
    ("torch.storage", "_load_from_bytes"): _nested_storage,
    ("_codecs", "encode"): _encode,
}
