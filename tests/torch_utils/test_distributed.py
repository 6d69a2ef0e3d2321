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


PATIENCE = """
import datetime, os, sys, time
from torch_utils import distributed
from torch_utils.distributed import get_rank, node_leader, run_by, run_on_rank0

def say(*values):
    os.write(1, (" ".join(map(str, (f"rank{get_rank()}", *values))) + "\\n").encode())

# Any collective that waits for more than 2 s ends the run; what one does for others takes 4.
distributed._STEP_TIMEOUT = distributed._HOST_TIMEOUT = datetime.timedelta(seconds=2)
distributed._BEAT_SEC = 0.1
os.environ["LOCAL_RANK"] = str(get_rank() % 2)

def work(kind=None):
    time.sleep(4)
    if kind and get_rank() == 2:
        raise kind("of a leader")
    return get_rank()

with distributed.process_group("cpu"):
    os.environ["LOCAL_RANK"] = str(get_rank() % 2)  # two nodes of two ranks
    say("rank 0", run_on_rank0(work))
    say("leader", node_leader(), run_by(node_leader(), work))
    for kind in (OSError, ValueError):
        try:
            run_by(node_leader(), work, kind)
        except kind as error:
            say("told", error)
    try:
        run_by(node_leader(), work, RuntimeError)
    except RuntimeError as error:
        say("raised", error)
    except OSError as error:
        say("told", error)
    def freeze():
        distributed.threading.Event.wait = lambda self, sec: True  # no beat of this process
        time.sleep(4)
    del os.environ["LOCAL_RANK"]
    say("no variable", node_leader())
    distributed._BEAT_SEC = 0.3
    try:
        run_by(1, freeze)
    except OSError as error:
        say("silent", "rank 1 has been silent" in str(error))
    time.sleep(3)
"""


@pytest.mark.scripts
@pytest.mark.slow
def test_what_one_does_for_others_may_take_longer_than_any_collective(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(PATIENCE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run_script(tmp_path / "script.py", processes=4)
    lines = done.stdout.splitlines()
    for rank in range(4):
        said = [line.partition(" ")[2] for line in lines if line.startswith(f"rank{rank} ")]
        leader = rank - rank % 2
        lost = "told lost another process of this run: rank 2 has ended; its own messages say why"
        assert said[:5] == ["rank 0 0", f"leader {leader} {leader}", *["told of a leader"] * 2,
                            "raised of a leader" if rank == 2 else lost]
        assert said[5:] == ["no variable 0", *(["silent True"] if rank != 1 else [])]
