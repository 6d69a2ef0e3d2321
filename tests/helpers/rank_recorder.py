"""Runs a script and records what its process did that one process does for all.

    python rank_recorder.py FOLDER SCRIPT [ARGS...]

A line each goes to FOLDER/rank<R>.txt: "changed PATH" for a file or folder that was made, written,
renamed to or removed, and "called MODULE:NAME" for each call of a function of CALLS.
"""

import functools
import importlib
import os
import runpy
import sys
from pathlib import Path

# What is computed or written once, whatever the number of processes: a module, and what is in it.
CALLS = (
    "metrics.references:load_reference", "metrics.references:save_reference",
    "metrics.evaluator:Evaluator._evaluate", "metrics.score_log:ScoreLog.record",
    "images.dataset:ImageFolderDataset.measure", "checkpoints.checkpoint:save",
    "training.resume:read_state", "training.sample_grids:save_real_grid",
    "sampling.image_writer:ImageFolder.open", "checkpoints.checkpoint:load",
    "images.grid:save_png", "images.grid:save_gif", "dnnlib.run_lock:run_lock",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _changed(event: str, args: tuple) -> str | int | None:
    """Returns the path that an audit event changes, None if it changes none."""
    if event == "open":
        path, mode, flags = args
        return path if set(mode or "") & set("wax+") or (flags or 0) & _WRITES else None
    if event in ("os.rename", "os.link", "os.symlink"):
        return args[1]
    if event == "os.mkdir":
        return None if os.path.isdir(args[0]) else args[0]
    return args[0] if event in ("os.remove", "os.truncate") else None


def _count_calls(name: str, write) -> None:
    module, _, path = name.partition(":")
    owner = importlib.import_module(module)
    *owners, attribute = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def counted(*args, **kwargs):
        write(f"called {name}")
        return function(*args, **kwargs)
    setattr(owner, attribute, counted)


def main(folder: str, script: str, *args: str) -> None:
    file = os.open(Path(folder, f"rank{os.environ['RANK']}.txt"), os.O_WRONLY | os.O_CREAT)

    def write(line: str) -> None:
        os.write(file, (line + "\n").encode())

    def audit(event: str, values: tuple) -> None:
        path = _changed(event, values)
        if isinstance(path, str | os.PathLike):
            write(f"changed {os.path.abspath(path)}")

    sys.argv = [script, *args]
    sys.path[0] = str(Path(script).parent)
    for name in CALLS:
        _count_calls(name, write)
    sys.addaudithook(audit)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
