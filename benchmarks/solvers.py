"""Solvers at few network evaluations: scores of networks, errors and times.

    python -m benchmarks.solvers --ref=datasets/emoji-faces-16.zip --out=docs/solvers.png

Scores compare samples of the same seeds with a data set. Errors use an ideal denoiser of known
data, and are relative to an accurate solution from the same starts. Times are medians over
alternating runs, without start-up and files.
"""

import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from dnnlib.cli import user_errors
from dnnlib.util import format_ranges
from metrics.scoring import network_features, open_evaluator
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.solvers import MULTISTEP, SOLVERS, num_evaluations
from sampling.network_sampler import NetworkSampler

_ROOT = Path(__file__).resolve().parent.parent
# Steps of each solver: up to 35 evaluations, denser where solvers differ most.
_STEPS = {"heun": (18, 9, 7, 5, 4, 3), "euler": (35, 18, 11, 9, 7, 5),
          "ipndm": (18, 11, 9, 7, 6, 5), "dpmpp2m": (18, 11, 9, 7, 6, 5),
          "unipc": (18, 11, 9, 7, 6, 5)}
_DIMS = (2.0, 128.0, math.inf)
_FINE_STEPS = 4000
_POINTS, _STARTS, _STD = 200, 500, 0.5  # of the ideal denoiser's problem
_HIGHEST, _LOWEST = 80.0, 0.1  # its noise levels
_COLUMNS = 3  # columns of panels in the picture
_IDEAL = "ideal denoiser"
_MARKS = dict(zip(_STEPS, "osv^D", strict=True))


def scores(network: Path, ref: str, seeds: Sequence[int], detector: str, device: torch.device,
           batch: int) -> dict[str, dict[int, float]]:
    """Returns the Frechet distance of the samples of a network, {solver: {evaluations: value}}."""
    found: dict[str, dict[int, float]] = {solver: {} for solver in _STEPS}
    evaluator = None
    for solver, all_steps in _STEPS.items():
        for steps in all_steps:
            samples = NetworkSampler.open(str(network), device, num_steps=steps, solver=solver)
            if evaluator is None:
                evaluator = open_evaluator(detector, ref, ["fid"], device, {str(network): samples},
                                           batch=batch, workers=0)
            features = network_features(samples, seeds, evaluator.detector, metrics=["fid"],
                                        batch=batch, title=f"{network.stem} {solver} {steps}")
            found[solver][num_evaluations(solver, steps)] = evaluator.evaluate(features)["fid"]
    return found


def errors(D: float) -> dict[str, dict[int, float]]:
    """Returns the median error of an ideal denoiser's states, {solver: {evaluations: error}}.

    The data are points in the plane, with the standard deviation of images. The states go from the
    highest level of EDM's grid to _LOWEST, at which they are still separate from the points. The
    median ignores starts near the border between two points, which may end at either point.
    """
    rng = torch.Generator().manual_seed(0)
    points = _STD * torch.randn([_POINTS, 1, 1, 2], generator=rng, dtype=torch.float64)
    start = _HIGHEST * torch.randn([_STARTS, 1, 1, 2], generator=rng, dtype=torch.float64)
    kernel = PerturbationKernel(D)

    def solve(solver: str, steps: int) -> torch.Tensor:
        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return kernel.posterior_mean(x, sigma, points)
        ends = _HIGHEST ** (1 / 7), _LOWEST ** (1 / 7)
        levels = torch.linspace(*ends, steps + 1, dtype=torch.float64) ** 7
        return (SOLVERS | MULTISTEP)[solver](denoise, start, levels)

    fine, found = solve("unipc", _FINE_STEPS), {}
    for solver, all_steps in _STEPS.items():
        found[solver] = {}
        for steps in all_steps:
            distance = (solve(solver, steps) - fine).square().flatten(1).sum(1).sqrt()
            count = 2 * steps if solver == "heun" else steps  # none of the steps ends in 0
            found[solver][count] = distance.median().item()
    return found


def times(network: Path, num: int, batch: int, device: torch.device,
          repeats: int) -> dict[str, float]:
    """Returns the median seconds for `num` images; the ways to sample alternate."""
    ways = {"heun, 18 steps": {"num_steps": 18},
            **{f"{solver}, 7 steps": {"num_steps": 7, "solver": solver}
               for solver in ("ipndm", "dpmpp2m", "unipc")}}
    samplers = {name: NetworkSampler.open(str(network), device, **way)
                for name, way in ways.items()}
    batches = [range(first, min(first + batch, num)) for first in range(0, num, batch)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for samples in samplers.values():
        list(samples.images(batches[:1]))  # warms up
    for _ in range(repeats):
        for name, samples in samplers.items():
            start = time.perf_counter()
            for done in samples.images(batches):
                done.images.cpu()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def table(found: dict[str, dict[int, float]], digits: int, name: str = "solver") -> str:
    """Returns values as Markdown: a row per solver, a column per number of evaluations.

    `name` is the title of the rows.
    """
    counts = sorted({count for values in found.values() for count in values}, reverse=True)
    rows = [[name, *map(str, counts)], ["---"] * (len(counts) + 1)]
    rows += [[solver, *(f"{values[count]:.{digits}g}" if count in values else ""
                        for count in counts)] for solver, values in found.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def draw(panels: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Writes a picture with a panel of values over evaluations for each entry of `panels`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = -(-(len(panels) + 1) // _COLUMNS)
    figure, grid = plt.subplots(rows, _COLUMNS, figsize=(3.4 * _COLUMNS, 2.9 * rows),
                                layout="constrained")
    axes = grid.flatten()
    for axis, (title, found) in zip(axes, panels.items(), strict=False):
        for solver, values in found.items():
            counts = sorted(values)
            axis.plot(counts, [values[count] for count in counts], marker=_MARKS[solver],
                      markersize=4, linewidth=1, label=solver)
        axis.set(title=title, xscale="log", yscale="log", xlabel="network evaluations",
                 ylabel=f"error at sigma = {_LOWEST:g}" if title.startswith(_IDEAL)
                 else "Frechet distance")
        axis.set_xticks([5, 7, 11, 18, 35])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            one.set_minor_formatter(NullFormatter())
    for axis in axes[len(panels):]:
        axis.axis("off")
    axes[len(panels)].legend(*axes[0].get_legend_handles_labels(), loc="upper left")
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--networks", metavar="LIST", show_default=True, help="Networks to score.",
              default="examples/emoji16-inf.pt,examples/emoji16-128.pt")
@click.option("--ref", metavar="ZIP|DIR", required=True, help="Data set that they were trained on.")
@click.option("--detector", default="pixels", show_default=True, help="Features to score by.")
@click.option("--num", metavar="INT", type=int, default=300, show_default=True, help="Samples.")
@click.option("--batch", metavar="INT", type=int, default=50, show_default=True,
              help="Samples at a time.")
@click.option("--repeats", metavar="INT", type=int, default=5, show_default=True,
              help="Measurements of each time; 0 measures none.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Where to sample.")
@click.option("--out", metavar="PNG", type=click.Path(path_type=Path), help="Picture to write.")
def main(networks: str, ref: str, detector: str, num: int, batch: int, repeats: int, device: str,
         out: Path | None) -> None:
    """Prints tables of scores, errors and times over network evaluations."""
    with user_errors():
        where, panels = torch.device(device), {}
        given = map(Path, networks.split(","))
        paths = [path if path.is_file() else _ROOT / path for path in given]
        for path in paths:
            panels[path.stem] = scores(path, ref, range(num), detector, where, batch)
            print(f"{path.stem}, seeds {format_ranges(range(num))}, {detector}, by evaluations\n\n"
                  f"{table(panels[path.stem], 3)}\n", flush=True)
        for D in _DIMS:
            title = f"{_IDEAL}, D = {D:g}"
            panels[title] = errors(D)
            print(f"{title}, median error, by evaluations\n\n{table(panels[title], 2)}\n",
                  flush=True)
        for path in paths if repeats else ():
            found = times(path, num, batch, where, repeats)
            first = next(iter(found.values()))
            for name, seconds in found.items():
                print(f"{path.stem}: {num} images by {name}: {seconds:.2f} s, "
                      f"{first / seconds:.2f}x", flush=True)
        if out:
            draw(panels, out)
            print(f"{out}: written")


if __name__ == "__main__":
    sys.exit(main())
