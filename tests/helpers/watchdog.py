"""Ends what tests have started when the process that ran them is gone: `watchdog.py PID MARK`.

Its parent is that process, PID. Whatever has MARK in its environment is what it started, however
indirectly.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path


def processes(mark: str | None = None) -> dict[int, str]:
    """Returns {pid: command line}, of those that were started with an environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark is None or mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(path.name)] = line
    return found


def kill_marked(mark: str) -> None:
    """Kills the processes with `mark` in their environment."""
    for _ in range(3):  # some may be starting others
        for pid in processes(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    while os.getppid() == int(sys.argv[1]):
        time.sleep(0.5)
    kill_marked(sys.argv[2])
