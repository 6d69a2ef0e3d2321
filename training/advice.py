"""Warnings before a run starts, based on its options and its device.

PyTorch is imported only to query the device.
"""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from training.config import TrainConfig

if TYPE_CHECKING:
    import torch

LARGE_FOR_CPU = 10_000_000  # parameters
_AMPERE = (8, 0)  # the first compute capability with bf16 and TF32
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is ARM's name
_MAX_KEPT = 0.5  # share of transferred weights in the average at the end of a run
_PUBLISHED_RAMPUP = 1 / 20  # of the duration: 10 of 200 Mimg


@dataclasses.dataclass(frozen=True)
class Machine:
    """Properties of a process's device.

    Attributes:
        kind: `torch.device.type`, 'cpu' or 'cuda'.
        name: name of a GPU.
        capability: compute capability of an NVIDIA GPU; None for other devices.
        has_bf16: whether the CPU has bfloat16 instructions; None if unknown.
    """

    kind: str
    name: str = ""
    capability: tuple[int, int] | None = None
    has_bf16: bool | None = None

    @classmethod
    def of(cls, device: "torch.device") -> "Machine":
        """Returns the properties of `device`."""
        if device.type != "cuda":
            return cls(device.type, has_bf16=_this_cpu_has_bf16())
        import torch
        capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
        return cls("cuda", torch.cuda.get_device_name(device), capability)


def advice(config: TrainConfig, machine: Machine, parameters: int, *,
           has_ema_rampup: bool = True) -> list[str]:
    """Returns a line for each setting of a run that is probably a mistake.

    `parameters` is the number of the network's parameters. Without `has_ema_rampup`, the average
    starts from transferred weights and keeps its whole half-life.
    """
    lines = [_on_rampup(config), _on_decay(config), _on_size(machine, parameters),
             None if has_ema_rampup else _on_average(config),
             _on_precision(config.precision, machine)]
    return [line for line in lines if line]


def cpu_has_bf16(cpuinfo: str) -> bool | None:
    """Says whether the text of Linux's /proc/cpuinfo lists bfloat16; None if it lists no flags."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.M)
    return bool(_BF16_FLAGS & set(flags[1].split())) if flags else None


def _this_cpu_has_bf16() -> bool | None:
    try:
        return cpu_has_bf16(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def _on_rampup(config: TrainConfig) -> str | None:
    if config.total_nimg >= config.lr_rampup * 1e6:
        return None
    share = config.total_nimg / (config.lr_rampup * 1e6)
    return (f"--duration={config.duration:g} ends before the learning rate's ramp-up, "
            f"--lr-rampup={config.lr_rampup:g}: the rate reaches only {100 * share:.3g}% of "
            f"--lr={config.lr:g}; give a shorter ramp-up, such as "
            f"--lr-rampup={config.duration * _PUBLISHED_RAMPUP:g}")


def _on_decay(config: TrainConfig) -> str | None:
    if config.lr_decay_start is None or config.lr_decay != "none":
        return None
    return (f"--lr-decay-start={config.lr_decay_start:g} has no effect without --lr-decay=rsqrt or "
            "cosine")


def _on_average(config: TrainConfig) -> str | None:
    kept = 0.5 ** (config.total_nimg / (config.ema * 1e6)) if config.ema > 0 else 0.0
    if config.method is not None or kept <= _MAX_KEPT:
        return None
    return (f"--ema={config.ema:g} is long for --duration={config.duration:g}: the averaged "
            f"weights, which are sampled, will still be {100 * kept:.3g}% the transferred ones; "
            f"give a shorter half-life, such as --ema={config.duration / 10:g}")


def _on_size(machine: Machine, parameters: int) -> str | None:
    if machine.kind != "cpu" or parameters <= LARGE_FOR_CPU:
        return None
    return (f"a network of {parameters:,} parameters on the CPU: more than about "
            f"{LARGE_FOR_CPU // 10**6} million need a GPU; make it smaller with --cbase and --cres,"
            " or try --preset=emoji32")


def _on_precision(precision: str, machine: Machine) -> str | None:
    given = f"--precision={precision}"
    if machine.kind == "cpu":
        return {
            "fp16": f"{given} is for GPUs: on the CPU the network runs in fp32",
            "tf32": f"{given} has no effect on the CPU, where the network runs in fp32",
            "bf16": f"{given} is slow on this CPU, which has no instructions for it (AVX512_BF16 "
                    "or AMX); use --precision=fp32" if machine.has_bf16 is False else None,
        }.get(precision)
    if machine.capability is None or machine.capability >= _AMPERE:
        return None
    which = f"{machine.name} (compute capability {'.'.join(map(str, machine.capability))})"
    return {
        "bf16": f"{given} is slow on {which}: it needs at least 8.0; use --precision=fp16",
        "tf32": f"{given} has no effect on {which}: it needs at least 8.0; use "
                "--precision=fp16 or fp32",
    }.get(precision)
