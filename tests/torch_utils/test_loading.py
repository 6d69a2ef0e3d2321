import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import wait_until
from scripts import HANG_SEC, ROOT

from dnnlib.cli import UserError, user_errors
from torch_utils import loading
from torch_utils.loading import Timed, read_in_processes, read_in_threads


class Numbers:
    """Rows [i, i] of int64, and whatever else happens at given indices."""

    def __init__(self, events=None):
        self._events = events or {}

    def get_batch(self, indices):
        for i in indices:
            if i in self._events:
                self._events[i]()
        return np.array([[i, i] for i in indices]), np.array(indices)


def fail():
    raise ValueError("image 5 is damaged")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def be_told_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)


READERS = pytest.mark.parametrize("read", [read_in_processes, read_in_threads])


@READERS
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order_whatever_the_number_of_workers(read, workers):
    batches = [[3, 1], [4], [1, 5, 9], [2, 6]] * 5
    found = list(read(Numbers(), batches, workers=workers))
    assert [pair.tolist() for pair, _ in found] == [[[i, i] for i in batch] for batch in batches]
    assert all(isinstance(tensor, torch.Tensor) for pair in found for tensor in pair)


@READERS
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_reader_arrives_with_its_own_words(read, workers):
    reader = read(Numbers({5: fail}), [[1], [5]], workers=workers)
    next(reader)
    with pytest.raises(ValueError, match="^image 5 is damaged$"):
        next(reader)


def test_a_killed_worker_is_one_line_with_its_signal():
    told = "data loader process was killed .Killed.*--workers"
    with pytest.raises(UserError, match=told) as info, user_errors():
        list(read_in_processes(Numbers({5: die}), [[1], [5], [7]], workers=1))
    assert info.value.exit_code == 1
    assert "\n" not in info.value.message


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"),
                                   EOFError(), FileNotFoundError(2, "No such file")])
def test_a_worker_killed_while_it_hands_over_a_batch_is_the_same_line(error, monkeypatch):
    class Loader:
        _workers = [SimpleNamespace(pid=6, exitcode=None, join=lambda timeout: None),
                    SimpleNamespace(pid=7, exitcode=-9, join=lambda timeout: None)]
        _shutdown_workers = staticmethod(lambda: None)

        def __init__(self, *args, **kwargs):
            pass

        def __iter__(self):
            return self

        def __next__(self):
            raise error

    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    told = "data loader process was killed .Killed.*--workers"
    with pytest.raises(UserError, match=told), user_errors():
        list(read_in_processes(Numbers(), [[1]], workers=2))


@pytest.mark.scripts
def test_a_process_ends_though_one_of_its_workers_was_killed_and_the_error_is_kept():
    code = ("import os, signal, sys\nimport numpy as np\n"
            "from torch_utils.loading import read_in_processes\n"
            "class Source:\n"
            "    def get_batch(self, indices):\n"
            "        if indices[0] == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
            "        return np.array(indices),\n"
            "try: list(read_in_processes(Source(), ([i] for i in range(10**9)), workers=2))\n"
            "except RuntimeError as error: sys.kept = error\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=HANG_SEC)
    assert done.returncode == 0, done.stderr


def test_workers_leave_signals_to_their_parent():
    found = list(read_in_processes(Numbers({5: be_told_to_stop}), [[1], [5], [7]], workers=1))
    assert len(found) == 3


@READERS
def test_batches_are_read_ahead_but_not_far(read):
    """An endless source is read no further than a few batches beyond what was taken."""
    taken = []

    def endless():
        for i in range(10**9):
            taken.append(i)
            yield [i]

    reader = read(Numbers(), endless(), workers=2)
    next(reader)
    assert 2 <= len(taken) <= 6
    reader.close()


def test_dropping_the_iterator_ends_the_workers():
    def children():
        return [child for child in os.listdir("/proc") if child.isdigit() and _parent(child)]

    def _parent(pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return int(file.read().rsplit(")", 1)[1].split()[1]) == os.getpid()
        except OSError:
            return False

    before = set(children())
    reader = read_in_processes(Numbers(), ([i] for i in range(10**9)), workers=2)
    next(reader)
    assert len(set(children()) - before) >= 2
    reader.close()
    wait_until(lambda: set(children()) <= before)


def test_closing_the_iterator_ends_the_threads():
    before = set(threading.enumerate())
    reader = read_in_threads(Numbers(), ([i] for i in range(10**9)), workers=2)
    next(reader)
    # The second starts only where the first is still busy when there is more to read.
    assert 1 <= len(set(threading.enumerate()) - before) <= 2
    reader.close()
    assert set(threading.enumerate()) <= before


ORPHANS = """
import os, signal, sys, numpy as np
from torch_utils.loading import read_in_processes

class Large:  # a batch fills the pipe, so that workers wait for somebody to take it
    def get_batch(self, indices):
        os.write(1, f"{os.getpid()}\\n".encode())  # a line at once
        return (np.zeros([len(indices), 1 << 20]),)

reader = read_in_processes(Large(), ([i] for i in range(10**9)), workers=3)
next(reader)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.scripts
def test_workers_end_with_a_parent_that_was_killed():
    done = subprocess.run([sys.executable, "-c", ORPHANS], cwd=ROOT, capture_output=True, text=True,
                          timeout=HANG_SEC)  # which waits until all have closed their output
    assert done.returncode == -signal.SIGKILL and not done.stderr
    workers = set(map(int, done.stdout.split()))
    assert 1 <= len(workers) <= 3  # those that had begun to read
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in workers))


@pytest.mark.scripts
def test_a_process_is_silent_about_a_parent_that_has_gone():
    code = ("import sys; from torch_utils import loading; loading._start_worker(0)\n"
            "for error in (EOFError(), ConnectionResetError(), ValueError('shown')):\n"
            "    sys.excepthook(type(error), error, None)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "ValueError: shown\n"


SMALL_SHM = """
import sys, numpy as np
from torch_utils.loading import read_in_processes

class Large:
    def get_batch(self, indices):
        return np.full([len(indices), 1 << 20], indices[0], np.uint8),

workers = int(sys.argv[1])
batches = [[i] * 20 for i in range(2 * workers + 3)]  # 20 MiB each
assert [int(b[0, 0]) for b, in read_in_processes(Large(), batches, workers=workers)] == [
    i for i, *_ in batches]
print("all there")
"""


@pytest.mark.scripts
@pytest.mark.long
@pytest.mark.parametrize("workers, size", [(2, "8m"), pytest.param(24, "64m",
                                                                   marks=pytest.mark.slow)])
def test_batches_need_no_room_in_shared_memory(workers, size):
    """As in a container, whose /dev/shm is small."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("may not mount a small /dev/shm")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$@"', sys.executable, "-c",
         SMALL_SHM, str(workers)], cwd=ROOT, text=True, capture_output=True, timeout=HANG_SEC)
    assert (done.returncode, done.stdout) == (0, "all there\n"), done.stderr


def test_the_time_that_is_waited_for_all_items_since_the_last_look_is_summed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loading.time, "perf_counter", lambda: now[0])

    def items():
        for seconds in (1.0, 2.0, 4.0):
            now[0] += seconds
            yield seconds
    timed = Timed(items())
    assert [next(timed), next(timed)] == [1, 2]
    now[0] += 100  # between items, where nobody waits
    assert timed.take_sec() == 3 and timed.take_sec() == 0
    assert next(timed) == 4 and timed.take_sec() == 4
