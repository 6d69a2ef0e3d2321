"""The density of an image that a denoiser implies, at every D.

    B batch    N = C*H*W data dimension    D(x; sigma) denoiser    J its Jacobian dD/dx [N, N]
    l = ln sigma    x_min, x_max the states at the lowest and the highest level

Along the probability-flow ODE, dx/dl = x - D(x; sigma), densities change by minus the divergence of
the right-hand side (Chen et al. 2018, arXiv 1806.07366; Song et al. 2021, arXiv 2011.13456, App.
D.2):

    d log p / dl = -(N - tr J(x; sigma))

    log p(x_min) = log p(x_max) + N ln(sigma_max/sigma_min) - int tr J dl

Only the last term is numerical. It is integrated together with the path, by the classical
Runge-Kutta method of order 4 in l. The equation is the same for every D, which enters only through
the prior: the density of the kernel at sigma_max (pfgmpp/kernel.py, `log_density`).

tr J is computed exactly by N products e_i^T J, or estimated without bias from a few e^T J e with
random signs e (Hutchinson 1989). Each product takes one backward pass of the network.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from pfgmpp.solvers import Denoiser

# (denoise, x, sigma, place) -> (D(x; sigma) [B, ...], tr J [B]); see `Evaluation`.
Traced = tuple[torch.Tensor, torch.Tensor]
Trace = Callable[[Denoiser, torch.Tensor, torch.Tensor, int], Traced]
LogDensity = Callable[[torch.Tensor], torch.Tensor]  # from states [B, ...] to [B]
EVALUATIONS_A_STEP = 4


@dataclass(frozen=True)
class Likelihood:
    """Densities of images, and the states at the end of their paths."""

    log_p: torch.Tensor  # at the lowest level, in nats, [B] float64
    end: torch.Tensor  # states at the highest level, [B, ...] float64


def log_likelihood(
    denoise: Denoiser, x: torch.Tensor, sigmas: Sequence[float], log_prior: LogDensity,
    trace: Trace, stride: int = 1,
) -> Likelihood:
    """Returns the log density of states x at the lowest of `sigmas`.

    Args:
        denoise: D(x, sigma) with sigma of shape [], differentiable in x.
        x: states [B, ...] at sigmas[0].
        sigmas: rising noise levels, at least two.
        log_prior: log density of states at sigmas[-1].
        trace: `exact_trace`, or a function that `hutchinson` returns. It gets the place of an
            evaluation in the grid: 2i at level i, 2i + 1 between levels i and i + 1.
        stride: 2 for every second level of a grid, so that places are those of the full grid.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64).log()
    x = x.to(torch.float64)
    integral = torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def slope(x: torch.Tensor, level: torch.Tensor, place: int) -> Traced:
        denoised, trace_of_J = trace(denoise, x, level.exp().to(x.device), place * stride)
        return x - denoised, trace_of_J

    for i in range(len(levels) - 1):
        h = (levels[i + 1] - levels[i]).item()
        middle = (levels[i + 1] + levels[i]) / 2
        dx1, t1 = slope(x, levels[i], 2 * i)
        dx2, t2 = slope(x + h / 2 * dx1, middle, 2 * i + 1)
        dx3, t3 = slope(x + h / 2 * dx2, middle, 2 * i + 1)
        dx4, t4 = slope(x + h * dx3, levels[i + 1], 2 * i + 2)
        x = x + h / 6 * (dx1 + 2 * dx2 + 2 * dx3 + dx4)
        integral += h / 6 * (t1 + 2 * t2 + 2 * t3 + t4)
    N = x[0].numel()
    log_p = log_prior(x) + N * (levels[-1] - levels[0]).item() - integral
    return Likelihood(log_p, x)


def exact_trace(
    denoise: Denoiser, x: torch.Tensor, sigma: torch.Tensor, place: int = 0
) -> Traced:
    """Returns (D(x; sigma), tr J [B] float64) by N backward passes."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        denoised = denoise(x, sigma)
        diagonal = []
        for i, values in enumerate(denoised.flatten(1).unbind(dim=1)):
            row, = torch.autograd.grad(values.sum(), x, retain_graph=True)
            diagonal.append(row.flatten(1)[:, i])
    return denoised.detach(), torch.stack(diagonal).sum(dim=0, dtype=torch.float64)


def hutchinson(probes_at: Callable[[int], Iterable[torch.Tensor]]) -> Trace:
    """Returns an unbiased estimator of the trace: e^T J e, averaged over probes.

    Args:
        probes_at: returns the probes for a place in the grid, each [B, ...] of -1 and 1. If probes
            differ between places, their errors average out along the path.
    """
    def trace(
        denoise: Denoiser, x: torch.Tensor, sigma: torch.Tensor, place: int
    ) -> Traced:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            denoised = denoise(x, sigma)
        total, count = 0.0, 0
        for e in probes_at(place):
            product, = torch.autograd.grad(denoised, x, e.to(denoised.dtype), retain_graph=True)
            total = total + (e * product).flatten(1).sum(dim=1, dtype=torch.float64)
            count += 1
        return denoised.detach(), total / count

    return trace
