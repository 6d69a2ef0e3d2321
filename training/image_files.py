"""Files of a folder or ZIP by name, and the labels in dataset.json; no PyTorch is needed.

    {"labels": [["00000/img00000000.png", 6], ...]}    or    {"labels": null}

Integers are class numbers; lists are vectors of numbers.
"""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

LABELS_NAME = "dataset.json"
GENERATE_RECORD = "generate.json"  # marks a folder of generated images
PICTURES = "vis"  # its subfolder of grids and movies
MAX_CLASSES = 1 << 16  # a class number beyond is an identifier, not a class
# What Pillow and zipfile raise for a damaged file.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, zlib.error,
          zipfile.BadZipFile)
_MAX_FLOAT = float(np.finfo(np.float32).max)


def parse_labels(text: bytes, where: str) -> dict[str, Any] | None:
    """Returns the labels of a `dataset.json` by image name, or None where it holds none.

    Args:
        text: the file's bytes.
        where: what to call the file in an error.

    Raises:
        ValueError: it isn't JSON of the expected form, or names an image twice.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: line {error.lineno}, column {error.colno}: "
                         f"{error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text") from error
    entries = data.get("labels") if isinstance(data, dict) else False
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise ValueError(f'{where}: must be {{"labels": [["NAME", LABEL], ...]}}')
    labels = {}
    for i, entry in enumerate(entries):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f'{where}: entry {i} of "labels" must be ["NAME", LABEL]')
        if entry[0] in labels:
            raise ValueError(f"{where}: {entry[0]} is listed twice")
        labels[entry[0]] = entry[1]
    return labels or None


def label_array(names: Sequence[str], labels: dict[str, Any], where: str) -> np.ndarray:
    """Returns the labels of `names` in their order: int64 [n], or float32 [n, label_dim].

    Raises:
        ValueError: naming the first image without a label, or with one that is neither a class
            number nor a vector like the first image's.
    """
    missing = sum(name not in labels for name in names)
    first = labels.get(names[0])
    for name in names:
        label = labels.get(name)
        if label is None:
            raise ValueError(f"{where}: no label for {name}; {missing} of {len(names)} images "
                             "have none, and it must be all or none")
        problem = _label_problem(label, first)
        if problem:
            raise ValueError(f"{where}: label {json.dumps(label)[:40]} of {name} {problem}")
    dtype = np.float32 if isinstance(first, list) else np.int64
    return np.array([labels[name] for name in names], dtype=dtype)


def _label_problem(label: Any, first: Any) -> str | None:
    """Says what is wrong with a label, given the first image's; None if it is fine."""
    if type(label) is int:
        if not 0 <= label < MAX_CLASSES:
            return f"must be in 0..{MAX_CLASSES - 1}"
        return None if type(first) is int else "must be a list like the first image's"
    if isinstance(label, list):
        if not label or not all(type(x) in (int, float) and abs(x) <= _MAX_FLOAT for x in label):
            return "must hold finite numbers"
        if not isinstance(first, list) or len(first) != len(label):
            return "must have the form of the first image's"
        return None
    return "must be a class number or a list of numbers"


def open_files(path: Path) -> "Folder | Zip":
    """Opens a folder or ZIP.

    Raises:
        OSError: there is none, or it can't be read.
        ValueError: not a ZIP, or one with two members of one name.
    """
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or ZIP")
    return Zip(path)


class Folder:
    """The files below a folder by their '/'-separated names; `stamp` tells a change of content."""

    def __init__(self, path: Path):
        def refuse(error):
            raise error

        self._path = path
        self.names = []
        for folder, subfolders, files in os.walk(path, onerror=refuse):
            inside = Path(folder).relative_to(path)
            if folder == str(path) and GENERATE_RECORD in files and PICTURES in subfolders:
                subfolders.remove(PICTURES)  # grids and movies of generate.py, not samples
            self.names += [(inside / name).as_posix() for name in files]

    def open(self, name: str) -> IO[bytes]:
        return open(self._path / name, "rb")

    def stamp(self, name: str) -> str:
        data = (self._path / name).read_bytes()
        return f"{len(data)} {zlib.crc32(data)}"

    def close(self) -> None:
        pass


class Zip:
    """The members of a ZIP by name; each process opens its own handle, on first use."""

    def __init__(self, path: Path):
        self._path = path
        self._zip, self._pid = None, None
        members = [info for info in self._handle().infolist() if not info.is_dir()]
        self._stamps = {info.filename: f"{info.file_size} {info.CRC}" for info in members}
        self.names = list(self._stamps)
        if len(self.names) != len(members):
            raise ValueError(f"{path}: several members share a name")

    def _handle(self) -> zipfile.ZipFile:
        if self._pid != os.getpid():  # a forked child shares the parent's file position
            try:
                self._zip = zipfile.ZipFile(self._path)
            except zipfile.BadZipFile as error:
                with open(self._path, "rb") as file:
                    is_cut = file.read(4) == b"PK\x03\x04"
                problem = "the ZIP is truncated or damaged" if is_cut else "neither folder nor ZIP"
                raise ValueError(f"{self._path}: {problem}") from error
            self._pid = os.getpid()
        return self._zip

    def open(self, name: str) -> IO[bytes]:
        return self._handle().open(name)

    def stamp(self, name: str) -> str:
        return self._stamps[name]

    def close(self) -> None:
        if self._zip is not None and self._pid == os.getpid():
            self._zip.close()
        self._zip, self._pid = None, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None, "_pid": None}
