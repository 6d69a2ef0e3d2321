"""Training states and network snapshots: what is in them, how they are written and read.

Both are ordinary `torch.save` files that hold tensors, numbers, strings, lists and dicts only, so
they load with `weights_only=True`. A state has all that a run needs to go on exactly:

    format, version, network   what the file is; class name and keywords of the network
    net, ema, optimizer        state dicts
    progress                   cur_nimg, loss_scale, bad-step counters
    options, dataset           the run's TrainConfig; name, size and fingerprint of the data
    checksum                   sha256 of everything else

A snapshot has format, version, network, ema, progress, options, checksum. Random draws and the
data order are functions of the seed in `options` and of `cur_nimg`, so no generator state is kept.
"""

import hashlib
import pickle
import re
from pathlib import Path
from typing import IO, Any

import torch

from dnnlib.util import is_url, open_url
from torch_utils import distributed
from torch_utils.atomic import atomic_write
from training.networks import Precond, build_network

STATE_FORMAT = "pfgmpp-training-state"
SNAPSHOT_FORMAT = "pfgmpp-network-snapshot"
VERSION = 1
_STATE_NAME = re.compile(r"training-state-(\d{6,}(?:\.\d{3})?)\.pt")
_READ_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError,
                OSError)


class SnapshotGivenError(ValueError):
    """A network snapshot stands where a training state is needed."""


def kimg_tag(nimg: int, *, fractional: bool) -> str:
    """Returns thousands of images for a file name: '000012', or '000012.345'."""
    return f"{nimg // 1000:06d}" + (f".{nimg % 1000:03d}" if fractional else "")


def training_states(run_dir: str | Path) -> list[Path]:
    """Returns the training states in a run directory, oldest first by the names' thousands.

    Raises:
        OSError: there is no such folder.
    """
    found = [(float(match[1]), path) for path in Path(run_dir).iterdir()
             if (match := _STATE_NAME.fullmatch(path.name))]
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
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        sha.update(raw.numpy())
    elif isinstance(value, dict):
        sha.update(f"dict {len(value)};".encode())
        for key, item in value.items():
            _update(sha, key)
            _update(sha, item)
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
        torch.save(content, file)


def load(source: str | Path) -> dict[str, Any]:
    """Reads and verifies a state or snapshot from a path or URL; tensors are on the CPU.

    Raises:
        OSError: it can't be opened.
        ValueError: not one of our files, damaged, or of a newer version.
    """
    with _open_source(source) as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except _READ_ERRORS:
            raise ValueError(f"{source}: damaged, or not a training state or network snapshot "
                             "of this project") from None
    kind = content.get("format") if isinstance(content, dict) else None
    if kind not in (STATE_FORMAT, SNAPSHOT_FORMAT):
        raise ValueError(f"{source}: not a training state or network snapshot of this project")
    if content.get("version") != VERSION:
        raise ValueError(f"{source}: written in format version {content.get('version')}; this code "
                         f"reads version {VERSION}: update the code")
    checksum = content.pop("checksum", None)
    if digest(content) != checksum:
        raise ValueError(f"{source}: damaged (its checksum does not match)")
    return content


def _open_source(source: str | Path) -> IO[bytes]:
    if not is_url(source):
        return open(source, "rb")
    with distributed.rank0_first():  # one download for all
        return open_url(str(source))


def load_state(source: str | Path) -> dict[str, Any]:
    """Reads a training state.

    Raises:
        ValueError: as for `load`; SnapshotGivenError where the file is a snapshot.
    """
    content = load(source)
    if content["format"] != STATE_FORMAT:
        raise SnapshotGivenError(f"{source}: a network snapshot has no optimizer to resume from; "
                         "use --transfer for it, or resume from a training-state-*.pt")
    return content


def newest_state(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Returns the newest state that verifies, None if there is none, and what was wrong with newer.

    Newest is by the number of images recorded in the file.
    """
    problems = []
    for path in sorted(training_states(run_dir), key=_recorded_nimg, reverse=True):
        try:
            load_state(path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        return path, problems
    return None, problems


def _recorded_nimg(path: Path) -> float:
    """Returns the images seen that a state records, unverified; by its name if it is damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["progress"]["cur_nimg"])
    except _READ_ERRORS:
        return float(state_tag(path)) * 1000


def build_ema(content: dict[str, Any]) -> Precond:
    """Returns the EMA network of a loaded state or snapshot, in evaluation mode, on the CPU."""
    net = build_network(content["network"])
    net.load_state_dict(content["ema"])
    return net.eval().requires_grad_(False)


def first_difference(ours: dict, theirs: dict) -> str | None:
    """Returns 'key: a here, b there' for the first key whose values differ, or None."""
    for key in [*ours, *(k for k in theirs if k not in ours)]:
        here, there = ours.get(key), theirs.get(key)
        if here != there:
            return f"{key}: {here} here, {there} there"
    return None
