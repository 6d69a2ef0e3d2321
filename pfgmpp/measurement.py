r"""Restoration of an image from a measurement with Gaussian noise of known level.

    B batch    N = C*H*W    D augmented dimensions    y clean image    x = y + n state
    v measurement    A linear operator    s_v its noise level    D(x) the denoiser E[y|x]

    v = A y + s_v e        e ~ Normal(0, I)

Sampling y given v needs the denoiser E[y|x,v] in place of E[y|x]. With it, the equation dx/dsigma =
(x - E[y|x,v])/sigma samples the data distribution given v, at every D. We use

    E[y|x,v] = D(x) + rho^2 grad_x log p(v|x)
    rho^2 = sigma^2                                    D = inf
    rho^2 = (sigma^2 D + |x - D(x)|^2) / (N + D)       finite D

At D = inf this is Tweedie's formula, which is exact. At finite D the kernel is a mixture of
Gaussians with variance u, and rho^2 is approximately the mean of u given x: the variance of the
noise in this state, which can be far from sigma^2.

p(v|x) is not known either. Both methods approximate y given x by a Gaussian with mean D(x) and the
variance that Gaussian data of standard deviation sigma_data would have (Song et al. 2023,
Pseudoinverse-guided diffusion models, ICLR),

    c = rho^2 sigma_data^2 / (rho^2 + sigma_data^2)        a the gain: A A^T = a on what is measured

    guidance      grad_x log p(v|x) = J^T A^T (v - A D(x)) / (s_v^2 + a c)      J = dD/dx
    projection    E[y|x,v] = D(x) + c A^T (v - A D(x)) / (s_v^2 + a c)

Guidance differentiates the network (Chung et al. 2023, DPS, arXiv 2209.14687), which takes two to
three times the time and memory. J carries the measurement over to correlated pixels. At high levels
the J of a trained network may be hundreds of times too large. For Gaussian data the correction is
as long as that of projection. One more than twice as long would overshoot by more than the original
error, and later steps by even more. So the correction of each image is shortened to at most twice
that length. Projection needs no derivative (Wang et al. 2023, DDNM, arXiv 2212.00490): it sets the
measured part and leaves the rest to later steps. Both are approximations at every D.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pfgmpp.kernel import per_image
from pfgmpp.wrapping import Wrapper, evaluate

METHODS = ("guidance", "projection")
_MOST_STEPS = 2.0  # maximum length of guidance's correction over that of projection


class Operator(NamedTuple):
    """A linear operator A with A A^T = gain on measured values, and 0 elsewhere."""

    apply: Callable[[torch.Tensor], torch.Tensor]  # A y, of [B, C, H, W]
    adjoint: Callable[[torch.Tensor], torch.Tensor]  # A^T v
    gain: float = 1.0
    factor: int = 1  # the sides of y over those of v

    def inverse(self, v: torch.Tensor) -> torch.Tensor:
        """Returns the smallest image whose measurement is v: A^T v / gain."""
        return self.adjoint(v) / self.gain


def denoise() -> Operator:
    """Returns the operator of denoising: everything is measured."""
    return Operator(lambda y: y, lambda v: v)


def inpaint(mask: torch.Tensor) -> Operator:
    """Returns the operator of inpainting.

    Args:
        mask: 1 where pixels are measured, 0 elsewhere; it must broadcast to the images.
    """
    return Operator(lambda y: mask * y, lambda v: mask * v)


def downsample(factor: int) -> Operator:
    """Returns the operator of super-resolution: means over squares of `factor` pixels a side.

    Raises:
        ValueError: `factor` is not a whole number of at least 2.
    """
    if type(factor) is not int or factor < 2:
        raise ValueError(f"downsample:{factor}: must be a whole number of at least 2")

    def adjoint(v: torch.Tensor) -> torch.Tensor:
        return v.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1) / factor**2

    return Operator(lambda y: torch.nn.functional.avg_pool2d(y, factor), adjoint,
                    1 / factor**2, factor)


def noise_variance(
    x: torch.Tensor, denoised: torch.Tensor, sigma: float | torch.Tensor, D: float
) -> torch.Tensor:
    """Returns rho^2 of states x [B, ...] and their denoised images, [B or 1, 1, ...] float64."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
    square = per_image(sigma.square(), x.ndim)
    if math.isinf(D):
        return square
    distance = (x.to(torch.float64) - denoised.to(torch.float64)).flatten(1).square().sum(dim=1)
    return (square * D + per_image(distance, x.ndim)) / (x[0].numel() + D)


def shortened(x: torch.Tensor, longest: torch.Tensor) -> torch.Tensor:
    """Returns vectors x [B, ...], each shortened to at most the length of that in `longest`."""
    own, most = (v.flatten(1).norm(dim=1, dtype=torch.float64) for v in (x, longest))
    return x * per_image(torch.where(own > most, most / own, 1.0), x.ndim)


class MeasuredDenoiser(Wrapper):
    """A denoiser of measured images, for any sampler, with the attributes of its network.

    Args:
        net: a preconditioned network, or a denoiser with such attributes.
        operator: A.
        v: the measurements, one for each image of a batch.
        sigma_v: s_v, in the network's scale; 0 means a measurement without noise.
        method: one of METHODS.
        sigma_data: standard deviation of the data; None means the network's, or 0.5.

    Raises:
        ValueError: the method is unknown, the noise level is negative, or the network is a few-step
            network.
    """

    def __init__(self, net: Any, operator: Operator, v: torch.Tensor, sigma_v: float,
                 method: str = "guidance", sigma_data: float | None = None):
        if method not in METHODS:
            raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
        if not 0 <= sigma_v < math.inf:
            raise ValueError(f"sigma_v={sigma_v:g}: must be 0 or more, and finite")
        few_step = getattr(net, "few_step", None)
        if few_step is not None:
            raise ValueError(f"a few-step network ({few_step.method}) is not a denoiser that a "
                             "measurement could correct; give the denoiser from which it was made")
        super().__init__(net)
        self.operator, self.v, self.sigma_v, self.method = operator, v, sigma_v, method
        self.data_variance = (getattr(net, "sigma_data", 0.5) if sigma_data is None
                              else sigma_data) ** 2

    def __call__(
        self, x: torch.Tensor, sigma: float | torch.Tensor,
        class_labels: torch.Tensor | None = None, *, condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns an approximation of E[y|x,v], [B, C, H, W]; arguments as for networks."""
        if self.method == "projection":
            denoised = evaluate(self.net, x, sigma, class_labels, condition).to(x.dtype)
            c = self._variance(noise_variance(x, denoised, sigma, self._D))
            return denoised + (c * self._innovation(denoised, c)).to(x.dtype)
        with torch.inference_mode(False), torch.enable_grad():
            # Copies, because tensors made in inference mode can't be differentiated.
            start, sigma, class_labels, condition = (
                value.clone() if isinstance(value, torch.Tensor) else value
                for value in (x.detach(), sigma, class_labels, condition))
            start.requires_grad_()
            denoised = evaluate(self.net, start, sigma, class_labels, condition).to(x.dtype)
            with torch.no_grad():
                rho2 = noise_variance(start, denoised, sigma, self._D)
                c = self._variance(rho2)
                weighted = self._innovation(denoised, c)
            gradient, = torch.autograd.grad(denoised, start, weighted)
        correction = shortened(rho2 * gradient, _MOST_STEPS * c * weighted)
        return denoised.detach() + correction.to(x.dtype)

    @property
    def _D(self) -> float:
        return getattr(self.net, "D", math.inf)

    def _variance(self, rho2: torch.Tensor) -> torch.Tensor:
        """Returns c."""
        return rho2 * self.data_variance / (rho2 + self.data_variance)

    def _innovation(self, denoised: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Returns A^T (v - A D(x)) / (s_v^2 + a c), in the dtype of `denoised`."""
        missing = self.v.to(denoised) - self.operator.apply(denoised)
        total = self.sigma_v**2 + self.operator.gain * c
        return self.operator.adjoint(missing / total.to(denoised.dtype))
