"""Own data from conversion to samples: floats and 16 bits, any channels and shape, conditions."""

import dataclasses
import io
import json
import math
import os
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from scripts import ROOT
from tiny import TINY_RUN, write_dataset

import dataset_tool
import fid
import generate
import train
from checkpoints import checkpoint
from dnnlib.util import CACHE_DIR_ENV
from images.dataset import ImageFolderDataset
from images.scaling import EIGHT_BIT, Moments, Scaling, default_scaling, scaling_by
from metrics.references import load_reference
from sampling.network_sampler import NetworkSampler
from sampling.seed_images import SeedImages

CPU = torch.device("cpu")
OFFSETS = np.array([300.0, -2e5])[:, None, None]
GAINS = np.array([4.0, 7e3])[:, None, None]


def fields(num=12, size=(8, 12), seed=0):
    """Returns float32 values [num, 2, H, W] far from 0 and of very different ranges."""
    noise = np.random.default_rng(seed).normal(size=[num, 2, *size])
    return (noise * GAINS + OFFSETS).astype(np.float32)


def write_arrays(folder, values, suffix=".npy"):
    """Writes each of `values` as FOLDER/000/i.npy, or as a picture."""
    (folder / "000").mkdir(parents=True)
    for i, value in enumerate(values):
        path = folder / f"000/{i:03d}{suffix}"
        if suffix == ".npy":
            np.save(path, value)
        else:
            PIL.Image.fromarray(value).save(path)
    return folder


def call(invoke, main, *args, code=0):
    """Runs a command; returns its output, or its one line of error where it must fail."""
    result = invoke(main, *args)
    assert result.exit_code == code, (result.output, result.exception)
    if not code:
        return result.output
    [line] = [text for text in result.output.splitlines() if text.startswith("Error: ")]
    return line


def convert(invoke, source, dest, *args, code=0):
    return call(invoke, dataset_tool.main, f"--source={source}", f"--dest={dest}", "--workers=1",
                *args, code=code)


def arrays_in(path):
    """Returns the arrays of a data set by name, and its dataset.json."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        return ({name: np.load(io.BytesIO(archive.read(name))) for name in names},
                json.loads(archive.read("dataset.json")))


# -------------------------------------------------------------------------------- the formula


def test_8_bit_images_are_scaled_as_ever_to_the_bit():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    expected = values.to(torch.float32) / 127.5 - 1
    assert torch.equal(EIGHT_BIT.to_network(values), expected)
    assert torch.equal(EIGHT_BIT.to_data(expected), values)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_a_scaling_and_back_is_the_identity(dtype):
    values = (fields() - OFFSETS.min() + 1e5).astype(np.float32)
    values = (values / values.max() * 6e4).astype(dtype)
    scaling = scaling_by("minmax", Moments.of(values))
    there = scaling.to_network(torch.from_numpy(values))
    back = scaling.to_data(there)
    # x is float32: half a unit in the last place of 1, times the spread.
    assert there.dtype == back.dtype == torch.float32
    assert np.abs(back.numpy() - values.astype(np.float64)).max() <= max(scaling.spread) * 2**-23


def test_minmax_is_exactly_minus_one_and_one_and_std_is_sigma_data():
    values = fields(50)
    x = scaling_by("minmax", Moments.of(values)).to_network(torch.from_numpy(values))
    assert x.amin([0, 2, 3]).tolist() == [-1, -1] and x.amax([0, 2, 3]).tolist() == [1, 1]
    x = scaling_by("std", Moments.of(values)).to_network(torch.from_numpy(values)).double()
    torch.testing.assert_close(x.mean([0, 2, 3]), torch.zeros(2).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(x.std([0, 2, 3], correction=0), torch.full([2], 0.5).double(),
                               atol=0, rtol=1e-6)
    assert scaling_by((10, 30), Moments.of(values)) == Scaling((20,), (10,))


def test_moments_of_pieces_are_those_of_the_whole_beside_a_large_mean():
    values = np.random.default_rng(0).normal(1e6, 1, [40, 3, 5, 7])
    total = Moments.of(values[:1])
    for piece in np.split(values[1:], [1, 4, 20]):
        total = total.merge(Moments.of(piece))
    by_channel = values.transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(total.mean, by_channel.mean(1), rtol=1e-15)
    np.testing.assert_allclose(total.std, by_channel.std(1), rtol=1e-9)
    assert total.low.tolist() == by_channel.min(1).tolist()
    assert total.high.tolist() == by_channel.max(1).tolist()
    assert total.overall_std() == pytest.approx(values.std(), rel=1e-9)


@pytest.mark.parametrize("record, words", [
    (None, "must be {"), ({"center": [0]}, "must be {"), ({"center": [0], "spread": ["1"]}, "must"),
    ({"center": [0], "spread": [0]}, "positive"), ({"center": [], "spread": []}, "finite"),
    ({"center": [0, 0], "spread": [1]}, "equally many"),
    ({"center": [math.nan], "spread": [1]}, "finite"),
])
def test_a_record_that_is_no_scaling_is_refused(record, words):
    with pytest.raises(ValueError, match=words):
        Scaling.from_dict(record)
    with pytest.raises(ValueError, match="has 2 channels, but the data have 3"):
        Scaling((0, 0), (1, 1)).check_channels(3)


# --------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("dtype, stored", [
    ("float32", "float32"), ("float64", "float32"), ("float16", "float32"), ("int16", "float32"),
    ("int8", "float32"), ("int32", "float32"), ("int64", "float32"), ("uint16", "uint16"),
    (">f4", "float32"), (">u2", "uint16")])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_arrays_keep_their_values(tmp_path, invoke, dtype, stored, channels):
    shape = [5, 6, 10] if channels is None else [5, channels, 6, 10]
    values = (np.random.default_rng(0).random(shape) * 1000).astype(dtype)
    source = write_arrays(tmp_path / "src", values)
    np.save(tmp_path / "stack.npy", np.asfortranarray(values))
    convert(invoke, source, tmp_path / "a.zip", "--scale=minmax")
    convert(invoke, tmp_path / "stack.npy", tmp_path / "b.zip", "--scale=minmax")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    dataset = ImageFolderDataset(tmp_path / "a.zip")
    assert dataset.image_shape == [channels or 1, 6, 10] and dataset.resolution == [6, 10]
    images, _ = dataset.get_batch(range(5))
    assert images.dtype == stored
    assert np.array_equal(images.squeeze(), values.squeeze().astype(stored))
    x = dataset.scaling.to_network(torch.from_numpy(images))
    assert (x.min(), x.max()) == (-1, 1)


@pytest.mark.parametrize("rule", ["minmax", "std", "-5,5"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_scaling_is_measured_over_all_images(tmp_path, invoke, rule, workers):
    values = fields(30)
    np.save(tmp_path / "stack.npy", values)
    output = convert(invoke, tmp_path / "stack.npy", tmp_path / "a.zip", f"--scale={rule}",
                     f"--workers={workers}")
    _, record = arrays_in(tmp_path / "a.zip")
    flat = values.astype(np.float64).transpose(1, 0, 2, 3).reshape(2, -1)
    low, high = flat.min(1), flat.max(1)
    center, spread = {"minmax": ((low + high) / 2, (high - low) / 2),
                      "std": (flat.mean(1), flat.std(1) * 2), "-5,5": ([0], [5])}[rule]
    np.testing.assert_allclose(record["scale"]["center"], center, rtol=1e-12)
    np.testing.assert_allclose(record["scale"]["spread"], spread, rtol=1e-12)
    x = (flat - np.array(center)[:, None]) / np.array(spread)[:, None]
    assert f"all    standard deviation {x.std():.4f} in the scale" in output
    shown = call(invoke, dataset_tool.main, "show", tmp_path / "a.zip", "--workers=1")
    assert shown.splitlines()[1:] == output.splitlines()[1:]


def test_16_bit_and_float_pictures_keep_their_values_with_a_scale_alone(tmp_path, invoke):
    deep = np.random.default_rng(0).integers(0, 65536, [3, 6, 8]).astype(np.uint16)
    source = write_arrays(tmp_path / "png", deep, ".png")
    convert(invoke, source, tmp_path / "deep.zip", "--scale=0,65535")
    dataset = ImageFolderDataset(tmp_path / "deep.zip")
    assert np.array_equal(dataset.get_batch(range(3))[0][:, 0], deep)
    assert dataset.scaling == Scaling((32767.5,), (32767.5,)) == default_scaling(np.uint16)
    convert(invoke, source, tmp_path / "8.zip")
    assert np.array_equal(ImageFolderDataset(tmp_path / "8.zip").get_batch(range(3))[0][:, 0],
                          deep >> 8)
    floats = fields(3)[:, 0]
    convert(invoke, write_arrays(tmp_path / "tif", floats, ".tif"), tmp_path / "f.zip",
            "--scale=std")
    assert np.array_equal(ImageFolderDataset(tmp_path / "f.zip").get_batch(range(3))[0][:, 0],
                          floats)


@pytest.mark.parametrize("channels, suffix", [(1, ".png"), (2, ".npy"), (3, ".png"), (5, ".npy")])
def test_8_bit_arrays_are_pngs_where_those_hold_them(tmp_path, invoke, channels, suffix):
    values = np.random.default_rng(0).integers(0, 256, [4, channels, 6, 10]).astype(np.uint8)
    np.save(tmp_path / "stack.npy", values)
    convert(invoke, tmp_path / "stack.npy", tmp_path / "a.zip")
    names = zipfile.ZipFile(tmp_path / "a.zip").namelist()
    assert names == [f"00000/img0000000{i}{suffix}" for i in range(4)] + ["dataset.json"]
    dataset = ImageFolderDataset(tmp_path / "a.zip", cache=True)
    assert np.array_equal(dataset.get_batch(range(4))[0], values)
    assert dataset.scaling == EIGHT_BIT and dataset.scale is None
    assert call(invoke, dataset_tool.main, "check", tmp_path / "a.zip", "--workers=1")


def test_arrays_are_resized_channel_by_channel(tmp_path, invoke):
    values = fields(1, (8, 12))
    np.save(tmp_path / "stack.npy", values)

    def resized(*args):
        convert(invoke, tmp_path / "stack.npy", tmp_path / "a.zip", "--scale=std", *args)
        return ImageFolderDataset(tmp_path / "a.zip")[0][0]

    lanczos = PIL.Image.Resampling.LANCZOS
    for channel, image in zip(values[0], resized("--resolution=6x4"), strict=True):
        assert np.array_equal(image, PIL.Image.fromarray(channel).resize((6, 4), lanczos))
    crop = resized("--resolution=4x4", "--transform=center-crop")
    for channel, image in zip(values[0, :, :, 2:10], crop, strict=True):
        assert np.array_equal(image, PIL.Image.fromarray(channel).resize((4, 4), lanczos))


# ------------------------------------------------------------------------------------- reader


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_the_packed_copy_holds_the_stored_values(tmp_path, invoke, dtype):
    values = np.abs(fields(9)).clip(0, 65535).astype(dtype)
    np.save(tmp_path / "stack.npy", values)
    convert(invoke, tmp_path / "stack.npy", tmp_path / "a.zip", "--scale=0,65535")
    for options in ({}, {"max_size": 4, "random_seed": 1}):
        plain = ImageFolderDataset(tmp_path / "a.zip", xflip=True, **options)
        packed = ImageFolderDataset(tmp_path / "a.zip", xflip=True, cache=True, **options)
        every = range(len(plain))
        assert packed.is_packed and packed.get_batch(every)[0].dtype == dtype
        assert np.array_equal(packed.get_batch(every)[0], plain.get_batch(every)[0])
    assert np.array_equal(plain.get_batch([4])[0], plain.get_batch([0])[0][..., ::-1])


def test_arrays_without_a_record_are_in_their_own_scale(tmp_path):
    values = np.random.default_rng(0).normal(size=[3, 2, 4, 6]).astype(np.float32)
    dataset = ImageFolderDataset(write_arrays(tmp_path / "src", values))
    assert np.array_equal(dataset.get_scored(range(3)), values)
    assert dataset.scaling == Scaling((0,), (1,))


def test_another_scale_is_another_data_set(tmp_path, invoke):
    np.save(tmp_path / "stack.npy", fields())
    prints = set()
    for rule in ("std", "minmax"):
        convert(invoke, tmp_path / "stack.npy", tmp_path / "a.zip", f"--scale={rule}")
        prints.add(ImageFolderDataset(tmp_path / "a.zip").fingerprint)
    assert len(prints) == 2


# --------------------------------------------------------------------------------- conditions


def write_pairs(folder, num=6, size=(8, 8)):
    """Writes RGB images in classes and masks of them, told apart by their values."""
    rng = np.random.default_rng(0)
    for i in range(num):
        for kind, shape in (("image", [*size, 3]), ("mask", size)):
            pixels = np.full(shape, 40 * i, np.uint8) + rng.integers(0, 9, shape, dtype=np.uint8)
            path = folder / kind / f"{i % 2}" / f"{i}.{'png' if kind == 'image' else 'bmp'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(path)
    return folder / "image", folder / "mask"


@pytest.mark.parametrize("dest", ["a.zip", "a"])
def test_each_image_has_the_condition_of_its_name(tmp_path, invoke, dest):
    images, masks = write_pairs(tmp_path)
    output = convert(invoke, images, tmp_path / dest, f"--cond-source={masks}")
    assert "6 condition images, 8x8, 1 channel" in output
    output = call(invoke, dataset_tool.main, "check", tmp_path / dest, "--workers=1")
    assert "6 condition images, 8x8, 1 channel" in output
    plain = ImageFolderDataset(tmp_path / dest, use_labels=True)
    assert len(plain) == 6 and len(plain[0]) == 2 and plain.cond_channels == 0
    for cache in (False, True):
        dataset = ImageFolderDataset(tmp_path / dest, use_labels=True, use_conditions=True,
                                     xflip=True, cache=cache)
        assert (dataset.cond_shape, dataset.cond_scaling) == ([1, 8, 8], EIGHT_BIT)
        images, labels, conditions = dataset.get_batch(range(12))
        assert np.abs(images[:, :1].astype(int) - conditions).max() < 9
        assert np.array_equal(conditions[6:], conditions[:6, :, :, ::-1])
        assert labels[:, 1].tolist() == [0, 0, 0, 1, 1, 1] * 2
    shown = call(invoke, dataset_tool.main, "show", tmp_path / dest, "--workers=1")
    assert "6 of 6 images, with conditions" in shown


def test_conditions_follow_the_images_that_are_kept_and_have_a_scale_of_their_own(tmp_path, invoke):
    images, _ = write_pairs(tmp_path)
    values = fields(6, (8, 8))
    for i, value in enumerate(values):
        (tmp_path / f"field/{i % 2}").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / f"field/{i % 2}/{i}.npy", value)
    convert(invoke, images, tmp_path / "a.zip", f"--cond-source={tmp_path / 'field'}",
            "--cond-scale=minmax", "--classes=1")
    dataset = ImageFolderDataset(tmp_path / "a.zip", use_conditions=True)
    assert np.array_equal(dataset.get_batch(range(3))[2], values[1::2])
    x = dataset.cond_scaling.to_network(torch.from_numpy(values[1::2]))
    assert x.amax([0, 2, 3]).tolist() == [1, 1] and dataset.scaling == EIGHT_BIT


def test_a_data_set_as_a_source_leaves_its_conditions_and_says_so(tmp_path, invoke):
    images, masks = write_pairs(tmp_path)
    convert(invoke, images, tmp_path / "a.zip", f"--cond-source={masks}")
    output = convert(invoke, tmp_path / "a.zip", tmp_path / "b.zip")
    assert "b.zip: 6 images" in output and "Left out: 6 images under cond/" in output


# --------------------------------------------------------------- training, sampling, scoring


@pytest.fixture(scope="module")
def field_run(tmp_path_factory):
    """A data set of 2-channel fields 8x12, and a run on it of a few steps with scores."""
    from click.testing import CliRunner
    folder = tmp_path_factory.mktemp("fields")
    os.environ.setdefault("PFGMPP_CACHE_DIR", str(folder / "cache"))

    def invoke(main, *args):
        return CliRunner().invoke(main, [str(arg) for arg in args])

    np.save(folder / "fields.npy", fields(40))
    data = folder / "fields.zip"
    convert(invoke, folder / "fields.npy", data, "--scale=std")
    call(invoke, train.main, f"--data={data}", f"--outdir={folder}", "--name=run", *TINY_RUN[:-1],
         "--samples=4", "--pfgmpp=1", "--aug_dim=16", "--augment=0.5", "--xflip=1",
         "--sigma-data=auto", "--duration=0.000064", "--tick=0.032", "--eval=0.064",
         f"--eval-ref={data}", "--eval-num=8", "--eval-detector=pixels")
    return data, folder / "run" / "network-snapshot-000000.064.pt"


@pytest.mark.long
def test_the_measured_deviation_is_that_of_the_data_and_is_in_the_file(field_run):
    data, snapshot = field_run
    dataset = ImageFolderDataset(data)
    expected = dataset.scaling.to_network(torch.from_numpy(dataset.get_batch(range(40))[0]))
    content = checkpoint.load(snapshot)
    assert content["options"]["sigma_data"] == content["network"]["sigma_data"]
    assert content["network"]["sigma_data"] == pytest.approx(
        float(expected.double().std(correction=0)), rel=1e-6)
    assert content["network"]["img_resolution"] == [8, 12]
    assert Scaling.from_dict(content["dataset"]["scale"]) == dataset.scaling
    copy = checkpoint.as_snapshot(content)
    assert copy["dataset"] == content["dataset"]


@pytest.mark.long
def test_samples_are_arrays_in_the_units_of_the_data(field_run, tmp_path, invoke):
    data, snapshot = field_run
    args = [f"--network={snapshot}", "--seeds=0-7", "--steps=3", f"--outdir={tmp_path / 'out'}"]
    call(invoke, generate.main, *args, "--save_images")
    sampler = NetworkSampler.open(str(snapshot), CPU, num_steps=3)
    [batch] = sampler.images([range(8)])
    scaling = ImageFolderDataset(data).scaling
    center, spread = (np.array(x)[:, None, None] for x in (scaling.center, scaling.spread))
    for seed, x in enumerate(batch.images.numpy()):
        values = np.load(tmp_path / f"out/{seed:06d}.npy")
        assert values.dtype == np.float32 and values.shape == (2, 8, 12)
        np.testing.assert_allclose(values, x * spread + center, rtol=1e-6)
    assert (tmp_path / "out/vis/grid.png").exists()
    record = json.loads((tmp_path / "out/generate.json").read_text())
    assert Scaling.from_dict(record["scale"]) == scaling
    assert ImageFolderDataset(tmp_path / "out").scaling == scaling
    np.save(tmp_path / "out/000003.npy", np.zeros([2, 8, 12]))  # float64: not what was written
    assert "7 of 8 images are there" in call(invoke, generate.main, *args)


@pytest.mark.long
def test_written_fields_and_the_network_score_alike(field_run, tmp_path, invoke):
    data, snapshot = field_run
    call(invoke, generate.main, f"--network={snapshot}", "--seeds=0-7",
         f"--outdir={tmp_path / 'out'}")
    call(invoke, fid.main, "ref", f"--data={data}", f"--dest={tmp_path / 'ref.npz'}",
         "--detector=pixels")
    values = []
    for args in (["calc", f"--images={tmp_path / 'out'}", f"--ref={data}", "--num=8"],
                 ["calc", f"--images={tmp_path / 'out'}", f"--ref={tmp_path / 'ref.npz'}",
                  "--num=8"],
                 ["gen", f"--network={snapshot}", f"--ref={data}", "--seeds=0-7"]):
        out = tmp_path / "scores.jsonl"
        call(invoke, fid.main, *args, "--detector=pixels", f"--out={out}", "--workers=0")
        values.append(json.loads(out.read_text().splitlines()[-1])["value"])
    during = json.loads((snapshot.parent / "metrics.jsonl").read_text().splitlines()[-1])["value"]
    # Batches of 8 against 64: the network's own rounding.
    assert values == pytest.approx([during] * 3, rel=1e-5)
    x = ImageFolderDataset(data).get_scored(range(40)).reshape(40, -1).astype(np.float64)
    np.testing.assert_allclose(load_reference(str(tmp_path / "ref.npz")).mu, x.mean(0), atol=1e-7)


@pytest.mark.long
def test_starting_from_fields_with_little_noise_returns_them(field_run, tmp_path, invoke):
    data, snapshot = field_run
    call(invoke, generate.main, f"--network={snapshot}", "--seeds=0-1", f"--init-image={data}",
         "--init-sigma=0.003", "--steps=2", f"--outdir={tmp_path / 'out'}")
    values = ImageFolderDataset(data).get_batch(range(2))[0]
    for seed in range(2):
        error = np.load(tmp_path / f"out/{seed:06d}.npy") - values[seed]
        assert (np.abs(error).max(axis=(1, 2)) < 0.05 * GAINS.ravel()).all()


@pytest.fixture(scope="module")
def cond_run(tmp_path_factory):
    """Emoji 16x16 with their half-size copies as conditions and labels, and a run of few steps."""
    from click.testing import CliRunner
    folder = tmp_path_factory.mktemp("conditional")

    def invoke(main, *args):
        return CliRunner().invoke(main, [str(arg) for arg in args])

    emoji = ROOT / "examples/emoji-google-32.zip"
    convert(invoke, emoji, folder / "small.zip", "--resolution=8x8", "--classes=6,1")
    convert(invoke, emoji, folder / "big.zip", "--resolution=16x16", "--classes=6,1")
    zipfile.ZipFile(folder / "small.zip").extractall(folder / "small")
    (folder / "small/dataset.json").unlink()
    data = folder / "pairs.zip"
    convert(invoke, folder / "big.zip", data, f"--cond-source={folder / 'small'}",
            "--resolution=16x16")
    call(invoke, train.main, f"--data={data}", f"--outdir={folder}", "--name=run", *TINY_RUN[:-1],
         "--samples=6", "--cond-image=1", "--cond=1", "--label-dropout=0.5",
         "--duration=0.000016", "--tick=1", "--eval=0.016", f"--eval-ref={data}", "--eval-num=6",
         "--eval-detector=pixels")
    return data, folder / "run" / "network-snapshot-000000.pt"


@pytest.mark.long
def test_a_conditional_run_draws_condition_samples_and_truth(cond_run):
    data, snapshot = cond_run
    content = checkpoint.load(snapshot)
    assert content["network"]["cond_channels"] == 3 and content["network"]["label_dropout"] == 0.5
    dataset = ImageFolderDataset(data, use_conditions=True)
    grid = np.asarray(PIL.Image.open(snapshot.parent / "samples-000000.png"))
    columns = (grid.shape[1] - 2) // 66  # 16 pixels enlarged to 64, gaps of 2
    for row in range((grid.shape[0] - 2) // 66):
        images, _, conditions = dataset.get_batch([row])
        for column, expected in ((0, conditions[0]), (columns - 1, images[0])):
            y, x = 2 + 66 * row, 2 + 66 * column
            shown = grid[y:y + 64:4, x:x + 64:4]
            assert np.array_equal(shown.transpose(2, 0, 1), expected)


@pytest.mark.long
def test_conditions_of_a_data_set_and_in_a_folder_are_the_same(cond_run, tmp_path, invoke):
    data, snapshot = cond_run
    zipfile.ZipFile(data).extractall(tmp_path / "pairs")
    args = [f"--network={snapshot}", "--seeds=0-13", "--steps=2", "--guidance=2"]
    for name, path in (("a", data), ("b", tmp_path / "pairs/cond")):
        call(invoke, generate.main, *args, f"--cond-image={path}", f"--outdir={tmp_path / name}")
    for i in range(14):
        assert (tmp_path / f"a/{i:06d}.png").read_bytes() == (
            tmp_path / f"b/{i:06d}.png").read_bytes()


@pytest.mark.long
def test_conditional_networks_are_scored_without_writing_images(cond_run, tmp_path, invoke):
    data, snapshot = cond_run
    out = tmp_path / "scores.jsonl"
    call(invoke, fid.main, "gen", f"--network={snapshot}", f"--ref={data}", "--seeds=0-5",
         f"--cond-image={data}", "--detector=pixels", f"--out={out}")
    during = json.loads((snapshot.parent / "metrics.jsonl").read_text())["value"]
    assert json.loads(out.read_text())["value"] == pytest.approx(during, rel=1e-5)
    line = call(invoke, fid.main, "gen", f"--network={snapshot}", f"--ref={data}", "--seeds=0-5",
                "--detector=pixels", code=2)
    assert "--cond-image=DIR|ZIP" in line


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--cache=0", "--workers=1"], ["--batch-gpu=4"]])
def test_how_pairs_are_read_changes_nothing_but_rounding(cond_run, tmp_path, invoke, flags):
    data, _ = cond_run
    losses = []
    for name, extra in (("a", []), ("b", flags)):
        call(invoke, train.main, f"--data={data}", f"--outdir={tmp_path}", f"--name={name}",
             *TINY_RUN, "--dropout=0", "--cond-image=1", "--duration=0.000024", "--tick=0.001",
             *extra)
        lines = (tmp_path / name / "stats.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["Loss/loss"]["mean"] for line in lines])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.long
def test_a_conditional_run_resumes_exactly(cond_run, tmp_path, invoke):
    data, _ = cond_run
    base = [f"--data={data}", f"--outdir={tmp_path}", *TINY_RUN, "--cond-image=1", "--tick=0.001",
            "--sigma-data=auto"]
    call(invoke, train.main, *base, "--name=a", "--duration=0.000032")
    for duration in ("0.000016", "0.000032"):
        call(invoke, train.main, *base, "--name=b", f"--duration={duration}", "--resume=auto")
    ours, theirs = (checkpoint.load(tmp_path / name / "training-state-000000.032.pt")
                    for name in "ab")
    assert all(torch.equal(ours["net"][key], theirs["net"][key]) for key in ours["net"])


def test_files_that_record_no_scale_are_of_8_bit_images():
    sampler = NetworkSampler.open(str(ROOT / "tests/data/network-snapshot-v1.pt"), CPU)
    assert sampler.scaling == EIGHT_BIT and "scale" not in sampler.settings


# ------------------------------------------------------------------------- what can't be used


def bad_source(folder, name):
    """Writes what a row of the table below names; returns the flags that name it."""
    images, masks = write_pairs(folder)
    values = fields(4)
    if name == "nan":
        values[2, 1, 3, 4] = np.nan
    elif name == "inf in float64":
        values = values.astype(np.float64)
        values[1, 0, 0, 0] = 1e300
    elif name == "constant":
        values[:, 1] = 7
    elif name == "shapes":
        values = [*values[:3], values[3, :, :4]]
    elif name == "types":
        values = [*values[:3], values[3].astype(np.float64)]
    elif name == "integers":
        values = values.astype(np.uint32)
    elif name == "several in one":
        values = values[None]
    elif name == "one axis":
        values = values[:, 0, 0]
    elif name == "missing condition":
        os.remove(masks / "1/3.bmp")
    elif name == "extra condition":
        PIL.Image.new("L", (8, 8)).save(masks / "0/9.png")
    elif name == "size of condition":
        PIL.Image.new("L", (4, 8)).save(masks / "0/0.bmp")
    elif name == "mode of condition":
        PIL.Image.new("RGB", (8, 8)).save(masks / "1/3.bmp")
    if "condition" in name or name == "scale for 8 bits":
        return [f"--source={images}", *([f"--cond-source={masks}"] if "condition" in name else [])]
    if name == "stack":
        np.save(folder / "stack.npy", values[0, 0])
        return [f"--source={folder / 'stack.npy'}"]
    source = write_arrays(folder / "src", values)
    if name == "cut":
        path = source / "000/002.npy"
        path.write_bytes(path.read_bytes()[:-1])
    if name == "pickle":
        np.save(source / "000/002.npy", np.array([{}]), allow_pickle=True)
    return [f"--source={source}"]


@pytest.mark.parametrize("name, flags, code, words", [
    ("nan", ["--scale=std"], 1, ["000/002.npy", "nan", "[1, 3, 4]"]),
    ("inf in float64", ["--scale=std"], 1, ["000/001.npy", "1e+300", "[0, 0, 0]"]),
    ("constant", ["--scale=minmax"], 1, ["--scale=minmax", "channel 1 is 7 in all"]),
    ("constant", ["--scale=std"], 1, ["--scale=std", "channel 1"]),
    ("shapes", ["--scale=std"], 1, ["000/003.npy", "12x4", "12x8"]),
    ("types", ["--scale=-1,1"], 0, []),
    ("integers", ["--scale=std"], 1, ["000/000.npy", "uint32", "uint16"]),
    ("several in one", ["--scale=std"], 1, ["000/000.npy", "is several images", "--source="]),
    ("one axis", ["--scale=std"], 1, ["000/000.npy", "[12]", "[C, H, W]"]),
    ("stack", ["--scale=std"], 1, ["stack.npy", "[n, C, H, W]"]),
    ("cut", ["--scale=std"], 1, ["000/002.npy", "bytes"]),
    ("pickle", ["--scale=std"], 1, ["000/002.npy", "object"]),
    ("plain", [], 1, ["000/000.npy", "float32", "--scale=minmax"]),
    ("plain", ["--scale=std", "--resolution=4x4", "--transform=center-crop-wide"], 1,
     ["000/000.npy", "center-crop"]),
    ("scale for 8 bits", ["--scale=minmax"], 1, ["--scale", "8 bits", "leave --scale out"]),
    ("condition", ["--cond-scale=std"], 1, ["--cond-scale", "8 bits"]),
    ("missing condition", [], 1, ["no condition image for 1/3.png", "1 of 6"]),
    ("extra condition", [], 1, ["0/9.png belongs to no image", "without an image: 1"]),
    ("size of condition", [], 1, ["0/0.bmp", "4x8", "8x8", "--resolution"]),
    ("mode of condition", [], 1, ["1/3.bmp", "RGB 8x8", "L 8x8"]),
], ids=str)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(tmp_path, invoke, name, flags,
                                                                 code, words):
    source = bad_source(tmp_path, name)
    for dest in ("a.zip", "a"):
        line = call(invoke, dataset_tool.main, *source, f"--dest={tmp_path / 'out' / dest}",
                    "--workers=1", *flags, code=code)
        assert all(word in line for word in words), line
        assert code == 0 or list((tmp_path / "out").glob("*")) == []


def bad_data(folder, invoke, name):
    """Writes the data set that a row of the table below names."""
    if name in ("plain", "no conditions", "labels"):
        return write_dataset(folder / "plain.zip", num=8, classes=2 if name == "labels" else 0)
    if name in ("missing", "extra", "size"):
        images, masks = write_pairs(folder)
        convert(invoke, images, folder / "pairs", f"--cond-source={masks}")
        changed = folder / "pairs/cond/00000/img00000002.png"
        if name == "missing":
            changed.unlink()
        elif name == "extra":
            changed.with_name("x.png").write_bytes(changed.read_bytes())
        else:
            PIL.Image.new("L", (16, 8)).save(changed)
        return folder / "pairs"
    values = fields(8, (8, 12) if name != "odd" else (8, 13))
    convert(invoke, write_arrays(folder / "src", values), folder / "data", "--scale=std")
    changed, record = folder / "data/00000/img00000005.npy", folder / "data/dataset.json"
    if name == "nan":
        values[5, 0, 1, 1] = np.inf
        np.save(changed, values[5])
    elif name == "channels of scale":
        record.write_text('{"scale": {"center": [1, 2, 3], "spread": [1, 1, 1]}}')
    elif name == "bad scale":
        record.write_text('{"scale": {"center": [1], "spread": [-1]}}')
    return folder / "data"


@pytest.mark.long
@pytest.mark.parametrize("name, flags, code, words", [
    ("no conditions", ["--cond-image=1"], 2, ["has no condition images", "--cond-source"]),
    ("missing", ["--cond-image=1"], 1, ["no condition image for", "img00000002", "1 of 6"]),
    ("extra", ["--cond-image=1"], 1, ["cond/00000/x.png belongs to no image"]),
    ("size", ["--cond-image=1"], 1, ["img00000002.png", "L 16x8", "L 8x8"]),
    ("size", ["--cond-image=1", "--cache=0"], 1, ["img00000002.png", "L 16x8", "L 8x8"]),
    ("missing", ["--cond-image=1", "--stf=1"], 2, ["--stf=1 with --cond-image=1"]),
    ("plain", ["--label-dropout=0.1"], 2, ["--label-dropout=0.1", "--cond=1"]),
    ("labels", ["--cond=1", "--label-dropout=2"], 2, ["--label-dropout=2", "between 0 and 1"]),
    ("plain", ["--sigma-data=0"], 2, ["--sigma-data=0", "positive"]),
    ("plain", ["--sigma-data=x"], 2, ["--sigma-data", "a number or auto"]),
    ("plain", ["--sigma-data=auto", "--precond=ve"], 2, ["--sigma-data", "--precond=edm"]),
    ("odd", [], 1, ["8x13", "nearest width 12 or 14"]),
    ("nan", [], 1, ["img00000005.npy", "inf at [0, 1, 1]"]),
    ("nan", ["--cache=0"], 1, ["img00000005.npy", "inf at [0, 1, 1]"]),
    ("channels of scale", [], 1, ["dataset.json", '"scale"', "has 3 channels, but the data"]),
    ("bad scale", [], 1, ["dataset.json", '"scale"', "positive"]),
    ("fields", ["--eval=1", "--eval-ref=PLAIN", "--eval-detector=pixels"], 1,
     ["plain.zip", "another scale"]),
    ("fields", ["--eval=1", "--eval-ref=DATA"], 1,
     ["the data: detector inception: takes 8-bit images", "use --eval-detector=pixels (pixels:K"]),
], ids=str)
def test_data_that_do_not_fit_are_one_line_before_training(tmp_path, invoke, name, flags, code,
                                                           words):
    data = bad_data(tmp_path, invoke, name)
    plain = write_dataset(tmp_path / "plain.zip", num=8, classes=2 if name == "labels" else 0)
    flags = [flag.replace("PLAIN", str(plain)).replace("DATA", str(data)) for flag in flags]
    line = call(invoke, train.main, f"--data={data}", f"--outdir={tmp_path / 'runs'}", *TINY_RUN,
                "--rbatch=8", *flags, code=code)
    assert all(word in line for word in words), line
    assert not (tmp_path / "runs").exists()


def test_check_lists_what_is_wrong_with_arrays_and_conditions(tmp_path, invoke):
    for name, words in (("nan", "img00000005.npy (image 5): value inf at [0, 1, 1]"),
                        ("channels of scale", "has 3 channels, but the data have 2"),
                        ("missing", "img00000002.png: has no condition image in cond/"),
                        ("extra", "cond/00000/x.png (image 6): belongs to no image"),
                        ("size", "img00000002.png (image 2): is L 16x8, but most are L 8x8")):
        data = bad_data(tmp_path / name.replace(" ", "-"), invoke, name)
        result = invoke(dataset_tool.main, "check", data, "--workers=1")
        first, *_, last = result.output.splitlines()
        assert result.exit_code == 1 and words in first and "1 problem in" in last


@pytest.mark.long
@pytest.mark.parametrize("which, flags, words", [
    ("fields", ["--init-image=PLAIN", "--init-sigma=1"], "of 3 channels, but the network takes 2"),
    ("fields", ["--init-image=8BIT", "--init-sigma=1"], "8-bit, but the network was trained on"),
    ("pairs", ["--cond-image=FIELDS"], "of 2 channels, but the network takes 3"),
])
def test_given_images_in_other_units_are_refused(field_run, cond_run, tmp_path, invoke, which,
                                                 flags, words):
    data, network = {"fields": field_run, "pairs": cond_run}[which]
    np.save(tmp_path / "8.npy", np.zeros([2, 2, 8, 12], np.uint8))
    convert(invoke, tmp_path / "8.npy", tmp_path / "8.zip")
    names = {"PLAIN": write_dataset(tmp_path / "plain.zip", num=2), "8BIT": tmp_path / "8.zip",
             "FIELDS": field_run[0]}
    flags = [f"{flag.split('=')[0]}={names.get(flag.split('=')[1], flag.split('=')[1])}"
             for flag in flags]
    line = call(invoke, generate.main, f"--network={network}", f"--outdir={tmp_path / 'out'}",
                *flags, code=1)
    assert words in line and not (tmp_path / "out").exists()


@pytest.mark.long
def test_inception_takes_8_bit_images_of_1_or_3_channels_alone(field_run, tmp_path, monkeypatch):
    from metrics import inception
    from metrics.detectors import Inception
    monkeypatch.setattr(inception, "load_weights", lambda path: {})
    monkeypatch.setattr(inception, "InceptionV3", lambda weights, device: None)
    for images in (torch.zeros(1, 2, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ValueError, match="1 or 3 channels.*--detector=pixels"):
            Inception(CPU)(images)


@pytest.mark.long
def test_inception_refuses_arrays_before_it_looks_for_weights(field_run, tmp_path, monkeypatch,
                                                              invoke):
    monkeypatch.setenv(CACHE_DIR_ENV, str(tmp_path))  # has no weights
    data, _ = field_run
    line = call(invoke, fid.main, "calc", f"--images={data}", f"--ref={data}", "--num=40",
                code=1)
    assert "takes 8-bit images of 1 or 3 channels" in line and not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_network_on_other_scales_is_no_guide(field_run, tmp_path, invoke):
    _, snapshot = field_run
    content = checkpoint.load(snapshot)
    content["dataset"] = {**content["dataset"], "scale": EIGHT_BIT.to_dict()}
    checkpoint.save(tmp_path / "other.pt", content)
    line = call(invoke, generate.main, f"--network={snapshot}", f"--gnet={tmp_path / 'other.pt'}",
                "--guidance=2", f"--outdir={tmp_path / 'out'}", code=1)
    assert "another scale" in line


def test_a_scaling_is_plain_data(tmp_path):
    for scaling in (EIGHT_BIT, Scaling((1.5, 2), (3, 4))):
        record = json.loads(json.dumps(scaling.to_dict()))
        assert Scaling.from_dict(record) == scaling
    with pytest.raises(dataclasses.FrozenInstanceError):
        EIGHT_BIT.is_8bit = False


def test_given_images_reach_the_network_in_the_units_it_was_trained_in(tmp_path):
    """Whatever scale the given files record, their values are of the network's data."""
    values = np.random.default_rng(0).normal(300, 40, [5, 1, 8, 8]).astype(np.float32)
    folder = tmp_path / "given"
    folder.mkdir()
    for i, value in enumerate(values):
        np.save(folder / f"{i:06d}.npy", value)
    trained = Scaling.from_dict({"center": [280.0], "spread": [80.0]} | {
        key: value for key, value in ImageFolderDataset(folder).scaling.to_dict().items()
        if key not in ("center", "spread")})
    images = SeedImages.open("--init-image", folder, 1, trained)
    expected = torch.from_numpy((values[[0, 4, 1]] - 280) / 80)
    torch.testing.assert_close(images([0, 4, 6]), expected)
