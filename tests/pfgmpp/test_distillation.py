"""Distillation into a generator, against closed forms of Gaussians and ideal denoisers."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from ideal_flow import IdealFlow, noise_on_a_line

from pfgmpp.distillation import GeneratorDraws, GeneratorLoss
from pfgmpp.loss import LossDraws

INF = math.inf
DIMS = (2, 128, INF)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_loss(D=INF, alpha=1.0, sigma_init=80.0, **options):
    return GeneratorLoss(sigma_init, alpha, pfgmpp=not math.isinf(D),
                         **({} if math.isinf(D) else {"D": D}), **options)


def denoiser_of(mean, std):
    """E[y|x] of Gaussian data in one dimension."""
    return lambda x, sigma, labels=None: mean + std**2 / (std**2 + sigma**2) * (x - mean)


# ---- Gaussians ----------------------------------------------------------------------------------

def generated(m, tau, sigma):
    """Pairs of a latent and noise by Gauss-Hermite: exact for what is square in them.

    Returns (x = m + tau * latent [B, 1], draws, weights [B]).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    pairs = torch.cartesian_prod(torch.from_numpy(nodes), torch.from_numpy(nodes))
    weights = torch.from_numpy(np.outer(weights, weights).ravel() / (2 * math.pi))
    latent, n = pairs[:, :1], pairs[:, 1:]
    draws = LossDraws(torch.full([len(n)], sigma, dtype=torch.float64), n / 2,
                      torch.full([len(n)], 2, dtype=torch.float64))
    return m + tau * latent, draws, weights


CASES = [(m, tau, sigma) for m, tau in ((0.8, 1.0), (-0.3, 0.6), (0.0, 1.7))
         for sigma in (0.05, 0.7, 3.0)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("m, tau, sigma", CASES)
def test_the_expected_loss_is_1_minus_alpha_of_the_gap(m, tau, sigma, alpha):
    x, draws, weights = generated(m, tau, sigma)
    loss = make_loss(alpha=alpha).of_generator(denoiser_of(0, 1), denoiser_of(m, tau), x, draws,
                                               is_weighted=False)
    # T - S at x ~ N(m, tau^2 + sigma^2), with the slopes k of the two.
    k_t, k_s = 1 / (1 + sigma**2), tau**2 / (tau**2 + sigma**2)
    gap = ((k_t - 1) * m) ** 2 + (k_t - k_s) ** 2 * (tau**2 + sigma**2)
    assert (weights * loss).sum().item() == pytest.approx((1 - alpha) * gap, rel=1e-9, abs=1e-12)


def gradients(m, tau, sigma, alpha):
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True)
                 for value in (m, tau))
    x, draws, weights = generated(mean, std, sigma)
    loss = make_loss(alpha=alpha).of_generator(denoiser_of(0, 1), denoiser_of(m, tau), x, draws,
                                               is_weighted=False)
    return [g.item() for g in torch.autograd.grad((weights * loss).sum(), [mean, std])]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("m, tau, sigma", CASES)
def test_the_gradient_of_a_gaussian_generator_is_its_closed_form(m, tau, sigma, alpha):
    # x = m + tau e and x + n = m + a: T - S = (k_t - 1) m + (k_t - k_s) a =: g, of slope
    # g' = k_t - k_s in x, and T - x of slope k_t - 1. So d/dm = E[g' (T - x) + g (k_t - 1)
    # - 2 alpha g g'], d/dtau the same with e inside, where E[e a] = tau.
    k_t, k_s = 1 / (1 + sigma**2), tau**2 / (tau**2 + sigma**2)
    of_mean = (k_t - 1) * m * (k_t - 1 + (1 - 2 * alpha) * (k_t - k_s))
    of_std = 2 * (k_t - k_s) * tau * (k_t - 1 - alpha * (k_t - k_s))
    assert gradients(m, tau, sigma, alpha) == pytest.approx([of_mean, of_std], rel=1e-9, abs=1e-12)
    if tau == 1:  # where S has T's slope: m sigma^4 / (1 + sigma^2)^2 for every alpha
        assert of_mean == pytest.approx(m * sigma**4 / (1 + sigma**2) ** 2, rel=1e-12)


@pytest.mark.parametrize("m, tau, sigma", CASES)
def test_alpha_one_half_follows_the_gap_with_the_auxiliary_that_follows(m, tau, sigma):
    # E|T - S|^2 / 2 with S always that of the generator, differentiated by differences.
    def half_gap(m, tau):
        k_t, k_s = 1 / (1 + sigma**2), tau**2 / (tau**2 + sigma**2)
        return (((k_t - 1) * m) ** 2 + (k_t - k_s) ** 2 * (tau**2 + sigma**2)) / 2

    h = 1e-5
    expected = [(half_gap(m + h, tau) - half_gap(m - h, tau)) / (2 * h),
                (half_gap(m, tau + h) - half_gap(m, tau - h)) / (2 * h)]
    assert gradients(m, tau, sigma, 0.5) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_over_drawn_levels_the_loss_keeps_its_expectation(alpha):
    m, num = 0.8, 40_000
    loss = make_loss(alpha=alpha)
    draws = loss.draw((num, 1), seeded(1))
    x = m + draws.z.double()
    noise = LossDraws(draws.noise.sigma.double(), draws.noise.z.double(), draws.noise.scale)
    found = loss.of_generator(denoiser_of(0, 1), denoiser_of(m, 1), x, noise, is_weighted=False)
    sigma = noise.sigma
    gap = (m * sigma**2 / (1 + sigma**2)).square().mean().item()
    # ln sigma ~ N(-1.2, 1.2^2); five standard errors.
    levels = np.exp(-1.2 + 1.2 * np.linspace(-6, 6, 2001))
    law = scipy.stats.norm().pdf(np.linspace(-6, 6, 2001)) * 12 / 2000
    assert gap == pytest.approx((law * (m * levels**2 / (1 + levels**2)) ** 2).sum(), rel=0.05)
    error = 5 * found.std().item() / math.sqrt(num)
    assert abs(found.mean().item() - (1 - alpha) * gap) < error < 0.01


# ---- weights ------------------------------------------------------------------------------------

def test_the_weight_is_one_over_the_mean_absolute_error_and_no_variable():
    x = torch.tensor([[[1.0, -2.0]], [[0.5, 0.5]]], dtype=torch.float64, requires_grad=True)
    draws = LossDraws(torch.tensor([1.0, 2.0]).double(),
                      torch.tensor([[[1.0, 1.0]], [[-1.0, 0.0]]]).double(),
                      torch.tensor([1.0, 0.5]).double())
    loss = make_loss(alpha=0.75)
    found = loss.of_generator(lambda x, sigma, labels: x / 2, lambda x, sigma, labels: x / 4, x,
                              draws)
    expected, slopes = [], []
    for y, n in (([1, -2], [1, 1]), ([0.5, 0.5], [-1, 0])):
        y, n = np.array(y, float), np.array(n, float)
        gap, miss = (y + n) / 4, (y + n) / 2 - y
        w = 1 / np.abs(miss).mean()
        expected.append(w * (gap * miss - 0.75 * gap**2).sum())
        slopes.append(w * (miss / 4 - gap / 2 - 2 * 0.75 * gap / 4))
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    [slope] = torch.autograd.grad(found.sum(), x)
    np.testing.assert_allclose(slope[:, 0], slopes, rtol=1e-12)


def test_an_image_that_the_teacher_knows_exactly_has_a_finite_weight():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    draws = LossDraws(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
    loss = make_loss().of_generator(lambda x, sigma, labels: x, lambda x, sigma, labels: x - 1e-5,
                                    x, draws)
    [slope] = torch.autograd.grad(loss.sum(), x)
    assert loss.isfinite().all() and slope.isfinite().all()
    # -alpha |1e-5|^2 of two pixels, over the floor of 1e-5.
    assert loss.item() == pytest.approx(-2e-5, rel=0.03)


# ---- the auxiliary denoiser ---------------------------------------------------------------------

LINE = torch.tensor([-0.8, 0.1, 0.6], dtype=torch.float64).reshape(3, 1)
BUMPS = {"constant": lambda x, s: torch.ones_like(x) / (1 + x**2),
         "odd": lambda x, s: x / (1 + x**2), "wave": lambda x, s: torch.sin(2 * x / s) / (1 + x**2)}


def auxiliary_loss(D, sigma, denoise):
    """E of the auxiliary's loss over points on a line and the noise of a level."""
    n, weights = noise_on_a_line(D, num=1201)
    x = LINE.repeat_interleave(len(n), dim=0)
    scale = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    draws = LossDraws(torch.full([len(x)], sigma, dtype=torch.float64),
                      n.repeat(3)[:, None] / scale[:, None], scale)
    each = make_loss(D).of_auxiliary(denoise, x, draws)
    assert each.shape == x.shape
    return (each[:, 0] * weights.repeat(3)).sum() / 3


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("D", DIMS)
def test_the_auxiliary_is_best_at_the_posterior_mean(D, sigma):
    flow = IdealFlow(D, LINE, end=0.1)
    for bump in BUMPS.values():
        theta = torch.zeros([], dtype=torch.float64, requires_grad=True)

        def moved(x, s, labels, theta=theta, bump=bump):
            return flow.denoise(x, s) + theta * bump(x, s)

        best = auxiliary_loss(D, sigma, moved)
        [slope] = torch.autograd.grad(best, theta)
        # The quadrature is exact to 1e-6 or so of the loss.
        assert abs(slope.item()) < 1e-5 * best.item()
        for step in (-0.1, 0.1):
            assert auxiliary_loss(D, sigma, lambda *a, step=step, moved=moved: moved(
                *a, theta=step)) > best * (1 + 1e-6)
    # Where the noisy image were the target, the identity would be the best, with loss 0.
    assert auxiliary_loss(D, sigma, lambda x, s, labels: x) > 1.05 * best
    # The ideal denoiser of another D is not the best one.
    other = IdealFlow(1 if D == 2 else 2, LINE, end=0.1)
    assert auxiliary_loss(D, sigma, other.denoise) > best * (1 + 1e-5)


def test_the_auxiliarys_loss_by_hand():
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    draws = LossDraws(torch.tensor([2.0]).double(), torch.tensor([[1.0, 0.5]]).double(),
                      torch.tensor([3.0]).double())
    weight = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    found = make_loss(sigma_data=0.25).of_auxiliary(lambda x, s, labels: weight * x, x, draws)
    # Noisy 7 and 1; lambda = 1/4 + 16.
    assert found.tolist() == [[16.25 * 0.75**2, 16.25 * 2.25**2]]
    found.sum().backward()
    assert x.grad is None and weight.grad.item() == 2 * 16.25 * (0.75 * 7 + 2.25 * 1)


# ---- through the generator ----------------------------------------------------------------------

def small_network(seed):
    torch.manual_seed(seed)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))
    return layer.double()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_gradient_through_the_generator_is_autograds_and_no_other_weight_gets_one(alpha):
    G, T, S = map(small_network, range(3))
    seen = []

    def called(net):
        def call(x, sigma, labels, condition):
            seen.append((labels, condition))
            return net(x + labels + condition) / (1 + sigma.reshape(-1, 1))
        return call

    loss = make_loss(2, alpha)
    draws = loss.draw((6, 4), seeded(3))
    noise = LossDraws(draws.noise.sigma.double(), draws.noise.z.double(), draws.noise.scale)
    draws = GeneratorDraws(draws.z.double(), draws.scale, noise)
    labels, condition = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    given = {"labels": labels, "condition": condition}

    x = loss.generate(called(G), draws, **given)
    value = loss.through_generator(called(T), called(S), x, noise, **given)
    value.sum().backward()
    assert all(p.grad is None for net in (T, S) for p in net.parameters())
    found = [p.grad.clone() for p in G.parameters()]
    assert all(a is labels and b is condition for a, b in seen) and len(seen) == 3

    for net in (T, S):
        net.requires_grad_(False)
    x = loss.generate(called(G), draws, **given)
    plain = loss.of_generator(called(T), called(S), x, noise, **given)
    expected = torch.autograd.grad(plain.sum(), list(G.parameters()))
    torch.testing.assert_close(value, plain, rtol=1e-14, atol=0)
    for a, b in zip(found, expected, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("D", DIMS)
def test_the_generator_sees_noise_of_the_kernel_of_its_own_level(D):
    loss = make_loss(D, sigma_init=2.5)
    draws = loss.draw((20_000, 1), seeded(4))
    seen = []

    def generator(latents, sigma, labels):
        seen.append((latents, sigma))
        return latents

    loss.generate(generator, draws)
    [(latents, sigma)] = seen
    assert torch.equal(sigma, torch.full([20_000], 2.5))
    law = scipy.stats.norm() if math.isinf(D) else scipy.stats.t(D)
    assert scipy.stats.kstest(latents[:, 0].double() / 2.5, law.cdf).pvalue > 1e-3
    noise = draws.noise.scale * draws.noise.z[:, 0]
    assert scipy.stats.kstest(noise, law.cdf).pvalue > 1e-3
    # Latents, noise and level are independent of each other, in size too.
    assert not torch.equal(draws.z, draws.noise.z)
    columns = [latents[:, 0].double(), noise, draws.noise.sigma]
    for i, a in enumerate(columns):
        for b in columns[i + 1:]:
            assert scipy.stats.spearmanr(a, b).pvalue > 1e-3
            assert scipy.stats.spearmanr(a.abs(), b.abs()).pvalue > 1e-3
    if not math.isinf(D):
        assert scipy.stats.spearmanr(draws.scale, draws.noise.scale).pvalue > 1e-3


def test_images_keep_their_draws_however_the_batch_is_split():
    loss = make_loss(2)

    def of(first, last):
        return loss.draw_range(first, last, (3,), seeded)

    whole, parts = of(0, 24), [of(0, 10), of(10, 24)]
    joined = GeneratorDraws.cat(parts)
    for a, b in ((whole.z, joined.z), (whole.scale, joined.scale),
                 (whole.noise.sigma, joined.noise.sigma), (whole.noise.z, joined.noise.z),
                 (whole.noise.scale, joined.noise.scale)):
        assert torch.equal(a, b) and len(a) == 24
