"""The propositions of the PFGM++ paper, each against formulas of its own in numpy and scipy.

Xu et al. 2023, arXiv 2302.04265. docs/mathematics.md lists them beside the tests by name; the
alignment of phases is in tests/test_phases.py, on data.
"""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

from pfgmpp.kernel import PerturbationKernel
from pfgmpp.samplers import edm_sampler
from pfgmpp.solvers import heun, sigma_slope

INF = math.inf
N = 3
CHARGES = np.random.default_rng(0).uniform(-1, 1, size=(5, N))
LARGE = np.geomspace(1e3, 1e6, 7)  # D, where rates are measured


class Ideal:
    """The ideal denoiser of the charges, with what a sampler asks of a network."""

    sigma_min, sigma_max = 0.0, INF
    round_sigma = staticmethod(torch.as_tensor)

    def __init__(self, D):
        self.kernel = PerturbationKernel(D)

    def __call__(self, x, sigma, class_labels=None):
        return self.kernel.posterior_mean(x, sigma, torch.tensor(CHARGES))


def slope_at(x, sigma, D):
    """dx/dsigma at one x, as samplers find it."""
    return sigma_slope(Ideal(D), x[None], torch.tensor(sigma, dtype=torch.float64))[0]


def rate(errors):
    """The exponent of D in errors at LARGE."""
    return np.polyfit(np.log(LARGE), np.log(errors), 1)[0]


# ---- the field of N + D dimensions --------------------------------------------------------------

def field(place, charges=CHARGES, power=None):
    """The electric field at (x, z) [N + D] of unit charges at (y, 0), up to a constant factor.

    No symmetry is used: all N + D coordinates are there. The factor keeps the largest term at the
    size of its offset, whatever the power.
    """
    at = np.pad(charges, [(0, 0), (0, len(place) - charges.shape[1])])
    offset = place - torch.tensor(at)
    log_distance = offset.norm(dim=1).log()
    power = len(place) if power is None else power
    return (offset * (-power * (log_distance - log_distance.min().detach())).exp()[:, None]).sum(0)


def places(D, sigma, count=6):
    """Points (x, z) [count, N + D] with |z| = r = sigma sqrt(D), in random directions."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(count, D))
    z *= sigma * math.sqrt(D) / np.linalg.norm(z, axis=1, keepdims=True)
    x = CHARGES[np.arange(count) % 5] + sigma * rng.normal(size=(count, N))
    return torch.tensor(np.concatenate([x, z], axis=1))


@pytest.mark.parametrize("D", [1, 2, 5, 64])
def test_the_field_has_no_sources_outside_the_data(D):
    # Gauss's law in N + D dimensions: of all powers of the distance, N + D alone does it.
    for place in places(D, 0.7):
        jacobian = torch.autograd.functional.jacobian(field, place)
        assert abs(jacobian.trace()) < 1e-11 * jacobian.norm()
        other = torch.autograd.functional.jacobian(lambda p: field(p, power=N + D - 1), place)
        assert abs(other.trace()) > 1e-3 * other.norm()


@pytest.mark.parametrize("D", [1, 2, 5, 128, 2048])
@pytest.mark.parametrize("sigma", [0.2, 1.0, 20.0])
def test_the_field_gives_the_equation_that_samplers_solve(D, sigma):
    r = sigma * math.sqrt(D)
    for place in places(D, sigma):
        x, z, force = place[:N], place[N:], field(place)
        along = force[N:] @ z / r  # E_r
        # By symmetry the field has no other component in the augmented dimensions.
        torch.testing.assert_close(force[N:], along * z / r, rtol=1e-9, atol=1e-12)
        slope = slope_at(x, sigma, D)
        # r = sigma sqrt(D), so dx/dsigma = sqrt(D) dx/dr.
        torch.testing.assert_close(slope, math.sqrt(D) * force[:N] / along, rtol=1e-9, atol=1e-9)


def field_line(start, r_end):
    """Where the field line through `start` [N + D] has |z| = r_end, by scipy."""
    def slope(log_r, place):
        force = field(torch.tensor(place)).numpy()
        z = place[N:]
        return force * (z @ z) / (force[N:] @ z)  # d/d ln r
    r = np.linalg.norm(start[N:])
    return scipy.integrate.solve_ivp(slope, [math.log(r), math.log(r_end)], start,
                                     method="DOP853", rtol=1e-9, atol=1e-11).y[:, -1]


@pytest.mark.long
@pytest.mark.parametrize("D", [1, 2, 64])
def test_field_lines_are_where_the_sampler_goes(D):
    highest, lowest = 40.0, 0.2
    starts = places(D, highest, count=4)
    x = starts[:, :N]
    grid = torch.linspace(highest ** (1 / 7), lowest ** (1 / 7), 401, dtype=torch.float64) ** 7
    levels = heun(Ideal(D), x, grid)
    ends = edm_sampler(Ideal(D), x / highest, num_steps=100, sigma_max=highest, sigma_min=1e-3)
    for start, at_lowest, end in zip(starts.numpy(), levels, ends, strict=True):
        middle = field_line(start, lowest * math.sqrt(D))
        # Heun's method leaves an error of (1/400)^2 times a constant.
        np.testing.assert_allclose(middle[:N], at_lowest, atol=1e-4)
        # Lines keep their direction in the augmented dimensions, and end on a charge.
        np.testing.assert_allclose(middle[N:], start[N:] * lowest / highest, rtol=1e-6)
        landed = field_line(middle, 1e-5 * math.sqrt(D))
        assert np.linalg.norm(CHARGES - landed[:N], axis=1).min() < 1e-3
        np.testing.assert_allclose(landed[:N], end, atol=1e-3)


# ---- the law of |n| -----------------------------------------------------------------------------

@pytest.mark.parametrize("dimension", [1, 64, 784])
@pytest.mark.parametrize("D", [1, 16, 2048])
def test_norms_of_noise_have_the_density_of_the_paper(dimension, D):
    sigma, count = 0.4, 5000
    r = sigma * math.sqrt(D)
    noise = PerturbationKernel(D).sample((count, dimension), sigma,
                                         torch.Generator().manual_seed(1)).double()
    log_R = noise.norm(dim=1).log().numpy()
    # p(R) ~ R^(N-1) / (R^2 + r^2)^((N+D)/2), integrated over ln R.
    grid = np.linspace(log_R.min() - 3, log_R.max() + 3, 20_001)
    log_p = dimension * grid - (dimension + D) / 2 * np.log(np.exp(2 * grid) + r**2)
    cdf = scipy.integrate.cumulative_trapezoid(np.exp(log_p - log_p.max()), grid, initial=0)
    law = scipy.stats.kstest(log_R, lambda v: np.interp(v, grid, cdf / cdf[-1]))
    assert law.pvalue > 1e-3
    # |n|^2/r^2 ~ BetaPrime(N/2, D/2) has logarithmic moments at every D: 4.5 standard errors.
    log_u = 2 * (log_R - math.log(r))
    mean = scipy.special.digamma(dimension / 2) - scipy.special.digamma(D / 2)
    variance = scipy.special.polygamma(1, [dimension / 2, D / 2]).sum()
    assert abs(log_u.mean() - mean) < 4.5 * math.sqrt(variance / count)
    squares = (log_u - mean) ** 2
    assert abs(squares.mean() - variance) < 4.5 * squares.std() / math.sqrt(count)


# ---- D to infinity at fixed sigma = r / sqrt(D) -------------------------------------------------

def score(x, sigma):
    """The score of the charges' density under Gaussian noise, by differences of scipy's normals."""
    def log_p(x):
        return scipy.special.logsumexp([
            scipy.stats.multivariate_normal.logpdf(x, y, sigma**2) for y in CHARGES])
    h = 1e-3 * sigma  # five-point differences: an error of (h/sigma)^4
    return np.array([(8 * (log_p(x + e) - log_p(x - e)) - log_p(x + 2 * e) + log_p(x - 2 * e))
                     / (12 * h) for e in h * np.eye(N)])


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
def test_at_D_inf_the_slope_is_minus_sigma_times_the_score(sigma):
    for x in places(1, sigma)[:, :N]:
        slope = slope_at(x, sigma, INF)
        np.testing.assert_allclose(slope, -sigma * score(x.numpy(), sigma), atol=1e-9)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
def test_the_field_converges_to_the_score_at_rate_1_over_D(sigma):
    for x in places(1, sigma)[:, :N]:
        limit = -sigma * score(x.numpy(), sigma)
        errors = np.stack([slope_at(x, sigma, D).numpy() - limit for D in LARGE])
        assert rate(np.linalg.norm(errors, axis=1)) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("dimension", [1, 12, 64])
@pytest.mark.parametrize("share", [0.3, 1.0, 2.0])
def test_the_kernels_density_converges_at_rate_1_over_D(dimension, share):
    sigma = 0.7
    a = share * dimension  # |n|^2 / sigma^2, whose mean is N at D = inf
    noise = torch.full([1, dimension], sigma * math.sqrt(share), dtype=torch.float64)
    gaussian = scipy.stats.norm.logpdf(noise.numpy(), scale=sigma).sum()
    errors = np.array([PerturbationKernel(D).log_density(noise, sigma).item() - gaussian
                       for D in LARGE])
    assert rate(np.abs(errors)) == pytest.approx(-1, abs=0.02)
    # The factor, by Stirling's series and that of the logarithm.
    assert LARGE[-1] * errors[-1] == pytest.approx(((a - dimension) ** 2 - 2 * dimension) / 4,
                                                   rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
def test_the_posterior_mean_converges_at_rate_1_over_D(sigma):
    for x in places(1, sigma)[:, :N]:
        a = ((x.numpy() - CHARGES) ** 2).sum(1) / sigma**2
        weights = scipy.special.softmax(-a / 2)
        mean = weights @ CHARGES
        errors = np.stack([Ideal(D)(x[None], sigma)[0].numpy() - mean for D in LARGE])
        assert rate(np.linalg.norm(errors, axis=1)) == pytest.approx(-1, abs=0.02)
        # The factor is the covariance of y and the density's.
        factor = weights * (a - N) ** 2 / 4 @ (CHARGES - mean)
        np.testing.assert_allclose(LARGE[-1] * errors[-1], factor, rtol=1e-3, atol=1e-5)


def test_trajectories_converge_at_rate_1_over_D():
    x = places(1, 40.0)[:, :N]
    grid = torch.linspace(40 ** (1 / 7), 0.3 ** (1 / 7), 65, dtype=torch.float64) ** 7
    limit = heun(Ideal(INF), x, grid)
    errors = np.stack([(heun(Ideal(D), x, grid) - limit).norm(dim=1) for D in LARGE])
    for trajectory in errors.T:
        assert rate(trajectory) == pytest.approx(-1, abs=0.02)
