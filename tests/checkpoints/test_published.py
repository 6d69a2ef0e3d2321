"""EDM and PFGM++ checkpoints give the networks, moments and progress that are in them; no others.

The files are assembled by test_safe_pickle.Assembler in the structure of the published ones.
"""

import copy
import functools
import io
import math
import random
import time

import pytest
import torch
from pickle_assembler import (
    CONTAINERS,
    New,
    mutated,
    persistent,
    zip_file,
)
from published_files import optimizer_state, record, stored

from checkpoints import checkpoint, published
from pfgmpp.networks import build_network

SONG = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
        "dropout": 0.13, "model_type": "SongUNet"}
ADM = {"model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4],
       "model_type": "DhariwalUNet"}
FACE = {"img_resolution": 8, "img_channels": 3}
NETWORKS = {
    "ddpmpp": {"class_name": "EDMPrecond", **FACE, **SONG, "augment_dim": 9},
    "ncsnpp": {"class_name": "EDMPrecond", **FACE, **SONG, "label_dim": 4, "sigma_data": 0.4,
               "embedding_type": "fourier", "encoder_type": "residual",
               "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1], "use_fp16": True},
    "skip": {"class_name": "VEPrecond", **FACE, **SONG, "encoder_type": "skip",
             "decoder_type": "skip"},
    "adm": {"class_name": "EDMPrecond", **FACE, **ADM, "label_dim": 3, "label_dropout": 0.1},
    "vp": {"class_name": "VPPrecond", **FACE, **SONG, "beta_d": 18.5},
    "ve": {"class_name": "VEPrecond", **FACE, **SONG, "sigma_max": 50},
    "iddpm": {"class_name": "iDDPMPrecond", **FACE, **ADM, "M": 100},
}


def network(name="ddpmpp", **changes):
    torch.manual_seed(0)
    net = build_network({**NETWORKS[name], **changes}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return net


def read(data):
    return published.read(io.BytesIO(data), "x.pkl")


def same(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.long
@pytest.mark.parametrize("name, container", [
    *((name, "zip") for name in NETWORKS),
    *((list(NETWORKS)[0], container) for container in CONTAINERS if container != "zip")])
def test_a_snapshot_gives_the_source_network_bit_exactly(name, container):
    net = network(name)
    data = CONTAINERS[container](
        {"ema": stored(net, NETWORKS[name]), "loss_fn": persistent("EDMLoss", {}),
         "augment_pipe": None, "dataset_kwargs": {"path": "x.zip"}}, location="cuda:0")
    assert published.is_published(data[:published.HEAD_BYTES])
    content = read(data)
    assert content["format"] == "edm-snapshot" and content["D_recorded"]
    assert content["network"] == net.config and "net" not in content
    assert same(content["ema"], net.state_dict())
    rebuilt = checkpoint.build_ema(content)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 5.0])
    assert torch.equal(rebuilt(x, sigma), net(x, sigma))


@pytest.mark.long
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("D", [2, 128, 3072000, math.inf])
def test_a_training_state_gives_networks_moments_progress_and_D(container, D):
    net = network(pfgmpp=True, D=D).train()
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    moments = optimizer_state(net)
    given = {**NETWORKS["ddpmpp"], "pfgmpp": True, "D": D}
    content = read(CONTAINERS[container]({
        "optimizer_state": moments, "step": 3_000_000_512, "ema": stored(ema, given),
        "net": stored(net, given, {"pfgmpp": True, "D": D, "N": 192})}))
    assert content["format"] == "pfgmpp-foreign-state"
    assert content["progress"] == {"cur_nimg": 3_000_000_512}
    assert content["network"]["D"] == D and content["D_recorded"]
    assert content["options"]["aug_dim"] == D
    assert same(content["ema"], ema.state_dict()) and same(content["net"], net.state_dict())
    fresh = torch.optim.Adam(net.parameters())
    fresh.load_state_dict(content["optimizer"])
    ours, theirs = fresh.state_dict(), moments
    assert ours["state"].keys() == theirs["state"].keys() and ours["state"]
    for i, entry in theirs["state"].items():
        assert all(torch.equal(ours["state"][i][key], entry[key]) for key in entry)
    assert ours["param_groups"][0]["lr"] == 2e-3


def test_moments_follow_the_names_where_the_order_of_registration_differs():
    net = network().train()
    moments = optimizer_state(net)
    entry = stored(net, NETWORKS["ddpmpp"])
    names = [name for name, _ in net.named_parameters()]
    modules = entry.args[0]["state"]["_modules"]["model"].args[0]["state"]["_modules"]
    for key in reversed(list(modules)):  # the file registers the model's parts backwards
        modules[key] = modules.pop(key)
    tops = list(dict.fromkeys(name.split(".")[1] for name in names))
    shuffled = sorted(names, key=lambda name: -tops.index(name.split(".")[1]))
    state = {i: moments["state"][names.index(name)] for i, name in enumerate(shuffled)
             if names.index(name) in moments["state"]}
    content = read(zip_file({"net": entry, "optimizer_state": {**moments, "state": state}}))
    assert content["format"] == "edm-training-state" and content["ema"] is None
    for i, expected in moments["state"].items():
        assert torch.equal(content["optimizer"]["state"][i]["exp_avg"], expected["exp_avg"])


@pytest.mark.long
@pytest.mark.parametrize("given, attributes, D, recorded", [
    ({"pfgmpp": False, "D": 128}, {"pfgmpp": False, "D": 128}, None, True),
    ({}, {"pfgmpp": True, "D": 2048}, 2048, True),
    ({"pfgmpp": True, "D": 64}, {}, 64, True),  # VE networks keep neither as attributes
    ({}, {}, None, False),
    ({"pfgmpp": True}, {}, None, False),
    ({"D": 128}, {}, None, False),
])
def test_D_is_infinite_unless_the_file_says_pfgmpp(given, attributes, D, recorded):
    config = NETWORKS["ve"]
    top = {"ema": stored(network("ve"), config, attributes, **given), "step": 0}
    content = read(zip_file(top))
    assert content["network"].get("D") == D and content["D_recorded"] is recorded
    assert content["network"]["pfgmpp"] is (D is not None)
    assert (D or math.inf) == build_network(content["network"]).D


def test_positional_arguments_and_arguments_of_the_model_alone_are_understood():
    net = network()
    given = {k: v for k, v in NETWORKS["ddpmpp"].items() if k not in ("class_name", *FACE)}
    entry = record(net, {"img_resolution": 8}, given)
    entry.args[0]["state"]["_init_args"] = (8, 3)
    assert read(zip_file({"ema": entry}))["network"] == net.config
    entry = record(net, {**FACE, "label_dim": 0})
    entry.args[0]["state"] |= {"_init_args": None, "_init_kwargs": None}
    inner = {k: v for k, v in given.items() if k != "model_type"}
    entry.args[0]["state"]["_modules"]["model"].args[0]["state"]["_init_kwargs"] = {
        "img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 0, **inner}
    content = read(zip_file({"ema": entry}))
    assert same(content["ema"], net.state_dict())
    assert content["network"] == net.config


def test_half_precision_weights_become_float32():
    net = network().half()
    content = read(zip_file({"ema": stored(net, NETWORKS["ddpmpp"])}))
    assert all(t.dtype == torch.float32 for t in content["ema"].values())
    assert same(content["ema"], {k: v.float() for k, v in net.state_dict().items()})


def test_our_own_files_are_not_foreign(tmp_path):
    net = network()
    for kind in (checkpoint.STATE_FORMAT, checkpoint.SNAPSHOT_FORMAT):
        checkpoint.save(tmp_path / "x.pt", {"format": kind, "ema": dict(net.state_dict())})
        assert not published.is_published((tmp_path / "x.pt").read_bytes()[:published.HEAD_BYTES])
    torch.save({"weights": torch.ones(1)}, tmp_path / "x.pt")
    assert published.is_published((tmp_path / "x.pt").read_bytes()[:published.HEAD_BYTES])
    for other in (b"", b"<html>", b"\x80", b"\x80\x01", b"PK\x05\x06"):
        assert not published.is_published(other)


# ------------------------------------------------------------------------------- data-only attacks


same_network = functools.cache(network)  # for what does not change it


def attack(changes, attributes=None, edit=None, name="ddpmpp", class_name=None, top=()):
    net = same_network(name)
    entry = stored(net, NETWORKS[name], attributes, **changes)
    if class_name:
        entry.args[0]["class_name"] = class_name
    if edit:
        edit(entry.args[0]["state"])
    return {"ema": entry, **dict(top)}


def model(state):
    return state["_modules"]["model"].args[0]["state"]


def _rename(state):
    layer = model(state)["_modules"]
    layer["map_layer9"] = layer.pop("map_layer0")


def _dotted(state):
    model(state)["_modules"]["a.b"] = model(state)["_modules"]["map_layer0"]


def _shape(state):
    parameters = model(state)["_modules"]["map_layer0"].args[0]["state"]["_parameters"]
    parameters["weight"] = torch.zeros(16, 64)


def _long(state):
    parameters = model(state)["_modules"]["map_layer0"].args[0]["state"]["_parameters"]
    parameters["weight"] = torch.zeros(64, 16, dtype=torch.int64)


def _buffer(state):
    layer = model(state)["_modules"]["map_layer0"].args[0]["state"]
    layer["_buffers"] = {"bias": layer["_parameters"].pop("bias")}


def _model_class(state):
    state["_modules"]["model"].args[0]["class_name"] = "Evil"


ADAM = {"state": {}, "param_groups": [{"params": [0], "lr": 1e-3}]}
ATTACKS = {
    "model_type of another name": (attack({"model_type": "os.system"}), "'os.system'"),
    "model_type of the other model": (attack({"model_type": "DhariwalUNet"}), "DhariwalUNet"),
    "model class": (attack({}, edit=_model_class), "'Evil'"),
    "network class": (attack({}, class_name="Popen"), "'Popen'"),
    "network of EDM2": (attack({}, class_name="Precond"), "EDM2"),
    "unknown argument": (attack({"__class__": "x"}), "'__class__'"),
    "argument of the other model": (attack({"channels_per_head": 64}), "channels_per_head"),
    "huge resolution": (attack({"img_resolution": 1 << 20}, {}), "img_resolution=1048576"),
    "huge width": (attack({"model_channels": 1 << 30}), "model_channels=1073741824"),
    "huge but allowed width": (attack({"model_channels": 1024}), "must be"),
    "huge but allowed depth": (attack({
        "num_blocks": 16, "channel_mult": [16] * 4, "model_channels": 512, "augment_dim": 0}),
        "lacks"),
    "many multipliers": (attack({"channel_mult": [1] * 1000}), "channel_mult=a list"),
    "nested multipliers": (attack({"channel_mult": [[1], 2]}), "channel_mult"),
    "huge label_dim": (attack({"label_dim": 1 << 31}), "label_dim"),
    "huge number of levels": (attack({"M": 1 << 30}, name="iddpm"), "M=1073741824"),
    "flag in place of a number": (attack({"model_channels": True}), "model_channels=True"),
    "real in place of a number": (attack({"num_blocks": 1.0}), "num_blocks=1.0"),
    "text in place of a number": (attack({"dropout": "0.1"}), "dropout='0.1'"),
    "dropout that is no number": (attack({"dropout": math.nan}), "dropout=nan"),
    "label dropout": (attack({"label_dropout": 2}), "label_dropout=2"),
    "sigma_data of zero": (attack({"sigma_data": 0}), "sigma_data=0"),
    "sigma_min that is no number": (attack({}, {"sigma_min": math.nan}), "sigma_min=nan"),
    "negative D": (attack({"pfgmpp": True, "D": -1}), "D=-1"),
    "D that is a list": (attack({"pfgmpp": True, "D": [1]}), "D=a list"),
    "odd resolution": (attack({"img_resolution": 9}, {}), "9"),
    "long argument with line ends": (attack({"model_type": "a\n" * 999}), r"a\na\n"),
    "missing tensor": (attack({"augment_dim": 9, "num_blocks": 2}), "lacks"),
    "surplus tensor": (attack({"augment_dim": 0}), "map_augment"),
    "renamed tensor": (attack({}, edit=_rename), "lacks the tensor model.map_layer0"),
    "wrong shape": (attack({}, edit=_shape), "[16, 64], must be [64, 16]"),
    "whole numbers for weights": (attack({}, edit=_long), "int64"),
    "buffer for a parameter": (attack({}, edit=_buffer), "buffer"),
    "dotted name": (attack({}, edit=_dotted), "'a.b'"),
    "no modules": (attack({}, edit=lambda s: s.pop("_modules")), "_modules"),
    "modules of texts": (attack({}, edit=lambda s: s.update(_modules={"model": "x"})), "'x'"),
    "tensor of text": (attack({}, edit=lambda s: s.update(_parameters={"w": "x"})), "'x'"),
    "arguments of text": (attack({}, edit=lambda s: s.update(_init_kwargs="x")), "arguments"),
    "negative progress": (attack({}, top={"step": -1}), "step=-1"),
    "progress of text": (attack({}, top={"step": "x"}), "step='x'"),
    "optimizer of text": (attack({}, top={"optimizer_state": "x"}), "optimizer"),
    "optimizer of another size": (attack({}, top={"optimizer_state": ADAM}), "optimizer"),
    "network of text": ({"ema": "x"}, "'x'"),
    "no network": ({"weights": 1}, "no network"),
    "a list": ([1], "a list"),
}


@pytest.mark.long
@pytest.mark.parametrize("case", ATTACKS)
def test_what_the_data_claims_is_checked_before_anything_is_built(case):
    value, asked = ATTACKS[case]
    for container in ("raw-4", "zip"):
        start = time.process_time()
        with pytest.raises(ValueError) as caught:
            read(CONTAINERS[container](value))
        message = str(caught.value)
        assert type(caught.value) in (ValueError, published.UnreadableError)
        assert time.process_time() - start < 10
        assert message.startswith("x.pkl: ") and message.isprintable() and len(message) < 400
        assert asked in message, message


def test_modules_that_contain_themselves_are_refused():
    state = {"_parameters": {}, "_buffers": {}}
    inner = New("torch.nn.modules.container", "ModuleDict", state={**state, "_modules": {}})
    for _ in range(40):  # 2^40 modules to whoever walks them
        inner = New("torch.nn.modules.container", "ModuleDict",
                    state={**state, "_modules": {"a": inner}})
    value = attack({}, edit=lambda s: s["_modules"].update(extra=inner))
    with pytest.raises(ValueError, match="too many modules"):
        read(zip_file(value))


def test_an_edm2_file_is_named_whatever_it_holds():
    for rest in (persistent("Encoder", {}), New("os", "x")):
        data = CONTAINERS["raw-4"](New("dnnlib.util", "EasyDict", items={"encoder": rest}))
        with pytest.raises(ValueError, match="x.pkl: .*EDM2"):
            read(data)


def test_hostile_source_in_a_good_file_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # every record's module_src touches a canary there
    net = network()
    data = CONTAINERS["raw-4"]({"ema": stored(net, NETWORKS["ddpmpp"])})
    assert b"touch canary" in data
    assert same(read(data)["ema"], net.state_dict())
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_damaged_files_end_in_a_value_error_or_in_the_same_tensors_names():
    net = network(model_channels=4, channel_mult=[1], img_resolution=4)
    given = {**NETWORKS["ddpmpp"], "model_channels": 4, "channel_mult": [1], "img_resolution": 4}
    rng = random.Random(11)
    for container in ("raw-4", "zip"):
        good = CONTAINERS[container]({"ema": stored(net, given), "step": 1})
        for _ in range(150):
            try:
                content = read(mutated(good, rng))
            except ValueError as error:
                assert str(error).isprintable()
                continue
            assert list(content["ema"]) == list(net.state_dict())


def test_what_a_network_computes_with_counts_more_than_how_it_was_constructed():
    net = network("ddpmpp", sigma_data=0.4)
    given = {**NETWORKS["ddpmpp"], "sigma_data": 0.5, "sigma_max": 80}
    data = zip_file({"ema": stored(net, given, {"sigma_data": 0.4, "img_resolution": 8})})
    config = read(data)["network"]
    assert (config["sigma_data"], config["sigma_max"]) == (0.4, 80)
