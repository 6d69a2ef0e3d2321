"""How much the scripts say: --quiet, --verbose, and under torchrun each thing once."""

import importlib
import io
import sys

import pytest
from click.testing import CliRunner
from scripts import ROOT, SCRIPTS, run_script
from snapshots import write_snapshot
from tiny import TINY_RUN

import fid
import generate
import train
from dnnlib import console


def split(main, *args):
    """Runs a script's command; returns (exit code, stdout, stderr)."""
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    return done.exit_code, done.stdout, done.stderr


def train_args(dataset_zip, outdir, *flags):
    return [f"--outdir={outdir}", "--name=run", f"--data={dataset_zip}", *TINY_RUN,
            "--duration=0.000016", "--tick=0.008", *flags]


@pytest.mark.long
def test_quiet_training_prints_its_end_and_warnings_and_logs_all(dataset_zip, tmp_path):
    args = train_args(dataset_zip, tmp_path, "--quiet", "--pfgmpp=1", "--aug_dim=0.3")
    code, out, err = split(train.main, *args)
    assert (code, out) == (0, f"Training finished: {tmp_path / 'run'}\n")
    assert err.startswith("Warning: noise of D = 0.3") and err.count("\n") == 1
    log = (tmp_path / "run/log.txt").read_text()
    assert all(word in log for word in ("tick 1", "Run directory", "Warning: ", "total"))
    code, out, _ = split(train.main, *args, "-n")
    assert code == 0 and '"aug_dim": 0.3' in out and "Steps" in out, "a dry run is a result"
    code, out, _ = split(train.main, *args, "--resume=auto")
    assert code == 0 and out.startswith("Nothing to do")


@pytest.mark.long
def test_quiet_leaves_scores_and_errors(dataset_zip, tmp_path):
    score = ["--eval=0.008", f"--eval-ref={dataset_zip}", "--eval-num=4", "--eval-detector=pixels"]
    code, out, err = split(train.main, *train_args(dataset_zip, tmp_path, "--quiet", *score))
    assert code == 0 and err == ""
    *scores, end = out.splitlines()
    assert len(scores) == 2 and all("pixels Frechet distance" in line for line in scores)
    code, out, err = split(train.main, *train_args(dataset_zip, tmp_path, "--quiet"))
    assert code == 1 and out == "" and err.startswith("Error: ") and err.count("\n") == 1


def test_verbose_training_says_who_computes_and_where_time_goes(dataset_zip, tmp_path):
    _, usual, _ = split(train.main, *train_args(dataset_zip, tmp_path / "a"))
    _, out, _ = split(train.main, *train_args(dataset_zip, tmp_path / "b", "--verbose"))
    assert "Rank 0 " in out and "Time       data: " in out and "Time       network: " in out
    assert out.count("waiting for data") == 2, "once a tick"
    assert "Rank 0" not in usual and "Time  " not in usual


def test_quiet_and_verbose_sampling_and_scoring(dataset_zip, tmp_path):
    network = write_snapshot(tmp_path / "network-snapshot-000000.pt")
    args = [f"--network={network}", f"--outdir={tmp_path / 'out'}", "--seeds=0-3", "--steps=2",
            "--device=cpu"]
    assert split(generate.main, *args, "--quiet") == (0, f"{tmp_path / 'out'}: 4 images made\n", "")
    _, out, _ = split(generate.main, *args, "--verbose")
    assert "Rank 0 " in out and "Time       network: " in out and "4 of 4 images" in out
    args = ["calc", f"--images={tmp_path / 'out'}", f"--ref={tmp_path / 'out'}", "--num=4",
            "--detector=pixels", "--workers=0", "--device=cpu"]
    code, out, err = split(fid.main, *args, "--quiet")
    assert code == 0 and out.startswith("pixels Frechet distance: ") and out.count("\n") == 1
    assert err.startswith("Warning: 4 images are fewer ") and err.count("\n") == 1
    _, out, _ = split(fid.main, *args, "--verbose")
    assert all(f"Time       {part}: " in out
               for part in ("detector and reference", "features", "distances"))


@pytest.mark.parametrize("main, args", [
    (train.main, ["--outdir=x", "--data=y"]), (generate.main, ["--outdir=x"]),
    (fid.main, ["calc", "--images=x", "--ref=y"])])
def test_quiet_and_verbose_exclude_each_other(main, args):
    code, out, err = split(main, *args, "--quiet", "--verbose")
    assert (code, out, err) == (2, "", "Error: --quiet and --verbose: choose one\n")


def test_quiet_ends_with_the_command(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(KeyError), console.speaking(quiet=True, verbose=False):
        print("dropped")
        console.result("kept")
        raise KeyError
    print("after")
    assert stream.getvalue() == "kept\nafter\n"


def test_no_bar_but_on_rank_0_and_never_with_quiet(monkeypatch):
    assert console.bar_disabled() is None  # tqdm then asks for a terminal
    monkeypatch.setenv("RANK", "1")
    assert console.bar_disabled() is True
    monkeypatch.setenv("RANK", "0")
    with console.speaking(quiet=True, verbose=False):
        assert console.bar_disabled() is True


# --------------------------------------------------------------------------------- torchrun

SCRIPT = """
import click
from dnnlib.cli import UserError, run, user_errors, verbosity_options
from torch_utils import distributed

@click.command()
@click.argument("fault")
@verbosity_options
def main(fault):
    with user_errors(), distributed.process_group("cpu"):
        rank = distributed.get_rank()
        if fault == "usage":
            raise UserError("the same everywhere", 2)
        if fault == "data" and rank == 1:
            raise ValueError("only rank 1 sees it")
        if fault == "bug":
            raise KeyError("a bug everywhere")
        if fault == "bug1" and rank == 1:
            raise KeyError("a bug of rank 1")
        distributed.barrier()

if __name__ == "__main__":
    run(main)
"""


@pytest.mark.scripts
@pytest.mark.parametrize("fault, words", [
    pytest.param("--bogus", "Error: No such option", marks=pytest.mark.slow),
    pytest.param("usage", "Error: the same everywhere", marks=pytest.mark.slow),
    ("data", "Error: only rank 1 sees it"),
    pytest.param("bug", "KeyError: 'a bug everywhere'", marks=pytest.mark.slow),
    ("bug1", "KeyError: 'a bug of rank 1'")])
def test_an_error_of_any_rank_is_shown_once(fault, words, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run_script(tmp_path / "script.py", fault, processes=2, check=False)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(words) == 1, done.stderr


@pytest.mark.scripts
def test_verbose_lists_every_rank_once(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run_script(tmp_path / "script.py", "none", "--verbose", processes=2)
    assert done.stdout.count("Rank 0 ") == done.stdout.count("Rank 1 ") == 1


@pytest.mark.long
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_misspelt_option_is_answered_with_the_nearest(name, invoke):
    command = importlib.import_module(name).main
    for words, each in [((), command), *(((sub,), child) for sub, child in
                                         getattr(command, "commands", {}).items())]:
        flags = [flag for option in each.params for flag in option.opts
                 if flag.startswith("--") and len(flag) > 5 and flag[-2] != "-"]  # words
        for flag in flags:
            result = invoke(command, *words, f"{flag[:-2]}{flag[-1]}{flag[-2]}x")
            assert result.exit_code == 2 and flag in result.output.splitlines()[-1], result.output
