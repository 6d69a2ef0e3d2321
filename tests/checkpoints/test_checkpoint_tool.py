import importlib.util
import json
import math
import os

import pytest
import torch
from snapshots import write_snapshot

import checkpoint_tool
from checkpoints import checkpoint
from checkpoints.checkpoint import digest, load, resolve_D

needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is an optional extra")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("net") / "network.pt", pfgmpp=True, aug_dim=2.5)


def test_show_says_what_is_in_a_file(snapshot, invoke):
    result = invoke(checkpoint_tool.main, "show", snapshot)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(":", 1) for line in result.output.splitlines())
    assert lines["format"].strip() == "pfgmpp-network-snapshot, version 1"
    assert lines["checksum"].strip() == "verified" and lines["D"].strip() == "2.5"
    assert "EDMPrecond of SongUNet" in lines["architecture"]
    count = sum(t.numel() for t in load(snapshot)["ema"].values())
    assert f"{count:,} numbers" in lines["parameters"]
    assert json.loads(lines["network"])["img_resolution"] == 8
    assert json.loads(lines["options"])["aug_dim"] == 2.5


@pytest.mark.long
@needs_safetensors
def test_safetensors_hold_the_same_network(snapshot, tmp_path, invoke):
    target = tmp_path / "network.safetensors"
    assert invoke(checkpoint_tool.main, "convert", snapshot, target).exit_code == 0
    assert digest(load(target)) == digest(load(snapshot))
    from safetensors.torch import load_file
    assert torch.equal(load_file(target)["model.map_layer0.weight"],
                       load(snapshot)["ema"]["model.map_layer0.weight"])
    nets = [checkpoint.build_ema(load(path)) for path in (snapshot, target)]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(nets[0](x, 1.0), nets[1](x, 1.0)) and nets[1].D == 2.5


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["pt", pytest.param("safetensors", marks=needs_safetensors)])
def test_half_weights_take_half_the_space_and_give_nearly_the_same(suffix, snapshot, tmp_path,
                                                                  invoke):
    target = tmp_path / f"network.{suffix}"
    assert invoke(checkpoint_tool.main, "convert", snapshot, target, "--half").exit_code == 0
    ours, theirs = load(target)["ema"], load(snapshot)["ema"]
    assert all(torch.equal(ours[name], theirs[name].half()) for name in theirs)
    net, whole = (checkpoint.build_ema(load(path)) for path in (target, snapshot))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    difference = (net(x, 1.0) - whole(x, 1.0)).abs().max()
    assert 0 < difference < 0.01
    content = load(snapshot)
    content["ema"]["model.map_layer0.bias"][0] = 7e4
    checkpoint.save(tmp_path / "large.pt", content)
    result = invoke(checkpoint_tool.main, "convert", tmp_path / "large.pt", target, "--half",
                    "--overwrite")
    assert result.exit_code == 1 and "model.map_layer0.bias has values beyond" in result.output


@needs_safetensors
def test_damaged_safetensors_are_refused(snapshot, tmp_path, invoke):
    target = tmp_path / "network.safetensors"
    invoke(checkpoint_tool.main, "convert", snapshot, target)
    data = target.read_bytes()
    for size in (9, 100, len(data) // 2, len(data) - 1):
        target.write_bytes(data[:size])
        with pytest.raises(ValueError, match="network.safetensors: damaged"):
            load(target)
    flipped = bytearray(data)
    flipped[-5] ^= 4
    target.write_bytes(flipped)
    with pytest.raises(ValueError, match="checksum"):
        load(target)


def test_conversion_to_a_snapshot_keeps_everything(snapshot, tmp_path, invoke):
    target = tmp_path / "copy.pt"
    assert invoke(checkpoint_tool.main, "convert", snapshot, target).exit_code == 0
    assert digest(load(target)) == digest(load(snapshot))


@pytest.mark.parametrize("args, words", [
    (["show", "nowhere.pt"], "nowhere.pt"), (["show", __file__], "not a training state"),
    (["convert", "SNAPSHOT", "x.onnx"], "must end in .pt or .safetensors"),
    (["convert", "SNAPSHOT", "x.pt", "--aug_dim=3"], "trained with D = 2.5"),
])
def test_mistakes_get_one_line(args, words, snapshot, invoke):
    args = [snapshot if arg == "SNAPSHOT" else arg for arg in args]
    result = invoke(checkpoint_tool.main, *args)
    assert result.exit_code == 1 and words in result.output
    assert len(result.output.splitlines()) == 1


def test_a_hostile_file_that_looks_like_ours_is_refused_by_what_it_asks_for(tmp_path, invoke):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    path = tmp_path / "network-snapshot-000001.pt"
    torch.save({"format": "pfgmpp-network-snapshot", "version": 1, "ema": Hostile()}, path)
    result = invoke(checkpoint_tool.main, "show", path)
    assert result.exit_code == 1 and "mkdir" in result.output and path.name in result.output
    assert len(result.output.splitlines()) == 1 and not (tmp_path / "ran").exists()


def recorded(D):
    noise = {"pfgmpp": False, "D": 128} if math.isinf(D) else {"pfgmpp": True, "D": D}
    return {"network": {"class_name": "EDMPrecond", **noise}}


@pytest.mark.parametrize("D", [2.5, math.inf])
def test_a_recorded_D_can_only_be_confirmed(D):
    content = recorded(D)
    assert resolve_D(content, "f", None, None) is content
    assert resolve_D(content, "f", not math.isinf(D), D) is content
    for pfgmpp, aug_dim in ((None, 7.0), (True, 7.0), (math.isinf(D), None)):
        with pytest.raises(ValueError, match="leave"):
            resolve_D(content, "f", pfgmpp, aug_dim)


def test_an_unrecorded_D_must_be_given():
    content = {"network": {"class_name": "VEPrecond", "pfgmpp": False}, "D_recorded": False}
    with pytest.raises(ValueError, match="f does not record D"):
        resolve_D(content, "f", None, None)
    with pytest.raises(ValueError, match="f does not record D"):
        resolve_D(content, "f", True, None)
    finite = resolve_D(content, "f", True, 64.0)["network"]
    assert finite["pfgmpp"] and finite["D"] == 64.0
    assert resolve_D(content, "f", False, None)["network"]["pfgmpp"] is False
    assert "D" not in content["network"], "the content given is not changed"


def test_a_conversion_never_destroys_what_is_there(tmp_path, invoke):
    source = write_snapshot(tmp_path / "network-snapshot-000001.pt")
    before, other = source.read_bytes(), tmp_path / "other.pt"
    for dest, words in ((source, "is the file to convert"), (other, "give --overwrite to")):
        other.write_bytes(b"mine")
        result = invoke(checkpoint_tool.main, "convert", str(source), str(dest))
        assert result.exit_code == 1 and words in result.stderr
        assert source.read_bytes() == before and other.read_bytes() == b"mine"
    result = invoke(checkpoint_tool.main, "convert", str(source), str(source), "--overwrite")
    assert result.exit_code == 1 and source.read_bytes() == before
    # Of a run directory the newest network is converted.
    assert invoke(checkpoint_tool.main, "convert", str(tmp_path), str(other),
                  "--overwrite").exit_code == 0
    assert checkpoint.load(other)["ema"].keys() == checkpoint.load(source)["ema"].keys()
