"""What a run minimises: the denoising loss, or that of a few-step method.

    Objective      a denoiser, see pfgmpp/loss.py
    Consistency    ect and cd, see pfgmpp/consistency.py
    Generation     ipfm, see pfgmpp/distillation.py

An objective holds what a step needs besides the network that is sampled: the teacher, a slowly
updated copy of the network that is the target at the lower level, or an auxiliary network with its
own optimizer. `Trainer` asks it for losses, and training states include what `state` returns.
"""

import copy
import dataclasses
from typing import Any, NamedTuple

import torch

from dnnlib.registry import takes_keyword
from pfgmpp.consistency import ConsistencyDistillationLoss, ConsistencyTuningLoss
from pfgmpp.distillation import GeneratorDraws, GeneratorLoss
from pfgmpp.loss import LOSSES, DenoisingLoss
from pfgmpp.networks import Precond, build_network
from pfgmpp.schedules import edm_sigmas
from training.config import TrainConfig
from training.ema import update_ema_


class Batch(NamedTuple):
    """What a micro-batch trains on."""

    images: torch.Tensor  # [B, C, H, W], as networks see them
    labels: torch.Tensor  # [B, label_dim]
    condition: torch.Tensor | None = None  # [B, cond_channels, H, W]
    reference: torch.Tensor | None = None  # [R, C, H, W], for stable targets
    reference_labels: torch.Tensor | None = None  # [R, label_dim]

    @property
    def condition_kwargs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments that pass the condition to a network."""
        return {} if self.condition is None else {"condition": self.condition}


@dataclasses.dataclass
class Part:
    """A network that is trained, and its optimizer settings."""

    net: Precond
    optimizer: torch.optim.Optimizer
    lr: float
    lr_rampup: float  # Mimg
    ddp: torch.nn.Module  # what is evaluated: the network, or its DDP wrapper


class Objective:
    """The denoising loss, and the base of the others."""

    auxiliary: Part | None = None
    auxiliary_steps = 0  # steps of the auxiliary network before each step

    def __init__(self, loss_fn: Any, augment_pipe: Any = None):
        self.loss_fn, self._augment_pipe = loss_fn, augment_pipe

    @property
    def other_networks(self) -> dict[str, Precond]:
        """The networks other than the one that is sampled, by name."""
        return {}

    @property
    def trained_networks(self) -> dict[str, Precond]:
        """Those of `other_networks` that change in training; they must be equal on all ranks."""
        return {name: net for name, net in self.other_networks.items() if name != "teacher"}

    def loss(self, net: torch.nn.Module, batch: Batch, draws: Any, nimg: int) -> torch.Tensor:
        """Returns the loss of the network that is sampled, of any shape [B, ...].

        Args:
            net: that network.
            batch: what to train on.
            draws: what `loss_fn.draw_range` returned for it.
            nimg: images seen before this step.
        """
        return self.loss_fn(net, batch.images, batch.labels, self._augment_pipe, draws=draws,
                            reference=batch.reference, reference_labels=batch.reference_labels,
                            condition=batch.condition)

    def auxiliary_loss(self, net: torch.nn.Module, batch: Batch, draws: Any, nimg: int
                       ) -> torch.Tensor:
        """Returns the loss of the auxiliary network. Arguments are as for `loss`."""
        raise NotImplementedError

    def after_step(self, net: Precond, bad: torch.Tensor) -> None:
        """Is called after a step of the network; `bad`, on the device, is 1 if it was skipped."""

    def state(self) -> dict[str, Any]:
        """Returns what a training state stores of the objective."""
        found = {name: dict(net.state_dict()) for name, net in self.trained_networks.items()}
        if self.auxiliary:
            found["auxiliary_optimizer"] = self.auxiliary.optimizer.state_dict()
        return found

    def load_networks(self, content: dict[str, Any]) -> None:
        """Loads the networks of a training state, but not an optimizer.

        If the state has no target because its run had none, the target starts as the network.
        """
        for name, net in self.trained_networks.items():
            net.load_state_dict(content.get(name, content["net"]))


class Consistency(Objective):
    """Consistency tuning and distillation."""

    def __init__(self, loss_fn: ConsistencyTuningLoss | ConsistencyDistillationLoss,
                 net: Precond, teacher: Precond | None = None, target: Precond | None = None,
                 target_decay: float = 0.0):
        super().__init__(loss_fn)
        self._net, self._teacher = net, teacher
        self._target, self._target_decay = target, target_decay

    @property
    def other_networks(self):
        return {name: net for name, net in (("teacher", self._teacher), ("target", self._target))
                if net is not None}

    def loss(self, net, batch, draws, nimg):
        return self.loss_fn(net, batch.images, batch.labels, draws=draws, nimg=nimg,
                            condition=batch.condition, frozen=self._net)

    def after_step(self, net, bad):
        if self._target is not None:
            update_ema_(self._target, net, self._target_decay, skip=bad)


class Generation(Objective):
    """Distillation into a generator by an auxiliary denoiser."""

    def __init__(self, loss_fn: GeneratorLoss, net: Precond, teacher: Precond,
                 auxiliary: Part, auxiliary_steps: int):
        super().__init__(loss_fn)
        self._net, self._teacher = net, teacher
        self.auxiliary, self.auxiliary_steps = auxiliary, auxiliary_steps

    @property
    def other_networks(self):
        return {"teacher": self._teacher, "auxiliary": self.auxiliary.net}

    def loss(self, net, batch, draws: GeneratorDraws, nimg):
        x = self.loss_fn.generate(net, draws, batch.labels, **batch.condition_kwargs)
        return self.loss_fn.through_generator(self._teacher, self.auxiliary.net, x, draws.noise,
                                              batch.labels, **batch.condition_kwargs)

    def auxiliary_loss(self, net, batch, draws: GeneratorDraws, nimg):
        with torch.no_grad():
            x = self.loss_fn.generate(self._net, draws, batch.labels, **batch.condition_kwargs)
        return self.loss_fn.of_auxiliary(net, x, draws.noise, batch.labels,
                                         **batch.condition_kwargs)


def build_loss(config: TrainConfig, net: Precond) -> DenoisingLoss:
    """Returns the denoising loss of a run, at the run's D.

    The loss gets those keywords of `EDMLoss` that it takes.

    Raises:
        ValueError: an option is set whose keyword the loss does not take.
    """
    make, usual = LOSSES[config.loss_name], TrainConfig  # whose attributes are the defaults
    given = {"pfgmpp": config.pfgmpp, "D": config.aug_dim, "lsun": config.lsun,
             "P_mean": config.P_mean, "P_std": config.P_std,
             "sigma_data": getattr(net, "sigma_data", 0.5)}
    kwargs = {name: value for name, value in given.items() if takes_keyword(make, name)}
    would_matter = {"pfgmpp": config.pfgmpp, "D": config.pfgmpp, "lsun": config.lsun,
                    "P_mean": config.P_mean != usual.P_mean, "P_std": config.P_std != usual.P_std}
    for name in [name for name, matters in would_matter.items() if matters and name not in kwargs]:
        flag = "--aug_dim" if name == "D" else f"--{name}"
        raise ValueError(f"{flag}={given[name]:g}: the loss {config.loss_name} takes no {name}; "
                         f"leave {flag} out")
    return make(**kwargs)


def build_objective(config: TrainConfig, net: Precond, teacher: Precond | None = None,
                    augment_pipe: Any = None) -> Objective:
    """Returns what a run with these options minimises.

    Args:
        config: the options; those of a `DistillConfig` name a few-step method.
        net: the network that is trained and sampled.
        teacher: the frozen denoiser that the network learns from, if there is one.
        augment_pipe: augments the images of the denoising loss; or None.
    """
    if config.method is None:
        return Objective(build_loss(config, net), augment_pipe)
    noise = {"pfgmpp": config.pfgmpp, "D": config.aug_dim}
    levels = noise | {"sigma_data": getattr(net, "sigma_data", 0.5), "lsun": config.lsun,
                      "P_mean": config.P_mean, "P_std": config.P_std}
    if config.method == "ect":
        return Consistency(ConsistencyTuningLoss(
            **levels, q=config.ect_q, k=config.ect_k, b=config.ect_b, c=config.ect_c,
            stage_nimg=config.ect_double * 1e6, boundary=getattr(net, "boundary", 0.0)), net)
    if config.method == "cd":
        grid = edm_sigmas(teacher, config.cd_scales, sigma_max=net.few_step.levels[0])[:-1].to(
            next(teacher.parameters()).device)
        target = copy.deepcopy(net).requires_grad_(False) if config.cd_decay else None
        loss_fn = ConsistencyDistillationLoss(teacher, grid, target, config.cd_metric, **noise)
        return Consistency(loss_fn, net, teacher, target, config.cd_decay)
    auxiliary = _auxiliary(config, teacher)
    loss_fn = GeneratorLoss(net.few_step.levels[0], config.ipfm_alpha, **levels)
    return Generation(loss_fn, net, teacher, auxiliary, config.ipfm_steps)


def _auxiliary(config: TrainConfig, teacher: Precond) -> Part:
    """Returns a trainable copy of the teacher, without dropout and augmentation labels."""
    network = {key: value for key, value in teacher.config.items() if key != "augment_dim"}
    net = build_network(network).to(next(teacher.parameters()).device).eval()
    net.load_state_dict(teacher.state_dict(), strict=False)
    net.compute_dtype = teacher.compute_dtype
    optimizer = torch.optim.Adam(net.parameters(), lr=config.aux_lr, betas=(0.9, 0.999), eps=1e-8,
                                 fused=True)
    # Its rate rises over as many of its own steps as the generator's does, so in less time.
    return Part(net, optimizer, config.aux_lr, config.lr_rampup / config.ipfm_steps, net)


def build_optimizer(config: TrainConfig, net: Precond) -> torch.optim.Optimizer:
    """Returns the optimizer of the network that is sampled."""
    if config.optim == "radam":
        return torch.optim.RAdam(net.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8,
                                 foreach=True)
    # A generator is trained without momentum, because its target keeps moving.
    first = 0.0 if config.method == "ipfm" else 0.9
    return torch.optim.Adam(net.parameters(), lr=config.lr, betas=(first, 0.999), eps=1e-8,
                            fused=True)
