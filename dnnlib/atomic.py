"""Writes files so that they are either complete or absent: a temporary name, fsync, rename.

A crash at any moment leaves the earlier file untouched and at most one `NAME.RANDOM.tmp` beside it,
which `remove_stale` or the next write of that file removes. A temporary file belongs to whoever
holds its lock, so those of other machines and containers are safe. Lines are appended whole.
"""

import contextlib
import glob
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dnnlib import locks

# NAME.RANDOM.tmp; earlier versions wrote NAME.HOST-PID.tmp, which nothing locked.
_TMP_NAME = re.compile(r".+\.([0-9a-f]{16}|(?P<unlocked>[^.]+-\d+))\.tmp")
_ABANDONED_SEC = 24 * 3600  # age from which a temporary file without a lock counts as abandoned
_TAIL_BYTES = 1 << 16


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, *, sync: bool = True,
                 replace: bool = True) -> Iterator[IO[bytes]]:
    """Yields a binary file that takes the name `path` when the block ends without an error.

    Args:
        path: the final name; its folder must exist.
        sync: whether the bytes must be on the disk before the name appears. Turn it off for files
            that are cheap to make again and too many to wait for, such as generated images.
        replace: False raises FileExistsError if the file exists, even if another process has just
            made it.

    Raises:
        OSError: the file can't be written; the temporary file is removed.
    """
    path = Path(path)
    if sync:  # not for images by the thousand: each would list the whole folder
        _remove_stale(path.parent.glob(f"{glob.escape(path.name)}.*.tmp"))
    tmp, file = _create(path)
    try:
        with file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            if locks.fcntl is None:  # Windows can't rename open files; there is no lock to hold
                file.close()
            if replace or not _link(tmp, path):
                os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    if sync:
        _sync_dir(path.parent)


def check_writable(path: str | os.PathLike) -> None:
    """Raises OSError unless a file, and another one beside it, can be written; leaves no trace.

    Missing folders are assumed to be made later. Call it before work that takes long.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_file():
        raise OSError("is a folder" if path.is_dir() else "is not a regular file")
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise OSError(f"{folder} is not a folder")
    try:
        if path.exists():
            with open(path, "ab"):
                pass
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"can't be written in {folder} ({error.strerror})") from error


def temporary_name(path: Path) -> Path:
    """Returns a name beside `path` that nobody else uses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def _create(path: Path) -> tuple[Path, IO[bytes]]:
    """Returns the name of a new temporary file for `path` and the file, which is locked."""
    while True:
        tmp = temporary_name(path)
        file = open(tmp, "xb")  # noqa: SIM115 - the caller closes it
        try:
            locks.lock_handle(file.fileno())
        except locks.NoLocksError:
            return tmp, file
        except BaseException:
            file.close()
            tmp.unlink(missing_ok=True)
            raise
        if _is_at(tmp, file.fileno()):
            return tmp, file
        file.close()  # another process took it for abandoned between the two calls


def _is_at(path: Path, fd: int) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False


def _link(tmp: Path, path: Path) -> bool:
    """Gives a file its name if nothing has it; returns False if the file system has no links."""
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

    If the file system has no locks, it removes those that are a day old.
    """
    return _remove_stale(Path(folder).glob("*.tmp"))


def _remove_stale(paths: Iterator[Path]) -> list[Path]:
    return [path for path in paths if _remove_if_stale(path)]


def _remove_if_stale(path: Path) -> bool:
    """Removes a temporary file if its writer is gone; says whether it did."""
    match = _TMP_NAME.fullmatch(path.name)
    if not match:
        return False
    try:
        with open(path, "r+b") as file:
            try:
                # Held until the file is gone, so that a writer that has yet to lock it notices.
                is_free = locks.lock_handle(file.fileno(), wait=False)
            except locks.NoLocksError:
                is_free = None
            if is_free is None or match["unlocked"]:
                is_free = time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED_SEC
            if not is_free:
                return False
            path.unlink()
    except OSError:  # another process removed it, or it isn't ours
        return False
    return True


def append_line(path: str | os.PathLike, line: str) -> None:
    """Appends a line, whole or not at all, after removing a partial one that a crash has left.

    Several processes may append to one file.

    Raises:
        OSError: it can't be written; the file is unchanged.
    """
    with open(path, "a+b", buffering=0) as file:
        with contextlib.suppress(locks.NoLocksError):
            locks.lock_whole(file.fileno())
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
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows can't open folders
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
