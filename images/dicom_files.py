"""DICOM files as images, in their own units, and the order of the slices of a series.

    value = slope * stored + intercept       (DICOM PS3.3, C.11.1.1: HU where the modality is CT)

MONOCHROME1, in which the least value is white, is a matter of showing these values (C.7.6.3.1.2).
A series is the files of one folder that share a SeriesInstanceUID. Its slices go by their position
along the normal of the first one, the cross product of its row's and its column's direction
(C.7.6.2.1.1). The package pydicom is imported when files are read.
"""

import contextlib
import io
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dnnlib.util import counted
from images import array_files
from images.image_files import DICOM_SUFFIXES
from images.pictures import DamagedImageError

_MAGIC, _MAGIC_START = b"DICM", 128
_INVERTED = "MONOCHROME1"
_DECODERS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
_TAGS = ["SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient",
         "Rows", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames",
         "SharedFunctionalGroupsSequence", "ModalityLUTSequence"]
# What pydicom has been seen to raise for damaged files.
_DAMAGE = (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError,
           NotImplementedError, EOFError, OverflowError, MemoryError, AssertionError, struct.error)


class Header(NamedTuple):
    """What a file says before its pixels are read."""

    is_image: bool
    series: str = ""
    number: int | None = None  # InstanceNumber
    position: tuple[float, ...] | None = None  # of the first pixel: x, y, z in mm
    directions: tuple[float, ...] | None = None  # of rows, x, y, z, then of columns
    is_shown_inverted: bool = False  # by viewers; its values are as those of others
    problem: str | None = None  # why the image isn't converted


def require_package(path: Path) -> None:
    """Raises OSError, about the source, if pydicom isn't installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise OSError(f"{path}: reading DICOM needs another package: pip install "
                      "pydicom") from error


def is_dicom(name: str, open_file: Callable[[str], IO[bytes]]) -> bool:
    """Whether a file is DICOM by its extension or, where it has none, by how it begins.

    Many names are UIDs, which end in a number after a dot.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix and not suffix[1:].isdecimal():
        return suffix in DICOM_SUFFIXES
    try:
        with open_file(name) as file:
            return file.read(_MAGIC_START + len(_MAGIC))[_MAGIC_START:] == _MAGIC
    except _DAMAGE:
        return False


def read_header(file: IO[bytes]) -> Header:
    """Returns what a file says before its pixels.

    Raises:
        DamagedImageError: it is not DICOM, or damaged.
    """
    with _reading():
        from pydicom import dcmread

        dataset = dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
        if "Rows" not in dataset:  # a directory, a report, a plan
            return Header(False)
        return Header(
            True, str(dataset.get("SeriesInstanceUID", "")), _integer(dataset, "InstanceNumber"),
            _numbers(dataset, "ImagePositionPatient", 3),
            _numbers(dataset, "ImageOrientationPatient", 6),
            dataset.get("PhotometricInterpretation") == _INVERTED, _problem(dataset))


def decode(content: bytes) -> np.ndarray:
    """Returns the values of the image in a file, float32 [1, H, W].

    Raises:
        DamagedImageError: it is not DICOM, damaged, or of a kind that isn't read.
    """
    with _reading():
        from pydicom import dcmread

        dataset = dcmread(io.BytesIO(content))
        if problem := _problem(dataset):  # of a file whose header was not read before
            raise ValueError(problem)
        values = dataset.pixel_array.astype(np.float64)
        slope, intercept = (_number(dataset, f"Rescale{name}") for name in ("Slope", "Intercept"))
        values = values * (1 if slope is None else slope) + (intercept or 0)
        return array_files.to_stored(values[None])


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Makes one kind of error of all that pydicom raises, and drops its warnings.

    They are about values that bend the rules, as scanners write many.
    """
    from pydicom.errors import BytesLengthException, InvalidDicomError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except InvalidDicomError as error:
            raise DamagedImageError("can't be read: not a DICOM file, which begins with 128 bytes "
                                    "and DICM") from error
        except (BytesLengthException, *_DAMAGE) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            more = f"; there are more: {_DECODERS}" if "available plugins" in text else ""
            raise DamagedImageError(f"can't be read: {text}{more}") from error


def _problem(dataset: Any) -> str | None:
    """Says why the image of a file isn't converted; None if it is."""
    kind, frames = dataset.get("PhotometricInterpretation"), _integer(dataset, "NumberOfFrames")
    if (frames or 1) > 1 or dataset.get("SharedFunctionalGroupsSequence"):
        return (f"is a multi-frame file ({frames or 1} frames); only files of one slice are read, "
                "so export it as such")
    if dataset.get("SamplesPerPixel", 1) != 1 or kind not in ("MONOCHROME2", _INVERTED):
        return f"is {kind}; only MONOCHROME2 and MONOCHROME1 are read, so save colours as PNG"
    if dataset.get("ModalityLUTSequence"):
        return "has a modality lookup table, which isn't read, instead of slope and intercept"
    return _compression_problem(dataset.file_meta.TransferSyntaxUID)


def _compression_problem(syntax: Any) -> str | None:
    from pydicom.pixels import get_decoder

    try:
        if get_decoder(syntax).is_available:
            return None
    except NotImplementedError:
        return f"is stored as {syntax.name}, which isn't read"
    return f"is compressed as {syntax.name}, which needs more packages: {_DECODERS}"


def _integer(dataset: Any, keyword: str) -> int | None:
    """Returns a whole number; None where there is none."""
    try:
        return int(dataset.get(keyword))
    except (TypeError, ValueError):
        return None


def _number(dataset: Any, keyword: str) -> float | None:
    """Returns a number; None where it is missing or empty."""
    value = dataset.get(keyword)
    return None if value is None or value == "" else float(value)


def _numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """Returns so many finite numbers; None where there aren't."""
    try:
        numbers = tuple(map(float, dataset.get(keyword)))
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def in_order(headers: Mapping[str, Header]) -> tuple[list[str], str, str]:
    """Returns the names of files series by series, slice by slice, how many, and by what they go.

    `headers` are in the order of their names, which series keep.
    """
    series: dict[tuple[str, str], list[str]] = {}
    for name, header in headers.items():
        series.setdefault((name.rpartition("/")[0], header.series), []).append(name)
    ordered, rules = [], {}
    for names in series.values():
        rule, key = _slice_order([headers[name] for name in names])
        ordered += sorted(names, key=lambda name, key=key: key(headers[name]))  # else as they are
        rules[rule] = None
    return (ordered, f"{counted(len(headers), 'slice')} of {len(series)} DICOM series",
            " or ".join(rules))


def _slice_order(headers: list[Header]) -> tuple[str, Callable[[Header], Any]]:
    """Returns what the slices of a series go by, in words and as a key to sort by."""
    if all(header.position and header.directions for header in headers):
        normal = np.cross(headers[0].directions[:3], headers[0].directions[3:])
        return "their positions", lambda header: (float(normal @ header.position),
                                                  header.number or 0)
    if all(header.number is not None for header in headers):
        return "InstanceNumber", lambda header: header.number
    return "their names", lambda header: 0
