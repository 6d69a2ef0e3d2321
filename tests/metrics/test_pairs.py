"""Images against their truths: values, partners, units, files and the picture."""

import csv
import json
import math
import re
import shutil
import sys
import tracemalloc
import types
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import scipy.signal
import torch
from scripts import ROOT, run_script

import fid
from images.dataset import ImageFolderDataset
from images.scaling import Scaling
from metrics.paired import PAIRED_METRICS, as_number, load_metric, ssim_problem
from metrics.pairs import Pairs, Summary, _Likeness, _UnitCheck, value_range_of
from reports.comparison import ScoreGroup
from reports.run_record import read_scores

HU = (-1024.0, 3071.0)
RNG = np.random.default_rng


def smooth(shape, seed=0, low=-1000.0, high=1000.0):
    """Returns an image with structure at several sizes, float32."""
    noise = RNG(seed).standard_normal(shape)
    values = sum(scipy.ndimage.gaussian_filter(noise, (0, s, s)) * s for s in (1, 3))
    values = (values - values.min()) / (values.max() - values.min())
    return (low + (high - low) * values).astype(np.float32)


def write(folder, images, names=None, **record):
    """Writes images [C, H, W] as .npy or, if they are 8-bit, as PNG; records go to dataset.json."""
    for i, image in enumerate(images):
        path = Path(folder, names[i] if names else f"img{i:03d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if image.dtype == np.uint8:
            pixels = image.transpose(1, 2, 0)
            pixels = pixels.squeeze(2) if len(image) == 1 else pixels
            PIL.Image.fromarray(pixels).save(f"{path}.png")
        else:
            np.save(path, image)
    if record:
        Path(folder, "dataset.json").write_text(json.dumps({"labels": None, **record}))
    return folder


def scale(low, high):
    return {"center": [(low + high) / 2], "spread": [(high - low) / 2]}


@pytest.fixture
def ct(tmp_path):
    """Four truths in HU with noisy conditions, and outputs as generate.py would name them."""
    truths = [smooth((1, 24, 20), seed) for seed in range(4)]
    noise = [RNG(10 + seed).standard_normal((1, 24, 20)).astype(np.float32) for seed in range(4)]
    write(tmp_path / "truth", truths, scale=scale(*HU), cond_scale=scale(*HU))
    write(tmp_path / "truth/cond", [t + 60 * n for t, n in zip(truths, noise, strict=True)])
    write(tmp_path / "out", [t + 20 * n for t, n in zip(truths, noise, strict=True)],
          [f"{i:06d}" for i in range(4)])
    (tmp_path / "out/generate.json").write_text(json.dumps({"scale": scale(*HU), "num_steps": 4}))
    return tmp_path, truths, noise


@pytest.fixture
def run(capsys):
    def run(*args):
        capsys.readouterr()
        fid.main(["pairs", *map(str, args)], standalone_mode=False)
        return capsys.readouterr()
    return run


@pytest.fixture
def fails(capsys):
    def fails(*args, exit_code=1):
        """Returns the one line that a failing command prints."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            fid.main(["pairs", *map(str, args)])
        assert caught.value.code == exit_code
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 or exit_code == 2  # which shows the usage too
        return lines[-1]
    return fails


# Values


def literal_ssim(x, y, low, high, window, is_sample):
    """Structural similarity of Wang et al. 2004, Eq. 13, over all windows inside the image."""
    L, n = high - low, window.size
    c1, c2 = (0.01 * L) ** 2, (0.03 * L) ** 2
    values = []
    for a, b in zip(x - low, y - low, strict=True):
        def mean(z):
            return scipy.signal.convolve2d(z, window[::-1, ::-1], mode="valid")
        bessel = n / (n - 1) if is_sample else 1
        ma, mb = mean(a), mean(b)
        va, vb, vab = (bessel * (mean(p * q) - mean(p) * mean(q)) for p, q in (
            (a, a), (b, b), (a, b)))
        values.append((((2 * ma * mb + c1) * (2 * vab + c2))
                       / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())
    return np.mean(values)


def gaussian_window():
    weights = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)]
                        for i in range(-5, 6)])
    return weights / weights.sum()


@pytest.mark.parametrize("channels, low, high", [(1, *HU), (3, 0.0, 255.0), (2, -1.0, 1.0)])
def test_ssim_is_its_formula_over_windows_inside_the_image(channels, low, high):
    pytest.importorskip("skimage")
    y = smooth((channels, 32, 27), 0, low, high).astype(float)
    x = y + (high - low) / 20 * RNG(1).standard_normal(y.shape)
    assert PAIRED_METRICS["ssim"](x, y, (low, high)) == pytest.approx(
        literal_ssim(x, y, low, high, gaussian_window(), False), abs=1e-10)
    assert PAIRED_METRICS["ssim_uniform"](x, y, (low, high)) == pytest.approx(
        literal_ssim(x, y, low, high, np.full((7, 7), 1 / 49), True), abs=1e-10)


def test_psnr_and_errors_are_their_formulas():
    y = smooth((3, 9, 11), 0).astype(float)
    x = y + 30 * RNG(1).standard_normal(y.shape)
    mse = sum((a - b) ** 2 for a, b in zip(x.ravel(), y.ravel(), strict=True)) / x.size
    assert PAIRED_METRICS["psnr"](x, y, HU) == pytest.approx(10 * math.log10(4095**2 / mse))
    assert PAIRED_METRICS["rmse"](x, y, HU) == pytest.approx(math.sqrt(mse))
    assert PAIRED_METRICS["mae"](x, y, HU) == pytest.approx(
        sum(abs(a - b) for a, b in zip(x.ravel(), y.ravel(), strict=True)) / x.size)
    # 60 HU of 4095: the forks' noisy slices
    assert PAIRED_METRICS["psnr"](y + 60, y, HU) == pytest.approx(36.68, abs=0.005)


@pytest.mark.parametrize("metric", ["psnr", "ssim", "ssim_uniform"])
def test_scores_over_a_range_do_not_depend_on_the_unit(metric):
    if "ssim" in metric:
        pytest.importorskip("skimage")
    y = smooth((1, 20, 20), 0).astype(float)
    x = y + 100 * RNG(1).standard_normal(y.shape)
    expected = PAIRED_METRICS[metric](x, y, HU)
    for low, high in ((0, 1), (-1, 1), (500, 70_000)):
        a, b = (low + (high - low) * (v - HU[0]) / 4095 for v in (x, y))
        assert PAIRED_METRICS[metric](a, b, (low, high)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric, best", [("psnr", math.inf), ("ssim", 1), ("ssim_uniform", 1),
                                          ("rmse", 0), ("mae", 0)])
def test_an_image_that_is_its_truth_has_the_best_score(metric, best):
    if "ssim" in metric:
        pytest.importorskip("skimage")
    y = smooth((2, 16, 16), 0).astype(float)
    assert PAIRED_METRICS[metric](y, y, HU) == best


def test_means_and_deviations_are_of_the_finite_values():
    values = [41.0, 44.0, math.inf, 43.5]
    finite = np.array([41.0, 44.0, 43.5])
    found = Summary.of(values)
    assert found.mean == pytest.approx(finite.mean())
    assert found.std == pytest.approx(finite.std(ddof=1))
    assert (found.num_finite, found.num_infinite) == (3, 1)
    assert Summary.of([math.inf] * 2) == (math.inf, None, 0, 2)
    assert Summary.of([40.0]) == (40.0, None, 1, 0)


@pytest.mark.parametrize("low, high, bits", [(*HU, 32), (0, 255, 8), (0, 65535, 16)])
def test_the_range_is_what_networks_see_as_minus_one_and_one(low, high, bits):
    scaling = Scaling(((low + high) / 2,), ((high - low) / 2,), is_8bit=bits == 8)
    assert value_range_of(scaling) == (low, high)


# Partners


def found_partners(tmp_path, names, others, by="auto", is_generated=False, record=None):
    image = np.zeros((1, 2, 2), np.float32)
    for folder, own in (("a", names), ("b", others)):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        write(tmp_path / folder, [image] * len(own), own)
    if is_generated:
        (tmp_path / "a/generate.json").write_text(json.dumps(record or {}))
    pairs = Pairs(tmp_path / "a", tmp_path / "b", by=by)
    assert len(pairs) == len(names)
    return pairs.partners.found_by, pairs.partners.numbers


def test_partners_go_by_name_and_there_may_be_more_truths(tmp_path):
    assert found_partners(tmp_path, "ca", "abcd") == ("name", [0, 2])
    # With folders where both have them, else without.
    assert found_partners(tmp_path, ["y/a", "x/a"], ["x/a", "x/b", "y/a"]) == ("name", [0, 2])
    assert found_partners(tmp_path, ["b", "a"], ["x/a", "y/b"]) == ("name", [0, 1])
    assert found_partners(tmp_path, ["00000/a"], ["a", "b"]) == ("name", [0])


def test_partners_go_by_order_where_no_name_fits_and_there_are_as_many(tmp_path):
    assert found_partners(tmp_path, "pqr", "abc") == ("order", [0, 1, 2])
    assert found_partners(tmp_path, "abc", "cba", by="order") == ("order", [0, 1, 2])
    # A folder that tells two images apart can't be left out.
    assert found_partners(tmp_path, ["a", "b"], ["x/a", "y/a"]) == ("order", [0, 1])


def test_images_of_generate_belong_to_the_truths_of_their_seeds(tmp_path):
    seeds = ["000003", "000000", "000005"]
    assert found_partners(tmp_path, seeds, "abcd", is_generated=True) == ("seed", [0, 3, 1])
    assert found_partners(tmp_path, [f"000000/{s}" for s in seeds], "abcd", is_generated=True) == (
        "seed", [0, 3, 1])
    # Numbered from 0 the two rules agree; numbered from 1 somebody has to say which it is.
    numbered = [f"{i:06d}" for i in range(6)]
    assert found_partners(tmp_path, seeds, numbered, is_generated=True) == ("name", [0, 3, 5])
    args = tmp_path, ["000003"], [f"{i:06d}" for i in range(1, 7)]
    with pytest.raises(ValueError, match="names and seeds give.*different.*--pair-by=name or"):
        found_partners(*args, is_generated=True)
    assert found_partners(*args, is_generated=True, by="name") == ("name", [2])
    assert found_partners(*args, is_generated=True, by="order") == ("seed", [3])
    # Names that are those of the inputs say it themselves.
    assert found_partners(*args, is_generated=True, record={"names": "inputs"}) == ("name", [2])


NUMBERED = [f"00000/img{i:08d}" for i in range(3)]
SEEDS = [f"{i:06d}" for i in range(3)]


@pytest.mark.parametrize("names, made_of, more, args, is_doubted", [
    (NUMBERED, "other", {"init_of": "conditions"}, [], True),
    (NUMBERED, "other", {}, ["--input=cond"], True),
    (NUMBERED, "truth", {"init_of": "conditions"}, [], False),
    (NUMBERED, "noisy", {}, ["--input={}/noisy"], False),
    (NUMBERED, "other", {}, ["--input={}/noisy"], True),
    (SEEDS, "other", {"init_of": "conditions", "names": None}, [], True),
    (SEEDS, "noisy", {"names": None}, [], False),  # a folder of measurements
    (["a", "b", "c"], "other", {"init_of": "conditions"}, [], False),  # the same slices
    (["a", "b", "c"], "noisy", {}, [], False),
    (NUMBERED, None, {}, [], False)])
@pytest.mark.parametrize("key", ["init_image", "cond_image"])
def test_images_made_of_another_paired_data_set_are_doubted(
        run, tmp_path, names, made_of, more, args, is_doubted, key):
    own = NUMBERED if names is SEEDS else names
    truths = [smooth((1, 8, 8), i) for i in range(3)]
    for seed, folder in enumerate(("truth", "other")):
        write(tmp_path / folder, [t + seed for t in truths], own, scale=scale(*HU),
              cond_scale=scale(*HU))
        write(tmp_path / folder / "cond", [t + 30 + seed for t in truths], own)
    write(tmp_path / "noisy", [t + 30 for t in truths], own)
    write(tmp_path / "out", [t + 5 for t in truths], names)
    made = {key: ImageFolderDataset(tmp_path / made_of).fingerprint} if made_of else {}
    (tmp_path / "out/generate.json").write_text(json.dumps({"names": "inputs", **made, **more}))
    args = [arg.format(tmp_path) for arg in args]
    paired = f"--images={tmp_path}/out", f"--truth={tmp_path}/truth", "--metrics=mae"
    warned = run(*paired, *args).err
    assert len(warned.splitlines()) == is_doubted and ("another data set" in warned) == is_doubted
    # Truths by themselves may be those of any pairs.
    shutil.rmtree(tmp_path / "truth/cond")
    if "--input=cond" not in args:
        assert run(*paired, *args).err == ""


@pytest.mark.parametrize("names, others, by", [
    ("abx", "abc", "auto"),  # by order x would silently belong to c
    ("abx", "abcd", "auto"), ("abc", "ab", "auto"), ("pq", "abc", "order"), ("pqr", "abc", "name")])
def test_images_without_partners_are_refused(tmp_path, names, others, by):
    named = len(set(names) & set(others))
    with pytest.raises(ValueError, match=rf"--images=.* has {len(names)} images, --truth=.*"
                       rf" has {len(others)}, and {named} have a partner of the same name; give"):
        found_partners(tmp_path, names, others, by=by)


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


@pytest.fixture
def seeds_2_to_7(tmp_path):
    """Six truths, and a folder of images of the seeds 2 to 7, each of the truth of its seed."""
    truths = [smooth((1, 16, 16), i) for i in range(6)]
    write(tmp_path / "truth", truths)
    write(tmp_path / "runs/sd", [truths[seed % 6] + 5 for seed in range(2, 8)],
          [f"{seed:06d}" for seed in range(2, 8)])
    (tmp_path / "runs/sd/generate.json").write_text(json.dumps({"subdirs": False}))
    return tmp_path


@pytest.mark.parametrize("place", ["runs/sd", "runs", "deep.zip", "flat.zip"])
def test_seeds_are_those_of_the_record_in_the_folder_of_the_images(run, seeds_2_to_7, place):
    root = seeds_2_to_7
    zipped(root / "runs", root / "deep.zip")
    zipped(root / "runs/sd", root / "flat.zip")
    done = run(f"--images={root / place}", f"--truth={root}/truth", "--range=-1000,1000",
               "--metrics=mae", f"--out={root}/scores")
    assert "6 images, paired by seed\n" in done.out and "\nmae 5 +- " in done.out
    assert done.err == ""
    [record] = map(json.loads, (root / "scores/metrics.jsonl").read_text().splitlines())
    assert record["seeds"] == "2-7" and record["sampler"] == {"subdirs": False}


@pytest.mark.parametrize("folder", ["", "sd/", "000000/"])
def test_numbers_that_may_be_seeds_are_refused_without_a_record(tmp_path, folder):
    names = [f"{folder}{seed:06d}" for seed in range(2, 8)]
    with pytest.raises(ValueError, match="000002.npy and the others seem to be named by seeds "
                       "that are not 0 to 5, but .*--pair-by=order or --pair-by=name"):
        found_partners(tmp_path, names, "abcdef")
    assert found_partners(tmp_path, names, "abcdef", by="order") == ("order", [0, 1, 2, 3, 4, 5])
    # From 0 on both rules agree. Names of inputs are no seeds, and neither are other numbers.
    numbered = [f"{folder}{seed:06d}" for seed in range(6)]
    assert found_partners(tmp_path, numbered, "abcdef") == ("order", [0, 1, 2, 3, 4, 5])
    assert found_partners(tmp_path, names, "abcdef", is_generated=True,
                          record={"names": "inputs"})[0] == "order"
    assert found_partners(tmp_path, ["02", "03"], "ab") == ("order", [0, 1])


def test_seeds_beside_other_names_are_refused(tmp_path):
    names = ["000001", "000000", "mean"]
    with pytest.raises(ValueError, match="2 of 3 images are named by seeds, such as 000000.npy"):
        found_partners(tmp_path, names, "abc", is_generated=True)
    assert found_partners(tmp_path, names, "abc", is_generated=True, by="order")[0] == "order"


ACCENTS = ["Évora", "Eza", "Zürich", "Zug"]  # sorted by letters in one form, not in the other


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_fit_whether_accents_are_letters_of_their_own_or_not(tmp_path, forms):
    own, other = ([unicodedata.normalize(form, name) for name in ACCENTS] for form in forms)
    assert sorted(own) != [unicodedata.normalize(forms[0], name) for name in sorted(other)]
    found_by, numbers = found_partners(tmp_path, own, other)
    assert found_by == "name"
    for name, number in zip(sorted(own), numbers, strict=True):
        assert unicodedata.normalize(forms[1], name) == sorted(other)[number]


@pytest.mark.parametrize("names, others, doubt", [
    ("pqr", "abc", "no image has a partner of the same name"),
    (["a1", "b2"], ["x1", "x2"], "no image has a partner of the same name"),
    ([f"x{i}" for i in range(1, 12)], [f"y{i:02d}" for i in range(1, 12)], "do not match those"),
    (["x1", "x2", "x4"], ["y1", "y2", "y3"], "do not match those"),
    (["x0", "x1", "x2"], ["y1", "y2", "y3"], None), (["s/x007"], ["y"], None),
    (["x7", "x8"], ["000000", "000001"], None), (["a/01", "a/02"], ["1", "2"], None)])
def test_an_order_that_names_do_not_show_is_doubted(run, tmp_path, names, others, doubt):
    truths = [smooth((1, 8, 8), i) for i in range(len(names))]
    write(tmp_path / "truth", truths, sorted(others))
    write(tmp_path / "out", [t + 5 for t in truths], sorted(names))
    args = [f"--images={tmp_path}/out", f"--truth={tmp_path}/truth", "--range=-1000,1000",
            "--metrics=mae"]
    done = run(*args)
    assert "paired by order\n" in done.out and len(done.err.splitlines()) == bool(doubt)
    assert (doubt or "") in done.err and ("give --pair-by=order" in done.err) == bool(doubt)
    assert run(*args, "--pair-by=order").err == ""
    assert (doubt or "") in run(*args, f"--input={tmp_path}/truth").err


def swapped(n, *pairs):
    numbers = list(range(n))
    for a, b in pairs:
        numbers[a], numbers[b] = b, a
    return numbers


@pytest.mark.parametrize("order, num_better", [
    (swapped(9), 0), (swapped(9, (2, 5)), 2), (swapped(9, (0, 8), (3, 4)), 4),
    ([*range(1, 9), 0], 9), (swapped(400, (1, 30)), 2), (swapped(400, (35, 90)), 0)])
@pytest.mark.parametrize("noise", [0, 300])
def test_images_that_are_more_like_the_truths_of_others_are_named(order, num_better, noise):
    # Beyond 256 only blocks of 32 are looked at, here from 0, 50, 100 on.
    truths = [smooth((1, 40, 36), seed) for seed in range(len(order))]
    likeness = _Likeness(len(order))
    for number, of in enumerate(order):
        image = truths[of] + noise * RNG(of).standard_normal((1, 40, 36))
        likeness.add(number, image, truths[number])
    found = likeness.better()
    assert len(found) == num_better and likeness.count == min(len(order), 256)
    if len(order) == 9:
        assert [(a, b) for a, b, *_ in found] == [
            (i, of) for i, of in enumerate(order) if i != of]


@pytest.mark.parametrize("make", [
    lambda t, k: t[k] + 900 * RNG(k).standard_normal(t[k].shape),  # noisier than structure
    lambda t, k: scipy.ndimage.gaussian_filter(t[k], (0, 8, 8)), lambda t, k: 0 * t[k] + 7,
    lambda t, k: np.mean(t, 0), lambda t, k: 1000 * RNG(k).standard_normal(t[k].shape),
    lambda t, k: t[0] + (t[k] - t[0]) * 0.2,  # all like the first
], ids=["noisy", "smooth", "even", "mean", "others", "collapsed"])
def test_bad_images_are_not_taken_for_those_of_others(make):
    truths = [smooth((1, 40, 36), seed) for seed in range(20)]
    likeness = _Likeness(20)
    for k, truth in enumerate(truths):
        likeness.add(k, make(truths, k), truth)
    assert likeness.better() == []


def test_a_swap_is_warned_of_with_both_names(run, ct):
    root, *_ = ct
    (root / "out/000001.npy").rename(root / "out/x")
    (root / "out/000002.npy").rename(root / "out/000001.npy")
    (root / "out/x").rename(root / "out/000002.npy")
    [line] = run(f"--images={root}/out", f"--truth={root}/truth", "--metrics=mae").err.splitlines()
    assert re.search(rf"^Warning: --images={root}/out: 2 of 4 images are clearly more like another "
                     r"image's truth than their own, such as 000001.npy like img002.npy "
                     r"\(correlation 0\.9\d+, with its own -?0\.\d+\); are they paired rightly\?$",
                     line)


def test_seeds_are_recorded_only_if_a_record_says_so(run, tmp_path):
    image = smooth((1, 8, 8))
    names = ["A/001", "A/002", "B/001", "B/002"]
    superscript = ["1", "2", "\u00b2", "\u00b3"]
    inputs = [f"{i:06d}" for i in range(4)]
    for own, record in ((names, None), (superscript, None), (inputs, None),
                        (inputs, {"names": "inputs"}), (inputs, {})):
        for folder in ("truth", "out", "pairs_out"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        write(tmp_path / "truth", [image] * 4, own)
        write(tmp_path / "out", [image + 5] * 4, own)
        if record is not None:
            (tmp_path / "out/generate.json").write_text(json.dumps(record))
        run(f"--images={tmp_path}/out", f"--truth={tmp_path}/truth", "--range=-1000,1000",
            "--metrics=mae")
        [line] = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
        assert json.loads(line)["seeds"] == ("0-3" if record == {} else None)


# Ranges, kinds, units


@pytest.mark.parametrize("dtype, expected", [(np.uint8, 255), (np.uint16, 65535)])
def test_whole_numbers_have_the_range_of_their_bits(run, tmp_path, dtype, expected):
    truths = [smooth((3 if dtype == np.uint8 else 1, 12, 12), i, 0, expected).astype(dtype)
              for i in range(3)]
    offsets = RNG(0).integers(-9, 10, (3, *truths[0].shape))
    images = [np.clip(t.astype(int) + o, 0, expected).astype(dtype)
              for t, o in zip(truths, offsets, strict=True)]
    write(tmp_path / "truth", truths)
    write(tmp_path / "out", images)
    values = [20 * np.log10(expected / np.sqrt(np.mean((i.astype(float) - t.astype(float)) ** 2)))
              for i, t in zip(images, truths, strict=True)]
    out = run(f"--images={tmp_path}/out", f"--truth={tmp_path}/truth", "--metrics=psnr").out
    assert f"Range      0 to {expected} (" in out
    assert f"\npsnr {np.mean(values):.2f} +- {np.std(values, ddof=1):.2f} (3 images)\n" in out


def test_float_data_have_the_range_of_their_recorded_scale_or_need_one(run, fails, ct):
    root, truths, noise = ct
    mses = [np.mean((20 * n) ** 2) for n in noise]
    values = 10 * np.log10(4095**2 / np.array(mses))
    args = f"--images={root}/out", f"--truth={root}/truth", "--metrics=psnr"
    line = f"\npsnr {values.mean():.2f} +- {values.std(ddof=1):.2f} (4 images)\n"
    out = run(*args).out
    assert "Range      -1024 to 3071 (the scale of --truth)\n" in out and line in out
    out = run(*args, "--range=-1024,1023.5").out
    assert f"\npsnr {values.mean() - 20 * math.log10(2):.2f} +-" in out
    (root / "truth/dataset.json").unlink()
    error = fails(*args)
    assert error.startswith(f"Error: --truth={root}/truth: the f") and "--range=LO,HI" in error
    assert line in run(*args, "--range=-1024,3071").out


def test_channels_with_scales_of_their_own_need_a_range(fails, tmp_path):
    images = [smooth((2, 8, 8), 0)]
    write(tmp_path / "truth", images, scale={"center": [0, 5], "spread": [1, 1]})
    write(tmp_path / "out", images)
    assert "give --range=LO,HI" in fails(f"--images={tmp_path}/out", f"--truth={tmp_path}/truth",
                                         "--metrics=psnr")


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 1), (-1e6, 1e6)])
def test_images_of_another_unit_are_refused_and_nothing_is_written(fails, ct, low, high):
    root, truths, _ = ct
    shutil.rmtree(root / "out")
    write(root / "out", [(low + (high - low) * (t + 1000) / 2000).astype(np.float32)
                         for t in truths])
    error = fails(f"--images={root}/out", f"--truth={root}/truth", "--metrics=psnr")
    assert f"--images={root}/out: values from {low:.6g} to {high:.6g}, but those of" in error
    assert "from -1000 to 1000; both must be in the units of the data" in error
    assert not (root / "pairs_out").exists() and not (root / "out/metrics.jsonl").exists()


def test_8_bits_are_not_compared_with_more(fails, run, ct):
    root, truths, _ = ct
    shutil.rmtree(root / "out")
    write(root / "out", [((t + 1000) / 2000 * 255).astype(np.uint8) for t in truths])
    assert "8-bit images, but those of" in fails(f"--images={root}/out", f"--truth={root}/truth")
    # Means of 8-bit samples are floating-point, in the same unit.
    write(root / "mean", [((t + 1000) / 2000 * 255).astype(np.float32) for t in truths])
    out = run(f"--images={root}/mean", f"--truth={root}/out", "--metrics=rmse").out
    rounding = math.sqrt(np.mean(np.square([t % 1 for t in [
        (t + 1000) / 2000 * 255 for t in truths]])))
    assert float(re.search("rmse (\\S+)", out)[1]) == pytest.approx(rounding, rel=0.02)


@pytest.mark.parametrize("slope, offset", [
    (255 / 4095, 255 * 1024 / 4095),  # HU as 0 to 255, but floating-point
    (1, 1024), (1, -1024), (0.1, 0), (10, 0), (-1, 0), (1.8, 320)])
def test_images_that_follow_their_truths_by_a_line_of_another_unit_are_named(
        run, ct, slope, offset):
    root, truths, noise = ct
    images = [slope * (t + 20 * n) + offset for t, n in zip(truths, noise, strict=True)]
    shutil.rmtree(root / "out")
    write(root / "out", [image.astype(np.float32) for image in images])
    x, y = np.ravel(images), np.ravel(truths)
    a, b = np.polyfit(y.astype(float), x, 1)
    lines = run(f"--images={root}/out", f"--truth={root}/truth", "--metrics=mae",
                "--input=cond").err.splitlines()
    assert len(lines) == 1, "and not of the input, which has the unit of the truths"
    found = re.search(rf"^Warning: --images={root}/out: values are about (\S+) times those of "
                      rf"--truth={root}/truth ([-+]\S+) \(correlation (-?[\d.]+)\); are they in "
                      "the same unit\\?$", lines[0])
    assert [float(found[1]), float(found[2])] == pytest.approx([a, b], rel=1e-3, abs=0.02 * abs(a))
    assert float(found[3]) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=6e-4)


def test_the_line_is_that_of_all_pixels_of_images_of_many_sizes():
    check, rng, pairs = _UnitCheck(), RNG(0), []
    for i, shape in enumerate([(1, 3, 40), (1, 24, 20), (1, 5, 5)]):
        truth = 1e5 + 200 * i + 100 * rng.standard_normal(shape)
        pairs.append((0.3 * truth + 7 + 20 * rng.standard_normal(shape), truth))
        check.add(*pairs[-1])
    x, y = (np.concatenate([values.ravel() for values in side])
            for side in zip(*pairs, strict=True))
    slope, offset = np.polyfit(y, x, 1)
    assert check._line() == pytest.approx((slope, offset, np.corrcoef(x, y)[0, 1]), rel=1e-6)


@pytest.mark.parametrize("make", [
    lambda t, n: t + 60 * n, lambda t, n: 0.6 * t, lambda t, n: t + 150,
    lambda t, n: 1500 * n,  # not of these truths
    lambda t, n: t + 250 + 200 * n,  # an offset beside errors of its size
    lambda t, n: np.full_like(t, 40) + n / 20 * (t > 999),
], ids=["noisy", "smooth", "biased", "others", "noisy-biased", "nearly-even"])
@pytest.mark.parametrize("zero", [0, 1e5], ids=["at-0", "far-from-0"])
def test_poor_images_of_the_same_unit_are_not_doubted(tmp_path, make, zero):
    truths = [smooth((1, 24, 20), seed) for seed in range(4)]
    noise = [RNG(10 + seed).standard_normal((1, 24, 20)) for seed in range(4)]
    check = _UnitCheck()
    for t, n in zip(truths, noise, strict=True):
        check.add(make(t, n) + zero, t.astype(float) + zero)
    assert list(check.warnings("images", "truths")) == []


def test_truths_among_the_images_and_the_inputs_are_named(run, ct):
    root, truths, _ = ct
    out = run(f"--images={root}/truth", f"--truth={root}/truth", "--metrics=psnr,rmse")
    assert "4 of 4 images equal their truths" in out.err
    assert "\npsnr inf (4 images)\nrmse 0 +- 0 (4 images)\n" in out.out
    np.save(root / "out/000002.npy", truths[2])
    out = run(f"--images={root}/out", f"--truth={root}/truth", f"--input={root}/truth",
              "--metrics=psnr")
    assert f"Warning: --images={root}/out: 1 of 4 images equal" in out.err
    assert f"Warning: --input={root}/truth: 4 of 4 images equal" in out.err
    assert re.search(r"\npsnr [\d.]+ \+- [\d.]+ \(3 images; 1 that equal their truth left out\)\n",
                     out.out)
    [line] = map(json.loads, (root / "out/metrics.jsonl").read_text().splitlines())
    assert line["num"] == 4 and line["num_infinite"] == 1 and line["input"] == "inf"


def test_clipping_is_of_both_sides_and_only_on_demand(run, ct):
    root, truths, noise = ct
    args = (f"--images={root}/out", f"--truth={root}/truth", "--metrics=rmse", "--range=-500,500")
    images = [t + 20 * n for t, n in zip(truths, noise, strict=True)]
    plain = np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(images, truths, strict=True)])
    clipped = np.mean([np.sqrt(np.mean((np.clip(a, -500, 500) - np.clip(b, -500, 500)) ** 2))
                       for a, b in zip(images, truths, strict=True)])
    assert f"\nrmse {plain:.4g} +-" in run(*args).out
    out = run(*args, "--clip").out
    assert f"\nrmse {clipped:.4g} +-" in out and "clipped to it" in out
    assert f"{clipped:.4g}" != f"{plain:.4g}"


def test_images_of_many_sizes_are_scored_each_at_its_own(run, fails, tmp_path):
    shapes = [(1, 20, 30), (1, 33, 12), (1, 20, 30), (1, 11, 64)]
    truths = [smooth(shape, i) for i, shape in enumerate(shapes)]
    images = [t + 50 * RNG(i).standard_normal(t.shape).astype(np.float32)
              for i, t in enumerate(truths)]
    write(tmp_path / "truth", truths, scale=scale(*HU))
    write(tmp_path / "out", images)
    args = f"--images={tmp_path}/out", f"--truth={tmp_path}/truth"
    values = [20 * np.log10(4095 / np.sqrt(np.mean((a.astype(float) - b.astype(float)) ** 2)))
              for a, b in zip(images, truths, strict=True)]
    mean, std = np.mean(values), np.std(values, ddof=1)
    assert f"\npsnr {mean:.2f} +- {std:.2f} (4 images)\n" in run(*args).out
    np.save(tmp_path / "out/img001.npy", images[1].transpose(0, 2, 1))
    error = fails(*args)
    assert "img001.npy is 33x12, but img001.npy of --truth" in error and "is 12x33" in error


def test_images_of_other_channels_are_refused(fails, ct):
    root, truths, _ = ct
    shutil.rmtree(root / "out")
    write(root / "out", [np.concatenate([t, t]) for t in truths])
    error = fails(f"--images={root}/out", f"--truth={root}/truth")
    assert f"--images={root}/out: 2 channels, but --truth={root}/truth has 1;" in error


# The command


def test_inputs_are_scored_beside_the_images(run, ct):
    root, truths, noise = ct
    args = f"--images={root}/out", f"--truth={root}/truth", "--metrics=psnr,mae"
    mae = {factor: [np.mean(np.abs(factor * n)) for n in noise] for factor in (20, 60)}
    shutil.copytree(root / "truth/cond", root / "noisy")
    for given in ("cond", root / "noisy"):
        out = run(*args, f"--input={given}").out
        lines = re.findall(r"^((?:input )?\w+ [\d.]+ \+- .*)$", out, re.M)
        assert [line.split(" +-")[0].rsplit(" ", 1)[0] for line in lines] == [
            "psnr", "mae", "input psnr", "input mae"]
        assert lines[1].startswith(f"mae {np.mean(mae[20]):.4g} +- ")
        assert lines[3].startswith(f"input mae {np.mean(mae[60]):.4g} +- ")
        psnr, input_psnr = (float(re.search(rf"^{name} (\S+)", out, re.M)[1])
                            for name in ("psnr", "input psnr"))
        assert psnr - input_psnr == pytest.approx(20 * math.log10(3), abs=0.02)


def test_the_files_hold_each_image(run, ct):
    root, truths, noise = ct
    out = run(f"--images={root}/out", f"--truth={root}/truth", "--input=cond",
              "--metrics=psnr,rmse").out
    assert str(root / "pairs_out/pairs.csv") in out
    with open(root / "pairs_out/pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    text = (root / "pairs_out/pairs.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == len(lines) == 4
    for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
        rmse = math.sqrt(np.mean(((truths[i] + 20 * noise[i]).astype(float) - truths[i]) ** 2))
        of_input = math.sqrt(np.mean(((truths[i] + 60 * noise[i]).astype(float) - truths[i]) ** 2))
        psnr = 20 * math.log10(4095 / rmse)
        assert [row["image"], row["truth"]] == [line["image"], line["truth"]] == [
            f"{i:06d}.npy", f"img{i:03d}.npy"]
        for found in ([row[name] for name in ("rmse", "psnr", "input_rmse", "low", "high")],
                      [line["rmse"], line["psnr"], line["input"]["rmse"], *line["range"]]):
            np.testing.assert_allclose(np.array(found, float), [rmse, psnr, of_input, *HU],
                                       rtol=1e-6)
    records = [json.loads(line) for line in (root / "out/metrics.jsonl").read_text().splitlines()]
    assert [record["metric"] for record in records] == ["psnr", "rmse"]
    values = [line["psnr"] for line in lines]
    assert records[0]["value"] == pytest.approx(np.mean(values))
    assert records[0]["std"] == pytest.approx(np.std(values, ddof=1))
    assert records[0]["input"] == pytest.approx(np.mean([line["input"]["psnr"] for line in lines]))
    assert records[0] | {"paired_by": "seed", "num": 4, "range": list(HU), "clip": False,
                         "seeds": "0-3", "reference_num": 4,
                         "images": f"{root}/out", "reference": f"{root}/truth"} == records[0]
    assert records[0]["sampler"]["num_steps"] == 4


def test_reports_compare_scores_over_one_range_alone(run, ct):
    root, *_ = ct
    args = (f"--images={root}/out", f"--truth={root}/truth", "--metrics=psnr,rmse",
            f"--out={root}/scores")
    for more in ([], [], ["--range=-1000,1000"], ["--clip"]):
        run(*args, *more)
    scores = read_scores(root / "scores")
    groups = [ScoreGroup.of(score) for score in scores]
    assert len(scores) == 8 and len(set(groups)) == 6
    assert groups[0] == groups[2] != groups[4] and groups[0] != groups[6]
    assert groups[0].title == "PSNR" and groups[0].is_lower_better is False
    assert groups[1].title == "RMSE" and groups[1].is_lower_better is True


def test_what_takes_an_npz_says_so_and_calls_it_a_file(run, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, RNG(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8))
    out = run(f"--images={path}", f"--truth={path}", f"--input={path}").out
    assert "none, because --images is a file; give --out=DIR to write them" in out
    metavars = {name: {option.name: option.metavar for option in command.params}
                for name, command in fid.main.commands.items()}
    for command, option in [("pairs", "images"), ("pairs", "truth"), ("pairs", "input_"),
                            ("nearest", "images"), ("nearest", "data"), ("nearest", "held_out"),
                            ("ref", "data"), ("calc", "images"), ("calc", "ref_path")]:
        assert "NPZ" in metavars[command][option].split("|")
    assert "PKL" in metavars["gen"]["ref_path"].split("|")


def test_files_of_a_run_and_of_zips(run, ct):
    root, *_ = ct
    (root / "training_options.json").write_text("{}")
    (root / "out").rename(root / "ckpt_000200")
    args = f"--truth={root}/truth", "--metrics=psnr"
    run(f"--images={root}/ckpt_000200", *args)
    assert (root / "pairs_ckpt_000200/pairs.png").exists()
    [score] = read_scores(root)
    assert (score.metric, score.kimg) == ("psnr", 200)
    with zipfile.ZipFile(root / "out.zip", "w") as archive:
        for path in (root / "ckpt_000200").iterdir():
            archive.write(path, path.name)
    before = set(root.rglob("*"))
    plain = run(f"--images={root}/out.zip", *args).out
    assert "Files      none" in plain and set(root.rglob("*")) == before
    out = run(f"--images={root}/out.zip", f"--out={root}/new/scores", *args).out
    assert out.split("Files")[0] == plain.split("Files")[0]
    assert sorted(path.name for path in (root / "new/scores").iterdir()) == [
        "metrics.jsonl", "pairs.csv", "pairs.jsonl", "pairs.png"]


def test_scoring_twice_gives_the_same(run, ct):
    root, *_ = ct
    args = f"--images={root}/out", f"--truth={root}/truth", "--metrics=psnr,mae"
    files = [root / "pairs_out" / name for name in ("pairs.csv", "pairs.jsonl", "pairs.png")]
    first = run(*args).out
    before = [path.read_bytes() for path in files]
    assert run(*args).out == first and [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("place", ["out", "out/scores", "truth/scores"])
def test_files_never_go_among_the_images(fails, ct, place):
    root, *_ = ct
    assert "give a folder outside it" in fails(
        f"--images={root}/out", f"--truth={root}/truth", f"--out={root}/{place}")


@pytest.mark.parametrize("args, expected", [
    (["--range=5"], "must be LO,HI with LO < HI"), (["--range=5,5"], "must be LO,HI"),
    (["--range=0,inf"], "must be LO,HI"), (["--window=40"], "a center and a width above 0"),
    (["--window=40,0"], "a center and a width"), (["--metrics=fid"], "'fid' is not one of psnr"),
])
def test_wrong_flags_are_usage_errors(fails, ct, args, expected):
    root, *_ = ct
    assert expected in fails(f"--images={root}/out", f"--truth={root}/truth", *args, exit_code=2)


def test_what_is_missing_is_named_with_its_flag(fails, ct):
    root, *_ = ct
    args = {"--images": f"{root}/out", "--truth": f"{root}/truth", "--input": f"{root}/truth"}
    for flag in args:
        words = [f"{name}={value}" for name, value in (args | {flag: f"{root}/gone"}).items()]
        assert fails(*words).startswith(f"Error: {flag}={root}/gone: no such folder or ZIP")
    assert "has no condition images" in fails(
        f"--images={root}/truth", f"--truth={root}/out", "--input=cond")
    assert "must have at least one metric" in fails(
        f"--images={root}/out", f"--truth={root}/truth", "--metrics=")


def test_images_that_came_out_infinite_have_no_score(fails, ct):
    root, *_ = ct
    (root / "out/generate.json").write_text(json.dumps({"not_finite": [7]}))
    assert "values that are not finite" in fails(f"--images={root}/out", f"--truth={root}/truth")


@pytest.mark.scripts
def test_the_other_ranks_of_torchrun_leave_the_work_to_the_first(ct):
    root, *_ = ct
    done = run_script("fid.py", "pairs", f"--images={root}/out", f"--truth={root}/truth",
                      "--metrics=psnr", processes=2)
    assert done.stdout.count("(4 images)") == 1 and done.stderr == ""
    assert len((root / "out/metrics.jsonl").read_text().splitlines()) == 1


def test_images_are_read_one_by_one(tmp_path):
    image = smooth((1, 256, 256), 0)  # 256 kB
    write(tmp_path / "truth", [image] * 40)
    write(tmp_path / "out", [image + 1] * 40)
    pairs = Pairs(tmp_path / "out", tmp_path / "truth")
    tracemalloc.start()
    scores, _ = pairs.score({"psnr": PAIRED_METRICS["psnr"]}, HU)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(scores) == 40 and peak < 16 * image.nbytes


# SSIM without what it needs


def test_ssim_needs_its_package_and_images_of_its_window(run, fails, ct, monkeypatch):
    root, truths, noise = ct
    args = f"--images={root}/out", f"--truth={root}/truth"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--metrics=ssim: needs scikit-image, which is not installed: pip install " \
        "scikit-image; or leave ssim out" in fails(*args, "--metrics=psnr,ssim")
    out = run(*args)
    assert "Warning: ssim is left out" in out.err and "\nrmse " in out.out
    assert "\nssim" not in out.out
    monkeypatch.undo()
    pytest.importorskip("skimage")
    assert "\nssim 0." in run(*args).out
    assert ssim_problem("ssim", [(11, 30)]) is None
    assert ssim_problem("ssim_uniform", [(7, 7)]) is None
    assert "11x11 pixels, but an image has a side of 10" in ssim_problem("ssim", [(30, 10)])
    assert "7x7 pixels" in ssim_problem("ssim_uniform", [(30, 30), (6, 30)])


# Metrics of one's own


@pytest.fixture
def metric_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def worst(image, truth, value_range):\n"
                    "    low, high = value_range\n"
                    "    assert image.dtype == truth.dtype == 'float64' and image.ndim == 3\n"
                    "    return abs(image - truth).max() / (high - low)\n"
                    "def nothing(image, truth, value_range):\n"
                    "    return None\n")
    return path


def test_a_function_of_a_file_is_a_metric(run, fails, ct, metric_file):
    root, truths, noise = ct
    args = f"--images={root}/out", f"--truth={root}/truth"
    own = f"--metric-file={metric_file}:worst"
    expected = np.mean([np.abs((t + 20 * n).astype(float) - t).max() / 4095
                        for t, n in zip(truths, noise, strict=True)])
    for chosen, lines in (("--metrics=", 1), ("--metrics=mae", 2)):
        out = run(*args, chosen, own).out
        assert f"\nworst {expected:.4g} +- " in out and out.count("(4 images)") == lines
    error = fails(*args, f"--metric-file={metric_file}:nothing")
    assert error == "Error: 000000.npy: nothing gave None; must be a number"


HASTY = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Box:
    side: int = 2
def sneaky(image, truth, value_range):
    image -= truth
    truth[:] = 7
    return Box().side
def halves(image, truth, value_range):
    return 1 / 0
def opens(image, truth, value_range):
    open("gone.txt")
def leaves(image, truth, value_range):
    raise SystemExit(3)
def quiet(image, truth, value_range):
    raise KeyError
"""


def test_a_function_that_writes_into_images_spoils_no_other_score(run, ct):
    root, truths, noise = ct
    (root / "hasty.py").write_text(HASTY)
    args = f"--images={root}/out", f"--truth={root}/truth", "--input=cond"
    own = f"--metric-file={root}/hasty.py:sneaky"
    (root / "last.py").write_text("def last(image, truth, value_range):\n"
                                  "    return abs(image - truth).mean()\n")
    out = run(*args, "--metrics=", own, f"--metric-file={root}/last.py:last").out
    mean = np.mean([np.abs((t + 20 * n).astype(float) - t) for t, n in zip(
        truths, noise, strict=True)])
    assert f"\nlast {mean:.4g} +- " in out and "\nsneaky 2 +- 0" in out


@pytest.mark.parametrize("name, what", [
    ("halves", "ZeroDivisionError: division by zero (line 12)"),
    ("opens", "gone.txt: No such file or directory (line 14)"),
    ("leaves", "SystemExit: 3 (line 16)"), ("quiet", "KeyError (line 18)")])
@pytest.mark.parametrize("place", ["", "."])
def test_an_error_in_a_function_is_one_line_with_the_image(fails, ct, monkeypatch, capsys, name,
                                                           what, place):
    root, *_ = ct
    (root / "hasty.py").write_text(HASTY)
    monkeypatch.chdir(root)
    spec = f"{place}/hasty.py:{name}" if place else f"{root}/hasty.py:{name}"
    args = f"--images={root}/out", f"--truth={root}/truth", f"--metric-file={spec}"
    assert fails(*args) == f"Error: 000000.npy: --metric-file={spec}: {what}"
    assert not (root / "pairs_out").exists()
    with pytest.raises(SystemExit):
        fid.main(["pairs", *args, "--verbose"])
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_two_functions_of_one_name_are_refused(fails, ct, metric_file):
    root, *_ = ct
    shutil.copy(metric_file, root / "copy.py")
    error = fails(f"--images={root}/out", f"--truth={root}/truth",
                  f"--metric-file={metric_file}:worst", f"--metric-file={root}/copy.py:worst")
    assert f"--metric-file={root}/copy.py:worst: another file already defines worst" in error


@pytest.mark.parametrize("channels", [1, 3])
def test_the_example_of_the_page_gives_lpips_what_it_wants(run, tmp_path, monkeypatch, channels):
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "lpips_alex.py").write_text(example)
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, y):
            seen.append((x, y))
            return (x - y).abs().mean().reshape(1, 1, 1, 1)  # as LPIPS does, of one pair

    stub = types.SimpleNamespace(LPIPS=lambda net: Network())
    monkeypatch.setitem(sys.modules, "lpips", stub)
    truths = [smooth((channels, 16, 20), i) for i in range(2)]
    write(tmp_path / "truth", truths)
    write(tmp_path / "out", [t + 100 for t in truths])
    out = run(f"--images={tmp_path}/out", f"--truth={tmp_path}/truth", "--range=-1000,1000",
              "--metrics=", f"--metric-file={tmp_path}/lpips_alex.py:lpips_alex").out
    assert "\nlpips_alex 0.1 +- " in out
    for (x, y), truth in zip(seen, truths, strict=True):
        assert x.dtype == y.dtype == torch.float64 and x.shape == y.shape == (1, 3, 16, 20)
        np.testing.assert_allclose(y[0, -1], truth[-1] / 1000, atol=1e-6)


@pytest.mark.parametrize("content, spec, expected", [
    ("x = 1\n", "m.py:f", "has no function f"),
    ("def g(): 0\n", "m.py:f", "has no function f; it has g"),
    ("f = 1\n", "m.py:f", "has no function f"), ("", "m.py", "must be FILE.py:FUNCTION"),
    ("", "m.txt:f", "must be FILE.py:FUNCTION"),
    ("", "m.py:psnr", "give the function another name"),
    ("import not_there\n", "m.py:f", "No module named 'not_there'"),
    ("def f(:\n", "m.py:f", "invalid syntax"), (None, "m.py:f", "No such file"),
    ("\n{}['x']\n", "m.py:f", "KeyError: 'x' (line 2)"), ("1 / 0", "m.py:f", "ZeroDivisionError"),
    ("import sys\nsys.exit()\n", "m.py:f", "SystemExit (line 2)"),
])
def test_files_without_a_metric_are_refused(tmp_path, content, spec, expected):
    if content is not None:
        (tmp_path / "m.py").write_text(content)
    with pytest.raises((ValueError, OSError), match="--metric-file=") as caught:
        load_metric(f"{tmp_path}/{spec}")
    assert expected in str(caught.value) and str(caught.value).count(str(tmp_path)) == 1


@pytest.mark.parametrize("value", [None, "x", math.nan, np.ones(2), 10**400])
def test_what_is_no_number_is_no_score(value):
    with pytest.raises(ValueError, match="^a gave .*must be a number$"):
        as_number(value, "a")
    assert as_number(np.float32(2), "a") == as_number(np.array([2]), "a") == 2.0


# The picture


def cells(path, shape, columns, rows):
    """Returns the pixels of each place of a picture of enlarged images: {(row, column): [h, w, 3]}.

    The last column and row of places end two pixels before the edge.
    """
    picture = np.asarray(PIL.Image.open(path))
    zoom = -(-160 // shape[0])
    height, width = (side * zoom for side in shape)
    found = {}
    for i in range(rows):
        for j in range(columns):
            bottom = picture.shape[0] - 2 - (rows - 1 - i) * (height + 2)
            right = picture.shape[1] - 2 - (columns - 1 - j) * (width + 2)
            found[i, j] = picture[bottom - height:bottom, right - width:right][::zoom, ::zoom]
    return found


def gray(values, low, high):
    """Returns what a window makes of values: black at its low end, white at its high one."""
    return np.clip(np.floor(255 * (values.astype(float) - low) / (high - low) + 0.5), 0, 255)


@pytest.mark.parametrize("window, low, high", [([], *HU), (["--window=40,400"], -160, 240),
                                               (["--window=-600,1500"], -1350, 150)])
def test_the_picture_shows_values_in_the_window(run, ct, window, low, high):
    root, truths, noise = ct
    out = run(f"--images={root}/out", f"--truth={root}/truth", "--input=cond", "--metrics=psnr",
              *window).out
    assert f"values {low:.6g} to {high:.6g}" in out
    limit = float(re.search("differences up to (\\S+)\\)", out)[1])
    shown = cells(root / "pairs_out/pairs.png", (24, 20), 4, 4)
    outside = 0
    for i, (t, n) in enumerate(zip(truths, noise, strict=True)):
        columns = [t + 60 * n, t + 20 * n, t]
        expected = [gray(values[0], low, high) for values in columns]
        difference = columns[1].astype(float)[0] - t[0]
        outside += (np.abs(difference) > limit).sum()
        expected.append(gray(difference, -limit, limit))
        for j, values in enumerate(expected):
            assert (shown[i, j][:, :, 0] == shown[i, j][:, :, 2]).all()
            off = np.abs(shown[i, j][:, :, 0].astype(int) - values)
            assert off.max() <= 1 and off.mean() < 0.01  # rounding at a border of two grays
    assert outside <= 0.005 * 4 * 24 * 20
    assert str(limit).strip(".0")[:1] in "125"


def test_colours_are_shown_as_they_are(run, tmp_path):
    truths = [smooth((3, 20, 40), i, 0, 255).astype(np.uint8) for i in range(2)]
    write(tmp_path / "truth", truths)
    write(tmp_path / "out", [255 - t for t in truths])
    run(f"--images={tmp_path}/out", f"--truth={tmp_path}/truth", "--metrics=psnr")
    shown = cells(tmp_path / "pairs_out/pairs.png", (20, 40), 3, 2)
    for i, truth in enumerate(truths):
        np.testing.assert_array_equal(shown[i, 1], truth.transpose(1, 2, 0))
        np.testing.assert_array_equal(shown[i, 0], 255 - truth.transpose(1, 2, 0))


def test_of_other_channels_the_first_is_shown(run, tmp_path):
    truths = [smooth((5, 20, 40), 0)]
    write(tmp_path / "truth", truths, scale=scale(*HU))
    write(tmp_path / "out", [t[::-1] for t in truths])
    run(f"--images={tmp_path}/out", f"--truth={tmp_path}/truth", "--metrics=psnr")
    shown = cells(tmp_path / "pairs_out/pairs.png", (20, 40), 3, 1)
    for j, channel in enumerate((4, 0)):
        off = shown[0, j][:, :, 1].astype(int) - gray(truths[0][channel], *HU)
        assert np.abs(off).max() <= 1


def test_the_picture_has_the_first_and_the_last_of_many(run, tmp_path):
    truths = [np.full((1, 160, 16), 10.0 * i, np.float32) for i in range(21)]
    write(tmp_path / "truth", truths)
    write(tmp_path / "out", [t + np.float32(i % 2) for i, t in enumerate(truths)])
    run(f"--images={tmp_path}/out", f"--truth={tmp_path}/truth", "--range=0,255", "--metrics=mae")
    shown = cells(tmp_path / "pairs_out/pairs.png", (160, 16), 3, 6)
    assert [shown[i, 1][0, 0, 0] for i in range(6)] == [0, 40, 80, 120, 160, 200]


def test_large_images_and_equal_ones_make_a_picture_too(run, tmp_path):
    truths = [smooth((1, 1200, 30), 0), smooth((1, 40, 800), 1)]
    write(tmp_path / "truth", truths, scale=scale(*HU))
    write(tmp_path / "out", truths, ["img000", "img001"])
    out = run(f"--images={tmp_path}/out", f"--truth={tmp_path}/truth", "--metrics=rmse").out
    assert "differences up to 40.95" in out  # a hundredth of the window
    with PIL.Image.open(tmp_path / "pairs_out/pairs.png") as picture:
        assert picture.height < 2 * 512 + 60 and picture.width < 3 * 514 + 200
