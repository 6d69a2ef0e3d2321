"""runs.py: what is said of a run is what its folder says."""

import json
import subprocess
import sys

import pytest
from scripts import HANG_SEC, ROOT
from tiny import TINY_RUN

import runs
import train
from dnnlib.run_lock import lock_holder, run_lock
from reports.run_state import find_runs
from training.config import TrainConfig


def write_run(folder, kimg=50.0, log="", scores=(), **options):
    """Writes what a run of 100 kimg leaves."""
    folder.mkdir(parents=True)
    config = TrainConfig(data="x", **{"duration": 0.1} | options)
    (folder / "training_options.json").write_text(json.dumps({"options": config.to_dict()}))
    lines = [{"Progress/kimg": {"mean": value}, "Loss/loss": {"mean": value / 100},
              "Timing/sec_per_kimg": {"mean": 2.0}} for value in (kimg / 2, kimg)]
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.txt").write_text(f"Run directory  {folder}\n{log}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores))
    return folder


def state_of(folder):
    [found] = find_runs(folder)
    return found.state, found.note


def test_states_follow_from_the_images_seen_and_the_log_of_the_last_start(tmp_path):
    stopped = "Stopped at 50 kimg, saved in training-state-000050.pt: continue with --resume=auto\n"
    error = "Error: 101 steps in a row had a loss that is not finite\n"
    again = "Run directory  again\n"
    assert state_of(write_run(tmp_path / "a", 100.0)) == ("finished", "")
    assert state_of(write_run(tmp_path / "b", log=stopped)) == ("stopped", "")
    assert state_of(write_run(tmp_path / "c", log=error)) == ("failed", error[7:].strip())
    assert state_of(write_run(tmp_path / "d", log=error + again + stopped)) == ("stopped", "")
    state, note = state_of(write_run(tmp_path / "e", log=stopped + again + "tick 9\n"))
    assert state == "failed" and "killed" in note
    assert state_of(write_run(tmp_path / "f", 100.0, log=error))[0] == "finished"
    records = write_run(tmp_path / "g")
    for name in ("log.txt", "stats.jsonl"):
        (records / name).unlink(missing_ok=True)
    assert state_of(records) == ("unknown", "has no log.txt and no stats.jsonl")
    damaged = write_run(tmp_path / "h", log=stopped)
    (damaged / "training_options.json").write_text('{"options": {"dura')
    assert state_of(damaged) == ("stopped", "training_options.json is empty or damaged")


def test_a_run_is_running_while_another_process_holds_its_lock(tmp_path, invoke):
    folder = write_run(tmp_path / "run")
    code = ("import sys; from dnnlib.run_lock import run_lock\n"
            "with run_lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()")
    owner = subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == "held\n"
    state, note = state_of(folder)
    assert state == "running" and f"process {owner.pid} on " in note
    [found] = find_runs(folder)
    assert found.seconds_left == 50e3 / 500  # 50 of 100 kimg, at 2 s per kimg
    assert "1m 40s" in invoke(runs.main, str(folder)).stdout
    assert found.to_dict()["seconds_left"] == 100
    owner.communicate("")
    assert state_of(folder)[0] == "failed" and find_runs(folder)[0].seconds_left is None
    assert (folder / ".lock").exists() and lock_holder(folder) is None
    with run_lock(folder):  # looking took no lock
        pass
    assert lock_holder(tmp_path) is None


@pytest.mark.parametrize("latest, best, shown", [
    ({"value": 20.0, "num_steps": 2}, (20.0, 40), "FID 20 @40, 2 steps, 459 images"),
    ({"value": 25.0, "num_steps": 1}, (25.0, 40), "FID 25 @40, 1 step, 459 images"),
    ({"value": 30.0, "num_steps": 4}, (12.0, 30), "FID 12 @30, 4 steps, 459 images"),
    ({"value": 9.0, "num_steps": 4, "num": 1000}, (9.0, 40), "FID 9 @40, 4 steps, 1,000 images"),
    ({"value": 31.0, "num_steps": 4, "reference": "other"}, (31.0, 40), "FID 31 @40, 4 steps"),
    ({"value": 32.0, "num_steps": 4, "solver": "ipndm"}, (32.0, 40), "FID 32 @40, 4 steps")],
    ids=str)
def test_the_best_score_is_of_those_made_as_the_latest_was(tmp_path, invoke, latest, best, shown):
    def line(value, kimg, num_steps, num=459, reference="ref", solver="heun"):
        return {"metric": "fid", "value": value, "kimg": kimg, "num": num, "reference": reference,
                "sampler": {"num_steps": num_steps, "solver": solver}}
    scores = [line(12.0, 30, 4), line(3.0, 20, 2, num=10), line(5.0, 30, 8), line(33.0, 35, 4)]
    folder = write_run(tmp_path / "run", scores=[*scores, line(kimg=40, **latest)])
    [found] = find_runs(folder)
    assert (found.score.value, found.score.kimg) == best
    assert f" {shown}" in invoke(runs.main, tmp_path).output


def test_the_best_score_is_the_lowest_of_as_many_images_as_the_latest(tmp_path, invoke):
    scores = [{"metric": "fid", "value": value, "num": num, "kimg": kimg,
               "sampler": {"num_steps": 18}}
              for value, num, kimg in ((1.5, 100, 10), (3.0, 50000, 20), (2.5, 50000, 30),
                                       (4.0, 50000, 40))]
    scores.append({"metric": "kid", "value": 0.1, "num": 50000})
    folder = write_run(tmp_path / "run", scores=scores, pfgmpp=True, aug_dim=2048,
                       preset="cifar10-cond")
    [found] = find_runs(folder)
    assert (found.score.value, found.score.kimg) == (2.5, 30)
    assert (found.D, found.preset, found.kimg, found.total_kimg) == (2048, "cifar10-cond", 50, 100)
    assert (found.loss, found.images_per_sec) == (0.5, 500)
    assert " FID 2.5 @30, 18 steps, 50,000 images " in invoke(runs.main, tmp_path).output


def test_the_best_score_is_never_one_of_classes_or_their_mean(tmp_path, invoke):
    def line(value, **of_class):
        return {"metric": "fid", "value": value, "kimg": 50, "num": 100,
                "sampler": {"num_steps": 18}, **of_class}
    write_run(tmp_path / "run", scores=[
        line(30.0), *(line(value, of_class=k) for k, value in ((0, 20.0), (1, 22.0))),
        line(21.0, of_class="mean")])
    [found] = find_runs(tmp_path / "run")
    assert found.score.value == 30
    assert " FID 30 @50, 18 steps, 100 images" in invoke(runs.main, tmp_path).output


def test_where_no_run_has_been_yet_is_one_line(tmp_path, invoke):
    result = invoke(runs.main, tmp_path / "none")
    assert result.exit_code == 1 and "no such folder; give the folder" in result.output


def test_thousands_of_images_are_never_shortened(tmp_path, invoke):
    write_run(tmp_path / "run", 123456.789, duration=200)
    assert " 123456.789/200000 " in invoke(runs.main, tmp_path).output


def test_runs_are_found_in_folders_of_folders_and_listed_by_name(tmp_path, invoke):
    write_run(tmp_path / "study/D-inf", 100.0)
    write_run(tmp_path / "alone", pfgmpp=True, aug_dim=0.5)
    (tmp_path / "study/notes").mkdir()
    result = invoke(runs.main, tmp_path)
    assert result.exit_code == 0, result.output
    header, first, second = result.output.splitlines()
    assert header.split()[:2] == ["run", "state"] and "preset" not in header
    assert first.startswith("alone ") and " 50/100 " in first and " 0.5 " in first
    assert second.startswith("study/D-inf  finished") and " inf " in second
    listed = json.loads(invoke(runs.main, tmp_path, "--json").output)
    assert [run["name"] for run in listed] == ["alone", "study/D-inf"]
    assert listed[1]["D"] == "inf" and listed[0]["score"] is None


@pytest.mark.parametrize("damage", [
    "", "{", '{"options": 3}', '{"options": {"duration": "x"}}', '{"options": [], "a": {}}',
    '{"options": {"duration": Infinity, "preset": {}, "pfgmpp": 3}}'])
def test_damaged_runs_are_listed_too(damage, tmp_path, invoke):
    folder = write_run(tmp_path / "run")
    (folder / "training_options.json").write_text(damage)
    (folder / "stats.jsonl").write_bytes(b"\xff\n{\n")
    (folder / "log.txt").unlink()
    assert invoke(runs.main, tmp_path).exit_code == 0
    [found] = find_runs(tmp_path)
    assert (found.name, found.state, found.kimg, found.total_kimg) == ("run", "failed", 0, None)


def test_a_folder_without_runs_gets_one_line(tmp_path, invoke):
    result = invoke(runs.main, tmp_path)
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "no runs" in result.output and str(tmp_path) in result.output
    assert json.loads(invoke(runs.main, tmp_path, "--json").output) == []
    result = invoke(runs.main, tmp_path / "nowhere")
    assert result.exit_code == 1 and result.output.startswith("Error: ")


@pytest.mark.long
def test_a_real_run_is_finished_and_a_longer_one_of_its_name_is_not(dataset_zip, tmp_path, invoke):
    args = [f"--outdir={tmp_path}", "--name=run", f"--data={dataset_zip}", *TINY_RUN]
    assert invoke(train.main, *args, "--duration=0.000016", "--tick=0.008").exit_code == 0
    assert state_of(tmp_path) == ("finished", "")
    options = json.loads((tmp_path / "run/training_options.json").read_text())
    options["options"]["duration"] = 1
    (tmp_path / "run/training_options.json").write_text(json.dumps(options))
    assert state_of(tmp_path)[0] == "failed"


def test_listing_needs_no_torch(tmp_path):
    write_run(tmp_path / "run")
    code = ("import sys, runs; runs.main([sys.argv[1]], standalone_mode=False); "
            "assert not {'torch', 'scipy'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True,
                          capture_output=True, timeout=HANG_SEC)
    assert done.returncode == 0, done.stderr
