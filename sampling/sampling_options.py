"""The flags of every script that samples from a network; no PyTorch is needed for their help.

`NetworkSampler.open` takes them by their names.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from dnnlib.cli import BAD_USAGE, FiniteNumber, NumberList, UserError
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
    """Noise levels: numbers with commas between them, or a file of numbers."""

    name = "levels"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        shown = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
        levels = _numbers(value)
        if levels is None:
            if not os.path.isfile(value):
                self.fail(f"{shown!r}: no such file, and no noise levels such as 80,10,1,0.1", param,
                          ctx)
            try:
                levels = _levels_in(value)
            except (OSError, ValueError, EOFError):
                levels = None
            if levels is None:
                self.fail(f"{shown!r}: must be a text file of numbers, UTF-8 and at most 1 MiB, or "
                          "a .npy file of an array [n] of numbers", param, ctx)
        if not levels or not all(a > b for a, b in zip(levels, [*levels[1:], 0.0], strict=True)):
            self.fail(f"{shown!r}: must be noise levels such as 80,10,1,0.1, falling and above 0; "
                      "the step to 0 comes by itself", param, ctx)
        return levels


def _numbers(text: str) -> tuple[float, ...] | None:
    """Returns numbers with commas or white space between them; None for anything else."""
    try:
        return tuple(map(float, text.replace(",", " ").split()))
    except ValueError:
        return None


def _levels_in(path: str) -> tuple[float, ...] | None:
    """Returns the numbers in a .npy or text file, where '#' begins a comment; None without them."""
    if not path.lower().endswith(".npy"):
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_MAX_FILE + 1)
        lines = [line.partition("#")[0] for line in text.splitlines()]
        return None if len(text) > _MAX_FILE else _numbers(" ".join(lines))
    import numpy as np

    array = np.load(path, allow_pickle=False)
    return tuple(map(float, array)) if array.ndim == 1 and array.dtype.kind in "iuf" else None


class _Finite(click.FloatRange):
    """A number in a range, and not infinite."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r}: must be finite", param, ctx)
        return number


class _ClassChoice(click.ParamType):
    """A class number, 'uniform' or 'data'."""

    name = "class"

    def convert(self, value, param, ctx):
        if value in ("uniform", "data") or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} must be a class number, uniform or data", param, ctx)


_OPTIONS = (
    click.option("--class", "class_idx", metavar="INT|uniform|data", type=_ClassChoice(), help="Class to sample: of a number, all equally often, or as often as the data have them.  [default: uniform]"),
    click.option("--labels", "label_source", metavar="FILE|DATASET", help="Labels to sample, a .npy, .json or data set; seed k has label k mod n of n."),
    click.option("--steps", metavar="LIST", type=NumberList(int, 1), help="Number of noise levels; several are a sweep.  [default: 18; of few-step networks their own]"),
    click.option("--alpha", metavar="LIST", type=NumberList(float, 0), help="Robustness study: noise of alpha times the level, added before each step."),
    click.option("--bits", metavar="LIST", type=NumberList(int, 1, FULL_BITS), help="Robustness study: bits that weights are rounded to; 32 leaves them."),
    click.option("--rounding-seed", metavar="INT", type=click.IntRange(0, 2**32 - 1), help="Round weights to --bits at random, up or down with their own value as the mean, by this seed.  [default: to the nearest level]"),
    click.option("--sigma_min", metavar="FLOAT", type=FiniteNumber(min=0, min_open=True), help="Lowest noise level.  [default: 0.002, or the discretisation's]"),
    click.option("--sigma_max", metavar="FLOAT", type=FiniteNumber(min=0, min_open=True), help="Highest noise level.  [default: 80, 380 for --lsun networks, what the file records, or the discretisation's]"),
    click.option("--rho", metavar="FLOAT", type=FiniteNumber(min=0, min_open=True), default=7, help="Exponent of the grid of noise levels."),
    click.option("--S_churn", "S_churn", metavar="FLOAT", type=click.FloatRange(min=0), default=0, help="Strength of the stochastic sampler; 0 is deterministic."),
    click.option("--S_min", "S_min", metavar="FLOAT", type=click.FloatRange(min=0), default=0, help="Lowest noise level that is churned."),
    click.option("--S_max", "S_max", metavar="FLOAT", type=click.FloatRange(min=0), default=math.inf, help="Highest noise level that is churned."),
    click.option("--S_noise", "S_noise", metavar="FLOAT", type=click.FloatRange(min=0), default=1, help="Factor on the noise of churn."),
    click.option("--solver", type=click.Choice(SOLVERS), help="Method; of N steps heun evaluates the network 2N-1 times, the others N times. ppfm is Heun's method with the published code's mistake, to repeat its results (docs/restoration.md).  [default: heun; consistency for few-step networks]"),
    click.option("--order", metavar="INT", type=click.IntRange(1, 4), help="Order of ipndm.  [default: 3]"),
    click.option("--sigmas", metavar="LIST|FILE", type=_Levels(), help="Noise levels of your own, falling, without the final 0, in place of a grid."),
    click.option("--disc", "discretization", type=click.Choice(["vp", "ve", "iddpm", "edm"]), help="Grid of noise levels.  [default: edm]"),
    click.option("--schedule", type=click.Choice(["vp", "ve", "linear"]), help="Noise level over time.  [default: linear]"),
    click.option("--scaling", type=click.Choice(["vp", "none"]), help="Scale of the state.  [default: none]"),
    click.option("--pfgmpp", type=click.BOOL, help="For files that do not record D; else checked against the file."),
    click.option("--aug_dim", metavar="D", type=float, help="For files that do not record D; else checked against the file."),
    click.option("--key", metavar="NAME", help="Network of an IDMD file: ema_0_9900, ema_0_9950, ema_0_9990, ema_0_9999, generator or student.  [default: ema_0_9990]"),
    click.option("--guidance", metavar="W", type=click.FloatRange(min=0), default=1, help="Guidance away from the network without its labels, or from --gnet; 1 is none."),
    click.option("--gnet", metavar="PT|URL", help="Guide of --guidance: another snapshot or state, of the same image shape and D.  [default: the network without its labels]"),
    click.option("--guidance-interval", "guidance_interval", metavar="LO,HI", type=_Interval(), help="Noise levels LO < sigma <= HI at which to guide.  [default: all]"),
    click.option("--cond-image", metavar="DIR|ZIP", help="Condition images, for networks that take them; seed k has image k mod n of n."),
    click.option("--init-image", metavar="DIR|ZIP|cond", help="Start from these images plus noise instead of noise; seed k has image k mod n of n. 'cond' starts from the condition images in --cond-image."),
    click.option("--init-sigma", metavar="S", type=_Finite(min=0, min_open=True), help="Noise level at which to start from --init-image, in place of --sigma_max; in the networks' scale, where the data have a deviation of about 0.5."),
    click.option("--init-level", metavar="L", type=_Finite(min=0, min_open=True), help="The same in the data's own units, such as 60 for noise of 60 HU."),
    click.option("--last", metavar="INT", type=click.IntRange(min=1), help="Start from --init-image so many steps before the lowest level of --steps, and stop there; the last step is first order."),
    click.option("--stop-sigma", metavar="S", type=_Finite(min=0), help="Where the last step ends.  [default: 0; with --last the lowest level of --steps]"),
    click.option("--init-noise", metavar="FLOAT", type=_Finite(min=0), default=1, help="Factor on the noise that is added to --init-image; 0 starts at the images themselves, which are noisy then."),
    click.option("--blend", metavar="W", type=click.FloatRange(0, 1), default=1, help="Draw the state back to --init-image after each step: x <- W x + (1-W) image."),
    click.option("--measure", metavar="denoise|inpaint:MASK|downsample:K", help="Sample images of which --init-image is a noisy measurement: of all pixels, of those that are white in a picture or not 0 in an array, or of means over squares of K pixels a side."),
    click.option("--measure-sigma", metavar="S", type=_Finite(min=0), help="Noise of that measurement, in the networks' scale."),
    click.option("--measure-level", metavar="L", type=_Finite(min=0), help="The same in the data's own units."),
    click.option("--measure-by", type=click.Choice(["guidance", "projection"]), help="How to use it: guidance differentiates the network, projection does not.  [default: guidance]"),
    click.option("--average", metavar="INT", type=click.IntRange(min=2), help="Make each image the mean of so many samples of one input. generate.py writes their standard deviation to std/."),
    click.option("--tile", metavar="SIDE", type=click.IntRange(min=1), help="Show the network overlapping squares of this side, to save memory with large images."),
    click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32", help="Arithmetic inside the network."),
    click.option("--compile", "compiled", metavar="BOOL", type=click.BOOL, default=False, help="torch.compile the network, with CUDA graphs on a GPU. Takes a minute at the start."),
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
    """Raises UserError for a value that is empty, as of a shell variable that is not set.

    Args:
        options: values by their names in Python.
        flags: the flags that name something, by their names in Python.
    """
    for name, flag in flags.items():
        if options[name] == "":
            raise UserError(f"{flag}=: names nothing; give it a value, or leave {flag} out",
                            BAD_USAGE)


def check_alpha(solver: str | None, alpha: Sequence[float] | None) -> None:
    """Raises UserError for noise before steps of a solver that it makes useless."""
    if solver in MULTISTEP and any(alpha or ()):
        raise UserError(f"--alpha={max(alpha):g}: --solver={solver} uses earlier steps, which fresh "
                        "noise makes useless; use heun or euler", BAD_USAGE)
    if solver == CONSISTENCY and any(alpha or ()):
        raise UserError(f"--alpha={max(alpha):g}: --solver={solver} solves no equation; leave one "
                        "of them out", BAD_USAGE)


def _check_rounding(seed: int | None, bits: Sequence[int] | None) -> None:
    """Raises UserError for a seed of rounding where no weight is rounded."""
    if seed is not None and min(bits or [FULL_BITS]) >= FULL_BITS:
        raise UserError(f"--rounding-seed={seed}: no weights are rounded; give --bits below "
                        f"{FULL_BITS}, or leave --rounding-seed out", BAD_USAGE)


def _refuse_grids(context: click.Context, options: dict) -> None:
    """Raises UserError for flags of grids beside --sigmas."""
    for name, flag in _OF_GRIDS.items():
        typed = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if typed or (name == "steps" and len(options["steps"] or ()) > 1):
            raise UserError(f"{flag} with --sigmas: these are the noise levels; leave {flag} out",
                            BAD_USAGE)
