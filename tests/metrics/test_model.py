"""`pfgmpp.load`: what it gives is what the scripts write, from files or from memory."""

import csv
import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from scripts import ROOT
from snapshots import write_few_step, write_snapshot
from tiny import write_dataset

import fid
import generate
import likelihood
from images.dataset import ImageFolderDataset
from images.scaling import Scaling
from pfgmpp import Model, PerturbationKernel, load
from sampling.latents import read_latents

HU = Scaling((1023.5,), (2047.5,))
CPU = "--device=cpu"
PIXELS = np.zeros([1, 3, 8, 8], np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    (root / "run").mkdir()
    write_snapshot(root / "run/network-snapshot-000010.pt", pfgmpp=True, aug_dim=2.5,
                   dataset={"class_names": ["dark", "bright"]})
    write_snapshot(root / "hu.pt", label_dim=0, shape=(1, 8, 8), cond_channels=1,
                   dataset={"scale": HU.to_dict(), "cond_scale": HU.to_dict()})
    write_few_step(root / "few.pt", levels=(80.0, 0.8), label_dim=0)
    write_dataset(root / "real.zip", num=12)
    rng = np.random.default_rng(0)
    (root / "hu").mkdir()
    for i in range(3):
        np.save(root / f"hu/{i}.npy", rng.normal(0, 300, [1, 8, 8]).astype(np.float32))
    mask = np.zeros([8, 8], np.uint8)
    mask[:, 3:] = 255
    PIL.Image.fromarray(mask).save(root / "mask.png")
    return root


@pytest.fixture(scope="module")
def model(root):
    return load(root / "run", device="cpu")


@pytest.fixture(scope="module")
def real(root):
    """The data set in memory: pictures and class numbers."""
    dataset = ImageFolderDataset(root / "real.zip", use_labels=True)
    images = dataset.get_batch(range(len(dataset)))[0].transpose(0, 2, 3, 1)
    return list(map(PIL.Image.fromarray, images)), dataset.class_numbers


def written(invoke, out, network, *args):
    """Returns what generate.py writes, [B, C, H, W]."""
    result = invoke(generate.main, f"--network={network}", f"--outdir={out}", CPU, *args)
    assert result.exit_code == 0, result.output
    [record] = out.rglob("generate.json")  # lists of --alpha and --bits have folders of their own
    dataset = ImageFolderDataset(record.parent, use_labels=True)
    images, labels = dataset.get_batch(range(len(dataset)))[:2]
    return images, labels


# ------------------------------------------------------------------------------------- the network


def test_a_network_tells_what_it_is(model, root):
    assert isinstance(model, Model)
    assert (model.D, model.image_shape, model.num_classes) == (2.5, (3, 8, 8), 2)
    assert (model.class_names, model.sigma_data, model.is_few_step) == (("dark", "bright"), 0.5,
                                                                       False)
    assert isinstance(model.kernel, PerturbationKernel) and model.kernel.D == 2.5
    assert repr(model) == (f"Model({root}/run/network-snapshot-000010.pt: denoiser, D = 2.5, "
                           "3x8x8, 2 classes, 0 kimg, on cpu)")
    few = load(root / "few.pt", torch.device("cpu"))
    assert (few.D, few.is_few_step, few.num_classes) == (math.inf, True, 0)
    assert "few steps (cd)" in repr(few)
    denoised = model.net(torch.zeros(2, 3, 8, 8), sigma=1.0, class_labels=torch.eye(2))
    assert denoised.shape == (2, 3, 8, 8)


# ------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("flags, options", [
    (["--steps=3"], {"steps": 3}),
    (["--steps=4", "--solver=ipndm", "--order=2", "--class=1"],
     {"steps": 4, "solver": "ipndm", "order": 2, "class_idx": 1}),
    (["--steps=3", "--S_churn=40", "--alpha=0.1", "--disc=iddpm", "--guidance=1.5"],
     {"steps": 3, "S_churn": 40, "alpha": 0.1, "disc": "iddpm", "guidance": 1.5}),
    (["--sigmas=20,1", "--bits=5"], {"sigmas": [20, 1], "bits": 5})])
def test_samples_are_the_images_of_generate(model, root, tmp_path, invoke, flags, options):
    images, labels = written(invoke, tmp_path, root / "run", "--seeds=3-8", *flags)
    samples = model.sample(range(3, 9), **options)
    assert samples.data().dtype == torch.uint8 and np.array_equal(samples.data(), images)
    assert list(samples.classes) == labels.argmax(1).tolist()
    assert [np.asarray(picture).tolist() for picture in samples.pil()] == \
        images.transpose(0, 2, 3, 1).tolist()
    assert np.array_equal(samples.images.clamp(-1, 1).mul(127.5).add(128).clip(0, 255).to(
        torch.uint8), images)


def test_rounded_weights_do_not_stay(model):
    before = model.sample(2, steps=2)
    assert not model.sample(2, steps=2, bits=3).images.equal(before.images)
    assert model.sample(2, steps=2).images.equal(before.images)


def test_seeds_are_a_number_or_numbers(model):
    first = model.sample(3, steps=2)
    assert first.seeds == (0, 1, 2) and len(model.sample(steps=1)) == 16
    for seeds in (range(3), [0, 1, 2], torch.arange(3), np.arange(3), iter([0, 1, 2])):
        assert model.sample(seeds, steps=2).images.equal(first.images)
    part = model.sample([2, 0], steps=2)
    torch.testing.assert_close(part.images, first.images[[2, 0]], rtol=1e-4, atol=1e-4)
    small = model.sample(3, steps=2, batch=2)
    torch.testing.assert_close(small.images, first.images, rtol=1e-4, atol=1e-4)


def test_labels_of_seeds_may_be_in_memory(model):
    one_hot = model.sample(3, steps=2, labels=torch.tensor([[0., 1], [1, 0], [0, 1]]))
    numbers = model.sample(3, steps=2, labels=[1, 0, 1])
    assert one_hot.images.equal(numbers.images) and numbers.classes == (1, 0, 1)
    bright = model.sample([0, 2], steps=2, class_idx=1)
    torch.testing.assert_close(numbers.images[[0, 2]], bright.images, rtol=1e-4, atol=1e-4)


def test_a_class_is_any_whole_number_or_a_name(model, root, tmp_path, invoke):
    asked = model.sample(2, steps=2, class_idx=1)
    assert asked.classes == (1, 1)
    for same in ("bright", np.int64(1), torch.tensor(1)):
        assert model.sample(2, steps=2, class_idx=same).images.equal(asked.images)
    images, labels = written(invoke, tmp_path, root / "run", "--seeds=0-1", "--steps=2",
                             "--class=bright")
    assert np.array_equal(images, asked.uint8().numpy()) and np.argmax(labels, 1).tolist() == [1, 1]
    assert json.loads((tmp_path / "generate.json").read_text())["class"] == 1


def test_a_few_step_network_takes_its_own_levels(root, tmp_path, invoke):
    images, _ = written(invoke, tmp_path, root / "few.pt", "--seeds=0-2")
    samples = load(root / "few.pt", "cpu").sample(3)
    assert np.array_equal(samples.data(), images) and samples.labels is None


def test_other_data_come_in_their_units_and_a_window_shows_them(root, tmp_path, invoke):
    flags = ["--seeds=0-4", "--steps=2", f"--cond-image={root / 'hu'}"]
    images, _ = written(invoke, tmp_path, root / "hu.pt", *flags)
    model = load(root / "hu.pt", "cpu")
    conditions = np.stack([np.load(root / f"hu/{i}.npy") for i in range(3)])
    for given in (root / "hu", conditions, torch.from_numpy(conditions)):
        samples = model.sample(5, steps=2, cond_image=given)
        assert np.array_equal(samples.data(), images) and samples.data().dtype == torch.float32
    torch.testing.assert_close(samples.images * 2047.5 + 1023.5, samples.data().double(),
                               rtol=1e-6, atol=1e-3)
    shown = (np.clip((images - 40) / 200, -1, 1) * 127.5 + 128).clip(0, 255).astype(np.uint8)
    window = samples.uint8(window=(40, 400)).numpy()
    assert np.abs(window.astype(int) - shown).max() <= 1  # at the edge of two levels
    assert [picture.mode for picture in samples.pil()] == ["L"] * 5
    assert np.array_equal(samples.pil((40, 400))[2], window[2, 0])


def test_a_notebook_shows_the_first_images_with_their_classes(model):
    samples = model.sample(4, steps=1)
    assert samples._repr_png_().startswith(b"\x89PNG") and samples.grid().mode == "RGB"
    part = samples[1:3]
    assert part.seeds == (1, 2) and part.classes == samples.classes[1:3] and len(part) == 2
    assert part.images.equal(samples.images[1:3]) and part.labels.equal(samples.labels[1:3])
    with pytest.raises(TypeError, match="must be a slice"):
        samples[0]
    assert samples[9:]._repr_png_() is None and samples[9:].pil() == []


# ------------------------------------------------------------------- latents, restoration


@pytest.mark.long
def test_latents_are_those_of_generate_and_lead_back(model, root, real, tmp_path, invoke):
    result = invoke(generate.main, f"--network={root / 'run'}", f"--outdir={tmp_path}", CPU,
                    "--steps=6", f"--encode={root / 'real.zip'}")
    assert result.exit_code == 0, result.output
    expected = read_latents(tmp_path / "latents.npz", (3, 8, 8)).latents
    images, classes = real
    for latents in (model.encode(root / "real.zip", 6), model.encode(images, 6, labels=classes)):
        assert latents.latents.equal(expected)
        assert latents.labels.argmax(1).tolist() == classes.tolist()
    small = model.encode(images, 6, labels=classes, batch=5).latents
    torch.testing.assert_close(small, expected, rtol=1e-3, atol=1e-3)
    drawn = model.sample(3, steps=6)
    again = model.sample(latents=model.encode(drawn.images, 6, labels=drawn.labels), steps=6)
    assert again.seeds == (0, 1, 2) and again.classes == drawn.classes
    few = model.sample(latents=model.encode(drawn.images, 3, labels=drawn.labels), steps=3)
    def error(samples):
        return (samples.images - drawn.images).abs().mean()
    assert error(again) < error(few)
    more = model.sample(latents=model.encode(drawn.images, 40, labels=drawn.labels), steps=40)
    assert error(more) < error(again)


@pytest.mark.parametrize("flags, options", [
    (["--init-noise=0", "--init-level=60"], {"level": 60}),
    (["--init-noise=0", "--init-sigma=0.5"], {"sigma": 0.5}),
    (["--init-noise=0.5", "--init-sigma=0.5"], {"sigma": 0.5, "init_noise": 0.5}),
    (["--init-noise=0", "--last=1", "--blend=0.7"], {"last": 1, "blend": 0.7}),
    (["--measure=inpaint:MASK", "--measure-level=2", "--measure-by=projection"],
     {"measure": "inpaint", "mask": True, "level": 2, "measure_by": "projection"}),
    (["--measure=downsample:2", "--measure-sigma=0.1"], {"measure": "downsample:2", "sigma": 0.1})])
def test_restored_images_are_those_of_generate(model, root, real, tmp_path, invoke, flags, options):
    mask = np.asarray(PIL.Image.open(root / "mask.png"))
    masks = [str(root / "mask.png"), mask, torch.from_numpy(mask.astype(bool)),
             PIL.Image.fromarray(mask)] if options.pop("mask", False) else [None]
    flags = [flag.replace("MASK", str(root / "mask.png")) for flag in flags]
    images, _ = written(invoke, tmp_path, root / "run", "--steps=3", "--class=1",
                        f"--init-image={root / 'real.zip'}", *flags)
    for given, chosen in [*((real[0], mask) for mask in masks), (root / "real.zip", masks[0])]:
        restored = model.restore(given, steps=3, class_idx=1, mask=chosen, **options)
        assert np.array_equal(restored.data(), images)


def test_floats_are_what_an_8bit_network_sees_and_noise_is_not_cut_off(model, capsys):
    pixels = np.random.default_rng(1).integers(0, 256, [2, 3, 8, 8], np.uint8)
    seen = pixels.astype(np.float32) / 127.5 - 1
    how = {"sigma": 0.5, "steps": 2, "class_idx": 0}
    same = model.restore(seen, **how).images
    assert same.equal(model.restore(pixels, **how).images)
    assert not model.restore(seen * 3, **how).images.equal(
        model.restore(np.clip(seen * 3, -1, 1), **how).images)
    assert capsys.readouterr().err == ""
    model.restore(pixels / 255, **how)
    assert "all values are between 0 and 1" in capsys.readouterr().err
    model.restore(pixels * 1.0, **how)
    assert "check the units" in capsys.readouterr().err


def test_samples_are_images_for_every_method(model):
    samples = model.sample(2, steps=2)
    how = {"sigma": 0.5, "steps": 2, "class_idx": 0}
    assert model.restore(samples, **how).images.equal(model.restore(samples.data(), **how).images)


# ------------------------------------------------------------------------------ likelihoods, scores


@pytest.mark.long
def test_likelihoods_are_those_of_the_script(model, root, real, tmp_path, invoke):
    result = invoke(likelihood.main, f"--network={root / 'run'}", f"--data={root / 'real.zip'}",
                    CPU, "--steps=2", "--probes=2", "--count=12", f"--out={tmp_path / 'out.jsonl'}")
    assert result.exit_code == 0, result.output
    [table] = tmp_path.glob("*.csv")
    with open(table, newline="") as file:
        expected = [float(row["bits_per_dim"]) for row in csv.DictReader(file)]
    record = json.loads((tmp_path / "out.jsonl").read_text())
    for found in (model.likelihood(root / "real.zip", steps=2, probes=2),
                  model.likelihood(real[0], real[1], steps=2, probes=2)):
        assert found.values == expected and found.unit == "bits/dim"
        assert (found.mean, found.stderr, found.width) == (
            record["value"], record["stderr"], record["bin_width"])
    part = model.likelihood(real[0], real[1], count=3, steps=2, probes=2, seed=5)
    assert len(part.values) == 3
    first = model.likelihood(real[0][:5], real[1][:5], steps=2, probes=2)
    np.testing.assert_allclose(first.values, expected[:5], rtol=1e-3)


def test_scores_are_those_of_fid_gen(model, root, real, tmp_path):
    args = [f"--network={root / 'run'}", f"--ref={root / 'real.zip'}", "--seeds=4-11", "--steps=2",
            "--detector=pixels:2", "--metrics=fid,kid", CPU, "--workers=0"]
    fid.main(["gen", *args, f"--out={tmp_path / 'out.jsonl'}"], standalone_mode=False)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    how = {"seeds": range(4, 12), "steps": 2, "detector": "pixels:2", "metrics": "fid,kid"}
    found = model.score(root / "real.zip", **how)
    assert {line["metric"]: line["value"] for line in lines} == found
    assert model.score(real[0], **how) == pytest.approx(found)
    own = model.sample(range(4, 12), steps=2)
    [distance] = model.score(own, **how | {"metrics": ["fid"]}).values()
    assert distance == pytest.approx(0, abs=1e-3)


def test_arrays_in_the_units_of_the_data_are_measured_as_in_a_data_set(tmp_path):
    """Digits have values 0 to 16, whose scale their dataset.json records."""
    digits = ImageFolderDataset(ROOT / "examples/digits8.zip", use_labels=True)
    images, labels = digits.get_batch(range(6))[0], digits.class_numbers[:6].tolist()
    for i, image in enumerate(images):
        np.save(tmp_path / f"{i}.npy", image)
    (tmp_path / "dataset.json").write_text(json.dumps({
        "labels": [[f"{i}.npy", label] for i, label in enumerate(labels)],
        "scale": digits.scale}))
    model = load(ROOT / "examples/digits8-8.pt", device="cpu")
    of_files = model.likelihood(tmp_path, count=6, steps=2)
    in_memory = model.likelihood(images, labels, steps=2)
    assert of_files.unit == in_memory.unit == "bits/dim"
    np.testing.assert_allclose(in_memory.mean, of_files.mean, rtol=0.1)  # noise goes by the name
    how = {"seeds": 8, "steps": 2, "detector": "pixels"}
    assert model.score(images, **how) == pytest.approx(model.score(tmp_path, **how), rel=1e-5)
    samples = model.sample(4, steps=2, class_idx=1)
    assert model.likelihood(samples, labels=[1] * 4, steps=2).unit == "nats/dim"
    assert model.score(samples, **how)["frechet_distance"] > 0


def test_class_accuracy_asks_for_the_classes_of_the_seeds(model, tmp_path):
    judge = ROOT / "examples/digits8-judge.npz"
    network = write_snapshot(tmp_path / "digits.pt", label_dim=10, shape=(1, 8, 8), seed=1,
                             dataset={"scale": {"center": [8.0], "spread": [8.0]}})
    how = {"seeds": range(7, 27), "steps": 2, "metrics": "ca", "detector": str(judge)}
    fid.main(["gen", f"--network={network}", "--seeds=7-26", "--steps=2", "--metrics=ca", CPU,
              f"--detector={judge}"], standalone_mode=False)
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert load(network, "cpu").score(**how) == {"class_accuracy": line["value"]}
    assert 0 < line["value"] < 1
    with pytest.raises(ValueError, match="images are 3x8x8|channel"):
        model.score(**how)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("call, words", [
    (lambda m: m.sample(steps=0), r"--steps=0: must be at least 1"),
    (lambda m: m.sample(S_churn=-1), "^--S_churn=-1: must be 0 or more$"),
    (lambda m: m.sample(alpha=-1), "^--alpha=-1: must be 0 or more$"),
    (lambda m: m.sample(alpha=math.nan), "^--alpha=nan: must be 0 or more$"),
    (lambda m: m.sample(sigma_min=-1), "^--sigma_min=-1: must be positive$"),
    (lambda m: m.sample(sigma_max=0), "^--sigma_max=0: must be positive$"),
    (lambda m: m.sample(disc="bad"), "--disc=bad: must be one of vp, ve, iddpm, edm"),
    (lambda m: m.sample(schedule="bad"), "--schedule=bad: must be one of vp, ve, linear"),
    (lambda m: m.sample(scaling="bad"), "--scaling=bad: must be one of vp, none"),
    *((lambda m, given=given: m.sample(guidance=2, guidance_interval=given),
       "guidance interval .*: must be two numbers") for given in (3, "a", (1,), ("a", "b"))),
    (lambda m: m.sample(2**70), "there are only 4294967296 seeds; give fewer"),
    (lambda m: m.sample([0, -1]), "seeds: -1 is not a seed; must be 0 to 4294967295"),
    (lambda m: m.sample([2**32]), "seeds: 4294967296 is not a seed; must be 0 to 4294967295"),
    (lambda m: m.sample([]), r"seeds=\[\]: there are no seeds"),
    (lambda m: m.sample(0), "seeds=0: there are no seeds; give a number of images, 1 or more"),
    (lambda m: m.sample(2, batch=0), "batch=0: must be 1 or more"),
    (lambda m: m.sample(class_idx=2), "--class=2: must be between 0 and 1"),
    *((lambda m, given=given: m.sample(class_idx=given), "must be a class number from 0 to 1, "
       "uniform or data, or a name: dark, bright; --labels takes one class for each seed")
      for given in ("brigth", [0, 1], 1.0, True, np.array([0, 1]))),
    (lambda m: m.sample(labels=[0, 2]), "labels: class numbers are 0 to 2; the network"),
    (lambda m: m.sample(labels=["a"]), r"labels: must be class numbers \[n\] or vectors"),
    (lambda m: m.sample(labels=torch.tensor([0, 1]), class_idx=1),
     r"--class=1 with --labels=\[0, 1\]: give one of them"),
    (lambda m: m.restore(np.zeros([1, 1, 8, 8]), sigma=1), "--init-image=given images: images are "
     "of 1 channel, but the network takes 3"),
    (lambda m: m.restore(np.zeros([1, 3, 8, 8])), "needs the level at which to start"),
    (lambda m: m.restore([np.zeros([3, 8, 8]), np.zeros([3, 8, 9])], sigma=1),
     "images are of 2 sizes"),
    (lambda m: m.restore(np.zeros([1, 3, 8, 8]), sigma=1, mask=np.ones([8, 8])),
     "mask: needs measure='inpaint', but measure is None"),
    (lambda m: m.restore(np.zeros([1, 3, 8, 8]), sigma=1, measure="inpaint", mask=np.zeros([8, 8])),
     "no pixel is measured; a mask must be white where pixels are known"),
    (lambda m: m.restore(np.zeros([1, 3, 8, 8]), sigma=1, measure="inpaint", mask=np.ones([4, 8])),
     "the mask is 8x4, but images of --init-image=given images are 8x8"),
    (lambda m: m.restore(PIXELS, sigma=-1), "--init-sigma=-1: must be positive"),
    (lambda m: m.restore(PIXELS, level=0), "--init-level=0: must be positive"),
    (lambda m: m.restore(PIXELS, measure="denoise", level=-1), "--measure-level=-1: must be 0 or"),
    (lambda m: m.restore(PIXELS, measure="denoise", sigma=0, measure_by="bad"),
     "--measure-by=bad: must be one of guidance, projection"),
    (lambda m: m.restore(PIXELS, measure=3, sigma=0), "--measure=3: must be denoise, inpaint"),
    *((call, "images=None: must be the path of a data set, pictures, arrays") for call in (
        lambda m: m.restore(None, sigma=1), lambda m: m.encode(None),
        lambda m: m.likelihood(None))),
    (lambda m: m.encode(np.zeros([1, 3, 9, 8]), labels=[0]), "images are 3x9x8"),
    (lambda m: m.encode(np.zeros([1, 3, 8, 8])), "--encode=given images: has no labels"),
    (lambda m: m.sample(latents=m.encode(np.zeros([1, 3, 8, 8]), labels=[0]), labels=[[1, 2, 3]]),
     r"labels have shape \[1, 3\]"),
    (lambda m: m.likelihood(np.zeros([1, 3, 8, 8]), [0]), "--data=given images: images are "
     "floating-point or 16-bit, but the network was trained on 8-bit"),
    (lambda m: m.likelihood(np.zeros([1, 3, 8, 8], np.uint8)), "given images: has no labels"),
    (lambda m: m.likelihood("nowhere.zip", [0]), "a data set has its labels in dataset.json"),
    (lambda m: m.likelihood(PIXELS, [0], seed=-1), "seed=-1: must be 0 or more"),
    (lambda m: m.likelihood(PIXELS, [0], count=0), "count=0: must be 1 or more"),
    (lambda m: m.score(metrics=3), "metrics=3: must be among fid, kid"),
    *((lambda m, given=given: m.sample(1, steps=1).grid(given),
       "window=.*: must be two numbers, a center and a width above 0")
      for given in (3, (0, 0), (1, -2), (1, 2, 3), ("a", 1), (math.nan, 1))),
    (lambda m: m.sample(1, steps=1)[9:].grid(), "there are no images to show; give a slice"),
    (lambda m: m.score(), "ref: fid needs a reference; give"),
    (lambda m: m.score(metrics="fix"), "metrics=fix: must be among fid, kid"),
    (lambda m: m.score("nowhere.zip", seeds=1), "1 image, at least 2 needed"),
    (lambda m: m.score("nowhere.zip", seeds=2, detector="pixels"), "nowhere.zip")])
def test_a_mistake_is_one_line(model, call, words):
    with pytest.raises((ValueError, OSError), match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call, words", [
    (lambda m: m.sample(step=3), "sample() has no option 'step'; did you mean 'steps'?"),
    (lambda m: m.restore(PIXELS, factor=3), "restore() has no option 'factor'"),
    (lambda m: m.encode(PIXELS, factor=3), "encode() has no option 'factor'"),
    (lambda m: m.score("a.zip", nums=3), "score() has no option 'nums'; did you mean 'num_steps'?"),
    (lambda m: m.likelihood(PIXELS, class_idx=1),
     "likelihood() has no option 'class_idx'; give labels, one for each image"),
    (lambda m: m.sample(xyz=3), "sample() has no option 'xyz'"),
    (lambda m: m.sample(steps=3, num_steps=4),
     "steps and num_steps mean the same; give one of them"),
    (lambda m: m.sample("0-3"), "seeds='0-3': must be a number of images or whole numbers, such as "
     "range(16)"),
    (lambda m: m.sample(1.5), "seeds=1.5: must be a number of images or whole numbers, such as "
     "range(16)"),
    (lambda m: m.sample(precision="bf16"), "sample() takes no 'precision'; give it to pfgmpp.load"),
    (lambda m: m.likelihood("a.zip", probe=3),
     "likelihood() has no option 'probe'; did you mean 'probes'?")])
def test_an_option_that_there_is_not_is_named(model, call, words):
    with pytest.raises(TypeError) as caught:
        call(model)
    assert str(caught.value) == words


@pytest.mark.parametrize("call, words", [
    *((lambda m, name=name: m.sample(1, **{name: "a"}), f"{name}='a': must be a number")
      for name in ("alpha", "S_churn", "S_noise", "sigma_min", "rho", "guidance", "init_sigma")),
    *((lambda m, name=name, given=given: m.sample(1, **{name: given}),
       f"{name}={given!r}: must be a whole number")
      for name in ("steps", "batch", "bits", "order", "tile") for given in ("a", 2.5)),
    (lambda m: m.sample(1, steps=True), "steps=True: must be a whole number"),
    (lambda m: m.sample(1, alpha=torch.ones(2)), "alpha=a Tensor: must be a number"),
    (lambda m: m.sample(["a"]), "seeds=['a']: must be a number of images or whole numbers, such as "
     "range(16)"),
    (lambda m: m.restore(PIXELS, sigma="a"), "sigma='a': must be a number"),
    (lambda m: m.restore(PIXELS, level="a", measure="denoise"), "level='a': must be a number"),
    *((lambda m, name=name: m.likelihood(PIXELS, [0], **{name: 2.5}),
       f"{name}=2.5: must be a whole number")
      for name in ("steps", "batch", "count", "seed", "probes")),
    *((lambda m, name=name: m.score("a.zip", **{name: "a"}), f"{name}='a': must be a whole number")
      for name in ("batch", "workers")),
    (lambda m: m.score("a.zip", detector=3),
     "detector=3: must be a name such as 'inception', or a path"),
    (lambda m: m.sample(latents=torch.zeros(1, 3, 8, 8)), "latents=a Tensor: must be what encode() "
     "has returned, or the path of a file of latents"),
    (lambda m: m.sample(guidance=2, gnet=3),
     "gnet=3: must be a Model, or the path or address of a network"),
    (lambda _: load(None), "source=None: must be the path or address of a network"),
    (lambda _: load(3), "source=3: must be the path or address of a network"),
    (lambda _: load("a.pt", aug_dim="a"), "aug_dim='a': must be a number")])
def test_a_value_of_the_wrong_type_is_named(model, call, words):
    with pytest.raises(TypeError) as caught:
        call(model)
    assert str(caught.value) == words


def test_numbers_may_be_of_any_type(model):
    expected = model.sample(2, steps=2, alpha=0.5).images
    for number in (np.int64(2), torch.tensor(2)):
        found = model.sample(number, steps=number, batch=number, alpha=np.float32(0.5))
        assert found.images.equal(expected)
    assert model.sample(2, steps=2, alpha=torch.tensor(0.5)).images.equal(expected)


def test_what_cannot_be_loaded_is_named(root):
    for name in ("mps", "meta", "xpu"):
        with pytest.raises(ValueError, match=f"device='{name}': must be 'cpu', 'cuda', 'cuda:N'"):
            load(root / "few.pt", name)
    with pytest.raises(ValueError, match="device='gpu': must be 'cpu', 'cuda', 'cuda:N' or 'auto'"):
        load(root / "few.pt", "gpu")
    with pytest.raises(ValueError, match="device='cuda:99': there are [0-9]+ GPUs"):
        load(root / "few.pt", "cuda:99")
    with pytest.raises(ValueError, match="precision='half': must be one of fp32, tf32, bf16, fp16"):
        load(root / "few.pt", precision="half")
    with pytest.raises(FileNotFoundError, match="nowhere.pt: no such file"):
        load("nowhere.pt", "cpu")


def test_lost_images_are_named(root):
    model = load(root / "few.pt", "cpu")
    for parameter in model.net.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(ValueError, match="2 of 2 images have values that are not .*: seeds 4-5;"):
        model.sample([4, 5])
