"""Latents: what images begin with, of unit scale; from a file, from images, or between others.

A latent is the state at the highest noise level divided by that level, [C, H, W] float64. At every
D the sampler takes it along a path of its own to an image, and back (pfgmpp/samplers.py, `encode`).
A latent of the kernel is a direction, uniform on the sphere, and a length

    |latent| = sqrt(D/c) * |z|        c ~ chi^2_D, z ~ Normal(0, I)

so at finite D, unlike at D = inf, its length is a coordinate of its own (`at_radii`).
"""

import dataclasses
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from checkpoints.checkpoint import digest
from dnnlib.atomic import atomic_write

LATENTS_NAME = "latents.npz"


@dataclasses.dataclass(frozen=True)
class Latents:
    """Latents by seed: seed k has latent k mod n of these n, and its label if they have labels.

    Raises:
        ValueError: they don't fit together, or are not finite.
    """

    latents: torch.Tensor  # [n, C, H, W] float64
    names: tuple[str, ...]  # what each belongs to
    labels: torch.Tensor | None = None  # [n, label_dim] float32

    def __post_init__(self):
        shape = list(self.latents.shape)
        if self.latents.ndim != 4 or not self.latents.numel():
            raise ValueError(f"latents of shape {shape}; must be [n, C, H, W]")
        if not self.latents.isfinite().all():
            raise ValueError("latents must be finite numbers")
        if len(self.names) != len(self.latents) or (
                self.labels is not None and len(self.labels) != len(self.latents)):
            raise ValueError(f"{len(self.names)} names of {len(self.latents)} latents, and "
                             "there must be as many labels, if any")

    def __len__(self) -> int:
        return len(self.latents)

    def __call__(self, seeds: Sequence[int]) -> torch.Tensor:
        """Returns the latents of seeds, [B, C, H, W] float64."""
        return self.latents[[seed % len(self) for seed in seeds]]

    def labels_of(self, seeds: Sequence[int], classes: torch.Tensor) -> torch.Tensor:
        """Returns the labels of seeds, [B, label_dim], whatever classes they draw."""
        return self.labels[[seed % len(self) for seed in seeds]]

    @property
    def digest(self) -> str:
        """A sha256 over latents and labels."""
        return digest({"latents": self.latents} | (
            {} if self.labels is None else {"labels": self.labels}))

    def save(self, path: Path) -> None:
        """Writes a .npz with `latents`, `names` and, if there are any, `labels`.

        Raises:
            OSError: it can't be written.
        """
        labels = {} if self.labels is None else {"labels": self.labels.numpy()}
        with atomic_write(path) as file:
            np.savez(file, latents=self.latents.numpy(), names=np.array(self.names, dtype=str),
                     **labels)


def read_latents(path: str | os.PathLike, shape: Sequence[int]) -> Latents:
    """Returns what `Latents.save` wrote, or the array `latents` of any .npz, or a .npy array.

    Args:
        path: the file.
        shape: [C, H, W] of the network's images.

    Raises:
        OSError: it can't be read.
        ValueError: it holds no such latents.
    """
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {"latents": found} if isinstance(found, np.ndarray) else {
            name: found[name] for name in ("latents", "names", "labels") if name in found.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: must be a .npz with an array 'latents', such as --encode "
                         f"writes ({error})") from error
    latents = arrays.get("latents")
    if latents is None or latents.dtype.kind != "f":
        raise ValueError(f"{path}: must have floating-point 'latents', such as --encode writes")
    if list(latents.shape[1:]) != list(shape):
        given, wanted = ("x".join(map(str, own)) for own in (latents.shape[1:], shape))
        raise ValueError(f"{path}: its latents are {given} (channels x height x width), the "
                         f"network takes {wanted}")
    names = arrays.get("names", np.arange(len(latents)))
    labels = arrays.get("labels")
    try:
        return Latents(torch.from_numpy(latents.astype(np.float64)), tuple(map(str, names)),
                       None if labels is None else torch.from_numpy(labels.astype(np.float32)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def joined(parts: Sequence[tuple[Sequence[int], Latents]], seeds: Sequence[int]) -> Latents:
    """Returns the latents of (their seeds, latents), in the order of `seeds`."""
    place = {seed: (part, i) for own, part in parts for i, seed in enumerate(own)}
    rows = [place[seed] for seed in seeds]
    labels = None if rows[0][0].labels is None else torch.stack(
        [part.labels[i] for part, i in rows])
    return Latents(torch.stack([part.latents[i] for part, i in rows]),
                   tuple(part.names[i] for part, i in rows), labels)


def between(ends: Latents, frames: int) -> Latents:
    """Returns the latents on the way from each end to the next, `frames` of each way.

    Directions move along great circles at even speed, lengths evenly in their logarithm, labels
    along straight lines. An end between two ways is there once.
    """
    made, names, labels = [], [], []
    for i in range(len(ends) - 1):
        for t in torch.linspace(0, 1, frames, dtype=torch.float64)[min(i, 1):]:
            made.append(_between(ends.latents[i], ends.latents[i + 1], t))
            names.append(f"{ends.names[i]} to {ends.names[i + 1]}, {t.item():.3f}")
            if ends.labels is not None:
                labels.append(torch.lerp(ends.labels[i], ends.labels[i + 1], t.float()))
    return Latents(torch.stack(made), tuple(names), torch.stack(labels) if labels else None)


def _between(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    lengths = a.norm(), b.norm()
    a, b = a / lengths[0], b / lengths[1]
    # The angle by its half's tangent: exact where it is small and where it is nearly pi.
    angle = 2 * torch.atan2((a - b).norm(), (a + b).norm())
    if angle.sin() < 1e-9:
        direction = torch.lerp(a, b, t)
    else:
        direction = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return direction * (lengths[0].log() * (1 - t) + lengths[1].log() * t).exp()


def at_radii(directions: Latents, D: float, quantiles: Sequence[float]) -> Latents:
    """Returns each direction at quantiles of the kernel's radial factor sqrt(D/c), n for each.

    Args:
        directions: latents [C, H, W], of which only the directions count. Their length becomes
            sqrt(N) times the factor, with N = C*H*W: sqrt(N) is nearly the length of z.
        D: augmented dimensions, finite.
        quantiles: between 0 and 1, rising or not.
    """
    N = directions.latents[0].numel()
    factors = [radial_factor(D, quantile) for quantile in quantiles]
    made = [N ** 0.5 * factor * latent / latent.norm()
            for latent in directions.latents for factor in factors]
    names = [f"{name}, {quantile:g}" for name in directions.names for quantile in quantiles]
    labels = directions.labels
    if labels is not None:
        labels = labels.repeat_interleave(len(quantiles), dim=0)
    return Latents(torch.stack(made), tuple(names), labels)


def radial_factor(D: float, quantile: float) -> float:
    """Returns the quantile of sqrt(D/c) for c ~ chi^2_D."""
    import scipy.special  # late: nothing else takes its time to load

    return float(np.sqrt(D / scipy.special.chdtri(D, quantile)))
