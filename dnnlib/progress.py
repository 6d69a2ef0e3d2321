"""Progress of long work: a bar on a terminal, lines in files, and a warning if it gets slow.

If stdout is a file or a pipe, a line is printed at least every LINE_SEC seconds. On a terminal
there is a bar, and the lines go to the log file if there is one. A thread writes the lines, so that
they also come while a single step takes minutes. If work is nested, only the innermost is reported.
No more than LINE_SEC pass without a line, even from one piece of work to the next.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import ClassVar, TypeVar

from dnnlib import console

T = TypeVar("T")

LINE_SEC = 15.0
FIRST_LINE_SEC = 3.0  # for work before training: users should soon see what they wait for
_LOOK_SEC = 1.0  # how often a stage is redrawn on a terminal, and the innermost work looked up
_COLLAPSED = 1 / 3  # of the best speed so far
_END_SEC = 1.0  # how long to wait for a line that is being written when the work ends
_WAY_OUT = ("Other programs may be using the processor, which slows down threads that wait for "
            "each other: end those programs, or start again with fewer threads, such as "
            "OMP_NUM_THREADS=1")


class Progress:
    """Counts what is done of `total`; shown on rank 0 only, and only inside a `with` block.

    Args:
        total: how many there are.
        title: what is being done; begins the bar and the lines.
        initial: how many are done already.
        unit: unit of the numbers.
        is_scaled: whether to show numbers as 1.2k and 3.4M.
        is_shown: whether to show anything.
        delay: seconds before the bar appears.
        watch_speed: whether to warn, once, when the speed collapses.
        first_line_sec: seconds before the first line; None means LINE_SEC.
        is_stage: whether to show the elapsed time instead of counting.
    """

    _open: ClassVar[list["Progress"]] = []
    _last_line: ClassVar[float] = -math.inf  # when anything wrote one

    def __init__(self, total: int | None, title: str = "", *, initial: int = 0, unit: str = "img",
                 is_scaled: bool = False, is_shown: bool = True, delay: float = 0.0,
                 watch_speed: bool = False, first_line_sec: float | None = None,
                 is_stage: bool = False):
        from tqdm import tqdm  # late: --help does not need it

        self._bar = tqdm(total=total, initial=initial, desc=title or None, unit=unit, leave=False,
                         unit_scale=is_scaled, delay=delay,
                         bar_format="{desc}: {elapsed}" if is_stage else None,
                         disable=console.bar_disabled() if is_shown else True)
        self._total, self._title, self._unit, self._is_scaled = total, title, unit, is_scaled
        self._done = initial
        self._is_shown = is_shown and console.is_rank0()
        self._watches_speed = watch_speed and self._is_shown
        self._rate = self._best_rate = self._window_sec = 0.0
        self._window_count = 0
        self._is_stage = is_stage
        self._note = ""
        self._other, self._other_sec = "", None  # what `set_other_work` said
        self._start = self._last_update = time.monotonic()
        self._first_line = self._start + (LINE_SEC if first_line_sec is None else first_line_sec)
        self._has_line = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_lines, daemon=True)

    def __enter__(self) -> "Progress":
        if not self._open and time.monotonic() > Progress._last_line + LINE_SEC:
            Progress._last_line = time.monotonic()  # there was nothing to report before
        self._open.append(self)
        if self._is_shown:
            self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._ended.set()
        self._open.remove(self)
        if self._thread.is_alive():
            self._thread.join(_END_SEC)
        self._bar.close()

    def update(self, count: int = 1) -> None:
        """Counts `count` more as done."""
        self._done += count
        self._bar.update(count)
        self._measure_speed(count)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items, each counted when the next one is asked for."""
        for item in items:
            yield item
            self.update()

    @contextlib.contextmanager
    def above_bar(self) -> Iterator[None]:
        """Lets lines be printed inside the block without breaking the bar."""
        with self._bar.external_write_mode():
            yield
        sys.stdout.flush()
        Progress._last_line = time.monotonic()
        self._has_line = True

    def set_note(self, text: str) -> None:
        """Shows `text` at the end of the bar."""
        self._note = text
        self._show_note()

    def _show_note(self) -> None:
        more = self._other and f"plus {self._other}"
        self._bar.set_postfix_str(", ".join(filter(None, (self._note, more))), refresh=False)

    def set_other_work(self, name: str, count: int, sec_each: float | None) -> None:
        """Adds work to the time left that comes between what is counted, such as evaluations.

        Without `sec_each`, the lines only name it.
        """
        each = "" if sec_each is None else f" of {self._bar.format_interval(sec_each)}"
        self._other = f"{count} {name if count == 1 else f'{name}s'}{each}" if count else ""
        self._other_sec = None if sec_each is None else count * sec_each
        self._show_note()

    def restart_clock(self) -> None:
        """Leaves the time since the last update, which other work took, out of the speed."""
        self._last_update = time.monotonic()

    def _write_lines(self) -> None:
        """Writes a line whenever none has been written for LINE_SEC, the first one sooner."""
        while not self._ended.wait(self._pause_sec()):
            if self._open[-1:] != [self]:
                continue
            try:
                if self._is_stage and time.monotonic() > self._first_line:
                    self._bar.refresh()
                if time.monotonic() >= self._due():
                    Progress._last_line = time.monotonic()
                    self._has_line = True
                    with self._bar.get_lock():
                        console.print_to_files(self._line())
            except (OSError, ValueError):  # there is no reader, or it can't take these characters
                return

    def _pause_sec(self) -> float:
        if self._open[-1:] != [self]:  # its line may be long due, but another's is shown
            return _LOOK_SEC
        return min(max(self._due() - time.monotonic(), 0.01), _LOOK_SEC)

    def _due(self) -> float:
        """Returns when the next line is due."""
        due = Progress._last_line + LINE_SEC
        return due if self._has_line else min(due, self._first_line)

    def _line(self) -> str:
        if self._is_stage:
            return f"{self._title}: {time.monotonic() - self._start:.0f} s so far"
        # Until a window is complete, it uses what there is: the first step may have taken longer.
        rate = self._rate or self._window_count / max(self._window_sec, 1e-9)
        parts = [f"{self._number(self._done)} {self._unit}"]
        if self._total is not None:
            parts = [f"{self._number(self._done)} of {self._number(self._total)} {self._unit}"]
        if rate:
            parts.append(f"{rate:.3g} {self._unit}/s")
            if self._total is not None:
                parts.append(self._time_left(max(self._total - self._done, 0) / rate))
        return (f"{self._title}: " if self._title else "") + ", ".join(parts)

    def _time_left(self, sec: float) -> str:
        if not self._other:
            return f"{self._bar.format_interval(sec)} left"
        if self._other_sec is None:
            return f"{self._bar.format_interval(sec)} and {self._other} left"
        return f"{self._bar.format_interval(sec + self._other_sec)} left with {self._other}"

    def _number(self, value: int) -> str:
        return self._bar.format_sizeof(value) if self._is_scaled else str(value)

    def _measure_speed(self, count: int) -> None:
        """Measures the speed over the last LINE_SEC of work; warns, once, if it has collapsed."""
        now = time.monotonic()
        self._window_count += count
        self._window_sec += now - self._last_update
        self._last_update = now
        if self._window_sec < LINE_SEC:
            return
        self._rate = self._window_count / self._window_sec
        self._window_count, self._window_sec = 0, 0.0
        if self._watches_speed and self._rate < _COLLAPSED * self._best_rate:
            self._watches_speed = False
            with self.above_bar():
                print(f"Warning: down to {self._rate:.3g} {self._unit}/s from "
                      f"{self._best_rate:.3g}. {_WAY_OUT}", file=sys.stderr, flush=True)
        self._best_rate = max(self._best_rate, self._rate)


def stage(title: str) -> Progress:
    """Returns the progress of work that can't be counted, such as reading the list of a ZIP.

    It shows the elapsed time: in a line after FIRST_LINE_SEC and then every LINE_SEC, or on a
    terminal in place of a bar.
    """
    return Progress(None, title, delay=math.inf, first_line_sec=FIRST_LINE_SEC, is_stage=True)
