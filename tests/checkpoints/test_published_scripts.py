"""The scripts on checkpoints of EDM and PFGM++, assembled in their structure."""

import copy
import json

import numpy as np
import PIL.Image
import pytest
import torch
from pickle_assembler import CONTAINERS, persistent
from published_files import optimizer_state, stored
from tiny import TINY_RUN

import checkpoint_tool
import fid
import generate
import train
from checkpoints import checkpoint
from pfgmpp.networks import build_network
from pfgmpp.samplers import draw_latents, edm_sampler, to_uint8
from training.config import TrainConfig

ZIP, RAW = (next(name for name in CONTAINERS if ("zip" in name.lower()) == is_zip)
            for is_zip in (True, False))


def make_network(**options):
    config = TrainConfig(data="x", arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1, **options)
    torch.manual_seed(0)
    net = build_network(config.network(8, 3, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def keywords(net):
    return {k: v for k, v in net.config.items() if k != "class_name"}


@pytest.fixture
def pfgmpp_state(tmp_path):
    net = make_network(pfgmpp=True, aug_dim=64).train()
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    moments = optimizer_state(net)
    path = tmp_path / "training-state-000005.pt"
    path.write_bytes(CONTAINERS[ZIP]({
        "optimizer_state": moments, "step": 5120, "ema": stored(ema, keywords(net)),
        "net": stored(net, keywords(net), {"pfgmpp": True, "D": 64, "N": 192})}))
    return path, net, ema, moments


@pytest.mark.long
def test_generate_makes_the_images_of_a_foreign_network(pfgmpp_state, tmp_path, invoke):
    path, _, ema, _ = pfgmpp_state
    result = invoke(generate.main, f"--network={path}", f"--outdir={tmp_path / 'o'}", "--seeds=3",
                    "--steps=4", "--use_pickle=1", "--pfgmpp=1", "--aug_dim=64")
    assert result.exit_code == 0, result.output
    latents, labels, _ = draw_latents(ema, [3], torch.device("cpu"))
    expected = to_uint8(edm_sampler(ema, latents, labels, num_steps=4))[0].permute(1, 2, 0)
    given = np.asarray(PIL.Image.open(tmp_path / "o/000003.png")).astype(int)
    assert np.abs(given - expected.numpy().astype(int)).max() <= 1
    assert json.loads((tmp_path / "o/generate.json").read_text())["D"] == 64


@pytest.mark.long
def test_resuming_a_foreign_state_restores_networks_moments_and_progress(
        pfgmpp_state, dataset_zip, tmp_path, invoke):
    path, net, ema, moments = pfgmpp_state
    args = [f"--outdir={tmp_path / 'run'}", "--nosubdir", f"--data={dataset_zip}", "--cond=1",
            *TINY_RUN, "--pfgmpp=1", f"--resume={path}", "--tick=0.008"]
    result = invoke(train.main, *args, "--aug_dim=64", "--lr=1e-12", "--ema=1000",
                    "--duration=0.005128")
    assert result.exit_code == 0, result.output
    assert "does not hold random state, data position" in result.output
    after = checkpoint.load(tmp_path / "run/training-state-000005.128.pt")
    assert after["progress"]["cur_nimg"] == 5128
    keep = 0.5 ** (8 / (0.05 * 5120))  # a half-life of 5% of the images seen, for one step
    for name, value in net.state_dict().items():  # one step at almost no learning rate
        torch.testing.assert_close(after["net"][name], value, rtol=1e-5, atol=1e-6)
        expected = keep * ema.state_dict()[name] + (1 - keep) * value
        torch.testing.assert_close(after["ema"][name], expected, rtol=1e-5, atol=1e-6)
    steps = [entry["step"] for entry in after["optimizer"]["state"].values()]
    assert {float(step) for step in steps} <= {1.0, 2.0} and 2.0 in map(float, steps)
    result = invoke(train.main, *args, "--aug_dim=32", "--duration=0.005128")
    assert result.exit_code == 1 and "D: 32.0 here, 64.0 there" in result.output


@pytest.mark.long
def test_transfer_takes_the_weights_of_a_foreign_snapshot(dataset_zip, tmp_path, invoke):
    net = make_network().eval().requires_grad_(False)
    path = tmp_path / "network-snapshot-000100.pkl"
    path.write_bytes(CONTAINERS[RAW]({
        "ema": stored(net, keywords(net)), "loss_fn": persistent("EDMLoss", {}),
        "augment_pipe": None, "dataset_kwargs": {}}))
    args = [f"--outdir={tmp_path / 'run'}", "--nosubdir", f"--data={dataset_zip}", "--cond=1",
            *TINY_RUN, "--duration=0.000008"]
    result = invoke(train.main, *args, f"--transfer={path}")
    assert result.exit_code == 0, result.output
    after = checkpoint.load(tmp_path / "run/training-state-000000.pt")  # lr is 0 in step 1
    assert all(torch.equal(after["net"][k], v) for k, v in net.state_dict().items())
    result = invoke(train.main, *args[2:], f"--outdir={tmp_path}", f"--resume={path}")
    assert result.exit_code == 2 and "use it with --transfer" in result.output


@pytest.mark.long
def test_show_and_convert_take_foreign_files(pfgmpp_state, tmp_path, invoke):
    path, _, ema, _ = pfgmpp_state
    shown = invoke(checkpoint_tool.main, "show", path).output
    assert "pfgmpp-foreign-state" in shown and "none in this format" in shown and "5120" in shown
    assert invoke(checkpoint_tool.main, "convert", path, tmp_path / "n.pt").exit_code == 0
    net = checkpoint.build_ema(checkpoint.load(tmp_path / "n.pt"))
    assert net.D == 64
    assert all(torch.equal(net.state_dict()[k], v) for k, v in ema.state_dict().items())


def write_edm_snapshot(path):
    net = make_network().eval().requires_grad_(False)
    path.write_bytes(CONTAINERS[RAW]({
        "ema": stored(net, keywords(net)), "loss_fn": persistent("EDMLoss", {}),
        "augment_pipe": None, "dataset_kwargs": {}}))


@pytest.mark.long
def test_edm_takes_the_snapshot_of_a_run_directory_for_ckpt_000000(tmp_path, invoke):
    write_edm_snapshot(tmp_path / "network-snapshot-000100.pkl")
    args = [f"--outdir={tmp_path}", "--seeds=0-2", "--steps=2"]
    result = invoke(generate.main, *args)
    assert result.exit_code == 1 and "0 training states" in result.output
    for more in (["--edm=1"], ["--edm", "--alpha=0,0.1"], ["--edm", "--seeds=50000-50002"]):
        result = invoke(generate.main, *args, *more)
        assert result.exit_code == 0, result.output
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"ckpt_000000", "ckpt_000000_alpha_0", "ckpt_000000_alpha_0.1",
                       "ckpt_2_000000"}
    assert len(list((tmp_path / "ckpt_000000/000000").glob("*.png"))) == 3
    direct = invoke(generate.main, f"--outdir={tmp_path / 'direct'}", *args[1:],
                    f"--network={tmp_path / 'network-snapshot-000100.pkl'}")
    assert direct.exit_code == 0, direct.output
    for k in range(3):
        assert ((tmp_path / f"direct/{k:06d}.png").read_bytes()
                == (tmp_path / f"ckpt_000000/000000/{k:06d}.png").read_bytes())
    scores = invoke(fid.main, "calc", f"--images={tmp_path}", f"--ref={tmp_path / 'ckpt_2_000000'}",
                    "--num=3", "--detector=pixels", "--workers=0")
    assert scores.exit_code == 0 and "/ckpt_000000, " in scores.output


@pytest.mark.parametrize("names, words", [
    ([], "0 network-snapshot-*.pkl"), (["000001", "000002"], "2 network-snapshot-*.pkl")])
def test_edm_needs_one_snapshot(names, words, tmp_path, invoke):
    for name in names:
        write_edm_snapshot(tmp_path / f"network-snapshot-{name}.pkl")
    result = invoke(generate.main, f"--outdir={tmp_path}", "--edm=1", "--seeds=0")
    assert result.exit_code == 1 and words in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.glob("ckpt*"))
