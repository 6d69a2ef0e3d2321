r"""The perturbation kernel of PFGM++; Gaussian diffusion and PFGM are two values of its D.

    B batch    C H W image shape    N = C*H*W data dimension
    D number of augmented dimensions, any real in (0, inf]
    y clean image    n noise    x = y + n    sigma noise level    r = sigma*sqrt(D) radius

PFGM++ (Xu et al. 2023, arXiv 2302.04265, Eq. 4) embeds the data in N+D dimensions; the electric
field of a unit charge at y, seen at distance r in the augmented directions, weighs x by

    p_r(x|y)  ~  (|x-y|^2 + r^2)^(-(N+D)/2).

So |n|^2/r^2 follows BetaPrime(N/2, D/2) and the direction of n is uniform. That is a multivariate
Student-t law with D degrees of freedom and scale sigma, drawn from a normal vector z and an
independent chi-square variate c with D degrees of freedom as

    n = sigma * sqrt(D/c) * z.

As D -> inf the factor tends to 1, which is Gaussian diffusion (EDM). D = 1 is PFGM. The law is a
scale family in sigma for every D, so nothing else in a diffusion code has to know D: the
probability-flow ODE is always dx/dsigma = (x - E[y|x])/sigma, and a sampler starts at sigma_max
times a unit-scale draw.

Given its factor, the noise is Gaussian with variance v = sigma^2 D/c. So the law is a mixture of
Gaussians, where v is inverse-gamma with shape D/2 and scale D sigma^2/2. This prior is conjugate to
the Gaussian, so given the noise, v is again inverse-gamma, with shape (N+D)/2 and scale
(D sigma^2 + |n|^2)/2. A stochastic sampler needs this to stay within the family (pfgmpp/solvers.py,
`churn`).

For data points y_i the ideal denoiser E[y|x] = sum_i w_i y_i is known in closed form:

    w = softmax_i( -|x-y_i|^2 / (2 sigma^2) )                          D = inf
    w = softmax_i( -(N+D)/2 * log(1 + |x-y_i|^2 / (sigma^2 D)) )       finite D

It is the exact solution in tests and the target of stable-target-field training (Xu et al. 2023,
arXiv 2302.00670).
"""

import math

import torch


class PerturbationKernel:
    """Noise of PFGM++ for one D: how to draw it, its density, and the posterior mean it implies."""

    def __init__(self, D: float = math.inf):
        """Takes the number of augmented dimensions.

        Raises:
            ValueError: D is not in (0, inf].
            TypeError: D is not a number.
        """
        if not hasattr(D, "__float__"):
            raise TypeError(f"D={D!r}: must be a number")
        self.D = float(D)
        if not self.D > 0:
            raise ValueError(f"D={self.D:g}: must be a positive number or inf")

    def scale(self, batch: int, rng: torch.Generator) -> torch.Tensor:
        """Returns sqrt(D/c) for c ~ chi^2_D, [batch] float64 on the generator's device.

        At D = inf it is 1 and nothing is drawn. It is heavy-tailed below D = 2, and always positive
        and finite in float64.
        """
        ones = torch.ones([batch], dtype=torch.float64, device=rng.device)
        if math.isinf(self.D):
            return ones
        chi2 = 2 * torch._standard_gamma(ones * (self.D / 2), generator=rng)
        return (self.D / chi2).sqrt()

    def sample(
        self, shape: tuple[int, ...], sigma: float | torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Returns noise of `shape` [B, ...], float32 on the generator's device.

        The normal vector is drawn before the chi-square variate, so that one seed gives the same
        direction at every D.

        Args:
            shape: the batch size, then the shape of one image.
            sigma: noise level, a number or a tensor of shape [], [B] or [B, 1, 1, 1].
            rng: source of all randomness.
        """
        z = torch.randn(shape, generator=rng, device=rng.device)
        return scaled_noise(z, _level(sigma, rng.device, may_be_0=True), self.scale(shape[0], rng))

    def posterior_scale(
        self, noise: torch.Tensor, sigma: float | torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Returns a draw of `scale`'s sqrt(D/c) given the noise that it made, [B] float64.

        With u ~ chi^2_(N+D) it is sqrt((D + |n|^2/sigma^2) / u). At D = inf it is 1 and nothing is
        drawn.

        Args:
            noise: sigma*sqrt(D/c)*z, of shape [B, ...], on the generator's device.
            sigma: noise level, a number or a tensor of shape [], [B] or [B, 1, 1, 1].
            rng: source of all randomness.
        """
        ones = torch.ones([len(noise)], dtype=torch.float64, device=rng.device)
        if math.isinf(self.D):
            return ones
        sigma = _level(sigma, noise.device).flatten()
        squared = (noise.to(torch.float64).flatten(1) / sigma.unsqueeze(1)).square().sum(dim=1)
        N = noise[0].numel()
        chi2 = 2 * torch._standard_gamma(ones * ((N + self.D) / 2), generator=rng)
        return ((self.D + squared) / chi2).sqrt()

    def log_density(self, noise: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Returns log p(n) of noise [B, ...] of level `sigma`, in nats, [B] float64.

        It includes the normalisation, Gamma((N+D)/2) / (Gamma(D/2) (pi D)^(N/2)) for finite D.
        """
        sigma = _level(sigma, noise.device).flatten()
        squared = noise.to(torch.float64).flatten(1).square().sum(dim=1)  # [B]
        N = noise[0].numel()
        return self._log_profile(squared / sigma.square(), N) - N * sigma.log() + self._constant(N)

    def posterior_mean(
        self, x: torch.Tensor, sigma: float | torch.Tensor, data: torch.Tensor,
        eligible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the ideal denoiser E[y|x] for y uniform over `data`, [B, ...] in x's dtype.

        Args:
            x: perturbed images [B, ...].
            sigma: noise level, a number or a tensor of shape [], [B] or [B, 1, 1, 1].
            data: clean images [M, ...].
            eligible: as for `posterior_weights`.
        """
        weights = self.posterior_weights(x, sigma, data, eligible)
        return (weights @ data.to(torch.float64).flatten(1)).to(x.dtype).reshape(x.shape)

    def posterior_weights(
        self, x: torch.Tensor, sigma: float | torch.Tensor, data: torch.Tensor,
        eligible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the posterior probability of each of `data` given x, [B, M] float64.

        Distances come from a matrix product, |x|^2 + |y|^2 - 2 x.y, whose cancellation is harmless
        in float64. No [B, M, N] array is formed.

        Args:
            x: perturbed images [B, ...].
            sigma: noise level, a number or a tensor of shape [], [B] or [B, 1, 1, 1].
            data: clean images [M, ...].
            eligible: bool [B, M], the points over which y is uniform for each x, at least one. None
                means all of them.
        """
        sigma = _level(sigma, x.device).reshape(-1, 1)
        points = data.to(torch.float64).flatten(1)  # [M, N]
        queries = x.to(torch.float64).flatten(1)  # [B, N]
        squared = queries.square().sum(dim=1, keepdim=True) + points.square().sum(dim=1)
        squared = torch.addmm(squared, queries, points.T, alpha=-2).clamp_(min=0)  # [B, M]
        logits = self._log_profile(squared / sigma.square(), points.shape[1])
        if eligible is not None:
            logits = logits.masked_fill(~eligible, -math.inf)
        return logits.softmax(dim=1)

    def _log_profile(self, squared: torch.Tensor, N: int) -> torch.Tensor:
        """Returns the log density of unit-scale noise of squared norm `squared` minus that at 0."""
        if math.isinf(self.D):
            return -squared / 2
        return -(N + self.D) / 2 * torch.log1p(squared / self.D)

    def _constant(self, N: int) -> float:
        """Returns the log density of unit-scale noise at 0.

        Beyond D = 1e4 it is computed with the first terms of Stirling's series, because
        ln Gamma(a + N/2) - ln Gamma(a), with a = D/2, would lose its digits to cancellation.
        """
        gaussian = -N / 2 * math.log(2 * math.pi)
        if math.isinf(self.D):
            return gaussian
        a, m = self.D / 2, N / 2
        if self.D < 1e4:
            growth = math.lgamma(a + m) - math.lgamma(a) - m * math.log(a)
        else:
            growth = (a + m - 0.5) * math.log1p(m / a) - m + (1 / (a + m) - 1 / a) / 12
        return gaussian + growth


def _level(sigma: float | torch.Tensor, device: torch.device, *, may_be_0: bool = False
           ) -> torch.Tensor:
    """Returns noise levels as float64 on the device.

    Tensors are not checked, since in every training step that would wait for the GPU.

    Raises:
        ValueError: a number is negative, NaN, or 0 where it must be positive.
        TypeError: they are not numbers.
    """
    try:
        levels = torch.as_tensor(sigma, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"sigma={sigma!r}: must be a number or a tensor of numbers") from None
    if not isinstance(sigma, torch.Tensor):
        bad = levels[~(levels >= 0 if may_be_0 else levels > 0)]
        if len(bad):
            allowed = "0 or more" if may_be_0 else "positive"
            raise ValueError(f"sigma={bad[0]:g}: must be {allowed}")
    return levels.to(device)


def scaled_noise(
    z: torch.Tensor, sigma: float | torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Returns sigma * scale * z for each image, computed in float64 and rounded once to z's dtype.

    A product beyond the dtype's range, which can occur if D is far below 1, saturates at the
    largest finite value.
    """
    sigma = per_image(torch.as_tensor(sigma, dtype=torch.float64, device=z.device), z.ndim)
    limit = torch.finfo(z.dtype).max
    product = sigma * per_image(scale, z.ndim) * z.to(torch.float64)
    return product.clamp_(-limit, limit).to(z.dtype)


def per_image(value: torch.Tensor, ndim: int) -> torch.Tensor:
    """Reshapes a value per image, of shape [], [B] or [B, 1, 1, 1], to [B or 1, 1, ...]."""
    return value.reshape(-1, *[1] * (ndim - 1))
