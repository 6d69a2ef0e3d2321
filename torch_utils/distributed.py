"""Processes: starting and ending the process group, ranks, and how ranks wait for each other.

Without torchrun there is no process group, and every function here works for one process. Under
torchrun there are two kinds of groups: one for tensors (NCCL on GPUs, gloo on the CPU), and gloo
groups for what hosts exchange (objects, barriers, whether to stop).

They have different timeouts. Ranks meet in every step, so a rank that does not reach a tensor's
all-reduce within half an hour hangs. Work that one rank does for others (`run_on_rank0`, `run_by`)
may take any time: the others poll the store for its end instead of waiting in a collective.
"""

import contextlib
import datetime
import gc
import hashlib
import io
import itertools
import os
import pickle
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, TypeVar

import torch
import torch.distributed

from dnnlib import console
from dnnlib.cli import check_compiled_dir
from dnnlib.ordered_pool import num_cores
from dnnlib.progress import stage

T = TypeVar("T")

# $PFGMPP_TIMEOUT, in seconds, overrides the timeout of a step. States are also written between
# steps, and networks are compiled in the first one: both take minutes at worst.
TIMEOUT_ENV = "PFGMPP_TIMEOUT"
_STEP_TIMEOUT = datetime.timedelta(minutes=30)
_HOST_TIMEOUT = datetime.timedelta(hours=2)
_POLL_SEC, _SLOW_POLL_SEC = 0.02, 0.5  # how often a rank polls the store: at first, later
_BEAT_SEC = 10.0  # between heartbeats of a rank that works for others
STOP_TIMEOUT = datetime.timedelta(seconds=5)  # torchrun kills after 30
_host_group: torch.distributed.ProcessGroup | None = None
_step_group: torch.distributed.ProcessGroup | None = None  # of hosts, with the timeout of a step
_stop_group: torch.distributed.ProcessGroup | None = None  # of hosts, for nothing but stopping
_turns = itertools.count()  # of run_by and run_on_rank0, which all ranks call in the same order
_PIECE_ROWS = 4096  # how many rows are sent between processes at a time


def init(device: str = "auto") -> torch.device:
    """Starts the process group if torchrun launched this process; returns the device to use.

    `device` is 'cuda', 'cpu', or 'auto' for CUDA if there is a GPU.

    Raises:
        ValueError: CUDA was asked for, but there are fewer GPUs than local processes, or none.
    """
    check_compiled_dir()
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and chosen.type == "cpu":
        # torchrun sets OMP_NUM_THREADS=1 for several processes, whatever the number of cores.
        torch.set_num_threads(own_cores())
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        kwargs = {"device_id": chosen} if chosen.type == "cuda" else {}
        store, rank, size = _fresh_store()
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=_step_timeout(), **kwargs)
        global _host_group, _step_group, _stop_group
        _host_group, _step_group, _stop_group = (
            torch.distributed.new_group(backend="gloo", timeout=timeout)
            for timeout in (_HOST_TIMEOUT, _step_timeout(), _HOST_TIMEOUT))
    return chosen


def _fresh_store() -> tuple[torch.distributed.Store, int, int]:
    """Returns (store, rank, world size); the store holds nothing of processes that are gone.

    torchrun keeps one store for all its restarts (PyTorch 2.13). A restarted rank could find in it
    the address of a rank that has died, and wait for that. So rank 0 chooses a prefix and gives it
    to the ranks that ask for it, under names that were never used before.
    """
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=_HOST_TIMEOUT))
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"asks/{rank}", own)
        prefix = store.get(f"answer/{own}").decode()
        store.set(f"{prefix}/{rank}", "")
        return torch.distributed.PrefixStore(prefix, store), rank, size
    waiting, end = set(range(1, size)), time.monotonic() + _HOST_TIMEOUT.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"asks/{other}"]):  # if that rank is gone, its successor asks again
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
            if store.check([f"{own}/{other}"]):
                waiting.remove(other)
        time.sleep(_POLL_SEC if waiting else 0)
        if time.monotonic() > end:
            raise OSError(f"ranks {sorted(waiting)} did not start in time")
    return torch.distributed.PrefixStore(own, store), rank, size


def _step_timeout() -> datetime.timedelta:
    given = os.environ.get(TIMEOUT_ENV)
    try:
        timeout = datetime.timedelta(seconds=float(given)) if given else _STEP_TIMEOUT
    except (ValueError, OverflowError):
        timeout = datetime.timedelta(0)
    if timeout < datetime.timedelta(seconds=1):
        raise ValueError(f"{TIMEOUT_ENV}={given}: must be a number of seconds, 1 or more")
    return timeout


def choose_device(device: str) -> torch.device:
    """Returns the device of this name; 'auto' is CUDA if there is a GPU, else the CPU.

    Raises:
        ValueError: CUDA was asked for, but there are fewer GPUs than local processes, or none.
        RuntimeError: PyTorch knows no such name.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if count else "cpu"
    if device != "cuda":
        return torch.device(device)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count == 0:
        raise ValueError("--device=cuda: no GPU found; use --device=cpu or auto")
    if local_size > count:
        raise ValueError(f"{local_size} processes for {count} GPU(s): "
                         f"use torchrun --nproc_per_node={count}")
    return torch.device("cuda", local_rank)


def shutdown() -> None:
    """Ends the process group. Drop every DDP module and its optimizer first."""
    global _host_group, _step_group, _stop_group
    if not torch.distributed.is_initialized():
        return
    barrier()
    _host_group = _step_group = _stop_group = None
    gc.collect()  # gloo sometimes aborts at exit while a DDP reducer is still alive
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[torch.device]:
    """Calls `init` on entry, and `shutdown` on a normal exit.

    After an error the group is left as it is: a barrier would wait for ranks that may be gone. The
    error gets the attribute `should_print`, whether this rank shows it: see dnnlib.cli.UserError.
    """
    chosen = init(device)
    if broadcast_object(console.is_verbose()):  # --verbose may be given on some ranks only
        _print_ranks(chosen)
    try:
        yield chosen
    except Exception as error:  # of any kind: it is raised again
        error.should_print = _is_first_to_tell(error)
        raise
    shutdown()


def _print_ranks(device: torch.device) -> None:
    own = f"{socket.gethostname()} process {os.getpid()}, {device}"
    if device.type == "cuda":
        own += f" ({torch.cuda.get_device_name(device)})"
    for rank, text in enumerate(gather_objects(f"{own}, {torch.get_num_threads()} threads")):
        print0(f"Rank {rank:<5d} {text}")


def _is_first_to_tell(error: Exception) -> bool | None:
    """Says whether no other rank has shown an error with this text; None if that is not known."""
    if get_world_size() == 1:
        return None
    words = hashlib.sha256(f"{type(error).__name__} {error}".encode()).hexdigest()
    with contextlib.suppress(RuntimeError):  # torchrun, and its store, may be gone
        store = torch.distributed.distributed_c10d._get_default_store()
        return store.add(f"printed/{words}", 1) == 1
    return None


class HostAgreement:
    """Gives all ranks the maximum over ranks of each of a few numbers.

    The numbers are exchanged between the hosts while the device works, and nothing waits for the
    device. On GPUs, a step returns the maxima of the step before, so that no host waits for another
    to reach the end of a step. On the CPU, where ranks meet in every step anyway, a step returns
    its own maxima.
    """

    def __init__(self, device: torch.device):
        self._is_delayed = device.type == "cuda"
        self._pending: tuple[Any, torch.Tensor] | None = None

    def in_step(self, numbers: Sequence[int]) -> list[int]:
        """Returns the maximum of each number over ranks; zeros if none has arrived yet."""
        if get_world_size() == 1:
            return list(numbers)
        said = self._say(numbers)
        heard, self._pending = (self._pending if self._is_delayed else said), said
        if heard is None:
            return [0] * len(numbers)
        heard[0].wait()
        return heard[1].tolist()

    def now(self, numbers: Sequence[int], timeout: datetime.timedelta | None = None
            ) -> list[int] | None:
        """Returns the maximum of each number over ranks; None if some ranks are not in time."""
        if get_world_size() == 1:
            return list(numbers)
        work, box = self._say(numbers)
        if timeout is None:
            work.wait()
            return box.tolist()
        try:
            work.wait(timeout)
        except RuntimeError:  # too late, or gone
            return None
        return box.tolist()

    def _say(self, numbers: Sequence[int]) -> tuple[Any, torch.Tensor]:
        box = torch.tensor(numbers)
        work = torch.distributed.all_reduce(
            box, torch.distributed.ReduceOp.MAX, group=_stop_group, async_op=True)
        return work, box


def run_while_others_wait(function: Callable[[], None]) -> None:
    """Calls `function` on rank 0 while the other ranks wait for its end, if it starts soon.

    They wait because torchrun ends the other ranks when one exits. No collective is used, so ranks
    may call this from different places. Rank 0 may itself be waiting for one of them in a
    collective; it is released once they exit.
    """
    if get_world_size() == 1:
        function()
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    # torchrun, and its store, may be gone.
    if get_rank() != 0:
        with contextlib.suppress(RuntimeError):
            store.wait(["begun"], STOP_TIMEOUT)
            store.wait(["ended"], _STEP_TIMEOUT)
        return
    with contextlib.suppress(RuntimeError):
        store.set("begun", "")
    function()
    with contextlib.suppress(RuntimeError):
        store.set("ended", "")


def get_rank() -> int:
    """Returns this process's number, 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def get_world_size() -> int:
    """Returns the number of processes, 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def own_cores() -> int:
    """Returns this process's share of the cores of its machine, at least 1."""
    return max(num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def print0(*values, **options) -> None:
    """Prints on rank 0 only, and flushes."""
    if get_rank() == 0:
        print(*values, **{"flush": True, **options})


def warn0(text: str) -> None:
    """Prints 'Warning: ...' on rank 0 to stderr, even with --quiet."""
    print0(f"Warning: {text}", file=sys.stderr)


def barrier() -> None:
    """Waits until every rank has called it."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier(group=_host_group)


def all_reduce_sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over ranks in place and returns it."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


class _TensorlessPickler(pickle.Pickler):
    """Leaves tensors out of the pickle and collects them."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _TensorlessUnpickler(pickle.Unpickler):
    """Reads what `_TensorlessPickler` wrote, given the tensors."""

    def __init__(self, data: bytes, tensors: Sequence[torch.Tensor]):
        super().__init__(io.BytesIO(data))
        self.persistent_load = tensors.__getitem__


def broadcast_object(value: T) -> T:
    """Returns rank 0's `value` on every rank, with tensors on the CPU.

    Tensors are sent one by one, so that a rank holds little more than the value itself.
    """
    if get_world_size() == 1:
        return value
    pickler = _TensorlessPickler(file := io.BytesIO())
    if get_rank() == 0:
        pickler.dump(value)
    tensors = pickler.tensors
    box = [(file.getvalue(), [(t.shape, t.dtype) for t in tensors])]
    torch.distributed.broadcast_object_list(box, src=0, group=_host_group)
    data, formats = box[0]
    if get_rank() != 0:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in formats]
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        torch.distributed.broadcast(flat, src=0, group=_host_group)
    return value if get_rank() == 0 else _TensorlessUnpickler(data, tensors).load()


def gather_objects(value: T, *, in_training: bool = False) -> list[T]:
    """Returns every rank's `value`, in the order of ranks, on every rank.

    With `in_training`, a rank that does not answer within the timeout of a step is given up:
    between steps of training, no rank works alone for long.
    """
    if get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * get_world_size()
    group = _step_group if in_training else _host_group
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def raise_first(error: Exception | None) -> None:
    """Raises the first error of any rank on all ranks; each passes its own error, or None.

    Otherwise the other ranks would wait for a rank that has stopped working with them.
    """
    for first in filter(None, gather_objects(error)):
        raise first


def gather_to_rank0(rows: torch.Tensor) -> list[torch.Tensor] | None:
    """Returns every rank's CPU tensor [n, d], each with its own n, on rank 0; None on the others.

    Tensors are sent in pieces, so that no other rank and no device holds much more than its own.
    """
    if get_world_size() == 1:
        return [rows]
    is_nccl = torch.distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
    sizes = gather_objects(tuple(rows.shape))
    if get_rank() != 0:
        for piece in rows.split(_PIECE_ROWS):
            torch.distributed.send(piece.contiguous().to(device), dst=0)
        return None
    parts = [rows]
    for rank, size in enumerate(sizes[1:], start=1):
        part = rows.new_empty(size)
        for piece in part.split(_PIECE_ROWS):
            box = torch.empty_like(piece, device=device)
            torch.distributed.recv(box, src=rank)
            piece.copy_(box)
        parts.append(part)
    return parts


@contextlib.contextmanager
def rank0_first() -> Iterator[None]:
    """Runs the block on rank 0 before it runs on the others, so that they find its work done.

    A ValueError or OSError of rank 0 is raised on every rank.
    """
    if get_rank() != 0:
        if error := broadcast_object(None):
            raise error
        yield
        return
    try:
        yield
    except (ValueError, OSError) as error:
        broadcast_object(error)
        raise
    broadcast_object(None)


class _Turn:
    """Work of some ranks, while the others poll the store for its end, however long it takes."""

    def __init__(self):
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._name = f"turn/{next(_turns)}"

    def take(self, function: Callable[..., T], args: Sequence[Any]) -> T | Exception:
        """Returns function(*args), or its ValueError or OSError, and sends it to waiting ranks."""
        result: Any = OSError(f"lost another process of this run: rank {get_rank()} has ended; its "
                              "own messages say why")
        try:
            with self._beating():
                result = function(*args)
        except (ValueError, OSError) as error:
            result = error
        finally:  # also at other errors and signals, so that nobody waits in vain
            with contextlib.suppress(RuntimeError):  # torchrun, and its store, may be gone
                self._store.set(f"{self._name}/{get_rank()}", pickle.dumps(result))
        return result

    def results(self, ranks: Sequence[int]) -> dict[int, Any]:
        """Waits for these ranks; returns {rank: result or error}.

        Raises:
            OSError: one of them has been silent for longer than a step may take.
        """
        heard = {rank: (0, time.monotonic()) for rank in ranks}
        pause, next_look = _POLL_SEC, time.monotonic() + _BEAT_SEC
        with stage(f"Waiting for rank {', '.join(map(str, ranks))}"):
            while heard:
                for rank in [rank for rank in heard
                             if self._store.check([f"{self._name}/{rank}"])]:
                    del heard[rank]
                if time.monotonic() > next_look:
                    next_look = time.monotonic() + _BEAT_SEC
                    self._look_after(heard)
                time.sleep(pause if heard else 0)
                pause = min(1.2 * pause, _SLOW_POLL_SEC)
        return {rank: pickle.loads(self._store.get(f"{self._name}/{rank}")) for rank in ranks}

    def _look_after(self, heard: dict[int, tuple[int, float]]) -> None:
        """Checks the heartbeats of ranks; raises OSError if one has been silent for too long."""
        for rank, (before, since) in heard.items():
            beats = self._store.add(f"{self._name}/{rank}/beats", 0)
            if beats != before:
                heard[rank] = (beats, time.monotonic())
            elif time.monotonic() - since > max(_step_timeout().total_seconds(), 6 * _BEAT_SEC):
                raise OSError(f"lost another process of this run: rank {rank} has been silent for "
                              f"{time.monotonic() - since:.0f} s")

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        """Sends heartbeats of this rank during the block."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(_BEAT_SEC):
                with contextlib.suppress(RuntimeError):
                    self._store.add(f"{self._name}/{get_rank()}/beats", 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(_POLL_SEC)


def node_leader() -> int:
    """Returns the first rank of this node, which does the work that is done once per node.

    torchrun gives the ranks of a node consecutive numbers, and $LOCAL_RANK counts them. Without it,
    all ranks are assumed to be on one node.
    """
    if get_world_size() == 1:
        return 0
    return get_rank() - int(os.environ.get("LOCAL_RANK", get_rank()))


def run_by(leader: int, function: Callable[..., T], *args) -> T:
    """Calls `function(*args)` on each rank that is its own `leader`; returns its leader's result.

    Every rank must call it, and gets its result once all leaders are done, however long that takes.
    The function must not use collectives. Its result is sent to other processes.

    Args:
        leader: the rank that works for this one; it must name itself.
        function: what the leaders call.
        args: its arguments.

    Raises:
        ValueError: a leader's call raised it; it is raised on every rank.
        OSError: likewise, or a leader has ended.
    """
    if get_world_size() == 1:
        return function(*args)
    turn, leaders = _Turn(), sorted(set(gather_objects(leader)))
    if leader == get_rank():
        turn.take(function, args)
    results = turn.results(leaders)
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return results[leader]


def run_on_rank0(function: Callable[..., T], *args) -> T:
    """Calls `function(*args)` on rank 0; returns its result, or raises its error, on every rank.

    The others wait for it as in `run_by`. Tensors in the result are on the CPU.
    """
    if get_world_size() == 1:
        return function(*args)
    turn, results = _Turn(), []

    def keep() -> None:  # the store only learns that the work is done
        try:
            results.append(function(*args))
        except (ValueError, OSError) as error:
            results.append(error)

    if get_rank() == 0:
        turn.take(keep, ())
    elif isinstance(lost := turn.results([0])[0], Exception):
        raise lost
    result = broadcast_object(results[0] if results else None)
    if isinstance(result, Exception):
        raise result
    return result


def split_for_rank(items: Sequence[T], batch: int) -> list[list[T]]:
    """Splits `items` into batches of at most `batch`; returns those of this rank, in order.

    The number of batches is a multiple of the world size, so that ranks stay in step; some may
    be empty.
    """
    return split_for_all_ranks(items, batch)[get_rank()::get_world_size()]


def split_for_all_ranks(items: Sequence[T], batch: int) -> list[list[T]]:
    """Returns the batches of `split_for_rank` of all ranks, in order: the first one is rank 0's."""
    world = get_world_size()
    count = max(-(-len(items) // (batch * world)), 1) * world
    base, extra = divmod(len(items), count)
    starts = [i * base + min(i, extra) for i in range(count + 1)]
    return [list(items[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
