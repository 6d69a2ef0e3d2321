"""States off their level: how well networks of several D restore images with unusual errors.

    y held-out image    x initial state of the sampler    S standard deviation of its error x - y

    gaussian     x = y + S z            Gaussian noise, on which D = inf is trained
    kernel       x = y + S sqrt(D/c) z  noise of the network's own kernel
    half, twice  x = y + S/2 z, y + 2 S z    the sampler nevertheless begins at S
    uniform      x = y + S u            u uniform in [-sqrt(3), sqrt(3)]
    blur         x = y after a binomial filter; S is the root mean square of x - y over all images

The sampler solves from S to 0 by Heun's method. The results are the PSNRs of the states x and of the
restored images. They are appended to metrics.jsonl of each run, except for those that it already
has.
"""

import json
import math
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - the path above
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from checkpoints import checkpoint  # noqa: E402
from checkpoints.names import find_network, kimg_of_network  # noqa: E402
from dnnlib.atomic import append_line  # noqa: E402
from dnnlib.cli import HELP_NAMES, FiniteNumber, run, user_errors  # noqa: E402
from dnnlib.util import json_value  # noqa: E402
from images.dataset import ImageFolderDataset  # noqa: E402
from metrics.paired import psnr  # noqa: E402
from metrics.score_names import SCORES_FILE  # noqa: E402
from pfgmpp.kernel import PerturbationKernel  # noqa: E402
from pfgmpp.samplers import sampler  # noqa: E402

ERRORS = ("gaussian", "kernel", "half", "twice", "uniform", "blur")
_RANGE = (-1.0, 1.0)  # of the values that networks see


def disturbed(y: torch.Tensor, error: str, S: float, D: float, seed: int
              ) -> tuple[torch.Tensor, float]:
    """Returns images [B, C, H, W] with an error from `ERRORS`, and its standard deviation."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(y.shape, generator=rng)
    if error == "blur":
        blurred = _blurred(y)
        return blurred, float((blurred - y).square().mean().sqrt())
    if error == "kernel":
        return y + PerturbationKernel(D).sample(tuple(y.shape), S, rng), S
    if error == "uniform":
        return y + S * math.sqrt(3) * (2 * torch.rand(y.shape, generator=rng) - 1), S
    return y + {"gaussian": 1.0, "half": 0.5, "twice": 2.0}[error] * S * z, S


def _blurred(y: torch.Tensor) -> torch.Tensor:
    """Returns images [B, C, H, W] after the binomial filter (1, 2, 1)/4 along both sides."""
    taps = torch.tensor([0.25, 0.5, 0.25])
    weight = torch.outer(taps, taps).expand(y.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), weight, groups=y.shape[1])


def mean_psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns the mean peak signal-to-noise ratio of images [B, C, H, W] in dB."""
    return float(np.mean([psnr(*pair, _RANGE) for pair in zip(x.numpy(), y.numpy(), strict=True)]))


def scores(network: str, data: ImageFolderDataset, level: float, num_steps: int, seed: int
           ) -> list[dict]:
    """Returns a record for each of `ERRORS`, and one for the state itself, as `sampler` 'none'."""
    content = checkpoint.load(network)
    net = checkpoint.build_ema(content)
    D = net.D or math.inf
    images, labels = data.get_batch(range(len(data)))[:2]
    y = data.scaling.to_network(torch.from_numpy(images))
    class_labels = torch.from_numpy(labels) if net.label_dim else None
    common = {"D": D, "weights": checkpoint.digest(checkpoint.sampling_weights(content))}
    found = []
    for error in ERRORS:
        x, S = disturbed(y, error, level, D, seed)
        with torch.inference_mode():
            restored = sampler(net, torch.zeros_like(x), class_labels, num_steps=num_steps,
                               sigma_max=S, init=x, init_noise=0.0)
        for name, state, steps in (("input", x, None), ("restored", restored, num_steps)):
            found.append({
                "metric": "psnr", "value": mean_psnr(state, y), "what": name,
                "network": str(network), "kimg": float(kimg_of_network(Path(network).name) or 0),
                "num": len(data), "seeds": str(seed), "range": list(_RANGE),
                "reference": str(data.path), "reference_sha256": data.fingerprint,
                "sampler": {**common, "off_level": f"{error}, {name}", "level": round(S, 6),
                            "num_steps": steps}})
    return found


def check(network: str, data: ImageFolderDataset) -> None:
    """Checks that a network can restore the images, and that its file of scores can be read.

    Raises:
        OSError: a file can't be read.
        ValueError: a file is damaged, or the network is for images or labels of another kind.
    """
    net = checkpoint.build_ema(checkpoint.load(network))
    if list(net.image_shape) != list(data.image_shape):
        wanted, given = ("x".join(map(str, shape)) for shape in (net.image_shape, data.image_shape))
        raise ValueError(f"--data={data.path}: its images are {given} (channels, height, width), "
                         f"but {network} makes {wanted}; name images of this shape")
    if getattr(net, "cond_channels", 0):
        raise ValueError(f"{network}: needs condition images, which this script does not give")
    if net.label_dim not in (0, data.label_dim):
        given = f"labels of {data.label_dim} numbers" if data.has_labels else "no labels"
        raise ValueError(f"--data={data.path}: has {given}, but {network} needs {net.label_dim}; "
                         "name images that are labelled like its training data")
    recorded(Path(network).parent / SCORES_FILE)


def recorded(path: Path) -> set[tuple]:
    """Returns what the scores of this script in a file are of.

    A last line without an end is left out, because `append_line` removes it.

    Raises:
        ValueError: another line is damaged.
    """
    found = set()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        if '"off_level"' not in line:
            continue
        try:
            found.add(key(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is damaged; remove it") from error
    return found


def key(record: dict) -> tuple:
    """Returns what a record is of, without its value."""
    settings = (record["sampler"].get(name)
                for name in ("weights", "off_level", "level", "num_steps"))
    return record["seeds"], record["reference_sha256"], *settings


@click.command(context_settings=HELP_NAMES)
@click.argument("run_dirs", nargs=-1, required=True)
@click.option("--data", metavar="ZIP|DIR", required=True, help="Held-out images, with labels if the networks take them.")
@click.option("--level", metavar="S", type=FiniteNumber(min=0, min_open=True), default=0.5, show_default=True, help="Deviation of the errors, on the networks' scale.")
@click.option("--steps", metavar="INT", type=click.IntRange(min=1), default=9, show_default=True, help="Steps of the solver.")
@click.option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the errors.")
def main(run_dirs: tuple[str, ...], data: str, level: float, steps: int, seed: int) -> None:
    """Measures how well networks restore images with errors that are off their level."""
    with user_errors():
        dataset = ImageFolderDataset(data, use_labels=True)
        networks = [find_network(run_dir) for run_dir in run_dirs]
        for network in networks:
            check(network, dataset)
        for run_dir, network in zip(run_dirs, networks, strict=True):
            path = Path(network).parent / SCORES_FILE
            found = scores(network, dataset, level, steps, seed)
            known = recorded(path)
            if new := [record for record in found if key(record) not in known]:
                date = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
                append_line(path, "\n".join(json.dumps(json_value(record | date))
                                            for record in new))
            print(f"{run_dir}: " + ", ".join(
                f"{record['sampler']['off_level'].split(',')[0]} {record['value']:.2f} dB"
                for record in found if record["what"] == "restored"), flush=True)


if __name__ == "__main__":
    run(main)
