"""Guidance: a denoiser pushed away from a worse one, for clearer and less varied samples.

    w guidance    (lo, hi] interval of noise levels    B batch    C channels    H W pixels

    D(x; sigma) = D_guide(x; sigma) + w (D_main(x; sigma) - D_guide(x; sigma))     lo < sigma <= hi
    D(x; sigma) = D_main(x; sigma)                                                 elsewhere

w = 1 is the unguided network, and w = 0 the guide. The guide is

    the same network without its label     classifier-free guidance (Ho and Salimans 2022,
                                           arXiv 2207.12598); the network must have been trained
                                           with `label_dropout`, so that it works without labels
    a smaller or less trained network      autoguidance (Karras et al. 2024, arXiv 2406.02507)

and the interval is that of Kynkaanniemi et al. 2024, arXiv 2404.07724. The slope (x - D)/sigma is
affine in D, so for any number of augmented dimensions the slopes are combined like the denoisers,
and for solvers the result is an ordinary denoiser. For diffusion its slope is that of the density
p_main^w p_guide^(1-w) at each noise level. For finitely many augmented dimensions the slope is not
the gradient of a log density, and no such relation is known.
"""

import math
from typing import Any

import torch

from pfgmpp.wrapping import Wrapper, evaluate

EVERYWHERE = (0.0, math.inf)


class GuidedDenoiser(Wrapper):
    """The denoiser that `guided` returns, with the attributes of its network.

    Its range of noise levels is the intersection of those of the network and the guide.
    """

    def __init__(self, net: Any, guidance: float, gnet: Any, interval: tuple[float, float]):
        super().__init__(net)
        self.gnet = gnet
        self.guidance, self.interval = guidance, interval
        both = [net] if gnet is None else [net, gnet]
        self.sigma_min = max(each.sigma_min for each in both)
        self.sigma_max = min(each.sigma_max for each in both)

    def __call__(
        self, x: torch.Tensor, sigma: float | torch.Tensor,
        class_labels: torch.Tensor | None = None, *, condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the denoised images [B, C, H, W].

        The noise level of each image decides whether it is guided. With an interval, the host waits
        for the levels.

        Args:
            x: noisy images [B, C, H, W].
            sigma: noise level of shape [], [B] or [B, 1, 1, 1].
            class_labels: [B, label_dim], or None if the network has no labels.
            condition: [B, cond_channels, H, W], passed to the guide too if it takes one.
        """
        if self.guidance == 1:
            return evaluate(self.net, x, sigma, class_labels, condition)
        if self.interval == EVERYWHERE:
            return self._guided(x, sigma, class_labels, condition)
        sigma = torch.as_tensor(sigma, device=x.device)
        inside = ((sigma > self.interval[0]) & (sigma <= self.interval[1])).flatten()
        if inside.all():
            return self._guided(x, sigma, class_labels, condition)
        if not inside.any():
            return evaluate(self.net, x, sigma, class_labels, condition)
        denoised = torch.empty_like(x, dtype=torch.float32)
        for rows, denoise in ((inside, self._guided), (~inside, self._plain)):
            denoised[rows] = denoise(x[rows], sigma[rows], *(
                None if value is None else value[rows] for value in (class_labels, condition)))
        return denoised

    def _plain(self, x, sigma, class_labels, condition) -> torch.Tensor:
        return evaluate(self.net, x, sigma, class_labels, condition)

    def _guided(self, x, sigma, class_labels, condition) -> torch.Tensor:
        if self.gnet is None:
            guide, main = self._without_and_with_labels(x, sigma, class_labels, condition)
        else:
            main = self._plain(x, sigma, class_labels, condition)
            guide = evaluate(self.gnet, x, sigma, class_labels if self.gnet.label_dim else None,
                             condition if _cond_channels(self.gnet) else None)
        return guide + self.guidance * (main - guide)

    def _without_and_with_labels(self, x, sigma, class_labels, condition):
        """Returns (D without labels, D with labels) by one evaluation of 2B images."""
        if class_labels is None:
            raise ValueError("guidance without class_labels: give the labels to guide towards")
        sigma = torch.as_tensor(sigma)
        labels = torch.cat([torch.zeros_like(class_labels), class_labels])
        return evaluate(
            self.net, _twice(x), sigma if sigma.numel() == 1 else _twice(sigma), labels,
            None if condition is None else _twice(condition)).chunk(2)


def guided(
    net: Any, *, guidance: float, gnet: Any = None, interval: tuple[float, float] = EVERYWHERE,
) -> GuidedDenoiser:
    """Returns `net` under guidance, a denoiser (x, sigma, class_labels) for any sampler.

    Args:
        net: a preconditioned network, or a denoiser with such attributes.
        guidance: w, 0 or more.
        gnet: the guide, another network with the same image shape and D. None means `net` without
            its labels.
        interval: noise levels (lo, hi] at which to guide; elsewhere only `net` is evaluated.

    Raises:
        ValueError: a value is out of range, the guide does not match, a network is a few-step
            network, or a network without labels has no guide.
    """
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance={guidance:g}: must be 0 or more, and finite (1 is no guidance)")
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError):
        raise ValueError(f"guidance interval {interval!r}: must be two numbers, (LO, HI) with "
                         "0 <= LO < HI") from None
    if not 0 <= low < high:
        raise ValueError(f"guidance interval {low:g},{high:g}: must be LO,HI with 0 <= LO < HI")
    for which, each in (("network", net), ("guide", gnet)):
        few_step = getattr(each, "few_step", None)
        if few_step is not None:
            raise ValueError(f"the {which} is a few-step network ({few_step.method}), not a "
                             "denoiser; give the denoiser from which it was made")
    if gnet is not None:
        _check_guide(net, gnet)
    elif guidance != 1 and not net.label_dim:
        raise ValueError(f"guidance={guidance:g}: the network has no labels; give a second network "
                         "as its guide (gnet)")
    return GuidedDenoiser(net, guidance, gnet, (low, high))


def _check_guide(net: Any, gnet: Any) -> None:
    for name in ("image_shape", "D"):
        ours, theirs = getattr(net, name), getattr(gnet, name)
        if ours != theirs:
            raise ValueError(f"the guide has {name} {theirs}, the network {ours}; they must agree")
    pairs = {"label_dim": (net.label_dim, gnet.label_dim),
             "cond_channels": (_cond_channels(net), _cond_channels(gnet))}
    for name, (ours, theirs) in pairs.items():
        if theirs not in (0, ours):
            raise ValueError(f"the guide has {name} {theirs}, the network {ours}; they must agree, "
                             "or that of the guide must be 0")


def _cond_channels(net: Any) -> int:
    return getattr(net, "cond_channels", 0)


def _twice(value: torch.Tensor) -> torch.Tensor:
    return torch.cat([value, value])
