"""Training steps with one process against two gloo processes, with equal batch and cores."""

import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks import networks
from benchmarks.sides import ROOT
from benchmarks.table import Options, Row, with_ratios

_BATCH, _STEPS = 8, 3


def rows(options: Options) -> list[Row]:
    """Returns the steps of NCSN++ 32x32 on two cores, with both divisions."""
    what = f"training, ncsnpp 32x32, batch {_BATCH}, two cores"
    ways = {"two processes, one thread each": (2, 1), "one process, two threads": (1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        networks.write_inputs({"network": networks.network("ncsnpp", 32), "folder": folder,
                               "side": 32})
        seconds = {name: _steps(folder, *way) for name, way in ways.items()}
    return with_ratios([Row(what, name, seconds[name], _BATCH) for name in ways], list(ways)[-1])


def _steps(folder: str, processes: int, threads: int) -> list[float]:
    """Returns the durations of some steps in seconds, as measured by rank 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", __file__, folder]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout.splitlines()[-1])


def _worker(folder: str) -> None:
    """Runs the steps in a process started by torchrun."""
    import torch

    from torch_utils import distributed

    with distributed.process_group("cpu"):
        case = networks.OurStep({"device": "cpu", "precision": "fp32", "compile": False,
                                 "arch": "ncsnpp", "batch": _BATCH, "folder": folder})
        seconds = []
        for _ in range(_STEPS + 1):
            distributed.barrier()
            start = time.perf_counter()
            case.run()
            seconds.append(time.perf_counter() - start)
        assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
        if distributed.get_rank() == 0:
            print(json.dumps(seconds[1:]), flush=True)
        case.close()


if __name__ == "__main__":
    _worker(sys.argv[1])
