"""Weights rounded to b bits, to see how robust a network is (Xu et al. 2023, PFGM++, section 6).

    w weight    b bits    s step = (max w - min w)/(2^b - 1)    z zero point, a whole number

    z  = trunc(clip(-min w / s, 0, 2^b - 1))
    w' = s (round(clip(z + w/s, 0, 2^b - 1)) - z)

per tensor: uniform, and 0 stays 0. Where min w <= 0 <= max w, a weight moves by at most s/2, and by
less than s next to min w, where truncating z cuts off. (A tensor of one sign is cut off further; no
layer here is one.)
"""

import torch

from sampling.sweeps import FULL_BITS

# Norms and embeddings are few, and an error in them moves whole images; the layers at 32x32 were
# spared by the published experiment, whatever the resolution of the image.
_SPARED = ("norm", "affine", "map", "32")


def is_quantised(name: str) -> bool:
    """Says whether a parameter of this name is rounded: weights, but for the spared layers."""
    return "weight" in name and not any(part in name for part in _SPARED)


@torch.no_grad()
def quantise_(module: torch.nn.Module, bits: int) -> None:
    """Rounds the weights of a module, in place; from 32 bits on nothing changes.

    Raises:
        ValueError: bits out of range.
    """
    if bits < 1:
        raise ValueError(f"bits={bits}: must be 1 or more ({FULL_BITS} leaves weights as they are)")
    if bits >= FULL_BITS:
        return
    for name, weight in module.named_parameters():
        if is_quantised(name):
            weight.copy_(quantised(weight, bits))


def quantised(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the weight rounded to 2^bits levels; a constant one as it is."""
    top = 2**bits - 1
    low, high = weight.min(), weight.max()
    step = (high - low) / top
    if step == 0:
        return weight.clone()
    zero = (-low / step).clamp(0, top).trunc()
    return step * ((zero + weight / step).clamp(0, top).round() - zero)
