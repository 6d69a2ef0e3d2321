"""Checks that all ranks agree on options, code, data and weights.

Ranks that were started differently would train on unnoticed, because gradients are averaged
regardless of their origin. So options, code and data are compared at the start, and weights
whenever files are written.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch

from images.dataset import ImageFolderDataset
from torch_utils import distributed
from training.config import TrainConfig, flag_name
from training.trainer import Trainer, dataset_record

# What may differ between machines: the paths of files (but not whether a path is given), and how
# each machine reads its data.
_PATHS = {"data", "transfer", "teacher", "eval_ref", "eval_pairs", "val_data", "plugin"}
_OWN_OPTIONS = {"workers"}
_ROOT = Path(__file__).resolve().parent.parent
_ROOMS = ("dnnlib", "torch_utils", "images", "pfgmpp", "checkpoints", "sampling", "metrics",
          "training")


def check_options(config: TrainConfig, **others: Any) -> None:
    """Raises ValueError on every rank if the options, code or PyTorch of any differ from rank 0's.

    Args:
        config: the options of this rank.
        others: what else must be equal, by flag.
    """
    facts = {f"--{flag_name(name)}": ("given" if value else None) if name in _PATHS else value
             for name, value in (config.to_dict() | others).items() if name not in _OWN_OPTIONS}
    _require_alike(facts, "start every process with the same command")
    _require_alike({"code of sha256": _code_digest(), "PyTorch": torch.__version__},
                   "install the same on every machine")


def check_data(dataset: ImageFolderDataset, flag: str = "--data") -> None:
    """Raises ValueError on every rank if the data of `flag` on any rank differ from rank 0's."""
    if distributed.get_world_size() == 1:  # a fingerprint may require reading a whole folder
        return
    dataset.share_fingerprint()
    record = dataset_record(dataset)
    content = f"{record['size']} images with fingerprint {record['fingerprint'][:12]}..."
    _require_alike({flag: content}, "give every machine the same data")


def check_weights(trainer: Trainer) -> None:
    """Raises ValueError on every rank if the weights of any differ from rank 0's in any bit.

    Every rank must call it at the same step. It waits for the device.
    """
    if distributed.get_world_size() == 1:
        return
    tensors = {f"{kind} {name}": tensor
               for kind, net in (("weight", trainer.net), ("averaged weight", trainer.ema),
                                 *trainer.objective.trained_networks.items())
               for name, tensor in net.named_parameters()}
    sums = torch.stack([_bit_sum(tensor) for tensor in tensors.values()]).tolist()
    everyone = distributed.gather_objects(sums, in_training=True)
    for rank, theirs in enumerate(everyone):
        differing = [name for name, a, b in zip(tensors, everyone[0], theirs, strict=True)
                     if a != b]
        if differing:
            raise ValueError(
                f"rank {rank} has other weights than rank 0 at {trainer.cur_nimg / 1000:g} kimg "
                f"({len(differing)} of {len(sums)} tensors, first {differing[0]}): nothing was "
                "written, so the last state was saved before the weights diverged; look for a "
                "machine with different hardware, drivers or libraries")


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Returns an int64 checksum, on the device, of a float32 tensor's bits and their positions.

    Odd factors make each term a bijection of its element modulo 2^64.
    """
    bits = tensor.detach().reshape(-1).view(torch.int32).to(torch.int64)
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


def _require_alike(facts: dict[str, Any], advice: str) -> None:
    """Raises ValueError on every rank, naming the first rank whose facts differ from rank 0's."""
    everyone = distributed.gather_objects(facts)
    for rank, theirs in enumerate(everyone):
        differing = [f"{name}={_shown(theirs.get(name))} ({_shown(value)} on rank 0)"
                     for name, value in everyone[0].items() if theirs.get(name) != value]
        if differing:
            raise ValueError(f"rank {rank} was started with {', '.join(differing)}; {advice}")


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def _code_digest() -> str:
    """Returns the beginning of a sha256 over the source files that training uses."""
    sha = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (_ROOT / room).glob("*.py")):
        sha.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return sha.hexdigest()[:16]
