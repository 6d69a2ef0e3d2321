"""Points as data: their ideal denoiser, its ODE solved finely, and integrals over the noise."""

import math

import numpy as np
import scipy.stats
import torch

from pfgmpp.kernel import PerturbationKernel, per_image


class IdealFlow:
    """The ideal denoiser of points at one D, and the exact solution of its ODE down to `end`.

    `denoise` and `solve` are called as networks are: (x, sigma, labels). `solve` is the exact
    consistency function of the path from `end` on: f(x, end) = x.
    """

    def __init__(self, D, points, end, steps=40):
        self.kernel, self.points = PerturbationKernel(D), points
        self.end, self.steps = end, steps

    def denoise(self, x, sigma, labels=None):
        """Returns E[y|x]."""
        return self.kernel.posterior_mean(x, sigma, self.points)

    def solve(self, x, sigma, labels=None):
        """Returns the state at `end`, by RK4 in u = ln sigma, where dx/du = x - E[y|x]."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        u = per_image(sigma.expand(len(x)) if sigma.ndim == 0 else sigma, x.ndim).log()
        h = (math.log(self.end) - u) / self.steps

        def slope(x, u):
            return x - self.denoise(x, u.exp())

        for _ in range(self.steps):
            a = slope(x, u)
            b = slope(x + h / 2 * a, u + h / 2)
            c = slope(x + h / 2 * b, u + h / 2)
            d = slope(x + h * c, u + h)
            x, u = x + h / 6 * (a + 2 * b + 2 * c + d), u + h
        return x


def noise_on_a_line(D, reach=10.0, num=301):
    """Returns unit-scale noise n of one dimension and the weights of an integral over it.

    The law is Student's t, by scipy; with n = sinh(u) the trapezoid rule is all but exact.
    """
    u = np.linspace(-reach, reach, num)
    law = scipy.stats.norm() if math.isinf(D) else scipy.stats.t(D)
    weights = law.pdf(np.sinh(u)) * np.cosh(u) * (u[1] - u[0])
    return torch.from_numpy(np.sinh(u)), torch.from_numpy(weights)
