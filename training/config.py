"""Options of a training run as plain data, what follows from them, and the names of its files.

`TrainConfig` holds the values of train.py's flags in the units of the command line, checks them,
and round-trips through JSON; it travels inside every checkpoint.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence

from dnnlib.util import json_value, require

ARCHITECTURES: dict[str, dict] = {
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
}
PRECONDITIONERS = {"vp": "VPPrecond", "ve": "VEPrecond", "edm": "EDMPrecond"}
LOG_SINKS = ("tensorboard", "wandb")  # see training/log_sinks.py
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
AUGMENT_DIM = 9  # augmentation labels, see pfgmpp/augment.py

# What a run writes to its directory besides states, snapshots and samples.
OPTIONS_FILE, STATS_FILE, SCORES_FILE = "training_options.json", "stats.jsonl", "metrics.jsonl"
LOG_FILE, REALS_FILE = "log.txt", "reals.png"

# What a resumed run may change without --override-options, with the reason. Everything else, also
# options added later, decides what is computed from the resumed step on: see `changed_options`.
RESUME_MAY_CHANGE = {
    "data": "a data set may move: its content is compared, by its fingerprint",
    "seed": "taken from the state; another one is refused",
    "transfer": "decides where a run begins, not how it continues",
    "preset": "a name: what it stands for is compared",
    "duration": "how long, not how: to train for longer is a reason to resume",
    "batch_gpu": "the split over rounds and processes changes only rounding",
    "bench": "which kernels run, as the machine does",
    "compile": "likewise",
    "deterministic": "likewise",
    "cache": "where the pixels come from, not which",
    "workers": "likewise",
    "data_on_device": "likewise",
    "max_bad_steps": "when to give up, not what is trained",
    "tick": "when to report and to write",
    "snap": "likewise",
    "dump": "likewise",
    "keep": "likewise",
    "log": "where else numbers and pictures go",
    "samples": "pictures are drawn from seeds of their own",
    "eval": "so are scores, and training does not see them",
    "eval_ref": "likewise",
    "eval_num": "likewise",
    "eval_detector": "likewise",
    "val_data": "training does not see them",
    "val_num": "likewise",
}
# Options that are in the network itself, which is compared with the state's key by key.
NETWORK_OPTIONS = {"arch", "precond", "pfgmpp", "aug_dim", "cond", "cond_image", "label_dropout",
                   "sigma_data", "cbase", "cres", "nblock"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What a run trains, on which data and how. Field names are those of train.py's flags.

    Raises:
        ValueError: an option outside its range, or options that exclude each other.
    """

    data: str
    cond: bool = False
    cond_image: bool = False
    arch: str = "ddpmpp"
    precond: str = "edm"
    pfgmpp: bool = False
    aug_dim: float = 128.0
    stf: bool = False
    rbatch: int = 4096
    lsun: bool = False
    duration: float = 200.0  # Mimg
    batch: int = 512
    batch_gpu: int | None = None  # None = batch / number of processes
    cbase: int | None = None
    cres: tuple[int, ...] | None = None
    nblock: int | None = None
    lr: float = 10e-4
    lr_rampup: float = 10.0  # Mimg
    ema: float = 0.5  # Mimg
    dropout: float = 0.13
    augment: float = 0.12
    label_dropout: float = 0.0
    sigma_data: float | None = 0.5  # None = measured
    xflip: bool = False
    precision: str = "fp32"
    ls: float | None = None  # None = dynamic for fp16, 1 elsewhere
    max_bad_steps: int = 100
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
    eval: float | None = None  # kimg; None = never
    eval_ref: str | None = None
    eval_num: int = 50_000
    eval_detector: str = "inception"
    val_data: str | None = None  # None = no held-out loss
    val_num: int = 2048
    seed: int = 0
    transfer: str | None = None
    preset: str | None = None  # a name in presets.PRESETS, whose values are in the other fields

    def __post_init__(self):
        require(self.arch in ARCHITECTURES, f"--arch={self.arch}", " or ".join(ARCHITECTURES))
        require(self.precond != "iddpm", "--precond=iddpm", "edm, ve or vp; no training loss is "
                "published for iddpm (such networks can be sampled)")
        require(self.precond in PRECONDITIONERS, f"--precond={self.precond}", "edm, ve or vp")
        require(not self.pfgmpp or self.aug_dim > 0, f"--aug_dim={self.aug_dim:g}",
                "positive; leave out --pfgmpp for D = inf")
        require(not self.stf or self.rbatch >= self.batch, f"--rbatch={self.rbatch}",
                f"at least --batch={self.batch}, whose images it contains")
        require(not self.lsun or self.precond == "edm", f"--lsun=1 with --precond={self.precond}",
                "used with --precond=edm")
        require(not self.stf or not self.cond_image, "--stf=1 with --cond-image=1", "used one "
                "without the other: stable targets know nothing of the condition")
        require(not self.stf or not self.augment > 0, f"--stf=1 with --augment={self.augment:g}",
                "used with --augment=0: stable targets know nothing of augmentation labels")
        require(self.cond or not self.label_dropout, f"--label-dropout={self.label_dropout:g}",
                "used with --cond=1: there are no labels to drop")
        require(self.sigma_data == 0.5 or self.precond == "edm", f"--sigma-data with --precond="
                f"{self.precond}", "used with --precond=edm")
        for name in ("duration", "batch", "tick", "lr", "max_bad_steps", "snap", "dump"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"--{_flag(name)}={value:g}", "positive and finite")
        for name in ("batch_gpu", "cbase", "nblock", "ls", "eval", "keep", "sigma_data"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"--{_flag(name)}={value}", "positive")
        for name in ("lr_rampup", "ema", "workers", "samples", "seed"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"--{_flag(name)}={value}", "0 or more")
        require((self.eval is None) == (self.eval_ref is None), "--eval and --eval-ref",
                "given together")
        require(self.eval_num >= 2, f"--eval-num={self.eval_num}", "2 or more")
        require(self.val_num >= 1, f"--val-num={self.val_num}", "1 or more")
        for name in ("dropout", "augment", "label_dropout"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{_flag(name)}={value:g}", "between 0 and 1")
        require(self.precision in PRECISIONS, f"--precision={self.precision}",
                ", ".join(PRECISIONS))
        require(set(self.log) <= set(LOG_SINKS), f"--log={','.join(self.log)}",
                f"a list of {', '.join(LOG_SINKS)}")
        for name in ("compile", "data_on_device"):
            require(getattr(self, name) in ("auto", "0", "1"),
                    f"--{_flag(name)}={getattr(self, name)}", "auto, 0 or 1")
        require(self.cache or self.data_on_device != "1", "--data-on-device=1 with --cache=0",
                "used with --cache=1: it is the packed file that is copied")
        require(self.cres is None or (self.cres and min(self.cres) > 0), f"--cres={self.cres}",
                "a list of positive integers such as 1,2,2,2")

    @property
    def D(self) -> float:
        """Augmented dimensions, inf for Gaussian diffusion."""
        return self.aug_dim if self.pfgmpp else math.inf

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

        Tick 0 comes after the first step, so that a new run shows a sign of life. It depends only
        on `nimg`: a resumed run reports when an undisturbed one would.
        """
        tick = (nimg - self.batch) // self.tick_nimg
        return tick if tick > (nimg - 2 * self.batch) // self.tick_nimg else None

    def is_eval_due(self, nimg: int) -> bool:
        """Says whether the tick after `nimg` images is the first since a multiple of `eval`."""
        if self.eval is None:
            return False
        eval_nimg = self.eval * 1e3
        return nimg // eval_nimg > max(nimg - self.tick_nimg, 0) // eval_nimg

    def rounds(self, world_size: int) -> tuple[int, int]:
        """Returns (micro-batch per process, accumulation rounds) for this many processes.

        Raises:
            ValueError: batch is not micro-batch * rounds * processes.
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

    def network(self, img_resolution: int | Sequence[int], img_channels: int, label_dim: int,
                cond_channels: int = 0) -> dict:
        """Returns the configuration of the network for this data, as `build_network` takes it."""
        optional = {
            "D": self.aug_dim if self.pfgmpp else None,
            "augment_dim": AUGMENT_DIM if self.augment > 0 else None,
            "sigma_data": self.sigma_data if self.precond == "edm" else None,
            "label_dropout": self.label_dropout or None, "cond_channels": cond_channels or None,
            "model_channels": self.cbase, "num_blocks": self.nblock,
            "channel_mult": list(self.cres) if self.cres else None,
        }
        return {
            "class_name": PRECONDITIONERS[self.precond], "img_resolution": img_resolution,
            "img_channels": img_channels, "label_dim": label_dim, "pfgmpp": self.pfgmpp,
            "dropout": self.dropout, **ARCHITECTURES[self.arch],
            **{key: value for key, value in optional.items() if value is not None},
        }

    def to_dict(self) -> dict:
        """Returns plain data that JSON can hold; infinity becomes the string 'inf'."""
        values = dataclasses.asdict(self)
        values["cres"] = list(self.cres) if self.cres else None
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
        return cls(**check_options(values))


def check_options(values: dict) -> dict:
    """Returns some of the options that `TrainConfig.to_dict` wrote, as the types of its fields.

    Raises:
        ValueError: an unknown key, or a value of the wrong kind.
    """
    hints = typing.get_type_hints(TrainConfig)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        [nearest] = difflib.get_close_matches(unknown[0], hints, n=1, cutoff=0)
        raise ValueError(f"unknown training option {unknown[0]!r}; the nearest is {nearest!r}")
    return {key: _coerce(key, value, hints[key]) for key, value in values.items()}


def changed_options(now: TrainConfig, then: dict) -> list[str]:
    """Returns '--lr=0.01 (0.001 in the state)' for each option that would change the run.

    If the value now is train.py's default, which nobody may have typed, the text says so.

    Args:
        now: the options of the run that is resumed.
        then: what `to_dict` wrote to the state; an option that it lacks had its default.
    """
    changed = []
    for field in dataclasses.fields(now):
        name, value = field.name, now.to_dict()[field.name]
        before = then.get(name, field.default)
        is_used = name != "rbatch" or now.stf
        if name not in {*RESUME_MAY_CHANGE, *NETWORK_OPTIONS} and is_used and value != before:
            default = ", the default" if value == field.default else ""
            changed.append(f"--{_flag(name)}={_shown(value)}{default} ({_shown(before)} in the "
                           "state)")
    return changed


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _flag(name: str) -> str:
    return name.replace("_", "-")


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
