"""Saved sums of an unfinished range of images, from which a killed command resumes.

A file `fid-unfinished-KEY.npz` beside the scores holds the sums over the first images of the range.
It is removed when the range is scored. KEY identifies the images and the detector. Under torchrun
every function is called on all ranks, and rank 0 has the file.
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

SAVE_SEC = 120.0  # time between two saves
_DONE = "done"  # the number of images in the sums


class UnfinishedSums:
    """The sums of one range of images.

    Args:
        folder: folder for the file; None saves nothing.
        key: what determines the features, as plain JSON data.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any]):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._path = None if folder is None else folder / f"fid-unfinished-{digest[:16]}.npz"

    @property
    def is_kept(self) -> bool:
        """Whether the sums are saved to a file."""
        return self._path is not None

    def restored(self, make: Callable[[], FeatureSet]) -> tuple[FeatureSet, int]:
        """Returns the saved sums and their number of images.

        If there is no file, or it is damaged, these are the result of `make` and 0. `make` returns
        a set of no images in which the number of features is fixed.
        """
        features = make()
        is_there = self._path is not None and dist.get_rank() == 0 and self._path.exists()
        done = 0
        if is_there:
            try:
                done = self._restore(features)
            except (OSError, ValueError, TypeError, KeyError, EOFError,
                    zipfile.BadZipFile) as error:
                dist.warn0(f"{self._path}: can't be read ({error}), so this range starts over")
                features = make()  # the first one may be partly restored
        return features, dist.broadcast_object(done)

    def _restore(self, features: FeatureSet) -> int:
        with np.load(self._path, allow_pickle=False) as file:
            arrays = dict(file)
        done = int(arrays[_DONE])
        if not 0 < done <= features.count:
            raise ValueError(f"it has {done} images")
        missing = [name for name in features.sums if not any(
            key.startswith(f"{name}.") for key in arrays)]
        if missing:
            raise ValueError("it has other metrics")
        for name, sums in features.sums.items():
            sums.restore({key.removeprefix(f"{name}."): array for key, array in arrays.items()
                          if key.startswith(f"{name}.")})
            if sums.count != done:
                raise ValueError(f"it has {done} and {sums.count} images")
        return done

    def save(self, features: FeatureSet, done: int) -> None:
        """Writes the sums over the first `done` images, which are moved to rank 0."""
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
            dist.warn0(f"{self._path} can't be written ({error}); if this command is stopped, the "
                       "range starts over")

    def remove(self) -> None:
        """Removes the file, if there is one."""
        if self._path is not None and dist.get_rank() == 0:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
