"""Networks that sample in one or a few evaluations: their noise levels, and their sampler.

    f(x, sigma) clean image    K_D(sigma) noise of the kernel    n number of levels

A consistency function, or a distilled generator, gives a clean image in one evaluation. More levels
sigma_0 > sigma_1 > ... > sigma_(n-1) improve it (Song et al. 2023, arXiv 2303.01469, Algorithm 1):

    x_0 = K_D(sigma_0)    y_i = f(x_i, sigma_i)    x_(i+1) = y_i + K_D(sigma_(i+1))

The noise between evaluations has the network's own D, with a new direction and a new radius.
Gaussian noise would give states that do not occur in training at finite D. Which levels are good
depends on how the network was trained:

    ect, cd   sigma_0 = 80 and, for n = 2, 0.821 (Geng et al. 2024, arXiv 2406.14548). More levels
              lie around the second, each a factor of 4 below the one before it.
    ipfm      n equal steps from sigma_0 to 0.002, which itself is left out
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pfgmpp.loss import EDM_SIGMA_MAX

METHODS = ("ect", "cd", "ipfm")
_MIDDLE = 0.821 / EDM_SIGMA_MAX  # second level of a consistency function over its first level
_FACTOR = 4.0  # ratio of its further levels
_LOWEST = 0.002  # end of the levels of generators, not included
_DEFAULT_STEPS = {"ect": 2, "cd": 2, "ipfm": 1}
_MAX_LEVELS = 64


@dataclasses.dataclass(frozen=True)
class FewStep:
    """How a few-step network was made, one of METHODS, and the levels to sample it at.

    Raises:
        ValueError: the method is unknown, or `levels` are not 1 to 64 falling levels.
    """

    method: str
    levels: tuple[float, ...]

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"few_step: method {self.method!r} must be one of "
                             f"{', '.join(METHODS)}")
        levels = tuple(map(float, self.levels))
        falling = all(a > b for a, b in itertools.pairwise([*levels, 0.0]))
        if not 1 <= len(levels) <= _MAX_LEVELS or not falling or math.isinf(levels[0]):
            raise ValueError(f"few_step: levels {list(levels)} must be 1 to {_MAX_LEVELS} falling "
                             "numbers above 0")
        object.__setattr__(self, "levels", levels)

    @classmethod
    def of(cls, method: str, sigma_max: float = EDM_SIGMA_MAX) -> "FewStep":
        """Returns a method with its usual levels, from `sigma_max` down."""
        return cls(method, few_step_levels(method, sigma_max, _DEFAULT_STEPS[method]))

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "FewStep":
        """Returns the object from which `to_dict` made a record.

        Raises:
            ValueError: it is not such a record.
        """
        try:
            if type(record) is not dict or type(record["levels"]) not in (list, tuple) or not (
                    {*map(type, record["levels"])} <= {int, float}):
                raise TypeError
            return cls(record["method"], tuple(record["levels"]))
        except (KeyError, TypeError, OverflowError):
            raise ValueError("few_step: must be a record of a method and of levels, a list of "
                             "numbers") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for a checkpoint."""
        return {"method": self.method, "levels": list(self.levels)}

    def of_steps(self, num_steps: int) -> tuple[float, ...]:
        """Returns the levels for `num_steps` evaluations: the recorded ones, or the usual ones."""
        if num_steps == len(self.levels):
            return self.levels
        return few_step_levels(self.method, self.levels[0], num_steps)


def few_step_levels(method: str, sigma_max: float, num_steps: int) -> tuple[float, ...]:
    """Returns the usual levels of a method, falling from `sigma_max`.

    Raises:
        ValueError: `num_steps` is not a whole number from 1 to 64.
    """
    if type(num_steps) is not int or not 1 <= num_steps <= _MAX_LEVELS:
        raise ValueError(f"num_steps={num_steps}: must be 1 to {_MAX_LEVELS} for a few-step "
                         "network")
    if method == "ipfm":
        step = (sigma_max - _LOWEST) / num_steps
        return tuple(sigma_max - i * step for i in range(num_steps))
    if num_steps == 1:
        return (sigma_max,)
    factor = min(_FACTOR, _MIDDLE ** (-2 / num_steps))  # many levels lie closer together
    middle = (num_steps - 2) / 2
    return (sigma_max, *(sigma_max * _MIDDLE * factor ** (middle - i)
                         for i in range(num_steps - 1)))


def consistency(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor,
    sigmas: Sequence[torch.Tensor] | torch.Tensor,
    noise_like: Callable[[torch.Tensor], torch.Tensor],
    watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Returns the images [B, ...] that a few-step network makes from states x.

    Args:
        denoise: f(x, sigma) with sigma of shape [].
        x: the states at sigmas[0], [B, ...].
        sigmas: noise levels, followed by 0, on x's device.
        noise_like: draws unit-scale noise of the kernel, of the shape and dtype of its argument.
        watch: called with (state, sigma) before each evaluation.
    """
    for i in range(len(sigmas) - 1):
        if i:
            x = x + sigmas[i] * noise_like(x)
        if watch:
            watch(x, sigmas[i])
        x = denoise(x, sigmas[i])
    return x
