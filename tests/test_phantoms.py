"""docs/phantoms.py: the law of its noise, the range of its slices, and what its seed decides."""

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
