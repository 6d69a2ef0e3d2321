"""Noise levels over time: schedules, and the grids of levels that samplers step through.

    t time    sigma noise level    s scale of the state    n number of steps    i = 0 .. n-1

A schedule defines how sigma and s depend on t (Karras et al. 2022, arXiv 2206.00364, Table 1):

    vp      sigma = sqrt(exp(beta_d t^2/2 + beta_min t) - 1)
    ve      sigma = sqrt(t)
    linear  sigma = t

The scale is s = 1/sqrt(1 + sigma^2) or s = 1 for each of them.

A grid is n levels from high to low, float64, to which the sampler appends 0:

    edm     (smax^(1/rho) + i/(n-1) (smin^(1/rho) - smax^(1/rho)))^rho
    vp      sigma_vp(1 + i/(n-1) (epsilon_s - 1))
    ve      smax (smin/smax)^(i/(n-1))
    iddpm   every ((len-1)/(n-1))-th of the improved-DDPM levels between smin and smax
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

EPSILON_S = 1e-3  # smallest time of the VP sampler (Song et al. 2021)
IDDPM_LEVELS = {"M": 1000, "C_1": 0.001, "C_2": 0.008}  # Nichol and Dhariwal 2021
_HIGHEST_GIVEN = 1e6  # highest user-defined level; beyond it, noise of a small D exceeds float32
_VP_BETA_D, _VP_BETA_MIN = 19.9, 0.1  # Song et al. 2021

TimeFunction = Callable[[torch.Tensor], torch.Tensor]


class HasSigmaRange(Protocol):
    """The attributes of a network that a grid needs."""

    sigma_min: float
    sigma_max: float

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the nearest noise levels that the network knows."""


# ------------------------------------------------------------------------------------- formulas


def vp_sigma(t: torch.Tensor, beta_d: float, beta_min: float) -> torch.Tensor:
    """Returns the noise level of the variance-preserving schedule at time t."""
    return ((beta_d * t**2 / 2 + beta_min * t).exp() - 1).sqrt()


def vp_sigma_inv(sigma: torch.Tensor, beta_d: float, beta_min: float) -> torch.Tensor:
    """Returns the time at which the variance-preserving schedule reaches sigma."""
    return ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d


def vp_betas(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Returns (beta_d, beta_min) with sigma_min at time EPSILON_S and sigma_max at time 1."""
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / EPSILON_S - high) / (EPSILON_S - 1)
    return beta_d, high - beta_d / 2


def vp_sigma_range(epsilon_t: float, beta_d: float, beta_min: float) -> tuple[float, float]:
    """Returns the float32 noise levels at times epsilon_t and 1, equal on every machine."""
    t = torch.tensor([epsilon_t, 1.0], device="cpu")  # also while building on "meta"
    low, high = (_rounded(torch.exp, beta_d * t**2 / 2 + beta_min * t) - 1).sqrt().tolist()
    return low, high


def iddpm_levels(M: int, C_1: float, C_2: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns the levels u_0 .. u_M of the improved-DDPM cosine schedule, falling to 0.

    The published levels follow from abar in float32, whose last digit near 1 affects the third
    digit of the smallest levels. So abar is always float32 here; `dtype` is only the type of the
    recursion.
    """
    j = torch.arange(M + 1, dtype=torch.float32, device="cpu")  # also while building on "meta"
    abar = _rounded(torch.sin, torch.pi / 2 * j / M / (C_2 + 1)) ** 2
    ratios = (abar[:-1] / abar[1:]).clamp(min=C_1)
    u = torch.zeros(M + 1, dtype=dtype, device="cpu")
    for k in range(M, 0, -1):
        u[k - 1] = ((u[k] ** 2 + 1) / ratios[k - 1] - 1).sqrt()
    return u


def _rounded(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Returns function(x), computed in float64 and rounded once to x's type.

    The float32 sine and exponential of vector libraries differ in the last digit from one CPU to
    another; those of float64, rounded to float32, do not.
    """
    return function(x.double()).to(x.dtype)


# ------------------------------------------------------------------------------------ schedules


@dataclasses.dataclass(frozen=True)
class Schedule:
    """sigma and s as functions of time, with the derivatives and inverse that solvers need."""

    sigma: TimeFunction
    sigma_deriv: TimeFunction
    sigma_inv: TimeFunction
    scale: TimeFunction
    scale_deriv: TimeFunction


def make_schedule(name: str, scaling: str, sigma_min: float, sigma_max: float) -> Schedule:
    """Returns the schedule 'vp', 've' or 'linear' with the scaling 'vp' or 'none'.

    Args:
        name: how sigma depends on t.
        scaling: 'vp' keeps the variance of the state at 1 for data of unit variance.
        sigma_min: level at time EPSILON_S; used by 'vp'.
        sigma_max: level at time 1; used by 'vp'.
    """
    sigma, sigma_deriv, sigma_inv = _SIGMAS[name](sigma_min, sigma_max)
    if scaling == "none":
        return Schedule(sigma, sigma_deriv, sigma_inv, torch.ones_like, torch.zeros_like)

    def scale(t: torch.Tensor) -> torch.Tensor:
        return (1 + sigma(t) ** 2).rsqrt()

    def scale_deriv(t: torch.Tensor) -> torch.Tensor:
        return -sigma(t) * sigma_deriv(t) * scale(t) ** 3

    return Schedule(sigma, sigma_deriv, sigma_inv, scale, scale_deriv)


def _vp(sigma_min: float, sigma_max: float) -> tuple[TimeFunction, TimeFunction, TimeFunction]:
    beta_d, beta_min = vp_betas(sigma_min, sigma_max)

    def sigma(t: torch.Tensor) -> torch.Tensor:
        return vp_sigma(t, beta_d, beta_min)

    def sigma_deriv(t: torch.Tensor) -> torch.Tensor:
        return (beta_min + beta_d * t) / 2 * (sigma(t) + 1 / sigma(t))

    return sigma, sigma_deriv, lambda level: vp_sigma_inv(level, beta_d, beta_min)


def _ve(sigma_min: float, sigma_max: float) -> tuple[TimeFunction, TimeFunction, TimeFunction]:
    return torch.sqrt, lambda t: t.rsqrt() / 2, torch.square


def _linear(sigma_min: float, sigma_max: float) -> tuple[TimeFunction, TimeFunction, TimeFunction]:
    return torch.clone, torch.ones_like, torch.clone


_SIGMAS = {"vp": _vp, "ve": _ve, "linear": _linear}
SCHEDULES = tuple(_SIGMAS)
SCALINGS = ("vp", "none")

# ---------------------------------------------------------------------------------------- grids


def edm_sigmas(
    net: HasSigmaRange, num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0,
    rho: float = 7.0,
) -> torch.Tensor:
    """Returns EDM's grid of [num_steps + 1] levels, float64 on the CPU, ending in 0.

    The levels are clipped to the network's range and rounded to those that it knows. One step
    means the single level sigma_max, then 0.

    Raises:
        ValueError: there is no step, or the levels are not 0 < sigma_min <= sigma_max.
    """
    return sigma_grid("edm", net, num_steps, sigma_min, sigma_max, rho)[0]


def sigma_grid(
    name: str, net: HasSigmaRange, num_steps: int, sigma_min: float | None = None,
    sigma_max: float | None = None, rho: float = 7.0,
) -> tuple[torch.Tensor, float, float]:
    """Returns (the grid `name` like `edm_sigmas`, sigma_min, sigma_max), both after clipping.

    None for a level means the grid's own published value.

    Raises:
        ValueError: as for `edm_sigmas`.
    """
    low, high = default_range(name)
    low = max(low if sigma_min is None else sigma_min, net.sigma_min)
    high = min(high if sigma_max is None else sigma_max, net.sigma_max)
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: must be at least 1")
    if not rho > 0:
        raise ValueError(f"rho={rho:g}: must be positive")
    for which, level in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if level is not None and not level > 0:
            raise ValueError(f"{which}={level:g}: must be positive")
    if not 0 < low <= high < math.inf:
        raise ValueError(
            f"sigma_min={low:g}, sigma_max={high:g}: need 0 < sigma_min <= sigma_max, finite "
            f"(the network's range is {net.sigma_min:g} to {net.sigma_max:g})")
    steps, last = torch.arange(num_steps, dtype=torch.float64), max(num_steps - 1, 1)
    sigmas = net.round_sigma(_GRIDS[name](steps, last, low, high, rho))
    return torch.cat([sigmas, sigmas.new_zeros(1)]), low, high


def given_sigmas(net: HasSigmaRange, sigmas: Sequence[float]) -> torch.Tensor:
    """Returns user-defined levels like `edm_sigmas`: float64 on the CPU, ending in 0.

    They are rounded to those that the network knows.

    Raises:
        ValueError: they don't fall from level to level, or the network doesn't know them.
    """
    falls = sigmas and all(a > b for a, b in zip(sigmas, [*sigmas[1:], 0.0], strict=True))
    if not falls or sigmas[0] > _HIGHEST_GIVEN:
        some = [f"{s:g}" for s in sigmas]
        some = [*some[:3], "...", some[-1]] if len(some) > 5 else some
        raise ValueError(f"sigmas={','.join(some)}: must be falling noise levels, above 0 and at "
                         f"most {_HIGHEST_GIVEN:g}; the step to 0 is added automatically")
    if sigmas[0] > net.sigma_max or sigmas[-1] < net.sigma_min:
        raise ValueError(f"sigmas={sigmas[0]:.9g} to {sigmas[-1]:.9g}: the network knows levels "
                         f"from {net.sigma_max:.9g} to {net.sigma_min:.9g}; give levels in this "
                         "range")
    levels = net.round_sigma(torch.tensor(sigmas, dtype=torch.float64))
    return torch.cat([levels, levels.new_zeros(1)])


def default_range(name: str) -> tuple[float, float]:
    """Returns the published (sigma_min, sigma_max) of a grid."""
    if name == "vp":
        times = torch.tensor([EPSILON_S, 1.0], dtype=torch.float64)
        low, high = vp_sigma(times, _VP_BETA_D, _VP_BETA_MIN).tolist()
        return low, high
    return {"edm": (0.002, 80.0), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0)}[name]


def _edm_grid(i: torch.Tensor, last: int, low: float, high: float, rho: float) -> torch.Tensor:
    return (high ** (1 / rho) + i / last * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def _vp_grid(i: torch.Tensor, last: int, low: float, high: float, rho: float) -> torch.Tensor:
    return vp_sigma(1 + i / last * (EPSILON_S - 1), *vp_betas(low, high))


def _ve_grid(i: torch.Tensor, last: int, low: float, high: float, rho: float) -> torch.Tensor:
    return high * (low / high) ** (i / last)


def _iddpm_grid(i: torch.Tensor, last: int, low: float, high: float, rho: float) -> torch.Tensor:
    levels = iddpm_levels(**IDDPM_LEVELS, dtype=torch.float64)
    inside = levels[(levels >= low) & (levels <= high)]
    if len(inside) == 0:
        raise ValueError(f"no iddpm noise level lies between {low:g} and {high:g}")
    return inside[((len(inside) - 1) / last * i).round().to(torch.int64)]


_GRIDS = {"vp": _vp_grid, "ve": _ve_grid, "iddpm": _iddpm_grid, "edm": _edm_grid}
DISCRETIZATIONS = tuple(_GRIDS)
