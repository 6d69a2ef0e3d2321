"""A trained network from a file, and how it is sampled."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from torch_utils import distributed
from torch_utils.misc import compute_dtype
from training import checkpoint
from training.loss import LSUN_SIGMA_MAX
from training.networks import Precond
from training.sampling import SampleBatch, SamplerConfig, generate_images, trajectory


class ClassError(ValueError):
    """The network does not have the class that was asked for."""


@dataclasses.dataclass(frozen=True)
class NetworkSampler:
    """A network with settings that have been checked against it.

    Attributes:
        net: the averaged network, on `device`, in evaluation mode.
        sampler: how to sample it.
        device: where to sample.
        class_idx: the class to sample, None for the seeds' own.
        settings: what decides an image beside its seed, as plain JSON data.
    """

    net: Precond
    sampler: SamplerConfig
    device: torch.device
    class_idx: int | None
    settings: dict[str, Any]

    @classmethod
    def open(cls, source: str, device: torch.device, *, class_idx: int | None = None,
             pfgmpp: bool | None = None, aug_dim: float | None = None, precision: str = "fp32",
             **sampler_options: Any) -> "NetworkSampler":
        """Returns the network of a snapshot or state, ready to sample.

        Args:
            source: a path or address.
            device: where to sample.
            class_idx: the class to sample, None for the seeds' own.
            pfgmpp: for files that do not record D, see `checkpoint.settle_D`.
            aug_dim: likewise.
            precision: arithmetic inside the network.
            sampler_options: fields of `SamplerConfig`.

        Raises:
            ValueError: the file or a setting does not fit; ClassError for the class.
            OSError: the file can't be read.
        """
        if precision == "fp16" and device.type != "cuda":
            distributed.print0("Note: fp16 is for GPUs; on the CPU the network runs in fp32")
        content = checkpoint.settle_D(checkpoint.load(source), source, pfgmpp, aug_dim)
        net = checkpoint.build_ema(content).to(device)
        net.compute_dtype = compute_dtype(precision)
        sampler = SamplerConfig(**sampler_options)
        is_edm_grid = sampler.discretization in (None, "edm")
        if content["options"].get("lsun") and is_edm_grid and sampler.sigma_max is None:
            sampler = dataclasses.replace(sampler, sigma_max=LSUN_SIGMA_MAX)
        _check_class(source, net, class_idx)
        sampler.check(net)
        weights = checkpoint.digest(checkpoint.sampling_weights(content))
        settings = {"weights": weights, "class": class_idx, "precision": precision,
                    "device": device.type, "D": net.D, **dataclasses.asdict(sampler)}
        return cls(net, sampler, device, class_idx,
                   {key: _json_number(value) for key, value in settings.items()})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self.net.img_channels, self.net.img_resolution, self.net.img_resolution

    def images(self, batches: Iterable[Sequence[int]]) -> Iterator[SampleBatch]:
        """Yields the images of each batch of seeds."""
        return generate_images(self.net, batches, sampler=self.sampler, device=self.device,
                               class_idx=self.class_idx)

    def trajectory(self, seeds: Sequence[int]) -> list[torch.Tensor]:
        """Returns what the sampler passes through, see `sampling.trajectory`."""
        return trajectory(self.net, seeds, sampler=self.sampler, device=self.device,
                          class_idx=self.class_idx)


def _check_class(source: str, net: Precond, class_idx: int | None) -> None:
    if class_idx is None:
        return
    if not net.label_dim:
        raise ClassError(f"--class={class_idx}: {source} is unconditional; leave --class out")
    if not 0 <= class_idx < net.label_dim:
        raise ClassError(f"--class={class_idx}: must be between 0 and {net.label_dim - 1}")


def _json_number(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) else value
