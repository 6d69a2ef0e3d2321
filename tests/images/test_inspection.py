"""dataset_tool.py: check finds and names every fault, show's statistics are those of the pixels."""

import json
import os
import stat
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from image_sources import EMOJI, encode, flat, labels_json, random_pixels, write_source
from scripts import ROOT
from tiny import write_dataset

from dataset_tool import main
from images.dataset import ImageFolderDataset
from images.image_files import is_image
from images.inspection import MAX_PROBLEMS


def call(*args):
    result = CliRunner().invoke(main, [*map(str, args), "--workers=1"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def problems_of(path, *args):
    """Returns the lines of a check that must fail, its last one parted."""
    result = call("check", path, *args)
    assert result.exit_code == 1, result.output
    *lines, last = result.output.splitlines()
    assert last.startswith("Error: ")
    return lines, last


# --------------------------------------------------------------------------------------- check


@pytest.mark.parametrize("folder", [False, True])
def test_a_good_data_set_is_described(tmp_path, folder):
    path = write_dataset(tmp_path / "tiny.zip")
    if folder:
        zipfile.ZipFile(path).extractall(tmp_path / "tiny")
        path = tmp_path / "tiny"
    result = call("check", path)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        f"{path}: 40 images, 8x8, 3 channels, 2 classes", "  class 0: 20", "  class 1: 20",
        f"fingerprint: {ImageFolderDataset(path).fingerprint}"]


@pytest.mark.long
def test_what_the_tool_wrote_passes(tmp_path):
    for dest in ("a.zip", "a"):
        assert call(f"--source={EMOJI}", f"--dest={tmp_path / dest}").exit_code == 0
        assert call("check", tmp_path / dest).exit_code == 0
    assert call("check", EMOJI).exit_code == 0


def test_vectors_and_empty_classes_are_told(tmp_path):
    path = write_dataset(tmp_path / "vectors.zip", vectors=True)
    assert "label vectors of 3" in call("check", path).output
    path = write_source(tmp_path / "gap", {"a.png": flat(0), "dataset.json":
                                           labels_json([["a.png", 2]])})
    assert "Note: 2 class numbers have no images, the first 0" in call("check", path).output


BAD = {"02.png": b"", "05.png": b"text", "07.png": encode(random_pixels(8, 8, 3))[:100],
       "09.png": random_pixels(4, 4, 3), "11.png": random_pixels(8, 8), "13.jpg":
       encode(random_pixels(8, 8, 3), "jpeg")[:-200], "14.png": random_pixels(8, 8, 4),
       "15.png": random_pixels(8, 9, 3)}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ["src", "src.zip"])
def test_every_bad_image_is_listed_by_name_and_number(tmp_path, name, workers):
    files = {**{f"{i:02}.png": random_pixels(8, 8, 3, seed=i) for i in range(17)}, **BAD}
    del files["13.png"]
    lines, last = problems_of(write_source(tmp_path / name, files), f"--workers={workers}")
    heads, texts = zip(*(line.split(": ", 1) for line in lines), strict=True)
    assert list(heads) == [f"{name} (image {int(name[:2])})" for name in sorted(BAD)]
    expected = ["can't be read", "not an image", "can't be read", "RGB 4x4, but most are RGB 8x8",
                "L 8x8, but most", "can't be read", "RGBA 8x8; images must be",
                "RGB 9x8, but most"]
    for text, part in zip(texts, expected, strict=True):
        assert part in text
    assert "8 problems in 17 images" in last


def test_the_first_image_may_be_the_odd_one(tmp_path):
    files = {"0.png": flat(0, 9), "1.png": flat(0), "2.png": flat(0)}
    lines, _ = problems_of(write_source(tmp_path / "src", files))
    assert lines == ["0.png (image 0): is L 9x9, but most are L 4x4"]


def test_images_of_many_sizes_are_told_how_to_become_alike(tmp_path):
    files = {f"{i}.png": flat(0, 4 + max(i - 1, 0)) for i in range(4)}  # sides 4, 4, 5, 6
    lines, _ = problems_of(write_source(tmp_path / "src", files))
    assert [line.split("; ")[0] for line in lines] == [
        "2.png (image 2): is L 5x5, others L 4x4", "3.png (image 3): is L 6x6, others L 4x4"]
    assert all("--resolution" in line for line in lines)


def test_a_flipped_bit_anywhere_in_a_png_is_found(tmp_path):
    png = encode(random_pixels(4, 4, 3), compress_level=0)
    assert png.endswith(b"\0\0\0\0IEND\xae\x42\x60\x82")  # what follows the pixels may be damaged
    files = {f"{i:03}.png": png[:i] + bytes([png[i] ^ 1]) + png[i + 1:]
             for i in range(len(png) - 12)}
    _, last = problems_of(write_source(tmp_path / "src", {**files, "good.png": png}))
    assert f"{len(files)} problems in {len(files) + 1} images" in last


def test_a_flipped_bit_in_a_zip_is_found(tmp_path):
    png = encode(random_pixels(4, 4, 3), compress_level=0)
    path = write_source(tmp_path / "src.zip", {"0.png": png, "1.png": png})
    data = path.read_bytes()
    position = data.rindex(b"IDAT") + 30
    path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1:])
    lines, _ = problems_of(path)
    assert len(lines) == 1 and "1.png (image 1): can't be read: Bad CRC" in lines[0]


@pytest.mark.parametrize("label,text", [
    (-1, "label -1 must be in 0..65535"), (0.5, "label 0.5 must be a class number"),
    ("x", 'label "x" must be'), ([1], "label [1] must have the same"), (10**9, "must be in 0.."),
    (None, "has no label"), (True, "label true must be"), ([1e39], "finite"),
])
@pytest.mark.parametrize("first", [False, True])
def test_every_bad_label_is_listed(tmp_path, label, text, first):
    bad = (0, 1) if first else (1, 2)
    labels = [[f"{i}.png", label if i in bad else 3] for i in range(5)]
    path = write_source(tmp_path / "src", {**{f"{i}.png": flat(0) for i in range(5)},
                                           "dataset.json": labels_json(labels)})
    lines, last = problems_of(path)
    assert [line.split(": ")[0] for line in lines] == [f"{i}.png (image {i})" for i in bad]
    assert all(text in line for line in lines) and "2 problems in 5 images" in last


def test_labels_of_images_that_are_not_there_are_a_problem(tmp_path):
    labels = labels_json([["a.png", 0], ["b.png", 1]])
    lines, _ = problems_of(write_source(tmp_path / "src", {"a.png": flat(0),
                                                           "dataset.json": labels}))
    assert lines == ['dataset.json: "b.png" has a label but no file']


def test_malformed_labels_are_told_beside_bad_images(tmp_path):
    files = {"a.png": b"", "b.png": flat(0), "dataset.json": b'{"labels": [["a.png", 1],\n oops]}'}
    lines, _ = problems_of(write_source(tmp_path / "src", files))
    assert "a.png (image 0)" in lines[0] and "dataset.json: line 2, column 2" in lines[1]


def test_names_that_lead_out_and_links_are_listed(tmp_path):
    path = write_source(tmp_path / "src.zip", {"../x.png": flat(0), "a.png": flat(0)})
    info = zipfile.ZipInfo("b.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, encode(flat(0)))
    lines, _ = problems_of(path)
    assert [line.split(" ")[0] for line in lines] == ["../x.png", "b.png"]
    assert "leads out" in lines[0] and "symbolic link" in lines[1]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a.png", encode(flat(0)))
    assert "a.png occurs 2 times" in problems_of(path)[1]


def test_long_lists_are_cut_and_counted(tmp_path):
    files = {f"{i:03}.png": b"broken" for i in range(MAX_PROBLEMS + 13)}
    lines, last = problems_of(write_source(tmp_path / "src", files))
    assert len(lines) == MAX_PROBLEMS + 1 and lines[-1] == "... and 13 more"
    assert lines[0].startswith("000.png") and lines[-2].startswith(f"{MAX_PROBLEMS - 1:03}.png")
    assert f"{MAX_PROBLEMS + 13} problems" in last


def test_what_is_no_data_set_is_refused(tmp_path):
    for command in ("check", "show"):
        for name, text in [("none", "no such"), ("empty", "no images found")]:
            (tmp_path / "empty").mkdir(exist_ok=True)
            result = call(command, tmp_path / name)
            assert result.exit_code == 1 and text in result.output
        (tmp_path / "cut.zip").write_bytes(EMOJI.read_bytes()[:-100])
        result = call(command, tmp_path / "cut.zip")
        assert result.exit_code == 1 and "truncated" in result.output


# ---------------------------------------------------------------------------------------- show


@pytest.mark.parametrize("shape", [(6, 6, 3), (6, 6)])
@pytest.mark.parametrize("workers", [1, 2])
def test_statistics_are_those_of_all_pixels_on_the_scale_of_training(tmp_path, shape, workers):
    pixels = random_pixels(70, *shape) // 3 + 20
    path = write_source(tmp_path / "src", {f"{i:02}.png": x for i, x in enumerate(pixels)})
    output = call("show", path, f"--workers={workers}").output.splitlines()
    scaled = pixels.reshape(70, 36, -1) / 127.5 - 1
    means, stds = scaled.mean(axis=(0, 1)), scaled.std(axis=(0, 1))
    rows = zip(("gray",) if len(means) == 1 else ("red", "green", "blue"), means, stds, strict=True)
    assert output[1:-1] == [f"{name:6s} mean {mean:+.4f}, standard deviation {std:.4f}"
                            for name, mean, std in rows]
    assert output[-1] == (f"all    standard deviation {scaled.std():.4f} in the scale of training, "
                          "where sigma_data is 0.5")


def test_the_picture_has_a_row_a_class(tmp_path):
    colors = {0: (255, 0, 0), 1: (0, 255, 0), 4: (0, 0, 255)}
    files = {f"{i}-{k}.png": np.full([64, 64, 3], color, np.uint8)
             for k, color in colors.items() for i in range(10)}
    files["dataset.json"] = labels_json([[name, int(name[2])] for name in files])
    output = call("show", write_source(tmp_path / "src", files)).output
    path = tmp_path / "src-show.png"
    assert output.startswith(f"{path}: 3 of 3 classes, up to 8 images each\n")
    picture = np.asarray(PIL.Image.open(path))
    for row, color in enumerate(colors.values()):
        assert (picture[row * 66 + 20, -500:-10:66] == color).all()
    assert sorted(os.listdir(tmp_path)) == ["src", "src-show.png"]


def test_the_rows_are_spread_over_many_classes_and_their_number_is_capped(tmp_path):
    files = {f"{i:03}.png": flat(i) for i in range(40)}
    files["dataset.json"] = labels_json([[name, int(name[:3])] for name in files])
    result = call("show", write_source(tmp_path / "src.zip", files), f"--out={tmp_path}/x/y.png")
    assert f"{tmp_path}/x/y.png: 16 of 40 classes" in result.output
    assert PIL.Image.open(tmp_path / "x/y.png").height == 16 * 66 + 2


@pytest.mark.long
def test_without_classes_the_picture_is_a_square_of_images(tmp_path):
    path = write_dataset(tmp_path / "plain.zip", num=100, classes=0, side=200)
    assert "plain-show.png: 64 of 100 images" in call("show", path).output
    assert PIL.Image.open(tmp_path / "plain-show.png").size == (8 * 130 + 2, 8 * 130 + 2)


def test_the_picture_never_becomes_an_image_of_the_data_set(tmp_path, monkeypatch):
    path = write_source(tmp_path / "src", {"a/0.png": flat(0), "b/1.png": flat(0)})
    before = ImageFolderDataset(path).fingerprint
    for out in (path / "x.png", path / "a/x.png", path / "../src/x.png"):
        result = call("show", path, f"--out={out}")
        assert result.exit_code == 1 and "inside the data set" in result.output
    monkeypatch.chdir(path)
    assert call("show", ".").exit_code == 0
    assert (tmp_path / "src-show.png").exists()
    assert ImageFolderDataset(path).fingerprint == before
    assert call("show", path, "--out=x.txt").exit_code == 2


@pytest.mark.parametrize("second", [b"broken", random_pixels(5, 5, 3), random_pixels(4, 4)])
def test_show_names_an_image_that_it_cannot_count(tmp_path, second):
    path = write_source(tmp_path / "src", {"0.png": random_pixels(4, 4, 3), "1.png": second})
    result = call("show", path)
    assert result.exit_code == 1 and "1.png (image 1)" in result.output
    assert "check" in result.output and os.listdir(tmp_path) == ["src"]


# ------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("args,texts", [
    ([], ["--source and --dest: missing", "check, show, split"]),
    (["--source=x"], ["--dest: missing"]), (["--dest=x"], ["--source: missing"]),
    (["other"], ["other"]), (["check"], ["DATA"]), (["show"], ["DATA"]),
    (["check", "a", "b"], ["b"]), (["check", "a", "--other"], ["--other"]),
    (["--other"], ["--other"]),
    (["--source=x", "check", "a"], ["--source: not a flag of check"]),
    (["--dest=x", "split", "a"], ["--dest: must come after split"]),
    (["split", "a", "--val=1", "--dest=x"], ["--val-dest"]), (["split"], ["DATA"]),
    (["split", "a", "--dest=x", "--val-dest=y"], ["--val"]),
    (["--first-frame", "show", "a"], ["--first-frame: not a flag of show"]),
])
def test_a_usage_mistake_says_what_is_missing_and_exits_with_2(args, texts):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    for text in texts:
        assert text in result.output.splitlines()[-1]


@pytest.mark.parametrize("args", [["check", "--help"], ["show", "--help"], ["split", "--help"]])
def test_help_of_the_commands_needs_no_torch(args):
    code = ("import sys, dataset_tool\n"
            f"try: dataset_tool.main({args!r})\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'numpy'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_extensions_of_images_are_those_of_pillow_in_any_case():
    assert is_image("a/b.PNG") and is_image("x.JPEG") and is_image("x.webp")
    assert not is_image("x.txt") and not is_image("png") and not is_image(json.dumps({}))


def test_extensions_are_known_even_if_an_image_was_opened_before():
    code = ("import io, PIL.Image\nfrom images.image_files import is_image\n"
            "PIL.Image.new('L', (1, 1)).save(io.BytesIO(), 'PNG')\n"
            "assert is_image('x.webp')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
