"""How much a script prints: by default, with --quiet and with --verbose.

    stdout    progress and results; --quiet drops everything but `result`
    stderr    warnings and errors, always; progress bars on a terminal, unless --quiet

Under torchrun, only rank 0 prints. For errors of other ranks see dnnlib/cli.py.
"""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from typing import IO

_console: IO[str] | None = None  # the real stdout, while --quiet replaces it
_is_verbose = False


class _Silent(io.TextIOBase):
    """A stream that drops everything."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def speaking(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Makes the script print less or more inside the block."""
    global _console, _is_verbose
    before = sys.stdout, _console, _is_verbose
    _is_verbose = verbose
    if quiet:
        _console, sys.stdout = sys.stdout, _Silent()
    try:
        yield
    finally:
        sys.stdout, _console, _is_verbose = before


def is_verbose() -> bool:
    """Says whether the user asked for details, on every rank."""
    return _is_verbose


def is_quiet() -> bool:
    """Says whether the user asked for only results, warnings and errors, on every rank."""
    return _console is not None


def is_rank0() -> bool:
    """Says whether this process prints: the only one, or the first that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def result(text: str) -> None:
    """Prints a result, even with --quiet; only rank 0 may call it."""
    print(text, flush=True)  # a log gets it from here
    if _console is not None:
        with contextlib.suppress(OSError):  # its reader has gone: the run continues
            print(text, file=_console, flush=True)


def detail(text: str) -> None:
    """Prints a line on rank 0 with --verbose."""
    if _is_verbose and is_rank0():
        print(text, flush=True)


def say(text: str) -> None:
    """Prints a line without failing if the reader of stdout has gone."""
    try:
        print(text, flush=True)
    except OSError:  # what is left in the buffer would fail again, at exit at the latest
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def print_to_files(text: str) -> None:
    """Prints a line if stdout is a file or a pipe; on a terminal, it only goes to the log."""
    if sys.stdout is None:
        return
    if not sys.stdout.isatty():
        sys.stdout.write(text + "\n")  # in one piece, so that no other line comes between
        sys.stdout.flush()
    elif write_log := getattr(sys.stdout, "write_log", None):
        write_log(text + "\n")


def bar_disabled() -> bool | None:
    """Returns tqdm's `disable`: bars are shown on a terminal, on rank 0, without --quiet."""
    return None if is_rank0() and not is_quiet() else True


@contextlib.contextmanager
def timed(title: str) -> Iterator[None]:
    """Prints with --verbose how long the block took."""
    start = time.perf_counter()
    yield
    detail(f"Time       {title}: {time.perf_counter() - start:.2f} s")
