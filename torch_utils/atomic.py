"""Files that are either complete or not there: a temporary name, fsync, rename.

A crash at any moment leaves the earlier file untouched and at most one `*.tmp` beside it.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_TMP_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Yields a binary file that takes the name `path` when the block ends without an error.

    Args:
        path: the final name; its folder must exist.
        sync: whether the bytes must be on the disk before the name appears. Off for files that
            are cheap to make again and too many to wait for, such as generated images.

    Raises:
        OSError: the file can't be written; the temporary file is removed.
    """
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{os.getpid()}{_TMP_SUFFIX}")
    try:
        with open(tmp, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    if sync:
        _sync_dir(path.parent)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
