"""docs/phases.py: phases are aligned in sigma, and what is drawn is the posterior's spread."""

import math

import numpy as np
import PIL.Image
import pytest
import torch
from ideal_flow import noise_on_a_line
from scripts import ROOT, load_script

from pfgmpp.kernel import PerturbationKernel

phases = load_script("docs/phases.py")
DIGITS = ROOT / "examples/digits8.zip"
WITHIN = 1.15  # a factor: half levels of D = 8 and inf differ by less
NUM = 100


def halves_of(measure, half):
    """The level at which a measure that rises with sigma passes `half`, for each D."""
    return {D: phases.half_level([measure(D, sigma) for sigma in phases.LEVELS], 2 * half)
            for D in phases.DIMS}


def assert_aligned(halves):
    assert max(halves.values()) < WITHIN * min(halves.values()), halves
    r = {D: sigma * math.sqrt(D) for D, sigma in halves.items() if not math.isinf(D)}
    for D in r:
        assert 1 / WITHIN < r[D] / r[8] / math.sqrt(D / 8) < WITHIN
    assert r[4096] > 20 * r[8]


@pytest.mark.long
def test_the_posteriors_spread_is_half_its_most_at_one_sigma_for_every_D():
    data = phases.read(DIGITS)
    assert_aligned(halves_of(lambda D, sigma: phases.spread(D, data, NUM, sigma),
                             phases.whole_spread(data) / 2))


@pytest.mark.long
def test_the_posterior_is_half_way_to_uniform_at_one_sigma_for_every_D():
    # The paper's measure: the mean total variation distance from the uniform law.
    data = phases.read(DIGITS)

    def likeness(D, sigma):
        kernel, rng = PerturbationKernel(D), torch.Generator().manual_seed(0)
        x = data[:NUM] + kernel.sample((NUM, data.shape[1]), sigma, rng)
        weights = kernel.posterior_weights(x, sigma, data)
        return float(weights.clamp(max=1 / len(data)).sum(1).mean())  # 1 - the distance
    assert_aligned(halves_of(likeness, 0.5))


@pytest.mark.parametrize("D", [1, 8, math.inf])
@pytest.mark.parametrize("sigma", [0.2, 0.6, 3.0])
def test_the_spread_of_two_points_is_its_integral(D, sigma):
    # At -a and a the posterior is a coin of probability p: its variance is 4 a^2 p (1 - p).
    a, num = 0.7, 20_000
    noise, weights = noise_on_a_line(D)
    here, there = ((sigma * noise + shift) ** 2 / sigma**2 for shift in (0, 2 * a))
    log_odds = (there - here) / 2 if math.isinf(D) else (
        (1 + D) / 2 * (torch.log1p(there / D) - torch.log1p(here / D)))
    p = log_odds.sigmoid()
    expected = float((weights * 2 * a * (p * (1 - p)).sqrt()).sum())
    data = torch.tensor([[-a], [a]], dtype=torch.float64)
    assert phases.whole_spread(data) == pytest.approx(a)
    # A value lies between 0 and a, so the mean of 20,000 is within 4.5 a / (2 sqrt(20,000)).
    assert phases.spread(D, data, num, sigma) == pytest.approx(
        expected, abs=4.5 * a / 2 / math.sqrt(num))


def test_half_is_found_between_levels_in_the_logarithm():
    logs = np.log(phases.LEVELS)
    assert phases.half_level(list(3 + (logs - 0.123) / 5), 6) == pytest.approx(math.exp(0.123))
    with pytest.raises(ValueError, match="does not pass half"):
        phases.half_level([1.0] * len(logs), 6)


def test_images_are_read_as_networks_see_them():
    data = phases.read(DIGITS)
    assert data.shape == (1797, 64) and data.min() == -1 and data.max() == 1


@pytest.mark.long
def test_the_script_draws_and_says_where_half_is(tmp_path, invoke):
    pytest.importorskip("matplotlib")
    result = invoke(phases.main, f"--data={DIGITS}", f"--out={tmp_path / 'p.png'}", "--num=5")
    assert result.exit_code == 0, result.output
    first, *lines = result.output.strip().splitlines()
    assert first == "1797 images, N = 64, spread 4.333"
    assert [line.split()[2] for line in lines] == ["8", "64", "512", "4096", "inf"]
    assert PIL.Image.open(tmp_path / "p.png").size > (1000, 400)


def test_data_that_cannot_be_drawn_get_one_line(tmp_path, invoke, monkeypatch):
    np.savez(tmp_path / "equal.npz", np.zeros([3, 9, 9, 1], np.uint8))
    for arguments, words in ((["--data=none.zip"], "none.zip"),
                             ([f"--data={tmp_path / 'equal.npz'}"], "all images are equal"),
                             ([f"--data={DIGITS}", f"--out={tmp_path}/equal.npz/p.png"], "--out")):
        result = invoke(phases.main, f"--out={tmp_path / 'p.png'}", *arguments)
        assert result.exit_code and len(result.output.strip().splitlines()) == 1
        assert words in result.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke(phases.main, f"--data={DIGITS}")
    assert result.exit_code and "pip install matplotlib" in result.output
    assert not list(tmp_path.glob("*.png"))
