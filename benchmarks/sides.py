"""Processes that run the same case with different code: ours, an older commit, another checkout.

Each process uses only the packages of its own checkout. It is asked for one run at a time, so sides
can alternate while each has its own memory. Its code is a class in a file of this folder, which is
loaded by path: `Case(settings)` with a method `run()`. Methods return plain data.
"""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class SideError(RuntimeError):
    """An error for a side that can't run the requested case."""


class Side:
    """A process that runs one case; use as a context manager.

    Args:
        root: the checkout.
        file: the file with the class of the case.
        case: name of the class.
        settings: argument of the class, plain data.
        threads: number of PyTorch threads in the process.

    Raises:
        SideError: the case can't be created in this checkout.
    """

    def __init__(self, root: Path, file: str, case: str, settings: dict[str, Any], threads: int):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(Path(root).resolve()), str(Path(file).resolve()), case],
            cwd=root, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not sys.stderr.isatty() else None)
        self.ask(settings)

    def ask(self, request: Any) -> Any:
        """Sends plain data and returns the answer."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            text = self._process.stderr.read() if self._process.stderr else ""
            last = (text.strip().splitlines() or ["no message"])[-1]
            raise SideError(f"{self._process.args[2]}: {last}")
        return json.loads(line)

    def run(self) -> float:
        """Returns the duration of one run in seconds."""
        return self.ask("run")

    def call(self, method: str, *args: Any) -> Any:
        """Returns the result of a method of the case."""
        return self.ask([method, *args])

    def peak_mb(self) -> float:
        """Returns the peak memory of the process since the case was created, in MB.

        On a GPU this is the memory of the allocator; otherwise it is the resident memory beyond
        that after the imports.
        """
        return self.ask("peak")

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def older_commit(revision: str, folder: Path) -> Iterator[Path]:
    """Yields a folder with the files of a commit of this repository.

    Raises:
        SideError: there is no such commit.
    """
    archive = subprocess.run(["git", "archive", "--format=tar", revision], cwd=ROOT,
                             capture_output=True)
    if archive.returncode:
        raise SideError(f"--against-commit={revision}: {archive.stderr.decode().strip()}")
    folder.mkdir()
    subprocess.run(["tar", "x"], cwd=folder, input=archive.stdout, check=True)
    yield folder


def _serve() -> None:
    """Answers requests on stdin until it ends."""
    root, file, name = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the code prints must not mix with the answers
    sys.path[0] = root
    spec = importlib.util.spec_from_file_location("benchmark_case", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import torch

    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    is_gpu = settings.get("device") == "cuda"
    before = _resident_mb("VmRSS")
    _forget_peak()
    case = getattr(module, name)(settings)
    answer: Any = None
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        if request == "run":
            if is_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            case.run()
            if is_gpu:
                torch.cuda.synchronize()
            answer = time.perf_counter() - start
        elif request == "peak":
            answer = torch.cuda.max_memory_allocated() / 1e6 if is_gpu else (
                _resident_mb("VmHWM") - before)
        else:
            answer = getattr(case, request[0])(*request[1:])


def _resident_mb(field: str) -> float:
    """Returns a memory statistic of this process from Linux; NaN on other systems."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return math.nan
    return int(text.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def _forget_peak() -> None:
    """Resets VmHWM, which a process inherits from its parent."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    _serve()
