"""--log: what sinks get, that they go on with a resumed run, and never stop training."""

import importlib.util
import json
import sys

import PIL.Image
import pytest
from tiny import TINY_RUN

import train
from training.config import TrainConfig
from training.log_sinks import LogSinks

WANDB = '''
import json, os, pathlib
CALLS = pathlib.Path(os.environ["STUB_CALLS"])
FAULT = os.environ.get("STUB_FAULT")

def record(call, /, **values):
    with open(CALLS, "a") as file:
        file.write(json.dumps({"call": call, **values}) + "\\n")
    if call == FAULT:
        raise RuntimeError("no\\nnetwork")

class Image:
    def __init__(self, image):
        self.size = list(image.size)

class Run:
    def define_metric(self, name, step_metric):
        record("define_metric", name=name, step_metric=step_metric)
    def log(self, values):
        record("log", values={k: getattr(v, "size", v) for k, v in values.items()})
    def finish(self):
        record("finish")

def init(**kwargs):
    record("init", **kwargs)
    return Run()
'''


def command(dataset_zip, outdir, kimg, *flags):
    return [f"--outdir={outdir}", "--name=run", f"--data={dataset_zip}", *TINY_RUN,
            "--tick=0.008", "--snap=2", "--samples=4", f"--duration={kimg / 1000}", *flags]


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stub of the package that records; returns a function that reads the calls."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("STUB_CALLS", str(tmp_path / "calls"))
    yield lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    sys.modules.pop("wandb", None)


@pytest.mark.long
def test_wandb_gets_the_numbers_of_stats_jsonl_and_pictures_and_a_resumed_run_goes_on(
        wandb, dataset_zip, tmp_path, invoke):
    for kimg in (0.016, 0.032):
        result = invoke(train.main, *command(dataset_zip, tmp_path, kimg, "--log=wandb",
                                             "--resume=auto"))
        assert result.exit_code == 0, result.output
    calls = wandb()
    first, second = [call for call in calls if call["call"] == "init"]
    assert first["id"] == second["id"] == (tmp_path / "run/wandb-id.txt").read_text().strip()
    assert (first["resume"], first["name"], first["project"]) == ("allow", "run", "pfgmpp")
    assert TrainConfig.from_dict(first["config"]).log == ("wandb",)
    logged = [call["values"] for call in calls if call["call"] == "log"]
    numbers = [values for values in logged if "Loss/loss" in values]
    rows = [json.loads(line) for line in (tmp_path / "run/stats.jsonl").read_text().splitlines()]
    assert numbers == [
        {name: value["mean"] for name, value in row.items() if name != "timestamp"} for row in rows]
    assert [v["Progress/kimg"] for v in logged if "samples" in v] == [0.008, 0.016, 0.024, 0.032]
    assert [call["call"] for call in calls][-1] == "finish"
    assert sum(call["call"] == "finish" for call in calls) == 2


@pytest.mark.parametrize("fault", ["init", "define_metric", "log", "finish"])
def test_a_sink_that_fails_anywhere_is_given_up_with_one_warning(fault, wandb, tmp_path, capsys,
                                                                 monkeypatch):
    monkeypatch.setenv("STUB_FAULT", fault)
    sinks = LogSinks(TrainConfig(data="x", log=("wandb",)), tmp_path, 0)
    for nimg in (8, 16):
        sinks.scalars({"Loss/loss": 1.0}, nimg)
        sinks.picture("samples", PIL.Image.new("RGB", (4, 2)), nimg)
    sinks.close()
    assert capsys.readouterr().err == (
        "Warning: --log=wandb given up: RuntimeError: no network; training continues, and its "
        "numbers are in stats.jsonl\n")
    assert [call["call"] for call in wandb()].count(fault) == 1 and wandb()[-1]["call"] == fault


@pytest.mark.long
def test_a_failing_sink_does_not_stop_training(wandb, dataset_zip, tmp_path, invoke, monkeypatch):
    monkeypatch.setenv("STUB_FAULT", "log")
    result = invoke(train.main, *command(dataset_zip, tmp_path, 0.024, "--log=wandb"))
    assert result.exit_code == 0 and "Training finished" in result.output
    [line] = [line for line in result.output.splitlines() if line.startswith("Warning: ")]
    assert line.startswith("Warning: --log=wandb given up: RuntimeError: no network")
    assert (tmp_path / "run/training-state-000000.024.pt").exists()


def test_an_absent_package_is_told_before_anything_starts(dataset_zip, tmp_path, invoke,
                                                          monkeypatch):
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
        result = invoke(train.main, *command(dataset_zip, tmp_path / "new", 1, f"--log={name}"))
        assert result.exit_code == 2
        assert result.output == (f"Error: --log={name}: not installed; run pip install {name}, "
                                 "or give --log= for none\n")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_absence_is_seen_without_a_stand_in(dataset_zip, tmp_path, invoke):
    result = invoke(train.main, *command(dataset_zip, tmp_path / "new", 1, "--log=wandb"))
    assert result.exit_code == 2 and "pip install wandb" in result.output


@pytest.mark.long
def test_an_empty_list_is_none(dataset_zip, tmp_path, invoke):
    (tmp_path / "some.json").write_text('{"log": ["wandb"]}')
    result = invoke(train.main, *command(dataset_zip, tmp_path / "new", 1, "--log=", "-n",
                                         f"--config={tmp_path / 'some.json'}"))
    assert result.exit_code == 0 and '"log": []' in result.output, result.output


def test_an_unknown_sink_is_told_the_known_ones(dataset_zip, tmp_path, invoke):
    result = invoke(train.main, *command(dataset_zip, tmp_path, 1, "--log=tensorbord"))
    assert result.exit_code == 2
    assert "'tensorbord' is not one of tensorboard, wandb" in result.output


@pytest.mark.slow
@pytest.mark.long
def test_tensorboard_has_one_line_through_a_killed_and_resumed_run(dataset_zip, tmp_path, invoke):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    args = ["--log=tensorboard", "--resume=auto", "--dump=2"]
    assert invoke(train.main, *command(dataset_zip, tmp_path, 0.048, *args)).exit_code == 0
    for path in (tmp_path / "run").glob("training-state-*"):  # the newest is lost
        if path.name > "training-state-000000.030.pt":
            path.unlink()
    assert invoke(train.main, *command(dataset_zip, tmp_path, 0.048, *args)).exit_code == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("Loss/loss")] == [8, 16, 24, 32, 40, 48]
    assert events.Scalars("Progress/kimg")[-1].value == pytest.approx(0.048)
    assert [event.step for event in events.Images("samples")] == [8, 24, 40, 48]
