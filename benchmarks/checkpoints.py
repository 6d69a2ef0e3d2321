"""Writing and reading a training state of the CIFAR-10 NCSN++, 56 million parameters."""

import tempfile
from pathlib import Path

import torch

from benchmarks.table import Options, Row, in_turn, with_ratios
from checkpoints import checkpoint
from pfgmpp.networks import build_network
from training.config import TrainConfig


def _state() -> dict:
    """Returns a state with the size and structure of a real one."""
    config = TrainConfig(data="", arch="ncsnpp")
    network = config.network(32, 3, 0)
    net = build_network(network)
    weights = dict(net.state_dict())
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.randn_like(p),
                   "exp_avg_sq": torch.rand_like(p)} for i, p in enumerate(net.parameters())}
    return {"format": checkpoint.STATE_FORMAT, "network": network, "net": weights,
            "ema": {name: value.clone() for name, value in weights.items()},
            "optimizer": {"state": moments, "param_groups": []},
            "progress": {"cur_nimg": 0}, "options": config.to_dict(), "dataset": {}}


def rows(options: Options) -> list[Row]:
    """Returns our functions, with checksum and fsync, and plain torch.save and torch.load."""
    state = _state()
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = Path(folder, "training-state-000000.pt"), Path(folder, "plain.pt")
        found = []
        for what, ways in (
            ("writing a training state", {
                "checksum, fsync, rename": lambda: checkpoint.save(ours, state),
                "torch.save": lambda: torch.save(state, plain)}),
            ("reading a training state", {
                "verified": lambda: checkpoint.load(ours),
                "torch.load": lambda: torch.load(plain, weights_only=True)}),
        ):
            in_turn(ways, 1)
            seconds = in_turn(ways, options.repeats)
            found += with_ratios([Row(what, name, seconds[name]) for name in ways], list(ways)[-1])
    return found
