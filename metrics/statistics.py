"""Mean and covariance of features, accumulated over batches and ranks, and their files.

    d number of features    n number of images    f_i [d] features of image i

    mu = 1/n sum_i f_i        sigma = 1/(n-1) sum_i (f_i - mu)(f_i - mu)^T

Everything is float64. Each batch is centred on its own mean before it is squared, and batches
and ranks are merged by the update of Chan, Golub and LeVeque (1983),

    M = M_a + M_b + n_a n_b/(n_a + n_b) (mu_b - mu_a)(mu_b - mu_a)^T,    sigma = M/(n-1).

So large terms never cancel, unlike in sum f f^T - n mu mu^T, which loses the digits of
mean^2/variance and can give a constant feature a variance below zero.
"""

import collections
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
import torch.distributed
from tqdm import tqdm

import dnnlib.util
from metrics.detectors import Detector
from torch_utils import distributed as dist
from torch_utils.atomic import atomic_write

MAX_FEATURES = 1 << 14  # a covariance of 2 GiB


class FeatureStatistics:
    """Mean and covariance of all features appended so far."""

    def __init__(self):
        self.count = 0
        self._mean: torch.Tensor | None = None  # [d]
        self._scatter: torch.Tensor | None = None  # [d, d], M above

    @torch.no_grad()
    def append(self, features: torch.Tensor) -> None:
        """Adds features [n, d] of any float type; the sums stay on their device.

        n = 0 only fixes d, which a rank without images needs before `all_reduce`.
        """
        features = features.to(torch.float64)
        n, d = features.shape
        if self._mean is None:
            self._mean, self._scatter = features.new_zeros([d]), features.new_zeros([d, d])
        if n == 0:
            return
        batch_mean = features.mean(0)
        shift = batch_mean - self._mean
        total = self.count + n
        # The merge's outer product is one more row of the matrix product.
        merge = shift * math.sqrt(self.count * n / total)
        rows = torch.cat([features - batch_mean, merge[None]])
        self._scatter.addmm_(rows.T, rows)
        self._mean += shift * (n / total)
        self.count = total

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Merges the statistics of all ranks, each of which must call this once, at the end."""
        count = dist.all_reduce_sum_(torch.tensor(self.count, device=self._mean.device)).item()
        mean = dist.all_reduce_sum_(self._mean * (self.count / max(count, 1)))
        shift = self._mean - mean
        self._scatter.addr_(shift, shift, alpha=self.count)
        dist.all_reduce_sum_(self._scatter)
        self.count, self._mean = count, mean

    def mean(self) -> torch.Tensor:
        """Returns mu [d] in float64."""
        self._require(1)
        return self._mean

    def cov(self) -> torch.Tensor:
        """Returns the unbiased sigma [d, d] in float64."""
        self._require(2)
        return self._scatter / (self.count - 1)

    def _require(self, count: int) -> None:
        if self.count < count:
            raise ValueError(f"statistics of {self.count} images: at least {count} needed")


class Images(Protocol):
    """What `dataset_statistics` needs of a data set; `ImageFolderDataset` has it."""

    image_shape: Sequence[int]

    def __len__(self) -> int: ...

    def get_batch(self, indices: Sequence[int]) -> tuple[np.ndarray, Any]:
        """Returns uint8 images [B, C, H, W], and anything."""


def dataset_statistics(images: Images, detector: Detector, *, batch: int,
                       workers: int) -> FeatureStatistics:
    """Returns the statistics of all images, split over ranks and merged again.

    Args:
        images: the data set.
        detector: gives the features.
        batch: the most images at a time on one rank.
        workers: threads that read ahead; 0 reads when needed.

    Raises:
        ValueError: an image can't be read. All ranks raise the same.
        OSError: likewise.
    """
    stats, error = FeatureStatistics(), None
    own = [indices for indices in dist.split_for_rank(range(len(images)), batch) if indices]
    try:
        stats.append(detector(torch.empty([0, *images.image_shape], dtype=torch.uint8)))
        with tqdm(total=sum(map(len, own)), unit="img", leave=False,
                  disable=None if dist.get_rank() == 0 else True) as bar:
            for pixels in _read_ahead(images, own, workers):
                stats.append(detector(torch.from_numpy(pixels)))
                bar.update(len(pixels))
    except (ValueError, OSError) as caught:
        error = caught
    _raise_on_all_ranks(error)
    stats.all_reduce()
    return stats


def _read_ahead(images: Images, batches: Iterable[list[int]],
                workers: int) -> Iterator[np.ndarray]:
    def read(indices: list[int]) -> np.ndarray:
        return images.get_batch(indices)[0]

    if workers == 0:
        yield from map(read, batches)
        return
    pending: collections.deque = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for indices in batches:
            pending.append(pool.submit(read, indices))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _raise_on_all_ranks(error: Exception | None) -> None:
    """Raises the error of the first rank that has one; without this the others would wait."""
    errors = [error] * dist.get_world_size()
    if len(errors) > 1:
        torch.distributed.all_gather_object(errors, error)
    for first in filter(None, errors):
        raise first


@dataclass(frozen=True)
class Reference:
    """Statistics of the images to compare with: mu [d], sigma [d, d], and whose features."""

    mu: np.ndarray
    sigma: np.ndarray
    detector: str


def save_reference(path: str | os.PathLike, stats: FeatureStatistics, detector: str) -> None:
    """Writes an .npz with float64 `mu` and `sigma`, and the name `detector`; makes its folder."""
    mu, sigma = stats.mean().cpu().numpy(), stats.cov().cpu().numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, mu=mu, sigma=sigma, detector=np.array(detector))


def load_reference(path: str) -> Reference:
    """Reads a file of `save_reference`, or an .npz of EDM or PFGM++, which name no detector.

    Nothing is unpickled, and sizes are checked before memory is asked for.

    Args:
        path: a file or an http(s) address.

    Raises:
        OSError: it can't be read or downloaded.
        ValueError: it holds something else.
    """
    try:
        with dnnlib.util.open_url(path) as file, zipfile.ZipFile(file) as archive:
            mu = _read_array(archive, "mu", "f")
            sigma = _read_array(archive, "sigma", "f")
            named = "detector.npy" in archive.namelist()
            detector = str(_read_array(archive, "detector", "U")) if named else "inception"
        _check_reference(mu, sigma)
    # The last two: an unknown compression method, an encrypted member.
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError,
            RuntimeError) as error:
        reason = str(error).strip("'\"").split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not reference statistics: {reason}") from error
    return Reference(mu.astype(np.float64), sigma.astype(np.float64), detector)


def _read_array(archive: zipfile.ZipFile, name: str, kind: str) -> np.ndarray:
    """Returns one array of an .npz after its header has been found plausible."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        shape, dtype = _read_header(member)
        if dtype.kind != kind:
            raise ValueError(f"{name} has type {dtype}, expected "
                             f"{'floats' if kind == 'f' else 'text'}")
        if len(shape) > 2 or any(size > MAX_FEATURES for size in (*shape, dtype.itemsize)):
            raise ValueError(f"{name} has shape {list(shape)}, at most {MAX_FEATURES} features")
        if member.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{name} has shape {list(shape)}, but not the bytes of it")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    readers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"array format {version}, expected 1.0 or 2.0")
    shape, _, dtype = readers[version](member)
    return shape, dtype


def _check_reference(mu: np.ndarray, sigma: np.ndarray) -> None:
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu has shape {list(mu.shape)} and sigma {list(sigma.shape)}, "
                         "expected [d] and [d, d]")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("mu or sigma has values that are not finite")
    tolerance = 1e-5 * np.abs(sigma).max()  # a covariance in float32 is symmetric to 1e-6
    if np.abs(sigma - sigma.T).max() > tolerance or sigma.diagonal().min() < -tolerance:
        raise ValueError("sigma is not a covariance")
