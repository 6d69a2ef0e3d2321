"""Options of a few-step run (distill.py): those of every run, and those of its method.

Defaults of each method are the published ones, where there are any:

    ect    Geng et al. 2024, arXiv 2406.14548, CIFAR-10
    cd     Song et al. 2023, arXiv 2303.01469, and PFCM (Hein et al. 2025) for its 40 levels, the
           target's decay and the boundary; the distance is that of Song and Dhariwal 2023,
           because LPIPS needs another package
    ipfm   Inverse Poisson flow matching, with alpha = 1 of Zhou et al. 2024, arXiv 2404.04057

The network's architecture comes from its teacher, whose configuration is part of the options.
`--teacher=none` trains a consistency function from randomly initialised weights.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dnnlib.registry import names_of
from dnnlib.util import require
from sampling.sweeps import MAX_FEW_STEPS
from training.config import TrainConfig

METHODS = ("ect", "cd", "ipfm")
OPTIMIZERS = ("radam", "adam")
METRICS = ("huber", "l2")
_LOWEST_LEVEL, _HIGHEST_LEVEL = 0.002, 1e6  # see few_steps.py and schedules.py
_MAX_SCALES = 10_000

# In Mimg where the flags are. A decay b per step of B images is a half-life of B ln 2 / (1 - b):
# 0.887 Mimg for b = 0.9999 and B = 128.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "ect": {"duration": 25.6, "batch": 128, "lr": 1e-4, "lr_rampup": 0.0, "ema": 0.887,
            "dropout": 0.2, "optim": "radam", "P_mean": -1.1, "P_std": 2.0},
    "cd": {"duration": 25.6, "batch": 128, "lr": 1e-4, "lr_rampup": 0.0, "ema": 0.887,
           "dropout": 0.0, "optim": "radam"},
    "ipfm": {"duration": 10.24, "batch": 512, "lr": 1e-5, "lr_rampup": 0.512, "ema": 0.355,
             "dropout": 0.0, "optim": "adam", "P_mean": -1.2, "P_std": 1.2},
}
# Options of one method, which the others ignore.
_OF_METHOD = {"ect": ("P_mean", "P_std", "ect_q", "ect_k", "ect_b", "ect_c", "ect_double"),
              "cd": ("cd_scales", "cd_metric", "cd_decay"),
              "ipfm": ("P_mean", "P_std", "ipfm_alpha", "ipfm_steps", "sigma_init", "aux_lr")}
# Options of train.py that distill.py does not have.
_OF_DENOISERS = {"loss", "stf", "rbatch", "augment", "label_dropout", "transfer", "eval_solver",
                 "val_data", "val_num", "teacher_network"}
# What the teacher determines.
_OF_NETWORK = {"arch", "precond", "cbase", "cres", "nblock", "ares", "sigma_data"}


@dataclasses.dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """What a few-step run trains, and how. Field names are those of distill.py's flags.

    Raises:
        ValueError: an option outside its range, or options that exclude each other.
    """

    duration: float = 25.6
    batch: int = 128
    lr: float = 1e-4
    lr_rampup: float = 0.0
    ema: float = 0.887
    dropout: float = 0.2
    augment: float = 0.0
    P_mean: float = -1.1
    P_std: float = 2.0
    eval_solver: str = "consistency"
    eval_steps: int | None = None  # None = the network's own number
    method: str = "ect"
    optim: str = "radam"
    teacher: str | None = None  # None = no teacher
    teacher_network: dict | None = None  # its configuration
    teacher_sha256: str | None = None  # of its weights
    boundary: float | None = None  # level at which f(x) = x; None = 0, or for cd its lowest level
    ect_q: float = 2.0
    ect_k: float = 8.0
    ect_b: float = 1.0
    ect_c: float = 0.0
    ect_double: float = 3.2  # Mimg
    cd_scales: int = 40
    cd_metric: str = "huber"
    cd_decay: float = 0.95  # of the target's average, per step
    ipfm_alpha: float = 1.0
    ipfm_steps: int = 5
    sigma_init: float | None = None  # None = sigma_max
    aux_lr: float = 1e-3

    def __post_init__(self):
        from pfgmpp.few_steps import FewStep
        if self.teacher_network:  # JSON has no infinity
            object.__setattr__(self, "teacher_network", {
                key: math.inf if value == "inf" else value
                for key, value in self.teacher_network.items()})
        super().__post_init__()
        require(self.method in METHODS, f"--method={self.method}", " or ".join(METHODS))
        require(self.teacher is not None or self.method == "ect",
                f"--teacher=none with --method={self.method}", "used with --method=ect; the other "
                "methods can't train from scratch")
        require(not self.augment and not self.stf, "--augment and --stf", "left out: few-step "
                "methods train on the original images only")
        require(self.optim in OPTIMIZERS, f"--optim={self.optim}", " or ".join(OPTIMIZERS))
        require(self.cd_metric in METRICS, f"--cd-metric={self.cd_metric}", " or ".join(METRICS))
        require(self.method != "ipfm" or self.precision != "fp16", "--precision=fp16 with "
                "--method=ipfm", "bf16, tf32 or fp32: gradients that pass through the teacher have "
                "no loss scale")
        for name in ("ect_double", "aux_lr", "ipfm_steps"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"--{name.replace('_', '-')}={value}",
                    "positive and finite")
        require(1 < self.ect_q < math.inf, f"--ect-q={self.ect_q:g}", "above 1, and finite")
        require(self.sigma_init is None or _LOWEST_LEVEL < self.sigma_init <= _HIGHEST_LEVEL,
                f"--sigma-init={self.sigma_init}", f"above {_LOWEST_LEVEL:g}, and at most "
                f"{_HIGHEST_LEVEL:g}")
        require(self.eval_steps is None or self.eval_steps <= MAX_FEW_STEPS,
                f"--eval-steps={self.eval_steps}", f"at most {MAX_FEW_STEPS}")
        for name in ("ect_k", "ect_b", "ect_c", "boundary", "ipfm_alpha"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, f"--{name.replace('_', '-')}={value}",
                    "0 or more, and finite")
        require(2 <= self.cd_scales <= _MAX_SCALES, f"--cd-scales={self.cd_scales}",
                f"2 to {_MAX_SCALES}")
        require(0 <= self.cd_decay < 1, f"--cd-decay={self.cd_decay:g}", "at least 0 and below 1; "
                "0 uses the network itself as the target")
        require(self._precond != "iDDPMPrecond", f"--teacher={self.teacher} (a network of discrete "
                "noise levels)", "a network of EDM, PFGM++, VE or VP")
        require(self._precond == "EDMPrecond" or not self.boundary, f"--boundary={self.boundary}",
                "left out: only EDM's preconditioner has a boundary")
        levels = FewStep.of(self.method, self.first_level).levels  # refuses invalid levels
        if self.teacher is None or self.teacher_network:  # else the teacher has not been read yet
            limit, reason = (levels[-1] / 2, "half the lowest sampling level") \
                if self.method != "cd" else (self._cd_end, "the lowest level of the grid")
            require((self.boundary or 0) <= limit, f"--boundary={self.boundary}",
                    f"at most {limit:g}, {reason}")

    @property
    def _precond(self) -> str:
        """The class of the network."""
        return self.teacher_network["class_name"] if self.teacher_network else self.class_name

    @property
    def _known_levels(self) -> tuple[float, float]:
        from pfgmpp.networks import known_levels
        return known_levels({"class_name": self._precond, **(self.teacher_network or {})})

    @property
    def _cd_end(self) -> float:
        """The lowest level of cd's grid, at which paths end."""
        return max(_LOWEST_LEVEL, self._known_levels[0])

    @property
    def first_level(self) -> float:
        """The noise level at which the network starts sampling."""
        from pfgmpp.loss import EDM_SIGMA_MAX, LSUN_SIGMA_MAX
        if self.method == "ipfm" and self.sigma_init:
            return self.sigma_init
        return min(LSUN_SIGMA_MAX if self.lsun else EDM_SIGMA_MAX, self._known_levels[1])

    @property
    def used_boundary(self) -> float:
        """The level at which the network returns its input; 0 for a network that has none."""
        if self.boundary is None and self.method == "cd" and self._precond == "EDMPrecond":
            return self._cd_end
        return self.boundary or 0.0

    def network(self, img_resolution: int | Sequence[int], img_channels: int, label_dim: int,
                cond_channels: int = 0) -> dict:
        """Returns the configuration of the trained network: the teacher's, changed to few steps.

        Raises:
            ValueError: as in `TrainConfig.network`, if there is no teacher.
        """
        from pfgmpp.few_steps import FewStep
        network = dict(self.teacher_network) if self.teacher_network else super().network(
            img_resolution, img_channels, label_dim, cond_channels)
        # Augmentation labels are never given, and DDP does not accept unused weights.
        for name in ("boundary", "boundary_in_training", "label_dropout", "augment_dim"):
            network.pop(name, None)
        if self.used_boundary:
            network["boundary"] = self.used_boundary
        if self.dropout or network.get("model_type") not in names_of((), "network"):
            network["dropout"] = self.dropout  # a plugin's class may not take it
        return network | {"few_step": FewStep.of(self.method, self.first_level).to_dict()}

    @property
    def method_defaults(self) -> dict[str, Any]:
        """The method's defaults, which may differ from those of the fields."""
        return METHOD_DEFAULTS[self.method]

    @property
    def unused_options(self) -> set[str]:
        """The options that have no effect, such as those of other methods."""
        unused = super().unused_options | self.unused_by(self.method) | _OF_DENOISERS
        if self._precond != "EDMPrecond":
            unused |= {"boundary"}
        return unused | (_OF_NETWORK if self.teacher else {"teacher_sha256"})

    def in_use(self) -> dict:
        from pfgmpp.few_steps import FewStep
        values = {"boundary": self.used_boundary, "sigma_init": self.first_level,
                  "eval_steps": self.eval_steps or len(
                      FewStep.of(self.method, self.first_level).levels)}
        used = super().in_use()
        return used | {name: value for name, value in values.items() if name in used}

    @staticmethod
    def unused_by(method: str) -> set[str]:
        """Returns the options that belong only to other methods than `method`."""
        return {name for names in _OF_METHOD.values() for name in names} - {*_OF_METHOD[method]}
