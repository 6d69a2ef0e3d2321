"""Solvers of the probability-flow ODE  dx/dsigma = (x - D(x; sigma)) / sigma.

    x state [B, ...]    sigmas [n + 1] from high to low, ending in 0    D the denoiser

The equation is the same for every number of augmented dimensions, so solvers never see it. A
solver is a function (denoise, x, sigmas); what happens to the state before each step (churn, or the
noise of a robustness study) is one more function, `before_step`.
"""

import math
from collections.abc import Callable

import torch

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BeforeStep = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
RandnLike = Callable[[torch.Tensor], torch.Tensor]

# Karras et al. 2022, Algorithm 2: more churn in one step would add noise above the signal.
_MAX_GAMMA = math.sqrt(2) - 1


def euler(
    denoise: Denoiser,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    before_step: BeforeStep | None = None,
) -> torch.Tensor:
    """Returns the solution at the last of `sigmas`, by first-order steps: n evaluations.

    Args:
        denoise: D(x, sigma) with sigma of shape [].
        x: the state at sigmas[0].
        sigmas: noise levels on x's device.
        before_step: (x, i) -> (x_hat, sigma_hat), the state and the level from which step i starts.
    """
    for i in range(len(sigmas) - 1):
        x, sigma = before_step(x, i) if before_step else (x, sigmas[i])
        x = x + (sigmas[i + 1] - sigma) * _slope(denoise, x, sigma)
    return x


def heun(
    denoise: Denoiser,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    before_step: BeforeStep | None = None,
) -> torch.Tensor:
    """Returns the solution at the last of `sigmas`, by second-order steps: 2n - 1 evaluations.

    Karras et al. 2022, Algorithm 2. The step to 0 is first order, for the slope there is 0/0.
    Arguments as for `euler`.
    """
    last = len(sigmas) - 2
    for i in range(last + 1):
        x, sigma = before_step(x, i) if before_step else (x, sigmas[i])
        sigma_next = sigmas[i + 1]
        slope = _slope(denoise, x, sigma)
        x_next = x + (sigma_next - sigma) * slope
        if i < last:
            slope = (slope + _slope(denoise, x_next, sigma_next)) / 2
            x_next = x + (sigma_next - sigma) * slope
        x = x_next
    return x


def _slope(denoise: Denoiser, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return (x - denoise(x, sigma)) / sigma


def churn(
    sigmas: torch.Tensor,
    randn_like: RandnLike,
    *,
    S_churn: float,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    round_sigma: Callable[[torch.Tensor], torch.Tensor] = lambda sigma: sigma,
) -> BeforeStep:
    """Returns a `before_step` that raises the noise level by a factor 1 + gamma with fresh noise.

    Karras et al. 2022, Algorithm 2: gamma = min(S_churn/n, sqrt(2) - 1) where
    S_min <= sigma <= S_max, else 0. The noise is Gaussian and so keeps the marginals of D = inf
    alone. It is drawn at every step, also where it is not used, so that the draws of a seed do not
    depend on S_min and S_max.

    Args:
        sigmas: the solver's noise levels, on the state's device.
        randn_like: draws a standard normal tensor like its argument.
        S_churn: strength; 0 is deterministic.
        S_min: lower end of the levels that are churned.
        S_max: upper end of the levels that are churned.
        S_noise: factor on the standard deviation of the fresh noise.
        round_sigma: maps the raised levels to those that the network knows.
    """
    levels = sigmas[:-1]
    gamma = min(S_churn / len(levels), _MAX_GAMMA)
    inside = (levels >= S_min) & (levels <= S_max)
    raised = round_sigma(levels + gamma * inside * levels)
    std = (raised.square() - levels.square()).clamp(min=0).sqrt() * S_noise

    def before_step(x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x + std[i] * randn_like(x), raised[i]

    return before_step
