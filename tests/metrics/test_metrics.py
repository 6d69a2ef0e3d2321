"""KID, precision and recall, Inception score: against other libraries and direct loops."""

import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import run_script
from tiny import TINY_RUN, write_dataset

import fid
import generate
import train
from checkpoints import checkpoint
from metrics import detectors, distances
from metrics import evaluator as evaluator_module
from metrics.detectors import Pixels, build_detector
from metrics.distances import density_coverage, kernel_distance, precision_recall
from metrics.evaluator import Evaluator, cached_reference
from metrics.inception import InceptionV3, state_shapes
from metrics.metrics import METRICS, dataset_features
from metrics.statistics import ClassStatistics, FeatureBank
from reports.comparison import ScoreGroup
from reports.run_record import read_scores

PIXELS = ["--detector=pixels", "--device=cpu", "--workers=0"]


def features(n, d, seed, shift=0.0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal([n, d]) + shift).float()


# -------------------------------------------------------------------------------- kernel distance


def discrepancy_by_loops(x, y):
    """The unbiased estimate, term by term."""
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    def pairs(a):
        return sum(k(p, q) for p, q in itertools.permutations(a, 2)) / (len(a) * (len(a) - 1))

    return pairs(x) + pairs(y) - 2 * sum(k(p, q) for p in x for q in y) / (len(x) * len(y))


def test_kernel_distance_of_whole_sets_is_the_double_loop():
    x, y = features(7, 5, 0), features(9, 5, 1, shift=0.3)
    y_part = y[np.random.RandomState(0).permutation(9)[:7]]
    mean, std = kernel_distance(x, y_part, subsets=3, size=100)
    assert mean == pytest.approx(discrepancy_by_loops(x.double().numpy(), y_part.double().numpy()),
                                 rel=1e-12)
    assert std == pytest.approx(0, abs=1e-12)  # every subset is the whole set


def test_kernel_distance_of_subsets_agrees_with_scikit_learn():
    from sklearn.metrics.pairwise import polynomial_kernel  # takes a second to import
    x, y = features(60, 16, 0), features(80, 16, 1, shift=0.2)
    rng, values = np.random.RandomState(2020), []
    for _ in range(20):
        a = x[rng.choice(60, 25, replace=False)].double().numpy()
        b = y[rng.choice(80, 25, replace=False)].double().numpy()
        own = [polynomial_kernel(s, degree=3, gamma=1 / 16, coef0=1) for s in (a, b)]
        cross = polynomial_kernel(a, b, degree=3, gamma=1 / 16, coef0=1)
        values.append(sum((m.sum() - np.trace(m)) / (25 * 24) for m in own) - 2 * cross.mean())
    found = kernel_distance(x, y, subsets=20, size=25)
    assert found == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)


@pytest.mark.long
def test_kernel_distance_is_unbiased_and_grows_with_the_shift():
    """Two samples of one law score 0 on average: within 4 standard errors of 100 subsets."""
    mean, std = kernel_distance(features(4000, 8, 0), features(4000, 8, 1), size=200)
    assert abs(mean) < 4 * std / math.sqrt(100) + 4 * std / math.sqrt(4000 / 200)
    shifts = [kernel_distance(features(500, 8, 0), features(500, 8, 1, shift=s))[0]
              for s in (0.1, 0.5, 1)]
    assert shifts == sorted(shifts) and shifts[-1] > 10 * std


# ---------------------------------------------------------------------------- precision and recall


def coverage_by_sklearn(points, centres, k):
    from sklearn.neighbors import NearestNeighbors
    radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, k]
    gaps = np.linalg.norm(points[:, None] - centres[None], axis=2)
    return (gaps <= radii).any(1).mean()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_precision_and_recall_agree_with_scikit_learn(monkeypatch, k, chunk):
    monkeypatch.setattr(distances, "_CHUNK_ROWS", chunk)
    x, y = features(90, 4, 0, shift=5.5), features(110, 4, 1, shift=5)
    expected = (coverage_by_sklearn(x.double().numpy(), y.double().numpy(), k),
                coverage_by_sklearn(y.double().numpy(), x.double().numpy(), k))
    assert 0.1 < expected[0] < 1
    assert precision_recall(x, y, k=k) == pytest.approx(expected, abs=0)


def test_precision_falls_with_bad_images_and_recall_with_missing_modes():
    modes = torch.cat([features(50, 6, 0), features(50, 6, 1, shift=20)])
    one_mode = modes[:50] + 0.01
    with_junk = torch.cat([modes + 0.01, features(100, 6, 2, shift=-50)])
    assert precision_recall(one_mode, modes) == (1.0, 0.5)
    assert precision_recall(with_junk, modes) == (0.5, 1.0)


# ---------------------------------------------------------------------------- density and coverage


def density_coverage_by_sklearn(x, y, k):
    """The definitions of Naeem et al. 2020, pair by pair."""
    from sklearn.neighbors import NearestNeighbors
    radii = NearestNeighbors(n_neighbors=k + 1).fit(y).kneighbors(y)[0][:, k]
    inside = [[np.linalg.norm(p - q) <= r for q, r in zip(y, radii, strict=True)] for p in x]
    return np.sum(inside) / (k * len(x)), np.mean(np.any(inside, axis=0))


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_density_and_coverage_agree_with_their_definitions(monkeypatch, k, chunk):
    monkeypatch.setattr(distances, "_CHUNK_ROWS", chunk)
    x, y = features(60, 4, 0, shift=6), features(80, 4, 1, shift=5)
    expected = density_coverage_by_sklearn(x.double().numpy(), y.double().numpy(), k)
    assert 0.1 < expected[1] < 0.9
    assert density_coverage(x, y, k=k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("m, n", [(400, 400), (200, 500)])
def test_sets_of_one_law_have_density_one_and_the_coverage_of_a_closed_form(m, n):
    """Over 40 pairs of sets, within 4 standard errors; the law must not matter."""
    expected = 1, 1 - math.comb(n - 1, 5) / math.comb(m + n - 1, 5)
    for shape in (torch.clone, torch.exp):
        found = np.array([density_coverage(shape(features(m, 3, 2 * i)),
                                           shape(features(n, 3, 2 * i + 1))) for i in range(40)])
        error = found.std(0, ddof=1) / math.sqrt(len(found))
        assert np.all(np.abs(found.mean(0) - expected) < 4 * error)
        assert np.all(error < 0.02)


def test_an_outlier_of_the_real_images_gives_no_density_to_bad_ones():
    """A failure of precision: one far real image covers whatever lies about it."""
    real = torch.cat([features(200, 2, 0), torch.tensor([[50.0, 0]])])
    bad = features(100, 2, 1) + torch.tensor([45.0, 0])
    assert precision_recall(bad, real)[0] == 1
    density, coverage = density_coverage(bad, real)
    assert density == pytest.approx(1 / 5) and coverage == pytest.approx(1 / 201)


def test_density_rises_above_one_and_coverage_falls_where_modes_are_missing():
    real = torch.cat([features(100, 4, 0), features(100, 4, 1, shift=30)])
    density, coverage = density_coverage(real[:100] * 0.1, real)
    assert density > 1.2 and coverage <= 0.5


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="3 and 9 images: at least 4 needed"):
        precision_recall(features(3, 2, 0), features(9, 2, 1))
    with pytest.raises(ValueError, match="5 real images: at least 6 needed"):
        density_coverage(features(9, 2, 0), features(5, 2, 1))
    assert density_coverage(features(1, 2, 0), features(6, 2, 1))[1] <= 1
    with pytest.raises(ValueError, match="5 features can't be compared with 6"):
        kernel_distance(features(9, 5, 0), features(9, 6, 0))


# --------------------------------------------------------------------------------- Inception score


def score_directly(logits, count):
    """As its authors wrote it, over 10 random splits."""
    shuffled = logits[np.random.RandomState(2020).permutation(count)]
    p = np.exp(shuffled) / np.exp(shuffled).sum(1, keepdims=True)
    values = []
    for k in range(10):
        part = p[k * count // 10:(k + 1) * count // 10]
        values.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    return np.mean(values), np.std(values)


def test_inception_score_is_its_definition_however_it_is_batched():
    logits = np.random.RandomState(0).standard_normal([57, 11]) * 3
    sums = ClassStatistics(57)
    for numbers in np.split(np.random.RandomState(1).permutation(57), [5, 6, 40]):
        sums.append(torch.from_numpy(logits[numbers]), numbers.tolist())
    assert sums.score() == pytest.approx(score_directly(logits, 57), rel=1e-12)


def test_inception_score_has_its_known_extremes():
    def score(logits):
        sums = ClassStatistics(len(logits))
        sums.append(logits, range(len(logits)))
        return sums.score()[0]

    assert score(torch.zeros(100, 8)) == pytest.approx(1)
    sure = torch.eye(8).repeat(1000, 1) * 1000  # classes certain; equally frequent in 800 a split
    assert score(sure) == pytest.approx(8, rel=0.02)


def test_class_probabilities_are_those_of_the_weights_without_bias():
    rng = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=rng) * 0.1 for name, shape in state_shapes().items()}
    x = torch.rand(3, 2048, generator=rng)
    expected = x.double().numpy() @ state["fc.weight"].double().numpy().T
    np.testing.assert_allclose(InceptionV3(state).logits(x), expected, rtol=1e-12)


# ---------------------------------------------------------------------------------------- the bank


def test_the_bank_is_in_the_order_of_numbers():
    bank, x = FeatureBank(), features(9, 2, 0)
    for numbers in ([7, 2], [0, 1, 8], [3, 5, 4, 6]):
        bank.append(x[numbers], numbers)
    assert torch.equal(bank.gather(), x)


# ---------------------------------------------------------------------------------- command lines


class FakeInception(Pixels):
    """Pixels under the name of Inception, with twelve classes."""

    name = "inception"
    distance_name = "FID"

    def logits(self, features):
        return features[:, :12] * 3


@pytest.fixture
def fake_inception(monkeypatch):
    monkeypatch.setitem(detectors.DETECTORS, "inception", FakeInception)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scores")
    write_dataset(root / "real.zip", num=60)
    write_dataset(root / "fake.zip", num=50, classes=3)
    return root


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def call(capsys, *args):
    capsys.readouterr()
    fid.main([str(arg) for arg in args], standalone_mode=False)
    return capsys.readouterr().out


def test_all_metrics_come_in_one_pass_with_table_and_lines(data, capsys, fake_inception, tmp_path):
    out = call(capsys, "calc", f"--images={data / 'fake.zip'}", f"--ref={data / 'real.zip'}",
               "--num=50", "--metrics=fid,kid,pr,dc,is", f"--out={tmp_path / 'm.jsonl'}",
               "--device=cpu", "--workers=0")
    assert re.search(r"images +FID +KID +precision +recall +density +coverage +IS\n"
                     r"fake.zip +[\d.]+ +\S+ ± \S+ ", out)
    found = {line["metric"]: line for line in lines_of(tmp_path / "m.jsonl")}
    assert list(found) == ["fid", "kid", "kid_std", "precision", "recall", "density", "coverage",
                           "is", "is_std"]
    x, y = (dataset_features(open_data(data / name), Pixels(), metrics=["kid"], batch=64,
                             workers=0).features for name in ("fake.zip", "real.zip"))
    assert found["kid"]["value"] == pytest.approx(kernel_distance(x, y)[0], rel=1e-9)
    assert [found[k]["value"] for k in ("precision", "recall")] == list(precision_recall(x, y))
    assert [found[k]["value"] for k in ("density", "coverage")] == list(density_coverage(x, y))
    assert found["is"]["value"] == pytest.approx(
        score_directly(x[:, :12].double().numpy() * 3, 50)[0], rel=1e-6)  # logits in float32
    fact = found["fid"]
    assert fact["num"] == 50 and fact["detector"] == "inception" and fact["seeds"] is None
    assert fact["reference_sha256"] == open_data(data / "real.zip").fingerprint
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", fact["date"])


def open_data(path):
    from images.dataset import ImageFolderDataset
    return ImageFolderDataset(path)


def test_scores_by_pixels_are_never_called_fid_or_kid(data, capsys, tmp_path):
    out = call(capsys, "calc", f"--images={data / 'fake.zip'}", f"--ref={data / 'real.zip'}",
               "--num=50", "--metrics=fid,kid", f"--out={tmp_path / 'm.jsonl'}", *PIXELS)
    assert not re.search(r"\bFID|\bKID", out)
    assert [line["metric"] for line in lines_of(tmp_path / "m.jsonl")] == [
        "frechet_distance", "kernel_distance", "kernel_distance_std"]


def test_a_data_set_as_reference_scores_like_its_statistics(data, capsys, tmp_path):
    args = ["calc", f"--images={data / 'fake.zip'}", "--num=50", *PIXELS]
    call(capsys, "ref", f"--data={data / 'real.zip'}", f"--dest={tmp_path / 'r.npz'}",
         "--features", *PIXELS)
    direct = call(capsys, *args, f"--ref={data / 'real.zip'}", "--metrics=fid,kid,pr")
    assert call(capsys, *args, f"--ref={tmp_path / 'r.npz'}", "--metrics=fid,kid,pr") == direct


def test_a_reference_that_is_a_data_set_is_computed_once(data, monkeypatch):
    images = open_data(data / "real.zip")
    first = cached_reference(images, Pixels(), with_features=True, batch=8, workers=0)
    monkeypatch.setattr(Pixels, "__call__", None)
    again = cached_reference(images, Pixels(), with_features=True, batch=8, workers=0)
    assert np.array_equal(first.sigma, again.sigma) and torch.equal(first.features, again.features)
    assert again.digest == images.fingerprint


def refused(capsys, *args, code=1):
    with pytest.raises(SystemExit) as caught:
        fid.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert caught.value.code == code, err
    assert out == ""
    return err.strip().splitlines()[-1]


def test_what_does_not_fit_is_refused_before_anything_is_computed(data, capsys, tmp_path):
    ref = tmp_path / "r.npz"
    call(capsys, "ref", f"--data={data / 'real.zip'}", f"--dest={ref}", *PIXELS)
    args = ["calc", f"--images={data / 'fake.zip'}", "--num=50", *PIXELS]
    assert "holds no features, which --metrics=kid needs" in refused(
        capsys, *args, f"--ref={ref}", "--metrics=kid")
    assert "detector pixels: has no classes" in refused(
        capsys, *args, f"--ref={ref}", "--metrics=is")
    assert "'lpips': must be a list of fid, kid, pr, dc, is" in refused(
        capsys, *args, f"--ref={ref}", "--metrics=lpips", code=2)
    assert "Missing option '--ref'" in refused(capsys, *args, code=2)
    assert "must be 1, 2, 3 or a list" in refused(
        capsys, *args, f"--ref={ref}", "--gen_seed=1,4", code=2)
    small = write_dataset(tmp_path / "small.zip", num=50, side=4)
    for reference in (ref, data / "real.zip"):
        assert re.search(r"8x8, but those of .*small.zip are 4x4", refused(
            capsys, "calc", f"--images={small}", f"--ref={reference}", "--num=50", *PIXELS))


def test_the_command_line_knows_every_metric():
    assert set(fid._METRICS) == set(METRICS)


def test_the_inception_score_needs_no_reference(data, capsys, fake_inception, tmp_path):
    out = call(capsys, "calc", f"--images={data / 'fake.zip'}", "--num=50", "--metrics=is",
               f"--out={tmp_path / 'm.jsonl'}", "--device=cpu", "--workers=0")
    assert re.search(r"images +IS\nfake.zip +\d\.\d+ ± ", out)
    assert lines_of(tmp_path / "m.jsonl")[0]["reference"] is None


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, data):
    """A run of one step with its images of three seed ranges."""
    root = tmp_path_factory.mktemp("run")
    args = [f"--data={data / 'real.zip'}", f"--outdir={root}", "--name=a", "--duration=0.000008",
            "--tick=0.008", "--snap=1", "--dump=1", "--device=cpu", *TINY_RUN]
    train.main(args, standalone_mode=False)
    for first in (0, 50000, 100000):
        generate.main([f"--outdir={root / 'a'}", f"--seeds={first}-{first + 9}", "--steps=2",
                       "--device=cpu"], standalone_mode=False)
    return root / "a"


def test_three_seed_ranges_come_with_their_lowest_and_mean(run_dir, data, capsys):
    out = call(capsys, "calc", f"--images={run_dir}", f"--ref={data / 'real.zip'}", "--num=10",
               "--gen_seed=1,2,3", *PIXELS)
    values = re.findall(r"^path:\S+, pixels Frechet distance: (\S+)$", out, re.M)
    values = [float(value) for value in values]
    assert len(values) == 3
    assert float(re.search(r"lowest of 3 +(\S+)", out)[1]) == pytest.approx(min(values), rel=1e-4)
    assert float(re.search(r"mean of 3 +(\S+)", out)[1]) == pytest.approx(np.mean(values), rel=1e-4)
    recorded = lines_of(run_dir / "metrics.jsonl")[-3:]
    assert [r["seeds"] for r in recorded] == ["0-9", "50000-50009", "100000-100009"]
    assert all(r["sampler"]["num_steps"] == 2 for r in recorded)
    assert [r["value"] for r in recorded] == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("ranges, place, kept", [
    ("1", "f.npz", ["f.npz"]),
    ("1,2", "kept", ["kept/ckpt_000000.npz", "kept/ckpt_2_000000.npz"])])
def test_features_of_a_run_are_kept_in_a_file_or_in_one_for_each_folder(
        run_dir, data, tmp_path, capsys, ranges, place, kept):
    call(capsys, "calc", f"--images={run_dir}", f"--ref={data / 'real.zip'}", "--num=10",
         f"--gen_seed={ranges}", f"--features={tmp_path / place}", *PIXELS)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.npz"))
    assert [re.sub(r"\.\d+(?=\.npz)", "", name) for name in found] == kept


@pytest.mark.long
def test_gen_gives_the_scores_of_generate_and_calc(run_dir, data, capsys, tmp_path):
    network = sorted(run_dir.glob("network-snapshot-*.pt"))[0]
    args = [f"--ref={data / 'real.zip'}", "--metrics=fid,kid,pr", *PIXELS]
    call(capsys, "gen", f"--network={network}", "--seeds=0-9", "--ranges=2", "--steps=2",
         "--batch=4", f"--out={tmp_path / 'gen.jsonl'}", *args)
    for first in (0, 10):
        images = tmp_path / f"images{first}"
        generate.main([f"--network={network}", f"--outdir={images}", "--steps=2", "--batch=4",
                       f"--seeds={first}-{first + 9}", "--device=cpu"], standalone_mode=False)
        call(capsys, "calc", f"--images={images}", "--num=10", "--batch=4",
             f"--out={tmp_path / 'calc.jsonl'}", *args)
    direct, written = lines_of(tmp_path / "gen.jsonl"), lines_of(tmp_path / "calc.jsonl")
    assert [r["value"] for r in direct] == pytest.approx([r["value"] for r in written], rel=1e-9)
    assert [r["seeds"] for r in direct] == [r["seeds"] for r in written]
    assert direct[0]["sampler"].items() <= written[0]["sampler"].items()


@pytest.mark.parametrize("flags, code, words", [
    (["--class=7"], 2, "--class=7: must be between|is unconditional"),
    (["--seeds=3"], 1, "1 image, at least 2 needed"),
    (["--steps=0"], 2, "'0' is not a list of whole numbers, each at least 1"),
    (["--S_churn=-1"], 2, "not in the range"),
])
def test_gen_refuses_in_one_line(run_dir, data, capsys, flags, code, words):
    network = sorted(run_dir.glob("network-snapshot-*.pt"))[0]
    assert re.search(words, refused(capsys, "gen", f"--network={network}", *PIXELS,
                                    f"--ref={data / 'real.zip'}", *flags, code=code))


def test_scores_that_cant_be_recorded_are_still_printed(run_dir, data, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    fid.main(["calc", f"--images={data / 'fake.zip'}", f"--ref={data / 'real.zip'}", "--num=50",
              f"--out={tmp_path / 'file' / 'm.jsonl'}", *PIXELS], standalone_mode=False)
    out, err = capsys.readouterr()
    assert re.fullmatch(r"pixels Frechet distance: [\d.]+\n", out)
    assert "m.jsonl not written" in err


@pytest.mark.scripts
@pytest.mark.slow
def test_two_processes_give_all_scores_of_one(run_dir, data, tmp_path):
    network = sorted(run_dir.glob("network-snapshot-*.pt"))[0]
    # A batch of another size rounds otherwise, by which a pixel may reach another gray level: two
    # batches here and there, of five images and of four.
    for nproc in (0, 2):
        run_script("fid.py", "gen", f"--network={network}", "--seeds=0-8", "--steps=2",
                   f"--ref={data / 'real.zip'}", "--metrics=fid,kid,pr", "--batch=5",
                   f"--out={tmp_path / f'{nproc}.jsonl'}", *PIXELS, processes=nproc)
    single, double = (lines_of(tmp_path / f"{n}.jsonl") for n in (0, 2))
    assert [r["metric"] for r in single] == [r["metric"] for r in double]
    assert [r["value"] for r in double] == pytest.approx([r["value"] for r in single], rel=1e-9,
                                                         abs=1e-12)


def test_an_evaluator_names_what_does_not_fit(data):
    real = open_data(data / "real.zip")
    evaluator = Evaluator("pixels", real, ["fid"], torch.device("cpu"), "real")
    evaluator.check([3, 8, 8], "own")
    with pytest.raises(ValueError, match="^real: its images are 8x8, but those of own are 6x4; "):
        evaluator.check([3, 4, 6], "own")


def test_a_run_that_moved_keeps_its_scores_together(run_dir, data, capsys, tmp_path):
    shutil.copytree(run_dir, tmp_path / "copy")
    folder = sorted((tmp_path / "copy").glob("ckpt_0*"))[0]
    call(capsys, "calc", f"--images={folder}", f"--ref={data / 'real.zip'}", "--num=10", *PIXELS)
    assert not (folder / "metrics.jsonl").exists()
    assert lines_of(tmp_path / "copy" / "metrics.jsonl")[-1]["images"] == str(folder)


# ------------------------------------------------------------------------------- during training


EVAL = ["--eval=0.016", "--eval-num=6", "--eval-detector=pixels", "--tick=0.008", "--snap=9",
        "--dump=1", "--device=cpu"]


@pytest.mark.long
@pytest.mark.parametrize("precision", [  # of training, not of scores
    pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_scores_during_training_are_those_of_the_states(data, capsys, tmp_path, precision):
    args = [f"--data={data / 'real.zip'}", f"--outdir={tmp_path}", "--name=a",
            "--duration=0.000056", f"--eval-ref={data / 'fake.zip'}", *EVAL, *TINY_RUN,
            f"--precision={precision}"]
    train.main(args, standalone_mode=False)
    out, run = capsys.readouterr().out, tmp_path / "a"
    key = "Metrics/frechet_distance"
    scores = {line["Progress/kimg"]["mean"]: line[key]["mean"]
              for line in lines_of(run / "stats.jsonl") if key in line}
    assert list(scores) == [0.016, 0.032, 0.048, 0.056]  # every 16 images, and at the end
    recorded = lines_of(run / "metrics.jsonl")
    assert {r["kimg"]: r["value"] for r in recorded} == scores
    assert {r["sampler"]["precision"] for r in recorded} == {"fp32"}
    for kimg, score in scores.items():
        state = run / f"training-state-{kimg:010.3f}.pt"
        call(capsys, "gen", f"--network={state}", "--seeds=0-5", f"--ref={data / 'fake.zip'}",
             f"--out={tmp_path / 'gen.jsonl'}", *PIXELS)
        assert lines_of(tmp_path / "gen.jsonl")[-1]["value"] == pytest.approx(score, rel=1e-9)
    (tmp_path / "gen.jsonl").rename(tmp_path / "metrics.jsonl")
    groups = {ScoreGroup.of(score) for folder in (run, tmp_path) for score in read_scores(folder)}
    assert len(groups) == 1  # reports compare them
    best = min(scores, key=scores.get)
    content = checkpoint.load_state(run / checkpoint.BEST_STATE)
    assert content["progress"]["cur_nimg"] == round(best * 1000)
    assert content["progress"]["best_score"] == scores[best]
    assert len(re.findall("the lowest so far", out)) == 4
    assert checkpoint.BEST_STATE not in [path.name for path in checkpoint.training_states(run)]


@pytest.mark.slow
@pytest.mark.long
def test_a_resumed_run_remembers_its_best_score(data, capsys, tmp_path):
    args = [f"--data={data / 'real.zip'}", f"--outdir={tmp_path}", *EVAL, *TINY_RUN,
            f"--eval-ref={data / 'fake.zip'}"]
    train.main([*args, "--name=whole", "--duration=0.000048"], standalone_mode=False)
    train.main([*args, "--name=parts", "--duration=0.000032"], standalone_mode=False)
    train.main([*args, "--name=parts", "--duration=0.000048", "--resume=auto"],
               standalone_mode=False)
    whole, parts = (checkpoint.load_state(tmp_path / name / "training-state-000000.048.pt")
                    for name in ("whole", "parts"))
    assert whole["progress"]["best_score"] == parts["progress"]["best_score"]
    assert checkpoint.digest(whole["net"]) == checkpoint.digest(parts["net"])


@pytest.mark.parametrize("flags, code, words", [
    (["--eval=1"], 2, "--eval and --eval-ref: must be given together"),
    (["--eval-ref=x.npz"], 2, "--eval and --eval-ref: must be given together"),
    (["--eval=0", "--eval-ref=x.npz"], 2, "--eval=0.0: must be positive"),
    (["--eval=1", "--eval-ref=x.npz", "--eval-num=1"], 2, "--eval-num=1: must be 2 or more"),
    (["--eval=1", "--eval-ref=x.npz"], 1, "x.npz"),
])
def test_bad_evaluation_is_refused_before_training(data, capsys, tmp_path, flags, code, words):
    with pytest.raises(SystemExit) as caught:
        train.main([f"--data={data / 'real.zip'}", f"--outdir={tmp_path}", "--name=a",
                    "--eval-detector=pixels", "--device=cpu", *TINY_RUN, *flags])
    assert caught.value.code == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("a/training-state*"))


@pytest.mark.scripts
@pytest.mark.slow
def test_two_processes_score_during_training_as_fid_py_does(data, tmp_path):
    run_script("train.py", f"--data={data / 'real.zip'}", f"--outdir={tmp_path}", "--name=a",
               "--duration=0.000016", f"--eval-ref={data / 'fake.zip'}", *EVAL, *TINY_RUN,
               processes=2)
    # In batches of three, as either process has: another size rounds otherwise.
    run_script("fid.py", "gen", f"--network={tmp_path / 'a' / checkpoint.BEST_STATE}",
               "--seeds=0-5", f"--ref={data / 'fake.zip'}", f"--out={tmp_path / 'gen.jsonl'}",
               "--batch=3", *PIXELS)
    [during], [after] = lines_of(tmp_path / "a/metrics.jsonl"), lines_of(tmp_path / "gen.jsonl")
    assert during["value"] == pytest.approx(after["value"], rel=1e-9)


@pytest.mark.long
def test_kernel_distances_are_over_the_subsets_of_torch_fidelity():
    # Its defaults: kid_subsets=100, kid_subset_size=1000, rng_seed=2020.
    x, y = (torch.randn([1500, 4], generator=torch.Generator().manual_seed(k), dtype=torch.float64)
            for k in range(2))
    rng = np.random.RandomState(2020)
    values = []
    for _ in range(100):
        a, b = (t[rng.choice(1500, 1000, replace=False)].numpy() for t in (x, y))
        linear = (u @ v.T / 4 + 1 for u, v in ((a, a), (b, b), (a, b)))
        k_aa, k_bb, k_ab = (k * k * k for k in linear)
        inside = sum((k.sum() - np.trace(k)) / (1000 * 999) for k in (k_aa, k_bb))
        values.append(inside - 2 * k_ab.mean())
    assert distances.kernel_distance(x, y) == pytest.approx(
        (np.mean(values), np.std(values)), rel=1e-6)


def test_the_features_that_are_kept_of_many_are_evenly_spaced(data, monkeypatch):
    monkeypatch.setattr(evaluator_module, "MAX_BANK", 4)
    reference = evaluator_module.dataset_reference(
        open_data(data / "real.zip"), build_detector("pixels", torch.device("cpu")),
        with_features=True, batch=5, workers=0)
    num = reference.count
    whole = dataset_features(open_data(data / "real.zip"),
                             build_detector("pixels", torch.device("cpu")), metrics=["kid"],
                             batch=5, workers=0).features
    assert torch.equal(reference.features, whole[[0, (num - 1) // 3, 2 * (num - 1) // 3, num - 1]])


def test_each_detector_and_need_of_features_has_a_cached_reference_of_its_own(data, monkeypatch,
                                                                              tmp_path):
    monkeypatch.setenv("PFGMPP_CACHE_DIR", str(tmp_path))

    def reference(detector, with_features):
        return evaluator_module.cached_reference(
            open_data(data / "real.zip"), detector, with_features=with_features, batch=8, workers=0)

    pixels = build_detector("pixels", torch.device("cpu"))
    shrunk = build_detector("pixels", torch.device("cpu"))
    shrunk.name = "pixels:other"
    assert reference(pixels, False).features is None
    assert len(reference(pixels, True).features)
    assert reference(shrunk, False).detector == "pixels:other"
    assert reference(pixels, False).detector == "pixels"
    assert len(list(tmp_path.rglob("*.npz"))) == 3


@pytest.mark.parametrize("ours, theirs", [
    (None, {"center": [0.0], "spread": [1.0]}), ({"center": [0.0], "spread": [1.0]}, None),
    ({"center": [0.0], "spread": [1.0]}, {"center": [0.0], "spread": [2.0]})])
def test_images_of_another_scale_than_the_reference_are_refused(data, ours, theirs):
    real = open_data(data / "real.zip")
    evaluator = Evaluator("pixels", real, ["fid"], torch.device("cpu"), "real")
    evaluator._data = SimpleNamespace(image_shape=[3, 8, 8], scale=theirs)
    with pytest.raises(ValueError, match="^real: has another scale than the images of own"):
        evaluator.check([3, 8, 8], "own", ours)
    evaluator.check([3, 8, 8], "own", theirs)
