"""The state of a run, from its lock, its statistics and its log.

    running    its lock is held
    finished   it has been trained on all its images
    stopped    a signal ended it, and it wrote its state
    failed     it ended in another way: by an error, or killed
    unknown    it has neither a log nor statistics

No PyTorch is needed.
"""

import dataclasses
import datetime
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dnnlib.run_lock import lock_holder
from dnnlib.util import json_value
from metrics.score_names import DISTANCES, SCORES_FILE
from reports.run_record import RunRecord, Score
from training.config import LOG_FILE, OPTIONS_FILE, STATS_FILE

_START = "Run directory  "  # log.txt has such a line for each start
_STOPPED, _ERROR = re.compile(r"^Stopped at ", re.M), re.compile(r"^Error: (.*)", re.M)
_LOG_TAIL_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class RunState:
    """A summary of a run; None stands for an unknown or missing value."""

    name: str  # its folder, relative to the searched folder
    state: str  # 'running', 'finished', 'stopped', 'failed' or 'unknown'
    kimg: float  # thousands of images seen at the last tick
    total_kimg: float | None  # of the whole run
    loss: float | None  # of the last tick
    images_per_sec: float | None  # of the last tick
    score: Score | None  # the best of those made in the same way as the latest one
    D: float | None  # augmented dimensions
    preset: str | None
    changed: datetime.datetime  # when a file of the run was last written
    note: str  # why it failed, or where it runs

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
        if not run.options:
            note = f"{OPTIONS_FILE} is empty or damaged{note and f'; {note}'}"
        preset = run.options.get("preset")
        return cls(name, state, kimg, total, tick.get("loss"), tick.get("images_per_sec"),
                   best_score(run.scores), run.D, preset if isinstance(preset, str) else None,
                   _changed(path), note)

    @property
    def seconds_left(self) -> float | None:
        """The remaining training time of an active run at the speed of its last tick, if known."""
        if self.state != "running" or self.total_kimg is None or not self.images_per_sec:
            return None
        return max(self.total_kimg - self.kimg, 0) * 1e3 / self.images_per_sec

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON data; an infinite D becomes the string 'inf'."""
        shown = ("metric", "value", "kimg", "num", "num_steps", "detector")
        score = self.score and {key: getattr(self.score, key) for key in shown}
        return {**vars(self), "seconds_left": self.seconds_left, "D": json_value(self.D),
                "score": score,
                "changed": self.changed.isoformat(timespec="seconds")}


def find_runs(folder: Path) -> list[RunState]:
    """Returns the runs in and below a folder, sorted by name.

    Raises:
        OSError: the folder can't be read.
    """
    return [RunState.read(path, path.resolve().name if path == folder else
                          str(path.relative_to(folder))) for path in sorted(run_dirs(folder))]


def run_dirs(folder: Path) -> Iterator[Path]:
    """Yields run directories in a folder; their subfolders are not searched, or links followed."""
    with os.scandir(folder) as entries:
        entries = list(entries)
    if any(entry.name == OPTIONS_FILE for entry in entries):
        yield folder
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from run_dirs(Path(entry.path))


def _state(path: Path, is_done: bool) -> tuple[str, str]:
    """Returns the state of a run and a note."""
    if holder := lock_holder(path):
        return "running", holder
    if is_done:
        return "finished", ""
    last = _log_tail(path / LOG_FILE).rpartition(_START)[2]
    if errors := _ERROR.findall(last):
        return "failed", errors[-1]
    if _STOPPED.search(last):
        return "stopped", ""
    if not (path / LOG_FILE).exists() and not (path / STATS_FILE).exists():
        return "unknown", f"has no {LOG_FILE} and no {STATS_FILE}"
    return "failed", "ended without a message: killed or crashed"


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


def best_score(scores: Sequence[Score]) -> Score | None:
    """Returns the lowest score of the first distance, else the highest PSNR.

    Only scores over all classes that were made in the same way as the latest one are compared.
    """
    def how(score: Score) -> tuple:
        return (score.num, score.num_steps, score.detector, score.reference, score.other)

    for metric, choose in (*((name, min) for name in DISTANCES), ("psnr", max)):
        found = [score for score in scores if score.metric == metric and score.is_plain
                 and score.of_class is None]
        if found:
            return choose((score for score in found if how(score) == how(found[-1])),
                          key=lambda score: score.value)
    return None


def _changed(path: Path) -> datetime.datetime:
    files = [path / name for name in (OPTIONS_FILE, LOG_FILE, STATS_FILE, SCORES_FILE)]
    times = [file.stat().st_mtime for file in files if file.exists()]
    return datetime.datetime.fromtimestamp(max(times)).astimezone()
