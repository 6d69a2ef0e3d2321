"""Grids of images, with labelled rows, as PNG files, and animated GIFs."""

import collections
import functools
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from dnnlib.atomic import atomic_write

_FRAME_MSEC, _LAST_FRAME_MSEC = 100, 2000
_GAP = 2  # pixels between images
_MAX_CLASSES = 16  # with a row of their own
_MAX_LABEL = 16  # characters
_MIN_SIDE = 64  # pixels
_MAX_FONT = 32  # pixels
_LINE = 1.25  # height of a line of text divided by the size of the font
# Font files of common systems, for letters that Pillow's own font lacks, which has only ASCII.
_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")
_NO_LETTER = "\uffff"  # a character that no font has


def image_grid(
    rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str] = (), split: int | None = None,
    titles: Sequence[str] = (), min_side: int = _MIN_SIDE, captions: Sequence[Sequence[str]] = (),
    halves: Sequence[str] = (),
) -> PIL.Image.Image:
    """Returns one picture of the rows on a white background.

    Images are uint8 [C, H, W]. If C is not 3, only the first channel is shown. Smaller images are
    centered in cells of the size of the largest. Labels are placed to the left of the rows, and
    titles, which may have several lines, above the columns. `captions` are rows of texts below the
    images. The gap before the column `split` is wider, and `halves` are two texts above the columns
    on either side of it. Small images are enlarged by a whole factor to a height of at least
    `min_side`.
    """
    shapes = [image.shape[1:] for row in rows for image in row]
    highest = max(height for height, _ in shapes)
    zoom = max(-(-min_side // highest), 1)
    height, width = (max(sides) * zoom + _GAP for sides in zip(*shapes, strict=True))
    font_size = min(max(height // 4, 10), _MAX_FONT)
    fonts = [_font_for(label, font_size) or _font(None, font_size) for label in labels]
    margin = math.ceil(max(map(PIL.ImageFont.FreeTypeFont.getlength, fonts, labels), default=0))
    margin += font_size * 2 // 3 if margin else 0
    columns = max(len(row) for row in rows)
    extra = width // 2 if split is not None else 0
    title_size = _fitting_size(titles, width)
    caption_size = _fitting_size([text for row in captions for text in row], width)
    foot = round(caption_size * _LINE) if captions else 0
    height += foot
    heads = [(halves[0], 0, split), (halves[1], split, columns)] if halves else []
    head_size = min((_fitting_size([text], (end - start) * width) for text, start, end in heads),
                    default=0)
    title_lines = max((title.count("\n") + 1 for title in titles), default=0)
    top = round(head_size * _LINE) + round(title_lines * title_size * _LINE)
    size = margin + columns * width + extra + _GAP, top + len(rows) * height + _GAP
    canvas = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(canvas)

    def left(column: int) -> int:
        return margin + column * width + _GAP + (
            extra if split is not None and column >= split else 0)

    for text, start, end in heads:
        draw.text(((left(start) + left(end - 1) + width - _GAP) // 2, round(head_size * _LINE)),
                  text, fill="black", anchor="md", font_size=head_size)
    for j, title in enumerate(titles):
        draw.text((left(j) + (width - _GAP) // 2, top), title, fill="black", anchor="md",
                  align="center", font_size=title_size)
    for i, row in enumerate(rows):
        if margin:
            draw.text((margin - font_size // 3, top + i * height + (height - foot) // 2), labels[i],
                      fill="black", anchor="rm", font=fonts[i])
        for j, image in enumerate(row):
            shown = _enlarged(image, zoom)
            x, y = left(j), top + i * height + _GAP
            canvas.paste(shown, (x + (width - _GAP - shown.width) // 2,
                                 y + (height - _GAP - foot - shown.height) // 2))
            if captions:
                draw.text((x + (width - _GAP) // 2, top + (i + 1) * height), captions[i][j],
                          fill="black", anchor="md",
                          font=_font_for(captions[i][j], caption_size)
                          or _font(None, caption_size))
    return canvas


def _fitting_size(titles: Sequence[str], width: int) -> int:
    """Returns the font size, at least 8, at which titles fit into columns of a width."""
    sizes = range(_MAX_FONT // 2, 8, -1)
    longest = max((line for title in titles for line in title.split("\n")), key=len, default="")
    return next((size for size in sizes
                 if PIL.ImageFont.load_default(size).getlength(longest) <= width - _GAP), 8)


def reduced(image: np.ndarray, max_side: int) -> np.ndarray:
    """Returns a uint8 image [C, H, W], shrunk if needed so that no side exceeds `max_side`."""
    if max(image.shape[1:]) <= max_side:
        return image
    factor = max_side / max(image.shape[1:])
    size = tuple(max(round(side * factor), 1) for side in image.shape[:0:-1])
    return np.stack([np.asarray(PIL.Image.fromarray(channel).resize(
        size, PIL.Image.Resampling.LANCZOS)) for channel in image])


def _enlarged(image: np.ndarray, zoom: int) -> PIL.Image.Image:
    pixels = image.transpose(1, 2, 0).repeat(zoom, axis=0).repeat(zoom, axis=1)
    return PIL.Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])


def square_grid(images: np.ndarray, classes: Sequence[int] | None = None,
                names: Sequence[str] | None = None) -> PIL.Image.Image:
    """Returns a nearly square picture of uint8 images [B, C, H, W], with full rows if possible.

    If there are at most 16 `classes` with equally many images each, each class starts a new row,
    which is labelled with its name or number. Otherwise the images are sorted by class, and each
    has the label of its class below it.
    """
    if classes is None:
        return image_grid(_lines(images, _num_columns(len(images), len(images))))
    groups = [[i for i, own in enumerate(classes) if own == k] for k in sorted(set(classes))]
    labels = [class_label(classes[numbers[0]], names) for numbers in groups]
    if len(groups) <= _MAX_CLASSES and len(set(map(len, groups))) == 1:
        columns = _num_columns(len(groups[0]), len(images))
        lines = [_lines(numbers, columns) for numbers in groups]
        return image_grid([[images[i] for i in line] for group in lines for line in group],
                          [text for label, group in zip(labels, lines, strict=True)
                           for text in (label, *[""] * (len(group) - 1))])
    shown = [(images[i], label) for label, numbers in zip(labels, groups, strict=True)
             for i in numbers]
    lines = _lines(shown, _num_columns(len(images), len(images)))
    return image_grid([[image for image, _ in line] for line in lines],
                      captions=[[label for _, label in line] for line in lines])


def even_classes(classes: Sequence[int], most: int) -> list[int] | None:
    """Returns positions of equally many images of each class, at most `most` in total, in order.

    They are the first of their classes, in numbers that fill rows. Returns None if all images can
    be shown, if there are too many classes for rows of their own, or if this would show less than
    three quarters of `most`.
    """
    counts = collections.Counter(classes)
    if len(classes) <= most or len(counts) > _MAX_CLASSES:
        return None
    size = min(min(counts.values()), most // len(counts))
    size -= size % 4 if size > 8 else 0
    if 4 * size * len(counts) < 3 * most:
        return None
    seen: collections.Counter = collections.Counter()
    chosen = []
    for i, own in enumerate(classes):
        if seen[own] < size:
            seen[own] += 1
            chosen.append(i)
    return chosen


def _lines(values: Sequence, columns: int) -> list[Sequence]:
    return [values[start:start + columns] for start in range(0, len(values), columns)]


def _num_columns(size: int, count: int) -> int:
    """Returns the number of columns for groups of `size` images, of `count` images in total.

    Rows are full if some number of columns allows that and the picture stays about square.
    """
    root = math.ceil(math.sqrt(count))
    if size <= root:
        return size
    full = [columns for columns in range(root // 2 + 1, 2 * root)
            if size % columns == 0 and columns <= 3 * (count // columns)]
    return min(full, key=lambda columns: (abs(columns - root), -columns), default=root)


def class_label(number: int, names: Sequence[str] | None) -> str:
    """Returns the label for the row of a class: its name, shortened, or its number.

    The number is also used if no font has all letters of the name.
    """
    # The name of a folder may store accents separately from their letters.
    name = unicodedata.normalize("NFC", names[number]) if names and number < len(names) else ""
    if not name or _font_for(name, _MAX_FONT) is None:
        return str(number)
    return name if len(name) <= _MAX_LABEL else f"{name[:_MAX_LABEL - 3]}..."


def _font_for(text: str, size: int) -> PIL.ImageFont.FreeTypeFont | None:
    """Returns a font with all letters of a text, Pillow's own or the system's, or None.

    Texts that are not written from left to right would need more than single letters.
    """
    if not text.isprintable() or any(unicodedata.bidirectional(letter) in ("R", "AL")
                                     for letter in text):
        return None
    fonts = (_font(name, size) for name in (None, *_SYSTEM_FONTS))
    return next((font for font in fonts if font and _has_letters(font, text)), None)


@functools.cache
def _font(name: str | None, size: int) -> PIL.ImageFont.FreeTypeFont | None:
    """Returns a font of the system, or Pillow's own; None if it does not exist."""
    if name is None:
        return PIL.ImageFont.load_default(size)
    try:
        return PIL.ImageFont.truetype(name, size)
    except OSError:
        return None


def _has_letters(font: PIL.ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font has glyphs for all letters of a text, not just the one for missing letters."""
    def shape(letter):
        mask = font.getmask(letter)
        return mask.size, bytes(mask)

    missing = shape(_NO_LETTER)
    return all(shape(letter) != missing for letter in set(text))


def save_gif(path: str | Path, pictures: Sequence[PIL.Image.Image]) -> None:
    """Writes a looping animation atomically. The last picture is shown longer.

    A GIF frame has 256 colours. This choice keeps rare colours, which Pillow's own choice loses.
    """
    pictures = [picture.quantize(256, PIL.Image.Quantize.MAXCOVERAGE) for picture in pictures]
    with atomic_write(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], loop=0,
                         duration=[_FRAME_MSEC] * (len(pictures) - 1) + [_LAST_FRAME_MSEC])


def save_png(path: str | Path, picture: PIL.Image.Image) -> None:
    """Writes a picture atomically."""
    with atomic_write(path) as file:
        picture.save(file, "PNG")
