"""Files that are complete or not there: what is asked of the system, in which order."""

import fcntl
import multiprocessing
import os
import time

import pytest

from dnnlib.atomic import append_line, atomic_write, write_json
from dnnlib.run_lock import LOCK_NAME, run_lock


class Calls:
    """Records, in order, what a disk has to be told about files, by the names they have then."""

    def __init__(self, monkeypatch):
        self.found = []
        for name in ("fsync", "replace", "link", "unlink"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name, function):
        def recorded(*args, **kwargs):
            if name == "fsync":
                path = os.readlink(f"/proc/self/fd/{args[0]}")
                self.found.append(("fsync", os.path.basename(path)))
            else:
                self.found.append((name, *(os.path.basename(arg) for arg in args)))
            return function(*args, **kwargs)
        return recorded


@pytest.mark.parametrize("replace", [True, False])
def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_the_end(
        tmp_path, monkeypatch, replace):
    folder = tmp_path / "run"
    folder.mkdir()
    calls = Calls(monkeypatch)
    with atomic_write(folder / "x.pt", replace=replace) as file:
        file.write(b"content")
        tmp = os.path.basename(file.name)
        assert not calls.found
    naming = [("replace", tmp, "x.pt")] if replace else [("link", tmp, "x.pt"), ("unlink", tmp)]
    # pathlib may remove a file by another function of os than the one that is watched.
    found = [call for call in calls.found if call != ("unlink", tmp) or not replace]
    assert [call for call in found if call[0] != "unlink"] == [
        ("fsync", tmp), naming[0], ("fsync", "run")]
    assert sorted(path.name for path in folder.iterdir()) == ["x.pt"]


def test_a_file_that_may_be_lost_waits_for_no_disk(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    with atomic_write(tmp_path / "x.png", sync=False) as file:
        file.write(b"content")
    assert not [call for call in calls.found if call[0] == "fsync"]


def test_json_is_synced_like_any_file(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    write_json(tmp_path / "x.json", {"a": 1})
    assert [call[0] for call in calls.found].count("fsync") == 2


def _append(path, lines, start):
    start.wait()
    for line in lines:
        append_line(path, line)


def test_lines_of_many_processes_stay_whole(tmp_path):
    """The lock is what keeps one process from cutting off what another is about to end."""
    path = tmp_path / "metrics.jsonl"
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=_append, args=(
        path, [f"{i} {k} " + "x" * 5000 for k in range(60)], start)) for i in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    lines = path.read_text().splitlines()
    assert sorted(line[:-5000] for line in lines) == sorted(
        f"{i} {k} " for i in range(4) for k in range(60))


def test_a_line_waits_for_the_process_that_is_writing_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    context = multiprocessing.get_context("fork")
    start = context.Event()
    start.set()
    with open(path, "a+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write(b"the beginning")
        file.flush()
        process = context.Process(target=_append, args=(path, ["second"], start))
        process.start()
        time.sleep(0.3)
        assert process.is_alive()
        file.write(b" and the end\n")
    process.join()
    assert path.read_text() == "the beginning and the end\nsecond\n"


def test_the_lock_names_its_owner_and_nothing_of_an_earlier_one(tmp_path):
    (tmp_path / LOCK_NAME).write_text("process 1234567 on a.machine.with.a.very.long.name\n" * 2)
    with run_lock(tmp_path):
        owner = (tmp_path / LOCK_NAME).read_text()
    assert owner.splitlines() == [f"process {os.getpid()} on {os.uname().nodename}"]
