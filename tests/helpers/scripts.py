"""Ways to run the project's scripts."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import forked

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "setup")
HANG_SEC = 900  # only what hangs takes so long, on any machine


def run_script(*args, processes: int = 0, check: bool = True, torchrun: bool = False,
               ) -> subprocess.CompletedProcess:
    """Runs a script in a process of its own, or on `processes` ranks.

    Args:
        args: the script and its arguments, or `-c` and code, or `-m` and a module.
        processes: how many ranks, 0 for a process without a group.
        check: fail unless the exit code is 0.
        torchrun: let torchrun start the ranks, see forked.py.
    """
    if torchrun or str(args[0]).startswith("-"):
        launch = [sys.executable]
        if processes:
            launch += ["-m", "torch.distributed.run", "--standalone",
                       f"--nproc_per_node={processes}"]
        done = subprocess.run([*launch, *map(str, args)], cwd=ROOT, text=True,
                              capture_output=True, timeout=HANG_SEC)
    else:
        ranks = run_ranks(*args, processes=processes)
        failed = [rank.returncode for rank in ranks if rank.returncode]
        done = subprocess.CompletedProcess(
            args, (1 if processes else failed[0]) if failed else 0,
            "".join(rank.stdout for rank in ranks), "".join(rank.stderr for rank in ranks))
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_ranks(*args, processes: int, cwd: Path = ROOT) -> list[subprocess.CompletedProcess]:
    """Runs a script on ranks and returns what each said and its exit code."""
    script = ROOT / str(args[0])  # unless that is absolute
    return forked.run([str(script), *map(str, args[1:])], cwd, processes, HANG_SEC)


def load_script(path):
    """Returns a script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
