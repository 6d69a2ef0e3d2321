"""Phantoms for image restoration: slices of ellipses in Hounsfield units, and noisy copies.

    python docs/phantoms.py --dest=phantoms.npy --num=400 --seed=0

It writes an array [n, 2, S, S] float32 in HU, slice by slice: channel 0 is the noisy measurement,
channel 1 the truth. A slice is air (-1000) around a body of about 40 HU, with up to seven organs,
cavities and bones in it. The noise is that of photon counting: with k photons in water,

    v = 1000 (m / k - 1),    m ~ Poisson(k (y + 1000) / 1000)

so its standard deviation is 1000 sqrt((y + 1000) / 1000 / k), which in water equals --noise. Bone
has more noise, and air has none. The noise is unbiased and independent between pixels, unlike that
of a scanner.
"""

import math
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - the path above

from dnnlib.atomic import atomic_write, check_writable  # noqa: E402
from dnnlib.cli import HELP_NAMES, flag_errors, run, user_errors  # noqa: E402
from dnnlib.progress import FIRST_LINE_SEC, Progress  # noqa: E402

AIR, BODY = -1000.0, 40.0
# Range of values, range of half axes (as a share of the body's), and how often each is drawn.
TISSUES = {"organ": ((-20, 120), (0.1, 0.4), 5), "fat": ((-110, -70), (0.1, 0.3), 2),
           "lung": ((-850, -700), (0.15, 0.35), 1), "bone": ((300, 900), (0.04, 0.12), 2)}
_NOISE = 1e-3, 1e5  # HU: from 10^12 photons per pixel, and from one photon per 10^4 pixels
_FINE = 4  # subpixels per side, over which the edges of ellipses are averaged


def phantom(side: int, rng: np.random.Generator) -> np.ndarray:
    """Returns one slice, [side, side] float64 in HU."""
    fine = side * _FINE
    y, x = (np.mgrid[:fine, :fine] + 0.5) / fine * 2 - 1  # from -1 to 1
    axes = rng.uniform(0.6, 0.9, 2)
    image = np.where(_inside(x, y, (0, 0), axes, rng.uniform(0, np.pi)), BODY, AIR)
    names = list(TISSUES)
    shares = np.array([TISSUES[name][2] for name in names], float)
    for name in rng.choice(names, rng.integers(3, 8), p=shares / shares.sum()):
        values, sizes, _ = TISSUES[name]
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.55)
        center = distance * axes[0] * np.cos(angle), distance * axes[1] * np.sin(angle)
        half = rng.uniform(*sizes, 2) * axes.min()
        image = np.where(_inside(x, y, center, half, rng.uniform(0, np.pi)) & (image > AIR),
                         rng.uniform(*values), image)
    return image.reshape(side, _FINE, side, _FINE).mean(axis=(1, 3))


def _inside(x, y, center, half, angle) -> np.ndarray:
    """Returns a mask of the points inside an ellipse."""
    dx, dy = x - center[0], y - center[1]
    along = (dx * np.cos(angle) + dy * np.sin(angle)) / half[0]
    across = (dy * np.cos(angle) - dx * np.sin(angle)) / half[1]
    return along**2 + across**2 < 1


def measure(image: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Returns a noisy copy of an image in HU; the standard deviation in water is `noise`."""
    photons = (1000 / noise) ** 2
    return 1000 * (rng.poisson(photons * (image + 1000) / 1000) / photons - 1)


def _parse_noise(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not _NOISE[0] <= value <= _NOISE[1]:  # nor NaN
        raise click.BadParameter("{:g}: must be from {:g} to {:g} HU".format(value, *_NOISE))
    return value


@click.command(context_settings=HELP_NAMES)
@click.option("--dest", metavar="NPY", type=click.Path(path_type=Path), required=True,
              help="File to write.")
@click.option("--num", metavar="INT", type=click.IntRange(1, 10**6), default=400, show_default=True,
              help="Number of slices.")
@click.option("--side", metavar="INT", type=click.IntRange(8, 2048), default=64, show_default=True,
              help="Height and width of a slice in pixels.")
@click.option("--noise", metavar="HU", type=float, callback=_parse_noise, default=60,
              show_default=True, help="Standard deviation of the noise in water.")
@click.option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, show_default=True,
              help="Random seed.")
def main(dest: Path, num: int, side: int, noise: float, seed: int) -> None:
    """Writes slices of ellipses in Hounsfield units, each with a noisy copy."""
    with user_errors():
        with flag_errors("--dest", dest, "give a file"):
            check_writable(dest)
            dest.parent.mkdir(parents=True, exist_ok=True)
        squares = 0.0
        with atomic_write(dest) as file, \
                Progress(num, "Drawing", delay=1, first_line_sec=FIRST_LINE_SEC) as progress:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (num, 2, side, side)})
            for k in progress.over(range(num)):
                rng = np.random.default_rng([seed, k])
                truth = phantom(side, rng)
                pair = np.stack([measure(truth, noise, rng), truth]).astype("<f4")
                file.write(pair.tobytes())
                squares += float(np.mean(np.square(pair[0] - pair[1], dtype=np.float64)))
        error = math.sqrt(squares / num)
        click.echo(f"{dest}: {num} pairs of {side}x{side}; noise of {error:.4g} HU over all pixels")


if __name__ == "__main__":
    run(main)
