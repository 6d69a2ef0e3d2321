"""Rounding weights to b bits, to test how robust a network is (Xu et al. 2023, PFGM++, section 6).

    w weight    b bits    s step = (max w - min w)/(2^b - 1)    z zero point, a whole number

    z  = trunc(clip(-min w / s, 0, 2^b - 1))
    q  = clip(z + w/s, 0, 2^b - 1)
    w' = s (round(q) - z)

for each tensor. Levels are uniform, and 0 stays 0. Where min w <= 0 <= max w, a weight moves by at
most s/2, or by less than s next to min w, where truncating z clips it. (A tensor whose weights all
have one sign is clipped further, but no layer here is like that.)

Stochastic rounding replaces round(q) by floor(q) + [u < q - floor(q)] with u uniform in [0, 1), so
that the mean of w' is w except where values are clipped. Every u is drawn on the CPU from one
generator, tensor by tensor in the order of the module's parameters. A seed therefore gives the same
weights on every device.
"""

import torch

from sampling.sweeps import FULL_BITS

# Norms and embeddings are few, and errors in them change whole images. The layers at 32x32 were
# spared in the published experiment, whatever the resolution of the images.
_SPARED = ("norm", "affine", "map", "32")
_SEED_RANGE = 1 << 32  # PyTorch's generator on the CPU ignores higher bits of a seed


def is_quantised(name: str) -> bool:
    """Whether a parameter of this name is rounded: all weights except those of spared layers."""
    return "weight" in name and not any(part in name for part in _SPARED)


@torch.no_grad()
def quantise_(module: torch.nn.Module, bits: int, seed: int | None = None) -> None:
    """Rounds the weights of a module in place. With 32 bits or more, nothing changes.

    With a `seed`, rounding is stochastic. None rounds to the nearest level.

    Raises:
        ValueError: bits or seed out of range.
    """
    if bits < 1:
        raise ValueError(f"bits={bits}: must be 1 or more; {FULL_BITS} leaves weights unchanged")
    if seed is not None and not 0 <= seed < _SEED_RANGE:
        raise ValueError(f"rounding_seed={seed}: must be from 0 to {_SEED_RANGE - 1}")
    if bits >= FULL_BITS:
        return
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        if is_quantised(name):
            weight.copy_(quantised(weight, bits, rng))


def quantised(weight: torch.Tensor, bits: int, rng: torch.Generator | None = None) -> torch.Tensor:
    """Returns the weight rounded to 2^bits levels. A constant weight is returned unchanged.

    With `rng`, a generator on the CPU, rounding is stochastic.
    """
    top = 2**bits - 1
    low, high = weight.min(), weight.max()
    step = (high - low) / top
    if step == 0:
        return weight.clone()
    zero = (-low / step).clamp(0, top).trunc()
    place = (zero + weight / step).clamp(0, top)
    return step * ((place.round() if rng is None else _rounded_at_random(place, rng)) - zero)


def _rounded_at_random(place: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Returns each value rounded up or down at random, so that its mean is the value."""
    below = place.floor()
    u = torch.rand(place.shape, generator=rng, dtype=place.dtype).to(place.device)
    return below + (u < place - below)  # floor(place + u) could round up a whole number
