"""Conversion of JPEGs to a data set of 64x64, with one process and with all, and by EDM's tool.

    python -m benchmarks.conversion [--images 1000] [--against DIR]

DIR is a checkout of https://github.com/NVlabs/edm. Prints the median of interleaved runs, start-up
of Python included, and the ratio to the first line's. The data sets must be equal, name by name,
pixel by pixel and label by label, or the benchmark fails.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import click
import numpy as np
import PIL.Image

from torch_utils.ordered_pool import num_cores

ROOT = Path(__file__).resolve().parent.parent
SIDE = 256


def write_jpegs(folder: Path, num: int) -> None:
    """Writes images that compress as photographs do: smooth shapes with a little noise."""
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


def commands_to_time(against: str | None) -> dict[str, list[str]]:
    """Returns the tools by name; EDM's is first where there is one."""
    own = [sys.executable, str(ROOT / "dataset_tool.py")]
    commands = {"ours, 1 worker": [*own, "--workers=1"]}
    if num_cores() > 1:
        commands[f"ours, {num_cores()} workers"] = own
    if against:
        theirs = [sys.executable, os.path.join(against, "dataset_tool.py")]
        commands = {"EDM": theirs, **commands}
    return commands


@click.command()
@click.option("--images", type=click.IntRange(min=1), default=1000)
@click.option("--against", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--repeats", type=click.IntRange(min=1), default=5)
def main(images: int, against: str | None, repeats: int) -> None:
    """Times the conversion of JPEGs 256x256 to 64x64."""
    commands = commands_to_time(against)
    seconds = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp, "jpegs")
        source.mkdir()
        write_jpegs(source, images)
        dests = [Path(tmp, f"{i}.zip") for i in range(len(commands))]
        for _ in range(repeats):
            for dest, (name, command) in zip(dests, commands.items(), strict=True):
                start = time.perf_counter()
                subprocess.run([*command, f"--source={source}", f"--dest={dest}",
                                "--resolution=64x64"], check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - start)
        for dest in dests[1:]:
            require_equal(dests[0], dest)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    baseline = next(iter(medians.values()))
    print(f"{images} JPEGs {SIDE}x{SIDE} to 64x64; the pixels and labels are equal")
    for name, median in medians.items():
        print(f"{name:16s} {median:7.2f} s {images / median:7.0f} images/s "
              f"{baseline / median:6.2f} x")


if __name__ == "__main__":
    main()
