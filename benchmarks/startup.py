"""Start-up: the help of the scripts, and the time to import our packages after PyTorch."""

import functools
import os
import subprocess
import sys

from benchmarks.sides import ROOT
from benchmarks.table import Options, Row, in_turn, with_ratios

_PACKAGES = ("training.training_loop", "sampling.network_sampler", "metrics.scoring")


def rows(options: Options) -> list[Row]:
    """Returns the times of fresh processes."""
    places = {"ours": ROOT}
    if options.commit:
        places[options.commit[0]] = options.commit[1]
    if options.reference:
        places["reference"] = options.reference
    found = []
    for script in ("train.py", "generate.py"):
        found += _timed(f"{script} --help", {
            name: [sys.executable, str(root / script), "--help"] for name, root in places.items()},
            ROOT, list(places)[-1], options)
    code = "import torch.nn.parallel, torch.utils.data, numpy, click, PIL.ImageFont, psutil, tqdm"
    return found + _timed("importing our packages", {
        "PyTorch and the libraries": [sys.executable, "-c", code],
        "with ours": [sys.executable, "-c", "; ".join([code, *(f"import {p}" for p in _PACKAGES)])],
    }, ROOT, "PyTorch and the libraries", options)


def _timed(what, commands, cwd, baseline, options) -> list[Row]:
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # bytecode is cached, as for users
    ways = {name: functools.partial(subprocess.run, command, cwd=cwd, check=True, env=env,
                                    capture_output=True) for name, command in commands.items()}
    in_turn(ways, 1)
    seconds = in_turn(ways, 2 * options.repeats + 1)
    return with_ratios([Row(what, name, seconds[name]) for name in commands], baseline)
