"""Ways to run the project's scripts."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HANG_SEC = 900  # only what hangs takes so long, on any machine


def run_script(*args, processes: int = 0, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a script in a subprocess, under torchrun if `processes` > 0."""
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={processes}"]
    done = subprocess.run([*launch, *map(str, args)], cwd=ROOT, text=True, capture_output=True,
                          timeout=HANG_SEC)
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def load_script(path):
    """Returns a script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
