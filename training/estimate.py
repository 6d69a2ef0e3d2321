"""Estimates what a run will take before it starts, without training and without its memory.

The network runs once, forward and backward, on PyTorch's meta device, which knows only shapes.
torch.utils.flop_counter counts the operations of convolutions and matrix products (a multiply-add
is two); the rest of a U-Net adds about 1%. Memory is

    20 bytes x parameters             weights, their average, gradients, two moments of Adam
    + tensors kept for backward       the network's, counted, x images at a time

With --checkpoint-blocks, the tensors kept are the inputs of all blocks and what the largest block
keeps. Few-step methods also evaluate other networks, such as the teacher, and keep them in memory.
ipfm differentiates through three networks in a row: generator, teacher and auxiliary.

This is a rough estimate: it leaves out the memory of the device itself, the workspace of its
convolutions and the batch. `gpumem` in the line of a tick is the measured value.
"""

import contextlib
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dnnlib.util import format_time, scaled
from pfgmpp.loss import DRAW_BLOCK
from pfgmpp.networks import build_network, image_size
from pfgmpp.unets import UNetBlock
from torch_utils import misc
from training.config import TrainConfig

_STATE_BYTES = 20  # per parameter
# A prime that divides no weight's size, so it identifies the sizes that grow with the batch.
_BATCH = 127


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The operations and memory that a network takes."""

    parameters: int
    forward_flops: float  # of one image
    training_flops: float  # of one image, forward and backward
    state_bytes: float  # per process, whatever the batch
    image_bytes: float  # per process and image of a micro-batch

    @classmethod
    def of_network(cls, network: dict[str, Any], precision: str = "fp32", *,
                   checkpoint_blocks: bool = False, differentiated: int = 1) -> "Estimate":
        """Returns the estimate for a network of `TrainConfig.network` at a precision.

        `checkpoint_blocks` is the flag of that name. `differentiated` is the number of networks of
        this size that are differentiated together; each keeps its tensors for the backward pass.
        """
        dtype = misc.compute_dtype(precision)
        with torch.device("meta"):
            net = build_network(network)
            # Both kinds of half precision have the same size, and fp16 runs only on GPUs.
            net.compute_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
            inputs = _inputs(net, network.get("augment_dim", 0))
        largest_block = _largest_block(net, inputs) if checkpoint_blocks else 0
        net.model.checkpoint_blocks = checkpoint_blocks
        kept = _Kept(net)
        # In blocks that keep nothing, kernels keep nothing either, so only autograd is watched.
        kernels = contextlib.nullcontext() if checkpoint_blocks else kept
        with FlopCounterMode(display=False) as counter:
            with kernels, torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
                denoised = net(**inputs)
            forward = counter.get_total_flops()
            denoised.sum().backward()
        parameters = misc.count_parameters(net)
        by_image, fixed = kept.sizes()
        return cls(parameters, forward / _BATCH, counter.get_total_flops() / _BATCH,
                   _STATE_BYTES * parameters + differentiated * fixed,
                   (differentiated * by_image + largest_block) / _BATCH)

    def memory_bytes(self, micro_batch: int) -> float:
        """Returns roughly the bytes that a process needs for `micro_batch` images at a time."""
        return self.state_bytes + micro_batch * self.image_bytes


class _Kept(TorchFunctionMode):
    """Collects what autograd keeps for backward, each storage once, without the parameters.

    For attention and matrix products, it collects what the kernels of real devices keep. The meta
    device only has the plain formula of attention, whose weight matrices are larger than everything
    else, and it loses channels_last, so that 1x1 convolutions copy their input.
    """

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self._known = {p.untyped_storage()._cdata for p in net.parameters()}
        self._tensors: dict[int, torch.Tensor] = {}
        self._is_in_kernel = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (F.scaled_dot_product_attention, F.linear):
            return func(*args, **(kwargs or {}))
        self._is_in_kernel = True
        output = func(*args, **(kwargs or {}))
        self._is_in_kernel = False
        for tensor in args if func is F.linear else (*args, output):
            if tensor is not None:
                self.add(tensor)
        return output

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._known and not self._is_in_kernel:
            self._tensors[key] = tensor
        return tensor

    def sizes(self) -> tuple[int, int]:
        """Returns the bytes that grow with the batch and those that do not."""
        sizes = [t.untyped_storage().nbytes() for t in self._tensors.values()]
        by_image = [size for size in sizes if size % _BATCH == 0]
        return sum(by_image), sum(sizes) - sum(by_image)


def _largest_block(net: torch.nn.Module, inputs: dict[str, torch.Tensor | None]) -> int:
    """Returns the bytes kept by the block that keeps most, counting what grows with the batch."""
    kept, sizes = _Kept(net), [0]

    def enter(*_: Any) -> None:
        sizes.append(-kept.sizes()[0])

    def leave(*_: Any) -> None:
        sizes[-1] += kept.sizes()[0]

    handles = [register(hook) for block in net.modules() if isinstance(block, UNetBlock)
               for register, hook in ((block.register_forward_pre_hook, enter),
                                      (block.register_forward_hook, leave))]
    with kept, torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        net(**inputs)
    for handle in handles:
        handle.remove()
    return max(sizes)


def _inputs(net: torch.nn.Module, augment_dim: int) -> dict[str, torch.Tensor | None]:
    def zeros(*shape: int) -> torch.Tensor | None:
        return torch.zeros(_BATCH, *shape) if shape[0] else None
    height, width = net.image_shape[-2:]
    return {"x": zeros(*net.image_shape), "sigma": torch.ones(_BATCH),
            "class_labels": zeros(net.label_dim), "augment_labels": zeros(augment_dim),
            "condition": zeros(net.cond_channels, height, width)}


def describe(config: TrainConfig, network: dict[str, Any], world_size: int,
             rate: float | None = None) -> str:
    """Returns the lines that say what a run takes.

    `network` is what `config.network` returns for the run's data. `rate` is the images per second
    over all processes, if known.
    """
    found = Estimate.of_network(network, config.precision,
                                checkpoint_blocks=config.checkpoint_blocks,
                                differentiated=3 if config.method == "ipfm" else 1)
    micro_batch, _ = config.rounds(world_size)
    found = _with_method(found, config)
    steps = -(-config.total_nimg // config.batch)
    rows = [
        ("Parameters", f"{found.parameters:,}"),
        ("Operations", f"{scaled(found.forward_flops)}FLOP per image forward, "
                       f"{scaled(found.training_flops)}FLOP in training, "
                       f"{scaled(found.training_flops * config.total_nimg)}FLOP in all"),
        ("Memory", f"about {scaled(found.memory_bytes(micro_batch))}B per process (an estimate): "
                   f"{scaled(found.state_bytes)}B + {micro_batch} x "
                   f"{scaled(found.image_bytes)}B per image"),
        ("Draws", f"{scaled(_draw_bytes(network, micro_batch))}B per process: the noise of "
                  f"{micro_batch} images, while it is assembled from blocks of {DRAW_BLOCK}"),
        ("Steps", f"{steps:,} of {config.batch} images"),
        ("Disk", _disk(config, found.parameters)),
    ]
    if rate is None:
        rows.append(("Time", "unknown; --rate=N computes it from the images/s that a run prints"))
    else:
        seconds = config.total_nimg / rate
        rows.append(("Time", f"{format_time(seconds)} ({seconds / 3600:.4g} hours) at {rate:g} "
                             "images/s, not counting scores and files"))
    return "\n".join(f"{title:<11s}{text}" for title, text in rows)


def _with_method(found: Estimate, config: TrainConfig) -> Estimate:
    """Returns the estimate plus what a few-step method computes and keeps beyond its network."""
    forward, training = found.forward_flops, found.training_flops
    extra = {None: 0, "ect": forward, "cd": 3 * forward}  # the lower level; and the teacher's step
    if config.method == "ipfm":
        # The generator and the auxiliary's step; then T and S, differentiated by inputs only.
        of_inputs = (3 if config.checkpoint_blocks else 2) * forward
        extra["ipfm"] = config.ipfm_steps * (forward + training) + 2 * of_inputs
    return dataclasses.replace(
        found, training_flops=training + extra[config.method],
        state_bytes=found.state_bytes + _kept_bytes(config)[0] * found.parameters)


def _kept_bytes(config: TrainConfig) -> tuple[int, int]:
    """Returns the bytes per parameter that a few-step method adds to memory, and to a state."""
    if config.method == "cd":  # the teacher, and the target unless it is the network itself
        return 4 + 4 * bool(config.cd_decay), 4 * bool(config.cd_decay)
    if config.method == "ipfm":  # the teacher; the auxiliary, its gradients and moments
        return 4 + 16, 12
    return 0, 0


def _draw_bytes(network: dict[str, Any], micro_batch: int) -> int:
    """Returns the bytes of a micro-batch's noise: float32 blocks, and the tensor of them all."""
    height, width = image_size(network["img_resolution"])
    blocks = -(-micro_batch // DRAW_BLOCK)
    of_image = 4 * network["img_channels"] * height * width
    return of_image * (blocks * DRAW_BLOCK + (micro_batch if blocks > 1 else 0))


def num_files(config: TrainConfig) -> tuple[int, int]:
    """Returns how many snapshots and training states a run writes from start to end.

    The first tick, number 0, has a snapshot and no state; the end has both.
    """
    end = -(-config.total_nimg // config.batch) * config.batch
    last, short = divmod(end - config.batch, config.tick_nimg)
    snapshots = last // config.snap + 1 + bool(short or last % config.snap)
    states = last // config.dump + bool(short or last == 0 or last % config.dump)
    return snapshots, states


def run_bytes(config: TrainConfig, parameters: int) -> int:
    """Returns the most bytes that the snapshots and training states of a run take on the disk.

    A snapshot has 4 bytes per parameter; a state has 16, plus those of a few-step method.
    """
    snapshots, kept, is_one_more = _kept_files(config)
    return parameters * (4 * snapshots + _state_bytes(config) * (kept + is_one_more))


def _state_bytes(config: TrainConfig) -> int:
    """Returns the bytes per parameter of a training state."""
    return 16 + _kept_bytes(config)[1]


def _kept_files(config: TrainConfig) -> tuple[int, int, bool]:
    """Returns how many snapshots and states stay, and whether one more state exists for a time.

    The newest is written before the oldest is removed.
    """
    snapshots, states = num_files(config)
    kept = states if config.keep is None else min(states, config.keep)
    return snapshots, kept + bool(config.eval), states > kept  # --eval keeps the best state, too


def _disk(config: TrainConfig, parameters: int) -> str:
    """Returns a text that says what a run leaves on the disk."""
    of_state = _state_bytes(config)
    snapshots, kept, is_one_more = _kept_files(config)
    total = run_bytes(config, parameters)
    choice = "" if config.keep is None else f" (--keep={config.keep})"
    choice += " and one more while it is written" if is_one_more else ""
    best = ", including the best one" if config.eval else ""
    return (f"{scaled(total)}B in all: snapshots {snapshots} x {scaled(4 * parameters)}B, "
            f"states {kept} x {scaled(of_state * parameters)}B{choice}{best}")
