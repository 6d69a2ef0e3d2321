"""Scores of few-step networks by evaluations, and of Gaussian noise between them at finite D.

    python -m benchmarks.few_steps --networks=runs/ect,runs/cd --ref=datasets/emoji-faces-16.zip

Frechet distances of samples to a data set, means over ranges of seeds. The noise between two
evaluations is that of the kernel, as it should be; in the second line of a network of finite D it
is Gaussian, with the same levels and normal vectors, to show what that costs.
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
from dnnlib.cli import UserError, user_errors
from metrics.evaluator import Evaluator
from pfgmpp.samplers import SampleBatch, draw_latents
from sampling.network_sampler import NetworkSampler
from training.scoring import network_features, open_evaluator

_EVALUATIONS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class GaussianBetween:
    """A few-step sampler whose noise between evaluations is Gaussian whatever D is."""

    sampler: NetworkSampler

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self.sampler.image_shape

    @property
    def scaling(self):
        """Of the data that the network was trained on."""
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


def scores(network: str, evaluator: Evaluator | None, ref: str, num: int, ranges: int,
           detector: str, device: torch.device, batch: int
           ) -> tuple[Evaluator, dict[str, dict[int, float]]]:
    """Returns the evaluator, and {noise: {evaluations: mean distance}} of a few-step network.

    Raises:
        UserError: the network is not a few-step one.
    """
    found: dict[str, dict[int, float]] = {}
    for steps in _EVALUATIONS:
        sampler = NetworkSampler.open(network, device, num_steps=steps)
        if sampler.net.few_step is None:
            raise UserError(f"--networks: {network} is not a few-step network")
        evaluator = evaluator or open_evaluator(detector, ref, ["fid"], device,
                                                {network: sampler}, batch=batch, workers=0)
        ways = {"kernel": sampler}
        if steps > 1 and math.isfinite(sampler.net.D):
            ways["Gaussian"] = GaussianBetween(sampler)
        for name, way in ways.items():
            values = [evaluator.evaluate(network_features(
                way, range(first * num, (first + 1) * num), evaluator.detector, metrics=["fid"],
                batch=batch))["fid"] for first in range(ranges)]
            found.setdefault(name, {})[steps] = statistics.mean(values)
    return evaluator, found


@click.command()
@click.option("--networks", metavar="LIST", required=True, help="Few-step networks, or their runs.")
@click.option("--ref", metavar="ZIP|DIR", required=True, help="Data set that they were trained on.")
@click.option("--detector", default="pixels", show_default=True, help="Features to score by.")
@click.option("--num", metavar="INT", type=int, default=459, show_default=True, help="Samples.")
@click.option("--ranges", metavar="INT", type=int, default=3, show_default=True,
              help="Ranges of seeds, of which means are taken.")
@click.option("--batch", metavar="INT", type=int, default=64, show_default=True,
              help="Samples at a time.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Where to sample.")
def main(networks: str, ref: str, detector: str, num: int, ranges: int, batch: int, device: str
         ) -> None:
    """Prints a table of scores for each network: noise between evaluations by their number."""
    with user_errors():
        evaluator = None
        for network in networks.split(","):
            evaluator, found = scores(network, evaluator, ref, num, ranges, detector,
                                      torch.device(device), batch)
            print(f"{Path(network).name}, {ranges} x {num} samples, {detector}, by evaluations\n\n"
                  f"{table(found, 3, 'noise between')}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
