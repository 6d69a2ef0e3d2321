"""The cache folder: free space, cached facts about data sets, and its contents. Needs no PyTorch.

    packed/FINGERPRINT-READER.npy    the images of a data set, see images/uniform_images.py
    notes/KIND-KEY.json              facts about a data set that took long to compute
    references/, downloads/          see metrics/evaluator.py and dnnlib/util.py
    compiled/                        see torch.compile

Everything in it can be computed again. If the cache can't be written, only time is lost.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dnnlib.atomic import remove_stale, write_json
from dnnlib.progress import FIRST_LINE_SEC, Progress, stage
from dnnlib.util import cache_dir, shown_bytes
from images.image_files import Files, Folder

PACKED = "packed"
_NOTES = "notes"
_FOLDERS = (PACKED, _NOTES, "references", "downloads", "compiled")
_SETTLED_NS = 2 * 10**9  # a file changed more recently may change again in the same clock tick
_READERS, _READ_AT_ONCE = 8, 1024  # threads that wait for a disk or server; files in flight


# ------------------------------------------------------------------------------------ room

def free_bytes(path: Path) -> int:
    """Returns the number of bytes that this user can write at `path`, which need not exist.

    Raises:
        OSError: the file system can't be queried.
    """
    path = path.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def make_room(folder: Path, num_bytes: int) -> int:
    """Makes a folder, removes leftovers of killed processes, and returns the free bytes.

    Raises:
        OSError: the folder can't be made, or fewer than `num_bytes` are free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    free = free_bytes(folder)
    if free < num_bytes:
        raise OSError(f"{folder}: needs {shown_bytes(num_bytes)}, but {shown_bytes(free)} are free")
    return free


# ----------------------------------------------------------------------------------- notes

def read_note(kind: str, key: str) -> dict[str, Any] | None:
    """Returns the data that `write_note` stored, or None if it is missing or unreadable."""
    try:
        note = json.loads(_note_path(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) else None


def write_note(kind: str, key: str, note: dict[str, Any]) -> None:
    """Stores plain data for later processes. Does nothing if the cache can't be written."""
    with contextlib.suppress(OSError):
        path = _note_path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, note)


def _note_path(kind: str, key: str) -> Path:
    return cache_dir(_NOTES) / f"{kind}-{key}.json"


# ----------------------------------------------------------------------------- fingerprints

class Listing(NamedTuple):
    """Names, sizes and times of some files in a folder, without their content.

    `digest` is the same for a copy that preserves the times. `key` also depends on the folder and
    on when each file was last changed in any way, so every write changes it.
    """

    digest: str
    key: str
    newest_ns: int  # when the last of them was changed


def list_folder(folder: Path, names: Sequence[str]) -> Listing:
    """Returns the listing of these files of a folder, in the order of the names."""
    digest, touched, newest = hashlib.sha256(), hashlib.sha256(), 0
    touched.update(os.fsencode(os.path.realpath(folder)) + b"\0")
    with Progress(len(names), f"Listing {folder}", unit="files", delay=1,
                  first_line_sec=FIRST_LINE_SEC) as progress:
        for name in progress.over(names):
            status = os.stat(folder / name)
            digest.update(f"{name}\0{status.st_size} {status.st_mtime_ns}\n".encode(
                errors="surrogateescape"))
            touched.update(f"{status.st_ctime_ns} {status.st_ino}\n".encode())
            newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
    touched.update(digest.digest())
    return Listing(digest.hexdigest(), touched.hexdigest(), newest)


def known_fingerprint(listing: Listing) -> str | None:
    """Returns the cached fingerprint of a folder, or None if there is none."""
    found = (read_note("fingerprint", listing.key) or {}).get("fingerprint")
    return found if isinstance(found, str) else None


def fingerprint(files: Files, names: Sequence[str], listing: Listing | None,
                title: str) -> str:
    """Returns a sha256 of names, sizes and CRCs, which is the same for a copy of the files.

    A ZIP lists these. The files of a folder have to be read, unless the cache has the fingerprint
    for their `listing`.
    """
    if listing and (known := known_fingerprint(listing)):
        return known
    now = time.time_ns()
    digest = hashlib.sha256()
    verb = "Reading" if listing else "Looking through"
    with Progress(len(names), f"{verb} {title} for its fingerprint", unit="files", delay=1,
                  first_line_sec=FIRST_LINE_SEC) as progress:
        stamps = _read_stamps(files, names) if listing else map(files.stamp, names)
        for name, stamp in zip(names, progress.over(stamps), strict=True):
            digest.update(f"{name}\0{stamp}\n".encode(errors="surrogateescape"))
    found = digest.hexdigest()
    if listing and listing.newest_ns < now - _SETTLED_NS:
        write_note("fingerprint", listing.key, {"fingerprint": found, "data": title})
    return found


def _read_stamps(files: Folder, names: Sequence[str]) -> Iterator[str]:
    """Yields the stamps of files in order, reading several at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(names), _READ_AT_ONCE):
            yield from pool.map(files.stamp, names[first:first + _READ_AT_ONCE])


# -------------------------------------------------------------------------------- contents

class Entry(NamedTuple):
    """A file or folder of the cache. Its name is relative to the cache folder."""

    name: str
    num_bytes: int
    used: float  # seconds since 1970 when it was last written or read, if known
    about: str  # what it holds


def entries() -> list[Entry]:
    """Returns the contents of the cache folder. Notes and compiled code are one entry each."""
    found = []
    with stage(f"Listing {cache_dir()}"):
        for folder in map(cache_dir, _FOLDERS):
            if not folder.is_dir():
                continue
            if folder.name in (_NOTES, "compiled"):
                if files := [path for path in folder.rglob("*") if path.is_file()]:
                    found.append(_entry(folder, files))
            else:
                found += [_entry(path, [path]) for path in sorted(folder.iterdir())
                          if path.is_file() and path.suffix != ".tmp"]
    return found


def _entry(path: Path, files: Sequence[Path]) -> Entry:
    sizes, used = [], []
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # removed in the meantime
            status = file.stat()
            sizes.append(status.st_size)
            used.append(max(status.st_mtime, status.st_atime))
    about = {_NOTES: "fingerprints of folders and measured sigma_data",
             "compiled": "code of torch.compile"}.get(path.name, "")
    if path.parent.name == PACKED:
        note = read_note("packed", path.stem) or {}
        about = f"{note.get('images', '?')} images of {note.get('data', 'an unknown data set')}"
    return Entry(str(path.relative_to(cache_dir())), sum(sizes), max(used, default=0.0), about)


def remove(names: Sequence[str]) -> list[Entry]:
    """Removes entries by their names or unique prefixes, and returns the removed entries.

    Raises:
        ValueError: a name matches no entry, or is a prefix of several.
        OSError: an entry can't be removed.
    """
    there, chosen = entries(), {}
    for name in names:
        fitting = [entry for entry in there if entry.name == name] or [
            entry for entry in there
            if name and (entry.name.startswith(name) or Path(entry.name).name.startswith(name))]
        if len(fitting) != 1:
            problem = f"begins the names of {len(fitting)} entries" if fitting else "is no entry"
            raise ValueError(f"{name!r} {problem} of {cache_dir()}; list them with dataset_tool.py "
                             "cache list")
        chosen[fitting[0].name] = fitting[0]
    for entry in chosen.values():
        path = cache_dir() / entry.name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent.name == PACKED:
            _note_path("packed", path.stem).unlink(missing_ok=True)
    return list(chosen.values())


def note_packed(path: Path, data: Path, num_images: int) -> None:
    """Records the data set of a packed file, for `entries`."""
    write_note("packed", path.stem, {"data": os.path.abspath(data), "images": num_images,
                                     "host": socket.gethostname()})
