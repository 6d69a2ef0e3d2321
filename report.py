"""Writes a report of runs: one HTML file with settings, curves, samples, scores, comparisons."""

from pathlib import Path

import click

from dnnlib.cli import CONTEXT, run, user_errors


@click.command(context_settings=CONTEXT)
@click.argument("folders", metavar="RUN_DIR...", nargs=-1, required=True)
@click.option("--out", metavar="HTML", default="report.html", help="File to write.")
@click.option("--title", metavar="STR", help="Heading of the report.  [default: names of the runs]")
def main(folders: tuple[str, ...], out: str, title: str | None) -> None:
    """Writes a report of one run, or of several side by side. A folder of runs stands for them all.

    The report is a single HTML file that opens offline in any browser. It shows settings, loss,
    skipped steps, speed, memory, sample grids and scores. For runs that were scored in the same
    way, it also shows the scores over D, alpha, steps and bits. The numbers are in tables and in
    CSV files inside the page. Reports need matplotlib: pip install matplotlib.

    Runs may still be in progress. The report says what is missing or damaged.

    \b
    python report.py runs/cifar10-128 runs/cifar10-2048 runs/cifar10-inf --out=report.html
    """  # noqa: D301 - \b is click's mark for lines that must not be rewrapped
    with user_errors():
        from reports.report_plots import check_available
        check_available()
        check_available("a report needs", "jinja2")
        if Path(out).is_dir():
            raise ValueError(f"--out={out}: is a folder; name a file, such as "
                             f"{Path(out) / 'report.html'}")

        from dnnlib.atomic import atomic_write
        from reports.report_page import render
        from reports.run_record import NotARunError, RunRecord
        from reports.run_state import run_dirs
        runs: dict[Path, RunRecord] = {}
        for folder in map(Path, folders):
            try:
                found = [RunRecord.read(folder)]
            except NotARunError:
                found = [RunRecord.read(path) for path in sorted(run_dirs(folder))]
                if not found:
                    raise
            runs |= {run.path.resolve(): run for run in found if run.path.resolve() not in runs}
        page = render(list(runs.values()), title).encode("utf-8", errors="replace")
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(out)) as file:
            file.write(page)
    click.echo(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(page) / 1e6:.1f} MB")


def cli() -> None:
    """Runs the command; entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
