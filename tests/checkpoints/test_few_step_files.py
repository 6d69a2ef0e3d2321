"""Files of ECT and IDMD give their networks, with the numbers that those projects define.

The files are assembled in the structure of theirs; no code of theirs is used.
"""

import functools
import json
import math
import pickle
import sys
import types

import pytest
import torch
from pickle_assembler import Assembler, Call, persistent, raw_file, zip_file
from published_files import (
    ecm_snapshot,
    idmd_snapshot,
    optimizer_state,
    stored,
    stored_ecm,
)
from snapshots import write_snapshot

import checkpoint_tool
import generate
from checkpoints import checkpoint, published
from pfgmpp.few_steps import FewStep
from pfgmpp.networks import build_network
from sampling.network_likelihood import NetworkLikelihood
from sampling.network_sampler import NetworkSampler
from torch_utils import safe_pickle

CPU = torch.device("cpu")
NETWORK = {"class_name": "EDMPrecond", "img_resolution": 8, "img_channels": 3,
           "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
           "attn_resolutions": [4], "dropout": 0.0, "sigma_data": 0.4}
KEYS = ("ema_0_9900", "ema_0_9950", "ema_0_9990", "ema_0_9999", "generator", "student")


def network(seed=0, **changes):
    torch.manual_seed(seed)
    net = build_network({**NETWORK, **changes}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return net


def write(path, value, container=raw_file):
    path.write_bytes(container(value))
    return path


def write_ecm(path, net=None, **how):
    return write(path, ecm_snapshot(stored_ecm(net or network(), NETWORK, **how)))


def write_idmd(path, keys=KEYS, container=raw_file, given=NETWORK, attributes=None, **changes):
    entries = {key: stored(network(seed, **changes), given, attributes)
               for seed, key in enumerate(KEYS) if key in keys}
    return write(path, idmd_snapshot(entries), container)


def same(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def refusal(path, key=None):
    with pytest.raises(ValueError) as caught:
        checkpoint.load(path, key)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400
    return message


# ------------------------------------------------------------------------------------------- ECT


@pytest.mark.long
@pytest.mark.parametrize("attributes, boundary", [
    ({}, 0.003), ({"sigma_min": 0.003, "sigma_max": math.inf}, 0.003), ({"sigma_min": 0.02}, 0.02)])
def test_a_consistency_function_of_ect_has_its_numbers_in_evaluation_and_edms_in_training(
        attributes, boundary, tmp_path):
    source = network()
    net = checkpoint.build_ema(checkpoint.load(
        write_ecm(tmp_path / "network-snapshot-000002.pkl", source, attributes={
            "img_resolution": 8, "sigma_data": 0.4, **attributes})))
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn([4, 3, 8, 8], generator=rng)
    sd = NETWORK["sigma_data"]
    for sigma in (boundary, 2 * boundary, 0.1, 0.821, 80.0):
        x = (1 + sigma) * noise
        c_in = 1 / math.sqrt(sigma**2 + sd**2)
        # The raw network, which sees ln(sigma)/4 for each image.
        raw = source.model(c_in * x, torch.full([4], math.log(sigma) / 4), None).detach()
        for is_training, above in ((False, sigma - boundary), (True, sigma)):
            c_skip, c_out = sd**2 / (above**2 + sd**2), above * sd * c_in
            found = net.train(is_training)(x, sigma)
            # Rounding of float32, of x at the end and of the network's input before.
            torch.testing.assert_close(found, c_skip * x + c_out * raw, rtol=1e-4, atol=2e-5)
    x = 3 * noise
    assert torch.equal(net.eval()(x, boundary), x)
    assert not torch.allclose(net.train()(x, boundary), x, atol=1e-3)


@pytest.mark.parametrize("container", [raw_file, lambda v: raw_file(v, 2), zip_file])
def test_a_snapshot_of_ect_becomes_edms_network_with_levels_to_sample_at(container, tmp_path):
    source = network()
    data = ecm_snapshot(stored_ecm(source, NETWORK))
    content = checkpoint.load(write(tmp_path / "network-snapshot-000100.pkl", data, container))
    assert content["format"] == "ect-snapshot" and same(content["ema"], source.state_dict())
    assert content["network"] == source.config | {
        "sigma_min": 0.003, "boundary": 0.003, "boundary_in_training": False,
        "few_step": {"method": "ect", "levels": [80.0, 0.821]}}
    net = checkpoint.build_ema(content)
    assert math.isinf(net.D) and content["D_recorded"] and net.few_step == FewStep.of("ect")
    # The number in the name counts ticks, so nothing is known of the images seen.
    assert content["progress"] == {"cur_nimg": None}
    sampler = NetworkSampler.open(str(tmp_path / "network-snapshot-000100.pkl"), CPU)
    assert sampler.settings["levels"] == [80, 0.821] and sampler.sampler.nfe == 2
    assert next(sampler.images([[0, 1]])).images.isfinite().all()


def stepped(name, net):
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=1e-4)
    net(torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0])).square().mean().backward()
    optimizer.step()
    return optimizer.state_dict()


STATES = {"Adam": optimizer_state, "RAdam": functools.partial(stepped, "RAdam"),
          "Adagrad": functools.partial(stepped, "Adagrad"), "none": lambda net: {"state": {}},
          "a number": lambda net: 7}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_ect_is_sampled_whatever_its_optimizer_and_resumed_from_never(name, tmp_path):
    net = network().train()
    optimizer = STATES[name](net)
    path = write(tmp_path / "training-state-000100.pt", {
        "net": stored_ecm(net, NETWORK), "optimizer_state": optimizer}, zip_file)
    content = checkpoint.load(path)
    assert content["format"] == "ect-training-state" and "optimizer" not in content
    assert same(content["net"], net.state_dict()) and content["ema"] is None
    with pytest.raises(checkpoint.SnapshotGivenError, match="state of ECT .* with --transfer"):
        checkpoint.load_state(path)


@pytest.mark.parametrize("number", ["000100", "latest"])
def test_a_state_of_ect_is_sampled_by_the_average_beside_it(number, tmp_path):
    ema = network(1)
    state = write(tmp_path / f"training-state-{number}.pt",
                  {"net": stored_ecm(network(), NETWORK), "optimizer_state": {}}, zip_file)
    assert "ema_source" not in checkpoint.with_average(checkpoint.load(state), state)
    write_ecm(tmp_path / f"network-snapshot-{number}.pkl", ema)
    content = checkpoint.with_average(checkpoint.load(state), state)
    assert same(checkpoint.build_ema(content).state_dict(), ema.state_dict())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_method_of_the_object_itself_is_read_as_python_writes_it(protocol, monkeypatch):
    module = types.ModuleType("torch_utils.persistence")

    def rebuild(meta):
        raise AssertionError("called")

    class Loss:
        def __init__(self):
            self.q, self.mapping, self.c = 2, self.sigmoid, 0.5

        def sigmoid(self):
            raise AssertionError("called")

        def __reduce__(self):
            return module._reconstruct_persistent_obj, ({
                "type": "class", "version": 6, "module_src": "1 / 0", "class_name": "Loss",
                "state": self.__dict__},)

    rebuild.__module__, rebuild.__qualname__ = module.__name__, "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = rebuild
    monkeypatch.setitem(sys.modules, module.__name__, module)
    written = pickle.dumps({"loss_fn": Loss(), "after": [1]}, protocol=protocol)
    assembled = raw_file(ecm_snapshot(None), 4 if protocol >= 4 else 2)
    for data, method, attribute in ((written, "sigmoid", "Loss"),
                                    (assembled, "t_to_r_sigmoid", "ECMLoss")):
        assert data.count(b"getattr") == 1 and b"R0h" in data  # the outer copy is thrown away
        loss = safe_pickle._load_pickle(memoryview(data), ())["loss_fn"]
        assert type(loss) is safe_pickle.Record and loss.state["q"] == 2
        found = loss.state["mapping"]
        assert type(found) is safe_pickle.BoundMethod and not callable(found)
        assert (found.class_name, found.name) == (attribute, method)


def test_a_method_in_place_of_a_network_or_tensor_is_refused(tmp_path):
    entry = stored_ecm(network(), NETWORK)
    method = Call("builtins", "getattr", persistent("A", {}), "f")
    for kind in ("_modules", "_parameters"):
        entry.args[0]["state"][kind]["extra"] = method
        assert "a BoundMethod" in refusal(write(tmp_path / "x.pkl", ecm_snapshot(entry)))
        del entry.args[0]["state"][kind]["extra"]
    assert "'ema' is a BoundMethod" in refusal(write(tmp_path / "x.pkl", ecm_snapshot(method)))


@pytest.mark.parametrize("claim", [
    {"few_step": {"method": "ect", "levels": [80.0]}}, {"boundary": 0.1},
    {"boundary_in_training": True}])
def test_what_makes_our_networks_few_step_is_no_argument_of_foreign_classes(claim, tmp_path):
    [name] = claim
    for make in (stored, stored_ecm):
        path = write(tmp_path / "x.pkl", {"ema": make(network(), NETWORK, **claim)})
        assert f"unknown argument '{name}'" in refusal(path)


# ------------------------------------------------------------------------------------------ IDMD


@pytest.fixture(scope="module")
def idmd(tmp_path_factory):
    return write_idmd(tmp_path_factory.mktemp("idmd") / "network-snapshot-001048.pkl")


@pytest.mark.parametrize("key", [None, *KEYS])
def test_each_key_of_idmd_gives_its_network_and_the_default_is_an_average(key, idmd):
    source = network(KEYS.index(key or "ema_0_9990"))
    content = checkpoint.load(idmd, key)
    assert content["format"] == "idmd-snapshot" and same(content["ema"], source.state_dict())
    few_step = {"few_step": {"method": "ipfm", "levels": [80.0]}}
    assert content["network"] == source.config | ({} if key == "student" else few_step)
    assert content["progress"] == {"cur_nimg": 1 << 20} and content["D_recorded"]
    assert (content["key"], content["keys"]) == (key or "ema_0_9990", list(KEYS))
    net = checkpoint.build_ema(content)
    assert math.isinf(net.D) and (net.few_step is None) == (key == "student")
    x = torch.randn([2, 3, 8, 8], generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(80 * x, 80.0), source(80 * x, 80.0))
    tensors = sum(isinstance(value, torch.Tensor) for part in content.values()
                  if isinstance(part, dict) for value in part.values())
    assert tensors == len(source.state_dict()) and "optimizer" not in content


@pytest.mark.parametrize("attributes, D, is_recorded", [
    ({"pfgmpp": True, "D": 128}, 128, True), ({"pfgmpp": False, "D": 128}, math.inf, True),
    ({"pfgmpp": True}, math.inf, False)])
def test_D_of_idmd_is_that_of_the_network(attributes, D, is_recorded, tmp_path):
    path = write_idmd(tmp_path / "x.pkl", ["generator"],
                      attributes={"img_resolution": 8, "sigma_data": 0.4, **attributes})
    content = checkpoint.load(path, "generator")
    assert content["D_recorded"] is is_recorded
    assert build_network(content["network"]).D == D


def test_only_networks_that_a_file_has_can_be_chosen(tmp_path):
    path = write_idmd(tmp_path / "x.pkl", ["ema_0_9900", "student"])
    for key in ("generator", "ema", "net", "cur_nimg", "", "__class__"):
        assert refusal(path, key) == (
            f"--key={key}: {path} has no network of this name; give --key=NAME with one of "
            "ema_0_9900, student")
    assert refusal(path) == (f"{path} has no network ema_0_9990; give --key=NAME with one of "
                             "ema_0_9900, student")
    assert checkpoint.load(path, "student")["key"] == "student"


@pytest.mark.long
def test_a_key_is_refused_where_a_file_holds_one_network(tmp_path):
    entry = stored(network(), NETWORK)
    paths = [write_snapshot(tmp_path / "own.pt"), write_ecm(tmp_path / "ect.pkl"),
             write(tmp_path / "edm.pkl", {"ema": entry, "loss_fn": persistent("EDMLoss", {})}),
             write(tmp_path / "edm.pt", {"net": stored(network().train(), NETWORK),
                                         "optimizer_state": optimizer_state(network())}, zip_file),
             write(tmp_path / "both.pkl", {"ema": entry, "student": entry})]
    for path in paths:
        checkpoint.load(path)
        for key in ("generator", "ema"):
            assert refusal(path, key) == (
                f"--key={key}: {path} holds only one network; leave --key out")


@pytest.mark.long
@pytest.mark.parametrize("container", [raw_file, lambda v: raw_file(v, 2), zip_file])
def test_tensors_of_other_networks_take_no_memory(container, tmp_path):
    path = write_idmd(tmp_path / "x.pkl", container=container)
    found = safe_pickle.load(path, leave_out={*KEYS, "generator_optimizer_state"} - {"generator"})

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, safe_pickle.Record)):
            for item in (value if isinstance(value, dict) else value.state).values():
                yield from tensors(item)

    for key in (*KEYS, "generator_optimizer_state", "student_optimizer_state"):
        is_read = key in ("generator", "student_optimizer_state")
        devices = {tensor.device.type for tensor in tensors(found[key])}
        assert devices == {"cpu" if is_read else "meta"}, key
    assert not any(t.is_meta for t in tensors(safe_pickle.load(path)))


class _Sharing(Assembler):
    """Writes a tensor that is seen again as a reference to the first."""

    def tensor(self, value):
        key = ("tensor", id(value))
        return self.remember(key, b"" if key in self.memo else super().tensor(value))


@pytest.mark.long
def test_networks_that_share_tensors_are_read_whole(tmp_path):
    source = network()
    entry = stored(source, NETWORK)
    data = _Sharing().pickle(idmd_snapshot({"generator": entry, "ema_0_9990": entry}))
    alone = _Sharing().pickle(idmd_snapshot({"generator": entry}))
    assert len(data) < 1.5 * len(alone)
    (tmp_path / "x.pkl").write_bytes(data)
    for key in ("generator", None):
        assert same(checkpoint.load(tmp_path / "x.pkl", key)["ema"], source.state_dict())
    # Nor does a file of another kind lose what it has in common with a part of such a name.
    net = source.train()
    moments, entry = optimizer_state(net), stored(net, NETWORK)
    for part in (entry, moments):
        (tmp_path / "x.pkl").write_bytes(_Sharing().pickle(
            {"student": part, "net": entry, "optimizer_state": moments}))
        content = checkpoint.load(tmp_path / "x.pkl")
        assert content["format"] == "edm-training-state" and same(content["net"], net.state_dict())
        for i, expected in moments["state"].items():
            found = content["optimizer"]["state"][i]
            assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("changes, asked", [
    ({"cur_nimg": -1}, "cur_nimg=-1"), ({"cur_nimg": "x"}, "cur_nimg='x'"),
    ({"ema_0_9990": "x"}, "'ema_0_9990' is 'x'"),
    ({"ema_0_9990": persistent("Popen", {})}, "'Popen'")])
def test_what_a_file_of_idmd_claims_is_checked(changes, asked, tmp_path):
    top = idmd_snapshot({"ema_0_9990": stored(network(), NETWORK)}) | changes
    assert asked in refusal(write(tmp_path / "x.pkl", top))


def test_a_damaged_network_of_idmd_is_refused_and_leaves_the_others_usable(tmp_path):
    entries = {key: stored(network(), NETWORK) for key in ("generator", "ema_0_9990")}
    model = entries["generator"].args[0]["state"]["_modules"]["model"]
    del model.args[0]["state"]["_modules"]["map_layer0"]
    path = write(tmp_path / "x.pkl", idmd_snapshot(entries))
    assert "lacks the tensor model.map_layer0" in refusal(path, "generator")
    checkpoint.load(path)


# ---------------------------------------------------------------------- what is refused by its name


class _GuidedDiffusion(torch.nn.Module):
    """The first modules of such a UNet, by their names."""

    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear(8, 8)
        self.time_embed = torch.nn.Sequential(linear, torch.nn.SiLU(), linear)
        self.label_emb = torch.nn.Embedding(5, 8)
        self.input_blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3))])
        self.middle_block = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3))
        self.out = torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.SiLU(),
                                       torch.nn.Conv2d(8, 2, 3))


@pytest.mark.parametrize("name", ["model300000.pt", "ema_0.9999_300000.pt"])
@pytest.mark.parametrize("is_new", [True, False])
def test_weights_of_a_guided_diffusion_unet_are_refused_by_name(name, is_new, tmp_path, invoke):
    path = tmp_path / name
    torch.save(_GuidedDiffusion().half().state_dict(), path, _use_new_zipfile_serialization=is_new)
    expected = (f"{path}: weights of a guided-diffusion UNet (OpenAI's, as in PFCM), which is not "
                "among the supported networks; only those of EDM, PFGM++, ECT and IDMD are "
                "supported")
    assert refusal(path) == refusal(path, "generator") == expected
    result = invoke(generate.main, f"--network={path}", f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 1 and result.stderr.splitlines() == [f"Error: {expected}"]


def test_other_weights_are_not_called_those_of_a_guided_diffusion_unet(tmp_path):
    path = tmp_path / "model000001.pt"
    inside = torch.nn.ModuleDict({"model": _GuidedDiffusion()})
    without = torch.nn.ModuleDict({"time_embed": torch.nn.Sequential(torch.nn.Linear(2, 2))})
    for module, is_one in ((inside, True), (without, False)):
        torch.save(module.state_dict(), path)
        assert ("weights of a guided-diffusion UNet" in refusal(path)) == is_one
    assert "guided-diffusion" not in refusal(write(path, {"ema": "time_embed.0.weight"}))


# ------------------------------------------------------------------------- our own files, the tools


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("record", [
    {"method": "cd", "levels": [80.0, 3.5, 0.821]}, {"method": "ipfm", "levels": [2.5]}])
def test_a_few_step_snapshot_of_ours_is_read_as_it_was_written(record, suffix, tmp_path):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    net = network(pfgmpp=True, D=64, few_step=record, boundary=0.002, boundary_in_training=False)
    path = tmp_path / f"network-snapshot-000001.{suffix}"
    save = checkpoint.save if suffix == "pt" else checkpoint.save_safetensors
    save(path, {"format": checkpoint.SNAPSHOT_FORMAT, "network": net.config, "options": {},
                "ema": dict(net.state_dict()), "progress": {"cur_nimg": 0}})
    content = checkpoint.load(path)
    again = checkpoint.build_ema(content)
    assert content["network"] == net.config == again.config
    assert again.few_step == FewStep(record["method"], tuple(record["levels"])) and again.D == 64
    x = torch.randn([2, 3, 8, 8], generator=torch.Generator().manual_seed(0))
    for is_training in (False, True):
        assert torch.equal(again.train(is_training)(x, 0.1), net.train(is_training)(x, 0.1))


@pytest.mark.parametrize("record", [
    "ect", {}, {"method": "ect"}, {"method": "other", "levels": [1.0]}, [80.0],
    {"method": "ect", "levels": [1.0, 2.0]}, {"method": "ect", "levels": []},
    {"method": "ect", "levels": [1.0, math.nan]}, {"method": "ect", "levels": ["x"]}])
def test_a_record_of_few_steps_that_is_none_is_refused(record):
    net = network()
    with pytest.raises(ValueError, match="few_step"):
        published.check_network(net.config | {"few_step": record}, net.state_dict())


def described(invoke, *args):
    result = invoke(checkpoint_tool.main, "show", *args)
    assert result.exit_code == 0, result.output
    return {name: text.strip() for name, text in (
        line.split(":", 1) for line in result.output.splitlines())}


@pytest.mark.long
def test_show_says_of_a_few_step_network_how_it_is_sampled(idmd, tmp_path, invoke):
    lines = described(invoke, write_ecm(tmp_path / "network-snapshot-000100.pkl"))
    assert lines["few-step"] == "ect, at the noise levels 80, 0.821"
    assert lines["architecture"] == "EDMPrecond of SongUNet" and lines["D"] == "inf"
    assert json.loads(lines["network"])["boundary"] == 0.003 and "key" not in lines
    lines = described(invoke, idmd)
    assert lines["few-step"] == "ipfm, at the noise levels 80"
    assert lines["key"] == f"ema_0_9990, of {', '.join(KEYS)}"
    lines = described(invoke, idmd, "--key=student")
    assert "few-step" not in lines and lines["key"].startswith("student, of ")
    assert "few-step" not in described(invoke, write_snapshot(tmp_path / "own.pt"))


@pytest.mark.long
def test_convert_keeps_how_a_network_is_sampled(idmd, tmp_path, invoke):
    ect = write_ecm(tmp_path / "network-snapshot-000100.pkl")
    for source, key in ((ect, None), (idmd, "generator"), (idmd, "student")):
        args = [] if key is None else [f"--key={key}"]
        result = invoke(checkpoint_tool.main, "convert", source, tmp_path / "n.pt", "--overwrite",
                        *args)
        assert result.exit_code == 0, result.output
        before, after = checkpoint.load(source, key), checkpoint.load(tmp_path / "n.pt")
        assert after["format"] == checkpoint.SNAPSHOT_FORMAT and "keys" not in after
        assert after["network"] == before["network"] and same(after["ema"], before["ema"])
        assert checkpoint.build_ema(after).config == before["network"]
        assert described(invoke, tmp_path / "n.pt").get("few-step") == (
            described(invoke, source, *args).get("few-step"))


@pytest.mark.long
def test_the_key_chooses_the_network_that_is_sampled_and_measured(idmd, tmp_path, invoke):
    weights = {key: checkpoint.digest(dict(network(seed).state_dict()))
               for seed, key in enumerate(KEYS)}
    assert len(set(weights.values())) == len(KEYS)
    for key in (None, "generator", "student"):
        sampler = NetworkSampler.open(str(idmd), CPU, key=key)
        assert sampler.settings["weights"] == weights[key or "ema_0_9990"]
        assert "key" not in sampler.settings
    measure = NetworkLikelihood.open(str(idmd), CPU, key="student")
    assert measure.settings["weights"] == weights["student"]
    args = [f"--network={idmd}", f"--outdir={tmp_path / 'out'}", "--seeds=0,1", "--steps=2"]
    assert invoke(generate.main, *args, "--key=student").exit_code == 0
    recorded = json.loads((tmp_path / "out/generate.json").read_text())
    assert recorded["weights"] == weights["student"]
    result = invoke(generate.main, *args, "--key=teacher")
    assert result.exit_code == 1 and "--key=teacher" in result.stderr
    assert "ema_0_9900" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.long
def test_the_key_is_not_for_the_guide(idmd, tmp_path):
    guide = write(tmp_path / "guide.pkl", {"ema": stored(network(9), NETWORK)})
    sampler = NetworkSampler.open(str(idmd), CPU, key="student", guidance=2.0, gnet=str(guide))
    assert sampler.settings["gnet"] == checkpoint.digest(dict(network(9).state_dict()))
