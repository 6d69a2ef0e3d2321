"""Converts a source of images to a data set: PNGs or arrays of one size, labels and conditions.

Each image is turned upright, converted to 8-bit gray or RGB in sRGB, cropped and resized as asked,
and stored as an uncompressed PNG under its number or name. `dataset.json` with the labels is
written last. With a scaling rule, floating-point and 16-bit images keep their values, optionally
clipped, and become .npy files. Statistics that the rule needs are measured during the conversion;
the scaling and the limits are written to `dataset.json`. 8-bit arrays with other than 1 or 3
channels also become .npy files, because PNGs can't hold them. Condition images are converted along
with their images. Damaged images stop the conversion or, if asked, are skipped. The result does not
depend on the number of worker processes. PyTorch is not needed.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import posixpath
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from dnnlib.atomic import atomic_write, temporary_name
from dnnlib.ordered_pool import ordered_map
from dnnlib.progress import Progress
from dnnlib.stored_zip import StoredZip
from dnnlib.util import counted, format_ranges
from images import array_files, color_profiles, pictures
from images.image_files import (
    ARRAY_SUFFIX,
    CONDITIONS,
    LABELS_NAME,
    PICTURE_FORMATS,
    ImageFormat,
    error_prefix,
    is_array,
    picture_format,
    stem,
)
from images.pictures import DamagedImageError
from images.scaling import Moments, Scaling, scaling_by
from images.sources import Item, Source

_PNG_COLOR = {"L": 0, "RGB": 2}
_HALF_OF_16_BITS = 1 << 15
_TWINS = {"MPO": "JPEG", "DIB": "BMP"}  # formats that share another format's extension


@dataclasses.dataclass(frozen=True)
class Settings:
    """How every image is converted."""

    transform: str | None  # how to crop, a key of `_TRANSFORMS`
    size: tuple[int, int] | None  # width and height to resize to; None keeps the size
    background: tuple[int, int, int]  # background colour for transparent images
    first_frame: bool  # whether to take the first frame of animations
    scale: str | tuple[float, float] | None = None  # for `scaling_by`; None makes all images 8-bit
    flag: str = "--scale"  # the flag of the scaling rule, for errors
    clip: tuple[float, float] | None = None  # limits of the values, applied first
    channels: str | None = None  # 'gray' or 'rgb' converts all pictures; None keeps their modes
    picked: tuple[int, ...] | None = None  # channels of arrays to take; None takes all
    layout: str | None = None  # of arrays, see `array_files.first_channels`
    to_srgb: bool = True  # whether to apply the colour profiles of pictures that become 8-bit
    skip_damaged: bool = False  # whether to skip damaged images instead of stopping
    can_be_checked: bool = False  # whether `dataset_tool.py check` can read the source


class Converted(NamedTuple):
    """One converted image. Its file is None if it is damaged or the transform skips it."""

    name: str  # in the source
    data: bytes | None
    format: ImageFormat | None
    was_cmyk: bool = False  # and had no colour profile
    has_new_colors: bool = False  # changed by its colour profile
    profile_problem: str | None = None  # why its colour profile was not applied
    file_format: str | None = None  # Pillow's name of the file's format; None for bare pixels
    moments: Moments | None = None  # set for images that will be scaled
    clipped: tuple[int, int] = (0, 0)  # number of values changed by `clip`, and of all values
    deep_top: int | None = None  # largest 16-bit value, if only the upper 8 bits were kept
    damage: str | None = None  # why the image can't be read


def convert_image(item: Item, settings: Settings) -> Converted:
    """Returns one image as a PNG, or as a .npy if a PNG can't hold it.

    Raises:
        ValueError: the image, which the message names, is damaged or of an unsupported kind.
    """
    try:
        decoded, is_deep, kind = _read(item, settings)
    except DamagedImageError as error:
        if settings.skip_damaged:
            return Converted(item.name, None, None, damage=str(error))
        check = "'dataset_tool.py check' lists all damaged images, " if settings.can_be_checked \
            else ""
        raise ValueError(f"{item.name}: {error}; {check}--skip-damaged leaves them "
                         "out") from error
    if isinstance(decoded, np.ndarray):
        return _convert_values(item.name, decoded, settings, kind)
    return _convert_picture(item.name, decoded, settings, is_deep)


class _Read(NamedTuple):
    """An image as it was read."""

    decoded: PIL.Image.Image | np.ndarray  # a picture, or values [C, H, W]
    is_deep: bool = False  # whether it was a 16-bit picture
    kind: str | None = None  # type of the array in its file


def _read(item: Item, settings: Settings) -> _Read:
    """Returns an image as a picture or as values.

    Raises:
        DamagedImageError: it can't be read; the message lacks its name.
        ValueError: it is an animation, or an array with an ambiguous shape.
    """
    content = item.content()
    values, kind = (item.decode(content), None) if item.decode else \
        _array_values(item.name, content, item.layout or settings.layout)
    if values is None:
        if settings.picked is not None:
            raise ValueError(f"{item.name}: is a picture, but --channels can only split arrays")
        return _read_picture(item.name, content, settings)
    if settings.picked is not None:
        values = _pick(item.name, values, settings.picked)
    if values.dtype == np.uint8 and len(values) in (1, 3):
        pixels = values[0] if len(values) == 1 else values.transpose(1, 2, 0)
        return _Read(PIL.Image.fromarray(pixels))
    return _Read(values, kind=kind)


def _read_picture(name: str, content: bytes | np.ndarray, settings: Settings) -> _Read:
    if not isinstance(content, bytes):  # pixels from an archive
        return _Read(PIL.Image.fromarray(content))
    picture = pictures.read_picture(content)
    # MPO is a photograph followed by a preview, not an animation.
    is_animated = getattr(picture, "is_animated", False) and picture.format != "MPO"
    if is_animated and not settings.first_frame:
        raise ValueError(f"{name}: has several frames; --first-frame takes the first")
    return _Read(picture, pictures.is_deep(picture, content))


def _array_values(name: str, content: bytes | np.ndarray,
                  layout: str | None) -> tuple[np.ndarray | None, str | None]:
    """Returns the values [C, H, W] of an array and their type in the file; None for a picture."""
    if not isinstance(content, bytes) or not (
            is_array(name) or content.startswith(array_files.MAGIC)):
        return None, None
    try:
        shape, kind = array_files.read_shape_and_type(content)
        values, _ = array_files.decode(content, layout)
    except ValueError as error:
        raise DamagedImageError(str(error)) from error
    with error_prefix(f"{name}: "):
        array_files.check_layout(shape, layout)
    return values, kind


def _pick(name: str, values: np.ndarray, picked: tuple[int, ...]) -> np.ndarray:
    """Returns these channels of values [C, H, W]."""
    if max(picked) >= len(values):
        raise ValueError(f"{name}: has no channel {max(picked)} for --channels; it has "
                         f"{len(values)}, numbered from 0")
    return values[list(picked)]


def _convert_picture(name: str, decoded: PIL.Image.Image, settings: Settings,
                     is_deep: bool = False) -> Converted:
    """Converts a picture of any mode."""
    if settings.scale is not None and decoded.mode in pictures.DEEP_MODES:
        values = pictures.deep_values(decoded)
        return _convert_values(name, values[None], settings)._replace(file_format=decoded.format)
    _refuse_scale(name, settings)
    with error_prefix(f"{name}: "):
        own = _to_8bit(decoded, settings.background) if decoded.mode in pictures.DEEP_MODES \
            else decoded
        matched, problem = _match_colors(own, decoded.info.get("icc_profile"), settings)
        image = _to_8bit(matched, settings.background)
    if settings.channels:
        image = image.convert({"gray": "L", "rgb": "RGB"}[settings.channels])
    image = _TRANSFORMS[settings.transform](image, settings.size)
    if image is None:
        return Converted(name, None, None, file_format=decoded.format)
    return Converted(
        name, _encode_png(image), picture_format(image.mode, image.size),
        was_cmyk=decoded.mode == "CMYK" and matched is own, has_new_colors=matched is not own,
        profile_problem=problem, file_format=decoded.format,
        deep_top=_top_value(decoded) if is_deep else None)


def _match_colors(image: PIL.Image.Image, profile: bytes | None,
                  settings: Settings) -> tuple[PIL.Image.Image, str | None]:
    """Returns a picture in sRGB, and the reason if its profile can't be used."""
    if not profile or not settings.to_srgb:
        return image, None
    try:
        return color_profiles.to_srgb(image, profile), None
    except color_profiles.ProfileError as error:
        return image, str(error)


def _top_value(image: PIL.Image.Image) -> int:
    """Returns the largest value of a 16-bit picture, of which Pillow may have kept 8 bits."""
    if image.mode in pictures.DEEP_MODES:
        return int(pictures.deep_values(image).max())
    pixels = np.asarray(image)
    return 257 * int(pixels[..., [band != "A" for band in image.getbands()]].max())


def _refuse_scale(name: str, settings: Settings) -> None:
    if settings.scale is not None:
        raise ValueError(f"{settings.flag}: {name} has 8 bits per channel (colour is always read "
                         f"as 8 bits), which always become x/127.5 - 1; leave {settings.flag} out")


def _convert_values(name: str, values: np.ndarray, settings: Settings,
                    kind: str | None = None) -> Converted:
    """Converts values [C, H, W] to a .npy of uint8, uint16 or float32.

    `kind` is the type they had in their file, for errors.
    """
    given = values
    with error_prefix(f"{name}: "):
        values = _clip(values, settings)
        num_clipped = int(np.count_nonzero(values != given))
        values = array_files.to_stored(_fit_values(values, settings))
        values = _clip(values, settings)  # Lanczos filters overshoot
        if array_files.is_channels_last(values.shape):
            raise ValueError(f"with {len(values)} channels and a width of {values.shape[2]}, the "
                             "channels can't be told from the columns; make the images wider")
        if values.dtype != np.uint8 and settings.scale is None:
            kind = kind or str(values.dtype)
            hint = ", or save pixels of 0 to 255 as uint8" if "int" in kind else ""
            raise ValueError(f"holds {kind}; give {settings.flag}=minmax, std or LO,HI{hint}")
    if values.dtype == np.uint8:
        _refuse_scale(name, settings)
    data = array_files.encode(values)
    image_format = array_files.read_format(io.BytesIO(data))
    moments = Moments.of(values) if settings.scale else None
    return Converted(name, data, image_format, moments=moments, clipped=(num_clipped, given.size))


def _clip(values: np.ndarray, settings: Settings) -> np.ndarray:
    """Returns values clipped to `clip`, in their type."""
    if settings.clip is None:
        return values
    low, high = settings.clip
    if values.dtype.kind == "f":
        return values.clip(low, high)
    limits = np.iinfo(values.dtype)
    low, high = max(math.ceil(low), limits.min), min(math.floor(high), limits.max)
    if low > high:
        flag = settings.flag.replace("scale", "clip")
        raise ValueError(f"holds {values.dtype}, which has no values in the range of {flag}")
    return values.clip(low, high)


def _fit_values(values: np.ndarray, settings: Settings) -> np.ndarray:
    """Returns values [C, H, W] cropped and resized channel by channel, in their type."""
    if settings.transform == "center-crop-wide":
        raise ValueError("--transform=center-crop-wide is for 8-bit pictures; use center-crop")
    if settings.transform == "center-crop":
        side = min(values.shape[1:])
        top, left = ((length - side) // 2 for length in values.shape[1:])
        values = values[:, top:top + side, left:left + side]
    if settings.size in (None, values.shape[:0:-1]):
        return values
    resized = np.stack([np.asarray(_resize(PIL.Image.fromarray(channel), settings.size))
                        for channel in values.astype(np.float32)])
    if values.dtype.kind == "f":
        return resized
    limits = np.iinfo(values.dtype)
    return resized.round().clip(limits.min, limits.max).astype(values.dtype)


def _encode_png(image: PIL.Image.Image) -> bytes:
    """Returns an uncompressed PNG of mode L or RGB, without filters and without metadata.

    At 64x64 this is six times as fast as Pillow, which tries every filter on every row even without
    compression. Without filters, decoding takes half the time.
    """
    pixels = np.asarray(image).reshape(image.height, -1)
    rows = np.zeros([len(pixels), 1 + pixels.shape[1]], np.uint8)  # each begins with its filter
    rows[:, 1:] = pixels
    header = struct.pack(">2I5B", *image.size, 8, _PNG_COLOR[image.mode], 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", _png_chunk(b"IHDR", header),
                     _png_chunk(b"IDAT", zlib.compress(rows, 0)), _png_chunk(b"IEND", b"")])


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def _to_8bit(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    """Returns the image as L or RGB.

    Transparent images are composited on `background`; gray images stay gray if it is gray. Of 16
    bits, the upper 8 are kept, as Pillow does for RGB. 1-bit images become 0 and 255.
    """
    mode = image.mode
    if mode in ("LA", "PA", "RGBA", "RGBa") or (mode in ("1", "L", "P", "RGB")
                                                and "transparency" in image.info):
        return _composite(image, background)
    if mode in ("L", "RGB"):
        return image
    if mode == "1":
        return image.convert("L")
    if mode in ("P", "CMYK", "YCbCr", "RGBX"):
        return image.convert("RGB")
    if mode == "F":
        raise ValueError("holds floating-point values; give --scale=minmax, std or LO,HI")
    if mode not in ("I", "I;16", "I;16L", "I;16B") or "transparency" in image.info:
        raise ValueError(f"has mode {mode}, which is not supported; convert it to RGB")
    pixels = pictures.deep_values(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError(f"has values from {pixels.min()} to {pixels.max()}, which do not fit in "
                         "16 bits; keep them with --scale=minmax, std or LO,HI")
    return PIL.Image.fromarray((pixels.astype(np.uint16) >> 8).astype(np.uint8))


def _composite(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    canvas = PIL.Image.new("RGBA", image.size, (*background, 255))
    rgb = PIL.Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    is_gray = image.mode in ("1", "L", "LA") and len(set(background)) == 1
    return rgb.getchannel("R") if is_gray else rgb


def _resize(image: PIL.Image.Image, size: tuple[int, int] | None) -> PIL.Image.Image:
    """Returns the image resized to `size`, ignoring its aspect; unchanged if it has that size."""
    if size is None or image.size == size:
        return image
    return image.resize(size, PIL.Image.Resampling.LANCZOS)


def _center_crop(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """Returns the largest central square as RGB, resized."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return _resize(image.crop((left, top, left + side, top + side)).convert("RGB"), size)


def _center_crop_wide(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image | None:
    """Returns the central rows at the aspect of `size` as RGB, resized, on a black square.

    Returns None for an image that would have to be enlarged.
    """
    width, height = image.size
    rows = round(size[0] * height / width)  # half to even, as EDM rounds
    if width < size[0] or rows < size[1]:
        return None
    top = (height - rows) // 2
    band = _resize(image.crop((0, top, width, top + rows)).convert("RGB"), size)
    canvas = PIL.Image.new("RGB", (size[0], size[0]))
    canvas.paste(band, (0, (size[0] - size[1]) // 2))
    return canvas


_TRANSFORMS = {None: _resize, "center-crop": _center_crop, "center-crop-wide": _center_crop_wide}


def select_images(source: Source, max_images: int | None,
                  classes: list[int] | None) -> tuple[Sequence[int], list[Any] | None]:
    """Returns the numbers of the images to convert and their new labels, or None without labels.

    Raises:
        ValueError: the labels are invalid or of mixed kinds, or none are in `classes`.
    """
    numbers = range(source.num_images)[:max_images]
    if source.labels is None:
        if classes:
            raise ValueError("--classes: the source has no labels")
        return numbers, None
    labels = source.labels(numbers)
    if classes is None:
        return numbers, labels
    if isinstance(labels[0], list):
        raise ValueError("--classes: the source's labels are vectors, not classes")
    present = set(labels)
    for number in classes:
        if number not in present:
            among = "" if max_images is None else f" of the first {len(numbers)} images"
            raise ValueError(f"--classes: no image{among} has class {number}; the classes are "
                             f"{format_ranges(sorted(present))}")
    new = {old: number for number, old in enumerate(classes)}
    kept = [i for i in numbers if labels[i] in new]
    return kept, [new[labels[i]] for i in kept]


def kept_names(source: Source, numbers: Sequence[int]) -> list[str] | None:
    """Returns the names of images in the data set, taken from the source without extensions.

    Returns None for sources that are not files.

    Raises:
        ValueError: two names would be equal, or a name is not UTF-8 or begins with cond/.
    """
    if not source.has_file_names:
        return None
    first: dict[str, str] = {}
    for number in numbers:
        name = source.names[number]
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"--keep-names: {ascii(name)} is not UTF-8; rename the "
                             "file") from error
        kept = posixpath.normpath(stem(name))
        if kept.startswith(CONDITIONS):
            raise ValueError(f"--keep-names: {name} would be a condition image; rename the folder")
        if first.setdefault(kept, name) != name:
            raise ValueError(f"--keep-names: {first[kept]} and {name} would both be named {kept}; "
                             "rename one")
    return list(first)


def new_class_names(source: Source, labels: list[Any] | None,
                    classes: list[int] | None) -> list[str] | None:
    """Returns the names of the new classes of `select_images`, or None if they have no names.

    Raises:
        ValueError: there are fewer names than classes.
    """
    names = source.class_names
    if not names or not labels or isinstance(labels[0], list):
        return None
    numbers = range(max(len(names), max(labels) + 1)) if classes is None else classes
    if max(numbers) >= len(names):
        raise ValueError(f'"class_names" has {len(names)} names, but there is a class '
                         f"{max(numbers)}")
    return [names[number] for number in numbers]


class Tally:
    """The number of images that something applies to, and the first of them."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def add(self, name: str) -> None:
        self.first = self.first or name
        self.count += 1


@dataclasses.dataclass
class Outcome:
    """What a conversion wrote, what it skipped, and what was unusual."""

    format: ImageFormat | None = None
    first: str = ""  # name of the first image
    num_images: int = 0
    label_dim: int | None = None  # length of label vectors; None for class numbers
    classes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    too_small: Tally = dataclasses.field(default_factory=Tally)
    cmyk: Tally = dataclasses.field(default_factory=Tally)
    recolored: Tally = dataclasses.field(default_factory=Tally)  # changed by their colour profiles
    bad_profiles: Tally = dataclasses.field(default_factory=Tally)  # names and reasons
    misnamed: Tally = dataclasses.field(default_factory=Tally)  # format differs from the extension
    damaged: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # names and reasons
    deep: Tally = dataclasses.field(default_factory=Tally)  # 16-bit images that became 8-bit
    deep_top: int = 0  # largest 16-bit value in them
    moments: Moments | None = None
    scaling: Scaling | None = None  # set for data that are not 8-bit
    clip: tuple[float, float] | None = None  # limits of the values; None for no limits
    num_clipped: int = 0  # values beyond the limits
    num_values: int = 0  # values compared with the limits
    conditions: "Outcome | None" = None

    def add(self, result: Converted, label: Any) -> None:
        """Counts a written image. Raises ValueError if its format differs from the first's."""
        if not self.num_images:
            self.first, self.format = result.name, result.format
        if result.format != self.format:
            pictures_only = {result.format.mode, self.format.mode} <= {"L", "RGB"}
            how = "--transform=center-crop with --resolution makes all alike"
            if pictures_only and result.format.shape[1:] == self.format.shape[1:]:
                how = "--channels=rgb or --channels=gray makes all alike"
            raise ValueError(f"{result.name} is {result.format}, but {self.first} is "
                             f"{self.format}; {how}")
        self.num_images += 1
        self.num_clipped += result.clipped[0]
        self.num_values += result.clipped[1]
        if result.moments:
            self.moments = self.moments.merge(result.moments) if self.moments else result.moments
        if isinstance(label, list):
            self.label_dim = len(label)
        elif label is not None:
            self.classes[label] += 1

    def note_oddities(self, result: Converted) -> None:
        """Counts what is unusual: CMYK, colour profiles, 16 bits, or a misleading name."""
        if result.deep_top is not None:
            self.deep.add(result.name)
            self.deep_top = max(self.deep_top, result.deep_top)
        if result.was_cmyk:
            self.cmyk.add(result.name)
        if result.has_new_colors:
            self.recolored.add(result.name)
        if result.profile_problem:
            self.bad_profiles.add(f"{result.name} ({result.profile_problem})")
        if result.file_format is None:
            return
        extension = os.path.splitext(result.name)[1].lower()
        named = PICTURE_FORMATS.get(extension, result.file_format)
        if _TWINS.get(named, named) != _TWINS.get(result.file_format, result.file_format):
            self.misnamed.add(f"{result.name} ({result.file_format})")

    def check_depth(self) -> None:
        """Raises ValueError if 16-bit images would become nearly black as 8-bit images."""
        if self.deep.count and self.deep_top < _HALF_OF_16_BITS:
            bits = max(self.deep_top.bit_length(), 8)
            how = (f"keep the values with --scale=0,{(1 << bits) - 1} or --scale=minmax, or store "
                   "them with 8 bits")
            if self.format.channels > 1:
                how = "store them with 8 bits or, for --scale, as .npy arrays"
            raise ValueError(
                f"{counted(self.deep.count, 'image has', 'images have')} 16 bits per channel, but "
                f"no value above {self.deep_top}, so the upper 8 bits would be nearly black; "
                f"{how} (the first is {self.deep.first})")

    def settle_scaling(self, settings: Settings) -> None:
        """Computes the scaling from the images. Raises ValueError for a constant channel."""
        if self.moments:
            self.clip = settings.clip
            with error_prefix(settings.flag):
                self.scaling = scaling_by(settings.scale, self.moments)


class Conditions(NamedTuple):
    """The condition images of a conversion, and how they are converted.

    If they are channels of the images' own files, `source` and `numbers` are those of the images.
    """

    source: Source
    numbers: Sequence[int]  # the condition image for each image that is converted
    settings: Settings
    flag: str = "--cond-source"  # the flag of their source, for errors


def convert_all(source: Source, numbers: Sequence[int], labels: list[Any] | None,
                settings: Settings, write: Callable[[str, bytes], None], workers: int,
                conditions: Conditions | None = None,
                class_names: Sequence[str] | None = None,
                names: Sequence[str] | None = None) -> Outcome:
    """Converts and writes these images of the source and their conditions, then dataset.json.

    `class_names` are the names of the new labels. `names` are the new names of the images without
    extensions. With None, images are numbered.
    """
    outcome, entries = Outcome(conditions=Outcome() if conditions else None), bytearray()
    convert = functools.partial(
        _convert_pair, settings=settings,
        cond_settings=conditions and conditions.settings, flag=conditions and conditions.flag)
    results = ordered_map(convert, _read_pairs(source, numbers, conditions),
                          min(workers, len(numbers)))
    with contextlib.closing(results), Progress(len(numbers), "Converting") as progress:
        for i, (result, condition) in enumerate(progress.over(results)):
            damaged = next((one for one in (result, condition) if one and one.damage), None)
            if damaged:
                outcome.damaged.append((damaged.name, damaged.damage))
                continue
            outcome.note_oddities(result)
            if result.data is None:
                outcome.too_small.add(result.name)
                continue
            outcome.add(result, labels[i] if labels else None)
            kept = names[i] if names else f"{i // 1000:05d}/img{i:08d}"
            name = kept + _suffix(result)
            write(name, result.data)
            if condition:
                outcome.conditions.note_oddities(condition)
                outcome.conditions.add(_of_one_size(condition, result, conditions.flag), None)
                write(CONDITIONS + kept + _suffix(condition), condition.data)
            if labels:
                entries += (b", " if entries else b"") + json.dumps([name, labels[i]]).encode()
    all_of_them = "the only image is" if len(numbers) == 1 else f"all {len(numbers)} images are"
    if len(outcome.damaged) == len(numbers):
        name, damage = outcome.damaged[0]
        raise ValueError(f"{all_of_them} damaged; the first is {name}: {damage}")
    outcome.check_depth()
    if outcome.conditions:
        outcome.conditions.check_depth()
    if not outcome.num_images:
        raise ValueError(f"{all_of_them} smaller than --resolution; enlarge with "
                         "--transform=center-crop")
    more = _scale_entries(outcome, settings, conditions)
    if class_names and labels:
        more += b', "class_names": %b' % json.dumps(class_names).encode()
    write(LABELS_NAME, b'{"labels": %b%b}' % (b"[%b]" % entries if labels else b"null", more))
    return outcome


def _read_pairs(source: Source, numbers: Sequence[int],
                conditions: Conditions | None) -> Iterator[tuple[Item, Item | None]]:
    """Yields each image with its condition image, which may be the same item."""
    if not conditions:
        return ((item, None) for item in source.read(numbers))
    if conditions.source is source:  # read only once
        return ((item, item) for item in source.read(numbers))
    return zip(source.read(numbers), conditions.source.read(conditions.numbers), strict=True)


def _convert_pair(items: tuple[Item, Item | None], settings: Settings,
                  cond_settings: Settings | None,
                  flag: str | None) -> tuple[Converted, Converted | None]:
    """Converts an image and its condition image, if it has one."""
    item, condition = items
    result = convert_image(item, settings)
    if condition is None or (result.data is None and not result.damage):
        return result, None
    with error_prefix(f"{flag}: "):
        return result, convert_image(condition, cond_settings)


def _suffix(result: Converted) -> str:
    return ARRAY_SUFFIX if result.data.startswith(array_files.MAGIC) else ".png"


def _of_one_size(condition: Converted, image: Converted, flag: str) -> Converted:
    """Returns the condition image. Raises ValueError if its size differs from its image's."""
    if condition.data is None or condition.format.shape[1:] != image.format.shape[1:]:
        raise ValueError(f"{flag}: {condition.name} is {condition.format}, but its image "
                         f"{image.name} is {image.format}; --resolution makes both alike")
    return condition


def _scale_entries(outcome: Outcome, settings: Settings, conditions: Conditions | None) -> bytes:
    """Returns the entries of dataset.json for scalings and limits, which follow the labels."""
    outcome.settle_scaling(settings)
    record = {"scale": outcome.scaling, "clip": outcome.clip}
    if conditions:
        outcome.conditions.settle_scaling(conditions.settings)
        record |= {"cond_scale": outcome.conditions.scaling, "cond_clip": outcome.conditions.clip}
    return b"".join(f', "{key}": {json.dumps(value, default=Scaling.to_dict)}'.encode()
                    for key, value in record.items() if value)


@contextlib.contextmanager
def open_dest(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Yields a function that writes a file by name. `path` appears when the block succeeds.

    An existing ZIP is replaced. An existing folder must be empty.

    Raises:
        OSError: the destination can't be written, or exists already.
    """
    with open_dests({"--dest": path}) as [write]:
        yield write


@contextlib.contextmanager
def open_dests(paths: Mapping[str, Path]) -> Iterator[list[Callable[[str, bytes], None]]]:
    """Opens several destinations like `open_dest`, by their flags, which errors name.

    All are complete before the first gets its name. A full disk therefore leaves earlier data sets
    unchanged.
    """
    with contextlib.ExitStack() as stack:
        dests = []
        for flag, given in paths.items():
            path = Path(os.path.realpath(given))
            opener = _write_zip if path.suffix.lower() == ".zip" else _write_folder
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                dests.append(stack.enter_context(opener(path, flag)))
            except OSError as error:
                if error.strerror is None:  # a message of this program
                    raise
                raise OSError(f"{flag}={given}: can't be written ({error.strerror}); name another "
                              "place") from error
        yield [dest.write for dest in dests]
        for dest in dests:
            dest.finish()


class _Dest(NamedTuple):
    """A data set that is being written."""

    write: Callable[[str, bytes], None]
    finish: Callable[[], None]  # completes it, except for giving it its name


@contextlib.contextmanager
def _write_zip(path: Path, flag: str) -> Iterator[_Dest]:
    def finish():
        archive.close()
        file.flush()
        os.fsync(file.fileno())

    if path.is_dir():
        raise IsADirectoryError(f"{flag}={path}: is a folder")
    with atomic_write(path) as file:
        archive = StoredZip(file)
        yield _Dest(archive.write, finish)


@contextlib.contextmanager
def _write_folder(path: Path, flag: str) -> Iterator[_Dest]:
    def write(name, data):
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_bytes(data)

    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{flag}={path}: exists and is not an empty folder")
    tmp = temporary_name(path)
    tmp.mkdir()
    try:
        yield _Dest(write, lambda: None)
        tmp.rename(path)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
