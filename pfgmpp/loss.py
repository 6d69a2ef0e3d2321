"""The denoising loss and its three published noise-level laws: EDM, VE, VP.

    B batch    C channels    H W pixels    y clean image    n noise    sigma noise level

Every loss is  weight(sigma) * (D_theta(y + n; sigma) - y)^2  per pixel, with n from the
perturbation kernel of any D; the laws differ in how sigma is drawn and in the weight
(Karras et al. 2022, arXiv 2206.00364, Table 1):

    EDM   ln sigma ~ Normal(P_mean, P_std)                          1/sigma^2 + 1/sigma_data^2
    VE    ln sigma ~ uniform between ln sigma_min and ln sigma_max   1/sigma^2
    VP    t ~ uniform between epsilon_t and 1, sigma = sigma_VP(t)   1/sigma^2

A stable target (Xu et al. 2023, arXiv 2302.00670) replaces y by its posterior mean given x over a
reference batch. It has less variance, and in the limit the same minimiser. The posterior must be
conditioned on all other inputs of the network. With one-hot labels it is E[y|x,k], the mean over
the images of the same class k. No other image shares a condition image or augmentation labels, so
a reference batch is not allowed with either.

The draws of image i of a step do not depend on how the batch is split over ranks and rounds of
gradient accumulation. Draws are made in blocks of DRAW_BLOCK consecutive images. Each block has its
own seed, and every rank draws only the blocks that it needs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dnnlib.registry import Registry
from pfgmpp.kernel import PerturbationKernel, per_image, scaled_noise
from pfgmpp.schedules import vp_sigma
from torch_utils.misc import default_generator

DRAW_BLOCK = 16  # images drawn together; another number would change all draws
EDM_SIGMA_MAX, LSUN_SIGMA_MAX = 80.0, 380.0  # highest levels of samplers; --lsun uses their ratio


@dataclasses.dataclass(frozen=True)
class LossDraws:
    """The random variates of a batch; `draws[a:b]` are those of images a to b - 1."""

    sigma: torch.Tensor  # [B] float32
    z: torch.Tensor  # [B, C, H, W] float32, standard normal
    scale: torch.Tensor  # [B] float64, the kernel's sqrt(D/c)
    augment: Any = None  # draws of the augmentation pipe

    def __getitem__(self, index: slice) -> "LossDraws":
        augment = None if self.augment is None else self.augment[index]
        return LossDraws(self.sigma[index], self.z[index], self.scale[index], augment)

    @staticmethod
    def cat(parts: Sequence["LossDraws"]) -> "LossDraws":
        """Returns the concatenated variates of several batches."""
        if len(parts) == 1:
            return parts[0]
        augment = None if parts[0].augment is None else (
            type(parts[0].augment).cat([part.augment for part in parts]))
        return LossDraws(*(torch.cat([getattr(part, name) for part in parts])
                           for name in ("sigma", "z", "scale")), augment)


class DenoisingLoss:
    """Base of the three losses; a subclass defines how sigma is drawn and weighted.

    Args:
        pfgmpp: whether the noise is that of PFGM++ with `D` augmented dimensions, else Gaussian.
        D: augmented dimensions.
    """

    def __init__(self, *, pfgmpp: bool = False, D: float = 128):
        self.kernel = PerturbationKernel(D if pfgmpp else math.inf)

    def sample_sigma(self, batch: int, rng: torch.Generator) -> torch.Tensor:
        """Returns noise levels [batch] float32."""
        raise NotImplementedError

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the weight of the squared error at sigma."""
        return 1 / sigma**2

    def draw(
        self, shape: tuple[int, ...], rng: torch.Generator, augment_pipe: Any = None
    ) -> LossDraws:
        """Returns the variates for images of `shape` [B, C, H, W].

        The chi-square variate is drawn last, because only its number of draws depends on D. So one
        seed gives the same augmentation, noise level and direction at every D.
        """
        can_draw = hasattr(augment_pipe, "draw")
        augment = augment_pipe.draw(shape[0], rng) if can_draw else None
        sigma = self.sample_sigma(shape[0], rng)
        z = torch.randn(shape, generator=rng, device=rng.device)
        return LossDraws(sigma, z, self.kernel.scale(shape[0], rng), augment)

    def draw_range(
        self, first: int, last: int, image_shape: Sequence[int],
        seeded: Callable[[int], torch.Generator], augment_pipe: Any = None,
    ) -> LossDraws:
        """Returns the variates of images `first` to `last` - 1 of a batch of any size.

        Args:
            first: position of the first image in the batch.
            last: position after the last image.
            image_shape: [C, H, W].
            seeded: returns the generator of block k, which begins at image DRAW_BLOCK * k.
            augment_pipe: as for `draw`.
        """
        parts = []
        for block in range(first // DRAW_BLOCK, -(-last // DRAW_BLOCK)):
            start = block * DRAW_BLOCK
            draws = self.draw((DRAW_BLOCK, *image_shape), seeded(block), augment_pipe)
            parts.append(draws[max(first - start, 0):last - start])
        return type(parts[0]).cat(parts)

    def __call__(
        self, net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None,
        augment_pipe: Any = None, *, draws: LossDraws | None = None,
        reference: torch.Tensor | None = None, reference_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the unreduced loss [B, C, H, W].

        Args:
            net: denoiser (x, sigma, labels, augment_labels=...) -> denoised; with a condition it
                also takes condition=...
            images: clean images [B, C, H, W] in [-1, 1], or vectors [B, N].
            labels: one-hot or real labels [B, label_dim], or None; with a reference, one-hot.
            augment_pipe: AugmentPipe, any other function images -> (images, labels), or None.
            draws: variates of these images; None draws them from PyTorch's default generator.
            reference: clean images [R, C, H, W] over which the stable target is the posterior mean.
                It must contain the images themselves. With None, the clean image is the target.
            reference_labels: one-hot labels of the reference [R, label_dim], if the images have
                labels.
            condition: condition images of the network, [B, cond_channels, H, W]. They are augmented
                like the images and get no noise.

        Raises:
            ValueError: a reference batch is given with a condition, with augmentation, or with
                labels on only one side.
        """
        eligible = None if reference is None else _same_class(
            labels, reference_labels, augment_pipe, condition)
        if draws is None:
            draws = self.draw(images.shape, default_generator(images.device), augment_pipe)
        augment_labels = None
        if augment_pipe is not None:
            pipe = augment_pipe if draws.augment is None else (
                lambda images: augment_pipe(images, draws.augment))
            images, condition, augment_labels = _augment_alike(pipe, images, condition)
        noisy = images + scaled_noise(draws.z, draws.sigma, draws.scale)
        target = images if reference is None else (
            self.kernel.posterior_mean(noisy, draws.sigma, reference, eligible))
        sigma = per_image(draws.sigma, images.ndim)
        condition_kwargs = {} if condition is None else {"condition": condition}
        denoised = net(noisy, sigma, labels, augment_labels=augment_labels, **condition_kwargs)
        return self.weight(sigma) * (denoised - target).square()


def _same_class(
    labels: torch.Tensor | None, reference_labels: torch.Tensor | None, augment_pipe: Any,
    condition: torch.Tensor | None,
) -> torch.Tensor | None:
    """Returns which reference images have each image's class, bool [B, R]; None without labels.

    Raises:
        ValueError: the network has an input on which the reference mean can't be conditioned.
    """
    if condition is not None:
        raise ValueError("stable targets with a condition image: the mean over a reference "
                         "batch ignores the condition; leave one of them out")
    if augment_pipe is not None:
        raise ValueError("stable targets with augmentation: the mean over a reference batch "
                         "ignores augmentation labels; leave one of them out")
    dims = [0 if given is None else given.shape[1] for given in (labels, reference_labels)]
    if dims[0] != dims[1]:
        raise ValueError(f"stable targets with labels of {dims[0]} dimensions and reference_labels "
                         f"of {dims[1]}; give the reference images labels of the same kind")
    return labels @ reference_labels.T > 0.5 if dims[0] else None


def _augment_alike(
    pipe: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], images: torch.Tensor,
    condition: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Returns (images, condition, labels), both transformed alike as channels of one image."""
    if condition is None:
        images, labels = pipe(images)
        return images, None, labels
    both, labels = pipe(torch.cat([images, condition], dim=1))
    channels = images.shape[1]
    return both[:, :channels], both[:, channels:], labels


class EDMLoss(DenoisingLoss):
    """Log-normal noise levels, as in EDM.

    Args (beyond the base's): P_mean, P_std: mean and standard deviation of ln sigma. sigma_data:
    standard deviation of the data. lsun: multiply sigma by 380/80, for 256x256 images, in which
    details remain visible under more noise.
    """

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5,
                 lsun: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data
        self.sigma_gain = LSUN_SIGMA_MAX / EDM_SIGMA_MAX if lsun else 1.0

    def sample_sigma(self, batch, rng):
        normal = torch.randn([batch], generator=rng, device=rng.device)
        return (normal * self.P_std + self.P_mean).exp() * self.sigma_gain

    def weight(self, sigma):
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VELoss(DenoisingLoss):
    """Log-uniform noise levels, as for the VE networks of score-based models.

    Args (beyond the base's): sigma_min, sigma_max: range of noise levels.
    """

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0, **kwargs):
        super().__init__(**kwargs)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def sample_sigma(self, batch, rng):
        u = torch.rand([batch], generator=rng, device=rng.device)
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u


class VPLoss(DenoisingLoss):
    """Uniform times of the variance-preserving schedule.

    Args (beyond the base's): beta_d, beta_min: slope and start of the schedule. epsilon_t: the
    smallest time.
    """

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5,
                 **kwargs):
        super().__init__(**kwargs)
        self.beta_d, self.beta_min, self.epsilon_t = beta_d, beta_min, epsilon_t

    def sample_sigma(self, batch, rng):
        u = torch.rand([batch], generator=rng, device=rng.device)
        return vp_sigma(1 + u * (self.epsilon_t - 1), self.beta_d, self.beta_min)


LOSSES: Registry[type[DenoisingLoss]] = Registry(
    "loss", {"edm": EDMLoss, "ve": VELoss, "vp": VPLoss})
