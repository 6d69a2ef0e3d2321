"""The files that rank 0 writes during a run: what happens on a full disk, and what is kept.

A thread writes states and snapshots from a copy, one tick's at a time, while training continues. If
a file can't be written, only that file is lost: the next tick warns of it, earlier files stay, and
training continues. Failures at two ticks in a row end the run, and so does one at the last tick.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoints import checkpoint
from dnnlib.atomic import remove_stale
from torch_utils import distributed

_MAX_FAILURES = 2  # ticks in a row


class RunFiles:
    """Writes to an existing run directory on rank 0; keeps `keep` training states (None: all)."""

    def __init__(self, run_dir: Path, keep: int | None):
        self.run_dir, self._keep = run_dir, keep
        self._failures, self._problems, self._written = 0, [], 0
        self._writer: _Writer | None = None
        self._sound: dict[Path, tuple[int, int]] = {}  # size and mtime of states written whole

    def tidy(self) -> None:
        """Removes the temporary files of a run that was killed."""
        for path in remove_stale(self.run_dir):
            distributed.print0(f"Removed {path}, left by a process that was killed")

    def write(self, name: str, function: Callable[[Path, Any], None], content: Any) -> bool:
        """Calls `function(path, content)`; returns whether the file could be written."""
        problem = _problem_of(function, self.run_dir / name, content)
        self._count([problem])
        return problem is None

    def save(self, name: str, content: dict[str, Any]) -> bool:
        """Writes a state or snapshot now; returns whether it could be written."""
        self.wait()
        return self.write(name, checkpoint.save, content)

    def save_in_background(self, contents: dict[str, dict[str, Any]]) -> None:
        """Starts writing states and snapshots, by name, and removing old states after that.

        The contents are copied first, so they may change once this returns.
        """
        self.wait()
        self._writer = _Writer(self._save_all, _host_copy(contents, {}))

    def wait(self) -> None:
        """Waits until all files that are being written are complete or have failed."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._count(writer.result())

    def look(self) -> None:
        """Records which files are complete or have failed, without waiting for the rest."""
        if self._writer is not None and self._writer.has_ended():
            self.wait()

    def _save_all(self, contents: dict[str, dict[str, Any]]) -> list[str | None]:
        """Returns what went wrong with each file, None if it was written."""
        problems = []
        while contents:  # each is freed once it is written
            path = self.run_dir / next(iter(contents))
            problems.append(_problem_of(checkpoint.save, path, contents.pop(path.name)))
            if problems[-1] is None and path in checkpoint.training_states(self.run_dir):
                self._sound[path] = _stamp(path)
                self.prune()
        return problems

    def _count(self, problems: list[str | None]) -> None:
        self._problems += filter(None, problems)
        self._written += problems.count(None)

    def raise_if_writes_failed(self, last: bool) -> None:
        """Warns of files that could not be written since the last call, and counts failed ticks.

        Raises:
            OSError: too many ticks in a row failed, or the `last` one did.
        """
        problems, written = self._take_problems()
        if not problems:
            if written:
                self._failures = 0
            return
        self._failures += 1
        if last or self._failures >= _MAX_FAILURES:
            raise OSError(f"not written: {'; '.join(problems)}. Free some space, then resume with "
                          "--resume=auto")
        for problem in problems:
            distributed.warn0(f"not written: {problem}; training continues, but ends if this "
                              "happens again")

    def warn_of_failures(self) -> None:
        """Warns of files that could not be written since the last call, and counts nothing."""
        for problem in self._take_problems()[0]:
            distributed.warn0(f"not written: {problem}")

    def _take_problems(self) -> tuple[list[str], int]:
        """Returns what went wrong and the number of files written since the last call."""
        taken = self._problems, self._written
        self._problems, self._written = [], 0
        return taken

    def prune(self) -> None:
        """Removes all training states except the newest `keep`, if one of those is intact.

        States that this process wrote and that are unchanged since are intact; others are read.
        """
        if self._keep is None:
            return
        states = sorted(checkpoint.training_states(self.run_dir), key=checkpoint.recorded_nimg)
        kept, old = states[-self._keep:], states[:-self._keep]
        if not old:
            return
        if not any(map(self._is_whole, reversed(kept))):
            distributed.warn0(f"no training state in {self.run_dir} was removed: none of the "
                              f"newest {len(kept)} is intact")
            return
        for path in old:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                distributed.warn0(f"{path}: can't be removed, as --keep={self._keep} requires: "
                                  f"{error.strerror or error}")

    def _is_whole(self, path: Path) -> bool:
        return self._sound.get(path) == _stamp(path) or checkpoint.verifies(path)


class _Writer:
    """A thread that calls a function; Python waits for it at exit."""

    def __init__(self, function: Callable[[Any], list[str | None]], content: Any):
        self._box: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(function, content))
        self._thread.start()

    def _run(self, function: Callable[[Any], list[str | None]], content: Any) -> None:
        try:
            self._box.append(function(content))
        except BaseException as error:
            self._box.append(error)

    def has_ended(self) -> bool:
        """Says whether `result` would return at once."""
        return not self._thread.is_alive()

    def result(self) -> list[str | None]:
        """Waits for the function to end; returns its result or raises its error."""
        self._thread.join()
        [result] = self._box
        if isinstance(result, BaseException):
            raise result
        return result


def _problem_of(function: Callable[[Path, Any], None], path: Path, content: Any) -> str | None:
    """Calls `function(path, content)`; returns what went wrong, None if nothing did."""
    try:
        function(path, content)
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _host_copy(value: Any, seen: dict[tuple, torch.Tensor]) -> Any:
    """Returns nested data with every tensor copied to the CPU; repeated ones are copied once."""
    if isinstance(value, torch.Tensor):
        key = value.device, value.data_ptr(), value.shape, value.stride(), value.dtype
        if not value.data_ptr() or key not in seen:  # an empty tensor has no address of its own
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        return {key: _host_copy(item, seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_host_copy(item, seen) for item in value)
    return value
