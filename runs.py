"""Lists runs with their state, progress and scores."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dnnlib.cli import CONTEXT, run, user_errors
from dnnlib.util import format_table, format_time
from metrics.score_names import title

if TYPE_CHECKING:  # imported late, so that --help is fast
    from reports.run_state import RunState

_HEADER = ("run", "state", "kimg", "loss", "img/s", "time left", "best score", "D", "preset",
           "last change", "note")
_NUMBERS = {"kimg", "loss", "img/s", "time left", "D"}  # right-aligned columns


@click.command(context_settings=CONTEXT)
@click.argument("folder", metavar="[FOLDER]", default="runs")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects instead of a table.")
def main(folder: str, as_json: bool) -> None:
    """Lists the training runs under FOLDER, by default 'runs'.

    The time left of a run assumes the speed of its last tick and no scores.

    A run is running while its process holds the lock of its folder, finished once it has seen all
    its images, stopped if a signal ended it after it had saved its state, and failed otherwise, or
    unknown without a log and statistics. --resume=auto continues stopped and failed runs. The best score is the lowest FID (or other
    Frechet distance) among those computed like the latest one: with the same number of images,
    sampler, steps, features and reference. If there is none, it is the highest PSNR.

    \b
    python runs.py runs
    python runs.py runs --json | jq '.[] | select(.state == "failed") | .name'
    """  # noqa: D301 - \b is click's mark for lines that must not be rewrapped
    with user_errors():
        from reports.run_state import find_runs
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder; give the folder that holds the runs")
        runs = find_runs(Path(folder))
        if not runs and not as_json:
            raise ValueError(f"{folder}: contains no runs (folders with a training_options.json)")
    if as_json:
        click.echo(json.dumps([state.to_dict() for state in runs], indent=2))
    else:
        click.echo(_table([_HEADER, *map(_row, runs)]))


def _row(run: "RunState") -> tuple[str, ...]:
    of_total = "" if run.total_kimg is None else f"/{run.total_kimg:.9g}"
    score = run.score
    kimg = f" @{score.kimg:.9g}" if score and score.kimg is not None else ""
    counts = [f", {count:,} {unit}{'s' if count > 1 else ''}" for count, unit in (
        (score.num_steps, "step"), (score.num, "image")) if count] if score else []
    return (run.name, run.state, f"{run.kimg:.9g}{of_total}",
            "" if run.loss is None else f"{run.loss:.5f}",
            "" if run.images_per_sec is None else f"{run.images_per_sec:.4g}",
            "" if run.seconds_left is None else format_time(run.seconds_left),
            f"{title(score.metric, score.detector)} {score.value:.5g}{kimg}{''.join(counts)}"
            if score else "",
            "" if run.D is None else "inf" if math.isinf(run.D) else f"{run.D:g}",
            run.preset or "", f"{run.changed:%Y-%m-%d %H:%M}", run.note)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Returns aligned columns; empty columns are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    texts = [i for i, column in enumerate(columns) if column[0] not in _NUMBERS]
    return format_table(list(zip(*columns, strict=True)), left=texts)


def cli() -> None:
    """Runs the command; entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
