import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pfgmpp.kernel import PerturbationKernel
from pfgmpp.samplers import SamplerConfig, ablation_sampler, edm_sampler
from pfgmpp.schedules import (
    DISCRETIZATIONS,
    SCALINGS,
    SCHEDULES,
    make_schedule,
    sigma_grid,
)

ANY = SimpleNamespace(sigma_min=0.0, sigma_max=math.inf, round_sigma=torch.as_tensor)
PATHS = list(itertools.product(SCHEDULES, SCALINGS))
DS = [1, 2, 128, math.inf]


@pytest.mark.parametrize("name, scaling", PATHS)
def test_derivatives_are_those_of_autograd(name, scaling):
    path = make_schedule(name, scaling, 0.002, 80.0)
    t = torch.linspace(0.05, 1.0, 50, dtype=torch.float64, requires_grad=True)
    for value, deriv in ((path.sigma, path.sigma_deriv), (path.scale, path.scale_deriv)):
        y = value(t)
        expected = torch.autograd.grad(y.sum(), t)[0] if y.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(deriv(t.detach()), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, scaling", PATHS)
def test_time_and_level_are_inverse(name, scaling):
    path = make_schedule(name, scaling, 0.002, 80.0)
    sigma = torch.logspace(-2, 1.9, 40, dtype=torch.float64)
    torch.testing.assert_close(path.sigma(path.sigma_inv(sigma)), sigma, rtol=1e-9, atol=0)


def test_the_vp_schedule_meets_both_ends_of_the_range():
    path = make_schedule("vp", "vp", 0.01, 50.0)
    ends = path.sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0.01, 50.0], rel=1e-9)


def test_vp_scaling_keeps_unit_variance():
    path = make_schedule("ve", "vp", 0.02, 100.0)
    t = torch.linspace(0.1, 50, 20, dtype=torch.float64)
    torch.testing.assert_close(path.scale(t) ** 2 * (1 + path.sigma(t) ** 2), torch.ones_like(t))


def numpy_grid(name, n):
    i = np.arange(n)
    if name == "edm":
        return (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    if name == "ve":
        return np.sqrt(100.0**2 * (0.02**2 / 100.0**2) ** (i / (n - 1)))
    if name == "vp":  # its own default range gives back beta_d = 19.9, beta_min = 0.1
        t = 1 + i / (n - 1) * (1e-3 - 1)
        return np.sqrt(np.expm1(19.9 * t**2 / 2 + 0.1 * t))
    u, levels = 0.0, []
    for j in range(1000, 0, -1):
        def abar(j):
            return math.sin(math.pi / 2 * j / (1000 * 1.008)) ** 2
        u = math.sqrt((u**2 + 1) / max(abar(j - 1) / abar(j), 0.001) - 1)
        levels.append(u)
    inside = np.array([u for u in levels[::-1] if 0.002 <= u <= 81])
    return inside[np.round((len(inside) - 1) / (n - 1) * i).astype(int)]


@pytest.mark.parametrize("name", DISCRETIZATIONS)
@pytest.mark.parametrize("n", [2, 7, 18])
def test_grids_follow_their_formulas_and_published_ranges(name, n):
    grid, low, high = sigma_grid(name, ANY, n)
    assert grid[-1] == 0 and len(grid) == n + 1 and (grid.diff() < 0).all()
    # Published levels of improved DDPM hang on float32 values of abar, off by 6e-8 near 1, which
    # moves the square of the smallest level, 4e-5, by 1e-3 of it.
    rtol = 1e-3 if name == "iddpm" else 1e-6
    np.testing.assert_allclose(grid[:-1].numpy(), numpy_grid(name, n), rtol=rtol)
    if name == "vp":
        assert (low, high) == pytest.approx((0.010486, 152.167), rel=1e-4)


@pytest.mark.parametrize("name", DISCRETIZATIONS)
def test_grids_are_clipped_to_the_network_and_one_step_is_the_highest_level(name):
    net = SimpleNamespace(sigma_min=0.1, sigma_max=20.0, round_sigma=torch.as_tensor)
    grid, low, high = sigma_grid(name, net, 9)
    assert (low, high) == (0.1, 20.0)
    assert grid[-2] >= 0.1 * (1 - 1e-6) and grid[0] <= 20 * (1 + 1e-6)
    one, *_ = sigma_grid(name, net, 1)
    # An exponential may round otherwise in a vector of another length: float64.
    assert one.shape == (2,) and one.tolist() == pytest.approx([float(grid[0]), 0], rel=1e-12)


def problem(D, num=6, N=5):
    """An ideal denoiser over a few points, as a network, and unit-scale latents."""
    rng = torch.Generator().manual_seed(0)
    data = torch.randn([4, N], generator=rng, dtype=torch.float64)
    kernel = PerturbationKernel(D)

    def net(x, sigma, class_labels=None):
        return kernel.posterior_mean(x, sigma, data)

    net.sigma_min, net.sigma_max, net.round_sigma = 0.0, math.inf, torch.as_tensor
    z = torch.randn([num, N], generator=rng, dtype=torch.float64)
    return net, z * kernel.scale(num, rng)[:, None]


@pytest.mark.parametrize("D", DS)
def test_the_ablation_sampler_at_edm_settings_is_the_edm_sampler(D):
    net, latents = problem(D)
    a = edm_sampler(net, latents, num_steps=12)
    b = ablation_sampler(net, latents, num_steps=12)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_churn_of_the_ablation_sampler_at_edm_settings_is_that_of_the_edm_sampler():
    net, latents = problem(math.inf)
    settings = {"num_steps": 12, "S_churn": 6, "S_min": 0.05, "S_max": 10, "S_noise": 1.01}
    results = []
    for sampler in (edm_sampler, ablation_sampler):
        rng = torch.Generator().manual_seed(1)

        def randn_like(x, rng=rng):
            return torch.randn(x.shape, generator=rng, dtype=x.dtype)
        results.append(sampler(net, latents, randn_like=randn_like, **settings))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("D", [1, math.inf])
@pytest.mark.parametrize("schedule, scaling", PATHS)
def test_every_schedule_and_scaling_solves_the_same_equation(D, schedule, scaling):
    """With many steps, Heun comes to the same images on every path.

    Paths differ in the last step alone: from 0.002 to 0, first order in the path's own time, it
    leaves up to all of the noise, 0.002 times the latent. A wrong sign or factor leaves far more.
    """
    net, latents = problem(D)
    exact = edm_sampler(net, latents, num_steps=300)
    x = ablation_sampler(net, latents, num_steps=300, schedule=schedule, scaling=scaling)
    assert (x - exact).abs().max() < 0.002 * latents.abs().max()


@pytest.mark.long
@pytest.mark.parametrize("D", DS)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_every_grid_and_solver_ends_on_the_data(D, discretization, solver):
    net, latents = problem(D)
    x = ablation_sampler(net, latents, num_steps=200, solver=solver,
                         discretization=discretization)
    data = torch.randn([4, 5], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Level 0.02 is the coarsest end among the grids; the data are of unit size.
    assert torch.cdist(x, data).min(dim=1).values.max() < 0.02


@pytest.mark.parametrize("option", [{"solver": "heun"}, {"discretization": "edm"},
                                    {"schedule": "linear"}, {"scaling": "none"}])
def test_spelling_a_default_out_changes_no_bit(option):
    net, latents = problem(math.inf)
    spelled_out, default = (config.sample(net, latents, None, torch.randn_like)
                            for config in (SamplerConfig(**option), SamplerConfig()))
    assert torch.equal(spelled_out, default)


def test_settings_reach_the_sampler():
    net, latents = problem(math.inf)
    config = SamplerConfig(num_steps=5, discretization="ve", schedule="ve", solver="euler")
    expected = ablation_sampler(net, latents, num_steps=5, discretization="ve", schedule="ve",
                                solver="euler")
    assert torch.equal(config.sample(net, latents, None, torch.randn_like), expected)
    assert not torch.allclose(expected, edm_sampler(net, latents, num_steps=5))


def test_watch_sees_every_state_in_units_of_the_data():
    net, latents = problem(math.inf)
    for sampler, settings in ((edm_sampler, {}), (ablation_sampler, {"scaling": "vp"})):
        seen = []

        def watch(x, sigma, seen=seen):
            seen.append((x, float(sigma)))
        sampler(net, latents, num_steps=4, watch=watch, **settings)
        grid = sigma_grid("edm", ANY, 4)[0][:-1].tolist()
        assert [sigma for _, sigma in seen] == pytest.approx(grid)
        torch.testing.assert_close(seen[0][0], latents * 80)


@pytest.mark.parametrize("name", DISCRETIZATIONS)
@pytest.mark.parametrize("rho", [0, -7, math.nan])
def test_a_rho_that_is_not_positive_is_refused(name, rho):
    with pytest.raises(ValueError, match="^rho=.*must be positive$"):
        sigma_grid(name, ANY, 5, rho=rho)


@pytest.mark.parametrize("name", DISCRETIZATIONS)
@pytest.mark.parametrize("levels", [
    {"sigma_max": math.inf}, {"sigma_max": math.nan}, {"sigma_min": 0}, {"sigma_min": math.nan},
    {"sigma_min": 5, "sigma_max": 4}, {"sigma_min": math.inf}, {"sigma_max": -1}])
def test_levels_that_make_no_grid_are_refused(name, levels):
    with pytest.raises(ValueError, match="sigma_m"):
        sigma_grid(name, ANY, 5, **levels)
