"""The training loop: one process, or many under torchrun, with the same result.

It takes steps until the run is done. At ticks it scores, reports and writes files; when it is
stopped, it writes a training state.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import PIL.Image
import psutil
import torch

from checkpoints import checkpoint
from dnnlib import console, signals
from dnnlib.atomic import append_line, write_json
from dnnlib.cli import UserError
from dnnlib.progress import Progress, stage
from dnnlib.util import format_ranges, format_time, json_value
from images.dataset import ImageFolderDataset
from images.grid import save_png
from metrics.score_log import ScoreLog
from metrics.score_names import SCORES_FILE, recorded_name
from metrics.scoring import NonFiniteSamplesError, network_features, open_evaluator, scored_name
from pfgmpp.samplers import SamplerConfig
from sampling.network_sampler import NetworkSampler
from sampling.seed_images import SeedImages
from torch_utils import distributed, misc, training_stats
from training.advice import Machine, advice
from training.agreement import check_weights
from training.config import OPTIONS_FILE, REALS_FILE, STATS_FILE, TrainConfig
from training.log_sinks import LogSinks
from training.pair_scores import PairEvaluator
from training.resume import LOSS_SCALE_KEY, State, Weights, restore_
from training.run_files import RunFiles
from training.sample_grids import labels_of_seeds, sample_grid, sampler_of, save_real_grid
from training.teacher import Teacher
from training.trainer import HEAVY_TAILED_D, Trainer, dataset_record, describe_data
from training.validation import VALIDATION_LOSS, Validation

_unwritten: set[Path] = set()  # files that a warning has named
_EVAL_BATCH = 64  # the most samples at a time; fewer if --batch-gpu is smaller


def provenance(device: torch.device) -> dict[str, Any]:
    """Returns what a run was made with: commit, versions, device, world size, command."""
    root, commit = Path(__file__).resolve().parent.parent, None
    if (root / ".git").exists():  # an installed copy may lie in a checkout of something else
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(
                ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=root, text=True,
                capture_output=True, timeout=10, check=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "commit": commit, "python": platform.python_version(), "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"), "cuda": torch.version.cuda,
        "device": str(device), "device_name": name, "world_size": distributed.get_world_size(),
        "cpu_threads": torch.get_num_threads(), "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def training_loop(
    config: TrainConfig, *, dataset: ImageFolderDataset, run_dir: Path, device: torch.device,
    start: State | Weights | None = None, held_out: ImageFolderDataset | None = None,
    pairs: ImageFolderDataset | None = None, teacher: Teacher | None = None,
) -> None:
    """Trains until `config.duration`; writes states, snapshots, grids and statistics to `run_dir`.

    `run_dir` must exist. `start` is the state to continue or the weights to start from. `held_out`
    are the images of --val-data, from `open_held_out`; `pairs` are those of --eval-pairs, from
    `open_pairs`. `teacher` is the network that a few-step network is made from.

    Raises:
        ValueError: the state does not fit, or the weights of ranks differ.
        DivergedError: too many bad steps in a row.
    """
    misc.configure_backends(config.precision, benchmark=config.bench,
                            deterministic=config.deterministic)
    with stage("Starting"):
        prepared = _prepare(config, dataset, run_dir, device, start, held_out, pairs, teacher)
    if prepared is None:
        return
    trainer, evaluators, validation, sinks = prepared
    try:
        _run(trainer, run_dir, evaluators, validation, sinks)
    finally:
        trainer.close()
        sinks.close()


def _prepare(
    config: TrainConfig, dataset: ImageFolderDataset, run_dir: Path, device: torch.device,
    start: State | Weights | None, held_out: ImageFolderDataset | None,
    pairs: ImageFolderDataset | None, teacher: Teacher | None,
) -> tuple[Trainer, "Evaluators", Validation | None, LogSinks] | None:
    """Returns the parts of a run and writes its first files; None if the run is finished."""
    with console.timed("network"):
        weights = start.tensors if isinstance(start, Weights) else None
        is_asked = teacher is not None and config.method != "ect"  # ect only starts from it
        frozen = teacher.build(device, config.precision) if is_asked else None
        trainer = Trainer(config, dataset, device, weights, frozen)
    if isinstance(start, State):
        restore_(trainer, start)
    if start is not None:
        start.release()
    check_weights(trainer)
    if trainer.is_finished:
        if trainer.rank == 0:
            console.result(f"Nothing to do: {trainer.cur_nimg} of {config.total_nimg} images done")
        return None
    _announce(trainer)
    if distributed.get_rank() == 0:
        RunFiles(run_dir, config.keep).tidy()
        write_json(run_dir / OPTIONS_FILE, {
            "options": config.to_dict(), "dataset": dataset_record(dataset),
            "network": json_value(trainer.net.config), **_foreign_facts(start),
            "held_out": dataset_record(held_out) if held_out else None,
            "pairs": dataset_record(pairs) if pairs else None,
            "provenance": provenance(device)})
        save_real_grid(trainer, run_dir / REALS_FILE)
    sinks = LogSinks(config, run_dir, trainer.cur_nimg)
    with trainer.average_in_fp32():  # features of a reference are computed here too
        evaluators = [Evaluator(trainer, run_dir / SCORES_FILE)] if config.eval_ref else []
        if pairs:
            evaluators.append(PairEvaluator(trainer, pairs, run_dir / SCORES_FILE))
    validation = Validation(trainer, held_out) if held_out else None
    trainer.start()
    return trainer, evaluators, validation, sinks


def _foreign_facts(start: State | Weights | None) -> dict[str, Any]:
    """Returns what a second start from a state of EDM or PFGM++ needs of the options beside it."""
    if not isinstance(start, State) or start.is_ours:
        return {}
    return {LOSS_SCALE_KEY: start.content["options"].get("ls", 1.0)}


class Evaluator:
    """Scores the averaged weights as `fid.py gen` scores a snapshot.

    Each score is appended to `path` as a line.

    Raises:
        ValueError: reference, detector and images do not match.
        OSError: a file can't be read.
    """

    is_lower_better = True

    def __init__(self, trainer: Trainer, path: Path):
        config, net = trainer.config, trainer.ema
        self._trainer, self._num = trainer, config.eval_num
        self._evaluator = open_evaluator(
            config.eval_detector, config.eval_ref, ["fid"], trainer.device,
            {scored_name("the data", config.patch): trainer.dataset}, batch=_EVAL_BATCH,
            workers=config.workers)
        self._score_log, self._path = ScoreLog(self._evaluator), path
        sampler = sampler_of(config)
        conditions = SeedImages.of_conditions(trainer.dataset) if net.cond_channels else None
        self._sampler = NetworkSampler(net, sampler, trainer.device, None, {}, conditions,
                                       scaling=trainer.dataset.scaling,
                                       labels=labels_of_seeds(trainer.dataset))

    @property
    def name(self) -> str:
        """The name of the score."""
        return self._evaluator.detector.distance_name

    @property
    def compared_by(self) -> dict[str, Any]:
        """What two scores must share to be comparable, as plain data."""
        compared = {"detector": self._evaluator.detector.name, "num": self._num,
                    "precision": "fp32",
                    "reference_sha256": self._evaluator.record["reference_sha256"]}
        sampler = self._sampler.sampler
        if sampler.nfe != SamplerConfig().nfe or sampler.solver is not None:
            compared |= {"solver": sampler.solver, "num_steps": sampler.num_steps}
        return compared

    def __call__(self) -> dict[str, float]:
        """Returns the score of the present weights by its name. Call it in `average_in_fp32`."""
        trainer, seeds = self._trainer, range(self._num)
        found = network_features(self._sampler, seeds, self._evaluator.detector, metrics=["fid"],
                                 batch=min(trainer.micro_batch, _EVAL_BATCH), title=self.name)
        values = self._evaluator.evaluate(found)
        if trainer.rank == 0:
            kimg = trainer.cur_nimg / 1e3
            self._score_log.record(self._path, values, {
                "kimg": kimg, "num": self._num, "seeds": format_ranges(seeds),
                "sampler": json_value({**dataclasses.asdict(self._sampler.sampler),
                                       "nfe": self._sampler.sampler.nfe,
                                       "D": self._sampler.net.D, "precision": "fp32"})})
        return {recorded_name("fid", self._evaluator.detector.name): values["fid"]}


Evaluators = Sequence[Evaluator | PairEvaluator]  # the first decides which state is best


def _run(trainer: Trainer, run_dir: Path, evaluators: Evaluators,
         validation: Validation | None, sinks: LogSinks) -> None:
    config = trainer.config
    ticks = TickRunner(trainer, run_dir, evaluators, sinks, validation)
    with contextlib.closing(ticks), signals.deferred(), Progress(
            config.total_nimg, "Training", initial=trainer.cur_nimg, is_scaled=True,
            watch_speed=trainer.device.type == "cpu") as progress:
        ticks.announce_evaluations(progress)
        if ticks.resume():
            ticks.run(progress)
        while trainer.cur_nimg < config.total_nimg:
            trainer.train_step()
            progress.update(config.batch)
            ticks.after_step()
            if ticks.is_due:
                ticks.run(progress)
                progress.restart_clock()
    if trainer.rank == 0:
        console.result(f"Training finished: {run_dir}")


class TickRunner:
    """Does the work of ticks (scores, the report, files) and of a stop."""

    def __init__(self, trainer: Trainer, run_dir: Path, evaluators: Evaluators,
                 sinks: LogSinks, validation: Validation | None = None):
        self._trainer, self._run_dir, self._evaluators = trainer, run_dir, evaluators
        self._validation = validation
        self._sinks, self._files = sinks, RunFiles(run_dir, trainer.config.keep)
        self._collector = training_stats.Collector(trainer.device)
        self._agreement = distributed.HostAgreement(trainer.device)
        self._start_time = self._tick_start_time = time.time()
        self._tick_start_nimg, self._maintenance_sec = trainer.cur_nimg, 0.0
        self._evaluation_sec: float | None = None  # of the last one

    @property
    def is_due(self) -> bool:
        """Whether a tick ends at the images seen so far."""
        nimg, config = self._trainer.cur_nimg, self._trainer.config
        return nimg >= config.total_nimg or config.tick_at(nimg) is not None

    def resume(self) -> bool:
        """Restores what a stopped run had collected; says whether its tick is due now."""
        left, self._trainer.unfinished = self._trainer.unfinished, None
        if left:
            training_stats.resume(left["stats"], self._trainer.device)
        return bool(left and left["is_due"])

    def run(self, progress: Progress) -> None:
        """Scores, reports and writes what is due at this tick."""
        trainer, config = self._trainer, self._trainer.config
        nimg, done = trainer.cur_nimg, trainer.cur_nimg >= config.total_nimg
        tick = config.tick_at(nimg)
        if tick is None:  # the last tick may be short
            tick = (nimg - config.batch) // config.tick_nimg + 1
        self._collector.update()
        started = time.time()
        has_eval = self._evaluators and (done or config.is_eval_due(nimg))
        has_snapshot = done or tick % config.snap == 0
        scores, pictures = {}, None
        if has_eval or has_snapshot or self._validation:
            with self._stops_at_once(), trainer.average_in_fp32():
                scores = {VALIDATION_LOSS: self._validation()} if self._validation else {}
                evaluation_started = time.time()
                for evaluator in self._evaluators if has_eval else ():
                    scores |= self._evaluate(evaluator, progress)
                if has_eval:
                    self._evaluation_sec = time.time() - evaluation_started
                    self.announce_evaluations(progress)
                pictures = sample_grid(trainer) if has_snapshot else None
        self._maintenance_sec += time.time() - started
        numbers = self._report(tick, scores, progress)
        self._sinks.scalars(numbers, nimg)
        if pictures is not None:
            self._sinks.picture("samples", pictures, nimg)
        trainer.check_divergence()
        has_state = done or (tick > 0 and tick % config.dump == 0)
        if has_snapshot or has_state:
            check_weights(trainer)
        if trainer.rank == 0:
            self._save_files(has_snapshot, has_state, pictures)
            if done:
                self._files.wait()
            else:
                self._files.look()
            self._files.raise_if_writes_failed(last=done)
        self._maintenance_sec = time.time() - self._tick_start_time

    def announce_evaluations(self, progress: Progress) -> None:
        """Lets the time left include the evaluations that are still to come."""
        if self._evaluators:
            progress.set_other_work("evaluation", self._trainer.config.num_evals_after(
                self._trainer.cur_nimg), self._evaluation_sec)

    def _evaluate(self, evaluator: Evaluator | PairEvaluator, progress: Progress
                  ) -> dict[str, float]:
        """Scores the run and returns the numbers for stats.jsonl.

        If the first evaluator's score is the best so far, the training state is kept.
        """
        trainer = self._trainer
        try:
            values = evaluator()
        except NonFiniteSamplesError as error:
            with progress.above_bar():
                distributed.warn0(f"{trainer.cur_nimg / 1e3:g} kimg: {error}")
            return {}
        value, standing = next(iter(values.values())), ""
        if evaluator is self._evaluators[0]:
            standing = self._keep_if_best(evaluator, value)
        if trainer.rank == 0:
            with progress.above_bar():
                console.result(f"{evaluator.name} {value:.5g} at {trainer.cur_nimg / 1e3:g} "
                               f"kimg{standing}")
        return {f"Metrics/{name}": value for name, value in values.items()}

    def _keep_if_best(self, evaluator: Evaluator | PairEvaluator, value: float) -> str:
        """Writes the state if no earlier score was as good; returns a text that says so."""
        trainer, compared_by = self._trainer, evaluator.compared_by
        best = "lowest" if evaluator.is_lower_better else "highest"
        before = trainer.best_score if trainer.best_score_of == compared_by else None
        sign = -1 if evaluator.is_lower_better else 1
        if not sign * value > (-math.inf if before is None else sign * before):  # or it is NaN
            return "" if before is None else f"; the {best} so far is {before:.5g}"
        check_weights(trainer)
        last = trainer.best_score, trainer.best_score_of
        trainer.best_score, trainer.best_score_of = value, compared_by  # as the state records
        is_kept = trainer.rank == 0 and self._files.save(checkpoint.BEST_STATE, trainer.state())
        if distributed.broadcast_object(is_kept):
            return f", the {best} so far: kept as {checkpoint.BEST_STATE}"
        trainer.best_score, trainer.best_score_of = last  # the next one may be kept
        return f", the {best} so far, but not kept"

    def _report(self, tick: int, scores: dict[str, float], progress: Progress) -> dict[str, float]:
        """Prints the tick's line, appends it to stats.jsonl, and starts the next tick's clock.

        Returns the mean of each statistic.
        """
        trainer, now = self._trainer, time.time()
        fields = self._numbers(tick, now) | scores
        stats = self._collector.as_dict() | {name: {"num": 1, "mean": value, "std": 0.0}
                                             for name, value in fields.items()}
        if trainer.rank == 0:
            loss, bad = self._collector.mean("Loss/loss"), fields["Progress/bad_steps"]
            sec_per_kimg = fields["Timing/sec_per_kimg"]
            rate = "-" if math.isnan(sec_per_kimg) else f"{1e3 / sec_per_kimg:.4g}"
            val = f"val {fields[VALIDATION_LOSS]:<8.5f} " if VALIDATION_LOSS in fields else ""
            with progress.above_bar():
                print(f"tick {tick:<5d} kimg {fields['Progress/kimg']:<9.4g} loss {loss:<8.5f} "
                      f"{val}time {format_time(fields['Timing/total_sec']):<12s} img/s {rate:<8} "
                      f"mem {fields['Resources/cpu_mem_gb']:.2f} GB "
                      f"gpumem {fields['Resources/peak_gpu_mem_gb']:.2f} GB"
                      + (f" bad steps {bad}" if bad else ""))
            progress.set_note(f"loss {loss:.5f}")
            console.detail(f"Time       steps {fields['Timing/sec_per_tick']:.2f} s, including "
                           f"{fields['Timing/data_sec']:.2f} s waiting for data; scores and files "
                           f"before this line {self._maintenance_sec:.2f} s")
            append_stats(self._run_dir / STATS_FILE, stats | {"timestamp": now})
        self._tick_start_nimg, self._tick_start_time = trainer.cur_nimg, now
        return {name: values["mean"] for name, values in stats.items()}

    def _numbers(self, tick: int, now: float) -> dict[str, float]:
        """Returns the progress, times and memory of the tick that ends now."""
        trainer, device = self._trainer, self._trainer.device
        tick_sec = now - self._tick_start_time - self._maintenance_sec
        kimg = (trainer.cur_nimg - self._tick_start_nimg) / 1e3  # 0 in a stopped run's last tick
        gb, peak, peak_reserved = 2**30, 0, 0
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            peak_reserved = torch.cuda.max_memory_reserved(device)
            torch.cuda.reset_peak_memory_stats(device)
        return {
            "Progress/tick": tick, "Progress/kimg": trainer.cur_nimg / 1e3,
            "Progress/lr": trainer.lr, "Progress/loss_scale": float(trainer.loss_scale),
            "Progress/bad_steps": int(trainer.counters["bad_total"]),
            "Timing/total_sec": now - self._start_time, "Timing/sec_per_tick": tick_sec,
            "Timing/sec_per_kimg": tick_sec / kimg if kimg else math.nan,
            "Timing/maintenance_sec": self._maintenance_sec,
            "Timing/data_sec": trainer.take_data_sec(),
            "Resources/cpu_mem_gb": psutil.Process().memory_info().rss / gb,
            "Resources/peak_gpu_mem_gb": peak / gb,
            "Resources/peak_gpu_mem_reserved_gb": peak_reserved / gb}

    def _save_files(self, has_snapshot: bool, has_state: bool, pictures: PIL.Image.Image | None
                    ) -> None:
        trainer, tag = self._trainer, _tag(self._trainer)
        if pictures is not None:
            self._files.write(f"samples-{tag}.png", save_png, pictures)
        contents = {}
        if has_snapshot:
            contents[f"network-snapshot-{tag}.pt"] = trainer.snapshot()
        if has_state:
            contents[f"training-state-{tag}.pt"] = trainer.state()
        if contents:
            self._files.save_in_background(contents)

    def close(self) -> None:
        """Waits for files that are being written."""
        if self._trainer.rank == 0:
            self._files.wait()

    def after_step(self) -> None:
        """Stops or fails on all ranks once one of them has a reason to."""
        trainer = self._trainer
        code, diverged = self._agreement.in_step(
            [signals.requested() or 0, int(trainer.seems_diverged())])
        if diverged:
            trainer.check_divergence()
        if code:
            self._collector.update()
            check_weights(trainer)
            self._save_and_stop(code, is_due=self.is_due)

    @contextlib.contextmanager
    def _stops_at_once(self) -> Iterator[None]:
        """Ends the block at a signal. The block may take long and must not change the run."""
        cause, timeout = None, None
        try:
            with signals.immediate():
                yield
        except (signals.Stopped, RuntimeError) as error:
            if signals.requested() is None:
                raise
            # Other ranks may be waiting for this one in a collective, which it leaves.
            cause, timeout = error, distributed.STOP_TIMEOUT
        heard = self._agreement.now([signals.requested() or 0 if cause else 0], timeout)
        if heard is None and self._trainer.rank != 0:
            raise signals.Stopped(signals.requested()) from cause
        if heard is None or heard[0]:  # no more collectives: ranks may have left one
            code = heard[0] if heard else signals.requested()
            self._save_and_stop(code, is_due=True, cause=cause)

    def _save_and_stop(self, code: int, is_due: bool,
                       cause: BaseException | None = None) -> NoReturn:
        """Writes a training state on rank 0 and ends the run."""
        trainer = self._trainer
        trainer.unfinished = {"stats": self._collector.moments, "is_due": is_due}
        path = self._run_dir / f"training-state-{_tag(trainer)}.pt"

        def save() -> None:
            self._files.wait()
            self._files.warn_of_failures()
            try:
                checkpoint.save(path, trainer.state())
            except OSError as error:
                raise UserError(f"stopped by a signal, but {path} can't be written: "
                                f"{error.strerror or error}") from error
            distributed.print0(f"Stopped at {trainer.cur_nimg / 1e3:g} kimg, saved in {path}: "
                               "continue with --resume=auto")
        distributed.run_while_others_wait(save)
        raise signals.Stopped(code) from cause


def _tag(trainer: Trainer) -> str:
    return checkpoint.kimg_tag(trainer.cur_nimg, fractional=trainer.config.tick < 1)


def append_stats(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line, with null for NaN and infinity. A full disk causes only a warning."""
    try:
        append_line(path, json.dumps(json_value(record, infinity=None)))
        _unwritten.discard(path)
    except OSError as error:
        if path not in _unwritten:
            distributed.warn0(f"{path} not written: {error}")
        _unwritten.add(path)


def _method_line(trainer: Trainer) -> str:
    config, few_step = trainer.config, trainer.net.few_step
    if few_step is None:
        return ""
    levels = ", ".join(f"{level:g}" for level in few_step.levels)
    source = f"from {config.teacher}" if config.teacher else "without a teacher"
    return f"Method     {config.method} {source}; sampled at noise levels {levels}\n"


def _announce(trainer: Trainer) -> None:
    config, dataset = trainer.config, trainer.dataset
    distributed.print0(misc.module_table(trainer.net))
    distributed.print0(
        f"\nData       {dataset.name}: {describe_data(config, dataset)}, "
        f"{dataset.label_dim or 'no'} label dimensions\n"
        f"Noise      {config.noise_name}\n"
        f"{_method_line(trainer)}"
        f"Batch      {config.batch} = {trainer.micro_batch} images x {trainer.rounds} round(s) "
        f"x {trainer.world_size} process(es), {trainer.device.type}, {config.precision}"
        f"{', compiled' if trainer.is_compiled else ''}\n"
        f"Training   {trainer.cur_nimg / 1e3:g} of {config.total_nimg / 1e3:g} kimg, "
        f"seed {config.seed}\n")
    if config.D < HEAVY_TAILED_D:
        distributed.warn0(f"noise of D = {config.D:g} can exceed float32; steps with such draws "
                          "are skipped and counted as bad steps")
    for line in advice(config, Machine.of(trainer.device), misc.count_parameters(trainer.net),
                       has_ema_rampup=trainer.ema_rampup is not None):
        distributed.warn0(line)
