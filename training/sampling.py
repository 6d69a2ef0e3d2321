"""From a trained network and seeds to images.

    B batch    C channels    H W pixels    N = C*H*W    D augmented dimensions

Image k is a function of (network, seed k, sampler settings) alone. Each seed has its own generator
on the sampling device, which draws in this order: the normal vector z [C, H, W]; the class where
there are classes; the chi-square variate where D is finite; then the sampler's own noise, if it
uses any. So one seed shows the same class and direction at every D, and D = inf gives EDM's images.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from training.discretization import edm_sigmas
from training.networks import Precond
from training.perturbation import PerturbationKernel, per_image
from training.solvers import churn, heun

_SEED_RANGE = 1 << 32
_FLOAT32_MAX = torch.finfo(torch.float32).max


class StackedRandomGenerator:
    """One generator per seed; draws a batch whose row i depends on seed i alone."""

    def __init__(self, device: torch.device | str, seeds: Sequence[int]):
        self.generators = [torch.Generator(device).manual_seed(int(seed) % _SEED_RANGE)
                           for seed in seeds]

    def _stack(self, draw: Callable, size: Sequence[int], **kwargs) -> torch.Tensor:
        assert size[0] == len(self.generators), "one row per seed"
        return torch.stack([draw(size=list(size[1:]), generator=rng, device=rng.device, **kwargs)
                            for rng in self.generators])

    def randn(self, size: Sequence[int], **kwargs) -> torch.Tensor:
        """Returns standard normal variates of shape `size`, [B, ...]."""
        return self._stack(torch.randn, size, **kwargs)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Returns standard normal variates of x's shape and dtype."""
        return self.randn(x.shape, dtype=x.dtype)

    def randint(self, *args: int, size: Sequence[int], **kwargs) -> torch.Tensor:
        """Returns integers of shape `size`, [B, ...]; other arguments as in torch.randint."""
        return self._stack(functools.partial(torch.randint, *args), size, **kwargs)

    def kernel_scale(self, kernel: PerturbationKernel) -> torch.Tensor:
        """Returns the kernel's radial factor sqrt(D/c), [B] float64."""
        return torch.cat([kernel.scale(1, rng) for rng in self.generators])


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Settings of the EDM sampler (Karras et al. 2022, Algorithm 2 and Table 1)."""

    num_steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def check(self, net: Precond) -> None:
        """Raises ValueError where these settings can't be used with this network."""
        if self.S_churn < 0 or self.S_noise < 0:
            raise ValueError(f"S_churn={self.S_churn:g}, S_noise={self.S_noise:g}: "
                             "must be 0 or more")
        if self.S_churn > 0 and not math.isinf(net.D):
            raise ValueError(
                f"S_churn={self.S_churn:g} with D={net.D:g}: churn adds Gaussian noise, which "
                "leaves the marginals of finite D; use S_churn=0")
        edm_sigmas(net, self.num_steps, self.sigma_min, self.sigma_max, self.rho)


def edm_sampler(
    net: Callable, latents: torch.Tensor, class_labels: torch.Tensor | None = None,
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    num_steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0,
    S_churn: float = 0.0, S_min: float = 0.0, S_max: float = math.inf, S_noise: float = 1.0,
) -> torch.Tensor:
    """Returns samples [B, C, H, W] in float64 by Heun's method on the EDM grid.

    Args:
        net: a preconditioned network, or any denoiser (x, sigma, class_labels) with the attributes
            sigma_min, sigma_max and round_sigma.
        latents: unit-scale draws of the network's prior, [B, C, H, W].
        class_labels: [B, label_dim] or None.
        randn_like: source of the noise that churn adds.
        num_steps: number of noise levels; the network is evaluated 2*num_steps - 1 times.
        sigma_min: lowest noise level above 0.
        sigma_max: highest noise level.
        rho: how strongly low levels are favoured.
        S_churn: strength of the stochastic part; 0 is deterministic. For D = inf only.
        S_min: lowest noise level that is churned.
        S_max: highest noise level that is churned.
        S_noise: factor on the noise that churn adds.
    """
    grid = edm_sigmas(net, num_steps, sigma_min, sigma_max, rho)
    sigmas = grid.to(latents.device)
    before_step = None
    if S_churn > 0:
        before_step = churn(sigmas, randn_like, S_churn=S_churn, S_min=S_min, S_max=S_max,
                            S_noise=S_noise, round_sigma=net.round_sigma)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return net(x, sigma, class_labels).to(torch.float64)

    start = latents.to(torch.float64) * sigmas[0]
    return heun(denoise, start.clamp(-_FLOAT32_MAX, _FLOAT32_MAX), sigmas, before_step)


@dataclasses.dataclass(frozen=True)
class SampleBatch:
    """Images of consecutive seeds, with the class vector that each was sampled for."""

    seeds: list[int]
    images: torch.Tensor  # [B, C, H, W] float64, about [-1, 1]
    class_labels: torch.Tensor | None  # [B, label_dim]


def draw_latents(
    net: Precond, seeds: Sequence[int], device: torch.device, class_idx: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, StackedRandomGenerator]:
    """Returns (unit-scale latents [B, C, H, W] float64, class labels or None, the generators).

    The class is drawn even where `class_idx` overrides it, so that all else of a seed stays.
    """
    rnd = StackedRandomGenerator(device, seeds)
    shape = [len(seeds), net.img_channels, net.img_resolution, net.img_resolution]
    z = rnd.randn(shape)
    class_labels = None
    if net.label_dim:
        classes = rnd.randint(net.label_dim, size=[len(seeds)])
        if class_idx is not None:
            classes = torch.full_like(classes, class_idx)
        class_labels = torch.nn.functional.one_hot(classes, net.label_dim).to(torch.float32)
    scale = rnd.kernel_scale(PerturbationKernel(net.D))
    return z.to(torch.float64) * per_image(scale, z.ndim), class_labels, rnd


@torch.inference_mode()
def generate_images(
    net: Precond, batches: Iterable[Sequence[int]], *, sampler: SamplerConfig,
    device: torch.device, class_idx: int | None = None,
) -> Iterator[SampleBatch]:
    """Yields the images of each batch of seeds.

    Args:
        net: the network, on `device`, in evaluation mode.
        batches: seeds of each batch; empty batches are passed over.
        sampler: settings, checked against the network before.
        device: where to draw and to sample.
        class_idx: sample this class instead of the seeds' own.
    """
    for seeds in batches:
        if not seeds:
            continue
        latents, class_labels, rnd = draw_latents(net, seeds, device, class_idx)
        images = edm_sampler(net, latents, class_labels, rnd.randn_like,
                             **dataclasses.asdict(sampler))
        yield SampleBatch(list(seeds), images, class_labels)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Returns clip(x*127.5 + 128, 0, 255) truncated to uint8."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
