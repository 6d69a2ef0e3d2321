"""Runs generate.py for several numbers of steps (PFGM++ paper, section 6)."""

from dnnlib.cli import run
from generate import preset

main = preset(
    "Samples in 10, 12, 14, 16, 18, 20, 22 and 24 steps, each into its own folder.",
    steps="10,12,14,16,18,20,22,24", name_steps=True)


def cli() -> None:
    """Runs the command, also as the console script that pip installs."""
    run(main)


if __name__ == "__main__":
    cli()
