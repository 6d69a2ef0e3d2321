"""dataset_tool.py split: who is held out, what the two parts keep, and what is refused."""

import collections
import errno
import io
import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from image_sources import assert_refused, encode, flat, labels_json, random_pixels, write_source
from scipy import stats
from scripts import ROOT
from tiny import TINY_RUN, write_dataset

import fid
import train
from dataset_tool import main
from images.dataset import ImageFolderDataset
from images.splitting import choose_held_out


def split(data, tmp_path, *args, val="0.25", dest="train.zip", val_dest="val.zip"):
    """Runs the command; the parts are in `out`."""
    return CliRunner().invoke(main, [
        "split", str(data), f"--val={val}", f"--dest={tmp_path}/out/{dest}",
        f"--val-dest={tmp_path}/out/{val_dest}", *args])


def parts(data, tmp_path, *args, **options):
    """Returns {name: content} of both parts of a split that must succeed."""
    result = split(data, tmp_path, *args, **options)
    assert result.exit_code == 0, result.output
    return [files_of(tmp_path / "out" / options.get(key, default))
            for key, default in (("dest", "train.zip"), ("val_dest", "val.zip"))]


def files_of(path):
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file.read_bytes()
                for file in path.rglob("*") if file.is_file()}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pictures(num=20):
    return {f"{i:02}.png": flat(i) for i in range(num)}


def array(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@pytest.mark.parametrize("flag", ["dest", "val_dest"])
@pytest.mark.parametrize("name", ["/proc/x.zip", "/proc/x", "/proc/none/x.zip"])
def test_a_place_that_can_not_be_written_is_named_with_its_flag(tmp_path, flag, name):
    data = write_dataset(tmp_path / "data.zip", num=8)
    args = ["split", str(data), "--val=0.25", *(
        f"--{key.replace('_', '-')}={name if key == flag else tmp_path / 'out/other.zip'}"
        for key in ("dest", "val_dest"))]
    result = CliRunner().invoke(main, args)
    [line] = result.stderr.splitlines()
    assert result.exit_code == 1 and "name another place" in line and ".tmp" not in line
    assert f"--{flag.replace('_', '-')}={name}: can't be written (" in line
    assert not list((tmp_path / "out").glob("*"))


# ------------------------------------------------------------------------------- who is held out


@pytest.mark.parametrize("name", ["src", "src.zip"])
@pytest.mark.parametrize("dest,val_dest", [("t.zip", "v.zip"), ("t", "v"), ("t", "v.zip")])
def test_each_file_is_in_one_part_with_its_bytes(tmp_path, name, dest, val_dest):
    files = {f"{i % 3}/{i:02}.jpg": encode(random_pixels(5, 5, 3, seed=i), "jpeg")
             for i in range(20)}
    source = write_source(tmp_path / name, files)
    train_part, held_out = parts(source, tmp_path, dest=dest, val_dest=val_dest)
    assert not train_part.keys() & held_out.keys() and len(held_out) == 5
    assert train_part | held_out == files


def test_the_seed_alone_decides_whatever_the_order_of_the_files(tmp_path):
    files = {name: encode(pixels) for name, pixels in pictures().items()}
    backwards = dict(reversed(files.items()))
    sources = [write_source(tmp_path / "a.zip", files), write_source(tmp_path / "b.zip", backwards),
               write_source(tmp_path / "c", files)]
    found = {}
    for seed in (0, 1, -7):
        written = []
        for source in sources:
            parts(source, tmp_path, f"--seed={seed}")
            written.append([(tmp_path / "out" / name).read_bytes()
                            for name in ("train.zip", "val.zip")])
        assert written[0] == written[1] == written[2]
        found[seed] = frozenset(files_of(tmp_path / "out/val.zip"))
    assert len(set(found.values())) == 3
    # What version 0.1 chose, so that a held-out set can always be made again.
    assert choose_held_out(dict.fromkeys(files), 5, 0) == found[0] == {
        "05.png", "09.png", "17.png", "18.png", "19.png"}


def test_every_image_is_held_out_equally_often():
    classes = {f"{i}.png": i % 2 for i in range(20)}
    counts = collections.Counter()
    for seed in range(1000):
        counts.update(choose_held_out(classes, 6, seed))
    assert set(counts) == set(classes)
    # Hypergeometric per image: the statistic is smaller than chi-square's with 19 degrees.
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def held_out_sizes(sizes, num, seed=0):
    """Returns how many images of classes of these sizes are held out."""
    classes = {f"{label}-{i}": label for label, size in enumerate(sizes) for i in range(size)}
    chosen = choose_held_out(classes, num, seed)
    assert len(chosen) == num
    counts = collections.Counter(classes[name] for name in chosen)
    return [counts[label] for label in range(len(sizes))]


def test_classes_get_their_share_by_largest_remainders():
    # The example of "Largest remainder method" in Wikipedia, in hundreds of votes.
    assert held_out_sizes([470, 160, 159, 120, 60, 31], 10) == [5, 2, 1, 1, 1, 0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(20, 60, rng.integers(1, 8))
        num = int(rng.integers(1, sizes.sum() // 2))
        due = num * sizes / sizes.sum()
        assert (np.abs(held_out_sizes(sizes, num) - due) < 1).all()


@pytest.mark.parametrize("sizes,num,expected", [
    ([90] + [1] * 10, 50, [50] + [0] * 10), ([2, 2, 2], 3, [1, 1, 1]), ([1, 3], 2, [0, 2]),
    ([2, 1, 40], 40, [1, 0, 39]),
])
def test_an_image_of_each_class_is_left_to_train_on(sizes, num, expected):
    assert held_out_sizes(sizes, num) == expected


@pytest.mark.parametrize("val,num", [
    ("0.1", 4), ("0.0124", None), ("0.0125", 1), ("0.33", 13), ("0.95", 38), ("0.97", None),
    ("1", 1), ("38", 38), ("39", None)])
def test_a_share_is_rounded_to_the_nearest_number(dataset_zip, tmp_path, val, num):
    result = split(dataset_zip, tmp_path, val=val)  # 40 images of 2 classes
    if num is None:
        assert_refused(result, tmp_path, f"--val={val}: would hold out", "of 40 images", "1 to 38")
    else:
        assert result.exit_code == 0
        assert len(ImageFolderDataset(tmp_path / "out/val.zip")) == num


# ----------------------------------------------------------------------------- what they keep


def test_labels_names_of_classes_and_unknown_keys_are_kept(tmp_path):
    entries = [[f"{i:02}.png", i // 5] for i in reversed(range(20))]
    record = {"by": "me", "labels": [*entries, ["gone.png", 1]], "class_names": list("abcd"),
              "more": {"x": [1.5, None]}}
    source = write_source(tmp_path / "src.zip", {
        **pictures(), "dataset.json": json.dumps(record).encode()})
    for part, num in zip(parts(source, tmp_path, val="0.2"), (4, 1), strict=True):
        kept = json.loads(part.pop("dataset.json"))
        assert list(kept) == list(record)
        assert kept == record | {"labels": [entry for entry in entries if entry[0] in part]}
        assert collections.Counter(label for _, label in kept["labels"]) == dict.fromkeys(
            range(4), num)
    for name in ("train.zip", "val.zip"):
        dataset = ImageFolderDataset(tmp_path / "out" / name, use_labels=True)
        assert dataset.class_names == list("abcd")
        for i in range(len(dataset)):
            assert dataset.get_details(i).raw_label == dataset[i][0].flat[0] // 5


def test_label_vectors_are_kept(tmp_path):
    source = write_dataset(tmp_path / "src.zip", vectors=True)
    labels = json.loads(files_of(source)["dataset.json"])["labels"]
    kept = [json.loads(part["dataset.json"])["labels"] for part in parts(source, tmp_path)]
    assert [len(part) for part in kept] == [30, 10] and sorted(kept[0] + kept[1]) == labels


@pytest.mark.parametrize("text", [None, b'{"labels": null,\n "scale": null}', b"{}"])
def test_a_dataset_json_without_labels_is_copied_and_none_is_made(tmp_path, text):
    source = write_source(tmp_path / "src", pictures() | ({"dataset.json": text} if text else {}))
    for part in parts(source, tmp_path):
        assert part.get("dataset.json") == text


def test_condition_images_go_with_their_images(tmp_path):
    files = {f"{kind}a/{i:02}.{suffix}": encode(flat(i + add))
             for i in range(20) for kind, suffix, add in (("", "png", 0), ("cond/", "bmp", 100))}
    source = write_source(tmp_path / "src", files)
    train_part, held_out = parts(source, tmp_path)
    assert train_part | held_out == files and not train_part.keys() & held_out.keys()
    for name, num in (("train.zip", 15), ("val.zip", 5)):
        dataset = ImageFolderDataset(tmp_path / "out" / name, use_conditions=True)
        assert len(dataset) == num
        for i in range(num):
            image, _, condition = dataset[i]
            assert (condition == image + 100).all()
    output = split(source, tmp_path).output
    assert f"{tmp_path}/out/val.zip: 5 images, 5 condition images\n" in output


def test_both_parts_have_the_scale_of_all_images(tmp_path):
    rng = np.random.default_rng(0)
    files = {f"{i:02}.npy": array(rng.normal(i, 1, [2, 4, 4]).astype(np.float32))
             for i in range(20)}
    source, conditions = (write_source(tmp_path / name, files) for name in ("src", "cond"))
    whole = tmp_path / "whole.zip"
    result = CliRunner().invoke(main, [f"--source={source}", f"--dest={whole}", "--scale=std",
                                       f"--cond-source={conditions}", "--cond-scale=-1,30"])
    assert result.exit_code == 0, result.output
    train_part, held_out = parts(whole, tmp_path)
    images = files_of(whole)
    assert all(images[name] == data for part in (train_part, held_out)
               for name, data in part.items() if name != "dataset.json")
    expected = ImageFolderDataset(whole, use_conditions=True)
    assert expected.scaling != expected.cond_scaling
    for name in ("train.zip", "val.zip"):
        dataset = ImageFolderDataset(tmp_path / "out" / name, use_conditions=True)
        assert dataset.scaling == expected.scaling
        assert dataset.cond_scaling == expected.cond_scaling


def test_generated_arrays_keep_the_scale_and_the_record_of_their_folder(tmp_path):
    record = json.dumps({"scale": {"center": [3.0], "spread": [7.0]}, "not_finite": [1]}).encode()
    files = {f"00000{i}.npy": array(np.full([1, 4, 4], i, np.float32)) for i in range(4)}
    source = write_source(tmp_path / "src", files | {"generate.json": record,
                                                     "vis/grid.png": flat(0)})
    result = split(source, tmp_path)
    assert "Left out: 1 picture or deviation of generate.py" in result.output
    for name in ("train.zip", "val.zip"):
        path = tmp_path / "out" / name
        assert ImageFolderDataset(path).scaling == ImageFolderDataset(source).scaling
        assert files_of(path)["generate.json"] == record


def test_names_that_are_not_ascii_are_kept(tmp_path):
    files = {f"größe/猫 {i}.png": encode(flat(i)) for i in range(4)}
    files["dataset.json"] = labels_json([[name, i % 2] for i, name in enumerate(files)])
    source = write_source(tmp_path / "src", files)
    found = parts(source, tmp_path), parts(source, tmp_path, dest="t", val_dest="v")
    assert found[0] == found[1]
    assert set(found[0][0]) | set(found[0][1]) == set(files)
    assert ImageFolderDataset(tmp_path / "out/train.zip", use_labels=True).label_dim == 2


def test_what_is_no_part_of_the_data_set_is_left_out_and_counted(tmp_path):
    source = write_source(tmp_path / "src", pictures() | {
        "readme.txt": b"x", "a/dataset.json": b"{}", ".hidden.png": flat(0)})
    train_part, held_out = parts(source, tmp_path)
    assert (train_part | held_out).keys() == pictures().keys()
    lines = split(source, tmp_path).output.splitlines()
    assert lines[-2:] == ["Left out: 2 files that aren't images (.txt, .json)",
                          "Left out: 1 hidden or system file"]


def test_the_summary_counts_both_parts(tmp_path):
    numbers = [0] * 9 + [1] * 10 + [3]
    source = write_source(tmp_path / "src", pictures() | {"dataset.json": json.dumps({
        "labels": [[f"{i:02}.png", k] for i, k in enumerate(numbers)],
        "class_names": ["cat", "dog"]}).encode()})
    assert split(source, tmp_path, val="4").output.splitlines() == [
        f"{tmp_path}/out/train.zip: 16 images, 3 classes",
        f"{tmp_path}/out/val.zip: 4 images, 2 classes",
        "  class 0 (cat): 7 to train on, 2 held out", "  class 1 (dog): 8 to train on, 2 held out",
        "  class 3: 1 to train on, 0 held out",
        "Note: no image is held out of 1 class, the first 3"]


@pytest.mark.long
def test_training_checking_and_scoring_read_the_parts(dataset_zip, tmp_path, invoke):
    parts(dataset_zip, tmp_path)
    one, two = tmp_path / "out/train.zip", tmp_path / "out/val.zip"
    for path in (one, two):
        assert invoke(main, "check", path, "--workers=1").exit_code == 0
    result = invoke(train.main, f"--outdir={tmp_path}/runs", f"--data={one}", f"--val-data={two}",
                    "--cond=1", "--device=cpu", "--dry-run", *TINY_RUN)
    assert result.exit_code == 0, result.output
    result = invoke(fid.main, "calc", f"--images={one}", f"--ref={two}", "--num=10",
                    "--detector=pixels", "--workers=0", "--device=cpu")
    assert result.exit_code == 0 and "pixels Frechet distance" in result.output, result.output


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("files,texts", [
    ({}, ["no images found"]), ({"a.png": flat(0)}, ["only one image"]),
    ({"a.png": flat(0), "b.png": flat(1), "dataset.json": labels_json([["a.png", 0],
                                                                      ["b.png", 1]])},
     ["only one image of each class"]),
    (pictures() | {"dataset.json": labels_json([["00.png", 0]])}, ["no label for 01.png", "19 of"]),
    (pictures() | {"dataset.json": b'{"labels": [\n'}, ["dataset.json: line 2"]),
    (pictures() | {"cond/03.png": flat(0)}, ["no condition image for 00.png; 19 of 20"]),
    ({"a.png": flat(0), "b.png": flat(1), "cond/a.png": flat(0), "cond/b.png": flat(0),
      "cond/c.png": flat(0)}, ["cond/c.png belongs to no image"]),
])
@pytest.mark.parametrize("name", ["src", "src.zip"])
def test_what_cannot_be_divided_is_refused_and_nothing_is_written(tmp_path, name, files, texts):
    source = write_source(tmp_path / name, files)
    assert_refused(split(source, tmp_path, val="1"), tmp_path, str(source), *texts)


def test_a_source_that_is_no_data_set_is_refused(tmp_path):
    assert_refused(split(tmp_path / "none", tmp_path), tmp_path, "no such folder or ZIP")
    (tmp_path / "x.npy").write_bytes(array(np.zeros([3, 4, 4])))
    assert_refused(split(tmp_path / "x.npy", tmp_path), tmp_path, "neither folder nor ZIP")


@pytest.mark.parametrize("dest,val_dest", [("t.zip", "v.zip"), ("t", "v")])
@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "cond/../../a.png"])
def test_names_that_lead_out_are_refused(tmp_path, name, dest, val_dest):
    source = write_source(tmp_path / "src.zip", {"a.png": flat(0), "b.png": flat(0), name: flat(0)})
    result = split(source, tmp_path, dest=dest, val_dest=val_dest)
    assert_refused(result, tmp_path, f"{name} leads out")
    assert os.listdir(tmp_path) == ["src.zip"]


def test_names_that_are_no_text_are_refused(tmp_path):
    source = write_source(tmp_path / "src", pictures())
    Path(os.fsdecode(os.fsencode(source) + b"/\xe9.png")).write_bytes(encode(flat(0)))
    assert_refused(split(source, tmp_path), tmp_path, r"\udce9.png' is not UTF-8; rename")


@pytest.mark.parametrize("val", ["0", "1.0", "-1", "-0.5", "1.5", "nan", "inf", "10%", "x", ""])
def test_a_val_that_is_neither_share_nor_number_exits_with_2(dataset_zip, tmp_path, val):
    assert_refused(split(dataset_zip, tmp_path, val=val), tmp_path, f"{val}: must be a share",
                   "whole number", exit_code=2)


def test_destinations_that_meet_are_refused(dataset_zip, tmp_path):
    same, inside = "is --dest too", "inside the other"
    for dest, val_dest, text in [("a.zip", "a.zip", same), ("a", "../out/a", same),
                                 ("a", "a/b.zip", inside), ("a/b", "a", inside)]:
        result = split(dataset_zip, tmp_path, dest=dest, val_dest=val_dest)
        assert_refused(result, tmp_path, f"--val-dest={tmp_path}/out/{val_dest}", text, exit_code=2)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    result = split(dataset_zip, tmp_path, dest="a.zip", val_dest="../link/a.zip")
    assert_refused(result, tmp_path, "is --dest too", exit_code=2)


@pytest.mark.parametrize("which", ["dest", "val_dest"])
def test_the_source_is_neither_replaced_nor_written_into(tmp_path, which):
    flag = f"--{which.replace('_', '-')}="
    archive = write_source(tmp_path / "src.zip", pictures())
    folder = write_source(tmp_path / "src", pictures())
    (tmp_path / "link.zip").symlink_to(archive)
    before = files_of(folder), archive.read_bytes()
    for source, place, text in [(archive, "../src.zip", "is the source itself"),
                                (archive, "../link.zip", "is the source itself"),
                                (folder, "../src", "is the source itself"),
                                (folder, "../src/a.zip", "lies inside the data set"),
                                (folder, "../src/a", "lies inside the data set")]:
        result = split(source, tmp_path, **{which: place})
        assert_refused(result, tmp_path, flag, text)
    assert (files_of(folder), archive.read_bytes()) == before


def test_an_earlier_zip_is_replaced_and_an_earlier_folder_must_be_empty(dataset_zip, tmp_path):
    parts(dataset_zip, tmp_path, "--seed=1")
    before = files_of(tmp_path / "out/val.zip")
    assert parts(dataset_zip, tmp_path, "--seed=2")[1] != before
    write_source(tmp_path, {"out/t/mine.txt": b"x"})
    kept = ["t", "train.zip", "val.zip"]
    for options in ({"dest": "t"}, {"val_dest": "t"}):
        flag = f"--{next(iter(options)).replace('_', '-')}="
        assert_refused(split(dataset_zip, tmp_path, **options), tmp_path, flag,
                       "not an empty folder", kept=kept)
    (tmp_path / "out/t/mine.txt").unlink()
    (tmp_path / "out/v.zip").mkdir()
    assert_refused(split(dataset_zip, tmp_path, dest="t", val_dest="v.zip"), tmp_path,
                   "--val-dest=", "is a folder", kept=[*kept, "v.zip"])
    parts(dataset_zip, tmp_path, dest="t")


@pytest.mark.parametrize("dest,val_dest", [("train.zip", "val.zip"), ("t", "v"), ("t", "val.zip")])
def test_a_damaged_image_is_named_and_the_earlier_parts_stay(tmp_path, dest, val_dest):
    source = write_source(tmp_path / "src.zip", pictures())
    parts(source, tmp_path)
    before = files_of(tmp_path / "out")
    data = bytearray(source.read_bytes())
    data[data.index(b"IDAT", data.index(b"07.png")) + 6] ^= 1
    source.write_bytes(data)
    assert_refused(split(source, tmp_path, "--seed=1", dest=dest, val_dest=val_dest), tmp_path,
                   "07.png: can't be read: Bad CRC", kept=["train.zip", "val.zip"])
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("dest,val_dest", [("train.zip", "val.zip"), ("t", "v"), ("t", "val.zip")])
def test_a_full_disk_leaves_the_earlier_parts_and_nothing_else(tmp_path, dest, val_dest):
    source = write_source(tmp_path / "src", {f"{i}.png": random_pixels(99, 99) for i in range(8)})
    parts(source, tmp_path)
    before = files_of(tmp_path / "out")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))  # an image has 10 kB
    try:
        result = split(source, tmp_path, "--seed=1", dest=dest, val_dest=val_dest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_refused(result, tmp_path, "File too large", kept=["train.zip", "val.zip"])
    assert files_of(tmp_path / "out") == before


def test_a_disk_that_fails_at_the_end_leaves_both_earlier_parts(dataset_zip, tmp_path, monkeypatch):
    """Else a new part would lie beside an old one, and images be trained on and held out."""
    parts(dataset_zip, tmp_path)
    before = files_of(tmp_path / "out")
    calls, fsync = [], os.fsync

    def fail_at_the_second_file(fd):
        calls.append(fd)
        if len(set(calls)) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)
    monkeypatch.setattr(os, "fsync", fail_at_the_second_file)
    assert_refused(split(dataset_zip, tmp_path, "--seed=1"), tmp_path, "No space left",
                   kept=["train.zip", "val.zip"])
    assert files_of(tmp_path / "out") == before


def test_dividing_needs_no_torch(dataset_zip, tmp_path):
    args = ["split", str(dataset_zip), "--val=1", f"--dest={tmp_path}/t",
            f"--val-dest={tmp_path}/v"]
    code = ("import sys, dataset_tool\n"
            f"dataset_tool.main({args!r}, standalone_mode=False)\n"
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
