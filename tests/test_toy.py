"""docs/toy.py: its ideal denoiser against draws, its measures, what its page says of D."""

import math

import pytest
import torch
from click.testing import CliRunner
from scripts import load_script

from pfgmpp.kernel import PerturbationKernel

INF = math.inf


toy = load_script("docs/toy.py")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("D", [0.5, 2, 10, 1000, INF])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
def test_the_ideal_denoiser_is_the_posterior_mean_over_many_draws(D, sigma):
    plane, kernel, rng = toy.Plane(N=4, M=2), PerturbationKernel(D), seeded(3)
    data = plane.draw(100_000, rng)
    x = data[:6] + kernel.sample((6, 4), sigma, rng).double()
    denoised = toy.IdealDenoiser(plane, D)(x[:, :, None, None], torch.tensor(sigma))
    assert denoised.shape == (6, 4, 1, 1)
    # The nearest of 100,000 points to x are hundreds: an error of about spread/sqrt(hundreds).
    torch.testing.assert_close(denoised.flatten(1), kernel.posterior_mean(x, sigma, data),
                               rtol=0, atol=0.01)


def test_data_have_the_moments_that_the_page_gives():
    plane = toy.Plane()
    data = plane.draw(4000, seeded())
    on = data @ plane.axes / plane.length
    side = plane.place(data).sign()
    assert data.square().mean().sqrt() == pytest.approx(1.02, abs=0.02)
    assert (on - side[:, None]).std() == pytest.approx(0.2, abs=0.004)
    rough = data - plane.length * on @ plane.axes.T
    assert rough.square().sum(1).mean() / 990 == pytest.approx(1e-4, rel=0.01)
    assert abs((side > 0).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)


def test_discrepancy_is_the_mean_over_pairs_and_zero_for_equal_sets():
    a, b = (torch.randn(7, 5, generator=seeded(k), dtype=torch.float64) + k for k in (0, 1))

    def pairs(x, y):
        return sum(math.exp(-float((p - q).square().sum()) / (2 * h**2))
                   for p in x for q in y for h in toy.BANDWIDTHS) / (49 * len(toy.BANDWIDTHS))
    assert toy.mmd2(a, b) == pytest.approx(pairs(a, a) + pairs(b, b) - 2 * pairs(a, b), rel=1e-6)
    assert abs(toy.mmd2(a, a)) < 1e-12


@pytest.mark.long
def test_noise_in_each_step_spreads_samples_more_the_larger_D():
    plane, count = toy.Plane(), 200
    real = plane.draw(count, seeded(1))
    spread = {}
    for D in (10, 1000, INF):
        net = toy.IdealDenoiser(plane, D)
        for alpha in toy.ALPHAS:
            found = toy.score(plane, toy.sample(net, count, alpha), real)
            spread[D, alpha] = found.spread
            assert abs(found.share - 0.5) < 4 * 0.5 / math.sqrt(count)
    # Of 2000 numbers: standard error 0.003. The seeds are the same, and so is most of the error.
    assert all(abs(spread[D, 0.0] - 0.2) < 0.013 for D in (10, 1000, INF))
    assert spread[INF, 0.2] > spread[1000, 0.2] + 0.01 > spread[10, 0.2] + 0.015


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(toy.main, [f"--outdir={tmp_path / 'out'}"])
    assert result.exit_code == 1 and "pip install matplotlib" in result.output
    assert len(result.output.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
