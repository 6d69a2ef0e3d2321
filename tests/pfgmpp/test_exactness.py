"""Sampling with the ideal denoiser: from seeds, by `generate_images`, to the data set itself.

The data are five points of 16 numbers at unequal distances from 0, with unequal shares. What is
sampled is compared with the exact law, within what two resamplings of that law differ by.
"""

import functools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from pfgmpp.kernel import PerturbationKernel
from pfgmpp.samplers import SamplerConfig, draw_latents, generate_images

INF = math.inf
ALL = (0.5, 1, 2, 64, 128, 2048, INF)
CPU = torch.device("cpu")
COUNT, N = 2000, 16
COPIES = [6, 4, 3, 2, 5]  # of each point
SHARE = np.array(COPIES) / sum(COPIES)
P = 1e-3  # seeds are fixed; a right sampler passes but for one choice of them in a thousand


def points():
    rng = torch.Generator().manual_seed(11)
    values = torch.rand(5, 1, 4, 4, generator=rng, dtype=torch.float64) * 2 - 1
    return values * torch.tensor([0.3, 0.6, 0.9, 1, 1]).reshape(5, 1, 1, 1)


class Ideal:
    """The ideal denoiser of D, in front of a sampler that takes its D to be `prior_D`."""

    sigma_min, sigma_max, label_dim, image_shape = 0.0, INF, 0, (1, 4, 4)
    round_sigma = staticmethod(torch.as_tensor)

    def __init__(self, D, prior_D=None):
        self.D = D if prior_D is None else prior_D
        self.kernel = PerturbationKernel(D)
        self.data = points().repeat_interleave(torch.tensor(COPIES), 0)

    def __call__(self, x, sigma, class_labels=None):
        return self.kernel.posterior_mean(x, sigma, self.data)


def lowest_level(D):
    """A level whose noise stays close to its point in all of COUNT draws but a few."""
    return 1e-9 if D < 1 else 1e-5


@functools.cache
def sampled(D, prior_D=None, sigma_max=80.0, start="noise"):
    """Returns (samples [COUNT, N], {level: states [COUNT, N]})."""
    net, states = Ideal(D, prior_D), {}
    # Far-out states of small D are at the data's scale when the level is far below it: there the
    # grid has to be as fine as above, which a geometric one is. The others use the EDM sampler.
    sampler = SamplerConfig(num_steps=60, discretization="ve" if D < 2 else None,
                            sigma_max=sigma_max, sigma_min=lowest_level(D))
    given = torch.from_numpy(np.random.default_rng(3).choice(5, COUNT, p=SHARE))
    [batch] = generate_images(
        net, [range(COUNT)], sampler=sampler, device=CPU,
        inits=(lambda seeds: points()[given]) if start == "data" else None,
        watch=lambda x, sigma: states.update({float(sigma): x.flatten(1)}))
    return batch.images.flatten(1), states


def energy(x, y):
    """The squared energy distance of two sets of vectors, 0 or more."""
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean()
                 - torch.cdist(y, y).mean())


@functools.cache
def resampling_noise():
    """The energy distance that one of a thousand pairs of real resamplings exceeds.

    Between multisets of the same points it is -(p - q)' d (p - q), p and q their frequencies.
    """
    distance = torch.cdist(points().flatten(1), points().flatten(1)).numpy()
    counts = np.random.default_rng(0).multinomial(COUNT, SHARE, size=(2, 20_000))
    difference = (counts[0] - counts[1]) / COUNT
    return np.quantile(-np.einsum("ki,ij,kj->k", difference, distance, difference), 1 - P)


def real(seed):
    chosen = np.random.default_rng(seed).choice(5, COUNT, p=SHARE)
    return points().flatten(1)[torch.from_numpy(chosen)]


def p_of_frequencies(samples):
    nearest = torch.cdist(samples, points().flatten(1)).argmin(1)
    counts = np.bincount(nearest.numpy(), minlength=5)
    return scipy.stats.chisquare(counts, COUNT * SHARE).pvalue


@pytest.mark.long
@pytest.mark.parametrize("start", ["noise", "data"])
@pytest.mark.parametrize("D", ALL)
def test_the_ideal_denoiser_samples_the_data_set(D, start):
    # From the data, at a level at which half of the seeds or fewer keep their point.
    samples, _ = sampled(D, sigma_max=80.0 if start == "noise" else 1.5, start=start)
    assert samples.isfinite().all()
    assert (torch.cdist(samples, points().flatten(1)).amin(1) < 0.01).all()
    assert p_of_frequencies(samples) > P
    assert energy(samples, real(7)) < resampling_noise()


def test_the_bound_is_that_of_real_resamplings():
    distances = [energy(real(2 * k), real(2 * k + 1)) for k in range(3)]
    assert all(0 < distance < resampling_noise() for distance in distances)
    shifted = real(0) + 0.15  # a systematic error of a few percent
    assert energy(shifted, real(1)) > resampling_noise()


def p_of_norms(states, sigma, D):
    """KS test of the noise about the nearest point against the kernel's radial law."""
    nearest = torch.cdist(states, points().flatten(1)).argmin(1)
    noise = (states - points().flatten(1)[nearest]) / sigma  # cdist itself rounds by 1e-8
    squared = noise.square().sum(1).numpy()
    law = scipy.stats.chi2(N) if math.isinf(D) else scipy.stats.betaprime(N / 2, D / 2, scale=D)
    return scipy.stats.kstest(squared, law.cdf).pvalue


@pytest.mark.long
@pytest.mark.parametrize("D", ALL)
def test_the_flow_carries_the_kernels_law_to_the_lowest_level(D):
    _, states = sampled(D)
    sigma = min(states)
    assert sigma == pytest.approx(lowest_level(D), rel=1e-6)
    assert p_of_norms(states[sigma], sigma, D) > P


@pytest.mark.long
@pytest.mark.parametrize("D, prior_D", [
    (0.5, 1), (1, 2), (2, INF), (INF, 2), (64, 16), (INF, 32), (128, 16)])
def test_a_prior_of_another_D_fails_the_bound_on_norms(D, prior_D):
    _, states = sampled(D, prior_D)
    sigma = min(states)
    assert p_of_norms(states[sigma], sigma, D) < P / 10


@pytest.mark.long
@pytest.mark.parametrize("D, prior_D, sigma_max", [
    (INF, 0.5, 80.0), (INF, 1, 80.0), (2, 2, 0.8), (128, 128, 0.8), (INF, INF, 0.8)])
def test_a_wrong_prior_fails_the_bounds_on_samples(D, prior_D, sigma_max):
    # Heavy tails where the network knows Gaussian noise, and sigma_max no larger than the data. The
    # other way round only norms tell: from far outside, the direction alone decides the end.
    samples, _ = sampled(D, prior_D, sigma_max)
    assert p_of_frequencies(samples) < P / 10
    assert energy(samples, real(7)) > resampling_noise()


@pytest.mark.parametrize("D, factor", [(0.5, 1e6), (1, 300), (2, 20)])
def test_the_seeds_above_reach_far_into_the_tails(D, factor):
    # P(sqrt(D/c) > factor) is a few in COUNT.
    latents, _, _ = draw_latents(Ideal(D), range(COUNT), CPU)
    assert latents.abs().max() > factor


def test_noise_beyond_float32_saturates_at_the_start_and_samples_stay_finite():
    D, start = 0.02, []
    [batch] = generate_images(
        Ideal(D), [range(300)], sampler=SamplerConfig(), device=CPU,
        watch=lambda x, sigma: start.append(x.abs().amax([1, 2, 3])))
    limit = torch.finfo(torch.float32).max
    assert (start[0] == limit).double().mean() > 0.1  # P(80 sqrt(D/c) > 3.4e38) is 0.17
    assert start[0].max() == limit and batch.images.isfinite().all()
