"""Lookup of scores that a file already has, so that none is computed again.

Two records belong to the same score if they agree in `_IDENTITY`: in metric, images, detector and
reference, and in the plugin file if a plugin added the metric. Images are the same if their number,
seeds and sampler are the same. The sampler is the content of generate.json, which includes the
hashes of the weights and of the network. Damaged lines, and values that are not finite numbers, are
ignored.
"""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnnlib.util import json_value

_IDENTITY = ("metric", "num", "seeds", "sampler", "detector", "detector_sha256",
             "reference_sha256", "plugin")
# Entries of generate.json that do not affect the images.
_NO_SETTINGS = ("subdirs", "names", "not_finite")
Record = dict[str, Any]


class RecordedScores:
    """The scores in one file of JSON lines."""

    def __init__(self, path: Path):
        self._records: dict[str, list[Record]] = {}
        try:
            text = path.read_bytes()
        except OSError:
            return
        for line in text.splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # damaged lines are ignored
                record = json.loads(line)
                if isinstance(record, dict) and _is_number(record.get("value")):
                    self.add(record)

    def add(self, record: Record) -> None:
        """Adds a record, which is plain JSON data."""
        self._records.setdefault(_identity(record), []).append(record)

    def find(self, record: Record, bootstrap: int | None = None) -> Record | None:
        """Returns the last record of a score over all classes; None if there is none.

        Args:
            record: the record that it must match.
            bootstrap: the number of draws for its interval; None if it needs no interval.
        """
        fitting = [found for found in self._all(record) if found.get("of_class") is None and (
            bootstrap is None or (found.get("bootstrap") == bootstrap and _has_interval(found)))]
        return fitting[-1] if fitting else None

    def of_classes(self, record: Record) -> dict[int | str, Record]:
        """Returns the last record of each per-class score and of their mean."""
        return {found["of_class"]: found for found in self._all(record)
                if type(found.get("of_class")) in (int, str)}

    def _all(self, record: Record) -> Sequence[Record]:
        return self._records.get(_identity(record), [])


def settings_of_images(sampler: Any) -> Any:
    """Returns the sampler entry of a record as plain JSON, without what does not affect images."""
    if not isinstance(sampler, Mapping):
        return sampler
    return json_value({key: value for key, value in sampler.items() if key not in _NO_SETTINGS})


def _identity(record: Record) -> str:
    known = {key: record.get(key) for key in _IDENTITY}
    return json.dumps(known | {"sampler": settings_of_images(known["sampler"])}, sort_keys=True)


def _has_interval(record: Record) -> bool:
    ends = record.get("interval")
    return _is_number(record.get("std_error")) and isinstance(ends, list) and len(ends) == 2 \
        and all(map(_is_number, ends))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
