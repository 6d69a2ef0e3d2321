"""Distillation into a generator with an auxiliary denoiser, at every D (ipfm).

    x = G(K_D(sigma_0), sigma_0) generated image    n = K_D(sigma)    T, S at (x + n, sigma)

The auxiliary denoiser S learns the distribution of the generator G, and the teacher T knows that of
the data. If they agree at every level, the two distributions are equal. In turn

    S minimises  lambda(sigma) |S(x + n, sigma) - x|^2
    G minimises  w [ (T - S).(T - x) - alpha |T - S|^2 ]

with lambda = 1/sigma^2 + 1/sigma_data^2 and ln sigma ~ Normal(P_mean, P_std). The weight w is one
over the mean absolute error |x - T| of an image, treated as a constant. The gradient of the second
loss reaches G through x and through the inputs of T and S, whose weights get no gradient. With
alpha = 1/2 the loss is half of |T - x|^2 - |S - x|^2, that of inverse Poisson flow matching
(Shlenskii and Korotin 2025, arXiv 2509.22454). With alpha = 1 it is that of score identity
distillation (Zhou et al. 2024, arXiv 2404.04057). Its expectation is 0 everywhere but its gradient
is not, and it is more stable. Only the kernel's noise depends on D, because the denoiser is E[y|x]
at every D.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pfgmpp.kernel import per_image, scaled_noise
from pfgmpp.loss import EDMLoss, LossDraws


@dataclasses.dataclass(frozen=True)
class GeneratorDraws:
    """The variates of a batch: unit-scale latents, and the noise that is added."""

    z: torch.Tensor  # [B, C, H, W] float32, standard normal
    scale: torch.Tensor  # [B] float64, the kernel's sqrt(D/c)
    noise: LossDraws

    def __getitem__(self, index: slice) -> "GeneratorDraws":
        return GeneratorDraws(self.z[index], self.scale[index], self.noise[index])

    @staticmethod
    def cat(parts: Sequence["GeneratorDraws"]) -> "GeneratorDraws":
        """Returns the concatenated variates of several batches."""
        return GeneratorDraws(torch.cat([part.z for part in parts]),
                              torch.cat([part.scale for part in parts]),
                              LossDraws.cat([part.noise for part in parts]))


class GeneratorLoss(EDMLoss):
    """The two losses of distillation with an auxiliary denoiser.

    Args (beyond EDMLoss's): sigma_init: level of the generator's input. alpha: see above.
    """

    def __init__(self, sigma_init: float, alpha: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.sigma_init, self.alpha = sigma_init, alpha

    def draw(self, shape: tuple[int, ...], rng: torch.Generator, augment_pipe: Any = None
             ) -> GeneratorDraws:
        """Returns the variates for images of `shape` [B, C, H, W]."""
        z = torch.randn(shape, generator=rng, device=rng.device)
        noise = super().draw(shape, rng)
        return GeneratorDraws(z, self.kernel.scale(shape[0], rng), noise)

    def generate(self, generator: Callable, draws: GeneratorDraws,
                 labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Returns the images G(K_D(sigma_init), sigma_init), [B, C, H, W]."""
        latents = scaled_noise(draws.z, self.sigma_init, draws.scale)
        return generator(latents, torch.full_like(draws.noise.sigma, self.sigma_init), labels,
                         **kwargs)

    def of_auxiliary(self, auxiliary: Callable, x: torch.Tensor, noise: LossDraws,
                     labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Returns lambda |S(x + n) - x|^2 per pixel, [B, C, H, W]; x gets no gradient."""
        x = x.detach()
        sigma = per_image(noise.sigma, x.ndim)
        denoised = auxiliary(x + scaled_noise(noise.z, noise.sigma, noise.scale), sigma, labels,
                             **kwargs)
        return self.weight(sigma) * (denoised - x).square()

    def of_generator(self, teacher: Callable, auxiliary: Callable, x: torch.Tensor,
                     noise: LossDraws, labels: torch.Tensor | None = None, *,
                     is_weighted: bool = True, **kwargs: Any) -> torch.Tensor:
        """Returns w [(T - S).(T - x) - alpha |T - S|^2] of each image, [B], differentiable in x.

        Without `is_weighted` w is 1.
        """
        sigma = per_image(noise.sigma, x.ndim)
        noisy = x + scaled_noise(noise.z, noise.sigma, noise.scale)
        true = teacher(noisy, sigma, labels, **kwargs)
        fake = auxiliary(noisy, sigma, labels, **kwargs)
        gap = true - fake
        loss = (gap * (true - x) - self.alpha * gap.square()).flatten(1).sum(dim=1)
        if not is_weighted:
            return loss
        error = (x - true).detach().abs().flatten(1).mean(dim=1)
        return loss / error.clamp(min=1e-5)

    def through_generator(self, teacher: Callable, auxiliary: Callable, x: torch.Tensor,
                          noise: LossDraws, labels: torch.Tensor | None = None, **kwargs: Any
                          ) -> torch.Tensor:
        """Returns `of_generator`, [B], whose gradient reaches only G's weights, through x.

        The gradient in x is computed first, which frees the graphs of T and S.
        """
        leaf = x.detach().requires_grad_()
        loss = self.of_generator(teacher, auxiliary, leaf, noise, labels, **kwargs)
        [slope] = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach() + ((x - x.detach()) * slope).flatten(1).sum(dim=1)
