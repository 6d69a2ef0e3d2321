"""What the checkpoints of EDM, PFGM++, ECT and IDMD hold of a network and its optimizer."""

import math

import torch
from pickle_assembler import New, Parameter, WithMethod, ordered, persistent, scalar


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


def optimizer_state(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    x = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution)
    net(x, torch.tensor([0.5, 2.0])).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["betas"] = list(group["betas"])
    return state
