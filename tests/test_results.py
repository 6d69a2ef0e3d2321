"""docs/results.py: the table and pictures follow from what the runs have recorded."""

import math

import PIL.Image
import pytest
from run_dirs import sweep_lines, write_run
from scripts import load_script

results = load_script("docs/results.py")


def test_rows_are_D_and_columns_are_points(tmp_path, invoke):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / f"D{D}", D, sweep_lines(D, base))
            for D, base in ((math.inf, 20), (2, 10))]
    result = invoke(results.main, *runs, f"--out={tmp_path}")
    assert result.exit_code == 0, result.output
    rows = [line.strip("| ").split(" | ") for line in result.output.splitlines() if "|" in line]
    assert rows == [["D", "18 steps, 3 ranges", "18 steps, 1 range", "alpha 0.1, 1 range",
                     "alpha 0.2, 1 range", "10 steps, 1 range", "5 bits, 1 range"],
                    ["---"] * 7,
                    ["2", "11 (10 to 12)", "10", "15", "19", "14", "13"],
                    ["inf", "21 (20 to 22)", "20", "25", "29", "24", "23"]]
    assert PIL.Image.open(tmp_path / "results-scores.png").width > 800
    assert PIL.Image.open(tmp_path / "results-samples.png").height > 100


def test_the_picture_compares_equal_seeds(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn, plot = [], axes.Axes.plot
    monkeypatch.setattr(axes.Axes, "plot", lambda self, x, y, **style: (
        drawn.append(y), plot(self, x, y, **style)))
    run = write_run(tmp_path / "run", 2, sweep_lines(2, 10))
    [comparison] = results.compare([results.RunRecord.read(run)])
    results.draw(comparison, tmp_path / "scores.png")
    assert [y for y in drawn if len(y) > 1] == [[10, 15, 19], [14, 10], [13, 10]]


def test_runs_without_scores_get_one_line(tmp_path, invoke):
    result = invoke(results.main, write_run(tmp_path / "run"), f"--out={tmp_path}")
    assert result.exit_code and "no scores; run the study first" in result.output
