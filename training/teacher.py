"""The network that a few-step network is made from: read once, checked, and frozen."""

import dataclasses
from typing import Any

import torch

from checkpoints import checkpoint
from images.dataset import ImageFolderDataset
from images.scaling import Scaling
from pfgmpp.loss import EDM_SIGMA_MAX, LSUN_SIGMA_MAX
from pfgmpp.networks import Precond, image_size, network_D
from sampling.network_sampler import (
    load_network,
    recorded_class_names,
    recorded_label_kind,
    recorded_scaling,
)
from torch_utils import distributed, misc


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network from a file: its averaged weights, and what the file records of its data."""

    source: str
    content: dict[str, Any]  # as `checkpoint.load` returns it, without an optimizer
    sha256: str

    @classmethod
    def open(cls, source: str, pfgmpp: bool | None = None, aug_dim: float | None = None
             ) -> "Teacher":
        """Reads a network on rank 0, for every rank.

        Args:
            source: a path or URL; a run directory stands for its newest network.
            pfgmpp: for files that do not record D, see `checkpoint.resolve_D`.
            aug_dim: likewise; if the file records D, a different one is refused.

        Raises:
            ValueError: it is not a network, is a few-step network, or has another D.
            OSError: it can't be read.
        """
        content = checkpoint.resolve_D(distributed.run_on_rank0(load_network, source), source,
                                       pfgmpp, aug_dim)
        if content["network"].get("few_step") is not None:
            raise ValueError(f"--teacher={source}: is a few-step network, which can't be a "
                             "teacher; give the denoiser that it was made from")
        level = checkpoint.highest_level(content)
        if level not in (None, EDM_SIGMA_MAX, LSUN_SIGMA_MAX):
            raise ValueError(f"--teacher={source}: is sampled from sigma_max = {level:g}, but "
                             f"few-step networks start at {EDM_SIGMA_MAX:g} or "
                             f"{LSUN_SIGMA_MAX:g}; give a file that records one of these")
        weights = checkpoint.sampling_weights(content)
        return cls(source, content | {"ema": weights}, checkpoint.digest(weights))

    @property
    def network(self) -> dict[str, Any]:
        """The configuration of the network."""
        return self.content["network"]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The averaged weights."""
        return self.content["ema"]

    @property
    def options(self) -> dict[str, Any]:
        """The options of a run that follow from the teacher, named as in `TrainConfig`."""
        network, D = self.network, network_D(self.network)
        is_pfgmpp = bool(network.get("pfgmpp"))
        return {"teacher": self.source, "teacher_network": network, "teacher_sha256": self.sha256,
                "pfgmpp": is_pfgmpp, "aug_dim": D if is_pfgmpp else 128.0,
                "cond": network.get("label_dim", 0) > 0,
                "cond_image": network.get("cond_channels", 0) > 0,
                "cond_c_in": network.get("cond_c_in", False),
                "lsun": checkpoint.highest_level(self.content) == LSUN_SIGMA_MAX}

    def build(self, device: torch.device, precision: str) -> Precond:
        """Returns the network on a device, in evaluation mode and frozen."""
        net = checkpoint.build_ema(self.content).to(device)
        net.compute_dtype = misc.compute_dtype(precision)
        return net

    def check_data(self, dataset: ImageFolderDataset) -> None:
        """Raises ValueError unless the data are of the kind that the teacher was trained on."""
        network, where = self.network, f"--data={dataset.path}"
        shape = (network["img_channels"], *image_size(network["img_resolution"]))
        if tuple(dataset.image_shape) != shape:
            given, allowed = ("x".join(map(str, s)) for s in (dataset.image_shape, shape))
            kind = "images" if dataset.patch is None else "patches"
            patch = f", or give --patch={shape[1]}" if shape[1] == shape[2] else ""
            raise ValueError(f"{where}: {kind} are {given} (channels x height x width), but the "
                             f"teacher makes {allowed}; convert them with dataset_tool.py{patch}")
        wanted = [("images", "scale", shape[0], dataset.scaling)]
        if dataset.cond_channels:
            wanted.append(("condition images", "cond_scale", network["cond_channels"],
                           dataset.cond_scaling))
        for name, key, channels, scaling in wanted:
            known: Scaling = recorded_scaling(self.content, self.source, key, channels)
            if known != scaling:
                raise ValueError(f"{where}: its {name} have another scale than those that the "
                                 "teacher was trained on; convert them with the same "
                                 "dataset_tool.py --scale")
        for name, given, allowed in (
                ("labels of {} numbers", dataset.label_dim, network.get("label_dim", 0)),
                ("condition images of {} channels", dataset.cond_channels,
                 network.get("cond_channels", 0))):
            if given != allowed:
                choose = ", or choose its classes with dataset_tool.py --classes" if (
                    dataset.has_onehot_labels and dataset.label_dim > allowed) else ""
                raise ValueError(f"{where}: has {name.format(given)}, but the teacher was trained "
                                 f"on {allowed}; give data like the teacher's{choose}")
        self._check_kind_of_labels(dataset)

    def _check_kind_of_labels(self, dataset: ImageFolderDataset) -> None:
        """Raises ValueError if only one has classes; warns if classes have different names."""
        if not dataset.has_labels:
            return
        where, kind = f"--data={dataset.path}", recorded_label_kind(self.content)
        given = "classes" if dataset.has_onehot_labels else "vectors"
        if given != kind:
            raise ValueError(f"{where}: its labels are {given}, but the teacher was trained on "
                             f"{kind} of {dataset.label_dim} numbers; give data like the teacher's")
        names = zip(dataset.class_names or (), recorded_class_names(self.content), strict=False)
        for number, (ours, theirs) in enumerate(names):
            if ours != theirs:
                distributed.warn0(f"{where}: class {number} is called {ours!r}, but {theirs!r} in "
                                  f"the data of {self.source}; check that both mean the same")
                return

