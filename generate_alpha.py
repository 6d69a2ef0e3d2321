"""Runs generate.py for several strengths of noise before each step (PFGM++ paper, section 6)."""

from dnnlib.cli import run
from generate import preset

main = preset(
    "Samples with noise of strength 0, 0.1 and 0.2 before each step, each into its own folder.",
    alpha="0,0.1,0.2")


def cli() -> None:
    """Runs the command, also as the console script that pip installs."""
    run(main)


if __name__ == "__main__":
    cli()
