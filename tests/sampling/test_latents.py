"""Latents: from images and back, from files, on the way between others, and of chosen radii."""

import json
import math

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
from sampling.latents import Latents, at_radii, between, radial_factor, read_latents
from sampling.network_sampler import NetworkSampler

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("scale", [1.0, 3.0, -1.0])
def test_the_way_between_latents_of_one_line_is_finite(scale):
    end = some(1).latents[0]
    way = between(Latents(torch.stack([end, scale * end]), ("a", "b")), 3)
    assert way.latents.isfinite().all()
    if scale > 0:
        torch.testing.assert_close(way.latents[1], math.sqrt(scale) * end)


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
    (["--interpolate=0"], "two seeds or more"), (["--interpolate=0,"], "two seeds or more"),
    (["--interpolate=0,x"], "'x' must be a seed"), (["--radii=0,0.5"], "between 0 and 1"),
    (["--radii=x"], "between 0 and 1"), (["--interpolate=0,1", "--radii=0.5"], "choose one"),
    (["--interpolate=0,1", "--seeds=0"], "--seeds with --interpolate"),
    (["--interpolate=0,1", "--frames=1"], "--frames"),
    (["--radii=0.5", "--frames=4"], "--frames: used with --interpolate"),
    (["--frames=4"], "--frames: used with --interpolate"),
    (["--encode=DATA", "--seeds=39-40"], "--seeds: names image 40"),
    (["--radii=0.5", "--steps=4,5"], "for one network with one setting"),
    (["--encode=DATA", "--init-image=DATA", "--init-sigma=1"], "--encode and --init-image"),
    (["--encode=DATA", "--S_churn=1"], "--S_churn=1.0: encoding solves the equation in sigma"),
    (["--encode=DATA", "--alpha=0.1"], "leave --alpha out"),
    (["--encode=DATA", "--schedule=vp"], "leave --schedule out"),
    (["--encode=DATA", "--steps=1"], "--steps=1: must be 2 or more"),
    (["--encode=DATA", "--radii=0.5"], "choose one")])
def test_flags_that_do_not_go_together(network, dataset_zip, tmp_path, invoke, flags, words):
    flags = [flag.replace("DATA", str(dataset_zip)) for flag in flags]
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'o'}", *flags)
    assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert not (tmp_path / "o").exists()


def test_one_network_has_to_be_named(network, tmp_path, invoke):
    result = invoke(generate.main, f"--outdir={tmp_path}", "--radii=0.5")
    assert result.exit_code == 2 and "name it with --network" in result.stderr


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
    assert result.exit_code == 1 and "latents.npz: is there already" in result.stderr


@pytest.mark.parametrize("content, words", [
    ({"other": np.ones(3)}, "must have floating-point 'latents'"),
    ({"latents": np.ones([2, 3, 8, 8], int)}, "floating-point"),
    ({"latents": np.ones([2, 3, 4, 4])}, "3x4x4"), ({"latents": np.ones([3, 8, 8])}, "8x8"),
    ({"latents": np.full([1, 3, 8, 8], np.nan)}, "finite"),
    ({"latents": np.ones([0, 3, 8, 8])}, "must be [n, C, H, W]"),
    ({"latents": np.ones([2, 3, 8, 8]), "names": ["a"]}, "1 names of 2"),
    ({"latents": np.ones([2, 3, 8, 8]), "labels": np.ones([2, 5])}, "5 numbers"),
    (b"text", "must be a .npz"), (None, "no.npz")])
def test_files_that_are_no_latents(network, tmp_path, invoke, content, words):
    path = tmp_path / ("l.npz" if content is not None else "no.npz")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'o'}",
                    f"--latents={path}")
    assert result.exit_code == 1 and words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()


def test_what_was_saved_is_read(tmp_path):
    given = some(2, labels=torch.eye(2))
    given.save(tmp_path / "l.npz")
    found = read_latents(tmp_path / "l.npz", (3, 8, 8))
    assert found.latents.equal(given.latents) and found.names == given.names
    assert found.labels.equal(given.labels) and found.digest == given.digest
    assert given.digest != some(2).digest
