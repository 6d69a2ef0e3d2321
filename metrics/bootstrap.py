"""How much the Frechet distance of m images varies with the images: a bootstrap of their features.

    d number of features    x_i [d] features of image i of m    m_x, S_x their mean and covariance
    mu [d], S = A A^T [d, d] mean and covariance of the reference, A [d, r]    F(m_x, S_x) the score

F is random, because other seeds give other images. At finite m its mean is biased upwards, E F =
F_inf + b/m + ..., so scores are compared only at equal m. The interval is therefore one for E F,
the mean score of the network at this m, and not for F_inf. The reference is held fixed.

Resampling the images and computing F again would not work. A replicate F* relates to the m images
as F does to the network, so its bias adds to that of F: E* F* is about F_inf + 2 b/m, and the
quantiles of F* lie above F and mostly exclude E F. Their centre can be corrected, but not their
width. For the deviation v of mean and covariance from those of the network, F = F_inf + g.v +
v.H.v/2. Replicates have their gradient at the images, g + H v, so the second order enters once more
and Var F* is about

    Var(g.v) + 3 Var(v.H.v/2)    instead of    Var(g.v) + Var(v.H.v/2).

Where F is mostly bias, the second order is most of F. So only the first order is resampled (the
infinitesimal jackknife of Efron 1982), whose variance is Var(g.v) + 2 Var(v.H.v/2). This is exact
where F is well above its bias; elsewhere the standard error is at most sqrt(2) too large. The first
order is an average,

    F* - F = mean over m draws i with replacement of psi_i,
    psi_i = 2 (m_x - mu).c_i + |c_i|^2 - c_i^T T c_i - the mean of these,    c_i = x_i - m_x,
    T = A (A^T S_x A)^(-1/2) A^T,

because dF = 2 (m_x - mu).dm + tr((1 - T) dS), where d tr sqrt(M) = tr(M^(-1/2) dM)/2 is used for
M = A^T S_x A. T is the linear map that takes Normal(m_x, S_x) to the reference. Hence

    standard error    std(psi)/sqrt(m)
    95% interval      F + q,    q the quantiles of F* - F at 2.5% and 97.5%

A draw takes m additions for any d. docs/metrics.md reports how often the intervals contain E F.
"""

from typing import NamedTuple

import numpy as np
import torch

from metrics.distances import Array, covariance_factor
from metrics.statistics import FeatureStatistics

DRAWS = 1000
MIN_DRAWS = 40  # with fewer draws there is no quantile at 2.5%
_LEVELS = 0.025, 0.975
_CHUNK_ROWS = 8192  # images per chunk: 130 MB at 2048 features


class FrechetInterval(NamedTuple):
    """The Frechet distance of m images, and an interval for its mean over all sets of m images."""

    value: float
    std_error: float
    low: float  # ends of the 95% interval
    high: float


@torch.no_grad()
def bootstrap_frechet(features: torch.Tensor, mu: Array, sigma: Array, *, draws: int = DRAWS,
                      seed: int = 0, device: torch.device | str = "cpu") -> FrechetInterval:
    """Returns the Frechet distance of features to a reference with its 95% interval, in float64.

    Args:
        features: features of the m generated images, [m, d].
        mu: mean of the reference, [d].
        sigma: covariance of the reference, [d, d], of any rank.
        draws: how often the images are resampled.
        seed: chooses the draws; the same seed gives the same interval.
        device: where products and eigenvalues are computed.

    Raises:
        ValueError: the shapes differ, or there are fewer than two images or `MIN_DRAWS` draws.
    """
    if draws < MIN_DRAWS:
        raise ValueError(f"{draws} draws of a bootstrap: at least {MIN_DRAWS} needed")
    value, psi = _influences(features, mu, sigma, device)
    rng, m = np.random.RandomState(seed), len(psi)
    deviations = [psi[rng.randint(m, size=m)].mean() for _ in range(draws)]
    # With this kind of quantile, a further draw lies between the two with 95% probability.
    low, high = value + np.quantile(deviations, _LEVELS, method="weibull")
    return FrechetInterval(value, float(psi.std() / np.sqrt(m)), max(float(low), 0.0), float(high))


def _influences(features: torch.Tensor, mu: Array, sigma: Array,
                device: torch.device | str) -> tuple[float, np.ndarray]:
    """Returns F, and psi [m]: how F changes as an image gets more weight."""
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
