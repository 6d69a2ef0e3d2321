"""Features of images in a file, so that other metrics can be computed without new images.

An .npz holds `features` [n, d] float32 in the order of the images, the name of the `detector`,
and `facts` as JSON: what records say about the images, their shape and scale, and the hash of the
detector's weights. Nothing is unpickled, and sizes are checked before memory is allocated.
"""

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.atomic import atomic_write
from dnnlib.util import json_value
from metrics.detectors import Detector
from metrics.metrics import FeatureSet
from metrics.npz_arrays import read_npz_array
from torch_utils import distributed as dist

_MAX_IMAGES = 10_000_000
_MAX_TEXT_BYTES = 1 << 24
_ARRAYS = {"features": "f", "detector": "U", "facts": "U"}
_OF_FILE = ("image_shape", "scale", "detector_sha256")  # facts that records don't have


@dataclasses.dataclass(frozen=True)
class KeptFeatures:
    """The features of a set of images, with all that is needed to score it."""

    features: torch.Tensor  # [n, d] float32
    detector: str  # name of the detector that computed them
    facts: dict[str, Any]  # what records say about the images, as plain JSON data
    image_shape: tuple[int, int, int]  # channels, height, width
    scale: dict[str, Any] | None = None  # scale of the images; None if they are 8-bit
    detector_sha256: str | None = None  # of the detector's weights

    def __len__(self) -> int:
        return len(self.features)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the .npz, and creates its folder if needed.

        Raises:
            OSError: it can't be written; an existing file is then left unchanged.
        """
        facts = {"image_shape": list(self.image_shape), "scale": self.scale,
                 "detector_sha256": self.detector_sha256, "facts": self.facts}
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                np.savez(file, features=self.features.numpy(), detector=np.array(self.detector),
                         facts=np.array(json.dumps(json_value(facts))))
        except OSError as error:
            raise OSError(f"--features={path}: can't be written ({error.strerror or error}), but "
                          "the score is recorded; give another path and run again") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> "KeptFeatures":
        """Reads a file that `save` wrote.

        Raises:
            OSError: it can't be read.
            ValueError: it is not such a file.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise ValueError("compressed")
                features, detector, facts = (
                    read_npz_array(archive, name, kind, _MAX_IMAGES, _MAX_TEXT_BYTES)
                    for name, kind in _ARRAYS.items())
            if features.ndim != 2 or min(features.shape) < 1 or not np.isfinite(features).all():
                raise ValueError(f"features has shape {list(features.shape)}, or values that are "
                                 "not finite")
            known = json.loads(str(facts))
            shape, scale, digest = (known[name] for name in _OF_FILE)
            if not isinstance(known["facts"], dict) or len(shape) != 3:
                raise ValueError("facts does not describe images")
        # The last two are raised by an unknown compression method and an encrypted member.
        except (ValueError, TypeError, KeyError, EOFError, RecursionError, zipfile.BadZipFile,
                zlib.error, NotImplementedError, RuntimeError) as error:
            reason = str(error).strip("'\"").split("\n")[0] or type(error).__name__
            raise ValueError(f"{path}: not a features file of --features: {reason}") from error
        return cls(torch.from_numpy(features.astype(np.float32)), str(detector), known["facts"],
                   tuple(map(int, shape)), scale, digest)

    def check_made_by(self, detector: Detector, path: str | os.PathLike) -> None:
        """Raises ValueError if another detector computed the features in the file `path`."""
        self.check_name(detector.name, path)
        if self.detector_sha256 != detector.weights_sha256:
            raise ValueError(f"{path}: features of detector {detector.name} with other weights; "
                             "give the weights that computed them")

    def check_name(self, detector: str, path: str | os.PathLike) -> None:
        """Raises ValueError if a detector of another name computed the features."""
        if self.detector != detector:
            raise ValueError(f"{path}: features of detector {self.detector}; give "
                             f"--detector={self.detector} instead of {detector}")


def find_feature_files(path: str | os.PathLike) -> list[str]:
    """Returns the files of features that a path names.

    These are the path itself, or the files of a folder that holds nothing else. For any other path
    there are none.
    """
    if not os.path.isdir(path):
        return [str(path)] if _is_feature_file(path) else []
    with os.scandir(path) as entries:
        files = sorted(entry.path for entry in entries)
    return files if files and all(map(_is_feature_file, files)) else []


def _is_feature_file(path: str | os.PathLike) -> bool:
    if not str(path).endswith(".npz"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {"features.npy", "facts.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load_on_rank0(path: str | os.PathLike) -> tuple[KeptFeatures, int]:
    """Returns the content of a file and the number of images; only rank 0 has their features.

    Raises:
        OSError: it can't be read.
        ValueError: it is not a file of features.
    """
    own: list[KeptFeatures] = []

    def load() -> tuple[KeptFeatures, int]:
        own.append(KeptFeatures.load(path))
        return dataclasses.replace(own[0], features=own[0].features[:0]), len(own[0])

    without, count = dist.run_on_rank0(load)
    return (own[0] if own else without), count


def of_features(kept: KeptFeatures, count: int, detector: Detector, metrics: Iterable[str], *,
                keeps_features: bool = False, asked: Sequence[int] | None = None) -> FeatureSet:
    """Returns what `metrics` need of `count` images; `kept` has the features on this rank.

    For `asked` see `FeatureSet`. Under torchrun every rank calls it.
    """
    found = FeatureSet(count, detector, metrics, keeps_features=keeps_features, asked=asked)
    found.append_features(kept.features.to(detector.device), range(len(kept)))
    found.finish()
    return found
