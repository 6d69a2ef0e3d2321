"""Restoring images from the command line: names, sizes, units, means, measurements, tiles."""

import dataclasses
import json
import math
import unicodedata

import numpy as np
import PIL.Image
import pytest
import torch
from pickle_assembler import zip_file
from published_files import ForkDenoiser, fork_state
from snapshots import write_snapshot

import checkpoint_tool
import dataset_tool
import fid
import generate
from dnnlib.atomic import temporary_name
from images.scaling import Scaling
from pfgmpp.measurement import MeasuredDenoiser, downsample, inpaint
from pfgmpp.samplers import SamplerConfig, generate_images, trajectory
from sampling.network_sampler import NetworkSampler
from sampling.seed_images import SeedImages

CPU = torch.device("cpu")
CENTER, SPREAD = 1023.5, 2047.5
HU = {"center": [CENTER], "spread": [SPREAD]}
SIZES = [(8, 8), (10, 14), (8, 8), (7, 16)]
NAMES = ["a/one.npy", "a/two.npy", "b.npy", "c.npy"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("restoration")
    record = {"scale": HU, "cond_scale": HU}
    for name, channels, label_dim in (("net", 0, 0), ("cond", 1, 0), ("classes", 0, 3)):
        write_snapshot(root / f"{name}.pt", label_dim=label_dim, shape=(1, 8, 8), dataset=record,
                       cond_channels=channels, pfgmpp=True, aug_dim=64.0)
    rng = np.random.default_rng(0)
    for folder, sizes in (("noisy", SIZES), ("equal", [(8, 8)] * 4)):
        for name, size in zip(NAMES, sizes, strict=True):
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, 300 * rng.standard_normal((1, *size)).astype(np.float32))
    return root


def stored(root, folder="noisy"):
    return [np.load(root / folder / name) for name in NAMES]


def to_network(array):
    return torch.from_numpy((array.astype(np.float64) - CENTER) / SPREAD)[None]


def make(invoke, root, out, *args, network="net", code=0):
    result = invoke(generate.main, f"--network={root / network}.pt", f"--outdir={out}", *args)
    assert result.exit_code == code, result.output
    return result.output


ONE_STEP = ("--init-noise=0", "--last=1", "--steps=8", "--sigma_max=380")


def test_each_input_makes_one_image_of_its_name_and_size_in_the_units_of_the_data(
        root, tmp_path, invoke):
    text = make(invoke, root, tmp_path, f"--init-image={root / 'noisy'}", *ONE_STEP, "--blend=0.7",
                "--batch=2")
    assert "Start      at sigma 0.07188, which is 147.2 in the data's units" in text
    assert "3 sizes from 7x16 to 14x10" in text or "3 sizes" in text
    assert "no multiples of 2 are padded" in text
    net = NetworkSampler.open(str(root / "net.pt"), CPU).net
    t = [(380 ** (1 / 7) + i / 7 * (0.002 ** (1 / 7) - 380 ** (1 / 7))) ** 7 for i in (6, 7)]
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.npy")) == NAMES
    for name, array in zip(NAMES, stored(root), strict=True):
        found = np.load(tmp_path / name)
        assert found.shape == array.shape and found.dtype == np.float32
        v = to_network(array)
        pad = [(0, 0), (0, 0), *((0, side % 2) for side in array.shape[1:])]
        x = torch.from_numpy(np.pad(v, pad, mode="reflect")).float()
        with torch.no_grad():
            denoised = net(x, t[0]).double()[..., :array.shape[1], :array.shape[2]]
        moved = v + (t[1] - t[0]) * (v - denoised) / t[0]
        expected = SPREAD * (0.7 * moved + 0.3 * v) + CENTER
        np.testing.assert_allclose(found, expected[0], rtol=0, atol=0.02)
    record = json.loads((tmp_path / "generate.json").read_text())
    assert record | {"last": 1, "blend": 0.7, "init_noise": 0, "nfe": 1} == record
    assert "4 of 4 images are there" in make(
        invoke, root, tmp_path, f"--init-image={root / 'noisy'}", *ONE_STEP, "--blend=0.7")
    text = make(invoke, root, tmp_path, f"--init-image={root / 'noisy'}", *ONE_STEP, code=1)
    assert "images made with another setting (blend: 0.7 there" in text


def test_with_seeds_images_are_numbered_and_taken_in_turn(root, tmp_path, invoke):
    make(invoke, root, tmp_path, f"--init-image={root / 'noisy'}", "--init-level=60", "--steps=2",
         "--seeds=1,5")
    one, five = (np.load(tmp_path / f"00000{k}.npy") for k in (1, 5))
    assert one.shape == five.shape == (1, *SIZES[1])
    assert 10 < np.std(one - five) < 1000  # other noise of the same image


@pytest.mark.parametrize("flags", [["--init-level=60"], [f"--init-sigma={60 / SPREAD!r}"]])
def test_a_level_may_be_in_either_scale(flags, root, tmp_path, invoke):
    text = make(invoke, root, tmp_path, f"--init-image={root / 'equal'}", *flags, "--steps=2")
    record = json.loads((tmp_path / "generate.json").read_text())
    assert record["sigma_max"] == pytest.approx(60 / SPREAD, rel=1e-9)
    assert ("sigma 0.0293, which is 60 in the data's units" in text) == (
        flags[0].startswith("--init-level"))


@pytest.mark.parametrize("network, start", [
    ("net", ["--init-level=60"]), ("cond", ["--steps=2"]), ("classes", ["--init-level=60"])])
def test_an_average_is_that_of_the_samples_of_seeds_k_and_k_plus_n(network, start, root, tmp_path,
                                                                   invoke):
    flag = "--cond-image" if network == "cond" else "--init-image"
    args = [f"{flag}={root / 'equal'}", "--steps=2", *start]
    classes = ["--class=1"] if network == "classes" else []
    make(invoke, root, tmp_path / "mean", *args, *classes, "--average=3", network=network)
    make(invoke, root, tmp_path / "each", *args, *classes, "--seeds=0-11", network=network)
    each = np.stack([np.load(tmp_path / f"each/{k:06d}.npy") for k in range(12)]).reshape(
        3, 4, 1, 8, 8)
    for k, name in enumerate(NAMES):
        np.testing.assert_allclose(np.load(tmp_path / "mean" / name), each[:, k].mean(axis=0),
                                   rtol=1e-4, atol=0.05)
        np.testing.assert_allclose(np.load(tmp_path / "mean/std" / name),
                                   each[:, k].std(axis=0, ddof=1), rtol=1e-3, atol=0.05)
    # The deviations are no images of the folder.
    found = SeedImages.open("--images", tmp_path / "mean", 1, Scaling(**HU))
    assert found.names(range(4)) == tuple(NAMES)


def test_an_average_is_of_the_label_of_its_first_seed(root):
    sampler = NetworkSampler.open(str(root / "classes.pt"), CPU, init_image=str(root / "equal"),
                                  init_level=60.0, num_steps=2, average=4)
    [mean] = sampler.images([[0, 1, 2, 3]])
    plain = NetworkSampler.open(str(root / "classes.pt"), CPU, init_image=str(root / "equal"),
                                init_level=60.0, num_steps=2)
    labels = plain.labels_of(range(4))
    assert torch.equal(mean.class_labels, labels)
    assert not torch.equal(labels, plain.labels_of(range(4, 8)))  # seeds of their own classes
    total = 0
    for j in range(4):
        [batch] = generate_images(plain.net, [[4 * j + k for k in range(4)]],
                                  sampler=plain.sampler, device=CPU, inits=plain.inits,
                                  labels=lambda *_: labels)
        total = total + batch.images
    torch.testing.assert_close(mean.images, total / 4)


def test_a_mean_whose_deviations_were_lost_is_made_again(root, tmp_path, invoke):
    args = [f"--init-image={root / 'equal'}", "--init-level=60", "--steps=2", "--average=2",
            "--batch=1"]
    make(invoke, root, tmp_path, *args)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.npy")}
    (tmp_path / "std/b.npy").unlink()
    assert "3 of 4 images are there" in make(invoke, root, tmp_path, *args)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.npy")} == before


def test_a_measurement_decides_the_denoiser_and_a_level_that_sampling_starts_from_it(root):
    given = {"init_image": str(root / "equal"), "measure": "downsample:2", "num_steps": 3,
             "measure_by": "projection"}
    v = torch.cat([to_network(array) for array in stored(root, "equal")])
    sampler = NetworkSampler.open(str(root / "net.pt"), CPU, **given, measure_level=60.0)
    [batch] = sampler.images([[0, 1, 2, 3]])
    assert batch.images.shape == (4, 1, 16, 16) and sampler.image_shape == (1, 16, 16)

    class Sized:  # the network for images of another size
        image_shape = (1, 16, 16)

        def __init__(self, net):
            self.net = net

        def __getattr__(self, name):
            return getattr(self.net, name)

        def __call__(self, *args):
            return self.net(*args)

    measured = MeasuredDenoiser(Sized(sampler.net), downsample(2), v, 60 / SPREAD, "projection")
    [expected] = generate_images(measured, [[0, 1, 2, 3]], sampler=SamplerConfig(num_steps=3),
                                 device=CPU)
    torch.testing.assert_close(batch.images, expected.images, rtol=1e-4, atol=1e-4)
    started = NetworkSampler.open(str(root / "net.pt"), CPU, **given, measure_sigma=0.1,
                                  init_sigma=0.3)
    seen = []
    list(generate_images(started.net, [[0]], **{**started._how(), "watch": lambda x, sigma:
                                                seen.append(x)}, ))
    mean = torch.nn.functional.avg_pool2d(seen[0], 2)
    assert 0.02 < (mean - v[:1]).std() < 0.4  # noise of level 0.3 around the measurement


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_a_mask_says_what_was_measured(kind, root, tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :5] = 255
    path = tmp_path / f"mask.{kind}"
    if kind == "png":
        PIL.Image.fromarray(mask).save(path)
    else:
        np.save(path, mask.astype(np.float32) / 255)
    given = {"init_image": str(root / "equal"), "num_steps": 3, "measure_by": "projection"}
    sampler = NetworkSampler.open(str(root / "net.pt"), CPU, **given, measure=f"inpaint:{path}",
                                  measure_sigma=0.0)
    [batch] = sampler.images([[0, 1]])
    v = torch.cat([to_network(array) for array in stored(root, "equal")[:2]])
    # Without noise, what is measured is kept.
    torch.testing.assert_close(batch.images[..., :5], v[..., :5], rtol=0, atol=1e-5)
    operator = inpaint(torch.from_numpy(mask > 0).float())
    [expected] = generate_images(
        MeasuredDenoiser(sampler.net, operator, v, 0.0, "projection"), [[0, 1]],
        sampler=SamplerConfig(num_steps=3), device=CPU)
    torch.testing.assert_close(batch.images, expected.images, rtol=1e-5, atol=1e-5)


def test_pictures_are_of_the_window(root, tmp_path, invoke):
    args = [f"--init-image={root / 'equal'}", *ONE_STEP, "--save_images"]
    make(invoke, root, tmp_path, *args, "--window=40,400")
    picture = np.asarray(PIL.Image.open(tmp_path / "vis/grid.png")).astype(int)
    made = np.load(tmp_path / NAMES[0])[0]
    expected = np.clip((made - (40 - 200)) / 400 * 255, 0, 255)
    first = picture[2:2 + 64, 2:2 + 64, 0]  # enlarged, behind a gap
    assert picture.shape[0] == 2 * 66 + 2
    np.testing.assert_allclose(first[4::8, 4::8], expected, atol=1.5)
    assert expected.std() > 0 and (expected == 0).any() and (expected == 255).any()


def test_scores_are_of_images_of_one_size_only(root, tmp_path, invoke):
    args = [f"--network={root / 'net.pt'}", "--detector=pixels", "--seeds=0-3", *ONE_STEP,
            f"--ref={root / 'equal'}", f"--out={tmp_path / 'm.jsonl'}"]
    result = invoke(fid.main, "gen", *args, f"--init-image={root / 'noisy'}")
    assert result.exit_code == 1 and "the images are of 3 sizes" in result.output


@pytest.mark.parametrize("flags, code, words", [
    (["--init-level=60"], 2, "--init-level without --init-image"),
    (["--last=1"], 2, "--last without --init-image"),
    (["--init-noise=0"], 2, "--init-noise without --init-image"),
    (["--blend=0.5"], 2, "--blend without --init-image"),
    (["--measure=denoise", "--measure-sigma=1"], 2, "--measure without --init-image"),
    (["INIT"], 2, "needs the level at which to start"),
    (["INIT", "--init-level=60", "--init-sigma=1"], 2, "leave one of them out"),
    (["INIT", "--init-level=60", "--last=1"], 2, "--init-level with --last"),
    (["INIT", "--init-level=60", "--sigma_max=3"], 2, "--sigma_max=3 with --init-level"),
    (["INIT", "--init-level=60", "--sigmas=3,1"], 2, "--init-level with --sigmas"),
    (["INIT", "--last=8", "--steps=8"], 1, "--last=8: must be 1 or more and less than --steps=8"),
    (["INIT", "--init-level=60", "--stop-sigma=3"], 1, "--stop-sigma=3: must be 0 or more"),
    (["INIT", "--last=1", "--solver=ipndm", "--blend=0.5"], 2, "which blending makes useless"),
    (["INIT", "--measure=denoise"], 2, "needs the noise of the measurement"),
    (["INIT", "--measure-sigma=1", "--last=1"], 2, "--measure-sigma=1.0 without --measure"),
    (["INIT", "--measure=blur", "--measure-sigma=1"], 2, "must be denoise, inpaint:MASK"),
    (["INIT", "--measure=downsample:1", "--measure-sigma=1"], 2, "whole number K of at least 2"),
    (["INIT", "--measure=inpaint:none.png", "--measure-sigma=1"], 1, "No such file"),
    (["INIT", "--measure=inpaint:MASK", "--measure-sigma=1"], 2, "the mask is 8x8, but images"),
    (["INIT", "--measure=denoise", "--measure-sigma=1", "--init-noise=0"], 2,
     "starts from pure noise"),
    (["--average=3"], 2, "--average=3: averages"),
    (["INIT", "--last=1", "--average=3", "--seeds=4"], 1, "name seeds below 4"),
    (["--tile=3"], 2, "--tile=3: must be a multiple of 2"),
    (["INIT", "--last=1", "--init-noise=0", "--average=3"], 2, "all samples of an input are equal"),
    (["--average=3", "--radii=0.5"], 2, "--average with --radii: each latent makes one image"),
    (["--average=3", "--interpolate=0,1"], 2, "--average with --interpolate"),
    (["INIT", "--measure=denoise", "--measure-sigma=1", "--init-sigma=1", "--blend=0.5"], 2,
     "--blend with --measure"),
    (["INIT", "--measure=denoise", "--measure-level=nan"], 2, "'nan': must be finite"),
    (["INIT", "--init-level=inf"], 2, "'inf': must be finite"),
    (["INIT", "--last=1", "--subdirs"], 2, "images keep the names and folders"),
    (["INIT", "--last=1", "--window=40,400"], 2, "--window: only applies to pictures"),
    (["--save_images", "--window=40"], 2, "must be a center and a width"),
    (["--save_images", "--window=40,0"], 2, "must be a center and a width"),
], ids=str)
def test_what_does_not_fit_gets_one_line_and_leaves_nothing(flags, code, words, root, tmp_path,
                                                            invoke):
    np.save(tmp_path / "mask.npy", np.ones((8, 8), np.float32))
    given = {"INIT": f"--init-image={root / 'noisy'}"}
    args = [given.get(flag, flag.replace("MASK", str(tmp_path / "mask.npy"))) for flag in flags]
    text = make(invoke, root, tmp_path / "out", *args, code=code)
    assert words in text and "Traceback" not in text
    assert not list(tmp_path.rglob("out/*.npy"))


def test_inputs_that_differ_in_their_extension_only_need_numbers(root, tmp_path, invoke):
    folder = tmp_path / "twice"
    folder.mkdir()
    for name in ("x.npy", "x.NPY"):
        np.save((folder / name).open("wb"), np.zeros((1, 8, 8), np.float32))
    text = make(invoke, root, tmp_path / "out", f"--init-image={folder}", *ONE_STEP, code=1)
    assert "differ only in their extension" in text
    make(invoke, root, tmp_path / "out", f"--init-image={folder}", *ONE_STEP, "--seeds=0,1")


def test_an_input_must_not_be_named_as_pictures_and_deviations_are(root, tmp_path, invoke):
    (tmp_path / "in/std").mkdir(parents=True)
    np.save(tmp_path / "in/std/x.npy", np.zeros((1, 8, 8), np.float32))
    text = make(invoke, root, tmp_path / "out", f"--init-image={tmp_path / 'in'}", *ONE_STEP,
                code=1)
    assert "std/x: an image of this name" in text and not (tmp_path / "out").exists()


def test_a_level_in_units_that_channels_do_not_share_is_refused(tmp_path):
    scale = {"center": [0.0, 0.0], "spread": [1.0, 2.0]}
    write_snapshot(tmp_path / "net.pt", label_dim=0, shape=(2, 8, 8), dataset={"scale": scale})
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8), np.float32))
    with pytest.raises(ValueError, match="--init-level=60: the channels .* with --init-sigma"):
        NetworkSampler.open(str(tmp_path / "net.pt"), CPU, init_level=60.0,
                            init_image=str(tmp_path))


@pytest.mark.parametrize("factor, offset, words", [
    (1 / SPREAD, -CENTER / SPREAD, "values span only 0.00"),  # -1 to 1 in place of HU
    (1000, 0, "values reach "), (1, 0, None), (0.05, 0, None)])
def test_inputs_of_another_unit_are_told(factor, offset, words, root, tmp_path, capsys):
    for name, array in zip(NAMES, stored(root, "equal"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, (array * factor + offset).astype(np.float32))
    NetworkSampler.open(str(root / "net.pt"), CPU, init_image=str(tmp_path), init_level=60.0)
    told = capsys.readouterr().err
    if words is None:
        assert told == ""
    else:
        assert words in told and "(-1024 to 3071 in their own units)" in told


def test_the_picture_of_means_ends_with_the_means(root):
    sampler = NetworkSampler.open(str(root / "net.pt"), CPU, init_image=str(root / "equal"),
                                  init_level=2000.0, num_steps=2, average=4)
    *way, last = sampler.trajectory([0, 1])
    [mean] = sampler.images([[0, 1]])
    expected = torch.clip(mean.images * 127.5 + 128, 0, 255).to(torch.uint8)
    assert torch.equal(last, expected) and len(way) == 2


@pytest.mark.long
@pytest.mark.parametrize("D", [64, math.inf])
@pytest.mark.parametrize("h, flags", [(1, []), (2, ["--solver=ppfm"])])
def test_a_state_of_the_ct_forks_restores_images_as_their_code_does(h, flags, D, tmp_path, invoke):
    """Their sampler written out: T = 8, w = 0.7, both halves of a step at its first level."""
    torch.manual_seed(0)
    nets = [ForkDenoiser("cSongUNet", 16, 1, model_channels=8, channel_mult=[1, 2], num_blocks=1)
            for _ in range(2)]
    (tmp_path / "training-state-003201.pt").write_bytes(zip_file(fork_state(*nets, D)))
    done = invoke(checkpoint_tool.main, "convert", str(tmp_path / "training-state-003201.pt"),
                  str(tmp_path / "net.pt"), "--scale=-1024,3071", "--cond-scale=-1024,3071",
                  "--sigma-max=380")
    assert done.exit_code == 0, done.output
    rng = np.random.default_rng(0)
    v = rng.uniform(-1024, 1500, (2, 1, 24, 24)).astype(np.float32)
    (tmp_path / "slices").mkdir()
    for k in (0, 1):
        np.save(tmp_path / f"slices/{k}.npy", v[k])
    make(invoke, tmp_path, tmp_path / "out", f"--cond-image={tmp_path / 'slices'}",
         "--init-image=cond", "--init-noise=0", "--steps=8", f"--last={h}", "--blend=0.7", *flags)
    t = torch.tensor([(380 ** (1 / 7) + i / 7 * (0.002 ** (1 / 7) - 380 ** (1 / 7))) ** 7
                      for i in range(8)], dtype=torch.float64)
    net, measured = nets[1].eval(), (torch.from_numpy(v).double() + 1024) / 4095 * 2 - 1

    def denoised(x, sigma):
        with torch.no_grad():
            return net(torch.cat([measured, x], dim=1).float(), sigma.float()[None]).double()

    x = measured
    for i in range(h):
        now, after = t[7 - h + i], t[8 - h + i]
        d = (x - denoised(x, now)) / now
        moved = x + (after - now) * d
        if i < h - 1:
            d_after = (moved - denoised(moved, now)) / after
            moved = x + (after - now) * (d + d_after) / 2
        x = 0.7 * moved + 0.3 * measured
    expected = (x.numpy() + 1) / 2 * 4095 - 1024
    found = np.stack([np.load(tmp_path / f"out/{k}.npy") for k in (0, 1)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - v).max() > 50


@pytest.fixture
def paired(root, tmp_path):
    """A data set of pairs in HU: truths, and measurements under cond/."""
    for k, (name, array) in enumerate(zip(NAMES, stored(root, "equal"), strict=True)):
        for folder, values in (("pairs", array), ("pairs/cond", array + 100 * (k + 1))):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / folder / name, values)
    return tmp_path / "pairs"


def test_restored_truths_do_not_pass_for_restored_measurements(paired, root, tmp_path, invoke):
    make(invoke, root, tmp_path / "out", f"--init-image={paired}", *ONE_STEP)
    text = make(invoke, root, tmp_path / "out", "--init-image=cond", f"--cond-image={paired}",
                *ONE_STEP, code=1)
    assert "images made with another setting (init_of: None there, conditions now)" in text


def test_images_to_start_from_are_partners_of_the_condition_images(root, tmp_path, invoke):
    def folder(name, stems, size=(8, 8)):
        (tmp_path / name).mkdir()
        for k, stem in enumerate(stems):
            np.save(tmp_path / name / f"{stem}.npy", np.full((1, *size), 100 * k, np.float32))
        return tmp_path / name

    three, four = folder("three", "abc"), folder("four", "abcd")
    shifted, other = folder("shifted", "bcde"), folder("other", "wxyz")
    # By letters their orders differ: those with accents are one here and two there.
    accents, apart = (folder(form, [unicodedata.normalize(form, f"{letter}x") for letter in "éüöŽ"])
                      for form in ("NFC", "NFD"))
    one, large = folder("one", "q"), folder("large", "abcd", (8, 12))
    for k, (inits, code, words) in enumerate([
            (three, 2, "has 3 images, but --cond-image has 4"),
            (shifted, 2, "has no image of the same name"),
            (large, 2, "would be 12x8, but its condition image is 8x8"),
            (other, 0, "4 images made"), (four, 0, "4 images made"), (one, 0, "4 images made"),
            (accents, 2, "has no image of the same name")]):
        conditions = apart if inits is accents else four
        text = make(invoke, root, tmp_path / f"out{k}", f"--init-image={inits}",
                    f"--cond-image={conditions}", "--init-level=60", "--steps=2", "--average=2",
                    network="cond", code=code)
        assert words in text
        assert (tmp_path / f"out{k}").exists() == (code == 0)
    assert sorted(p.name for p in (tmp_path / "out5").glob("*.npy")) == [
        "a.npy", "b.npy", "c.npy", "d.npy"]


def test_an_error_leaves_nothing_behind_that_refuses_the_next_command(root, tmp_path, invoke,
                                                                      monkeypatch):
    args = [f"--init-image={root / 'equal'}", *ONE_STEP]
    monkeypatch.setattr(NetworkSampler, "images", lambda *args, **how: 1 / 0)
    result = invoke(generate.main, f"--network={root / 'net.pt'}", f"--outdir={tmp_path / 'o'}",
                    *args)
    assert isinstance(result.exception, ZeroDivisionError) and not (tmp_path / "o").exists()
    monkeypatch.undo()
    make(invoke, root, tmp_path / "o", *args)
    monkeypatch.setattr(NetworkSampler, "images", lambda *args, **how: 1 / 0)
    (tmp_path / "o" / NAMES[0]).unlink()
    invoke(generate.main, f"--network={root / 'net.pt'}", f"--outdir={tmp_path / 'o'}", *args)
    assert (tmp_path / "o/generate.json").exists() and (tmp_path / "o" / NAMES[2]).exists()


def test_images_do_not_go_into_the_folder_of_their_inputs(root, tmp_path, invoke):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/x.npy", np.zeros((1, 8, 8), np.float32))
    for out in ("in", "in/out"):
        text = make(invoke, root, tmp_path / out, f"--init-image={tmp_path / 'in'}", *ONE_STEP,
                    code=1)
        assert "lies inside" in text and not list(tmp_path.rglob("generate.json"))


@pytest.mark.parametrize("kind", ["1", "P", "L", "LA", "RGB", "I;16", "bool", "uint8", "HWC"])
def test_a_mask_may_be_any_picture_or_array(kind, root, tmp_path):
    known = np.zeros((8, 8), bool)
    known[:, :5] = True
    white = PIL.Image.fromarray(np.uint8(known) * 255)
    path = tmp_path / ("mask.npy" if kind in ("bool", "uint8", "HWC") else "mask.png")
    if kind == "I;16":
        PIL.Image.fromarray(np.uint16(known) * 4000).save(path)
    elif kind == "P":  # whose first colour is white
        picture = PIL.Image.fromarray(np.uint8(~known), "P")
        picture.putpalette([255, 255, 255, 0, 0, 0])
        picture.save(path)
    elif path.suffix == ".png":
        white.convert(kind).save(path)
    else:
        np.save(path, {"bool": known, "uint8": np.uint8(known), "HWC": known[..., None]}[kind])
    sampler = NetworkSampler.open(str(root / "net.pt"), CPU, init_image=str(root / "equal"),
                                  measure=f"inpaint:{path}", measure_sigma=0.1)
    np.testing.assert_array_equal(sampler.measurement.mask, known[None])


def test_a_low_start_with_pixels_that_were_not_measured_is_told(root, tmp_path, capsys):
    np.save(tmp_path / "mask.npy", np.eye(8) > 0)
    given = {"init_image": str(root / "equal"), "measure": f"inpaint:{tmp_path / 'mask.npy'}",
             "measure_sigma": 0.0}
    for start, is_told in (({}, False), ({"init_sigma": 2.0}, False), ({"init_sigma": 0.1}, True)):
        NetworkSampler.open(str(root / "net.pt"), CPU, **given, **start)
        assert ("too low to restore pixels" in capsys.readouterr().err) == is_told


def test_interpolated_latents_need_conditions_of_their_size(root, tmp_path, invoke):
    text = make(invoke, root, tmp_path / "out", "--interpolate=0,1", "--frames=3", "--steps=2",
                f"--cond-image={root / 'noisy'}", network="cond", code=1)
    assert "latents are 8x8 like the network; give images of that size" in text
    assert not (tmp_path / "out").exists()
    make(invoke, root, tmp_path / "out", "--interpolate=0,1", "--frames=3", "--steps=2",
         f"--cond-image={root / 'equal'}", network="cond")


def test_one_image_that_is_enlarged_goes_with_all_conditions(root, tmp_path):
    for folder, count, size in (("one", 1, (4, 4)), ("conds", 3, (8, 8))):
        (tmp_path / folder).mkdir()
        for k in range(count):
            np.save(tmp_path / folder / f"{k}.npy", np.full((1, *size), 90 * k, np.float32))
    sampler = NetworkSampler.open(
        str(root / "cond.pt"), CPU, cond_image=str(tmp_path / "conds"), num_steps=2,
        init_image=str(tmp_path / "one"), measure="downsample:2", measure_sigma=0.1,
        measure_by="projection")
    assert sampler.image_shape == (1, 8, 8) and len(sampler.inputs) == 3
    [batch] = sampler.images(sampler.batches(range(3), 3))
    assert batch.images.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("factor, size", [(1, (7, 9)), (3, (3, 5)), (2, (4, 4))])
def test_frames_of_the_way_lie_where_the_images_do(factor, size, root, tmp_path):
    np.save(tmp_path / "x.npy", np.full((1, *size), 500, np.float32))
    given = {"measure": f"downsample:{factor}", "measure_sigma": 0.0,
             "measure_by": "projection"} if factor > 1 else {}
    sampler = NetworkSampler.open(str(root / "net.pt"), CPU, init_image=str(tmp_path),
                                  init_sigma=0.3, num_steps=2, init_noise=0.0, **given)
    places = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0)) - 0.5
    moved = dataclasses.replace(sampler, inits=lambda seeds: places)
    first, *_ = trajectory(sampler.net, [0], **moved._how())
    start = places.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    expected = start * 0.5 / (0.3**2 + 0.5**2) ** 0.5 * 127.5 + 128
    assert torch.equal(first, expected.clip(0, 255).to(torch.uint8))


def test_a_mask_of_numbers_that_are_not_finite_is_refused(root, tmp_path, invoke):
    np.save(tmp_path / "mask.npy", np.where(np.eye(8) > 0, 1, np.nan))
    text = make(invoke, root, tmp_path / "out", f"--init-image={root / 'equal'}",
                f"--measure=inpaint:{tmp_path / 'mask.npy'}", "--measure-sigma=0", code=1)
    assert "mask.npy" in text and "give 0 where nothing is measured" in text


def test_samples_of_a_mean_are_made_in_batches_of_samples(root, monkeypatch):
    """A batch of 6 samples is of two means of three; one mean of four is made in two parts."""
    sizes = []

    def opened(average):
        sampler = NetworkSampler.open(str(root / "net.pt"), CPU, init_image=str(root / "equal"),
                                      init_level=2000.0, num_steps=1, average=average)
        forward = sampler.net.forward
        monkeypatch.setattr(sampler.net, "forward", lambda x, *args, **how: (
            sizes.append(len(x)), forward(x, *args, **how))[1])
        return sampler

    three = opened(3)
    assert three.batches(range(4), 6) == [[0, 1], [2, 3]]
    found = torch.cat([batch.images for batch in three.images(three.batches(range(4), 6), 6)])
    assert sizes == [6, 6]
    sizes.clear()
    one_by_one = torch.cat([batch.images for batch in three.images([[k] for k in range(4)])])
    assert sizes == [1] * 12
    torch.testing.assert_close(found, one_by_one, rtol=0, atol=1e-5)
    sizes.clear()
    four = opened(4)
    assert four.batches(range(2), 2) == [[0], [1]]
    list(four.images([[0]], 2))
    assert sizes == [2, 2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_images_of_several_sizes_are_dealt_to_all_processes(root, monkeypatch, world):
    from torch_utils import distributed
    sampler = NetworkSampler.open(str(root / "net.pt"), CPU, init_image=str(root / "noisy"),
                                  init_level=60.0)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        found.append(sampler.batches(range(12), 64))
    counts = [sum(map(len, own)) for own in found]
    assert sorted(k for own in found for batch in own for k in batch) == list(range(12))
    assert max(counts) - min(counts) <= 3
    for batch in (batch for own in found for batch in own):
        assert len({sampler.shape_of(k) for k in batch}) == 1


@pytest.mark.parametrize("args, words", [
    (["--init-level=3"], "--init-level: starts at sigma 0.001465, which is 3 in the data's units, "
     "below the lowest level, sigma 0.002, which is 4.095 in the data's units; give a smaller "
     "--sigma_min, or --steps=1"),
    (["--init-sigma=0.001"], "--init-sigma: starts at sigma 0.001, "),
])
def test_a_start_below_the_lowest_level_is_refused_with_a_way_out(args, words, root, tmp_path,
                                                                  invoke):
    given = [f"--init-image={root / 'equal'}", *args]
    assert words in make(invoke, root, tmp_path / "out", *given, "--steps=3", code=2)
    for more in ("--steps=1", "--sigma_min=0.0001"):
        make(invoke, root, tmp_path / more, *given, "--steps=1", more)


@pytest.mark.parametrize("start, is_at_measurement", [
    ({"sigmas": (10.0, 1.0, 0.1)}, False), ({}, False), ({"init_sigma": 10.0}, True),
    ({"last": 2}, True)])
def test_sampling_begins_at_a_measurement_only_where_a_flag_says_so(start, is_at_measurement, root):
    given = {"measure": "denoise", "measure_sigma": 0.01, "measure_by": "projection",
             "num_steps": 3, **start}
    sampler = NetworkSampler.open(str(root / "net.pt"), CPU, init_image=str(root / "equal"),
                                  **given)
    assert sampler.measurement.starts == is_at_measurement


def test_what_a_killed_run_has_left_in_subfolders_is_removed(root, tmp_path, invoke):
    args = [f"--init-image={root / 'noisy'}", "--init-level=60", "--steps=1", "--average=2"]
    make(invoke, root, tmp_path / "out", *args)
    left = [temporary_name(tmp_path / "out" / place / "x.npy")
            for place in ("", "a", "std", "std/a")]
    for path in left:
        path.write_bytes(b"")
    make(invoke, root, tmp_path / "out", *args)
    assert not [path for path in left if path.exists()]


def test_a_network_whose_images_are_means_is_scored_over_its_inputs(root, tmp_path, invoke):
    (tmp_path / "reference").mkdir()
    for k in range(12):
        np.save(tmp_path / "reference" / f"{k}.npy", np.full((1, 8, 8), 90 * k, np.float32))
    assert invoke(dataset_tool.main, f"--source={tmp_path / 'reference'}",
                  f"--dest={tmp_path / 'ref.zip'}", "--scale=-1024,3071").exit_code == 0
    args = ["gen", f"--network={root / 'net.pt'}", f"--init-image={root / 'equal'}",
            "--init-level=60", "--steps=1", "--average=2", f"--ref={tmp_path / 'ref.zip'}",
            "--detector=pixels", f"--out={tmp_path / 'm.jsonl'}", "--device=cpu", "--workers=0"]
    result = invoke(fid.main, *args)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0])["seeds"] == "0-3"
    result = invoke(fid.main, *args, "--seeds=0-9")
    assert result.exit_code == 2 and "name seeds below 4" in result.output
