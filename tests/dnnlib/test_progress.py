"""Progress: lines in files every LINE_SEC, a bar on terminals, a word when it gets slow."""

import io
import re
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from dnnlib import console, progress
from dnnlib.progress import Progress
from dnnlib.util import Logger


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stdout(monkeypatch):
    def make(stream):
        monkeypatch.setattr(sys, "stdout", stream)
        return stream
    monkeypatch.setattr(progress, "LINE_SEC", 0.05)
    return make


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_lines_come_while_nothing_is_done(stdout):
    out = stdout(io.StringIO())
    with Progress(10, "Packing", initial=4) as bar:
        assert wait_for(lambda: out.getvalue().count("Packing: 4 of 10 img\n") >= 2)
        bar.update(3)
        assert wait_for(lambda: "Packing: 7 of 10 img, " in out.getvalue())
    assert " img/s, " in out.getvalue() and out.getvalue().rstrip().endswith(" left")
    said = out.getvalue()
    time.sleep(0.2)
    assert out.getvalue() == said  # nothing after the end


def test_a_line_of_the_program_puts_off_the_next(stdout, monkeypatch):
    out = stdout(io.StringIO())
    monkeypatch.setattr(progress, "LINE_SEC", 60.0)
    with Progress(10) as bar:
        with bar.above_bar():
            print("tick 0")
        time.sleep(0.1)
    assert out.getvalue() == "tick 0\n"


def test_on_a_terminal_lines_go_to_the_log_only(stdout, tmp_path, monkeypatch):
    terminal = stdout(Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Logger(tmp_path / "log.txt"), Progress(3, "Training"):
        assert wait_for(lambda: "Training: 0 of 3 img" in (tmp_path / "log.txt").read_text())
    assert "0 of 3 img\n" not in terminal.getvalue()


@pytest.mark.parametrize("rank, quiet", [("1", False), ("0", True)])
def test_other_ranks_and_quiet_runs_say_nothing(rank, quiet, stdout, monkeypatch):
    out = stdout(io.StringIO())
    monkeypatch.setenv("RANK", rank)
    with console.speaking(quiet=quiet, verbose=False), Progress(3):
        time.sleep(0.2)
    assert out.getvalue() == ""


def test_every_item_is_counted_and_no_thread_is_left():
    before = threading.active_count()
    with Progress(3) as bar:
        assert list(bar.over("abc")) == ["a", "b", "c"] and bar._done == 3
    assert threading.active_count() == before


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.delenv("RANK", raising=False)

    def work(self, bar, steps, sec):
        for _ in range(steps):
            self.now += sec
            bar.update(64)


def test_a_collapse_of_the_speed_is_told_once_with_the_way_out(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    bar = Progress(10**6, watch_speed=True)
    clock.work(bar, 60, 0.4)   # 160 img/s
    clock.work(bar, 30, 1.0)   # 64 img/s: more than a third
    assert capsys.readouterr().err == ""
    clock.work(bar, 10, 8.0)   # 8 img/s, but for the rest of the window before
    err = capsys.readouterr().err
    assert re.match(r"Warning: down to \d+ img/s from 160\. ", err) and "OMP_NUM_THREADS=1" in err
    assert err.count("Warning") == 1 and err.endswith("\n")


def test_other_work_between_updates_is_no_collapse(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    bar = Progress(10**6, watch_speed=True)
    for _ in range(5):
        clock.work(bar, 40, 0.4)
        clock.now += 1000.0  # a score
        bar.restart_clock()
    assert capsys.readouterr().err == ""


def test_nothing_is_told_without_being_asked_for(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    bar = Progress(10**6)
    clock.work(bar, 40, 0.4)
    clock.work(bar, 10, 8.0)
    assert capsys.readouterr().err == ""


def test_the_speed_and_what_is_left_are_those_of_the_last_work(monkeypatch):
    clock = Clock(monkeypatch)
    bar = Progress(64 * 1000, "Training")
    clock.work(bar, 1, 500.0)  # compiling
    clock.now += 3600.0  # a score
    bar.restart_clock()
    clock.work(bar, 99, 0.5)
    assert bar._line() == "Training: 6400 of 64000 img, 128 img/s, 07:30 left"


def test_the_time_left_includes_evaluations_and_never_falls_below_zero(monkeypatch):
    clock = Clock(monkeypatch)
    bar = Progress(64 * 1000, "Training")
    clock.work(bar, 100, 0.5)
    bar.set_other_work("evaluation", 4, None)
    assert bar._line().endswith("128 img/s, 07:30 and 4 evaluations left")
    bar.set_note("loss 0.5")
    assert bar._bar.postfix == "loss 0.5, plus 4 evaluations"
    bar.set_other_work("evaluation", 3, 65.0)
    assert bar._bar.postfix == "loss 0.5, plus 3 evaluations of 01:05"
    assert bar._line().endswith("128 img/s, 10:45 left with 3 evaluations of 01:05")
    clock.work(bar, 901, 0.5)
    bar.set_other_work("evaluation", 1, 65.0)
    assert bar._line().endswith("128 img/s, 01:05 left with 1 evaluation of 01:05")
    bar.set_other_work("evaluation", 0, 65.0)
    assert bar._line().endswith("64064 of 64000 img, 128 img/s, 00:00 left")


def test_work_within_work_is_the_one_that_is_told(stdout):
    out = stdout(io.StringIO())
    with Progress(8, "outer"):
        with Progress(8, "inner"):
            assert wait_for(lambda: out.getvalue().count("inner: 0 of 8 img\n") > 3)
            assert out.getvalue().count("outer") <= 1
        assert wait_for(lambda: "outer: 0 of 8 img\n" in out.getvalue())


def test_work_that_waits_for_other_work_inside_it_looks_once_a_second(stdout):
    """Its first line has long been due, and is not its own to write."""
    stdout(io.StringIO())
    with Progress(None, "outer", first_line_sec=0.0) as outer:
        time.sleep(0.01)
        assert outer._pause_sec() < 0.1
        with Progress(8, "inner"):
            assert outer._pause_sec() == 1.0


def test_a_stage_tells_soon_what_is_done_and_then_how_long_it_has_taken(stdout, monkeypatch):
    out = stdout(io.StringIO())
    monkeypatch.setattr(progress, "LINE_SEC", 60.0)
    monkeypatch.setattr(progress, "FIRST_LINE_SEC", 0.05)
    with progress.stage("Opening a.zip"):
        assert wait_for(lambda: out.getvalue() == "Opening a.zip: 0 s so far\n")
        time.sleep(0.2)
    assert out.getvalue().count("\n") == 1


def test_a_stage_is_shown_on_a_terminal_although_nothing_is_counted(stdout, monkeypatch):
    stdout(Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "FIRST_LINE_SEC", 0.0)
    with progress.stage("Opening a.zip"):
        assert wait_for(lambda: "Opening a.zip: 00:" in sys.stderr.getvalue())


@pytest.mark.long
def test_no_silence_is_longer_where_one_work_follows_another(stdout, monkeypatch):
    times = []

    class Lines(io.StringIO):
        def write(self, text):
            times.append(time.monotonic())
            return super().write(text)

    stdout(Lines())
    monkeypatch.setattr(progress, "LINE_SEC", 1.0)
    monkeypatch.setattr(progress, "_LOOK_SEC", 0.01)
    start = time.monotonic()
    with Progress(None, "outer"):
        for _ in range(5):  # each would say nothing by itself
            with Progress(8, "inner"):
                time.sleep(0.7)
    gaps = [b - a for a, b in zip([start, *times], [*times, time.monotonic()], strict=True)]
    assert len(times) >= 3 and max(gaps) < 1.5


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.long
@pytest.mark.parametrize("stream", [
    None, Broken(BrokenPipeError()), Broken(OSError(28, "No space left on device")),
    Broken(UnicodeEncodeError("ascii", "\u00fc", 0, 1, "not in range"))])
def test_a_console_that_takes_no_lines_does_not_stop_the_work(stdout, stream, monkeypatch):
    stdout(stream)
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with Progress(3, "\u00fc") as bar:
        time.sleep(0.3)
        bar.update(3)
    assert not failed and bar._done == 3


def test_lines_are_written_whole(stdout):
    class Writes(io.StringIO):
        def write(self, text):
            assert text.endswith("\n")
            return super().write(text)

    out = stdout(Writes())
    with Progress(3):
        assert wait_for(lambda: out.getvalue().count("0 of 3 img\n") > 2)
