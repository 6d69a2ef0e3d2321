"""The tables and the pictures of docs/results.md, from the run directories of the study."""

import collections
import math
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.cli import HELP_NAMES, UserError, user_errors
from reports.comparison import Comparison, compare
from reports.report_plots import look
from reports.run_record import RunRecord

_AXES = {"noise_alpha": "noise before each step, alpha", "num_steps": "network evaluations",
         "bits": "bits of the weights"}
_POINTS = {"noise_alpha": "alpha {:g}", "num_steps": "{:g} steps", "bits": "{:g} bits"}
_DRAWN = ("fid", "frechet_distance")
_IMAGES = 12


def name_of(D: float) -> str:
    """Returns D as it is written."""
    return f"{D:g}"


def table(comparison: Comparison) -> str:
    """Returns the scores as Markdown: a row per D, a column per point and its seed ranges.

    First the base point over all seed ranges, then what to compare, over equal seeds.
    """
    base = f"{comparison.num_steps} steps"
    columns: dict[tuple, dict[float, str]] = collections.defaultdict(dict)
    for curve in comparison.over_D:
        s = curve.points[curve.D]
        columns[base, curve.seeds][curve.D] = f"{s.mean:.3g} ({s.low:.3g} to {s.high:.3g})"
    for axis, curves in comparison.over.items():
        default = comparison.base[axis]
        for x in sorted({x for curve in curves for x in curve.points},
                        key=lambda x, default=default: (x != default, x)):
            label = base if x == default else _POINTS[axis].format(x)
            for curve in curves:
                if x in curve.points:
                    columns[label, curve.seeds].setdefault(curve.D, f"{curve.points[x].mean:.3g}")
    heads = [f"{label}, {len(seeds)} range{'s' if len(seeds) > 1 else ''}"
             for label, seeds in columns]
    lines = [["D", *heads], ["---"] * (len(heads) + 1)]
    lines += [[name_of(D), *(cells.get(D, "") for cells in columns.values())]
              for D in sorted(curve.D for curve in comparison.over_D)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw(comparison: Comparison, path: Path) -> None:
    """Writes the scores over D, noise, steps and bits as one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    finite = [c for c in comparison.over_D if not math.isinf(c.D)]
    spreads = [c.points[c.D] for c in finite]
    low = [s.mean - s.low for s in spreads]
    high = [s.high - s.mean for s in spreads]
    axes[0, 0].errorbar([c.D for c in finite], [s.mean for s in spreads], [low, high], marker="o",
                        capsize=3, color="black")
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks([c.D for c in finite], [name_of(c.D) for c in finite])
    for curve in comparison.over_D:
        if math.isinf(curve.D):
            s = curve.points[curve.D]
            axes[0, 0].axhline(s.mean, color="black", linestyle="--", label="D = inf")
            axes[0, 0].axhspan(s.low, s.high, color="black", alpha=0.1)
            axes[0, 0].legend()
    axes[0, 0].set_xlabel("D")
    looks = {D: look(i) for i, D in enumerate(sorted(c.D for c in comparison.over_D))}
    for ax, (axis, curves) in zip(axes.flat[1:], comparison.over.items(), strict=False):
        for curve in curves:
            xs = sorted(curve.points)
            places = range(len(xs)) if axis == "bits" else [
                comparison.group.evaluations(x) if axis == "num_steps" else x for x in xs]
            ax.plot(places, [curve.points[x].mean for x in xs], label=f"D = {name_of(curve.D)}",
                    **looks[curve.D].line)
            ax.set_xticks(list(places), [f"{x:g}" for x in (xs if axis == "bits" else places)])
        ax.set_xlabel(_AXES[axis])
        if axis != "noise_alpha":
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.legend()
    for ax in axes.flat:
        ax.set_ylabel(comparison.group.title)
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def show_samples(runs: list[RunRecord], path: Path) -> None:
    """Writes images of the same seeds, a row per D."""
    import numpy as np
    import PIL.Image

    from images.grid import image_grid, save_png
    rows = []
    for run in runs:
        [folder, *_] = sorted(run.path.glob("ckpt_*/000000"))
        names = sorted(folder.glob("*.png"))[:_IMAGES]
        rows.append([np.asarray(PIL.Image.open(name)).transpose(2, 0, 1) for name in names])
    save_png(path, image_grid(rows, [f"D = {name_of(run.D)}" for run in runs]))


@click.command(context_settings=HELP_NAMES)
@click.argument("run_dirs", nargs=-1, required=True)
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), default="docs", show_default=True, help="Folder for the pictures.")
def main(run_dirs: tuple[str, ...], out: Path) -> None:
    """Prints the tables of the study and writes its pictures."""
    with user_errors():
        runs = sorted((RunRecord.read(path) for path in run_dirs), key=lambda run: run.D)
        comparisons = compare(runs)
        if not comparisons:
            raise UserError(f"{', '.join(run_dirs)}: no scores; run the study first")
        for comparison in comparisons:
            print(f"{comparison.group.title}\n\n{table(comparison)}\n")
        first = next((c for c in comparisons if c.group.metric in _DRAWN), comparisons[0])
        draw(first, out / "results-scores.png")
        show_samples(runs, out / "results-samples.png")


if __name__ == "__main__":
    main()
