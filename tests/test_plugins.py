"""--plugin: what a file adds decides what is computed; which files are refused, and when."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from plugin_files import PARTS, forget, parts_of_extending, registries_kept
from scripts import run_script
from snapshots import write_snapshot
from tiny import TINY_RUN

import distill
import fid
import generate
import likelihood
import sweep
import train
from dnnlib.plugins import load_plugin
from dnnlib.registry import Registry, names_of, takes_keyword
from metrics.evaluator import check_classifies
from pfgmpp import load
from pfgmpp.solvers import SOLVERS, euler, heun, num_evaluations

RUN = [*TINY_RUN, "--device=cpu", "--tick=0.008", "--duration=0.000024"]
CONV = [*[word for word in RUN if not re.match("--(cbase|cres|nblock|arch)=", word)],
        "--dropout=0", "--augment=0"]
STATE = "training-state-000000.024.pt"

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _parts_are_taken_back():
    with registries_kept():
        forget()  # what the modules of other tests have added
        yield


@pytest.fixture
def plugin(tmp_path):
    return write(tmp_path / "parts.py")


def write(path, text=PARTS):
    path.write_text(text)
    return path


@pytest.fixture
def run(invoke, tmp_path, dataset_zip):
    """Trains a run of this name; returns its state at 24 images, or its output if it `fails`."""
    def call(name, *words, options=RUN, fails=False):
        done = invoke(train.main, f"--outdir={tmp_path}", f"--name={name}",
                      f"--data={dataset_zip}", *options, *words)
        if fails:
            assert done.exit_code in (1, 2), done.output
            return done.output
        assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
        state = tmp_path / name / STATE
        return torch.load(state, weights_only=True) if state.exists() else None
    return call


def is_same(a, b):
    """Says whether the weights, averages and moments of two states are the same, to the bit."""
    names = [[*state["net"]] for state in (a, b)]
    moments = [state["optimizer"]["state"] for state in (a, b)]
    return names[0] == names[1] and all(
        torch.equal(x[name], y[name]) for part in ("net", "ema") for x, y in [(a[part], b[part])]
        for name in x) and all(torch.equal(moments[0][k][name], moments[1][k][name])
                               for k in moments[0] for name in ("exp_avg", "exp_avg_sq"))


# ------------------------------------------------------------------------------------ training


def test_a_loss_decides_the_training(run, plugin):
    usual = run("usual")
    assert is_same(run("twin", f"--plugin={plugin}", "--loss=twin"), usual)
    higher = run("higher", f"--plugin={plugin}", "--loss=higher")
    assert is_same(higher, run("by_flag", "--P_mean=-0.2")) and not is_same(higher, usual)


def test_a_loss_of_ours_can_be_named_for_another_preconditioner(run):
    usual, named = run("usual"), run("named", "--loss=edm")
    other = run("other", "--loss=ve")
    assert is_same(usual, named) and not is_same(usual, other)
    assert other["network"]["class_name"] == "EDMPrecond" and other["options"]["loss"] == "ve"


def test_a_preconditioner_decides_the_training_and_has_the_loss_of_edm(
        run, plugin, invoke, tmp_path):
    twin = run("twin", f"--plugin={plugin}", "--precond=TwinPrecond", "--sigma-data=0.3")
    assert is_same(twin, run("usual", "--sigma-data=0.3"))
    assert twin["network"]["class_name"] == "TwinPrecond"
    assert not is_same(twin, run("default"))
    made = [pictures(invoke, tmp_path / name, tmp_path / f"by_{name}", f"--plugin={plugin}")
            for name in ("twin", "usual")]
    assert made[0] == made[1]


@pytest.mark.parametrize("arch, width", [("Conv", 4), ("wide", 6)])
def test_a_network_has_the_keywords_of_its_architecture(run, plugin, arch, width):
    state = run(arch, f"--plugin={plugin}", f"--arch={arch}", options=CONV)
    assert state["net"]["model.first.weight"].shape == (width, 4, 3, 3)
    assert state["network"]["model_type"] == "Conv" and "dropout" not in state["network"]


@pytest.mark.parametrize("words, message", [
    (["--dropout=0.1"], "Error: network class Conv: takes no dropout; give --dropout=0"),
    (["--augment=0.1"], "Error: network class Conv: takes no augment_dim; give --augment=0"),
    (["--cbase=8"], "Error: network class Conv: takes no model_channels; leave --cbase out"),
    (["--cres=1,2"], "Error: network class Conv: takes no channel_mult; leave --cres out"),
    (["--ares=8"], "Error: network class Conv: takes no attn_resolutions; leave --ares out"),
    (["--loss=bare", "--P_mean=-1"],
     "Error: --P_mean=-1: the loss bare takes no P_mean; leave --P_mean out"),
    (["--loss=bare", "--lsun=1"],
     "Error: --lsun=1: the loss bare takes no lsun; leave --lsun out"),
    (["--loss=ve", "--P_mean=-1"],
     "Error: --P_mean=-1 with --loss=ve: must be used with --loss=edm"),
])
def test_options_that_a_part_does_not_take_are_refused(run, plugin, words, message, tmp_path):
    output = run("no", f"--plugin={plugin}", "--arch=Conv", *words, options=CONV, fails=True)
    assert message in output and not (tmp_path / "no").exists()


def test_a_loss_without_those_keywords_trains(run, plugin):
    state = run("bare", f"--plugin={plugin}", "--loss=bare", "--pfgmpp=1", "--aug_dim=64")
    assert state["options"]["loss"] == "bare" and state["network"]["D"] == 64


@pytest.mark.parametrize("flag, ours, own", [
    ("--loss", "'vp', 've', 'edm'", "'twin', 'higher', 'bare'"),
    ("--precond", "'vp', 've', 'edm', 'iddpm'", "'TwinPrecond'"),
    ("--arch", "'ddpmpp', 'ncsnpp', 'adm'", "'Conv', 'wide'"),
    ("--eval-solver", "'heun', 'euler', 'ppfm', 'ipndm', 'dpmpp2m', 'unipc'",
     "'twin', 'steps', 'twin2m'")])
def test_a_wrong_name_lists_all_names(run, plugin, flag, ours, own):
    output = run("no", f"{flag}=none", fails=True)
    assert f"'none' is not one of {ours}; --plugin=FILE adds others" in output
    output = run("no", f"{flag}=none", f"--plugin={plugin}", fails=True)
    listed = set(re.search("is not one of (.*); --plugin", output)[1].split(", "))
    assert listed == {*ours.split(", "), *own.split(", ")}


# ------------------------------------------------------------------------------------ resuming


def test_a_run_records_its_file_and_goes_on_only_with_it(run, plugin, tmp_path):
    words = ["--loss=twin", "--duration=0.000016"]
    longer = ["--loss=twin", "--resume=auto"]
    first = f"--plugin={plugin}"
    undisturbed = run("whole", first, "--loss=twin")
    run_half(run, tmp_path, first, *words)
    options = json.loads((tmp_path / "half/training_options.json").read_text())["options"]
    assert options["plugin"] == str(plugin) and re.fullmatch("[0-9a-f]{64}",
                                                             options["plugin_sha256"])
    changed = write(tmp_path / "changed.py", PARTS + "\n# another version\n")
    output = run("half", f"--plugin={changed}", *longer, fails=True)
    assert f"--plugin={changed} (other content in the state)" in output
    assert "--override-options to change them" in output
    output = run("half", "--resume=auto", fails=True)
    assert "--plugin=none (other content in the state)" in output
    moved = Path(shutil.copy(plugin, tmp_path / "moved.py"))
    assert is_same(run("half", f"--plugin={moved}", *longer), undisturbed)


def run_half(run, tmp_path, *words):
    """Trains two thirds of a run called 'half'."""
    run("half", *words)
    assert (tmp_path / "half/training-state-000000.016.pt").exists()


def test_a_run_without_a_file_goes_on_with_one_only_by_override(run, plugin, tmp_path):
    run_half(run, tmp_path, "--duration=0.000016")
    words = [f"--plugin={plugin}", "--resume=auto"]
    assert f"--plugin={plugin} (none in the state)" in run("half", *words, fails=True)
    assert is_same(run("half", *words, "--override-options"), run("usual"))


def test_no_file_of_options_and_no_checkpoint_makes_a_script_run_code(
        run, plugin, tmp_path, invoke):
    trace = tmp_path / "trace"
    write(plugin, PARTS + f"\nopen({str(trace)!r}, 'a').write('ran ')\n")
    run("first", f"--plugin={plugin}", "--arch=Conv", options=CONV)
    assert trace.read_text() == "ran "
    forget()
    config = f"--config={tmp_path / 'first/training_options.json'}"
    assert "'Conv' is not one of" in run("second", config, options=[], fails=True)
    done = invoke(generate.main, f"--network={tmp_path / 'first'}", f"--outdir={tmp_path / 'out'}")
    assert done.exit_code == 1 and trace.read_text() == "ran "
    assert ("asks for the model_type 'Conv', which is not known (known are SongUNet, "
            "DhariwalUNet); if a plugin defines it, give --plugin=FILE\n") in done.output
    done = invoke(generate.main, f"--network={tmp_path / 'first'}", f"--outdir={tmp_path / 'out'}",
                  f"--plugin={plugin}", "--seeds=0-1", "--steps=2", "--device=cpu")
    assert done.exit_code == 0 and trace.read_text() == "ran ran "
    again = run("third", config, f"--plugin={plugin}", options=[])
    assert again["network"]["model_type"] == "Conv"
    assert again["options"]["plugin"] == str(plugin)


# ------------------------------------------------------------------------------------ sampling


def pictures(invoke, network, folder, *words):
    done = invoke(generate.main, f"--network={network}", f"--outdir={folder}", "--seeds=0-3",
                  "--steps=3", "--device=cpu", *words)
    assert done.exit_code == 0, done.output
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def test_a_solver_decides_the_images_and_is_recorded(invoke, plugin, tmp_path):
    network = write_snapshot(tmp_path / "net.pt")
    by = {name: pictures(invoke, network, tmp_path / name, f"--solver={name}",
                         *([f"--plugin={plugin}"] if name in ("twin", "steps", "twin2m") else []))
          for name in ("heun", "twin", "euler", "steps", "dpmpp2m", "twin2m")}
    assert by["twin"] == by["heun"] and by["twin2m"] == by["dpmpp2m"]
    assert by["steps"] == by["euler"] != by["heun"] and len(by["heun"]) == 4
    records = {name: json.loads((tmp_path / name / "generate.json").read_text()) for name in by}
    digest = load_plugin(str(plugin)).sha256[:16]
    assert {name: record.get("plugin") for name, record in records.items()} == {
        "heun": None, "euler": None, "dpmpp2m": None, "twin": digest, "steps": digest,
        "twin2m": digest}
    assert (records["twin"]["nfe"], records["steps"]["nfe"], records["twin2m"]["nfe"]) == (5, 3, 3)


def test_images_of_another_version_of_the_file_are_not_mixed(invoke, plugin, tmp_path):
    network = write_snapshot(tmp_path / "net.pt")
    pictures(invoke, network, tmp_path / "out", f"--plugin={plugin}", "--solver=twin")
    write(plugin, PARTS + "\n# another version\n")
    done = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'out'}",
                  "--seeds=0-9", "--steps=3", "--device=cpu", f"--plugin={plugin}", "--solver=twin")
    assert done.exit_code == 1 and "plugin" in done.output


@pytest.mark.parametrize("solve, own", [(heun, "heun"), (euler, "euler")])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_evaluations_of_a_solver_are_counted(monkeypatch, solve, own, n):
    monkeypatch.setitem(SOLVERS, "mine", solve)
    assert num_evaluations("mine", n) == num_evaluations(own, n)


def test_multistep_solvers_of_a_file_refuse_noise(invoke, plugin, tmp_path):
    network = write_snapshot(tmp_path / "net.pt")
    done = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'out'}",
                  f"--plugin={plugin}", "--solver=twin2m", "--alpha=0.1", "--device=cpu")
    assert done.exit_code == 2 and "uses earlier steps" in done.output


def test_the_likelihood_and_the_few_step_methods_take_networks_of_a_file(
        run, plugin, invoke, tmp_path, dataset_zip):
    run("teacher", f"--plugin={plugin}", "--arch=Conv", options=CONV)
    network = tmp_path / "teacher"
    done = invoke(likelihood.main, f"--network={network}", f"--data={dataset_zip}", "--count=2",
                  "--steps=2", "--device=cpu", f"--plugin={plugin}")
    assert done.exit_code == 0 and "bits/dim" in done.output, done.output
    words = [f"--teacher={network}", f"--data={dataset_zip}", f"--outdir={tmp_path}",
             "--name=few", "--duration=0.000016", "--batch=8", "--workers=0", "--samples=0",
             "--seed=0", "--device=cpu", f"--plugin={plugin}"]
    done = invoke(distill.main, *words)
    assert "network class Conv: takes no dropout; give --dropout=0" in done.output
    done = invoke(distill.main, *words, "--dropout=0")
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    options = json.loads((tmp_path / "few/training_options.json").read_text())["options"]
    assert options["plugin"] == str(plugin)


# ------------------------------------------------------------------------------------ scores


def scores(invoke, tmp_path, *words, command=fid.gen):
    """Returns what the command says, and the last value of each metric that it has recorded."""
    done = invoke(command, f"--out={tmp_path / 'scores.jsonl'}", "--device=cpu", "--workers=0",
                  *words)
    assert done.exit_code == 0, done.output
    lines = map(json.loads, (tmp_path / "scores.jsonl").read_text().splitlines())
    return done.output, {line["metric"]: line["value"] for line in lines}


def test_a_metric_is_what_its_formula_says(invoke, plugin, tmp_path, dataset_zip):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    pixels = rng.integers(0, 256, [6, 8, 8, 3], np.uint8)
    for k in range(6):
        PIL.Image.fromarray(pixels[k]).save(tmp_path / f"images/{k:06d}.png")
    words = [f"--images={tmp_path / 'images'}", "--num=6", f"--ref={dataset_zip}",
             "--detector=pixels", f"--plugin={plugin}"]
    _, both = scores(invoke, tmp_path, *words, "--metrics=shift,fid", command=fid.calc)
    _, given = scores(invoke, tmp_path, *words[:2], f"--ref={tmp_path / 'images'}", *words[3:],
                      "--metrics=shift", command=fid.calc)
    from images.dataset import ImageFolderDataset
    real = ImageFolderDataset(dataset_zip).get_scored(range(40)).transpose(0, 2, 3, 1)
    expected = (((pixels.mean(axis=0) - real.mean(axis=0)) / 127.5) ** 2).sum()
    assert both["mean_shift"] == pytest.approx(expected, rel=1e-5)
    assert both["mean_shift"] < both["frechet_distance"]  # of which it is a part
    assert given["mean_shift"] == pytest.approx(0, abs=1e-9)
    done = invoke(fid.calc, *words, "--metrics=none")
    assert "must be a list of fid, kid, pr, dc, is, ca, shift; --plugin=FILE" in done.output


def test_a_frechet_distance_of_halved_features_is_a_quarter(invoke, plugin, tmp_path, dataset_zip):
    network = write_snapshot(tmp_path / "net.pt")
    words = [f"--network={network}", f"--ref={dataset_zip}", "--seeds=0-9", "--steps=2"]
    _, whole = scores(invoke, tmp_path, *words, "--detector=pixels")
    _, halved = scores(invoke, tmp_path, *words, f"--plugin={plugin}", "--detector=halved")
    assert 4 * halved["frechet_distance"] == pytest.approx(whole["frechet_distance"], rel=1e-4)
    # Neither the reference's features in the cache nor recorded scores are of the other version.
    write(plugin, PARTS.replace("(images) / 2", "(images) / 4"))
    output, less = scores(invoke, tmp_path, *words, f"--plugin={plugin}", "--detector=halved")
    assert 16 * less["frechet_distance"] == pytest.approx(whole["frechet_distance"], rel=1e-4)
    assert "halved:" in output and "Recorded" not in output


def test_scores_of_a_metric_are_taken_from_records_of_the_same_file(
        invoke, plugin, tmp_path, dataset_zip):
    network = write_snapshot(tmp_path / "net.pt")
    words = [f"--network={network}", f"--ref={dataset_zip}", "--seeds=0-9", "--steps=2",
             "--detector=pixels", f"--plugin={plugin}", "--metrics=fid,shift"]
    _, first = scores(invoke, tmp_path, *words)
    output, again = scores(invoke, tmp_path, *words)
    assert "Recorded" in output and again == first
    write(plugin, PARTS.replace(".sum()),)", ".sum()) * 2,)"))
    output, doubled = scores(invoke, tmp_path, *words)
    assert "Recorded" not in output
    assert doubled["mean_shift"] == pytest.approx(2 * first["mean_shift"])
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert sum('"frechet_distance"' in line for line in lines) == 1  # which is the project's own


def test_a_metric_must_not_call_its_value_like_another(invoke, plugin, tmp_path, dataset_zip):
    write(plugin, PARTS.replace('"mean_shift"', '"fid"'))
    done = invoke(fid.gen, f"--network={write_snapshot(tmp_path / 'net.pt')}",
                  f"--ref={dataset_zip}", "--seeds=0-3", "--steps=2", "--detector=pixels",
                  f"--plugin={plugin}", "--device=cpu", "--workers=0")
    assert done.exit_code == 1
    assert "metric shift: its value 'fid' has the name of a value of fid" in done.output


def test_what_a_metric_needs_decides_which_detectors_and_images_it_takes(
        invoke, plugin, tmp_path, dataset_zip):
    words = [f"--images={dataset_zip}", f"--ref={dataset_zip}", "--num=40", "--detector=pixels",
             f"--plugin={plugin}", "--metrics=shift", "--device=cpu", "--workers=0"]
    for needs, message in (("classes", "has no classes"), ("hits", "needs a detector")):
        write(plugin, PARTS.replace('Metric("moments"', f'Metric("{needs}"'))
        done = invoke(fid.calc, *words)
        assert done.exit_code == 1 and message in done.output, done.output
        with pytest.raises(ValueError, match=message):  # before any image is read
            check_classifies("pixels", ["shift"])
    write(plugin)
    done = invoke(fid.calc, *words, "--per-class")
    assert done.exit_code == 0 and re.search(r"^mean +0\b", done.output, re.M), done.output


def test_a_metric_without_reference_scores_images_alone(invoke, plugin, tmp_path, dataset_zip):
    words = [f"--images={dataset_zip}", "--num=40", "--detector=pixels", f"--plugin={plugin}",
             "--metrics=shift", "--device=cpu", "--workers=0"]
    done = invoke(fid.calc, *words)
    assert done.exit_code == 2 and "needed by shift" in done.output, done.output
    write(plugin, PARTS.replace("False, shift)", "False, shift, needs_reference=False)")
          .replace("- reference.mu", "- (0 if reference is None else 9)"))
    forget()
    alone = invoke(fid.calc, *words)
    against = invoke(fid.calc, *words, f"--ref={dataset_zip}")
    assert (alone.exit_code, against.exit_code) == (0, 0), alone.output + against.output
    values = [float(done.output.split()[-1]) for done in (alone, against)]
    assert 0 < values[0] < 9 < values[1]
    net = load(write_snapshot(tmp_path / "net.pt"), device="cpu")
    assert net.score(metrics="shift", seeds=8, steps=2, detector="pixels")["mean_shift"] > 0
    with pytest.raises(ValueError, match="fid needs a reference"):
        net.score(metrics="shift,fid", seeds=8, steps=2, detector="pixels")


def test_a_study_gives_the_file_to_its_scripts_and_runs_it_once(
        invoke, plugin, tmp_path, dataset_zip):
    trace = tmp_path / "trace"
    write(plugin, PARTS + f"\nopen({str(trace)!r}, 'a').write('ran ')\n")
    words = [f"--outdir={tmp_path}", f"--data={dataset_zip}", "--aug_dims=8,inf", "--dry-run",
             "--seeds=0-3", "--detector=halved", "--metrics=fid,shift", "--solver=twin",
             f"--plugin={plugin}", "--device=cpu", "--", "--loss=twin", *TINY_RUN[:-2]]
    done = invoke(sweep.main, *words)
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    commands = [line for line in done.output.splitlines() if ".py " in line]
    own = [line for line in commands if f"--plugin={plugin}" in line]
    assert len(own) == 6 and [line for line in commands if line not in own] == [
        line for line in commands if "report.py" in line]
    assert trace.read_text() == "ran "
    done = invoke(sweep.main, *words, f"--plugin={plugin}")
    assert done.exit_code == 2 and "--plugin" in done.output


@pytest.mark.scripts
@pytest.mark.slow
def test_a_study_with_a_file_is_done_when_it_is_done(plugin, tmp_path, dataset_zip):
    words = ["sweep.py", f"--outdir={tmp_path}", f"--data={dataset_zip}", "--aug_dims=8",
             "--name=s", "--seeds=0-3", "--base-steps=2", "--images=1", "--detector=halved",
             "--metrics=fid,shift", "--solver=twin", f"--plugin={plugin}", "--device=cpu", "--",
             "--loss=twin", *(word for word in RUN if word != "--device=cpu")]
    assert "[4/4]" in run_script(*words).stdout
    again = run_script(*words).stdout
    assert len(re.findall("there already", again)) == 4
    write(plugin, PARTS.replace(".sum()),)", ".sum()) * 2,)"))
    done = run_script(*words, check=False)
    assert done.returncode and "was begun with plugin_sha256" in done.stderr


# ------------------------------------------------------------------------------------ files


def shown(invoke, path):
    done = invoke(train.main, "--outdir=none", "--data=none", f"--plugin={path}")
    return done.exit_code, done.output


def test_files_that_can_not_be_run_are_one_line(invoke, tmp_path):
    code, output = shown(invoke, tmp_path / "none.py")
    assert (code, output) == (2, f"Error: --plugin={tmp_path}/none.py: No such file or directory; "
                              "name a Python file\n")
    assert shown(invoke, tmp_path)[1].endswith("Is a directory; name a Python file\n")
    wrong = write(tmp_path / "wrong.py", "x = 1\ny = (\n")
    code, output = shown(invoke, wrong)
    assert code == 2 and re.fullmatch(
        rf"Error: --plugin={wrong}: not valid Python in line 2 \(.*\)\n", output)
    wrong.write_bytes(b"\0\1\xff" * 9)
    code, output = shown(invoke, wrong)
    assert code == 2 and "not valid Python" in output and len(output.splitlines()) == 1


def test_a_file_that_exits_does_not_end_the_command_without_a_word(invoke, tmp_path):
    file = write(tmp_path / "exits.py", "import sys\nsys.exit(3)\n")
    code, output = shown(invoke, file)
    assert code == 1 and output.startswith(f"Error: --plugin={file}: SystemExit: 3\n")


def test_an_error_of_the_file_is_shown_with_its_traceback_alone(invoke, tmp_path):
    file = write(tmp_path / "wrong.py", "def f():\n    return missing\n\nf()\n")
    code, output = shown(invoke, file)
    first, *trace = output.splitlines()
    assert code == 1
    assert first == f"Error: --plugin={file}: NameError: name 'missing' is not defined"
    assert [line for line in trace if line.startswith("  File")] == [
        f'  File "{file}", line 4, in <module>', f'  File "{file}", line 2, in f']


@pytest.mark.parametrize("line", [
    'SOLVERS["heun"] = euler', 'MULTISTEP["heun"] = euler', 'del SOLVERS["heun"]',
    'SOLVERS["ipndm"] = euler'])
def test_a_file_does_not_replace_our_parts(invoke, tmp_path, line):
    file = write(tmp_path / "wrong.py", f"from pfgmpp.solvers import *\n{line}\n")
    code, output = shown(invoke, file)
    name = re.search('"(.*)"', line)[1]
    assert code == 1 and output == (
        f"Error: --plugin={file}: replaces the solver '{name}', which is built in; register "
        "yours under another name\n")
    assert SOLVERS["heun"] is heun and not SOLVERS.added


def test_a_file_is_a_module_of_its_own_which_runs_again_when_it_has_changed(tmp_path):
    file = write(tmp_path / "train.py", "import dataclasses\nfrom pfgmpp.solvers import *\n"
                 "@dataclasses.dataclass\nclass A:\n    x: int = 0\nSOLVERS['a'] = A\n")
    first = load_plugin(str(file))
    made = SOLVERS["a"]
    assert load_plugin(str(file)) == first and SOLVERS["a"] is made
    assert SOLVERS.origins == {"a": first.sha256} and sys.modules["train"] is train
    write(file, "from pfgmpp.solvers import *\nSOLVERS['b'] = heun\n")
    second = load_plugin(str(file))
    assert SOLVERS.added == ["b"] and SOLVERS.origins == {"b": second.sha256}
    write(file, file.read_text() + "SOLVERS['a'] = heun\n")
    second = load_plugin(str(file))
    assert SOLVERS.origins == {"a": second.sha256, "b": second.sha256}
    third = load_plugin(str(write(tmp_path / "c.py", "from pfgmpp.solvers import *\n"
                                  "SOLVERS['c'] = euler\n")))
    assert SOLVERS.origins == {"a": second.sha256, "b": second.sha256, "c": third.sha256}


def test_help_names_our_parts_alone_and_is_not_slowed(plugin):
    load_plugin(str(plugin))
    for command in (train.main, generate.main, fid.gen):
        with command.make_context("x", [], resilient_parsing=True) as context:
            text = command.get_help(context)
        assert "twin" not in text and "Conv" not in text and "--plugin" in text


@pytest.mark.scripts
def test_every_rank_runs_the_file(plugin, tmp_path, dataset_zip):
    write(plugin, PARTS + "\nimport os, pathlib\n"
          f"pathlib.Path({str(tmp_path)!r}, 'rank' + os.environ['RANK']).touch()\n")
    words = ["train.py", f"--outdir={tmp_path}", "--name=r", f"--data={dataset_zip}", *RUN]
    run_script(*words, f"--plugin={plugin}", "--loss=twin", processes=2)
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0", "rank1"}
    assert (tmp_path / "r" / STATE).exists()


# ------------------------------------------------------------------------------------ registries


def test_names_are_ours_and_those_added_to_registries_of_the_kind():
    mine, other = Registry("test kind", {"a": 1}), Registry("other test kind", {"z": 1})
    mine["b"], other["y"] = 2, 2
    assert names_of(["a"], "test kind") == ("a", "b") and mine.added == ["b"]
    assert names_of(["a"], "test kind", "other test kind") == ("a", "b", "y")


def test_keywords_are_followed_through_base_classes():
    class Base:
        def __init__(self, a, *, b=0):
            pass

    class Passing(Base):
        def __init__(self, c, **kwargs):
            super().__init__(**kwargs)

    class Closed(Passing):
        def __init__(self, d):
            pass

    def found(maker):
        return {name for name in "abcde" if takes_keyword(maker, name)}

    assert found(Base) == {"a", "b"} and found(Passing) == {"a", "b", "c"}
    assert found(Closed) == {"d"} and found(lambda e, **kwargs: 0) == set("abcde")
    assert found(type("Inheriting", (Passing,), {})) == {"a", "b", "c"}


# ------------------------------------------------------------------------------------ the page


def test_the_parts_of_the_page_are_taken_by_the_scripts(
        run, invoke, tmp_path, dataset_zip, monkeypatch):
    parts = write(tmp_path / "my_parts.py", parts_of_extending())
    assert len(parts.read_text().splitlines()) > 40
    state = run("loguniform", f"--plugin={parts}", "--loss=loguniform")
    assert not is_same(state, run("usual"))
    network = tmp_path / "loguniform"
    images = {name: pictures(invoke, network, tmp_path / name, f"--plugin={parts}",
                             f"--solver={name}") for name in ("midpoint", "heun")}
    assert images["midpoint"] != images["heun"]
    record = json.loads((tmp_path / "midpoint/generate.json").read_text())
    assert record["nfe"] == 5  # two a step, one in the last
    _, found = scores(invoke, tmp_path, f"--network={network}", f"--ref={dataset_zip}",
                      "--seeds=0-9", "--steps=2", "--detector=pixels", f"--plugin={parts}",
                      "--metrics=fid,shift")
    assert 0 < found["mean_shift"] < found["frechet_distance"]


def test_the_network_of_the_page_trains_on_vectors(run, invoke, tmp_path):
    parts = write(tmp_path / "my_parts.py", parts_of_extending())
    (tmp_path / "vectors").mkdir()
    for k in range(16):
        np.save(tmp_path / f"vectors/{k:06d}.npy", np.full([2, 1, 1], k / 8 - 1, np.float32))
    state = run("mlp", f"--plugin={parts}", "--arch=MLP", f"--data={tmp_path / 'vectors'}",
                options=CONV)
    assert state["network"]["img_resolution"] == 1 and state["network"]["model_type"] == "MLP"


def test_in_python_importing_the_file_makes_its_solver_known(tmp_path, monkeypatch):
    """One that takes Euler's steps by another name gives Euler's samples."""
    (tmp_path / "parts_to_import.py").write_text(
        "from pfgmpp.solvers import SOLVERS, euler\nSOLVERS['imported'] = euler\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load(write_snapshot(tmp_path / "net.pt"), device="cpu")
    with pytest.raises(ValueError, match="imported"):
        model.sample(2, solver="imported", steps=3)
    importlib.import_module("parts_to_import")
    samples = [model.sample(2, solver=name, steps=3).images for name in ("imported", "euler")]
    assert torch.equal(*samples) and samples[0].std() > 0
