"""Training of consistency functions at every D: tuning (ect) and distillation (cd).

    B batch    N = C*H*W    y clean image    (s, z) scale and direction of a path    t > r levels

A path of the family is x_t = y + t s z, where s = sqrt(D/c) with c ~ chi^2_D is fixed along the
path (s = 1 at D = inf). Its mean velocity given x is the right-hand side of the ODE at every D. So
all results on consistency functions f(x, t) for diffusion carry over, provided that both ends of a
step share (s, z):

    ect   |f(y + t s z, t) - f(y + r s z, r)|^2 in expectation, with r close below t. Easy
          consistency tuning (Geng et al. 2024, arXiv 2406.14548) draws ln t ~ Normal(P_mean,
          P_std) and takes r of stage j = floor(images / stage length) by

              r = max(0, t (1 - q^-(j+1) (1 + k / (1 + e^(b t)))))

          so that the first stages denoise (r = 0, where f(x_0, 0) = y) and later stages enforce
          consistency ever more. The loss of an image is sqrt(L) / (t - r), where L is the squared
          distance, or (sqrt(L + c^2) - c) / (t - r) with c > 0. If the network has a boundary B,
          where f(x_B, B) = x_B, paths end there: t is B plus the drawn value, and r is at least B.
    cd    the distance between f(x_i, t_i) and f_target(x_(i+1), t_(i+1)), where x_i = y + t_i s z
          and x_(i+1) follows from it by one Heun step of the teacher's ODE on a grid of levels
          (Song et al. 2023, arXiv 2303.01469; at finite D Hein et al. 2025, PFCM). The distance is
          L or, by default, the pseudo-Huber distance sqrt(L + c^2) - c with c = 0.00054 sqrt(N)
          (Song and Dhariwal 2023, arXiv 2310.14189). At the lowest level f_target is the identity,
          because paths end there. Without this condition, f + 1 would be as consistent as f.

No gradient flows through the end at r. Both ends see the same dropout masks, labels and condition.
If they differed in more than the level, the variance of the gradient would not fall with t - r.
"""

import math
from collections.abc import Callable

import torch

from pfgmpp.kernel import per_image, scaled_noise
from pfgmpp.loss import DenoisingLoss, EDMLoss, LossDraws
from pfgmpp.solvers import heun_step
from torch_utils.misc import default_generator

HUBER_PER_SQRT_N = 0.00054  # Song and Dhariwal 2023
# The square root has no derivative at 0, where both ends agree.
_TINY = 1e-12
_LEAST_GAP = 1e-5  # smallest (t - r)/t; float32 then keeps two digits of the difference


class ConsistencyTuningLoss(EDMLoss):
    """The loss of easy consistency tuning at the stage that `nimg` images have reached.

    Args (beyond EDMLoss's, whose defaults differ here): q, k, b: constants of r(t), see above.
    stage_nimg: images per stage. c: constant of the distance; with 0 it is the square root.
    boundary: level at which the network returns its input.
    """

    def __init__(self, P_mean: float = -1.1, P_std: float = 2.0, q: float = 2.0, k: float = 8.0,
                 b: float = 1.0, c: float = 0.0, stage_nimg: float = 3.2e6, boundary: float = 0.0,
                 **kwargs):
        super().__init__(P_mean=P_mean, P_std=P_std, **kwargs)
        self.q, self.k, self.b, self.c, self.stage_nimg = q, k, b, c, stage_nimg
        self.boundary = boundary

    def stage(self, nimg: int) -> int:
        """Returns the stage j after `nimg` images."""
        return int(nimg // self.stage_nimg)

    def lower_level(self, t: torch.Tensor, nimg: int) -> torch.Tensor:
        """Returns r, the level that is compared with t, of t's shape; boundary <= r < t."""
        decay = self.q ** -(self.stage(nimg) + 1)
        bend = 1 + self.k * torch.sigmoid(-self.b * t)
        r = (t * (1 - decay * bend)).clamp(min=self.boundary)
        return torch.minimum(r, t * (1 - _LEAST_GAP))

    def __call__(
        self, net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None,
        *, draws: LossDraws | None = None, condition: torch.Tensor | None = None, nimg: int = 0,
        frozen: Callable | None = None,
    ) -> torch.Tensor:
        """Returns the loss of each image, [B].

        Args:
            net: the consistency function (x, sigma, labels) -> image; condition=... where given.
            images: clean images [B, C, H, W] in [-1, 1], or vectors [B, N].
            labels: one-hot or real labels [B, label_dim], or None.
            draws: variates of these images; None draws them from PyTorch's default generator.
            condition: condition images of the network, [B, cond_channels, H, W].
            nimg: number of images seen so far, which determines the stage.
            frozen: the function to evaluate at r, without a gradient, in place of `net`: the same
                network without the wrapper that gathers its gradients.
        """
        if draws is None:
            draws = self.draw(images.shape, default_generator(images.device))
        t = draws.sigma + self.boundary
        r = self.lower_level(t, nimg)
        kwargs = {} if condition is None else {"condition": condition}
        end = images  # the ends of the paths, where the network is the identity
        if self.boundary:
            end = images + scaled_noise(draws.z, self.boundary, draws.scale)

        def at(f: Callable, sigma: torch.Tensor) -> torch.Tensor:
            noisy = images + scaled_noise(draws.z, sigma, draws.scale)
            return f(noisy, per_image(sigma, images.ndim), labels, **kwargs)

        seed = dropout_seed()
        torch.manual_seed(seed)
        with torch.no_grad():
            is_above = r > self.boundary
            # A network has no level 0, whose logarithm is infinite: there f(y, 0) = y.
            target = torch.where(per_image(is_above, images.ndim),
                                 at(frozen or net, torch.where(is_above, r, t)), end)
        torch.manual_seed(seed)
        return distance(at(net, t), target, self.c) / (t - r)


class ConsistencyDistillationLoss(DenoisingLoss):
    """The loss of consistency distillation along the teacher's Heun steps.

    Args (beyond the base's): teacher: a denoiser (x, sigma, labels), frozen. levels: noise levels
    above 0, falling to the level at which paths end. target: the consistency function at the lower
    level; None means the network itself. metric: 'huber' or 'l2'.
    """

    def __init__(self, teacher: Callable, levels: torch.Tensor, target: Callable | None = None,
                 metric: str = "huber", **kwargs):
        super().__init__(**kwargs)
        self.teacher, self.target, self.metric = teacher, target, metric
        self.levels = levels.to(torch.float32)

    def sample_sigma(self, batch, rng):
        """Returns uniformly drawn levels of the grid except the lowest, [batch] float32."""
        index = torch.randint(len(self.levels) - 1, [batch], generator=rng, device=rng.device)
        return self.levels.to(rng.device)[index]

    def lower_level(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the level of the grid below each of t, [B]."""
        levels = self.levels.to(t.device)
        return levels[(levels - t[:, None]).abs().argmin(dim=1) + 1]

    def __call__(
        self, net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None,
        *, draws: LossDraws | None = None, condition: torch.Tensor | None = None, nimg: int = 0,
        frozen: Callable | None = None,
    ) -> torch.Tensor:
        """Returns the loss of each image, [B]. Arguments as for `ConsistencyTuningLoss`.

        `nimg` has no effect here. Without a `target`, `frozen` or else `net` is evaluated.
        """
        if draws is None:
            draws = self.draw(images.shape, default_generator(images.device))
        t = draws.sigma
        r = self.lower_level(t)
        kwargs = {} if condition is None else {"condition": condition}
        x = images + scaled_noise(draws.z, t, draws.scale)
        high, low = per_image(t, x.ndim), per_image(r, x.ndim)
        seed = dropout_seed()
        with torch.no_grad():
            below = heun_step(lambda x, sigma: self.teacher(x, sigma, labels, **kwargs), x, high,
                              low)
            torch.manual_seed(seed)
            target = (self.target or frozen or net)(below, low, labels, **kwargs)
            target = torch.where(low > self.levels[-1], target, below)
        torch.manual_seed(seed)
        given = net(x, high, labels, **kwargs)
        if self.metric == "l2":
            return (given - target).square().flatten(1).sum(dim=1)
        return distance(given, target, HUBER_PER_SQRT_N * math.sqrt(x[0].numel()))


def distance(a: torch.Tensor, b: torch.Tensor, c: float) -> torch.Tensor:
    """Returns sqrt(|a - b|^2 + c^2) - c of each image [B, ...], as [B]; c = 0 is the 2-norm."""
    squared = (a - b).square().flatten(1).sum(dim=1)
    return (squared + (c * c if c else _TINY)).sqrt() - c


def dropout_seed() -> int:
    """Returns a seed with which two passes of a network draw the same dropout masks.

    It comes from PyTorch's default generator on the CPU, from which masks are seeded as well.
    """
    return int(torch.randint(1 << 62, [], device="cpu"))
