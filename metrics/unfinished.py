"""What a killed command goes on from: the sums of a range of images that is not finished.

A file `fid-unfinished-KEY.npz` beside the scores holds what was kept of the first images of the
range, and is removed when the range is scored. KEY stands for the images and the detector. Under
torchrun every function is called on all ranks; the file is rank 0's.
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.atomic import atomic_write
from metrics.metrics import FeatureSet
from torch_utils import distributed as dist

SAVE_SEC = 120.0  # between two times that sums are written
_DONE = "done"  # how many images the sums are of


class UnfinishedSums:
    """The sums of one range of images.

    Args:
        folder: where the file goes; None keeps nothing.
        key: what decides the features, as plain JSON data.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any]):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._path = None if folder is None else folder / f"fid-unfinished-{digest[:16]}.npz"

    @property
    def is_kept(self) -> bool:
        """Whether there is a place for them."""
        return self._path is not None

    def restored(self, make: Callable[[], FeatureSet]) -> tuple[FeatureSet, int]:
        """Returns what the file holds, and of how many images it is.

        Without a file, or with one that is damaged, these are what `make` returns, and 0. `make`
        returns a set of no images, in which the number of features is fixed.
        """
        features = make()
        is_there = self._path is not None and dist.get_rank() == 0 and self._path.exists()
        done = 0
        if is_there:
            try:
                done = self._restore(features)
            except (OSError, ValueError, TypeError, KeyError, EOFError,
                    zipfile.BadZipFile) as error:
                dist.warn0(f"{self._path}: can't be read ({error}), so this range begins anew")
                features = make()  # some of it may be there already
        return features, dist.broadcast_object(done)

    def _restore(self, features: FeatureSet) -> int:
        with np.load(self._path, allow_pickle=False) as file:
            arrays = dict(file)
        done = int(arrays[_DONE])
        if not 0 < done <= features.count:
            raise ValueError(f"of {done} images")
        missing = [name for name in features.sums if not any(
            key.startswith(f"{name}.") for key in arrays)]
        if missing:
            raise ValueError("of other metrics")
        for name, sums in features.sums.items():
            sums.restore({key.removeprefix(f"{name}."): array for key, array in arrays.items()
                          if key.startswith(f"{name}.")})
            if sums.count != done:
                raise ValueError(f"of {done} and of {sums.count} images")
        return done

    def save(self, features: FeatureSet, done: int) -> None:
        """Writes the sums of the first `done` images, which rank 0 has from then on."""
        for sums in features.sums.values():
            sums.merge_to_rank0()
        dist.run_on_rank0(self._save, features, done)

    def _save(self, features: FeatureSet, done: int) -> None:
        arrays = {f"{name}.{key}": array for name, sums in features.sums.items()
                  for key, array in sums.arrays().items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path) as file:
                np.savez(file, **{_DONE: np.array(done)}, **arrays)
        except OSError as error:
            dist.warn0(f"{self._path} can't be written ({error}): if this command is stopped, the "
                       "range begins anew")

    def remove(self) -> None:
        """Removes the file, if there is one."""
        if self._path is not None and dist.get_rank() == 0:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
