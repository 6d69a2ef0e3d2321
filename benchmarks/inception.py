"""Inception features: folded batch norm in channels_last against the network as published.

The weights are random, because the speed does not depend on them.
"""

import math

import torch
import torch.nn.functional as F

from benchmarks.table import Options, Row, in_turn, relative_error, with_ratios
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


@torch.inference_mode()
def rows(options: Options) -> list[Row]:
    """Returns both implementations for 16 images on the CPU, or 128 on a GPU."""
    device, batch = options.device, 128 if options.device.type == "cuda" else 16
    state = {name: value.to(device) for name, value in random_state().items()}
    network = inception.InceptionV3(state, device)
    images = torch.randint(256, [batch, 3, 32, 32], dtype=torch.uint8, device=device)
    features = {}
    ways = {"folded, channels_last": lambda: features.update(ours=network(images).cpu()),
            "as written": lambda: features.update(naive=naive(state, images).cpu())}
    in_turn(ways, 1)
    seconds = in_turn(ways, options.repeats)
    error = relative_error(features["ours"], features["naive"])
    return with_ratios([Row(f"Inception features, batch {batch}", name, seconds[name], batch,
                            error=error if name != "as written" else None) for name in ways],
                       "as written")
