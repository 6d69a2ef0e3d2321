"""The value of --sigma-data=auto: that of the state, an earlier measurement, or a new one.

It is the standard deviation of the data as networks see them, over all pixels and channels. A large
data set is measured on a sample: with n images, the relative standard error is about 0.3 / sqrt(n)
for photographs, or 1e-3 for 50,000. The networks only need 1e-1.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

from dnnlib import console
from images import data_cache
from images.dataset import ImageFolderDataset
from torch_utils import distributed
from training.config import TrainConfig

if TYPE_CHECKING:
    from training.resume import State

SAMPLE_SIZE = 50_000  # images to measure in a larger data set
_NOTE = "sigma_data"  # in the cache, by the fingerprint of the data
_DEFAULT = 0.5  # of networks that do not record it


def settle_sigma_data(config: TrainConfig, dataset: ImageFolderDataset, state: "State | None", *,
                      may_measure: bool = True) -> TrainConfig:
    """Returns the options with sigma_data as a number, and prints where it comes from.

    Every rank must call it; rank 0 measures, with all cores. Without `may_measure`, the options may
    be returned unchanged.

    Raises:
        ValueError: all values of the data are equal, or an image can't be read.
    """
    if config.sigma_data is not None:
        return config
    value, line = distributed.run_on_rank0(_find, dataset, state, may_measure)
    if value is None:
        return config
    if distributed.get_rank() == 0:
        console.say(line)
    return dataclasses.replace(config, sigma_data=value)


def _find(dataset: ImageFolderDataset, state: "State | None",
          may_measure: bool) -> tuple[float | None, str]:
    """Returns sigma_data, None if it is not known, and the line that says where it comes from."""
    if state:
        value = float(state.content["network"].get("sigma_data", _DEFAULT))
        return value, f"sigma_data     {value:.6g}, as in the state"
    key = dataset.fingerprint if may_measure else dataset.known_fingerprint
    note = data_cache.read_note(_NOTE, key) if key else None
    if note and _is_whole(note):
        return note["value"], _describe(note) + " by an earlier run"
    if not may_measure:
        return None, ""
    note = _measure(dataset)
    data_cache.write_note(_NOTE, key, note)
    return note["value"], _describe(note)


def _measure(dataset: ImageFolderDataset) -> dict:
    moments, spread = dataset.measure(SAMPLE_SIZE)
    value = moments.scaled(dataset.scaling).overall_std()
    if not value > 0:
        raise ValueError(f"--sigma-data=auto: all values of {dataset.path} are equal; give a "
                         "number")
    population = len(dataset.all_names)
    return {"value": value, "images": min(population, SAMPLE_SIZE), "of": population,
            "relative_error": spread.relative_error(population)}


def _describe(note: dict) -> str:
    text = (f"sigma_data     {note['value']:.6g}, measured on {note['images']} of {note['of']} "
            "images")
    if note["images"] < note["of"]:
        text += f" (relative standard error {note['relative_error']:.1g})"
    return text


def _is_whole(note: dict) -> bool:
    return (type(note.get("value")) is float and 0 < note["value"] < math.inf
            and type(note.get("relative_error")) is float
            and all(type(note.get(name)) is int for name in ("images", "of")))
