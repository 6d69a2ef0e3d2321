"""Grids of images as PNG files, rows labelled, and as animations."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from dnnlib.atomic import atomic_write

_FRAME_MSEC, _LAST_FRAME_MSEC = 100, 2000
_GAP = 2  # pixels between images
_MAX_CLASSES = 16  # that get rows of their own
_MAX_LABEL = 16  # characters
_MIN_SIDE = 64  # small images are enlarged by a whole factor to at least this height


def image_grid(
    rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str] = (), split: int | None = None
) -> PIL.Image.Image:
    """Returns one picture of the rows, on white.

    Images are uint8 [C, H, W] of one shape, of which only the first channel is shown unless C is 3.
    Labels stand at the left of the rows. There is a wider gap before the column `split`.
    """
    first = next(image for row in rows for image in row)
    zoom = max(-(-_MIN_SIDE // first.shape[1]), 1)
    height, width = (side * zoom + _GAP for side in first.shape[1:])
    font_size = max(height // 4, 10)
    margin = max((len(label) for label in labels), default=0) * font_size * 2 // 3
    margin += font_size // 2 if margin else 0
    columns = max(len(row) for row in rows)
    extra = width // 2 if split is not None else 0
    size = margin + columns * width + extra + _GAP, len(rows) * height + _GAP
    canvas = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        if margin:
            draw.text((margin - font_size // 3, i * height + height // 2), labels[i],
                      fill="black", anchor="rm", font_size=font_size)
        for j, image in enumerate(row):
            x = margin + j * width + _GAP + (extra if split is not None and j >= split else 0)
            canvas.paste(_enlarged(image, zoom), (x, i * height + _GAP))
    return canvas


def _enlarged(image: np.ndarray, zoom: int) -> PIL.Image.Image:
    pixels = image.transpose(1, 2, 0).repeat(zoom, axis=0).repeat(zoom, axis=1)
    return PIL.Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])


def square_grid(images: np.ndarray, classes: Sequence[int] | None = None,
                names: Sequence[str] | None = None) -> PIL.Image.Image:
    """Returns one picture of uint8 images [B, C, H, W], about as square as even rows allow.

    With up to 16 `classes` among the images, each begins a row of its own, labelled by its name or
    number.
    """
    columns = _num_columns(len(images))
    found = sorted(set(classes or ()))
    groups = {"": range(len(images))}
    if 0 < len(found) <= _MAX_CLASSES:
        groups = {class_label(k, names): [i for i, own in enumerate(classes) if own == k]
                  for k in found}
    rows, labels = [], []
    for label, numbers in groups.items():
        for start in range(0, len(numbers), columns):
            rows.append([images[i] for i in numbers[start:start + columns]])
            labels.append("" if start else label)
    return image_grid(rows, labels)


def _num_columns(count: int) -> int:
    """Returns columns that make all rows full, if there are such of at most twice the rows."""
    root = math.ceil(math.sqrt(count))
    full = [columns for columns in range(root, 2 * root) if count % columns == 0]
    return full[0] if full and full[0] <= 2 * (count // full[0]) else root


def class_label(number: int, names: Sequence[str] | None) -> str:
    """Returns what a row of a class is labelled: its name, cut short, or its number.

    It is the number too where the font lacks letters of the name.
    """
    if not names or number >= len(names) or not (names[number].isascii()
                                                 and names[number].isprintable()):
        return str(number)
    name = names[number]
    return name if len(name) <= _MAX_LABEL else f"{name[:_MAX_LABEL - 3]}..."


def save_gif(path: str | Path, pictures: Sequence[PIL.Image.Image]) -> None:
    """Writes a looping animation atomically; the last picture stays longer.

    A GIF's frame has 256 colours; these reach the rare ones too, which Pillow's own choice loses.
    """
    pictures = [picture.quantize(256, PIL.Image.Quantize.MAXCOVERAGE) for picture in pictures]
    with atomic_write(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], loop=0,
                         duration=[_FRAME_MSEC] * (len(pictures) - 1) + [_LAST_FRAME_MSEC])


def save_png(path: str | Path, picture: PIL.Image.Image) -> None:
    """Writes a picture atomically."""
    with atomic_write(path) as file:
        picture.save(file, "PNG")
