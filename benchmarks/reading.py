"""Reading batches of training data: images a second.

    python -m benchmarks.reading [--images 20000] [--side 32] [--against DIR]

DIR is a checkout of https://github.com/NVlabs/edm. Each side runs in a process of its own, with one
loader worker and a batch of 512, as both train by default: first the start (ours with packing, and
without), then the median rate over batches after an epoch, when whatever is kept is there.
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

ROOT = Path(__file__).resolve().parent.parent
BATCH = 512


def write_dataset(path: Path, num: int, side: int) -> None:
    """Writes a ZIP of stored PNGs as dataset_tool.py makes them."""
    import io

    import PIL.Image

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(num):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, [side, side, 3], dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
            archive.writestr(f"{i // 1000:05d}/img{i:08d}.png", buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": None}))


def open_ours(path: str):
    """Returns an endless iterator of batches, as training reads them."""
    from torch_utils.loading import read_in_threads
    from training.dataset import ImageFolderDataset, TrainingOrder

    dataset = ImageFolderDataset(path, cache=True)
    return len(dataset), read_in_threads(dataset, TrainingOrder(len(dataset), 0, BATCH), workers=1)


def open_theirs(path: str):
    """Returns the same of a checkout of EDM, the working directory.

    PyTorch's sampler takes the place of EDM's, which fails on PyTorch 2.13.
    """
    import torch

    from training.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(path=path, cache=True)
    sampler = torch.utils.data.RandomSampler(dataset, num_samples=1 << 30)
    loader = torch.utils.data.DataLoader(dataset=dataset, sampler=sampler, batch_size=BATCH,
                                         num_workers=1, prefetch_factor=2)
    return len(dataset), iter(loader)


def measure(open_side, path: str, repeats: int) -> None:
    """Prints the figures of one side as JSON."""
    import torch.utils.data  # noqa: F401 - not part of what is measured

    start = time.perf_counter()
    size, batches = open_side(path)
    next(batches)
    started = time.perf_counter()
    for _ in range(-(-size // BATCH)):
        next(batches)
    rates = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(8):
            next(batches)
        rates.append(8 * BATCH / (time.perf_counter() - begin))
    print(json.dumps({"start": started - start, "rate": statistics.median(rates)}))
    sys.stdout.flush()
    os._exit(0)  # whatever a checkout does at its end is not measured


def run_side(name: str, path: Path, cwd: Path, cache: Path, repeats: int) -> dict:
    """Returns what a fresh process measures."""
    code = (f"import importlib.util, sys; sys.path.insert(0, {str(cwd)!r}); "
            f"spec = importlib.util.spec_from_file_location('reading', {__file__!r}); "
            "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
            f"module.measure(module.{name}, {str(path)!r}, {repeats})")
    env = {**os.environ, "PFGMPP_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, text=True, check=True,
                          stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


@click.command()
@click.option("--images", type=click.IntRange(min=1), default=20000)
@click.option("--side", type=click.IntRange(min=1), default=32)
@click.option("--against", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--repeats", type=click.IntRange(min=1), default=9)
def main(images: int, side: int, against: str | None, repeats: int) -> None:
    """Measures ours, and the reader of a checkout of EDM if one is named."""
    with tempfile.TemporaryDirectory() as tmp:
        path, cache = Path(tmp, "data.zip"), Path(tmp, "cache")
        write_dataset(path, images, side)
        found = {"ours, packing": run_side("open_ours", path, ROOT, cache, repeats),
                 "ours, packed": run_side("open_ours", path, ROOT, cache, repeats)}
        if against:
            found["EDM"] = run_side("open_theirs", path, Path(against).resolve(), cache, repeats)
    print(f"{images} images {side}x{side}, batch {BATCH}, 1 worker")
    for name, figures in found.items():
        print(f"{name:14s} first batch after {figures['start']:6.2f} s {figures['rate']:9.0f} "
              "images/s")
    if against:
        print(f"ratio {found['ours, packed']['rate'] / found['EDM']['rate']:.1f}")


if __name__ == "__main__":
    main()
