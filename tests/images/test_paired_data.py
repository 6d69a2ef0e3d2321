"""Images and conditions out of one source, values within limits, and names that are kept."""

import json
import os
import re
import unicodedata
import zipfile

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from image_sources import (
    assert_refused,
    encode,
    flat,
    labels_json,
    random_pixels,
    run,
    write_source,
)

from dataset_tool import main
from images import array_files
from images.dataset import ImageFolderDataset
from images.image_files import stem
from images.inspection import DataSet

HU = ["--scale=-1024,3071", "--cond-scale=-1024,3071"]


def slices(num=5, channels=2, height=8, width=12, seed=0):
    """Returns float32 values [num, C, H, W] that are about those of CT images, in HU."""
    values = np.random.default_rng(seed).normal(0, 800, [num, channels, height, width])
    return values.astype(np.float32)


def made(source, dest, *args):
    """Returns what a conversion that must succeed printed, and the data set with conditions."""
    result = run(source, dest, *args)
    assert result.exit_code == 0, result.output
    has_conditions = bool(DataSet(dest).cond_names)
    return result.output, ImageFolderDataset(dest, use_conditions=has_conditions)


def record_of(dest):
    with zipfile.ZipFile(dest) as archive:
        return json.loads(archive.read("dataset.json"))


def write_stack(tmp_path, kind, values):
    """Writes values [n, C, H, W] as a source of one kind; returns it and the flags it needs."""
    if kind == "folder":
        return write_source(tmp_path / "src", {
            f"{i:02}.npy": array_files.encode(value) for i, value in enumerate(values)}), []
    if kind == "zip, channels last":
        return write_source(tmp_path / "src.zip", {
            f"{i:02}.npy": array_files.encode(np.ascontiguousarray(value.transpose(1, 2, 0)))
            for i, value in enumerate(values)}), ["--layout=hwc"]
    last = kind == "array, channels last"
    np.save(tmp_path / "x.npy", values.transpose(0, 2, 3, 1) if last else values)
    return tmp_path / "x.npy", ["--layout=hwc"] if last else []


# ----------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("kind", ["folder", "zip, channels last", "array", "array, channels last"])
@pytest.mark.parametrize("text, cond, image", [
    ("cond:0,image:1", [0], [1]), ("image:0,cond:1", [1], [0]), ("cond:0+2,image:1", [0, 2], [1]),
    ("cond:1,image:4+0+3", [1], [4, 0, 3]), ("image:1", None, [1])])
def test_channels_become_images_and_conditions_in_the_order_given(tmp_path, kind, text, cond,
                                                                  image):
    values = slices(channels=5)
    path, flags = write_stack(tmp_path, kind, values)
    scales = HU if cond else HU[:1]
    _, dataset = made(path, tmp_path / "a.zip", f"--channels={text}", *flags, *scales)
    images, _, *conditions = dataset.get_batch(range(5))
    assert np.array_equal(images, values[:, image])
    assert len(conditions) == bool(cond)
    if cond:
        assert np.array_equal(conditions[0], values[:, cond])


def test_channels_make_what_two_sources_make(tmp_path):
    values = slices(num=30)
    path, _ = write_stack(tmp_path, "array", values)
    args = ["--scale=minmax", "--cond-scale=std", "--max-images=25", "--resolution=6x4"]
    made(path, tmp_path / "a.zip", "--channels=cond:0,image:1", *args, "--workers=2")
    for name, channel in (("cond", 0), ("image", 1)):
        np.save(tmp_path / f"{name}.npy", values[:, channel])
    made(tmp_path / "image.npy", tmp_path / "b.zip", f"--cond-source={tmp_path / 'cond.npy'}",
         *args)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_channels_of_bytes_become_pictures(tmp_path):
    values = random_pixels(4, 5, 6, 8)
    path, _ = write_stack(tmp_path, "array", values)
    _, dataset = made(path, tmp_path / "a.zip", "--channels=cond:3+1+0,image:2")
    images, _, conditions = dataset.get_batch(range(4))
    assert np.array_equal(images, values[:, [2]])
    assert np.array_equal(conditions, values[:, [3, 1, 0]])
    assert all(name.endswith(".png") for name in DataSet(tmp_path / "a.zip").cond_names)


@pytest.mark.parametrize("args, texts, code", [
    (["--channels=cond:0,image:2", *HU], ["00.npy", "no channel 2", "has 2, numbered from 0"], 1),
    (["--channels=cond:7,image:0", *HU], ["--channels: 00.npy", "no channel 7"], 1),
    (["--channels=cond:0,image:1", HU[0]], ["--channels: 00.npy", "give --cond-scale="], 1),
    (["--channels=cond:1,image:1", *HU], ["channel 1 is named twice"], 2),
    (["--channels=cond:0,image:0", *HU], ["channel 0 is named twice"], 2),
    (["--channels=cond:0", *HU], ["such as cond:0,image:1"], 2),
    (["--channels=truth:0,image:1"], ["such as cond:0,image:1"], 2),
    (["--channels=cond:0,image:-1"], ["such as cond:0,image:1"], 2),
    (["--channels=cond:0,image:1,image:2"], ["such as cond:0,image:1"], 2),
    (["--channels=image:1", *HU], ["--cond-scale: needs condition images"], 2),
    (["--channels=cond:0,image:1", "--cond-source=x", *HU], ["choose one"], 2),
])
def test_channels_that_are_not_there_or_mean_nothing_are_refused(tmp_path, args, texts, code):
    path, _ = write_stack(tmp_path, "folder", slices())
    assert_refused(run(path, tmp_path / "out/a.zip", *args), tmp_path, *texts, exit_code=code)


def test_channels_of_pictures_are_not_picked(tmp_path):
    path = write_source(tmp_path / "src", {"x.png": random_pixels(4, 4, 3)})
    assert_refused(run(path, tmp_path / "out/a.zip", "--channels=image:1"), tmp_path, "x.png",
                   "is a picture")


# -------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("rule", ["minmax", "std", "-1000,400"])
def test_values_are_clipped_before_they_are_measured(tmp_path, rule):
    values = slices()
    path, _ = write_stack(tmp_path, "array", values)
    args = [f"--scale={rule}", f"--cond-scale={rule}", "--channels=cond:0,image:1"]
    output, dataset = made(path, tmp_path / "a.zip", *args, "--clip=-1000,400")
    np.save(tmp_path / "y.npy", np.minimum(np.maximum(values, -1000), 400))
    other, expected = made(tmp_path / "y.npy", tmp_path / "b.zip", *args)
    for one, two in zip(dataset.get_batch(range(5)), expected.get_batch(range(5)), strict=True):
        assert np.array_equal(one, two)
    assert (dataset.scaling, dataset.cond_scaling) == (expected.scaling, expected.cond_scaling)
    shares = [100 * np.mean((channel < -1000) | (channel > 400))
              for channel in (values[:, 1], values[:, 0])]
    lines = [line for line in output.splitlines() if line.startswith("clipped")]
    assert lines == [f"clipped to -1000..400: {share:.3g}% of the values" for share in shares]
    assert [line for line in output.splitlines()[1:] if line not in lines] \
        == other.splitlines()[1:], "all other lines are those of data that were clipped before"


def test_the_share_of_clipped_values_counts_all_channels_and_images(tmp_path):
    values = slices(num=7, channels=3)
    path, _ = write_stack(tmp_path, "array", values)
    output, _ = made(path, tmp_path / "a.zip", "--scale=std", "--clip=0,900")
    share = 100 * np.mean((values < 0) | (values > 900))
    assert f"clipped to 0..900: {share:.3g}% of the values\n" in output


def test_limits_are_recorded_beside_the_scale(tmp_path):
    path, _ = write_stack(tmp_path, "array", slices())
    made(path, tmp_path / "a.zip", *HU, "--channels=cond:0,image:1", "--clip=-1024,3071")
    record = record_of(tmp_path / "a.zip")
    assert record["clip"] == record["cond_clip"] == [-1024, 3071]
    made(path, tmp_path / "a.zip", *HU, "--channels=cond:0,image:1", "--cond-clip=-5,5.5")
    record = record_of(tmp_path / "a.zip")
    assert "clip" not in record and record["cond_clip"] == [-5, 5.5]
    assert list(record) == ["labels", "scale", "cond_scale", "cond_clip"]


def test_conditions_in_other_units_have_limits_of_their_own(tmp_path):
    values = slices()
    np.save(tmp_path / "x.npy", values[:, 0])
    np.save(tmp_path / "c.npy", values[:, 1])
    args = [f"--cond-source={tmp_path / 'c.npy'}", *HU, "--clip=-700,700"]
    for more, limit in ([], 700), (["--cond-clip=-300,300"], 300):
        _, dataset = made(tmp_path / "x.npy", tmp_path / "a.zip", *args, *more)
        images, _, conditions = dataset.get_batch(range(5))
        assert (images.max(), conditions.max(), conditions.min()) == (700, limit, -limit)


@pytest.mark.parametrize("name, channels", [("a.png", 1), ("a.npy", 2)])
def test_masks_of_8_bits_are_not_clipped(tmp_path, name, channels):
    images = write_source(tmp_path / "src", {"a.npy": array_files.encode(slices()[0])})
    mask = random_pixels(channels, 8, 12)
    masks = write_source(tmp_path / "masks", {
        name: mask[0] if channels == 1 else array_files.encode(mask)})
    _, dataset = made(images, tmp_path / "a.zip", f"--cond-source={masks}", "--scale=-9,9",
                      "--clip=-9,9")
    assert np.array_equal(dataset[0][2], mask)
    assert "cond_clip" not in record_of(tmp_path / "a.zip")


@pytest.mark.parametrize("limits, expected", [
    ("0.5,9.5", [1, 1, 9, 9]), ("-5,100000", [0, 1, 10, 65535]), ("10,11", [10, 10, 10, 11])])
def test_16_bits_stay_16_bits_within_the_limits(tmp_path, limits, expected):
    path = write_source(tmp_path / "src", {"a.png": encode(np.uint16([[0, 1, 10, 65535]]))})
    _, dataset = made(path, tmp_path / "a.zip", "--scale=0,65535", f"--clip={limits}")
    assert dataset[0][0].dtype == np.uint16 and dataset[0][0].flatten().tolist() == expected


def test_a_resize_does_not_overshoot_the_limits(tmp_path):
    edge = np.where(np.arange(64) < 30, -3000, 5000) * np.ones([64, 1])
    np.save(tmp_path / "x.npy", edge[None])
    _, plain = made(tmp_path / "x.npy", tmp_path / "a.zip", "--scale=-1,1", "--resolution=24x24")
    assert plain[0][0].min() < -3000, "the filter overshoots"
    _, clipped = made(tmp_path / "x.npy", tmp_path / "b.zip", "--scale=-1,1", "--resolution=24x24",
                      "--clip=-1024,3071")
    assert (clipped[0][0].min(), clipped[0][0].max()) == (-1024, 3071)


@pytest.mark.parametrize("args, texts, code", [
    (["--clip=-1,1"], ["--clip: needs --scale"], 2),
    (["--clip=1,-1", *HU], ["LO < HI"], 2), (["--clip=minmax", *HU], ["LO,HI"], 2),
    (["--clip=0,inf", *HU], ["LO,HI"], 2), (["--clip=5", *HU], ["LO,HI"], 2),
    (["--cond-clip=-1,1", HU[0], "--channels=cond:0,image:1"], ["needs --cond-scale"], 2),
])
def test_limits_that_mean_nothing_are_refused(tmp_path, args, texts, code):
    path, _ = write_stack(tmp_path, "folder", slices())
    assert_refused(run(path, tmp_path / "out/a.zip", *args), tmp_path, *texts, exit_code=code)


def test_limits_that_a_type_cannot_keep_are_refused(tmp_path):
    path = write_source(tmp_path / "src", {"a.png": encode(np.uint16([[0, 1]]))})
    assert_refused(run(path, tmp_path / "out/a.zip", "--scale=0,9", "--clip=-9,-1"), tmp_path,
                   "a.png", "uint16", "--clip")
    path = write_source(tmp_path / "bytes", {"a.png": flat(1)})
    assert_refused(run(path, tmp_path / "out/a.zip", "--scale=0,9", "--clip=0,9"), tmp_path,
                   "a.png", "8 bits")


def check(path):
    return CliRunner().invoke(main, ["check", str(path), "--workers=1"])


def test_check_finds_values_beyond_the_recorded_limits(tmp_path):
    values = slices()
    np.save(tmp_path / "x.npy", values)
    args = [*HU, "--channels=cond:0,image:1", "--clip=-1000.1,700.3"]  # neither is a float32
    run(tmp_path / "x.npy", tmp_path / "a", *args)
    assert check(tmp_path / "a").exit_code == 0
    changed = tmp_path / "a/cond/00000/img00000003.npy"
    np.save(changed, values[3, :1].clip(-1000.1, 900))
    result = check(tmp_path / "a")
    assert result.exit_code == 1
    assert result.output.splitlines()[0] == (
        'cond/00000/img00000003.npy (image 3): has values from -1000.1 to 900, but "cond_clip" in '
        "dataset.json is -1000.1 to 700.3")


@pytest.mark.parametrize("limits", [[1], [2, 1], ["a", "b"], {"low": 1}, 7, [True, 2]])
def test_check_finds_limits_that_are_none(tmp_path, limits):
    np.save(tmp_path / "x.npy", slices())
    run(tmp_path / "x.npy", tmp_path / "a", "--scale=std", "--clip=-9,9")
    record = json.loads((tmp_path / "a/dataset.json").read_text())
    (tmp_path / "a/dataset.json").write_text(json.dumps(record | {"clip": limits}))
    result = check(tmp_path / "a")
    assert result.exit_code == 1
    assert result.output.splitlines()[0] == 'dataset.json: "clip" must be two rising numbers'


# --------------------------------------------------------------------------------------- pairs


def pattern_source(path, *names, size=4):
    """Writes a picture of each name, whose value is its place in the list."""
    return write_source(path, {name: flat(i, size) for i, name in enumerate(names)})


def pairs_of(dataset):
    """Returns the values of each image and of its condition."""
    images, _, conditions = dataset.get_batch(range(len(dataset)))
    return list(zip(images[:, 0, 0, 0].tolist(), conditions[:, 0, 0, 0].tolist(), strict=True))


MAYO = "--pair=(.*)_QD_|(.*)_FD_"


@pytest.mark.parametrize("name", ["src", "src.zip"])
def test_a_pattern_pairs_files_of_one_source_by_the_text_of_its_groups(tmp_path, name):
    path = pattern_source(tmp_path / name, "b_QD_1.png", "a_FD_7.png", "b_FD_2.png", "a_QD_9.png",
                          "c_FD_a.png", "c_QD_b.png")
    _, dataset = made(path, tmp_path / "a.zip", MAYO)
    assert pairs_of(dataset) == [(1, 3), (2, 0), (4, 5)]  # a, b, c


def test_several_files_of_one_text_are_paired_in_the_order_of_the_source(tmp_path):
    # As the published files are: folders of doses, names with the time of their own.
    names = [f"{patient}/{dose}/{patient}_{short}_1.{number:04}.{time + number}.png"
             for dose, short, time in (("quarter", "QD", 500), ("full", "FD", 200))
             for patient in ("L067", "L096") for number in (2, 10, 1)]
    _, dataset = made(pattern_source(tmp_path / "src", *names), tmp_path / "a.zip", MAYO)
    expected = [(names.index(image), names.index(condition)) for image, condition in zip(
        *(sorted(name for name in names if dose in name) for dose in ("full", "quarter")),
        strict=True)]
    assert pairs_of(dataset) == expected and len(expected) == 6


def test_a_pattern_with_a_slash_sees_folders_and_several_groups_are_one_text(tmp_path):
    names = ["p/QD/2.png", "p/QD/1.png", "p/FD/1.png", "p/FD/2.png", "q/QD/1.png", "q/FD/1.png"]
    path = pattern_source(tmp_path / "src", *names)
    _, dataset = made(path, tmp_path / "a.zip", r"--pair=(.*)/QD/(\d+)|(.*)/FD/(\d+)")
    assert pairs_of(dataset) == [(2, 1), (3, 0), (5, 4)]


def test_files_that_a_pattern_takes_for_neither_are_left_out_and_named(tmp_path):
    path = pattern_source(tmp_path / "src", "a_QD_.png", "a_FD_.png", *(f"{c}.png" for c in "xyzw"))
    output, dataset = made(path, tmp_path / "a.zip", MAYO)
    assert pairs_of(dataset) == [(1, 0)]
    assert ("Left out: 4 images that --pair matches neither way, such as w.png, x.png, y.png and "
            "1 more\n") in output


def test_labels_and_counts_are_those_of_the_images_of_a_pattern(tmp_path):
    names = [f"{folder}/{i}_{dose}.png" for dose in ("QD", "FD") for folder in ("cat", "dog")
             for i in range(3)]
    path = pattern_source(tmp_path / "src", *names)
    pair = "--pair=(.*)/(.*)_QD|(.*)/(.*)_FD"
    made(path, tmp_path / "a.zip", pair, "--classes=1,0", "--max-images=4")
    labels = [label for _, label in record_of(tmp_path / "a.zip")["labels"]]
    assert labels == [1, 1, 1, 0] and record_of(tmp_path / "a.zip")["class_names"] == ["dog", "cat"]
    own = [[name, i] for i, name in enumerate(names) if "FD" in name]  # conditions have none
    (path / "dataset.json").write_bytes(labels_json(own))
    made(path, tmp_path / "a.zip", pair)
    assert [label for _, label in record_of(tmp_path / "a.zip")["labels"]] == [6, 7, 8, 9, 10, 11]


def test_folders_of_conditions_and_images_are_no_classes(tmp_path):
    path = pattern_source(tmp_path / "src", "full/1.png", "low/1.png")
    made(path, tmp_path / "a.zip", "--pair=low/(.*)|full/(.*)")
    assert record_of(tmp_path / "a.zip")["labels"] is None


def test_pairs_of_a_pattern_have_scales_and_limits_of_their_own(tmp_path):
    values = slices(num=1)[0]
    path = write_source(tmp_path / "src", {
        "1_QD.npy": array_files.encode(values[:1]), "1_FD.npy": array_files.encode(values[1:])})
    _, dataset = made(path, tmp_path / "a.zip", "--pair=(.*)_QD|(.*)_FD", "--scale=-1000,1000",
                      "--cond-scale=minmax", "--clip=-900,900")
    image, _, condition = dataset[0]
    assert np.array_equal(image, values[1:].clip(-900, 900))
    assert np.array_equal(condition, values[:1].clip(-900, 900))
    assert dataset.scaling.spread == (1000,) and dataset.cond_scaling.spread == (900,)


@pytest.mark.parametrize("names, texts", [
    (["a_QD_.png"], ["1 of 1 groups", "'a' has 1 and 0 (a_QD_.png)", "there are 1 and 0"]),
    (["a_QD_.png", "a_FD_.png", "b_FD_1.png", "b_FD_2.png", "b_QD_.png", "c_FD_.png"],
     ["2 of 3 groups", "'b' has 1 and 2 (b_FD_1.png), 'c' has 0 and 1", "there are 2 and 4"]),
    ([f"{i}_FD_.png" for i in range(9)],
     ["9 of 9", "'2' has 0 and 1 (2_FD_.png) and 6 more", "there are 0 and 9"]),
    (["a.png", "b.png", "c.png", "d.png"], ["none of 4 names matches", "b.png, c.png and 1 more"]),
    (["p/1_QD_.png", "p/1_FD_.png", "q/1_QD_.png", "q/1_FD_.png"],
     ["files of '1' are in 2 folders, such as p, q", "with a /"]),
])
def test_files_without_a_certain_partner_are_one_line(tmp_path, names, texts):
    path = pattern_source(tmp_path / "src", *names)
    assert_refused(run(path, tmp_path / "out/a.zip", MAYO), tmp_path, "--pair: ", *texts)


@pytest.mark.parametrize("args, texts", [
    (["--pair=(.*"], ["not a regular expression"]), (["--pair=(a)(b)"], ["two alternatives"]),
    (["--pair=a|b"], ["two alternatives"]), (["--pair=(a)|(b)|(c)"], ["two alternatives"]),
    (["--pair="], ["two alternatives"]), (["--pair=order"], ["needs --cond-source"]),
    ([MAYO, "--cond-source=x"], ["--cond-source and --pair", "choose one"]),
    ([MAYO, "--channels=cond:0,image:1"], ["--pair and --channels", "choose one"]),
])
def test_patterns_that_are_none_are_refused(tmp_path, args, texts):
    path = pattern_source(tmp_path / "src", "a_QD_.png", "a_FD_.png")
    assert_refused(run(path, tmp_path / "out/a.zip", *args), tmp_path, *texts, exit_code=2)


def test_arrays_have_no_names_for_a_pattern(tmp_path):
    path, _ = write_stack(tmp_path, "array", slices())
    assert_refused(run(path, tmp_path / "out/a.zip", MAYO, "--scale=std"), tmp_path,
                   "--pair", "--channels", "--pair=order")


def test_order_pairs_sources_of_other_names(tmp_path):
    images = pattern_source(tmp_path / "src", *(f"x{i}.png" for i in range(4)))
    conditions = pattern_source(tmp_path / "cond", "d.png", "b.png", "a.png", "c.png")
    args = [f"--cond-source={conditions}", "--pair=order"]
    _, dataset = made(images, tmp_path / "a.zip", *args)
    assert pairs_of(dataset) == [(0, 2), (1, 1), (2, 3), (3, 0)]
    _, dataset = made(images, tmp_path / "a.zip", *args, "--max-images=2")
    assert pairs_of(dataset) == [(0, 2), (1, 1)]
    (conditions / "e.png").write_bytes((conditions / "d.png").read_bytes())
    assert_refused(run(images, tmp_path / "out/a.zip", *args), tmp_path,
                   "--source has 4 images, but --cond-source has 5")


def named_pairs(output_dataset, names):
    """Returns the names of each image and its condition, of files that hold their numbers."""
    _, dataset = output_dataset
    return [(names[image], names[condition]) for image, condition in pairs_of(dataset)]


@pytest.mark.parametrize("pair", [MAYO, "--pair=(.*)_QD.*|(.*)_FD.*"])
@pytest.mark.parametrize("condition, image", [
    ("{}_QD_{}", "{}_FD_{:02}"), ("{}_QD_{:03}", "{}_FD_{}"),  # 10 comes before 2, or not
    ("{}_QD_{}", "{}_FD_n{:02}_512"), ("{}_QD_8_{}", "{}_FD_4_{:02}"),
    ("{}_QD_{}_x7", "{}_FD_{:02}_x7")])
def test_files_of_one_text_are_paired_by_the_numbers_in_the_rest_of_their_names(
        tmp_path, pair, condition, image):
    pairs = [(f"{image.format(patient, k)}.png", f"{condition.format(patient, k)}.png")
             for patient in ("L1", "L2") for k in range(1, 12)]
    names = [name for both in pairs for name in both]
    done = made(pattern_source(tmp_path / "src", *names), tmp_path / "a.zip", pair)
    assert named_pairs(done, names) == sorted(pairs) and "Warning" not in done[0]


@pytest.mark.parametrize("conditions, images, doubt", [
    ("abc", "xyz", True), ([4, 5, 6], [1, 2, 3], True), ([0, 1, 2], [1, 2, 3], True),
    (["3_3", "5_3", "7_3"], ["1_1", "1_2", "1_4"], True), (["2_", "3_"], ["a2_", "b3_"], False)])
def test_order_among_files_of_one_text_is_told(tmp_path, conditions, images, doubt):
    names = [f"p_{dose}_{text}.png" for dose, texts in (("QD", conditions), ("FD", images))
             for text in texts]
    output, dataset = made(pattern_source(tmp_path / "src", "q_FD_.png", "q_QD_.png", *names),
                           tmp_path / "a.zip", MAYO)
    n = len(images)
    assert pairs_of(dataset) == [(n + 2 + i, i + 2) for i in range(n)] + [(0, 1)]
    expected = (f"Warning: --pair: {n} of {n + 1} images have the same text as others and are "
                "paired by order, because no numbers in the rest of their names are the same; "
                f"check that {names[0]} is the condition image of {names[n]}\n")
    assert (expected in output) == doubt and ("Warning" in output) == doubt


def test_files_of_one_text_without_a_partner_of_their_number_are_refused(tmp_path):
    names = [f"p_{dose}_{k}.png" for dose, lost in (("QD", 4), ("FD", 2)) for k in range(6)
             if k != lost]
    assert_refused(run(pattern_source(tmp_path / "src", *names), tmp_path / "out/a.zip", MAYO),
                   tmp_path, "--pair: 1 of 5 images have no condition image with their number, "
                   "but others have; the first is p_FD_4.png")


@pytest.mark.parametrize("conditions, images, num_doubted", [
    ([f"q{i}" for i in range(1, 12)], [f"f{i:02}" for i in range(1, 12)], 10),
    (["q1", "q2", "q4"], ["f1", "f3", "f4"], 1), (["q0", "q1"], ["f1", "f2"], 0),
    (["q3", "q4"], ["f1", "f2"], 0), (["q1", "q2"], ["1_f1", "1_f2"], 0), ("ab", "xy", 0)])
def test_numbers_that_speak_against_an_order_are_told(tmp_path, conditions, images, num_doubted):
    source = pattern_source(tmp_path / "src", *(f"{name}.png" for name in sorted(images)))
    others = pattern_source(tmp_path / "cond", *(f"{name}.png" for name in sorted(conditions)))
    output, dataset = made(source, tmp_path / "a.zip", f"--cond-source={others}", "--pair=order")
    assert pairs_of(dataset) == [(i, i) for i in range(len(images))]
    n, first = len(images), next((pair for pair in zip(sorted(conditions), sorted(images),
                                                       strict=True) if pair[0][1:] !=
                                  pair[1][1:].lstrip("0")), None)
    warned = re.findall(r"^Warning: .*$", output, re.M)
    assert warned == ([] if not num_doubted else [
        f"Warning: --pair=order: by the numbers in their names, {num_doubted} of {n} images have "
        f"other condition images than by order, which makes {first[0]}.png that of "
        f"{first[1]}.png"])


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_fit_whether_accents_are_letters_of_their_own_or_not(tmp_path, form, other):
    names = ["Évora.png", "Eza.png", "Zürich.png", "Zug.png"]
    images, conditions = (pattern_source(tmp_path / folder, *(
        unicodedata.normalize(own, name) for name in names))
        for folder, own in (("src", form), ("cond", other)))
    _, dataset = made(images, tmp_path / "a.zip", f"--cond-source={conditions}")
    assert [image for image, condition in pairs_of(dataset) if image == condition] == sorted(
        range(4), key=lambda i: unicodedata.normalize(form, names[i]))
    # So does a data set whose conditions were copied from elsewhere.
    os.rename(conditions, images / "cond")
    dataset = ImageFolderDataset(images, use_conditions=True)
    assert all(image == condition for image, condition in pairs_of(dataset))


def test_images_are_not_their_own_conditions(tmp_path):
    path = pattern_source(tmp_path / "src", "a.png")
    assert_refused(run(path, tmp_path / "out/a.zip", f"--cond-source={path}/."), tmp_path,
                   "would be their own conditions")


# --------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["src", "src.zip"])
@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_names_are_kept_and_so_are_those_of_conditions_and_labels(tmp_path, name, dest):
    names = ["cat/b.png", "cat/a.JPG", "dog.v2/1.2.840.1.bmp", "dog.v2/1.2.840.2.tiff"]
    kinds = ["png", "jpeg", "bmp", "tiff"]
    images = {names[i]: encode(flat(i), kinds[i]) for i in range(4)}
    path = write_source(tmp_path / name, images)
    conditions = write_source(tmp_path / "cond", {
        f"{stem(name)}.npy": array_files.encode(np.full([1, 4, 4], 10.5 + i, np.float32))
        for i, name in enumerate(names)})
    _, dataset = made(path, tmp_path / dest, "--keep-names", f"--cond-source={conditions}",
                      "--cond-scale=0,20")
    found = DataSet(tmp_path / dest)
    assert found.names == ["cat/a.png", "cat/b.png", "dog.v2/1.2.840.1.png",
                           "dog.v2/1.2.840.2.png"]
    assert found.cond_names == [f"cond/{stem(name)}.npy" for name in found.names]
    assert [int(image) - 10 for _, image in pairs_of(dataset)] == [1, 0, 2, 3]
    assert found.labels() == {"cat/a.png": 0, "cat/b.png": 0, "dog.v2/1.2.840.1.png": 1,
                              "dog.v2/1.2.840.2.png": 1}
    assert check(tmp_path / dest).exit_code == 0


def test_conditions_of_a_pattern_have_the_names_of_their_images(tmp_path):
    path = pattern_source(tmp_path / "src", "low/a_QD_1.png", "full/a_FD_2.png")
    made(path, tmp_path / "a", MAYO, "--keep-names")
    found = DataSet(tmp_path / "a")
    assert (found.names, found.cond_names) == (["full/a_FD_2.png"], ["cond/full/a_FD_2.png"])


def test_names_of_those_left_out_do_not_collide(tmp_path):
    path = write_source(tmp_path / "src", {"a.png": flat(1), "b.png": flat(2), "b.bmp":
                                           encode(flat(3), "bmp")})
    assert_refused(run(path, tmp_path / "out/a.zip", "--keep-names"), tmp_path,
                   "--keep-names: b.bmp and b.png would both be named b; rename one")
    made(path, tmp_path / "a", "--keep-names", "--max-images=2")
    assert DataSet(tmp_path / "a").names == ["a.png", "b.png"]


def test_names_that_are_not_text_are_refused(tmp_path):
    path = write_source(tmp_path / "src", {"a.png": flat(1)})
    os.rename(path / "a.png", os.fsencode(path) + b"/\xff.png")
    assert_refused(run(path, tmp_path / "out/a.zip", "--keep-names"), tmp_path, "not UTF-8")


def test_arrays_have_no_names_to_keep(tmp_path):
    path, _ = write_stack(tmp_path, "array", slices(num=2))
    made(path, tmp_path / "a", "--keep-names", "--scale=std")
    assert DataSet(tmp_path / "a").names == ["00000/img00000000.npy", "00000/img00000001.npy"]


def test_names_in_a_zip_are_kept_as_paths(tmp_path):
    path = write_source(tmp_path / "src.zip", {"./a//x.png": flat(1)})
    made(path, tmp_path / "a.zip", "--keep-names")
    assert DataSet(tmp_path / "a.zip").names == ["a/x.png"]
    path = write_source(tmp_path / "src.zip", {"./cond/x.png": flat(1), "y.png": flat(1)})
    assert_refused(run(path, tmp_path / "out/a.zip", "--keep-names"), tmp_path,
                   "./cond/x.png would be a condition image")


# ------------------------------------------------------------------------------------- pictures


def shown(path, *args):
    """Returns the pixels of conditions and images in the picture of a data set of 64x64."""
    out = path.with_name("out.png")
    result = CliRunner().invoke(main, ["show", str(path), f"--out={out}", "--workers=1", *args])
    assert result.exit_code == 0, result.output
    picture = PIL.Image.open(out)
    return [np.asarray(picture.crop((picture.width - 66, top, picture.width - 2, top + 64)))[..., 0]
            for top in range(2, picture.height - 1, 66)]


def test_a_window_shows_values_from_black_to_white_in_the_units_of_the_data(tmp_path):
    values = slices(num=1, height=64, width=64)
    np.save(tmp_path / "x.npy", values)
    made(tmp_path / "x.npy", tmp_path / "a.zip", "--channels=cond:0,image:1", *HU)
    for center, width in ((40, 400), (-600, 1500), (0.25, 0.5)):
        for pixels, channel in zip(shown(tmp_path / "a.zip", f"--window={center},{width}"),
                                   values[0].astype(np.float64), strict=True):
            share = (channel - (center - width / 2)) / width
            # 255 share + 0.5, cut off: half a level more than -1 to 1 shown without a window.
            assert np.abs(pixels - (255 * share).clip(0, 255)).max() <= 0.51
            assert pixels[channel <= center - width / 2].max() == 0
            assert pixels[channel >= center + width / 2].min() == 255
    without = shown(tmp_path / "a.zip", "--window=1023.5,4095")
    assert np.array_equal(without, shown(tmp_path / "a.zip")), "that of the scale"


def test_masks_beside_values_are_shown_as_they_are(tmp_path):
    images = write_source(tmp_path / "src", {"a.npy": array_files.encode(slices(height=64,
                                                                                width=64)[0, :1])})
    mask = random_pixels(64, 64)
    masks = write_source(tmp_path / "masks", {"a.png": mask})
    made(images, tmp_path / "a.zip", f"--cond-source={masks}", "--scale=std")
    assert np.array_equal(shown(tmp_path / "a.zip", "--window=40,400")[0], mask)


@pytest.mark.parametrize("window", ["40", "40,0", "40,-5", "nan,5", "1,inf", "a,b", "1e300,1"])
def test_windows_that_are_none_are_refused(tmp_path, window):
    result = CliRunner().invoke(main, ["show", "x.zip", f"--window={window}"])
    assert result.exit_code == 2 and "must be a center and a width above 0" in result.output


def test_a_window_of_pictures_is_refused(tmp_path):
    path = write_source(tmp_path / "src", {"a.png": flat(1)})
    result = CliRunner().invoke(main, ["show", str(path), "--window=40,400", "--workers=1"])
    assert result.exit_code == 1 and "--window: the images have 8 bits" in result.output
    assert not (tmp_path / "src-show.png").exists()
