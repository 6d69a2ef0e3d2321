"""What the checkpoints of EDM, PFGM++, its CT forks, ECT and IDMD hold of networks, optimizers."""

import math

import torch
from pickle_assembler import New, Parameter, WithMethod, ordered, persistent, scalar

from pfgmpp.unets import DhariwalUNet, SongUNet


def record(module, attributes=(), init_kwargs=None):
    """Returns what a reference's pickle holds of a module of the same structure."""
    wrap = Parameter if module.training else lambda tensor: tensor
    state = {
        "training": module.training,
        "_parameters": {k: None if p is None else wrap(p.detach().contiguous())
                        for k, p in module._parameters.items()},
        "_buffers": ordered(**module._buffers), "_non_persistent_buffers_set": set(),
        "_forward_hooks": ordered(),
        "_modules": {k: None if m is None else record(m) for k, m in module._modules.items()},
        "skip_scale": scalar(math.sqrt(0.5)), **dict(attributes),
    }
    if type(module) is torch.nn.ModuleDict:
        return New("torch.nn.modules.container", "ModuleDict", state=state)
    state |= {"_init_args": (), "_init_kwargs": init_kwargs or {}}
    return persistent(type(module).__name__, state)


def stored(net, given, attributes=None, **changes):
    """Returns a network's record with the constructor arguments `given`."""
    given = {**{k: v for k, v in given.items() if k != "class_name"}, **changes}
    if attributes is None:
        attributes = {k: v for k, v in given.items() if k in ("img_resolution", "sigma_data")}
    return record(net, attributes, given)


def stored_ecm(net, given, attributes=None, **changes):
    """Returns the record of a network with the constructor arguments `given` as ECT's class."""
    entry = stored(net, given, attributes, **changes)
    entry.args[0]["class_name"] = "ECMPrecond"
    return entry


def ecm_snapshot(entry):
    """Returns what a network-snapshot of ECT holds around the record of its network."""
    loss = WithMethod("ECMLoss", {"P_mean": -1.1, "q": 2}, "mapping", "t_to_r_sigmoid")
    return {"ema": entry, "loss_fn": loss, "augment_pipe": None,
            "dataset_kwargs": New("dnnlib.util", "EasyDict", items={"path": "x.zip"})}


def idmd_snapshot(entries, cur_nimg=1 << 20):
    """Returns what a network-snapshot of IDMD holds around the records of its networks, by key."""
    adam = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(5)}},
            "param_groups": [{"lr": 1e-5, "params": [0]}]}
    return {**entries, "generator_optimizer_state": adam, "student_optimizer_state": adam,
            "cur_nimg": cur_nimg}


class cSongUNet(SongUNet):  # noqa: N801 - as the file names it
    def __init__(self, *, out_channels, **kwargs):
        super().__init__(in_channels=2 * out_channels, out_channels=out_channels, **kwargs)


class cDhariwalUNet(DhariwalUNet):  # noqa: N801
    def __init__(self, *, out_channels, **kwargs):
        super().__init__(in_channels=2 * out_channels, out_channels=out_channels, **kwargs)


class ForkDenoiser(torch.nn.Module):
    """The conditional denoiser of the CT forks, of [v, x] with v the condition.

    D_theta = c_skip x + c_out F(c_in [v, x]; ln(sigma) / 4), with sigma_data = 1/2.
    """

    def __init__(self, model_type, img_resolution, channels, **kwargs):
        super().__init__()
        self.model = {"cSongUNet": cSongUNet, "cDhariwalUNet": cDhariwalUNet}[model_type](
            img_resolution=img_resolution, out_channels=channels, **kwargs)
        self.img_resolution, self.channels = img_resolution, channels
        self.given = {"model_type": model_type, **kwargs}
        with torch.no_grad():
            for parameter in self.parameters():  # some begin as zeros
                parameter.add_(0.05 * torch.randn_like(parameter))

    @property
    def img_channels(self):
        return 2 * self.channels

    def forward(self, both, sigma):
        squares = sigma.reshape(-1, 1, 1, 1) ** 2
        inner = self.model(both / (squares + 0.25).sqrt(), sigma.log() / 4, None)
        x = both[:, self.channels:]
        return x * 0.25 / (squares + 0.25) + inner * (0.25 * squares / (squares + 0.25)).sqrt()


def stored_fork(net, D, **attributes):
    """Returns the record of a ForkDenoiser; D is 128 there where it has no meaning."""
    is_pfgmpp = not math.isinf(D)
    known = {"img_resolution": net.img_resolution, "img_channels": net.channels, "label_dim": 0,
             "pfgmpp": is_pfgmpp, "D": D if is_pfgmpp else 128}
    entry = record(net, {**known, "N": net.channels * net.img_resolution**2, "use_fp16": False,
                         "sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5, **attributes},
                   {**known, **net.given})
    entry.args[0]["class_name"] = "EDMPrecond"
    return entry


def fork_state(net, average, D, step=3_201_000):
    """Returns a state of the CT forks, after a step of `net`; both are ForkDenoisers."""
    return {"optimizer_state": optimizer_state(net), "step": step,
            "net": stored_fork(net.train(), D),
            "ema": stored_fork(average.requires_grad_(False), D)}


def optimizer_state(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    x = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution)
    net(x, torch.tensor([0.5, 2.0])).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["betas"] = list(group["betas"])
    return state
