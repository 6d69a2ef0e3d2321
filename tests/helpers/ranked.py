"""Runs a script with arguments of each rank's own: a JSON list of them, then the common ones.

    torchrun --standalone --nproc_per_node=2 ranked.py '[["--lr=1"], ["--lr=2"]]' SCRIPT [ARGS...]

`python:CODE` in place of an argument runs the code first.
"""

import json
import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    own = json.loads(sys.argv[1])[int(os.environ["RANK"])]
    script, *common = sys.argv[2:]
    sys.path[0] = str(Path(script).parent)
    for arg in own:
        if arg.startswith("python:"):
            exec(arg.removeprefix("python:"), {})  # noqa: S102
    sys.argv = [script, *common, *(arg for arg in own if not arg.startswith("python:"))]
    runpy.run_path(script, run_name="__main__")
