"""Output of 'fid.py nearest': text lines, a table and a picture of nearest training images.

    nearest.csv    one line per image: image, nearest, distance, second, second_distance
    nearest.png    each row has an image and its nearest training images; closest rows first

Distances are between features.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image

from dnnlib.atomic import atomic_write
from images.dataset import ImageFolderDataset
from images.grid import image_grid, reduced, save_png
from images.scaling import display_window
from metrics.nearest import TAIL, Nearness, Neighbours

TABLE, PICTURE = "nearest.csv", "nearest.png"
SHOWN = 5  # training images beside each image
_MIN_SIDE, _MAX_SIDE = 96, 256  # pixels; images in the picture are resized to this range
_MAX_CAPTION = 20  # characters of a name
_FEW = 100  # with fewer held-out images, the 5% quantile is unreliable


def write_nearest(folder: Path, images: ImageFolderDataset, data: ImageFolderDataset,
                  found: Neighbours, rows: int, window: tuple[float, float] | None) -> str:
    """Writes both files, and returns a text that names them.

    Args:
        folder: folder for the files, created if needed; existing files are replaced.
        images: the images that were examined.
        data: the training images.
        found: the nearest training images of each image.
        rows: the maximum number of rows of the picture.
        window: center and width of the values that are shown; by default the recorded scales.

    Raises:
        OSError: they can't be written.
        ValueError: an image can't be read.
    """
    shown = picture(images, data, found, rows, window)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / TABLE) as file:
        file.write(_table(images.all_names, data.all_names, found).encode(errors="surrogateescape"))
    save_png(folder / PICTURE, shown)
    return f"{folder / TABLE}, {PICTURE}"


def _table(names: Sequence[str], training_names: Sequence[str], found: Neighbours) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["image", "nearest", "distance", "second", "second_distance"])
    writer.writerows([name, training_names[first], d, training_names[second], e]
                     for name, (first, second), (d, e) in zip(
                         names, found.numbers[:, :2].tolist(), found.distances[:, :2].tolist(),
                         strict=True))
    return text.getvalue()


def picture(images: ImageFolderDataset, data: ImageFolderDataset, found: Neighbours, rows: int,
            window: tuple[float, float] | None = None) -> PIL.Image.Image:
    """Returns rows of an image and its nearest training images with their distances.

    The images are those with the smallest distances. Arguments and errors are as for
    `write_nearest`.
    """
    def shown(dataset: ImageFolderDataset, number: int) -> np.ndarray:
        scaling = display_window(*window) if window and not dataset.scaling.is_8bit else \
            dataset.scaling
        return reduced(scaling.to_picture(dataset.get_batch([number])[0][0]), _MAX_SIDE)

    chosen = np.argsort(found.distances[:, 0], kind="stable")[:rows].tolist()
    columns = min(SHOWN, found.numbers.shape[1])
    cells, captions = [], []
    for i in chosen:
        near, distances = found.numbers[i, :columns].tolist(), found.distances[i, :columns].tolist()
        cells.append([shown(images, i), *(shown(data, j) for j in near)])
        captions.append([_caption(images.all_names[i], i), *(f"{d:.4g}" for d in distances)])
    titles = ["image", "nearest", *(f"{number}." for number in range(2, columns + 1))]
    return image_grid(cells, split=1, titles=titles, min_side=_MIN_SIDE, captions=captions)


def _caption(name: str, number: int) -> str:
    """Returns the end of a name, or the number if the font may lack letters of the name."""
    stem = PurePosixPath(name).stem
    if not (stem.isascii() and stem.isprintable()):
        return str(number)
    return stem if len(stem) <= _MAX_CAPTION else f"...{stem[3 - _MAX_CAPTION:]}"


def summary_lines(found: Nearness) -> list[str]:
    """Returns a line about the images and, if there are held-out images, a line about those."""
    lines = [f"nearest: median distance {found.median:.5g} ({_images(found.num)}), "
             f"{found.copies} exact {'copy' if found.copies == 1 else 'copies'}, "
             f"{found.memorised:.2%} memorised (nearest under 1/3 of the second)"]
    if held := found.held_out:
        lines.append(f"held-out: median distance {held.median:.5g} ({_images(held.num)}); "
                     f"{held.nearer:.2%} of the images are nearer than {TAIL:.0%} of these, "
                     f"C_T {held.c_t:+.2f}")
    return lines


def _images(num: int) -> str:
    return f"{num} image{'' if num == 1 else 's'}"


def warnings(found: Nearness) -> list[str]:
    """Returns warnings about held-out images that make the comparison unreliable."""
    held, texts = found.held_out, []
    if held and held.copies:
        texts.append(f"{held.copies} of {_images(held.num)} of --held-out are copies of training "
                     "images, which makes their distances too small; remove them")
    if held and held.num < _FEW:
        texts.append(f"--held-out has {_images(held.num)}, so its 5% quantile is unreliable; give "
                     f"at least {_FEW}")
    return texts


def summary_records(found: Nearness) -> list[dict[str, Any]]:
    """Returns plain JSON data for each value: metric, value and what it was compared with."""
    held = found.held_out
    beside = {"held_out": held.median, "held_out_num": held.num} if held else {}
    records = [{"metric": "nearest_distance", "value": found.median, **beside},
               {"metric": "copies", "value": found.copies},
               {"metric": "memorised", "value": found.memorised}]
    if held:
        records += [{"metric": "nearer_than_held_out", "value": held.nearer, "quantile": TAIL},
                    {"metric": "c_t", "value": held.c_t}]
    return records
