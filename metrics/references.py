"""Reference statistics, with which generated images are compared, and their files.

An .npz holds float64 `mu` [d] and `sigma` [d, d], and optionally the name of the `detector` (if
absent, inception), the `image_shape` [3] and `count` of the images, and their `features` [n, d].
For images that are not 8-bit it also holds their `scale` [2, C or 1], which is (center, spread):
center maps to 0, and center + spread to 1. A .pkl is one of EDM2:
{"num_images": n, "fid": {"mu": ..., "sigma": ...}, "fd_dinov2": {...}}.
No code in a file is run, and sizes are checked before memory is allocated.
"""

import functools
import hashlib
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

import dnnlib.util
from dnnlib import plain_pickle
from dnnlib.atomic import atomic_write
from metrics.npz_arrays import MAX_FEATURES, read_npz_array

MAX_BANK = 50_000  # images whose features are kept: 410 MB for Inception

_REQUIRED = ("mu", "sigma")
_ARRAYS = {"mu": "f", "sigma": "f", "detector": "U", "image_shape": "i", "count": "i",
           "features": "f", "scale": "f"}
_MOST_ROWS = {"features": MAX_BANK}
_PICKLED = {"fid": "inception", "fd_dinov2": "dinov2"}  # detectors of the entries of EDM2's files
_PICKLE_MAGIC = b"\x80"
_MAX_PICKLE_BYTES = 1 << 30  # EDM2's have 42 MB
_READ_BYTES = 1 << 20  # block size for the hash


@dataclass(frozen=True)
class Reference:
    """Statistics with which generated images are compared."""

    mu: np.ndarray  # mean of the features, [d] float64
    sigma: np.ndarray  # their covariance, [d, d] float64
    detector: str  # the name of the detector whose features they are
    features: torch.Tensor | None = None  # [n, d] float32, for the metrics that need them
    image_shape: tuple[int, ...] | None = None  # channels, height, width; None if not recorded
    count: int | None = None  # number of images; None if not recorded
    digest: str | None = None  # sha256 of the file, or fingerprint of the data set
    scale: dict | None = None  # {"center": [...], "spread": [...]} of images that are not 8-bit


def save_reference(path: str | os.PathLike, reference: Reference) -> None:
    """Writes a reference as .npz without its unknown entries, and creates its folder if needed."""
    arrays = {"mu": reference.mu, "sigma": reference.sigma,
              "detector": np.array(reference.detector)}
    for name in ("image_shape", "count", "features"):
        value = getattr(reference, name)
        if value is not None:
            arrays[name] = np.asarray(value)
    if reference.scale:
        arrays["scale"] = np.array([reference.scale["center"], reference.scale["spread"]])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def load_reference(path: str, detector: str = "inception") -> Reference:
    """Reads a file or http(s) address: an .npz of `save_reference`, EDM or PFGM++, or EDM2's .pkl.

    An .npz is read completely. A .pkl may hold the statistics of several detectors, of which those
    of `detector` are returned.

    Raises:
        OSError: it can't be read or downloaded.
        ValueError: it is not such a file, or has no statistics of `detector`.
    """
    try:
        with dnnlib.util.open_url(path) as file:
            is_pickle = file.read(1) == _PICKLE_MAGIC
            if not is_pickle and not zipfile.is_zipfile(file):
                raise ValueError("neither a complete .npz nor a pickle of protocol 2 or later; "
                                 "save an older pickle with pickle.dump(value, file, protocol=4)")
            found = _read_pickle(file) if is_pickle else {detector: _read_npz(file)}
            file.seek(0)
            digest = hashlib.sha256()
            for block in iter(functools.partial(file.read, _READ_BYTES), b""):
                digest.update(block)
        if detector in found:
            return _checked_reference(found[detector], digest.hexdigest())
    # The last two are raised by an unknown compression method and an encrypted member.
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError,
            RuntimeError) as error:
        reason = str(error).strip("'\"").split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not reference statistics: {reason}") from error
    raise ValueError(f"{path}: holds statistics of {' and '.join(found)}, but not of detector "
                     f"{detector}; give --detector={' or --detector='.join(found)}")


def _read_npz(file: IO[bytes]) -> dict[str, np.ndarray]:
    """Returns the arrays in an .npz that form a reference."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if "arr_0.npy" in names and "mu.npy" not in names:  # local files are opened as data sets
            raise ValueError("it holds images (arr_0); download the file and give it as --ref")
        return {name: read_npz_array(archive, name, kind, _MOST_ROWS.get(name, MAX_FEATURES))
                for name, kind in _ARRAYS.items() if name in _REQUIRED or f"{name}.npy" in names}


def _read_pickle(file: IO[bytes]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the arrays that form a reference, by the names of the detectors; at least one."""
    size = file.seek(0, os.SEEK_END)
    if size > _MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {size} bytes, at most {_MAX_PICKLE_BYTES} are allowed")
    file.seek(0)
    content = plain_pickle.loads(file.read())
    entries = {key: content[key] for key in _PICKLED if key in content} if isinstance(
        content, dict) else {}
    if not entries:
        raise ValueError(f"a pickle without statistics called {' or '.join(_PICKLED)}")
    count = content.get("num_images")
    if not (count is None or type(count) is int and count > 0):
        raise ValueError("num_images is not a positive number")
    counted = {} if count is None else {"count": np.array(count)}
    return {_PICKLED[key]: {"detector": np.array(_PICKLED[key]), **counted,
                            **_pickled_statistics(key, entry)} for key, entry in entries.items()}


def _pickled_statistics(key: str, entry: object) -> dict[str, np.ndarray]:
    """Returns mu and sigma of one entry of a pickle."""
    if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name), plain_pickle.Array) for name in _REQUIRED):
        raise ValueError(f"{key} has no arrays {' and '.join(_REQUIRED)}")
    arrays = {name: entry[name].numpy() for name in _REQUIRED}
    for name, values in arrays.items():
        if values.dtype.kind != "f":
            raise ValueError(f"{key}: {name} has type {values.dtype}, expected floats")
    return arrays


def _checked_reference(arrays: dict[str, np.ndarray], digest: str) -> Reference:
    """Returns the reference of these arrays; raises ValueError if they are inconsistent."""
    mu, sigma, features = arrays["mu"], arrays["sigma"], arrays.get("features")
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu has shape {list(mu.shape)} and sigma {list(sigma.shape)}, "
                         "expected [d] and [d, d]")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("mu or sigma has values that are not finite")
    tolerance = 1e-5 * np.abs(sigma).max()  # float32 covariances are symmetric to 1e-6
    if np.abs(sigma - sigma.T).max() > tolerance or sigma.diagonal().min() < -tolerance:
        raise ValueError("sigma is not a covariance")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(mu)
                                 or not np.isfinite(features).all()):
        raise ValueError(f"features has shape {list(features.shape)}, or values that are not "
                         f"finite; expected [n, {len(mu)}]")
    scale = arrays.get("scale")
    if scale is not None and (scale.ndim != 2 or len(scale) != 2):
        raise ValueError(f"scale has shape {list(scale.shape)}, expected [2, C]")
    for name, expected in (("detector", ()), ("count", ()), ("image_shape", (3,))):
        if name in arrays and arrays[name].shape != expected:
            raise ValueError(f"{name} has shape {list(arrays[name].shape)}, "
                             f"expected {list(expected)}")
    shape = arrays.get("image_shape")
    return Reference(
        mu.astype(np.float64), sigma.astype(np.float64), str(arrays.get("detector", "inception")),
        None if features is None else torch.from_numpy(features.astype(np.float32)),
        None if shape is None else tuple(map(int, shape)),
        int(arrays["count"]) if "count" in arrays else None, digest,
        None if scale is None else dict(zip(("center", "spread"), scale.tolist(), strict=True)))
