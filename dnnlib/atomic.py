"""Files that are either complete or not there: a temporary name, fsync, rename.

A crash at any moment leaves the earlier file untouched and at most one `NAME.HOST-PID.tmp` beside
it, which `remove_stale` or the next write of that file removes. Lines are appended whole.
"""

import contextlib
import fcntl
import glob
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_TMP_NAME = re.compile(r".+\.(?P<host>[^.]+)-(?P<pid>\d+)\.tmp")
_ABANDONED_SEC = 24 * 3600  # a temporary of another machine that nobody has touched so long
_TAIL_BYTES = 1 << 16


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, *, sync: bool = True,
                 replace: bool = True) -> Iterator[IO[bytes]]:
    """Yields a binary file that takes the name `path` when the block ends without an error.

    Args:
        path: the final name; its folder must exist.
        sync: whether the bytes must be on the disk before the name appears. Off for files that
            are cheap to make again and too many to wait for, such as generated images.
        replace: False raises FileExistsError if the file exists, even if another process made it
            meanwhile.

    Raises:
        OSError: the file can't be written; the temporary file is removed.
    """
    path = Path(path)
    if sync:  # not of images by the thousand: each would read the whole folder
        _remove(_stale(path.parent.glob(f"{glob.escape(path.name)}.*.tmp")))
    tmp = path.with_name(f"{path.name}.{_host()}-{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if replace or not _link(tmp, path):
            os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    if sync:
        _sync_dir(path.parent)


def _link(tmp: Path, path: Path) -> bool:
    """Gives a file its name where nothing has it; False where the file system has no links."""
    try:
        os.link(tmp, path)
    except FileExistsError:
        raise
    except OSError:
        return False
    tmp.unlink()
    return True


def write_json(path: str | os.PathLike, value: Any, *, replace: bool = True) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path, replace=replace) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def remove_stale(folder: str | os.PathLike) -> list[Path]:
    """Removes and returns the temporary files of `atomic_write` whose writers are gone.

    Files of running processes stay, and so do those of other machines until they are a day old.
    """
    stale = list(_stale(Path(folder).glob("*.tmp")))
    _remove(stale)
    return stale


def _stale(paths: Iterator[Path]) -> Iterator[Path]:
    here = _host()
    for path in paths:
        match = _TMP_NAME.fullmatch(path.name)
        if match and match["host"] == here:
            # A file with this process's own number was left by an earlier one.
            if int(match["pid"]) == os.getpid() or not _is_alive(int(match["pid"])):
                yield path
        elif match:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SEC:
                    yield path


def _host() -> str:
    return socket.gethostname().replace(".", "_")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _remove(paths: Iterator[Path] | list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # another process removed it, or it isn't ours
            path.unlink()


def append_line(path: str | os.PathLike, line: str) -> None:
    """Appends a line, whole or not at all; a torn one that a crash has left goes first.

    Several processes may append to one file.

    Raises:
        OSError: it can't be written; the file is as it was.
    """
    with open(path, "a+b", buffering=0) as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        size = _whole_lines(file)
        try:
            data = (line + "\n").encode()
            if file.write(data) != len(data):
                raise OSError(f"{path}: no space for a whole line")
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def _whole_lines(file: IO[bytes]) -> int:
    """Cuts a file after its last newline; returns its size."""
    size = file.seek(0, os.SEEK_END)
    end = size
    while end:
        start = max(end - _TAIL_BYTES, 0)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end != size:
        os.ftruncate(file.fileno(), end)
    return end


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
