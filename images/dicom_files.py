"""DICOM files as images, in their own units, and the order of the slices of a series.

    value = slope * stored + intercept       (DICOM PS3.3, C.11.1.1: HU if the modality is CT)

MONOCHROME1, in which the lowest value is white, only affects display, not these values
(C.7.6.3.1.2). A series consists of the files in one folder that share a SeriesInstanceUID. Its
slices are ordered by their position along the normal of the first slice, the cross product of its
row and column directions (C.7.6.2.1.1). The package pydicom is imported when files are read.
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
# Exceptions that pydicom has been seen to raise for damaged files.
_DAMAGE = (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError,
           NotImplementedError, EOFError, OverflowError, MemoryError, AssertionError, struct.error)


class Header(NamedTuple):
    """The header of a file, which is read before its pixels."""

    is_image: bool
    series: str = ""
    number: int | None = None  # InstanceNumber
    position: tuple[float, ...] | None = None  # of the first pixel: x, y, z in mm
    directions: tuple[float, ...] | None = None  # of rows (x, y, z), then of columns
    is_shown_inverted: bool = False  # by viewers; does not affect the values
    problem: str | None = None  # why the image can't be converted


def require_package(path: Path) -> None:
    """Raises OSError, naming the source, if pydicom is not installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise OSError(f"{path}: reading DICOM needs the package pydicom: pip install "
                      "pydicom") from error


def is_dicom(name: str, open_file: Callable[[str], IO[bytes]]) -> bool:
    """Whether a file is DICOM, by its extension or, without one, by its first bytes.

    Many names are UIDs, which end in a dot and a number.
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
    """Returns the header of a file.

    Raises:
        DamagedImageError: the file is not DICOM, or is damaged.
    """
    with _reading():
        from pydicom import dcmread

        dataset = dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
        if "Rows" not in dataset:  # a directory, report or plan
            return Header(False)
        return Header(
            True, str(dataset.get("SeriesInstanceUID", "")), _integer(dataset, "InstanceNumber"),
            _numbers(dataset, "ImagePositionPatient", 3),
            _numbers(dataset, "ImageOrientationPatient", 6),
            dataset.get("PhotometricInterpretation") == _INVERTED, _problem(dataset))


def decode(content: bytes) -> np.ndarray:
    """Returns the values of the image in a file, float32 [1, H, W].

    Raises:
        DamagedImageError: the file is not DICOM, is damaged, or has an unsupported kind.
    """
    with _reading():
        from pydicom import dcmread

        dataset = dcmread(io.BytesIO(content))
        if problem := _problem(dataset):  # in case the header was not read before
            raise ValueError(problem)
        values = dataset.pixel_array.astype(np.float64)
        slope, intercept = (_number(dataset, f"Rescale{name}") for name in ("Slope", "Intercept"))
        values = values * (1 if slope is None else slope) + (intercept or 0)
        return array_files.to_stored(values[None])


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Converts all exceptions of pydicom to one type, and drops its warnings.

    The warnings are about values that violate the standard, which many scanners write.
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
            more = f"; more decoders: {_DECODERS}" if "available plugins" in text else ""
            raise DamagedImageError(f"can't be read: {text}{more}") from error


def _problem(dataset: Any) -> str | None:
    """Returns why the image of a file can't be converted, or None if it can."""
    kind, frames = dataset.get("PhotometricInterpretation"), _integer(dataset, "NumberOfFrames")
    if (frames or 1) > 1 or dataset.get("SharedFunctionalGroupsSequence"):
        return (f"is a multi-frame file ({frames or 1} frames), but only single-slice files are "
                "supported; export it as one file per slice")
    if dataset.get("SamplesPerPixel", 1) != 1 or kind not in ("MONOCHROME2", _INVERTED):
        return f"is {kind}; only MONOCHROME2 and MONOCHROME1 are supported; save colours as PNG"
    if dataset.get("ModalityLUTSequence"):
        return "has a modality lookup table instead of slope and intercept, which is not supported"
    return _compression_problem(dataset.file_meta.TransferSyntaxUID)


def _compression_problem(syntax: Any) -> str | None:
    from pydicom.pixels import get_decoder

    try:
        if get_decoder(syntax).is_available:
            return None
    except NotImplementedError:
        return f"is stored as {syntax.name}, which is not supported"
    return f"is compressed as {syntax.name}, which needs more packages: {_DECODERS}"


def _integer(dataset: Any, keyword: str) -> int | None:
    """Returns a whole number, or None if there is none."""
    try:
        return int(dataset.get(keyword))
    except (TypeError, ValueError):
        return None


def _number(dataset: Any, keyword: str) -> float | None:
    """Returns a number, or None if it is missing or empty."""
    value = dataset.get(keyword)
    return None if value is None or value == "" else float(value)


def _numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """Returns `count` finite numbers, or None if there are not that many."""
    try:
        numbers = tuple(map(float, dataset.get(keyword)))
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def in_order(headers: Mapping[str, Header]) -> tuple[list[str], str, str]:
    """Returns file names by series and slice, a text with their number, and the sort criteria.

    `headers` must be in the order of their names, in which the series stay.
    """
    series: dict[tuple[str, str], list[str]] = {}
    for name, header in headers.items():
        series.setdefault((name.rpartition("/")[0], header.series), []).append(name)
    ordered, rules = [], {}
    for names in series.values():
        rule, key = _slice_order([headers[name] for name in names])
        ordered += sorted(names, key=lambda name, key=key: key(headers[name]))  # a stable sort
        rules[rule] = None
    return (ordered, f"{counted(len(headers), 'slice')} of {len(series)} DICOM series",
            " or ".join(rules))


def _slice_order(headers: list[Header]) -> tuple[str, Callable[[Header], Any]]:
    """Returns the sort criterion for the slices of a series, in words and as a sort key."""
    if all(header.position and header.directions for header in headers):
        normal = np.cross(headers[0].directions[:3], headers[0].directions[3:])
        return "their positions", lambda header: (float(normal @ header.position),
                                                  header.number or 0)
    if all(header.number is not None for header in headers):
        return "InstanceNumber", lambda header: header.number
    return "their names", lambda header: 0
