"""Scores of one image against its truth: PSNR, SSIM, errors, and the user's own functions.

    mse    mean of (image - truth)^2 over all values
    psnr   10 log10((hi - lo)^2 / mse), in dB
    rmse   sqrt(mse), in the units of the data
    mae    mean of |image - truth|, in the units of the data
    ssim   structural similarity, Wang et al. 2004

PSNR and SSIM are relative to the range [lo, hi] of the data. SSIM depends on more than the
difference, so it is computed on v - lo: data in Hounsfield units then have the same SSIM as when
they are rescaled to [0, 1]. docs/metrics.md gives the formulas of both kinds of SSIM.
"""

import contextlib
import functools
import importlib.util
import math
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dnnlib import console, signals
from dnnlib.cli import describe
from dnnlib.util import shown

# Maps (image, truth, (lo, hi)) to a number. Images are float64 [C, H, W] in the data's units.
PairedMetric = Callable[[np.ndarray, np.ndarray, tuple[float, float]], float]

SSIM_WINDOWS = {"ssim": 11, "ssim_uniform": 7}  # side in pixels


def rmse(image: np.ndarray, truth: np.ndarray, value_range: tuple[float, float]) -> float:
    """Returns the root of the mean squared difference."""
    return math.sqrt(np.mean(np.square(image - truth)))


def mae(image: np.ndarray, truth: np.ndarray, value_range: tuple[float, float]) -> float:
    """Returns the mean absolute difference."""
    return float(np.mean(np.abs(image - truth)))


def psnr(image: np.ndarray, truth: np.ndarray, value_range: tuple[float, float]) -> float:
    """Returns the ratio of the range to the RMS difference in dB; inf for equal images."""
    low, high = value_range
    error = rmse(image, truth, value_range)
    return 20 * math.log10((high - low) / error) if error else math.inf


def _ssim(image: np.ndarray, truth: np.ndarray, value_range: tuple[float, float],
          **window) -> float:
    """Returns the mean of the SSIM map, over channels and where the window lies in the image."""
    from skimage.metrics import structural_similarity

    low, high = value_range
    return float(structural_similarity(image - low, truth - low, data_range=high - low,
                                       channel_axis=0, **window))


# "ssim" is that of Wang et al. 2004: Gaussian weights of 11x11 pixels and population covariances.
# "ssim_uniform" is scikit-image's default: 7x7 equal weights and sample covariances. Both have
# K1 = 0.01 and K2 = 0.03.
PAIRED_METRICS: dict[str, PairedMetric] = {
    "psnr": psnr,
    "ssim": functools.partial(_ssim, gaussian_weights=True, sigma=1.5,
                              use_sample_covariance=False),
    "ssim_uniform": _ssim,
    "rmse": rmse,
    "mae": mae,
}


def ssim_problem(metric: str, sizes: Sequence[tuple[int, int]]) -> str | None:
    """Returns why images of these heights and widths can't have an SSIM; None if they can."""
    if importlib.util.find_spec("skimage") is None:
        return "needs scikit-image, which is not installed: pip install scikit-image"
    side, least = SSIM_WINDOWS[metric], min(map(min, sizes))
    if least < side:
        return f"has a window of {side}x{side} pixels, but an image has a side of {least}"
    return None


class MetricOfFile:
    """A user's function; an error in its code is reported in one line.

    It gets copies of image and truth, because it may modify them.
    """

    def __init__(self, where: str, file: str, function: PairedMetric):
        self._where, self._file, self._function = where, file, function

    def __call__(self, image: np.ndarray, truth: np.ndarray,
                 value_range: tuple[float, float]) -> float:
        """Returns what the function returns.

        Raises:
            ValueError: the function raised an error.
        """
        with _errors_of_user(self._where, self._file):
            return self._function(image.copy(), truth.copy(), value_range)


@contextlib.contextmanager
def _errors_of_user(where: str, file: str) -> Iterator[None]:
    """Turns any error of the user's code into a ValueError that gives the line in the file.

    With --verbose its traceback is printed.
    """
    try:
        yield
    except signals.Stopped:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code may raise
        if console.is_verbose():
            traceback.print_exc()
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == file]
        line = f" (line {lines[-1]})" if lines else ""
        text = describe(error).removeprefix(f"{file}: ")
        kind = "" if isinstance(error, OSError | SyntaxError) and text else \
            f"{type(error).__name__}{': ' if text else ''}"
        raise ValueError(f"{where}: {kind}{text}{line}") from error


def load_metric(spec: str) -> tuple[str, PairedMetric]:
    """Returns the name and the function of FILE.py:FUNCTION, and runs the file for that.

    Raises:
        ValueError: the file can't be read or run or lacks the function, or the name is taken.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"--metric-file={spec}: must be FILE.py:FUNCTION, a function of (image, "
                         "truth, value_range)")
    if name in PAIRED_METRICS:
        raise ValueError(f"--metric-file={spec}: {name} is already a metric of --metrics; give the "
                         "function another name")
    module_name = f"_metric_file_{Path(path).stem}_{zlib.crc32(os.path.abspath(path).encode())}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # where dataclasses and pickle look for it
    with _errors_of_user(f"--metric-file={path}", module_spec.origin):
        module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(f"--metric-file={spec}: the file has no function {name}"
                         f"{'; it has ' + ', '.join(there[:6]) if there else ''}")
    return name, MetricOfFile(f"--metric-file={spec}", module_spec.origin, function)


def as_number(value: object, metric: str) -> float:
    """Returns the value of a metric as a float; raises ValueError if it is not a number."""
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # long arrays: the middle two
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{metric} gave {shown(value)}; must be a number")
    return number
