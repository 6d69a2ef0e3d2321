"""Makes a network that samples in one or a few evaluations: checks the options, starts the run."""


import os
from pathlib import Path

import click
from click.core import ParameterSource

from dnnlib.cli import BAD_USAGE, CONTEXT, UserError, run, user_errors
from training.config import flag_name
from training.distill_config import METHOD_DEFAULTS, METHODS, METRICS, OPTIMIZERS, DistillConfig
from training.launch import check_flags, config_values, finish_config, launch
from training.presets import DISTILL_PRESETS
from training.run_options import (
    ARCHITECTURE,
    LENGTH,
    OUTPUT,
    PATCHES,
    PERFORMANCE,
    SCHEDULE,
    START,
    RunCommand,
    options,
)

_BOOL = click.BOOL
_ROOT = Path(__file__).resolve().parent
_EXAMPLE = "examples/emoji16-128.pt"
_NONE = "none"  # as --teacher
_OF_NETWORK = {"arch": "--arch", "precond": "--precond", "cbase": "--cbase", "cres": "--cres",
               "nblock": "--nblock", "ares": "--ares", "sigma_data": "--sigma-data",
               "cond": "--cond"}  # determined by the teacher
_DEFAULT_METHOD = "ect"


class _Command(RunCommand):
    """A command that takes defaults from the method; a preset overrides them."""

    script = "distill.py"

    def first_command(self) -> str:
        if not (_ROOT / _EXAMPLE).exists():
            return "All flags: pfgmpp-distill --help"
        script, teacher = (os.path.relpath(_ROOT / name) for name in (self.script, _EXAMPLE))
        return f"For example: python {script} --teacher={teacher} --data=DATA --outdir=runs"

    def parse_args(self, ctx, args):
        method, preset = (_value_of(args, flag) for flag in ("--method", "--preset"))
        settings = DISTILL_PRESETS.get(preset, {})
        chosen = method or settings.get("method", _DEFAULT_METHOD)
        if settings and chosen != settings["method"]:
            raise UserError(f"--preset={preset} is for --method={settings['method']}, not "
                            f"{chosen}; leave one of them out", BAD_USAGE)
        ctx.default_map = METHOD_DEFAULTS.get(chosen, {}) | settings
        return super().parse_args(ctx, args)


def _value_of(args: list[str], flag: str) -> str | None:
    """Returns the value of a flag on the command line, the last one if it is repeated."""
    found = None
    for word, following in zip(args, [*args, None][1:], strict=True):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


@click.command(cls=_Command, context_settings=CONTEXT)
@click.option("--teacher", metavar="PT|URL|DIR|none", required=True, help="Teacher network: a snapshot, a training state, or a run directory for its newest network; none trains from scratch, with --method=ect.")
@click.option("--data", metavar="ZIP|DIR", required=True, help="Data set of the same kind as the teacher's, as made by dataset_tool.py.")
@click.option("--outdir", metavar="DIR", required=True, help="Folder in which the run directory is created.")
@click.option("--name", metavar="NAME", help="Use OUTDIR/NAME as the run directory instead of a numbered one.")
@click.option("--method", type=click.Choice(METHODS), default=_DEFAULT_METHOD, help="Consistency tuning (ect), consistency distillation (cd), or distillation into a generator (ipfm).")
@click.option("--preset", metavar="NAME", type=click.Choice(list(DISTILL_PRESETS)), help=f"Take defaults for the flags below from a published run: {', '.join(DISTILL_PRESETS)}.")
@click.option("--pfgmpp", type=_BOOL, help="With --teacher=none, train at a finite D. Otherwise only for teachers that do not record D.")
@click.option("--aug_dim", metavar="D", type=float, help="Augmented dimensions, only with --teacher=none or for teachers that do not record D.  [default: the teacher's; 128 with --pfgmpp=1]")
@click.option("--cond", type=_BOOL, default=False, help="With --teacher=none, train a class-conditional model.")
# Of the methods.
@click.option("--ect-q", metavar="FLOAT", type=float, default=2, help="ect: factor by which the distance between the two noise levels shrinks in each stage.")
@click.option("--ect-k", metavar="FLOAT", type=float, default=8, help="ect: how much larger that distance is at low levels.")
@click.option("--ect-b", metavar="FLOAT", type=float, default=1, help="ect: how fast this increase fades as the level rises.")
@click.option("--ect-c", metavar="FLOAT", type=float, default=0, help="ect: constant of the pseudo-Huber distance; 0 gives the 2-norm.")
@click.option("--ect-double", metavar="MIMG", type=float, default=3.2, help="ect: length of a stage, in millions of images.")
@click.option("--cd-scales", metavar="INT", type=int, default=40, help="cd: number of noise levels.")
@click.option("--cd-metric", type=click.Choice(METRICS), default="huber", help="cd: distance between two images, pseudo-Huber or squared.")
@click.option("--cd-decay", metavar="FLOAT", type=float, default=0.95, help="cd: decay per step of the averaged network that gives the targets; 0 uses the network itself.")
@click.option("--ipfm-alpha", metavar="FLOAT", type=float, default=1, help="ipfm: weight of |T - S|^2 in the loss, with teacher T and auxiliary denoiser S; 0.5 gives inverse Poisson flow matching.")
@click.option("--ipfm-steps", metavar="INT", type=int, default=5, help="ipfm: steps of the auxiliary denoiser per step of the generator.")
@click.option("--aux-lr", metavar="FLOAT", type=float, default=1e-3, help="ipfm: learning rate of the auxiliary denoiser. It rises over --lr-rampup divided by --ipfm-steps, and follows --lr-decay.")
@click.option("--sigma-init", metavar="FLOAT", type=float, help="ipfm: noise level from which the generator starts.  [default: 80 (380 for --lsun teachers), or the teacher's highest if lower]")
@click.option("--boundary", metavar="FLOAT", type=float, help="Noise level at which the network returns its input.  [default: 0; for cd the lowest level of its grid, 0.002 or the teacher's if higher]")
@click.option("--P_mean", "P_mean", metavar="FLOAT", type=float, default=-1.2, help="ect, ipfm: mean of ln sigma.")
@click.option("--P_std", "P_std", metavar="FLOAT", type=float, default=1.2, help="ect, ipfm: standard deviation of ln sigma.")
# Hyperparameters.
@options(LENGTH)
@click.option("--optim", type=click.Choice(OPTIMIZERS), default="radam", help="Optimizer of the few-step network.")
@click.option("--lr", metavar="FLOAT", type=float, default=1e-4, help="Learning rate of the few-step network.")
@options(SCHEDULE, ARCHITECTURE, PATCHES, PERFORMANCE, OUTPUT)
@click.option("--eval-steps", metavar="INT", type=int, help="Network evaluations per image for scores and sample grids.  [default: 2; 1 for ipfm]")
@options(START)
@click.pass_context
def main(ctx, teacher, pfgmpp, aug_dim, **flags):
    """Turns a trained network into one that samples in one or a few steps.

    The defaults shown are those of --method=ect; docs/few-steps.md lists the others. --arch,
    --precond, --cbase, --cres, --nblock, --ares, --sigma-data and --cond are only for
    --teacher=none; otherwise the teacher determines them.

    \b
    # consistency tuning of a PFGM++ network on 8 GPUs
    torchrun --standalone --nproc_per_node=8 distill.py --preset=cifar10-ect \\
        --outdir=runs --name=cifar10-2048-ect --teacher=runs/cifar10-2048 \\
        --data=datasets/cifar10-32x32.zip

    \b
    # then sample with two evaluations per image
    python generate.py --network=runs/cifar10-2048-ect --steps=2 --outdir=out
    """  # noqa: D301 - \b tells click not to wrap the lines that follow
    if teacher == "":
        raise UserError("--teacher=: must be a network's file, URL or run directory, or none",
                        BAD_USAGE)
    fixed_dir = check_flags(ctx)
    has_teacher = teacher != _NONE
    typed = [flag for name, flag in _OF_NETWORK.items()
             if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if has_teacher and typed:
        raise UserError(f"{typed[0]} with --teacher={teacher}: the teacher determines the network; "
                        f"leave {typed[0]} out", BAD_USAGE)
    for name in DistillConfig.unused_by(flags["method"]):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = f"--{flag_name(name)}"
            raise UserError(f"{flag} with --method={flags['method']}: has no effect; leave "
                            f"{flag} out", BAD_USAGE)
    if aug_dim is not None and not aug_dim > 0:
        raise UserError(f"--aug_dim={aug_dim:g}: must be positive, or inf", BAD_USAGE)
    values = config_values(ctx) | {"teacher": None, "eval_solver": "consistency"}
    if not has_teacher:
        is_pfgmpp = aug_dim is not None if pfgmpp is None else pfgmpp
        values |= {"pfgmpp": is_pfgmpp, "aug_dim": 128.0 if aug_dim is None else aug_dim}
    # Mistakes in the flags are reported before the teacher is read.
    with user_errors(BAD_USAGE):
        placeholder = {"teacher": teacher, "pfgmpp": False, "aug_dim": 128.0} if has_teacher else {}
        config = finish_config(ctx, DistillConfig(**values | placeholder))
    if not has_teacher:
        launch(ctx, fixed_dir, lambda _: config)
        return

    def open_teacher():
        from training.teacher import Teacher
        return Teacher.open(teacher, pfgmpp, aug_dim)

    def make_config(opened):
        with user_errors(BAD_USAGE):
            return finish_config(ctx, DistillConfig(**values | opened.options))

    launch(ctx, fixed_dir, make_config, open_teacher)


def cli() -> None:
    """Runs the command; where pip has installed it, the console script."""
    run(main)


if __name__ == "__main__":
    cli()
