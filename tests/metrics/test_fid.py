import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import PIL.Image
import pytest
import scipy.linalg
from scripts import ROOT, run_script

import fid
from metrics import detectors, score_report

PIXELS = ("--detector=pixels", "--device=cpu")


def write_images(folder, n, seed=0, size=6):
    """Writes n random RGB images as generate.py would; returns their features."""
    pixels = np.random.RandomState(seed).randint(0, 256, [n, size, size, 3], dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / "000000" / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    return pixels.transpose(0, 3, 1, 2).reshape(n, -1) / 127.5 - 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two hundred images and their reference file."""
    root = tmp_path_factory.mktemp("data")
    features = write_images(root / "images", 200, seed=0)
    fid.main(["ref", f"--data={root / 'images'}", f"--dest={root / 'ref.npz'}", *PIXELS],
             standalone_mode=False)
    return root, features


@pytest.fixture
def run(capsys):
    def run(*args):
        capsys.readouterr()
        fid.main([str(arg) for arg in args], standalone_mode=False)
        return capsys.readouterr().out
    return run


@pytest.fixture
def fails(capsys):
    def fails(*args, exit_code=1):
        """Returns the one line that a failing command prints."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            fid.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert caught.value.code == exit_code, err
        assert out == ""
        lines = [line for line in err.strip().splitlines() if not line.startswith("Warning: ")]
        assert len(lines) == 1 or exit_code == 2  # which shows the usage too
        assert lines[-1].startswith("Error: ")
        return lines[-1]
    return fails


def frechet_by_sqrtm(x, y):
    s1, s2 = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)


# Scores


def test_ref_writes_the_mean_and_covariance_of_the_images(data):
    root, features = data
    with np.load(root / "ref.npz") as ref:
        np.testing.assert_allclose(ref["mu"], features.mean(0), atol=1e-6)
        np.testing.assert_allclose(ref["sigma"], np.cov(features.T), atol=1e-6)
        assert str(ref["detector"]) == "pixels"


def test_images_are_at_distance_zero_from_their_own_statistics(data, run):
    root, _ = data
    out = run("calc", f"--images={root / 'images'}", f"--ref={root / 'ref.npz'}", "--num=200",
              *PIXELS)
    assert float(re.fullmatch(r"pixels Frechet distance: (\S+)\n", out)[1]) < 1e-10


def test_the_score_is_the_frechet_distance_of_the_two_sets(data, run, tmp_path):
    root, features = data
    expected = frechet_by_sqrtm(features, write_images(tmp_path, 150, seed=1))
    out = run("calc", f"--images={tmp_path}", f"--ref={root / 'ref.npz'}", "--num=150", *PIXELS)
    assert float(out.split(": ")[1]) == pytest.approx(expected, rel=1e-5)  # printed by %g


def test_the_seed_chooses_which_images_are_scored(data, run):
    root, features = data
    args = ("calc", f"--images={root / 'images'}", f"--ref={root / 'ref.npz'}", "--num=150",
            *PIXELS)
    chosen = np.arange(200)
    np.random.RandomState(7).shuffle(chosen)  # the choice of the EDM code
    expected = frechet_by_sqrtm(features, features[chosen[:150]])
    assert float(run(*args, "--seed=7").split(": ")[1]) == pytest.approx(expected, rel=1e-5)
    assert run(*args, "--seed=8") != run(*args, "--seed=7")


class FakeInception(detectors.Pixels):
    name = "inception"
    distance_name = "FID"


def test_the_last_line_for_inception_is_the_number_alone(data, run, tmp_path, monkeypatch):
    root, _ = data
    monkeypatch.setitem(detectors.DETECTORS, "inception", FakeInception)
    images = root / "images"
    run("ref", f"--data={images}", f"--dest={tmp_path / 'ref.npz'}", "--device=cpu")
    out = run("calc", f"--images={images}", f"--ref={tmp_path / 'ref.npz'}", "--num=100",
              "--device=cpu")
    assert re.fullmatch(r"[0-9.]+\n", out)
    assert 0 < float(out) < 20


def test_scores_of_few_images_by_inception_come_with_a_warning(data, tmp_path, monkeypatch,
                                                               capsys):
    root, _ = data
    monkeypatch.setitem(detectors.DETECTORS, "inception", FakeInception)
    fid.main(["ref", f"--data={root / 'images'}", f"--dest={tmp_path / 'ref.npz'}",
              "--device=cpu"], standalone_mode=False)
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'ref.npz'}: statistics of 200 images by inception\n"
    assert "Warning: 200 images are fewer than the 2048 features" in err
    args = [f"--images={root / 'images'}", f"--ref={root / 'ref.npz'}", "--num=200", *PIXELS]
    fid.main(["calc", *args], standalone_mode=False)
    assert "Warning: 200 images are fewer than 2048, " in capsys.readouterr().err


def test_other_files_beside_the_images_are_skipped(data, run, tmp_path):
    root, _ = data
    write_images(tmp_path, 5)
    (tmp_path / "generate.json").write_text("{}")
    out = run("calc", f"--images={tmp_path}", f"--ref={root / 'ref.npz'}", "--num=5", *PIXELS)
    assert out.startswith("pixels Frechet distance: ")


# Run directories

FOLDERS = [
    "ckpt_000002", "ckpt_000010", "ckpt_000010.500", "ckpt_999999", "ckpt_1000000",
    "ckpt_2000000", "ckpt_000010_alpha_0.1_steps_9", "ckpt_000010_alpha_0.1_steps_10",
    "ckpt_2_000010", "ckpt_3_000010", "ckpt_2_000010_alpha_0.1",
    "ckpt_000010_alpha_0", "ckpt_000010_alpha_0.1", "ckpt_000010_steps_10", "ckpt_000010_quant_5",
    "ckpt_000010_alpha_0_steps_10",
    "ckpt_10", "ckpt_4_000010", "ckpt_000010_old", "ckpt_000010_alpha_", "ckpt_000010_prune_0.1",
]


@pytest.mark.parametrize("gen_seed, first, last, sweeps, expected", [
    (1, 0, 1e6, "", ["000002", "000010", "000010.500", "999999", "1000000"]),
    (1, 0, 3e6, "", ["000002", "000010", "000010.500", "999999", "1000000", "2000000"]),
    (1, 10, 10, "", ["000010"]),
    (1, 10.2, 11, "", ["000010.500"]),
    (2, 0, 1e6, "", ["2_000010"]),
    (3, 0, 1e6, "", ["3_000010"]),
    (1, 0, 1e6, "alpha", ["000010_alpha_0", "000010_alpha_0.1"]),
    (2, 0, 1e6, "alpha", ["2_000010_alpha_0.1"]),
    (1, 0, 1e6, "steps", ["000010_steps_10"]),
    (1, 0, 1e6, "quant", ["000010_quant_5"]),
    (1, 0, 1e6, "alpha steps", ["000010_alpha_0_steps_10", "000010_alpha_0.1_steps_9",
                                "000010_alpha_0.1_steps_10"]),
])
def test_folders_of_a_run_are_chosen_by_their_exact_names(tmp_path, gen_seed, first, last, sweeps,
                                                          expected):
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "ckpt_000003").write_text("a file")
    chosen = fid._ckpt_folders(str(tmp_path), (gen_seed,), first, last, set(sweeps.split()))
    assert [job.path for job in chosen] == [str(tmp_path / f"ckpt_{name}") for name in expected]


@pytest.mark.long
def test_each_folder_of_a_run_is_scored_like_a_plain_one(data, run, tmp_path):
    root, _ = data
    for seed, name in enumerate(["ckpt_000001", "ckpt_000002", "ckpt_000002_alpha_0.1"]):
        write_images(tmp_path / name, 20, seed=seed)
    args = [f"--ref={root / 'ref.npz'}", "--num=20", *PIXELS]
    plain = {name: run("calc", f"--images={tmp_path / name}", *args)
             for name in sorted(os.listdir(tmp_path))}
    lines, table = run("calc", f"--images={tmp_path}", *args).split("\n\n")
    assert lines + "\n" == "".join(
        f"path:{tmp_path / name}, {plain[name]}" for name in ("ckpt_000001", "ckpt_000002"))
    assert [row.split()[0] for row in table.splitlines()] == ["images", "ckpt_000001",
                                                              "ckpt_000002"]
    for flag in ("--alpha", "--alpha=True"):
        name = "ckpt_000002_alpha_0.1"
        out = run("calc", f"--images={tmp_path}", flag, *args)
        assert out == f"path:{tmp_path / name}, {plain[name]}"


def test_a_run_without_a_fitting_folder_is_refused(fails, data, tmp_path):
    root, _ = data
    (tmp_path / "ckpt_000005").mkdir()
    args = ("calc", f"--ref={root / 'ref.npz'}", *PIXELS)
    assert "none of 1 ckpt_* folders (such as ckpt_000005) matches --gen_seed=2" in fails(
        *args, f"--images={tmp_path}", "--gen_seed=2")
    for name in ("ckpt_000005_steps_4_quant_5", "ckpt_000005_alpha_0.1"):
        (tmp_path / name).mkdir()
    assert "0 to inf kimg; there is --alpha and --steps --quant and no sweep" in fails(
        *args, f"--images={tmp_path}", "--steps")
    assert "not a run directory with ckpt_* folders" in fails(
        *args, f"--images={root / 'images'}", "--steps")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "training_options.json").write_text("{}")
    (run_dir / "reals.png").write_bytes(b"no image to score")
    assert "generate.py --outdir=" in fails(*args, f"--images={run_dir}")


# Bad input


@pytest.fixture
def no_detector(monkeypatch):
    """Fails the test if anything slow begins."""
    def build(*_):
        raise AssertionError("the detector was built")
    monkeypatch.setattr(detectors, "build_detector", build)


def test_fewer_images_than_num_are_refused_with_the_counts(fails, data, no_detector):
    root, _ = data
    args = ("calc", f"--images={root / 'images'}", f"--ref={root / 'ref.npz'}", *PIXELS)
    assert "images: 200 images, but --count=50000; make more images, or score these with" in \
        fails(*args)
    assert "--num" in fails(*args, "--num=1", exit_code=2)


def test_an_unfinished_folder_of_a_run_is_left_out_and_named(data, tmp_path, invoke):
    root, _ = data
    for kimg, num in ((1, 4), (2, 3), (1_000_001, 4), (2_500_000, 2)):
        write_images(tmp_path / f"ckpt_{kimg:06d}", num)
    args = ["calc", f"--images={tmp_path}", f"--ref={root / 'ref.npz'}", "--num=4", *PIXELS]
    done = invoke(fid.main, *args)
    assert done.exit_code == 1 and [
        json.loads(line)["images"][-7:] for line in
        (tmp_path / "metrics.jsonl").read_text().splitlines()] == ["_000001", "1000001"]
    assert ("Error: 2 of 4 folders were not scored with --count=4: ckpt_000002 (3 images), "
            "ckpt_2500000 (2 images)\n") in done.stderr
    done = invoke(fid.main, *args, "--num=5")
    assert done.exit_code == 1 and "ckpt_2500000: 2 images, but --count=5" in done.stderr


def test_an_empty_or_diverged_folder_of_a_run_is_left_out_and_named(data, tmp_path, invoke):
    root, _ = data
    for kimg in (1, 2, 3):
        write_images(tmp_path / f"ckpt_{kimg:06d}", 4)
    for path in (tmp_path / "ckpt_000002").rglob("*.png"):
        path.unlink()
    (tmp_path / "ckpt_000003/generate.json").write_text('{"not_finite": [7, 9]}')
    args = ["calc", f"--ref={root / 'ref.npz'}", "--num=4", *PIXELS]
    done = invoke(fid.main, *args, f"--images={tmp_path}")
    assert done.exit_code == 1 and "/ckpt_000001, " in done.stdout
    assert ("2 of 3 folders were not scored with --count=4: ckpt_000002 (no images), ckpt_000003 "
            "(2 images that are not finite)") in done.stderr
    done = invoke(fid.main, *args, f"--images={tmp_path / 'ckpt_000003'}")
    assert done.exit_code == 1 and "not finite, so it has no score" in done.stderr
    done = invoke(fid.main, *args, f"--images={tmp_path / 'nowhere'}")
    assert done.exit_code == 1 and "nowhere: no such folder or ZIP" in done.stderr


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_images_of_several_networks_are_not_scored_as_one(data, tmp_path, invoke, suffix):
    root, _ = data
    for name in "ab":
        write_images(tmp_path / "both" / name, 4)
        (tmp_path / "both" / name / "generate.json").write_text("{}")
    path = tmp_path / "both"
    if suffix:
        path = Path(shutil.make_archive(str(path), "zip", path))
    args = ["calc", f"--ref={root / 'ref.npz'}", "--num=4", *PIXELS, f"--images={path}"]
    done = invoke(fid.main, *args)
    assert done.exit_code == 1 and "holds the images of 2 networks or settings (a/, b/)" in \
        done.stderr


def test_missing_ranges_and_strange_folders_are_named(data, tmp_path, invoke):
    root, _ = data
    for name in ("ckpt_000001", "ckpt_2_000001", "ckpt_000002", "ckpt_000002_alpha_1e+06",
                 "ckpt_old"):
        write_images(tmp_path / name, 4)
    args = ["calc", f"--images={tmp_path}", f"--ref={root / 'ref.npz'}", "--num=4", *PIXELS]
    done = invoke(fid.main, *args, "--gen_seed=1,2,3")
    assert done.exit_code == 0
    warnings = [line for line in done.stderr.splitlines() if "fewer than" not in line]
    assert warnings == [
        "Warning: folders with names not from generate.py are not scored: ckpt_old (1 in total)",
        "Warning: ckpt_000001: for --gen_seed=1,2,3 there is no ckpt_3_000001; its lowest score is "
        "that of 2",
        "Warning: ckpt_000002: for --gen_seed=1,2,3 there is no ckpt_2_000002 and no ckpt_3_000002"
        "; its lowest score is that of 1"]
    assert "ckpt_000002_alpha_1e+06, " in invoke(fid.main, *args, "--alpha").stdout


@pytest.mark.parametrize("subdirs", [False, True, None])
@pytest.mark.parametrize("stray, is_stray", [
    ("mine.png", [1, 1, 1]), ("000009.png", [0, 1, 0]), ("000000/000009.png", [1, 0, 0]),
    ("001000/000009.png", [1, 1, 1]), ("1.png", [1, 1, 1]), ("000009.jpg", [1, 1, 1])])
def test_images_that_are_not_of_the_record_are_refused(data, tmp_path, invoke, subdirs, stray,
                                                       is_stray):
    root, _ = data
    folder = tmp_path / "samples"
    write_images(folder, 4)
    if not subdirs:
        for path in list(folder.glob("000000/*.png")):
            path.rename(folder / path.name)
    (folder / "generate.json").write_text(json.dumps(
        {} if subdirs is None else {"subdirs": subdirs}))
    (folder / stray).parent.mkdir(exist_ok=True)
    first = next(folder.rglob("*.png"))
    (folder / stray).write_bytes(first.read_bytes())
    args = ["calc", f"--images={folder}", f"--ref={root / 'ref.npz'}", "--num=4", *PIXELS]
    done = invoke(fid.main, *args)
    if is_stray[{False: 0, True: 1, None: 2}[subdirs]]:
        assert done.exit_code == 1 and f"{folder}: holds files that generate.json does " \
            f"not describe: {stray} (" in done.stderr
    else:
        assert done.exit_code == 0


def test_small_references_are_told_and_recorded(data, tmp_path, invoke, monkeypatch):
    root, _ = data
    write_images(root / "more", len(list((root / "images").rglob("*.png"))) + 1, seed=5)
    args = ["calc", f"--images={root / 'images'}", f"--ref={root / 'images'}", "--num=10",
            "--metrics=fid,kid", f"--out={tmp_path / 'm.jsonl'}", *PIXELS]
    done = invoke(fid.main, *args)
    count = len(list((root / "images").rglob("*.png")))
    assert f"only at equal numbers and with this reference of {count} images\n" in done.stderr
    assert "Warning: KID is computed on subsets of 10 images instead of 1000" in done.stderr
    assert {json.loads(line)["reference_num"]
            for line in (tmp_path / "m.jsonl").read_text().splitlines()} == {count}
    monkeypatch.setattr(score_report, "_FEW_IMAGES", count + 1)
    done = invoke(fid.main, "calc", f"--images={root / 'more'}", f"--num={count + 1}",
                  f"--ref={root / 'images'}", f"--out={tmp_path / 'm.jsonl'}", *PIXELS)
    assert f"Warning: the reference has {count} images, fewer than {count + 1}" in done.stderr


def test_statistics_of_one_image_are_refused(fails, tmp_path, no_detector):
    write_images(tmp_path / "images", 1)
    line = fails("ref", f"--data={tmp_path / 'images'}", f"--dest={tmp_path / 'r.npz'}", *PIXELS)
    assert "1 image, at least 2" in line
    assert not (tmp_path / "r.npz").exists()


def test_a_reference_of_another_detector_is_refused_naming_both(fails, data, no_detector):
    root, _ = data
    line = fails("calc", f"--images={root / 'images'}", f"--ref={root / 'ref.npz'}", "--num=200")
    assert line.endswith("ref.npz: made with the detector pixels; give --detector=pixels (the "
                         "default is inception)")


def test_a_reference_of_another_detector_than_the_given_is_refused(fails, data):
    root, _ = data
    line = fails("calc", f"--images={root / 'images'}", f"--ref={root / 'ref.npz'}", "--num=200",
                 "--detector=pixels:2")
    assert line.endswith("give --detector=pixels (not pixels:2)")


def test_a_reference_of_another_image_size_is_refused(fails, data, tmp_path):
    root, _ = data
    write_images(tmp_path, 4, size=5)
    line = fails("calc", f"--images={tmp_path}", f"--ref={root / 'ref.npz'}", "--num=4", *PIXELS)
    assert "its images are 6x6, but those of" in line and "are 5x5" in line
    with np.load(root / "ref.npz") as ref:  # as those of the references, which record no size
        np.savez(tmp_path / "old.npz", **{k: ref[k] for k in ("mu", "sigma", "detector")})
    line = fails("calc", f"--images={tmp_path}", f"--ref={tmp_path / 'old.npz'}", "--num=4",
                 *PIXELS)
    assert "statistics of 108 features, but detector pixels gives 75 for the 3x5x5" in line


def test_bad_files_are_one_line(fails, data, tmp_path):
    root, _ = data
    images, ref = f"--images={root / 'images'}", f"--ref={root / 'ref.npz'}"
    few = ("--num=9", *PIXELS)
    assert "gone.npz" in fails("calc", images, f"--ref={tmp_path / 'gone.npz'}", *few)
    assert "no such folder" in fails("calc", f"--images={tmp_path / 'gone'}", ref, *PIXELS)
    assert "no images" in fails("calc", f"--images={tmp_path}", ref, *PIXELS)
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    assert "not finite" in fails("calc", images, f"--ref={tmp_path / 'nan.npz'}", *few)
    assert "detector 'clip'" in fails("calc", images, ref, "--num=9", "--detector=clip")
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"x")
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert "made with the detector inception; give --detector=inception (" in fails(
        "calc", images, f"--ref={tmp_path / 'edm.npz'}", "--num=9", f"--detector={weights}")
    assert "w.pth: " in fails("ref", f"--data={root / 'images'}", f"--dest={tmp_path / 'x.npz'}",
                              f"--detector={weights}")
    (tmp_path / "folder.npz").mkdir()
    assert "folder.npz" in fails("ref", f"--data={root / 'images'}",
                                 f"--dest={tmp_path / 'folder.npz'}", *PIXELS)


def test_a_damaged_image_is_one_line(fails, data, tmp_path):
    root, _ = data
    write_images(tmp_path, 5)
    (tmp_path / "000000" / "000003.png").write_bytes(b"\x89PNG")
    line = fails("calc", f"--images={tmp_path}", f"--ref={root / 'ref.npz'}", "--num=5", *PIXELS)
    assert "000003.png" in line


def test_prune_is_refused_and_its_default_accepted(fails, data, run):
    root, _ = data
    args = ("calc", f"--images={root / 'images'}", f"--ref={root / 'ref.npz'}", "--num=200",
            *PIXELS)
    assert "--prune: pruned networks are not supported" in fails(*args, "--prune=1", exit_code=2)
    assert run(*args, "--prune=False") == run(*args)


def test_errors_are_click_exceptions_without_standalone_mode(tmp_path):
    with pytest.raises(click.ClickException, match="no such folder"):
        fid.main(["ref", f"--data={tmp_path / 'gone'}", "--dest=x.npz", *PIXELS],
                 standalone_mode=False)


# Command line and processes


@pytest.mark.parametrize("args", [["--help"], ["calc", "--help"], ["ref", "--help"]])
def test_help_needs_neither_torch_nor_numpy(args):
    # Seconds of its own, whatever else the machine does: it takes 0.1.
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (5, 5)); import fid\n"
            f"try: fid.main({args})\n"
            "finally: assert not {'torch', 'numpy', 'scipy'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


@pytest.mark.scripts
def test_two_processes_give_the_score_of_one(data, tmp_path):
    root, features = data
    run_script("fid.py", "ref", f"--data={root / 'images'}", f"--dest={tmp_path / 'ref.npz'}",
               "--batch=7", *PIXELS, processes=2)
    with np.load(tmp_path / "ref.npz") as split, np.load(root / "ref.npz") as whole:
        np.testing.assert_allclose(split["mu"], whole["mu"], atol=1e-14)
        np.testing.assert_allclose(split["sigma"], whole["sigma"], atol=1e-14)

    expected = frechet_by_sqrtm(features, write_images(tmp_path / "images", 150, seed=1))
    done = run_script("fid.py", "calc", f"--images={tmp_path / 'images'}",
                      f"--ref={tmp_path / 'ref.npz'}", "--num=150", "--workers=1", *PIXELS,
                      processes=2)
    name, number = done.stdout.strip().split(": ")  # printed once
    assert name == "pixels Frechet distance"
    assert float(number) == pytest.approx(expected, rel=1e-5)


@pytest.mark.scripts
@pytest.mark.slow
def test_an_error_of_one_process_is_printed_once_and_ends_all(data, tmp_path):
    root, _ = data
    write_images(tmp_path, 6)
    (tmp_path / "000000" / "000005.png").write_bytes(b"\x89PNG")  # read by the last process
    done = run_script("fid.py", "calc", f"--images={tmp_path}", f"--ref={root / 'ref.npz'}",
                      "--num=6", *PIXELS, processes=2, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(re.findall(r"^Error: .*000005\.png", done.stderr, re.M)) == 1
