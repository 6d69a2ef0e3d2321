"""Scores of images: FID, KID, precision and recall, Inception score; PSNR and SSIM of pairs."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click

from dnnlib import console
from dnnlib.cli import (
    BAD_USAGE,
    HELP_NAMES,
    IntList,
    NameList,
    Range,
    UserError,
    Window,
    cache_dir_option,
    describe,
    flag_errors,
    run,
    user_errors,
    verbosity_options,
)
from metrics.score_names import OF_PAIRS
from sampling.folders import CKPT_PREFIX, SWEPT, FolderName, strays
from sampling.sampling_options import sampling_options

_JSONL = "metrics.jsonl"
_METRICS = ("fid", "kid", "pr", "is")
_RUN_OPTIONS = "training_options.json"  # of a run directory
_FEW_IMAGES = 2048  # the covariance of Inception's features is singular below
_MAX_NAMED = 6  # folders in a message
_MAX_WORKERS = 3  # by default; a GPU's Inception waits for no more
_PAIR_DEFAULT = ("psnr", "ssim", "rmse", "mae")


@click.group(context_settings=HELP_NAMES)
def main() -> None:
    """Scores generated images: FID, KID, precision and recall, Inception score; PSNR and SSIM.

    \b
    # 50,000 images against published statistics, on 8 GPUs
    torchrun --standalone --nproc_per_node=8 fid.py calc --images=fid-tmp \\
        --ref=fid-refs/cifar10-32x32.npz

    \b
    # every ckpt_* folder of a run that generate.py filled
    python fid.py calc --images=training-runs/exp_name --ref=fid-refs/cifar10-32x32.npz

    \b
    # a network, without writing its images; the lowest of three seed ranges
    torchrun --standalone --nproc_per_node=8 fid.py gen --ref=fid-refs/cifar10-32x32.npz \\
        --network=training-runs/exp_name/network-snapshot-200000.pt --ranges=3

    \b
    # reference statistics of a data set
    python fid.py ref --data=datasets/cifar10-32x32.zip --dest=fid-refs/cifar10-32x32.npz

    \b
    # restored images against their truths, and the measurements beside them
    python fid.py pairs --images=runs/ct/restored --truth=datasets/ct-test.zip --input=cond
    """  # noqa: D301 - \b is click's mark for lines to leave alone


def _switch(*names: str, help: str):
    """An option that is on as `--name` and as the references' `--name=True`."""
    return click.option(*names, type=bool, is_flag=False, flag_value=True, default=False,
                        metavar="[BOOL]", help=help)


def _parse_metrics(ctx, param, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in _METRICS]:
        raise click.BadParameter(f"{unknown[0]!r}: must be a list of {', '.join(_METRICS)}")
    return names


def _parse_gen_seed(ctx, param, value: tuple[int, ...]) -> tuple[int, ...]:
    if not set(value) <= {1, 2, 3}:
        raise click.BadParameter("must be 1, 2, 3 or a list of them such as 1,2,3")
    return value


def _parse_workers(ctx, param, value: int | None) -> int:
    from dnnlib.ordered_pool import num_cores

    return min(_MAX_WORKERS, num_cores()) if value is None else value


def _detector_options(command):
    """The options that all commands share."""
    for option in reversed((
        click.option("--batch",    metavar="INT", type=click.IntRange(min=1), default=64,
                     help="Images at a time on each device"),
        click.option("--detector", metavar="inception|pixels[:K]|FILE", default="inception",
                     help="Features to compare; pixels:K makes images smaller by K, FILE is a local "
                          "copy of the Inception weights"),
        click.option("--device",   type=click.Choice(["auto", "cuda", "cpu"]), default="auto",
                     help="Where to compute"),
        click.option("--workers",  metavar="INT", type=click.IntRange(min=0),
                     callback=_parse_workers,
                     help="Processes that read images ahead; 0 reads in the main process  "
                          "[default: up to 3]"),
    )):
        command = option(command)
    return command


def _score_options(command):
    """The options of the commands that score."""
    for option in reversed((
        click.option("--ref", "ref_path", metavar="NPZ|URL|ZIP|DIR",
                     help="Reference statistics, or the data set; needed for all but is"),
        click.option("--metrics", metavar="LIST", default="fid", callback=_parse_metrics,
                     help="What to compute, of fid, kid, pr (precision and recall), is "
                          "(Inception score)"),
        click.option("--out", metavar="JSONL",
                     help="File that gets one line a score  [default: metrics.jsonl of the run]"),
    )):
        command = option(command)
    return command


@main.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--images",     metavar="DIR|ZIP", required=True,
              help="Images to score, or a run directory with ckpt_* folders")
@_score_options
@click.option("--count", "--num", "num", metavar="INT", type=click.IntRange(min=2), default=50000,
              help="Number of images to use")
@click.option("--seed",       metavar="INT", type=int, default=0,
              help="Chooses the images where there are more than --count")
@click.option("--ckpt",       metavar="KIMG", type=float, default=0,
              help="Run directory: first checkpoint to score")
@click.option("--end_ckpt",   metavar="KIMG", type=float, default=math.inf,
              help="Run directory: last checkpoint to score")
@click.option("--gen_seed",   metavar="LIST", type=IntList(), callback=_parse_gen_seed, default="1",
              help="Run directory: seed ranges to score, of 1 (ckpt_*), 2 (ckpt_2_*) and 3")
@_switch("--steps",           help="Run directory: score the folders of a sweep over steps")
@_switch("--alpha",           help="Run directory: score the folders of a sweep over alpha")
@_switch("--quant",           help="Run directory: score the folders of a sweep over bits")
@_switch("--prune",           help="Refused: there is no pruning here")
@_detector_options
@cache_dir_option
@verbosity_options
def calc(images: str, ref_path: str | None, metrics: tuple[str, ...], out: str | None, num: int,
         seed: int, ckpt: float, end_ckpt: float, gen_seed: tuple[int, ...], steps: bool,
         alpha: bool, quant: bool, prune: bool, batch: int, detector: str, device: str,
         workers: int) -> None:
    """Scores a folder or ZIP, or each ckpt_* folder of a run.

    The FID of one folder is printed alone, those of a run as 'path:FOLDER, FID'; several values
    also as a table, with the lowest and the mean of each checkpoint's seed ranges. Each is appended
    to metrics.jsonl in the run or folder.

    Folders of a sweep over several settings need all of their flags, such as --alpha --steps.
    Folders with fewer than --count images are left out and named at the end, with exit code 1.

    Scores can be compared only at equal --count. With --detector=pixels the number is called
    'pixels Frechet distance', because it is not an FID.

    --num is the earlier name of --count. torchrun takes it for an option of its own, --numa-binding,
    unless a '--' stands before the script.
    """
    if prune:
        raise UserError("--prune: pruned networks are not supported; --quant, --alpha and --steps "
                        "are", BAD_USAGE)
    _check_reference_given(ref_path, metrics)
    with user_errors():
        sweeps = {name for name, on in zip(SWEPT, (alpha, steps, quant), strict=True) if on}

        from images.dataset import ImageFolderDataset
        from images.image_files import NoImagesError
        from metrics.metrics import dataset_features
        from torch_utils import distributed as dist

        with dist.process_group(device) as chosen_device:
            folders = dist.run_on_rank0(_ckpt_folders, images, gen_seed, ckpt, end_ckpt, sweeps)
            with dist.rank0_first():
                jobs = folders or [_Job(images, Path(images).name)]
                enough, left_out = [], []
                for job in jobs:
                    try:
                        dataset = ImageFolderDataset(job.path, max_size=num, random_seed=seed)
                        _refuse_strays(dataset)
                        if len(dataset) < num:
                            raise UnscorableError(
                                f"{job.path}: {len(dataset)} images, but --count={num}; make more, "
                                f"or score these with --count={len(dataset)}",
                                f"{len(dataset)} images")
                        enough.append((job, dataset))
                    except (NoImagesError, UnscorableError) as error:
                        if not folders or len(jobs) == len(left_out) + 1:
                            raise
                        left_out.append(f"{job.label} ({getattr(error, 'short', 'no images')})")
            sets = {str(dataset.path): dataset for _, dataset in enough}
            scores = _Scores(detector, ref_path, metrics, chosen_device, sets, num, batch=batch,
                             workers=workers, path=Path(out) if out else _jsonl_of_images(images))
            for job, dataset in enough:
                with console.timed("features"):
                    found = dataset_features(dataset, scores.detector, metrics=metrics, batch=batch,
                                             workers=workers, title=Path(job.path).name)
                facts = {"images": job.path, "num": num, **_facts_of_images(job.path, dataset, seed)}
                scores.add(job, found, facts, is_only=not folders)
            scores.print_table()
            if left_out:
                more = ", ..." if len(left_out) > _MAX_NAMED else ""
                raise ValueError(f"{len(left_out)} of {len(jobs)} folders were not scored by "
                                 f"--count={num}: {', '.join(left_out[:_MAX_NAMED])}{more}")


@main.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--network",    metavar="PT|URL", required=True,
              help="Network snapshot or training state")
@_score_options
@click.option("--seeds",      metavar="LIST", type=IntList(), default="0-49999",
              help="Random seeds; one image each")
@click.option("--ranges",     metavar="INT", type=click.IntRange(min=1), default=1,
              help="Number of seed ranges: --seeds, then as many seeds after them, and so on")
@sampling_options
@_detector_options
@cache_dir_option
@verbosity_options
def gen(network: str, ref_path: str | None, metrics: tuple[str, ...], out: str | None,
        seeds: tuple[int, ...], ranges: int, batch: int, detector: str, device: str, workers: int,
        steps: tuple[int, ...], alpha: tuple[float, ...] | None, bits: tuple[int, ...] | None,
        **sampling) -> None:
    """Scores the images of a network without writing them.

    The scores are those of 'generate.py', then 'fid.py calc', for the same options. Papers report
    the lowest FID of three seed ranges: --ranges=3. Each score is appended to metrics.jsonl beside
    the network.
    """
    _check_reference_given(ref_path, metrics)
    with user_errors():
        from checkpoints.names import find_network
        from dnnlib.util import format_ranges, is_url
        from sampling.network_sampler import NetworkSampler, UsageError
        from sampling.sweeps import sweep_points
        from torch_utils import distributed as dist
        from torch_utils.misc import configure_backends
        from training.scoring import network_features

        if len(seeds) < 2:
            raise ValueError(f"--seeds: {len(seeds)} image, at least 2 needed")
        with dist.process_group(device) as chosen_device:
            given, network = network, dist.run_on_rank0(find_network, network)
            if network != given:
                dist.print0(f"Network    {network}, the newest of {given}")

            def open_sampler(point):
                try:
                    return NetworkSampler.open(network, chosen_device, **point.settings, **sampling)
                except UsageError as error:
                    raise UserError(str(error), BAD_USAGE) from error

            points = sweep_points(steps, alpha, bits)
            sampler = open_sampler(points[0])
            default = None if is_url(network) else Path(network).parent / _JSONL
            scores = _Scores(detector, ref_path, metrics, chosen_device, {network: sampler},
                             len(seeds), batch=batch, workers=workers,
                             path=Path(out) if out else default)
            span = max(seeds) - min(seeds) + 1
            for point, i in itertools.product(points, range(ranges)):
                own = [seed + i * span for seed in seeds]
                text = " ".join([*point.suffix.split("_")[1:], "seeds", format_ranges(own)])
                job = _Job(network, text, network + point.suffix)
                if i == 0 and point is not points[0]:
                    sampler = open_sampler(point)
                configure_backends(sampling["precision"])
                with console.timed("samples and features"):
                    found = network_features(sampler, own, scores.detector, metrics=metrics,
                                             batch=batch, title=job.label)
                configure_backends("fp32")
                facts = {"network": network, "num": len(own), "seeds": format_ranges(own),
                         "sampler": sampler.settings}
                scores.add(job, found, facts, is_only=len(points) * ranges == 1)
            scores.print_table()


@main.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--data",       metavar="DIR|ZIP", required=True,
              help="Images of the data set")
@click.option("--dest",       metavar="NPZ", required=True,
              help="File to write")
@_switch("--features",        help="Also keep the features, which kid and pr need")
@_detector_options
@cache_dir_option
@verbosity_options
def ref(data: str, dest: str, features: bool, batch: int, detector: str, device: str,
        workers: int) -> None:
    """Writes the reference statistics of a data set that 'calc' and 'gen' need."""
    with user_errors():
        from images.dataset import ImageFolderDataset
        from metrics.detectors import build_detector, describe_detector
        from metrics.evaluator import dataset_reference
        from metrics.references import save_reference
        from torch_utils import distributed as dist
        from torch_utils.misc import configure_backends

        name, _ = describe_detector(detector)
        with dist.process_group(device) as chosen_device:
            with dist.rank0_first():
                dataset = ImageFolderDataset(data)
                if len(dataset) < 2:
                    raise ValueError(f"{data}: {len(dataset)} image, at least 2 needed")
                built = build_detector(detector, chosen_device)
            dataset.share_fingerprint()
            configure_backends("fp32")
            _warn_if_few(len(dataset), name, ("fid",))
            with console.timed("features"):
                reference = dataset_reference(dataset, built, with_features=features, batch=batch,
                                              workers=workers)
            dist.run_on_rank0(save_reference, dest, reference)
            if dist.get_rank() == 0:
                console.result(f"{dest}: statistics of {len(dataset)} images by {name}"
                               f"{', with features' if features else ''}")


@main.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--images",     metavar="DIR|ZIP", required=True,
              help="Images to score")
@click.option("--truth",      metavar="DIR|ZIP", required=True,
              help="What they should be: a data set, of which condition images are left out")
@click.option("--input", "input_", metavar="DIR|ZIP|cond",
              help="Measurements that the images were made of, to score and show beside them; cond "
                   "for the condition images of --truth")
@click.option("--metrics",    metavar="LIST", type=NameList(OF_PAIRS),
              help="What to compute, of psnr, ssim (Gaussian window), ssim_uniform, rmse, mae  "
                   "[default: psnr,ssim,rmse,mae]")
@click.option("--metric-file", "metric_files", metavar="FILE.py:FUNCTION", multiple=True,
              help="Metric of your own: a function of (image, truth, value_range)")
@click.option("--range", "value_range", metavar="LO,HI", type=Range(),
              help="Range of the data that psnr and ssim are relative to  [default: 0,255 of 8 bits, "
                   "else that of the recorded scale of --truth]")
@click.option("--clip",       is_flag=True,
              help="Clip all images to the range before they are compared")
@click.option("--window",     metavar="CENTER,WIDTH", type=Window(),
              help="Values that the picture shows, from black to white  [default: the range]")
@click.option("--pair-by",    type=click.Choice(["auto", "name", "order"]), default="auto",
              help="How images find their truths; auto takes names where all match")
@click.option("--out",        metavar="DIR",
              help="Folder of pairs.csv, pairs.jsonl, pairs.png, and of metrics.jsonl  [default: "
                   "pairs_NAME beside the images; metrics.jsonl of the run]")
@cache_dir_option
@verbosity_options
def pairs(images: str, truth: str, input_: str | None, metrics: tuple[str, ...] | None,
          metric_files: tuple[str, ...], value_range: tuple[float, float] | None, clip: bool,
          window: tuple[float, float] | None, pair_by: str, out: str | None) -> None:
    """Scores images one by one against their truths: PSNR, SSIM, errors.

    Images and truths belong together by name without extension, else by order where there are as
    many; images of generate.py by their seeds, seed k with truth k. Values are compared in the
    units of the data. Both may be of any size and any channels.

    A line a metric is printed, such as 'psnr 43.42 +- 0.31 (16 images)': the mean and the standard
    deviation over the images. --out gets the scores of each image and a picture of some.

    Under torchrun only the first process works.
    """
    if not console.is_rank0():
        return
    with user_errors():
        from metrics.paired import PAIRED_METRICS, SSIM_WINDOWS, load_metric, ssim_problem
        from metrics.pairs import Pairs, value_range_of

        own_metrics = dict(map(load_metric, metric_files))
        folder = _folder_of_pairs(images, truth, out)
        paired = Pairs(images, truth, input_, pair_by)
        for record in paired.images.sample_records().values():
            _refuse_not_finite(paired.images, record)
        chosen = list(_PAIR_DEFAULT if metrics is None else metrics)
        for name in [name for name in chosen if name in SSIM_WINDOWS]:
            problem = ssim_problem(name, paired.sizes)
            if problem and metrics is not None:
                raise ValueError(f"--metrics={name}: {problem}; or leave {name} out")
            if problem:
                click.echo(f"Warning: {name} is left out: it {problem}", err=True)
                chosen.remove(name)
        functions = {name: PAIRED_METRICS[name] for name in chosen} | own_metrics
        if not functions:
            raise ValueError("--metrics=: must name a metric, unless --metric-file gives one")
        source = "--range"
        if value_range is None:
            with flag_errors("--truth", truth, "give --range=LO,HI in the unit of the data"):
                value_range = value_range_of(paired.truth.scaling)
            source = "8 bits" if paired.truth.scaling.is_8bit else "the scale of --truth"
        counts = f"{len(paired)} images, paired by {paired.partners.found_by}"
        if len(set(paired.partners.numbers)) < len(paired.truth):
            counts += (f" with {len(set(paired.partners.numbers))} of the {len(paired.truth)} "
                       "truths")
        click.echo(f"Pairs      {counts}")
        if warning := paired.warning_of_source():
            click.echo(f"Warning: {warning}", err=True)
        low, high = value_range
        click.echo(f"Range      {low:.6g} to {high:.6g} ({source}){', clipped to it' * clip}")
        with console.timed("scores"):
            scores, warnings = paired.score(functions, value_range, clip=clip)
        for warning in warnings:
            click.echo(f"Warning: {warning}", err=True)
        _report_pairs(paired, scores, value_range, clip, images, folder, bool(out), window)


def _folder_of_pairs(images: str, truth: str, out: str | None) -> Path | None:
    """Returns where the files of paired scores go; None for a ZIP without --out.

    Raises:
        ValueError: inside of images, among which the picture would be one more.
        OSError: files can't be written there.
    """
    from dnnlib.atomic import check_writable

    source = Path(os.path.abspath(images))
    if out is None and not source.is_dir():
        return None
    folder = Path(out) if out is not None else source.with_name(f"pairs_{source.name}")
    if out == "" or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"--out={out}: must be a folder, which is made if need be")
    for path in filter(os.path.isdir, (images, truth)):
        if folder.resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(f"--out={folder}: lies inside {path}, of which the picture would become "
                             "an image; name a folder outside of it")
    try:
        check_writable(folder / _JSONL)
    except OSError as error:
        raise OSError(f"--out={folder}: {describe(error)}; name another folder") from error
    return folder


def _report_pairs(paired, scores, values: tuple[float, float], clip: bool, images: str,
                  folder: Path | None, is_folder_given: bool,
                  window: tuple[float, float] | None) -> None:
    """Prints the summary of paired scores, and writes it and the scores of each image."""
    from dnnlib.atomic import append_line
    from metrics.pair_files import summary_lines, summary_records, write_scores

    for line in summary_lines(scores):
        console.result(line)
    if folder is None:
        click.echo("Files      none, because --images is a ZIP; --out=DIR keeps the scores")
        return
    window = window or (sum(values) / 2, values[1] - values[0])
    click.echo(f"Files      {write_scores(folder, paired, scores, values, window)}")
    facts = {"images": images, "num": len(scores), **_facts_of_images(images, paired.images, 0),
             "range": list(values), "clip": clip, "paired_by": paired.partners.found_by,
             "reference": str(paired.truth.path), "reference_sha256": paired.truth.fingerprint,
             "reference_num": len(paired.truth), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    append_line(folder / _JSONL if is_folder_given else _jsonl_of_images(images), "\n".join(
        json.dumps(record | facts) for record in summary_records(scores)))


class _Job(NamedTuple):
    """A set of images to score; those of one `group` are the seed ranges of one network."""

    path: str
    label: str
    group: str = ""


def _check_reference_given(ref_path: str | None, metrics: tuple[str, ...]) -> None:
    if ref_path is None and metrics != ("is",):
        raise UserError("Missing option '--ref': reference statistics (.npz) or the data set, "
                        "needed by " + ", ".join(m for m in metrics if m != "is"), BAD_USAGE)


class _Scores:
    """The scores of one command, against one reference: computed, printed and recorded.

    Args:
        detector, ref_path, metrics, device, sets, batch, workers: see `open_evaluator`.
        num: how many images each score is of.
        path: the file that gets a JSON line a score; None for none.
    """

    def __init__(self, detector: str, ref_path: str | None, metrics: tuple[str, ...], device,
                 sets: dict, num: int, *, batch: int, workers: int, path: Path | None):
        from metrics.score_log import ScoreLog
        from torch_utils.distributed import get_rank
        from torch_utils.misc import configure_backends
        from training.scoring import open_evaluator

        configure_backends("fp32")
        with console.timed("detector and reference"):
            self._evaluator = open_evaluator(detector, ref_path, metrics, device, sets,
                                             batch=batch, workers=workers)
        self.detector = self._evaluator.detector
        self._log, self._is_rank0 = ScoreLog(self._evaluator, path), get_rank() == 0
        _warn_if_few(num, self.detector.name, metrics, self._evaluator.reference_count)
        _warn_of_small_subsets(self._evaluator, num)

    def add(self, job: _Job, found, facts: dict, *, is_only: bool) -> None:
        """Scores the features of a job, prints its distance as the references do, and records all.

        Args:
            job: the images.
            found: their features.
            facts: what else the record says of them.
            is_only: this is the command's only score.
        """
        from metrics.score_log import Score

        with console.timed("distances"):
            values = self._evaluator.evaluate(found)
        if not self._is_rank0:
            return
        self._log.add(Score(job.label, job.group, values), facts)
        if "fid" in values:
            text = f"{values['fid']:g}"
            if self._log.distance_name != "FID":
                text = f"{self._log.distance_name}: {text}"
            if not is_only:
                text = (f"path:{job.path}, {text}" if os.path.isdir(job.path)
                        else f"{job.label}: {text}")
            console.result(text)

    def print_table(self) -> None:
        """Prints all scores where there are several values."""
        if self._is_rank0 and self._log.has_more_than_one_value:
            console.result("\n" + self._log.table())


def _warn_if_few(count: int, detector: str, metrics: tuple[str, ...],
                 num_reference: int | None = None) -> None:
    """Warns of images or, if their number is known, of references that are too few for an FID."""
    from torch_utils.distributed import get_rank

    if "fid" not in metrics or get_rank() != 0:
        return
    is_reference_small = num_reference is not None and num_reference < _FEW_IMAGES
    if count >= _FEW_IMAGES:
        if is_reference_small:
            click.echo(f"Warning: the reference is of {num_reference} images, fewer than "
                       f"{_FEW_IMAGES}: the distance is biased upwards; compare with the same "
                       "reference only", err=True)
    else:
        reason = f"are fewer than {_FEW_IMAGES}: the distance is biased upwards"
        if detector == "inception":
            reason = (f"are fewer than the {_FEW_IMAGES} features: their covariance is singular and "
                      "FID is biased upwards")
        more = f", and with this reference of {num_reference} images" if is_reference_small else ""
        click.echo(f"Warning: {count} images {reason}; compare at equal numbers only{more}",
                   err=True)


def _warn_of_small_subsets(evaluator, num: int) -> None:
    """Warns where there are too few images for the subsets of KID."""
    from metrics.distances import SUBSET_SIZE

    kept = evaluator.num_reference_features
    if kept is not None and "kid" in evaluator.metrics and min(kept, num) < SUBSET_SIZE:
        click.echo(f"Warning: KID is computed on subsets of {min(kept, num)} images instead of "
                   f"{SUBSET_SIZE}, because there are no more; compare at equal numbers only",
                   err=True)


def _jsonl_of_images(images: str) -> Path | None:
    """Returns the file for scores of a folder: in its run, else in itself; None for a ZIP."""
    path = Path(os.path.abspath(images))
    if not path.is_dir():
        return None
    is_of_run = FolderName.parse(path.name) and any(path.parent.glob("training[-_]*"))
    return (path.parent if is_of_run else path) / _JSONL


def _facts_of_images(path: str, dataset, seed: int) -> dict:
    """Returns what is recorded of the images in a folder or ZIP: seeds, sampler, the choice."""
    from dnnlib.util import format_ranges
    from images.image_files import GENERATE_RECORD

    stems = [Path(name).stem for name in dataset.all_names]
    facts = {"seeds": None, "sampler": None}
    if all(stem.isdigit() for stem in stems):
        facts["seeds"] = format_ranges(map(int, stems))
    if len(dataset) < len(stems):
        facts["chosen_from"], facts["choice_seed"] = len(stems), seed
    with contextlib.suppress(OSError, ValueError, RecursionError):  # not a folder of generate.py
        facts["sampler"] = json.loads(Path(path, GENERATE_RECORD).read_text(encoding="utf-8"))
    return facts


def _ckpt_folders(images: str, gen_seeds: tuple[int, ...], first: float, last: float,
                  sweeps: set[str]) -> list[_Job]:
    """Returns the folders of a run directory to score, in order; none if it isn't one."""
    if not os.path.exists(images):
        raise FileNotFoundError(f"{images}: no such folder or ZIP")
    names = [entry.name for entry in os.scandir(images)
             if entry.is_dir() and entry.name.startswith(CKPT_PREFIX)
             ] if os.path.isdir(images) else []
    if not names:
        if sweeps or gen_seeds != (1,):
            raise ValueError(f"{images}: no run directory with ckpt_* folders, which --gen_seed, "
                             "--alpha, --steps and --quant choose from")
        if os.path.exists(os.path.join(images, _RUN_OPTIONS)):
            raise ValueError(f"{images}: a run directory without ckpt_* folders of images; make them "
                             f"with generate.py --outdir={images}, or score a network with 'fid.py "
                             "gen'")
        return []
    parsed = {name: FolderName.parse(name) for name in sorted(names)}
    if strange := [name for name, parts in parsed.items() if parts is None]:
        click.echo(f"Warning: {strange[0]} and {len(strange)} folders in all are not named by "
                   "generate.py and are not scored", err=True)
    folders = {parts: name for name, parts in parsed.items() if parts is not None}
    chosen = [parts for parts in folders if parts.gen_seed in gen_seeds
              and first <= float(parts.kimg) <= last and parts.swept == sweeps]
    if not chosen:
        there = sorted({_sweep_flags(parts.swept) for parts in folders})
        raise ValueError(f"{images}: none of {len(names)} ckpt_* folders (such as {min(names)}) is "
                         f"of --gen_seed={','.join(map(str, gen_seeds))}, {_sweep_flags(sweeps)}, "
                         f"and {first:.15g} to {last:.15g} kimg; there is "
                         f"{' and '.join(there) or 'none of generate.py'}")
    _warn_of_missing_ranges(chosen, gen_seeds)
    return [_Job(os.path.join(images, folders[parts]), folders[parts], str(parts.point))
            for parts in sorted(chosen, key=lambda parts: (parts.point, parts.gen_seed))]


def _warn_of_missing_ranges(chosen: Sequence[FolderName], gen_seeds: tuple[int, ...]) -> None:
    """Names the ranges of seeds that were asked for and are not there, for each network."""
    groups: dict[tuple, list[FolderName]] = {}
    for parts in chosen:
        groups.setdefault(parts.point, []).append(parts)
    for found in groups.values():
        there = {parts.gen_seed for parts in found}
        missing = [str(dataclasses.replace(found[0], gen_seed=number)) for number in gen_seeds
                   if number not in there]
        if missing:
            click.echo(f"Warning: {found[0]}: of --gen_seed={','.join(map(str, gen_seeds))} there "
                       f"is no {' and no '.join(missing)}; its lowest score is that of "
                       f"{len(found)}", err=True)


class UnscorableError(ValueError):
    """A folder of a run that can't be scored, which keeps no other from it; `short` says why."""

    def __init__(self, message: str, short: str):
        super().__init__(message)
        self.short = short


def _refuse_strays(dataset) -> None:
    """Raises ValueError for a folder of generate.py with images that are not of its making.

    UnscorableError where the network has made images that are not finite.
    """
    records = dataset.sample_records()
    if not records:
        return
    if len(records) > 1:
        raise ValueError(f"{dataset.path}: holds the images of {len(records)} networks or settings "
                         f"({', '.join(sorted(records)[:_MAX_NAMED])}); score each folder by itself")
    [(top, record)] = records.items()
    below = [name.removeprefix(top) if name.startswith(top) else f"/{name}"
             for name in dataset.all_names]
    subdirs = record.get("subdirs")
    found = strays(below, subdirs if isinstance(subdirs, bool) else None)
    if found and record.get("names") != "inputs":  # which may be any
        raise ValueError(f"{dataset.path}: {found[0].lstrip('/')} is not one of the images that "
                         f"generate.json describes, and so are {len(found)} files in all; move "
                         "them away")
    _refuse_not_finite(dataset, record)


def _refuse_not_finite(dataset, record: dict) -> None:
    """Raises UnscorableError if generate.py has made images that are not finite."""
    if lost := record.get("not_finite"):
        raise UnscorableError(f"{dataset.path}: {len(lost)} images of this network have values that "
                              "are not finite, so it has no score",
                              f"{len(lost)} images that are not finite")


def _sweep_flags(sweeps: set[str]) -> str:
    """Returns the flags that choose folders swept over all of these."""
    return " ".join(f"--{name}" for name in SWEPT if name in sweeps) or "no sweep"


def cli() -> None:
    """Runs the command; where pip has installed it, the console script."""
    run(main)


if __name__ == "__main__":
    cli()
