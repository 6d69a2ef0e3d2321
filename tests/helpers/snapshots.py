"""Small network snapshots."""

import torch

from checkpoints import checkpoint
from pfgmpp.networks import build_network
from training.config import TrainConfig


def write_snapshot(path, *, label_dim=2, shape=(3, 8, 8), cond_channels=0, seed=0, dataset=None,
                   **options):
    """Writes a network snapshot with weights that are not those of initialisation.

    `dataset` is what it records of its data.
    """
    config = TrainConfig(data="none", arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1, **options)
    torch.manual_seed(seed)
    net = build_network({**config.network(list(shape[1:]), shape[0], label_dim),
                         **({"cond_channels": cond_channels} if cond_channels else {})})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    checkpoint.save(path, {
        "format": checkpoint.SNAPSHOT_FORMAT, "network": net.config,
        "ema": dict(net.state_dict()), "progress": {"cur_nimg": 0}, "options": config.to_dict(),
        **({"dataset": dataset} if dataset else {})})
    return path


def write_few_step(path, method="cd", levels=(80.0, 0.821), **options):
    """Writes a snapshot that records that it is a few-step network, see `write_snapshot`."""
    return with_network(write_snapshot(path, **options),
                        few_step={"method": method, "levels": list(levels)})


def with_network(path, **changes):
    """Changes the configuration of the network in a snapshot."""
    content = checkpoint.load(path)
    content["network"] |= changes
    checkpoint.save(path, {key: content[key] for key in (
        "format", "network", "ema", "progress", "options", "dataset") if key in content})
    return path
