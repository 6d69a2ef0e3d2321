"""The names of files in a folder or ZIP, and the labels in dataset.json. Needs no PyTorch.

    {"labels": [["00000/img00000000.png", 6], ...]}    or    {"labels": null}

Integers are class numbers, and lists are vectors of numbers. "class_names" may list the names of
the classes in order. Files in the top-level folder cond/ are condition images: cond/a/x.npy belongs
to a/x.png.

A file is an image if its extension is .npy or one of `PICTURE_FORMATS`. Hidden files, files that
operating systems create, and pictures that generate.py makes of its images do not count as images.
"""

import collections
import contextlib
import gc
import json
import math
import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

LABELS_NAME = "dataset.json"
GENERATE_RECORD = "generate.json"  # marks a folder of generated images
PARTS_SUFFIX = ".parts"  # of the folder beside a ZIP that is being filled
PICTURES = "vis"  # subfolder for grids and movies
DEVIATIONS = "std"  # subfolder for standard deviations of images that are means
CONDITIONS = "cond/"  # prefix of the names of condition images
ARRAY_SUFFIX = ".npy"
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# Extensions of pictures and Pillow's names of their formats, common ones first.
PICTURE_FORMATS = {
    ".png": "PNG", ".apng": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG",
    ".jfif": "JPEG", ".mpo": "MPO", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".dib": "DIB",
    ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM",
    ".avif": "AVIF", ".avifs": "AVIF", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".j2c": "JPEG2000",
    ".jpc": "JPEG2000", ".jpf": "JPEG2000", ".jpx": "JPEG2000", ".qoi": "QOI", ".tga": "TGA",
    ".pcx": "PCX", ".ico": "ICO", ".sgi": "SGI", ".rgb": "SGI", ".bw": "SGI",
}
# Names that begin with a dot, folders of macOS, Synology and Windows, and small files of Windows.
_HIDDEN = re.compile(
    r"(?:^|/)(?:\.(?![./])|~\$|__MACOSX/|@eaDir/|lost\+found/|\$RECYCLE\.BIN/"
    r"|System Volume Information/"
    r"|(?:Thumbs\.db|desktop\.ini)$)", re.IGNORECASE)
MAX_CLASSES = 1 << 16  # a larger number is an identifier, not a class
# Exceptions of Pillow and zipfile for damaged files.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, zlib.error,
          zipfile.BadZipFile)
_MAX_FLOAT = float(np.finfo(np.float32).max)
_MAX_FILE_BYTES = 1 << 30  # of one image, uncompressed


class NoImagesError(ValueError):
    """A folder or ZIP without images."""


class ImageFormat(NamedTuple):
    """The format that all images of a data set share. `mode` is Pillow's or describes an array."""

    mode: str
    channels: int  # 0 for modes that data sets can't have
    width: int
    height: int
    dtype: str = "uint8"  # in memory: uint8, uint16 or float32

    def __str__(self) -> str:
        return f"{self.mode} {self.width}x{self.height}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    @property
    def num_bytes(self) -> int:
        """Size of one image in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def picture_format(mode: str, size: tuple[int, int]) -> ImageFormat:
    """Returns the format of a picture with this mode (Pillow's), width and height."""
    return ImageFormat(mode, {"L": 1, "RGB": 3}.get(mode, 0), *size)


def is_array(name: str) -> bool:
    """Whether a name has the extension of NumPy arrays."""
    return name.lower().endswith(ARRAY_SUFFIX)


def is_image(name: str) -> bool:
    """Whether a name has the extension of NumPy arrays or one of `PICTURE_FORMATS`."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in PICTURE_FORMATS or suffix == ARRAY_SUFFIX


def stem(name: str) -> str:
    """Returns a name without its extension if that is one of images. The end of a UID is none."""
    root, suffix = os.path.splitext(name)
    return root if is_image(name) or suffix.lower() in DICOM_SUFFIXES else name


def composed(name: str) -> str:
    """Returns a name with composed letters (NFC). macOS decomposes them into letter and accent.

    Names are compared in this form, but files are opened by their original names.
    """
    return unicodedata.normalize("NFC", name)


class Names(NamedTuple):
    """File names sorted by kind. `images` and `conditions` are in order."""

    images: list[str]
    conditions: list[str]
    num_hidden: int  # hidden files and system files
    num_pictures: int  # grids, movies and deviations that generate.py makes of its images
    others: list[str]  # all other files that are not images


def sort_names(names: Iterable[str]) -> Names:
    """Sorts '/'-separated file names by kind."""
    names = list(names)
    pictures = tuple(f"{name.removesuffix(GENERATE_RECORD)}{folder}/" for name in names
                     if name.rpartition("/")[2] == GENERATE_RECORD
                     for folder in (PICTURES, DEVIATIONS))
    images, conditions, others, num_hidden, num_pictures = [], [], [], 0, 0
    for name in names:
        if _HIDDEN.search(name):
            num_hidden += 1
        elif pictures and name.startswith(pictures):
            num_pictures += 1
        elif not is_image(name):
            others.append(name)
        else:
            (conditions if name.startswith(CONDITIONS) else images).append(name)
    return Names(sorted(images), sorted(conditions), num_hidden, num_pictures, others)


def list_files(path: Path) -> list[str]:
    """Returns the '/'-separated names of all files below a folder, following links.

    A link to a folder that contains the link is not followed.

    Raises:
        OSError: a folder can't be read.
    """
    names: list[str] = []

    def walk(folder: str, prefix: str, inside: frozenset[tuple[int, int]]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    names.append(prefix + entry.name)
                    continue
                status = entry.stat()
                key = (status.st_dev, status.st_ino)
                if key not in inside:
                    walk(entry.path, f"{prefix}{entry.name}/", inside | {key})

    status = os.stat(path)
    walk(os.fspath(path), "", frozenset({(status.st_dev, status.st_ino)}))
    return names


def match_names(names: Sequence[str], others: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """Returns the partner of each name among `others`, or None, and the others left over.

    Partners have the same name except for the extension. Composed and decomposed letters are equal.
    """
    by_stem = {}
    extra = [other for other in others
             if by_stem.setdefault(composed(stem(other)), other) != other]
    stems = [composed(stem(name)) for name in names]
    found = [by_stem.get(own) for own in stems]
    return found, sorted([*extra, *map(by_stem.get, by_stem.keys() - set(stems))])


def check_matched(names: Sequence[str], found: Sequence[str | None], extra: Sequence[str],
                  where: str) -> None:
    """Raises ValueError, naming the first file, if `match_names` left any without a partner."""
    missing = [name for name, other in zip(names, found, strict=True) if other is None]
    if missing:
        raise ValueError(f"{where}: no condition image for {missing[0]}; {len(missing)} of "
                         f"{len(names)} images have none, but each needs one with its name")
    if extra:
        raise ValueError(f"{where}: {extra[0]} belongs to no image (condition images "
                         f"without an image: {len(extra)})")


@contextlib.contextmanager
def error_prefix(text: str) -> Iterator[None]:
    """Prefixes the message of a ValueError that is raised inside with `text`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{text}{error}") from error


def name_problem(name: str) -> str | None:
    """Returns what is wrong with the name of an archive member, or None if it is fine."""
    slashed = PurePosixPath(name.replace("\\", "/"))
    if slashed.is_absolute() or ".." in slashed.parts or re.match("[A-Za-z]:", name):
        return "leads out of the archive"
    return "has a zero byte in its name" if "\0" in name else None


def member_problem(info: zipfile.ZipInfo) -> str | None:
    """Returns what is wrong with the name or type of a ZIP member, or None if it is fine."""
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a symbolic link"
    return name_problem(info.filename)


def check_finished(path: Path) -> None:
    """Raises ValueError for an unfinished ZIP of generated images, and for its folder of parts."""
    is_parts = path.name.endswith(PARTS_SUFFIX)
    if path.exists() and not is_parts:
        return
    parts = path if is_parts else path.with_name(path.name + PARTS_SUFFIX)
    if (parts / GENERATE_RECORD).is_file():
        raise ValueError(f"{path}: not all of its images have been made (some are in "
                         f"{parts.name}); run the same generate.py command again to make the rest "
                         f"and write {parts.name.removesuffix(PARTS_SUFFIX)}")


def read_regular(path: str | os.PathLike) -> bytes:
    """Returns the content of a file, but not of a pipe, which might never end.

    Raises:
        OSError: it can't be read.
        ValueError: it is not a regular file, or is too large.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    check_file_size(status.st_size)
    with open(path, "rb") as file:
        return file.read()


def check_file_size(size: int) -> None:
    """Raises ValueError for a file that is too large to be one image."""
    if size > _MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes are more than the {_MAX_FILE_BYTES} allowed")


def parse_labels(text: bytes, where: str) -> dict[str, Any] | None:
    """Returns the labels in a `dataset.json` by image name, or None if it has no labels.

    `where` is the file's name in errors.

    Raises:
        ValueError: it is not JSON of the expected form, or lists an image twice.
    """
    data = parse_json(text, where)
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


def parse_class_names(text: bytes, where: str) -> list[str] | None:
    """Returns the class names in a `dataset.json`, or None if it has none.

    `where` is the file's name in errors.

    Raises:
        ValueError: it is not JSON, or the names are not text.
    """
    data = parse_json(text, where)
    names = data.get("class_names") if isinstance(data, dict) else None
    if names is not None and not (isinstance(names, list)
                                  and all(isinstance(name, str) for name in names)):
        raise ValueError(f'{where}: "class_names" must be a list of names, for class 0, 1, ...')
    return names or None


def parse_json(text: bytes, where: str) -> Any:
    """Returns the content of a JSON file. Raises ValueError with the position of an error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: line {error.lineno}, column {error.colno}: "
                         f"{error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # a number with too many digits; deep nesting
        raise ValueError(f"{where}: holds JSON that can't be read ({error})") from error


def label_array(names: Sequence[str], labels: dict[str, Any], where: str) -> np.ndarray:
    """Returns the labels of `names` in their order: int64 [n], or float32 [n, label_dim].

    Raises:
        ValueError: an image, which the message names, has no label, or one that is neither a class
            number nor a vector like that of the first image.
    """
    missing = sum(name not in labels for name in names)
    first = labels.get(names[0])
    for name in names:
        label = labels.get(name)
        if label is None:
            raise ValueError(f"{where}: no label for {name}; {missing} of {len(names)} images "
                             "have none, but either all or none must have one")
        problem = label_problem(label, first)
        if problem:
            raise ValueError(f"{where}: label {shown_label(label)} of {name} {problem}")
    dtype = np.float32 if isinstance(first, list) else np.int64
    return np.array([labels[name] for name in names], dtype=dtype)


def shown_label(label: Any) -> str:
    """Returns a label as JSON, shortened."""
    return json.dumps(label)[:40]


def label_problem(label: Any, first: Any) -> str | None:
    """Returns what is wrong with a label, given the first image's, or None if it is fine."""
    if type(label) is int:
        if not 0 <= label < MAX_CLASSES:
            return f"must be in 0..{MAX_CLASSES - 1}"
        return None if type(first) is int else "must be a list like the first image's"
    if isinstance(label, list):
        if not label or not all(type(x) in (int, float) and abs(x) <= _MAX_FLOAT for x in label):
            return "must hold finite numbers"
        if not isinstance(first, list) or len(first) != len(label):
            return "must have the same form as the first image's"
        return None
    return "must be a class number or a list of numbers"


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses Python's garbage collection.

    A million names and labels contain no garbage, but searching them takes a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Files(Protocol):
    """The files of a data set by their '/'-separated names, wherever they are stored."""

    names: list[str]

    def open(self, name: str) -> IO[bytes]:
        """Opens a file."""

    def stamp(self, name: str) -> str:
        """Returns a string that changes with the content of a file."""

    def close(self) -> None:
        """Closes open files."""


class Folder:
    """The files below a folder by their '/'-separated names. `stamp` depends on the content."""

    def __init__(self, path: Path):
        self._path = path
        self.names = list_files(path)

    def open(self, name: str) -> IO[bytes]:
        return open(self._path / name, "rb")

    def stamp(self, name: str) -> str:
        data = (self._path / name).read_bytes()
        return f"{len(data)} {zlib.crc32(data)}"

    def close(self) -> None:
        pass


class Zip:
    """The members of a ZIP by name. Each process opens its own handle on first use."""

    def __init__(self, path: Path):
        self._path = path
        self._zip, self._pid = None, None
        self.names = [info.filename for info in self._handle().infolist() if not info.is_dir()]
        if len(set(self.names)) != len(self.names):
            [(name, count)] = collections.Counter(self.names).most_common(1)
            raise ValueError(f"{path}: {name} occurs {count} times; member names must be "
                             "unique")

    @collector_paused()
    def _handle(self) -> zipfile.ZipFile:
        if self._zip is not None and self._pid != os.getpid():
            # A forked child keeps the list of members, which takes 20 s to read for a million, but
            # needs its own file position.
            self._zip.fp = open(self._path, "rb")  # noqa: SIM115 - by close()
            self._pid = os.getpid()
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self._path)
            except zipfile.BadZipFile as error:
                with open(self._path, "rb") as file:
                    is_cut = file.read(4) == b"PK\x03\x04"
                problem = "the ZIP is truncated or damaged" if is_cut else "neither folder nor ZIP"
                if is_image(str(self._path)):
                    problem += (", but a single file; put it into a folder and name that, or "
                                "convert an array of images with dataset_tool.py --source=FILE")
                raise ValueError(f"{self._path}: {problem}") from error
            self._pid = os.getpid()
        return self._zip

    def open(self, name: str) -> IO[bytes]:
        return self._handle().open(name)

    def stamp(self, name: str) -> str:
        return f"{self.info(name).file_size} {self.info(name).CRC}"

    def info(self, name: str) -> zipfile.ZipInfo:
        """Returns the ZIP's record of a member."""
        return self._handle().getinfo(name)

    def close(self) -> None:
        if self._zip is not None and self._pid == os.getpid():
            self._zip.close()
        self._zip, self._pid = None, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None, "_pid": None}
