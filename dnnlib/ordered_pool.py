"""Maps a function over many items in several processes: results in order, a bounded look-ahead.

Items are sent in chunks that grow as long as they are quick to do, so that tiny images don't wait
for the pipes between processes and large ones don't pile up.
"""

import collections
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from dnnlib import signals

T = TypeVar("T")
R = TypeVar("R")

_CHUNK_SEC = 0.02  # what a chunk should take
_MAX_CHUNK = 64
_WINDOW = 4  # chunks in flight per worker


def num_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yields function(item) in the order of the items, computed by `workers` processes.

    With one worker everything happens in this process. Errors of `function` are raised here.

    Raises:
        OSError: a worker was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    items = iter(items)
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    pending, size = collections.deque(), 1
    try:
        while True:
            if chunk := list(itertools.islice(items, size)):
                pending.append(pool.submit(_run, function, chunk))
            elif not pending:
                return
            if not chunk or len(pending) > _WINDOW * workers:
                results, seconds = pending.popleft().result()
                size = _next_size(size, len(results), seconds)
                yield from results
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed, perhaps because memory ran out; "
                      "try --workers=1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _next_size(size: int, num: int, seconds: float) -> int:
    """Returns the size of the next chunk, given that `num` items took `seconds`."""
    fitting = int(num * _CHUNK_SEC / max(seconds, 1e-9))
    return min(max(fitting, 1), 2 * size, _MAX_CHUNK)


def _run(function: Callable[[T], R], chunk: list[T]) -> tuple[list[R], float]:
    start = time.perf_counter()
    return [function(item) for item in chunk], time.perf_counter() - start


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent and makes this process end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.end_with_parent()
