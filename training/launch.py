"""Starts a run: checks its flags, opens its data, finds its starting point, and trains.

train.py and distill.py differ in how they turn flags into options, and in the teacher; everything
else about starting a run is here. Importing this file does not import PyTorch, which is imported
only after the flags have been checked.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dnnlib import console
from dnnlib.cli import BAD_USAGE, DIVERGED, UserError, user_errors
from dnnlib.progress import stage

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.teacher import Teacher


def precision_of(ctx: click.Context) -> str:
    """Returns the precision that --precision and --fp16 select; typed flags override defaults.

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


# Network keywords that follow from flags, and what to do if a class does not take one.
_OF_MODEL = {
    "dropout": "give --dropout=0", "augment_dim": "give --augment=0",
    "label_dropout": "leave --label-dropout out", "model_channels": "leave --cbase out",
    "channel_mult": "leave --cres out", "num_blocks": "leave --nblock out",
    "attn_resolutions": "leave --ares out"}
# Flags that say how a run starts, not what it trains.
_OF_START = {"outdir", "name", "desc", "nosubdir", "device", "resume", "override_options",
             "dry_run", "rate", "quiet", "verbose"}


def _typed_options(ctx: click.Context) -> set[str]:
    """Returns the names of the fields of `TrainConfig` that the command line sets."""
    typed = {name for name in ctx.params
             if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    return typed | ({"precision"} if "fp16" in typed else set())


def config_values(ctx: click.Context) -> dict[str, Any]:
    """Returns the values of the fields of `TrainConfig` that the flags set."""
    flags = ctx.params
    values = {name: value for name, value in flags.items()
              if name not in _OF_START | {"fp16", "compile_"}}
    plugin = flags["plugin"]
    return values | {"precision": precision_of(ctx), "compile": flags["compile_"],
                     "plugin": plugin and plugin.path, "plugin_sha256": plugin and plugin.sha256,
                     "seed": flags["seed"] or 0, "log": flags["log"] or ()}


def check_flags(ctx: click.Context) -> Path | None:
    """Returns the run directory that the flags name, None for a numbered one in --outdir.

    Raises:
        UserError: flags that do not go together, or a folder that can't be written.
    """
    flags = ctx.params

    def is_typed(name: str) -> bool:
        return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE

    name, nosubdir, resume = flags["name"], flags["nosubdir"], flags["resume"]
    if nosubdir and (name or flags["desc"]):
        raise UserError("--nosubdir: can't be combined with --name or --desc", BAD_USAGE)
    if resume == "auto" and not (name or nosubdir):
        raise UserError("--resume=auto: needs --name or --nosubdir to find the run", BAD_USAGE)
    if resume not in (None, "auto") and flags.get("transfer") and is_typed("transfer"):
        raise UserError("--resume=FILE and --transfer: choose one; --resume=auto with --transfer "
                        "transfers only if there is no state yet", BAD_USAGE)
    if flags["rate"] and not flags["dry_run"]:
        raise UserError("--rate: must be used with --dry-run", BAD_USAGE)
    outdir = Path(flags["outdir"])
    fixed_dir = outdir if nosubdir else outdir / name if name else None
    with user_errors():
        if console.is_rank0():  # the only one that writes
            _check_writable(fixed_dir or outdir)
    return fixed_dir


def finish_config(ctx: click.Context, config: "TrainConfig") -> "TrainConfig":
    """Returns the options, with --batch-gpu lowered to fit the processes unless it was typed.

    Raises:
        ValueError: the batch can't be split, or a package for --log is missing.
    """
    with stage("Loading PyTorch"):
        from training.log_sinks import check_available
    check_available(config.log)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if ctx.get_parameter_source("batch_gpu") is not ParameterSource.COMMANDLINE:
        config = config.with_fitting_batch_gpu(world_size)  # of a preset or another run's options
    config.rounds(world_size)
    return config


def launch(
    ctx: click.Context, fixed_dir: Path | None,
    make_config: Callable[["Teacher | None"], "TrainConfig"],
    open_teacher: "Callable[[], Teacher] | None" = None,
) -> None:
    """Starts a run, or with --dry-run describes it.

    Args:
        ctx: the command's; its flags include `run_options.PERFORMANCE`, `OUTPUT` and `START`.
        fixed_dir: what `check_flags` returned.
        make_config: returns the options, given the teacher.
        open_teacher: opens the teacher, within the process group; None if there is none.
    """
    flags = ctx.params
    resume, dry_run, override = flags["resume"], flags["dry_run"], flags["override_options"]
    with stage("Loading PyTorch"):
        from torch_utils import distributed
        from training import agreement
        from training import resume as resuming
        from training.objectives import build_loss
        from training.sigma_data import settle_sigma_data

    with user_errors(), contextlib.ExitStack() as starting, \
            _starting(starting, distributed.process_group(flags["device"])) as torch_device, \
            contextlib.ExitStack() as stack:
        teacher = open_teacher() if open_teacher else None
        config = make_config(teacher)
        _warn_of_idle_dim(ctx, config)
        agreement.check_options(
            config, device=torch_device.type, seed=flags["seed"],
            resume=resume if resume in (None, "auto") else "a path",
            override_options=override, dry_run=dry_run, has_name=fixed_dir is not None)
        if fixed_dir and not dry_run:  # before its newest state, which may be in use, is read
            distributed.run_on_rank0(_lock_if_there, stack, fixed_dir)
        state = resuming.open_state(resume, fixed_dir) if resume else None
        config, state = resuming.settle_options(config, flags["seed"], state, override=override,
                                                typed=_typed_options(ctx))
        with console.timed("data"):
            dataset = _open_dataset(config)
            if teacher:
                teacher.check_data(dataset)
            net = _network(config, dataset)
            if net.few_step:
                _check_levels(config, net)
            else:
                build_loss(config, net)  # refuses options that it does not take
            agreement.check_data(dataset)
            if state:
                state = resuming.settle_data(config, dataset, state, override=override)
            _check_reference(config, dataset)
            held_out = _open_held_out(config, dataset)
            pairs = _open_pairs(config, dataset)
            for opened, flag in ((held_out, "--val-data"), (pairs, "--eval-pairs")):
                if opened:
                    agreement.check_data(opened, flag)
            for opened in filter(None, (dataset, held_out, pairs)):
                if config.cache and not dry_run and opened is not pairs:  # pairs differ in size
                    opened.pack()
                distributed.run_by(distributed.node_leader(), _check_unless_packed, opened)
            if config.data_on_device == "1" and not dry_run:
                _require_packed(dataset)
            settled = settle_sigma_data(config, dataset, state, may_measure=not dry_run)
        if settled is not config:
            config, net = settled, _network(settled, dataset)
        if pairs:
            _check_pairs(config, net, pairs, dataset)
        start = state
        if state and config.sigma_data is not None:
            resuming.check_network(net, state)
        elif teacher and not state:
            start = resuming.fitting_weights(teacher.source, teacher.weights, net)
        elif config.transfer and not state:
            start = resuming.open_weights(config.transfer, net, dataset)
        if dry_run:
            distributed.run_on_rank0(_print_plan, config, dataset, flags["rate"], torch_device,
                                     start)
            return
        run_dir = distributed.run_on_rank0(
            _make_run_dir, config, dataset.name, Path(flags["outdir"]), fixed_dir, flags["desc"],
            bool(resume))
        distributed.run_on_rank0(_lock, stack, run_dir)  # no effect if locked already
        starting.close()
        _train(config, dataset, run_dir, torch_device, start, held_out, pairs, teacher)


def _warn_of_idle_dim(ctx: click.Context, config: "TrainConfig") -> None:
    """Warns if --aug_dim is typed but diffusion is trained."""
    from torch_utils import distributed
    typed = ctx.get_parameter_source("aug_dim") is ParameterSource.COMMANDLINE
    has_teacher = config.method is not None and config.teacher is not None
    if typed and not config.pfgmpp and config.aug_dim != float("inf") and not has_teacher:
        distributed.warn0(f"--aug_dim={config.aug_dim:g} has no effect without --pfgmpp=1: this "
                          "run trains diffusion (D = inf)")


def _check_writable(folder: Path) -> None:
    """Raises ValueError if a folder can't be made or written, before anything slow starts."""
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents]
                    if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--outdir or --name: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--outdir or --name: no permission to write in {existing}")


def _starting(starting: contextlib.ExitStack, context):
    """Returns the context; until `starting` is closed, shows how long the start takes."""
    starting.enter_context(stage("Starting"))  # slow parts show their own progress
    return context


def _lock(stack, run_dir: Path) -> None:
    """Locks a run directory until `stack` is closed."""
    from dnnlib.run_lock import run_lock
    stack.enter_context(run_lock(run_dir))


def _lock_if_there(stack, run_dir: Path) -> None:
    if run_dir.is_dir():
        _lock(stack, run_dir)


def _open_dataset(config):
    """Returns the data set, checked against the options."""
    from images.dataset import ImageFolderDataset
    from training.trainer import check_stable_targets
    kwargs = {"use_labels": config.cond, "xflip": config.xflip, "patch": config.patch}
    dataset = ImageFolderDataset(config.data, **kwargs)
    if config.method and config.teacher:
        for is_needed, is_there, name in ((config.cond, dataset.has_labels, "labels"),
                                          (config.cond_image, dataset.has_conditions,
                                           "condition images")):
            if is_needed and not is_there:
                raise UserError(f"--data={config.data}: has no {name}, which the teacher "
                                f"{config.teacher} needs; give a data set that has them", BAD_USAGE)
    if config.cond_image:
        if not dataset.has_conditions:
            raise UserError(f"--cond-image=1: {config.data} has no condition images; add them with "
                            "dataset_tool.py --cond-source or leave --cond-image out", BAD_USAGE)
        kwargs["use_conditions"] = True
        dataset = ImageFolderDataset(config.data, **kwargs)
    if config.cond and not dataset.has_labels:
        raise UserError(f"--cond=1: {config.data} has no labels; add them to its dataset.json, "
                        "convert images in one folder per class with dataset_tool.py, or train "
                        "with --cond=0", BAD_USAGE)
    with user_errors(BAD_USAGE):
        check_stable_targets(config, dataset)
    return dataset


def _network(config, dataset):
    """Returns the network of a run on the "meta" device, which takes no memory."""
    import torch

    from images.image_files import error_prefix
    from pfgmpp.networks import build_network
    with torch.device("meta"), error_prefix(f"--patch={config.patch}: " if config.patch else ""):
        network = config.network(dataset.resolution, dataset.num_channels, dataset.label_dim,
                                 dataset.cond_channels)
        _check_keywords(network)
        return build_network(network)


def _check_keywords(network: dict[str, Any]) -> None:
    """Raises UserError for an option whose keyword a plugin's network class does not take."""
    from dnnlib.registry import takes_keyword
    from pfgmpp.networks import MODELS
    name = network.get("model_type")
    for key, remedy in _OF_MODEL.items() if name in MODELS.added else ():
        if key in network and not takes_keyword(MODELS[name], key):
            raise UserError(f"network class {name}: takes no {key}; {remedy}", BAD_USAGE)


def _check_levels(config, net) -> None:
    """Raises UserError if a few-step network could not be sampled at its levels."""
    from pfgmpp.samplers import SamplerConfig
    own = f"--teacher={config.teacher}" if config.sigma_init is None else (
        f"--sigma-init={config.sigma_init:g}")
    for steps, flag in ((None, own), (config.eval_steps, f"--eval-steps={config.eval_steps}")):
        try:
            SamplerConfig.of_few_steps(net.few_step, steps).check(net)
        except ValueError as error:
            levels = net.few_step.of_steps(steps or len(net.few_step.levels))
            _, _, reason = str(error).partition(": ")  # without the levels
            shown = " to ".join(f"{s:g}" for s in sorted({levels[0], levels[-1]}, reverse=True))
            raise UserError(f"{flag}: sampling uses noise levels {shown}, but {reason}",
                            BAD_USAGE) from error


def _open_held_out(config, dataset):
    """Returns the images of --val-data, checked against the data set; None without it."""
    from training.validation import open_held_out
    return open_held_out(config, dataset) if config.val_data else None


def _open_pairs(config, dataset):
    """Returns the pairs of --eval-pairs, checked against the data set; None without it."""
    from training.pair_scores import open_pairs
    return open_pairs(config, dataset) if config.eval_pairs else None


def _check_pairs(config, net, pairs, dataset) -> None:
    """Raises ValueError or OSError on every rank if the network can't restore --eval-pairs."""
    from training.pair_scores import sampler_of_pairs
    sampler_of_pairs(config, net, pairs, dataset.scaling)


def _check_reference(config, dataset) -> None:
    """Raises ValueError or OSError on every rank if networks can't be scored against --eval-ref.

    The file may be missing on some ranks only.
    """
    from dnnlib.util import is_url
    from torch_utils import distributed
    ref = config.eval_ref
    if ref is None:
        return
    missing = [] if is_url(ref) else [
        rank for rank, there in enumerate(distributed.gather_objects(os.path.exists(ref)))
        if not there]
    if missing:
        where = f" (on rank {missing[0]})" if distributed.get_world_size() > 1 else ""
        raise ValueError(f"--eval-ref={ref}: no such file or folder{where}")
    distributed.run_on_rank0(_check_scoring, config, dataset)


def _check_scoring(config, dataset) -> None:
    from metrics.scoring import check_scoring, scored_name
    try:
        check_scoring(config.eval_detector, config.eval_ref, ["fid"], dataset,
                      scored_name("the data", config.patch))
    except ValueError as error:  # in the words of fid.py and sweep.py
        raise ValueError(str(error).replace("--detector=", "--eval-detector=")) from error


def _check_unless_packed(dataset) -> None:
    """Checks all images unless they are packed, because packing has checked them."""
    if not dataset.is_packed:
        dataset.check_uniform()


def _require_packed(dataset) -> None:
    """Raises ValueError on every rank if any rank has no packed file to copy."""
    from torch_utils import distributed
    if not all(distributed.gather_objects(dataset.is_packed)):
        raise ValueError(f"--data-on-device=1: {dataset.path} is not packed, and only packed files "
                         "can be copied; free some space, choose another folder with --cache-dir, "
                         "or leave --data-on-device out")


def _make_run_dir(config, dataset_name, outdir, fixed_dir, desc, resuming) -> Path:
    """Makes and returns the run directory."""
    from checkpoints.checkpoint import training_states
    from dnnlib.run_lock import numbered_dir
    from torch_utils import distributed
    if fixed_dir is not None:
        fixed_dir.mkdir(parents=True, exist_ok=True)
        if not resuming and training_states(fixed_dir):
            raise ValueError(f"{fixed_dir} already holds a run; use --resume=auto to continue it,"
                             " or another --name")
        return fixed_dir
    outdir.mkdir(parents=True, exist_ok=True)
    words = [dataset_name, "cond" if config.cond else "uncond",
             *([config.method] if config.method else [config.arch, config.precond]),
             *([config.loss] if config.loss else []),
             f"gpus{distributed.get_world_size()}", f"batch{config.batch}", config.precision]
    text = "-".join(words + ([desc] if desc else []))
    return numbered_dir(outdir, text)


def _train(config, dataset, run_dir, device, start, held_out, pairs, teacher) -> None:
    """Trains from a State, from Weights, or from None: weights initialised from the seed."""
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
                          held_out=held_out, pairs=pairs, teacher=teacher)
        except (DivergedError, ValueError, OSError) as error:
            if distributed.get_rank() == 0:
                log.write_file(f"Error: {error}\n")  # the console shows it at the end
            if isinstance(error, DivergedError):
                raise UserError(str(error), DIVERGED) from error
            raise


def _print_plan(config, dataset, rate: float | None, device, start) -> None:
    """Prints what --dry-run shows: options, data, what the run will take, start, and warnings."""
    from dnnlib.util import json_value
    from torch_utils import distributed, misc
    from training.advice import Machine, advice
    from training.estimate import describe as describe_estimate
    from training.resume import Weights, describe_start
    from training.trainer import describe_data
    world_size = distributed.get_world_size()
    micro_batch, rounds = config.rounds(world_size)
    network = config.network(dataset.resolution, dataset.num_channels, dataset.label_dim,
                             dataset.cond_channels)
    options = config.in_use() | ({"network": json_value(network)} if config.method else {})
    console.result("\n".join([
        json.dumps(options, indent=2),
        f"{describe_data(config, dataset)}, "
        f"{dataset.label_dim} label dimensions; {micro_batch} images x {rounds} round(s) x "
        f"{world_size} process(es)",
        f"Noise      {config.noise_name}",
        describe_estimate(config, network, world_size, rate),
        *(_cache_lines(dataset) if config.cache else []),
        *describe_start(start),
        "Dry run: nothing was trained or written."]))
    parameters = misc.count_parameters(_network(config, dataset))
    is_all_given = isinstance(start, Weights) and start.share == 1
    for line in advice(config, Machine.of(device), parameters, has_ema_rampup=not is_all_given):
        distributed.warn0(line)


def _cache_lines(dataset) -> list[str]:
    """Returns the lines of --dry-run that say where the data are or would be packed."""
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
        lines.append(f"           {shown_bytes(free)} is free there" + (
            "" if free >= size else ", too little: images would be decoded in every epoch instead; "
            "free some space or choose another folder with --cache-dir"))
    return lines
