"""Options of a training run as plain data, values derived from them, and the names of its files.

`TrainConfig` holds the values of train.py's flags in the units of the command line, checks them,
and round-trips through JSON; it travels inside every checkpoint.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence

from dnnlib.registry import Registry, names_of, takes_keyword
from dnnlib.util import json_value, require
from sampling.sweeps import DENOISER_SOLVERS, SOLVERS

ARCHITECTURES: Registry[dict] = Registry("architecture", {
    "ddpmpp": {
        "model_type": "SongUNet", "embedding_type": "positional", "encoder_type": "standard",
        "decoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1],
        "model_channels": 128, "channel_mult": [2, 2, 2],
    },
    "ncsnpp": {
        "model_type": "SongUNet", "embedding_type": "fourier", "encoder_type": "residual",
        "decoder_type": "standard", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1],
        "model_channels": 128, "channel_mult": [2, 2, 2],
    },
    "adm": {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4]},
})
PRECONDITIONERS = {"vp": "VPPrecond", "ve": "VEPrecond", "edm": "EDMPrecond"}
LOSSES = ("vp", "ve", "edm")  # see pfgmpp/loss.py
LOG_SINKS = ("tensorboard", "wandb")  # see training/log_sinks.py
LR_DECAYS = ("none", "rsqrt", "cosine")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
AUGMENT_DIM = 9  # augmentation labels, see pfgmpp/augment.py

# What a run writes to its directory besides states, snapshots and samples.
OPTIONS_FILE, STATS_FILE = "training_options.json", "stats.jsonl"
LOG_FILE, REALS_FILE = "log.txt", "reals.png"

_UNDERSCORED = {"aug_dim", "P_mean", "P_std"}  # fields whose flags are spelled with underscores


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What a run trains, on which data and how. Field names are those of train.py's flags.

    Raises:
        ValueError: an option outside its range, or options that exclude each other.
    """

    data: str
    cond: bool = False
    cond_image: bool = False
    patch: int | None = None  # None = whole images
    patches: int = 1
    cond_c_in: bool = False
    arch: str = "ddpmpp"
    precond: str = "edm"
    loss: str | None = None  # None = that of precond
    pfgmpp: bool = False
    aug_dim: float = 128.0
    stf: bool = False
    rbatch: int = 4096
    lsun: bool = False
    P_mean: float = -1.2  # of ln sigma, with the loss 'edm'
    P_std: float = 1.2
    duration: float = 200.0  # Mimg
    batch: int = 512
    batch_gpu: int | None = None  # None = batch / number of processes
    cbase: int | None = None
    cres: tuple[int, ...] | None = None
    nblock: int | None = None
    ares: tuple[int, ...] | None = None  # () = no level attends
    lr: float = 10e-4
    lr_rampup: float = 10.0  # Mimg
    lr_decay: str = "none"  # of LR_DECAYS
    lr_decay_start: float | None = None  # Mimg; None = the end of the ramp-up
    ema: float = 0.5  # Mimg
    dropout: float = 0.13
    augment: float = 0.12
    label_dropout: float = 0.0
    sigma_data: float | None = 0.5  # None = measured
    xflip: bool = False
    precision: str = "fp32"
    clip_grad: float | None = None
    ls: float | None = None  # None = dynamic for fp16, 1 elsewhere
    max_bad_steps: int = 100
    checkpoint_blocks: bool = False
    bench: bool = True
    compile: str = "auto"
    data_on_device: str = "auto"
    deterministic: bool = False
    cache: bool = True
    workers: int = 1
    tick: float = 50.0  # kimg
    snap: int = 50  # ticks
    dump: int = 50  # ticks
    keep: int | None = None  # training states; None = all
    log: tuple[str, ...] = ()  # of LOG_SINKS
    samples: int | None = None  # None = 64 on a GPU, 16 on the CPU
    window: tuple[float, ...] | None = None  # center and width of pictures; None = from -1 to 1
    eval: float | None = None  # kimg; None = never
    eval_ref: str | None = None
    eval_pairs: str | None = None
    eval_num: int = 50_000
    eval_detector: str = "inception"
    eval_solver: str = "heun"
    eval_steps: int = 18
    val_data: str | None = None  # None = no held-out loss
    val_num: int = 2048
    seed: int = 0
    transfer: str | None = None
    plugin: str | None = None  # a file that is run first, see dnnlib/plugins.py
    plugin_sha256: str | None = None
    preset: str | None = None  # a name in presets.PRESETS, whose values are in the other fields

    method = None  # not a field here: training/distill_config.py has few-step methods
    optim = "adam"
    method_defaults: typing.ClassVar[dict] = {}  # those that differ from the fields' defaults

    def __post_init__(self):
        for name, own, kinds in (("arch", ARCHITECTURES.own, ("architecture", "network")),
                                 ("loss", LOSSES, ("loss",))):
            value, known = getattr(self, name), names_of(own, *kinds)
            require(value is None or value in known, f"--{name}={value}", " or ".join(known))
        require(self.precond != "iddpm", "--precond=iddpm", "edm, ve or vp; iddpm networks can be "
                "sampled, but no training loss is published for them")
        preconds = names_of(PRECONDITIONERS, "preconditioner")
        require(self.precond in preconds, f"--precond={self.precond}", " or ".join(preconds))
        require(not self.pfgmpp or self.aug_dim > 0, f"--aug_dim={self.aug_dim:g}",
                "positive; leave out --pfgmpp for D = inf")
        require(not self.stf or self.rbatch >= self.batch, f"--rbatch={self.rbatch}",
                f"at least --batch={self.batch}, because it includes the training batch")
        flag = "loss" if self.loss else "precond"
        given, is_fixed = f"--{flag}={getattr(self, flag)}", self.loss_name in ("ve", "vp")
        require(not self.lsun or not is_fixed, f"--lsun=1 with {given}", f"used with --{flag}=edm")
        require(not self.stf or not self.cond_image, "--stf=1 with --cond-image=1", "used "
                "separately: stable targets do not depend on the condition")
        require(not self.stf or not self.augment > 0, f"--stf=1 with --augment={self.augment:g}",
                "used with --augment=0: stable targets are not defined for augmented images")
        require(self.cond_image or not self.cond_c_in, "--cond-c-in=1", "used with "
                "--cond-image=1: otherwise there are no condition images to multiply")
        require(self.cond or not self.label_dropout, f"--label-dropout={self.label_dropout:g}",
                "used with --cond=1: otherwise there are no labels to drop")
        require(self.sigma_data == 0.5 or self.precond not in ("ve", "vp"),
                f"--sigma-data with --precond={self.precond}", "used with --precond=edm")
        self._check_patches()
        for name in ("P_mean", "P_std"):
            value = getattr(self, name)
            require(value == _default(name) or not is_fixed or self.method is not None,
                    f"--{name}={value:g} with {given}", f"used with --{flag}=edm: ve and vp have "
                    "their own distributions of noise levels")
        require(math.isfinite(self.P_mean), f"--P_mean={self.P_mean:g}", "finite")
        for name in ("duration", "batch", "tick", "lr", "max_bad_steps", "snap", "dump",
                     "P_std"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"--{flag_name(name)}={value:g}", "positive and finite")
        for name in ("batch_gpu", "cbase", "nblock", "ls", "eval", "keep", "sigma_data",
                     "clip_grad"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"--{flag_name(name)}={value}",
                    "positive")
        for name in ("lr_rampup", "ema", "workers", "samples", "seed", "lr_decay_start"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"--{flag_name(name)}={value}", "0 or more")
        self._check_lr_decay()
        has_scores = self.eval_ref is not None or self.eval_pairs is not None
        require((self.eval is not None) == has_scores, "--eval and --eval-ref", "given together "
                "(or --eval and --eval-pairs, or all three)")
        require(self.eval_pairs != "", "--eval-pairs=", "a data set; leave it out for none")
        require(self.eval_num >= 2, f"--eval-num={self.eval_num}", "2 or more")
        solvers = names_of(DENOISER_SOLVERS if self.method is None else SOLVERS, "solver")
        require(self.eval_solver in solvers, f"--eval-solver={self.eval_solver}",
                f"one of {', '.join(solvers)}")
        require(self.eval_steps is None or self.eval_steps >= 1,
                f"--eval-steps={self.eval_steps}", "1 or more")
        require(self.val_data != "", "--val-data=", "a data set; leave it out for none")
        require(self.val_num >= 1, f"--val-num={self.val_num}", "1 or more")
        for name in ("dropout", "augment", "label_dropout"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{flag_name(name)}={value:g}", "between 0 and 1")
        require(self.precision in PRECISIONS, f"--precision={self.precision}",
                ", ".join(PRECISIONS))
        require(set(self.log) <= set(LOG_SINKS), f"--log={','.join(self.log)}",
                f"a list of {', '.join(LOG_SINKS)}")
        for name in ("compile", "data_on_device"):
            require(getattr(self, name) in ("auto", "0", "1"),
                    f"--{flag_name(name)}={getattr(self, name)}", "auto, 0 or 1")
        require(self.cache or self.data_on_device != "1", "--data-on-device=1 with --cache=0",
                "used with --cache=1: it copies the packed file")
        require(self.cres is None or (self.cres and min(self.cres) > 0), f"--cres={self.cres}",
                "a list of positive integers such as 1,2,2,2")

    def _check_patches(self) -> None:
        require(self.patch is None or self.patch >= 1, f"--patch={self.patch}", "1 or more")
        require(self.patches >= 1, f"--patches={self.patches}", "1 or more")
        require(self.patch is not None or self.patches == 1, f"--patches={self.patches}",
                "used with --patch, the side of a patch")
        require(self.patch is None or not self.stf, f"--stf=1 with --patch={self.patch}", "used "
                "separately: stable targets are means over whole images")

    def _check_lr_decay(self) -> None:
        require(self.lr_decay in LR_DECAYS, f"--lr-decay={self.lr_decay}", " or ".join(LR_DECAYS))
        start = self.decay_start
        given = f"--lr-decay-start={start:g}" + (
            " (the end of --lr-rampup)" if self.lr_decay_start is None else "")
        if self.lr_decay == "rsqrt":
            require(0 < start < math.inf, f"{given} with --lr-decay=rsqrt", "positive and finite")
        if self.lr_decay == "cosine":
            require(start < self.duration, f"{given} with --lr-decay=cosine",
                    f"less than --duration={self.duration:g}, where the rate reaches 0")

    @property
    def decay_start(self) -> float:
        """Mimg after which the learning rate falls, if --lr-decay is set."""
        return self.lr_rampup if self.lr_decay_start is None else self.lr_decay_start

    def lr_decay_at(self, nimg: int) -> float:
        """Returns the factor of --lr-decay on the learning rate after `nimg` images.

        'rsqrt' is sqrt(start / nimg) from `decay_start` on (Karras et al. 2024, arXiv 2312.02696).
        'cosine' falls as half a cosine, from 1 at `decay_start` to 0 at the end of the run.
        """
        start = self.decay_start * 1e6
        if self.lr_decay == "none" or nimg <= start:
            return 1.0
        if self.lr_decay == "rsqrt":
            return math.sqrt(start / nimg)
        done = min((nimg - start) / (self.duration * 1e6 - start), 1.0)
        return (1 + math.cos(math.pi * done)) / 2

    @property
    def unused_options(self) -> set[str]:
        """The options that have no effect given the others."""
        used = {"rbatch": self.stf, "lr_decay_start": self.lr_decay != "none",
                "aug_dim": self.pfgmpp, "patches": self.patch, "val_num": self.val_data,
                **dict.fromkeys(("eval_ref", "eval_num", "eval_detector"), self.eval)}
        return {name for name, user in used.items() if not user}

    def in_use(self) -> dict:
        """Returns the result of `to_dict` without the options that have no effect."""
        unused = self.unused_options
        return {name: value for name, value in self.to_dict().items() if name not in unused}

    @property
    def loss_name(self) -> str:
        """The named loss, else that of the preconditioner; edm for a plugin's preconditioner."""
        return self.loss or (self.precond if self.precond in LOSSES else "edm")

    @property
    def class_name(self) -> str:
        """The preconditioner's class; a plugin's preconditioner is named by its class."""
        return PRECONDITIONERS.get(self.precond, self.precond)

    @property
    def _architecture(self) -> dict:
        """Keywords of the architecture; a plugin's network class needs none."""
        return ARCHITECTURES.get(self.arch, {"model_type": self.arch})

    @property
    def D(self) -> float:
        """Augmented dimensions, inf for Gaussian diffusion."""
        return self.aug_dim if self.pfgmpp else math.inf

    @property
    def has_dynamic_scale(self) -> bool:
        """Whether the loss scale is adjusted during training, as for fp16 without --ls."""
        return self.ls is None and self.precision == "fp16"

    @property
    def total_nimg(self) -> int:
        """Number of images to train on, at least one."""
        return max(round(self.duration * 1e6), 1)

    @property
    def tick_nimg(self) -> int:
        """Number of images between two progress reports, a multiple of the batch."""
        return max(-(-round(self.tick * 1e3) // self.batch), 1) * self.batch

    def tick_at(self, nimg: int) -> int | None:
        """Returns the number of the tick that is due after `nimg` images, None if none is.

        Tick 0 comes after the first step, so that a new run reports early. Ticks depend only on
        `nimg`, so a resumed run reports when an uninterrupted one would.
        """
        tick = (nimg - self.batch) // self.tick_nimg
        return tick if tick > (nimg - 2 * self.batch) // self.tick_nimg else None

    def is_eval_due(self, nimg: int) -> bool:
        """Says whether the tick after `nimg` images is the first since a multiple of `eval`."""
        if self.eval is None:
            return False
        eval_nimg = self.eval * 1e3
        return nimg // eval_nimg > max(nimg - self.tick_nimg, 0) // eval_nimg

    def num_evals_after(self, nimg: int) -> int:
        """Returns how many evaluations follow after `nimg` images: one is at the end."""
        if self.eval is None or nimg >= self.total_nimg:
            return 0
        ticks = range(self.batch, self.total_nimg, self.tick_nimg)
        return 1 + sum(nimg < tick and self.is_eval_due(tick) for tick in ticks)

    def rounds(self, world_size: int) -> tuple[int, int]:
        """Returns (micro-batch per process, accumulation rounds) for this many processes.

        Raises:
            ValueError: the batch is not micro-batch * rounds * processes.
        """
        share = self.batch // world_size
        if self.batch % world_size:
            nearest = " or ".join(str(n * world_size) for n in (share, share + 1) if n)
            raise ValueError(f"--batch={self.batch} can't be split over {world_size} processes; "
                             f"nearest: {nearest}")
        micro = min(self.batch_gpu or share, share)
        if share % micro:
            below = next(d for d in range(micro, 0, -1) if share % d == 0)
            above = next(d for d in range(micro, share + 1) if share % d == 0)
            raise ValueError(f"--batch-gpu={micro} must divide --batch={self.batch} / {world_size} "
                             f"process(es) = {share}; nearest: {below} or {above}")
        return micro, share // micro

    def with_fitting_batch_gpu(self, world_size: int) -> "TrainConfig":
        """Returns the options with `batch_gpu` lowered until it divides a process's share.

        If the batch itself can't be split, the options stay as they are and `rounds` raises.
        """
        share, rest = divmod(self.batch, world_size)
        if self.batch_gpu is None or rest or not share:
            return self
        fitting = next(d for d in range(min(self.batch_gpu, share), 0, -1) if share % d == 0)
        return dataclasses.replace(self, batch_gpu=fitting)

    def network(self, img_resolution: int | Sequence[int], img_channels: int, label_dim: int,
                cond_channels: int = 0) -> dict:
        """Returns the configuration of the network for this data, as `build_network` takes it.

        Raises:
            ValueError: `ares` names a resolution that the network does not reach.
        """
        optional = {
            "D": self.aug_dim if self.pfgmpp else None,
            "augment_dim": AUGMENT_DIM if self.augment > 0 else None,
            "sigma_data": self.sigma_data if self._has_sigma_data else None,
            "label_dropout": self.label_dropout or None, "cond_channels": cond_channels or None,
            "cond_c_in": self.cond_c_in or None,
            "model_channels": self.cbase, "num_blocks": self.nblock,
            "channel_mult": list(self.cres) if self.cres else None,
            "attn_resolutions": None if self.ares is None else sorted(self.ares, reverse=True),
        }
        self._check_ares(img_resolution)
        return {
            "class_name": self.class_name, "img_resolution": img_resolution,
            "img_channels": img_channels, "label_dim": label_dim, "pfgmpp": self.pfgmpp,
            **({"dropout": self.dropout} if self.dropout or self.arch in ARCHITECTURES.own else {}),
            **self._architecture,
            **{key: value for key, value in optional.items() if value is not None},
        }

    @property
    def _has_sigma_data(self) -> bool:
        """Whether the preconditioner takes the standard deviation of the data."""
        if self.precond in PRECONDITIONERS:
            return self.precond == "edm"
        from pfgmpp.networks import PRECONDS  # the plugin has imported it already
        return takes_keyword(PRECONDS[self.precond], "sigma_data")

    def _check_ares(self, img_resolution: int | Sequence[int]) -> None:
        """Raises ValueError for an attention resolution that no level of the network has.

        A level is named by the longer side of its image, as in the U-Nets.
        """
        if self.arch not in ARCHITECTURES.own:
            return  # a plugin's network may have other levels
        size = img_resolution if isinstance(img_resolution, Sequence) else [img_resolution]
        levels = len(self.cres or ARCHITECTURES[self.arch]["channel_mult"])
        if any(side % 2 ** (levels - 1) for side in size):
            return  # the network refuses the size itself
        sides = [max(size) >> level for level in range(levels)]
        unknown = [str(given) for given in self.ares or () if given not in sides]
        if unknown:
            raise ValueError(f"--ares={','.join(map(str, self.ares))}: no level of the network has "
                             f"an image side of {' or '.join(unknown)}; choose from "
                             f"{', '.join(map(str, sides))}, or none")

    def to_dict(self) -> dict:
        """Returns plain data that JSON can hold; infinity becomes the string 'inf'."""
        values = dataclasses.asdict(self)
        values["cres"] = list(self.cres) if self.cres else None
        values["ares"] = None if self.ares is None else list(self.ares)
        values["window"] = None if self.window is None else list(self.window)
        values["log"] = list(self.log)
        return json_value(values)

    @property
    def noise_name(self) -> str:
        """The family of the noise, in words."""
        return f"PFGM++ with D = {self.D:g}" if self.pfgmpp else "Gaussian (D = inf)"

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """Returns the configuration that `to_dict` wrote.

        Raises:
            ValueError: an unknown key, or a value of the wrong kind.
        """
        return cls(**check_options(values, cls))


def check_options(values: dict, cls: type[TrainConfig] = TrainConfig) -> dict:
    """Returns options, all or some, that `to_dict` of `cls` wrote, as the types of its fields.

    Raises:
        ValueError: an unknown key, or a value of the wrong kind.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        [nearest] = difflib.get_close_matches(unknown[0], hints, n=1, cutoff=0)
        raise ValueError(f"unknown training option {unknown[0]!r}; the nearest is {nearest!r}")
    return {key: _coerce(key, value, hints[key]) for key, value in values.items()}


def flag_name(name: str) -> str:
    """Returns train.py's flag for a field, without the leading dashes."""
    return name if name in _UNDERSCORED else name.replace("_", "-")


def _default(name: str) -> object:
    return TrainConfig.__dataclass_fields__[name].default


def _coerce(key: str, value: object, hint: object) -> object:
    """Returns `value` as the field's type: lists to tuples, whole numbers and 'inf' to floats."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and (value == "inf" or isinstance(value, int | float)):
        return float(value)
    for kind in kinds:
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            of_item = typing.get_args(kind)[0]
            return tuple(of_item(item) for item in value)
    if type(value) in kinds:
        return value
    raise ValueError(f"training option {key!r} can't be {value!r}")
