"""Guidance: a denoiser pushed away from a worse one, for clearer and less varied samples.

    w guidance    (lo, hi] interval of noise levels    B batch    C channels    H W pixels

    D(x; sigma) = D_guide(x; sigma) + w (D_main(x; sigma) - D_guide(x; sigma))     lo < sigma <= hi
    D(x; sigma) = D_main(x; sigma)                                                 elsewhere

w = 1 is the network as it is, w = 0 the guide. The guide is

    the same network without its label     classifier-free guidance (Ho and Salimans 2022,
                                           arXiv 2207.12598); the network must have been trained
                                           with `label_dropout`, so that it knows no label
    a smaller or less trained network      autoguidance (Karras et al. 2024, arXiv 2406.02507)

and the interval is that of Kynkaanniemi et al. 2024, arXiv 2404.07724. The slope (x - D)/sigma is
linear in D, so at every number of augmented dimensions the slopes are combined like the denoisers,
and solvers see one more denoiser. At D = inf that follows the density p_main^w p_guide^(1-w) at
each noise level; at finite D the slope is no gradient of a log density, and no such law is known.
"""

import math
from typing import Any

import torch

from pfgmpp.wrapping import Wrapper, evaluate

EVERYWHERE = (0.0, math.inf)


class GuidedDenoiser(Wrapper):
    """What `guided` returns: a denoiser for samplers, with the attributes of its network.

    Its range of noise levels is that which network and guide share.
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

        Each image is guided or not by its own noise level. With an interval, the host waits for the
        levels.

        Args:
            x: noisy images [B, C, H, W].
            sigma: noise level of shape [], [B] or [B, 1, 1, 1].
            class_labels: [B, label_dim], or None where the network has none.
            condition: [B, cond_channels, H, W], which the guide sees too if it takes one.
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
            raise ValueError("guidance without class_labels: give the labels to be guided towards")
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
        gnet: the guide, another network for images of the same shape and of the same D. None is
            `net` without its labels.
        interval: noise levels (lo, hi] at which to guide; elsewhere `net` alone is evaluated.

    Raises:
        ValueError: values out of range, a guide that does not fit, a few-step network, or no
            guide for a network without labels.
    """
    low, high = interval
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance={guidance:g}: must be a finite number from 0 on (1 is none)")
    if not 0 <= low < high:
        raise ValueError(f"guidance interval {low:g},{high:g}: must be LO,HI with 0 <= LO < HI")
    for which, each in (("network", net), ("guide", gnet)):
        few_step = getattr(each, "few_step", None)
        if few_step is not None:
            raise ValueError(f"the {which} is a few-step network ({few_step.method}), which is no "
                             "denoiser; give the denoiser that it was made from")
    if gnet is not None:
        _check_guide(net, gnet)
    elif guidance != 1 and not net.label_dim:
        raise ValueError(f"guidance={guidance:g} of a network without labels: it needs a second "
                         "network as its guide (gnet)")
    return GuidedDenoiser(net, guidance, gnet, (float(low), float(high)))


def _check_guide(net: Any, gnet: Any) -> None:
    for name in ("image_shape", "D"):
        ours, theirs = getattr(net, name), getattr(gnet, name)
        if ours != theirs:
            raise ValueError(f"the guide has {name} {theirs}, the network {ours}: they must agree")
    pairs = {"label_dim": (net.label_dim, gnet.label_dim),
             "cond_channels": (_cond_channels(net), _cond_channels(gnet))}
    for name, (ours, theirs) in pairs.items():
        if theirs not in (0, ours):
            raise ValueError(f"the guide has {name} {theirs}, the network {ours}: they must agree, "
                             "or the guide have 0")


def _cond_channels(net: Any) -> int:
    return getattr(net, "cond_channels", 0)


def _twice(value: torch.Tensor) -> torch.Tensor:
    return torch.cat([value, value])
