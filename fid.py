"""Frechet Inception Distance (FID) of images to reference statistics, and those statistics."""

import os
import re

import click

from dnnlib.cli import BAD_USAGE, UserError, user_errors

# As generate.py names folders: ckpt_[2_|3_]KIMG[_alpha_A][_steps_S][_quant_B].
_CKPT_PREFIX = "ckpt_"
_CKPT_NAME = re.compile(
    r"ckpt_(?:(?P<gen_seed>[23])_)?(?P<kimg>\d{6,}(?:\.\d+)?)"
    r"(?:_alpha_(?P<alpha>\d+(?:\.\d+)?(?:e-\d+)?))?(?:_steps_(?P<steps>\d+))?"
    r"(?:_quant_(?P<quant>\d+))?")
_SWEEPS = ("alpha", "steps", "quant")

_FEW_IMAGES = 2048  # the covariance of Inception's features is singular below


@click.group()
def main() -> None:
    """Scores generated images by Frechet Inception Distance (FID).

    \b
    # 50,000 images against published statistics, on 8 GPUs
    torchrun --standalone --nproc_per_node=8 fid.py calc --images=fid-tmp \\
        --ref=fid-refs/cifar10-32x32.npz

    \b
    # every ckpt_* folder of a run that generate.py filled
    python fid.py calc --images=training-runs/exp_name --ref=fid-refs/cifar10-32x32.npz

    \b
    # reference statistics of a data set
    python fid.py ref --data=datasets/cifar10-32x32.zip --dest=fid-refs/cifar10-32x32.npz
    """  # noqa: D301 - \b is click's mark for lines to leave alone


def _switch(*names: str, help: str):
    """An option that is on as `--name` and as the references' `--name=True`."""
    return click.option(*names, type=bool, is_flag=False, flag_value=True, default=False,
                        metavar="[BOOL]", help=help)


def _detector_options(command):
    """The options that `calc` and `ref` share."""
    for option in reversed((
        click.option("--batch",    metavar="INT", type=click.IntRange(min=1), default=64,
                     help="Images at a time on each device"),
        click.option("--detector", metavar="inception|pixels|FILE", default="inception",
                     help="Features to compare; FILE is a local copy of the Inception weights"),
        click.option("--device",   type=click.Choice(["auto", "cuda", "cpu"]), default="auto",
                     help="Where to compute"),
        click.option("--workers",  metavar="INT", type=click.IntRange(min=0), default=3,
                     help="Threads that read images ahead"),
    )):
        command = option(command)
    return command


@main.command(context_settings={"show_default": True})
@click.option("--images",     metavar="DIR|ZIP", required=True,
              help="Images to score, or a run directory with ckpt_* folders")
@click.option("--ref", "ref_path", metavar="NPZ|URL", required=True,
              help="Reference statistics")
@click.option("--num",        metavar="INT", type=click.IntRange(min=2), default=50000,
              help="Number of images to use")
@click.option("--seed",       metavar="INT", type=int, default=0,
              help="Chooses the images where there are more than --num")
@click.option("--ckpt",       metavar="KIMG", type=float, default=0,
              help="Run directory: first checkpoint to score")
@click.option("--end_ckpt",   metavar="KIMG", type=float, default=1000000,
              help="Run directory: last checkpoint to score")
@click.option("--gen_seed",   metavar="1|2|3", type=click.IntRange(1, 3), default=1,
              help="Run directory: score ckpt_*, ckpt_2_* or ckpt_3_*")
@_switch("--steps",           help="Run directory: score the folders of a sweep over steps")
@_switch("--alpha",           help="Run directory: score the folders of a sweep over alpha")
@_switch("--quant",           help="Run directory: score the folders of a sweep over bits")
@_switch("--prune",           help="Refused: there is no pruning here")
@_detector_options
def calc(images: str, ref_path: str, num: int, seed: int, ckpt: float, end_ckpt: float,
         gen_seed: int, steps: bool, alpha: bool, quant: bool, prune: bool, batch: int,
         detector: str, device: str, workers: int) -> None:
    """Prints the FID of a folder or ZIP, or 'path:FOLDER, FID' for each ckpt_* folder of a run.

    Scores can be compared only at equal --num. With --detector=pixels the number is called
    'pixels Frechet distance', because it is not an FID.

    With --num, torchrun needs a '--' before the script, as in 'torchrun --standalone
    --nproc_per_node=8 -- fid.py calc --num=10000 ...': it would take --num for an option of its
    own, --numa-binding.
    """
    if prune:
        raise UserError("--prune: pruned networks are not supported; --quant, --alpha and --steps "
                        "are", BAD_USAGE)
    with user_errors():
        sweeps = {name for name, on in zip(_SWEEPS, (alpha, steps, quant), strict=True) if on}
        folders = _ckpt_folders(images, gen_seed, ckpt, end_ckpt, sweeps)

        from metrics.detectors import build_detector, describe_detector
        from metrics.distances import frechet_distance
        from metrics.statistics import dataset_statistics, load_reference
        from torch_utils import distributed as dist
        from training.dataset import ImageFolderDataset

        name, distance_name = describe_detector(detector)
        with dist.process_group(device) as chosen_device:
            with dist.rank0_first():
                reference = load_reference(ref_path)
                if reference.detector != name:
                    raise ValueError(f"{ref_path}: made with detector {reference.detector}, but "
                                     f"--detector={detector} is {name}; give --detector={reference.detector}")
                datasets = [ImageFolderDataset(path, max_size=num, random_seed=seed)
                            for path in folders or [images]]
                for dataset in datasets:
                    if len(dataset) < num:
                        raise ValueError(f"{dataset.path}: {len(dataset)} images, but --num={num}")
                features = build_detector(detector, chosen_device)
                for dataset in datasets:
                    _check_feature_dim(dataset, features, ref_path, len(reference.mu))
            _use_exact_kernels()
            _warn_if_few(num, name)

            for path, dataset in zip(folders or [None], datasets, strict=True):
                stats = dataset_statistics(dataset, features, batch=batch, workers=workers)
                if dist.get_rank() == 0:
                    distance = frechet_distance(stats.mean(), stats.cov(),
                                                reference.mu, reference.sigma)
                    text = f"{distance:g}"
                    if distance_name != "FID":
                        text = f"{distance_name}: {text}"
                    click.echo(text if path is None else f"path:{path}, {text}")


@main.command(context_settings={"show_default": True})
@click.option("--data",       metavar="DIR|ZIP", required=True,
              help="Images of the data set")
@click.option("--dest",       metavar="NPZ", required=True,
              help="File to write")
@_detector_options
def ref(data: str, dest: str, batch: int, detector: str, device: str, workers: int) -> None:
    """Writes the reference statistics of a data set that 'calc' needs."""
    with user_errors():
        from metrics.detectors import build_detector, describe_detector
        from metrics.statistics import dataset_statistics, save_reference
        from torch_utils import distributed as dist
        from training.dataset import ImageFolderDataset

        name, distance_name = describe_detector(detector)
        with dist.process_group(device) as chosen_device:
            with dist.rank0_first():
                dataset = ImageFolderDataset(data)
                if len(dataset) < 2:
                    raise ValueError(f"{data}: {len(dataset)} image, at least 2 needed")
                features = build_detector(detector, chosen_device)
            _use_exact_kernels()
            _warn_if_few(len(dataset), name)
            stats = dataset_statistics(dataset, features, batch=batch, workers=workers)
            dist.run_on_rank0(save_reference, dest, stats, name)


def _ckpt_folders(images: str, gen_seed: int, first: float, last: float,
                  sweeps: set[str]) -> list[str]:
    """Returns the folders of a run directory to score, in order; none if it isn't one."""
    names = [entry.name for entry in os.scandir(images)
             if entry.is_dir() and entry.name.startswith(_CKPT_PREFIX)
             ] if os.path.isdir(images) else []
    if not names:
        if sweeps or gen_seed != 1:
            raise ValueError(f"{images}: no run directory with ckpt_* folders, which --gen_seed, "
                             "--alpha, --steps and --quant choose from")
        return []
    chosen = []
    for match in filter(None, map(_CKPT_NAME.fullmatch, names)):
        kimg, values = float(match["kimg"]), [match[name] for name in _SWEEPS]
        has = {name for name, value in zip(_SWEEPS, values, strict=True) if value is not None}
        if int(match["gen_seed"] or 1) == gen_seed and first <= kimg <= last and has == sweeps:
            chosen.append((kimg, *(float(value or 0) for value in values), match[0]))
    if not chosen:
        wanted = " ".join(f"--{name}" for name in _SWEEPS if name in sweeps) or "no sweep"
        raise ValueError(f"{images}: none of {len(names)} ckpt_* folders (such as {min(names)}) "
                         f"is of --gen_seed={gen_seed}, {wanted}, and {first:g} to {last:g} kimg")
    return [os.path.join(images, name) for *_, name in sorted(chosen)]


def _check_feature_dim(dataset, detector, ref_path: str, expected: int) -> None:
    import torch

    empty = torch.empty([0, *dataset.image_shape], dtype=torch.uint8)
    given = detector(empty).shape[1]
    if given != expected:
        shape = "x".join(map(str, dataset.image_shape))
        raise ValueError(f"{ref_path}: statistics of {expected} features, but detector "
                         f"{detector.name} gives {given} for the {shape} images of {dataset.path}")


def _use_exact_kernels() -> None:
    from torch_utils.misc import configure_backends

    configure_backends("fp32")


def _warn_if_few(count: int, detector: str) -> None:
    from torch_utils.distributed import get_rank

    if detector == "inception" and count < _FEW_IMAGES and get_rank() == 0:
        click.echo(f"Warning: {count} images are fewer than the {_FEW_IMAGES} features: "
                   "their covariance is singular and FID is biased upwards", err=True)


if __name__ == "__main__":
    main()
