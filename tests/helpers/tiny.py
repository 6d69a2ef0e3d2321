"""A tiny data set, network and run, shared by the tests."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image

# The smallest network with every part: two levels, attention, augmentation, dropout.
TINY_NETWORK = ["--cbase=8", "--cres=1,2", "--nblock=1", "--arch=ncsnpp"]
TINY_RUN = [*TINY_NETWORK, "--batch=8", "--lr=1e-2", "--lr-rampup=0.00001", "--ema=0.00001",
            "--workers=0", "--seed=3", "--samples=0"]


def write_dataset(path: Path, num: int = 40, side: int = 8, classes: int = 2, channels: int = 3,
                  vectors: bool = False):
    """Writes a ZIP of noisy images whose brightness tells the class; None labels if classes=0."""
    rng = np.random.default_rng(0)
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(num):
            k = i % max(classes, 1)
            pixels = rng.integers(0, 120, [side, side, channels]) + 120 * k
            buffer = io.BytesIO()
            PIL.Image.fromarray(pixels.astype(np.uint8).squeeze()).save(buffer, "PNG")
            name = f"00000/img{i:08d}.png"
            archive.writestr(name, buffer.getvalue())
            labels.append([name, [0.0, float(k), -1.5] if vectors else k])
        archive.writestr("dataset.json", json.dumps({"labels": labels if classes else None}))
    return path
