"""The flags of every script that samples from a network. Their help needs no PyTorch.

`NetworkSampler.open` takes the values under their names in Python.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from dnnlib.cli import BAD_USAGE, FiniteNumber, NumberList, UserError
from dnnlib.plugins import Registered
from sampling.sweeps import CONSISTENCY, FULL_BITS, MULTISTEP, SOLVERS

_OF_GRIDS = {"steps": "--steps", "sigma_min": "--sigma_min", "sigma_max": "--sigma_max",
             "rho": "--rho", "discretization": "--disc"}  # excluded by --sigmas
_NAMES = {"label_source": "--labels", "gnet": "--gnet", "cond_image": "--cond-image",
          "init_image": "--init-image"}  # of files and folders
_MAX_SHOWN = 80  # characters of a value in an error
_MAX_FILE = 1 << 20  # characters of a file of noise levels


class _Interval(click.ParamType):
    """LO,HI with 0 <= LO < HI, where HI may be inf; becomes a pair of numbers."""

    name = "interval"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            low, high = map(float, value.split(","))
        except ValueError:
            low = high = math.nan
        if not 0 <= low < high:
            self.fail(f"{value!r} is not LO,HI with 0 <= LO < HI, such as 0.3,5 or 0.3,inf",
                      param, ctx)
        return low, high


class _Levels(click.ParamType):
    """Noise levels: comma-separated numbers, or a file of numbers."""

    name = "levels"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        shown = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
        levels = _numbers(value)
        if levels is None:
            if not os.path.isfile(value):
                self.fail(f"{shown!r}: must be an existing file, or noise levels such as "
                          "80,10,1,0.1", param, ctx)
            try:
                levels = _levels_in(value)
            except (OSError, ValueError, EOFError):
                levels = None
            if levels is None:
                self.fail(f"{shown!r}: must be a text file of numbers, UTF-8 and at most 1 MiB, or "
                          "a .npy file of an array [n] of numbers", param, ctx)
        if not levels or not all(a > b for a, b in zip(levels, [*levels[1:], 0.0], strict=True)):
            self.fail(f"{shown!r}: must be noise levels above 0 in falling order, such as "
                      "80,10,1,0.1; the last step, to 0, is added", param, ctx)
        return levels


def _numbers(text: str) -> tuple[float, ...] | None:
    """Returns numbers separated by commas or white space, or None for anything else."""
    try:
        return tuple(map(float, text.replace(",", " ").split()))
    except ValueError:
        return None


def _levels_in(path: str) -> tuple[float, ...] | None:
    """Returns the numbers in a .npy or text file with '#' comments, or None for other content."""
    if not path.lower().endswith(".npy"):
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_MAX_FILE + 1)
        lines = [line.partition("#")[0] for line in text.splitlines()]
        return None if len(text) > _MAX_FILE else _numbers(" ".join(lines))
    import numpy as np

    array = np.load(path, allow_pickle=False)
    return tuple(map(float, array)) if array.ndim == 1 and array.dtype.kind in "iuf" else None


class _Finite(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r}: must be finite", param, ctx)
        return number


class _ClassChoice(click.ParamType):
    """A class number, 'uniform', 'data', or a name, which only the network can tell."""

    name = "class"

    def convert(self, value, param, ctx):
        try:
            return int(value)
        except ValueError:
            return value


_OPTIONS = (
    click.option("--class", "class_idx", metavar="INT|NAME|uniform|data", type=_ClassChoice(), help="Class to sample: a class by number or name, all classes equally often (uniform), or as often as in the training data (data).  [default: uniform]"),
    click.option("--labels", "label_source", metavar="FILE|DATASET", help="Labels to sample, from a .npy or .json file or a data set; seed k uses label k mod n of n."),
    click.option("--steps", metavar="LIST", type=NumberList(int, 1), help="Number of noise levels; several numbers make a sweep.  [default: 18; few-step networks have their own]"),
    click.option("--alpha", metavar="LIST", type=NumberList(float, 0), help="Robustness study: add noise of alpha times the noise level before each step."),
    click.option("--bits", metavar="LIST", type=NumberList(int, 1, FULL_BITS), help="Robustness study: round the weights to this many bits; 32 leaves them unchanged."),
    click.option("--rounding-seed", metavar="INT", type=click.IntRange(0, 2**32 - 1), help="Round weights to --bits with this seed: up or down at random, without bias.  [default: to the nearest level]"),
    click.option("--sigma_min", metavar="FLOAT", type=FiniteNumber(min=0, min_open=True), help="Lowest noise level.  [default: 0.002, or that of --disc]"),
    click.option("--sigma_max", metavar="FLOAT", type=FiniteNumber(min=0, min_open=True), help="Highest noise level.  [default: 80, 380 for --lsun networks, what the file records, or that of --disc]"),
    click.option("--rho", metavar="FLOAT", type=FiniteNumber(min=0, min_open=True), default=7, help="Exponent of the grid of noise levels."),
    click.option("--S_churn", "S_churn", metavar="FLOAT", type=click.FloatRange(min=0), default=0, help="Strength of the stochastic sampler's churn; 0 samples deterministically."),
    click.option("--S_min", "S_min", metavar="FLOAT", type=click.FloatRange(min=0), default=0, help="Lowest noise level that is churned."),
    click.option("--S_max", "S_max", metavar="FLOAT", type=click.FloatRange(min=0), default=math.inf, help="Highest noise level that is churned."),
    click.option("--S_noise", "S_noise", metavar="FLOAT", type=click.FloatRange(min=0), default=1, help="Factor on the churn noise."),
    click.option("--solver", type=Registered(SOLVERS, "solver"), help="Solver. For N steps, heun and ppfm evaluate the network 2N-1 times, the others N times. ppfm is Heun's method with the published code's bug, to reproduce its results (docs/restoration.md).  [default: heun; consistency for few-step networks]"),
    click.option("--order", metavar="INT", type=click.IntRange(1, 4), help="Order of ipndm.  [default: 3]"),
    click.option("--sigmas", metavar="LIST|FILE", type=_Levels(), help="Your own noise levels instead of a grid, falling, without the final 0."),
    click.option("--disc", "discretization", type=click.Choice(["vp", "ve", "iddpm", "edm"]), help="Grid of noise levels.  [default: edm]"),
    click.option("--schedule", type=click.Choice(["vp", "ve", "linear"]), help="Noise level as a function of time.  [default: linear]"),
    click.option("--scaling", type=click.Choice(["vp", "none"]), help="Scale of the state as a function of time.  [default: none]"),
    click.option("--pfgmpp", type=click.BOOL, help="Whether the network is PFGM++. Only for files that do not record D; otherwise checked against the file."),
    click.option("--aug_dim", metavar="D", type=float, help="Augmented dimensions. Only for files that do not record D; otherwise checked against the file."),
    click.option("--key", metavar="NAME", help="Which network of an IDMD file to use: ema_0_9900, ema_0_9950, ema_0_9990, ema_0_9999, generator or student.  [default: ema_0_9990]"),
    click.option("--guidance", metavar="W", type=click.FloatRange(min=0), default=1, help="Strength of the guidance away from --gnet, or from the network without its labels; 1 means none."),
    click.option("--gnet", metavar="PT|URL", help="Guide for --guidance: another snapshot or state with the same image shape and D.  [default: the network without its labels]"),
    click.option("--guidance-interval", "guidance_interval", metavar="LO,HI", type=_Interval(), help="Guide only at noise levels LO < sigma <= HI.  [default: all]"),
    click.option("--cond-image", metavar="DIR|ZIP", help="Condition images, for networks that take them; seed k uses image k mod n of n."),
    click.option("--init-image", metavar="DIR|ZIP|cond", help="Start from these images plus noise instead of from pure noise; seed k uses image k mod n of n. 'cond' starts from the condition images in --cond-image."),
    click.option("--init-sigma", metavar="S", type=_Finite(min=0, min_open=True), help="Noise level at which to start from --init-image, instead of --sigma_max. It is in the networks' scale, where the data have a standard deviation of about 0.5."),
    click.option("--init-level", metavar="L", type=_Finite(min=0, min_open=True), help="Same as --init-sigma, but in the data's own units, e.g. 60 for noise of 60 HU."),
    click.option("--last", metavar="INT", type=click.IntRange(min=1), help="Start from --init-image this many steps before the lowest level of --steps, and stop at that level. The last step is first order."),
    click.option("--stop-sigma", metavar="S", type=_Finite(min=0), help="Noise level at which the last step ends.  [default: 0; with --last the lowest level of --steps]"),
    click.option("--init-noise", metavar="FLOAT", type=_Finite(min=0), default=1, help="Factor on the noise added to --init-image; 0 starts from the images themselves, which should then be noisy."),
    click.option("--blend", metavar="W", type=click.FloatRange(0, 1), default=1, help="Pull the state back to --init-image after each step: x <- W x + (1-W) image."),
    click.option("--measure", metavar="denoise|inpaint:MASK|downsample:K", help="Treat --init-image as a noisy measurement of the images to sample: of all pixels (denoise), of the pixels that are white in the picture MASK or nonzero in the array MASK (inpaint), or of means over KxK squares (downsample)."),
    click.option("--measure-sigma", metavar="S", type=_Finite(min=0), help="Noise level of the --measure measurement, in the networks' scale."),
    click.option("--measure-level", metavar="L", type=_Finite(min=0), help="Same as --measure-sigma, but in the data's own units."),
    click.option("--measure-by", type=click.Choice(["guidance", "projection"]), help="How to use the measurement: guidance differentiates the network, projection does not.  [default: guidance]"),
    click.option("--average", metavar="INT", type=click.IntRange(min=2), help="Make each image the mean of this many samples of one input. generate.py writes their standard deviation to std/."),
    click.option("--tile", metavar="SIDE", type=click.IntRange(min=1), help="Run the network on overlapping square tiles of this side, to save memory with large images."),
    click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32", help="Precision of the network's arithmetic."),
    click.option("--compile", "compiled", metavar="BOOL", type=click.BOOL, default=False, help="Compile the network with torch.compile, using CUDA graphs on a GPU. This takes a minute at the start."),
)


def sampling_options(command: Callable) -> Callable:
    """Adds the flags to the function of a click command."""
    @functools.wraps(command)
    def checked(**options):
        check_given(options, _NAMES)
        if options["sigmas"] is not None:
            _refuse_grids(click.get_current_context(), options)
        check_alpha(options["solver"], options["alpha"])
        _check_rounding(options["rounding_seed"], options["bits"])
        return command(**options)

    for option in reversed(_OPTIONS):
        checked = option(checked)
    return checked


def check_given(options: Mapping[str, Any], flags: Mapping[str, str]) -> None:
    """Raises UserError for an empty value, such as that of an unset shell variable.

    Args:
        options: values by their names in Python.
        flags: flags that must not be empty, by their names in Python.
    """
    for name, flag in flags.items():
        if options[name] == "":
            raise UserError(f"{flag}=: is empty; give it a value, or leave {flag} out",
                            BAD_USAGE)


def check_alpha(solver: str | None, alpha: Sequence[float] | None) -> None:
    """Raises UserError for --alpha with a solver that can't use it."""
    if solver in MULTISTEP and any(alpha or ()):
        raise UserError(f"--alpha={max(alpha):g}: --solver={solver} uses earlier steps, which "
                        "fresh noise makes useless; use heun or euler", BAD_USAGE)
    if solver == CONSISTENCY and any(alpha or ()):
        raise UserError(f"--alpha={max(alpha):g}: --solver={solver} solves no equation; leave one "
                        "of them out", BAD_USAGE)


def _check_rounding(seed: int | None, bits: Sequence[int] | None) -> None:
    """Raises UserError for a seed of rounding if no weights are rounded."""
    if seed is not None and min(bits or [FULL_BITS]) >= FULL_BITS:
        raise UserError(f"--rounding-seed={seed}: no weights are rounded; give --bits below "
                        f"{FULL_BITS}, or leave --rounding-seed out", BAD_USAGE)


def _refuse_grids(context: click.Context, options: dict) -> None:
    """Raises UserError for flags of grids together with --sigmas."""
    for name, flag in _OF_GRIDS.items():
        typed = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if typed or (name == "steps" and len(options["steps"] or ()) > 1):
            raise UserError(f"{flag} with --sigmas: both set the noise levels; leave {flag} out",
                            BAD_USAGE)
