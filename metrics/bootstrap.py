"""How much the Frechet distance of m images varies with the images: a bootstrap of their features.

    d number of features    x_i [d] features of image i of m    m_x, S_x their mean and covariance
    mu [d], S = A A^T [d, d] mean and covariance of the reference, A [d, r]    F(m_x, S_x) the score

F is random, because other seeds give other images. At finite m its mean is too large, E F = F_inf +
b/m + ..., and so scores are compared at equal m only. What a network has for a score then is E F,
and this is what the interval is of. It is not one of F_inf, and the reference is held fixed.

Resampling the images and computing F again would not do. A replicate F* is to the m images what F
is to the network, so its bias comes on top of F's: E* F* is about F_inf + 2 b/m, and quantiles of
F* lie above F, mostly without E F. Their centre can be taken away, but not their width. For the
deviation v of mean and covariance from those of the network, F = F_inf + g.v + v.H.v/2. Replicates
take g where the images are, at g + H v, so the second order comes once more and Var F* is about

    Var(g.v) + 3 Var(v.H.v/2)    instead of    Var(g.v) + Var(v.H.v/2).

Where F is mostly bias the second order is most of F. So the first order alone is resampled (the
infinitesimal jackknife of Efron 1982), which has Var(g.v) + 2 Var(v.H.v/2): exact where F is well
above its bias, and a standard error at most sqrt(2) too large where it is not. It is an average,

    F* - F = mean over m draws i with replacement of psi_i,
    psi_i = 2 (m_x - mu).c_i + |c_i|^2 - c_i^T T c_i - the mean of these,    c_i = x_i - m_x,
    T = A (A^T S_x A)^(-1/2) A^T,

as dF = 2 (m_x - mu).dm + tr((1 - T) dS), by d tr sqrt(M) = tr(M^(-1/2) dM)/2 for M = A^T S_x A. T
is the linear map of Normal(m_x, S_x) to the reference. Hence

    standard error    std(psi)/sqrt(m)
    95% interval      F + q,    q the quantiles of F* - F at 2.5% and 97.5%

A draw takes m additions, whatever d is. docs/metrics.md has how often intervals hold E F.
"""

from typing import NamedTuple

import numpy as np
import torch

from metrics.distances import Array, covariance_factor
from metrics.statistics import FeatureStatistics

DRAWS = 1000
MIN_DRAWS = 40  # from here on there is a quantile at 2.5%
_LEVELS = 0.025, 0.975
_CHUNK_ROWS = 8192  # images at a time: 130 MB at 2048 features


class FrechetInterval(NamedTuple):
    """The Frechet distance of m images, and where its mean over all sets of m lies."""

    value: float
    std_error: float
    low: float  # ends of the 95% interval
    high: float


@torch.no_grad()
def bootstrap_frechet(features: torch.Tensor, mu: Array, sigma: Array, *, draws: int = DRAWS,
                      seed: int = 0, device: torch.device | str = "cpu") -> FrechetInterval:
    """Returns the Frechet distance of features to a reference with its 95% interval, in float64.

    Args:
        features: of the m generated images, [m, d].
        mu: mean of the reference, [d].
        sigma: its covariance, [d, d], of any rank.
        draws: how often images are resampled.
        seed: chooses the draws; the same seed gives the same interval.
        device: where products and eigenvalues are computed.

    Raises:
        ValueError: the shapes differ, there are fewer than two images, or too few draws.
    """
    if draws < MIN_DRAWS:
        raise ValueError(f"{draws} draws of a bootstrap: at least {MIN_DRAWS} needed")
    value, psi = _influences(features, mu, sigma, device)
    rng, m = np.random.RandomState(seed), len(psi)
    deviations = [psi[rng.randint(m, size=m)].mean() for _ in range(draws)]
    # By these quantiles one more draw lies between the two with 95% probability.
    low, high = value + np.quantile(deviations, _LEVELS, method="weibull")
    return FrechetInterval(value, float(psi.std() / np.sqrt(m)), max(float(low), 0.0), float(high))


def _influences(features: torch.Tensor, mu: Array, sigma: Array,
                device: torch.device | str) -> tuple[float, np.ndarray]:
    """Returns F, and psi [m]: how F moves as an image gets more weight."""
    mu, sigma = (torch.as_tensor(x).to("cpu", torch.float64) for x in (mu, sigma))
    if features.shape[1:] != mu.shape or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"statistics of {len(mu)} features can't be compared with "
                         f"those of {features.shape[1]}")
    factor, trace, mu = covariance_factor(sigma).to(device), sigma.trace().item(), mu.to(device)
    moments = FeatureStatistics()
    for part in features.split(_CHUNK_ROWS):
        moments.append(part.to(device))
    mean, covariance = moments.mean(), moments.cov()
    values, vectors = torch.linalg.eigh(factor.T @ covariance @ factor)
    keep = values > values[-1:].abs() * len(values) * torch.finfo(values.dtype).eps
    values = values[keep]
    distance = (mean - mu).square().sum() + covariance.trace() + trace - 2 * values.sqrt().sum()
    half_map = factor @ (vectors[:, keep] * values**-0.25)  # T is this times its transpose
    psi = []
    for part in features.split(_CHUNK_ROWS):
        c = part.to(device, torch.float64) - mean
        psi.append(2 * c @ (mean - mu) + c.square().sum(1) - (c @ half_map).square().sum(1))
    psi = torch.cat(psi).cpu().numpy()
    return max(distance.item(), 0.0), psi - psi.mean()
