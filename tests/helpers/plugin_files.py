"""Files for --plugin, and registries as they were before these ran."""

import ast
import contextlib
import re

from scripts import ROOT

from dnnlib import plugins
from dnnlib.registry import registries

# Parts under new names, whose results follow from those of the project's own.
PARTS = '''
import torch
from metrics.detectors import DETECTORS, Pixels
from metrics.metrics import METRICS, Metric
from pfgmpp.loss import LOSSES, DenoisingLoss, EDMLoss
from pfgmpp.networks import MODELS, PRECONDS, EDMPrecond
from pfgmpp.solvers import MULTISTEP, SOLVERS, dpmpp2m, heun, sigma_slope
from training.config import ARCHITECTURES


class Twin(EDMLoss):
    """EDM's."""


class Higher(EDMLoss):
    """EDM's, with levels e times higher."""

    def __init__(self, P_mean=-1.2, **kwargs):
        super().__init__(P_mean=P_mean + 1, **kwargs)


class Bare(DenoisingLoss):
    """Of the keywords it takes those of its base class alone."""

    def sample_sigma(self, batch, rng):
        return torch.rand([batch], generator=rng, device=rng.device) + 0.1


class TwinPrecond(EDMPrecond):
    """EDM's."""


class Conv(torch.nn.Module):
    """A small network of its own keywords."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, width=4):
        super().__init__()
        self.first = torch.nn.Conv2d(in_channels + 1, width, 3, padding=1)
        self.last = torch.nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        noise = noise_labels.reshape(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        return self.last(self.first(torch.cat([x, noise.to(x.dtype)], dim=1)).relu())


def steps(denoise, x, sigmas, before_step=None, slope=sigma_slope):
    for i in range(len(sigmas) - 1):
        x, sigma = before_step(x, i) if before_step else (x, sigmas[i])
        x = x + (sigmas[i + 1] - sigma) * slope(denoise, x, sigma)
    return x


class Halved(Pixels):
    name = "halved"

    def __call__(self, images):
        return super().__call__(images) / 2


def shift(images, reference):
    return (float(((images.moments.mean().cpu().numpy() - reference.mu) ** 2).sum()),)


LOSSES["twin"], LOSSES["higher"], LOSSES["bare"] = Twin, Higher, Bare
PRECONDS["TwinPrecond"] = TwinPrecond
MODELS["Conv"] = Conv
ARCHITECTURES["wide"] = {"model_type": "Conv", "width": 6}
SOLVERS["twin"], SOLVERS["steps"], MULTISTEP["twin2m"] = heun, steps, dpmpp2m
DETECTORS["halved"] = Halved
METRICS["shift"] = Metric("moments", ("mean_shift",), False, shift)
'''


@contextlib.contextmanager
def registries_kept():
    """While it is entered, files may add parts; afterwards all is as it was."""
    before = [(registry, dict(registry), dict(registry.origins)) for registry in registries()]
    loaded = dict(plugins._loaded)
    try:
        yield
    finally:
        for registry, parts, origins in before:
            registry.clear()
            registry.update(parts)
            registry.origins.clear()
            registry.origins.update(origins)
        plugins._loaded.clear()
        plugins._loaded.update(loaded)


def forget() -> None:
    """Takes back what files have added, as in a new process."""
    plugins._loaded.clear()
    for registry in registries():
        for name in registry.added:
            del registry[name]
        registry.origins.clear()


def parts_of_extending() -> str:
    """Returns my_parts.py of docs/extending.md: what its blocks define and register."""
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    code = ast.parse("\n".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)))
    wanted = [node for node in code.body
              if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef)
              or (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript))]
    return ast.unparse(ast.Module(wanted, []))
