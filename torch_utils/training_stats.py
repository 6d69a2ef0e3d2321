"""Statistics of a training run: count, mean and standard deviation, over steps and ranks.

`report` adds to sums that stay on the device; nothing waits for the GPU until a `Collector` reads
them, once a tick.
"""

import math

import torch

from torch_utils import distributed

# Per name: [count, sum, sum of squares] since the last collection, float64 on the value's device.
_sums: dict[str, torch.Tensor] = {}


@torch.no_grad()
def report(name: str, value: float | torch.Tensor) -> float | torch.Tensor:
    """Adds every element of `value` to the statistic `name`; returns `value`.

    Every rank must report the same names between two collections.
    """
    elements = torch.as_tensor(value)
    moments = torch.stack([
        torch.full([], elements.numel(), dtype=torch.float64, device=elements.device),
        elements.sum(dtype=torch.float64),
        elements.to(torch.float64).square().sum(),
    ])
    if name in _sums:
        _sums[name] += moments
    else:
        _sums[name] = moments
    return value


def resume(moments: dict[str, list[float]], device: torch.device) -> None:
    """Restores what a `Collector` had read before the run was stopped; call it on every rank."""
    for name, values in moments.items():
        own = values if distributed.get_rank() == 0 else [0.0] * len(values)
        _sums[name] = torch.tensor(own, dtype=torch.float64, device=device)


class Collector:
    """Collects what was reported since the last `update`, over all ranks."""

    def __init__(self, device: torch.device | str = "cpu"):
        self._device = torch.device(device)
        self.moments: dict[str, list[float]] = {}  # per name: count, sum, sum of squares
        _sums.clear()

    def update(self) -> None:
        """Reads and clears the sums; every rank must call it at the same step."""
        names = sorted(_sums)
        if not names:
            self.moments = {}
            return
        table = torch.stack([_sums[name].to(self._device) for name in names])
        distributed.all_reduce_sum_(table)
        self.moments = dict(zip(names, table.tolist(), strict=True))
        _sums.clear()

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Returns {name: {num, mean, std}}; std is the population's."""
        return {name: _summary(*moments) for name, moments in self.moments.items()}

    def mean(self, name: str) -> float:
        """Returns the mean of one statistic, NaN if nothing was reported."""
        return self.as_dict().get(name, {}).get("mean", math.nan)


def _summary(num: float, total: float, squares: float) -> dict[str, float]:
    if num == 0:
        return {"num": 0, "mean": math.nan, "std": math.nan}
    mean = total / num
    variance = squares / num - mean**2
    std = math.nan if math.isnan(variance) else math.sqrt(max(variance, 0.0))
    return {"num": int(num), "mean": mean, "std": std}
