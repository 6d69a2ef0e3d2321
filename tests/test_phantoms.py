"""docs/phantoms.py: the law of its noise, the range of its slices, and what its seed decides."""

import re
import time

import numpy as np
import pytest
from scripts import load_script

phantoms = load_script("docs/phantoms.py")


@pytest.mark.parametrize("value, noise", [(0, 60), (0, 20), (700, 60), (-800, 60)])
def test_noise_is_unbiased_and_as_strong_as_photons_say(value, noise):
    image = np.full([400, 400], float(value))
    error = phantoms.measure(image, noise, np.random.default_rng(0)) - image
    expected = noise * ((value + 1000) / 1000) ** 0.5
    assert abs(error.mean()) < 4 * expected / 400
    assert abs(error.std() / expected - 1) < 0.01
    assert (phantoms.measure(np.full([8, 8], -1000.0), noise, np.random.default_rng(0))
            == -1000).all()


def test_slices_are_bodies_in_air_with_values_of_tissues():
    slices = [phantoms.phantom(48, np.random.default_rng(k)) for k in range(20)]
    values = np.stack(slices)
    assert (values[:, 0] == -1000).all() and (values[:, :, 0] == -1000).all()
    assert values.min() == -1000 and 200 < values.max() <= 900
    assert np.median(values[:, 24, 24]) > -200
    bodies = (values > -900).mean(axis=(1, 2))
    assert (bodies > 0.2).all() and (bodies < 0.7).all() and bodies.std() > 0.03


def test_a_pair_depends_on_the_seed_and_its_number(tmp_path, invoke):
    def written(*args):
        done = invoke(phantoms.main, f"--dest={tmp_path / 'x.npy'}", "--side=16", *args)
        assert done.exit_code == 0, done.output
        return np.load(tmp_path / "x.npy")

    three, five = written("--num=3"), written("--num=5")
    assert three.shape == (3, 2, 16, 16) and three.dtype == np.float32
    np.testing.assert_array_equal(three, five[:3])
    other = written("--num=3", "--seed=1")
    assert np.abs(other[:, 1] - three[:, 1]).max() > 100
    assert (three[:, 1] != three[:, 0]).mean() > 0.2


def test_the_file_is_what_numpy_writes_of_the_pairs(tmp_path, invoke):
    done = invoke(phantoms.main, f"--dest={tmp_path / 'x.npy'}", "--side=16", "--num=3",
                  "--noise=30")
    pairs = np.load(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", pairs)
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()
    error = np.sqrt(np.mean((pairs[:, 0].astype(float) - pairs[:, 1]) ** 2))
    assert f"3 pairs of 16x16; noise of {error:.4g} HU" in done.output


@pytest.mark.parametrize("flag, value", [
    ("noise", "inf"), ("noise", "nan"), ("noise", "1e-7"), ("noise", "0"), ("noise", "-60"),
    ("noise", "1e200"), ("noise", "x"), ("num", "0"), ("num", "10000000000"), ("side", "7"),
    ("side", "100000"), ("seed", "-1")])
def test_values_that_make_no_slices_are_refused_by_flag(tmp_path, invoke, flag, value):
    done = invoke(phantoms.main, f"--dest={tmp_path / 'new/x.npy'}", "--num=1", "--side=8",
                  f"--{flag}={value}")
    assert done.exit_code == 2 and list(tmp_path.iterdir()) == []
    [line] = [line for line in done.output.splitlines() if line.startswith("Error:")]
    shown = {"1e-7": "1e-07", "1e200": "1e+200"}.get(value, value)
    assert f"Invalid value for '--{flag}': " in line and shown in line


@pytest.mark.parametrize("noise", ["0.001", "100000"])
def test_the_ends_of_the_noise_are_drawn(tmp_path, invoke, noise):
    assert invoke(phantoms.main, f"--dest={tmp_path / 'x.npy'}", "--num=4", "--side=64",
                  f"--noise={noise}").exit_code == 0
    pairs = np.load(tmp_path / "x.npy")
    assert np.isfinite(pairs).all()
    if noise == "0.001":  # that of float32 numbers of about 1000 is 3e-5
        body = pairs[:, 1] > 0
        error = (pairs[:, 0].astype(float) - pairs[:, 1])[body]
        assert abs(error.std() / 0.001 - 1) < 0.1


def test_a_place_that_is_none_is_told_before_anything_is_drawn(tmp_path, invoke, monkeypatch):
    monkeypatch.setattr(phantoms, "phantom", None)
    done = invoke(phantoms.main, f"--dest={tmp_path}", "--num=1")
    assert done.exit_code == 1
    assert done.output == f"Error: --dest={tmp_path}: is a folder; give a file\n"


def test_long_work_shows_how_far_it_is(tmp_path, invoke, monkeypatch):
    monkeypatch.setattr(phantoms, "FIRST_LINE_SEC", 0.0)
    slow = phantoms.phantom
    monkeypatch.setattr(phantoms, "phantom", lambda *args: time.sleep(0.3) or slow(*args))
    done = invoke(phantoms.main, f"--dest={tmp_path / 'x.npy'}", "--num=4", "--side=8")
    assert re.search(r"^Drawing: \d of 4 img", done.output, re.M)
