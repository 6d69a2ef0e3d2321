"""The kernel against scipy: radial law, direction, density, limits, and the posterior mean."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

from pfgmpp.kernel import PerturbationKernel

INF = math.inf
SHORT = (1, 2, 128, INF)
ALL = (0.7, 1, 2, 64, 128, 2048, 1e6, 1e9, INF)
FLOAT32_MAX = torch.finfo(torch.float32).max

# Kolmogorov-Smirnov tests here have fixed seeds; a right law passes p > 1e-3 but for one seed in a
# thousand, and at 20000 samples a CDF that is off by 2 % fails.
KS_SAMPLES, KS_P = 20_000, 1e-3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit_radius(D, N):
    """The law of |n|^2 / (sigma^2 D), or of |n|^2 / sigma^2 at D = inf."""
    return scipy.stats.chi2(N) if math.isinf(D) else scipy.stats.betaprime(N / 2, D / 2)


def log_profile(squared, sigma, D, N):
    """log p(n) up to a constant, straight from (|n|^2 + r^2)^(-(N+D)/2) * r^D, by numpy."""
    if math.isinf(D):
        return -squared / (2 * sigma**2) - N * np.log(sigma)
    radius = sigma * math.sqrt(D)
    return -(N + D) / 2 * np.log(squared + radius**2) + D * np.log(radius)


# ---- drawing ------------------------------------------------------------------------------------

@pytest.mark.parametrize("D", ALL)
def test_squared_radius_over_r_squared_is_beta_prime(D):
    sigma, shape = 0.37, (3, 2, 2)
    noise = PerturbationKernel(D).sample((KS_SAMPLES, *shape), sigma, seeded(1)).double()
    ratio = noise.square().sum([1, 2, 3]) / (sigma**2 * (1 if math.isinf(D) else D))
    assert scipy.stats.kstest(ratio.numpy(), unit_radius(D, 12).cdf).pvalue > KS_P


@pytest.mark.parametrize("D", [D for D in ALL if D < INF])
def test_scale_is_the_root_of_D_over_chi_square(D):
    scale = PerturbationKernel(D).scale(KS_SAMPLES, seeded(2))
    assert scale.dtype == torch.float64 and scale.shape == (KS_SAMPLES,)
    assert scipy.stats.kstest((D / scale.square()).numpy(), scipy.stats.chi2(D).cdf).pvalue > KS_P


def test_scale_at_D_inf_is_one_and_draws_nothing():
    rng = seeded()
    before = rng.get_state()
    scale = PerturbationKernel(INF).scale(5, rng)
    assert torch.equal(scale, torch.ones(5, dtype=torch.float64))
    assert torch.equal(rng.get_state(), before)


@pytest.mark.parametrize("D", SHORT)
def test_direction_is_uniform_and_independent_of_the_radius(D):
    N = 12
    noise = PerturbationKernel(D).sample((KS_SAMPLES, N, 1, 1), 3.0, seeded(3)).double()
    noise = noise.flatten(1).numpy()
    radius = np.linalg.norm(noise, axis=1)
    axis = np.random.default_rng(0).normal(size=N)
    cosine = noise @ (axis / np.linalg.norm(axis)) / radius
    # The squared cosine with any fixed axis is Beta(1/2, (N-1)/2), its sign a fair coin.
    law = scipy.stats.beta(1 / 2, (N - 1) / 2)
    assert scipy.stats.kstest(cosine**2, law.cdf).pvalue > KS_P
    assert scipy.stats.binomtest(int((cosine > 0).sum()), KS_SAMPLES).pvalue > KS_P
    assert scipy.stats.spearmanr(cosine, radius).pvalue > KS_P
    assert scipy.stats.spearmanr(cosine**2, radius).pvalue > KS_P


@pytest.mark.parametrize("D", [8, 64, 128, 2048, INF])
def test_variance_is_sigma_squared_D_over_D_minus_2(D):
    batch, N, sigma = 50_000, 4, 0.6
    noise = PerturbationKernel(D).sample((batch, N, 1, 1), sigma, seeded(4)).double()
    per_image = noise.square().mean([1, 2, 3])
    expected = sigma**2 * (1 if math.isinf(D) else D / (D - 2))
    # Five standard errors of the mean over images, as the sample itself has them.
    assert abs(per_image.mean() - expected) < 5 * per_image.std() / math.sqrt(batch)


@pytest.mark.parametrize("D", [D for D in ALL if D < INF])
def test_one_seed_gives_one_direction_at_every_D(D):
    shape = (16, 3, 4, 4)
    gaussian = PerturbationKernel(INF).sample(shape, 2.0, seeded(5)).double().flatten(1)
    noise = PerturbationKernel(D).sample(shape, 2.0, seeded(5)).double().flatten(1)
    # Each entry is rounded to float32 once: 6e-8 relative.
    torch.testing.assert_close(noise / noise.norm(dim=1, keepdim=True),
                               gaussian / gaussian.norm(dim=1, keepdim=True),
                               rtol=3e-7, atol=0)


@pytest.mark.parametrize("sigma", [
    0.5, 80.0, torch.tensor(0.002), torch.tensor([0.1, 0.7, 80.0, 1e-3]),
    torch.tensor([0.1, 0.7, 80.0, 1e-3]).reshape(4, 1, 1, 1)], ids=str)
def test_noise_at_D_inf_is_sigma_times_randn_bit_for_bit(sigma):
    shape = (4, 3, 4, 4)
    expected = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1, 1, 1, 1) * torch.randn(
        shape, generator=seeded(6))
    noise = PerturbationKernel(INF).sample(shape, sigma, seeded(6))
    assert noise.dtype == torch.float32 and torch.equal(noise, expected)


@pytest.mark.parametrize("D", SHORT)
def test_noise_is_a_scale_family_in_sigma(D):
    shape, sigma = (6, 2, 3, 3), torch.tensor([0.25, 0.5, 1, 2, 4, 8])
    unit = PerturbationKernel(D).sample(shape, 1.0, seeded(7))
    scaled = PerturbationKernel(D).sample(shape, sigma, seeded(7))
    # Powers of two do not round.
    assert torch.equal(scaled, unit * sigma.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("D", [1e6, 1e9])
def test_scale_approaches_one_like_a_normal_of_variance_1_over_2D(D):
    scale = PerturbationKernel(D).scale(KS_SAMPLES, seeded(8)).numpy()
    assert scipy.stats.kstest(math.sqrt(2 * D) * (scale - 1), "norm").pvalue > KS_P


def test_noise_at_huge_D_is_the_gaussian_of_the_same_seed():
    shape = (64, 3, 8, 8)
    gaussian = PerturbationKernel(INF).sample(shape, 1.0, seeded(9))
    noise = PerturbationKernel(1e9).sample(shape, 1.0, seeded(9))
    # The factor deviates from 1 by at most 6 standard deviations, 6/sqrt(2D) = 1.4e-4.
    torch.testing.assert_close(noise, gaussian, rtol=1.4e-4, atol=0)


def test_tails_beyond_float32_saturate_with_the_right_rate_and_sign():
    D, sigma, batch = 0.01, 80.0, 10_000
    noise = PerturbationKernel(D).sample((batch, 1, 2, 2), sigma, seeded(10))
    z = PerturbationKernel(INF).sample((batch, 1, 2, 2), 1.0, seeded(10))
    assert noise.isfinite().all()
    assert torch.equal(noise.sign(), z.sign())
    # P(sigma sqrt(D/c) |z| > max) for the largest of each image's four pixels, by chi-square's CDF.
    largest = z.abs().amax([1, 2, 3]).double().numpy()
    rate = scipy.stats.chi2(D).cdf(D * (sigma * largest / FLOAT32_MAX) ** 2).mean()
    assert 0.40 < rate < 0.44
    saturated = int((noise.abs().amax([1, 2, 3]) == FLOAT32_MAX).sum())
    # Each image is a coin of almost the same probability: 4 standard deviations.
    assert abs(saturated / batch - rate) < 4 * math.sqrt(rate * (1 - rate) / batch)


@pytest.mark.parametrize("D", [0.01, 0.1])
def test_scale_stays_positive_and_finite_far_below_D_1(D):
    scale = PerturbationKernel(D).scale(KS_SAMPLES, seeded(11))
    assert scale.isfinite().all() and (scale > 0).all()
    for bound in (1.0, 1e10, 1e38, 1e100):  # all far below where float64 ends
        rate = scipy.stats.chi2(D).cdf(D / bound**2)
        count = int((scale > bound).sum())
        assert scipy.stats.binomtest(count, KS_SAMPLES, rate).pvalue > KS_P


@pytest.mark.parametrize("N", [3, 48])
@pytest.mark.parametrize("D", [D for D in ALL if D < INF])
def test_noise_over_its_drawn_scale_is_gaussian_and_independent_of_it(D, N):
    # What holds of z and c in n = sigma sqrt(D/c) z must hold of a c that is drawn given n.
    sigma = torch.linspace(0.2, 30, KS_SAMPLES)
    noise = PerturbationKernel(D).sample((KS_SAMPLES, N, 1, 1), sigma, seeded(12)).double()
    scale = PerturbationKernel(D).posterior_scale(noise, sigma, seeded(13))
    assert scale.dtype == torch.float64 and scale.shape == (KS_SAMPLES,)
    squared = noise.flatten(1).square().sum(1) / (sigma * scale).square()
    chi2 = D / scale.square()
    assert scipy.stats.kstest(squared.numpy(), scipy.stats.chi2(N).cdf).pvalue > KS_P
    assert scipy.stats.kstest(chi2.numpy(), scipy.stats.chi2(D).cdf).pvalue > KS_P
    assert scipy.stats.spearmanr(squared, chi2).pvalue > KS_P


def test_the_drawn_scale_at_D_inf_is_one_and_draws_nothing():
    rng = seeded()
    before = rng.get_state()
    scale = PerturbationKernel(INF).posterior_scale(torch.ones(5, 3), 0.5, rng)
    assert torch.equal(scale, torch.ones(5, dtype=torch.float64))
    assert torch.equal(rng.get_state(), before)


@pytest.mark.parametrize("D", [0, 0.0, -1, -INF, math.nan])
def test_D_outside_its_range_is_refused_in_one_line(D):
    with pytest.raises(ValueError) as error:
        PerturbationKernel(D)
    assert "\n" not in str(error.value) and str(error.value)


@pytest.mark.parametrize("D", ["inf", "a", None, [1]])
def test_D_that_is_no_number_is_refused_in_one_line(D):
    with pytest.raises(TypeError, match="^D=.*: must be a number$"):
        PerturbationKernel(D)


@pytest.mark.parametrize("D", [1, 2, 128])
@pytest.mark.parametrize("call, lowest", [
    (lambda kernel, x, sigma: kernel.sample(x.shape, sigma, seeded()), "0 or more"),
    (lambda kernel, x, sigma: kernel.posterior_scale(x, sigma, seeded()), "positive"),
    (lambda kernel, x, sigma: kernel.log_density(x, sigma), "positive"),
    (lambda kernel, x, sigma: kernel.posterior_mean(x, sigma, x), "positive")])
def test_a_level_outside_its_range_is_refused_in_one_line(D, call, lowest):
    kernel, x = PerturbationKernel(D), torch.zeros(2, 1, 2, 2)
    for sigma, shown in [(-1, "-1"), ([1, -0.5], "-0.5"), (math.nan, "nan")]:
        with pytest.raises(ValueError, match=f"^sigma={shown}: must be {lowest}$"):
            call(kernel, x, sigma)
    with pytest.raises(TypeError, match="^sigma='a': must be a number or a tensor of numbers$"):
        call(kernel, x, "a")
    if lowest == "positive":
        with pytest.raises(ValueError, match="^sigma=0: must be positive$"):
            call(kernel, x, 0.0)
    else:
        assert (call(kernel, x, 0.0) == 0).all()


# ---- density ------------------------------------------------------------------------------------

@pytest.mark.parametrize("D", ALL)
def test_log_density_is_scipys(D):
    rng = np.random.default_rng(0)
    N, sigmas = 6, np.array([0.05, 0.3, 1.0, 4.0, 80.0])
    noise = sigmas[:, None] * rng.standard_t(3, size=(5, N))
    law = (scipy.stats.multivariate_normal(np.zeros(N), np.eye(N)) if math.isinf(D)
           else scipy.stats.multivariate_t(np.zeros(N), np.eye(N), df=D))
    expected = np.array([law.logpdf(n / s) - N * np.log(s)
                         for n, s in zip(noise, sigmas, strict=True)])
    ours = PerturbationKernel(D).log_density(
        torch.tensor(noise).reshape(5, 1, 2, 3), torch.tensor(sigmas)).numpy()
    # At D = 1e9 scipy subtracts log-gammas of size 1e10: 1e-6 of rounding.
    np.testing.assert_allclose(ours, expected, atol=1e-4 if D == 1e9 else 1e-7)


@pytest.mark.parametrize("N", [1, 12, 3072])
@pytest.mark.parametrize("D", [9_999.0, 10_000.0, 1e6, 1e12])
def test_the_densitys_constant_keeps_its_digits_at_large_D(D, N):
    zero = torch.zeros(1, 1, 1, N, dtype=torch.float64)
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(40):
        exact = (mpmath.loggamma(mpmath.mpf(N + D) / 2) - mpmath.loggamma(mpmath.mpf(D) / 2)
                 - mpmath.mpf(N) / 2 * mpmath.log(mpmath.pi * D))
        assert PerturbationKernel(D).log_density(zero, 1.0).item() == pytest.approx(
            float(exact), rel=1e-11)


@pytest.mark.parametrize("D", [0.7, 1, 2, 128, INF])
def test_density_integrates_to_one_in_one_dimension(D):
    kernel = PerturbationKernel(D)
    # n = s sinh(u): the trapezoid rule is then exact to rounding, also for the tails of D = 0.7.
    u = np.linspace(-50, 50, 20_001)
    for sigma in (0.3, 1.0, 7.0):
        noise = torch.tensor(sigma * np.sinh(u)).reshape(-1, 1, 1, 1)
        density = np.exp(kernel.log_density(noise, sigma).numpy())
        area = scipy.integrate.trapezoid(density * sigma * np.cosh(u), u)
        assert area == pytest.approx(1, abs=1e-9)


def test_log_density_at_huge_D_is_the_gaussians():
    noise = torch.randn(8, 3, 4, 4, generator=seeded(), dtype=torch.float64)
    sigma = torch.linspace(0.5, 2, 8, dtype=torch.float64)

    def ours(D):
        return PerturbationKernel(D).log_density(noise, sigma)
    # The next term of the expansion is of order (N + |n|^2/s^2)^2 / D = 4e-5.
    torch.testing.assert_close(ours(1e9), ours(INF), rtol=0, atol=4e-5)


@pytest.mark.parametrize("D", SHORT)
def test_log_density_takes_sigma_in_every_shape(D):
    noise = torch.randn(4, 1, 2, 2, generator=seeded(), dtype=torch.float64)
    kernel = PerturbationKernel(D)
    expected = kernel.log_density(noise, torch.full([4], 0.5, dtype=torch.float64))
    assert expected.shape == (4,) and expected.dtype == torch.float64
    for sigma in (0.5, torch.tensor(0.5), torch.full([4, 1, 1, 1], 0.5)):
        # A logarithm may round otherwise in a vector of another length: float64.
        torch.testing.assert_close(kernel.log_density(noise, sigma), expected, rtol=1e-12,
                                   atol=1e-12)


# ---- the ideal denoiser -------------------------------------------------------------------------

def naive_posterior_mean(x, sigma, data, D):
    """Bayes' rule one image and one data point at a time."""
    result = np.zeros_like(x)
    for b in range(len(x)):
        logits = np.array([log_profile(((x[b] - y) ** 2).sum(), sigma[b], D, x[b].size)
                           for y in data])
        weights = np.exp(logits - scipy.special.logsumexp(logits))
        result[b] = sum(w * y for w, y in zip(weights, data, strict=True))
    return result


@pytest.mark.parametrize("D", ALL)
def test_posterior_mean_is_bayes_rule(D):
    rng = np.random.default_rng(1)
    data = rng.uniform(-1, 1, size=(7, 3, 2, 2))
    sigma = np.array([1e-3, 0.03, 0.2, 0.5, 1.0, 3.0, 80.0, 1e4])
    x = data[np.arange(8) % 7] + sigma.reshape(-1, 1, 1, 1) * rng.normal(size=(8, 3, 2, 2))
    ours = PerturbationKernel(D).posterior_mean(
        torch.tensor(x), torch.tensor(sigma), torch.tensor(data))
    # Float64 logits of size (N+D) log(...) or distance/sigma^2, rounded at 1e-16 each; at D = 1e9
    # log(d + r^2) of the naive form loses nine digits.
    np.testing.assert_allclose(ours.numpy(), naive_posterior_mean(x, sigma, data, D),
                               atol=1e-5 if D == 1e9 else 1e-8)


@pytest.mark.parametrize("D", SHORT)
def test_posterior_mean_of_some_points_is_bayes_rule_for_them(D):
    rng = np.random.default_rng(2)
    data, sigma = rng.uniform(-1, 1, size=(9, 3, 2, 2)), np.array([1e-3, 0.3, 1.0, 80.0])
    x = data[:4] + sigma.reshape(-1, 1, 1, 1) * rng.normal(size=(4, 3, 2, 2))
    eligible = rng.random([4, 9]) < 0.5
    eligible[range(4), range(4)] = True
    ours = PerturbationKernel(D).posterior_mean(
        *map(torch.tensor, (x, sigma, data, eligible))).numpy()
    for b in range(4):
        alone = naive_posterior_mean(x[b:b + 1], sigma[b:b + 1], data[eligible[b]], D)
        np.testing.assert_allclose(ours[b:b + 1], alone, atol=1e-8)


@pytest.mark.parametrize("D", SHORT)
def test_posterior_mean_takes_sigma_in_every_shape(D):
    data = torch.randn(5, 1, 2, 2, generator=seeded(), dtype=torch.float64)
    x = torch.randn(3, 1, 2, 2, generator=seeded(1), dtype=torch.float64)
    kernel, sigma = PerturbationKernel(D), torch.tensor([0.5, 0.7, 2.0])
    batch = kernel.posterior_mean(x, sigma, data)
    assert torch.equal(kernel.posterior_mean(x, sigma.reshape(3, 1, 1, 1), data), batch)
    for i in range(3):
        for value in (sigma[i], sigma[i].item()):
            alone = kernel.posterior_mean(x, value, data)
            torch.testing.assert_close(alone[i], batch[i], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_mean_comes_in_the_dtype_of_x(dtype):
    data = torch.randn(5, 1, 2, 2, generator=seeded())
    x = torch.randn(3, 1, 2, 2, generator=seeded(1)).to(dtype)
    ours = PerturbationKernel(2).posterior_mean(x, 0.5, data)
    wide = PerturbationKernel(2).posterior_mean(x.double(), 0.5, data.double())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), wide, rtol=0, atol=1e-7)


@pytest.mark.parametrize("D", SHORT)
def test_posterior_mean_is_the_data_mean_where_noise_drowns_the_data(D):
    data = torch.rand(9, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    x = PerturbationKernel(INF).sample((4, 3, 2, 2), 1.0, seeded(1)).double() * 1e7
    ours = PerturbationKernel(D).posterior_mean(x, 1e7, data)
    # Logits differ by x.(y_i - y_j)/sigma^2 * (N+D)/(D + |x|^2/sigma^2), which is about 1e-6.
    torch.testing.assert_close(ours, data.mean(0).expand_as(ours), rtol=0, atol=1e-5)


@pytest.mark.parametrize("D", SHORT)
@pytest.mark.parametrize("sigma", [0.0, 1e-8, 1e-4])
def test_posterior_mean_is_the_data_point_itself_where_noise_is_tiny(D, sigma):
    data = torch.rand(9, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    z = torch.randn(9, 3, 2, 2, generator=seeded(1), dtype=torch.float64)
    ours = PerturbationKernel(D).posterior_mean(data + sigma * z, max(sigma, 1e-8), data)
    # The wrong points keep a weight of at most (sigma |z| / distance)^(N+1): < 1e-30 here.
    torch.testing.assert_close(ours, data, rtol=0, atol=1e-12)


def test_posterior_mean_at_D_inf_is_the_nearest_neighbour_for_tiny_sigma():
    data = torch.rand(9, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    x = torch.rand(20, 3, 2, 2, generator=seeded(1), dtype=torch.float64)
    nearest = (x[:, None] - data).square().sum([2, 3, 4]).argmin(1)
    ours = PerturbationKernel(INF).posterior_mean(x, 1e-5, data)
    torch.testing.assert_close(ours, data[nearest], rtol=0, atol=1e-12)


@pytest.mark.parametrize("D", [1, 2, 128])
def test_posterior_mean_at_finite_D_weighs_by_inverse_distance_for_tiny_sigma(D):
    # Off the data, (d^2 + r^2)^(-(N+D)/2) tends to the field of point charges, d^-(N+D).
    data = torch.rand(9, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    x = torch.rand(20, 3, 2, 2, generator=seeded(1), dtype=torch.float64)
    distance = (x[:, None] - data).square().sum([2, 3, 4]).sqrt().numpy()
    weights = scipy.special.softmax(-(12 + D) * np.log(distance), axis=1)
    expected = np.einsum("bm,mchw->bchw", weights, data.numpy())
    ours = PerturbationKernel(D).posterior_mean(x, 1e-6, data)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("D", SHORT)
def test_posterior_mean_of_a_uniform_prior_is_its_integral(D):
    law = scipy.stats.norm() if math.isinf(D) else scipy.stats.t(D)
    count = 4000
    prior = (np.arange(count) + 0.5) / count * 2 - 1  # midpoints: error (2/count)^2
    for x, sigma in [(0.3, 0.2), (-2.0, 0.7), (5.0, 3.0), (0.0, 0.1)]:
        def moment(power, x=x, sigma=sigma):
            return scipy.integrate.quad(
                lambda y: y**power * law.pdf((x - y) / sigma), -1, 1, epsabs=1e-13,
                points=[min(max(x, -1), 1)])[0]
        ours = PerturbationKernel(D).posterior_mean(
            torch.full([1, 1, 1, 1], x, dtype=torch.float64), sigma,
            torch.tensor(prior).reshape(-1, 1, 1, 1))
        assert ours.item() == pytest.approx(moment(1) / moment(0), abs=1e-5)


def mixture(x, sigma, data, kernel):
    """log sum_i p_sigma(x - y_i) for each x, differentiable in x and sigma."""
    return torch.stack([kernel.log_density(x - y, sigma) for y in data]).logsumexp(0)


def test_posterior_mean_at_D_inf_is_tweedies_formula():
    kernel = PerturbationKernel(INF)
    data = torch.randn(5, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    x = torch.randn(8, 3, 2, 2, generator=seeded(1), dtype=torch.float64).requires_grad_()
    for sigma in (0.3, 1.0, 4.0):
        score, = torch.autograd.grad(mixture(x, sigma, data, kernel).sum(), x)
        torch.testing.assert_close(kernel.posterior_mean(x.detach(), sigma, data),
                                   (x + sigma**2 * score).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("D", [2.5, 3, 64, 128])
def test_posterior_mean_at_finite_D_follows_the_electric_field(D):
    # The field is the gradient of the potential sum_i (|x-y_i|^2 + r^2)^(-(N+D-2)/2), which is the
    # density of D-2 dimensions at the same r, and lines of force have dx/dr = E_x/E_r. The ODE says
    # dx/dr = (x - E[y|x])/r.
    data = torch.randn(5, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    x = torch.randn(8, 3, 2, 2, generator=seeded(1), dtype=torch.float64).requires_grad_()
    for sigma in (0.3, 1.0, 4.0):
        r = torch.full([8], sigma * math.sqrt(D), dtype=torch.float64).requires_grad_()
        narrow = r / math.sqrt(D - 2)
        # log_density is normalised in sigma; the potential is not.
        log_potential = (mixture(x, narrow, data, PerturbationKernel(D - 2))
                         - (D - 2) * narrow.log())
        field_x, field_r = torch.autograd.grad(log_potential.sum(), [x, r])
        expected = x - (r / field_r).reshape(-1, 1, 1, 1) * field_x
        ours = PerturbationKernel(D).posterior_mean(x.detach(), sigma, data)
        torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("D", SHORT)
def test_posterior_mean_carries_probability_along_the_flow(D):
    # In one dimension the flow keeps the CDF, so (x - E[y|x])/sigma = -(dF/dsigma)/(dF/dx).
    law = scipy.stats.norm() if math.isinf(D) else scipy.stats.t(D)
    data = np.array([-1.0, 0.2, 0.7])

    def cdf(x, sigma):
        return law.cdf((x - data) / sigma).mean()
    for x, sigma in [(0.1, 0.5), (-0.8, 0.3), (2.0, 2.0)]:
        h = 1e-5  # central differences: error h^2
        slope = (-(cdf(x, sigma + h) - cdf(x, sigma - h))
                 / (cdf(x + h, sigma) - cdf(x - h, sigma)))
        ours = PerturbationKernel(D).posterior_mean(
            torch.full([1, 1, 1, 1], x, dtype=torch.float64), sigma,
            torch.tensor(data).reshape(-1, 1, 1, 1)).item()
        assert ours == pytest.approx(x - sigma * slope, abs=1e-7)


@pytest.mark.parametrize("D", [1e10, 1e13, 1e16, 1e300])
def test_density_and_posterior_mean_of_huge_D_are_those_of_diffusion(D):
    # The exponent is (N + D)/2 log(1 + s/D), s/2 to a relative error of about s/D. Each sum 1 + s/D
    # would be off by up to 1e-16, and the exponent by 1e-16 D.
    finite, gaussian = PerturbationKernel(D), PerturbationKernel(INF)
    noise = torch.randn(2, 12, generator=seeded(), dtype=torch.float64)
    for kernel_of in (lambda k: k.log_density(noise, 0.7).diff(),
                      lambda k: k.posterior_mean(noise, 0.7, 2 * noise.flip(0) + 0.3)):
        torch.testing.assert_close(kernel_of(finite), kernel_of(gaussian), rtol=1e-7, atol=1e-9)
