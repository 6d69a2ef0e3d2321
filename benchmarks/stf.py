"""Stable targets by a matrix product, against computing every difference."""

import torch

from benchmarks.table import Options, Row, in_turn, peak_mb, relative_error, with_ratios
from pfgmpp.kernel import PerturbationKernel


def by_differences(kernel, x, sigma, data):
    """Returns the posterior mean by computing all differences [B, R, N] in float64."""
    squared = (x[:, None].double() - data[None].double()).square().sum(dim=2)
    weights = kernel._log_profile(squared / sigma.double()[:, None] ** 2, x.shape[1]).softmax(1)
    return (weights @ data.double()).to(x.dtype)


def by_product(kernel, x, sigma, data):
    """Returns the posterior mean as training computes it."""
    return kernel.posterior_mean(x, sigma, data)


def make_inputs(batch, rbatch, dim, aug_dim):
    """Returns (kernel, noisy images, noise levels, reference images)."""
    rng = torch.Generator().manual_seed(0)
    # So close to each other that many images contribute to a target.
    data = 0.05 * (torch.rand([rbatch, dim], generator=rng) * 2 - 1)
    sigma = (torch.randn([batch], generator=rng) * 1.2 - 1.2).exp()
    kernel = PerturbationKernel(aug_dim)
    return kernel, data[:batch] + kernel.sample((batch, dim), sigma, rng), sigma, data


def rows(options: Options) -> list[Row]:
    """Returns both methods for a batch of 64 CIFAR images and a reference batch of 1024."""
    what, inputs = "stable targets, 64 of 1024 images 32x32", make_inputs(64, 1024, 3072, 128)
    ways = {"matrix product": lambda: by_product(*inputs),
            "every difference": lambda: by_differences(*inputs)}
    # Before the timed runs, after which the allocator would reuse cached memory.
    peaks = {name: peak_mb(way) for name, way in ways.items()}
    error = relative_error(by_product(*inputs), by_differences(*inputs))
    seconds = in_turn(ways, options.repeats)
    return with_ratios([Row(what, name, seconds[name], 64, memory_mb=peaks[name],
                            error=error if name == "matrix product" else None)
                        for name in ways], "every difference")
