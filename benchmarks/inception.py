"""Inception features: folded batch norm in channels_last against the network as it is written.

    python -m benchmarks.inception [--batch 16] [--repeats 7]

Random weights stand for the published ones; speed does not depend on them. Prints medians of
interleaved runs, their ratio and the relative error of the features.
"""

import math
import statistics
import time

import click
import torch
import torch.nn.functional as F

from metrics import inception


def random_state() -> dict[str, torch.Tensor]:
    """Returns weights that keep activations at unit scale."""
    rng, state = torch.Generator().manual_seed(0), {}
    for name, shape in inception.state_shapes().items():
        values = torch.randn(shape, generator=rng)
        if name.endswith("conv.weight"):
            values *= math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            values = 1 + 0.1 * values.abs()
        else:
            values *= 0.1
        state[name] = values
    return state


def naive(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Returns the features by convolution, then batch norm, then ReLU, in NCHW."""
    def apply_conv(x, name, conv):
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, conv.stride, conv.pad)
        bn = [state[f"{name}.bn.{key}"]
              for key in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *bn, eps=inception.BN_EPS))

    x = (inception.resize(images.float(), inception.RESOLUTION) - 128) / 128
    return inception.run(inception.NETWORK, x, apply_conv).mean([2, 3])


@click.command()
@click.option("--batch", type=int, default=16)
@click.option("--repeats", type=int, default=7)
@torch.inference_mode()
def main(batch, repeats):
    """Compares the two on the CPU."""
    state = random_state()
    images = torch.randint(256, [batch, 3, 32, 32], dtype=torch.uint8)
    network = inception.InceptionV3(state)
    ways = {"folded, channels_last": lambda: network(images),
            "as written": lambda: naive(state, images)}
    seconds = {name: [] for name in ways}
    features = {name: way() for name, way in ways.items()}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = (statistics.median(times) for times in seconds.values())
    for name, times in seconds.items():
        print(f"{name:22s} {1e3 * statistics.median(times) / batch:7.1f} ms/image")
    a, b = features.values()
    print(f"ratio {theirs / ours:.2f}; relative error {((a - b).norm() / b.norm()):.1e}")


if __name__ == "__main__":
    main()
