"""Distances between two sets of images, computed from their features.

    d number of features    mu [d] mean    S [d, d] covariance    tr trace
    x_i [d] features of image i of m generated, y_j [d] of image j of n real ones

The Frechet distance between two Gaussians (Dowson and Landau 1982), called FID when the features
are Inception's (Heusel et al. 2017, arXiv 1706.08500), is

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2).

With S = A A^T the eigenvalues of S1 S2 are the squared singular values of A1^T A2, so

    tr sqrt(S1 S2) = sum of the singular values of A1^T A2.

These are the roots of the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), but found without
squaring: an eigenvalue that should be 0 comes out as 1e-16, its root as 1e-8, and a covariance of
few images has up to d of them. Nothing is ever complex, and no rank is too low. Where both are far
from singular the eigenvalues of A1^T S2 A1, with A1 from Cholesky's factorisation, are exact enough
and found in a third of the time.

The kernel distance, KID for Inception's features (Binkowski et al. 2018, arXiv 1801.01401), is the
squared maximum mean discrepancy of the kernel k(x, y) = (x.y/d + 1)^3, without bias:

    mean_(i != j) k(x_i, x_j) + mean_(i != j) k(y_i, y_j) - 2 mean_ij k(x_i, y_j)

averaged over random subsets of both. It can be below 0.

Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991): a set covers a point that lies
within the distance from one of its members to that member's k-th nearest neighbour in the set.
Precision is the share of generated images that the real ones cover, recall the other way round.

An outlier among the real ones reaches far, and so covers generated images that resemble none.
Density and coverage (Naeem et al. 2020, arXiv 2002.09797) count how many real images cover a
generated one, and how many cover any, where r_j is the distance of y_j to its k-th neighbour:

    density = 1/(k m) sum_ij [|x_i - y_j| <= r_j]    coverage = 1/n sum_j [min_i |x_i - y_j| <= r_j]

If x and y are of one law, whatever it is, they are on average

    1    and    1 - C(n - 1, k)/C(m + n - 1, k), about 1 - (n/(m + n))^k,

as y_j covers no x_i where its k nearest images of all others are real. Density can exceed 1.
"""

import numpy as np
import torch

Array = torch.Tensor | np.ndarray

# Ratio of pivots from which squaring is harmless: it costs about eps/ratio of the trace.
_WELL_CONDITIONED = 1e-7
NUM_SUBSETS = 100  # this and the next two: as torch-fidelity, so that scores agree
SUBSET_SIZE = 1000
SUBSET_SEED = 2020
NUM_NEIGHBOURS = 3  # of precision and recall
NUM_DENSITY_NEIGHBOURS = 5  # of density and coverage
_CHUNK_ROWS = 1024  # rows of a distance matrix at a time: 200 MB against 50,000 columns


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Returns the squared Frechet distance of two Gaussians, computed in float64 on the CPU.

    Means are [d]. Covariances are [d, d], symmetric and positive semi-definite, of any rank.

    Raises:
        ValueError: the shapes differ.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).to("cpu", torch.float64)
                                for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        raise ValueError(f"statistics of {len(mu1)} features can't be compared with "
                         f"those of {len(mu2)}")
    cross = _trace_of_root(sigma1, sigma2)
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _trace_of_root(sigma1: torch.Tensor, sigma2: torch.Tensor) -> torch.Tensor:
    """Returns tr sqrt(S1 S2)."""
    factors = [_quick_factor(sigma) for sigma in (sigma1, sigma2)]
    if all(factor is not None for factor in factors):
        return torch.linalg.eigvalsh(factors[0].T @ sigma2 @ factors[0]).clamp(min=0).sqrt().sum()
    return torch.linalg.svdvals(covariance_factor(sigma1).T @ covariance_factor(sigma2)).sum()


def _quick_factor(sigma: torch.Tensor) -> torch.Tensor | None:
    """Returns A [d, d] with A A^T = sigma, or None if sigma is nearly singular."""
    factor, failed = torch.linalg.cholesky_ex(sigma)
    pivots = factor.diagonal().square()
    return None if failed or pivots.min() <= _WELL_CONDITIONED * pivots.max() else factor


def covariance_factor(sigma: torch.Tensor) -> torch.Tensor:
    """Returns A [d, rank] with A A^T = sigma; eigenvalues that are rounding errors are left out."""
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def kernel_distance(x: torch.Tensor, y: torch.Tensor, *, subsets: int = NUM_SUBSETS,
                    size: int = SUBSET_SIZE, seed: int = SUBSET_SEED) -> tuple[float, float]:
    """Returns mean and standard deviation, over random subsets, of the kernel distance in float64.

    Features of the generated images are x [m, d], those of the real ones y [n, d]. `seed` chooses
    the subsets, each of `size` images, but of at most m and n.

    Raises:
        ValueError: fewer than two images on a side, or features of different lengths.
    """
    _check_features(x, y, least=2)
    rng, size = np.random.RandomState(seed), min(size, len(x), len(y))
    values = []
    for _ in range(subsets):
        part_x = x[torch.from_numpy(rng.choice(len(x), size, replace=False))]
        part_y = y[torch.from_numpy(rng.choice(len(y), size, replace=False))]
        values.append(_squared_discrepancy(part_x.double(), part_y.double()))
    return float(np.mean(values)), float(np.std(values))


def _squared_discrepancy(x: torch.Tensor, y: torch.Tensor) -> float:
    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(a: torch.Tensor) -> torch.Tensor:
        matrix = kernel(a, a)
        return (matrix.sum() - matrix.trace()) / (len(a) * (len(a) - 1))

    return (mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()).item()


def precision_recall(x: torch.Tensor, y: torch.Tensor, *, k: int = NUM_NEIGHBOURS,
                     device: torch.device | str = "cpu") -> tuple[float, float]:
    """Returns precision and recall, each in [0, 1], computed on `device`.

    Features of the generated images are x [m, d], those of the real ones y [n, d]; the distance to
    the k-th nearest neighbour is the radius.

    Raises:
        ValueError: fewer than k neighbours on a side, or features of different lengths.
    """
    _check_features(x, y, least=k + 1)
    x, y = _centred(x, y, device)
    return _covered(x, y, _neighbour_radii(y, k)), _covered(y, x, _neighbour_radii(x, k))


def density_coverage(x: torch.Tensor, y: torch.Tensor, *, k: int = NUM_DENSITY_NEIGHBOURS,
                     device: torch.device | str = "cpu") -> tuple[float, float]:
    """Returns density, at least 0 and perhaps above 1, and coverage in [0, 1].

    Arguments and errors are those of `precision_recall`, but there may be any number of x.
    """
    _check_features(x, y, least=1)
    if len(y) <= k:
        raise ValueError(f"{len(y)} real images: at least {k + 1} needed")
    x, y = _centred(x, y, device)
    radii, count = _neighbour_radii(y, k), 0
    is_reached = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for part in x.split(_CHUNK_ROWS):
        inside = squared_distances(part, y) <= radii
        count += inside.sum()
        is_reached |= inside.any(0)
    return count.item() / (k * len(x)), is_reached.sum().item() / len(y)


def _centred(x: torch.Tensor, y: torch.Tensor,
             device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both on a device, less the mean of y.

    Distances are differences of squares, in which centred features lose fewer digits.
    """
    centre = y.to(torch.float64).mean(0).to(torch.float32)
    return x.to(device) - centre.to(device), y.to(device) - centre.to(device)


def _neighbour_radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the squared distance [n] of each row of x to its k-th nearest other row."""
    radii = []
    for start in range(0, len(x), _CHUNK_ROWS):
        distances = squared_distances(x[start:start + _CHUNK_ROWS], x)
        rows = torch.arange(len(distances), device=x.device)
        distances[rows, start + rows] = torch.inf
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def _covered(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    """Returns the share of points that lie within the radius of a centre."""
    count = sum((squared_distances(part, centres) <= radii).any(1).sum()
                for part in points.split(_CHUNK_ROWS))
    return count.item() / len(points)


def squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns |a_i - b_j|^2 [n, m]."""
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)
    return squares.addmm_(a, b.T, alpha=-2)


def _check_features(x: torch.Tensor, y: torch.Tensor, least: int) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{x.shape[1]} features can't be compared with {y.shape[1]}")
    if min(len(x), len(y)) < least:
        raise ValueError(f"{len(x)} and {len(y)} images: at least {least} needed on each side")
