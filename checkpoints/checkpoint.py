"""Training states and network snapshots: what is in them, how they are written and read.

Both are ordinary `torch.save` files that hold only tensors, numbers, strings, lists and dicts, so
they load with `weights_only=True`. A state has all that a run needs to continue exactly:

    format, version, network   what the file is; class name and keywords of the network
    net, ema, optimizer        state dicts
    progress                   cur_nimg, EMA ramp-up, best score, loss scale, bad-step counters
    options, dataset           the run's TrainConfig; name, size and fingerprint of the data
    checksum                   sha256 of everything else

`dataset` also has the scaling of the data, `scale` (images/scaling.py), and for condition images
`cond_scale` and `cond_shape`; files without `scale` are of 8-bit images. With labels, `label_kind`
is 'classes' or 'vectors'; classes have `class_counts`, the number of images of each, and perhaps
`class_names`. For a run on patches, `patch` is their side; `image_shape` and `cond_shape` are still
those of whole images.

A snapshot has format, version, network, ema, progress, options, dataset, checksum, and perhaps
`sigma_max`, the noise level where sampling starts. A snapshot of a foreign file has
`converted_from`: the `file` and its `format`, the `key` of the network if there are several,
whether the weights are `averaged` (None: not known), and `notes`.

Random draws and the order of the data are functions of the seed in `options` and of `cur_nimg`, so
no generator state is kept.
"""

import hashlib
import json
import math
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

import torch

from checkpoints import bare, published
from checkpoints.names import find_network, neighbouring_snapshot
from dnnlib.atomic import atomic_write
from dnnlib.pickle_reader import Budget, Global, Reader
from dnnlib.util import is_url, open_url
from images.image_files import error_prefix
from images.scaling import Scaling
from pfgmpp.loss import LSUN_SIGMA_MAX
from pfgmpp.networks import Precond, build_network, network_D
from pfgmpp.schedules import default_range

STATE_FORMAT = "pfgmpp-training-state"
SNAPSHOT_FORMAT = "pfgmpp-network-snapshot"
VERSION = 1
BEST_STATE = "training-state-best.pt"  # of the best score so far; not among the numbered states

_STATE_NAME = re.compile(r"training-state-(\d{6,}(?:\.\d{3})?)\.(?P<suffix>pt|pkl)")
_COLLECTIONS = ("collections", "builtins", "__builtin__")
_MAX_DEPTH = 20  # of nested data; states have 5
_READ_ERRORS = (zipfile.BadZipFile, RuntimeError, MemoryError, EOFError,
                KeyError, IndexError, AttributeError, ValueError, TypeError, OverflowError,
                AssertionError, NotImplementedError, struct.error, OSError)


class SnapshotGivenError(ValueError):
    """A network snapshot was given where a training state is needed."""


def kimg_tag(nimg: int, *, fractional: bool) -> str:
    """Returns thousands of images for a file name: '000012', or '000012.345'."""
    return f"{nimg // 1000:06d}" + (f".{nimg % 1000:03d}" if fractional else "")


def training_states(run_dir: str | Path, suffix: str = "pt") -> list[Path]:
    """Returns the training states in a run directory, oldest first by the numbers in their names.

    Their `suffix` is 'pt', or 'pkl' for pickles of PFGM++.

    Raises:
        OSError: there is no such folder.
    """
    found = [(float(match[1]), path) for path in Path(run_dir).iterdir()
             if (match := _STATE_NAME.fullmatch(path.name)) and match["suffix"] == suffix]
    return [path for _, path in sorted(found)]


def state_tag(path: Path) -> str:
    """Returns the NNNNNN or NNNNNN.FFF of a training state's name."""
    match = _STATE_NAME.fullmatch(path.name)
    assert match, path
    return match[1]


def digest(value: Any) -> str:
    """Returns a sha256 over nested plain data and tensors: values, dtypes and shapes."""
    sha = hashlib.sha256()
    _update(sha, value)
    return sha.hexdigest()


def _update(sha, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        sha.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, dict):
        sha.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=repr):  # formats differ in the order of keys
            _update(sha, key)
            _update(sha, value[key])
    elif isinstance(value, list | tuple):
        sha.update(f"list {len(value)};".encode())
        for item in value:
            _update(sha, item)
    else:
        sha.update(f"{type(value).__name__} {value!r};".encode())


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a state or snapshot atomically, with its checksum.

    Raises:
        OSError: the file can't be written; an earlier file of that name is untouched.
    """
    content = {**content, "version": VERSION}
    content["checksum"] = digest(content)
    with atomic_write(path) as file:
        _save_torch(content, file)


class _ErrorKeeper:
    """A writable file that remembers its first error."""

    def __init__(self, file: IO[bytes]):
        self._file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save_torch(content: dict[str, Any], file: IO[bytes]) -> None:
    """Calls `torch.save`, but keeps the OSError of a full disk, not PyTorch's RuntimeError."""
    keeper = _ErrorKeeper(file)
    try:
        torch.save(content, keeper)
    except Exception as error:
        if keeper.error is None:
            raise
        raise keeper.error from error
    if keeper.error is not None:
        raise keeper.error


def load(source: str | Path, key: str | None = None, config: str | Path | None = None
         ) -> dict[str, Any]:
    """Reads and verifies a state or snapshot from a path or URL; tensors are on the CPU.

    For a run directory, it reads the newest network. It also reads checkpoints of EDM, PFGM++, ECT
    and IDMD; published.py says what they hold. Weights without their network's configuration are
    read with that of `config`, see bare.py.

    Args:
        source: a path, a URL or a run directory.
        key: which network to read from a file of IDMD, one of `published.KEYS`; None is
            `published.DEFAULT_KEY`. For weights without their configuration, see `bare.read`.
        config: a training_options.json with the configuration, for a file that only has weights.

    Returns:
        The content, see the docstring of this module, `published.read` and `bare.read`.

    Raises:
        OSError: it can't be opened.
        ValueError: it is not such a file, damaged, or of a newer version; or `key` is not among its
            networks, or it has only one network; or it only has weights, which `config` does not
            fit; or `config` is given for a file that describes its network.
    """
    options = None if config is None else bare.read_options(config)
    with _open_source(source) as file:
        head = file.read(published.HEAD_BYTES)
        file.seek(0)
        try:
            content = _load(source, file, head, key)
        except published.UnreadableError as error:
            return _load_bare(source, file, head, key, options, error)
    if options is not None:
        raise ValueError(f"{options.name}: {source} describes its network itself; leave --config "
                         "out")
    return content


def _load(source: str | Path, file: IO[bytes], head: bytes, key: str | None) -> dict[str, Any]:
    """Returns the content of a file that describes its network."""
    if published.is_published(head):
        return published.read(file, str(source), key)
    if head[8:9] == b"{":  # safetensors: the header's length, then the header in JSON
        content = _read_safetensors(source, file.read())
    else:
        content = _read_torch(source, file)
    kind = content.get("format") if isinstance(content, dict) else None
    if kind not in (STATE_FORMAT, SNAPSHOT_FORMAT):
        raise published.UnreadableError(f"{source}: not a training state or network snapshot of "
                                        "this project")
    if content.get("version") != VERSION:
        raise ValueError(f"{source}: written in format version {content.get('version')}; this code "
                         f"reads version {VERSION}: update the code")
    checksum = content.pop("checksum", None)
    if digest(content) != checksum:
        raise ValueError(f"{source}: damaged (its checksum does not match)")
    published.check_key(content, key, str(source))
    return content


def _load_bare(
    source: str | Path, file: IO[bytes], head: bytes, key: str | None,
    options: bare.RunOptions | None, error: ValueError,
) -> dict[str, Any]:
    """Returns the content of a file of weights, or raises ValueError that says what is in it.

    If it is not a file of weights either, raises `error`.
    """
    try:
        found = bare.load(file, head)
        what = bare.description(found)
    except ValueError:
        raise error from None
    if what is None:
        raise error
    if options is None:
        raise ValueError(f"{source}: {what}") from None
    return bare.read(found, str(source), options, key)


def _read_torch(source: str | Path, file: IO[bytes]) -> Any:
    """Returns the content of one of our files, not verified yet.

    PyTorch builds only plain data, but it trusts the sizes that the file claims. So members must be
    uncompressed, and tensors and items no more than the file has bytes for. Nor does PyTorch check
    keys, whose hashes can be made to collide, or how deeply data are nested; this function does.
    """
    try:
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("compressed")
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    _check_depth(_Skeleton(archive.read(name)).read())
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        _check_claims(content, size)
    except pickle.UnpicklingError:
        file.seek(0)
        return published.read(file, str(source))  # names what the file asked for
    except _READ_ERRORS:
        raise ValueError(f"{source}: damaged, or not a training state or network snapshot of this "
                         "project") from None
    return content


class _Skeleton(Reader):
    """Reads the pickle of a `torch.save` file without its tensors, with the keys of plain data."""

    opcodes = Reader.opcodes | {
        ord("G"): lambda r: r.push(struct.unpack(">d", r.take(8))[0]),
        ord("Q"): lambda r: r.push(r.stack.pop() and None),  # the place of a tensor's bytes
    }

    def __init__(self, data: bytes):
        super().__init__(memoryview(data), {}, Budget(len(data), "has too many instructions"))

    def text(self, size: int) -> str:
        # File names may have bytes that are not UTF-8, which Python keeps as surrogates.
        return str(self.take(size), "utf-8", "surrogatepass")

    def check_name(self, name: Global) -> None:
        pass  # PyTorch has its own list of allowed names

    def reduce(self) -> None:
        called, args = self.pop_pair()
        is_dict = called == ("collections", "OrderedDict") and not args
        if type(called) is Global and called.module in _COLLECTIONS and not is_dict:
            raise ValueError("makes a collection whose keys can't be checked")
        self.push({} if is_dict else None)


def _check_depth(content: Any) -> None:
    """Raises ValueError for data that are nested more deeply than any that is written."""
    level = [content]
    for _ in range(_MAX_DEPTH):
        level = [item for value in level if isinstance(value, dict | list | tuple)
                 for item in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _check_claims(content: Any, size: int) -> None:
    """Raises ValueError if nested data hold more bytes or items than a file of `size` can."""
    pending, bytes_left, items_left = [content], size, size
    while pending:
        value = pending.pop()
        items_left -= 1
        if isinstance(value, torch.Tensor):
            bytes_left -= value.numel() * value.element_size()
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            pending += value
        if min(bytes_left, items_left) < 0:
            raise ValueError("claims more than the file holds")


def _open_source(source: str | Path) -> IO[bytes]:
    return open_url(find_network(source))


def with_average(content: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Returns the content of a file, with averaged weights from the file beside it if it has none.

    States of EDM and ECT lack them: they are in the network-snapshot of the same number.
    "ema_source" of the result names it.

    Raises:
        OSError, ValueError: that file can't be read, or is of another network.
    """
    snapshot = None if is_url(str(source)) else neighbouring_snapshot(source)
    if content.get("ema") is not None or snapshot is None:
        return content
    other = load(snapshot)
    difference = first_difference(content["network"], other["network"])
    if difference:
        raise ValueError(f"{snapshot}: is beside {Path(source).name}, but is of another network "
                         f"({difference}); move one of them away")
    return content | {"ema": other["ema"], "ema_source": str(snapshot)}


def as_snapshot(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the snapshot that is in a loaded state or snapshot."""
    return {
        "format": SNAPSHOT_FORMAT, "network": content["network"],
        "ema": sampling_weights(content),
        "progress": {"cur_nimg": content["progress"]["cur_nimg"]}, "options": content["options"],
        **{key: content[key] for key in ("dataset", "sigma_max", "converted_from")
           if key in content},
    }


def with_origin(content: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Returns the content of a foreign file with `converted_from`: where its weights come from.

    Args:
        content: what `load` or `with_average` returned; that of this project's files is returned
            unchanged.
        source: its path or URL; only the file name is kept.
    """
    if content["format"] in (STATE_FORMAT, SNAPSHOT_FORMAT):
        return content
    averaged = False if content.get("ema") is None else content.get("is_averaged", True)
    path = urlparse(str(source)).path if is_url(str(source)) else source
    return content | {"converted_from": {
        "file": Path(path).name, "format": content["format"],
        **({"key": content["key"]} if "key" in content else {}),
        "averaged": averaged, "notes": list(content.get("notes", ()))}}


def halved(weights: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Returns weights as float16, which every reader accepts and converts to float32.

    Raises:
        ValueError: a weight of the file `source` is beyond float16.
    """
    halves = {name: tensor.half() for name, tensor in weights.items()}
    for name, tensor in halves.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} has values beyond float16's 65504; leave "
                             "--half out")
    return halves


def save_safetensors(path: str | Path, snapshot: dict[str, Any]) -> None:
    """Writes a snapshot as safetensors; everything but tensors becomes JSON in the metadata.

    Raises:
        OSError: the file can't be written.
        ValueError: the package safetensors is missing.
    """
    content = {**snapshot, "version": VERSION}
    content["checksum"] = digest(content)
    metadata = {key: value for key, value in content.items() if key != "ema"}
    tensors = {name: tensor.contiguous() for name, tensor in content["ema"].items()}
    data = bare.safetensors().save(tensors, {SNAPSHOT_FORMAT: json.dumps(metadata)})
    with atomic_write(path) as file:
        file.write(data)


def _read_safetensors(source: str | Path, data: bytes) -> dict[str, Any]:
    """Returns the content of a file of `save_safetensors`, not verified yet."""
    library = bare.safetensors()
    from safetensors import SafetensorError
    try:
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"][SNAPSHOT_FORMAT])
        return {**content, "ema": library.load(data)}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError,
            SafetensorError) as error:
        raise published.UnreadableError(
            f"{source}: damaged, or not a network snapshot of this project") from error


def load_state(source: str | Path) -> dict[str, Any]:
    """Reads a training state.

    Raises:
        ValueError: as for `load`; SnapshotGivenError if the file is a snapshot, or a state of ECT,
            which is read as a snapshot.
    """
    if not is_url(str(source)) and not os.path.isfile(source):
        problem = "is a folder" if os.path.isdir(source) else "no such file"
        raise FileNotFoundError(f"{source}: {problem}; name a training-state-*.pt")
    content = load(source)
    if "optimizer" not in content:
        what = "a network snapshot has no optimizer to resume from"
        if content["format"] == published.ECT_STATE_FORMAT:
            what = "the optimizer in a state of ECT can't be resumed from"
        raise SnapshotGivenError(f"{source}: {what}; "
                         "use it with --transfer, or resume from a training-state-*.pt")
    return content


def verifies(path: Path) -> bool:
    """Says whether a training state can be read and is undamaged."""
    try:
        load_state(path)
    except (OSError, ValueError):
        return False
    return True


def recorded_nimg(path: Path) -> float:
    """Returns the images seen that a state records, unverified; if damaged, that of its name."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["progress"]["cur_nimg"])
    except (pickle.UnpicklingError, *_READ_ERRORS):
        return float(state_tag(path)) * 1000


def build_ema(content: dict[str, Any]) -> Precond:
    """Returns the EMA network of a loaded state or snapshot, in evaluation mode, on the CPU.

    Raises:
        ValueError: the file describes a network that is not allowed, or that its weights don't fit.
    """
    weights = sampling_weights(content)
    published.check_network(content["network"], weights)
    net = build_network(content["network"])
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


def sampling_weights(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the averaged weights, or the plain ones if a foreign file has no average."""
    return content["net"] if content.get("ema") is None else content["ema"]


def resolve_D(
    content: dict[str, Any], source: str | Path, pfgmpp: bool | None, aug_dim: float | None
) -> dict[str, Any]:
    """Returns `content` with the D that the file records, or else the D that was given.

    Args:
        content: what `load` returned.
        source: the file's name in errors.
        pfgmpp: whether the user says that it was trained on PFGM++ noise; None if not given.
        aug_dim: the user's D; None if not given.

    Raises:
        ValueError: file and user disagree, or neither says.
    """
    given = math.inf if pfgmpp is False else aug_dim
    network = content["network"]
    if content.get("D_recorded", True):
        recorded = network_D(network)
        if given is None and pfgmpp and math.isinf(recorded):
            raise ValueError(f"--pfgmpp=1: {source} was trained with D = inf; leave --pfgmpp out")
        if given is not None and given != recorded:
            raise ValueError(f"--pfgmpp/--aug_dim say D = {given:g}, but {source} was trained with "
                             f"D = {recorded:g}; leave the flags out")
        return content
    if given is None:
        raise ValueError(f"{source} does not record D; give --pfgmpp=1 --aug_dim=D as it was "
                         "trained, or --pfgmpp=0 for D = inf")
    noise = {"pfgmpp": False} if math.isinf(given) else {"pfgmpp": True, "D": given}
    return {**content, "network": {**network, **noise}, "D_recorded": True}


def highest_level(content: dict[str, Any]) -> float | None:
    """Returns the level where sampling starts, as a loaded file records it; None for the default.

    Raises:
        ValueError: it records something other than a level.
    """
    if "sigma_max" not in content:
        return LSUN_SIGMA_MAX if content["options"].get("lsun") else None
    level = content["sigma_max"]
    if type(level) not in (int, float) or not 0 < level < math.inf:
        raise ValueError(f'the file\'s "sigma_max" is {level!r}, must be a positive number')
    return float(level)


def with_records(
    content: dict[str, Any], source: str | Path, *, scale: Scaling | None = None,
    cond_scale: Scaling | None = None, sigma_max: float | None = None,
) -> dict[str, Any]:
    """Returns `content` with the given facts about its data and sampler added where it has none.

    Args:
        content: what `load` returned.
        source: the file's name in errors.
        scale: of the data.
        cond_scale: of the condition images.
        sigma_max: the noise level where sampling starts.

    Raises:
        ValueError: the file records another value, or its network has no use for one.
    """
    network, added = content["network"], {}
    if cond_scale and not network.get("cond_channels"):
        raise ValueError(f"--cond-scale: {source} takes no condition images; leave --cond-scale "
                         "out")
    if sigma_max is not None:
        _check_start(content, source, sigma_max)
        added["sigma_max"] = float(sigma_max)
    record = content.get("dataset")
    record = dict(record) if isinstance(record, dict) else {}
    for key, flag, given in (("scale", "--scale", scale),
                             ("cond_scale", "--cond-scale", cond_scale)):
        if given is None:
            continue
        if record.get(key) not in (None, given.to_dict()):
            with error_prefix(f'{source}: "{key}" of its data '):
                known = Scaling.from_dict(record[key])
            raise ValueError(f"{flag}: {source} records another scale, by which {known}; "
                             f"leave {flag} out")
        record[key] = given.to_dict()
        added["dataset"] = record
    return content | added


def _check_start(content: dict[str, Any], source: str | Path, sigma_max: float) -> None:
    """Raises ValueError for a level that is not the recorded one, or that can't be sampled from."""
    flag, network = f"--sigma-max={sigma_max:g}", content["network"]
    if network.get("few_step") is not None:
        raise ValueError(f"{flag}: {source} is a few-step network, which has levels of its own; "
                         "leave --sigma-max out")
    known = highest_level(content)
    if known not in (None, sigma_max):
        raise ValueError(f"{flag}: {source} records that sampling starts at {known:g}; leave "
                         "--sigma-max out")
    low = max(default_range("edm")[0], network.get("sigma_min", 0))
    high = network.get("sigma_max", math.inf)
    if not low < sigma_max <= high or math.isinf(sigma_max):
        most = "finite" if math.isinf(high) else f"at most {high:g}"
        raise ValueError(f"{flag}: must be above {low:g} and {most}, a noise level in the range of "
                         f"the network of {source}")


def first_difference(ours: dict, theirs: dict) -> str | None:
    """Returns 'key: a here, b there' for the first key whose values differ, or None."""
    for key in ours | theirs:
        here, there = ours.get(key), theirs.get(key)
        if here != there:
            return f"{key}: {here} here, {there} there"
    return None
