"""Batches read ahead by worker processes, in order.

A worker hands over whole batches, so that one array crosses the process boundary instead of many.
Workers leave SIGINT and SIGTERM to the process that started them: a signal to the whole group must
not take away the data of a step that is still to be finished.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch.utils.data


class Batched(Protocol):
    """What can be read in batches; `training.dataset.ImageFolderDataset` can."""

    def get_batch(self, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Returns arrays whose first axis runs over `indices`."""


class _BatchReader(torch.utils.data.Dataset):
    def __init__(self, source: Batched):
        self._source = source

    def __getitem__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...] | Exception:
        try:
            return tuple(map(torch.from_numpy, self._source.get_batch(indices)))
        except (ValueError, OSError) as error:
            return error  # raised there it would come back with the worker's traceback as its text


def read_batches(source: Batched, batches: Iterable[Sequence[int]], *, workers: int,
                 pin_memory: bool = False) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields `source.get_batch(indices)` as tensors for each list of indices, in order.

    Close the iterator, or drop it, to end the workers.

    Args:
        source: where to read; each worker has a copy of it.
        batches: lists of indices; may be endless.
        workers: processes that read ahead; 0 reads in this one, when needed.
        pin_memory: put the tensors where a GPU can fetch them asynchronously.

    Raises:
        ValueError: as `source.get_batch` raises it.
        OSError: likewise.
        RuntimeError: a worker was killed; `dnnlib.cli.user_errors` makes one line of it.
    """
    for batch in torch.utils.data.DataLoader(
            _BatchReader(source), sampler=batches, batch_size=None, num_workers=workers,
            pin_memory=pin_memory, worker_init_fn=_start_worker):
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _start_worker(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
