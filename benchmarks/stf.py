"""Stable targets by a matrix product against forming every difference.

    python -m benchmarks.stf [--batch 64] [--rbatch 1024] [--dim 3072] [--aug_dim 128]

Prints time (medians of interleaved runs), peak memory above the inputs, and how far the two targets
are apart.
"""

import statistics
import threading
import time

import click
import psutil
import torch

from training.perturbation import PerturbationKernel


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
    data = torch.rand([rbatch, dim], generator=rng) * 2 - 1
    sigma = (torch.randn([batch], generator=rng) * 1.2 - 1.2).exp()
    kernel = PerturbationKernel(aug_dim)
    return kernel, data[:batch] + kernel.sample((batch, dim), sigma, rng), sigma, data


def _peak_mb(function, inputs) -> float:
    """Returns how far the resident memory rises while `function` runs, sampled every ms."""
    process, samples, running = psutil.Process(), [], True

    def sample():
        while running:
            samples.append(process.memory_info().rss)
            time.sleep(1e-3)

    before = process.memory_info().rss
    thread = threading.Thread(target=sample)
    thread.start()
    function(*inputs)
    running = False
    thread.join()
    return (max(samples) - before) / 1e6


@click.command()
@click.option("--batch", type=int, default=64)
@click.option("--rbatch", type=int, default=1024)
@click.option("--dim", type=int, default=3072)
@click.option("--aug_dim", type=float, default=128)
@click.option("--repeats", type=int, default=5)
def main(batch, rbatch, dim, aug_dim, repeats):
    """Compares the two ways on the CPU."""
    sizes = batch, rbatch, dim, aug_dim
    inputs = make_inputs(*sizes)
    seconds = {by_product: [], by_differences: []}
    # Before the timed runs, from which the allocator would keep memory to reuse.
    peaks = {function: _peak_mb(function, inputs) for function in seconds}
    for _ in range(repeats):
        for function, times in seconds.items():
            start = time.perf_counter()
            function(*inputs)
            times.append(time.perf_counter() - start)
    difference = (by_product(*inputs) - by_differences(*inputs)).abs().max()
    for function, times in seconds.items():
        print(f"{function.__name__:16s} {1e3 * statistics.median(times):9.1f} ms "
              f"{peaks[function]:9.0f} MB above the inputs")
    medians = [statistics.median(times) for times in seconds.values()]
    print(f"ratio {medians[1] / medians[0]:.1f}; largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
