"""Runs generate.py for several numbers of bits of the weights (PFGM++ paper, section 6)."""

from dnnlib.cli import run
from generate import preset

main = preset(
    "Samples with weights rounded to 5, 6, 7, 8 and 9 bits, each into its own folder.",
    bits="5,6,7,8,9")


def cli() -> None:
    """Runs the command, also as the console script that pip installs."""
    run(main)


if __name__ == "__main__":
    cli()
