"""How close generated images are to individual training images: copies and memorisation.

    x_i [d] features of image i of m    y_j [d] features of training image j of n
    d_i distance of x_i to its nearest training image    e_i to its second nearest
    h_l distance of held-out image l of H to its nearest training image

An image is a copy if d_i = 0 up to rounding. It is memorised if d_i < e_i/3 (Yoon et al. 2023;
Gu et al. 2023, arXiv 2310.02664): a new image is about equally far from several training images,
whereas a replica is much closer to one than to all others. If a training image has duplicates, this
rule misses replicas of it that are not exact copies.

Held-out images from the data distribution show which distances are usual. If a network copies
nothing, 5% of its images are closer than the 5% quantile of the h_l. If the share is larger, it
makes images that are too close, however far the others are. The statistic of Meehan et al. 2020
(arXiv 2004.05675) compares all distances, by the ranks of Mann and Whitney,

    C_T = (P - 1/2) / sqrt((m + H + 1)/(12 m H)),    P = share of pairs (i, l) with d_i > h_l,

where a pair of equal distances counts half. It is about Normal(0, 1) if d and h have the same
distribution. Below -3 generated images are systematically closer to the training images than new
ones are. Above 3 they are farther away, as blurred or bad images are. (Meehan et al. average this
over the cells of a partition; here there is only one cell.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from metrics.detectors import Detector
from metrics.distances import squared_distances
from metrics.evaluator import check_alike
from metrics.metrics import Images

MEMORISED_RATIO = 1 / 3
TAIL = 0.05
# A share of the root mean square distance of training images from their mean. It is larger than the
# rounding differences of one image between batches, and smaller than the effect of one level of one
# pixel in a 64x64 RGB image.
_COPY_SHARE = 1e-4
_ROWS, _COLUMNS = 1024, 16384  # of a block of the distance matrix
_SPARE = 4  # extra candidates, so that rounding can't drop one of the k nearest
_DIFFERENCES = 1 << 24  # values per chunk


@dataclass(frozen=True)
class Neighbours:
    """The k nearest training images of each image, nearest first."""

    numbers: np.ndarray  # [m, k] int64
    distances: np.ndarray  # [m, k] float64


@dataclass(frozen=True)
class HeldOut:
    """How close held-out images are to training images, and how generated images compare."""

    num: int
    median: float  # median of their distances
    copies: int  # number of them that are copies of training images
    nearer: float  # share of generated images within the 5% quantile of the held-out distances
    c_t: float


@dataclass(frozen=True)
class Nearness:
    """How close images are to training images."""

    num: int
    median: float  # median distance to the nearest training image
    copies: int
    memorised: float  # share of memorised images, including copies
    held_out: HeldOut | None = None


def check_comparable(detector: Detector, data: Images, data_name: str,
                     sets: Mapping[str, Images]) -> None:
    """Raises ValueError unless features of a data set and of named image sets are comparable."""
    def dim(images: Images, name: str) -> int:
        try:
            detector.check_kind(images.image_shape[0], images.scale is None)
            return detector.dim_of(images.image_shape, images.scale)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    expected = dim(data, data_name)
    for name, images in sets.items():
        check_alike(data, data_name, images.image_shape, name, images.scale)
        if dim(images, name) != expected:
            raise ValueError(f"{name}: images have {images.image_shape[0]} channels, but those of "
                             f"{data_name} have {data.image_shape[0]}; detector {detector.name} "
                             "needs the same number of channels")


@torch.no_grad()
def nearest_neighbours(x: torch.Tensor, y: torch.Tensor, k: int, *,
                       device: torch.device | str = "cpu") -> Neighbours:
    """Returns the k nearest rows of y [n, d] for each row of x [m, d], found on `device`.

    Candidates are found by squared distances in float32, which are rounding errors near zero. Their
    distances are then computed from differences in float64, so that equal rows have distance 0.
    Ties are sorted by number.

    Raises:
        ValueError: features have different lengths, or y has fewer than k rows.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{x.shape[1]} features can't be compared with {y.shape[1]}")
    if len(y) < k:
        raise ValueError(f"{len(y)} training images: at least {k} needed")
    numbers = torch.cat(_candidates(x, y, min(k + _SPARE, len(y)), device))
    numbers = numbers.sort(1).values  # so that a stable sort puts lower numbers first
    size = max(_DIFFERENCES // (numbers.shape[1] * x.shape[1]), 1)
    distances = torch.cat([(own.double()[:, None] - y[found].double()).norm(dim=2)
                           for own, found in zip(x.split(size), numbers.split(size), strict=True)])
    distances, order = distances.sort(dim=1, stable=True)
    return Neighbours(numbers.gather(1, order)[:, :k].numpy(), distances[:, :k].numpy())


def _candidates(x: torch.Tensor, y: torch.Tensor, k: int,
                device: torch.device | str) -> list[torch.Tensor]:
    """Returns the numbers of the k nearest rows of y, up to rounding, for chunks of rows of x."""
    centre = y.double().mean(0).float().to(device)
    parts = [part.to(device) - centre for part in x.split(_ROWS)]
    best: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(parts)
    for start in range(0, len(y), _COLUMNS):
        columns = y[start:start + _COLUMNS].to(device) - centre
        for i, part in enumerate(parts):
            values, numbers = squared_distances(part, columns).topk(min(k, len(columns)), 1,
                                                                    largest=False)
            numbers += start
            if best[i] is not None:
                values, numbers = (torch.cat(pair, 1) for pair in zip(best[i], (values, numbers),
                                                                      strict=True))
                values, order = values.topk(min(k, values.shape[1]), 1, largest=False)
                numbers = numbers.gather(1, order)
            best[i] = values, numbers
    return [numbers.cpu() for _, numbers in best]


def copy_distance(y: torch.Tensor) -> float:
    """Returns the largest distance from a training image at which an image counts as its copy."""
    return _COPY_SHARE * math.sqrt(y.double().var(0, correction=0).sum().item())


def nearness(found: Neighbours, up_to: float, held_out: Neighbours | None = None) -> Nearness:
    """Returns how close images are to training images.

    Args:
        found: at least the two nearest training images of each image.
        up_to: the largest distance of a copy, from `copy_distance`.
        held_out: the nearest training images of held-out images.
    """
    nearest, second = found.distances[:, 0], found.distances[:, 1]
    is_copy = nearest <= up_to
    of_held_out = None
    if held_out is not None:
        usual = held_out.distances[:, 0]
        of_held_out = HeldOut(
            len(usual), float(np.median(usual)), int((usual <= up_to).sum()),
            float((nearest <= np.quantile(usual, TAIL)).mean()), _c_t(nearest, usual))
    return Nearness(len(nearest), float(np.median(nearest)), int(is_copy.sum()),
                    float((is_copy | (nearest < MEMORISED_RATIO * second)).mean()), of_held_out)


def _c_t(nearest: np.ndarray, usual: np.ndarray) -> float:
    """Returns the statistic of Meehan et al. for distances [m] and those of held-out images [H]."""
    usual, (m, H) = np.sort(usual), (len(nearest), len(usual))
    below = np.searchsorted(usual, nearest, "left") + np.searchsorted(usual, nearest, "right")
    return float((below.mean() / 2 / H - 0.5) / math.sqrt((m + H + 1) / (12 * m * H)))
