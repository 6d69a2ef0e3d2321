"""One run per directory: numbered directories, and a lock that ends when its owner dies.

The lock is on DIR/.lock. The file says who holds it; it is never removed, and its existence means
nothing. Without file locks (Windows), a file DIR/.running stands for the lock during a run.
"""

import contextlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from dnnlib import locks

LOCK_NAME = ".lock"
_FILE_NAME = ".running"  # where there are no locks
_held: set[Path] = set()  # by this process


@contextlib.contextmanager
def run_lock(run_dir: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of an existing directory; does nothing if this process already holds it.

    If the file system has no locks, it only warns: a second run is then not detected.

    Raises:
        ValueError: another process holds it; the message names host and process.
        OSError: the directory can't be written.
    """
    folder = Path(run_dir).resolve()
    if folder in _held:
        yield
        return
    with _file_for_lock(Path(run_dir)) if locks.fcntl is None else _lock(Path(run_dir)):
        _held.add(folder)
        try:
            yield
        finally:
            _held.remove(folder)


@contextlib.contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    fd = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            if not locks.lock_whole(fd, wait=False):
                raise ValueError(f"{run_dir}: in use by {_owner(fd)}; wait until it ends, stop "
                                 "it, or name another directory")
            os.ftruncate(fd, 0)
            os.write(fd, _own_name())
        except locks.NoLocksError as error:
            print(f"Warning: {run_dir} can't be locked ({error.strerror}): do not start a second "
                  "run there", file=sys.stderr, flush=True)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _file_for_lock(run_dir: Path) -> Iterator[None]:
    path = run_dir / _FILE_NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        owner = path.read_text(errors="replace").strip() or "another process"
        raise ValueError(f"{run_dir}: in use by {owner}; wait until it ends, stop it, or name "
                         f"another directory. If it has crashed, remove {path}") from None
    try:
        os.write(fd, _own_name())
        yield
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _own_name() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}\n".encode()


def _owner(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    return os.read(fd, 200).decode(errors="replace").strip() or "another process"


def lock_holder(run_dir: str | os.PathLike) -> str | None:
    """Returns who holds the lock of a directory; None if nobody does, or if that is not known.

    It takes no lock, so a run that starts meanwhile is not disturbed. A process does not see its
    own lock.
    """
    has_locks = locks.fcntl is not None
    try:
        fd = os.open(Path(run_dir) / (LOCK_NAME if has_locks else _FILE_NAME), os.O_RDONLY)
    except OSError:
        return None
    try:
        return _owner(fd) if not has_locks or locks.is_locked_by_another_process(fd) else None
    except OSError:
        return None
    finally:
        os.close(fd)


def numbered_dir(parent: Path, text: str) -> Path:
    """Makes and returns PARENT/NNNNN-text, with a number that no other folder there has.

    First, mkdir claims the bare number, at which only one process succeeds on every file system.
    Another process may have claimed the same number in between and renamed its folder; then the
    number appears twice, and this process tries again.
    """
    while True:
        number = f"{max(_numbers(parent), default=-1) + 1:05d}"
        claim = parent / number
        try:
            claim.mkdir()
        except FileExistsError:
            continue
        if _numbers(parent).count(int(number)) > 1:
            claim.rmdir()
            continue
        return claim.rename(parent / f"{number}-{text}")


def _numbers(parent: Path) -> list[int]:
    return [int(match[0]) for path in parent.iterdir() if (match := re.match(r"\d+", path.name))]
