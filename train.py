"""Trains a PFGM++ or EDM model: checks the options, opens the data, starts the loop."""

import contextlib
import json
import os
from pathlib import Path

import click
from click.core import ParameterSource

from dnnlib import console
from dnnlib.cli import (
    BAD_USAGE,
    CONTEXT,
    DIVERGED,
    IntList,
    NameList,
    UserError,
    cache_dir_option,
    describe,
    run,
    user_errors,
    verbosity_options,
)
from dnnlib.progress import stage
from sampling.sweeps import SOLVERS
from training.config import LOG_SINKS, LR_DECAYS
from training.presets import PRESETS

_BOOL = click.BOOL
_ROOT = Path(__file__).resolve().parent
_EXAMPLE_DATA = "examples/emoji-google-32.zip"
_PARAMETERS = {"compile": "compile_"}  # of options whose name is not that of the parameter


class _Command(click.Command):
    """A command that says all that is missing, and how to start."""

    def parse_args(self, ctx, args):
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            missing = [f"{option.opts[0]}={option.metavar} ({option.help[:-1].lower()})"
                       for option in self.params if option.required
                       and not any(word.partition("=")[0] == option.opts[0] for word in given)
                       and ctx.lookup_default(option.name) is None]
            raise UserError(f"train.py needs {' and '.join(missing)}", BAD_USAGE,
                            hint=_first_command()) from error


def _first_command() -> str:
    """Returns the line that shows how to start, with the data of this repository where it is."""
    script, data = (os.path.relpath(_ROOT / name) for name in ("train.py", _EXAMPLE_DATA))
    if not (_ROOT / _EXAMPLE_DATA).exists():
        return "All flags: pfgmpp-train --help"
    return f"To try it: python {script} --preset=emoji32 --outdir=runs --data={data}"


def _use_preset(ctx, param, value: str | None) -> str | None:
    """Makes a preset's settings the defaults of the other flags."""
    if value and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
        ctx.default_map = PRESETS[value]
    return value


def _options_in(path: Path) -> dict:
    """Returns the options in a training_options.json, or in a JSON object of options."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"not a JSON file ({error})") from error
    options = content.get("options", content) if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise ValueError("not a JSON object of options, as training_options.json holds it")
    return options


def _use_config(ctx, param, value: str | None) -> None:
    """Makes the options of a run the defaults of the other flags."""
    if not value:
        return
    from training.config import check_options
    try:
        options = check_options(_options_in(Path(value)))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"--config={value}: {describe(error)}", BAD_USAGE) from error
    if "sigma_data" in options and options["sigma_data"] is None:
        options["sigma_data"] = "auto"
    ctx.default_map = {_PARAMETERS.get(key, key): option for key, option in options.items()
                       if option is not None}


def precision_of(ctx: click.Context) -> str:
    """Returns the precision that --precision and --fp16 come to; what is typed comes first.

    Raises:
        ValueError: both are typed and disagree.
    """
    precision, fp16 = ctx.params["precision"], ctx.params["fp16"]
    typed = [name for name in ("precision", "fp16")
             if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if fp16 and len(typed) == 2 and precision != "fp16":
        raise ValueError(f"--fp16=1 and --precision={precision}: choose one")
    if typed == ["fp16"]:
        return "fp16" if fp16 else "fp32"
    return precision or "fp32"


def _parse_sigma_data(ctx, param, value: str) -> float | None:
    """Returns the number, None for 'auto'."""
    try:
        return None if value == "auto" else float(value)
    except ValueError:
        raise click.BadParameter(f"{value}: must be a number or auto") from None


@click.command(cls=_Command, context_settings=CONTEXT)
# Main options.
@click.option("--outdir", metavar="DIR", required=True, help="Where to make the run directory.")
@click.option("--data", metavar="ZIP|DIR", required=True, help="Data set made by dataset_tool.py.")
@click.option("--name", metavar="NAME", help="Run directory OUTDIR/NAME instead of a numbered one.")
@click.option("--preset", metavar="NAME", type=click.Choice(list(PRESETS)), is_eager=True, callback=_use_preset, help=f"Defaults for the flags below, of a published run or an example: {', '.join(PRESETS)}.")
@click.option("--config", metavar="JSON", is_eager=True, expose_value=False, callback=_use_config, help="Defaults for the flags below, from the training_options.json of a run.")
@click.option("--cond", type=_BOOL, default=False, help="Train a class-conditional model.")
@click.option("--arch", type=click.Choice(["ddpmpp", "ncsnpp", "adm"]), default="ddpmpp", help="Network architecture.")
@click.option("--precond", type=click.Choice(["vp", "ve", "edm", "iddpm"]), default="edm", help="Preconditioning and loss.")
@click.option("--pfgmpp", type=_BOOL, default=False, help="Train PFGM++ instead of diffusion.")
@click.option("--aug_dim", metavar="D", type=float, default=128, help="Augmented dimensions of PFGM++: any real above 0, or inf.")
@click.option("--stf", type=_BOOL, default=False, help="Stable targets: the mean over a reference batch, of the own class, given the noisy image; with --augment=0.")
@click.option("--rbatch", metavar="INT", type=int, default=4096, help="Images in the reference batch of --stf, the batch included.")
@click.option("--lsun", type=_BOOL, default=False, help="Noise levels for 256x256 images: 380/80 times higher.")
@click.option("--P_mean", "P_mean", metavar="FLOAT", type=float, default=-1.2, help="Mean of ln sigma in training, with --precond=edm. Latents and 512x512 images use others: EDM2 has -0.4.")
@click.option("--P_std", "P_std", metavar="FLOAT", type=float, default=1.2, help="Standard deviation of ln sigma in training, with --precond=edm; EDM2 has 1.0.")
@click.option("--cond-image", type=_BOOL, default=False, help="Train with the condition images of the data set.")
# Hyperparameters.
@click.option("--duration", metavar="MIMG", type=float, default=200, help="Length of training in millions of images.")
@click.option("--batch", metavar="INT", type=int, default=512, help="Batch size over all processes.")
@click.option("--batch-gpu", metavar="INT", type=int, help="Largest batch per process; smaller means gradient accumulation.  [default: batch / processes]")
@click.option("--cbase", metavar="INT", type=int, help="Channel multiplier.  [default: by architecture]")
@click.option("--cres", metavar="LIST", type=IntList(unique=False), help="Channels per resolution, e.g. 1,2,2,2.  [default: by architecture]")
@click.option("--nblock", metavar="INT", type=int, help="Residual blocks per resolution.  [default: by architecture]")
@click.option("--ares", metavar="LIST", type=IntList(empty="none"), help="Image sides (the longer one) at which blocks attend, e.g. 32,16,8; with none, only the block in the middle does.  [default: by architecture: 16, and 32,16,8 for adm]")
@click.option("--lr", metavar="FLOAT", type=float, default=10e-4, help="Learning rate of Adam.")
@click.option("--lr-rampup", metavar="MIMG", type=float, default=10, help="Linear rise of the learning rate, in millions of images.")
@click.option("--lr-decay", type=click.Choice(LR_DECAYS), default="none", help="Fall of the learning rate: rsqrt is sqrt(start / images), as in EDM2; cosine reaches 0 at --duration.")
@click.option("--lr-decay-start", metavar="MIMG", type=float, help="Where --lr-decay begins, in millions of images; above 0 for rsqrt.  [default: the end of --lr-rampup]")
@click.option("--ema", metavar="MIMG", type=float, default=0.5, help="Half-life of the weights' moving average.")
@click.option("--dropout", metavar="FLOAT", type=float, default=0.13, help="Dropout probability.")
@click.option("--augment", metavar="FLOAT", type=float, default=0.12, help="Augmentation probability; 0 is off.")
@click.option("--label-dropout", metavar="FLOAT", type=float, default=0, help="Share of labels left out, for --guidance without a second network; with --cond=1.")
@click.option("--sigma-data", metavar="FLOAT|auto", default="0.5", callback=_parse_sigma_data, help="Standard deviation of the data as networks see them; auto measures it.")
@click.option("--xflip", type=_BOOL, default=False, help="Add a mirrored copy of the data set.")
# Performance.
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), help="Arithmetic inside the network.  [default: fp32]")
@click.option("--fp16", type=_BOOL, default=False, help="The same as --precision=fp16.")
@click.option("--ls", metavar="FLOAT", type=float, help="Loss scaling.  [default: dynamic for fp16, else 1]")
@click.option("--clip-grad", metavar="NORM", type=float, help="Shorten the gradient of a step, all parameters together, to this 2-norm.  [default: no limit]")
@click.option("--max-bad-steps", metavar="INT", type=int, default=100, help="End the run after more steps in a row with gradients that are not finite; checked without waiting for the device, at the latest at a tick.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="Where to train.")
@click.option("--checkpoint-blocks", type=_BOOL, default=False, help="Keep only the inputs of the network's blocks for the backward pass, and compute each block twice: less memory, about a third more operations.")
@click.option("--compile", "compile_", type=click.Choice(["auto", "0", "1"]), default="auto", help="torch.compile the network; auto compiles on a GPU with Triton, except with --deterministic=1.")
@click.option("--deterministic", type=_BOOL, is_flag=False, flag_value=True, default=False, help="Only deterministic GPU kernels.")
@click.option("--bench", type=_BOOL, default=True, help="cuDNN autotuning.")
@click.option("--cache", type=_BOOL, default=True, help="Decode the data once into a packed file that all processes of a node map.")
@cache_dir_option
@click.option("--data-on-device", type=click.Choice(["auto", "0", "1"]), default="auto", help="Keep the data in the device's memory; auto does where they take 1/16 of a GPU's.")
@click.option("--workers", metavar="INT", type=int, default=1, help="Threads that read data ahead, processes with --cache=0; 0 reads in the main thread.")
# Input and output.
@click.option("--desc", metavar="STR", help="Text at the end of the run directory's name.")
@click.option("--nosubdir", is_flag=True, help="Use OUTDIR itself as the run directory.")
@click.option("--tick", metavar="KIMG", type=float, default=50, help="How often to report progress, in thousands of images.")
@click.option("--snap", metavar="TICKS", type=int, default=50, help="How often to write network-snapshot-*.pt and samples-*.png.")
@click.option("--dump", metavar="TICKS", type=int, default=50, help="How often to write training-state-*.pt.")
@click.option("--keep", metavar="INT", type=int, help="Keep this many training states, the newest.  [default: all]")
@click.option("--samples", metavar="INT", type=int, help="Images in a samples-*.png; 0 writes none.  [default: 64 on a GPU, 16 on the CPU]")
@click.option("--log-to", "--log", "log", metavar="LIST", type=NameList(LOG_SINKS), help="Also log to tensorboard, wandb.  [default: files of the run alone]")
@click.option("--eval", metavar="KIMG", type=float, help="How often to score samples, in thousands of images.  [default: never]")
@click.option("--eval-ref", metavar="NPZ|URL|ZIP|DIR", help="Reference statistics or data set to score against.")
@click.option("--eval-num", metavar="INT", type=int, default=50_000, help="Number of samples to score.")
@click.option("--eval-solver", type=click.Choice(SOLVERS), default="heun", help="Solver of scores and of grids of samples, see generate.py.")
@click.option("--eval-steps", metavar="INT", type=int, default=18, help="Steps of scores and of grids of samples.")
@click.option("--eval-detector", metavar="inception|pixels|FILE", default="inception", help="Features to score by, see fid.py.")
@click.option("--val-data", metavar="ZIP|DIR", help="Held-out data set; each tick reports the loss of its images.  [default: none]")
@click.option("--val-num", metavar="INT", type=int, default=2048, help="Largest number of held-out images to use, chosen at random.")
@click.option("--seed", metavar="INT", type=int, help="Random seed.  [default: random, or that of the resumed state]")
@click.option("--transfer", metavar="PT|URL", help="Start from the weights of a snapshot or state.")
@click.option("--resume", metavar="PT|auto", help="Go on from a training state; auto takes the newest of the run directory.")
@click.option("--override-options", is_flag=True, help="Resume although options that decide what is computed have changed.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the options and what the run will take, and stop.")
@click.option("--rate", metavar="IMG_PER_S", type=click.FloatRange(min=0, min_open=True), help="Images a second over all processes, for the hours that --dry-run prints.")
@verbosity_options
@click.pass_context
def main(ctx, outdir, data, name, desc, nosubdir, device, resume, override_options, dry_run, rate,
         **opts):
    """Trains a PFGM++ or EDM diffusion model.

    Two runs on 8 GPUs, PFGM++ with D = 2048 and class-conditional diffusion:

    \b
    torchrun --standalone --nproc_per_node=8 train.py --outdir=runs \\
        --data=datasets/cifar10-32x32.zip --arch=ncsnpp --pfgmpp=1 --aug_dim=2048

    \b
    torchrun --standalone --nproc_per_node=8 train.py --outdir=runs \\
        --data=datasets/cifar10-32x32.zip --arch=ncsnpp --cond=1
    """  # noqa: D301 - \b is click's mark for lines to leave alone
    if nosubdir and (name or desc):
        raise UserError("--nosubdir: can't be combined with --name or --desc", BAD_USAGE)
    if resume == "auto" and not (name or nosubdir):
        raise UserError("--resume=auto: needs --name or --nosubdir to know the run", BAD_USAGE)
    is_transfer_typed = ctx.get_parameter_source("transfer") is ParameterSource.COMMANDLINE
    if resume not in (None, "auto") and opts["transfer"] and is_transfer_typed:
        raise UserError("--resume=FILE and --transfer: choose one; --resume=auto goes with it, and "
                        "transfers where there is no state yet", BAD_USAGE)
    typed = [name for name in ("preset", "config")
             if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if len(typed) == 2:
        raise UserError("--preset and --config: choose one", BAD_USAGE)
    is_val_num_typed = ctx.get_parameter_source("val_num") is ParameterSource.COMMANDLINE
    if is_val_num_typed and opts["val_data"] is None:
        raise UserError("--val-num: used with --val-data", BAD_USAGE)
    if rate and not dry_run:
        raise UserError("--rate: used with --dry-run", BAD_USAGE)
    fixed_dir = Path(outdir) if nosubdir else Path(outdir, name) if name else None
    with user_errors():
        if console.is_rank0():  # the only one that writes
            _check_writable(fixed_dir or Path(outdir))

    with stage("Loading PyTorch"):
        from torch_utils import distributed
        from training import agreement
        from training import resume as resuming
        from training.log_sinks import check_available
        from training.sigma_data import settle_sigma_data

    with user_errors(BAD_USAGE):
        config = _config(data, opts, precision_of(ctx))
        check_available(config.log)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if ctx.get_parameter_source("batch_gpu") is not ParameterSource.COMMANDLINE:
            config = config.with_fitting_batch_gpu(world_size)  # of a preset or another run
        config.rounds(world_size)
    with user_errors(), contextlib.ExitStack() as starting, \
            _starting(starting, distributed.process_group(device)) as torch_device, \
            contextlib.ExitStack() as stack:
        _warn_of_idle_dim(ctx, config)
        agreement.check_options(
            config, device=torch_device.type, seed=opts["seed"],
            resume=resume if resume in (None, "auto") else "a path",
            override_options=override_options, dry_run=dry_run, has_name=fixed_dir is not None)
        if fixed_dir and not dry_run:  # before another run's newest state is read
            distributed.run_on_rank0(_lock_if_there, stack, fixed_dir)
        state = resuming.open_state(resume, fixed_dir) if resume else None
        config, state = resuming.settle_options(config, opts["seed"], state,
                                                override=override_options)
        with console.timed("data"):
            dataset = _open_dataset(config)
            net = _network(config, dataset)
            agreement.check_data(dataset)
            if state:
                state = resuming.settle_data(config, dataset, state, override=override_options)
            _check_reference(config)
            held_out = _open_held_out(config, dataset)
            if held_out:
                agreement.check_data(held_out, "--val-data")
            for opened in filter(None, (dataset, held_out)):
                if config.cache and not dry_run:
                    opened.pack()
                distributed.run_by(distributed.node_leader(), _check_unless_packed, opened)
            if config.data_on_device == "1" and not dry_run:
                _require_packed(dataset)
            settled = settle_sigma_data(config, dataset, state, may_measure=not dry_run)
        if settled is not config:
            config, net = settled, _network(settled, dataset)
        start = state
        if state and config.sigma_data is not None:
            resuming.check_network(net, state)
        elif config.transfer and not state:
            start = resuming.open_weights(config.transfer, net)
        if dry_run:
            distributed.run_on_rank0(_print_plan, config, dataset, rate, torch_device)
            for line in resuming.describe_start(start):
                distributed.print0(line)
            return
        run_dir = distributed.run_on_rank0(
            _make_run_dir, config, dataset.name, Path(outdir), fixed_dir, desc, bool(resume))
        distributed.run_on_rank0(_lock, stack, run_dir)  # a second time is none
        starting.close()
        _train(config, dataset, run_dir, torch_device, start, held_out)


def _starting(starting: contextlib.ExitStack, context):
    """Returns the context; says until `starting` is closed how long the start takes."""
    starting.enter_context(stage("Starting"))  # what takes long says so itself
    return context


def _lock(stack, run_dir: Path) -> None:
    """Locks a run directory until `stack` is left."""
    from dnnlib.run_lock import run_lock
    stack.enter_context(run_lock(run_dir))


def _lock_if_there(stack, run_dir: Path) -> None:
    if run_dir.is_dir():
        _lock(stack, run_dir)


def _config(data: str, opts: dict, precision: str):
    from training.config import TrainConfig
    names = {"precision": precision, "compile": opts["compile_"], "seed": opts["seed"] or 0,
             "log": opts["log"] or ()}
    skipped = {"fp16", "compile_"}
    return TrainConfig(data=data, **{k: v for k, v in opts.items() if k not in skipped} | names)


def _warn_of_idle_dim(ctx, config) -> None:
    """Says so where --aug_dim is typed but diffusion is trained."""
    from torch_utils import distributed
    typed = ctx.get_parameter_source("aug_dim") is ParameterSource.COMMANDLINE
    if typed and not config.pfgmpp and config.aug_dim != float("inf"):
        distributed.warn0(f"--aug_dim={config.aug_dim:g} has no effect without --pfgmpp=1: this run "
                          "is diffusion (D = inf)")


def _check_writable(folder: Path) -> None:
    """Raises ValueError where a folder can't be made or written, before anything slow starts."""
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents]
                    if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--outdir or --name: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--outdir or --name: no permission to write in {existing}")


def _open_dataset(config):
    """Returns the data set, checked against the options."""
    from images.dataset import ImageFolderDataset
    from training.trainer import check_stable_targets
    kwargs = {"use_labels": config.cond, "xflip": config.xflip}
    dataset = ImageFolderDataset(config.data, **kwargs)
    if config.cond_image:
        if not dataset.has_conditions:
            raise UserError(f"--cond-image=1: {config.data} has no condition images; add them with "
                            "dataset_tool.py --cond-source or leave --cond-image out", BAD_USAGE)
        kwargs["use_conditions"] = True
        dataset = ImageFolderDataset(config.data, **kwargs)
    if config.cond and not dataset.has_labels:
        raise UserError(f"--cond=1: {config.data} has no labels; add them to its dataset.json, let "
                        "dataset_tool.py make a data set whose classes are its folders, or train "
                        "with --cond=0", BAD_USAGE)
    with user_errors(BAD_USAGE):
        check_stable_targets(config, dataset)
    return dataset


def _network(config, dataset):
    """Returns the network of a run without its memory, on the "meta" device."""
    import torch

    from pfgmpp.networks import build_network
    with torch.device("meta"):
        return build_network(config.network(dataset.resolution, dataset.num_channels,
                                            dataset.label_dim, dataset.cond_channels))


def _open_held_out(config, dataset):
    """Returns the images of --val-data, checked against the data set; None without it."""
    from training.validation import open_held_out
    return open_held_out(config, dataset) if config.val_data else None


def _check_reference(config) -> None:
    """Raises ValueError on every rank if one of them does not find --eval-ref."""
    from dnnlib.util import is_url
    from torch_utils import distributed
    ref = config.eval_ref
    if ref is None or is_url(ref):
        return
    missing = [rank for rank, there in enumerate(distributed.gather_objects(os.path.exists(ref)))
               if not there]
    if missing:
        where = f" (on rank {missing[0]})" if distributed.get_world_size() > 1 else ""
        raise ValueError(f"--eval-ref={ref}: no such file or folder{where}")


def _check_unless_packed(dataset) -> None:
    """Looks at all images, as packing would have done, where one node may have packed them."""
    if not dataset.is_packed:
        dataset.check_uniform()


def _require_packed(dataset) -> None:
    """Raises ValueError on every rank if the data of one have no packed file to copy."""
    from torch_utils import distributed
    if not all(distributed.gather_objects(dataset.is_packed)):
        raise ValueError(f"--data-on-device=1: {dataset.path} is not packed, and it is the packed "
                         "file that is copied; free some space, name another folder by "
                         "--cache-dir, or leave --data-on-device out")


def _make_run_dir(config, dataset_name, outdir, fixed_dir, desc, resuming) -> Path:
    """Makes and returns the run directory."""
    from checkpoints.checkpoint import training_states
    from dnnlib.run_lock import numbered_dir
    from torch_utils import distributed
    if fixed_dir is not None:
        fixed_dir.mkdir(parents=True, exist_ok=True)
        if not resuming and training_states(fixed_dir):
            raise ValueError(f"{fixed_dir} already holds a run; use --resume=auto to go on with it,"
                             " or another --name")
        return fixed_dir
    outdir.mkdir(parents=True, exist_ok=True)
    words = [dataset_name, "cond" if config.cond else "uncond", config.arch, config.precond,
             f"gpus{distributed.get_world_size()}", f"batch{config.batch}", config.precision]
    text = "-".join(words + ([desc] if desc else []))
    return numbered_dir(outdir, text)


def _train(config, dataset, run_dir, device, start, held_out) -> None:
    """Trains from a State, from Weights, or from None: the seed's own weights."""
    from dnnlib.util import Logger
    from torch_utils import distributed
    from training.resume import describe_start
    from training.trainer import DivergedError
    from training.training_loop import training_loop
    log = Logger(run_dir / "log.txt") if distributed.get_rank() == 0 else contextlib.nullcontext()
    with log:
        distributed.print0(f"Run directory  {run_dir}")
        for line in describe_start(start):
            distributed.print0(line)
        try:
            training_loop(config, dataset=dataset, run_dir=run_dir, device=device, start=start,
                          held_out=held_out)
        except (DivergedError, ValueError, OSError) as error:
            if distributed.get_rank() == 0:
                log.write_file(f"Error: {error}\n")  # the console shows it at the end
            if isinstance(error, DivergedError):
                raise UserError(str(error), DIVERGED) from error
            raise


def _print_plan(config, dataset, rate: float | None, device) -> None:
    """Prints what --dry-run shows: options, data, what the run will take, and warnings."""
    from torch_utils import distributed, misc
    from training.advice import Machine, advice
    from training.estimate import describe as describe_estimate
    world_size = distributed.get_world_size()
    micro_batch, rounds = config.rounds(world_size)
    network = config.network(dataset.resolution, dataset.num_channels, dataset.label_dim,
                             dataset.cond_channels)
    console.result("\n".join([
        json.dumps(config.to_dict(), indent=2),
        f"{len(dataset)} images {'x'.join(map(str, dataset.image_shape))}, "
        f"{dataset.label_dim} label dimensions; {micro_batch} images x {rounds} round(s) x "
        f"{world_size} process(es)",
        f"Noise      {config.noise_name}",
        describe_estimate(config, network, world_size, rate),
        *(_cache_lines(dataset) if config.cache else []),
        "Dry run: nothing was trained or written."]))
    parameters = misc.count_parameters(_network(config, dataset))
    for line in advice(config, Machine.of(device), parameters):
        distributed.warn0(line)


def _cache_lines(dataset) -> list[str]:
    """Returns where the data are packed, or would be, for --dry-run."""
    from dnnlib.util import shown_bytes
    from images.data_cache import free_bytes
    packing = dataset.packing()
    lines = [f"Cache      {path}, {shown_bytes(size)}, packed already"
             for path, size, is_there in packing if is_there]
    missing = [(path, size) for path, size, is_there in packing if not is_there]
    if missing:
        size, free = sum(size for _, size in missing), free_bytes(missing[0][0])
        lines += [f"Cache      {path}, {shown_bytes(size)}, to be packed by the first run"
                  for path, size in missing]
        lines.append(f"           {shown_bytes(free)} are free there" + (
            "" if free >= size else ", too little: images would be decoded in every epoch instead; "
            "free some space, or name another folder by --cache-dir"))
    return lines


def cli() -> None:
    """Runs the command; where pip has installed it, the console script."""
    run(main)


if __name__ == "__main__":
    cli()
