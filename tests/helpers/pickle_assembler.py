"""Pickles assembled byte by byte, in the structure of published checkpoints."""

import io
import struct
import zipfile

import torch

STORAGE_NAMES = {torch.float32: "FloatStorage", torch.float64: "DoubleStorage",
                 torch.float16: "HalfStorage", torch.bfloat16: "BFloat16Storage",
                 torch.int64: "LongStorage", torch.uint8: "ByteStorage",
                 torch.bool: "BoolStorage"}


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """REDUCE of a global; `items` are set on what it returns."""

    def __init__(self, module, name, *args, items=None, state=None):
        self.target, self.args, self.items, self.state = Global(module, name), args, items, state


class New(Call):
    """NEWOBJ of a global without arguments, then SETITEMS or BUILD."""


class Pid:
    def __init__(self, *parts):
        self.parts = parts


class Parameter:
    def __init__(self, tensor):
        self.tensor = tensor


def persistent(class_name, state, changes=()):
    return Call("torch_utils.persistence", "_reconstruct_persistent_obj", {
        "type": "class", "version": 6, "module_src": "import os\nos.system('touch canary')\n",
        "class_name": class_name, "state": state, **dict(changes)})


class WithMethod:
    """A persistent object with one of its own methods among its attributes, the last of these."""

    def __init__(self, class_name, state, attribute, method):
        self.class_name, self.state = class_name, state
        self.attribute, self.method = attribute, method


def ordered(**items):
    return Call("collections", "OrderedDict", items=items)


def scalar(value, numpy="numpy._core"):
    dtype = Call("numpy", "dtype", "f8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
    return Call(f"{numpy}.multiarray", "scalar", dtype, struct.pack("<d", value))


class Assembler:
    """Writes plain values and the objects above as a pickle of protocol 2 or 4.

    Args:
        protocol: 2 or 4.
        storages: a dict that takes the tensors' bytes by key, as in a torch.save ZIP; None nests
            a file of one storage at every tensor instead.
        location: device that the storages are said to be on.
    """

    def __init__(self, protocol=4, storages=None, location="cpu"):
        self.protocol, self.storages, self.location = protocol, storages, location
        self.memo = {}

    def pickle(self, value):
        body = self(value) + b"."
        head = bytes([0x80, self.protocol])
        return head + (b"\x95" + struct.pack("<Q", len(body)) if self.protocol >= 4 else b"") + body

    def remember(self, key, code):
        """Returns `code` the first time and a reference to it from the memo after that."""
        if key in self.memo:
            index = self.memo[key]
            return b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)
        index = self.memo[key] = len(self.memo)
        if self.protocol >= 4:
            return code + b"\x94"
        return code + (b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index))

    def text(self, value):
        raw = value.encode()
        if self.protocol >= 4 and len(raw) < 256:
            return self.remember(value, b"\x8c" + bytes([len(raw)]) + raw)
        return self.remember(value, b"X" + struct.pack("<I", len(raw)) + raw)

    def name(self, one):
        key = ("global", one.module, one.name)
        if self.protocol >= 4:
            if key in self.memo:
                return self.remember(key, b"")
            return self.remember(key, self.text(one.module) + self.text(one.name) + b"\x93")
        return self.remember(key, b"c" + f"{one.module}\n{one.name}\n".encode())

    def bytes(self, value):
        if self.protocol < 3:
            return self(Call("_codecs", "encode", value.decode("latin-1"), "latin1"))
        if len(value) < 256:
            return b"C" + bytes([len(value)]) + value
        return b"B" + struct.pack("<I", len(value)) + value

    def whole(self, value):
        if 0 <= value < 256:
            return b"K" + bytes([value])
        if 0 <= value < 65536:
            return b"M" + struct.pack("<H", value)
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def __call__(self, value):
        plain = {type(None): lambda v: b"N", bool: lambda v: b"\x88" if v else b"\x89",
                 int: self.whole, float: lambda v: b"G" + struct.pack(">d", v), str: self.text,
                 bytes: self.bytes, Global: self.name, torch.Tensor: self.tensor,
                 tuple: self.tuple, set: self.set, dict: lambda v: b"}" + self.items(v)}
        if type(value) in plain:
            return plain[type(value)](value)
        if type(value) is list:
            return b"]" + (b"(" + b"".join(map(self, value)) + b"e" if value else b"")
        if type(value) is Pid:
            return self(value.parts) + b"Q"
        if type(value) is WithMethod:
            return self.with_method(value)
        if type(value) is Parameter:
            return self(Call("torch._utils", "_rebuild_parameter", value.tensor, True, ordered()))
        made = self(value.target) + self(value.args) + (b"\x81" if type(value) is New else b"R")
        if value.state is not None:
            return made + self(value.state) + b"b"
        return made + self.items(value.items)

    def with_method(self, value):
        """Writes the object within itself, as Python does: the outer copy is thrown away."""
        state, inner = ("state", id(value)), ("inner", id(value))

        def copy(code):
            call = persistent(value.class_name, None)
            meta = {key: item for key, item in call.args[0].items() if key != "state"}
            return (self(call.target) + b"}(" + b"".join(self(k) + self(v) for k, v in meta.items())
                    + self("state") + code() + b"u\x85R")

        def attributes():
            module = "builtins" if self.protocol >= 3 else "__builtin__"
            return (self.remember(state, b"}") + b"("
                    + b"".join(self(k) + self(v) for k, v in value.state.items())
                    + self(value.attribute) + self(Global(module, "getattr"))
                    + self.remember(inner, copy(lambda: self.remember(state, b"")))
                    + self(value.method) + b"\x86Ru")

        return copy(attributes) + b"0" + self.remember(inner, b"")

    def tuple(self, value):
        if len(value) <= 3:
            return b"".join(map(self, value)) + [b")", b"\x85", b"\x86", b"\x87"][len(value)]
        return b"(" + b"".join(map(self, value)) + b"t"

    def set(self, value):
        return b"\x8f" if self.protocol >= 4 else self(Call("__builtin__", "set", []))

    def items(self, value):
        if not value:
            return b""
        return b"(" + b"".join(self(k) + self(v) for k, v in value.items()) + b"u"

    def tensor(self, value):
        raw = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy().tobytes()
        cls = Global("torch", STORAGE_NAMES[value.dtype])
        numel = len(raw) // value.element_size()
        if self.storages is None:
            source = Call("torch.storage", "_load_from_bytes",
                          nested(cls.name, numel, raw, location=self.location))
        else:
            key = str(len(self.storages))
            self.storages[key] = raw
            source = Pid("storage", cls, key, self.location, numel)
        return self(Call("torch._utils", "_rebuild_tensor_v2", source, value.storage_offset(),
                         tuple(value.shape), value.stride(), False, ordered()))


def nested(cls, numel, raw, *, location="cpu", magic=0x1950A86A20F9469CFC6C, little=True,
           keys=("94",), said=None):
    """Returns a torch.save file of before 1.6 with one storage."""
    parts = [magic, 1001,
             {"protocol_version": 1001, "little_endian": little,
              "type_sizes": {"short": 2, "int": 4, "long": 4}},
             Pid("storage", Global("torch", cls), "94", location, numel, None), list(keys)]
    pickles = b"".join(Assembler(2).pickle(part) for part in parts)
    return pickles + struct.pack("<q", numel if said is None else said) + raw


def zipped(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def raw_file(value, protocol=4, location="cpu"):
    return Assembler(protocol, location=location).pickle(value)


def zip_file(value, location="cpu", root="archive"):
    storages = {}
    data = Assembler(2, storages, location).pickle(value)
    return zipped([(f"{root}/data.pkl", data), (f"{root}/byteorder", b"little"),
                   *((f"{root}/data/{key}", raw) for key, raw in storages.items()),
                   (f"{root}/version", b"3\n"), (f"{root}/.data/serialization_id", b"1" * 40)])


CONTAINERS = {"raw-2": lambda v, **k: raw_file(v, 2, **k), "raw-4": raw_file, "zip": zip_file}


def mutated(data, rng):
    """Returns a copy with a few flipped bits, cut short, or with code spliced in."""
    data = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)):]
    elif kind == 2:
        at = rng.randrange(len(data))
        piece = rng.choice((bytes([rng.randrange(256)]), b"R", b"b", b"\x81", b"Q", b"(", b"t",
                            b"\x93", b"h\x03", b"cposix\nsystem\n", b"K\x00", b"\x86R", b"u"))
        data[at:at + rng.choice((0, 0, 1, len(piece)))] = piece
    else:
        a, b = sorted(rng.randrange(len(data)) for _ in range(2))
        at = rng.randrange(len(data))
        data[at:at] = data[a:min(b, a + 64)]
    return bytes(data)
