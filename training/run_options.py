"""The flags that train.py and distill.py share; no PyTorch is needed for their help."""

from collections.abc import Callable, Sequence

import click

from dnnlib.cli import (
    BAD_USAGE,
    FiniteNumber,
    IntList,
    NameList,
    UserError,
    Window,
    cache_dir_option,
    verbosity_options,
)
from dnnlib.plugins import Registered, plugin_option
from training.config import LOG_SINKS, LR_DECAYS

_BOOL = click.BOOL


class RunCommand(click.Command):
    """A command that lists all missing options and shows how to start."""

    script = ""  # its file

    def first_command(self) -> str:
        """Returns the line that shows how to start."""
        return f"All flags: python {self.script} --help"

    def parse_args(self, ctx, args):
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            missing = [f"{option.opts[0]}={option.metavar} ({option.help[:-1].lower()})"
                       for option in self.params if option.required
                       and not any(word.partition("=")[0] == option.opts[0] for word in given)
                       and ctx.lookup_default(option.name) is None]
            raise UserError(f"{self.script} needs {' and '.join(missing)}", BAD_USAGE,
                            hint=self.first_command()) from error


def _parse_sigma_data(ctx, param, value: str | float | None) -> float | None:
    """Returns the number, or None for 'auto', as which presets and configs have it too."""
    try:
        return None if value in (None, "auto") else float(value)
    except ValueError:
        raise click.BadParameter(f"{value}: must be a number or auto") from None


ARCHITECTURE = (
    click.option("--arch", type=Registered(["ddpmpp", "ncsnpp", "adm"], "architecture", "network"), default="ddpmpp", help="Network architecture."),
    click.option("--precond", type=Registered(["vp", "ve", "edm", "iddpm"], "preconditioner"), default="edm", help="Preconditioning and loss; iddpm cannot be trained."),
    click.option("--cbase", metavar="INT", type=int, help="Channel multiplier.  [default: by architecture]"),
    click.option("--cres", metavar="LIST", type=IntList(unique=False), help="Channels per resolution, e.g. 1,2,2,2.  [default: by architecture]"),
    click.option("--nblock", metavar="INT", type=int, help="Residual blocks per resolution.  [default: by architecture]"),
    click.option("--ares", metavar="LIST", type=IntList(empty="none"), help="Image sides at which blocks use attention, e.g. 32,16,8; none leaves attention only in the middle block. The longer side of an image counts, or with --patch that of a patch.  [default: by architecture: 16, or 32,16,8 for adm]"),
    click.option("--sigma-data", metavar="FLOAT|auto", default="0.5", callback=_parse_sigma_data, help="Standard deviation of the data as the network sees them; auto measures it."),
)

PATCHES = (
    click.option("--patch", metavar="P", type=int, help="Train a network for PxP pixels on random patches, cut from an image and its condition image at the same place.  [default: whole images]"),
    click.option("--patches", metavar="K", type=int, default=1, help="Number of successive patches of each image; each counts as an image. Requires --patch."),
)

LENGTH = (
    click.option("--duration", metavar="MIMG", type=float, default=200, help="Length of training, in millions of images."),
    click.option("--batch", metavar="INT", type=int, default=512, help="Total batch size over all processes."),
    click.option("--batch-gpu", metavar="INT", type=int, help="Maximum batch size per process; smaller values accumulate gradients.  [default: batch / processes]"),
)

SCHEDULE = (
    click.option("--lr-rampup", metavar="MIMG", type=float, default=10, help="Length of the learning rate's linear rise, in millions of images."),
    click.option("--lr-decay", type=click.Choice(LR_DECAYS), default="none", help="Decay of the learning rate: rsqrt multiplies it by sqrt(start / images), as in EDM2; cosine reaches 0 at --duration."),
    click.option("--lr-decay-start", metavar="MIMG", type=float, help="Start of --lr-decay, in millions of images; must be above 0 for rsqrt.  [default: the end of --lr-rampup]"),
    click.option("--ema", metavar="MIMG", type=float, default=0.5, help="Half-life of the weights' moving average, in millions of images."),
    click.option("--dropout", metavar="FLOAT", type=float, default=0.13, help="Dropout probability."),
    click.option("--xflip", type=_BOOL, default=False, help="Add a mirrored copy of the data set."),
)

PERFORMANCE = (
    click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), help="Precision of the network's arithmetic.  [default: fp32]"),
    click.option("--fp16", type=_BOOL, default=False, help="Same as --precision=fp16."),
    click.option("--ls", metavar="FLOAT", type=float, help="Loss scaling.  [default: dynamic for fp16, else 1]"),
    click.option("--clip-grad", metavar="NORM", type=float, help="Clip the gradient of all parameters together to this 2-norm.  [default: no limit]"),
    click.option("--max-bad-steps", metavar="INT", type=int, default=100, help="End the run after more than this many consecutive steps with non-finite gradients. The check does not wait for the device and takes effect at the next tick at the latest."),
    click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="Where to train."),
    click.option("--checkpoint-blocks", type=_BOOL, default=False, help="Keep only the inputs of the network's blocks for the backward pass and compute each block twice. This saves memory at the cost of about a third more operations."),
    click.option("--compile", "compile_", type=click.Choice(["auto", "0", "1"]), default="auto", help="Compile the network with torch.compile; auto does so on a GPU with Triton, except with --deterministic=1."),
    click.option("--deterministic", type=_BOOL, is_flag=False, flag_value=True, default=False, help="Use only deterministic GPU kernels."),
    click.option("--bench", type=_BOOL, default=True, help="Use cuDNN autotuning."),
    click.option("--cache", type=_BOOL, default=True, help="Decode the data once into a packed file that all processes of a node share."),
    cache_dir_option,
    click.option("--data-on-device", type=click.Choice(["auto", "0", "1"]), default="auto", help="Keep the data in device memory; auto does so if they take at most 1/16 of a GPU's memory."),
    click.option("--workers", metavar="INT", type=int, default=1, help="Number of threads (with --cache=0, processes) that read data ahead; 0 reads in the main thread."),
)

OUTPUT = (
    click.option("--desc", metavar="STR", help="Text to append to the run directory's name."),
    click.option("--nosubdir", is_flag=True, help="Use OUTDIR itself as the run directory."),
    click.option("--tick", metavar="KIMG", type=float, default=50, help="How often to report progress, in thousands of images."),
    click.option("--snap", metavar="TICKS", type=int, default=50, help="How often to write network-snapshot-*.pt and samples-*.png, in ticks."),
    click.option("--dump", metavar="TICKS", type=int, default=50, help="How often to write training-state-*.pt, in ticks."),
    click.option("--keep", metavar="INT", type=int, help="Number of training states to keep, the newest ones.  [default: all]"),
    click.option("--samples", metavar="INT", type=int, help="Number of images in each samples-*.png; 0 writes none.  [default: 64 on a GPU, 16 on the CPU]"),
    click.option("--window", metavar="CENTER,WIDTH", type=Window(), help="Center and width of the values shown from black to white in pictures of samples and data, in the data's units, e.g. 40,400. Only for data that are not 8-bit.  [default: what networks see as -1 to 1]"),
    click.option("--log-to", "--log", "log", metavar="LIST", type=NameList(LOG_SINKS), help="Also log to tensorboard, wandb or both.  [default: only the run's files]"),
    click.option("--eval", metavar="KIMG", type=float, help="How often to score samples, in thousands of images.  [default: never]"),
    click.option("--eval-ref", metavar="NPZ|URL|ZIP|DIR", help="Reference statistics or data set to score against."),
    click.option("--eval-pairs", metavar="ZIP|DIR", help="Paired data set. Reports PSNR and RMSE of its images, restored from its condition images.  [default: none]"),
    click.option("--eval-num", metavar="INT", type=int, default=50_000, help="Number of samples to score, and maximum number of pairs."),
    click.option("--eval-detector", metavar="inception|dinov2[:PLACE]|pixels[:K]|FILE.npz|FILE.pth", default="inception", help="Features for scores; see fid.py."),
)

START = (
    click.option("--seed", metavar="INT", type=int, help="Random seed.  [default: random, or that of the resumed state]"),
    click.option("--resume", metavar="PT|auto", help="Resume from a training state; auto uses the newest one in the run directory."),
    click.option("--override-options", is_flag=True, help="Resume even if options that affect the results have changed."),
    click.option("-n", "--dry-run", is_flag=True, help="Print the options and what the run will take, then exit."),
    click.option("--rate", metavar="IMG_PER_S", type=FiniteNumber(min=0, min_open=True), help="Images per second over all processes, from which --dry-run estimates the hours."),
    plugin_option(is_exposed=True),
    verbosity_options,
)


def options(*groups: Sequence[Callable]) -> Callable:
    """Returns a decorator that adds groups of flags to a command's function, in their order."""

    def add(function: Callable) -> Callable:
        for group in reversed(groups):
            for option in reversed(group):
                function = option(function)
        return function

    return add
