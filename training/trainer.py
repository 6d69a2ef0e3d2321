"""The state of a run in one process, and its step.

    step k trains on images k*batch ... (k+1)*batch - 1 of the stream; cur_nimg = k*batch before it

Order of a step: learning rate, gradients (all accumulation rounds, averaged over ranks),
finiteness and clipping, Adam, EMA, cur_nimg += batch. If the objective has an auxiliary network,
that network takes its own steps first, on the same images. Nothing in a step waits for the device
except RAdam, which asks it whether to take the step. Reported values stay on the device until the
tick reads them.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from checkpoints import checkpoint
from dnnlib.util import require
from images.dataset import ImageFolderDataset, TrainingOrder, order_at
from images.patches import TrainingPatches
from images.scaling import Scaling
from pfgmpp.augment import AugmentPipe
from pfgmpp.networks import Precond, build_network
from torch_utils import distributed, misc, training_stats
from torch_utils.loading import Timed, read_in_processes, read_in_threads
from training.config import TrainConfig
from training.device_data import DeviceData, fits_by_itself
from training.ema import RAMPUP_RATIO, ema_beta, update_ema_
from training.objectives import Batch, Objective, Part, build_objective, build_optimizer

# Increased by every change of what a seed draws or of the data's order; resuming compares it.
DRAWS_VERSION = 2
# These keep the uses of the run's seed apart.
_INIT_TAG, _STEP_TAG, _DROPOUT_TAG, _REFERENCE_TAG = 1, 2, 3, 4
_DYNAMIC_SCALE_START = 2.0**16
_DYNAMIC_SCALE_PERIOD = 2000  # good steps between doublings
HEAVY_TAILED_D = 0.5  # below this, draws beyond float32 have been seen (pfgmpp/kernel.py)
# The buffers never change. The flag that says so has two names, depending on the PyTorch version.
_BUFFERS_ALONE = {
    "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel)
    .parameters else "broadcast_buffers": False}
_MAX_NAMED = 8  # images in an error message


class DivergedError(RuntimeError):
    """Too many steps in a row had gradients that are not finite."""


class Trainer:
    """The state of a run in one process, and its step.

    The tensors in `weights` replace those that the seed initialises. `teacher` is the denoiser that
    a few-step network learns from, if it has one; it is on the device and frozen.
    """

    def __init__(self, config: TrainConfig, dataset: ImageFolderDataset, device: torch.device,
                 weights: Mapping[str, torch.Tensor] | None = None,
                 teacher: Precond | None = None):
        assert dataset.patch == config.patch
        self.config, self.dataset, self.device = config, dataset, device
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.micro_batch, self.rounds = config.rounds(self.world_size)
        self.cur_nimg = 0
        self.best_score: float | None = None
        self.best_score_of: dict[str, Any] | None = None  # what was scored, and against what
        # In a state written at a signal: what the tick has collected and still has to do.
        self.unfinished: dict[str, Any] | None = None

        torch.manual_seed(misc.mix_seed(config.seed, _INIT_TAG))
        self.net = build_network(
            config.network(dataset.resolution, dataset.num_channels, dataset.label_dim,
                           dataset.cond_channels))
        self.net.to(device).train()
        self.net.compute_dtype = misc.compute_dtype(config.precision)
        require(not config.checkpoint_blocks or hasattr(self.net.model, "checkpoint_blocks"),
                f"--checkpoint-blocks=1: a {self.net.model_type} has no blocks to compute twice; "
                "leave it out")
        self.net.model.checkpoint_blocks = config.checkpoint_blocks
        self.ema_rampup: float | None = RAMPUP_RATIO
        if weights is not None and not self.net.load_state_dict(weights, strict=False).missing_keys:
            self.ema_rampup = None  # all weights are given: there is no random start to forget
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.augment_pipe = AugmentPipe.standard(config.augment) if config.augment > 0 else None
        self.optimizer = build_optimizer(config, self.net)
        self.objective: Objective = build_objective(config, self.net, teacher, self.augment_pipe)
        for net in self.objective.other_networks.values():  # ipfm differentiates them too
            net.model.checkpoint_blocks = config.checkpoint_blocks
        # Kept on the device: the loss scale, good steps since a dynamic one last changed, bad steps
        # in total, bad steps in a row, the longest such row, and its first step.
        self.dynamic_scale = config.has_dynamic_scale
        start = _DYNAMIC_SCALE_START if self.dynamic_scale else (config.ls or 1.0)
        self.loss_scale = torch.tensor(start, device=device)
        self.counters = {name: torch.zeros([], device=device) for name in
                         ("good_since_change", "bad_total", "bad_row", "worst_row", "bad_step")}
        self._step_loss = torch.zeros([], device=device)  # mean of this rank's share
        self._good_loss = self._bad_loss = torch.full([], math.nan, device=device)
        self._seen_row = _HostCopy(device)
        self._step_rng = torch.Generator(device)
        self.ddp: torch.nn.Module = self.net

    def start(self) -> None:
        """Opens the stream of batches at `cur_nimg` and wraps the networks in DDP."""
        if self.is_compiled:
            for net in (self.net, *self.objective.other_networks.values()):
                misc.compile_network(net.model)
            if self.config.checkpoint_blocks:
                # PyTorch 2.6 can't split such a compiled network at DDP's buckets.
                torch._dynamo.config.optimize_ddp = False
        self.ddp = self._coupled(self.net)
        if self.objective.auxiliary:
            self.objective.auxiliary.ddp = self._coupled(self.objective.auxiliary.net)
        source, read = self._reader()
        order = TrainingOrder(
            len(self.dataset), self.config.seed, self.config.batch, start=self.cur_nimg,
            rank=self.rank, world_size=self.world_size, rounds=self.rounds)
        self._references = Timed(read(source, self._reference_order() if self.config.stf else []))
        if self.config.patch is None:
            self._batches = Timed(read(source, order))
        else:
            patches = TrainingPatches(source, self.dataset, self.config.seed, self.config.patches)
            self._batches = Timed(read(patches, order.positions()))

    def _coupled(self, net: torch.nn.Module) -> torch.nn.Module:
        """Returns the network, wrapped in DDP if there is a process group."""
        if not torch.distributed.is_initialized():
            return net
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True,
                                       **_BUFFERS_ALONE)

    @property
    def is_compiled(self) -> bool:
        """Whether the network is compiled; --compile=auto does so where it pays and is exact."""
        if self.config.compile == "auto":
            if self.config.method and self.config.dropout:
                return False  # two passes must have the same dropout masks
            return not self.config.deterministic and misc.compiles_by_itself(self.device)
        return self.config.compile == "1"

    def close(self) -> None:
        """Releases the process group's hooks and the loader workers."""
        self.ddp = self.net
        self._batches = self._references = None
        self.optimizer = self.objective = None

    @contextlib.contextmanager
    def average_in_fp32(self) -> Iterator[None]:
        """Lets the averaged network compute in float32 without TF32, as when loaded from its file.

        Scores and pictures then depend on the weights only, not on the precision of training.
        """
        config = self.config
        choices = {"benchmark": config.bench, "deterministic": config.deterministic}
        self.ema.compute_dtype = torch.float32
        misc.configure_backends("fp32", **choices)
        try:
            yield
        finally:
            self.ema.compute_dtype = misc.compute_dtype(config.precision)
            misc.configure_backends(config.precision, **choices)

    def take_data_sec(self) -> float:
        """Returns how long steps have waited for batches since the last call."""
        return self._batches.take_sec() + self._references.take_sec()

    def _reader(self) -> tuple[ImageFolderDataset | DeviceData, Callable[..., Iterator]]:
        """Returns the source of images, and a function that reads from it, ahead or on the device.

        The function takes a source (this one or a wrapper) and lists of indices, and yields
        `source.get_batch(indices)` for each list.
        """
        on_device = self.config.data_on_device
        if on_device == "1" or (on_device == "auto" and fits_by_itself(self.dataset, self.device)):
            return DeviceData(self.dataset, self.device), (
                lambda source, batches: map(source.get_batch, batches))
        read = read_in_threads if self.dataset.is_packed else read_in_processes
        return self.dataset, functools.partial(read, workers=self.config.workers,
                                               pin_memory=self.device.type == "cuda")

    def _reference_order(self) -> Iterator[list[int]]:
        """Returns the `rbatch` images of each step, from the next one on, for stable targets.

        The global batch comes first, then images from a separate stream. They depend only on the
        seed and the step, and are the same on every rank. If the data set has at most `rbatch`
        images, all are used, each once.
        """
        check_stable_targets(self.config, self.dataset)
        size, batch = len(self.dataset), self.config.batch
        if size <= self.config.rbatch:
            return itertools.repeat(list(range(size)))
        extra = self.config.rbatch - batch
        seed = misc.mix_seed(self.config.seed, _REFERENCE_TAG)

        def indices(nimg: int) -> list[int]:
            step = nimg // batch
            return [*order_at(size, self.config.seed, nimg + np.arange(batch)).tolist(),
                    *order_at(size, seed, step * extra + np.arange(extra)).tolist()]
        return map(indices, itertools.count(self.cur_nimg, batch))

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.cur_nimg // self.config.batch

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._lr_of(self._sampled)

    def _lr_of(self, part: Part) -> float:
        rampup_nimg = part.lr_rampup * 1e6
        ramp = min(self.cur_nimg / rampup_nimg, 1.0) if rampup_nimg > 0 else 1.0
        return part.lr * ramp * self.config.lr_decay_at(self.cur_nimg)

    def train_step(self) -> None:
        """Trains on the next batch."""
        batches, auxiliary = self._next_batches(), self.objective.auxiliary
        bad_before = torch.zeros_like(self._step_loss)
        if auxiliary:
            batches = list(batches)
            for number in range(1, self.objective.auxiliary_steps + 1):
                bad_before = torch.maximum(bad_before, self._move(auxiliary, batches, number))
        bad = self._move(self._sampled, batches)
        beta = ema_beta(self.cur_nimg, self.config.batch, self.config.ema * 1e6, self.ema_rampup)
        update_ema_(self.ema, self.net, beta, skip=bad)
        self.objective.after_step(self.net, bad)
        self._count(torch.maximum(bad, bad_before))
        self.cur_nimg += self.config.batch

    @property
    def _sampled(self) -> Part:
        return Part(self.net, self.optimizer, self.config.lr, self.config.lr_rampup, self.ddp)

    def _move(self, part: Part, batches: Iterable[Batch], number: int = 0) -> torch.Tensor:
        """Updates one network by a step on the batches of all rounds.

        `number` distinguishes the steps of one `train_step`: 0 is that of the network that is
        sampled, 1 and above are those of the auxiliary network.

        Returns:
            1, on the device, if the step was skipped because gradients are not finite, else 0.
        """
        optimizer = part.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self._lr_of(part)
        self._accumulate_gradients(part, batches, number)
        bad = self._finish_gradients(part.net)
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = bad
            optimizer.grad_scale = self.loss_scale if self.dynamic_scale else None
            optimizer.step()
        elif not bad:  # waits for the device
            # The lengths of RAdam's first steps depend on the gradients' scale, so it is removed.
            torch._foreach_mul_([p.grad for p in part.net.parameters() if p.grad is not None],
                                1 / self.loss_scale)
            optimizer.step()
        return bad

    def _next_batches(self) -> Iterator[Batch]:
        """Yields the batch of each round of this step."""
        reference = self._next_reference() if self.config.stf else (None, None)
        for _ in range(self.rounds):
            images, labels, *conditions = next(self._batches)
            condition = self._to_device(conditions[0], self.dataset.cond_scaling) \
                if conditions else None
            yield Batch(self._to_device(images, self.dataset.scaling),
                        labels.to(self.device, non_blocking=True), condition, *reference)

    def _accumulate_gradients(self, part: Part, batches: Iterable[Batch], number: int = 0) -> None:
        share = self.config.batch // self.world_size
        gain = self.loss_scale / share
        part.optimizer.zero_grad(set_to_none=True)
        words = (number,) if number else ()
        if not number:
            self._step_loss = torch.zeros_like(self._step_loss)
        for i, batch in enumerate(batches):
            # Dropout takes no generator; nothing else draws from PyTorch's default one.
            torch.manual_seed(misc.mix_seed(
                self.config.seed, _DROPOUT_TAG, self.step, self.rank, i, *words))
            draws = self._draw(self.rank * share + i * self.micro_batch, words)
            is_synced = i == self.rounds - 1 or part.ddp is part.net
            with contextlib.nullcontext() if is_synced else part.ddp.no_sync():
                loss = (self.objective.auxiliary_loss if number else self.objective.loss)(
                    part.ddp, batch, draws, self.cur_nimg)
                training_stats.report("Loss/auxiliary" if number else "Loss/loss", loss.detach())
                if not number:
                    self._step_loss += loss.detach().mean() / self.rounds
                (loss.sum() * gain).backward()

    def _draw(self, first: int, words: Sequence[int] = ()) -> Any:
        """Returns the draws of the micro-batch that begins at image `first` of the global batch."""
        def seeded(block: int) -> torch.Generator:
            return self._step_rng.manual_seed(
                misc.mix_seed(self.config.seed, _STEP_TAG, self.step, block, *words))
        return self.loss_fn.draw_range(first, first + self.micro_batch, self.dataset.image_shape,
                                       seeded, self.augment_pipe)

    @property
    def loss_fn(self) -> Any:
        """The loss that the objective minimises."""
        return self.objective.loss_fn

    @loss_fn.setter
    def loss_fn(self, value: Any) -> None:
        self.objective.loss_fn = value

    def _next_reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images [R, C, H, W] and labels [R, label_dim] of this step's reference batch."""
        images, labels = next(self._references)
        return self._to_device(images, self.dataset.scaling), labels.to(
            self.device, non_blocking=True)

    def _to_device(self, images: torch.Tensor, scaling: Scaling) -> torch.Tensor:
        """Returns stored images as networks see them on the device."""
        return scaling.to_network(images.to(self.device, non_blocking=True))

    def _finish_gradients(self, net: torch.nn.Module) -> torch.Tensor:
        """Clips the averaged gradients, if asked to, and checks whether they are finite.

        Computing their 2-norm is the cheapest check. It is infinite if a square exceeds float32,
        which would make Adam's second moment infinite for good. The limit of --clip-grad is on the
        unscaled gradient, so it is multiplied by the loss scale too.

        Returns:
            1 if they are not finite, else 0; a 0-d float on the device.
        """
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.config.clip_grad is not None:
            limit = self.config.clip_grad * self.loss_scale
            torch._foreach_mul_(grads, (limit / norm).clamp(max=1))  # 1 at norm 0
        return (~norm.isfinite()).to(torch.float32)

    def _count(self, bad: torch.Tensor) -> None:
        """Updates the counters and a dynamic loss scale, all on the device."""
        c = self.counters
        c["bad_total"] = c["bad_total"] + bad
        c["bad_row"] = (c["bad_row"] + 1) * bad
        longer = c["bad_row"] > c["worst_row"]
        c["bad_step"] = torch.where(longer, self.step - c["bad_row"] + 1, c["bad_step"])
        c["worst_row"] = torch.maximum(c["worst_row"], c["bad_row"])
        self._bad_loss = torch.where(c["bad_row"] == 1, self._step_loss, self._bad_loss)
        self._good_loss = torch.where(bad > 0, self._good_loss, self._step_loss)
        if not self.dynamic_scale:
            return
        good = (c["good_since_change"] + 1) * (1 - bad)
        double = good >= _DYNAMIC_SCALE_PERIOD
        factor = torch.where(bad > 0, 0.5, torch.where(double, 2.0, 1.0))
        self.loss_scale = self.loss_scale * factor
        c["good_since_change"] = torch.where(double, torch.zeros_like(good), good)

    def seems_diverged(self) -> bool:
        """Says whether too many steps in a row were bad, as far as is known without waiting."""
        return self._seen_row(self.counters["worst_row"]) > self.config.max_bad_steps

    def check_divergence(self) -> None:
        """Raises DivergedError if too many steps in a row were bad. It waits for the device.

        Every rank must call it at the same step.
        """
        row = int(self.counters["worst_row"])
        self.counters["worst_row"].zero_()
        if row <= self.config.max_bad_steps:
            return
        step = int(self.counters["bad_step"])
        positions = step * self.config.batch + np.arange(self.config.batch)
        first = order_at(len(self.dataset), self.config.seed,
                         positions[:_MAX_NAMED] // self.config.patches)
        losses = distributed.all_reduce_sum_(torch.stack([self._bad_loss, self._good_loss]))
        bad_loss, good_loss = (losses / self.world_size).tolist()
        raise DivergedError(
            f"{row} steps in a row had a loss or gradients that are not finite, from step {step} "
            f"({step * self.config.batch / 1000:g} kimg; its loss is {bad_loss:.5g}, the last good "
            f"one was {good_loss:.5g}; its first images have the data indices "
            f"{', '.join(map(str, first))}); more than --max-bad-steps={self.config.max_bad_steps}"
            f". These steps did not change the weights. {self._divergence_hint()}")

    def _divergence_hint(self) -> str:
        if self.config.D < HEAVY_TAILED_D:
            return f"Noise of D={self.config.D:g} can exceed float32: use a larger --aug_dim"
        if self.config.precision != "fp32":
            return "Lower --lr, or use --precision=fp32"
        return "Lower --lr"

    @property
    def is_finished(self) -> bool:
        """Whether all images have been seen, and the last tick is done."""
        is_due = bool(self.unfinished and self.unfinished["is_due"])
        return self.cur_nimg >= self.config.total_nimg and not is_due

    def state(self) -> dict[str, Any]:
        """Returns all that a resumed run needs, see checkpoints/checkpoint.py."""
        progress = {"cur_nimg": self.cur_nimg, "ema_rampup": self.ema_rampup,
                    "best_score": self.best_score, "best_score_of": self.best_score_of,
                    "unfinished": self.unfinished,
                    "loss_scale": self.loss_scale.cpu(), "draws": DRAWS_VERSION,
                    "counters": {name: value.cpu() for name, value in self.counters.items()}}
        return {
            "format": checkpoint.STATE_FORMAT, "network": self.net.config,
            "net": dict(self.net.state_dict()), "ema": dict(self.ema.state_dict()),
            "optimizer": self.optimizer.state_dict(), "progress": progress,
            "options": self.config.to_dict(), "dataset": dataset_record(self.dataset),
            **self.objective.state(),
        }

    def snapshot(self) -> dict[str, Any]:
        """Returns what sampling needs, see checkpoints/checkpoint.py."""
        return checkpoint.as_snapshot(self.state())


class _HostCopy:
    """A recent value of a number on the device, read without waiting for the device."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._value = 0.0
        self._box = torch.zeros([], pin_memory=self._on_gpu)
        self._copied: torch.cuda.Event | None = None

    def __call__(self, number: torch.Tensor) -> float:
        """Starts copying `number` unless a copy is under way; returns the last one to arrive."""
        if not self._on_gpu:
            return float(number)
        if self._copied is None or self._copied.query():
            self._value = float(self._box)
            self._box.copy_(number, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._value


def check_stable_targets(config: TrainConfig, dataset: ImageFolderDataset) -> None:
    """Raises ValueError if stable targets are asked for and the labels are not classes."""
    if config.stf and dataset.has_labels and not dataset.has_onehot_labels:
        raise ValueError(f"--stf=1: the labels of {config.data} are vectors, but stable targets "
                         "are means over the images of a class; train with --cond=0 or --stf=0")


def describe_data(config: TrainConfig, dataset: ImageFolderDataset) -> str:
    """Returns a text with the number and shape of the images, and of their patches."""
    text = f"{len(dataset)} images {'x'.join(map(str, dataset.stored_shape))}"
    if dataset.patch is None:
        return text
    return f"{text}, in patches of {dataset.patch}x{dataset.patch} ({config.patches} per image)"


def dataset_record(dataset: ImageFolderDataset) -> dict[str, Any]:
    """Returns what files record of the data set: its identity, and the scaling of samples."""
    record = {"name": dataset.name, "size": len(dataset), "label_dim": dataset.label_dim,
              "image_shape": list(dataset.stored_shape), "fingerprint": dataset.fingerprint,
              "scale": dataset.scaling.to_dict()}
    if dataset.patch is not None:
        record["patch"] = dataset.patch
    if dataset.has_labels:
        record["label_kind"] = "classes" if dataset.has_onehot_labels else "vectors"
    if dataset.has_labels and dataset.has_onehot_labels:
        counts = np.bincount(dataset.class_numbers, minlength=dataset.label_dim)
        record["class_counts"] = counts.tolist()
        if dataset.class_names:
            record["class_names"] = list(dataset.class_names)
    if dataset.cond_scaling:
        record |= {"cond_shape": [dataset.cond_channels, *dataset.stored_shape[1:]],
                   "cond_scale": dataset.cond_scaling.to_dict()}
    return record
