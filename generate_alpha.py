"""generate.py over strengths of noise before each step (PFGM++ paper, section 6)."""

from dnnlib.cli import run
from generate import preset

main = preset(alpha="0,0.1,0.2")

if __name__ == "__main__":
    run(main)
