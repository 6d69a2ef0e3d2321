"""Denoisers around a network: how it is called, and what they take over from it."""

from typing import Any

import torch


def evaluate(
    net: Any, x: torch.Tensor, sigma: float | torch.Tensor, class_labels: torch.Tensor | None,
    condition: torch.Tensor | None,
) -> torch.Tensor:
    """Returns net(x, sigma, class_labels), told the condition only where there is one.

    Denoisers without conditions need not have such a keyword.
    """
    condition_kwargs = {} if condition is None else {"condition": condition}
    return net(x, sigma, class_labels, **condition_kwargs)


class Wrapper:
    """Base of denoisers that wrap a network `net`, whose attributes are theirs too."""

    def __init__(self, net: Any):
        self.net = net

    def __getattr__(self, name: str) -> Any:
        if name == "net":  # not there yet, while unpickling
            raise AttributeError(name)
        return getattr(self.net, name)
