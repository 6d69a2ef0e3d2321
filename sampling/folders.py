"""Names of folders of generated images, and of the images in them; needs no PyTorch.

    ckpt_000200                             images of the network after 200 thousand images
    ckpt_2_000200, ckpt_3_000200            of the second and third range of seeds
    ckpt_000200_alpha_0.1_steps_12_quant_6  of a point of a sweep, with the parts that are swept

The image of seed 3021 is 003021.png or .npy; with --subdirs it lies in a folder per thousand,
003000. Ranges of seeds are 0-49999, 50000-99999, and all beyond.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints.names import KIMG

CKPT_PREFIX = "ckpt_"
SWEPT = ("alpha", "steps", "quant")  # in the order of names
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_NAME = re.compile(
    rf"ckpt_(?:(?P<gen_seed>[23])_)?(?P<kimg>{KIMG})(?:_alpha_(?P<alpha>{_NUMBER}))?"
    r"(?:_steps_(?P<steps>\d+))?(?:_quant_(?P<quant>\d+))?")
_EXTENSIONS = (".png", ".npy")
_RANGE_ENDS = (49_999, 99_999)  # last seeds of the first two ranges


@dataclass(frozen=True)
class FolderName:
    """The parts of a folder's name; None for what is not swept."""

    kimg: str  # as in the name of the network
    gen_seed: int = 1  # range of seeds, 1 to 3
    alpha: str | None = None
    steps: str | None = None
    quant: str | None = None

    @classmethod
    def parse(cls, name: str) -> "FolderName | None":
        """Returns the parts of a name, None for one that is not of this form."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(match["kimg"], int(match["gen_seed"] or 1), *(match[part] for part in SWEPT))

    def __str__(self) -> str:
        seeds = f"{self.gen_seed}_" if self.gen_seed > 1 else ""
        return f"{CKPT_PREFIX}{seeds}{self.kimg}{suffix(self.alpha, self.steps, self.quant)}"

    @property
    def swept(self) -> frozenset[str]:
        """Which of `SWEPT` the folder is a point of."""
        return frozenset(part for part in SWEPT if getattr(self, part) is not None)

    @property
    def point(self) -> tuple[float, ...]:
        """What the seed ranges of one network and one setting share; for sorting."""
        return (float(self.kimg), *(float(getattr(self, part) or 0) for part in SWEPT))


def suffix(alpha: object = None, steps: object = None, quant: object = None) -> str:
    """Returns what the parts that are swept add to a folder's name."""
    parts = zip(SWEPT, (alpha, steps, quant), strict=True)
    return "".join(f"_{name}_{value}" for name, value in parts if value is not None)


def gen_seed_of(seeds: Iterable[int]) -> int:
    """Returns the range of seeds, 1 to 3, that the largest of these lies in."""
    return 1 + sum(max(seeds) > end for end in _RANGE_ENDS)


def is_zip(outdir: str | os.PathLike) -> bool:
    """Whether images are to go into one ZIP of this name instead of a folder."""
    return os.fspath(outdir).lower().endswith(".zip")


def image_name(seed: int, *, subdirs: bool, extension: str) -> str:
    """Returns the name of the image of a seed in its folder."""
    folder = f"{seed - seed % 1000:06d}/" if subdirs else ""
    return f"{folder}{seed:06d}{extension}"


def seed_of(name: str, records: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Returns the seed by which generate.py has named an image; None for any other image.

    Args:
        name: of the image in a data set, with its folders.
        records: what generate.json says, by folder: '' or ending in '/'. The one in the innermost
            folder that holds the image tells of it.
    """
    folders = [folder for folder in records if name.startswith(folder)]
    if not folders:
        return None
    folder = max(folders, key=len)
    subdirs, below = records[folder].get("subdirs"), name[len(folder):]
    if records[folder].get("names") == "inputs" or strays(
            [below], subdirs if isinstance(subdirs, bool) else None):
        return None
    return int(os.path.splitext(below.rpartition("/")[2])[0])


def strays(names: Iterable[str], subdirs: bool | None) -> list[str]:
    """Returns those of the names of images that generate.py would not have given.

    `subdirs` is what generate.json records of them; None where it does not.
    """
    found = []
    for name in names:
        stem, extension = os.path.splitext(name.rpartition("/")[2])
        kinds = (False, True) if subdirs is None else (subdirs,)
        is_own = stem.isdecimal() and extension in _EXTENSIONS and any(
            name == image_name(int(stem), subdirs=kind, extension=extension) for kind in kinds)
        if not is_own:
            found.append(name)
    return found
