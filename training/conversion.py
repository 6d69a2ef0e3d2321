"""From any source of images to a data set: gray or RGB PNGs of one size, with labels.

Each image is turned upright, made 8-bit gray or RGB, cropped and resized as asked, and stored as
an uncompressed PNG under its number; `dataset.json` with the labels comes last. What becomes of an
image is a function of it alone, so the result does not depend on the number of worker processes.
No PyTorch is needed.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
from tqdm import tqdm

from torch_utils.atomic import atomic_write
from torch_utils.ordered_pool import ordered_map
from torch_utils.stored_zip import StoredZip
from training.image_files import DAMAGE, LABELS_NAME
from training.sources import Item, Source

_PNG_COLOR = {"L": 0, "RGB": 2}
_TWINS = {"MPO": "JPEG", "DIB": "BMP"}  # formats that another one's extension may hold


@dataclasses.dataclass(frozen=True)
class Settings:
    """How every image is converted."""

    transform: str | None
    size: tuple[int, int] | None  # width, height
    background: tuple[int, int, int]
    first_frame: bool


class Converted(NamedTuple):
    """One image: its PNG, or None where the transform leaves it out."""

    name: str  # in the source
    png: bytes | None
    kind: tuple[str, int, int] | None  # mode, width, height
    was_cmyk: bool
    format: str | None  # Pillow's name of the file's format; None for bare pixels


def convert_image(item: Item, settings: Settings) -> Converted:
    """Returns one image as a PNG.

    Raises:
        ValueError: naming the image: it is damaged, or of a kind that isn't converted.
    """
    content = item.content()
    if isinstance(content, bytes):
        decoded, file_format = _decode(item.name, content, settings.first_frame)
    else:
        decoded, file_format = PIL.Image.fromarray(content), None
    try:
        image = _to_8bit(decoded, settings.background)
    except ValueError as error:
        raise ValueError(f"{item.name}: {error}") from error
    image = _TRANSFORMS[settings.transform](image, settings.size)
    was_cmyk = decoded.mode == "CMYK"
    if image is None:
        return Converted(item.name, None, None, was_cmyk, file_format)
    kind = image.mode, *image.size
    return Converted(item.name, _encode_png(image), kind, was_cmyk, file_format)


def _encode_png(image: PIL.Image.Image) -> bytes:
    """Returns an uncompressed PNG of mode L or RGB, without filters and without metadata.

    At 64x64 six times as fast as Pillow, which tries every filter on every row even if nothing is
    compressed afterwards; and without filters it takes half the time to decode.
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


def _decode(name: str, data: bytes, first_frame: bool) -> tuple[PIL.Image.Image, str]:
    """Returns the image upright, in whatever mode, and its file's format."""
    bombs = (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)
    is_animated = is_program = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(io.BytesIO(data))
        # MPO is a photograph with a preview behind it, not an animation.
        is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
        is_program = image.format == "EPS"  # Pillow would start Ghostscript
        if not is_program and (first_frame or not is_animated):
            PIL.ImageOps.exif_transpose(image, in_place=True)
    except bombs as error:
        raise ValueError(f"{name}: more pixels than the {PIL.Image.MAX_IMAGE_PIXELS} "
                         "allowed") from error
    except DAMAGE as error:
        problem = "not an image" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise ValueError(f"{name}: can't be read: {problem}") from error
    if is_program:
        raise ValueError(f"{name}: PostScript isn't supported; convert it to PNG")
    if is_animated and not first_frame:
        raise ValueError(f"{name}: has several frames; --first-frame takes the first")
    return image, image.format


def _to_8bit(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    """Returns the image as L or RGB.

    Transparent images are composited on `background` and gray ones stay gray if it is gray. Of 16
    bits the upper 8 are kept, as Pillow does on its own for RGB; 1 bit becomes 0 and 255.
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
    if mode in ("I", "I;16", "I;16L", "I;16B") and "transparency" not in image.info:
        return _upper_byte(image)
    raise ValueError(f"mode {mode} isn't supported; convert it to RGB")


def _composite(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    canvas = PIL.Image.new("RGBA", image.size, (*background, 255))
    rgb = PIL.Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    is_gray = image.mode in ("1", "L", "LA") and len(set(background)) == 1
    return rgb.getchannel("R") if is_gray else rgb


def _upper_byte(image: PIL.Image.Image) -> PIL.Image.Image:
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError("values beyond 16 bits aren't supported")
    return PIL.Image.fromarray((pixels >> 8).astype(np.uint8))


def _resize(image: PIL.Image.Image, size: tuple[int, int] | None) -> PIL.Image.Image:
    """Returns the image at `size` whatever its aspect, untouched if it has that size."""
    if size is None or image.size == size:
        return image
    return image.resize(size, PIL.Image.Resampling.LANCZOS)


def _center_crop(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """Returns the largest central square as RGB, resized."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return _resize(image.crop((left, top, left + side, top + side)).convert("RGB"), size)


def _center_crop_wide(image: PIL.Image.Image,
                      size: tuple[int, int]) -> "PIL.Image.Image | None":
    """Returns the central rows at the aspect of `size` as RGB, resized, on a black square.

    None for an image that would have to be enlarged.
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
        ValueError: the labels aren't of one valid kind, or have none of the `classes`.
    """
    numbers = range(source.num_images)[:max_images]
    if source.labels is None:
        if classes:
            raise ValueError("--classes: the source has no labels")
        return numbers, None
    labels = source.labels(len(numbers))
    if classes is None:
        return numbers, labels
    if isinstance(labels[0], list):
        raise ValueError("--classes: the source's labels are vectors, not classes")
    present = set(labels)
    for number in classes:
        if number not in present:
            raise ValueError(f"--classes: no image has class {number}; there are "
                             f"{min(present)}..{max(present)}")
    new = {old: number for number, old in enumerate(classes)}
    kept = [i for i in numbers if labels[i] in new]
    return kept, [new[labels[i]] for i in kept]


class Tally:
    """How many images something holds for, and the first of them."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def add(self, name: str) -> None:
        self.first = self.first or name
        self.count += 1


@dataclasses.dataclass
class Outcome:
    """What a conversion wrote, what it left out, and what was unusual."""

    kind: tuple[str, int, int] | None = None  # mode, width, height
    first: str = ""  # name of the first image
    num_images: int = 0
    label_dim: int | None = None  # length of label vectors; None for class numbers
    classes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    too_small: Tally = dataclasses.field(default_factory=Tally)
    cmyk: Tally = dataclasses.field(default_factory=Tally)
    misnamed: Tally = dataclasses.field(default_factory=Tally)  # of another format

    def add(self, result: Converted, label: Any) -> None:
        """Counts an image that is written; raises ValueError if it is unlike the first."""
        if not self.num_images:
            self.first, self.kind = result.name, result.kind
        _check_kind(result.name, result.kind, self.first, self.kind)
        self.num_images += 1
        if isinstance(label, list):
            self.label_dim = len(label)
        elif label is not None:
            self.classes[label] += 1

    def note_oddities(self, result: Converted) -> None:
        """Counts an image of CMYK, or of another format than its name says."""
        if result.was_cmyk:
            self.cmyk.add(result.name)
        if result.format is None:
            return
        extension = os.path.splitext(result.name)[1].lower()
        named = PIL.Image.EXTENSION.get(extension, result.format)
        if _TWINS.get(named, named) != _TWINS.get(result.format, result.format):
            self.misnamed.add(f"{result.name} ({result.format})")


def convert_all(source: Source, numbers: Sequence[int], labels: list[Any] | None,
                settings: Settings, write: Callable[[str, bytes], None], workers: int) -> Outcome:
    """Converts and writes these images of the source, then dataset.json."""
    outcome, entries = Outcome(), bytearray()
    results = ordered_map(functools.partial(convert_image, settings=settings),
                          source.read(numbers), min(workers, len(numbers)))
    with contextlib.closing(results):
        bar = tqdm(results, total=len(numbers), unit="img", disable=None, leave=False)
        for i, result in enumerate(bar):
            outcome.note_oddities(result)
            if result.png is None:
                outcome.too_small.add(result.name)
                continue
            outcome.add(result, labels[i] if labels else None)
            name = f"{i // 1000:05d}/img{i:08d}.png"
            write(name, result.png)
            if labels:
                entries += (b", " if entries else b"") + json.dumps([name, labels[i]]).encode()
    if not outcome.num_images:
        raise ValueError(f"all {len(numbers)} images are smaller than --resolution; "
                         "--transform=center-crop enlarges")
    write(LABELS_NAME, b'{"labels": %b}' % (b"[%b]" % entries if labels else b"null"))
    return outcome


def _check_kind(name: str, kind: tuple[str, int, int], first: str,
                first_kind: tuple[str, int, int]) -> None:
    mode, width, height = kind
    if kind != first_kind:
        raise ValueError("{} is {} {}x{}, but {} is {} {}x{}; --transform=center-crop with "
                         "--resolution makes all alike".format(name, *kind, first, *first_kind))
    if width != height:
        raise ValueError(f"{name} is {width}x{height} and must be square: give --resolution, "
                         "with --transform=center-crop to keep the aspect")


@contextlib.contextmanager
def open_dest(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Yields a function that writes a file by name; `path` appears when the block ends well.

    An earlier ZIP is replaced, an earlier folder must be empty.

    Raises:
        OSError: the destination can't be written, or is there already.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = _write_zip if path.suffix.lower() == ".zip" else _write_folder
    with opener(path) as write:
        yield write


@contextlib.contextmanager
def _write_zip(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    if path.is_dir():
        raise IsADirectoryError(f"--dest={path}: is a folder")
    with atomic_write(path) as file:
        archive = StoredZip(file)
        yield archive.write
        archive.close()


@contextlib.contextmanager
def _write_folder(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    def write(name, data):
        (tmp / name).parent.mkdir(exist_ok=True)
        (tmp / name).write_bytes(data)

    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"--dest={path}: is there already and not an empty folder")
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tmp.mkdir()
    try:
        yield write
        tmp.rename(path)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
