"""Scores of few-step networks and of denoisers by number of evaluations, and a picture of both.

    python -m benchmarks.few_steps --ref=datasets/emoji-faces-16.zip --out=docs/few-steps.png \
        --networks=examples/emoji16-128.pt,examples/emoji16-128-few-steps.pt

The scores are Frechet distances between samples and a data set, averaged over ranges of seeds.
Denoisers are sampled with Heun's method and ipndm. The noise between two evaluations of a few-step
network is correctly that of the kernel. To show what Gaussian noise would cost, the second line of
a network with finite D uses Gaussian noise with the same levels and normal vectors.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click
import torch

from benchmarks.solvers import table
from dnnlib.cli import user_errors
from images.grid import image_grid, save_png
from metrics.scoring import network_features, open_evaluator
from pfgmpp.samplers import SampleBatch, draw_latents, to_uint8
from sampling.network_sampler import NetworkSampler

_STEPS = (1, 2, 4)  # steps of few-step networks
_SOLVER_STEPS = {"heun": (18, 5, 4, 3), "ipndm": (35, 9, 7, 5)}  # steps of denoisers
_SHOWN = 12  # seeds in a row of the picture


@dataclasses.dataclass(frozen=True)
class GaussianBetween:
    """A few-step sampler whose noise between evaluations is Gaussian for any D."""

    sampler: NetworkSampler

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self.sampler.image_shape

    @property
    def scaling(self):
        """The scaling of the data on which the network was trained."""
        return self.sampler.scaling

    @torch.inference_mode()
    def images(self, batches: Iterable[Sequence[int]]) -> Iterator[SampleBatch]:
        """Yields the images of each batch of seeds."""
        own = self.sampler
        for seeds in filter(None, batches):
            latents, labels, rnd = draw_latents(own.net, seeds, own.device, own.class_idx,
                                                own.labels)
            ones = torch.ones(len(seeds), dtype=torch.float64, device=own.device)
            images = own.sampler.sample(own.net, latents, labels, rnd.randn_like,
                                        kernel_scale=lambda kernel, ones=ones: ones)
            yield SampleBatch(list(seeds), images, labels)


def samplers(network: str, device: torch.device) -> Iterator[tuple[str, NetworkSampler]]:
    """Yields the ways to sample a network, with the names of their rows."""
    few_step = NetworkSampler.open(network, device).net.few_step
    if few_step is not None:
        for steps in _STEPS:
            yield few_step.method, NetworkSampler.open(network, device, num_steps=steps)
        return
    for solver, all_steps in _SOLVER_STEPS.items():
        for steps in all_steps:
            yield solver, NetworkSampler.open(network, device, num_steps=steps, solver=solver)


@click.command()
@click.option("--networks", metavar="LIST", required=True, help="Networks, or their runs.")
@click.option("--ref", metavar="ZIP|DIR", required=True, help="Data set that they were trained on.")
@click.option("--detector", default="pixels", show_default=True, help="Features to score by.")
@click.option("--num", metavar="INT", type=int, default=459, show_default=True, help="Samples.")
@click.option("--ranges", metavar="INT", type=int, default=3, show_default=True,
              help="Ranges of seeds, of which means are taken.")
@click.option("--batch", metavar="INT", type=int, default=64, show_default=True,
              help="Samples at a time.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Where to sample.")
@click.option("--out", metavar="PNG", type=click.Path(path_type=Path), help="Picture to write.")
def main(networks: str, ref: str, detector: str, num: int, ranges: int, batch: int, device: str,
         out: Path | None) -> None:
    """Prints a table of scores for each network, and draws the same seeds sampled in all ways."""
    with user_errors():
        evaluator, rows, labels = None, [], []
        for network in networks.split(","):
            found: dict[str, dict[int, float]] = {}
            for name, sampler in samplers(network, torch.device(device)):
                evaluator = evaluator or open_evaluator(
                    detector, ref, ["fid"], torch.device(device), {network: sampler}, batch=batch,
                    workers=0)
                nfe, ways = sampler.sampler.nfe, {name: sampler}
                if sampler.net.few_step and nfe > 1 and math.isfinite(sampler.net.D):
                    ways[f"{name}, Gaussian noise between"] = GaussianBetween(sampler)
                for way, samples in ways.items():
                    found.setdefault(way, {})[nfe] = statistics.mean(
                        evaluator.evaluate(network_features(
                            samples, range(first * num, (first + 1) * num), evaluator.detector,
                            metrics=["fid"], batch=batch))["fid"] for first in range(ranges))
                [shown] = sampler.images([range(_SHOWN)])
                rows.append(to_uint8(shown.images).cpu().numpy())
                labels.append(f"{name} {nfe}")
            print(f"{Path(network).name}, {ranges} x {num} samples, {detector}, by evaluations\n\n"
                  f"{table(found, 3, 'sampler')}\n", flush=True)
        if out:
            save_png(out, image_grid(rows, labels))
            print(f"{out}: written")


if __name__ == "__main__":
    sys.exit(main())
