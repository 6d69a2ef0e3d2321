"""The benchmarks' own arithmetic, and that they run; figures are nobody's test."""

import json
import math

import PIL.Image
import pytest
import torch
from snapshots import write_snapshot

from benchmarks import __main__ as command
from benchmarks import few_steps, networks, reading, sides, solvers, stf
from benchmarks.table import Row, format_table, in_turn, relative_error, with_ratios
from checkpoints import checkpoint
from pfgmpp.few_steps import FewStep


def test_a_ratio_is_how_many_times_faster_than_the_baseline():
    rows = with_ratios([Row("a", "ours", [1.0, 9.0, 2.0]), Row("a", "theirs", [6.0, 6.0, 7.0]),
                        Row("b", "ours", [1.0])], "theirs")
    assert [row.ratio for row in rows] == [3.0, None, None]


def test_figures_follow_from_the_median():
    row = Row("a", "ours", [0.5, 2.0, 0.1], images=8, flops=3e12, arithmetic="bf16")
    data = row.to_dict({"bf16": 12.0})
    assert data["images_per_second"] == 16 and data["tflops"] == 6
    assert data["percent_of_peak"] == 50
    assert row.to_dict({})["percent_of_peak"] is None


def test_the_table_has_a_line_a_side_under_each_thing():
    rows = with_ratios([Row("step", "ours", [0.5], images=4, error=2e-7, note="busy"),
                        Row("step", "theirs", [1.0], images=4, memory_mb=1234.5)], "theirs")
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in format_table(rows, {}).splitlines()]
    assert lines[2][0] == "**step**"
    assert lines[3] == ["ours (busy)", "500 ms", "8", "", "", "", "2.0e-07", "2.00x"]
    assert lines[4] == ["theirs", "1 s", "4", "", "", "1,234", "", ""]


def test_ways_take_turns():
    order = []
    seconds = in_turn({name: (lambda name=name: order.append(name)) for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b"] and {len(times) for times in seconds.values()} == {2}


def test_relative_error():
    assert math.isclose(relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])), 0.1)


def test_both_ways_of_stable_targets_agree_where_many_images_have_a_share():
    kernel, x, sigma, data = inputs = stf.make_inputs(8, 32, 48, 128)
    assert relative_error(stf.by_product(*inputs), stf.by_differences(*inputs)) < 1e-6
    nearest = data[torch.cdist(x, data).argmin(1)]
    assert relative_error(stf.by_product(*inputs), nearest) > 0.1


@pytest.mark.long
def test_solvers_are_compared_by_scores_errors_and_time(invoke, tmp_path, dataset_zip, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(solvers, "_STEPS", {"heun": (12, 2), "euler": (24, 4), "unipc": (24, 4)})
    monkeypatch.setattr(solvers, "_FINE_STEPS", 300)
    monkeypatch.setattr(solvers, "_DIMS", (2.0,))
    network = write_snapshot(tmp_path / "network.pt")
    result = invoke(solvers.main, f"--networks={network}", f"--ref={dataset_zip}", "--num=6",
                    "--batch=3", "--repeats=1", f"--out={tmp_path}/solvers.png")
    assert result.exit_code == 0, result.output
    tables = [block.splitlines() for block in result.stdout.split("\n\n") if "|" in block]
    scores, errors = ({cells[0]: cells[1:] for row in rows
                       if (cells := [cell.strip() for cell in row.strip("|").split("|")])}
                      for rows in tables)
    assert scores["solver"] == ["24", "23", "4", "3"]  # heun takes one less in the step to 0
    assert errors["solver"] == ["24", "4"]
    assert [bool(cell) for cell in scores["heun"]] == [False, True, False, True]
    many, few = ([float(errors[name][k]) for name in ("euler", "heun", "unipc")] for k in (0, 1))
    assert many == sorted(many, reverse=True) and all(a < b for a, b in zip(many, few, strict=True))
    assert "network: 6 images by ipndm, 7 steps: " in result.stdout
    assert image.open(tmp_path / "solvers.png").width > 500


CASE = """
import os, sys
class Case:
    def __init__(self, settings):
        print("noise on stdout")
        self.total = settings["start"]
    def run(self):
        self.total += 1
    def get(self, factor):
        return {"total": self.total * factor, "first path": sys.path[0]}
class Broken:
    def __init__(self, settings):
        raise KeyError("no such network")
"""


@pytest.mark.long
def test_a_side_runs_in_its_own_checkout(tmp_path):
    (tmp_path / "case.py").write_text(CASE)
    with sides.Side(tmp_path, tmp_path / "case.py", "Case", {"start": 5}, threads=1) as side:
        assert side.run() > 0 and side.run() > 0
        assert side.call("get", 10) == {"total": 70, "first path": str(tmp_path)}
        assert 0 <= side.peak_mb() < 500


@pytest.mark.long
def test_a_side_that_can_not_be_made_says_why(tmp_path):
    (tmp_path / "case.py").write_text(CASE)
    with pytest.raises(sides.SideError, match="no such network"):
        sides.Side(tmp_path, tmp_path / "case.py", "Broken", {}, threads=1)


@pytest.mark.parametrize("args, words", [
    (["--precision=bf16"], "fp16 with fp32"),
    (["--precision=fp32,int8"], "must be a list of fp32"),
    (["--against=."], "not a checkout of EDM"),
    (["--networks=ncsnpp"], "must be a list of ncsnpp-N"),
    (["--against-commit=no-such-revision"], "--against-commit=no-such-revision: "),
    (["nothing"], "nothing"),
])
def test_what_can_not_be_measured_is_refused(invoke, args, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = invoke(command.main, *args)
    assert result.exit_code and words in result.output and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_what_was_measured_is_kept_when_the_rest_fails(invoke, tmp_path, monkeypatch):
    def rows(options):
        assert options.networks == [("adm", 64), ("ncsnpp", 16)]
        yield Row("step", "ours", [0.5])
        raise sides.SideError("no memory")

    monkeypatch.setattr(command, "measure_peaks", lambda *_: {"fp32": 1.0})
    monkeypatch.setattr(command, "BENCHMARKS", {"training": rows})
    result = invoke(command.main, "--device=cpu", "--networks=adm-64,ncsnpp-16",
                    f"--out={tmp_path}/figures.json")
    assert result.exit_code == 1 and "training: no memory" in result.stderr
    assert "| ours " in result.stdout
    [row] = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["median_seconds"] == 0.5


# Our modules also have the names that they have in EDM, so our checkout stands for one of EDM.
@pytest.mark.slow
@pytest.mark.parametrize("file, case", [
    (networks, "TheirEvaluation"), (networks, "TheirStep"), (reading, "TheirReader")])
def test_a_checkout_of_edm_is_run_by_the_names_of_its_modules(tmp_path, file, case):
    command._check(("fp32",), sides.ROOT)
    settings = {"network": networks.network("ncsnpp", 8) | {"model_channels": 8}, "batch": 2,
                "side": 8, "folder": str(tmp_path), "device": "cpu", "precision": "fp32",
                "compile": False, "data": str(tmp_path / "data.zip"), "cache": str(tmp_path)}
    networks.write_inputs(settings)
    with sides.Side(sides.ROOT, file.__file__, case, settings, threads=1) as side:
        assert side.run() > 0
        if case == "TheirEvaluation":
            side.call("save", str(tmp_path / "theirs.out"))
            ours = networks.OurEvaluation(settings)
            ours.run()
            found = torch.load(tmp_path / "theirs.out", weights_only=True)
            assert torch.equal(found, ours._output)


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(invoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "figures.json"
    result = invoke(command.main, "training", "sampling", "startup", "--device=cpu", "--threads=1",
                    "--batch=1", "--repeats=1", "--against-commit=HEAD", f"--out={out}")
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    steps = {row["side"]: row for row in rows if row["what"].startswith("training, ncsnpp")}
    assert steps.keys() == {"ours fp32", "ours bf16", "HEAD fp32", "HEAD bf16"}
    assert steps["ours bf16"]["error"] < 0.05 and steps["ours fp32"]["ratio"] > 0.2
    assert steps["HEAD fp32"]["error"] < 1e-3
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.long
def test_few_step_networks_are_scored_beside_denoisers(invoke, tmp_path, dataset_zip, monkeypatch):
    monkeypatch.setattr(few_steps, "_SOLVER_STEPS", {"heun": (2,), "ipndm": (3,)})
    denoiser = write_snapshot(tmp_path / "denoiser.pt", pfgmpp=True, aug_dim=2.0)
    content = checkpoint.load(denoiser)
    content["network"] = content["network"] | {"few_step": FewStep.of("cd").to_dict()}
    checkpoint.save(tmp_path / "few.pt", checkpoint.as_snapshot(content))
    result = invoke(few_steps.main, f"--networks={denoiser},{tmp_path / 'few.pt'}",
                    f"--ref={dataset_zip}", "--num=6", "--ranges=2", "--batch=3",
                    f"--out={tmp_path / 'few.png'}")
    assert result.exit_code == 0, result.output
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
            for line in result.output.splitlines() if (cells := line.split("|")) and len(cells) > 3}
    assert [bool(cell) for cell in rows["cd, Gaussian noise between"]] == [True, True, False]
    assert all(rows["cd"]) and rows["cd"][:2] != rows["cd, Gaussian noise between"][:2]
    assert PIL.Image.open(tmp_path / "few.png").height > 100
