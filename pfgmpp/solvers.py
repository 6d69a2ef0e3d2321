"""Solvers of the probability-flow ODE, as functions of (denoise, x, sigmas).

    x state [B, ...]    D the denoiser    sigmas [n + 1] from high to low, ending in 0
    t time, where a schedule sets sigma(t) and the state's scale s(t)

    dx/dsigma = (x - D(x; sigma)) / sigma
    dx/dt = (sigma'/sigma + s'/s) x - (sigma' s/sigma) D(x/s; sigma)      with a schedule

(Karras et al. 2022, arXiv 2206.00364, Eq. 4 and Algorithm 1). The first is the second with
sigma = t and s = 1. They are the same for any number of augmented dimensions, so solvers do not
depend on it. A further function, `before_step`, changes the state before each step, for churn or
the noise of a robustness study. With a schedule, solvers get times in place of sigmas.
"""

import math
from collections.abc import Callable

import torch

from dnnlib.registry import Registry
from pfgmpp.schedules import Schedule

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BeforeStep = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
Slope = Callable[[Denoiser, torch.Tensor, torch.Tensor], torch.Tensor]
RandnLike = Callable[[torch.Tensor], torch.Tensor]
NoiseScale = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Karras et al. 2022, Algorithm 2: more churn in one step would add more noise than is present.
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


def heun_step(
    denoise: Denoiser, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor,
    slope: Slope = sigma_slope,
) -> torch.Tensor:
    """Returns the states at `sigma_next` > 0 that Heun's method finds from those at `sigma`.

    Levels may also be each image's own, [B, 1, ...].
    """
    first = slope(denoise, x, sigma)
    second = slope(denoise, x + (sigma_next - sigma) * first, sigma_next)
    return x + (sigma_next - sigma) * (first + second) / 2


def heun(
    denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor,
    before_step: BeforeStep | None = None, slope: Slope = sigma_slope,
    step: Callable[..., torch.Tensor] = heun_step,
) -> torch.Tensor:
    """Returns the solution at the last of `sigmas`, by second-order steps: 2 evaluations each.

    See Karras et al. 2022, Algorithm 2. A step to 0 is first order and takes 1 evaluation, because
    the slope at 0 is 0/0. Arguments are as for `euler`; `step` replaces `heun_step`.
    """
    last = _step_to_zero(sigmas)
    for i in range(len(sigmas) - 1):
        x, sigma = before_step(x, i) if before_step else (x, sigmas[i])
        if i == last:
            x = x + (sigmas[i + 1] - sigma) * slope(denoise, x, sigma)
        else:
            x = step(denoise, x, sigma, sigmas[i + 1], slope)
    return x


def ppfm(
    denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor,
    before_step: BeforeStep | None = None, slope: Slope = sigma_slope,
) -> torch.Tensor:
    """Returns the result of `heun` with both evaluations of a step at its first noise level.

    The published code of conditional PPFM samples in this way (Hein et al. 2023, arXiv 2312.09754).
    It is not a second-order method, and is provided only to reproduce their results.
    """

    def step(denoise, x, sigma, sigma_next, slope):
        return heun_step(lambda state, _: denoise(state, sigma), x, sigma, sigma_next, slope)

    return heun(denoise, x, sigmas, before_step, slope, step)


def ending_in_euler(solve: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns `heun` or `euler` with a first-order last step, which takes 1 evaluation.

    The solvers already do so if that step leads to 0.
    """

    def solved(
        denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor,
        before_step: BeforeStep | None = None, slope: Slope = sigma_slope,
    ) -> torch.Tensor:
        last = len(sigmas) - 2
        x = solve(denoise, x, sigmas[:-1], before_step, slope)
        before_last = before_step and (lambda x, _: before_step(x, last))
        return euler(denoise, x, sigmas[-2:], before_last, slope)

    return solved


def ipndm(
    denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor,
    before_step: BeforeStep | None = None, order: int = 3,
) -> torch.Tensor:
    """Returns the solution at the last of `sigmas`, by Adams-Bashforth steps: n evaluations.

        x_(i+1) = x_i + (sigma_(i+1) - sigma_i) sum_j b_j d_(i-j)        d = (x - D)/sigma

    with the coefficients b of equal steps even if the steps differ, and of a lower order while
    fewer than `order` slopes are known (Liu et al. 2022, arXiv 2202.09778; Zhang and Chen 2023,
    arXiv 2204.13902). On EDM's grid this is second order for `order` >= 2, and with few evaluations
    it is better than the coefficients of the true steps. The step to 0 is like the others.

    Args:
        denoise: D(x, sigma) with sigma of shape [].
        x: the state at sigmas[0].
        sigmas: noise levels on x's device.
        before_step: called with (x, i) before each step; it must not change the state.
        order: 1 to 4; 1 is Euler's method.
    """
    slopes: list[torch.Tensor] = []  # the newest first
    for i in range(len(sigmas) - 1):
        x, sigma = before_step(x, i) if before_step else (x, sigmas[i])
        slopes = [sigma_slope(denoise, x, sigma), *slopes][:order]
        weights = ADAMS_BASHFORTH[len(slopes)]
        x = x + (sigmas[i + 1] - sigma) * sum(w * d for w, d in zip(weights, slopes, strict=True))
    return x


# Coefficients for equal steps, by the number of slopes; that of the newest slope is first.
ADAMS_BASHFORTH = {
    1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def dpmpp2m(
    denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor,
    before_step: BeforeStep | None = None,
) -> torch.Tensor:
    """Returns the solution at the last of `sigmas`, by DPM-Solver++(2M): n evaluations.

    See Lu et al. 2022, arXiv 2211.01095, Algorithm 2. In l = -ln sigma the equation is
    dx/dl = D - x, whose linear part is solved exactly:

        x_(i+1) = e^-h x_i + (1 - e^-h) (D_i + (D_i - D_(i-1))/(2 r))

    with h = l_(i+1) - l_i and r = (l_i - l_(i-1))/h. The first step uses only D_0. The step to 0
    returns D. Arguments are as for `ipndm`.
    """
    levels, last = sigmas.log().neg(), _step_to_zero(sigmas)
    known: list[torch.Tensor] = []  # D of the levels so far, the newest first
    for i in range(len(sigmas) - 1):
        x, sigma = before_step(x, i) if before_step else (x, sigmas[i])
        known = [denoise(x, sigma), *known][:2]
        if i == last:
            return known[0]
        x = _extrapolated(x, levels, i, *known)
    return x


def unipc(
    denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor,
    before_step: BeforeStep | None = None,
) -> torch.Tensor:
    """Returns the solution at the last of `sigmas`, by UniPC of order 2: n evaluations.

    See Zhao et al. 2023, arXiv 2302.04867, for the denoised image, with B2(h) = e^h - 1. A step
    predicts like `dpmpp2m`. The evaluation at its end, which the next step needs anyway, corrects
    it. In

        x_(i+1) = e^-h x_i + int_0^h e^(l-h) D(l) dl        l = -ln sigma, counted from level i

    D is then the parabola through D_(i-1), D_i and D_(i+1), which raises the order to 3. In the
    first step it is the mean of D_0 and D_1. The step to 0 returns D. Arguments are as for `ipndm`.
    """
    levels, last, start = sigmas.log().neg(), _step_to_zero(sigmas), x
    known: list[torch.Tensor] = []  # D of the levels so far, the newest first
    for i in range(len(sigmas) - 1):
        x, sigma = before_step(x, i) if before_step else (x, sigmas[i])
        known = [denoise(x, sigma), *known][:3]
        if i == last:
            return known[0]
        if i > 0:
            x = _corrected(start, levels, i, *known)
        start, x = x, _extrapolated(x, levels, i, *known[:2])
    return x


def _step_to_zero(sigmas: torch.Tensor) -> int | None:
    """Returns the number of the step to 0, or None. It waits for the GPU, so call it first."""
    return len(sigmas) - 2 if sigmas[-1] == 0 else None


def _extrapolated(
    x: torch.Tensor, levels: torch.Tensor, i: int, denoised: torch.Tensor,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the state at level i + 1 from x at level i, by D there and at i - 1.

    D is taken as constant, with the value extrapolated from both to the middle of the step.
    """
    h = levels[i + 1] - levels[i]
    if before is not None:
        denoised = denoised + (denoised - before) * h / (2 * (levels[i] - levels[i - 1]))
    return (-h).exp() * x - torch.expm1(-h) * denoised


def _corrected(
    x: torch.Tensor, levels: torch.Tensor, i: int, denoised: torch.Tensor, before: torch.Tensor,
    earlier: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the state at level i from x at level i - 1, by D at both and at i - 2."""
    h = levels[i] - levels[i - 1]
    # The integrals of e^(l-h) l^k from 0 to h, for k = 0, 1, 2.
    constant = -torch.expm1(-h)
    linear = h - constant
    square = h**2 - 2 * linear
    if earlier is None:
        return (-h).exp() * x + constant * (before + denoised) / 2
    h_before = levels[i - 1] - levels[i - 2]
    slope = (denoised - before) / h
    bend = (slope - (before - earlier) / h_before) / (h + h_before)
    return (-h).exp() * x + constant * before + linear * (slope - bend * h) + square * bend


# Solvers of the equation along any schedule, and solvers of the equation in sigma.
SOLVERS: Registry[Callable] = Registry("solver", {"euler": euler, "heun": heun, "ppfm": ppfm})
MULTISTEP: Registry[Callable] = Registry(
    "solver", {"ipndm": ipndm, "dpmpp2m": dpmpp2m, "unipc": unipc})


def num_evaluations(solver: str | None, num_steps: int) -> int:
    """Returns how often a solver evaluates the network; None means Heun's method.

    Solvers of plugins are run on a single number to count their evaluations.
    """
    added = {name: registry[name] for registry in (SOLVERS, MULTISTEP) for name in registry.added}
    if solver in added:
        return _counted(added[solver], num_steps)
    return 2 * num_steps - 1 if solver in (None, "heun", "ppfm") else num_steps


def _counted(solve: Callable, num_steps: int) -> int:
    """Returns how often a solver evaluates D(x) = 0 in `num_steps` steps, the last one to 0."""
    count = 0

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return torch.zeros_like(x)

    levels = torch.arange(num_steps, -1, -1, dtype=torch.float64)
    solve(denoise, torch.ones([1, 1, 1, 1], dtype=torch.float64), levels)
    return count


def watched(
    before_step: BeforeStep | None, sigmas: torch.Tensor,
    watch: Callable[[torch.Tensor, torch.Tensor], None],
) -> BeforeStep:
    """Returns `before_step` with `watch(x, sigmas[i])` called on the state before it."""

    def before(x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        watch(x, sigmas[i])
        return before_step(x, i) if before_step else (x, sigmas[i])

    return before


def blended(
    before_step: BeforeStep | None, sigmas: torch.Tensor, blend: Callable[[torch.Tensor],
                                                                          torch.Tensor],
) -> BeforeStep:
    """Returns a `before_step` that applies `blend` to the result of the previous step."""

    def before(x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = blend(x) if i else x
        return before_step(x, i) if before_step else (x, sigmas[i])

    return before


def disturbed(
    before_step: BeforeStep | None, sigmas: torch.Tensor, randn_like: RandnLike, *,
    noise_alpha: float, schedule: Schedule | None = None,
) -> BeforeStep:
    """Returns a `before_step` that adds noise_alpha * sigma * Normal(0, I) before the given one.

    This is a deliberate error of the sampler (Xu et al. 2023, PFGM++, section 6): the level is
    unchanged, so the state no longer belongs to it. Arguments are as for `churn`.
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

    See Karras et al. 2022, Algorithm 2: gamma = min(S_churn/n, sqrt(2) - 1) if
    S_min <= sigma <= S_max, else 0. Fresh noise is Gaussian, which preserves the marginals if the
    state's noise is Gaussian. If that is a mixture of Gaussians, `noise_scale` draws the scale of
    the state's noise, estimated as x - D(x; sigma), and the fresh noise gets the same scale. This
    takes one more evaluation in each churned step. Noise and scale are drawn at every step, even if
    they are not used, so that the draws of a seed do not depend on S_min and S_max.

    Args:
        sigmas: the solver's noise levels, or times if there is a schedule, on x's device.
        randn_like: draws a standard normal tensor like its argument.
        S_churn: strength; 0 is deterministic.
        S_min: lower end of the levels that are churned.
        S_max: upper end of the levels that are churned.
        S_noise: factor on the standard deviation of the fresh noise.
        round_sigma: maps the raised levels to those that the network knows.
        schedule: how levels and the state's scale depend on time.
        denoise: D(x, sigma); needed with `noise_scale`.
        noise_scale: (n, sigma) -> [B], the scale of noise n of level sigma; None means 1.
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
    # For a level that isn't churned, a schedule's inverse would only add a rounding error.
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
