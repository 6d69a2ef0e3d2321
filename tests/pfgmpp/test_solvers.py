"""Solvers against exact solutions of the flow; grids against their formula; the laws of churn."""

import functools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch

from pfgmpp.kernel import PerturbationKernel
from pfgmpp.networks import EDMPrecond, iDDPMPrecond
from pfgmpp.samplers import SamplerConfig, ablation_sampler, edm_sampler
from pfgmpp.schedules import edm_sigmas, make_schedule, sigma_grid
from pfgmpp.solvers import churn, euler, heun

INF = math.inf
SHORT = (1, 2, 128, INF)
KS_SAMPLES = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Ideal:
    """The ideal denoiser of a data set, with what a sampler asks of a network."""

    def __init__(self, data, D, sigma_min=0.0, sigma_max=INF):
        self.data, self.kernel = data, PerturbationKernel(D)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.levels = []

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None, *args, **kwargs):
        self.levels.append(float(torch.as_tensor(sigma).flatten()[0]))
        return self.kernel.posterior_mean(x.double(), sigma, self.data)


def formula(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's grid as the paper writes it, with the final 0."""
    i = np.arange(n)
    root = sigma_max ** (1 / rho) + i / (n - 1) * (sigma_min ** (1 / rho)
                                                   - sigma_max ** (1 / rho))
    return np.append(root**rho, 0.0)


# ---- convergence --------------------------------------------------------------------------------

POINTS = np.array([-1.0, 0.1, 0.8])
FIRST, LAST = 20.0, 0.3


@functools.cache
def exact_flow(x, D):
    """The state at LAST of a trajectory that is at x at FIRST: in one dimension quantiles move."""
    def cdf(x, sigma):
        q = (x - POINTS) / sigma
        return (scipy.special.ndtr(q) if math.isinf(D) else scipy.special.stdtr(D, q)).mean()
    return scipy.optimize.brentq(lambda y: cdf(y, LAST) - cdf(x, FIRST), -1e3, 1e3, xtol=1e-15)


@pytest.fixture(scope="module")
def starts():
    return torch.tensor([-35.0, -11.0, -2.0, 3.0, 17.0], dtype=torch.float64).reshape(5, 1, 1, 1)


def error_of(solver, D, num_steps, starts):
    net = Ideal(torch.tensor(POINTS).reshape(3, 1, 1, 1), D)
    exact = torch.tensor([exact_flow(x, D) for x in starts.flatten().tolist()],
                         dtype=torch.float64).reshape(5, 1, 1, 1)
    # The step to 0 is D(x; LAST) for both solvers: not an error, for the exact x takes it too.
    exact = net(exact, LAST)
    sigmas = torch.tensor(formula(num_steps, LAST, FIRST))
    return (solver(net, starts, sigmas) - exact).abs().max().item()


@pytest.mark.long
@pytest.mark.parametrize("D", SHORT)
@pytest.mark.parametrize("solver, order", [(euler, 1), (heun, 2)])
def test_solver_converges_at_its_order_to_the_exact_flow(solver, order, D, starts):
    steps = np.array([33, 65, 129, 257])  # twice as fine each, for n levels have n-1 intervals
    errors = [error_of(solver, D, n, starts) for n in steps]
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    # Slopes of a smooth problem differ from the order by O(1/n).
    assert np.abs(slopes - order).max() < 0.25, slopes
    assert abs(slopes[-1] - order) < 0.1, slopes


@pytest.mark.parametrize("D", SHORT)
def test_heun_needs_fewer_evaluations_than_euler_for_the_same_error(D, starts):
    assert error_of(heun, D, 33, starts) < error_of(euler, D, 129, starts) / 2


@pytest.mark.long
@pytest.mark.parametrize("solver", [euler, heun])
def test_solver_is_exact_where_the_flow_is_a_straight_line(solver):
    # With one data point x - y is proportional to sigma, for every D.
    y = torch.randn(1, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    x = 80 * torch.randn(4, 3, 2, 2, generator=seeded(1), dtype=torch.float64)
    sigmas = torch.tensor(formula(9))
    half = solver(lambda x, sigma: y.expand_as(x), x, sigmas[:5])
    torch.testing.assert_close(half, y + (x - y) * sigmas[4] / sigmas[0], rtol=0, atol=1e-11)
    assert (solver(lambda x, sigma: y.expand_as(x), x, sigmas) - y).abs().max() < 1e-11


# ---- evaluations --------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 5, 18])
def test_euler_evaluates_n_and_heun_2n_minus_1_times_at_the_grid(n):
    sigmas = torch.tensor(formula(n) if n > 1 else [80.0, 0.0], dtype=torch.float64)
    x = torch.randn(2, 1, 2, 2, generator=seeded(), dtype=torch.float64)
    grid = sigmas.tolist()
    net = Ideal(torch.zeros(1, 1, 2, 2, dtype=torch.float64), INF)
    euler(net, x, sigmas)
    assert net.levels == grid[:-1]
    net.levels.clear()
    heun(net, x, sigmas)
    assert len(net.levels) == 2 * n - 1
    assert net.levels == [s for pair in zip(grid[:-1], grid[1:], strict=True) for s in pair][:-1]


@pytest.mark.parametrize("D", SHORT)
@pytest.mark.parametrize("solver", [euler, heun])
def test_one_step_returns_what_the_denoiser_says_at_sigma_max(solver, D):
    net = Ideal(torch.randn(5, 3, 2, 2, generator=seeded(), dtype=torch.float64), D)
    x = 80 * torch.randn(4, 3, 2, 2, generator=seeded(1), dtype=torch.float64)
    expected = net(x, 80.0)
    torch.testing.assert_close(solver(net, x, torch.tensor([80.0, 0.0], dtype=torch.float64)),
                               expected, rtol=0, atol=1e-12)
    net.levels.clear()
    sampled = edm_sampler(net, x / 80, num_steps=1)
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-12)
    assert net.levels == [80.0]


def test_solvers_start_each_step_from_what_before_step_returns():
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def before(x, i):
        return x + 1, sigmas[i] * 1.25

    for solver, second_order in ((euler, False), (heun, True)):
        def denoise(x, sigma):
            return 0.5 * x / (1 + sigma)
        state = x
        for i in range(3):  # by hand
            state, start, end = state + 1, float(sigmas[i]) * 1.25, float(sigmas[i + 1])
            slope = (state - denoise(state, start)) / start
            stepped = state + (end - start) * slope
            if second_order and end > 0:
                slope = (slope + (stepped - denoise(stepped, end)) / end) / 2
                stepped = state + (end - start) * slope
            state = stepped
        torch.testing.assert_close(solver(denoise, x, sigmas, before), state, rtol=1e-14, atol=0)


# ---- sampling -----------------------------------------------------------------------------------

@pytest.mark.parametrize("D", SHORT)
def test_sampling_with_the_ideal_denoiser_returns_the_data_in_its_proportions(D):
    points = torch.tensor([[0.9, 0.3], [-0.6, 0.5], [0.1, -0.9]], dtype=torch.float64)
    share = np.array([0.5, 0.3, 0.2])
    data = points.repeat_interleave(torch.tensor([5, 3, 2]), 0).reshape(10, 1, 1, 2)
    count = 4000
    latents = PerturbationKernel(D).sample((count, 1, 1, 2), 1.0, seeded(12))
    # From 80 times the data's spread the prior differs from the true start by 0.4 * |mean|/80, far
    # below the sampling error. At D = 1 noise of sigma_min reaches far, so sigma_min is small.
    samples = edm_sampler(Ideal(data, D), latents, num_steps=40, sigma_min=1e-4, sigma_max=80)
    assert samples.dtype == torch.float64
    distance = torch.cdist(samples.flatten(1), points)
    # Student-t noise of scale 1e-4 leaves the neighbourhood of its point with P(|n| > 0.1) < 0.002.
    assert (distance.amin(1) < 0.01).double().mean() > 0.99
    counts = np.bincount(distance.argmin(1).numpy(), minlength=3)
    # 4 binomial standard deviations.
    assert (np.abs(counts / count - share) < 4 * np.sqrt(share * (1 - share) / count)).all(), counts


def test_the_class_labels_reach_the_network():
    seen = []

    class Net(Ideal):
        def __call__(self, x, sigma, class_labels=None, *args, **kwargs):
            seen.append(class_labels)
            return super().__call__(x, sigma)
    labels = torch.eye(3)
    edm_sampler(Net(torch.zeros(1, 1, 1, 1), INF), torch.ones(3, 1, 1, 1), labels, num_steps=4)
    assert len(seen) == 7 and all(torch.equal(labels, given) for given in seen)


@pytest.mark.parametrize("D", SHORT)
def test_the_prior_follows_sigma_max_and_the_networks_range(D):
    seen = []

    class Net(Ideal):
        def __call__(self, x, sigma, class_labels=None, *args, **kwargs):
            seen.append((x.double(), float(sigma.flatten()[0])))
            return super().__call__(x, sigma)
    latents = PerturbationKernel(D).sample((3, 1, 2, 2), 1.0, seeded())
    for limit, asked, used in [(INF, 80, 80), (INF, 7, 7), (5.0, 80, 5)]:
        seen.clear()
        edm_sampler(Net(torch.zeros(1, 1, 2, 2), D, sigma_max=limit), latents, num_steps=3,
                    sigma_max=asked)
        assert seen[0][1] == pytest.approx(used, rel=1e-12)
        # The network may see float32.
        torch.testing.assert_close(seen[0][0], used * latents.double(), rtol=1e-7, atol=0)


# ---- the grid -----------------------------------------------------------------------------------

def free_net():
    return Ideal(torch.zeros(1, 1, 1, 1), INF)


@pytest.mark.parametrize("n, sigma_min, sigma_max, rho", [
    (18, 0.002, 80, 7), (2, 0.002, 80, 7), (7, 0.01, 50, 3), (40, 0.1, 5, 1), (5, 0.5, 0.5, 7)])
def test_edm_grid_is_the_papers_formula(n, sigma_min, sigma_max, rho):
    sigmas = edm_sigmas(free_net(), n, sigma_min, sigma_max, rho)
    assert sigmas.dtype == torch.float64
    np.testing.assert_allclose(sigmas, formula(n, sigma_min, sigma_max, rho), rtol=1e-12)
    assert sigmas[-1] == 0


def test_edm_grid_defaults_are_the_papers():
    np.testing.assert_allclose(edm_sigmas(free_net(), 18), formula(18, 0.002, 80, 7), rtol=1e-12)


def test_edm_grid_of_one_step_is_sigma_max_then_zero():
    sigmas = edm_sigmas(free_net(), 1, 0.002, 80)
    np.testing.assert_allclose(sigmas, [80, 0], rtol=1e-12)


def test_edm_grid_is_clipped_to_the_networks_range():
    net = free_net()
    net.sigma_min, net.sigma_max = 0.02, 50.0
    np.testing.assert_allclose(edm_sigmas(net, 10, 0.002, 80), formula(10, 0.02, 50), rtol=1e-12)
    np.testing.assert_allclose(edm_sigmas(net, 10, 0.1, 40), formula(10, 0.1, 40), rtol=1e-12)
    np.testing.assert_allclose(edm_sigmas(net, 1, 0.002, 80), [50, 0], rtol=1e-12)


@pytest.mark.parametrize("n", [1, 6, 18])
def test_edm_grid_of_an_iddpm_network_is_snapped_to_its_levels(n):
    net = iDDPMPrecond(8, 3, model_type="SongUNet", model_channels=8, channel_mult=[1],
                       num_blocks=1, attn_resolutions=[])
    sigmas = edm_sigmas(net, n).numpy()
    levels = net.u.double().numpy()
    # Float32 loses digits of (u^2 + 1)/ratio - 1 where u is small.
    np.testing.assert_allclose(levels, iddpm_by_hand(), rtol=1e-3)
    wanted = formula(n, max(0.002, levels[-2]))[:-1] if n > 1 else np.array([80.0])
    nearest = levels[np.abs(levels - wanted[:, None]).argmin(1)]
    np.testing.assert_array_equal(sigmas[:-1], nearest)
    assert sigmas[-1] == 0
    assert np.abs(nearest / wanted - 1).max() > 1e-4  # rounding does something


def iddpm_by_hand(M=1000, C_1=0.001, C_2=0.008):
    def alpha_bar(j):
        return math.sin(math.pi / 2 * j / M / (C_2 + 1)) ** 2
    u = [0.0]
    for j in range(M, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1))
    return np.array(u[::-1])


@pytest.mark.parametrize("n, sigma_min, sigma_max", [
    (0, 0.002, 80), (-3, 0.002, 80), (5, 0, 80), (5, -1, 80), (5, 2, 1), (5, math.nan, 80)])
def test_impossible_grids_are_refused_in_one_line(n, sigma_min, sigma_max):
    with pytest.raises(ValueError) as error:
        edm_sigmas(free_net(), n, sigma_min, sigma_max)
    assert "\n" not in str(error.value) and str(error.value)


# ---- churn --------------------------------------------------------------------------------------

def recorder():
    """A source of noise that keeps what it gave."""
    rng, given = seeded(3), []

    def randn_like(x):
        given.append(torch.randn(x.shape, generator=rng, dtype=x.dtype))
        return given[-1]
    return randn_like, given


@pytest.mark.parametrize("S_churn, S_noise", [(0.9, 1.0), (2.0, 1.007), (1e3, 0.5)])
def test_churn_adds_the_missing_variance_and_caps_gamma(S_churn, S_noise):
    sigmas = torch.tensor(formula(6))
    randn_like, given = recorder()
    before_step = churn(sigmas, randn_like, S_churn=S_churn, S_noise=S_noise)
    x = torch.randn(3, 1, 4, 4, generator=seeded(), dtype=torch.float64)
    gamma = min(S_churn / 6, math.sqrt(2) - 1)
    for i in range(6):
        x_hat, sigma_hat = before_step(x, i)
        assert float(sigma_hat) == pytest.approx(float(sigmas[i]) * (1 + gamma), rel=1e-12)
        # Independent Gaussians add in variance.
        std = float(sigmas[i]) * math.sqrt((1 + gamma) ** 2 - 1) * S_noise
        torch.testing.assert_close(x_hat - x, std * given[i], rtol=1e-9, atol=1e-12)


def test_churn_at_its_defaults_keeps_the_marginal_of_the_raised_level():
    sigmas = torch.tensor(formula(6))
    rng = seeded(4)
    before_step = churn(sigmas, lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype),
                        S_churn=3)
    y, count = 0.7, 20_000
    x = y + sigmas[2] * torch.randn(count, 1, 1, 1, generator=seeded(5), dtype=torch.float64)
    x_hat, sigma_hat = before_step(x, 2)
    assert sigma_hat > sigmas[2]
    law = scipy.stats.norm(y, float(sigma_hat))
    assert scipy.stats.kstest(x_hat.flatten().numpy(), law.cdf).pvalue > 1e-3


def test_churn_acts_between_S_min_and_S_max_alone_and_draws_everywhere():
    sigmas = torch.tensor([16.0, 8, 4, 2, 1, 0], dtype=torch.float64)
    randn_like, given = recorder()
    before_step = churn(sigmas, randn_like, S_churn=1, S_min=2, S_max=8)  # the ends belong to it
    x = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    for i, acts in enumerate([False, True, True, True, False]):
        x_hat, sigma_hat = before_step(x, i)
        assert len(given) == i + 1
        assert float(sigma_hat) == pytest.approx(float(sigmas[i]) * (1.2 if acts else 1))
        assert torch.equal(x_hat, x) != acts


def test_churned_levels_are_rounded_to_what_the_network_knows():
    sigmas = torch.tensor([16.0, 8, 0], dtype=torch.float64)
    randn_like, given = recorder()
    before_step = churn(sigmas, randn_like, S_churn=0.2, round_sigma=torch.round)
    x_hat, sigma_hat = before_step(torch.zeros(1, 1, 2, 2, dtype=torch.float64), 0)
    assert float(sigma_hat) == 18  # 16 * 1.1 = 17.6
    torch.testing.assert_close(x_hat, math.sqrt(18**2 - 16**2) * given[0])


def test_sampler_without_churn_draws_nothing():
    def forbidden(x):
        raise AssertionError("a draw that nobody uses would shift the seeds' streams")
    edm_sampler(free_net(), torch.ones(1, 1, 1, 1), randn_like=forbidden, num_steps=4, S_churn=0)


def test_sampler_with_churn_draws_float64_once_a_step():
    randn_like, given = recorder()
    latents = torch.randn(2, 1, 1, 1, generator=seeded())
    edm_sampler(free_net(), latents, randn_like=randn_like, num_steps=7, S_churn=5, S_max=1)
    assert len(given) == 7
    assert all(g.dtype == torch.float64 and g.shape == latents.shape for g in given)


def test_sampler_with_churn_still_returns_the_data_in_its_proportions():
    # Stochastic sampling keeps the marginals at D = inf.
    data = torch.tensor([0.9, 0.9, 0.9, -0.6], dtype=torch.float64).reshape(4, 1, 1, 1)
    rng, count = seeded(6), 4000
    latents = torch.randn(count, 1, 1, 1, generator=rng)
    samples = edm_sampler(
        Ideal(data, INF), latents, num_steps=30, S_churn=10, S_min=0.05, S_max=50,
        randn_like=lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype))
    share = (samples > 0.15).double().mean()
    # Churn of a discretised flow adds a bias of about a percent to the sampling error.
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / count) + 0.01
    assert torch.minimum((samples - 0.9).abs(), (samples + 0.6).abs()).max() < 0.02


SMALL = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1,
         "attn_resolutions": []}


def churned_radius(data, D, sigma, *, with_scale=True, count=KS_SAMPLES):
    """Returns the KS test of |x_hat - y|^2 / (sigma_hat^2 D) against the law of D at sigma_hat."""
    N = data[0].numel()
    y = data[torch.randint(len(data), [count], generator=seeded(20))]
    x = y + PerturbationKernel(D).sample(tuple(y.shape), sigma, seeded(21)).double()
    net, rng = Ideal(data, D), seeded(22)
    scaled = {"denoise": net,
              "noise_scale": lambda n, s: net.kernel.posterior_scale(n, s, rng)}
    before_step = churn(torch.tensor([sigma, 0], dtype=torch.float64),
                        lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype),
                        S_churn=0.2, **(scaled if with_scale else {}))
    x_hat, sigma_hat = before_step(x, 0)
    assert float(sigma_hat) == pytest.approx(1.2 * sigma, rel=1e-12)
    ratio = (x_hat - y).flatten(1).square().sum(1) / (sigma_hat**2 * D)
    return scipy.stats.kstest(ratio.numpy(), scipy.stats.betaprime(N / 2, D / 2).cdf)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 4, 4), (3, 8, 8)], ids=str)
@pytest.mark.parametrize("D", [0.5, 1, 2, 16, 128])
def test_churn_of_one_point_is_the_kernel_at_the_raised_level(D, shape):
    # x - D(x) is the noise itself, so the joint law of noise and scale is kept exactly.
    point = torch.full((1, *shape), 0.3, dtype=torch.float64)
    assert churned_radius(point, D, 0.7).pvalue > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("D", [0.5, 1, 2, 16, 128])
def test_gaussian_churn_of_one_point_is_told_from_the_kernel(D):
    point = torch.full((1, 3, 8, 8), 0.3, dtype=torch.float64)
    assert churned_radius(point, D, 0.7, with_scale=False).pvalue < 1e-6


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("D", [2, 64])
def test_churn_of_a_data_set_is_near_the_kernel_at_the_raised_level(D, sigma):
    # x - D(x) is shorter than the noise where several points are likely: |x - y|^2 exceeds
    # |x - D(x)|^2 by the posterior variance of y, at most 11% here. Gaussian churn is off by 0.07
    # (D = 2) and 0.015 (D = 64); KS distances of exact samples reach 1.95/sqrt(20000) = 0.014.
    data = torch.rand(12, 1, 4, 4, generator=seeded(5), dtype=torch.float64) * 2 - 1
    assert churned_radius(data, D, sigma).statistic < 0.02


@pytest.mark.parametrize("D", [0.5, 1, 2, 128])
def test_states_of_a_churned_sampler_follow_the_kernel_at_every_level(D):
    y, count, rng = 0.3, 4000, seeded(7)
    net, states = Ideal(torch.full((1, 1, 4, 4), y, dtype=torch.float64), D), []
    net.D = D
    latents = torch.randn(count, 1, 4, 4, generator=rng, dtype=torch.float64)
    latents *= net.kernel.scale(count, rng).reshape(-1, 1, 1, 1)
    edm_sampler(net, latents, num_steps=8, S_churn=3, init=torch.full_like(latents, y),
                randn_like=lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype),
                posterior_scale=lambda kernel, n, s: kernel.posterior_scale(n, s, rng),
                watch=lambda x, sigma: states.append((x - y) / sigma))
    law = scipy.stats.betaprime(16 / 2, D / 2)
    for state in states:
        squared = state.flatten(1).square().sum(1).numpy()
        assert scipy.stats.kstest(squared / D, law.cdf).pvalue > 1e-3
    # The state at one level is a scale mixture anew: the direction does not stay.
    cosine = torch.nn.functional.cosine_similarity(states[0].flatten(1), states[-1].flatten(1))
    assert cosine.abs().mean() < 0.9


@pytest.mark.parametrize("D", [1, 2, 128])
def test_churn_at_finite_D_still_returns_the_data_in_its_proportions(D):
    data = torch.tensor([[1.0, 0.5], [1.0, 0.5], [1.0, 0.5], [-0.6, -0.8]], dtype=torch.float64)
    data = data.repeat(1, 8).reshape(4, 1, 4, 4)
    rng, count = seeded(6), 2000
    net = Ideal(data, D)
    net.D = D
    latents = net.kernel.sample((count, 1, 4, 4), 1.0, rng)
    samples = edm_sampler(
        net, latents, num_steps=40, sigma_min=1e-4, S_churn=10, S_min=0.05, S_max=50,
        randn_like=lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype),
        posterior_scale=lambda kernel, n, s: kernel.posterior_scale(n, s, rng))
    # Churn of a discretised flow adds a bias of about a percent to the sampling error.
    share = (samples.mean([1, 2, 3]) > 0).double().mean()
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / count) + 0.01
    distance = torch.cdist(samples.flatten(1), data.flatten(1)).amin(1)
    assert (distance < 0.01).double().mean() > 0.99


@pytest.mark.parametrize("D", [2, INF])
def test_churn_costs_an_evaluation_a_churned_step_at_finite_D_alone(D):
    net = Ideal(torch.zeros(1, 1, 2, 2, dtype=torch.float64), D)
    net.D = D
    latents = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    grid = formula(6)
    S_min, S_max = grid[3] * 0.99, grid[1] * 1.01  # three of the levels
    edm_sampler(net, latents, num_steps=6, S_churn=1, S_min=S_min, S_max=S_max)
    assert len(net.levels) == 2 * 6 - 1 + (3 if D < INF else 0)
    # Asked at the level before it is raised, then at the raised one.
    if D < INF:
        asked = np.array(net.levels)
        for sigma in grid[1:4]:
            [k] = np.flatnonzero(np.isclose(asked[:-1], sigma) & np.isclose(
                asked[1:], sigma * (1 + 1 / 6)))
            assert k > 0


@pytest.mark.parametrize("name", ["vp", "ve", "linear"])
@pytest.mark.parametrize("S_churn", [0, 1.5])
def test_levels_that_are_not_churned_get_no_noise_and_no_evaluation_along_a_schedule(name, S_churn):
    # A schedule's inverse gives levels back off by rounding, now up, now down.
    sigmas = sigma_grid("ve", free_net(), 257)[0]
    path, asked = make_schedule(name, "none", 0.02, 100), []
    before_step = churn(path.sigma_inv(sigmas), torch.ones_like, S_churn=S_churn, S_min=0.1,
                        S_max=10, schedule=path, denoise=lambda x, sigma: asked.append(sigma) or x,
                        noise_scale=lambda n, sigma: torch.ones(len(n)))
    zeros = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    noisy = [bool(before_step(zeros, i)[0].any()) for i in range(257)]
    churned = [S_churn > 0 and 0.1 <= sigma <= 10 for sigma in sigmas[:-1]]
    assert noisy == churned and len(asked) == sum(churned)


@pytest.mark.parametrize("D", [1, 2, 128])
def test_churn_is_allowed_at_every_D(D):
    SamplerConfig(S_churn=10).check(EDMPrecond(8, 3, pfgmpp=True, D=D, **SMALL))
    SamplerConfig(S_churn=10).check(EDMPrecond(8, 3, pfgmpp=False, D=D, **SMALL))


@pytest.mark.parametrize("D", SHORT)
def test_sampler_defaults_are_edms(D):
    net = Ideal(torch.tensor(POINTS).reshape(3, 1, 1, 1), D)
    latents = PerturbationKernel(D).sample((20, 1, 1, 1), 1.0, seeded(7))
    spelled_out = {"num_steps": 18, "sigma_min": 0.002, "sigma_max": 80, "rho": 7, "S_churn": 0,
                   "S_min": 0, "S_max": INF, "S_noise": 1}
    expected = edm_sampler(net, latents, **spelled_out)
    levels, net.levels = net.levels, []
    assert torch.equal(edm_sampler(net, latents), expected)
    assert torch.equal(SamplerConfig().sample(net, latents, None, torch.randn_like), expected)
    assert net.levels == 2 * levels


# ---- the ablation sampler -----------------------------------------------------------------------

VP_BETAS = 19.9, 0.1


def vp_sigma(t, beta_d=VP_BETAS[0], beta_min=VP_BETAS[1]):
    return np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t))


# What NVlabs/edm's ablation_sampler makes of --disc=iddpm in float64, PyTorch 2.13 on an AMD EPYC.
PUBLISHED_IDDPM_GRIDS = {
    2: [80.20367617799776, 0.0064224695811984575],
    7: [80.20367617799776, 3.6187161191062898, 1.719471821964532, 0.9998443686148031,
        0.5834219914943771, 0.2776941144285248, 0.0064224695811984575],
    18: [80.20367617799776, 9.687848103884503, 5.068195961652411, 3.4107606410408473,
         2.5361010609130563, 1.9883932885155027, 1.6023834730291455, 1.3200216159794353,
         1.098003886076512, 0.9133120999194778, 0.759764295135753, 0.6259973154403513,
         0.5046302701569558, 0.39584529576659044, 0.2945708527913949, 0.19850549501482204,
         0.10403644724603973, 0.0064224695811984575],
    40: [80.20367617799776, 19.427174796818257, 10.844969276113968, 7.595150369491833,
         5.776037824584097, 4.68271259203205, 3.926921041024707, 3.352622105719851,
         2.9306369645723622, 2.583174603940878, 2.3114405540172402, 2.076322228503215,
         1.8847879179843952, 1.719471821964532, 1.5695138159657227, 1.4422875479195354,
         1.324304636256863, 1.2222242674902224, 1.1294278052067241, 1.0412042031729094,
         0.9631263995576906, 0.887907502620235, 0.8205199266247155, 0.7573088503539143,
         0.6954069392811478, 0.6390920392054893, 0.5834219914943771, 0.5323218931078624,
         0.4832975230317359, 0.43422923521743206, 0.3886486950969402, 0.34268003291231475,
         0.2996636838273248, 0.25596785228711183, 0.21478549161904614, 0.17426094614541152,
         0.132642613477032, 0.09293340377517828, 0.0515412341541703, 0.0064224695811984575],
}


def published_grid(name, n):
    """The grids of the paper's table 1, and of its code for improved DDPM."""
    i = np.arange(n) / (n - 1)
    if name == "vp":
        return vp_sigma(1 + i * (1e-3 - 1))
    if name == "ve":
        return np.sqrt(100**2 * (0.02**2 / 100**2) ** i)
    if name == "iddpm":
        levels = iddpm_by_hand()
        levels = levels[(levels >= 0.002) & (levels <= 81)]
        return PUBLISHED_IDDPM_GRIDS.get(n, levels[np.round((len(levels) - 1) * i).astype(int)])
    return formula(n)[:-1]


@pytest.mark.parametrize("n", [2, 7, 18, 40])
@pytest.mark.parametrize("name", ["vp", "ve", "iddpm", "edm"])
def test_ablation_grids_are_the_published_ones(name, n):
    sigmas, low, high = sigma_grid(name, free_net(), n)
    assert sigmas.dtype == torch.float64 and sigmas[-1] == 0
    # The levels of improved DDPM hang on abar in float32, whose sine differs between machines.
    rtol = 2e-5 if name == "iddpm" else 1e-9
    np.testing.assert_allclose(sigmas[:-1], published_grid(name, n), rtol=rtol)
    expected = {"vp": (vp_sigma(1e-3), vp_sigma(1.0)), "ve": (0.02, 100), "iddpm": (0.002, 81),
                "edm": (0.002, 80)}[name]
    np.testing.assert_allclose((low, high), expected, rtol=1e-9)


@pytest.mark.parametrize("scaling", ["vp", "none"])
@pytest.mark.parametrize("name", ["vp", "ve", "linear"])
def test_schedules_are_their_formulas_with_true_derivatives_and_inverse(name, scaling):
    schedule = make_schedule(name, scaling, float(vp_sigma(1e-3)), float(vp_sigma(1.0)))
    t = torch.tensor([1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
    formulas = {"vp": vp_sigma, "ve": np.sqrt, "linear": lambda t: t}
    sigma = formulas[name](t.numpy())
    np.testing.assert_allclose(schedule.sigma(t), sigma, rtol=1e-7)
    np.testing.assert_allclose(schedule.sigma_inv(torch.tensor(sigma)), t, rtol=1e-7)
    scale = schedule.scale(t) * torch.ones_like(t)
    np.testing.assert_allclose(
        scale, 1 / np.sqrt(1 + sigma**2) if scaling == "vp" else np.ones(4), rtol=1e-7)
    for function, derivative in [(schedule.sigma, schedule.sigma_deriv),
                                 (schedule.scale, schedule.scale_deriv)]:
        h = 1e-5 * t  # central differences: error h^2
        slope = (function(t + h) - function(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t) * torch.ones_like(t),
                                   slope * torch.ones_like(t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("D", SHORT)
def test_ablation_sampler_at_its_defaults_is_the_edm_sampler(D):
    net = Ideal(torch.tensor(POINTS).reshape(3, 1, 1, 1), D)
    latents = PerturbationKernel(D).sample((20, 1, 1, 1), 1.0, seeded(7))
    # The same steps in another order of operations.
    torch.testing.assert_close(ablation_sampler(net, latents, num_steps=9),
                               edm_sampler(net, latents, num_steps=9), rtol=0, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("discretization, D", [
    ("vp", 2), ("ve", 2), ("iddpm", 2), ("edm", 2), ("edm", INF)])
@pytest.mark.parametrize("schedule, scaling", [
    ("vp", "vp"), ("vp", "none"), ("ve", "none"), ("ve", "vp"), ("linear", "none"),
    ("linear", "vp")])
def test_every_ablation_follows_the_exact_flow(solver, discretization, schedule, scaling, D):
    share, count = 0.7, 400
    # Improved DDPM's levels are sparse at the high end, and Euler needs nearly all of them.
    n = 900 if discretization == "iddpm" and solver == "euler" else 200
    data = torch.tensor([-1.0] * 7 + [1.0] * 3, dtype=torch.float64).reshape(10, 1, 1, 1)
    latents = PerturbationKernel(D).sample((count, 1, 1, 1), 1.0, seeded(8))
    samples = ablation_sampler(Ideal(data, D), latents, num_steps=n, solver=solver,
                               discretization=discretization, schedule=schedule, scaling=scaling)
    # Quantiles move: the lower 70 % of the mixture at the first level goes to -1.
    first = published_grid(discretization, n)[0]
    law = scipy.stats.norm() if math.isinf(D) else scipy.stats.t(D)
    start = latents.double().flatten().numpy() * first
    rank = share * law.cdf((start + 1) / first) + (1 - share) * law.cdf((start - 1) / first)
    goal = np.where(rank < share, -1.0, 1.0)
    # Those within a percent of the watershed may fall on either side, and a sample keeps some of
    # its last level's noise: 0.02 times the tails of D = 2.
    clear = np.abs(rank - share) > 0.01
    error = np.abs(samples.flatten().numpy() - goal)[clear]
    assert (error < 0.2).mean() > 0.98, np.sort(error)[-20:]


@pytest.mark.parametrize("D", [2, INF])
@pytest.mark.parametrize("schedule, scaling", [("vp", "vp"), ("ve", "none"), ("linear", "vp")])
def test_churn_along_a_schedule_is_churn_of_the_unscaled_state(schedule, scaling, D):
    sigmas = torch.tensor(formula(6, 0.02, 50))
    path = make_schedule(schedule, scaling, 0.01, 150)
    times = path.sigma_inv(sigmas)
    settings = {"S_churn": 1.5, "S_min": 0.1, "S_max": 10.0, "S_noise": 1.1}
    if D < INF:
        rngs = seeded(4), seeded(4)
        settings["denoise"] = Ideal(torch.zeros(1, 1, 2, 2, dtype=torch.float64), D)
    scales = [{} if D == INF else {
        "noise_scale": lambda n, s, k=k: PerturbationKernel(D).posterior_scale(n, s, rngs[k])}
        for k in range(2)]
    plain = churn(sigmas, recorder()[0], **settings, **scales[0])
    along = churn(times, recorder()[0], schedule=path, **settings, **scales[1])
    x = torch.randn(3, 1, 2, 2, generator=seeded(), dtype=torch.float64)
    for i in range(6):
        x_hat, sigma_hat = plain(x, i)
        state, t_hat = along(path.scale(times[i]) * x, i)
        torch.testing.assert_close(path.sigma(t_hat), sigma_hat, rtol=1e-6, atol=0)
        torch.testing.assert_close(state, path.scale(t_hat) * x_hat, rtol=1e-6, atol=1e-9)
