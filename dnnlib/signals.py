"""How a script handles SIGTERM, SIGINT and SIGUSR1, with which clusters and people stop it.

    outside `deferred()`    `Stopped` is raised where the main thread is: temporary files are
                            removed, worker processes ended
    inside                  the signal is remembered; whoever deferred it asks `requested()`
    a second signal         ends the process at once

torchrun passes on signals that a cluster's scheduler may already have sent to every process. So the
same stop can come twice, and signals within GRACE_SEC of the first count as the same one.

A process is not notified when its torchrun is killed, so it watches for that. It then stops as at
SIGTERM, and ends at once if it still runs LAUNCHER_SEC later, as torchrun would have ended it.
"""

import contextlib
import multiprocessing.process
import os
import signal
import threading
import time
from collections.abc import Iterator

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
if hasattr(signal, "SIGUSR1"):  # Windows has none
    EXIT_CODES[signal.SIGUSR1] = 143
GRACE_SEC = 2.0
LAUNCHER_SEC = 30.0  # torchrun's own patience, unless $TORCH_ELASTIC_SHUTDOWN_TIMEOUT says more
_POLL_SEC = 0.5


class Stopped(SystemExit):
    """A signal asked this process to stop; `code` is the exit code."""


_requested: int | None = None  # the exit code of the first signal
_is_deferred = _was_raised = False


def install() -> None:
    """Handles these signals; call it once, in the main thread, before anything slow."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in EXIT_CODES:
        signal.signal(number, _handle)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch_launcher, args=(os.getppid(),), daemon=True).start()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)


def end_with_parent() -> None:
    """Makes this child process of multiprocessing end with its parent, even if that is killed.

    Otherwise a child and its siblings could wait for each other to receive data forever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def requested() -> int | None:
    """Returns the exit code of the signal that has come, None if none has."""
    return _requested


def raise_again() -> None:
    """Raises `Stopped` if it was raised before: later errors only follow from it."""
    if _was_raised:
        raise Stopped(_requested)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only remembers signals inside the block."""
    with _deferring(True):
        yield


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Lets signals, even an earlier one, raise `Stopped` inside a block within `deferred()`."""
    with _deferring(False):
        if _requested is not None:
            raise Stopped(_requested)
        yield


@contextlib.contextmanager
def _deferring(value: bool) -> Iterator[None]:
    global _is_deferred
    before, _is_deferred = _is_deferred, value
    try:
        yield
    finally:
        _is_deferred = before


def _handle(number: int, frame) -> None:
    global _requested, _was_raised
    if _requested is not None:
        return  # `_watch` handles it
    _requested = EXIT_CODES[number]
    if not _is_deferred:
        _was_raised = True
        raise Stopped(_requested)


def _watch(reader: int) -> None:
    """Ends the process at a second signal, wherever the main thread is: it may be stuck in C."""
    first = None
    while True:
        for number in os.read(reader, 64):
            if number not in EXIT_CODES:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first > GRACE_SEC:
                os._exit(EXIT_CODES[number])


def _watch_launcher(launcher: int) -> None:
    """Ends the process when torchrun is gone: an orphan would train on and hold the run's lock."""
    while os.getppid() == launcher:
        time.sleep(_POLL_SEC)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_patience_sec())
    os._exit(EXIT_CODES[signal.SIGTERM])


def _patience_sec() -> float:
    try:
        return max(float(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]), LAUNCHER_SEC)
    except (KeyError, ValueError):
        return LAUNCHER_SEC


def _forget() -> None:
    """Restores default signal handling in a forked child: only its parent stops cleanly."""
    signal.set_wakeup_fd(-1)
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_DFL)
