"""Conversion of JPEGs to a 64x64 data set, including the start-up of Python.

The data sets of all sides must have equal names, pixels and labels.
"""

import functools
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image

from benchmarks.table import Options, Row, in_turn, with_ratios
from dnnlib.ordered_pool import num_cores

ROOT = Path(__file__).resolve().parent.parent
SIDE = 256
_IMAGES = 1000


def write_jpegs(folder: Path, num: int) -> None:
    """Writes images that compress like photographs: smooth shapes with a little noise."""
    rng = np.random.default_rng(0)
    for i in range(num):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, [16, 16, 3], dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC))
        pixels = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        path = folder / f"class{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).save(path, quality=90)


def read_dataset(path: Path) -> tuple[dict[str, np.ndarray], object]:
    """Returns the pixels by name, and the labels."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")]
        return {name: np.asarray(PIL.Image.open(archive.open(name))) for name in names}, \
            json.loads(archive.read("dataset.json"))


def require_equal(first: Path, second: Path) -> None:
    """Raises AssertionError unless both hold the same images under the same names and labels."""
    (images, labels), (other_images, other_labels) = read_dataset(first), read_dataset(second)
    assert labels == other_labels and images.keys() == other_images.keys(), second
    for name, pixels in images.items():
        assert np.array_equal(pixels, other_images[name]), f"{second}: {name}"


def _commands(options: Options) -> dict[str, list[str]]:
    """Returns the tools by name, the baseline last."""
    own = [sys.executable, str(ROOT / "dataset_tool.py")]
    commands = {"ours, 1 worker": [*own, "--workers=1"]}
    if num_cores() > 1:
        commands[f"ours, {num_cores()} workers"] = own
    if options.commit:
        name, root = options.commit
        commands[name] = [sys.executable, str(root / "dataset_tool.py")]
    if options.reference:
        commands["reference"] = [sys.executable, str(options.reference / "dataset_tool.py")]
    return commands


def rows(options: Options) -> list[Row]:
    """Returns the conversion with one process, with all processes, and by the other sides.

    Raises:
        AssertionError: the data sets differ in a name, a pixel or a label.
    """
    commands = _commands(options)
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp, "jpegs")
        source.mkdir()
        write_jpegs(source, _IMAGES)
        dests = {name: Path(tmp, f"{i}.zip") for i, name in enumerate(commands)}
        ways = {name: functools.partial(
            subprocess.run, [*command, f"--source={source}", f"--dest={dests[name]}",
                             "--resolution=64x64"], check=True, capture_output=True)
            for name, command in commands.items()}
        seconds = in_turn(ways, options.repeats)
        first, *others = dests.values()
        for dest in others:
            require_equal(first, dest)
    what = f"conversion, JPEG {SIDE}x{SIDE} to 64x64"
    return with_ratios([Row(what, name, seconds[name], _IMAGES) for name in commands],
                       list(commands)[-1])
