"""Two processes: who waits for whom, what they agree on, and that one of them speaks."""

import pytest
from scripts import ROOT, run_script

SCRIPT = """
import os, sys, time
import torch
from torch_utils import distributed
from torch_utils.distributed import HostAgreement, get_rank, print0, rank0_first, run_on_rank0

def say(*values):
    # One write each, so that two processes do not mix their lines.
    os.write(1, (" ".join(map(str, (f"rank{get_rank()}", *values))) + "\\n").encode())

calls = []
with distributed.process_group("cpu") as device:
    # Both have received SIGTERM; only rank 1 has SIGINT's code and has diverged.
    agreement = HostAgreement(device)
    say("in_step", *agreement.in_step([143, 0]))
    say("in_step", *agreement.in_step([0, 0] if get_rank() == 0 else [130, 1]))
    say("now", *agreement.now([143, 1]))
    with rank0_first():
        if get_rank() == 0:
            time.sleep(1)
            open(sys.argv[1], "w").close()
        say("finds", os.path.exists(sys.argv[1]))
    say("result", run_on_rank0(lambda: calls.append(1) or "of rank 0"), len(calls))
    print0("printed")
    total = distributed.all_reduce_sum_(torch.tensor([1.0 + get_rank()]))
    say("sum", float(total))
"""


@pytest.mark.scripts
def test_two_processes_agree_wait_and_speak_once(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run_script(tmp_path / "script.py", tmp_path / "made", processes=2)
    lines = done.stdout.splitlines()
    assert lines.count("printed") == 1
    for rank in range(2):
        said = [line.partition(" ")[2] for line in lines if line.startswith(f"rank{rank} ")]
        assert said == [
            "in_step 143 0",  # the largest, which is an exit code, not their sum
            "in_step 130 1", "now 143 1", "finds True",
            f"result of rank 0 {1 - rank}", "sum 3.0"]
