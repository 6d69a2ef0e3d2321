"""Densities along the probability-flow equation, against those that are known in closed form."""

import math

import numpy as np
import pytest
import torch

from pfgmpp.kernel import PerturbationKernel
from pfgmpp.likelihood import exact_trace, hutchinson, log_likelihood

DIMS = (1, 2, 128, math.inf)
LOWEST, HIGHEST = 0.1, 80.0


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(steps, lowest=LOWEST, highest=HIGHEST):
    return torch.linspace(lowest ** (1 / 7), highest ** (1 / 7), steps + 1).double() ** 7


class Ideal:
    """The ideal denoiser of points, with the density that it belongs to: a mixture of kernels."""

    def __init__(self, D, num=20, shape=(1, 2, 2)):
        self.kernel = PerturbationKernel(D)
        self.data = 0.5 * torch.randn(num, *shape, generator=seeded(), dtype=torch.float64)
        self.shape = shape

    def __call__(self, x, sigma):
        return self.kernel.posterior_mean(x, sigma, self.data)

    def mixture(self, x, sigma):
        terms = [self.kernel.log_density(x - y, sigma) for y in self.data]
        return torch.logsumexp(torch.stack(terms), dim=0) - math.log(len(self.data))

    def noisy(self, num, sigma=LOWEST):
        rng = seeded(1)
        y = self.data[torch.arange(num) % len(self.data)]
        return y + self.kernel.sample(y.shape, sigma, rng).double()


def mixture_prior(net, highest=HIGHEST):
    return lambda x: net.mixture(x, highest)


# ------------------------------------------------------------------------------------ densities

@pytest.mark.long
@pytest.mark.parametrize("D", DIMS)
def test_the_equation_gives_the_density_of_the_mixture(D):
    net = Ideal(D)
    x = net.noisy(16)
    found = log_likelihood(net, x, grid(240), mixture_prior(net), exact_trace)
    error = (found.log_p - net.mixture(x, LOWEST)).abs() / x[0].numel()
    assert error.max() < 1e-4, error
    # The density of the kernel alone is a worse prior, as the data then count as one point.
    plain = log_likelihood(net, x, grid(240), lambda x: net.kernel.log_density(x, HIGHEST),
                           exact_trace)
    assert (plain.log_p - found.log_p).abs().max() / x[0].numel() < 3e-3
    assert plain.end.equal(found.end)


@pytest.mark.long
@pytest.mark.parametrize("D", (2, math.inf))
def test_errors_fall_at_order_four(D):
    net = Ideal(D)
    x = net.noisy(12)
    steps = [40, 80, 160]
    errors = [(log_likelihood(net, x, grid(n), mixture_prior(net), exact_trace).log_p
               - net.mixture(x, LOWEST)).abs().mean().item() for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope > 3.5, errors


@pytest.mark.long
def test_gaussian_data_have_the_entropy_of_the_gaussian():
    N, std, lowest = 6, 0.5, 0.002
    x = torch.randn(40_000, N, generator=seeded(), dtype=torch.float64) * math.hypot(std, lowest)

    def denoise(x, sigma):
        return x * std**2 / (std**2 + sigma**2)

    def prior(x):
        law = torch.distributions.Normal(0.0, math.hypot(std, HIGHEST))
        return law.log_prob(x).sum(dim=1)

    found = log_likelihood(denoise, x, grid(60, lowest), prior, exact_trace)
    law = torch.distributions.Normal(0.0, math.hypot(std, lowest))
    torch.testing.assert_close(found.log_p, law.log_prob(x).sum(dim=1), rtol=0, atol=1e-3 * N)
    entropy = N / 2 * math.log(2 * math.pi * math.e * (std**2 + lowest**2))
    noise = 4 * math.sqrt(N / 2 / len(x))
    assert -found.log_p.mean().item() == pytest.approx(entropy, abs=noise)


def test_a_step_is_of_the_log_of_sigma():
    # D = 0: x grows as sigma, to the order of the method; tr J is 0.
    x = torch.ones(2, 3, dtype=torch.float64)
    found = log_likelihood(lambda x, sigma: 0 * x, x, [0.5, 1.0, 2.0], lambda x: 0 * x[:, 0],
                           exact_trace)
    h = math.log(2)
    growth = (1 + h + h**2 / 2 + h**3 / 6 + h**4 / 24) ** 2
    torch.testing.assert_close(found.end, torch.full_like(x, growth))
    torch.testing.assert_close(found.log_p, torch.full([2], 3 * math.log(4)).double())


# --------------------------------------------------------------------------------------- traces

def linear(matrix):
    return lambda x, sigma: (x.flatten(1) @ matrix.T).reshape(x.shape)


def test_the_trace_of_a_matrix():
    matrix = torch.randn(12, 12, generator=seeded(), dtype=torch.float64)
    x = torch.randn(3, 3, 2, 2, generator=seeded(1), dtype=torch.float64)
    denoised, found = exact_trace(linear(matrix), x, torch.tensor(1.0))
    torch.testing.assert_close(found, matrix.trace().expand(3))
    torch.testing.assert_close(denoised, linear(matrix)(x, 1.0))
    assert not denoised.requires_grad and not x.requires_grad


def test_probes_are_unbiased_and_their_spread_is_hutchinsons():
    matrix = torch.randn(6, 6, generator=seeded(), dtype=torch.float64)
    x, rng = torch.zeros(20_000, 6, dtype=torch.float64), seeded(2)

    def probes_at(place):
        for _ in range(2):
            yield torch.randint(2, x.shape, generator=rng) * 2.0 - 1

    _, found = hutchinson(probes_at)(linear(matrix), x, torch.tensor(1.0), 0)
    symmetric = (matrix + matrix.T) / 2
    variance = 2 * (symmetric.square().sum() - symmetric.diagonal().square().sum()) / 2
    assert found.var().item() == pytest.approx(variance.item(), rel=0.05)
    assert found.mean().item() == pytest.approx(
        matrix.trace().item(), abs=4 * math.sqrt(variance / len(x)))


def test_all_probes_of_signs_together_are_the_exact_trace():
    net = Ideal(2, shape=(1, 1, 2))
    x = net.noisy(5)
    signs = [torch.tensor(pair, dtype=torch.float64).expand(x.shape)
             for pair in ([1, 1], [1, -1], [-1, 1], [-1, -1])]
    exact, found = (log_likelihood(net, x, grid(12), mixture_prior(net), trace).log_p
                    for trace in (exact_trace, hutchinson(lambda place: signs)))
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_evaluations_know_their_place_in_the_whole_grid(stride):
    places = []

    def trace(denoise, x, sigma, place):
        places.append((place, round(sigma.item(), 9)))
        return denoise(x, sigma), torch.zeros(len(x)).double()

    sigmas = [2.0 ** i for i in range(5)]
    log_likelihood(lambda x, sigma: x, torch.ones(1, 2), sigmas[::stride], lambda x: x[:, 0], trace,
                   stride)
    assert all(sigma == round(2.0 ** (place / 2), 9) for place, sigma in places)
    assert len(places) == 4 * (4 // stride)
