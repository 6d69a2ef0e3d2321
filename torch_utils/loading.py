"""Batches read ahead of their use, in order: by processes or by threads.

Processes suit sources that decode. Threads suit sources in memory or in mapped files, where the
work is copying, which lets other threads run: nothing crosses a process boundary, and a batch takes
a tenth of the time.

Processes send arrays through a pipe. PyTorch would send tensors through files in /dev/shm, which
holds 64 MiB in a container by default, and a batch that finds no room there is never delivered.

Worker processes ignore SIGINT, SIGTERM and SIGUSR1 and leave them to their parent: a signal to the
whole group must not take away the data of a step that has yet to finish. They end when the parent
has ended, for whatever reason.
"""

import collections
import functools
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch.utils.data

from dnnlib import signals

T = TypeVar("T")
_END_SEC = 0.5  # how long to wait until a worker whose connection is lost has ended
_AHEAD = 2  # batches that are ready or being read, per process or thread


class Batched(Protocol):
    """What can be read in batches; `images.dataset.ImageFolderDataset` can."""

    def get_batch(self, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Returns arrays whose first axis runs over `indices`."""


class Timed(Generic[T]):
    """An iterator that measures how long its user waits for it."""

    def __init__(self, items: Iterator[T]):
        self._items, self._sec = items, 0.0

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        start = time.perf_counter()
        item = next(self._items)
        self._sec += time.perf_counter() - start
        return item

    def take_sec(self) -> float:
        """Returns the seconds that its user has waited since the previous call."""
        sec, self._sec = self._sec, 0.0
        return sec


def read_in_processes(source: Batched, batches: Iterable[Sequence[int]], *, workers: int,
                      pin_memory: bool = False) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields `source.get_batch(indices)` as tensors for each list of indices, in order.

    Close the iterator, or drop it, to end the processes.

    Args:
        source: where to read; each process has a copy of it.
        batches: lists of indices; may be endless.
        workers: how many processes; 0 reads in this one, on demand.
        pin_memory: whether to put the tensors where a GPU can fetch them asynchronously.

    Raises:
        ValueError: as `source.get_batch` raises it.
        OSError: likewise.
        RuntimeError: a process was killed; `dnnlib.cli.user_errors` turns it into one line.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader = iter(torch.utils.data.DataLoader(
            _BatchReader(source), sampler=batches, batch_size=None, num_workers=workers,
            prefetch_factor=_AHEAD if workers else None, collate_fn=_unchanged,
            worker_init_fn=_start_worker))
    try:
        while (batch := _next_batch(loader)) is not None:
            if isinstance(batch, Exception):
                raise batch
            yield _tensors(batch, pin_memory)
    finally:
        # Not left to the freeing of the loader: an error's traceback may keep it until the process
        # ends, which would then wait forever for workers that ignore signals.
        if workers:
            loader._shutdown_workers()


def _unchanged(batch: T) -> T:
    return batch


def _tensors(arrays: tuple[np.ndarray, ...], pin_memory: bool) -> tuple[torch.Tensor, ...]:
    tensors = tuple(map(torch.from_numpy, arrays))
    return tuple(tensor.pin_memory() for tensor in tensors) if pin_memory else tensors


def _next_batch(loader: Iterator) -> tuple[np.ndarray, ...] | Exception | None:
    """Returns the next batch, or the error of reading it; None after the last."""
    try:
        return next(loader, None)
    except (OSError, EOFError) as error:  # a worker ended while it was sending a batch
        for worker in getattr(loader, "_workers", ()):
            worker.join(_END_SEC)
            if worker.exitcode:
                # What PyTorch says of a worker that ends at any other time.
                name = signal.strsignal(-worker.exitcode) if worker.exitcode < 0 else "none"
                raise RuntimeError(f"DataLoader worker (pid {worker.pid}) is killed by signal: "
                                   f"{name}. ") from error
        raise


class _BatchReader(torch.utils.data.Dataset):
    def __init__(self, source: Batched):
        self._source = source

    def __getitem__(self, indices: Sequence[int]) -> tuple[np.ndarray, ...] | Exception:
        try:
            return self._source.get_batch(indices)
        except (ValueError, OSError) as error:
            return error  # if raised here, it would arrive with the worker's traceback as its text


def _start_worker(worker: int) -> None:
    for number in signals.EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _except_that_nobody_listens
    signals.end_with_parent()


def _except_that_nobody_listens(kind, error, trace) -> None:
    """Shows a thread's error, unless it only says that the parent process has ended."""
    if not issubclass(kind, (EOFError, OSError)):
        sys.__excepthook__(kind, error, trace)


def read_in_threads(source: Batched, batches: Iterable[Sequence[int]], *, workers: int,
                    pin_memory: bool = False) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields what `read_in_processes` does, read by threads; the arguments are the same."""
    def read(indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return _tensors(source.get_batch(indices), pin_memory)

    if workers == 0:
        yield from map(read, batches)
        return
    # A thread that pins memory would otherwise open a context on the first GPU.
    start = functools.partial(torch.cuda.set_device, torch.cuda.current_device()) \
        if pin_memory else None
    pool = ThreadPoolExecutor(workers, initializer=start)
    pending: collections.deque = collections.deque()
    try:
        for indices in batches:
            pending.append(pool.submit(read, indices))
            if len(pending) > _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
