"""Full disks, damaged files, second runs, killed workers, changed options: one clear line."""

import contextlib
import copy
import dataclasses
import errno
import gc
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import psutil
import pytest
import torch
from faults import Script, end_scripts, run_to_end, wait_until  # noqa: F401 - a fixture
from run_dirs import newest_state
from scripts import HANG_SEC, ROOT, SCRIPTS, run_script
from tiny import TINY_RUN, write_dataset
from watchdog import processes

import distill
import fid
import train
from checkpoints import checkpoint as checkpoint_module
from checkpoints.checkpoint import BEST_STATE, digest, load, save, training_states
from dnnlib import locks
from dnnlib.atomic import append_line, atomic_write, remove_stale
from dnnlib.run_lock import numbered_dir, run_lock
from generate import main as generate_main
from images.dataset import ImageFolderDataset
from torch_utils import distributed
from training import training_loop
from training.config import TrainConfig
from training.distill_config import DistillConfig
from training.resume import (
    NETWORK_OPTIONS,
    RESUME_MAY_CHANGE,
    State,
    Weights,
    changed_options,
)
from training.run_files import RunFiles
from training.trainer import Trainer


def command(data, outdir, *more, steps=10):
    return ["--name=run", *TINY_RUN, "--tick=0.008", "--dump=1", "--snap=1000", "--device=cpu",
            f"--data={data}", f"--outdir={outdir}", f"--duration={steps * 8e-6}", *more]


def error_of(result, code):
    """Returns the one line of a command that ends in `code`."""
    assert result.exit_code == code, result.output
    [line] = [text for text in result.output.splitlines() if text.startswith("Error: ")]
    assert "Traceback" not in result.output
    return line


@pytest.fixture(scope="module")
def finished(dataset_zip, tmp_path_factory):
    """A run of ten steps with a state for each but the first."""
    from click.testing import CliRunner
    outdir = tmp_path_factory.mktemp("finished")
    result = CliRunner().invoke(train.main, command(dataset_zip, outdir))
    assert result.exit_code == 0, result.output
    return outdir / "run"


@pytest.fixture
def disk(tmp_path):
    """A file system of 6 MB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", path],
                      capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk, leave=0):
    """Fills the disk but for some bytes; returns the file to remove."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    if leave:
        os.truncate(filler, filler.stat().st_size - leave)
    return filler


def write_state(path, nimg):
    save(path, {"format": "pfgmpp-training-state", "optimizer": {}, "net": torch.arange(100.0),
                "progress": {"cur_nimg": nimg}})


# --------------------------------------------------------------------------------- full disks


def test_a_full_disk_is_called_that_wherever_it_strikes(disk):
    """PyTorch's writer has words of its own for most places."""
    content = {"format": "x", "net": {f"w{i}": torch.randn(20_000) for i in range(20)}}
    size, results = 6 << 20, set()
    for room in range(0, 2 << 20, 61_000):
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
            file.write(bytes(size - room))
        try:
            save(disk / "x.pt", content)
            torch.load(disk / "x.pt", weights_only=True)
            results.add("whole")
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            results.add("full")
            assert [path.name for path in disk.iterdir()] == ["filler"]
        for path in disk.iterdir():
            path.unlink()
    assert results == {"whole", "full"}


@pytest.mark.scripts
@pytest.mark.slow
def test_a_full_disk_costs_a_state_but_not_the_run(dataset_zip, disk, tmp_path):
    script = Script("train.py", *command(dataset_zip, disk, "--dump=60", "--keep=2", steps=300),
                    folder=tmp_path)
    script.wait_for("^tick 10 ")
    filler = fill(disk, leave=300_000)  # enough for the log, not for a state
    script.wait_for("^Warning: not written: .*state-.*No space left")
    assert not list(disk.rglob("*.tmp"))
    filler.unlink()
    assert script.wait() == 0, script.output
    assert script.output.count("Warning") == 1
    assert [load(path)["progress"]["cur_nimg"] for path in training_states(disk / "run")] in (
        [8 * 241, 8 * 300], [8 * 300])


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_at_the_second_state(dataset_zip, disk, tmp_path):
    args = command(dataset_zip, disk, "--dump=20", steps=3000)
    script = Script("train.py", *args, folder=tmp_path)
    script.wait_for("^tick 25 ")
    fill(disk, leave=300_000)
    assert script.wait() == 1
    [line] = script.errors
    assert "No space left" in line and "training-state" in line
    assert script.output.count("Warning: not written") == 1
    path, problems = newest_state(disk / "run")
    assert path and not problems
    script.assert_left_nothing(disk)


@pytest.mark.scripts
@pytest.mark.slow
def test_a_full_disk_for_log_and_statistics_is_one_warning_each(dataset_zip, disk, tmp_path):
    script = Script("train.py", *command(dataset_zip, disk, "--dump=1000", steps=400),
                    folder=tmp_path)
    script.wait_for("^tick 10 ")
    filler = fill(disk)
    script.wait_for("^Warning: .*stats.jsonl not written")
    script.wait_for("^tick 200 ")
    filler.unlink()
    assert script.wait() == 0, script.output
    assert script.output.count("stats.jsonl not written") == 1
    assert script.output.count("log.txt not written") <= 1
    lines = (disk / "run" / "stats.jsonl").read_text().splitlines()
    kimg = [json.loads(line)["Progress/kimg"]["mean"] for line in lines]
    assert kimg == sorted(kimg) and kimg[-1] == pytest.approx(3.2) and len(kimg) < 400


@pytest.mark.scripts
@pytest.mark.slow
def test_a_console_on_a_full_disk_does_not_end_the_run(dataset_zip, disk):
    steps = 600 * resource.getpagesize() // 4096  # of which a page of a file holds a hundred
    script = Script("train.py", *command(dataset_zip, disk, f"--dump={steps}", steps=steps),
                    folder=disk)
    script.wait_for("^tick 10 ")
    filler = fill(disk)
    log, process = disk / "run" / "log.txt", psutil.Process(script.process.pid)

    def is_lost():
        """Whether the log stays as it is while the run goes on."""
        size, end = log.stat().st_size, process.cpu_times().user + 0.3
        wait_until(lambda: script.process.poll() is not None or process.cpu_times().user > end)
        assert script.process.poll() is None
        return log.stat().st_size == size

    wait_until(is_lost)
    filler.unlink()
    assert script.wait() == 0
    log = log.read_text()
    assert log.count("tick ") < steps, "nothing was lost: the disk was not full"
    assert log.splitlines()[-1].startswith("Training finished")
    path, problems = newest_state(disk / "run")
    assert load(path)["progress"]["cur_nimg"] == steps * 8 and not problems


@pytest.mark.scripts
@pytest.mark.parametrize("lines", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_reader_of_the_output_that_goes_does_not_end_the_run(dataset_zip, tmp_path, lines):
    run = subprocess.Popen([sys.executable, "train.py", *command(dataset_zip, tmp_path)],
                           cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env=os.environ | {"PFGMPP_CACHE_DIR": str(tmp_path / "new-cache")})
    for _ in range(lines):
        run.stdout.readline()
    run.stdout.close()
    assert run.wait(HANG_SEC) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.splitlines()[-1].startswith("Training finished")
    assert log.count("Warning: console not written") <= 1  # none where the log had not begun


@contextlib.contextmanager
def largest_file(size):
    """Lets no file of this process grow beyond a size: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_writing_leaves_the_earlier_file_and_no_temporary(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    write_state(path, 1000)
    before = path.read_bytes()
    with largest_file(500), pytest.raises(OSError):
        write_state(path, 2000)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_two_occasions_of_failure_in_a_row_are_one_too_many(tmp_path, capsys):
    files, content = RunFiles(tmp_path, None), {"format": "x", "net": torch.zeros(1000)}

    def occasion(size, last=False):
        with largest_file(size):
            files.save("a.pt", content)
            files.save("b.pt", content)
        files.raise_if_writes_failed(last)

    occasion(100)
    occasion(10**6)
    occasion(100)
    files.raise_if_writes_failed(False)  # an occasion without files is none
    assert capsys.readouterr().err.count("Warning: not written") == 4
    with pytest.raises(OSError, match=r"a\.pt: .*b\.pt: "):
        occasion(100)
    with pytest.raises(OSError, match="--resume=auto"):
        RunFilesAtTheirEnd(tmp_path)


def RunFilesAtTheirEnd(folder):
    files = RunFiles(folder, None)
    with largest_file(100):
        files.save("c.pt", {"net": torch.zeros(1000)})
    files.raise_if_writes_failed(last=True)


# ------------------------------------------------------------------- writing in the background


def test_states_are_written_from_a_copy_while_training_goes_on(dataset_zip, tmp_path, monkeypatch):
    """Each save waits until two more steps are taken: training that waited would end in a hang."""
    real_save, real_step, steps, nimg = save, Trainer.train_step, [], {}

    def slow_save(path, content):
        if "state" in path.name and (number := len(steps)) < 8:
            wait_until(lambda: len(steps) >= number + 2, timeout=60)
        real_save(path, content)

    def step(trainer):
        real_step(trainer)
        steps.append(1)
        nimg[trainer.cur_nimg] = digest(dict(trainer.net.state_dict()))
    monkeypatch.setattr(checkpoint_module, "save", slow_save)
    monkeypatch.setattr(Trainer, "train_step", step)
    config = TrainConfig(data=str(dataset_zip), arch="ncsnpp", cbase=8, cres=(1,), nblock=1,
                         batch=8, lr=1e-2, lr_rampup=0.0, workers=0, augment=0.0, samples=0, seed=0,
                         duration=10 * 8e-6, tick=0.024, dump=1, snap=1000)
    training_loop.training_loop(config, dataset=ImageFolderDataset(dataset_zip), run_dir=tmp_path,
                                device=torch.device("cpu"))
    states = [load(path) for path in training_states(tmp_path)]
    assert len(states) >= 3
    for state in states:
        assert digest(state["net"]) == nimg[state["progress"]["cur_nimg"]]


def test_a_failure_in_the_background_is_told_at_the_next_tick(tmp_path, capsys):
    files, content = RunFiles(tmp_path, None), {"format": "x", "net": torch.zeros(1000)}
    with largest_file(100):
        files.save_in_background({"a.pt": content})
        files.raise_if_writes_failed(last=False)  # it may not have ended yet
        assert not capsys.readouterr().err
        files.wait()
    files.raise_if_writes_failed(last=False)
    assert f"Warning: not written: {tmp_path / 'a.pt'}: " in capsys.readouterr().err
    files.save_in_background({"b.pt": content})
    files.wait()
    files.raise_if_writes_failed(last=True)
    assert torch.equal(torch.load(tmp_path / "b.pt")["net"], content["net"])


def test_a_failure_is_told_at_a_tick_that_writes_nothing(tmp_path, capsys):
    files, content = RunFiles(tmp_path, None), {"format": "x", "net": torch.zeros(1000)}
    with largest_file(100):
        files.save_in_background({"a.pt": content})
        wait_until(lambda: files._writer.has_ended())
    files.look()
    files.raise_if_writes_failed(last=False)
    assert f"Warning: not written: {tmp_path / 'a.pt'}: " in capsys.readouterr().err
    files.look()  # nothing is left to tell
    files.raise_if_writes_failed(last=True)


def test_a_tick_that_writes_nothing_looks_for_failures(dataset_zip, tmp_path, monkeypatch, capsys):
    def save_later(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save", save_later)
    looked = []
    real_look = RunFiles.look
    monkeypatch.setattr(RunFiles, "look", lambda files: looked.append(1) or real_look(files))
    config = TrainConfig(data=str(dataset_zip), arch="ncsnpp", cbase=8, cres=(1,), nblock=1,
                         batch=8, lr=1e-2, workers=0, augment=0.0, samples=0, seed=0,
                         duration=10 * 8e-6, tick=0.008, dump=1000, snap=1000)
    with pytest.raises(OSError, match="No space left"):  # at the end
        training_loop.training_loop(config, dataset=ImageFolderDataset(dataset_zip),
                                    run_dir=tmp_path, device=torch.device("cpu"))
    assert len(looked) == 9
    lines = [line for line in capsys.readouterr().err.splitlines() if "not written" in line]
    assert len(lines) == 1 and "network-snapshot-000000.008.pt" in lines[0]


def test_a_state_that_cannot_be_removed_costs_a_warning(tmp_path, capsys):
    write_state(tmp_path / "training-state-000001.pt", 1000)
    (tmp_path / "training-state-000000.pt").mkdir()  # as good as one that may not be removed
    files = RunFiles(tmp_path, 1)
    content = load(tmp_path / "training-state-000001.pt")
    content["progress"]["cur_nimg"] = 2000
    files.save_in_background({"training-state-000002.pt": content})
    files.wait()
    files.raise_if_writes_failed(last=True)
    assert "training-state-000000.pt: can't be removed, as --keep=1 requires: " in \
        capsys.readouterr().err
    assert not (tmp_path / "training-state-000001.pt").exists()


def test_one_file_is_written_at_a_time_and_a_mistake_of_the_program_is_not_lost(tmp_path,
                                                                                monkeypatch):
    files, events = RunFiles(tmp_path, None), []

    def slow_save(path, content):
        events.append(f"begin {path.name}")
        time.sleep(0.05)
        events.append(f"end {path.name}")
        if content.get("bug"):
            raise KeyError("bug")
    monkeypatch.setattr(checkpoint_module, "save", slow_save)
    files.save_in_background({"a": {}, "b": {}})
    files.save_in_background({"c": {"bug": True}})
    with pytest.raises(KeyError, match="bug"):
        files.save("d", {})
    assert events == [f"{when} {name}" for name in "abc" for when in ("begin", "end")]


def test_old_states_go_when_a_newer_one_is_whole_and_what_was_just_written_is_not_read(
        tmp_path, monkeypatch):
    for kimg in (1, 2, 3):
        write_state(tmp_path / f"training-state-{kimg:06d}.pt", kimg * 1000)
    content, files = load(tmp_path / "training-state-000003.pt"), RunFiles(tmp_path, 2)
    content["progress"]["cur_nimg"] = 4000
    read = []
    monkeypatch.setattr(checkpoint_module, "verifies", lambda path: read.append(path) or True)
    files.save_in_background({"training-state-000004.pt": content})
    files.wait()
    assert [path.name for path in training_states(tmp_path)] == [
        "training-state-000003.pt", "training-state-000004.pt"]
    assert not read


@pytest.mark.parametrize("kind", ["state", "weights"])
def test_what_a_run_starts_from_is_freed_once_it_is_in_the_network(kind, dataset_zip, tmp_path,
                                                                   monkeypatch):
    config = TrainConfig(data=str(dataset_zip), arch="ncsnpp", cbase=8, cres=(1,), nblock=1,
                         batch=8, workers=0, augment=0.0, samples=0, seed=0, duration=16e-6)
    dataset = ImageFolderDataset(dataset_zip)
    trainer = Trainer(config, dataset, torch.device("cpu"))
    if kind == "state":
        start = State("x.pt", copy.deepcopy(trainer.state()))
        tensor = weakref.ref(next(iter(start.content["net"].values())))
    else:
        start = Weights("x.pt", copy.deepcopy(dict(trainer.net.state_dict())), ())
        tensor = weakref.ref(next(iter(start.tensors.values())))
    seen, real = [], training_loop._announce

    def announce(trainer):
        gc.collect()
        seen.append(tensor() is None)
        real(trainer)
    monkeypatch.setattr(training_loop, "_announce", announce)
    training_loop.training_loop(config, dataset=dataset, run_dir=tmp_path,
                                device=torch.device("cpu"), start=start)
    assert seen == [True]


# ------------------------------------------------------------------------------ appended lines


def test_a_torn_line_is_cut_off_before_the_next(tmp_path):
    path = tmp_path / "stats.jsonl"
    for torn in ("", '{"a": 1', "x" * 200_000):
        path.write_text('{"n": 0}\n' + torn)
        append_line(path, '{"n": 1}')
        assert path.read_text() == '{"n": 0}\n{"n": 1}\n'
    path.write_text("no newline at all")
    append_line(path, "1")
    assert path.read_text() == "1\n"


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "stats.jsonl"
    append_line(path, "x" * 100)
    with largest_file(150), pytest.raises(OSError):
        append_line(path, "y" * 100)
    assert path.read_text() == "x" * 100 + "\n"


@pytest.mark.scripts
def test_lines_of_several_processes_do_not_mix(tmp_path):
    code = ("import sys; from dnnlib.atomic import append_line\n"
            "for i in range(200): append_line(sys.argv[1], sys.argv[2] * 3000)")
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "s.jsonl", letter],
                                cwd=ROOT) for letter in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted(letter * 3000 for letter in "abc" for _ in range(200))


# ------------------------------------------------------------------------- stale temporaries


WRITER = """
import sys, time
from dnnlib.atomic import atomic_write
with atomic_write(sys.argv[1]) as file:
    print("open", flush=True)
    time.sleep(1000)
"""


def start_writer(path):
    """Returns a process that is in the middle of writing a file, and the temporary file."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE)
    assert writer.stdout.readline() == "open\n"
    [tmp] = path.parent.glob(f"{path.name}.*.tmp")
    return writer, tmp


def test_temporaries_of_dead_writers_are_removed_and_others_left_alone(tmp_path):
    live, live_tmp = start_writer(tmp_path / "a.pt")
    dead, dead_tmp = start_writer(tmp_path / "b.pt")
    dead.kill()
    dead.wait()
    try:
        earlier, old = (tmp_path / f"{name}.pt.node-1.tmp" for name in ("c", "d"))
        for path in (earlier, old, tmp_path / "notes.tmp", tmp_path / "a.pt.12.tmp"):
            path.write_text("")
        os.utime(old, (0, 0))
        with atomic_write(tmp_path / "e.pt") as file:
            assert set(remove_stale(tmp_path)) == {dead_tmp, old}
            assert live_tmp.exists() and file
        assert (tmp_path / "e.pt").exists(), "nor does a process take its own file for abandoned"
        with atomic_write(tmp_path / "a.pt"):
            assert live_tmp.exists(), "another writer of the same file is left alone too"
    finally:
        live.kill()
        live.wait()
    with atomic_write(tmp_path / "a.pt"):
        assert not live_tmp.exists(), "the next writing of a file takes its rests away"


def test_writers_of_equal_host_names_and_numbers_do_not_meet(tmp_path, monkeypatch):
    """As in two containers, where every process is number 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with atomic_write(tmp_path / "x") as first:
        first.write(b"first")
        with atomic_write(tmp_path / "x") as second:
            second.write(b"second")
        assert (tmp_path / "x").read_bytes() == b"second"
    assert (tmp_path / "x").read_bytes() == b"first"


def test_a_file_that_is_tidied_away_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    real, seen = locks.lock_handle, []

    def lock(fd, wait=True):
        if wait and not seen:
            seen.extend(remove_stale(tmp_path))
        return real(fd, wait=wait)
    monkeypatch.setattr(locks, "lock_handle", lock)
    with atomic_write(tmp_path / "x") as file:
        file.write(b"content")
    assert len(seen) == 1 and (tmp_path / "x").read_bytes() == b"content"


def test_a_file_is_locked_until_it_has_its_name(tmp_path, monkeypatch):
    real, seen = os.replace, []

    def replace(source, target):
        seen.extend(remove_stale(tmp_path))
        real(source, target)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_write(tmp_path / "x") as file:
        file.write(b"content")
    assert not seen and (tmp_path / "x").read_bytes() == b"content"


def test_without_locks_temporaries_are_kept_for_a_day(tmp_path, monkeypatch):
    def refuse(fd, wait=True):
        raise locks.NoLocksError(errno.ENOLCK, "no locks")
    monkeypatch.setattr(locks, "lock_handle", refuse)
    with atomic_write(tmp_path / "x"):
        [tmp] = tmp_path.glob("*.tmp")
        assert remove_stale(tmp_path) == []
    assert (tmp_path / "x").exists()
    tmp.write_text("")
    os.utime(tmp, (0, 0))
    assert remove_stale(tmp_path) == [tmp]


def test_a_file_that_must_be_new_is_never_replaced(tmp_path):
    won = []

    def write(i):
        with contextlib.suppress(FileExistsError):
            with atomic_write(tmp_path / "x", replace=False) as file:
                file.write(str(i).encode())
                time.sleep(0.01)
            won.append(i)
    threads = [threading.Thread(target=write, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [first] = won
    assert (tmp_path / "x").read_text() == str(first)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


WINDOWS = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
sys.modules["fcntl"] = None
del signal.SIGUSR1

def run(*args):
    sys.argv = list(args)
    try:
        runpy.run_path(args[0], run_name="__main__")
    except SystemExit as error:
        return error.code
    return 0

from dnnlib.run_lock import lock_holder
for path in sys.argv[1:]:
    assert run(path, "--help") in (0, None), path
"""


@pytest.mark.slow
@pytest.mark.scripts
@pytest.mark.long
def test_without_posix_locks_scripts_start_and_a_second_run_is_refused(dataset_zip, tmp_path):
    """As on Windows, but for its other differences."""
    scripts = [f"{name}.py" for name in SCRIPTS]
    args = ["train.py", *command(dataset_zip, tmp_path)]
    (tmp_path / "windows.py").write_text(WINDOWS + f"""
args, run_dir = {args!r}, {str(tmp_path / "run")!r}
assert not run(*args)
assert lock_holder(run_dir) is None
marker = os.path.join(run_dir, ".running")  # as a run that crashed leaves it
with open(marker, "w") as file:
    file.write("process 1 on node0\\n")
assert lock_holder(run_dir) == "process 1 on node0"
assert run(*args, "--resume=auto") == 1
os.unlink(marker)
assert not run(*args, "--resume=auto")
print("all as it should be")
""")
    done = run_script(tmp_path / "windows.py", *scripts)
    assert "all as it should be" in done.stdout
    assert "in use by process 1 on node0" in done.stderr and ".running" in done.stderr


# ----------------------------------------------------------------------------- pruned states


def test_keep_leaves_the_newest_states_once_one_of_them_verifies(tmp_path, capsys):
    for i in range(1, 6):
        write_state(tmp_path / f"training-state-{i:06d}.pt", i * 1000)
    write_state(tmp_path / BEST_STATE, 1)
    (tmp_path / "network-snapshot-000001.pt").write_text("")

    def names():
        return {path.name[-5:-3] for path in training_states(tmp_path)}

    newest = tmp_path / "training-state-000005.pt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-100])
    RunFiles(tmp_path, 1).prune()
    assert names() == {"01", "02", "03", "04", "05"}, "the one to keep is damaged"
    assert "none of the newest 1 is intact" in capsys.readouterr().err
    RunFiles(tmp_path, 2).prune()
    assert names() == {"04", "05"}, "one of the two verifies"
    newest.write_bytes(whole)
    RunFiles(tmp_path, 1).prune()
    RunFiles(tmp_path, None).prune()
    assert names() == {"05"}
    assert (tmp_path / BEST_STATE).exists() and (tmp_path / "network-snapshot-000001.pt").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_run_with_keep_has_that_many_states_and_all_its_snapshots(dataset_zip, tmp_path,
                                                                    invoke):
    result = invoke(train.main, *command(dataset_zip, tmp_path, "--keep=3", "--snap=2"))
    assert result.exit_code == 0, result.output
    names = [path.name for path in training_states(tmp_path / "run")]
    assert names == [f"training-state-000000.{n:03d}.pt" for n in (64, 72, 80)]
    assert len(list((tmp_path / "run").glob("network-snapshot-*.pt"))) == 6


# -------------------------------------------------------------------- damaged and other files


@pytest.mark.long
@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:len(data) // 2], lambda data: data[:-1],
    lambda data: data[:1000] + bytes([data[1000] ^ 4]) + data[1001:],
    lambda data: data[:-3000] + bytes([data[-3000] ^ 1]) + data[-2999:],
], ids=["empty", "half", "last byte", "flipped early", "flipped late"])
def test_a_damaged_state_is_named_or_passed_over(damage, finished, dataset_zip, tmp_path, invoke):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    older, newest = training_states(finished)[-2:]
    (run_dir / older.name).write_bytes(older.read_bytes())
    bad = run_dir / newest.name
    bad.write_bytes(damage(newest.read_bytes()))
    line = error_of(invoke(train.main, *command(dataset_zip, tmp_path, f"--resume={bad}")), 1)
    assert str(bad) in line
    result = invoke(train.main, *command(dataset_zip, tmp_path, "--resume=auto"))
    assert result.exit_code == 0, result.output
    assert f"Warning: skipped {bad}" in result.output
    assert f"Resuming from  {run_dir / older.name}" in result.output
    assert digest(load(bad)["net"]) == digest(load(newest)["net"]), "it was trained anew"


# --------------------------------------------------------------------------- changed options


def test_every_option_is_free_or_compared_or_in_the_network():
    of_training, names = ({field.name for field in dataclasses.fields(config)}
                          for config in (TrainConfig, DistillConfig))
    assert names >= RESUME_MAY_CHANGE.keys() | NETWORK_OPTIONS | of_training
    assert not RESUME_MAY_CHANGE.keys() & NETWORK_OPTIONS
    compared = names - RESUME_MAY_CHANGE.keys() - NETWORK_OPTIONS
    # A new option is compared until somebody has thought about it.
    assert compared & of_training == {
        "stf", "rbatch", "lsun", "batch", "lr", "lr_rampup", "ema", "dropout", "augment", "xflip",
        "patch", "patches", "precision", "ls", "P_mean", "P_std", "clip_grad", "lr_decay",
        "lr_decay_start", "loss", "plugin_sha256"}
    assert compared - of_training == {
        "method", "optim", "teacher_sha256", "ect_q", "ect_k", "ect_b", "ect_c", "ect_double",
        "cd_scales", "cd_metric", "cd_decay", "ipfm_alpha", "ipfm_steps", "aux_lr"}
    assert all(RESUME_MAY_CHANGE.values()), "each with its reason"


def test_changed_options_are_listed_with_both_values():
    then = TrainConfig(data="a", batch=64, lr=1e-3).to_dict()
    now = TrainConfig(data="b", batch=32, lr=2e-3, duration=7, batch_gpu=2, rbatch=100, keep=2)
    assert changed_options(now, then) == [
        "--batch=32 (64 in the state)", "--lr=0.002 (0.001 in the state)"]
    back = dataclasses.replace(now, batch=64, lr=TrainConfig.lr)
    assert changed_options(back, then | {"lr": 0.5}) == [
        "--lr=0.001, the default (0.5 in the state)"]
    assert changed_options(back, then | {"lr": 0.5}, {"lr"}) == ["--lr=0.001 (0.5 in the state)"]
    del then["xflip"]  # written before there was such an option
    then["gone"] = 1
    flipped = dataclasses.replace(now, batch=64, lr=1e-3, xflip=True)
    assert changed_options(flipped, then) == ["--xflip=1 (0 in the state)"]
    assert changed_options(dataclasses.replace(now, batch=64, lr=1e-3), then) == []
    assert "--rbatch=100" in str(
        changed_options(dataclasses.replace(now, stf=True, augment=0.0), then))
    cosine = dataclasses.replace(now, batch=64, lr=1e-3, lr_decay="cosine", lr_decay_start=2)
    assert changed_options(cosine, then) == [
        "--duration=7 (200 in the state)", "--lr-decay=cosine (none in the state)",
        "--lr-decay-start=2 (none in the state)"]
    assert changed_options(dataclasses.replace(cosine, lr_rampup=1), cosine.to_dict()) == [
        "--lr-rampup=1 (10 in the state)"]
    rsqrt = dataclasses.replace(cosine, lr_decay="rsqrt")
    assert changed_options(dataclasses.replace(rsqrt, duration=9), rsqrt.to_dict()) == []
    assert changed_options(dataclasses.replace(now, lr_decay_start=2), now.to_dict()) == []
    now = dataclasses.replace(back, lr=1e-3, P_mean=-0.4, P_std=1.0)
    assert changed_options(now, then) == [
        "--P_mean=-0.4 (-1.2 in the state)", "--P_std=1 (1.2 in the state)"]


@pytest.mark.long
@pytest.mark.parametrize("flags, words", [
    (["--arch=ddpmpp"], "embedding_type: positional here, fourier there"),
    (["--cbase=4"], "model_channels: 4 here, 8 there"),
    (["--cond=1"], "label_dim: 2 here, 0 there"),
    (["--pfgmpp=1", "--aug_dim=9"], "pfgmpp: True here, False there"),
    (["--override-options"], "img_resolution: 16 here, 8 there")])
def test_a_state_of_another_network_is_refused(flags, words, finished, dataset_zip, tmp_path,
                                               invoke):
    data = dataset_zip
    if flags == ["--override-options"]:
        data = write_dataset(tmp_path / "larger.zip", side=16)
    state = training_states(finished)[-1]
    args = command(data, tmp_path, f"--resume={state}", steps=20)
    line = error_of(invoke(train.main, *args, *flags), 1)
    assert words in line and "another --name" in line


@pytest.mark.scripts
@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_under_torchrun(dataset_zip, tmp_path):
    script = run_to_end("train.py", *command(dataset_zip, tmp_path), folder=tmp_path, processes=3)
    assert script.wait() == 1 and "exitcode  : 2" in script.output
    assert script.errors == ["Error: --batch=8 can't be split over 3 processes; nearest: 6 or 9"]
    script.assert_left_nothing(tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_changed_options_end_a_resumed_run_unless_overridden(finished, dataset_zip, tmp_path,
                                                             invoke):
    state = training_states(finished)[3]
    args = command(dataset_zip, tmp_path, f"--resume={state}")
    changed = [*args, "--batch=4", "--lr=0.5", "--dropout=0.3"]
    line = error_of(invoke(train.main, *changed), 2)
    for word in ("--batch=4 (8 in the state)", "--lr=0.5", "--dropout=0.3", str(state),
                 "--override-options"):
        assert word in line
    assert not (tmp_path / "run").exists()
    assert invoke(train.main, *changed, "--override-options").exit_code == 0
    assert load(newest_state(tmp_path / "run")[0])["options"]["lr"] == 0.5
    log = (tmp_path / "run/log.txt").read_text()
    assert re.search(r"^Changed  .*--batch=4 \(8 in the state\), --lr=0.5 ", log, re.M)
    free = ["--workers=1", "--cache=0", "--batch-gpu=2", "--tick=0.016", "--snap=3", "--keep=1",
            "--max-bad-steps=7", "--bench=0", "--samples=4", "--name=free"]
    assert invoke(train.main, *args, *free).exit_code == 0


@pytest.mark.long
def test_other_data_need_overriding_and_changed_data_are_refused(finished, dataset_zip, tmp_path,
                                                                 invoke):
    state = training_states(finished)[3]
    moved = tmp_path / "moved.zip"
    moved.write_bytes(dataset_zip.read_bytes())
    other = write_dataset(tmp_path / "other.zip", num=44)
    args = command(dataset_zip, tmp_path, f"--resume={state}")
    assert invoke(train.main, *args, f"--data={moved}", "--name=a").exit_code == 0
    line = error_of(invoke(train.main, *args, f"--data={other}", "--name=b"), 2)
    assert f"--data={other}" in line and "40 images then, 44 now" in line
    result = invoke(train.main, *args, f"--data={other}", "--name=b", "--override-options")
    assert result.exit_code == 0, result.output
    write_dataset(moved, num=44)  # under the same name
    args = [*command(moved, tmp_path), "--name=a", "--duration=1"]
    line = error_of(invoke(train.main, *args, "--resume=auto", "--override-options"), 1)
    assert "40 images then, 44 now" in line


# ---------------------------------------------------------------------------------- two runs


HOLD = ("import sys, time; from dnnlib.run_lock import run_lock\n"
        "with run_lock(sys.argv[1]): print('held', flush=True); time.sleep(600)")


@pytest.mark.long
def test_a_second_run_in_a_directory_is_told_who_is_there(finished, dataset_zip, tmp_path, invoke):
    import socket
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    state = training_states(finished)[-1]
    (run_dir / state.name).write_bytes(state.read_bytes())
    owner = subprocess.Popen([sys.executable, "-c", HOLD, run_dir], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE)
    assert owner.stdout.readline() == "held\n"
    before = sorted(path.name for path in run_dir.iterdir())
    for resume in (["--resume=auto"], [f"--resume={state}"]):
        line = error_of(invoke(train.main, *command(dataset_zip, tmp_path, *resume)), 1)
        assert f"in use by process {owner.pid} on {socket.gethostname()}" in line
    assert sorted(path.name for path in run_dir.iterdir()) == before
    owner.kill()
    owner.wait()
    result = invoke(train.main, *command(dataset_zip, tmp_path, "--resume=auto", steps=11))
    assert result.exit_code == 0, result.output


def test_a_lock_ends_with_its_owner_though_its_children_live(tmp_path):
    code = HOLD.replace("print(", "import os; os.fork() and print(")  # once there is a child
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, start_new_session=True)
    assert owner.stdout.readline() == "held\n"
    code = "import sys; from dnnlib.run_lock import run_lock\nwith run_lock(sys.argv[1]): pass"
    taker = [sys.executable, "-c", code, tmp_path]
    assert b"in use by process" in subprocess.run(taker, cwd=ROOT, capture_output=True).stderr
    owner.kill()
    owner.wait()
    assert subprocess.run(taker, cwd=ROOT, capture_output=True).returncode == 0
    os.killpg(owner.pid, signal.SIGKILL)


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(37, "No locks available")
    monkeypatch.setattr("fcntl.lockf", refuse)
    with run_lock(tmp_path):
        assert "can't be locked (No locks available)" in capsys.readouterr().err


def test_numbers_of_runs_that_start_together_are_all_different(tmp_path):
    made, start = [], threading.Barrier(8)

    def make(i):
        start.wait()
        for k in range(20):
            made.append(numbered_dir(tmp_path, f"run-{i}-{k}"))
    threads = [threading.Thread(target=make, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [int(path.name[:5]) for path in made]
    assert len(set(numbers)) == len(made) == 160
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in made}


def test_an_outdir_that_cannot_be_written_is_refused_before_the_data_are_opened(disk, invoke):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    line = error_of(invoke(train.main, *command("nowhere.zip", disk / "new")), 1)
    assert f"no permission to write in {disk}" in line


# ----------------------------------------------------------------------- divergence and memory


@pytest.mark.long
def test_divergence_names_step_loss_and_images_and_leaves_the_last_good_state(
        finished, dataset_zip, tmp_path, invoke):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    good = training_states(finished)[4]
    (run_dir / good.name).write_bytes(good.read_bytes())
    args = command(dataset_zip, tmp_path, "--resume=auto", "--override-options", "--lr=1e30",
                   "--tick=100", "--max-bad-steps=4", steps=100_000)
    line = error_of(invoke(train.main, *args), 3)
    # State of 6 steps; the 7th makes the weights huge, the 8th has no finite gradient.
    for words in ("5 steps in a row", "from step 7 (0.056 kimg", "its loss is ",
                  "the last good one was ", "data indices", "--max-bad-steps=4", "Lower --lr"):
        assert words in line, line
    number = float(line.split("last good one was ")[1].split(";")[0])
    assert math.isfinite(number)
    assert newest_state(run_dir) == (run_dir / good.name, [])
    assert (run_dir / good.name).read_bytes() == good.read_bytes()
    assert line in (run_dir / "log.txt").read_text()


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--batch-gpu"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--batch-gpu"),
    (MemoryError(), "--batch-gpu")])
def test_out_of_memory_suggests_smaller_batches(error, words, dataset_zip, tmp_path, invoke,
                                                monkeypatch):
    def fail(trainer):
        raise error
    monkeypatch.setattr(training_loop.Trainer, "train_step", fail)
    assert words in error_of(invoke(train.main, *command(dataset_zip, tmp_path)), 1)


@pytest.mark.scripts
@pytest.mark.slow
def test_memory_that_runs_out_is_one_line(dataset_zip, tmp_path):
    # Of a process by itself: this one may hold whatever other tests needed.
    code = "import training.training_loop; print(open('/proc/self/statm').read().split()[0])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, check=True,
                            capture_output=True)
    size = resource.getpagesize() * int(loaded.stdout)  # PyTorch's code, mostly

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * 2**30,) * 2)
    args = [arg for arg in command(dataset_zip, tmp_path) if not arg.startswith("--batch=")]
    done = subprocess.run([sys.executable, "train.py", *args, "--batch=200000"], cwd=ROOT,
                          text=True, capture_output=True, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: out of memory; use a smaller --batch-gpu"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.scripts
def test_a_killed_loader_worker_is_one_line(dataset_zip, tmp_path):
    script = Script("train.py", *command(dataset_zip, tmp_path, "--cache=0", "--workers=2",
                                         "--tick=1", steps=100_000), folder=tmp_path)
    script.wait_for("^tick 0 ")
    workers = wait_until(lambda: len(script.children()) >= 2 and script.children())
    os.kill(workers[0], signal.SIGKILL)
    assert script.wait() == 1
    [line] = script.errors
    assert "killed" in line.lower() and "--workers" in line and "Traceback" not in script.output
    script.assert_left_nothing(tmp_path)


# -------------------------------------------------------------------------- sampling and scores


@pytest.fixture(scope="module")
def network(finished):
    return next(finished.glob("network-snapshot-*.080.pt"))


def generate(network, outdir, *more, seeds="0-1999"):
    return ["generate.py", f"--network={network}", f"--outdir={outdir}", f"--seeds={seeds}",
            "--steps=2", "--batch=50", "--subdirs", "--device=cpu", *more]


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def images(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    script = run_to_end(*generate(network, folder / "all"), folder=folder)
    assert script.wait() == 0, script.output
    return folder / "all"


@pytest.mark.slow
@pytest.mark.scripts
def test_a_stop_while_sampling_keeps_the_images(network, tmp_path):
    script = Script(*generate(network, tmp_path / "out", seeds="0-99999"), folder=tmp_path)
    wait_until(lambda: len(list(tmp_path.rglob("*.png"))) > 100)
    script.signal(signal.SIGTERM)
    assert script.wait() == 143
    assert "Traceback" not in script.output
    script.assert_left_nothing(tmp_path)


@pytest.mark.slow
def test_generate_killed_and_started_again_makes_the_same_images(network, images, tmp_path):
    rng = np.random.default_rng(0)
    args = generate(network, tmp_path / "out")
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        done = len(list(tmp_path.rglob("*.png")))
        script = Script(*args, folder=tmp_path)
        wait_until(lambda done=done: len(list(tmp_path.rglob("*.png"))) > done + 100)
        time.sleep(rng.uniform(0, 0.3))
        script.signal(number)
        script.wait()
    last = run_to_end(*args, folder=tmp_path)
    assert last.wait() == 0 and "images are there" in last.output
    assert content(tmp_path / "out") == content(images)
    last.assert_left_nothing(tmp_path)


@pytest.mark.slow
def test_two_runs_of_generate_fill_one_folder(network, images, tmp_path):
    scripts = [Script(*generate(network, tmp_path / "out"), folder=tmp_path) for _ in range(2)]
    assert [script.wait() for script in scripts] == [0, 0], scripts[0].output + scripts[1].output
    assert content(tmp_path / "out") == content(images)
    others = [Script(*generate(network, tmp_path / "other", f"--rho={rho}"), folder=tmp_path)
              for rho in (7, 5)]
    assert sorted(script.wait() for script in others) == [0, 1]
    assert any("another setting" in str(script.errors) for script in others)
    for script in scripts + others:
        script.assert_left_nothing(tmp_path)


@pytest.mark.slow
def test_scores_killed_and_started_again_are_the_same(images, dataset_zip, tmp_path):
    def calc(name):
        return ["fid.py", "calc", f"--images={images}", f"--ref={dataset_zip}", "--num=2000",
                "--detector=pixels", "--device=cpu", "--workers=1", "--batch=1",
                f"--out={tmp_path / name}.jsonl"]

    assert run_to_end(*calc("whole"), folder=tmp_path).wait() == 0
    for delay, number in ((1, signal.SIGKILL), (2.5, signal.SIGTERM), (3, signal.SIGKILL)):
        script = Script(*calc("killed"), folder=tmp_path)
        time.sleep(delay)
        script.signal_group(number)
        code = script.wait()
        # A script that still imports its modules dies of SIGTERM itself.
        assert code in (-signal.SIGKILL, -signal.SIGTERM, 143, 0)
        assert "Traceback" not in script.output
        script.assert_left_nothing(tmp_path)
    assert run_to_end(*calc("killed"), folder=tmp_path).wait() == 0
    scores = [json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[-1])["value"]
              for name in ("whole", "killed")]
    assert scores[0] == scores[1]


# ------------------------------------------------------------------------- the tests themselves


@pytest.mark.slow
def test_scripts_end_with_the_tests_that_started_them(tmp_path):
    """Ranks, their loader processes and torchrun: each has a session of its own."""
    nested = tmp_path / "nested"

    def scripts():
        return [pid for pid, line in processes().items()
                if str(nested) in line and "train.py" in line]

    tests = Script("-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={nested}", "-k",
                   "one_rank_told_to_stop", "tests/training/test_preemption.py", folder=tmp_path)
    wait_until(lambda: tests.process.poll() is not None or len(scripts()) == 7)
    assert tests.process.poll() is None, tests.output
    tests.signal(signal.SIGKILL)
    wait_until(lambda: not scripts(), 10)


# ------------------------------------------------------------------------ hostile and lost files


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A checkpoint that would run a command, one as a ZIP, and one that claims petabytes."""
    folder = tmp_path_factory.mktemp("hostile")

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'canary'}",)
    paths = [folder / name for name in ("plain.pkl", "zip.pt", "bomb.pkl")]
    paths[0].write_bytes(pickle.dumps({"ema": Command()}))
    torch.save({"format": "pfgmpp-training-state", "net": Command()}, paths[1])
    paths[2].write_bytes(b"\x80\x04\x8e" + (2**50).to_bytes(8, "little"))
    yield paths
    assert not (folder / "canary").exists()


@pytest.mark.scripts
@pytest.mark.parametrize("which, asked", [
    (0, "asks for 'posix.system'"),
    pytest.param(1, "asks for 'posix.system'", marks=pytest.mark.slow),
    pytest.param(2, "bomb.pkl: ", marks=pytest.mark.slow)])
def test_hostile_checkpoints_are_refused_by_every_script(which, asked, hostile, dataset_zip,
                                                         tmp_path, invoke):
    path = hostile[which]
    for flag in ("--resume", "--transfer"):
        line = error_of(invoke(train.main, *command(dataset_zip, tmp_path, f"{flag}={path}")), 1)
        assert asked in line and str(path) in line
    line = error_of(invoke(fid.main, "gen", f"--network={path}", f"--ref={dataset_zip}",
                           "--detector=pixels", "--seeds=0-9", "--device=cpu"), 1)
    assert asked in line
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    script = run_to_end(*generate(path, tmp_path / "out"), folder=tmp_path)
    assert script.wait() == 1
    # Seconds of its own, most of them for starting.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    assert asked in script.output and script.output.count("\n") == 1


@pytest.mark.parametrize("members, words", [
    ({"mu": np.array([None])}, "mu has type object, expected floats"),
    ({"mu": np.array([0, np.nan])}, "not finite"), ({"mu": np.zeros(3)}, "mu has shape [3]")])
def test_statistics_that_are_none_end_a_score(members, words, dataset_zip, tmp_path, invoke):
    np.savez(tmp_path / "ref.npz", **{"mu": np.zeros(2), "sigma": np.eye(2), **members})
    line = error_of(invoke(fid.main, "calc", f"--images={dataset_zip}", "--num=9",
                           f"--ref={tmp_path / 'ref.npz'}", "--detector=pixels"), 1)
    assert words in line and "ref.npz" in line


@pytest.fixture
def address(network, tmp_path):
    """Serves the network, and a page of words."""
    import functools
    import http.server
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "network.pt").write_bytes(network.read_bytes())
    (folder / "page.pt").write_text("<!DOCTYPE html><p>Sign in")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.long
@pytest.mark.parametrize("name, words", [
    ("page.pt", "returned a web page"), ("none.pt", "404"), (None, "refused"),
    ("network.pt#sha256:" + 64 * "0", "expected 0000")])
def test_an_address_without_the_network_is_one_line_and_leaves_the_cache(name, words, address,
                                                                         tmp_path, invoke,
                                                                         monkeypatch):
    monkeypatch.setenv("PFGMPP_CACHE_DIR", str(tmp_path / "cache"))
    url = f"{address}/{name}" if name else "http://127.0.0.1:9/network.pt"
    args = [f"--outdir={tmp_path / 'out'}", "--seeds=0-1", "--steps=1", "--device=cpu"]
    assert words in error_of(invoke(generate_main, f"--network={url}", *args), 1)
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    result = invoke(generate_main, f"--network={address}/network.pt", *args)
    assert result.exit_code == 0, result.output


def test_a_time_limit_that_is_none_is_one_line(monkeypatch):
    for text in ("soon", "inf", "nan", "0", "-3", "1e300"):
        monkeypatch.setenv(distributed.TIMEOUT_ENV, text)
        with pytest.raises(ValueError, match=f"PFGMPP_TIMEOUT={text}: must be a number"):
            distributed._step_timeout()


# -------------------------------------------------------------------------------- dependencies


def test_the_reasons_name_options_of_the_command():
    flags = {option.name for option in (*train.main.params, *distill.main.params)}
    renamed = {"compile": "compile_"}
    assert {renamed.get(name, name) for name in RESUME_MAY_CHANGE} <= flags
