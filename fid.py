"""Scores of images: FID, KID, precision and recall, Inception score; PSNR and SSIM of pairs."""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from dnnlib import console
from dnnlib.cli import (
    BAD_USAGE,
    HELP_NAMES,
    FiniteNumber,
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
from dnnlib.plugins import plugin_option
from dnnlib.registry import names_of
from metrics.score_names import OF_PAIRS, SCORES_FILE
from sampling.folders import CKPT_PREFIX, SWEPT, FolderName, seed_of, strays
from sampling.sampling_options import sampling_options

_METRICS = ("fid", "kid", "pr", "dc", "is", "ca")
_RUN_OPTIONS = "training_options.json"  # in a run directory
_MAX_NAMED = 6  # folders in a message
_MAX_WORKERS = 3  # default; more don't speed up Inception on a GPU
_MAX_LAYERS, _MAX_WIDTH = 8, 4096  # of a classifier, as in metrics/classifier.py
_PAIR_DEFAULT = ("psnr", "ssim", "rmse", "mae")


@click.group(context_settings=HELP_NAMES)
def main() -> None:
    """Scores generated images: FID, KID, precision and recall, Inception score; PSNR and SSIM.

    Also finds their nearest training images.

    \b
    # 50,000 images against published statistics, on 8 GPUs
    torchrun --standalone --nproc_per_node=8 fid.py calc --images=fid-tmp \\
        --ref=fid-refs/cifar10-32x32.npz

    \b
    # every ckpt_* folder of a run that generate.py filled
    python fid.py calc --images=training-runs/exp_name --ref=fid-refs/cifar10-32x32.npz

    \b
    # a network over three seed ranges, without writing its images
    torchrun --standalone --nproc_per_node=8 fid.py gen --ref=fid-refs/cifar10-32x32.npz \\
        --network=training-runs/exp_name/network-snapshot-200000.pt --ranges=3

    \b
    # reference statistics of a data set
    python fid.py ref --data=datasets/cifar10-32x32.zip --dest=fid-refs/cifar10-32x32.npz

    \b
    # restored images against their truths, compared with the measurements
    python fid.py pairs --images=runs/ct/restored --truth=datasets/ct-test.zip --input=cond

    \b
    # whether the network repeats training images
    python fid.py nearest --images=fid-tmp --data=datasets/cifar10-32x32.zip

    \b
    # a classifier of small images, and the share of samples that are of the requested class
    python fid.py classifier --data=datasets/digits8-train.zip \\
        --val-data=datasets/digits8-val.zip --dest=digits8-judge.npz
    python fid.py gen --network=runs/digits --detector=digits8-judge.npz --metrics=ca \\
        --seeds=0-999
    """  # noqa: D301 - \b is click's mark for lines that must not be rewrapped


def _switch(*names: str, help: str):
    """An option that is set by `--name`, or by `--name=True` as in EDM and PFGM++."""
    return click.option(*names, type=bool, is_flag=False, flag_value=True, default=False,
                        metavar="[BOOL]", help=help)


def _parse_metrics(ctx, param, value: str) -> tuple[str, ...]:
    names, known = tuple(dict.fromkeys(value.split(","))), names_of(_METRICS, "metric")
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r}: must be a list of {', '.join(known)}; "
                                 "--plugin=FILE adds others")
    return names


def _parse_gen_seed(ctx, param, value: tuple[int, ...]) -> tuple[int, ...]:
    if not set(value) <= {1, 2, 3}:
        raise click.BadParameter("must be 1, 2, 3 or a list of these, such as 1,2,3")
    return value


def _parse_workers(ctx, param, value: int | None) -> int:
    from dnnlib.ordered_pool import num_cores

    return min(_MAX_WORKERS, num_cores()) if value is None else value


def _detector_options(command):
    """The options that all commands share."""
    for option in reversed((
        click.option("--batch",    metavar="INT", type=click.IntRange(min=1), default=64,
                     help="Batch size per device"),
        click.option("--detector", metavar="inception|dinov2[:PLACE]|pixels[:K]|FILE.npz|FILE.pth",
                     default="inception",
                     help="Features to compare; PLACE is a folder or hub name of other DINOv2 "
                          "weights, pixels:K reduces images by a factor of K, FILE.npz is a "
                          "classifier made by 'fid.py classifier', FILE.pth is a local copy of the "
                          "Inception weights"),
        click.option("--device",   type=click.Choice(["auto", "cuda", "cpu"]), default="auto",
                     help="Where to compute"),
        click.option("--workers",  metavar="INT", type=click.IntRange(min=0),
                     callback=_parse_workers,
                     help="Number of processes that read images ahead; 0 reads in the main "
                          "process  "
                          "[default: up to 3]"),
        plugin_option(),
    )):
        command = option(command)
    return command


def _score_options(command):
    """The options of the commands that score."""
    for option in reversed((
        click.option("--ref", "ref_path", metavar="NPZ|PKL|URL|ZIP|DIR",
                     help="Reference statistics or data set; required except for is and ca"),
        click.option("--metrics", metavar="LIST", default="fid", callback=_parse_metrics,
                     help="Metrics to compute: fid, kid, pr (precision and recall), dc (density "
                          "and coverage), is (Inception score), ca (class accuracy)"),
        click.option("--out", metavar="JSONL",
                     help="File to which one line per score is appended  [default: metrics.jsonl "
                          "of the run]"),
        click.option("--features", "kept_features", metavar="NPZ|DIR",
                     help="Keep the features for other metrics: in a file if there is only one "
                          "score, otherwise in a folder"),
        click.option("--bootstrap", metavar="DRAWS", type=click.IntRange(min=40),
                     is_flag=False, flag_value=1000,
                     help="Also estimate a 95% interval of the Frechet distance from this many "
                          "draws of the images  [1000 if no number is given]"),
        click.option("--per-class", is_flag=True,
                     help="Also score the images of each class separately; --ref must be a data "
                          "set with classes"),
    )):
        command = option(command)
    return command


@main.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--images",     metavar="DIR|ZIP|NPZ", required=True,
              help="Images to score, a run directory with ckpt_* folders, or features kept by "
                   "--features")
@_score_options
@click.option("--count", "--num", "num", metavar="INT", type=click.IntRange(min=2), default=50000,
              help="Number of images to use")
@click.option("--seed",       metavar="INT", type=int, default=0,
              help="Seed for choosing images if there are more than --count")
@click.option("--ckpt",       metavar="KIMG", type=float, default=0,
              help="Run directory: first checkpoint to score")
@click.option("--end_ckpt",   metavar="KIMG", type=float, default=math.inf,
              help="Run directory: last checkpoint to score")
@click.option("--gen_seed",   metavar="LIST", type=IntList(), callback=_parse_gen_seed, default="1",
              help="Run directory: seed ranges to score, out of 1 (ckpt_*), 2 (ckpt_2_*) and 3")
@_switch("--steps",           help="Run directory: score the folders of a sweep over steps")
@_switch("--alpha",           help="Run directory: score the folders of a sweep over alpha")
@_switch("--quant",           help="Run directory: score the folders of a sweep over bits")
@_switch("--prune",           help="Refused, because pruning is not supported")
@_detector_options
@cache_dir_option
@verbosity_options
def calc(images: str, ref_path: str | None, metrics: tuple[str, ...], out: str | None,
         kept_features: str | None, bootstrap: int | None, per_class: bool, num: int, seed: int,
         ckpt: float, end_ckpt: float, gen_seed: tuple[int, ...], steps: bool,
         alpha: bool, quant: bool, prune: bool, batch: int, detector: str, device: str,
         workers: int) -> None:
    """Scores a folder or ZIP, or each ckpt_* folder of a run.

    The FID of a single folder is printed by itself, and those of a run as 'path:FOLDER, FID'.
    Several values are also printed as a table, with the lowest and the mean of each checkpoint's
    seed ranges. Each score is appended to metrics.jsonl in the run or folder.

    To score the folders of a sweep over several settings, give all of their flags, such as --alpha
    --steps. Folders of a run with fewer than --count images are skipped and named at the end, and
    the exit code is 1.

    Scores are comparable only at equal --count. With --detector=pixels the number is called 'pixels
    Frechet distance', because it is not an FID.

    --num is the old name of --count. torchrun mistakes it for its own option --numa-binding, unless
    '--' precedes the script.
    """
    if prune:
        raise UserError("--prune: pruned networks are not supported; --quant, --alpha and --steps "
                        "are", BAD_USAGE)
    _check_metrics(ref_path, metrics, bootstrap, per_class)
    needing_classes = _needing_classes(metrics, per_class)
    with user_errors():
        sweeps = {name for name, on in zip(SWEPT, (alpha, steps, quant), strict=True) if on}

        from images.dataset import ImageFolderDataset
        from images.image_files import NoImagesError
        from metrics.feature_files import find_feature_files
        from metrics.metrics import dataset_features
        from metrics.score_report import Job, ScoreReport
        from torch_utils import distributed as dist

        with dist.process_group(device) as chosen_device:
            if kept_files := dist.run_on_rank0(find_feature_files, images):
                flag = needing_classes or ("--features" if kept_features is not None else None)
                if flag:
                    raise UserError(f"{flag}: --images={images} holds features without classes; "
                                    f"leave {flag.split('=')[-1]} out", BAD_USAGE)
                _score_kept(kept_files, ref_path, metrics, out, num, bootstrap, detector, chosen_device,
                            batch, workers)
                return
            folders = dist.run_on_rank0(_ckpt_folders, images, gen_seed, ckpt, end_ckpt, sweeps)
            with dist.rank0_first():
                jobs = folders or [Job(images, Path(images).name)]
                enough, left_out = [], []
                for job in jobs:
                    try:
                        dataset = ImageFolderDataset(job.path, max_size=num, random_seed=seed,
                                                     use_labels=needing_classes is not None)
                        if needing_classes and not dataset.has_onehot_labels:
                            raise ValueError(f"{needing_classes}: {job.path} has no classes; leave "
                                             f"{needing_classes.split('=')[-1]} out")
                        _refuse_strays(dataset)
                        if len(dataset) < num:
                            raise UnscorableError(
                                f"{job.path}: {len(dataset)} images, but --count={num}; make more "
                                f"images, or score these with --count={len(dataset)}",
                                f"{len(dataset)} images")
                        enough.append((job, dataset))
                    except (NoImagesError, UnscorableError) as error:
                        if not folders or len(jobs) == len(left_out) + 1:
                            raise
                        left_out.append(f"{job.label} ({getattr(error, 'short', 'no images')})")
            sets = {str(dataset.path): dataset for _, dataset in enough}
            kept_place = _place_of_features(kept_features, len(jobs))
            report = ScoreReport(detector, ref_path, metrics, chosen_device, sets, num, batch=batch,
                                 workers=workers, is_single=not folders, bootstrap=bootstrap,
                                 per_class=per_class)
            path = Path(out) if out else _jsonl_of_images(images)
            for job, dataset in enough:
                if len(dataset) < len(dataset.all_names):
                    dist.print0(f"Note: {job.path}: {num} of {len(dataset.all_names)} images are "
                                f"scored, chosen at random by --seed={seed}", file=sys.stderr)
                classes = dataset.class_numbers if needing_classes else None
                if per_class:
                    report.check_classes(classes)
                report.check_asked(dataset.label_dim, job.path, is_part=True)
                with console.timed("features"):
                    found = dataset_features(dataset, report.detector, metrics=metrics, batch=batch,
                                             workers=workers, title=Path(job.path).name,
                                             keeps_features=kept_place is not None
                                             or report.keeps_features, asked=classes)
                facts = {"images": job.path, "num": num, **_facts_of_images(dataset, seed)}
                report.add(job, found, facts, path, classes)
                if kept_place is not None:
                    dist.run_on_rank0(_keep_features, found, report.detector, dataset, facts,
                                      kept_place if len(jobs) == 1 else
                                      kept_place / f"{Path(job.path).name}.npz")
            report.print_table()
            if left_out:
                more = ", ..." if len(left_out) > _MAX_NAMED else ""
                raise ValueError(f"{len(left_out)} of {len(jobs)} folders were not scored with "
                                 f"--count={num}: {', '.join(left_out[:_MAX_NAMED])}{more}")


@main.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--network",    metavar="PT|URL|DIR|PATTERN", required=True, multiple=True,
              help="Network snapshot, training state, run directory (its newest network), or a "
                   "quoted pattern such as 'RUN/network-snapshot-*.pt'; may be given several times")
@_score_options
@click.option("--seeds",      metavar="LIST", type=IntList(), default="0-49999",
              help="Random seeds; one image per seed. With --average, the default is one image per "
                   "input")
@click.option("--ranges",     metavar="INT", type=click.IntRange(min=1), default=1,
              help="Number of seed ranges: --seeds, then as many seeds after them, and so on")
@click.option("--again",      is_flag=True,
              help="Recompute scores that are already recorded")
@sampling_options
@_detector_options
@cache_dir_option
@verbosity_options
def gen(network: tuple[str, ...], ref_path: str | None, metrics: tuple[str, ...], out: str | None,
        kept_features: str | None, bootstrap: int | None, per_class: bool, seeds: tuple[int, ...],
        ranges: int, again: bool, batch: int, detector: str, device: str,
        workers: int, steps: tuple[int, ...], alpha: tuple[float, ...] | None,
        bits: tuple[int, ...] | None, **sampling) -> None:
    """Scores the images of networks without writing them.

    The scores equal those of 'generate.py' followed by 'fid.py calc' with the same options. Papers
    report the lowest FID of three seed ranges: --ranges=3. Each score is appended to metrics.jsonl
    beside its network.

    Scores already recorded for the same weights, settings, seeds, detector and reference are
    reused. The progress of an unfinished range is saved every two minutes, so a command that was
    stopped continues when it is repeated.

    A network that cannot be opened or scored is skipped and named, and the exit code is 1.
    """
    _check_metrics(ref_path, metrics, bootstrap, per_class)
    with user_errors():
        from checkpoints.names import PUBLISHED, find_networks, found_note
        from metrics.network_scores import score_networks, seed_ranges
        from metrics.score_report import ScoreReport
        from sampling.network_sampler import NetworkFile, NetworkSampler, UsageError
        from sampling.sweeps import sweep_points
        from torch_utils import distributed as dist

        if len(seeds) < 2:
            raise ValueError(f"--seeds: {len(seeds)} image, at least 2 needed")
        is_seeds_typed = click.get_current_context().get_parameter_source(
            "seeds") is click.core.ParameterSource.COMMANDLINE
        with dist.process_group(device) as chosen_device:
            sources = dist.run_on_rank0(find_networks, network)
            if len(sources) > 1:
                dist.print0(f"Networks   {len(sources)}, {sources[0]} to {sources[-1]}")
            elif sources[0] not in network:
                is_pattern = not os.path.isdir(network[0]) and network[0] not in PUBLISHED
                note = sources[0] if is_pattern else found_note(network[0], sources[0])
                dist.print0(f"Network    {note}")
            points, seed_lists = sweep_points(steps, alpha, bits), seed_ranges(seeds, ranges)
            num_scores = len(sources) * len(points) * len(seed_lists)
            kept_place = _place_of_features(kept_features, num_scores)
            key = sampling.pop("key")
            if sampling["gnet"] is not None:
                sampling["gnet"] = NetworkFile.read(sampling["gnet"])

            def open_sampler(file, point):
                return NetworkSampler.open(file, chosen_device, **point.settings, **sampling)

            def open_report(source, sampler):
                return ScoreReport(
                    detector, ref_path, metrics, chosen_device, {source: sampler}, len(seeds),
                    batch=batch, workers=workers,
                    is_single=num_scores == 1, bootstrap=bootstrap, per_class=per_class)

            try:
                score_networks(sources, points, seed_lists, open_sampler, open_report, batch=batch,
                               out=Path(out) if out else None, key=key, again=again,
                               features=kept_place,
                               needing_classes=_needing_classes(metrics, per_class),
                               are_seeds_default=not is_seeds_typed)
            except UsageError as error:
                raise UserError(str(error), BAD_USAGE) from error


@main.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--data",       metavar="DIR|ZIP|NPZ", required=True,
              help="Data set")
@click.option("--dest",       metavar="NPZ", required=True,
              help="File to write")
@_switch("--features",        help="Also keep the features, which kid, pr and dc need")
@_detector_options
@cache_dir_option
@verbosity_options
def ref(data: str, dest: str, features: bool, batch: int, detector: str, device: str,
        workers: int) -> None:
    """Writes the reference statistics of a data set for 'calc' and 'gen'."""
    with user_errors():
        from images.dataset import ImageFolderDataset
        from metrics.detectors import build_detector, detector_class
        from metrics.evaluator import dataset_reference
        from metrics.references import save_reference
        from metrics.score_report import warn_if_few
        from torch_utils import distributed as dist
        from torch_utils.misc import configure_backends

        detector_class(detector)  # checks the name before the data are read
        with dist.process_group(device) as chosen_device:
            with dist.rank0_first():
                dataset = ImageFolderDataset(data)
                if len(dataset) < 2:
                    raise ValueError(f"{data}: {len(dataset)} image, at least 2 needed")
                built = build_detector(detector, chosen_device)
            dataset.share_fingerprint()
            configure_backends("fp32")
            warn_if_few(len(dataset), built.name, ("fid",))
            with console.timed("features"):
                reference = dataset_reference(dataset, built, with_features=features, batch=batch,
                                              workers=workers)
            dist.run_on_rank0(save_reference, dest, reference)
            if dist.get_rank() == 0:
                console.result(f"{dest}: statistics of {len(dataset)} images by {built.name}"
                               f"{', with features' if features else ''}")


def _parse_hidden(ctx, param, value: tuple[int, ...]) -> tuple[int, ...]:
    if not 1 <= len(value) < _MAX_LAYERS or not all(1 <= units <= _MAX_WIDTH for units in value):
        raise click.BadParameter(f"must be 1 to {_MAX_LAYERS - 1} numbers from 1 to {_MAX_WIDTH}")
    return value


@main.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--data",       metavar="DIR|ZIP|NPZ", required=True,
              help="Images with classes to train on")
@click.option("--val-data",   metavar="DIR|ZIP|NPZ", required=True,
              help="Held-out images with classes, for measuring the accuracy")
@click.option("--dest",       metavar="NPZ", required=True,
              help="File to write")
@click.option("--hidden",     metavar="LIST", type=IntList(unique=False), callback=_parse_hidden,
              default="128,64",
              help="Sizes of the hidden layers; the last one gives the features")
@click.option("--shift",      metavar="PIXELS", type=click.IntRange(min=0), default=1,
              help="Also train on copies of the images shifted this far in each direction")
@click.option("--alpha",      metavar="FLOAT", type=FiniteNumber(min=0, max=1e3), default=0.1,
              help="Strength of the penalty on squared weights in the loss")
@click.option("--seed",       metavar="INT", type=click.IntRange(0, 2**32 - 1), default=0,
              help="Seed for the initial weights and the order of the images")
@cache_dir_option
@verbosity_options
def classifier(data: str, val_data: str, dest: str, hidden: tuple[int, ...], shift: int,
               alpha: float, seed: int) -> None:
    """Trains a classifier of small images, to be used as --detector=NPZ.

    The classifier is a multilayer perceptron on the pixels, trained with scikit-learn. It takes
    only images of the same shape and scale as its training data. With it, --metrics=ca measures the
    share of images that are of the requested class. Its accuracy on the held-out images is printed
    and stored in the file.

    Under torchrun only the first process does the work.
    """
    if not console.is_rank0():
        return
    with user_errors():
        from dnnlib.atomic import check_writable
        from metrics.classifier_training import (
            check_trainable,
            open_labelled,
            require_package,
            train_classifier,
        )

        require_package()
        if not dest.endswith(".npz"):
            raise ValueError(f"--dest={dest}: must be a file with extension .npz")
        with flag_errors("--dest", dest, "give another file"):
            check_writable(dest)
        images, held_out = open_labelled(data, "--data"), open_labelled(val_data, "--val-data")
        check_trainable(images, held_out, shift)
        with console.timed("training"):
            trained = train_classifier(images, held_out, hidden=hidden, shift=shift, alpha=alpha,
                                       seed=seed)
        trained.save(dest)
        right = round(trained.accuracy * len(held_out))
        console.result(f"{dest}: a classifier of {trained.num_classes} classes; recognises {right} "
                       f"of {len(held_out)} held-out images, {trained.accuracy:.2%}")


@main.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--images",     metavar="DIR|ZIP|NPZ", required=True,
              help="Images to score")
@click.option("--truth",      metavar="DIR|ZIP|NPZ", required=True,
              help="The true images: a data set, whose condition images are ignored")
@click.option("--input", "input_", metavar="DIR|ZIP|NPZ|cond",
              help="Measurements from which the images were made, to score and show beside them; "
                   "cond uses the condition images of --truth")
@click.option("--metrics",    metavar="LIST", type=NameList(OF_PAIRS),
              help="Metrics to compute: psnr, ssim (Gaussian window), ssim_uniform, rmse, mae  "
                   "[default: psnr,ssim,rmse,mae]")
@click.option("--metric-file", "metric_files", metavar="FILE.py:FUNCTION", multiple=True,
              help="Your own metric: a function of (image, truth, value_range); may be given "
                   "several times")
@click.option("--range", "value_range", metavar="LO,HI", type=Range(),
              help="Value range for psnr and ssim  [default: 0,255 for 8-bit data, otherwise that "
                   "of the recorded scale of --truth]")
@click.option("--clip",       is_flag=True,
              help="Clip all images to the range before comparing them")
@click.option("--window",     metavar="CENTER,WIDTH", type=Window(),
              help="Center and width of the values that the picture shows from black to white  "
                   "[default: the range]")
@click.option("--pair-by",    type=click.Choice(["auto", "name", "order"]), default="auto",
              help="How to match images with their truths; auto uses names if all match")
@click.option("--out",        metavar="DIR",
              help="Folder for pairs.csv, pairs.jsonl, pairs.png and metrics.jsonl  [default: "
                   "pairs_NAME beside the images; metrics.jsonl of the run]")
@cache_dir_option
@verbosity_options
def pairs(images: str, truth: str, input_: str | None, metrics: tuple[str, ...] | None,
          metric_files: tuple[str, ...], value_range: tuple[float, float] | None, clip: bool,
          window: tuple[float, float] | None, pair_by: str, out: str | None) -> None:
    """Scores images one by one against their truths: PSNR, SSIM, errors.

    Images and truths are matched by name without extension. Failing that, images of generate.py are
    matched by seed, seed k with truth k, and others by order if there are equally many. Values are
    compared in the units of the data. Images may have any size and any number of channels.

    One line per metric is printed, such as 'psnr 43.42 +- 0.31 (16 images)': the mean and the
    standard deviation over the images. The scores of each image, and a picture of some of them, are
    written to --out.

    Under torchrun only the first process does the work.
    """
    if not console.is_rank0():
        return
    with user_errors():
        from metrics.paired import PAIRED_METRICS, SSIM_WINDOWS, load_metric, ssim_problem
        from metrics.pairs import Pairs, value_range_of

        own_metrics: dict = {}
        for spec in dict.fromkeys(metric_files):
            name, function = load_metric(spec)
            if name in own_metrics:
                raise ValueError(f"--metric-file={spec}: another file already defines {name}; "
                                 "rename one of the functions")
            own_metrics[name] = function
        folder = _folder_of_files("pairs", out, images, truth)
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
            raise ValueError("--metrics=: must have at least one metric, unless --metric-file is "
                             "given")
        source = "--range"
        if value_range is None:
            with flag_errors("--truth", truth, "give --range=LO,HI in the units of the data"):
                value_range = value_range_of(paired.truth.scaling)
            source = "8 bits" if paired.truth.scaling.is_8bit else "the scale of --truth"
        counts = f"{len(paired)} images, paired by {paired.partners.found_by}"
        if len(set(paired.partners.numbers)) < len(paired.truth):
            counts += (f" with {len(set(paired.partners.numbers))} of the {len(paired.truth)} "
                       "truths")
        click.echo(f"Pairs      {counts}")
        for warning in paired.warnings_of_partners():
            click.echo(f"Warning: {warning}", err=True)
        low, high = value_range
        click.echo(f"Range      {low:.6g} to {high:.6g} ({source}){', clipped to it' * clip}")
        with console.timed("scores"):
            scores, warnings = paired.score(functions, value_range, clip=clip)
        for warning in warnings:
            click.echo(f"Warning: {warning}", err=True)
        _report_pairs(paired, scores, value_range, clip, images, folder, bool(out), window)


@main.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--images",     metavar="DIR|ZIP|NPZ", required=True,
              help="Generated images")
@click.option("--data",       metavar="DIR|ZIP|NPZ", required=True,
              help="Images that the network was trained on")
@click.option("--held-out",   metavar="DIR|ZIP|NPZ",
              help="Images of the same kind that the network was not trained on, which show what "
                   "distances are usual")
@click.option("--rows",       metavar="INT", type=click.IntRange(min=1), default=16,
              help="Number of images in the picture: those nearest to a training image")
@click.option("--window",     metavar="CENTER,WIDTH", type=Window(),
              help="Center and width of the values that the picture shows from black to white, if "
                   "the data are not 8-bit  [default: the recorded scale]")
@click.option("--out",        metavar="DIR",
              help="Folder for nearest.csv, nearest.png and metrics.jsonl  [default: nearest_NAME "
                   "beside the images; metrics.jsonl of the run]")
@_detector_options
@cache_dir_option
@verbosity_options
def nearest(images: str, data: str, held_out: str | None, rows: int,
            window: tuple[float, float] | None, out: str | None, batch: int, detector: str,
            device: str, workers: int) -> None:
    """Finds the training images nearest to generated ones, to detect copies and memorisation.

    Distances are between features. The output is the median distance, the number of exact copies,
    and the share of images that are over three times nearer to one training image than to any
    other.

    With --held-out, it also includes the median distance of the held-out images, and the share of
    generated images that are at least as near as the nearest 5% of these. A share well above 5%
    means memorisation. C_T (Meehan et al. 2020) compares all distances: below -3, generated images
    are nearer than held-out ones as a whole.
    """
    with user_errors():
        from images.dataset import ImageFolderDataset
        from metrics.detectors import build_detector
        from metrics.metrics import dataset_features
        from metrics.nearest import check_comparable
        from torch_utils import distributed as dist
        from torch_utils.misc import configure_backends

        with dist.process_group(device) as chosen_device:
            folder = dist.run_on_rank0(_folder_of_files, "nearest", out, images, data, held_out)
            with dist.rank0_first():
                sets = [ImageFolderDataset(path) for path in (images, data, held_out) if path]
                _refuse_strays(sets[0])
                if len(sets[1]) < 2:
                    raise ValueError(f"--data={data}: {len(sets[1])} image, at least 2 needed")
                built = build_detector(detector, chosen_device)
            check_comparable(built, sets[1], data, {str(s.path): s for s in (sets[0], *sets[2:])})
            configure_backends("fp32")
            sets[1].share_fingerprint()
            with console.timed("features"):
                features = [dataset_features(
                    part, built, metrics=["kid"], batch=batch, workers=workers,
                    title=part.name).features for part in sets]
            dist.run_on_rank0(_report_nearest, sets, features, built, rows, window, folder,
                              bool(out))


def _report_nearest(sets: list, features: list, detector, rows: int,
                    window: tuple[float, float] | None, folder: Path | None,
                    is_folder_given: bool) -> None:
    """Finds the nearest training images, prints a summary, and writes it, a table and a picture.

    Args:
        sets: generated images, training images and, if given, held-out images.
        features: the features of each set.
        detector: the detector that computed the features.
        rows: the number of rows of the picture.
        window: center and width of the values that the picture shows.
        folder: folder for the files; None writes none.
        is_folder_given: whether the folder was given by --out.
    """
    from dnnlib.atomic import append_line
    from metrics.nearest import copy_distance, nearest_neighbours, nearness
    from metrics.nearest_files import (
        SHOWN,
        summary_lines,
        summary_records,
        warnings,
        write_nearest,
    )

    images, data, *_ = sets
    own, training, *held_out = features
    with console.timed("distances"):
        found = nearest_neighbours(own, training, min(SHOWN, len(training)), device=detector.device)
        usual = [nearest_neighbours(part, training, 1, device=detector.device) for part in held_out]
    summary = nearness(found, copy_distance(training), *usual)
    for text in warnings(summary):
        click.echo(f"Warning: {text}", err=True)
    for line in summary_lines(summary):
        console.result(line)
    if folder is None:
        click.echo("Files      none, because --images is a file; give --out=DIR to write them")
        return
    click.echo(f"Files      {write_nearest(folder, images, data, found, rows, window)}")
    path = str(images.path)
    facts = {"images": path, "num": len(images), **_facts_of_images(images, 0),
             "detector": detector.name, "detector_sha256": detector.weights_sha256,
             "reference": str(data.path), "reference_sha256": data.fingerprint,
             "reference_num": len(data), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    append_line(folder / SCORES_FILE if is_folder_given else _jsonl_of_images(path), "\n".join(
        json.dumps(record | facts) for record in summary_records(summary)))


def _folder_of_files(kind: str, out: str | None, images: str, *others: str | None) -> Path | None:
    """Returns the folder for files about images: --out, or KIND_NAME beside them; None for a file.

    Raises:
        ValueError: the folder is inside one of the image folders, so the picture would be read as
            an image.
        OSError: files can't be written there.
    """
    from dnnlib.atomic import check_writable

    source = Path(os.path.abspath(images))
    if out is None and not source.is_dir():
        return None
    folder = Path(out) if out is not None else source.with_name(f"{kind}_{source.name}")
    if out == "" or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"--out={out}: must be a folder, which is created if needed")
    for path in filter(os.path.isdir, filter(None, (images, *others))):
        if folder.resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(f"--out={folder}: is inside {path}, so the picture would be read as "
                             "one of its images; give a folder outside it")
    try:
        check_writable(folder / SCORES_FILE)
    except OSError as error:
        raise OSError(f"--out={folder}: {describe(error)}; give another folder") from error
    return folder


def _report_pairs(paired, scores, values: tuple[float, float], clip: bool, images: str,
                  folder: Path | None, is_folder_given: bool,
                  window: tuple[float, float] | None) -> None:
    """Prints the summary of paired scores, and writes it with the scores of each image."""
    from dnnlib.atomic import append_line
    from metrics.pair_files import summary_lines, summary_records, write_scores

    for line in summary_lines(scores):
        console.result(line)
    if folder is None:
        click.echo("Files      none, because --images is a file; give --out=DIR to write them")
        return
    window = window or (sum(values) / 2, values[1] - values[0])
    click.echo(f"Files      {write_scores(folder, paired, scores, values, window)}")
    facts = {"images": images, "num": len(scores), **_facts_of_images(paired.images, 0),
             "range": list(values), "clip": clip, "paired_by": paired.partners.found_by,
             "reference": str(paired.truth.path), "reference_sha256": paired.truth.fingerprint,
             "reference_num": len(paired.truth), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    append_line(folder / SCORES_FILE if is_folder_given else _jsonl_of_images(images), "\n".join(
        json.dumps(record | facts) for record in summary_records(scores)))


def _check_metrics(ref_path: str | None, metrics: tuple[str, ...], bootstrap: int | None,
                   per_class: bool) -> None:
    if ref_path is None:
        from metrics.metrics import metrics_that_compare

        comparing = metrics if per_class else metrics_that_compare(metrics)
        if comparing:
            raise UserError("Missing option '--ref': reference statistics (.npz) or the data set, "
                            f"needed by {', '.join(comparing)}", BAD_USAGE)
    if bootstrap is not None and "fid" not in metrics:
        raise UserError(f"--bootstrap with --metrics={','.join(metrics)}: needs fid, whose "
                        "interval it estimates; add fid, or leave --bootstrap out", BAD_USAGE)


def _needing_classes(metrics: tuple[str, ...], per_class: bool) -> str | None:
    """Returns the flag that needs images with classes; None if no flag does."""
    from metrics.metrics import metrics_that_need

    asking = metrics_that_need("hits", metrics)
    return "--per-class" if per_class else f"--metrics={asking[0]}" if asking else None


def _place_of_features(kept: str | None, num_scores: int) -> Path | None:
    """Returns the path of --features: a file for one score, a folder for several; None without it.

    Raises:
        ValueError: it is a file instead of a folder, or the other way round.
        OSError: it can't be written.
    """
    from dnnlib.atomic import check_writable

    if kept is None:
        return None
    path, is_file = Path(kept), kept.lower().endswith(".npz")
    if num_scores == 1 and (not is_file or path.is_dir()):
        raise ValueError(f"--features={kept}: must be a file with extension .npz")
    if num_scores > 1 and (is_file or path.is_file()):
        raise ValueError(f"--features={kept}: must be a folder, because there are {num_scores} "
                         "scores")
    try:
        check_writable(path if is_file else path / "features.npz")
    except OSError as error:
        raise OSError(f"--features={kept}: {describe(error)}; give another path") from error
    return path


def _keep_features(found, detector, dataset, facts: dict, path: Path) -> None:
    """Writes the features of a folder or ZIP of images."""
    from metrics.feature_files import KeptFeatures

    KeptFeatures(found.features, detector.name, facts, tuple(dataset.image_shape), dataset.scale,
                 detector.weights_sha256).save(path)


def _score_kept(files: Sequence[str], ref_path: str | None, metrics: tuple[str, ...],
                out: str | None, num: int, bootstrap: int | None, detector: str, device,
                batch: int, workers: int) -> None:
    """Scores features of one detector that --features has kept in files."""
    from metrics.detectors import describe_detector
    from metrics.feature_files import load_on_rank0, of_features
    from metrics.score_report import Job, ScoreReport
    from torch_utils import distributed as dist

    report = None
    for path in files:
        kept, count = load_on_rank0(path)
        kept.check_name(dist.run_on_rank0(describe_detector, detector)[0], path)
        if count != num:
            raise ValueError(f"{path}: features of {count} images, but --count={num}; give "
                             f"--count={count}")
        if report is None:
            report = ScoreReport(detector, ref_path, metrics, device, {path: kept}, count,
                                 batch=batch, workers=workers, is_single=len(files) == 1,
                                 bootstrap=bootstrap)
        report.check(kept, path)
        kept.check_made_by(report.detector, path)
        found = of_features(kept, count, report.detector, metrics,
                            keeps_features=report.keeps_features)
        beside = Path(path).with_name(SCORES_FILE)
        report.add(Job(path, Path(path).name), found, kept.facts, Path(out) if out else beside)
    report.print_table()


def _jsonl_of_images(images: str) -> Path | None:
    """Returns the scores file of a folder, in its run or else in itself; None for a file."""
    path = Path(os.path.abspath(images))
    if not path.is_dir():
        return None
    is_of_run = FolderName.parse(path.name) and any(path.parent.glob("training[-_]*"))
    return (path.parent if is_of_run else path) / SCORES_FILE


def _facts_of_images(dataset, seed: int) -> dict:
    """Returns what is recorded about the images in a folder or ZIP: seeds, sampler, the choice."""
    from dnnlib.util import format_ranges

    names, records = dataset.all_names, dataset.sample_records()
    seeds = [seed_of(name, records) for name in names]
    facts = {"seeds": None, "sampler": None}
    if len(records) == 1:
        [facts["sampler"]] = records.values()
        facts["seeds"] = None if None in seeds else format_ranges(seeds)
    if len(dataset) < len(names):
        facts["chosen_from"], facts["choice_seed"] = len(names), seed
    return facts


def _ckpt_folders(images: str, gen_seeds: tuple[int, ...], first: float, last: float,
                  sweeps: set[str]) -> list:
    """Returns the folders of a run directory to score, in order; none if it isn't one."""
    from images.image_files import check_finished
    from metrics.score_report import Job

    check_finished(Path(images))
    if not os.path.exists(images):
        raise FileNotFoundError(f"{images}: no such folder or ZIP")
    names = [entry.name for entry in os.scandir(images)
             if entry.is_dir() and entry.name.startswith(CKPT_PREFIX)
             ] if os.path.isdir(images) else []
    if not names:
        if sweeps or gen_seeds != (1,):
            raise ValueError(f"{images}: not a run directory with ckpt_* folders, among which "
                             "--gen_seed, --alpha, --steps and --quant choose")
        if os.path.exists(os.path.join(images, _RUN_OPTIONS)):
            raise ValueError(f"{images}: a run directory without ckpt_* folders of images; make them "
                             f"with generate.py --outdir={images}, or score a network with 'fid.py "
                             "gen'")
        return []
    parsed = {name: FolderName.parse(name) for name in sorted(names)}
    if strange := [name for name, parts in parsed.items() if parts is None]:
        click.echo(f"Warning: folders with names not from generate.py are not scored: {strange[0]} "
                   f"({len(strange)} in total)", err=True)
    folders = {parts: name for name, parts in parsed.items() if parts is not None}
    chosen = [parts for parts in folders if parts.gen_seed in gen_seeds
              and first <= float(parts.kimg) <= last and parts.swept == sweeps]
    if not chosen:
        there = sorted({_sweep_flags(parts.swept) for parts in folders})
        raise ValueError(f"{images}: none of {len(names)} ckpt_* folders (such as {min(names)}) "
                         f"matches --gen_seed={','.join(map(str, gen_seeds))}, {_sweep_flags(sweeps)}, "
                         f"and {first:.15g} to {last:.15g} kimg; there is "
                         f"{' and '.join(there) or 'none of generate.py'}")
    _warn_of_missing_ranges(chosen, gen_seeds)
    return [Job(os.path.join(images, folders[parts]), folders[parts], str(parts.point))
            for parts in sorted(chosen, key=lambda parts: (parts.point, parts.gen_seed))]


def _warn_of_missing_ranges(chosen: Sequence[FolderName], gen_seeds: tuple[int, ...]) -> None:
    """Warns of the requested seed ranges that are missing, for each network."""
    groups: dict[tuple, list[FolderName]] = {}
    for parts in chosen:
        groups.setdefault(parts.point, []).append(parts)
    for found in groups.values():
        there = {parts.gen_seed for parts in found}
        missing = [str(dataclasses.replace(found[0], gen_seed=number)) for number in gen_seeds
                   if number not in there]
        if missing:
            click.echo(f"Warning: {found[0]}: for --gen_seed={','.join(map(str, gen_seeds))} there "
                       f"is no {' and no '.join(missing)}; its lowest score is that of "
                       f"{len(found)}", err=True)


class UnscorableError(ValueError):
    """A folder of a run can't be scored, but others can; `short` says why."""

    def __init__(self, message: str, short: str):
        super().__init__(message)
        self.short = short


def _refuse_strays(dataset) -> None:
    """Raises ValueError for a folder of generate.py with images that it did not make.

    Raises UnscorableError if the network has made images that are not finite.
    """
    records = dataset.sample_records()
    if not records:
        return
    if len(records) > 1:
        raise ValueError(f"{dataset.path}: holds the images of {len(records)} networks or settings "
                         f"({', '.join(sorted(records)[:_MAX_NAMED])}); score each folder "
                         "separately")
    [(top, record)] = records.items()
    below = [name.removeprefix(top) if name.startswith(top) else f"/{name}"
             for name in dataset.all_names]
    subdirs = record.get("subdirs")
    found = strays(below, subdirs if isinstance(subdirs, bool) else None)
    if found and record.get("names") != "inputs":  # names of inputs can be anything
        raise ValueError(f"{dataset.path}: holds files that generate.json does not describe: "
                         f"{found[0].lstrip('/')} ({len(found)} in total); move them away")
    _refuse_not_finite(dataset, record)


def _refuse_not_finite(dataset, record: dict) -> None:
    """Raises UnscorableError if generate.py has made images that are not finite."""
    if lost := record.get("not_finite"):
        raise UnscorableError(f"{dataset.path}: {len(lost)} images of this network have values that "
                              "are not finite, so it has no score",
                              f"{len(lost)} images that are not finite")


def _sweep_flags(sweeps: set[str]) -> str:
    """Returns the flags that choose folders of a sweep over all of these settings."""
    return " ".join(f"--{name}" for name in SWEPT if name in sweeps) or "no sweep"


def cli() -> None:
    """Runs the command; entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
