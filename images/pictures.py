"""Reading pictures of any user, in one way for training, scoring, checking and conversion.

Only listed formats are opened, whatever the name of a file, since Pillow would start Ghostscript
for PostScript. Pictures are turned upright according to their EXIF data. Text in PNGs is ignored if
Pillow refuses it because it is too long or damaged.
"""

import io
import struct
import warnings
import zlib
from typing import IO

import numpy as np
import PIL.Image
import PIL.ImageOps

from images.image_files import DAMAGE, PICTURE_FORMATS, ImageFormat, picture_format

DEEP_MODES = {"I;16": "uint16", "I;16L": "uint16", "I;16B": "uint16", "I": "float32",
              "F": "float32"}  # Pillow's modes with more than 8 bits, and types that hold them
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER = struct.Struct(">2I5B")  # the first chunk: width, height, depth, colour type, ...
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type; that of palettes, 3, is missing
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # the last is a colour profile
_HEAD_BYTES = 32  # at the start of a file; include the bit depth of a PNG
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap the sides
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
_MIN_IS_WHITE, _UNSIGNED = 0, 1
# Where Pillow may store an orientation. Its TIFF reader turns pictures upright by itself.
_MAY_BE_TURNED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")

_OTHER_KINDS = [  # position and content of the first bytes, and a description
    (0, b"%!ps", "PostScript, which is a program and isn't run; convert it to PNG"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript, which is a program and isn't run; convert it to PNG"),
    (0, b"%pdf", "a PDF document"), (4, b"ftyphe", "a HEIC picture; convert it to PNG or JPEG"),
    (4, b"ftypmif1", "a HEIC picture; convert it to PNG or JPEG"),
    (0, b"<svg", "an SVG drawing; convert it to PNG"), (0, b"<!doctype", "a web page"),
    (0, b"<html", "a web page"), (0, b"version https://git-lfs",
                                  "a pointer of Git LFS; fetch the file with 'git lfs pull'"),
]


class DamagedImageError(ValueError):
    """An image that can't be read. The message does not name it."""


def read_format(file: IO[bytes]) -> ImageFormat:
    """Returns the format of a picture after turning it upright, reading only the header.

    Raises:
        DamagedImageError: the file is not a picture in a listed format.
    """
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    with open_picture(file) as image:
        size = image.size
        if _may_be_turned(image) and image.getexif().get(_ORIENTATION) in _TURNED:
            size = size[::-1]
        return picture_format(_mode(image, head), size)


def decode(content: bytes, *, verify: bool = False) -> tuple[np.ndarray, ImageFormat]:
    """Returns the pixels of a picture [C, H, W], turned upright, and its format.

    See `read_picture` for `verify`.

    Raises:
        DamagedImageError: see `read_picture`.
    """
    image = read_picture(content, verify=verify)
    pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
    return pixels, picture_format(_mode(image, content), image.size)


def _mode(image: PIL.Image.Image, head: bytes) -> str:
    """Returns the mode of a picture, including the bits that Pillow drops."""
    return f"{image.mode};16" if image.mode in ("L", "RGB") and is_deep(image, head) else image.mode


def deep_values(image: PIL.Image.Image) -> np.ndarray:
    """Returns the values [H, W] of a picture with a mode in `DEEP_MODES`, in that mode's type."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED \
            and tags.get(_BITS_PER_SAMPLE, (0,))[0] == 32:
        values = values.view(np.uint32)  # Pillow treats it as signed
    if tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE and image.mode.startswith("I;16"):
        values = np.iinfo(np.uint16).max - values.astype(np.uint16)
    return values.astype(DEEP_MODES[image.mode])


def read_picture(content: bytes, *, verify: bool = False) -> PIL.Image.Image:
    """Returns a picture of any mode, decoded and upright. Of an animation it is the first frame.

    With `verify`, the checksums of PNGs that decoding ignores are compared.

    Raises:
        DamagedImageError: the file is not a picture in a listed format, is damaged, or too large.
    """
    if verify:
        with open_picture(io.BytesIO(content)) as image:
            try:
                image.verify()
            except DAMAGE as error:
                raise DamagedImageError(f"can't be read: {error}") from error
    image = open_picture(io.BytesIO(content))
    try:
        image.load()
        if _may_be_turned(image):
            PIL.ImageOps.exif_transpose(image, in_place=True)
    except DAMAGE as error:
        raise DamagedImageError(f"can't be read: {error}") from error
    return image


def open_picture(file: IO[bytes]) -> PIL.Image.Image:
    """Returns a picture before its pixels are decoded. `file` must stay open until they are.

    Raises:
        DamagedImageError: the file is not a picture in a listed format.
    """
    try:
        return _open(file)
    except DAMAGE as error:
        file.seek(0)
        content = file.read()
        shorter = _without_text(content)
        try:
            if shorter != content:
                return _open(io.BytesIO(shorter))
        except DAMAGE:
            pass  # the first error says more
        problem = _kind(content) if isinstance(error, PIL.UnidentifiedImageError) else error
        raise DamagedImageError(f"can't be read: {problem}") from error
    except PIL.Image.DecompressionBombError as error:
        most = f"{2 * PIL.Image.MAX_IMAGE_PIXELS:,}"
        raise DamagedImageError(f"has more pixels than the {most} allowed; make it smaller with an "
                                "image editor first") from error


def _open(file: IO[bytes]) -> PIL.Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of pictures of more than half the size that it refuses.
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        return PIL.Image.open(file, formats=_formats())


def _formats() -> tuple[str, ...]:
    """Returns the listed formats that this version of Pillow knows."""
    global _known_formats
    if _known_formats is None:
        PIL.Image.init()
        _known_formats = tuple(dict.fromkeys(
            name for name in PICTURE_FORMATS.values() if name in PIL.Image.OPEN))
    return _known_formats


_known_formats: tuple[str, ...] | None = None


def _may_be_turned(image: PIL.Image.Image) -> bool:
    return any(key in image.info for key in _MAY_BE_TURNED)


def _kind(content: bytes) -> str:
    """Describes a file that Pillow does not recognise as a listed format."""
    found = next((kind for start, beginning, kind in _OTHER_KINDS
                  if content[start:].lower().startswith(beginning)), None)
    return f"not an image but {found}" if found else "not an image" if content else "it is empty"


def _without_text(content: bytes) -> bytes:
    """Returns a PNG without its text. Other or incomplete files are returned unchanged."""
    if not content.startswith(_PNG):
        return content
    kept, start = [_PNG], len(_PNG)
    while start + 12 <= len(content):
        [length] = struct.unpack_from(">I", content, start)
        end = start + 12 + length
        if content[start + 4:start + 8] not in _TEXT_CHUNKS:
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def png_shape(content: bytes) -> tuple[int, int, int]:
    """Returns channels, height and width of a complete 8-bit PNG without decoding it.

    All checksums are compared, which detects truncated and damaged files in less than a tenth of
    the time that decoding takes.

    Raises:
        ValueError: the PNG is truncated or damaged, or has a palette or not 8 bits.
    """
    start, kinds, header = len(_PNG), set(), b""
    while b"IEND" not in kinds:
        if not content.startswith(_PNG) or len(content) < start + 12:
            raise ValueError("is not a PNG, or is truncated")
        [length] = struct.unpack_from(">I", content, start)
        kind, end = content[start + 4:start + 8], start + 8 + length
        if content[end:end + 4] != struct.pack(">I", zlib.crc32(
                memoryview(content)[start + 4:end])):
            raise ValueError("is damaged (a checksum does not match)")
        header = header or content[start + 8:end]
        kinds.add(kind)
        start = end + 4
    if b"IDAT" not in kinds or len(header) != _PNG_HEADER.size:
        raise ValueError("is damaged (it has no header or no pixels)")
    width, height, depth, color, *_ = _PNG_HEADER.unpack(header)
    if depth != 8 or color not in _PNG_CHANNELS:
        raise ValueError(f"has {depth} bits and colour type {color}")
    return _PNG_CHANNELS[color], height, width


def is_deep(image: PIL.Image.Image, content: bytes) -> bool:
    """Whether a picture's file has more than 8 bits per channel, some of which Pillow drops."""
    if image.mode in DEEP_MODES:
        return True
    if content.startswith(_PNG):
        return content[24:25] == b"\x10"  # the bit depth in the header, which comes first
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())  # of a TIFF
    return max(bits if isinstance(bits, tuple) else (bits,), default=0) > 8
