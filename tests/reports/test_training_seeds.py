"""Runs that differ only in their training seed: means, intervals, paired differences."""

import math

import numpy as np
import pytest
import scipy.stats
from run_dirs import score_line, write_run

from reports.comparison import compare
from reports.report_page import render
from reports.run_record import RunRecord
from reports.training_seeds import (
    Difference,
    Family,
    differences,
    families,
    over_training_seeds,
    t_half_width,
)

DIMS = (8, 64, math.inf)
SEEDS = (0, 1, 2)
# Scores of D = 8, 64 and inf by training seed, as they are at the default point and at alpha = 0.2.
BASE = {8: (3.0, 5.0, 4.5), 64: (2.0, 4.2, 3.1), math.inf: (2.5, 4.0, 3.9)}
NOISY = {8: (4.0, 6.1, 5.4), 64: (4.0, 6.0, 5.5), math.inf: (6.5, 8.1, 7.7)}


def write_study(root):
    """Writes a run for each D and training seed, with two seed ranges 0.2 apart."""
    return [write_run(root / f"D{D}-seed{seed}", D, [
        score_line(D, BASE[D][k] - 0.1, "0-9"), score_line(D, BASE[D][k] + 0.1, "10-19"),
        score_line(D, NOISY[D][k], "0-9", noise_alpha=0.2)], seed=seed)
        for k, seed in enumerate(SEEDS) for D in DIMS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return [RunRecord.read(run) for run in write_study(tmp_path_factory.mktemp("study"))]


@pytest.fixture(scope="module")
def merged(runs):
    [comparison] = compare(runs)
    return over_training_seeds(comparison, families(runs))


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_the_interval_is_students(count):
    values = np.random.default_rng(count).normal(size=count)
    low, high = scipy.stats.t.interval(0.95, count - 1, values.mean(), scipy.stats.sem(values))
    assert t_half_width(list(values)) == pytest.approx((high - low) / 2, rel=1e-9)


def test_the_interval_holds_the_truth_19_times_of_20():
    rng = np.random.default_rng(0)
    found = [Difference(dict(enumerate(rng.normal(1.0, 2.0, 3)))) for _ in range(4000)]
    share = np.mean([abs(each.mean - 1.0) <= each.half_width for each in found])
    assert abs(share - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 4000)


def test_one_seed_decides_nothing():
    one = Difference({"0": 5.0})
    assert one.half_width is None and not one.is_decided and one.verdict(True) == "not decided"


@pytest.mark.parametrize("shift, is_lower_better, verdict", [
    (-5, True, "better"), (5, True, "worse"), (-5, False, "worse"), (5, False, "better"),
    (-5, None, "lower"), (5, None, "higher"), (0.1, True, "not decided")])
def test_a_verdict_says_which_way_a_decided_difference_goes(shift, is_lower_better, verdict):
    found = Difference({"0": shift - 0.5, "1": shift, "2": shift + 0.5})
    assert found.verdict(is_lower_better) == verdict


def test_runs_of_equal_settings_are_a_family_by_seed(runs):
    assert families(runs) == [Family({"0": k, "1": k + 3, "2": k + 6}) for k in range(3)]


@pytest.mark.parametrize("change, are_together", [
    ({"lr": 2e-3}, False), ({"aug_dim": 9}, False), ({"duration": 0.2}, False),
    ({"data": "elsewhere/tiny.zip"}, True), ({"data": "datasets/other.zip"}, False),
    ({"tick": 5}, True), ({"teacher_sha256": "ef"}, False), ({"transfer": "a.pt"}, False),
    ({"seed": 0}, False)])
def test_what_makes_a_family(tmp_path, change, are_together):
    common = {"seed": 1, "duration": 0.1, "tick": 2, "teacher": "teacher.pt",
              "teacher_sha256": "cd", "transfer": None}
    runs = [RunRecord.read(write_run(tmp_path / name, 8, **options)) for name, options in
            (("a", common | {"seed": 0}), ("b", common | change))]
    assert (len(families(runs)) == 1) == are_together


@pytest.mark.parametrize("lr, are_together", [(1e-3, True), (2e-3, False)])
def test_few_step_networks_are_a_family_if_their_teachers_are(tmp_path, lr, are_together):
    teachers = [write_run(tmp_path / f"teacher{seed}", 8, seed=seed, lr=rate)
                for seed, rate in ((0, 1e-3), (1, lr))]
    (teachers[1] / "network-snapshot-000001.pt").touch()
    named = [teachers[0], teachers[1] / "network-snapshot-000001.pt"]
    runs = [RunRecord.read(write_run(tmp_path / f"student{seed}", 8, seed=seed, teacher=str(path),
                                     teacher_sha256=str(seed))) for seed, path in enumerate(named)]
    assert (len(families(runs)) == 1) == are_together


def test_runs_of_unknown_settings_stay_apart(tmp_path):
    runs = []
    for name in "ab":
        run = write_run(tmp_path / name, 8, [score_line(8, 1.0)])
        (run / "training_options.json").unlink()
        runs.append(RunRecord.read(run))
    assert len(families(runs)) == 2


def test_a_point_is_the_mean_over_training_seeds_and_samples_are_apart(merged):
    for curve, D in zip(merged.over_D, DIMS, strict=True):
        spread = curve.points[D]
        assert spread.values == pytest.approx(BASE[D])
        assert spread.mean == pytest.approx(np.mean(BASE[D]))
        assert (spread.low, spread.high) == pytest.approx((min(BASE[D]), max(BASE[D])))
        # Two values 0.2 apart have the deviation 0.2/sqrt(2), whatever their mean.
        assert curve.of_samples[D] == pytest.approx(0.2 / math.sqrt(2))
    noisy = {curve.D: curve.points[0.2].values for curve in merged.over["noise_alpha"]}
    assert all(noisy[D] == pytest.approx(NOISY[D]) for D in DIMS)


def test_differences_to_inf_are_paired_by_training_seed(merged):
    for number, difference in differences(merged.over_D).items():
        test = scipy.stats.ttest_rel(BASE[DIMS[number]], BASE[math.inf])
        low, high = test.confidence_interval(0.95)
        assert difference.mean == pytest.approx((low + high) / 2)
        assert difference.half_width == pytest.approx((high - low) / 2)
        assert difference.is_decided == (test.pvalue < 0.05)
    assert set(differences(merged.over_D)) == {0, 1}


def test_changes_are_paired_too(merged):
    # The curves over alpha are of the first seed range, 0.1 below the mean of both.
    found = differences(merged.over["noise_alpha"], 0.2, 0)
    for number, D in enumerate((8, 64)):
        expected = np.subtract(NOISY[D], BASE[D]) - np.subtract(NOISY[math.inf], BASE[math.inf])
        assert list(found[number].by_seed.values()) == pytest.approx(expected)
        assert found[number].mean < 0


def test_a_missing_run_leaves_the_seeds_that_both_have(tmp_path):
    folders = write_study(tmp_path)
    runs = [RunRecord.read(folder) for folder in folders if folder.name != "Dinf-seed1"]
    [comparison] = compare(runs)
    found = differences(over_training_seeds(comparison, families(runs)).over_D)
    assert [sorted(difference.by_seed) for difference in found.values()] == [["0", "2"]] * 2


def test_a_point_that_one_run_lacks_is_named_and_left_out(tmp_path):
    folders = write_study(tmp_path)
    path = tmp_path / "D8-seed1/metrics.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    runs = [RunRecord.read(folder) for folder in folders]
    [comparison] = compare(runs)
    curve = over_training_seeds(comparison, families(runs)).over["noise_alpha"][0]
    assert 0.2 not in curve.points and curve.left_out == (0.2,)


def test_nothing_is_compared_with_two_kinds_of_diffusion(tmp_path):
    runs = [RunRecord.read(run) for run in write_study(tmp_path)]
    runs += [RunRecord.read(write_run(tmp_path / f"wide-{seed}", math.inf,
                                      [score_line(math.inf, 1.0, "0-9")], seed=seed, lr=1.0))
             for seed in SEEDS]
    [comparison] = compare(runs)
    assert differences(over_training_seeds(comparison, families(runs)).over_D) == {}


def test_rounding_draws_are_one_point_their_mean(tmp_path):
    run = write_run(tmp_path / "run", 8, [
        score_line(8, 1.0), score_line(8, 9.0, bits=4),
        *(score_line(8, value, bits=4, rounding_seed=seed) for seed, value in enumerate((2, 3, 7))),
        score_line(8, 6.0, bits=5)])
    [comparison] = compare([RunRecord.read(run)])
    of_axis = {axis: {x: spread.values for x, spread in curve.points.items()}
               for axis, [curve] in comparison.over.items()}
    assert of_axis == {"bits": {4: (9.0,), 5: (6.0,), 32: (1.0,)},
                       "random_bits": {4: (4.0,), 32: (1.0,)}}
    page = render([RunRecord.read(run)])
    assert "Weights rounded at random" in page
    assert "Every value for rounded weights is the mean of 3 random roundings." in page


def test_differences_that_do_not_vary_decide_nothing():
    """0.8 - 0.6 and 0.7 - 0.5 differ in the last bit only."""
    for values in ((0.8 - 0.6, 0.7 - 0.5), (1e-16, 1e-16), (2.0, 2.0)):
        assert Difference(dict(zip("01", values, strict=True))).verdict(True) == "not decided"


def test_runs_are_compared_over_the_seed_ranges_that_all_have(tmp_path):
    """A second range that only one D has, whose scores are far off, changes no difference."""
    runs = []
    for D, extra in ((8, True), (math.inf, False)):
        for seed in SEEDS:
            lines = [score_line(D, BASE[D][seed], "0-9")]
            lines += [score_line(D, 100.0, "10-19")] if extra else []
            runs.append(RunRecord.read(write_run(tmp_path / f"D{D}-{seed}", D, lines, seed=seed)))
    [comparison] = compare(runs)
    [difference] = differences(over_training_seeds(comparison, families(runs)).over_D).values()
    assert difference.mean == pytest.approx(np.mean(np.subtract(BASE[8], BASE[math.inf])))
    assert "Values, each over 1 seed range (0-9)." in render(runs)


def test_an_axis_without_common_points_is_left_out(tmp_path):
    """Seed 0 is scored at 18 and 9 steps, seed 1 at 5 and 7: the page can be written."""
    runs = [RunRecord.read(write_run(tmp_path / str(seed), 8, [
        score_line(8, 1.0, num_steps=steps) for steps in numbers], seed=seed))
        for seed, numbers in enumerate(((18, 9), (5, 7)))]
    [comparison] = compare(runs)
    assert over_training_seeds(comparison, families(runs)).over == {}
    assert "Over D" in render(runs)


def test_seeds_of_a_single_D_have_their_mean_on_the_page(tmp_path):
    runs = [RunRecord.read(write_run(tmp_path / str(seed), 8, [score_line(8, BASE[8][seed])],
                                     seed=seed)) for seed in SEEDS]
    page = render(runs)
    assert f"{np.mean(BASE[8]):.3f}" in page and "Summary: " in page and "Differences" not in page


def test_families_without_a_D_of_their_own_are_called_by_their_runs(tmp_path):
    runs = [RunRecord.read(write_run(tmp_path / f"{name}{seed}", 8, [score_line(8, 1.0 + seed)],
                                     seed=seed, lr=lr))
            for name, lr in (("slow", 1e-4), ("fast", 1e-2)) for seed in (0, 1)]
    page = render(runs)
    assert "slow0 and 1 more" in page and "fast0 and 1 more" in page


def test_several_kinds_of_diffusion_and_lengths_are_told(tmp_path):
    runs = [RunRecord.read(write_run(tmp_path / f"{D}-{lr}-{seed}", D, [
        score_line(D, 1.0, kimg=100 * (1 + seed))], seed=seed, lr=lr))
        for D, lr in ((8, 1e-3), (math.inf, 1e-3), (math.inf, 1e-2)) for seed in (0, 1)]
    page = render(runs)
    assert "Differences to D = inf are left out" in page
    assert "The compared networks were trained for different kimg: 100, 200" in page


def test_the_page_tells_training_seeds_and_differences(runs):
    page = render(runs)
    assert "Differences to D = inf" in page and "change at alpha 0.2" in page
    assert "Points are means over training seeds" in page
    assert "3 training seeds (0, 1, 2)" in page and "deviation over samples" in page
    # D = 64 against inf at alpha = 0.2, by hand: changes 2.0, 1.8, 2.4 and 4.0, 4.1, 3.8.
    d = np.array([2.0 - 4.0, 1.8 - 4.1, 2.4 - 3.8])
    half = 4.302653 * d.std(ddof=1) / math.sqrt(3)
    assert f"{d.mean():+.1f} ± {half:.1f}" in page  # two digits of the interval
    legend = page.count("D\u00a0=\u00a08")
    assert legend and "D8-seed1" in page


def test_runs_of_one_seed_have_a_page_without_them(runs):
    page = render(runs[:3])
    assert "Differences to" not in page and "training seeds" not in page
    assert "Points are means over seed ranges" in page


