"""The mathematics of PFGM++ and EDM, tensors in and tensors out.

kernel       the perturbation kernel of every D in (0, inf], and its posterior mean
schedules    noise levels over time, and grids of them
solvers      Euler, Heun and multistep methods along a grid; churn
few_steps    levels and sampler of networks that take a few evaluations
samplers     from unit-scale latents, or seeds, to images, and back
likelihood   the density of images that a denoiser implies
guidance     a denoiser pushed away from a worse one
measurement  a denoiser of images of which a noisy measurement is known
sizes        images of other sizes than the network was trained on
wrapping     what denoisers around a network share
loss         how noise levels are drawn and weighted; targets
consistency  losses that make a consistency function: tuning and distillation
distillation losses that make a generator by an auxiliary denoiser
augment      images moved at random, and labels that tell the network how
unets        SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM)
networks     the preconditioners that make denoisers of them

`from pfgmpp import load` gives a trained network as one object, see metrics/model.py. It is found
when it is asked for: this room imports none of the later ones, and `import pfgmpp` not even torch.
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
    """Returns what is named in `_HOMES`."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pfgmpp' has no attribute {name!r}")
    if not _HOMES[name].startswith("pfgmpp."):
        _check_rooms()
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _check_rooms() -> None:
    """Raises ImportError if Python would find another module under the name of a room."""
    for room in _ROOMS:
        spec = importlib.util.find_spec(room)
        places = [] if spec is None else spec.submodule_search_locations or [spec.origin]
        if _ROOT / room not in [Path(place).resolve() for place in places]:
            found = next(iter(places), "nothing")
            raise ImportError(f"pfgmpp needs the package {room!r} of {_ROOT}, but Python finds "
                              f"{found} under this name; rename that, or put {_ROOT} before it in "
                              "PYTHONPATH")
