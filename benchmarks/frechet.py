"""The Frechet distance of two covariances of full rank, against scipy's matrix square root."""

import numpy as np
import scipy.linalg
import torch

from benchmarks.table import Options, Row, in_turn, with_ratios
from metrics.distances import frechet_distance


def random_covariance(d: int, seed: int) -> torch.Tensor:
    """Returns the covariance of 3d images; features have standard deviations from 0.01 to 2."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn([3 * d, d], generator=rng, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn([d, d], generator=rng, dtype=torch.float64))[0]
    return torch.cov((x * torch.logspace(-2, 0.3, d, dtype=torch.float64) @ mix).T)


def ours(s1: torch.Tensor, s2: torch.Tensor) -> float:
    """Returns the distance of two centred Gaussians as fid.py computes it."""
    zero = torch.zeros(len(s1), dtype=torch.float64)
    return frechet_distance(zero, s1, zero, s2)


def by_sqrtm(s1: torch.Tensor, s2: torch.Tensor) -> float:
    """Returns the same distance by direct evaluation of the formula."""
    root = scipy.linalg.sqrtm((s1 @ s2).numpy())
    return float(s1.trace() + s2.trace() - 2 * np.trace(root).real)


def rows(options: Options) -> list[Row]:
    """Returns both methods for the 2048 features of Inception."""
    covariances = random_covariance(2048, 0), random_covariance(2048, 1)
    values = {}
    ways = {"ours": lambda: values.update(ours=ours(*covariances)),
            "scipy's sqrtm": lambda: values.update(scipy=by_sqrtm(*covariances))}
    ways["ours"]()  # warms up
    seconds = in_turn(ways, min(options.repeats, 3))
    error = abs(values["ours"] / values["scipy"] - 1)
    return with_ratios([Row("Frechet distance, 2048 features", name, seconds[name], error=error
                            if name == "ours" else None) for name in ways], "scipy's sqrtm")
