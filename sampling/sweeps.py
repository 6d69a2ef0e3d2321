"""Sweeps over sampler settings: all combinations of several lists. Needs no PyTorch.

sampling/folders.py names the folder of each combination.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sampling.folders import suffix

MULTISTEP = ("ipndm", "dpmpp2m", "unipc")  # see pfgmpp/solvers.py
CONSISTENCY = "consistency"  # see pfgmpp/few_steps.py
DENOISER_SOLVERS = ("heun", "euler", "ppfm", *MULTISTEP)
SOLVERS = (*DENOISER_SOLVERS, CONSISTENCY)  # plugins may add more
MAX_FEW_STEPS = 64  # evaluations of a few-step network, see pfgmpp/few_steps.py
FULL_BITS = 32  # from here on, weights stay unchanged


@dataclass(frozen=True)
class SweepPoint:
    """One combination of settings.

    `suffix` is appended to the folder's name and is '' outside of a sweep. `num_steps` None is the
    network's own number.
    """

    num_steps: int | None = None
    noise_alpha: float = 0.0
    bits: int = FULL_BITS
    suffix: str = ""

    @property
    def settings(self) -> dict[str, float]:
        """The settings to pass to the sampler."""
        steps = {} if self.num_steps is None else {"num_steps": self.num_steps}
        return {**steps, "noise_alpha": self.noise_alpha, "bits": self.bits}


def sweep_points(
    steps: Sequence[int] | None, alphas: Sequence[float] | None = None,
    bits: Sequence[int] | None = None, *, is_steps_sweep: bool = False,
) -> list[SweepPoint]:
    """Returns all combinations. The last list varies fastest.

    Several numbers of steps are a sweep. One number is a sweep only if `is_steps_sweep`, and None
    is the network's own number. `alphas`, the strengths of the noise before each step, and `bits`
    of the weights are None if they are not swept.
    """
    points, steps = [], steps or [None]
    for alpha, num_steps, num_bits in itertools.product(alphas or [None], steps, bits or [None]):
        name = suffix(None if alpha is None else f"{alpha:g}",
                      num_steps if len(steps) > 1 or is_steps_sweep else None, num_bits)
        points.append(SweepPoint(num_steps, alpha or 0.0, num_bits or FULL_BITS, name))
    return points
