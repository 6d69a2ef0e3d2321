"""sweep.py: the study through the real commands, what is not done again, what is refused early."""

import dataclasses
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from run_dirs import score_line, tick, write_lines, write_picture, write_run
from scripts import run_script
from snapshots import write_snapshot
from tiny import TINY_NETWORK, write_dataset

import dataset_tool
import fid
import sweep
from checkpoints import checkpoint
from pfgmpp.samplers import SamplerConfig
from reports import study as study_module
from reports.run_record import RunRecord
from reports.study import Study, _is_trained, network_of, report_step

STUDY = Study(ref="ref.npz", metrics="fid", detector="inception", detector_name="inception",
              seeds=(0, 1, 2), ranges=3, base_steps=18, alpha=(0.0, 0.1), steps=(10, 18), bits=(5,),
              images=2, device="cpu")


@pytest.fixture(autouse=True)
def weights_of_empty_files(monkeypatch):
    """Empty files of networks have the weights that scores of run_dirs.py record."""
    real = study_module._weights_of
    monkeypatch.setattr(study_module, "_weights_of",
                        lambda path, *stamp: real(path, *stamp) if stamp[0] else "ab")


@pytest.fixture
def run_dir(tmp_path):
    run = write_run(tmp_path / "run", seeds=())
    (run / "network-snapshot-000200.pt").touch()
    return run


def words_of(run_dir, study=STUDY):
    """Returns what each step of a run does, by the end of its title."""
    return {step.title.split()[-1]: step.words() for step in study.steps_of(run_dir)}


def write_scores(run_dir, *lines):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_settings_are_scored_one_at_a_time(run_dir):
    words = words_of(run_dir)
    assert list(words) == ["scores", "alpha", "steps", "bits", "images"]
    network = run_dir / "network-snapshot-000200.pt"
    common = ["fid.py", "gen", f"--network={network}", "--ref=ref.npz", "--metrics=fid",
              "--detector=inception", "--device=cpu", "--seeds=0-2"]
    assert words["scores"] == [*common, "--steps=18", "--ranges=3"]
    assert words["alpha"] == [*common, "--steps=18", "--alpha=0,0.1"]
    assert words["steps"] == [*common, "--steps=10,18"]
    assert words["bits"] == [*common, "--steps=18", "--bits=5"]
    assert words["images"] == [
        "generate.py", f"--network={network}", f"--outdir={run_dir}/report_ckpt_000200",
        "--subdirs", "--seeds=0-1", "--steps=18", "--device=cpu"]


def test_what_is_scored_is_left_out(run_dir):
    write_scores(run_dir, score_line(128, 1, "0-2"), score_line(128, 1, "0-2", num_steps=10),
                 score_line(128, 1, "0-2", bits=5))
    words = words_of(run_dir)
    assert words["steps"] is None and words["bits"] is None
    assert words["alpha"][-1] == "--alpha=0.1"
    assert words["scores"][-3:] == ["--seeds=3-5", "--steps=18", "--ranges=2"]


@pytest.mark.parametrize("change", [
    {"seeds": "0-3"}, {"reference": "other"}, {"detector": "pixels"}, {"metric": "kid"},
    {"network": "network-snapshot-000100.pt"},
    {"sampler": score_line(128, 1, guidance=2)["sampler"]}])
def test_scores_by_other_settings_do_not_count(run_dir, change):
    study = dataclasses.replace(STUDY, ranges=1)
    write_scores(run_dir, score_line(128, 1, "0-2"))
    assert words_of(run_dir, study)["scores"] is None
    write_scores(run_dir, {**score_line(128, 1, "0-2"), **change})
    assert words_of(run_dir, study)["scores"] is not None


@pytest.mark.parametrize("method, flags, recorded", [
    ({"solver": "ipndm"}, ["--solver=ipndm"], {"solver": "ipndm"}),
    ({"solver": "ipndm", "order": 2}, ["--solver=ipndm", "--order=2"],
     {"solver": "ipndm", "order": 2}),
    ({"solver": "ipndm", "order": 3}, ["--solver=ipndm"], {"solver": "ipndm", "order": 3}),
    ({"solver": "heun"}, [], {"solver": None}), ({}, [], {"solver": "heun"})])
def test_a_study_by_another_solver_has_scores_of_its_own(run_dir, method, flags, recorded):
    study = dataclasses.replace(STUDY, ranges=1, alpha=None, steps=None, bits=None, **method)
    other = dataclasses.replace(study, solver="unipc", order=None)
    words = words_of(run_dir, study)
    assert words["scores"][-len(flags) - 2:-2] == flags or not flags
    assert [word for word in words["images"] if word.startswith(("--solver", "--order"))] == flags
    write_scores(run_dir, {**score_line(128, 1, "0-2", **recorded)})
    assert words_of(run_dir, study)["scores"] is None
    assert words_of(run_dir, other)["scores"] is not None


@pytest.mark.parametrize("point", [{"noise_alpha": 0.1}, {"num_steps": 10}, {"bits": 5}])
def test_scores_around_the_default_point_are_not_scores_of_it(run_dir, point):
    write_scores(run_dir, score_line(128, 1, "0-2", **point))
    assert words_of(run_dir, dataclasses.replace(STUDY, ranges=1))["scores"] is not None


def test_every_metric_must_be_there(run_dir):
    study = dataclasses.replace(STUDY, ranges=1, metrics="fid,kid")
    write_scores(run_dir, score_line(128, 1, "0-2"))
    assert words_of(run_dir, study)["scores"] is not None
    write_scores(run_dir, score_line(128, 1, "0-2"), score_line(128, 1, "0-2", metric="kid"))
    assert words_of(run_dir, study)["scores"] is None


def test_a_run_is_trained_when_its_last_network_is_there(tmp_path):
    asked = {"duration": 0.003, "batch": 32, "cres": None}
    assert not _is_trained(tmp_path / "none", asked)
    run = write_run(tmp_path / "run", cres=None)  # of 3 kimg
    assert not _is_trained(run, asked)
    (run / "network-snapshot-000002.pt").touch()
    assert not _is_trained(run, asked)
    (run / "network-snapshot-000003.pt").touch()
    assert _is_trained(run, asked)
    assert not _is_trained(run, {**asked, "duration": 0.0031})
    (run / "training_options.json").write_text(json.dumps({"options": {"sigma_data": 0.75}}))
    assert _is_trained(run, {**asked, "sigma_data": None}), "auto has measured the number"
    with pytest.raises(ValueError, match="sigma_data = 0.75, but sigma_data = 0.5 was given"):
        _is_trained(run, {**asked, "sigma_data": 0.5})
    run = write_run(tmp_path / "other", cres=None)
    with pytest.raises(ValueError, match="was begun with batch = 32, but batch = 64 was given"):
        _is_trained(run, {**asked, "batch": 64})


def test_the_report_is_written_again_only_for_newer_files(run_dir, tmp_path):
    out = tmp_path / "report.html"
    assert report_step(out, [run_dir]).words() == ["report.py", str(run_dir), f"--out={out}"]
    out.touch()
    assert report_step(out, [run_dir]).words() is None
    write_scores(run_dir, score_line(128, 1))
    # Later by more than file systems tell apart: many count in ticks, some in seconds.
    later = out.stat().st_mtime + 2
    os.utime(run_dir / "metrics.jsonl", (later, later))
    assert report_step(out, [run_dir]).words() is not None


def test_a_network_that_is_not_there_yet_has_a_stand_in(tmp_path):
    assert network_of(tmp_path)[0].name == "network-snapshot-NNNNNN.pt"


@pytest.mark.parametrize("args, words", [
    ([], "give --data and --aug_dims to train, or --runs"),
    (["--aug_dims=2"], "give --data and --aug_dims to train, or --runs"),
    (["--data=DATA", "--aug_dims=0,inf"], "--aug_dims=0,inf: must be numbers above 0 or inf"),
    (["--data=DATA", "--aug_dims=2", "--", "--pfgmpp=1"], "--pfgmpp=1: can't be given"),
    (["--data=DATA", "--aug_dims=2", "--", "--no=1"], "No such option"),
    (["--data=DATA", "--aug_dims=2", "--cbase=16"], "give options of train.py after '--'"),
    (["--data=DATA", "--aug_dims=2", "--solver=ipndm", "--alpha=0,0.1"],
     "--alpha=0.1: --solver=ipndm uses earlier steps"),
    (["--data=DATA", "--aug_dims=2", "--order=2"], "--order=2: only ipndm has orders"),
    (["--data=DATA", "--aug_dims=2", "--train-seeds=0,1", "--", "--seed=3"],
     "--seed: can't be given with --train-seeds"),
    (["--runs=none", "--ref=DATA", "--train-seeds=0,1"], "--train-seeds: with --runs nothing"),
    (["--data=DATA", "--aug_dims=2", "--rounding-seeds=0,1"], "--rounding-seeds: needs --bits"),
    (["--data=DATA", "--aug_dims=2", "--detector=pixels", "--likelihood=4"],
     "--likelihood and --val-data: give both or neither"),
    (["--data=DATA", "--aug_dims=2", "--detector=pixels", "--likelihood=4", "--val-data=none"],
     "none"),
    (["--data=DATA", "--aug_dims=2", "--detector=pixels", "--likelihood=4", "--val-data=DATA"],
     "itself, so nothing is held out"),
    (["--data=DATA", "--aug_dims=2", "--rate=nan", "-n"], "nan is not a finite number"),
    (["--data=DATA", "--aug_dims=2", "--bits=4", "--rounding-seeds=4294967296"], "4294967296"),
    (["--data=DATA", "--aug_dims=2", "--metrics=nice"], "'nice': must be a list of fid"),
    (["--data=DATA", "--aug_dims=2", "--detector=nice"], "detector 'nice': must be"),
    (["--data=DATA", "--aug_dims=2", "--ref=none.npz"], "none.npz: no such file or folder"),
    (["--runs=none"], "--ref: needed with --runs"),
    (["--runs=none", "--ref=DATA"], "--runs: none holds no network-snapshot"),
    (["--runs=none", "--ref=DATA", "--", "--lr=1"], "with --runs nothing is trained")])
def test_mistakes_get_one_line_before_anything_starts(args, words, dataset_zip, tmp_path, invoke):
    args = [arg.replace("DATA", str(dataset_zip)) for arg in args]
    done = invoke(sweep.main, f"--outdir={tmp_path / 'runs'}", *args)
    assert done.exit_code in (1, 2) and words in done.output, done.output
    assert "[1/" not in done.output and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("make, words", [
    (lambda path: write_dataset(path, side=4), "its images are 3x4x4, but those of"),
    (lambda path: write_dataset(path, num=10, classes=0), "has no classes"),
    (lambda path: write_dataset(path, num=10, classes=3), "has 3 classes, but --data="),
    (lambda path: write_dataset(path, num=10), None)], ids=["size", "no", "more", "good"])
def test_held_out_images_that_do_not_fit_are_refused_before_training(make, words, dataset_zip,
                                                                    tmp_path, invoke):
    make(tmp_path / "val.zip")
    done = invoke(sweep.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", "--aug_dims=2",
                  "--detector=pixels", "--likelihood=4", f"--val-data={tmp_path / 'val.zip'}", "-n",
                  "--", "--cond=1")
    assert done.exit_code == (1 if words else 0), done.output
    assert words is None or f"val.zip: {words}" in done.output


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_what_the_report_needs_is_asked_for_before_anything_starts(package, dataset_zip, tmp_path,
                                                                   invoke, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec",
                        lambda name, *args: None if name == package else find_spec(name, *args))
    args = [f"--outdir={tmp_path}", f"--data={dataset_zip}", "--aug_dims=2"]
    done = invoke(sweep.main, *args)
    assert done.exit_code == 1 and done.output == (
        f"Error: the report at the end needs {package}, which is not installed: "
        f"pip install {package}\n")
    assert invoke(sweep.main, *args, "--dry-run").exit_code == 0


@pytest.mark.parametrize("of", ["few-step", "denoiser", "training"])
@pytest.mark.parametrize("flags, of_few_step, of_denoiser", [
    (["--solver=heun"], "--solver=heun: ", None), (["--solver=euler"], "--solver=euler: ", None),
    (["--solver=ipndm", "--order=2"], "--solver=ipndm: ", None),
    (["--solver=consistency"], None, "--solver=consistency: "), ([], None, None),
    (["--alpha=0.1"], "--alpha: ", None), (["--steps=2,65"], "--steps=65: ", None),
    (["--base-steps=65", "--steps=2"], "--base-steps=65: ", None)], ids=str)
def test_what_can_not_sample_a_network_is_refused_before_anything_starts(
        flags, of_few_step, of_denoiser, of, dataset_zip, tmp_path, invoke):
    run = write_run(tmp_path / "run")
    (run / "network-snapshot-000200.pt").touch()
    if of == "few-step":
        path = run / "training_options.json"
        record = json.loads(path.read_text())
        network = {"few_step": {"method": "cd", "levels": [80.0, 0.821]}}
        path.write_text(json.dumps(record | {"network": network}))
    what = [f"--data={dataset_zip}", "--aug_dims=2"] if of == "training" else [
        f"--runs={run}", f"--ref={dataset_zip}"]
    result = invoke(sweep.main, *what, f"--outdir={tmp_path}", "--detector=pixels", "--dry-run",
                    *flags)
    error = of_few_step if of == "few-step" else of_denoiser
    assert result.exit_code == (2 if error else 0), result.output
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert [line.startswith(f"Error: {error}") for line in lines] == [True] * bool(error)


def test_the_first_failing_step_stops_the_study(dataset_zip, tmp_path, invoke, monkeypatch):
    calls = []
    monkeypatch.setattr(sweep, "_run_script", lambda command: calls.append(command) or 3)
    done = invoke(sweep.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", "--aug_dims=2,inf",
                  "--detector=pixels", "--nproc=2", "--", "--seed=5")
    assert done.exit_code == 3 and len(calls) == 1
    assert "step 1 of 7 (tiny-D2: training) failed with exit code 3; run the same" in done.output
    assert calls[0][:6] == [sys.executable, "-m", "torch.distributed.run", "--standalone",
                            "--nproc_per_node=2", "--"]
    assert {"--seed=5", "--pfgmpp=1", "--aug_dim=2", "--resume=auto"} <= set(calls[0])


def test_every_training_seed_is_a_run_of_its_own(dataset_zip, tmp_path, invoke):
    done = invoke(sweep.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", "--aug_dims=2,inf",
                  "--train-seeds=0,7", "--detector=pixels", "--images=0", "-n")
    assert done.exit_code == 0, done.output
    commands = [line.split() for line in done.output.splitlines() if "train.py" in line]
    names = [f"tiny-D{D}-seed{seed}" for seed in (0, 7) for D in ("2", "inf")]
    for name, words in zip(names, commands, strict=True):
        assert {f"--name={name}", f"--seed={name[-1]}"} <= set(words)
        assert ("--pfgmpp=0" in words) == ("Dinf" in name)
    report = next(line for line in done.output.splitlines() if "report.py" in line)
    assert [report.count(name) for name in names] == [1] * 4


def test_every_rounding_seed_is_a_score_of_its_own(run_dir):
    study = dataclasses.replace(STUDY, bits=(4, 5), rounding_seeds=(0, 1))
    write_scores(run_dir, score_line(128, 1, "0-2", bits=4), score_line(128, 1, "0-2", bits=5),
                 score_line(128, 1, "0-2", bits=4, rounding_seed=1))
    words = {step.title: step.words() for step in study.steps_of(run_dir) if "bits" in step.title}
    assert [words[title][-2:] for title in ("run: bits, rounding seed 0",
                                            "run: bits, rounding seed 1")] == [
        ["--rounding-seed=0", "--bits=4,5"], ["--rounding-seed=1", "--bits=5"]]
    assert words_of(run_dir)["bits"] is None  # to the nearest level
    whole = dataclasses.replace(STUDY, bits=(32,), rounding_seeds=(0,))
    assert words_of(run_dir, whole)["0"] is None, "32 bits are not rounded"


def test_likelihoods_are_measured_once_for_each_network(run_dir):
    study = dataclasses.replace(STUDY, likelihood=50, val_data="val.zip")
    line = score_line(128, 1, seeds="", num=50, metric="bits_per_dim", num_steps=32, probes=1,
                      seed=0, cond=True, dequantize="uniform") | {"reference": "val.zip"}
    assert words_of(run_dir, study)["likelihood"] == [
        "likelihood.py", f"--network={run_dir}/network-snapshot-000200.pt", "--data=val.zip",
        "--count=50", "--device=cpu"]
    for change in ({"num": 49}, {"reference": "train.zip"}, {"metric": "fid"},
                   {"network": "network-snapshot-000100.pt"},
                   *({"sampler": line["sampler"] | change} for change in (
                       {"weights": "other"}, {"num_steps": 4}, {"seed": 7}, {"probes": 2},
                       {"cond": False}))):
        write_scores(run_dir, line | change)
        assert words_of(run_dir, study)["likelihood"] is not None
    write_scores(run_dir, line)
    assert words_of(run_dir, study)["likelihood"] is None


@pytest.mark.parametrize("solver", [None, "heun", "ppfm", "ipndm"])
def test_evaluations_that_are_left_are_those_that_the_sampler_makes(run_dir, solver):
    """By the number of evaluations that the solvers themselves tell."""
    study = dataclasses.replace(STUDY, solver=solver, alpha=None if solver == "ipndm" else (0, .1))
    one = {n: SamplerConfig(num_steps=n, solver=solver or "heun").nfe for n in (10, 18)}
    left = {step.title.split()[-1]: step.evaluations(step.words())
            for step in study.steps_of(run_dir)}
    expected = {"scores": 3 * 3 * one[18], "alpha": 3 * 2 * one[18],
                "steps": 3 * (one[10] + one[18]), "bits": 3 * one[18], "images": 2 * one[18]}
    assert left == {title: number for title, number in expected.items() if title in left}
    assert set(expected) - set(left) == ({"alpha"} if solver == "ipndm" else set())


def test_a_dry_run_tells_images_bytes_and_hours(dataset_zip, tmp_path, invoke):
    args = [f"--outdir={tmp_path}", f"--data={dataset_zip}", "--aug_dims=2,inf", "-n",
            "--train-seeds=0,1", "--detector=pixels", "--seeds=0-9", "--images=0"]
    network = [*TINY_NETWORK, "--batch=8", "--duration=0.001", "--samples=0", "--tick=1"]
    said = invoke(sweep.main, *args, "--rate=100", "--", *network).stdout
    assert "4 networks of" in said and "4,000 images in total" in said
    assert f"{4 * 10 * 35:,} network evaluations" in said
    # 40 s of training, and evaluations about three times as fast as steps of training.
    assert re.search(r"Time       4[3-6]s at 100 images/s in training", said), said
    assert "Time       unknown; give --rate" in invoke(sweep.main, *args, "--", *network).stdout
    run = write_run(tmp_path / "tiny-D2-seed0", 2, seeds=())  # of 500 images a second
    (run / "training_options.json").write_text('{"options": {}}')
    said = invoke(sweep.main, *args, "--", *network).stdout
    assert "at 500 images/s in training" in said


@pytest.mark.long
def test_the_bytes_that_a_dry_run_tells_are_those_that_runs_take(dataset_zip, tmp_path, invoke,
                                                                monkeypatch):
    monkeypatch.setattr(sweep, "_run_script", in_this_process)
    args = study_args(tmp_path, dataset_zip)
    said = invoke(sweep.main, "-n", *args).stdout
    number, unit = re.search(r"Disk       ([\d.]+) ([kM])B", said).groups()
    told = float(number) * {"k": 1e3, "M": 1e6}[unit]
    assert invoke(sweep.main, *args).exit_code == 0
    files = list(tmp_path.glob("toy-D*/*.pt"))
    taken = sum(path.stat().st_size for path in files)
    assert told <= taken < told + 1e5 * len(files)  # a file has names beside its tensors


def study_args(outdir, data):
    return [f"--outdir={outdir}", f"--data={data}", "--aug_dims=2,inf", "--name=toy",
            "--detector=pixels", "--seeds=0-3", "--base-steps=2", "--alpha=0.1", "--steps=3",
            "--images=2", "--device=cpu", "--", *TINY_NETWORK, "--batch=8", "--duration=0.000016",
            "--tick=0.008", "--workers=0", "--samples=0"]


def check_study(outdir, first, second):
    """Checks what two calls of the same study print and leave."""
    titles = [*(f"toy-D{D}: training" for D in ("2", "inf")),
              *(f"toy-D{D}: {what}" for D in ("2", "inf")
                for what in ("scores", "alpha", "steps", "images")), "report"]
    assert re.findall(r"^\[.*", first, re.M) == [
        f"[{i}/11] {title}" for i, title in enumerate(titles, 1)]
    for D, expected in (("2", 2.0), ("inf", "inf")):
        lines = (outdir / f"toy-D{D}/metrics.jsonl").read_text().splitlines()
        points = [{key: json.loads(line)["sampler"].get(key) for key in
                   ("D", "num_steps", "noise_alpha")} for line in lines]
        assert points == [{"D": expected, "num_steps": n, "noise_alpha": a}
                          for n, a in ((2, None), (2, 0.1), (3, None))]
    page = (outdir / "report.html").read_text(encoding="utf-8")
    titles_of_plots = set(re.findall("<h4>(.*?)<", page))
    assert {"Over D", "Noise before each step", "Steps"} <= titles_of_plots
    assert page.count("seed 1") == 2
    assert second.splitlines() == [f"[{i}/11] {title}: already done"
                                   for i, title in enumerate(titles, 1)]


def in_this_process(command):
    """Returns the exit code of a script that sweep.py would start."""
    script = importlib.import_module(Path(command[1]).stem)
    return CliRunner().invoke(script.main, command[2:]).exit_code


@pytest.mark.slow
@pytest.mark.long
def test_a_study_runs_and_a_second_call_does_nothing_again(dataset_zip, tmp_path, invoke,
                                                           monkeypatch):
    monkeypatch.setattr(sweep, "_run_script", in_this_process)
    first, second = (invoke(sweep.main, *study_args(tmp_path, dataset_zip)) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output
    check_study(tmp_path, first.output, second.output)


@pytest.mark.slow
@pytest.mark.scripts
def test_a_study_runs_as_users_start_it(dataset_zip, tmp_path):
    args = ["sweep.py", *study_args(tmp_path, dataset_zip)]
    check_study(tmp_path, run_script(*args).stdout, run_script(*args).stdout)


def test_images_are_made_until_all_are_there(tmp_path):
    study = dataclasses.replace(STUDY, images=3)
    write_run(tmp_path / "a", seeds=())
    (tmp_path / "a/network-snapshot-000200.pt").write_bytes(b"")
    folder = tmp_path / "a/report_ckpt_000200"
    for seed in range(3):
        assert study._image_words(tmp_path / "a"), f"{seed} of 3 are there"
        write_picture(folder / f"000000/{seed:06d}.png")
    assert study._image_words(tmp_path / "a"), "of unknown making"
    (folder / "generate.json").write_text('{"weights": "ab"}')
    assert study._image_words(tmp_path / "a") is None
    (folder / "000000/000001.png").rename(folder / "000000/000001.npy")
    assert study._image_words(tmp_path / "a") is None
    (folder / "generate.json").write_text('{"weights": "other"}')
    with pytest.raises(ValueError, match="images of another network called network-snapshot-0002"):
        study._image_words(tmp_path / "a")
    assert [kimg for kimg in [RunRecord.read(tmp_path / "a").sample_folder.kimg]] == [200]


def test_another_network_under_the_same_name_is_scored_again(run_dir):
    network = run_dir / "network-snapshot-000200.pt"
    digests = []
    for seed in (0, 1):
        write_snapshot(network, seed=seed)
        digests.append(checkpoint.digest(checkpoint.load(network)["ema"]))
        write_scores(run_dir, score_line(128, 1, "0-2", num_steps=10, weights=digests[0]),
                     score_line(128, 1, "0-2", weights=digests[0]))
        assert (words_of(run_dir)["steps"] is None) == (seed == 0)
    assert digests[0] != digests[1]


@pytest.mark.parametrize("lsun, settings, is_scored", [
    (False, {"scale": {"center": [0.5], "spread": [2.0]}}, True),
    (True, {"sigma_max": 380.0}, True), (False, {"sigma_max": 380.0}, False),
    (True, {"sigma_max": 200.0}, False),
    (False, {"empty_classes": 2}, True), (True, {}, True)])
def test_scores_of_networks_of_other_data_count(lsun, settings, is_scored, tmp_path):
    run = write_run(tmp_path / "run", seeds=(), lsun=lsun)
    (run / "network-snapshot-000200.pt").touch()
    write_scores(run, score_line(128, 1, "0-2", bits=5, **settings))
    assert (words_of(run)["bits"] is None) == is_scored


@pytest.mark.parametrize("args, words", [
    (["--detector=pixels", "--ref=SMALL"], "its images are 4x4, but those of"),
    (["--detector=pixels", "--ref=REF", "--metrics=kid"], "holds no features, which --metrics=kid"),
    (["--detector=inception", "--ref=REF"], "made with the detector pixels; give"),
    (["--detector=pixels", "--data=FLOATS"], "has another scale than the images of"),
    (["--detector=inception", "--data=FLOATS", "--ref=FLOATS"], "8-bit"),
    (["--detector=pixels", "--metrics=is"], "has no classes"),
    (["--detector=pixels", "--seeds=0"], "at least 2 needed"),
    (["--detector=pixels", "--data=VECTORS", "--ref=VECTORS", "--", "--cond=1"], "label vectors"),
    (["--detector=pixels", "--", "--cond-image=1"], "networks with condition images"),
    (["--detector=pixels", "--report=."], "--report=.: . is a folder"),
    (["--detector=pixels", "--report=REF/x.html"], "ref.npz is a file")])
def test_scoring_that_could_never_work_is_refused_before_training(args, words, dataset_zip,
                                                                 tmp_path, invoke):
    write_dataset(tmp_path / "small.zip", side=4)
    invoke(fid.main, "ref", f"--data={dataset_zip}", f"--dest={tmp_path / 'ref.npz'}",
           "--detector=pixels", "--device=cpu")
    values = np.random.default_rng(0).normal(size=[8, 8, 8]).astype(np.float32)
    np.save(tmp_path / "floats.npy", values)
    invoke(dataset_tool.main, f"--source={tmp_path / 'floats.npy'}", "--scale=-1,1",
           f"--dest={tmp_path / 'floats.zip'}", "--workers=1")
    write_dataset(tmp_path / "vectors.zip", vectors=True)
    for name, file in {"SMALL": "small.zip", "REF": "ref.npz", "FLOATS": "floats.zip",
                       "VECTORS": "vectors.zip"}.items():
        args = [arg.replace(name, str(tmp_path / file)) for arg in args]
    result = invoke(sweep.main, f"--data={dataset_zip}", f"--ref={dataset_zip}",
                    f"--outdir={tmp_path / 'runs'}", "--aug_dims=2", "-n", *args)
    assert result.exit_code == 1 and words in result.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kimg, tag, finished", [
    (20.48, "000020", True), (20.48, "000019", False), (0.512, "000000.512", True),
    (0.512, "000000.256", False)])
def test_a_run_is_trained_when_its_last_network_is_written(tmp_path, kimg, tag, finished):
    write_run(tmp_path / "a", seeds=(), duration=kimg / 1e3)
    write_lines(tmp_path / "a/stats.jsonl", [tick(kimg)])
    (tmp_path / f"a/network-snapshot-{tag}.pt").write_bytes(b"")
    assert _is_trained(tmp_path / "a", {"duration": kimg / 1e3}) is finished
