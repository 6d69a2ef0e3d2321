"""Colour profiles (ICC) of pictures: converts pixels to sRGB, which all other code assumes.

Colours are converted with the relative colorimetric intent and black point compensation, the
default of image editors: white stays white and black stays black. A profile that changes no colour
by more than two levels of 255 counts as one of the many variants of sRGB, and leaves pixels as they
are.
"""

import functools
import io
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

_SAME = 2  # levels by which variants of sRGB may differ
_STEPS = 17  # levels of each channel that are compared
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # colour spaces by Pillow's modes
_PLAIN = {"P": "RGB", "PA": "RGBA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB"}
_WITH_ALPHA = {"P": "RGBA", "L": "LA", "RGB": "RGBA"}  # result of a transparent colour, by mode


class ProfileError(ValueError):
    """A profile that can't be used. The message says why."""


def to_srgb(image: PIL.Image.Image, profile: bytes) -> PIL.Image.Image:
    """Returns a picture in sRGB; gray pictures stay gray, and sRGB pictures are returned as is.

    Args:
        image: a picture of any mode. Modes that profiles do not apply to are returned as is.
        profile: the content of its ICC profile.

    Raises:
        ProfileError: the profile is damaged, or does not fit the picture's mode.
    """
    mode = _WITH_ALPHA.get(image.mode) if "transparency" in image.info else None
    mode = mode or _PLAIN.get(image.mode, image.mode)
    if mode.rstrip("A") not in _SPACES:
        return image
    pixels = image if mode == image.mode else image.convert(mode)
    alpha = pixels.getchannel("A") if mode.endswith("A") else None
    color = pixels.convert(mode[:-1]) if alpha else pixels
    transform = _transform(profile, color.mode)
    if transform is None:
        return image
    converted = _apply(transform, color)
    if alpha:
        converted.putalpha(alpha)
    return converted


def _apply(transform: "ImageCmsTransform", color: PIL.Image.Image) -> PIL.Image.Image:
    """Returns L as L, and RGB and CMYK as RGB."""
    converted = transform.apply(color if color.mode == transform.input_mode
                                else color.convert(transform.input_mode))
    # In any profile, gray has equal red, green and blue.
    return converted.getchannel("G") if color.mode == "L" else converted


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> "ImageCmsTransform | None":
    """Returns the transform from this mode to RGB, with L as RGB, or None for an sRGB profile."""
    try:
        from PIL import ImageCms

        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = own.profile.xcolor_space.strip()
        # Gray pictures often have the profile of the colour pictures they were made from.
        mode_read = "RGB" if mode == "L" and space == "RGB" else mode
        if space != _SPACES[mode_read]:
            raise ProfileError(f"is for {space}, not for {_SPACES[mode]}")
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        if mode == "L":  # its short tables put dark values off by up to 9 levels
            flags |= ImageCms.Flags.NOOPTIMIZE
        transform = ImageCms.ImageCmsTransform(
            own, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), mode_read, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=flags)
    except ImportError as error:
        raise ProfileError("Pillow was built without LittleCMS, which reads profiles") from error
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"{error or 'damaged'}") from error
    return None if mode != "CMYK" and _is_identity(transform, mode) else transform


def _is_identity(transform: "ImageCmsTransform", mode: str) -> bool:
    """Whether colours of mode L or RGB change by at most two levels."""
    levels = np.linspace(0, 255, _STEPS).round().astype(np.uint8)
    if mode == "L":
        colors = np.arange(256, dtype=np.uint8)[None]
    else:
        colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    found = np.asarray(_apply(transform, PIL.Image.fromarray(colors)))
    return bool(np.abs(found.astype(int) - colors).max() <= _SAME)
