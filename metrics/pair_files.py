"""Output of 'fid.py pairs': a table, JSON lines and a picture of some pairs.

    pairs.csv      one line per image: image, truth, its scores, those of its input, low, high
    pairs.jsonl    the same: {"image": ..., "truth": ..., "psnr": ..., "input": {...}, "range": ...}
    pairs.png      rows of input, output, truth, and output - truth

(low, high) is the range that scores are relative to.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image

from dnnlib.atomic import atomic_write
from dnnlib.util import json_value
from images.grid import image_grid, reduced, save_png
from images.scaling import display_window
from metrics.pairs import Pairs, PairScore, Summary

TABLE, LINES, PICTURE = "pairs.csv", "pairs.jsonl", "pairs.png"
_ROWS = 6  # maximum number of rows of the picture
_MIN_SIDE, _MAX_SIDE = 160, 512  # pixels; images in the picture are resized to this range
_MAX_LABEL = 16  # characters
_SHOWN_SHARE = 0.995  # share of the differences in the picture that are within its scale
_DIGITS = {"psnr": 2, "ssim": 4, "ssim_uniform": 4}  # after the decimal point


def write_scores(folder: Path, pairs: Pairs, scores: Sequence[PairScore],
                 value_range: tuple[float, float], window: tuple[float, float]) -> str:
    """Writes all three files, and returns a text that describes them.

    Args:
        folder: folder for the files, created if needed; existing files are replaced.
        pairs: the pairs that were scored.
        scores: the scores that `pairs.score` returned.
        value_range: the range that `pairs.score` was given.
        window: see `picture`.

    Raises:
        OSError: they can't be written.
        ValueError: an image can't be read.
    """
    shown, scale = picture(pairs, window)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / TABLE) as file:
        file.write(_table(scores, value_range).encode(errors="surrogateescape"))
    with atomic_write(folder / LINES) as file:
        file.writelines(_line(score, value_range) for score in scores)
    save_png(folder / PICTURE, shown)
    low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    return (f"{folder / TABLE}, {LINES}, {PICTURE} (of values {low:.6g} to {high:.6g}, differences "
            f"up to {scale:g})")


def _table(scores: Sequence[PairScore], value_range: tuple[float, float]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    of_input = scores[0].of_input or {}
    writer.writerow(["image", "truth", *scores[0].values, *(f"input_{name}" for name in of_input),
                     "low", "high"])
    writer.writerows([score.name, score.truth, *score.values.values(),
                      *(score.of_input or {}).values(), *value_range] for score in scores)
    return text.getvalue()


def _line(score: PairScore, value_range: tuple[float, float]) -> bytes:
    of_input = {} if score.of_input is None else {"input": score.of_input}
    line = {"image": score.name, "truth": score.truth, **score.values, **of_input,
            "range": list(value_range)}
    return (json.dumps(json_value(line)) + "\n").encode()


def summary_lines(scores: Sequence[PairScore]) -> list[str]:
    """Returns a line per metric, such as 'psnr 43.42 +- 0.31 (16 images)', then the inputs' lines.

    The number after +- is the sample standard deviation over the images.
    """
    lines = [f"{name} {_shown(name, summary)}" for name, summary in _summaries(scores).items()]
    return lines + [f"input {name} {_shown(name, summary)}"
                    for name, summary in _summaries(scores, of_input=True).items()]


def summary_records(scores: Sequence[PairScore]) -> list[dict[str, Any]]:
    """Returns plain JSON data for each metric: metric, value, std and other known facts."""
    of_input = _summaries(scores, of_input=True)
    records = []
    for name, own in _summaries(scores).items():
        record = {"metric": name, "value": own.mean, "std": own.std}
        if own.num_infinite:
            record["num_infinite"] = own.num_infinite
        if name in of_input:
            record |= {"input": of_input[name].mean, "input_std": of_input[name].std}
        records.append(json_value(record))
    return records


def _summaries(scores: Sequence[PairScore], *, of_input: bool = False) -> dict[str, Summary]:
    values = [score.of_input if of_input else score.values for score in scores]
    return {name: Summary.of([value[name] for value in values]) for name in values[0] or ()}


def _shown(name: str, summary: Summary) -> str:
    digits = _DIGITS.get(name)
    mean, std = (f"{value or 0:{form}}" for value, form in zip(summary[:2], (
        (f".{digits}f",) * 2 if digits else (".4g", ".2g")), strict=True))
    count = summary.num_finite or summary.num_infinite
    left_out = "" if count == summary.num_finite + summary.num_infinite else \
        f"; {summary.num_infinite} that equal their truth left out"
    return (f"{mean}{'' if summary.std is None else f' +- {std}'} "
            f"({count} image{'' if count == 1 else 's'}{left_out})")


def picture(pairs: Pairs, window: tuple[float, float]) -> tuple[PIL.Image.Image, float]:
    """Returns a picture of evenly spaced pairs, and the difference that is black or white in it.

    Args:
        pairs: images, truths and perhaps inputs.
        window: center and width of the values that are shown, in the data's units. Differences are
            shown on a separate scale, which has gray at 0 and includes nearly all of them.

    Raises:
        ValueError: an image can't be read.
    """
    count = min(len(pairs), _ROWS)
    numbers = [i * (len(pairs) - 1) // max(count - 1, 1) for i in range(count)]
    read = [pairs.read(number) for number in numbers]
    differences = [image - truth for image, truth, *_ in read]
    scale = _rounded_up(float(np.quantile(np.abs(np.concatenate(
        [difference.ravel() for difference in differences])), _SHOWN_SHARE))) or window[1] / 100
    values, about_zero = display_window(*window), display_window(0, 2 * scale)
    rows = [[*(reduced(values.to_picture(item), _MAX_SIDE) for item in (*inputs, image, truth)),
             reduced(about_zero.to_picture(difference), _MAX_SIDE)]
            for (image, truth, *inputs), difference in zip(read, differences, strict=True)]
    titles = ["input"] * pairs.has_input + ["output", "truth", f"difference\n+-{scale:g}"]
    labels = [_label(pairs.images.all_names[number], number) for number in numbers]
    return image_grid(rows, labels, titles=titles, min_side=_MIN_SIDE), scale


def _rounded_up(value: float) -> float:
    """Returns the value rounded up to 1, 2 or 5 times a power of ten; 0 for 0."""
    if not value:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= value * (1 - 1e-12))


def _label(name: str, number: int) -> str:
    """Returns the end of a name, or the number if the font may lack letters of the name."""
    stem = PurePosixPath(name).stem
    if not (stem.isascii() and stem.isprintable()):
        return str(number)
    return stem if len(stem) <= _MAX_LABEL else f"...{stem[3 - _MAX_LABEL:]}"
