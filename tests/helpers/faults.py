"""Ways to start the real scripts, to hurt them, and to see what they leave behind."""

import contextlib
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from scripts import HANG_SEC, ROOT
from watchdog import kill_marked, processes

_MARK = "PFGMPP_TEST_MARK"
_started = []


@pytest.fixture(autouse=True)
def end_scripts():
    """Ends what a failed test has left running."""
    yield
    while _started:
        _started.pop().kill_all()


def wait_until(condition, timeout=HANG_SEC, period=0.02):
    """Returns the first true value of `condition()`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(period)
    raise AssertionError("waited in vain")


def shared_memory():
    """Returns the files of PyTorch's shared memory."""
    return list(Path("/dev/shm").glob("torch_*"))


class Script:
    """A script in a subprocess of its own session, under torchrun if `processes` > 0."""

    def __init__(self, *args, processes=0, launch=("--standalone",), folder, **env):
        self.mark = uuid.uuid4().hex
        self._shared_before = set(shared_memory())  # perhaps of other people's processes
        command = [sys.executable]
        if processes:
            command += ["-m", "torch.distributed.run", *launch, f"--nproc_per_node={processes}"]
        self._log = Path(folder) / f"output-{self.mark}.txt"
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, *map(str, args)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | {_MARK: self.mark, "PYTHONUNBUFFERED": "1"} | env,
                start_new_session=True)
        _started.append(self)

    @property
    def output(self):
        return self._log.read_text(errors="replace")

    @property
    def errors(self):
        return [line for line in self.output.splitlines() if line.startswith("Error: ")]

    def wait_for(self, pattern, timeout=HANG_SEC):
        """Waits until the output has a line that matches; fails if the script ends before."""
        def found():
            ended = self.process.poll() is not None
            if match := re.search(pattern, self.output, re.M):
                return match
            assert not ended, f"ended without {pattern!r}\n{self.output}"
        return wait_until(found, timeout)

    def signal(self, number):
        os.kill(self.process.pid, number)

    def signal_group(self, number):
        os.killpg(self.process.pid, number)

    def processes(self):
        """Returns {pid: command line} of the script and everything that it started."""
        return processes(f"{_MARK}={self.mark}")

    def ranks(self):
        """Returns the process ids of the ranks, by rank."""
        found = {}
        for pid, line in self.processes().items():
            with contextlib.suppress(OSError):
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = [int(value[5:]) for value in environ if value.startswith(b"RANK=")]
                parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                if rank and parent == self.process.pid and "train.py" in line:
                    found[rank[0]] = pid
        return found

    def children(self):
        """Returns the process ids of what the script itself has started."""
        return [pid for pid in self.processes() if pid != self.process.pid]

    def kill_all(self):
        """What a machine does that loses its power."""
        kill_marked(f"{_MARK}={self.mark}")
        self.wait()

    def wait(self, timeout=HANG_SEC):
        """Returns the exit code."""
        return self.process.wait(timeout)

    def wait_for_all(self):
        """Waits until everything that the script has started has ended too."""
        wait_until(lambda: not self.processes(), 120)

    def assert_left_nothing(self, *folders):
        """No process, no temporary file, no shared memory of processes that are gone."""
        self.wait_for_all()
        left = [path for folder in folders for path in Path(folder).rglob("*.tmp")]
        assert not left
        for path in set(shared_memory()) - self._shared_before:
            pid = int(re.match(r"torch_(\d+)", path.name)[1])
            assert Path(f"/proc/{pid}").exists(), f"{path} is nobody's"


def run_to_end(*args, **options):
    """Runs a script; returns it when it has ended."""
    script = Script(*args, **options)
    script.wait()
    return script
