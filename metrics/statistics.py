"""Statistics of the features of images, accumulated over batches and ranks.

    d number of features    n number of images    f_i [d] features of image i

`FeatureStatistics` are mean and covariance,

    mu = 1/n sum_i f_i        sigma = 1/(n-1) sum_i (f_i - mu)(f_i - mu)^T

in float64. Each batch is centred on its own mean before it is squared, and batches
and ranks are merged by the update of Chan, Golub and LeVeque (1983),

    M = M_a + M_b + n_a n_b/(n_a + n_b) (mu_b - mu_a)(mu_b - mu_a)^T,    sigma = M/(n-1).

So large terms never cancel. The formula sum f f^T - n mu mu^T would lose log10(mean^2/variance)
digits, and could give a constant feature a negative variance.

`FeatureBank` keeps the features themselves, for metrics that compare images one by one.
`ClassStatistics` sum class probabilities for the Inception score. Both put images in the order of
their numbers, so that neither the batches nor the number of ranks changes a result. `ClassHits`
count the images that show their intended class.

Each can be saved as `arrays` and restored from them. Rank 0 then has all that was appended so far,
and the other ranks are empty.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from torch_utils import distributed as dist

NUM_SPLITS = 10  # Salimans et al. 2016
SPLIT_SEED = 2020  # that of torch-fidelity, so that scores agree


class Sums(Protocol):
    """Statistics of the features of images; `count` is the number appended on this rank."""

    count: int

    def merge_to_rank0(self) -> None:
        """Moves what all ranks have to rank 0 and empties the others. Every rank must call it."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the statistics so far, on rank 0 after `merge_to_rank0`."""

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restores what `arrays` returned. An append of no images must have fixed all lengths.

        Raises:
            ValueError: the arrays are not of this form.
        """


def _checked(arrays: Mapping[str, np.ndarray], name: str, shape: Sequence[int | None]
             ) -> torch.Tensor:
    """Returns an array as a tensor; raises ValueError if its shape differs. None is any length."""
    array = arrays.get(name)
    if array is None or len(array.shape) != len(shape) or any(
            length not in (None, given) for length, given in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name}: not of shape {list(shape)}")
    return torch.from_numpy(array)


class FeatureStatistics:
    """Mean and covariance of all features appended so far."""

    def __init__(self):
        self.count = 0
        self._mean: torch.Tensor | None = None  # [d]
        self._scatter: torch.Tensor | None = None  # [d, d], M above

    @torch.no_grad()
    def append(self, features: torch.Tensor) -> None:
        """Adds features [n, d] of any float type; the sums stay on the features' device.

        With n = 0 this only fixes d, which a rank without images needs before `all_reduce`.
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
        # The outer product of the merge is one more row of the matrix product.
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

    def merge_to_rank0(self) -> None:
        self.all_reduce()
        if dist.get_rank() != 0:
            self.count = 0
            self._mean.zero_()
            self._scatter.zero_()

    def arrays(self) -> dict[str, np.ndarray]:
        return {"count": np.array(self.count), "mean": self._mean.cpu().numpy(),
                "scatter": self._scatter.cpu().numpy()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        d = len(self._mean)
        self.count = int(_checked(arrays, "count", []))
        self._mean.copy_(_checked(arrays, "mean", [d]))
        self._scatter.copy_(_checked(arrays, "scatter", [d, d]))

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


class FeatureBank:
    """The features of every image, on the CPU."""

    def __init__(self):
        self._features: list[torch.Tensor] = []
        self._numbers: list[int] = []

    @property
    def count(self) -> int:
        return len(self._numbers)

    def append(self, features: torch.Tensor, numbers: Sequence[int]) -> None:
        """Adds features [n, d] of the images of these numbers."""
        self._features.append(features.to("cpu", torch.float32))
        self._numbers.extend(numbers)

    def gather(self) -> torch.Tensor | None:
        """Returns the features of all ranks [n, d] in the order of their numbers.

        They are returned on rank 0, and None on the others. Every rank must call it.
        """
        self.merge_to_rank0()
        return self._features[0] if dist.get_rank() == 0 else None

    def merge_to_rank0(self) -> None:
        features = dist.gather_to_rank0(torch.cat(self._features))
        numbers = [number for part in dist.gather_objects(self._numbers) for number in part]
        if features is None:
            self._features, self._numbers = [self._features[0][:0]], []
            return
        order = np.argsort(numbers, kind="stable")
        self._features = [torch.cat(features)[torch.from_numpy(order)]]
        self._numbers = [numbers[i] for i in order]

    def arrays(self) -> dict[str, np.ndarray]:
        return {"features": torch.cat(self._features).numpy(), "numbers": np.array(self._numbers)}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        numbers = _checked(arrays, "numbers", [None]).tolist()
        features = _checked(arrays, "features", [len(numbers), self._features[0].shape[1]])
        self._features, self._numbers = [features], numbers


class ClassStatistics:
    """Sums of class probabilities p(c|i) over the images of each of `NUM_SPLITS` random splits.

    `count` is the total number of images, and `seed` assigns them to splits.
    """

    def __init__(self, count: int, seed: int = SPLIT_SEED):
        splits = min(NUM_SPLITS, count)
        shuffled = np.random.RandomState(seed).permutation(count)
        self._split = np.empty(count, np.int64)
        for k in range(splits):
            self._split[shuffled[k * count // splits:(k + 1) * count // splits]] = k
        self._num = torch.zeros(splits, dtype=torch.float64)
        self._sum: torch.Tensor | None = None  # [splits, classes], of p
        self._negative_entropy = torch.zeros(splits, dtype=torch.float64)  # sum of p log p

    @property
    def count(self) -> int:
        return int(self._num.sum())

    def append(self, logits: torch.Tensor, numbers: Sequence[int]) -> None:
        """Adds logits [n, classes] of the images of these numbers."""
        log_p = logits.to("cpu", torch.float64).log_softmax(1)
        p = log_p.exp()
        if self._sum is None:
            self._sum = p.new_zeros([len(self._num), p.shape[1]])
        split = torch.from_numpy(self._split[list(numbers)])
        self._num.index_add_(0, split, p.new_ones(len(split)))
        self._sum.index_add_(0, split, p)
        self._negative_entropy.index_add_(0, split, (p * log_p).sum(1))

    def all_reduce(self) -> None:
        """Adds up the sums of all ranks, each of which must call this once, at the end."""
        for tensor in (self._num, self._sum, self._negative_entropy):
            tensor.copy_(sum(dist.gather_objects(tensor)))

    def merge_to_rank0(self) -> None:
        self.all_reduce()
        if dist.get_rank() != 0:
            for tensor in (self._num, self._sum, self._negative_entropy):
                tensor.zero_()

    def arrays(self) -> dict[str, np.ndarray]:
        return {"num": self._num.numpy(), "sum": self._sum.numpy(),
                "negative_entropy": self._negative_entropy.numpy()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._num.copy_(_checked(arrays, "num", self._num.shape))
        self._sum.copy_(_checked(arrays, "sum", self._sum.shape))
        self._negative_entropy.copy_(
            _checked(arrays, "negative_entropy", self._negative_entropy.shape))

    def score(self) -> tuple[float, float]:
        """Returns exp(E_i KL(p(.|i) | p(.))), its mean and standard deviation over the splits."""
        p = self._sum / self._num[:, None]
        marginal = torch.xlogy(p, p).sum(1)
        scores = (self._negative_entropy / self._num - marginal).exp()
        return scores.mean().item(), scores.std(correction=0).item()


class ClassHits:
    """The number of images that a classifier recognises as their intended class.

    `asked` holds the intended classes of all images, in the order of their numbers.
    """

    def __init__(self, asked: Sequence[int]):
        self._asked = torch.as_tensor(np.asarray(asked, np.int64))
        self._num = torch.zeros(2, dtype=torch.int64)  # images, and recognised images

    @property
    def count(self) -> int:
        return int(self._num[0])

    def append(self, logits: torch.Tensor, numbers: Sequence[int]) -> None:
        """Adds logits [n, classes] of the images of these numbers."""
        hits = logits.argmax(1).cpu() == self._asked[list(numbers)]
        self._num += torch.tensor([len(hits), int(hits.sum())])

    def all_reduce(self) -> None:
        """Adds up the counts of all ranks, each of which must call this once, at the end."""
        self._num.copy_(sum(dist.gather_objects(self._num)))

    def merge_to_rank0(self) -> None:
        self.all_reduce()
        if dist.get_rank() != 0:
            self._num.zero_()

    def arrays(self) -> dict[str, np.ndarray]:
        return {"num": self._num.numpy()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._num.copy_(_checked(arrays, "num", [2]))

    def share(self) -> float:
        """Returns the share of the images that were recognised."""
        return self._num[1].item() / self.count
