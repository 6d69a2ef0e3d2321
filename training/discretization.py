"""Grids of noise levels for the samplers, in float64, from high to low, ending in 0.

    EDM:  sigma_i = (smax^(1/rho) + i/(n-1) * (smin^(1/rho) - smax^(1/rho)))^rho,  i = 0 .. n-1

(Karras et al. 2022, arXiv 2206.00364, Eq. 5).
"""

from typing import Protocol

import torch


class HasSigmaRange(Protocol):
    """What a grid needs to know of a network."""

    sigma_min: float
    sigma_max: float

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the nearest noise levels that the network knows."""


def edm_sigmas(
    net: HasSigmaRange,
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> torch.Tensor:
    """Returns the grid [num_steps + 1] float64 on the CPU, clipped to the network's range.

    One step means the single level sigma_max, then 0.

    Raises:
        ValueError: no step, or levels that are not 0 < sigma_min <= sigma_max.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: must be at least 1")
    sigma_min = max(sigma_min, net.sigma_min)
    sigma_max = min(sigma_max, net.sigma_max)
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(
            f"sigma_min={sigma_min:g}, sigma_max={sigma_max:g}: "
            f"need 0 < sigma_min <= sigma_max (the network knows {net.sigma_min:g} .. "
            f"{net.sigma_max:g})"
        )
    if not rho > 0:
        raise ValueError(f"rho={rho:g}: must be positive")
    fraction = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = net.round_sigma((high + fraction * (low - high)) ** rho)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def vp_sigma(t: torch.Tensor, beta_d: float, beta_min: float) -> torch.Tensor:
    """Returns the noise level of the variance-preserving schedule at time t."""
    return ((beta_d * t**2 / 2 + beta_min * t).exp() - 1).sqrt()


def vp_sigma_inv(sigma: torch.Tensor, beta_d: float, beta_min: float) -> torch.Tensor:
    """Returns the time at which the variance-preserving schedule reaches sigma."""
    return ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d


def iddpm_levels(M: int, C_1: float, C_2: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns the levels u_0 .. u_M of the improved-DDPM cosine schedule, falling to 0."""
    j = torch.arange(M + 1, dtype=dtype)
    abar = (torch.pi / 2 * j / (M * (C_2 + 1))).sin() ** 2
    u = torch.zeros(M + 1, dtype=dtype)
    for k in range(M, 0, -1):
        ratio = (abar[k - 1] / abar[k]).clamp(min=C_1)
        u[k - 1] = ((u[k] ** 2 + 1) / ratio - 1).sqrt()
    return u
