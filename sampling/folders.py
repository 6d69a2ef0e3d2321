"""Names of folders of generated images, and of the images in them. Needs no PyTorch.

    ckpt_000200                             images of the network after 200 thousand images
    ckpt_2_000200, ckpt_3_000200            those of the second and third range of seeds
    ckpt_000200_alpha_0.1_steps_12_quant_6  those of a sweep point, named by the swept parameters

The image of seed 3021 is 003021.png or 003021.npy. With --subdirs it lies in a folder per thousand
seeds, 003000. The ranges of seeds are 0-49999, 50000-99999, and everything above.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints.names import KIMG

CKPT_PREFIX = "ckpt_"
SWEPT = ("alpha", "steps", "quant")  # in the order in which names list them
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_NAME = re.compile(
    rf"ckpt_(?:(?P<gen_seed>[23])_)?(?P<kimg>{KIMG})(?:_alpha_(?P<alpha>{_NUMBER}))?"
    r"(?:_steps_(?P<steps>\d+))?(?:_quant_(?P<quant>\d+))?")
_EXTENSIONS = (".png", ".npy")
_RANGE_ENDS = (49_999, 99_999)  # the last seeds of the first two ranges


@dataclass(frozen=True)
class FolderName:
    """The parts of a folder's name. Parameters that are not swept are None."""

    kimg: str  # as in the name of the network's file
    gen_seed: int = 1  # range of seeds, 1 to 3
    alpha: str | None = None
    steps: str | None = None
    quant: str | None = None

    @classmethod
    def parse(cls, name: str) -> "FolderName | None":
        """Returns the parts of a name, or None if it does not have this form."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(match["kimg"], int(match["gen_seed"] or 1), *(match[part] for part in SWEPT))

    def __str__(self) -> str:
        seeds = f"{self.gen_seed}_" if self.gen_seed > 1 else ""
        return f"{CKPT_PREFIX}{seeds}{self.kimg}{suffix(self.alpha, self.steps, self.quant)}"

    @property
    def swept(self) -> frozenset[str]:
        """The members of `SWEPT` that the name gives a value for."""
        return frozenset(part for part in SWEPT if getattr(self, part) is not None)

    @property
    def point(self) -> tuple[float, ...]:
        """A sort key that is the same for all seed ranges of one network and one setting."""
        return (float(self.kimg), *(float(getattr(self, part) or 0) for part in SWEPT))


def suffix(alpha: object = None, steps: object = None, quant: object = None) -> str:
    """Returns the suffix that the swept parameters add to a folder's name."""
    parts = zip(SWEPT, (alpha, steps, quant), strict=True)
    return "".join(f"_{name}_{value}" for name, value in parts if value is not None)


def gen_seed_of(seeds: Iterable[int]) -> int:
    """Returns the range, 1 to 3, that contains the largest of these seeds."""
    return 1 + sum(max(seeds) > end for end in _RANGE_ENDS)


def is_zip(outdir: str | os.PathLike) -> bool:
    """Whether images go into one ZIP of this name instead of a folder."""
    return os.fspath(outdir).lower().endswith(".zip")


def image_name(seed: int, *, subdirs: bool, extension: str) -> str:
    """Returns the name of a seed's image, relative to its folder."""
    folder = f"{seed - seed % 1000:06d}/" if subdirs else ""
    return f"{folder}{seed:06d}{extension}"


def seed_of(name: str, records: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Returns the seed by which generate.py named an image, or None for any other image.

    Args:
        name: name of the image in a data set, including its folders.
        records: the content of each generate.json, by folder ('' or ending in '/'). The record of
            the innermost folder that contains the image applies.
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
    """Returns the image names that generate.py would not have given.

    `subdirs` is the value that generate.json records, or None if it records none.
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
