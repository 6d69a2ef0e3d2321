"""Trains a PFGM++ or EDM model: checks the options, opens the data, starts the loop."""

import json
import os
from pathlib import Path

import click
from click.core import ParameterSource

from dnnlib.cli import BAD_USAGE, CONTEXT, UserError, describe, run, user_errors
from dnnlib.plugins import Registered
from sampling.sweeps import DENOISER_SOLVERS
from training.config import LOSSES, TrainConfig
from training.launch import check_flags, config_values, finish_config, launch
from training.presets import PRESETS
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
_EXAMPLE_DATA = "examples/emoji-google-32.zip"
_PARAMETERS = {"compile": "compile_"}  # options whose parameter has another name


class _Command(RunCommand):
    script = "train.py"

    def first_command(self) -> str:
        script, data = (os.path.relpath(_ROOT / name) for name in (self.script, _EXAMPLE_DATA))
        if not (_ROOT / _EXAMPLE_DATA).exists():
            return "All flags: pfgmpp-train --help"
        return f"To try it: python {script} --preset=emoji32 --outdir=runs --data={data}"


def _claim_defaults(ctx) -> None:
    """Raises UserError if --preset and --config are both given."""
    if ctx.meta.setdefault("has_defaults", False):
        raise UserError("--preset and --config: choose one", BAD_USAGE)
    ctx.meta["has_defaults"] = True


def _use_preset(ctx, param, value: str | None) -> str | None:
    """Makes a preset's settings the defaults of the other flags."""
    if value and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
        _claim_defaults(ctx)
        ctx.default_map = PRESETS[value]
    return value


def _options_in(path: Path) -> dict:
    """Returns the options in a training_options.json or in a JSON object of options."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"not a JSON file ({error})") from error
    options = content.get("options", content) if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise ValueError("not a JSON object of options, such as a training_options.json")
    return options


def _use_config(ctx, param, value: str | None) -> None:
    """Makes the options of a run the defaults of the other flags."""
    if not value:
        return
    _claim_defaults(ctx)
    from training.config import check_options
    try:
        found = _options_in(Path(value))
        if "method" in found:
            raise ValueError("holds options of distill.py, which makes few-step networks; name the "
                             "options of a train.py run")
        options = check_options(found)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"--config={value}: {describe(error)}", BAD_USAGE) from error
    ctx.default_map = {_PARAMETERS.get(key, key): option for key, option in options.items()
                       if option is not None or key == "sigma_data"}


@click.command(cls=_Command, context_settings=CONTEXT)
@click.option("--outdir", metavar="DIR", required=True, help="Folder in which the run directory is created.")
@click.option("--data", metavar="ZIP|DIR", required=True, help="Training data set, as made by dataset_tool.py.")
@click.option("--name", metavar="NAME", help="Use OUTDIR/NAME as the run directory instead of a numbered one.")
@click.option("--preset", metavar="NAME", type=click.Choice(list(PRESETS)), is_eager=True, callback=_use_preset, help=f"Take defaults for the flags below from a published run or an example: {', '.join(PRESETS)}.")
@click.option("--config", metavar="JSON", is_eager=True, expose_value=False, callback=_use_config, help="Take defaults for the flags below from the training_options.json of a run.")
@click.option("--cond", type=_BOOL, default=False, help="Train a class-conditional model.")
@click.option("--pfgmpp", type=_BOOL, default=False, help="Train PFGM++ instead of diffusion.")
@click.option("--aug_dim", metavar="D", type=float, default=128, help="Augmented dimensions of PFGM++: any real number above 0, or inf.")
@click.option("--stf", type=_BOOL, default=False, help="Train on stable targets: the posterior mean given the noisy image, over a reference batch (with --cond=1, over its images of the same class). Requires --augment=0.")
@click.option("--rbatch", metavar="INT", type=int, default=4096, help="Size of the --stf reference batch, including the training batch.")
@click.option("--lsun", type=_BOOL, default=False, help="Use noise levels for 256x256 images, which are 380/80 times higher.")
@click.option("--loss", type=Registered(LOSSES, "loss"), help="Noise levels and weights in training.  [default: as --precond]")
@click.option("--P_mean", "P_mean", metavar="FLOAT", type=float, default=-1.2, help="Mean of ln sigma in training, with the edm loss. Latents and 512x512 images need other values; EDM2 uses -0.4.")
@click.option("--P_std", "P_std", metavar="FLOAT", type=float, default=1.2, help="Standard deviation of ln sigma in training, with the edm loss. EDM2 uses 1.0.")
@click.option("--cond-image", type=_BOOL, default=False, help="Train with the data set's condition images.")
@click.option("--cond-c-in", type=_BOOL, default=False, help="Multiply condition images by c_in, as the PFGM++ forks for CT images do. Requires --cond-image=1.")
@options(PATCHES, ARCHITECTURE, LENGTH)
@click.option("--lr", metavar="FLOAT", type=float, default=10e-4, help="Learning rate of Adam.")
@options(SCHEDULE)
@click.option("--augment", metavar="FLOAT", type=float, default=0.12, help="Augmentation probability; 0 turns augmentation off.")
@click.option("--label-dropout", metavar="FLOAT", type=float, default=0, help="Share of labels to drop, so that --guidance works without a second network. Requires --cond=1.")
@options(PERFORMANCE, OUTPUT)
@click.option("--eval-solver", type=Registered(DENOISER_SOLVERS, "solver"), default="heun", help="Solver for scores and sample grids; see generate.py.")
@click.option("--eval-steps", metavar="INT", type=int, default=18, help="Solver steps for scores and sample grids.")
@click.option("--val-data", metavar="ZIP|DIR", help="Held-out data set. Each tick reports the loss on it.  [default: none]")
@click.option("--val-num", metavar="INT", type=int, default=2048, help="Maximum number of held-out images to use, chosen at random.")
@click.option("--transfer", metavar="PT|URL", help="Start from the weights of a snapshot or training state.")
@options(START)
@click.pass_context
def main(ctx, **flags):
    """Trains a PFGM++ or EDM diffusion model.

    Two examples on 8 GPUs, PFGM++ with D = 2048 and class-conditional diffusion:

    \b
    torchrun --standalone --nproc_per_node=8 train.py --outdir=runs \\
        --data=datasets/cifar10-32x32.zip --arch=ncsnpp --pfgmpp=1 --aug_dim=2048

    \b
    torchrun --standalone --nproc_per_node=8 train.py --outdir=runs \\
        --data=datasets/cifar10-32x32.zip --arch=ncsnpp --cond=1
    """  # noqa: D301 - \b tells click not to wrap the lines that follow
    fixed_dir = check_flags(ctx)
    is_val_num_typed = ctx.get_parameter_source("val_num") is ParameterSource.COMMANDLINE
    if is_val_num_typed and flags["val_data"] is None:
        raise UserError("--val-num: must be used with --val-data", BAD_USAGE)
    with user_errors(BAD_USAGE):
        config = finish_config(ctx, TrainConfig(**config_values(ctx)))
    launch(ctx, fixed_dir, lambda teacher: config)


def cli() -> None:
    """Runs the command; where pip has installed it, the console script."""
    run(main)


if __name__ == "__main__":
    cli()
