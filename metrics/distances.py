"""Distances between two sets of images, computed from statistics of their features.

    d number of features    mu [d] mean    S [d, d] covariance    tr trace

The Frechet distance between two Gaussians (Dowson and Landau 1982), called FID when the features
are Inception's (Heusel et al. 2017, arXiv 1706.08500), is

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2).

With S = A A^T the eigenvalues of S1 S2 are the squared singular values of A1^T A2, so

    tr sqrt(S1 S2) = sum of the singular values of A1^T A2.

These are the roots of the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), but found without
squaring: an eigenvalue that should be 0 comes out as 1e-16, its root as 1e-8, and a covariance of
few images has up to d of them. Nothing is ever complex, and no rank is too low.
"""

import numpy as np
import torch

Array = torch.Tensor | np.ndarray


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Returns the squared Frechet distance of two Gaussians, computed in float64 on the CPU.

    Args:
        mu1: mean [d] of the first.
        sigma1: its covariance [d, d]: symmetric, positive semi-definite, of any rank.
        mu2: mean [d] of the second.
        sigma2: its covariance.

    Raises:
        ValueError: the shapes differ.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).to("cpu", torch.float64)
                                for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        raise ValueError(f"statistics of {len(mu1)} features can't be compared with "
                         f"those of {len(mu2)}")
    cross = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _factor(sigma: torch.Tensor) -> torch.Tensor:
    """Returns A [d, rank] with A A^T = sigma; eigenvalues that are rounding errors are left out."""
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()
