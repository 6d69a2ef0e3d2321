"""Reading batches of training data with one loader worker and a batch of 512, as in training.

Eight batches are timed after one epoch, when all caches are filled.
"""

import itertools
import json
import os
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_IMAGES, _SIDE, _BATCH, _BATCHES = 20000, 32, 512, 8


def write_dataset(path: Path, num: int, side: int) -> None:
    """Writes a ZIP of uncompressed PNGs of random pixels, like those of dataset_tool.py."""
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


# --------------------------------------------------------- cases, run inside a side's own process

class _Reader:
    def __init__(self, settings: dict[str, Any]):
        import torch.utils.data  # noqa: F401 - so that the import is not timed

        os.environ["PFGMPP_CACHE_DIR"] = settings["cache"]
        start = time.perf_counter()
        size, self._batches = self.open(settings["data"])
        next(self._batches)
        self._started = time.perf_counter() - start
        self._read(-(-size // _BATCH))

    def run(self) -> None:
        self._read(_BATCHES)

    def _read(self, num: int) -> None:
        for _ in itertools.islice(self._batches, num):
            pass

    def start(self) -> float:
        """Returns the time to the first batch in seconds."""
        return self._started


class OurReader(_Reader):
    """Reads the packed array, like training."""

    def open(self, path: str):
        from images.dataset import ImageFolderDataset, TrainingOrder
        from torch_utils.loading import read_in_threads

        dataset = ImageFolderDataset(path, cache=True)
        order = TrainingOrder(len(dataset), 0, _BATCH)
        return len(dataset), read_in_threads(dataset, order, workers=1)


class TheirReader(_Reader):
    """Reads the reference's data set with its cache enabled.

    PyTorch's sampler replaces the reference's, which fails on PyTorch 2.13.
    """

    def open(self, path: str):
        import torch

        from training.dataset import ImageFolderDataset

        dataset = ImageFolderDataset(path=path, cache=True)
        sampler = torch.utils.data.RandomSampler(dataset, num_samples=1 << 30)
        loader = torch.utils.data.DataLoader(dataset=dataset, sampler=sampler, batch_size=_BATCH,
                                             num_workers=1, prefetch_factor=2)
        return len(dataset), iter(loader)


def rows(options):
    """Returns our reader and, if available, those of an older commit and the reference."""
    import contextlib

    from benchmarks.sides import ROOT, Side
    from benchmarks.table import Row, with_ratios

    places = {"ours": (ROOT, "OurReader")}
    if options.commit:
        places[options.commit[0]] = options.commit[1], "OurReader"
    if options.reference:
        places["reference"] = options.reference, "TheirReader"
    what = f"reading {_SIDE}x{_SIDE}, batch {_BATCH}, 1 worker"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_dataset(Path(folder, "data.zip"), _IMAGES, _SIDE)
        sides, seconds = {}, {name: [] for name in places}
        for name, (root, case) in places.items():
            settings = {"data": f"{folder}/data.zip", "cache": f"{folder}/{name}"}
            sides[name] = stack.enter_context(
                Side(root, Path(__file__), case, settings, options.threads))
        for _ in range(3 * options.repeats):
            for name, side in sides.items():
                seconds[name].append(side.run())
        return with_ratios([
            Row(what, name, seconds[name], _BATCHES * _BATCH,
                note=f"first batch after {side.call('start'):.2g} s")
            for name, side in sides.items()], list(places)[-1])
