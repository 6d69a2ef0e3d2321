"""generate.py over bits of the weights (PFGM++ paper, section 6)."""

from dnnlib.cli import run
from generate import preset

main = preset(bits="5,6,7,8,9")

if __name__ == "__main__":
    run(main)
