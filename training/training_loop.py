"""The training loop: one process, or many under torchrun, with the same result.

    step k trains on images k*batch ... (k+1)*batch - 1 of the stream; cur_nimg = k*batch before it

Order of a step: learning rate, gradients (all accumulation rounds, averaged over ranks),
finiteness, Adam, EMA, cur_nimg += batch. Nothing in a step waits for the device; what is reported
stays there until the tick reads it.
"""

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import psutil
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dnnlib import signals
from dnnlib.cli import UserError
from dnnlib.util import format_ranges, format_time
from metrics.score_sheet import Score, ScoreSheet
from torch_utils import distributed, misc, training_stats
from torch_utils.atomic import append_line, write_json
from torch_utils.loading import read_in_processes, read_in_threads
from training import checkpoint
from training.augment import AugmentPipe
from training.config import TrainConfig
from training.dataset import ImageFolderDataset, TrainingOrder, order_at
from training.ema import RAMPUP_RATIO, ema_beta, update_ema_
from training.grid import image_grid, save_png
from training.loss import LOSSES, LSUN_SIGMA_MAX, DenoisingLoss, LossDraws
from training.network_sampler import NetworkSampler, SeedImages
from training.networks import Precond, build_network
from training.run_files import RunFiles
from training.sampling import SamplerConfig, generate_images, to_uint8
from training.scaling import Scaling
from training.scoring import network_features, open_scorer

# Set the uses of the run's seed apart.
_INIT_TAG, _STEP_TAG, _DROPOUT_TAG, _REFERENCE_TAG = 1, 2, 3, 4
_DYNAMIC_SCALE_START = 2.0**16
_DYNAMIC_SCALE_PERIOD = 2000  # good steps between doublings
_HEAVY_TAILED_D = 0.5  # below, draws beyond float32 have been seen (training/perturbation.py)
_MAX_NAMED = 8  # images in an error message
_GRID_SEED = 0
_GRID_MAX_ROWS = 16
_unwritten: set[Path] = set()  # files that have been warned of
_EVAL_BATCH = 64  # the most samples at a time; smaller where --batch-gpu is


class DivergedError(RuntimeError):
    """Too many steps in a row had gradients that are not finite."""


class Trainer:
    """The state of a run in one process, and its step.

    Args:
        config: the run's options.
        dataset: the images.
        device: where to train.
    """

    def __init__(self, config: TrainConfig, dataset: ImageFolderDataset, device: torch.device):
        self.config, self.dataset, self.device = config, dataset, device
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.micro_batch, self.rounds = config.rounds(self.world_size)
        self.cur_nimg = 0
        self.best_score: float | None = None
        # What a tick has collected and still has to do, in a state that a signal had written.
        self.unfinished: dict[str, Any] | None = None

        torch.manual_seed(misc.mix_seed(config.seed, _INIT_TAG))
        self.net = build_network(
            config.network(dataset.resolution, dataset.num_channels, dataset.label_dim,
                           dataset.cond_channels))
        self.net.to(device).train()
        self.net.compute_dtype = misc.compute_dtype(config.precision)
        self.ema_rampup: float | None = RAMPUP_RATIO
        if config.transfer:
            self._transfer(config.transfer)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.loss_fn = build_loss(config, self.net)
        self.augment_pipe = AugmentPipe.standard(config.augment) if config.augment > 0 else None
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
        # Counters that live on the device: scale of a dynamic loss, good steps since its last
        # change, bad steps in all, bad steps in a row, the longest such row, its first step.
        self.dynamic_scale = config.ls is None and config.precision == "fp16"
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
        """Opens the stream of batches at `cur_nimg` and couples the ranks."""
        if self.config.compile == "1":
            self.net.model.compile()
        if torch.distributed.is_initialized():
            ids = [self.device] if self.device.type == "cuda" else None
            self.ddp = DistributedDataParallel(
                self.net, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._batches = self._open_batches()

    def close(self) -> None:
        """Lets go of the process group's hooks and of the loader workers."""
        self.ddp = self.net
        self._batches = None
        self.optimizer = None

    def _open_batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        order = TrainingOrder(
            len(self.dataset), self.config.seed, self.config.batch, start=self.cur_nimg,
            rank=self.rank, world_size=self.world_size, rounds=self.rounds)
        read = read_in_threads if self.dataset.is_packed else read_in_processes
        return read(self.dataset, order, workers=self.config.workers,
                    pin_memory=self.device.type == "cuda")

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.cur_nimg // self.config.batch

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        rampup_nimg = self.config.lr_rampup * 1e6
        ramp = min(self.cur_nimg / rampup_nimg, 1.0) if rampup_nimg > 0 else 1.0
        return self.config.lr * ramp

    def train_step(self) -> None:
        """Trains on the next batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self._accumulate_gradients()
        bad = self._finish_gradients()
        self.optimizer.found_inf = bad
        self.optimizer.grad_scale = self.loss_scale if self.dynamic_scale else None
        self.optimizer.step()
        beta = ema_beta(self.cur_nimg, self.config.batch, self.config.ema * 1e6, self.ema_rampup)
        update_ema_(self.ema, self.net, beta, skip=bad)
        self._count(bad)
        self.cur_nimg += self.config.batch

    def _accumulate_gradients(self) -> None:
        draws = self._draw_step()
        reference = self._reference_batch(draws.augment) if self.config.stf else None
        share = self.config.batch // self.world_size
        draws = draws[self.rank * share:(self.rank + 1) * share]
        gain = self.loss_scale / share
        self.optimizer.zero_grad(set_to_none=True)
        self._step_loss = torch.zeros_like(self._step_loss)
        for i in range(self.rounds):
            images, labels, *conditions = next(self._batches)
            images = self._to_device(images, self.dataset.scaling)
            condition = self._to_device(conditions[0], self.dataset.cond_scaling) \
                if conditions else None
            labels = labels.to(self.device, non_blocking=True)
            # Dropout takes no generator: it alone draws from PyTorch's default one.
            torch.manual_seed(misc.mix_seed(
                self.config.seed, _DROPOUT_TAG, self.step, self.rank, i))
            with self._sync_on_last_round(i):
                part = slice(i * self.micro_batch, (i + 1) * self.micro_batch)
                loss = self.loss_fn(self.ddp, images, labels, self.augment_pipe, draws=draws[part],
                                    reference=reference, condition=condition)
                training_stats.report("Loss/loss", loss.detach())
                self._step_loss += loss.detach().mean() / self.rounds
                (loss.sum() * gain).backward()

    def _draw_step(self) -> LossDraws:
        """Returns what the whole global batch of this step draws."""
        rng = self._step_rng.manual_seed(
            misc.mix_seed(self.config.seed, _STEP_TAG, self.step))
        shape = (self.config.batch, *self.dataset.image_shape)
        return self.loss_fn.draw(shape, rng, self.augment_pipe)

    def _reference_batch(self, augment_draws: Any) -> torch.Tensor:
        """Returns the `rbatch` images over which stable targets are the mean, [R, C, H, W].

        The global batch as it is augmented for training, then images of a stream of their own. A
        function of the seed and the step alone, the same on every rank.
        """
        batch, extra = self.config.batch, self.config.rbatch - self.config.batch
        seed = misc.mix_seed(self.config.seed, _REFERENCE_TAG)
        size = len(self.dataset)
        indices = np.concatenate([
            order_at(size, self.config.seed, self.cur_nimg + np.arange(batch)),
            order_at(size, seed, self.step * extra + np.arange(extra))])
        images = self._to_device(torch.from_numpy(self.dataset.get_batch(indices)[0]),
                                 self.dataset.scaling)
        if self.augment_pipe is None:
            return images
        rng = self._step_rng.manual_seed(misc.mix_seed(seed, self.step))
        own, _ = self.augment_pipe(images[:batch], augment_draws)
        others, _ = self.augment_pipe(images[batch:], self.augment_pipe.draw(extra, rng))
        return torch.cat([own, others])

    def _to_device(self, images: torch.Tensor, scaling: Scaling) -> torch.Tensor:
        """Returns stored images as networks see them on the device."""
        return scaling.to_network(images.to(self.device, non_blocking=True))

    def _sync_on_last_round(self, i: int) -> contextlib.AbstractContextManager:
        if i == self.rounds - 1 or self.ddp is self.net:
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    def _finish_gradients(self) -> torch.Tensor:
        """Returns 1 if any averaged gradient is not finite, else 0: a 0-d float on the device."""
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        largest = torch.nn.utils.get_total_norm(grads, norm_type=math.inf)
        return (~largest.isfinite()).to(torch.float32)

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
        """Raises DivergedError where too many steps in a row were bad. Waits for the device.

        Every rank must call it at the same step.
        """
        row = int(self.counters["worst_row"])
        self.counters["worst_row"].zero_()
        if row <= self.config.max_bad_steps:
            return
        step = int(self.counters["bad_step"])
        positions = step * self.config.batch + np.arange(self.config.batch)
        first = order_at(len(self.dataset), self.config.seed, positions[:_MAX_NAMED])
        losses = distributed.all_reduce_sum_(torch.stack([self._bad_loss, self._good_loss]))
        bad_loss, good_loss = (losses / self.world_size).tolist()
        raise DivergedError(
            f"{row} steps in a row had loss or gradients that are not finite, from step {step} "
            f"({step * self.config.batch / 1000:g} kimg; its loss is {bad_loss:.5g}, the last good "
            f"one was {good_loss:.5g}; its images begin with data indices "
            f"{', '.join(map(str, first))}); more than --max-bad-steps={self.config.max_bad_steps}"
            f". The weights are those from before. {self._divergence_hint()}")

    def _divergence_hint(self) -> str:
        if self.config.D < _HEAVY_TAILED_D:
            return f"Noise of D={self.config.D:g} can exceed float32: use a larger --aug_dim"
        if self.config.precision != "fp32":
            return "Lower --lr, or use --precision=fp32"
        return "Lower --lr"

    def state(self) -> dict[str, Any]:
        """Returns all that a resumed run needs, see training/checkpoint.py."""
        progress = {"cur_nimg": self.cur_nimg, "ema_rampup": self.ema_rampup,
                    "best_score": self.best_score, "unfinished": self.unfinished,
                    "loss_scale": self.loss_scale.cpu(),
                    "counters": {name: value.cpu() for name, value in self.counters.items()}}
        return {
            "format": checkpoint.STATE_FORMAT, "network": self.net.config,
            "net": dict(self.net.state_dict()), "ema": dict(self.ema.state_dict()),
            "optimizer": self.optimizer.state_dict(), "progress": progress,
            "options": self.config.to_dict(), "dataset": dataset_record(self.dataset),
        }

    def snapshot(self) -> dict[str, Any]:
        """Returns what sampling needs, see training/checkpoint.py."""
        return {
            "format": checkpoint.SNAPSHOT_FORMAT, "network": self.net.config,
            "ema": dict(self.ema.state_dict()), "progress": {"cur_nimg": self.cur_nimg},
            "options": self.config.to_dict(), "dataset": dataset_record(self.dataset),
        }

    def restore(self, state: dict[str, Any], source: str) -> None:
        """Continues from a training state; call before `start`.

        Raises:
            ValueError: it belongs to another network or other data; names the first difference.
        """
        self._check_network(state, source)
        if state["format"] != checkpoint.STATE_FORMAT:
            self._restore_foreign(state, source)
            return
        record = dataset_record(self.dataset)
        if record["fingerprint"] != state["dataset"]["fingerprint"]:
            raise ValueError(f"{source}: the data set has changed since the run began "
                             f"({state['dataset']['size']} images then, {record['size']} now)")
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.cur_nimg = state["progress"]["cur_nimg"]
        self.ema_rampup = state["progress"]["ema_rampup"]
        self.best_score = state["progress"].get("best_score")
        self.unfinished = state["progress"].get("unfinished")
        if self.dynamic_scale:
            self.loss_scale = state["progress"]["loss_scale"].to(self.device)
        self.counters = {k: v.to(self.device) for k, v in state["progress"]["counters"].items()}

    def _check_network(self, state: dict[str, Any], source: str) -> None:
        """Raises ValueError where a state is of another network than this run's."""
        # The dtype follows --precision of this run, not of the one that wrote the state.
        skip = {"use_fp16"}
        if not state.get("D_recorded", True):
            skip |= {"pfgmpp", "D"}
        ours, theirs = self.net.config, state["network"]
        if state["format"] != checkpoint.STATE_FORMAT:
            # Foreign files spell out what ours leave at its default, and the other way round.
            skip |= set(ours) ^ set(theirs)
        else:
            skip.add("dropout")  # an option without weights, see config.changed_options
        difference = checkpoint.first_difference(
            *({k: v for k, v in config.items() if k not in skip} for config in (ours, theirs)))
        if difference:
            raise ValueError(f"{source}: the state is of another network ({difference})")

    def _restore_foreign(self, state: dict[str, Any], source: str) -> None:
        """Continues from a state of EDM or PFGM++, and says what can't be restored."""
        weights = state.get("net") or state["ema"]
        self._check_weights(weights, f"--resume={source}")
        self.net.load_state_dict(weights)
        self.ema.load_state_dict(state["ema"] or weights)
        moments = self.optimizer.state_dict() | {"state": state["optimizer"]["state"]}
        self.optimizer.load_state_dict(moments)
        nimg = state["progress"]["cur_nimg"]
        named = re.search(r"training-state-(\d+)", Path(source).name)
        self.cur_nimg = nimg if nimg is not None else int(named[1]) * 1000 if named else 0
        self.ema_rampup = None  # these states follow long runs, whose ramp-up is over
        lost = ["random state", "data position"] + ([] if state["ema"] else ["averaged weights"])
        distributed.print0(
            f"Note: {source} does not hold {', '.join(lost)}; the run goes on at "
            f"{self.cur_nimg / 1000:g} kimg with draws and data order of its own seed")

    def _check_weights(self, weights: dict[str, torch.Tensor], given: str) -> None:
        """Raises ValueError, naming the first difference, where weights do not fit the network."""
        ours, theirs = ({name: tuple(t.shape) for name, t in tensors.items()}
                        for tensors in (self.net.state_dict(), weights))
        difference = checkpoint.first_difference(ours, theirs)
        if difference:
            raise ValueError(f"{given}: the weights are of another network ({difference})")

    def _transfer(self, source: str) -> None:
        weights = checkpoint.sampling_weights(checkpoint.load(source))
        self._check_weights(weights, f"--transfer={source}")
        self.net.load_state_dict(weights)
        self.ema_rampup = None  # the weights are good already: nothing to forget


class _HostCopy:
    """The value of a number on the device as it was a moment ago, for the host to look at."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._value = 0.0
        self._box = torch.zeros([], pin_memory=self._on_gpu)
        self._copied: torch.cuda.Event | None = None

    def __call__(self, number: torch.Tensor) -> float:
        """Starts copying `number` if no copy is under way; returns the last that has arrived."""
        if not self._on_gpu:
            return float(number)
        if self._copied is None or self._copied.query():
            self._value = float(self._box)
            self._box.copy_(number, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._value


def build_loss(config: TrainConfig, net: Precond) -> DenoisingLoss:
    """Returns the loss of the run's preconditioner, at the run's D."""
    kwargs: dict[str, Any] = {"pfgmpp": config.pfgmpp, "D": config.aug_dim}
    if config.precond == "edm":
        kwargs |= {"sigma_data": net.sigma_data, "lsun": config.lsun}
    return LOSSES[config.precond](**kwargs)


def dataset_record(dataset: ImageFolderDataset) -> dict[str, Any]:
    """Returns what a file keeps of the data set: to recognise it, and the scaling of samples."""
    record = {"name": dataset.name, "size": len(dataset), "label_dim": dataset.label_dim,
              "image_shape": list(dataset.image_shape), "fingerprint": dataset.fingerprint,
              "scale": dataset.scaling.to_dict()}
    if dataset.cond_scaling:
        record |= {"cond_shape": dataset.cond_shape, "cond_scale": dataset.cond_scaling.to_dict()}
    return record


def provenance(device: torch.device) -> dict[str, Any]:
    """Returns where a run comes from: commit, versions, device, world size."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=root, text=True,
            capture_output=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None  # not a checkout
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "commit": commit, "python": platform.python_version(), "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"), "cuda": torch.version.cuda,
        "device": str(device), "device_name": name, "world_size": distributed.get_world_size(),
        "cpu_threads": torch.get_num_threads(), "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


@dataclasses.dataclass
class _Clock:
    """Times and image counts since the run and the tick began."""

    start_time: float
    tick_start_time: float
    tick_start_nimg: int
    maintenance_sec: float = 0.0


def training_loop(
    config: TrainConfig, *, dataset: ImageFolderDataset, run_dir: Path, device: torch.device,
    resume: tuple[str, dict[str, Any]] | None = None,
) -> None:
    """Trains until `config.duration`; writes states, snapshots, grids and statistics to `run_dir`.

    Args:
        config: the run's options.
        dataset: the images.
        run_dir: an existing folder.
        device: where to train.
        resume: (name, content) of the training state to continue from.

    Raises:
        ValueError: the state or network to start from does not fit.
        DivergedError: too many bad steps in a row.
    """
    misc.configure_backends(config.precision, benchmark=config.bench,
                            deterministic=config.deterministic)
    trainer = Trainer(config, dataset, device)
    if resume:
        trainer.restore(resume[1], resume[0])
    _announce(trainer)
    if distributed.get_rank() == 0:
        RunFiles(run_dir, config.keep).tidy()
        write_json(run_dir / "training_options.json", {
            "options": config.to_dict(), "dataset": dataset_record(dataset),
            "network": finite_json(trainer.net.config, infinity="inf"),
            "provenance": provenance(device)})
        _save_real_grid(trainer, run_dir / "reals.png")
    evaluator = Evaluator(trainer, run_dir / "metrics.jsonl") if config.eval else None
    trainer.start()
    try:
        _run(trainer, run_dir, evaluator)
    finally:
        trainer.close()


class Evaluator:
    """Scores the averaged weights as `fid.py gen` scores a snapshot.

    Args:
        trainer: whose weights.
        path: the file that gets a JSON line a score.

    Raises:
        ValueError: reference, detector and images do not fit.
        OSError: a file can't be read.
    """

    def __init__(self, trainer: Trainer, path: Path):
        config, net = trainer.config, trainer.ema
        self._trainer, self._num = trainer, config.eval_num
        self._scorer = open_scorer(
            config.eval_detector, config.eval_ref, ["fid"], trainer.device,
            {"the data": trainer.dataset}, batch=_EVAL_BATCH, workers=config.workers)
        self._sheet = ScoreSheet(self._scorer, path)
        sampler = SamplerConfig(sigma_max=LSUN_SIGMA_MAX if config.lsun else None)
        conditions = SeedImages.of_conditions(trainer.dataset) if net.cond_channels else None
        self._sampler = NetworkSampler(net, sampler, trainer.device, None, {}, conditions,
                                       scaling=trainer.dataset.scaling)

    @property
    def name(self) -> str:
        """What the score is called."""
        return self._scorer.detector.distance_name

    def __call__(self) -> float:
        """Returns the score of the present weights; lower is better."""
        trainer, seeds = self._trainer, range(self._num)
        found = network_features(self._sampler, seeds, self._scorer.detector, metrics=["fid"],
                                 batch=min(trainer.micro_batch, _EVAL_BATCH), title=self.name)
        values = self._scorer.evaluate(found)
        if trainer.rank == 0:
            kimg = trainer.cur_nimg / 1e3
            self._sheet.add(Score(f"{kimg:g} kimg", "", values), {
                "kimg": kimg, "num": self._num, "seeds": format_ranges(seeds),
                "sampler": finite_json({**dataclasses.asdict(self._sampler.sampler),
                                        "D": self._sampler.net.D}, infinity="inf")})
        return values["fid"]


def _evaluate(trainer: Trainer, evaluator: Evaluator, files: RunFiles, bar) -> dict[str, float]:
    """Scores the run, keeps its best state, and returns what stats.jsonl says of it."""
    value = evaluator()
    kimg = trainer.cur_nimg / 1e3
    before = trainer.best_score
    is_best = before is None or value < before
    if is_best:
        trainer.best_score = value  # which the state records
        if trainer.rank == 0 and not files.save(checkpoint.BEST_STATE, trainer.state()):
            trainer.best_score = before  # the next one may be kept
    if trainer.rank == 0:
        standing = (f"; the lowest so far is {before:.5g}" if not is_best else
                    f", the lowest so far: kept as {checkpoint.BEST_STATE}"
                    if trainer.best_score == value else ", the lowest so far, but not kept")
        bar.write(f"{evaluator.name} {value:.5g} at {kimg:g} kimg{standing}", file=sys.stdout)
    return {"Metrics/" + evaluator.name.replace(" ", "_").lower(): value}


def _run(trainer: Trainer, run_dir: Path, evaluator: Evaluator | None) -> None:
    config = trainer.config
    now = time.time()
    upkeep = _Upkeep(trainer, run_dir, evaluator, training_stats.Collector(trainer.device),
                     _Clock(now, now, trainer.cur_nimg))
    is_due = upkeep.resume()
    if trainer.cur_nimg >= config.total_nimg and not is_due:
        distributed.print0(f"Nothing to do: {trainer.cur_nimg} of {config.total_nimg} images done")
        return
    with signals.deferred(), tqdm(
            total=config.total_nimg, initial=trainer.cur_nimg, unit="img", unit_scale=True,
            leave=False, disable=None if trainer.rank == 0 else True) as bar:
        if is_due:
            upkeep.run(bar)
        while trainer.cur_nimg < config.total_nimg:
            trainer.train_step()
            bar.update(config.batch)
            upkeep.after_step()
            if upkeep.is_due:
                upkeep.run(bar)
    distributed.print0("Training finished")


class _Upkeep:
    """What is done at ticks: scores, the report, files. And at a stop.

    Args:
        trainer: the run.
        run_dir: its folder.
        evaluator: gives the scores; None for none.
        collector: gives the statistics.
        clock: times the ticks.
    """

    def __init__(self, trainer: Trainer, run_dir: Path, evaluator: Evaluator | None,
                 collector: training_stats.Collector, clock: _Clock):
        self._trainer, self._run_dir, self._evaluator = trainer, run_dir, evaluator
        self._collector, self._clock = collector, clock
        self._files = RunFiles(run_dir, trainer.config.keep)
        self._agreement = distributed.Agreement(trainer.device)

    @property
    def is_due(self) -> bool:
        """Whether a tick ends at the images seen so far."""
        nimg, config = self._trainer.cur_nimg, self._trainer.config
        return nimg >= config.total_nimg or config.tick_at(nimg) is not None

    def resume(self) -> bool:
        """Takes over what a stopped run has left of its tick; says whether the tick is due now."""
        left, self._trainer.unfinished = self._trainer.unfinished, None
        if left:
            training_stats.resume(left["stats"], self._trainer.device)
        return bool(left and left["is_due"])

    def run(self, bar) -> None:
        """Scores, reports and writes what is due at this tick."""
        trainer, config = self._trainer, self._trainer.config
        nimg, done = trainer.cur_nimg, trainer.cur_nimg >= config.total_nimg
        tick = config.tick_at(nimg)
        if tick is None:  # the last tick may be short
            tick = (nimg - config.batch) // config.tick_nimg + 1
        self._collector.update()
        started = time.time()
        has_eval = self._evaluator and (done or config.is_eval_due(nimg))
        has_pictures = done or tick % config.snap == 0
        scores, pictures = {}, None
        if has_eval or has_pictures:
            with self._stops_at_once():
                scores = _evaluate(trainer, self._evaluator, self._files, bar) if has_eval else {}
                pictures = _sample_grid(trainer) if has_pictures else None
        self._clock.maintenance_sec += time.time() - started
        _report_tick(trainer, self._collector, self._clock, tick, self._run_dir, bar, scores)
        trainer.check_divergence()
        if trainer.rank == 0:
            _save_files(trainer, self._files, tick, done, pictures)
        self._clock.maintenance_sec = time.time() - self._clock.tick_start_time

    def after_step(self) -> None:
        """Stops or fails on all ranks where one of them has seen the reason."""
        trainer = self._trainer
        code, diverged = self._agreement.in_step(
            [signals.requested() or 0, int(trainer.seems_diverged())])
        if diverged:
            trainer.check_divergence()
        if code:
            self._collector.update()
            self._save_and_stop(code, is_due=self.is_due)

    @contextlib.contextmanager
    def _stops_at_once(self) -> Iterator[None]:
        """Ends what is inside at a signal: it takes long, and leaves the run as it is."""
        cause, timeout = None, None
        try:
            with signals.immediate():
                yield
        except (signals.Stopped, RuntimeError) as error:
            if signals.requested() is None:
                raise
            # Ranks may be anywhere inside, waiting for this one in a collective: then it leaves.
            cause, timeout = error, distributed.STOP_TIMEOUT
        heard = self._agreement.now([signals.requested() or 0 if cause else 0], timeout)
        if heard is None and self._trainer.rank != 0:
            raise signals.Stopped(signals.requested()) from cause
        if heard is None or heard[0]:
            code = heard[0] if heard else signals.requested()
            self._save_and_stop(code, is_due=True, cause=cause)

    def _save_and_stop(self, code: int, is_due: bool,
                       cause: BaseException | None = None) -> NoReturn:
        """Writes a training state on rank 0 and ends the run."""
        trainer = self._trainer
        trainer.unfinished = {"stats": self._collector.moments, "is_due": is_due}
        path = self._run_dir / f"training-state-{_tag(trainer)}.pt"

        def save() -> None:
            try:
                checkpoint.save(path, trainer.state())
            except OSError as error:
                raise UserError(f"stopped by a signal, but {path} can't be written: "
                                f"{error.strerror or error}") from error
            distributed.print0(f"Stopped at {trainer.cur_nimg / 1e3:g} kimg: {path} goes on from "
                               "here with --resume=auto")
        distributed.run_while_others_wait(save)
        raise signals.Stopped(code) from cause


def _tag(trainer: Trainer) -> str:
    return checkpoint.kimg_tag(trainer.cur_nimg, fractional=trainer.config.tick < 1)


def _report_tick(trainer, collector, clock: _Clock, tick: int, run_dir: Path, bar,
                 scores: dict[str, float]) -> None:
    """Prints the tick's line, appends it to stats.jsonl, and starts the clock of the next tick."""
    device = trainer.device
    now = time.time()
    tick_sec = now - clock.tick_start_time - clock.maintenance_sec
    kimg = (trainer.cur_nimg - clock.tick_start_nimg) / 1e3
    gb = 2**30
    sec_per_kimg = tick_sec / kimg if kimg else math.nan  # a stopped run's tick that was left
    fields = {
        "Progress/tick": tick, "Progress/kimg": trainer.cur_nimg / 1e3,
        "Progress/lr": trainer.lr, "Progress/loss_scale": float(trainer.loss_scale),
        "Progress/bad_steps": int(trainer.counters["bad_total"]),
        "Timing/total_sec": now - clock.start_time, "Timing/sec_per_tick": tick_sec,
        "Timing/sec_per_kimg": sec_per_kimg, "Timing/maintenance_sec": clock.maintenance_sec,
        "Resources/cpu_mem_gb": psutil.Process().memory_info().rss / gb,
        "Resources/peak_gpu_mem_gb": 0.0, "Resources/peak_gpu_mem_reserved_gb": 0.0, **scores,
    }
    if device.type == "cuda":
        fields["Resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated(device) / gb
        fields["Resources/peak_gpu_mem_reserved_gb"] = torch.cuda.max_memory_reserved(device) / gb
        torch.cuda.reset_peak_memory_stats(device)
    bad = fields["Progress/bad_steps"]
    if trainer.rank == 0:
        line = (f"tick {tick:<5d} kimg {fields['Progress/kimg']:<9.4g} "
                f"loss {collector.mean('Loss/loss'):<8.5f} "
                f"time {format_time(fields['Timing/total_sec']):<12s} "
                f"img/s {1e3 / fields['Timing/sec_per_kimg']:<8.4g} "
                f"mem {fields['Resources/cpu_mem_gb']:.2f} GB "
                f"gpumem {fields['Resources/peak_gpu_mem_gb']:.2f} GB"
                + (f" bad steps {bad}" if bad else ""))
        bar.write(line, file=sys.stdout)
        sys.stdout.flush()
        stats = {**collector.as_dict(), **{name: {"num": 1, "mean": value, "std": 0.0}
                                           for name, value in fields.items()}}
        append_stats(run_dir / "stats.jsonl", stats | {"timestamp": now})
    clock.tick_start_nimg, clock.tick_start_time = trainer.cur_nimg, now


def append_stats(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line; numbers that JSON lacks become null. A full disk only warns, once."""
    try:
        append_line(path, json.dumps(finite_json(record)))
        _unwritten.discard(path)
    except OSError as error:
        if path not in _unwritten:
            distributed.print0(f"Warning: {path} not written: {error}")
        _unwritten.add(path)


def finite_json(value: Any, infinity: str | None = None) -> Any:
    """Returns plain data with NaN and infinities, which JSON lacks, replaced by `infinity`."""
    if isinstance(value, dict):
        return {key: finite_json(item, infinity) for key, item in value.items()}
    return infinity if isinstance(value, float) and not math.isfinite(value) else value


def _save_files(trainer: Trainer, files: RunFiles, tick: int, done: bool,
                pictures: PIL.Image.Image | None) -> None:
    config, tag = trainer.config, _tag(trainer)
    if done or tick % config.snap == 0:
        files.save(f"network-snapshot-{tag}.pt", trainer.snapshot())
    if pictures is not None:
        files.write(f"samples-{tag}.png", save_png, pictures)
    is_state_due = done or (tick > 0 and tick % config.dump == 0)
    if is_state_due and files.save(f"training-state-{tag}.pt", trainer.state()):
        files.prune()
    files.end_occasion(last=done)


def _sample_grid(trainer: Trainer) -> PIL.Image.Image | None:
    """Returns a grid of EMA samples of fixed seeds on rank 0; rows are classes if there are any.

    With condition images, row i has the condition image of training image i, then samples, then
    the image itself.
    """
    has_conditions = trainer.dataset.cond_channels > 0
    classes, rows, columns = _grid_layout(trainer)
    if rows == 0:
        return None
    sampler = SamplerConfig(sigma_max=LSUN_SIGMA_MAX if trainer.config.lsun else None)
    mine = {}
    for row in range(rows)[trainer.rank::trainer.world_size]:
        seeds = range(row * columns, (row + 1) * columns)
        number = row % len(trainer.dataset)
        given = _grid_condition(trainer, number) if has_conditions else {}
        [batch] = generate_images(
            trainer.ema, [seeds], sampler=sampler, device=trainer.device,
            **({"class_idx": classes[row] if classes else None} | given))
        mine[row] = [*to_uint8(batch.images).cpu().numpy()]
        if has_conditions:
            mine[row] = _with_truth(trainer.dataset, number, mine[row])
    pictures = {row: images for part in distributed.gather_objects(mine)
                for row, images in part.items()}
    if trainer.rank != 0:
        return None
    return image_grid([pictures[row] for row in range(rows)], list(map(str, classes)))


def _grid_condition(trainer: Trainer, number: int) -> dict[str, Any]:
    """Returns what `generate_images` is told to sample for the condition and class of an image."""
    label = trainer.dataset.get_label(number)
    of_seed = SeedImages.of_conditions(trainer.dataset)
    return {"conditions": lambda seeds: of_seed([number] * len(seeds)),
            "class_idx": int(label.argmax()) if trainer.dataset.has_onehot_labels else None}


def _with_truth(dataset: ImageFolderDataset, number: int,
                samples: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the condition image of an image, samples, and the image, to look at."""
    images, _, conditions = dataset.get_batch([number])
    return [dataset.cond_scaling.to_picture(conditions)[0], *samples,
            dataset.scaling.to_picture(images)[0]]


def _save_real_grid(trainer: Trainer, path: Path) -> None:
    """Writes a grid of training images in the layout of the sample grids."""
    dataset = trainer.dataset
    classes, rows, columns = _grid_layout(trainer)
    if rows == 0:
        return
    order = order_at(len(dataset), _GRID_SEED, range(len(dataset)))
    if classes:
        labels = dataset.class_numbers[order]
        groups = [order[labels == k][:columns] for k in classes]
    else:
        groups = np.array_split(order[:rows * columns], rows)
    pictures = [dataset.scaling.to_picture(dataset.get_batch(group)[0]) for group in groups]
    save_png(path, image_grid(pictures, list(map(str, classes))))


def _grid_layout(trainer: Trainer) -> tuple[list[int], int, int]:
    """Returns (classes of the rows, if any, rows, columns) of about `config.samples` images.

    The classes are the first that have images, and none where there are condition images.
    """
    count = trainer.config.samples
    if count is None:
        count = 64 if trainer.device.type == "cuda" else 16
    if count == 0:
        return [], 0, 0
    classes = []
    if trainer.dataset.has_onehot_labels and not trainer.dataset.cond_channels:
        classes = np.unique(trainer.dataset.class_numbers)[:min(count, _GRID_MAX_ROWS)].tolist()
    rows = len(classes) or min(math.isqrt(count), _GRID_MAX_ROWS)
    return classes, rows, count // rows


def _announce(trainer: Trainer) -> None:
    config, dataset = trainer.config, trainer.dataset
    shape = "x".join(map(str, dataset.image_shape))
    noise = f"PFGM++ with D = {config.D:g}" if config.pfgmpp else "Gaussian (D = inf)"
    distributed.print0(misc.module_table(trainer.net))
    distributed.print0(
        f"\nData       {len(dataset)} images {shape} of {dataset.name}, "
        f"{dataset.label_dim or 'no'} label dimensions\n"
        f"Noise      {noise}\n"
        f"Batch      {config.batch} = {trainer.micro_batch} images x {trainer.rounds} round(s) "
        f"x {trainer.world_size} process(es), {trainer.device.type}, {config.precision}\n"
        f"Training   {trainer.cur_nimg / 1e3:g} of {config.total_nimg / 1e3:g} kimg, "
        f"seed {config.seed}\n")
    if config.D < _HEAVY_TAILED_D:
        distributed.print0(f"Warning: noise of D = {config.D:g} can exceed float32; steps with "
                           "such draws are skipped and counted as bad steps")
    if config.precision == "fp16" and trainer.device.type != "cuda":
        distributed.print0("Note: fp16 is for GPUs; on the CPU the network runs in fp32")
