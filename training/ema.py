"""Exponential moving average of the weights, with a half-life in images and a ramp-up.

    beta = 0.5^(batch / halflife),   halflife = min(ema_halflife, ramp-up ratio * images so far)

(Karras et al. 2022, arXiv 2206.00364, appendix F.2). The ramp-up keeps the initial weights from
lingering in the average; at the very first step beta = 0 and the average is the network itself.
"""

import torch

RAMPUP_RATIO = 0.05
_TINY_HALFLIFE = 1e-8


def ema_beta(
    cur_nimg: int, batch: int, halflife_nimg: float, rampup_ratio: float | None = RAMPUP_RATIO
) -> float:
    """Returns the decay of one step of `batch` images after `cur_nimg` images.

    `rampup_ratio` None means no ramp-up (transfer learning starts from a good average).
    """
    if rampup_ratio is not None:
        halflife_nimg = min(halflife_nimg, cur_nimg * rampup_ratio)
    return 0.5 ** (batch / max(halflife_nimg, _TINY_HALFLIFE))


@torch.no_grad()
def update_ema_(
    ema: torch.nn.Module, net: torch.nn.Module, beta: float, skip: torch.Tensor
) -> None:
    """Moves the parameters of `ema` towards those of `net` by 1 - beta; copies the buffers.

    `skip` is a 0-d float tensor on the parameters' device: 1 leaves the parameters as they are,
    without a round trip to the host.
    """
    averages, params = list(ema.parameters()), list(net.parameters())
    steps = torch._foreach_sub(params, averages)
    torch._foreach_mul_(steps, (1 - beta) * (1 - skip))
    torch._foreach_add_(averages, steps)
    for average, buffer in zip(ema.buffers(), net.buffers(), strict=True):
        average.copy_(buffer)
