"""The Frechet distance of two covariances of full rank, against scipy's matrix square root.

    python -m benchmarks.frechet [--features 2048] [--repeats 3]

Prints medians of interleaved runs, their ratio and the relative difference of the distances.
"""

import statistics
import time

import click
import numpy as np
import scipy.linalg
import torch

from metrics.distances import frechet_distance


def random_covariance(d: int, seed: int) -> torch.Tensor:
    """Returns the covariance of 3d images whose features have deviations from 0.01 to 2."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn([3 * d, d], generator=rng, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn([d, d], generator=rng, dtype=torch.float64))[0]
    return torch.cov((x * torch.logspace(-2, 0.3, d, dtype=torch.float64) @ mix).T)


def ours(s1: torch.Tensor, s2: torch.Tensor) -> float:
    """Returns the distance of two centred Gaussians as fid.py computes it."""
    zero = torch.zeros(len(s1), dtype=torch.float64)
    return frechet_distance(zero, s1, zero, s2)


def by_sqrtm(s1: torch.Tensor, s2: torch.Tensor) -> float:
    """Returns the same by the formula as it is written."""
    root = scipy.linalg.sqrtm((s1 @ s2).numpy())
    return float(s1.trace() + s2.trace() - 2 * np.trace(root).real)


@click.command()
@click.option("--features", type=click.IntRange(min=2), default=2048)
@click.option("--repeats", type=click.IntRange(min=1), default=3)
def main(features: int, repeats: int) -> None:
    """Compares the two ways on the CPU."""
    covariances = random_covariance(features, 0), random_covariance(features, 1)
    seconds, values = {ours: [], by_sqrtm: []}, {}
    for _ in range(repeats):
        for function, times in seconds.items():
            start = time.perf_counter()
            values[function] = function(*covariances)
            times.append(time.perf_counter() - start)
    medians = [statistics.median(times) for times in seconds.values()]
    for function, median in zip(seconds, medians, strict=True):
        print(f"{function.__name__:10s} {median:7.2f} s")
    difference = abs(values[ours] / values[by_sqrtm] - 1)
    print(f"ratio {medians[1] / medians[0]:.1f}; relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
