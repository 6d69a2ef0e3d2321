"""Two processes: who waits for whom, what they agree on, and that one of them speaks."""

import pytest
from scripts import ROOT, run_script

SCRIPT = """
import os, sys, time
import torch
from torch_utils import distributed
from torch_utils.distributed import (
    HostAgreement, broadcast_object, get_rank, print0, rank0_first, run_on_rank0)

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
    def fail(kind):
        raise kind("of rank 0")

    def first(kind):
        with rank0_first():
            if get_rank() == 0:
                fail(kind)

    for kind in (OSError, ValueError):  # whose rank 0 may fail, and nobody waits for it
        for call in (lambda kind=kind: first(kind), lambda kind=kind: run_on_rank0(fail, kind)):
            try:
                call()
            except kind as error:
                say("told", error)
    sent = {"a": [torch.arange(3).double(), torch.ones(2, 2).bfloat16()], "b": "text",
            "c": torch.tensor(True), "d": torch.zeros(0, 4), "e": (torch.arange(4), None)}
    got = broadcast_object(sent if get_rank() == 0 else None)
    say("sent", all(map(torch.equal, got["a"], sent["a"])) and got["a"][1].dtype == torch.bfloat16,
        got["b"], bool(got["c"]), tuple(got["d"].shape), got["e"][0].tolist())
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
            f"result of rank 0 {1 - rank}", *["told of rank 0"] * 4,
            "sent True text True (0, 4) [0, 1, 2, 3]", "sum 3.0"]
