"""Latents, from which sampling starts: read from files, encoded from images, or interpolated.

A latent is the state at the highest noise level divided by that level, [C, H, W] float64. At every
D, the sampler maps it to an image along a path of its own, and back (`encode` in
pfgmpp/samplers.py). A latent drawn from the kernel has a direction, which is uniform on the sphere,
and a length

    |latent| = sqrt(D/c) * |z|        c ~ chi^2_D, z ~ Normal(0, I)

At finite D, unlike at D = inf, the length is therefore an independent coordinate (`at_radii`).
"""

import dataclasses
import io
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch

from checkpoints.checkpoint import digest
from dnnlib.atomic import atomic_write
from dnnlib.cli import shown_name
from dnnlib.npy_header import read_npy_header
from images.image_files import DAMAGE

LATENTS_NAME = "latents.npz"
_NPY, _ZIP = b"\x93NUMPY", b"PK"  # first bytes of the files
_ENTRIES = ("latents", "names", "labels", "numbers")
_RARE, _FAR = 1e-12, 1e6  # see `check_lengths`
_OPPOSITE = 1e-6  # |a + b| of unit vectors that may be opposite after rounding to float32


@dataclasses.dataclass(frozen=True)
class Latents:
    """Latents by seed: seed k has latent k mod n of n, and that latent's label if there are labels.

    Raises:
        ValueError: the fields don't fit together, or values are not finite.
    """

    latents: torch.Tensor  # [n, C, H, W] float64
    names: tuple[str, ...]  # the image or seed that each belongs to
    labels: torch.Tensor | None = None  # [n, label_dim] float32
    numbers: tuple[int, ...] | None = None  # of their condition images, for conditional networks

    def __post_init__(self):
        shape, n = list(self.latents.shape), len(self.latents) if self.latents.ndim else 0
        if self.latents.ndim != 4 or not self.latents.numel():
            raise ValueError(f"latents have shape {shape}; must be [n, C, H, W]")
        if not self.latents.isfinite().all():
            raise ValueError("latents must be finite numbers")
        if len(self.names) != n:
            raise ValueError(f"{len(self.names)} names for {n} latents; give one for each latent")
        if self.labels is not None:
            if self.labels.ndim != 2 or len(self.labels) != n:
                raise ValueError(f"labels have shape {list(self.labels.shape)}; must be "
                                 f"[{n}, label_dim], one-hot for classes")
            if not self.labels.isfinite().all():
                raise ValueError("labels must be finite numbers")
        if self.numbers is not None and len(self.numbers) != n:
            raise ValueError(f"{len(self.numbers)} numbers of images for {n} latents; give one for "
                             "each latent")

    def __len__(self) -> int:
        return len(self.latents)

    def __call__(self, seeds: Sequence[int]) -> torch.Tensor:
        """Returns the latents of seeds, [B, C, H, W] float64."""
        return self.latents[[seed % len(self) for seed in seeds]]

    def labels_of(self, seeds: Sequence[int], classes: torch.Tensor) -> torch.Tensor:
        """Returns the labels of seeds, [B, label_dim]. The classes that they draw are ignored."""
        return self.labels[[seed % len(self) for seed in seeds]]

    def numbers_of(self, seeds: Sequence[int]) -> list[int]:
        """Returns the number of each seed's condition image: its own number if none is recorded."""
        if self.numbers is None:
            return list(seeds)
        return [self.numbers[seed % len(self)] for seed in seeds]

    def find(self, name: str) -> int | None:
        """Returns the index of the latent with this name or number, or None if there is none.

        Raises:
            ValueError: several latents have this name.
        """
        found = [i for i, own in enumerate(self.names) if own == name]
        if len(found) > 1:
            raise ValueError(f"latents {', '.join(map(str, found))} all have the name "
                             f"{shown_name(name)}; give the number of one")
        if found:
            return found[0]
        is_number = name.isascii() and name.isdecimal() and int(name) < len(self)
        return int(name) if is_number else None

    @property
    def digest(self) -> str:
        """A sha256 of latents, labels and numbers."""
        return digest({"latents": self.latents}
                      | ({} if self.labels is None else {"labels": self.labels})
                      | ({} if self.numbers is None else {"numbers": list(self.numbers)}))

    def save(self, path: Path) -> None:
        """Writes a .npz with `latents`, `names` and, if present, `labels` and `numbers`.

        Raises:
            OSError: the file can't be written.
        """
        more = {} if self.labels is None else {"labels": self.labels.numpy()}
        if self.numbers is not None:
            more["numbers"] = np.array(self.numbers, dtype=np.int64)
        with atomic_write(path) as file:
            np.savez(file, latents=self.latents.numpy(), names=np.array(self.names, dtype=str),
                     **more)


def read_latents(path: str | os.PathLike | Latents, shape: Sequence[int]) -> Latents:
    """Returns latents that `Latents.save` wrote, or the array `latents` of a .npz, or a .npy array.

    Args:
        path: the file, or latents, which are only checked.
        shape: [C, H, W] of the network's images.

    Raises:
        OSError: the file can't be read.
        ValueError: it does not hold such latents.
    """
    if isinstance(path, Latents):
        _check_shape(path.latents.shape, shape)
        return path
    with open(path, "rb") as file:
        try:
            return _latents_of(_read_arrays(file), shape)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _read_arrays(file: IO[bytes]) -> dict[str, np.ndarray]:
    """Returns the arrays of a .npz that belong to latents, or that of a .npy as 'latents'."""
    start = file.read(len(_NPY))
    if start == _NPY:
        return {"latents": _read_array(file, os.fstat(file.fileno()).st_size, "the array")}
    if not start.startswith(_ZIP):
        raise ValueError("must be a .npz with an array 'latents', as --encode writes it, or a "
                         ".npy array of latents")
    try:
        with zipfile.ZipFile(file) as archive:
            return {name: _read_member(archive, f"{name}.npy", f"its {name!r}")
                    for name in _ENTRIES if f"{name}.npy" in archive.namelist()}
    except _WrongEntryError:
        raise
    except DAMAGE as error:
        raise ValueError(f"is a damaged .npz ({error}); write it again") from error


class _WrongEntryError(ValueError):
    """An undamaged entry that is incomplete or not an array of numbers or text."""


def _read_member(archive: zipfile.ZipFile, name: str, what: str) -> np.ndarray:
    info = archive.getinfo(name)
    if info.flag_bits & 1:
        raise _WrongEntryError(f"{what} is encrypted; give a .npz without encryption")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _WrongEntryError(f"{what} is compressed with method {info.compress_type}; write it "
                               "with numpy.savez or numpy.savez_compressed")
    with archive.open(info) as member:  # the header says whether the rest is worth reading
        _check_header(member, info.file_size, what)
    content = archive.read(info)
    return _read_array(io.BytesIO(content), len(content), what)


def _read_array(file: IO[bytes], size: int, what: str) -> np.ndarray:
    file.seek(0)
    _check_header(file, size, what)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _check_header(file: IO[bytes], size: int, what: str) -> None:
    """Raises ValueError unless the file of an array has the size that its header states."""
    try:
        shape, _, dtype = read_npy_header(file)
    except ValueError as error:
        raise _WrongEntryError(f"{what} is not a NumPy array") from error
    if dtype.kind not in "biufcSU":
        raise _WrongEntryError(f"{what} is an array of {dtype.name}; must hold numbers, or text "
                               "for names")
    claimed, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed != held:
        raise _WrongEntryError(f"{what} should have {claimed} bytes for {list(shape)} of "
                               f"{dtype.name}, but has {held}; write the file again")


def _latents_of(arrays: dict[str, np.ndarray], shape: Sequence[int]) -> Latents:
    """Returns the latents in the arrays of a file. Raises ValueError for arrays that don't fit."""
    latents = arrays.get("latents")
    if latents is None or latents.dtype.kind != "f":
        raise ValueError("must have floating-point 'latents', as --encode writes them")
    _check_shape(latents.shape, shape)
    n = len(latents)
    names = arrays.get("names", np.arange(n))
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise ValueError(f"its names are {names.dtype.name} of shape {list(names.shape)}; must be "
                         f"text of shape [{n}], one for each latent")
    numbers = arrays.get("numbers")
    if numbers is not None and (numbers.shape != (n,) or numbers.dtype.kind not in "iu"
                                or (numbers < 0).any() or (numbers > np.iinfo(np.int64).max).any()):
        raise ValueError(f"its numbers of images must be whole numbers, 0 or more, one for each of "
                         f"its {n} latents")
    with np.errstate(over="ignore"):  # overflow becomes inf, which `Latents` refuses
        return Latents(
            torch.from_numpy(latents.astype(np.float64)), tuple(map(_text, names)),
            _labels_of(arrays.get("labels"), n),
            None if numbers is None else tuple(map(int, numbers)))


def _check_shape(given: Sequence[int], shape: Sequence[int]) -> None:
    """Raises ValueError unless latents of shape `given` belong to images of shape [C, H, W]."""
    wanted = "x".join(map(str, shape))
    if len(given) != 4 or not given[0]:
        raise ValueError(f"its latents have shape {list(given)}; must be [n, C, H, W], where the "
                         f"network takes {wanted}")
    if list(given[1:]) != list(shape):
        raise ValueError(f"its latents are {'x'.join(map(str, given[1:]))} (channels x height x "
                         f"width), but the network takes {wanted}")


def _labels_of(labels: np.ndarray | None, n: int) -> torch.Tensor | None:
    if labels is None:
        return None
    if labels.dtype.kind not in "biuf" or labels.ndim != 2:
        raise ValueError(f"its labels are {labels.dtype.name} of shape {list(labels.shape)}; must "
                         f"be numbers [{n}, label_dim], one-hot for classes")
    return torch.from_numpy(labels.astype(np.float32))


def _text(name: str | bytes | int) -> str:
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name)


def check_lengths(latents: Latents, D: float) -> None:
    """Raises ValueError for a latent far longer than any that the kernel draws at this D.

    The bound on |latent| / sqrt(N) is 1e6 times the radial factor that one in 10^12 draws exceeds.
    There is no bound if that factor overflows, at D far below 1.
    """
    try:
        limit = _FAR * (1 if math.isinf(D) else radial_factor(D, 1 - _RARE))
    except ValueError:
        return
    values = latents.latents.flatten(1)
    largest = values.abs().amax(dim=1).clamp(min=1e-300)  # divided by it, no square overflows
    lengths = largest * (values / largest[:, None]).square().mean(dim=1).sqrt()
    k = int(lengths.argmax())
    if lengths[k] > limit:
        raise ValueError(f"latent {shown_name(latents.names[k])} has a length of "
                         f"{lengths[k]:.3g} sqrt(N), but at D = {D:g} latents are at most "
                         f"{limit:.3g} sqrt(N) long; give latents of unit scale")


def joined(parts: Sequence[tuple[Sequence[int], Latents]], seeds: Sequence[int]) -> Latents:
    """Returns the latents of several (their seeds, latents), in the order of `seeds`."""
    place = {seed: (part, i) for own, part in parts for i, seed in enumerate(own)}
    rows = [place[seed] for seed in seeds]
    labels = None if rows[0][0].labels is None else torch.stack(
        [part.labels[i] for part, i in rows])
    numbers = None if rows[0][0].numbers is None else tuple(part.numbers[i] for part, i in rows)
    return Latents(torch.stack([part.latents[i] for part, i in rows]),
                   tuple(part.names[i] for part, i in rows), labels, numbers)


def between(ends: Latents, frames: int) -> Latents:
    """Returns latents on the paths from each end to the next, `frames` of them per path.

    Directions move along great circles at constant speed. Lengths are interpolated linearly in
    their logarithm, and labels linearly. An end between two paths appears once.

    Raises:
        ValueError: there are fewer than two ends or frames, an end is zero, or two neighbours are
            opposite, so that no great circle is the shortest.
    """
    if len(ends) < 2 or frames < 2:
        raise ValueError(f"{len(ends)} latents and {frames} frames; an interpolation needs at "
                         "least 2 of each")
    polar = _polar(ends)
    made, names, labels = [], [], []
    for i in range(len(ends) - 1):
        if (polar[i][0] + polar[i + 1][0]).norm() < _OPPOSITE:
            raise ValueError(f"latents {shown_name(ends.names[i])} and "
                             f"{shown_name(ends.names[i + 1])} are opposite, so no great circle "
                             "between them is the shortest; put a third latent between them")
        for t in torch.linspace(0, 1, frames, dtype=torch.float64)[min(i, 1):]:
            made.append(_between(*polar[i], *polar[i + 1], t))
            names.append(f"{ends.names[i]} to {ends.names[i + 1]}, {t.item():.3f}")
            if ends.labels is not None:
                labels.append(torch.lerp(ends.labels[i], ends.labels[i + 1], t.float()))
    return Latents(torch.stack(made), tuple(names), torch.stack(labels) if labels else None)


def _polar(latents: Latents) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the unit direction of each latent and the logarithm of its length.

    Raises:
        ValueError: a latent is zero.
    """
    found = []
    for k, latent in enumerate(latents.latents):
        largest = latent.abs().max()
        if largest == 0:
            raise ValueError(f"latent {shown_name(latents.names[k])} is zero and has no direction; "
                             "leave it out")
        direction = latent / largest  # its squares neither overflow nor vanish
        length = direction.norm()
        found.append((direction / length, length.log() + largest.log()))
    return found


def _between(a: torch.Tensor, log_a: torch.Tensor, b: torch.Tensor, log_b: torch.Tensor,
             t: torch.Tensor) -> torch.Tensor:
    # The angle from the tangent of its half is accurate for small angles and near pi.
    angle = 2 * torch.atan2((a - b).norm(), (a + b).norm())
    if angle.sin() < 1e-9:
        direction = torch.lerp(a, b, t)
    else:
        direction = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return direction * (log_a * (1 - t) + log_b * t).exp()


def at_radii(directions: Latents, D: float, quantiles: Sequence[float]) -> Latents:
    """Returns each direction at n quantiles of the kernel's radial factor sqrt(D/c).

    Args:
        directions: latents [C, H, W]. Only their directions are used. The new lengths are sqrt(N)
            times the factor, with N = C*H*W, because |z| is nearly sqrt(N).
        D: augmented dimensions, finite.
        quantiles: numbers between 0 and 1, in any order.

    Raises:
        ValueError: D or a quantile is out of range, or a latent is zero.
    """
    if not len(quantiles):
        raise ValueError("quantiles: must be one or more")
    N = directions.latents[0].numel()
    factors = [radial_factor(D, quantile) for quantile in quantiles]
    made = [N ** 0.5 * factor * direction
            for direction, _ in _polar(directions) for factor in factors]
    names = [f"{name}, {quantile:g}" for name in directions.names for quantile in quantiles]
    labels = directions.labels
    if labels is not None:
        labels = labels.repeat_interleave(len(quantiles), dim=0)
    return Latents(torch.stack(made), tuple(names), labels)


def radial_factor(D: float, quantile: float) -> float:
    """Returns the quantile of sqrt(D/c) for c ~ chi^2_D.

    Raises:
        ValueError: D is not positive and finite, the quantile is not between 0 and 1, or the
            factor overflows or is 0.
    """
    import scipy.special  # late: it is slow to load, and only this function needs it

    if not 0 < D < math.inf:
        raise ValueError(f"D={D:g}: must be positive and finite; at D = inf all radii are equal")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile:g}: must be between 0 and 1")
    chi2 = float(scipy.special.chdtri(D, quantile))
    factor = math.sqrt(D / chi2) if chi2 > 0 else math.inf
    if not 0 < factor < math.inf:
        raise ValueError(f"quantile={quantile:g}: at D={D:g}, this radius is out of the range of "
                         "floating-point numbers; give another quantile")
    return factor
