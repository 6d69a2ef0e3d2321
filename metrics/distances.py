"""Distances between two sets of images, computed from their features.

    d number of features    mu [d] mean    S [d, d] covariance    tr trace
    x_i [d] features of image i of m generated, y_j [d] of image j of n real ones

The Frechet distance between two Gaussians (Dowson and Landau 1982), called FID when the features
are Inception's (Heusel et al. 2017, arXiv 1706.08500), is

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2).

With S = A A^T the eigenvalues of S1 S2 are the squared singular values of A1^T A2, so

    tr sqrt(S1 S2) = sum of the singular values of A1^T A2.

These are the roots of the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), but found without
squaring. With squaring, an eigenvalue that should be 0 comes out as 1e-16 and its root as 1e-8, and
a covariance of few images has up to d of them. The singular values are always real, for any rank.
Where both covariances are far from singular, the eigenvalues of A1^T S2 A1, with A1 from the
Cholesky factorisation, are accurate enough and take a third of the time.

The kernel distance, KID for Inception's features (Binkowski et al. 2018, arXiv 1801.01401), is the
unbiased estimate of the squared maximum mean discrepancy of the kernel k(x, y) = (x.y/d + 1)^3:

    mean_(i != j) k(x_i, x_j) + mean_(i != j) k(y_i, y_j) - 2 mean_ij k(x_i, y_j)

It is averaged over random subsets of both, and can be negative.

Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991): a set covers a point that lies
within the distance from one of its members to that member's k-th nearest neighbour in the set.
Precision is the share of generated images that the real ones cover, and recall the share of real
images that the generated ones cover.

An outlier among the real ones has a large radius, and so covers generated images that resemble no
real one. Density and coverage (Naeem et al. 2020, arXiv 2002.09797) instead count how many real
images cover a generated one, and how many real images cover at least one. With r_j the distance of
y_j to its k-th neighbour,

    density = 1/(k m) sum_ij [|x_i - y_j| <= r_j]    coverage = 1/n sum_j [min_i |x_i - y_j| <= r_j]

If x and y have the same distribution, whichever it is, their means are

    1    and    1 - C(n - 1, k)/C(m + n - 1, k), about 1 - (n/(m + n))^k,

because y_j covers no x_i if its k nearest images among all others are real. Density can exceed 1.
"""

import numpy as np
import torch

Array = torch.Tensor | np.ndarray

# Squaring is harmless above this ratio of pivots: its error is about eps/ratio of the trace.
_WELL_CONDITIONED = 1e-7
NUM_SUBSETS = 100  # this and the next two are those of torch-fidelity, so that scores agree
SUBSET_SIZE = 1000
SUBSET_SEED = 2020
NUM_NEIGHBOURS = 3  # of precision and recall
NUM_DENSITY_NEIGHBOURS = 5  # of density and coverage
_CHUNK_ROWS = 1024  # rows of a distance matrix per chunk: 200 MB for 50,000 columns


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
    """Returns A [d, rank] with A A^T = sigma, without eigenvalues that are rounding errors."""
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def kernel_distance(x: torch.Tensor, y: torch.Tensor, *, subsets: int = NUM_SUBSETS,
                    size: int = SUBSET_SIZE, seed: int = SUBSET_SEED) -> tuple[float, float]:
    """Returns mean and standard deviation, over random subsets, of the kernel distance in float64.

    Features of the generated images are x [m, d], those of the real ones y [n, d]. `seed` chooses
    the subsets. Each has `size` images, or min(m, n) if that is smaller.

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
    """Returns density, which is at least 0 and can exceed 1, and coverage in [0, 1].

    Arguments and errors are those of `precision_recall`, except that one generated image suffices.
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
    """Returns both on a device, minus the mean of y.

    Distances are computed as differences of squares, which lose fewer digits if centred.
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
