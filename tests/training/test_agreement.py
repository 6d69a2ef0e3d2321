"""Ranks that were started differently: what is noticed, when, and who decides."""

import dataclasses
import json
import re
import shutil
import time

import pytest
import torch
from scripts import ROOT, run_script
from snapshots import write_snapshot
from tiny import TINY_RUN, write_dataset

from torch_utils import distributed
from training import agreement
from training.agreement import _bit_sum
from training.config import TrainConfig


def two_processes(test):
    return pytest.mark.scripts(pytest.mark.long(test))


def two_ranks(script, common, own, check=False):
    """Runs a script on two ranks, each with `own` arguments beside the common ones."""
    return run_script(ROOT / "tests/helpers/ranked.py", json.dumps(own), ROOT / script, *common,
                      processes=2, check=check)


def train(tmp_path, own, *flags, check=False):
    common = [f"--outdir={tmp_path}", "--name=run", *TINY_RUN, "--device=cpu",
              "--duration=0.000032", "--tick=0.016", *flags]
    return two_ranks("train.py", common, own, check=check)


def errors(done):
    return re.findall(r"^Error: (.*)$", done.stderr, re.M)


ALIKE = {"lr": 1e-3, "augment": 0.0}


@pytest.mark.parametrize("other, words", [
    ({"lr": 2e-3}, "--lr=0.002 (0.001 on rank 0)"),
    ({"pfgmpp": True, "aug_dim": 64.0}, "--pfgmpp=True (False on rank 0), --aug_dim=64.0 (128.0"),
    ({"resume": None}, "--resume=not given (auto on rank 0)"),
    ({"has_name": False}, "--has-name=False (True on rank 0)"),
    ({"transfer": "x.pt"}, "--transfer=given (not given on rank 0)"),
    ({"val_data": "x.zip"}, "--val-data=given (not given on rank 0)"),
    ({"eval_ref": "x", "eval": 1.0}, "--eval=1.0 (not given on rank 0), --eval-ref=given (not "),
    ({"dry_run": True}, "--dry-run=True (False on rank 0)"),
    ({"seed": 3}, "--seed=3 (not given on rank 0)"),
    ({"code of sha256": "ab"}, "code of sha256=ab ("),
])
def test_other_options_or_code_are_named(other, words, monkeypatch):
    def say(facts):
        said.append(facts)
        return [facts]

    def told(**other):
        """What a rank says of its options; `other` may name what is no option."""
        fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"seed"}
        own = {"resume": "auto", "dry_run": False, "seed": None, "has_name": True}
        own |= {name: value for name, value in other.items() if name in own}
        options = {name: value for name, value in other.items() if name in fields}
        said.clear()
        agreement.check_options(TrainConfig(data="a", **ALIKE | options), **own)
        return [facts | {name: other[name] for name in facts if name in other} for facts in said]

    said: list[dict] = []
    monkeypatch.setattr(distributed, "gather_objects", say)
    ranks = list(zip(told(), told(**other), strict=True))
    monkeypatch.setattr(distributed, "gather_objects", lambda facts: list(ranks.pop(0)))
    with pytest.raises(ValueError, match=re.escape(f"rank 1 was started with {words}")):
        agreement.check_options(TrainConfig(data="a", **ALIKE))


def test_paths_may_differ_between_machines(monkeypatch):
    said = []
    monkeypatch.setattr(distributed, "gather_objects", lambda facts: [said.append(facts) or facts])
    agreement.check_options(TrainConfig(data="a", augment=0.0, workers=1))
    agreement.check_options(TrainConfig(data="b", augment=0.0, workers=7))
    agreement.check_options(TrainConfig(data="b", augment=0.0, transfer="c", val_data="d"))
    agreement.check_options(TrainConfig(data="b", augment=0.0, transfer="x/c", val_data="y/d"))
    assert said[4] == said[6] != said[2]
    assert said[0] == said[2] and said[1] == said[3] and len(said[0]) > 40


@two_processes
def test_another_rate_ends_the_run_before_it_begins(dataset_zip, tmp_path):
    done = train(tmp_path, [["--lr=1e-3"], ["--lr=2e-3"]], f"--data={dataset_zip}")
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert errors(done) == ["rank 1 was started with --lr=0.002 (0.001 on rank 0); start every "
                            "process with the same command"]


SILENT = """python:
import time
from training import training_loop
def wait(trainer):
    time.sleep(100)
    raise SystemExit(9)
training_loop.check_weights = wait
"""


@two_processes
def test_a_rank_that_does_not_answer_between_steps_is_given_up(dataset_zip, tmp_path, monkeypatch):
    monkeypatch.setenv("PFGMPP_TIMEOUT", "4")
    start = time.monotonic()
    done = train(tmp_path, [[], [SILENT]], f"--data={dataset_zip}", "--snap=1")
    assert done.returncode == 1 and time.monotonic() - start < 60
    assert len(errors(done)) == 1 and "lost another process of this run" in errors(done)[0]


@pytest.mark.slow
@two_processes
def test_one_rank_alone_may_be_verbose(dataset_zip, tmp_path):
    done = train(tmp_path, [["--verbose"], []], f"--data={dataset_zip}", "-n")
    assert done.returncode == 0 and not errors(done)
    done = train(tmp_path, [[], ["--verbose"]], f"--data={dataset_zip}", "-n")
    assert done.returncode == 0 and not errors(done)


@two_processes
@pytest.mark.slow
def test_other_data_end_the_run_before_it_begins(tmp_path):
    one, other = (write_dataset(tmp_path / f"{n}.zip", num=n) for n in (40, 41))
    done = train(tmp_path, [[f"--data={one}"], [f"--data={other}"]])
    [error] = errors(done)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert re.search(r"rank 1 was started with --data=41 images with fingerprint \w{12}\.\.\. "
                     r"\(40 images with fingerprint \w{12}\.\.\. on rank 0\)", error)


@two_processes
@pytest.mark.slow
@pytest.mark.parametrize("rank, flag", [
    (0, "--val-data=DATA"), (1, "--val-data=DATA"), (0, "--transfer=NET"), (1, "--transfer=NET"),
    (1, "--nosubdir"), (1, "--resume=NET")])
def test_no_flag_of_one_rank_alone_makes_ranks_wait(rank, flag, dataset_zip, tmp_path):
    net = write_snapshot(tmp_path / "net.pt", label_dim=0)
    own = [[], []]
    own[rank] = [flag.replace("DATA", str(dataset_zip)).replace("NET", str(net))]
    common = [f"--outdir={tmp_path / 'runs'}", *TINY_RUN, "--device=cpu", f"--data={dataset_zip}"]
    done = two_ranks("train.py", common, own)
    assert done.returncode == 1 and len(errors(done)) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.slow
@two_processes
def test_a_state_for_a_signal_is_not_written_by_ranks_that_disagree(dataset_zip, tmp_path):
    stop = SPOIL + """
import os, signal
before = module.Trainer.train_step
def stopped(self):
    before(self)
    if len(steps) == 4:
        os.kill(os.getpid(), signal.SIGTERM)
module.Trainer.train_step = stopped
"""
    done = train(tmp_path, [[], [stop]], f"--data={dataset_zip}", "--tick=0.8",
                 "--duration=0.00008")
    assert any("rank 1 has other weights than rank 0" in error for error in errors(done))
    assert not list((tmp_path / "run").glob("training-state-*"))


SPOIL = """python:
import training.trainer as module
step, steps = module.Trainer.train_step, []
def spoiled(self):
    step(self)
    steps.append(0)
    if len(steps) == 3:
        next(self.net.parameters()).data[0] += 1e-6
module.Trainer.train_step = spoiled
"""


@two_processes
@pytest.mark.parametrize("flags", [
    ["--snap=1", "--dump=1000"],
    pytest.param(["--snap=1000", "--dump=1"], marks=pytest.mark.slow)])
def test_weights_that_differ_end_the_run_before_they_are_written(flags, dataset_zip, tmp_path):
    done = train(tmp_path, [[], [SPOIL]], f"--data={dataset_zip}", "--tick=0.008", *flags)
    [error] = errors(done)
    assert done.returncode == 1
    assert re.match(r"rank 1 has other weights than rank 0 at 0.024 kimg \(1 of \d+ tensors, first "
                    r"weight model\.", error)
    written = [path.name for path in (tmp_path / "run").glob("*.pt")]
    assert not [name for name in written if "000000.024" in name or "000000.032" in name]


def test_the_sum_of_bits_sees_every_bit_and_every_exchange():
    x = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    base = int(_bit_sum(x))
    assert int(_bit_sum(x.contiguous(memory_format=torch.channels_last))) == base
    for bit in range(32):
        y = x.clone()
        y.view(-1).view(torch.int32)[5] ^= (1 << bit) if bit < 31 else -(1 << 31)
        assert int(_bit_sum(y)) != base
    assert int(_bit_sum(x.flip(0))) != base and int(_bit_sum(x.flip(3))) != base


@pytest.mark.slow
@two_processes
def test_rank_0_finds_and_reads_the_state_that_all_go_on_with(dataset_zip, tmp_path):
    """The folders of rank 1 do not exist: another machine's disk. Its data lie elsewhere."""
    copy = shutil.copy(dataset_zip, tmp_path / "copy.zip")
    source = write_snapshot(tmp_path / "net.pt", label_dim=0)
    own = [[f"--data={dataset_zip}", f"--transfer={source}"],
           [f"--data={copy}", "--transfer=not-here.pt", f"--outdir={tmp_path / 'elsewhere'}"]]
    flags = ["--resume=auto", "--tick=0.008"]
    first = train(tmp_path, own, *flags, "--duration=0.000016", check=True)
    assert first.stdout.count("Transferred") == 1 and "Resuming from" not in first.stdout
    second = train(tmp_path, own, *flags, "--duration=0.000024", check=True)
    assert second.stdout.count("Resuming from") == 1 and "Transferred" not in second.stdout
    assert not (tmp_path / "elsewhere").exists()


@two_processes
@pytest.mark.slow
def test_a_missing_folder_of_rank_0_is_a_new_run_whatever_rank_1_has(dataset_zip, tmp_path):
    train(tmp_path / "b", [[], []], f"--data={dataset_zip}", check=True)
    done = train(tmp_path / "a", [[], [f"--outdir={tmp_path / 'b'}"]], f"--data={dataset_zip}",
                 "--resume=auto", check=True)
    assert "Resuming from" not in done.stdout


@two_processes
@pytest.mark.slow
def test_rank_0_finds_the_networks_and_folders_of_a_run(dataset_zip, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    write_snapshot(run / "training-state-000001.pt", label_dim=0)
    own = [[f"--outdir={run}"], [f"--outdir={elsewhere}"]]
    done = two_ranks("generate.py", ["--seeds=0-3", "--steps=2", "--device=cpu"], own, check=True)
    assert "4 images made" in done.stdout and not elsewhere.exists()
    assert sorted(path.name for path in run.rglob("ckpt_000001/**/*.png")) == [
        f"{seed:06d}.png" for seed in range(4)]
    (run / "training-state-000001.pt").unlink()
    args = ["calc", f"--ref={dataset_zip}", "--detector=pixels", "--device=cpu", "--workers=0"]
    done = two_ranks("fid.py", args, [[f"--images={run}", "--num=4"],
                                      [f"--images={elsewhere}", "--num=4"]], check=True)
    assert done.stdout.startswith(f"path:{run / 'ckpt_000001'}, ")


@two_processes
@pytest.mark.slow
def test_a_run_without_states_is_one_error(tmp_path):
    (tmp_path / "run").mkdir()
    done = two_ranks("generate.py", ["--seeds=0-3", "--steps=2", "--device=cpu"],
                     [[f"--outdir={tmp_path / 'run'}"], [f"--outdir={tmp_path / 'elsewhere'}"]])
    assert done.returncode == 1 and len(errors(done)) == 1
