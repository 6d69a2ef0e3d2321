"""Denoisers that wrap a network: how they call it, and which attributes they inherit."""

from typing import Any

import torch


def evaluate(
    net: Any, x: torch.Tensor, sigma: float | torch.Tensor, class_labels: torch.Tensor | None,
    condition: torch.Tensor | None,
) -> torch.Tensor:
    """Returns net(x, sigma, class_labels), with condition=... only if there is a condition.

    So denoisers without conditions need no such keyword.
    """
    condition_kwargs = {} if condition is None else {"condition": condition}
    return net(x, sigma, class_labels, **condition_kwargs)


class Wrapper:
    """Base of denoisers that wrap a network `net` and have all its attributes."""

    def __init__(self, net: Any):
        self.net = net

    def __getattr__(self, name: str) -> Any:
        if name == "net":  # not set yet, while unpickling
            raise AttributeError(name)
        return getattr(self.net, name)
