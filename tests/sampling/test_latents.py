"""Latents: from images and back, from files, on the way between others, and of chosen radii."""

import contextlib
import dataclasses
import io
import json
import math
import zipfile

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from scripts import run_script
from snapshots import write_snapshot
from tiny import write_dataset

import generate
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.samplers import SamplerConfig, encode, sampler
from sampling.latents import (
    Latents,
    at_radii,
    between,
    check_lengths,
    radial_factor,
    read_latents,
)
from sampling.network_sampler import NetworkSampler

CPU = torch.device("cpu")


ONES = {"latents": np.ones([2, 3, 8, 8])}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("net") / "net.pt", pfgmpp=True, aug_dim=2.5)


def pngs(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def run(invoke, network, outdir, *flags):
    result = invoke(generate.main, f"--network={network}", f"--outdir={outdir}", "--steps=5",
                    *flags)
    assert result.exit_code == 0, result.output
    return result.stdout


def some(num=3, labels=None):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(num, 3, 8, 8, generator=rng, dtype=torch.float64)
    return Latents(latents, tuple(f"image {i}" for i in range(num)), labels)


# --------------------------------------------------------------------------------------- encoding

class Gaussian:
    """The ideal denoiser of Gaussian data, whose paths are known."""

    sigma_min, sigma_max, D = 0.0, math.inf, math.inf

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        return x * 0.25 / (0.25 + sigma**2)


@pytest.mark.parametrize("solver", [None, "euler", "ipndm", "dpmpp2m", "unipc"])
def test_latents_of_gaussian_data(solver):
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    found = encode(Gaussian(), x, config=SamplerConfig(num_steps=800, solver=solver))
    exact = x * math.sqrt((0.25 + 80**2) / (0.25 + 0.002**2)) / 80
    torch.testing.assert_close(found, exact, rtol=2e-2 if solver == "euler" else 1e-3, atol=0)


@pytest.mark.parametrize("D", [1, 2, 128, math.inf])
def test_images_come_back_at_every_D(D):
    kernel, rng = PerturbationKernel(D), torch.Generator().manual_seed(0)
    data = 0.5 * torch.randn(20, 1, 2, 2, generator=rng, dtype=torch.float64)
    net = Gaussian()
    net.D = D
    net = type("Ideal", (Gaussian,), {
        "__call__": lambda self, x, sigma, class_labels=None: kernel.posterior_mean(
            x.double(), sigma, data)})()
    # States of the lowest level, where they still lie apart from the points.
    config = SamplerConfig(num_steps=200, sigma_min=0.2)
    x = data[:8] + kernel.sample((8, 1, 2, 2), 0.2, rng).double()
    latents = encode(net, x, config=config)
    levels = config.levels(net)[:-1]
    back = sampler(net, latents, sigmas=levels.tolist(), solver="heun")
    # The sampler goes on to 0: its last step, from the state that was encoded.
    torch.testing.assert_close(back, net(x, torch.tensor(0.2)), rtol=0, atol=5e-3)


def test_encoded_images_are_sampled_again(network, dataset_zip, tmp_path, invoke):
    output = run(invoke, network, tmp_path / "e", f"--encode={dataset_zip}", "--seeds=0-2,7")
    assert "Round trip " in output and "e/latents.npz: 4 latents" in output
    found = np.load(tmp_path / "e/latents.npz")
    assert found["latents"].dtype == np.float64 and found["latents"].shape == (4, 3, 8, 8)
    assert found["names"].tolist() == [f"00000/img{i:08d}.png" for i in (0, 1, 2, 7)]
    assert found["labels"].argmax(axis=1).tolist() == [0, 1, 0, 1]
    run(invoke, network, tmp_path / "s", f"--latents={tmp_path}/e/latents.npz")
    labels = json.loads((tmp_path / "s/dataset.json").read_text())["labels"]
    assert [label for _, label in labels] == [0, 1, 0, 1]


@pytest.mark.long
def test_the_round_trip_is_as_good_as_its_steps(network, dataset_zip, tmp_path, invoke):
    errors = []
    for steps in (20, 40, 80):
        folder = tmp_path / str(steps)
        output = run(invoke, network, folder, f"--encode={dataset_zip}", "--seeds=0-3",
                     f"--steps={steps}")
        errors.append(float(output.split("Round trip ")[1].split()[0]))
        run(invoke, network, folder / "back", f"--latents={folder}/latents.npz",
            f"--steps={steps}")
    # What is left is the last step, which takes the lowest level's noise off.
    assert errors[0] > 2 * errors[1] > 2 * errors[2] and errors[2] < 0.002 * 127.5
    sampler = NetworkSampler.open(str(network), CPU, encode=str(dataset_zip))
    given = sampler.scaling.to_data(sampler.encoded(range(4))).numpy()
    made = np.stack([np.array(PIL.Image.open(path)).transpose(2, 0, 1)
                     for path in sorted((tmp_path / "80/back").glob("*.png"))])
    rms = np.sqrt(np.square(given.astype(float) - made).mean())
    assert rms == pytest.approx(errors[2], abs=0.5 + 0.3 * errors[2])


def test_given_classes_take_the_place_of_those_of_the_data(network, dataset_zip, tmp_path, invoke):
    run(invoke, network, tmp_path, f"--encode={dataset_zip}", "--seeds=0-1", "--class=1")
    assert np.load(tmp_path / "latents.npz")["labels"].tolist() == [[0, 1], [0, 1]]
    run(invoke, network, tmp_path / "s", f"--latents={tmp_path}/latents.npz", "--class=0")
    labels = json.loads((tmp_path / "s/dataset.json").read_text())["labels"]
    assert [label for _, label in labels] == [0, 0]


@pytest.mark.slow
@pytest.mark.scripts
def test_two_processes_write_the_latents_of_one(network, dataset_zip, tmp_path):
    found = []
    for processes in (0, 2):
        run_script("generate.py", f"--network={network}", f"--outdir={tmp_path}/{processes}",
                   "--steps=3", f"--encode={dataset_zip}", "--seeds=0-4", "--batch=2",
                   processes=processes)
        found.append(np.load(tmp_path / str(processes) / "latents.npz"))
    assert found[0]["names"].tolist() == found[1]["names"].tolist()
    np.testing.assert_allclose(found[0]["latents"], found[1]["latents"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["encode", "interpolate", "radii"])
def test_condition_images_are_those_of_the_seeds(tmp_path, invoke, way):
    network = write_snapshot(tmp_path / "net.pt", pfgmpp=True, aug_dim=2.5, label_dim=0,
                             cond_channels=3)
    conditions = write_dataset(tmp_path / "conditions.zip", num=6)
    data = write_dataset(tmp_path / "data.zip", num=10)
    asked = []

    class Watched(type(NetworkSampler.open(str(network), CPU, cond_image=str(conditions)).net)):
        def forward(self, x, sigma, class_labels=None, condition=None, **kwargs):
            asked.append(condition)
            return super().forward(x, sigma, class_labels, condition=condition, **kwargs)

    def see(**settings):
        sampler = NetworkSampler.open(str(network), CPU, cond_image=str(conditions), num_steps=2,
                                      **settings)
        sampler.net.__class__ = Watched
        return sampler

    sampler = see(encode=str(data) if way == "encode" else None)
    own = sampler.conditions([4, 2])
    if way == "encode":
        sampler.decode(sampler.encode([4, 2]), [4, 2])
    elif way == "interpolate":
        latents, own = between(sampler.draw([4, 2]), 3), own[:1].expand(3, -1, -1, -1)
        list(sampler.starting_from(latents, [4]).images([range(3)]))
    else:
        latents, own = at_radii(sampler.draw([4, 2]), 2.5, [0.1, 0.9]), own.repeat_interleave(2, 0)
        list(sampler.starting_from(latents, [4, 4, 2, 2]).images([range(4)]))
    assert len(asked) >= 3 and all(condition.equal(own) for condition in asked)


def test_latents_know_their_condition_images(tmp_path, invoke):
    network = write_snapshot(tmp_path / "net.pt", pfgmpp=True, aug_dim=2.5, label_dim=0,
                             cond_channels=3)
    pairs = write_dataset(tmp_path / "pairs.zip", num=6)
    args = [f"--cond-image={pairs}", "--steps=3"]
    run(invoke, network, tmp_path / "e", *args, f"--encode={pairs}", "--seeds=4,2")
    path = tmp_path / "e/latents.npz"
    assert np.load(path)["numbers"].dtype == np.int64
    assert np.load(path)["numbers"].tolist() == [4, 2]

    def conditions(file, seeds):
        sampler = NetworkSampler.open(str(network), CPU, cond_image=str(pairs), latents=str(file))
        return sampler.conditions(seeds)

    own = NetworkSampler.open(str(network), CPU, cond_image=str(pairs)).conditions
    assert conditions(path, [0, 1, 2]).equal(own([4, 2, 4]))
    plain = tmp_path / "plain.npz"
    np.savez(plain, latents=np.load(path)["latents"])
    assert conditions(plain, [0, 1, 2]).equal(own([0, 1, 2]))
    run(invoke, network, tmp_path / "w", *args, f"--latents={path}", "--interpolate=1,0",
        "--frames=2")
    run(invoke, network, tmp_path / "s", *args, f"--latents={path}")
    way, ends = pngs(tmp_path / "w"), pngs(tmp_path / "s")
    assert way["000000.png"] == ends["000001.png"]  # both under condition image 2
    assert way["000001.png"] != ends["000000.png"]  # the way's under that of its first end


# ----------------------------------------------------------------------------------- files, ways

def test_latents_of_seeds_give_the_images_of_the_seeds(network, tmp_path, invoke):
    NetworkSampler.open(str(network), CPU).draw(range(3)).save(tmp_path / "l.npz")
    run(invoke, network, tmp_path / "a", "--seeds=0-2")
    run(invoke, network, tmp_path / "b", f"--latents={tmp_path}/l.npz")
    run(invoke, network, tmp_path / "c", f"--latents={tmp_path}/l.npz", "--seeds=3-5,1")
    made = [pngs(tmp_path / name) for name in "abc"]
    assert made[0] == made[1] and len(made[0]) == 3
    assert made[2] == {f"{k:06d}.png": made[0][f"{k % 3:06d}.png"] for k in (1, 3, 4, 5)}
    np.save(tmp_path / "plain.npy", np.load(tmp_path / "l.npz")["latents"])
    run(invoke, network, tmp_path / "d", f"--latents={tmp_path}/plain.npy", "--class=0")
    run(invoke, network, tmp_path / "e", "--seeds=0-2", "--class=0")
    assert pngs(tmp_path / "d") == pngs(tmp_path / "e")


def test_a_folder_is_of_its_latents(network, tmp_path, invoke):
    for seed in (0, 1):
        NetworkSampler.open(str(network), CPU).draw([seed]).save(tmp_path / f"{seed}.npz")
    run(invoke, network, tmp_path / "a", f"--latents={tmp_path}/0.npz")
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path}/a", "--steps=5",
                    f"--latents={tmp_path}/1.npz")
    assert result.exit_code == 1 and "another setting (latents: " in result.stderr


def test_the_way_between_latents():
    ends = some(3, labels=torch.eye(3))
    way = between(ends, 5)
    assert len(way) == 9 and way.names[4] == "image 0 to image 1, 1.000"
    for i, end in ((0, 0), (4, 1), (8, 2)):
        torch.testing.assert_close(way.latents[i], ends.latents[end])
        torch.testing.assert_close(way.labels[i], torch.eye(3)[end])
    unit = way.latents.flatten(1) / way.latents.flatten(1).norm(dim=1, keepdim=True)
    angles = (unit[:-1] * unit[1:]).sum(dim=1).acos()
    torch.testing.assert_close(angles[:4], angles[:1].expand(4))
    lengths = way.latents.flatten(1).norm(dim=1).log()
    torch.testing.assert_close(lengths[:5].diff(), lengths[:5].diff()[:1].expand(4))
    torch.testing.assert_close(way.labels[1], torch.tensor([0.75, 0.25, 0.0]))
    # In the plane of the two ends.
    plane = torch.linalg.svdvals(way.latents[:5].flatten(1))
    assert plane[2] < 1e-12 * plane[0]


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e200, 1e-200])
def test_the_way_between_latents_of_one_line_is_finite(scale):
    end = some(1).latents[0]
    way = between(Latents(torch.stack([end, scale * end]), ("a", "b")), 3)
    assert way.latents.isfinite().all()
    torch.testing.assert_close(way.latents[1], math.sqrt(scale) * end)


@pytest.mark.parametrize("scale, dtype", [(-1, torch.float64), (-3e200, torch.float64),
                                          (-1 / 3, torch.float32)])
def test_opposite_latents_have_no_one_way_between(scale, dtype):
    end = some(1).latents[0]
    ends = Latents(torch.stack([end, (scale * end).to(dtype).double()]), ("a", "b\n"))
    with pytest.raises(ValueError, match=r"latents a and 'b\\n' are opposite"):
        between(ends, 3)
    nearly = ends.latents[1].clone()
    nearly[0, 0, 0] += 1e-3 * nearly.abs().max()
    way = between(Latents(torch.stack([end, nearly]), ("a", "b")), 5)
    lengths = way.latents.flatten(1).abs().amax(dim=1)
    assert lengths.isfinite().all() and lengths.min() > 0


def test_a_latent_of_zero_has_no_direction():
    latents = some(3).latents
    latents[2] = 0
    zero = Latents(latents, ("0", "1", "2"))
    for make in (lambda: between(zero, 3), lambda: at_radii(zero, 2.5, [0.5])):
        with pytest.raises(ValueError, match="latent 2 is zero and has no direction"):
            make()


@pytest.mark.parametrize("make, words", [
    (lambda: between(some(2), 0), "0 frames"), (lambda: between(some(2), 1), "1 frames"),
    (lambda: between(some(1), 3), "1 latents"), (lambda: at_radii(some(1), 2, []), "quantiles"),
    (lambda: radial_factor(2, 0), "quantile=0: must be between"),
    (lambda: radial_factor(2, 1), "quantile=1: must be between"),
    (lambda: radial_factor(2, math.nan), "quantile=nan"), (lambda: radial_factor(0, 0.5), "D=0"),
    (lambda: radial_factor(math.inf, 0.5), "D=inf"),
    (lambda: radial_factor(1e-3, 0.99), "out of the range of")])
def test_ways_and_radii_that_are_none(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_interpolation_on_the_command_line(network, tmp_path, invoke):
    run(invoke, network, tmp_path / "a", "--interpolate=4,0,9", "--frames=3")
    run(invoke, network, tmp_path / "b", "--seeds=0,4,9")
    made, ends = pngs(tmp_path / "a"), pngs(tmp_path / "b")
    assert len(made) == 5
    for i, seed in ((0, 4), (2, 0), (4, 9)):
        assert made[f"{i:06d}.png"] == ends[f"{seed:06d}.png"]
    strip = PIL.Image.open(tmp_path / "a/vis/interpolation.png")
    movie = PIL.Image.open(tmp_path / "a/vis/interpolation.gif")
    assert strip.width > strip.height and movie.n_frames == 5
    NetworkSampler.open(str(network), CPU).draw([4, 0]).save(tmp_path / "l.npz")
    for name, ends in (("c", "0,1"), ("d", "1,0")):
        run(invoke, network, tmp_path / name, f"--latents={tmp_path}/l.npz",
            f"--interpolate={ends}", "--frames=3")
    first, turned = pngs(tmp_path / "c"), pngs(tmp_path / "d")
    # Names come before numbers: these are "4" and "0", so that 0 is the second latent.
    assert first["000000.png"] == made["000002.png"] and first["000002.png"] != made["000000.png"]
    assert turned["000002.png"] == made["000002.png"]


# -------------------------------------------------------------------------------------------- radii

@pytest.mark.parametrize("D", [0.7, 2, 128, 2048])
def test_radial_factors_are_quantiles_of_the_kernels(D):
    draws = PerturbationKernel(D).scale(100_000, torch.Generator().manual_seed(0))
    for quantile in (0.05, 0.5, 0.95):
        share = (draws < radial_factor(D, quantile)).double().mean().item()
        assert share == pytest.approx(quantile, abs=4 * 0.5 / math.sqrt(100_000))
        assert radial_factor(D, quantile) == pytest.approx(
            math.sqrt(D / scipy.stats.chi2(D).isf(quantile)))


def test_radii_keep_directions(network, tmp_path, invoke):
    directions = some(2)
    found = at_radii(directions, 2.5, [0.05, 0.95])
    assert found.names == ("image 0, 0.05", "image 0, 0.95", "image 1, 0.05", "image 1, 0.95")
    lengths = found.latents.flatten(1).norm(dim=1) / math.sqrt(192)
    expected = torch.tensor([radial_factor(2.5, 0.05), radial_factor(2.5, 0.95)]).double()
    torch.testing.assert_close(lengths, expected.repeat(2))
    for i in range(4):
        cosine = torch.nn.functional.cosine_similarity(
            found.latents[i].flatten(), directions.latents[i // 2].flatten(), dim=0)
        assert cosine.item() == pytest.approx(1.0)
    run(invoke, network, tmp_path, "--radii=0.05,0.95", "--seeds=3,5")
    assert len(pngs(tmp_path)) == 4 and PIL.Image.open(tmp_path / "vis/radii.png").width > 100
    labels = json.loads((tmp_path / "dataset.json").read_text())["labels"]
    own = NetworkSampler.open(str(network), CPU).classes([3, 3, 5, 5])
    assert [label for _, label in labels] == own


# ------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("flags, words", [
    (["--interpolate=0"], "at least two seeds"), (["--interpolate=0,"], "at least two seeds"),
    (["--interpolate=0,x"], "'x' must be a seed"), (["--radii=0,0.5"], "between 0 and 1"),
    (["--radii=x"], "between 0 and 1"), (["--interpolate=0,1", "--radii=0.5"], "choose one"),
    (["--interpolate=0,1", "--seeds=0"], "--seeds with --interpolate"),
    (["--interpolate=0,1", "--frames=1"], "--frames"),
    (["--radii=0.5", "--frames=4"], "--frames: needs --interpolate"),
    (["--frames=4"], "--frames: needs --interpolate"),
    (["--encode=DATA", "--seeds=39-40"], "--seeds: names image 40"),
    (["--radii=0.5", "--steps=4,5"], "with one network and one setting"),
    (["--encode=DATA", "--init-image=DATA", "--init-sigma=1"], "--encode and --init-image"),
    (["--encode=DATA", "--S_churn=1"], "--S_churn=1.0: encoding solves the equation in sigma"),
    (["--encode=DATA", "--alpha=0.1"], "leave --alpha out"),
    (["--encode=DATA", "--schedule=vp"], "leave --schedule out"),
    (["--encode=DATA", "--steps=1"], "--steps=1: must be 2 or more"),
    (["--encode=DATA", "--radii=0.5"], "choose one"),
    (["--radii=0.5", "--init-image=DATA", "--init-sigma=1"], "--radii with --init-image"),
    (["--interpolate=0,1", "--init-image=DATA", "--init-sigma=1"], "--interpolate with --init-"),
    (["--encode=DATA", "--save_images"], "--encode with --save_images"),
    (["--encode=DATA", "--subdirs"], "--encode with --subdirs"),
    (["--encode="], "--encode=: is empty"), (["--latents="], "--latents=: is empty"),
    (["--network="], "--network=: is empty"), (["--outdir="], "--outdir=: is empty"),
    (["--init-image=", "--init-sigma=1"], "--init-image=: is empty")])
def test_flags_that_do_not_go_together(network, dataset_zip, tmp_path, invoke, flags, words):
    flags = [flag.replace("DATA", str(dataset_zip)) for flag in flags]
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'o'}", *flags)
    assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert not (tmp_path / "o").exists()


def test_one_network_has_to_be_named(network, tmp_path, invoke):
    result = invoke(generate.main, f"--outdir={tmp_path}", "--radii=0.5")
    assert result.exit_code == 2 and "name the network with" in result.stderr


def test_diffusion_has_one_radius(tmp_path, invoke):
    network = write_snapshot(tmp_path / "net.pt")
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'o'}",
                    "--radii=0.5")
    assert result.exit_code == 2 and "D = inf" in result.stderr


def test_data_without_labels_need_a_class(network, tmp_path, invoke):
    data = write_dataset(tmp_path / "plain.zip", classes=0)
    args = [f"--network={network}", f"--outdir={tmp_path / 'o'}", f"--encode={data}", "--steps=2"]
    result = invoke(generate.main, *args)
    assert result.exit_code == 2 and "--class" in result.stderr, result.stderr
    assert invoke(generate.main, *args, "--class=1").exit_code == 0
    result = invoke(generate.main, *args, "--class=1")
    assert result.exit_code == 1 and "latents.npz: exists" in result.stderr


def test_latents_are_not_written_over_a_file(network, dataset_zip, tmp_path, invoke):
    (tmp_path / "o").touch()
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path}/o", "--steps=2",
                    f"--encode={dataset_zip}")
    [line] = result.stderr.splitlines()
    assert result.exit_code == 1 and f"--outdir={tmp_path}/o: " in line and "name another" in line


def test_data_to_encode_that_are_not_there(network, tmp_path, invoke):
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path}/o", "--steps=2",
                    f"--encode={tmp_path}/none.zip")
    [line] = result.stderr.splitlines()
    assert result.exit_code == 1 and f"--encode={tmp_path}/none.zip: no such" in line
    assert "name a data set" in line


@pytest.mark.parametrize("name, ends, words", [
    ("twice", "twice,1", "latents 0, 2 all have the name twice; give the number"),
    ("a\nb", "x,1", r"such as 'a\nb'"), ("twice", "0,3", "'3' must be a number from 0 to 2")])
def test_names_that_mean_no_one_latent(network, tmp_path, invoke, name, ends, words):
    Latents(some(3).latents, (name, "b", name)).save(tmp_path / "l.npz")
    args = [f"--network={network}", f"--latents={tmp_path}/l.npz", "--steps=2", "--class=0"]
    result = invoke(generate.main, *args, f"--outdir={tmp_path}/o", f"--interpolate={ends}")
    [line] = result.stderr.splitlines()
    assert result.exit_code == 2 and words in line, line
    result = invoke(generate.main, *args, f"--outdir={tmp_path}/o", "--interpolate=0,b",
                    "--frames=2")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("content, words", [
    ({"other": np.ones(3)}, "must have floating-point 'latents'"),
    ({"latents": np.ones([2, 3, 8, 8], int)}, "floating-point"),
    ({"latents": np.ones([2, 3, 4, 4])}, "3x4x4"), ({"latents": np.ones([3, 8, 8])}, "8x8"),
    ({"latents": np.full([1, 3, 8, 8], np.nan)}, "finite"),
    ({"latents": np.ones([0, 3, 8, 8])}, "must be [n, C, H, W]"),
    ({"latents": np.ones([2, 3, 8, 8]), "names": ["a"]}, "1 names for 2"),
    ({"latents": np.ones([2, 3, 8, 8]), "labels": np.ones([2, 5])}, "5 numbers"),
    (b"text", "must be a .npz"), (None, "no.npz"),
    ({"latents": 1e30 * np.ones([2, 3, 8, 8])}, "latent 0 has a length of 1e+30 sqrt(N)"),
    ({"latents": np.array(1.0)}, "shape []; must be [n, C, H, W]"),
    ({**ONES, "labels": np.array([0, 1])}, "[2, label_dim]"),
    ({**ONES, "labels": np.full([2, 2], np.nan)}, "labels must be finite"),
    ({**ONES, "labels": np.full([2, 2], 1e300)}, "labels must be finite"),
    ({**ONES, "labels": np.ones([2, 2], complex)}, "labels are complex128"),
    ({**ONES, "labels": np.ones([3, 2])}, "labels have shape [3, 2]"),
    ({**ONES, "names": np.array("a")}, "text of shape [2]"),
    ({**ONES, "names": np.ones([2, 1])}, "text of shape [2]"),
    ({**ONES, "names": np.array([None, "a"])}, "names' is an array of object"),
    ({**ONES, "numbers": np.array([0.0, 1.0])}, "numbers of images must be whole"),
    ({**ONES, "numbers": np.array([0, -1])}, "numbers of images must be whole"),
    ({**ONES, "numbers": np.array([0])}, "numbers of images must be whole")])
def test_files_that_are_no_latents(network, tmp_path, invoke, content, words):
    path = tmp_path / ("l.npz" if content is not None else "no.npz")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'o'}",
                    f"--latents={path}")
    assert result.exit_code == 1 and words in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: --latents") and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("D", [0.01, 0.5, 1, 2, 128, math.inf])
def test_lengths_are_refused_that_no_network_draws(D):
    rng = torch.Generator().manual_seed(0)
    scale = PerturbationKernel(D).scale(100_000, rng).max()
    drawn = Latents((scale * some(2).latents), ("0", "1"))
    check_lengths(drawn, D)
    if D > 0.1:
        drawn.latents[1] *= 1e40 if D < 1 else 1e15
        with pytest.raises(ValueError, match="latent 1 has a length of .* sqrt"):
            check_lengths(drawn, D)
    drawn.latents[:] = 1e300
    with pytest.raises(ValueError) if D > 0.1 else contextlib.nullcontext():
        check_lengths(drawn, D)


def npy(shape, held):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False,
                                                "descr": "<f8"})
    return file.getvalue() + bytes(held)


def changed(content, offset, value):
    """Returns a ZIP with a byte changed after the mark of each header, local and in the list."""
    content = bytearray(content)
    for mark, more in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        at = content.find(mark) + offset + more
        content[at] = value
    return bytes(content)


def zipped(entry, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("latents.npy", entry)
    return file.getvalue()


WHOLE = npy((1, 3, 8, 8), 1536)
DEFLATED = zipped(WHOLE, zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("content, words", [
    (npy((10**12, 3, 8, 8), 1536), "the array should have 1536000000000000 bytes"),
    (zipped(npy((10**12, 3, 8, 8), 1536)), "its 'latents' should have 1536000000000000 bytes"),
    (zipped(npy((10**12, 3, 8, 8), 0)), "but has 0"), (WHOLE[:-8], "but has 1528"),
    (zipped(b"text"), "its 'latents' is not a NumPy array"),
    (changed(zipped(WHOLE), 6, 1), "its 'latents' is encrypted"),
    (changed(DEFLATED, 8, 14), "compressed with method 14"),
    (DEFLATED[:60] + b"\xff" * 12 + DEFLATED[72:], "damaged .npz"),
    (zipped(WHOLE)[:-30], "damaged .npz"), (b"PK no ZIP", "damaged .npz"),
    (b"some text", "or a .npy array of latents")],
    ids=["claims", "zip claims", "empty", "short", "no array", "encrypted", "method", "deflate",
         "cut", "magic", "text"])
def test_damaged_files_of_latents(tmp_path, content, words):
    (tmp_path / "l.npz").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_latents(tmp_path / "l.npz", (3, 8, 8))
    text = str(caught.value)
    assert words in text and "\n" not in text and "pickle" not in text


def test_arrays_as_others_write_them_are_latents(tmp_path):
    given = some(2).latents.numpy()
    np.savez_compressed(tmp_path / "l.npz", latents=np.asfortranarray(given.astype(">f4")),
                        names=np.array([b"a", b"b"]), labels=np.eye(2, dtype=np.int64))
    found = read_latents(tmp_path / "l.npz", (3, 8, 8))
    np.testing.assert_allclose(found.latents, given, rtol=1e-6)
    assert found.names == ("a", "b") and found.labels.equal(torch.eye(2)) and found.numbers is None


def test_what_was_saved_is_read(tmp_path):
    given = dataclasses.replace(some(2, labels=torch.eye(2)), numbers=(7, 3))
    given.save(tmp_path / "l.npz")
    found = read_latents(tmp_path / "l.npz", (3, 8, 8))
    assert found.latents.equal(given.latents) and found.names == given.names
    assert found.labels.equal(given.labels) and found.digest == given.digest
    assert found.numbers == (7, 3)
    others = [some(2), some(2, labels=torch.eye(2)), dataclasses.replace(given, numbers=(3, 7))]
    assert given.digest not in {other.digest for other in others}
