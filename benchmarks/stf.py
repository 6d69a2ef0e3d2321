"""Stable targets by a matrix product against forming every difference."""

import torch

from benchmarks.table import Options, Row, in_turn, peak_mb, relative_error, with_ratios
from pfgmpp.kernel import PerturbationKernel


def by_differences(kernel, x, sigma, data):
    """Returns the posterior mean by forming [B, R, N] in float64, as a plain reading suggests."""
    squared = (x[:, None].double() - data[None].double()).square().sum(dim=2)
    weights = kernel._log_profile(squared / sigma.double()[:, None] ** 2, x.shape[1]).softmax(1)
    return (weights @ data.double()).to(x.dtype)


def by_product(kernel, x, sigma, data):
    """Returns the posterior mean as training does."""
    return kernel.posterior_mean(x, sigma, data)


def make_inputs(batch, rbatch, dim, aug_dim):
    """Returns (kernel, noisy images, noise levels, reference images)."""
    rng = torch.Generator().manual_seed(0)
    # So near to each other that many have a share in a target.
    data = 0.05 * (torch.rand([rbatch, dim], generator=rng) * 2 - 1)
    sigma = (torch.randn([batch], generator=rng) * 1.2 - 1.2).exp()
    kernel = PerturbationKernel(aug_dim)
    return kernel, data[:batch] + kernel.sample((batch, dim), sigma, rng), sigma, data


def rows(options: Options) -> list[Row]:
    """Returns both ways for a batch of 64 CIFAR images and a reference batch of 1024."""
    what, inputs = "stable targets, 64 of 1024 images 32x32", make_inputs(64, 1024, 3072, 128)
    ways = {"matrix product": lambda: by_product(*inputs),
            "every difference": lambda: by_differences(*inputs)}
    # Before the timed runs, from which the allocator would keep memory to reuse.
    peaks = {name: peak_mb(way) for name, way in ways.items()}
    error = relative_error(by_product(*inputs), by_differences(*inputs))
    seconds = in_turn(ways, options.repeats)
    return with_ratios([Row(what, name, seconds[name], 64, memory_mb=peaks[name],
                            error=error if name == "matrix product" else None)
                        for name in ways], "every difference")
