"""Weights without the configuration of their network give the network that they were taken from.

The files are written by PyTorch, its DDP, compiler and averages, and by safetensors, or in the
structure that Lightning, CompVis's LitEma, torch_ema and ema-pytorch write.
"""

import collections
import copy
import enum
import functools
import importlib.util
import io
import json
import math
import os
import pathlib
import pickle
import random
import zipfile

import pytest
import torch
from pickle_assembler import mutated
from snapshots import write_snapshot

import checkpoint_tool
import fid
import generate
import likelihood
import train
from checkpoints import bare, checkpoint
from pfgmpp.networks import build_network
from torch_utils import safe_pickle

needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is an optional extra")

SONG = {"img_resolution": 8, "img_channels": 3, "model_channels": 8, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [4], "model_type": "SongUNet"}
NCSN = {**SONG, "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1]}
ADM = {"img_resolution": 8, "img_channels": 3, "model_channels": 32, "channel_mult": [1, 2],
       "num_blocks": 1, "attn_resolutions": [4], "model_type": "DhariwalUNet"}
NETWORKS = {
    "ddpmpp": {"class_name": "EDMPrecond", **SONG, "augment_dim": 9, "pfgmpp": True, "D": 128.0},
    "ncsnpp": {"class_name": "EDMPrecond", **NCSN, "label_dim": 4, "pfgmpp": True, "D": 2.0},
    "skip": {"class_name": "VEPrecond", **SONG, "encoder_type": "skip", "decoder_type": "skip"},
    "adm": {"class_name": "EDMPrecond", **ADM, "label_dim": 3, "sigma_data": 0.4},
    "vp": {"class_name": "VPPrecond", **SONG},
    "iddpm": {"class_name": "iDDPMPrecond", **ADM, "M": 50},
    "oblong": {"class_name": "EDMPrecond", **SONG, "img_resolution": [8, 16], "img_channels": 2},
}


def network(name="ncsnpp", seed=0, **changes):
    """Returns a network with random weights, no two of which are equal tensors."""
    torch.manual_seed(seed)
    net = build_network({**NETWORKS[name], **changes}).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return net


same_network = functools.cache(network)  # for what does not change it


def other_network(net):
    """Returns one with other weights and the same buffers, as that which an average is of."""
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        parameter.add_(1)
    return other


def write_options(folder, net, **more):
    """Writes what a run of ours writes of its network."""
    path = folder / "training_options.json"
    config = {key: "inf" if value == math.inf else value for key, value in net.config.items()}
    path.write_text(json.dumps({"options": {"pfgmpp": net.pfgmpp}, "network": config, **more}))
    return path


def assert_same(content, net):
    """Asserts that a content is of a network: its configuration, and every bit of its weights."""
    assert content["network"] == net.config
    weights = net.state_dict()
    assert list(content["ema"]) == list(weights)
    for name, tensor in weights.items():
        assert content["ema"][name].dtype == torch.float32
        assert torch.equal(content["ema"][name], tensor), name


def load(path, options, key=None):
    return checkpoint.load(path, key, options)


def below(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------- forms of files


class Kind(enum.Enum):
    CELL = "cell"


class Settings(dict):
    """An object of a program that we don't have, as hyper-parameters are."""

    def __init__(self):
        super().__init__(lr=1e-3)
        self.frozen = frozenset([1, 2])


def adam(net):
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(p),
                   "exp_avg_sq": torch.zeros_like(p)} for i, p in enumerate(net.parameters())}
    return {"state": moments, "param_groups": [{"lr": 1e-3, "params": [*moments]}]}


def lightning(tensors, net, **more):
    """Returns what Lightning keeps around a module's tensors."""
    return {
        "epoch": 7, "global_step": 4321, "pytorch-lightning_version": "2.5.1",
        "state_dict": collections.OrderedDict(tensors),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 8}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {
            "best_model_score": torch.tensor(0.5), "dirpath": pathlib.PurePosixPath("a/b"),
            "best_k_models": {"a.ckpt": torch.tensor(0.5)}},
            Kind: {"wait": 1}},  # as callbacks of old versions are named by their class
        "optimizer_states": [adam(net)], "lr_schedulers": [], "hparams_name": "kwargs",
        "hyper_parameters": {
            "settings": Settings(), "kind": Kind.CELL, "dtype": torch.float16, -1: 0,
            "device": torch.device("cpu"), "act": functools.partial(torch.nn.SiLU, inplace=True),
            "sizes": {1, 2, 3}, 0.5: "x", (1, 2): "y", "where": pathlib.PurePosixPath("c"),
            "tables": collections.defaultdict(list, a=[1])}, **more}


def lit_ema(net):
    """Returns what CompVis's LitEma keeps: parameters under names without dots, two counters."""
    return {"decay": torch.tensor(0.999), "num_updates": torch.tensor(7), **{
        name.replace(".", ""): p.clone() for name, p in net.named_parameters()}}


def averaged(net):
    return torch.optim.swa_utils.AveragedModel(net).state_dict()


def distributed(net):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(
            copy.deepcopy(net).requires_grad_(True))
        return wrapped.state_dict()
    finally:
        torch.distributed.destroy_process_group()


def compiled_inside(net):
    """Returns the tensors of a network whose model alone was compiled."""
    net = copy.deepcopy(net)
    net.model = torch.compile(net.model)
    return net.state_dict()


def lightning_weight_averaging(net, plain):
    return lightning(below("net.", net.state_dict()), net, **{
        "current_model_state": below("net.", plain.state_dict()),
        "averaging_state": {"n_averaged": torch.tensor(3)}})


FORMS = {  # of the weights of `net`; `plain` are others, and worse
    "state_dict": lambda net, plain: net.state_dict(),
    "plain dict": lambda net, plain: dict(net.state_dict()),
    "parameters": lambda net, plain: {name: torch.nn.Parameter(tensor, requires_grad=False)
                                      for name, tensor in net.state_dict().items()},
    "without model.": lambda net, plain: net.model.state_dict(),
    "compiled": lambda net, plain: torch.compile(net).state_dict(),
    "compiled inside": lambda net, plain: compiled_inside(net),
    "DDP": lambda net, plain: distributed(net),
    "averaged": lambda net, plain: averaged(net),
    "checkpointed blocks": lambda net, plain: {
        name.replace("_block0.", "_block0._checkpoint_wrapped_module."): tensor
        for name, tensor in net.state_dict().items()},
    "model": lambda net, plain: {"model": net.state_dict(), "optimizer": adam(net)},
    "net": lambda net, plain: {"net": net.state_dict(), "epoch": 3, "losses": [0.5, 0.25]},
    "ema": lambda net, plain: {"ema": net.model.state_dict()},
    "model_state_dict": lambda net, plain: {"model_state_dict": net.state_dict(), "loss": 0.5},
    "model and ema": lambda net, plain: {"model": plain.state_dict(), "ema": net.state_dict()},
    "ema_model": lambda net, plain: {"ema_model": net.state_dict(), "model": plain.state_dict()},
    "nested": lambda net, plain: {"state": {"nets": {"net": plain.state_dict(),
                                                     "net_ema": net.state_dict()}}},
    "swa": lambda net, plain: {"model": plain.state_dict(), "other": averaged(net)},
    "ema-pytorch": lambda net, plain: {"model": plain.state_dict(), "ema": {
        "initted": torch.tensor(True), "step": torch.tensor(5),
        **below("online_model.", plain.state_dict()), **below("ema_model.", net.state_dict())}},
    "average without buffers": lambda net, plain: {
        "model": plain.state_dict(), "ema": dict(net.named_parameters())},
    "torch_ema": lambda net, plain: {"model": plain.state_dict(), "ema": {
        "decay": 0.999, "num_updates": 5, "shadow_params": [*net.parameters()]}},
    "Lightning, model.": lambda net, plain: lightning(below("model.", net.state_dict()), net),
    "Lightning, model in net.": lambda net, plain: lightning(
        below("net.", net.model.state_dict()), net),
    "Lightning, beside others": lambda net, plain: lightning(
        below("net.", net.state_dict()) | {"lpips.conv.weight": torch.ones(3)}, net),
    "Lightning, compiled, in DDP": lambda net, plain: lightning(
        below("module.net._orig_mod.", net.state_dict()), net),
    "Lightning, average": lambda net, plain: lightning(
        below("net.", plain.state_dict()) | below("ema.", averaged(net)), net),
    "Lightning, LitEma": lambda net, plain: lightning(
        below("model.", plain.state_dict()) | below("model_ema.", lit_ema(net)), net),
    "Lightning, LitEma of a model": lambda net, plain: lightning(
        below("unet.", plain.model.state_dict()) | below("unet_ema.", lit_ema(net.model)), net),
    "Lightning, WeightAveraging": lightning_weight_averaging,
    "Lightning, the same twice": lambda net, plain: lightning(
        below("net.", net.state_dict()) | below("loss.net.", net.state_dict()), net),
}
AVERAGES = {"averaged", "ema", "model and ema", "ema_model", "nested", "swa", "ema-pytorch",
            "average without buffers", "torch_ema", "Lightning, average", "Lightning, LitEma",
            "Lightning, LitEma of a model", "Lightning, WeightAveraging"}
SAVES = {
    "zip": torch.save,
    "legacy": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=4)),
}


@pytest.mark.long
@pytest.mark.parametrize("form, save", [
    *((form, "zip") for form in FORMS),
    *((form, save) for save in ("legacy", "pickle") for form in (
        "state_dict", "parameters", "model and ema", "torch_ema", "Lightning, LitEma"))])
def test_every_form_gives_the_network_bit_exactly(form, save, tmp_path):
    net = same_network()
    value = FORMS[form](net, other_network(net))
    SAVES[save](value, tmp_path / "x.pt")
    content = load(tmp_path / "x.pt", write_options(tmp_path, net))
    assert_same(content, net)
    assert ("averaged weights" in content["notes"][0]) == (form in AVERAGES)


@pytest.mark.long
@pytest.mark.parametrize("form", ["state_dict", "without model.", "Lightning, LitEma",
                                  "average without buffers", "torch_ema"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_rebuilt(name, form, tmp_path):
    net = same_network(name)
    torch.save(FORMS[form](net, other_network(net)), tmp_path / "x.pt")
    content = load(tmp_path / "x.pt", write_options(tmp_path, net))
    assert_same(content, net)
    x, sigma = torch.randn(2, *net.image_shape), torch.tensor([0.5, 3.0])
    assert torch.equal(checkpoint.build_ema(content)(x, sigma), net(x, sigma))


@needs_safetensors
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "net."])
def test_safetensors_give_the_network(prefix, tmp_path, monkeypatch):
    from safetensors.torch import save_file
    net = same_network("adm")
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(below(prefix, tensors), path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"a plain state_dict of {len(tensors)} tensors, without"):
        checkpoint.load(path)
    options = write_options(tmp_path, net)
    assert_same(load(path, options), net)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors: damaged"):
        load(path, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_numbers_become_float32(dtype, tmp_path):
    net = same_network()
    torch.save({name: t.to(dtype) for name, t in net.state_dict().items()}, tmp_path / "x.pt")
    content = load(tmp_path / "x.pt", write_options(tmp_path, net))
    for name, tensor in net.state_dict().items():
        assert content["ema"][name].dtype == torch.float32
        assert torch.equal(content["ema"][name], tensor.to(dtype).float())


@pytest.mark.long
@pytest.mark.parametrize("D", [2, 128, math.inf])
def test_samples_are_those_of_our_own_snapshot(D, tmp_path, invoke):
    options = {"pfgmpp": True, "aug_dim": float(D)}
    own = write_snapshot(tmp_path / "own.pt", seed=3, **options)
    content = checkpoint.load(own)
    net = checkpoint.build_ema(content)
    torch.save(lightning(below("net.", torch.compile(net).state_dict()), net), tmp_path / "x.ckpt")
    config = write_options(tmp_path, net, options=content["options"])
    done = invoke(checkpoint_tool.main, "convert", tmp_path / "x.ckpt", tmp_path / "new.pt",
                  f"--config={config}")
    assert done.exit_code == 0, done.output
    assert "Read as the weights 'state_dict.net'. The file does not say" in done.stderr
    new = checkpoint.load(tmp_path / "new.pt")
    assert new["progress"] == {"cur_nimg": None}  # nobody knows
    origin = new.pop("converted_from")
    assert (origin["file"], origin["format"]) == ("x.ckpt", "bare-weights")
    assert checkpoint.digest(new | {"progress": content["progress"]}) == checkpoint.digest(content)
    images = []
    for path in (own, tmp_path / "new.pt"):
        out = tmp_path / f"{path.stem}-images"
        done = invoke(generate.main, f"--network={path}", f"--outdir={out}", "--seeds=0-3",
                      "--steps=3", "--device=cpu")
        assert done.exit_code == 0, done.output
        images.append([file.read_bytes() for file in sorted(out.rglob("*.png"))])
    assert images[0] == images[1] and len(images[0]) == 4


def test_what_a_run_records_of_its_data_goes_with_its_weights(tmp_path):
    net = same_network()
    torch.save(net.state_dict(), tmp_path / "x.pt")
    dataset = {"scale": {"lo": [0.0], "hi": [1.0]}, "name": "x"}
    content = load(tmp_path / "x.pt", write_options(tmp_path, net, dataset=dataset))
    assert content["dataset"] == dataset and content["options"] == {"pfgmpp": True}
    assert checkpoint.as_snapshot(content)["dataset"] == dataset


# ----------------------------------------------------------------- configurations of other projects


def their_options(net, path, *, leave_out=(), top=(), **changes):
    """Writes what EDM, and with `top` PFGM++, write of a network of ours."""
    ours = ("img_resolution", "img_channels", "label_dim", "pfgmpp", "D", "sigma_min", "sigma_max",
            "beta_d", "beta_min", "M", "epsilon_t")
    kwargs = {key: value for key, value in net.config.items() if key not in ours}
    kwargs["class_name"] = f"training.networks.{kwargs['class_name']}"
    data = {"class_name": "training.dataset.ImageFolderDataset", "resolution": net.image_shape[1],
            "use_labels": net.label_dim > 0}
    content = {"dataset_kwargs": data, "network_kwargs": {**kwargs, **changes},
               "loss_kwargs": {"class_name": "training.loss.EDMLoss"}, "batch_size": 512,
               **dict(top)}
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in leave_out}))
    return path


@pytest.mark.long
@pytest.mark.parametrize("leave_out", [(), ("dataset_kwargs",)])
@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "skip", "adm", "vp"])
def test_runs_of_edm_and_pfgmpp_lack_what_the_tensors_tell(name, leave_out, tmp_path):
    """Image size, channels and labels; D is beside the network in a file of PFGM++."""
    net = same_network(name)
    torch.save({"model": net.state_dict()}, tmp_path / "x.pt")
    top = {"pfgmpp": True, "D": net.D} if net.pfgmpp else {}
    content = load(tmp_path / "x.pt", their_options(net, tmp_path / "o.json", top=top,
                                                    leave_out=leave_out))
    assert_same(content, net)
    assert content["D_recorded"] and content["options"].get("aug_dim", math.inf) == net.D
    assert build_network(content["network"]).D == net.D


@pytest.mark.parametrize("top, D, recorded", [
    ({}, math.inf, True), ({"pfgmpp": False, "D": 128}, math.inf, True),
    ({"pfgmpp": True, "D": 2048}, 2048, True), ({"D": 64, "pfgmv2": True}, math.inf, False),
    ({"pfgm": True}, math.inf, False)])
def test_D_is_that_of_the_run(top, D, recorded, tmp_path, invoke):
    net = same_network("ddpmpp", pfgmpp=False)
    torch.save(net.state_dict(), tmp_path / "x.pt")
    config = their_options(net, tmp_path / "o.json", top=top)
    content = load(tmp_path / "x.pt", config)
    assert build_network(content["network"]).D == D and content["D_recorded"] is recorded
    args = ["convert", tmp_path / "x.pt", tmp_path / "y.pt", f"--config={config}"]
    done = invoke(checkpoint_tool.main, *args)
    assert ("does not record D" in done.output) == (not recorded)
    if not recorded:
        assert invoke(checkpoint_tool.main, *args, "--pfgmpp=1", "--aug_dim=64").exit_code == 0
        assert build_network(checkpoint.load(tmp_path / "y.pt")["network"]).D == 64


def test_a_configuration_written_by_hand_says_D_or_flags_do(tmp_path, invoke):
    net = same_network("ddpmpp", pfgmpp=False)
    torch.save(net.state_dict(), tmp_path / "x.pt")
    ours = json.loads(write_options(tmp_path, net).read_text())["network"]
    del ours["pfgmpp"]
    theirs = {key: value for key, value in ours.items()
              if key not in ("sigma_min", "sigma_max", "D")}
    for key, config in (("network_kwargs", theirs), ("network", ours)):
        args = ["convert", tmp_path / "x.pt", tmp_path / "y.pt", "--overwrite",
                f"--config={tmp_path / 'o.json'}"]
        (tmp_path / "o.json").write_text(json.dumps({key: config}))
        refused = invoke(checkpoint_tool.main, *args)
        assert refused.exit_code != 0 and "does not record D; give --pfgmpp=1" in refused.output
        for flags, D in ((["--pfgmpp=1", "--aug_dim=128"], 128), (["--pfgmpp=0"], math.inf)):
            assert invoke(checkpoint_tool.main, *args, *flags).exit_code == 0
            assert build_network(checkpoint.load(tmp_path / "y.pt")["network"]).D == D
        for known, D in (({"pfgmpp": True, "D": 2}, 2), ({"pfgmpp": False}, math.inf)):
            (tmp_path / "o.json").write_text(json.dumps({key: config | known}))
            assert invoke(checkpoint_tool.main, *args).exit_code == 0
            assert build_network(checkpoint.load(tmp_path / "y.pt")["network"]).D == D


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_show_says_where_converted_weights_come_from(suffix, tmp_path, invoke):
    net = same_network()
    config = write_options(tmp_path, net)

    def shown(content):
        torch.save(content, tmp_path / "x.pt")
        first, again = (tmp_path / f"{name}.{suffix}" for name in ("y", "z"))
        for source, dest, more in ((tmp_path / "x.pt", first, [f"--config={config}"]),
                                   (first, again, [])):
            assert invoke(checkpoint_tool.main, "convert", source, dest, *more,
                          "--overwrite").exit_code == 0
        lines = invoke(checkpoint_tool.main, "show", again).output.splitlines()
        return {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}

    told = shown(net.state_dict())
    assert told["parts"] == "ema (not known to be averaged)"
    assert json.loads(told["converted from"])["file"] == "x.pt"
    assert "Read as one set of weights. The file does not say" in told["converted from"]
    assert shown({"ema": net.state_dict()})["parts"] == "ema"


def test_lsun_runs_of_pfgmpp_are_sampled_from_380(tmp_path):
    net = same_network("ddpmpp")
    torch.save(net.state_dict(), tmp_path / "x.pt")
    for lsun, level in ((True, 380.0), (False, None)):
        config = their_options(net, tmp_path / "o.json", top={
            "pfgmpp": True, "D": 128, "opts": {"lsun": lsun}})
        assert checkpoint.highest_level(load(tmp_path / "x.pt", config)) == level


def test_a_consistency_function_of_ect_is_one(tmp_path):
    net = same_network("ddpmpp", pfgmpp=False)
    torch.save(net.state_dict(), tmp_path / "x.pt")
    config = their_options(net, tmp_path / "o.json", class_name="training.networks.ECMPrecond")
    loaded = load(tmp_path / "x.pt", config)["network"]
    assert loaded["few_step"]["method"] == "ect" and loaded["boundary"] == loaded["sigma_min"] > 0


def test_the_ct_forks_see_the_condition_first(tmp_path):
    """Theirs is F(c_in [v, x]), ours F([c_in x, v]): the first layer's inputs change places."""
    net = same_network("ddpmpp", pfgmpp=False, cond_channels=3, cond_c_in=True)
    theirs = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first = theirs["model.enc.8x8_conv.weight"]
    theirs["model.enc.8x8_conv.weight"] = torch.cat([first[:, 3:], first[:, :3]], dim=1)
    torch.save(theirs, tmp_path / "x.pt")
    config = their_options(net, tmp_path / "o.json", model_type="cSongUNet")
    kwargs = json.loads(config.read_text())
    for key in ("cond_channels", "cond_c_in"):
        kwargs["network_kwargs"].pop(key)
    config.write_text(json.dumps(kwargs))
    assert_same(load(tmp_path / "x.pt", config), net)
    assert_same(load(write_snapshot_of(net, tmp_path), write_options(tmp_path, net)), net)


def write_snapshot_of(net, folder):
    """Writes the weights of a network of ours alone."""
    torch.save(net.state_dict(), folder / "ours.pt")
    return folder / "ours.pt"


# ---------------------------------------------------------------------------- which weights, errors


def refusal(path, options, key=None):
    with pytest.raises(ValueError) as caught:
        load(path, options, key)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 600
    return line


@pytest.mark.long
def test_of_several_weights_a_key_names_those_to_take(tmp_path, invoke):
    one, two = same_network(), same_network(seed=1)
    torch.save({"nets": {"a": one.state_dict(), "b": two.state_dict()}, "c.ema": two.state_dict(),
                "d": {"ema": one.state_dict()}}, tmp_path / "x.pt")
    options = write_options(tmp_path, one)
    for key, net in (("nets.a", one), ("a", one), ("b", two), ("d", one), ("c.ema", two)):
        assert_same(load(tmp_path / "x.pt", options, key), net)
    line = refusal(tmp_path / "x.pt", options)
    assert "give --key=NAME with one of 'd.ema', 'c.ema'" in line or "'c.ema', 'd.ema'" in line
    assert "no weights have this name" in refusal(tmp_path / "x.pt", options, "x")
    assert "several weights have this name" in refusal(tmp_path / "x.pt", options, "nets")
    done = invoke(checkpoint_tool.main, "convert", tmp_path / "x.pt", tmp_path / "y.pt",
                  f"--config={options}", "--key=b")
    assert done.exit_code == 0 and "Read as the weights 'nets.b', not " in done.stderr
    assert checkpoint.digest(checkpoint.load(tmp_path / "y.pt")["ema"]) == checkpoint.digest(
        dict(two.state_dict()))


def test_plain_weights_need_a_key_where_two_differ_and_none_where_they_are_one(tmp_path):
    one, two = same_network(), same_network(seed=1)
    options = write_options(tmp_path, one)
    torch.save(below("a.", one.state_dict()) | below("b.", two.state_dict()), tmp_path / "x.pt")
    assert "holds several networks; give --key=NAME with one of 'a', 'b'" in refusal(
        tmp_path / "x.pt", options)
    assert_same(load(tmp_path / "x.pt", options, "b"), two)


LAST = "model.dec.8x8_aux_conv.weight"
DAMAGE = {
    "missing": ((LAST, "model.map_layer0.bias"), {}, (
        "missing: 2 of 152 tensors, the first 'model.map_layer0.bias'",)),
    "unknown": ((), {"model.enc.more.weight": torch.ones(2), "model.z": torch.ones(1)}, (
        "unknown to it: 2, the first 'model.enc.more.weight'",)),
    "misshapen": ((), {LAST: torch.ones(4, 3)}, (
        f"of another shape or type: 1, the first {LAST}, which is [4, 3], must be [3, 8, 3, 3]",)),
    "whole numbers": ((), {"model.map_layer0.bias": torch.ones(32, dtype=torch.int64)}, (
        "the first model.map_layer0.bias, which is of torch.int64",)),
    "no tensor": ((), {"model.map_layer0.bias": torch.ones(32, dtype=torch.complex64)}, (
        "the first model.map_layer0.bias, which is an object of 'torch.ComplexFloatStorage'",)),
    "random buffer": (("model.map_noise.freqs",), {}, ("the first 'model.map_noise.freqs'",)),
    "all of these": ((LAST,), {"model.z": torch.ones(1), "model.map_layer0.bias": torch.ones(1)}, (
        "missing: 1 of", "unknown to it: 1,", "of another shape or type: 1,")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_tensors_that_do_not_fit_are_named_and_counted(case, tmp_path, invoke):
    without, more, words = DAMAGE[case]
    net = same_network()
    tensors = {k: v for k, v in net.state_dict().items() if k not in without} | more
    torch.save({"ema": tensors, "net": net.state_dict()} if case == "missing" else tensors,
               tmp_path / "x.pt")
    options = write_options(tmp_path, net)
    line = refusal(tmp_path / "x.pt", options)
    assert all(word in line for word in words), line
    assert ("; --key=NAME selects other weights: 'net'" in line) == (case == "missing")
    done = invoke(checkpoint_tool.main, "convert", tmp_path / "x.pt", tmp_path / "y.pt",
                  f"--config={options}")
    assert done.exit_code == 1 and len(done.output.splitlines()) == 1
    assert not (tmp_path / "y.pt").exists()


def test_an_average_of_another_number_of_parameters_is_not_passed_over(tmp_path):
    net = same_network()
    shadow = [*net.parameters()]
    for wrong, words in ((shadow[:-1], "missing: 1 of"), ([*shadow, shadow[0]], "'number ")):
        torch.save({"model": net.state_dict(), "ema": {"shadow_params": wrong}}, tmp_path / "x.pt")
        line = refusal(tmp_path / "x.pt", write_options(tmp_path, net))
        assert words in line and "selects other weights: 'model'" in line


def test_buffers_that_follow_from_the_configuration_may_be_missing(tmp_path):
    net = same_network("iddpm")
    torch.save({name: tensor for name, tensor in net.state_dict().items()
                if name != "u" and "resample_filter" not in name}, tmp_path / "x.pt")
    assert_same(load(tmp_path / "x.pt", write_options(tmp_path, net)), net)


STRANGERS = {
    "diffusers": ({"conv_in.weight": 1, "time_embedding.linear_1.weight": 1}, "UNet of diffusers"),
    "guided-diffusion in Lightning": (
        {"state_dict": {"model.diffusion_model.time_embed.0.weight": 1,
                        "model.diffusion_model.input_blocks.0.0.weight": 1}}, "a guided-diffusion"),
    "score_sde": ({"model": {"module.all_modules.0.weight": 1}}, "a network of score_sde"),
    "DiT": ({"ema": {"x_embedder.proj.weight": 1, "t_embedder.mlp.0.weight": 1}}, "(DiT)"),
    "ResNet": ({"layer1.0.conv1.weight": 1}, "weights of an unknown network"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_weights_of_other_networks_get_one_line(case, tmp_path):
    def filled(value):
        return torch.ones(2) if value == 1 else {k: filled(v) for k, v in value.items()}
    names, words = STRANGERS[case]
    torch.save(filled(names), tmp_path / "x.pt")
    net = same_network()
    assert words in refusal(tmp_path / "x.pt", write_options(tmp_path, net))
    line = refusal(tmp_path / "x.pt", None)
    assert ("convert" in line) == (case == "ResNet") and line.startswith(f"{tmp_path / 'x.pt'}: ")


@pytest.mark.parametrize("change, words", [
    ({"img_resolution": 16}, "network for 16x16 images, but the tensors are named for 8x8"),
    ({"class_name": "Evil"}, "asks for the class_name 'Evil'"),
    ({"model_channels": 1 << 30}, "model_channels=1073741824: must be"),
    ({"model_channels": 16}, "of another shape or type"),
    ({"label_dim": 5}, "model.map_label.weight, which is [16, 4], must be [16, 5]"),
    ({"num_blocks": 2}, "missing: "), ({"attn_resolutions": []}, "unknown to it: ")])
def test_a_configuration_of_another_network_is_refused(change, words, tmp_path):
    net = same_network()
    torch.save(net.state_dict(), tmp_path / "x.pt")
    path = write_options(tmp_path, net)
    options = json.loads(path.read_text())
    options["network"] |= change
    path.write_text(json.dumps(options))
    assert words in refusal(tmp_path / "x.pt", path)


@pytest.mark.parametrize("text, words", [
    ("{", "not a JSON file"), ("[1]", "not a JSON object"), ("{}", "neither 'network' nor"),
    ("[" * 100_000, "not a JSON"), ('{"network_kwargs": {}}', "asks for the network class ''"),
    ('{"network_kwargs": {"class_name": "training.networks.EDMPrecond", "small": true}}',
     "unknown argument 'small'")])
def test_files_that_are_no_options_of_a_run_get_one_line(text, words, tmp_path):
    net = same_network()
    torch.save(net.state_dict(), tmp_path / "x.pt")
    (tmp_path / "o.json").write_text(text)
    line = refusal(tmp_path / "x.pt", tmp_path / "o.json")
    assert words in line and line.startswith(f"--config={tmp_path / 'o.json'}: ")


def test_what_nobody_can_tell_is_asked_for(tmp_path):
    net = same_network("ddpmpp")
    torch.save({"shadow_params": [*net.parameters()]}, tmp_path / "x.pt")
    top = {"pfgmpp": True, "D": 128.0}
    config = their_options(net, tmp_path / "o.json", top=top)
    assert "has no img_channels, and the tensors don't" in refusal(tmp_path / "x.pt", config)
    config = their_options(net, tmp_path / "o.json", top=top, img_channels=3, label_dim=0)
    assert_same(load(tmp_path / "x.pt", config), net)


def test_a_file_that_describes_its_network_needs_no_configuration(tmp_path, invoke):
    own = write_snapshot(tmp_path / "own.pt")
    net = checkpoint.build_ema(checkpoint.load(own))
    options = write_options(tmp_path, net)
    assert "describes its network itself; leave --config out" in refusal(own, options)
    done = invoke(checkpoint_tool.main, "convert", own, tmp_path / "y.pt", "--config=nowhere.json")
    assert done.exit_code == 1 and "--config=nowhere.json: No such file" in done.output


@pytest.mark.long
def test_every_script_says_what_such_a_file_is(dataset_zip, tmp_path, invoke):
    net, path = same_network(), tmp_path / "x.pt"
    out = f"--outdir={tmp_path / 'out'}"
    calls = [(checkpoint_tool.main, "show", path), (generate.main, f"--network={path}", out),
             (checkpoint_tool.main, "convert", path, tmp_path / "y.pt"),
             (fid.main, "gen", f"--network={path}", f"--ref={dataset_zip}",
              "--seeds=0-3", "--detector=pixels", "--device=cpu"),
             (likelihood.main, f"--network={path}", f"--data={dataset_zip}"),
             (train.main, out, f"--data={dataset_zip}", f"--transfer={path}")]
    for value, words in (
            (net.state_dict(), "a plain state_dict of 152 tensors, without the network's config"),
            (lightning(below("net.", net.state_dict()), net),
             "a Lightning checkpoint: state_dicts by name ('state_dict' of 152 tensors)"),
            ({"model": net.state_dict(), "ema": {"shadow_params": [*net.parameters()]}},
             "('model' of 152 tensors, 'ema.shadow_params' of ")):
        torch.save(value, path)
        for main, *args in calls:
            done = invoke(main, *args)
            assert done.exit_code == 1 and words in done.stderr, done.output
            assert "checkpoint_tool.py convert FILE DEST.pt --config=training" in done.stderr
            assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_whole_module_is_named(tmp_path):
    net = same_network()
    for value in (net, {"net": net, "epoch": 3}):
        torch.save(value, tmp_path / "x.pt")
        assert ("a pickled module of the class 'pfgmpp.networks.EDMPrecond', whose code is not in"
                in refusal(tmp_path / "x.pt", None))


# ------------------------------------------------------------------------------------ hostile files


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.long
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "beside"])
def test_a_file_that_asks_for_harm_is_refused_unrun(place, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = same_network()
    for call in ((os.mkdir, "ran"), (eval, "open('ran', 'w')"), (open, "ran", "w"),
                 (pathlib.Path.touch, pathlib.Path("ran"))):
        value = lightning(below("net.", net.state_dict()), net)
        if place == "beside":
            value["x"] = Hostile(*call)
        elif place == "state_dict":
            value[place]["net.model.map_layer0.bias"] = Hostile(*call)
        else:
            value[place]["x"] = Hostile(*call)
        try:
            SAVES[save](value, tmp_path / "x.pt")
        except AttributeError:  # methods have no name in protocol 2
            continue
        options = write_options(tmp_path, net)
        if call[0] is pathlib.Path.touch and place != "state_dict":
            assert_same(load(tmp_path / "x.pt", options), net)  # inert, and not looked at
        else:
            assert "x.pt: " in refusal(tmp_path / "x.pt", options)
            refusal(tmp_path / "x.pt", None)
        assert not (tmp_path / "ran").exists()


def rewritten(path, edit):
    """Changes the pickle in a ZIP of torch.save, with its checksum."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, edit(data) if name.endswith("data.pkl") else data)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    net = same_network()
    torch.save(dict(net.state_dict()), tmp_path / "x.pt")
    assert_same(load(tmp_path / "x.pt", write_options(tmp_path, net)), net)
    # The first weight of 32x16 begins at element 0 of its storage; now it begins at element 255.
    rewritten(tmp_path / "x.pt", lambda data: data.replace(b"QK\x00K", b"QK\xffK"))
    with pytest.raises(ValueError, match="ends at element"):
        safe_pickle.load_loosely(tmp_path / "x.pt")
    assert "ends at element" in refusal(tmp_path / "x.pt", write_options(tmp_path, net))


def test_a_tensor_larger_than_the_file_is_not_built(tmp_path):
    net = same_network()
    huge = dict(net.state_dict())
    huge["model.map_layer0.bias"] = torch.zeros(1).expand(1 << 40)
    torch.save(huge, tmp_path / "x.pt")
    assert "which is [1099511627776], must be" in refusal(tmp_path / "x.pt",
                                                          write_options(tmp_path, net))


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path):
    net = same_network()
    torch.save(net.state_dict(), tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    at = data.index(net.state_dict()[LAST].contiguous().numpy().tobytes()) if net.state_dict()[
        LAST].is_contiguous() else data.index(net.model.map_layer0.bias.numpy().tobytes())
    data[at] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    assert "checksum" in refusal(tmp_path / "x.pt", write_options(tmp_path, net))


def test_dictionaries_within_themselves_are_walked_once(tmp_path):
    inner = {"x.y": torch.ones(1)}
    for _ in range(40):  # 1000^40 paths
        inner = dict.fromkeys(map(str, range(1000)), inner)
    own = {"a.b": torch.ones(1)}
    own["self"] = own
    for value in (inner, own):
        torch.save(value, tmp_path / "x.pt")
        assert refusal(tmp_path / "x.pt", write_options(tmp_path, same_network()))


@pytest.mark.long
@pytest.mark.parametrize("save", SAVES)
def test_damaged_files_end_in_a_value_error_or_in_plain_data(save):
    net = network("ddpmpp", model_channels=4, channel_mult=[1], attn_resolutions=[])
    buffer = io.BytesIO()
    value = lightning(below("net.", net.model.state_dict()), net)
    if save == "pickle":
        buffer.write(pickle.dumps(value, protocol=2))
    else:
        SAVES[save](value, buffer)
    data, rng = buffer.getvalue(), random.Random(0)
    head = 60_000 if save == "zip" else len(data)
    for _ in range(100):
        changed = mutated(data[:head], rng) + data[head:]
        try:
            found = bare.load(io.BytesIO(changed), changed[:512])
            bare.description(found)
            options = bare.RunOptions("o", {"network": dict(net.config)})
            assert bare.read(found, "x", options)["ema"].keys() == net.state_dict().keys()
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 600


def test_old_files_are_refused_where_their_storages_are_not_what_they_say(tmp_path):
    net = same_network()
    torch.save(net.state_dict(), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pt").read_bytes()
    for changed in (data[:-1], data + b"x", data[:2000], data.replace(b"little_e", b"x" * 8)):
        (tmp_path / "x.pt").write_bytes(changed)
        refusal(tmp_path / "x.pt", write_options(tmp_path, net))
