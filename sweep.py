"""The study of D in one command: trains a network per D, scores each, and writes the report.

It runs train.py, fid.py gen, generate.py and report.py, and skips steps that are already done.
"""

import dataclasses
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import fid
import train
from dnnlib import signals
from dnnlib.cli import (
    BAD_USAGE,
    CONTEXT,
    FiniteNumber,
    IntList,
    NumberList,
    UserError,
    run,
    user_errors,
)
from dnnlib.plugins import Plugin, Registered, plugin_option
from dnnlib.util import counted, format_time, is_url, shown_bytes
from sampling.sampling_options import check_alpha
from sampling.sweeps import CONSISTENCY, FULL_BITS, MAX_FEW_STEPS, SOLVERS
from training.config import TrainConfig
from training.launch import config_values, finish_config, precision_of

if TYPE_CHECKING:  # imported late, so that --help is fast
    from images.dataset import ImageFolderDataset
    from reports.study import Step, Study

_ROOT = Path(__file__).resolve().parent
# Flags of train.py that this script sets itself, or that would prevent it from resuming a run.
_NOT_FOR_TRAINING = {"--outdir", "--name", "--data", "--pfgmpp", "--aug_dim", "--resume", "--desc",
                     "--nosubdir", "--transfer", "--device", "--dry-run", "-n", "--plugin"}


class _Command(click.Command):
    """A command that tells users to put options of train.py after '--'."""

    def parse_args(self, ctx, args):
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if any(error.option_name in option.opts for option in train.main.params):
                raise UserError(f"{error.option_name}: is an option of train.py; give options of "
                                "train.py after '--'", BAD_USAGE) from error
            raise


@click.command(cls=_Command, context_settings=CONTEXT)
@click.option("--outdir", metavar="DIR", default="runs", help="Folder for the run directories.")
@click.option("--data", metavar="ZIP|DIR", help="Data set to train on.")
@click.option("--aug_dims", metavar="LIST", help="Values of D, one network each, e.g. 128,2048,inf.")
@click.option("--train-seeds", metavar="LIST", type=IntList(), help="Train each D once with each of these seeds, in OUTDIR/NAME-D128-seed0 and so on.  [default: 0]")
@click.option("--name", metavar="NAME", help="Name the run directories OUTDIR/NAME-D128 and so on.  [default: name of the data]")
@click.option("--runs", metavar="DIR,DIR", help="Score these runs instead of training.")
@click.option("--ref", metavar="NPZ|URL|ZIP|DIR", help="Reference statistics or data set for the scores.  [default: --data]")
@click.option("--metrics", metavar="LIST", default="fid", help="Metrics to compute; see fid.py.")
@click.option("--detector", metavar="inception|dinov2[:PLACE]|pixels[:K]|FILE", default="inception", help="Features for scores; see fid.py.")
@click.option("--seeds", metavar="LIST", type=IntList(), default="0-49999", help="Seeds of the images to score.")
@click.option("--ranges", metavar="INT", type=click.IntRange(min=1), default=1, help="Number of seed ranges at the default point; see fid.py.")
@click.option("--base-steps", metavar="INT", type=click.IntRange(min=1), help="Number of steps at the default point.  [default: 18; few-step networks have their own]")
@click.option("--solver", type=Registered(SOLVERS, "solver"), help="Solver for all scores and images; see generate.py.  [default: heun; consistency for few-step networks]")
@click.option("--order", metavar="INT", type=click.IntRange(1, 4), help="Order of ipndm.  [default: 3]")
@click.option("--alpha", metavar="LIST", type=NumberList(float, 0), help="Also score with noise of these strengths before each step.")
@click.option("--steps", metavar="LIST", type=NumberList(int, 1), help="Also score with these numbers of steps.")
@click.option("--bits", metavar="LIST", type=NumberList(int, 1, FULL_BITS), help="Also score with weights rounded to these numbers of bits.")
@click.option("--rounding-seeds", metavar="LIST", type=NumberList(int, 0, 2**32 - 1), help="Round to --bits at random, once with each of these seeds, and compare the means.  [default: to the nearest level]")
@click.option("--val-data", metavar="ZIP|DIR", help="Held-out images for --likelihood.")
@click.option("--likelihood", metavar="INT", type=click.IntRange(min=1), help="Also measure the likelihood of this many images of --val-data.")
@click.option("--images", metavar="INT", type=click.IntRange(min=0, max=1000), default=10, help="Number of images of each network in the report, from the same seeds.")
@click.option("--nproc", metavar="INT", type=click.IntRange(min=1), help="Run the scripts with torchrun and this many processes.  [default: with python]")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="Where to compute.")
@click.option("--report", metavar="HTML", help="File for the report.  [default: OUTDIR/report.html]")
@click.option("-n", "--dry-run", is_flag=True, help="Print the remaining commands and what they will take, then exit.")
@click.option("--rate", metavar="IMG_PER_S", type=FiniteNumber(min=0, min_open=True), help="Images per second in training, from which --dry-run estimates the hours.  [default: measured on existing runs of the study]")
@plugin_option(is_exposed=True)
@click.argument("train_options", metavar="[-- TRAIN_OPTIONS]", nargs=-1, type=click.UNPROCESSED)
def main(outdir, data, aug_dims, train_seeds, name, runs, nproc, report, dry_run, rate,
         train_options, **scoring):
    """Trains one network per D from the same seed, scores each, and writes a report.

    Each network is scored at the default point (--base-steps, no noise, all bits), then over
    --alpha, --steps and --bits, one at a time. Options for train.py follow after '--'.

    Finished work is not repeated: run the same command again to continue after a failure, or give
    longer lists to extend the study. -n prints what is left to do.

    \b
    # how does D affect FID and robustness?
    python sweep.py --data=datasets/cifar10-32x32.zip --aug_dims=128,2048,inf --nproc=8 \\
        --alpha=0.1,0.2 --steps=10,12,14 --bits=5,6,7 -- --arch=ncsnpp --batch=512

    \b
    # how much of that is chance? Three training seeds per D
    python sweep.py --data=datasets/cifar10-32x32.zip --aug_dims=128,2048,inf --nproc=8 \\
        --train-seeds=0,1,2 -- --arch=ncsnpp --batch=512

    \b
    # existing runs
    python sweep.py --runs=runs/a,runs/b --ref=datasets/cifar10-32x32.zip --ranges=3
    """  # noqa: D301 - \b is click's mark for lines that must not be rewrapped
    if bool(runs) == bool(aug_dims) or bool(aug_dims) != bool(data):
        raise UserError("give --data and --aug_dims to train, or --runs", BAD_USAGE)
    scoring["ref"] = scoring["ref"] or data
    check_alpha(scoring["solver"], scoring["alpha"])
    if scoring["order"] is not None and scoring["solver"] != "ipndm":
        raise UserError(f"--order={scoring['order']}: only ipndm has orders; give --solver=ipndm",
                        BAD_USAGE)
    if scoring["rounding_seeds"] and not scoring["bits"]:
        raise UserError("--rounding-seeds: needs --bits; give it, or leave --rounding-seeds out",
                        BAD_USAGE)
    with user_errors(BAD_USAGE):
        dims = _parse_dims(aug_dims) if aug_dims else []
        _check_options(train_options, bool(runs), scoring["ref"], train_seeds)
        trainings = [_Training.of(Path(outdir, f"{name or Path(data).stem}-D{D:.15g}"), D, seed,
                                  data, scoring["device"], scoring["plugin"], train_options)
                     for seed in train_seeds or [None] for D in dims]
        folders = [Path(folder) for folder in runs.split(",")] if runs else [
            training.run_dir for training in trainings]
        steps = [training.step for training in trainings]
    with user_errors():
        out = Path(report or Path(outdir, "report.html"))
        _check_report(out)
        study = _open_study(scoring, folders if runs else [], dry_run)
        if data:
            _check_scoring(study, data, train_options)
        is_conditional = bool(trainings) and trainings[0].asked["cond"]
        study = _with_likelihood(study, data, folders if runs else [], is_conditional)

        from reports.study import report_step
        for folder in folders:
            steps += study.steps_of(folder)
        steps.append(report_step(out, folders))
        left = _run_steps(steps, nproc, dry_run)
        if dry_run:
            _print_plan(left, trainings, folders, data, rate)


def _parse_dims(text: str) -> list[float]:
    try:
        dims = list(dict.fromkeys(map(float, text.split(","))))
    except ValueError:
        dims = [math.nan]
    if not all(D > 0 for D in dims):
        raise ValueError(f"--aug_dims={text}: must be numbers above 0 or inf, such as 128,2048,inf")
    return dims


def _check_options(train_options: Sequence[str], is_trained: bool, ref: str | None,
                   train_seeds: Sequence[int] | None) -> None:
    if train_seeds and is_trained:
        raise ValueError("--train-seeds: with --runs nothing is trained; leave it out")
    if train_seeds and any(word.partition("=")[0] == "--seed" for word in train_options):
        raise ValueError("--seed: can't be given with --train-seeds; leave one of them out")
    own = [word for word in train_options if word.partition("=")[0] in _NOT_FOR_TRAINING]
    if own or (train_options and is_trained):
        raise ValueError(f"{(own or train_options)[0]}: can't be given to the training of a study"
                         + (": with --runs nothing is trained" if is_trained else ""))
    if ref is None:
        raise ValueError("--ref: needed with --runs; give the data set, or its statistics")


def _open_study(scoring: dict, runs: Sequence[Path], dry_run: bool) -> "Study":
    """Returns the study, after checks for what would otherwise fail after hours of training."""
    from reports.report_plots import check_available
    from reports.study import Study, has_network, is_few_step
    for folder in runs:
        if not has_network(folder):
            raise ValueError(f"--runs: {folder} holds no network-snapshot-*.pt or training-state-*.pt")
        if wrong := _wrong_sampling(scoring, is_few_step(folder)):
            raise UserError(f"{wrong[0]}: {folder} is a run of {wrong[1]}", BAD_USAGE)
    if not runs and (wrong := _wrong_sampling(scoring, False)):
        raise UserError(f"{wrong[0]}: train.py makes {wrong[1]}", BAD_USAGE)
    if not is_url(scoring["ref"]) and not Path(scoring["ref"]).exists():
        raise ValueError(f"{scoring['ref']}: no such file or folder")
    for package in () if dry_run else ("matplotlib", "jinja2"):
        check_available("the report at the end needs", package)
    from metrics.detectors import describe_detector
    study = Study(**scoring, detector_name=describe_detector(scoring["detector"])[0])
    fid.gen.make_context("fid.py gen", study.score_words(Path("none"), "0-1")[2:])
    return study


def _wrong_sampling(scoring: dict, is_few_step: bool) -> tuple[str, str] | None:
    """Returns a flag with which a network can't be sampled, and why; None if there is none."""
    solver, steps = scoring["solver"], [*(scoring["steps"] or ()), scoring["base_steps"] or 1]
    if not is_few_step:
        return None if solver != CONSISTENCY else (
            f"--solver={solver}", "a denoiser, which has no few-step levels; leave --solver out")
    if scoring["alpha"]:
        return "--alpha", "a few-step network, which solves no equation; leave --alpha out"
    if solver not in (None, CONSISTENCY):
        return f"--solver={solver}", "a few-step network, which solves no equation; leave --solver out"
    if max(steps) > MAX_FEW_STEPS:
        flag = "--steps" if scoring["steps"] and max(steps) in scoring["steps"] else "--base-steps"
        return f"{flag}={max(steps)}", f"a few-step network, which takes 1 to {MAX_FEW_STEPS} steps"
    return None


def _check_report(path: Path) -> None:
    """Raises ValueError if the report can't be written there."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not parent.is_dir():
        raise ValueError(f"--report={path}: {path if path.is_dir() else parent} is a "
                         f"{'folder' if path.is_dir() else 'file'}; give a file for the report")


def _check_scoring(study: "Study", data: str, train_options: Sequence[str]) -> None:
    """Raises ValueError if networks trained on the data could not be scored."""
    from images.dataset import ImageFolderDataset
    from metrics.scoring import check_scoring, scored_name
    if len(study.seeds) < 2:
        raise ValueError(f"--seeds: {len(study.seeds)} image, at least 2 needed")
    asked = train.main.make_context("train.py", [
        *train_options, "--outdir=none", f"--data={data}"]).params
    dataset = ImageFolderDataset(data, use_labels=asked["cond"], patch=asked["patch"])
    if asked["cond_image"]:
        raise ValueError("--cond-image=1: networks with condition images are scored by 'fid.py gen "
                         "--cond-image', not by sweep.py")
    if dataset.has_labels and not dataset.has_onehot_labels:
        raise ValueError(f"{data}: has label vectors; networks trained on these are scored by "
                         "'fid.py gen --labels', not by sweep.py")
    check_scoring(study.detector, study.ref, study.metrics.split(","), dataset,
                  scored_name(data, asked["patch"]))


def _with_likelihood(study: "Study", data: str | None, runs: Sequence[Path],
                     is_conditional: bool) -> "Study":
    """Returns the study with the settings of its likelihoods.

    Raises:
        ValueError: only one of --likelihood and --val-data is given, or they don't match the data.
    """
    if (study.likelihood is None) != (study.val_data is None):
        raise ValueError("--likelihood and --val-data: give both or neither")
    if study.val_data is None:
        return study
    from images.dataset import ImageFolderDataset
    from reports.study import is_few_step
    for folder in filter(is_few_step, runs):
        raise UserError(f"--likelihood: {folder} is a run of a few-step network, which has no "
                        "likelihood; leave --likelihood out", BAD_USAGE)
    held_out = ImageFolderDataset(study.val_data, use_labels=True)
    if data:
        _check_held_out(held_out, ImageFolderDataset(data, use_labels=True), is_conditional)
    metric = "bits_per_dim" if held_out.dtype.kind == "u" else "nats_per_dim"
    return dataclasses.replace(study, likelihood=min(study.likelihood, len(held_out)),
                               likelihood_metric=metric)


def _check_held_out(held_out: "ImageFolderDataset", data: "ImageFolderDataset",
                    is_conditional: bool) -> None:
    """Raises ValueError if the likelihood of held-out images could not be measured."""
    def problem() -> str | None:
        if held_out.image_shape != data.image_shape:
            shapes = ["x".join(map(str, each.image_shape)) for each in (held_out, data)]
            return f"its images are {shapes[0]}, but those of --data={data.path} are {shapes[1]}"
        if held_out.scale != data.scale or held_out.dtype != data.dtype:
            return f"has another scale or type than --data={data.path}"
        if is_conditional and held_out.label_dim > data.label_dim:
            return f"has {held_out.label_dim} classes, but --data={data.path} has {data.label_dim}"
        if is_conditional and not held_out.has_onehot_labels:
            return "has no classes, which the networks need"
        if held_out.fingerprint == data.fingerprint:
            return f"is --data={data.path} itself, so nothing is held out"
        return None
    if found := problem():
        raise ValueError(f"--val-data={held_out.path}: {found}; give held-out images of the same "
                         "data, such as those of 'dataset_tool.py split'")


@dataclasses.dataclass(frozen=True)
class _Training:
    """A run to be trained: its directory, its step, and the given options."""

    run_dir: Path
    step: "Step"
    context: click.Context
    asked: dict[str, Any]

    @property
    def config(self) -> "TrainConfig":
        """The configuration of the training."""
        return finish_config(self.context, TrainConfig(**config_values(self.context)))

    @classmethod
    def of(cls, run_dir: Path, D: float, seed: int | None, data: str, device: str,
           plugin: Plugin | None, extra: Sequence[str]) -> "_Training":
        """Returns the run for a D and a seed; None means 0, unless `extra` has a seed."""
        from reports.study import train_step
        noise = ["--pfgmpp=0"] if math.isinf(D) else ["--pfgmpp=1", f"--aug_dim={D:.17g}"]
        if seed is not None:
            run_dir = run_dir.with_name(f"{run_dir.name}-seed{seed}")
        words = [f"--seed={seed or 0}", *extra, f"--outdir={run_dir.parent}",
                 f"--name={run_dir.name}", f"--data={data}", f"--device={device}", *noise,
                 *([plugin.flag] if plugin else [])]
        context = train.main.make_context("train.py", list(words))
        asked = context.params | {"precision": precision_of(context),
                                  "plugin_sha256": plugin and plugin.sha256}
        return cls(run_dir, train_step(run_dir, ["train.py", *words], asked), context, asked)


def _print_plan(left: Sequence[tuple["Step", list[str]]], trainings: Sequence[_Training], folders: Sequence[Path],
                data: str | None, rate: float | None) -> None:
    """Prints what the remaining steps will take: images, evaluations, bytes and hours."""
    from images.dataset import ImageFolderDataset
    from reports.study import images_to_train, measured_rate
    from training.estimate import Estimate, run_bytes
    steps = [step for step, _ in left]
    to_train = [each for each in trainings if each.step in steps]
    num_images = sum(images_to_train(each.run_dir, each.asked) for each in to_train)
    evaluations = sum(step.evaluations(words) for step, words in left)
    backward = 3.0  # approximate time of a training step over that of an evaluation
    if to_train:
        config = to_train[0].config
        dataset = ImageFolderDataset(data, use_labels=config.cond, patch=config.patch)
        network = config.network(dataset.resolution, dataset.num_channels, dataset.label_dim)
        found = Estimate.of_network(network | {"sigma_data": 0.5}, config.precision)
        backward = found.training_flops / found.forward_flops
        size = sum(run_bytes(each.config, found.parameters) for each in to_train)
        click.echo(f"Training   {counted(len(to_train), 'network')} of {found.parameters:,} "
                   f"parameters, {num_images:,} images in total")
        click.echo(f"Disk       {shown_bytes(size)}, without pictures and logs")
    click.echo(f"Scores     {evaluations:,.0f} network evaluations of one image each")
    rate = rate or measured_rate(folders)
    if rate is None:
        click.echo("Time       unknown; give --rate=IMG_PER_S, the training speed in images/s")
        return
    seconds = num_images / rate + evaluations / (rate * backward)
    click.echo(f"Time       {format_time(seconds)} at {rate:.4g} images/s in training and "
               f"{rate * backward:.4g} evaluations/s, without start-up, detectors and files")


def _launched(words: Sequence[str], nproc: int | None) -> list[str]:
    """Returns the command that runs a script in this folder."""
    launch = [] if nproc is None or words[0] == "report.py" else [
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", "--"]
    return [sys.executable, *launch, str(_ROOT / words[0]), *words[1:]]


def _run_steps(steps: Sequence["Step"], nproc: int | None, dry_run: bool
               ) -> list[tuple["Step", list[str]]]:
    """Runs the steps that are not done, unless `dry_run`; returns them with their words."""
    left = []
    for i, step in enumerate(steps, 1):
        words = step.words()
        click.echo(f"[{i}/{len(steps)}] {step.title}" + ("" if words else ": already done"))
        if words is None:
            continue
        left.append((step, words))
        command = _launched(words, nproc)
        click.echo(shlex.join(command))
        code = 0 if dry_run else _run_script(command)
        if code:
            raise UserError(f"step {i} of {len(steps)} ({step.title}) failed with exit code "
                            f"{code}; run the same command again to continue", max(code, 1))
    return left


def _run_script(command: Sequence[str]) -> int:
    """Returns the exit code of a script; passes on stop signals, and waits for its end."""
    with subprocess.Popen(command) as script:
        try:
            return script.wait()
        except signals.Stopped:
            script.terminate()
            raise


def cli() -> None:
    """Runs the command; entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
