"""Whether a run goes on, and how it ended: from its lock, its statistics and its log.

    running    its lock is held
    finished   it has seen all its images
    stopped    a signal ended it, after it had written a state
    failed     it ended otherwise: an error, or killed

No PyTorch is needed.
"""

import dataclasses
import datetime
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib.run_lock import lock_holder
from dnnlib.util import json_value
from reports.run_record import RunRecord, Score

_OPTIONS, _LOG = "training_options.json", "log.txt"
_FILES = (_OPTIONS, _LOG, "stats.jsonl", "metrics.jsonl")
_START = "Run directory  "  # of each start in log.txt
_STOPPED, _ERROR = re.compile(r"^Stopped at ", re.M), re.compile(r"^Error: (.*)", re.M)
_LOG_TAIL_BYTES = 1 << 16
# Metrics of which lower is better, the first that a run has is its score.
_LOWER_IS_BETTER = ("fid", "frechet_distance", "pixels_frechet_distance")


@dataclasses.dataclass(frozen=True)
class RunState:
    """A run at a glance.

    Attributes:
        name: its folder, as seen from where runs were looked for.
        state: 'running', 'finished', 'stopped' or 'failed'.
        kimg: thousands of images seen at the last tick.
        total_kimg: of the whole run; None where nothing tells.
        loss: of the last tick.
        images_per_sec: likewise.
        score: the best, of the largest number of images; None without one.
        D: augmented dimensions; None where nothing tells.
        preset: its name; None without one.
        changed: when a file of the run was written last.
        note: why it failed, where it runs.
    """

    name: str
    state: str
    kimg: float
    total_kimg: float | None
    loss: float | None
    images_per_sec: float | None
    score: Score | None
    D: float | None
    preset: str | None
    changed: datetime.datetime
    note: str

    @classmethod
    def read(cls, path: Path, name: str) -> "RunState":
        """Returns the state of a run directory.

        Raises:
            OSError: it can't be read.
        """
        run = RunRecord.read(path)
        tick = run.ticks[-1] if run.ticks else {}
        total, kimg = _total_kimg(run.options), tick.get("kimg", 0.0)
        is_done = total is not None and round(kimg * 1e3) >= max(round(total * 1e3), 1)
        state, note = _state(path, is_done)
        preset = run.options.get("preset")
        return cls(name, state, kimg, total, tick.get("loss"), tick.get("images_per_sec"),
                   _best(run.scores), run.D, preset if isinstance(preset, str) else None,
                   _changed(path), note)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data that JSON can hold; an infinite D becomes the string 'inf'."""
        shown = ("metric", "value", "kimg", "num", "num_steps", "detector")
        score = self.score and {key: getattr(self.score, key) for key in shown}
        return {**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
                "D": json_value(self.D), "score": score,
                "changed": self.changed.isoformat(timespec="seconds")}


def find_runs(folder: Path) -> list[RunState]:
    """Returns the runs under a folder, which may be one itself, in the order of their names.

    Raises:
        OSError: the folder can't be read.
    """
    return [RunState.read(path, path.resolve().name if path == folder else
                          str(path.relative_to(folder))) for path in sorted(_run_dirs(folder))]


def _run_dirs(folder: Path) -> Iterator[Path]:
    """Yields the run directories, in which there are no others; links are not followed."""
    with os.scandir(folder) as entries:
        entries = list(entries)
    if any(entry.name == _OPTIONS for entry in entries):
        yield folder
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _run_dirs(Path(entry.path))


def _state(path: Path, is_done: bool) -> tuple[str, str]:
    """Returns the state and a note."""
    if holder := lock_holder(path):
        return "running", holder
    if is_done:
        return "finished", ""
    last = _log_tail(path / _LOG).rpartition(_START)[2]
    if errors := _ERROR.findall(last):
        return "failed", errors[-1]
    if _STOPPED.search(last):
        return "stopped", ""
    return "failed", "ended without a word: killed, or a crash"


def _log_tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES, 0))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _total_kimg(options: dict[str, Any]) -> float | None:
    duration = options.get("duration")
    is_known = isinstance(duration, int | float) and 0 < duration < math.inf
    return duration * 1e3 if is_known else None


def _best(scores: list[Score]) -> Score | None:
    """Returns the lowest score of the first metric, among those of the most images."""
    for metric in _LOWER_IS_BETTER:
        found = [score for score in scores if score.metric == metric and score.is_plain]
        if found:
            most = max(score.num or 0 for score in found)
            return min((score for score in found if (score.num or 0) == most),
                       key=lambda score: score.value)
    return None


def _changed(path: Path) -> datetime.datetime:
    times = [(path / name).stat().st_mtime for name in _FILES if (path / name).exists()]
    return datetime.datetime.fromtimestamp(max(times)).astimezone()
