"""Solvers of the probability-flow ODE, as functions of (denoise, x, sigmas).

    x state [B, ...]    D the denoiser    sigmas [n + 1] from high to low, ending in 0
    t time, where a schedule sets sigma(t) and the state's scale s(t)

    dx/dsigma = (x - D(x; sigma)) / sigma
    dx/dt = (sigma'/sigma + s'/s) x - (sigma' s/sigma) D(x/s; sigma)      with a schedule

(Karras et al. 2022, arXiv 2206.00364, Eq. 4 and Algorithm 1). The first is the second with
sigma = t and s = 1. They are the same for every number of augmented dimensions, so solvers never
see it. What happens to the state before each step (churn, or the noise of a robustness study) is
one more function, `before_step`; with a schedule, times stand where sigmas stand without.
"""

import math
from collections.abc import Callable

import torch

from pfgmpp.schedules import Schedule

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BeforeStep = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
Slope = Callable[[Denoiser, torch.Tensor, torch.Tensor], torch.Tensor]
RandnLike = Callable[[torch.Tensor], torch.Tensor]
NoiseScale = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Karras et al. 2022, Algorithm 2: more churn in one step would add noise above the signal.
_MAX_GAMMA = math.sqrt(2) - 1


def sigma_slope(denoise: Denoiser, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Returns dx/dsigma."""
    return (x - denoise(x, sigma)) / sigma


def schedule_slope(schedule: Schedule) -> Slope:
    """Returns dx/dt along a schedule, as a function (denoise, x, t)."""

    def slope(denoise: Denoiser, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma, s = schedule.sigma(t), schedule.scale(t)
        growth = schedule.sigma_deriv(t) / sigma
        shrink = schedule.scale_deriv(t) / s
        return (growth + shrink) * x - growth * s * denoise(x / s, sigma)

    return slope


def euler(
    denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor,
    before_step: BeforeStep | None = None, slope: Slope = sigma_slope,
) -> torch.Tensor:
    """Returns the solution at the last of `sigmas`, by first-order steps: n evaluations.

    Args:
        denoise: D(x, sigma) with sigma of shape [].
        x: the state at sigmas[0].
        sigmas: noise levels, or times, on x's device.
        before_step: (x, i) -> (x_hat, sigma_hat), the state and the level where step i starts.
        slope: right-hand side of the equation.
    """
    for i in range(len(sigmas) - 1):
        x, sigma = before_step(x, i) if before_step else (x, sigmas[i])
        x = x + (sigmas[i + 1] - sigma) * slope(denoise, x, sigma)
    return x


def heun(
    denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor,
    before_step: BeforeStep | None = None, slope: Slope = sigma_slope,
) -> torch.Tensor:
    """Returns the solution at the last of `sigmas`, by second-order steps: 2n - 1 evaluations.

    Karras et al. 2022, Algorithm 2. The step to 0 is first order, for the slope there is 0/0.
    Arguments as for `euler`.
    """
    last = len(sigmas) - 2
    for i in range(last + 1):
        x, sigma = before_step(x, i) if before_step else (x, sigmas[i])
        sigma_next = sigmas[i + 1]
        first = slope(denoise, x, sigma)
        x_next = x + (sigma_next - sigma) * first
        if i < last:
            second = slope(denoise, x_next, sigma_next)
            x_next = x + (sigma_next - sigma) * (first + second) / 2
        x = x_next
    return x


SOLVERS = {"euler": euler, "heun": heun}


def watched(
    before_step: BeforeStep | None, sigmas: torch.Tensor,
    watch: Callable[[torch.Tensor, torch.Tensor], None],
) -> BeforeStep:
    """Returns `before_step` with `watch(x, sigmas[i])` called on the state before it."""

    def before(x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        watch(x, sigmas[i])
        return before_step(x, i) if before_step else (x, sigmas[i])

    return before


def disturbed(
    before_step: BeforeStep | None, sigmas: torch.Tensor, randn_like: RandnLike, *,
    noise_alpha: float, schedule: Schedule | None = None,
) -> BeforeStep:
    """Returns a `before_step` that adds noise_alpha * sigma * Normal(0, I) before the given one.

    An error of the sampler on purpose (Xu et al. 2023, PFGM++, section 6): the level stays as it
    is, so the state no longer belongs to it. Arguments as for `churn`.
    """
    starts = sigmas[:-1]
    std = noise_alpha * (schedule.sigma(starts) * schedule.scale(starts) if schedule else starts)

    def before(x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + std[i] * randn_like(x)
        return before_step(x, i) if before_step else (x, sigmas[i])

    return before


def churn(
    sigmas: torch.Tensor, randn_like: RandnLike, *, S_churn: float, S_min: float = 0.0,
    S_max: float = math.inf, S_noise: float = 1.0,
    round_sigma: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    schedule: Schedule | None = None, denoise: Denoiser | None = None,
    noise_scale: NoiseScale | None = None,
) -> BeforeStep:
    """Returns a `before_step` that raises the noise level by a factor 1 + gamma with fresh noise.

    Karras et al. 2022, Algorithm 2: gamma = min(S_churn/n, sqrt(2) - 1) where
    S_min <= sigma <= S_max, else 0. Fresh noise is Gaussian, which keeps the marginals of Gaussian
    noise. Where the state's noise is a mixture of Gaussians, `noise_scale` draws by what its own
    was scaled, given x - D(x; sigma) for the noise, and the fresh one is scaled by the same: one
    more evaluation in each step that is churned. Noise and scale are drawn at every step, also
    where they are not used, so that the draws of a seed do not depend on S_min and S_max.

    Args:
        sigmas: the solver's noise levels, or times where there is a schedule, on x's device.
        randn_like: draws a standard normal tensor like its argument.
        S_churn: strength; 0 is deterministic.
        S_min: lower end of the levels that are churned.
        S_max: upper end of the levels that are churned.
        S_noise: factor on the standard deviation of the fresh noise.
        round_sigma: maps the raised levels to those that the network knows.
        schedule: how levels and the state's scale depend on time.
        denoise: D(x, sigma); needed with `noise_scale`.
        noise_scale: (n, sigma) -> [B], the scale of noise n of level sigma; None is 1 for all.
    """
    starts = sigmas[:-1]
    levels = schedule.sigma(starts) if schedule else starts
    gamma = min(S_churn / len(levels), _MAX_GAMMA)
    inside = (levels >= S_min) & (levels <= S_max)
    raised = round_sigma(levels + gamma * levels * inside)
    if schedule is None:
        raised_starts, std, ratio = raised, 1.0, torch.ones_like(levels)
        scales = ratio
    else:
        raised_starts = schedule.sigma_inv(raised)
        raised, std = schedule.sigma(raised_starts), schedule.scale(raised_starts)
        scales = schedule.scale(starts)
        ratio = std / scales
    # A level that isn't churned comes back from a schedule's inverse off by rounding alone.
    is_churned = inside & (gamma > 0)
    std = std * is_churned * (raised.square() - levels.square()).clamp(min=0).sqrt() * S_noise

    is_raised = (std > 0).tolist()

    def before_step(x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        fresh = randn_like(x)
        if noise_scale is not None:
            noise = x / scales[i]
            if is_raised[i]:
                noise = noise - denoise(noise, levels[i])
            fresh = noise_scale(noise, levels[i]).reshape(-1, *[1] * (x.ndim - 1)) * fresh
        return ratio[i] * x + std[i] * fresh, raised_starts[i]

    return before_step
