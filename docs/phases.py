"""The phases of sampling at several D: how well noise of each level hides the original image.

    y image of a data set    x = y + n its noisy copy    r = sigma*sqrt(D)    N data dimension
    spread(sigma)   mean over x of sqrt(tr Cov[y|x])

The posterior is that of the ideal denoiser, with y uniform over the data set. Far from the data it
covers all images, and the spread is that of the data set. Near the data it is a single image, and
the spread is 0. PFGM++ (Xu et al. 2023, arXiv 2302.04265, section 4) transfers the settings of
diffusion to any D by r = sigma*sqrt(D), because the phases in between then occur at the same sigma.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.atomic import atomic_write, check_writable
from dnnlib.cli import HELP_NAMES, UserError, flag_errors, run, user_errors
from reports.report_plots import check_available

if TYPE_CHECKING:
    import torch

DIMS = (8, 64, 512, 4096, math.inf)
LEVELS = [0.01 * 10 ** (k / 12) for k in range(61)]  # to 1000
_SHOWN = 0.05, 1000.0  # range of both axes, so that a shift has the same length in both
_LOOKS = [  # for each D; the lines coincide, so the lower ones are wider
    {"color": "#e8a33d", "linewidth": 6.0}, {"color": "#d1495b", "linewidth": 4.4},
    {"color": "#2a9d8f", "linewidth": 3.0}, {"color": "#7fb2e5", "linewidth": 1.8},
    {"color": "black", "linewidth": 1.0, "linestyle": "--"}]


def read(path: Path) -> "torch.Tensor":
    """Returns the images of a data set, scaled as for networks, [M, N] float64."""
    import torch

    from images.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(path)
    images, *_ = dataset.get_batch(range(len(dataset)))
    return dataset.scaling.to_network(torch.from_numpy(images)).to(torch.float64).flatten(1)


def whole_spread(data: "torch.Tensor") -> float:
    """Returns sqrt(tr Cov[y]) of data [M, N], the spread if nothing is known about y."""
    return float(data.var(dim=0, correction=0).sum().sqrt())


def spread(D: float, data: "torch.Tensor", num: int, sigma: float) -> float:
    """Returns the mean of sqrt(tr Cov[y|x]) over noisy copies of `num` images of data [M, N].

    The images and the directions of the noise are the same for every D and sigma.
    """
    import torch

    from pfgmpp.kernel import PerturbationKernel

    kernel, rng = PerturbationKernel(D), torch.Generator().manual_seed(0)
    clean = data[torch.randint(len(data), [num], generator=rng)]
    x = clean + kernel.sample(clean.shape, sigma, rng)
    weights = kernel.posterior_weights(x, sigma, data)
    squares = weights @ data.square().sum(dim=1) - (weights @ data).square().sum(dim=1)
    return float(squares.clamp(min=0).sqrt().mean())  # rounding can make them negative


def half_level(spreads: Sequence[float], whole: float) -> float:
    """Returns the level at which spreads at LEVELS reach whole/2, interpolated in its logarithm.

    Raises:
        ValueError: they do not reach it.
    """
    for k in range(1, len(LEVELS)):
        low, high = spreads[k - 1:k + 1]
        if low <= whole / 2 < high:
            share = (whole / 2 - low) / (high - low)
            return LEVELS[k - 1] * (LEVELS[k] / LEVELS[k - 1]) ** share
    raise ValueError(f"the spread does not pass half of the data's, {whole / 2:.3g}, between sigma "
                     f"{LEVELS[0]:g} and {LEVELS[-1]:g}; scale the data to about -1 to 1")


def draw(spreads: dict[float, list[float]], whole: float, path: Path) -> None:
    """Writes the spreads over sigma and r, as shares of the spread of the data, to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for D, look in zip(DIMS, _LOOKS, strict=True):
        shares = [value / whole for value in spreads[D]]
        half = half_level(spreads[D], whole)
        left.plot(LEVELS, shares, label=f"D = {D:g}: {half:.3g}", **look)
        if not math.isinf(D):
            r = math.sqrt(D)  # of sigma = 1
            right.plot([r * level for level in LEVELS], shares,
                       label=f"D = {D:g}: {r * half:.3g}", **(look | {"linewidth": 2}))
    for axes, title, name, place in (
            (left, "over sigma: the phases are aligned", "noise level sigma", "lower right"),
            (right, "over r: they are sqrt(D) apart", "radius r = sigma sqrt(D)", "upper left")):
        axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlim(*_SHOWN)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(title)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        axes.legend(loc=place, fontsize=9, title="halfway at", title_fontsize=9)
    left.set_ylabel("spread of the images that x may\ncome from, over that of the data")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)


@click.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--data", metavar="PATH", type=click.Path(path_type=Path),
              default=Path("examples/digits8.zip"), help="Data set: a folder, ZIP or .npz.")
@click.option("--out", metavar="PNG", type=click.Path(path_type=Path),
              default=Path("docs/phases.png"), help="Picture to write.")
@click.option("--num", metavar="INT", type=click.IntRange(min=1), default=500,
              help="Number of noisy images per level.")
def main(data: Path, out: Path, num: int) -> None:
    """Plots how far noise hides the images of a data set, over sigma and r, for several D."""
    with user_errors():
        check_available("the picture of docs/phases.py needs")
        with flag_errors("--out", out, "give a file"):
            check_writable(out)
            out.parent.mkdir(parents=True, exist_ok=True)
        points = read(data)
        whole = whole_spread(points)
        if not whole > 0:
            raise UserError(f"{data}: all images are equal, so their spread is 0 at every level")
        click.echo(f"{len(points)} images, N = {points.shape[1]}, spread {whole:.4g}")
        spreads = {}
        for D in DIMS:
            spreads[D] = [spread(D, points, num, sigma) for sigma in LEVELS]
            half = half_level(spreads[D], whole)
            click.echo(f"D = {D:<6g} halfway at sigma = {half:.3f}, "
                       f"r = {half * math.sqrt(D):.3f}")
        draw(spreads, whole, out)


if __name__ == "__main__":
    run(main)
