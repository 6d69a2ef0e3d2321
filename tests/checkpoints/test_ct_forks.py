"""Checkpoints of the forks of PFGM++ for CT images: their networks, and what their files lack."""

import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from pickle_assembler import zip_file
from published_files import ForkDenoiser, fork_state, stored_fork
from snapshots import write_snapshot
from tiny import TINY_RUN

import checkpoint_tool
import dataset_tool
import generate
import train
from checkpoints import checkpoint, published
from images.dataset import ImageFolderDataset
from images.scaling import Scaling
from pfgmpp.networks import build_network
from pfgmpp.samplers import draw_latents, edm_sampler
from sampling.network_sampler import NetworkSampler
from training.teacher import Teacher

INF = math.inf
CPU = torch.device("cpu")
SONG = {"model_type": "cSongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
        "attn_resolutions": [4], "dropout": 0.1}
MODELS = {
    "ddpmpp": SONG,
    "ncsnpp": {**SONG, "embedding_type": "fourier", "encoder_type": "residual",
               "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]},
    "skip": {**SONG, "encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 1, 2]},
    "adm": {"model_type": "cDhariwalUNet", "model_channels": 64, "channel_mult": [1],
            "num_blocks": 1, "attn_resolutions": [], "dropout": 0.1},
}
HU = ["--scale=-1024,3071", "--cond-scale=-1000,1000", "--sigma-max=380"]


def fork(arch="ddpmpp", channels=1, seed=0):
    torch.manual_seed(seed)
    return ForkDenoiser(img_resolution=8, channels=channels, **MODELS[arch]).eval()


def read(top):
    return published.read(io.BytesIO(zip_file(top)), "x.pt")


def build(content, key="ema"):
    net = build_network(content["network"]).eval()
    net.load_state_dict(content[key])
    return net


def both(channels, seed=1):
    """A condition and noisy images at four levels, side by side, and the levels."""
    generator, sigma = torch.Generator().manual_seed(seed), torch.tensor([0.002, 0.1, 1.0, 380.0])
    pair = torch.randn(4, 2 * channels, 8, 8, generator=generator) / 2
    noise = torch.randn(4, channels, 8, 8, generator=generator)
    pair[:, channels:] += sigma.reshape(4, 1, 1, 1) * noise
    return pair, sigma


@torch.no_grad()
def denoised(net, pair, sigma):
    channels = pair.shape[1] // 2
    return net(pair[:, channels:], sigma, condition=pair[:, :channels])


# ---- the network --------------------------------------------------------------------------------

@pytest.mark.long
@pytest.mark.parametrize("D", [2, 128, INF])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("arch", MODELS)
def test_a_conditional_network_denoises_as_that_of_the_fork(arch, channels, D):
    theirs, average = fork(arch, channels), fork(arch, channels, seed=3)
    content = read(fork_state(theirs, average, D))
    assert content["progress"]["cur_nimg"] == 3_201_000 and content["D_recorded"]
    pair, sigma = both(channels)
    for key, source in (("net", theirs.eval()), ("ema", average)):
        net = build(content, key)
        assert net.D == D and net.cond_channels == channels and net.cond_c_in
        with torch.no_grad():
            expected = source(pair, sigma)
        torch.testing.assert_close(denoised(net, pair, sigma), expected, rtol=1.5e-6, atol=1.5e-6)
        net.cond_c_in = False
        assert (denoised(net, pair, sigma) - expected).abs().max() > 0.02


@pytest.mark.long
@pytest.mark.parametrize("arch", MODELS)
def test_the_next_step_of_adam_is_the_one_that_the_fork_would_take(arch):
    theirs = fork(arch, 2)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=2e-3)
    pair, sigma = both(2)
    pair[3], sigma[3] = pair[1], 0.3

    def step(net, optimizer, call):
        optimizer.zero_grad()
        (call(pair, sigma) - pair[:, :2]).square().mean().backward()
        optimizer.step()

    step(theirs, optimizer, theirs)
    content = read({"net": stored_fork(theirs.train(), 64), "optimizer_state": {
        **optimizer.state_dict(), "param_groups": [
            {**group, "betas": list(group["betas"])}
            for group in optimizer.state_dict()["param_groups"]]}})
    assert content["ema"] is None and content["progress"]["cur_nimg"] is None
    ours = build(content, "net")
    resumed = torch.optim.Adam(ours.parameters(), lr=2e-3)
    resumed.load_state_dict(content["optimizer"])
    step(theirs.eval(), optimizer, theirs)
    step(ours, resumed, lambda pair, sigma: ours(pair[:, 2:], sigma, condition=pair[:, :2]))
    with torch.no_grad():
        expected = theirs(pair, sigma)
    torch.testing.assert_close(denoised(ours, pair, sigma), expected, rtol=0, atol=1e-5)


def test_a_converted_network_computes_in_the_same_way(tmp_path, invoke):
    path, average = write_state(tmp_path), fork(seed=3)
    convert(invoke, path, tmp_path / "net.pt")
    content = checkpoint.load(tmp_path / "net.pt")
    assert content["network"]["cond_c_in"] is True
    pair, sigma = both(1)
    with torch.no_grad():
        expected = average(pair, sigma)
    torch.testing.assert_close(denoised(checkpoint.build_ema(content), pair, sigma), expected,
                               rtol=0, atol=1.5e-6)


def in_class(name):
    entry = stored_fork(fork(), 64, sigma_max=100)
    entry.args[0]["class_name"] = name
    return {"ema": entry}


def with_argument(**arguments):
    entry = stored_fork(fork(), 64)
    entry.args[0]["state"]["_init_kwargs"] |= arguments
    return {"ema": entry}


@pytest.mark.parametrize("top, words", [
    (in_class("VEPrecond"), "a conditional network in VEPrecond, must be in EDMPrecond"),
    (with_argument(model_type="SongUNet"), "model_type='SongUNet', but the model is cSongUNet"),
    (with_argument(cond_c_in=True), "unknown argument 'cond_c_in'"),
    ({"ema": stored_fork(fork(), 64, img_channels=2)}, "must be [8, 4, 3, 3]"),
])
def test_what_their_code_can_not_have_written_is_refused(top, words):
    with pytest.raises(ValueError) as caught:
        read(top)
    assert words in str(caught.value) and str(caught.value).isprintable()


# ---- what the files lack ------------------------------------------------------------------------


def write_state(folder, D=64.0, net=None):
    path = folder / "training-state-003201.pt"
    path.write_bytes(zip_file(fork_state(net or fork(), fork(seed=3), D)))
    return path


def convert(invoke, source, dest, *args, code=0):
    result = invoke(checkpoint_tool.main, "convert", source, dest, *args)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twelve images 8x8 in HU with conditions: a data set."""
    folder, rng = tmp_path_factory.mktemp("ct"), np.random.default_rng(0)
    for name, noise in (("clean", 0), ("noisy", 60)):
        (folder / name).mkdir()
        for i in range(12):
            image = np.full([8, 8], -1000.0)
            image[2:6, 2:6] = 20 * i
            np.save(folder / name / f"{i}.npy",
                    np.float32(image + noise * rng.normal(size=image.shape)))
    from click.testing import CliRunner
    done = CliRunner().invoke(dataset_tool.main, [
        f"--source={folder / 'clean'}", f"--dest={folder / 'pairs.zip'}", HU[0], "--workers=1",
        f"--cond-source={folder / 'noisy'}", HU[1]])
    assert done.exit_code == 0, done.output
    return folder / "pairs.zip"


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_conversion_records_what_was_said_of_data_and_sampler(suffix, tmp_path, invoke):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    target = tmp_path / f"net.{suffix}"
    convert(invoke, write_state(tmp_path), target, *HU)
    content = checkpoint.load(target)
    assert Scaling.from_dict(content["dataset"]["scale"]) == Scaling((1023.5,), (2047.5,))
    assert Scaling.from_dict(content["dataset"]["cond_scale"]) == Scaling((0.0,), (1000.0,))
    assert checkpoint.highest_level(content) == 380
    shown = invoke(checkpoint_tool.main, "show", target).output
    lines = dict(line.split(":", 1) for line in shown.splitlines())
    assert lines["scale"].strip() == "-1024 to 3071 map to -1 to 1"
    assert lines["cond_scale"].strip() == "-1000 to 1000 map to -1 to 1"
    assert lines["sigma_max"].strip() == "380, where sampling starts"
    convert(invoke, target, tmp_path / "again.pt")  # a second conversion keeps it
    again = checkpoint.load(tmp_path / "again.pt")
    assert again["sigma_max"] == 380 and again["dataset"] == content["dataset"]
    convert(invoke, target, tmp_path / "again.pt", *HU, "--overwrite")  # what is equal may be said
    assert checkpoint.digest(checkpoint.load(tmp_path / "again.pt")) == checkpoint.digest(again)


@pytest.mark.long
@pytest.mark.parametrize("args, words", [
    (["--scale=-1024,3072"], "--scale: SOURCE records another scale, by which -1024 to 3071 map"),
    (["--cond-scale=-1024,3071"], "--cond-scale: SOURCE records another scale, by which -1000 to "),
    (["--sigma-max=80"], "--sigma-max=80: SOURCE records that sampling starts at 380"),
])
def test_what_is_recorded_can_only_be_confirmed(args, words, tmp_path, invoke):
    source, target = tmp_path / "net.pt", tmp_path / "other.pt"
    convert(invoke, write_state(tmp_path), source, *HU)
    line = convert(invoke, source, target, *args, code=1)
    assert words.replace("SOURCE", str(source)) in line and len(line.splitlines()) == 1
    assert not target.exists()


@pytest.mark.parametrize("options, args, words", [
    ({}, ["--cond-scale=0,1"], "takes no condition images; leave --cond-scale out"),
    ({}, ["--sigma-max=inf"], "must be above 0.002 and finite"),
    ({}, ["--sigma-max=nan"], "must be above 0.002 and finite"),
    ({}, ["--sigma-max=0.001"], "must be above 0.002 and finite"),
    ({"precond": "ve"}, ["--sigma-max=380"], "must be above 0.02 and at most 100"),
    ({"lsun": True}, ["--sigma-max=80"], "records that sampling starts at 380"),
])
def test_what_a_network_has_no_use_for_is_refused(options, args, words, tmp_path, invoke):
    source, target = write_snapshot(tmp_path / "net.pt", **options), tmp_path / "other.pt"
    line = convert(invoke, source, target, *args, code=1)
    assert words in line and len(line.splitlines()) == 1 and not target.exists()


@pytest.mark.parametrize("text", ["3071,-1024", "1,1", "0,inf", "nan,1", "0", "0,1,2", "minmax"])
def test_a_scale_is_two_finite_numbers_that_rise(text, tmp_path, invoke):
    line = convert(invoke, write_snapshot(tmp_path / "net.pt"), tmp_path / "other.pt",
                   f"--scale={text}", code=2)
    assert f"'{text}': must be LO,HI with LO < HI" in line


def test_files_of_ours_that_lack_a_record_take_one(tmp_path, invoke):
    plain = write_snapshot(tmp_path / "net.pt")
    convert(invoke, plain, tmp_path / "other.pt", "--scale=0,4095", "--sigma-max=20")
    sampler = NetworkSampler.open(str(tmp_path / "other.pt"), CPU)
    assert sampler.sampler.sigma_max == 20 and sampler.scaling == Scaling((2047.5,), (2047.5,))
    eight_bit = write_snapshot(tmp_path / "8.pt", dataset={
        "scale": {"center": [127.5], "spread": [127.5], "dtype": "uint8"}})
    line = convert(invoke, eight_bit, tmp_path / "no.pt", "--scale=0,255", code=1)
    assert "records another scale, by which 0 to 255 map to -1 to 1" in line


@pytest.mark.long
def test_conditions_without_a_scale_are_pointed_out(tmp_path, invoke):
    said = convert(invoke, write_state(tmp_path), tmp_path / "net.pt", HU[0])
    assert "Warning: --scale without --cond-scale" in said
    assert "Warning" not in convert(invoke, write_state(tmp_path), tmp_path / "2.pt", *HU[:2])


@pytest.mark.parametrize("level", ["380", -1, 0, INF, math.nan, True, [380]])
def test_a_level_that_is_none_is_refused(level):
    with pytest.raises(ValueError, match='"sigma_max" is'):
        checkpoint.highest_level({"options": {}, "sigma_max": level})


@pytest.mark.long
@pytest.mark.parametrize("D", [2.0, INF])
def test_a_converted_network_is_sampled_from_its_level_and_writes_hu(D, pairs, tmp_path, invoke):
    path, average = write_state(tmp_path, D), fork(seed=3)
    flags = [f"--cond-image={pairs}", "--seeds=5", "--steps=4"]
    raw = invoke(generate.main, f"--network={path}", f"--outdir={tmp_path / 'raw'}", *flags)
    assert raw.exit_code == 1 and "checkpoint_tool.py convert records them" in raw.output
    convert(invoke, path, tmp_path / "net.pt", *HU)
    done = invoke(generate.main, f"--network={tmp_path / 'net.pt'}", *flags,
                  f"--outdir={tmp_path / 'o'}")
    assert done.exit_code == 0 and "does not record" not in done.output, done.output
    given = np.load(tmp_path / "o/000005.npy")
    # By hand: the fork's denoiser, Heun from 380, HU by their formula.
    v = torch.from_numpy(ImageFolderDataset(pairs, use_conditions=True).get_batch([5])[2]) / 1000

    class Conditioned(torch.nn.Module):
        sigma_min, sigma_max, label_dim, image_shape = 0.0, INF, 0, (1, 8, 8)
        round_sigma = staticmethod(torch.as_tensor)

        def forward(self, x, sigma, class_labels=None):
            sigma = torch.as_tensor(sigma, dtype=torch.float32).expand(1)
            return average(torch.cat([v, x.to(torch.float32)], dim=1), sigma)

    net = Conditioned()
    net.D = D
    with torch.no_grad():
        latents, _, _ = draw_latents(net, [5], CPU)
        image = edm_sampler(net, latents, num_steps=4, sigma_max=380)[0]
    expected = (image.numpy() + 1) / 2 * 4095 - 1024
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=0.05)
    record = json.loads((tmp_path / "o/generate.json").read_text())
    assert record["sigma_max"] == 380 and record["scale"]["center"] == [1023.5]


# ---- training -----------------------------------------------------------------------------------

RUN = [*(flag for flag in TINY_RUN if not flag.startswith("--arch")), "--arch=ddpmpp", "--ares=4",
       "--augment=0", "--dropout=0.1", "--pfgmpp=1", "--aug_dim=64", "--nosubdir", "--tick=0.008",
       "--device=cpu"]


def run(invoke, pairs, folder, *args, code=0):
    result = invoke(train.main, f"--data={pairs}", f"--outdir={folder}", *RUN, *args)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.mark.long
def test_a_run_goes_on_from_a_state_of_the_fork(pairs, tmp_path, invoke):
    theirs = fork()
    path = write_state(tmp_path, net=theirs)
    args = [f"--resume={path}", "--duration=3.201008", "--lr=1e-12"]
    for given, words in (([], "--cond-image; cond_channels: None here, 1 there"),
                         (["--cond-image=1"], "--cond-c-in; cond_c_in: None here, True there")):
        output = run(invoke, pairs, tmp_path / "run", *args, *given, code=1)
        assert words in output and not (tmp_path / "run").exists()
    flags = ["--cond-image=1", "--cond-c-in=1"]
    run(invoke, pairs, tmp_path / "run", *args, *flags)
    after = checkpoint.load(tmp_path / "run/training-state-003201.008.pt")
    pair, sigma = both(1)
    with torch.no_grad():
        expected = theirs.eval()(pair, sigma)
    torch.testing.assert_close(denoised(build(after, "net"), pair, sigma), expected, rtol=0,
                               atol=1e-5)
    # A state of ours knows it too.
    args = ["--resume=auto", "--duration=3.201016", "--lr=1e-12"]
    output = run(invoke, pairs, tmp_path / "run", *args, "--cond-image=1", code=1)
    assert "--cond-c-in; cond_c_in: None here, True there" in output
    run(invoke, pairs, tmp_path / "run", *args, *flags)


@pytest.mark.long
def test_a_run_begins_with_the_weights_of_the_fork(pairs, tmp_path, invoke):
    path, average = tmp_path / "net.pt", fork(seed=3)
    convert(invoke, write_state(tmp_path), path, HU[0], "--cond-scale=-1024,3071", HU[2])
    args = [f"--transfer={path}", "--duration=0.000008"]
    output = run(invoke, pairs, tmp_path / "run", *args, "--cond-image=1", code=1)
    assert "its network sees the condition multiplied by c_in; give --cond-c-in=1" in output
    output = run(invoke, pairs, tmp_path / "run", *args, "--cond-image=1", "--cond-c-in=1")
    assert "100% of the network's parameters" in output
    # The conditions have another scale than the file records, the images have the same.
    assert output.count("in the condition images that it was trained on, but -1000 to ") == 1
    assert "in the images that it was trained on" not in output
    after = checkpoint.load(tmp_path / "run/training-state-000000.008.pt")  # lr is 0 in step 1
    pair, sigma = both(1)
    with torch.no_grad():
        expected = average(pair, sigma)
    torch.testing.assert_close(denoised(build(after, "net"), pair, sigma), expected, rtol=0,
                               atol=1.5e-6)
    plain = run(invoke, pairs, tmp_path / "plain", f"--transfer={path}", "--duration=0.000008")
    assert "1 do not fit" in plain  # an unconditional network has another first layer
    snapshot = tmp_path / "run/network-snapshot-000000.008.pt"
    line = run(invoke, pairs, tmp_path / "no", f"--transfer={snapshot}", "--cond-image=1", code=1)
    assert "give --cond-c-in=1" in line


@pytest.mark.long
def test_conditions_as_they_are_are_not_taken_for_scaled_ones(pairs, tmp_path, invoke):
    path = write_snapshot(tmp_path / "net.pt", shape=(1, 8, 8), label_dim=0, cond_channels=1)
    line = run(invoke, pairs, tmp_path / "run", f"--transfer={path}", "--cond-image=1",
               "--cond-c-in=1", code=1)
    assert "its network sees the condition without c_in; leave --cond-c-in out" in line
    line = run(invoke, pairs, tmp_path / "run", "--cond-c-in=1", code=2)
    assert "--cond-c-in=1: must be used with --cond-image=1" in line


@pytest.mark.parametrize("level, lsun", [(None, False), (80.0, False), (380.0, True)])
def test_a_few_step_network_begins_where_its_teacher_does(level, lsun, tmp_path):
    content = checkpoint.load(write_snapshot(tmp_path / "net.pt"))
    content |= {} if level is None else {"sigma_max": level}
    checkpoint.save(tmp_path / "teacher.pt", content)
    assert Teacher.open(str(tmp_path / "teacher.pt")).options["lsun"] is lsun
    checkpoint.save(tmp_path / "teacher.pt", copy.copy(content) | {"sigma_max": 200.0})
    with pytest.raises(ValueError, match="is sampled from sigma_max = 200"):
        Teacher.open(str(tmp_path / "teacher.pt"))
