"""One run per directory: numbered ones, and a lock that the kernel takes back when its owner dies.

The lock is a POSIX record lock on DIR/.lock. Unlike a lock of flock(2) it is not shared with forked
loader workers, which may outlive a killed run by seconds, and it holds between the machines of an
NFS mount that has locking. The file says who holds it; it stays, and means nothing by itself.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

LOCK_NAME = ".lock"
_FLOCK = "hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, process


@contextlib.contextmanager
def run_lock(run_dir: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of an existing directory.

    Where the file system has no locks it only warns: a second run is then not detected.

    Raises:
        ValueError: another process holds it; the message names host and process.
        OSError: the directory can't be written.
    """
    path = Path(run_dir) / LOCK_NAME
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(fd, path)
        yield
    finally:
        os.close(fd)


def _acquire(fd: int, path: Path) -> None:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"Warning: {path.parent} can't be locked ({error.strerror}): start no second "
                  "run there", file=sys.stderr, flush=True)
            return
        owner = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
        raise ValueError(f"{path.parent}: in use by {owner}; wait for its end, stop it, or name "
                         "another directory") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def lock_holder(run_dir: str | os.PathLike) -> str | None:
    """Returns who holds the lock of a directory, None where nobody does or it can't be told.

    It takes no lock, so a run that starts meanwhile is not disturbed. A process does not see its
    own lock.
    """
    try:
        fd = os.open(Path(run_dir) / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0]
        if kind == fcntl.F_UNLCK:
            return None
        return os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
    except OSError:
        return None
    finally:
        os.close(fd)


def numbered_dir(parent: Path, text: str) -> Path:
    """Makes and returns PARENT/NNNNN-text, with a number that no other folder there has.

    First the bare number is taken by mkdir, at which one process succeeds on every file system. A
    process that listed the folders before another one took the number, and makes its own folder
    after that one got its full name, then sees the full name.
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
