"""The mathematics of PFGM++ and EDM, tensors in and tensors out.

kernel       the perturbation kernel of every D in (0, inf], and its posterior mean
schedules    noise levels over time, and grids of them
solvers      Euler, Heun and multistep methods along a grid; churn
few_steps    levels and sampler of networks that take a few evaluations
samplers     from unit-scale latents, or seeds, to images, and back
likelihood   the density of images that a denoiser implies
guidance     a denoiser pushed away from a worse one
measurement  a denoiser for images of which a noisy measurement is known
sizes        images of other sizes than the network was trained on
wrapping     base class of denoisers that wrap a network
loss         how noise levels are drawn and weighted; targets
consistency  losses that train a consistency function: tuning and distillation
distillation losses that train a generator with an auxiliary denoiser
augment      random transforms of images, and labels that describe them to the network
unets        SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM)
networks     the preconditioners that turn U-Nets into denoisers

`from pfgmpp import load` gives the function that returns a trained network as one object, see
metrics/model.py. It is imported only when it is accessed: this package imports none of the packages
that build on it, and `import pfgmpp` does not even import torch.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

_HOMES = {"load": "metrics.model", "Model": "metrics.model", "PerturbationKernel": "pfgmpp.kernel"}
_ROOMS = ("dnnlib", "torch_utils", "images", "checkpoints", "sampling", "metrics")
_ROOT = Path(__file__).resolve().parent.parent

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Returns the object with a name in `_HOMES`."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pfgmpp' has no attribute {name!r}")
    if not _HOMES[name].startswith("pfgmpp."):
        _check_rooms()
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _check_rooms() -> None:
    """Raises ImportError if Python finds another module under the name of one of our packages."""
    for room in _ROOMS:
        spec = importlib.util.find_spec(room)
        places = [] if spec is None else spec.submodule_search_locations or [spec.origin]
        if _ROOT / room not in [Path(place).resolve() for place in places]:
            found = next(iter(places), "nothing")
            raise ImportError(f"pfgmpp needs the package {room!r} of {_ROOT}, but Python finds "
                              f"{found} under this name; rename that, or put {_ROOT} before it in "
                              "PYTHONPATH")
