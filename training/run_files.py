"""The files that rank 0 writes during a run: what a full disk costs, what is kept.

If a file can't be written, only that file is lost: there is a warning, earlier files stay, and
training goes on. Failures at two ticks in a row end the run, and so does one at the last tick.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import checkpoint
from dnnlib.atomic import remove_stale
from torch_utils import distributed

_MAX_FAILURES = 2  # ticks in a row


class RunFiles:
    """Writes files of an existing run directory, on rank 0; keeps `keep` training states or all."""

    def __init__(self, run_dir: Path, keep: int | None):
        self.run_dir, self._keep = run_dir, keep
        self._failures, self._problems, self._written = 0, [], 0

    def tidy(self) -> None:
        """Removes the temporary files of a run that was killed."""
        for path in remove_stale(self.run_dir):
            distributed.print0(f"Removed {path}, left by a process that was killed")

    def write(self, name: str, function: Callable[[Path, Any], None], content: Any) -> bool:
        """Calls `function(path, content)`; returns whether the file could be written."""
        try:
            function(self.run_dir / name, content)
        except OSError as error:
            self._problems.append(f"{self.run_dir / name}: {error.strerror or error}")
            return False
        self._written += 1
        return True

    def save(self, name: str, content: dict[str, Any]) -> bool:
        """Writes a state or snapshot; returns whether it could be written."""
        return self.write(name, checkpoint.save, content)

    def raise_if_writes_failed(self, last: bool) -> None:
        """Warns of what could not be written since the last call, and counts it.

        Raises:
            OSError: it failed too often, or at the `last` call.
        """
        problems, written = self._problems, self._written
        self._problems, self._written = [], 0
        if not problems:
            if written:
                self._failures = 0
            return
        self._failures += 1
        if last or self._failures >= _MAX_FAILURES:
            raise OSError(f"not written: {'; '.join(problems)}. Make room and use --resume=auto")
        for problem in problems:
            distributed.warn0(f"not written: {problem}; training goes on, and ends if it happens "
                              "again")

    def prune(self) -> None:
        """Removes all training states but the newest `keep`, if one of those verifies."""
        if self._keep is None:
            return
        states = sorted(checkpoint.training_states(self.run_dir), key=checkpoint.recorded_nimg)
        kept, old = states[-self._keep:], states[:-self._keep]
        if not old:
            return
        if not any(map(checkpoint.verifies, reversed(kept))):
            distributed.warn0(f"no training state in {self.run_dir} pruned: none of the newest "
                              f"{len(kept)} verifies")
            return
        for path in old:
            path.unlink(missing_ok=True)
