"""Folders and files as people have them: what is read, how, and what is left out."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest
from image_sources import (
    convert,
    encode,
    flat,
    gray_value,
    random_pixels,
    run,
    write_source,
)
from PIL import TiffImagePlugin

import dataset_tool
import fid
from images import array_files
from images.dataset import ImageFolderDataset
from images.image_files import sort_names
from images.pictures import DamagedImageError, png_shape, read_picture

RED = np.zeros([4, 6, 3], np.uint8) + np.array([200, 10, 10], np.uint8)


def turned(pixels, suffix="png"):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encode(pixels, suffix, exif=exif, **({"quality": 100} if suffix == "jpeg" else {}))


# ----------------------------------------------------------------------------- what is an image

def test_names_are_sorted_out():
    images = ["a/1.png", "a/2.JPG", "cat/0.npy", "..odd/x.png", "./y.png"]
    hidden = [".git/a.png", "a/.ipynb_checkpoints/1.png", "__MACOSX/a/._1.png", "a/.DS_Store",
              "a/Thumbs.db", "@eaDir/1.png/x.jpg", "._1.png"]
    others = ["notes.txt", "a/x.heic", "license.pdf", "a/x.eps", "out/generate.json"]
    pictures = ["out/vis/grid.png", "out/vis/movie.gif"]
    conditions = ["cond/a/1.png"]
    found = sort_names([*hidden, *images, *pictures, *others, *conditions, "vis/mine.png"])
    assert found.images == sorted([*images, "vis/mine.png"])
    assert (found.conditions, found.others) == (conditions, others)
    assert (found.num_hidden, found.num_pictures) == (len(hidden), len(pictures))


@pytest.mark.parametrize("name", ["src", "src.zip"])
def test_hidden_and_system_files_are_left_out_and_counted(tmp_path, name):
    files = {"pets/dog/1.png": flat(1), "pets/cat/2.png": flat(2), "pets/.hidden/x.png": flat(3),
             "__MACOSX/pets/cat/._2.png": b"\0\5\x16\7", "pets/cat/.DS_Store": b"Bud1",
             "pets/license.pdf": b"%PDF-1.4", "readme": b"hello"}
    result = run(write_source(tmp_path / name, files), tmp_path / "out.zip")
    assert result.output.splitlines() == [
        f"{tmp_path}/out.zip: 2 images, 4x4, 1 channel, 2 classes", "  class 0 (cat): 1",
        "  class 1 (dog): 1", "Left out: 2 files that aren't images (.pdf, no extension)",
        "Left out: 3 hidden or system files"]


def test_training_and_scoring_see_no_hidden_files_either(tmp_path, invoke):
    files = {"1.png": flat(1), ".trash/2.png": flat(2), "__MACOSX/._1.png": b"\0\5\x16\7"}
    for name in ("src", "src.zip"):
        dataset = ImageFolderDataset(write_source(tmp_path / name, files))
        assert list(dataset.all_names) == ["1.png"]
    assert invoke(dataset_tool.main, "check", str(tmp_path / "src")).stdout.startswith(
        f"{tmp_path}/src: 1 image")


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_a_folder_of_samples_is_a_source_without_its_pictures(tmp_path, suffix):
    files = {"run/generate.json": b"{}", "run/vis/grid.png": flat(9, 50),
             "run/vis/movie.gif": encode(flat(9, 50), "gif"),
             "run/000000/000000.png": flat(1), "run/000000/000001.png": flat(2)}
    path = write_source(tmp_path / f"src{suffix}", files)
    images, labels = convert(path, tmp_path / "out.zip")
    assert [gray_value(pixels) for _, pixels in images] == [1, 2] and labels is None
    assert len(ImageFolderDataset(path)) == 2
    assert "Left out: 2 pictures and deviations of generate.py under vis/ and std/" in run(
        path, tmp_path / "out.zip").output


def test_backslashes_of_windows_separate_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as archive:
        for i, name in enumerate(["pets\\cat\\0.png", "pets\\dog\\0.png"]):
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, encode(flat(i)))
    _, labels = convert(tmp_path / "src.zip", tmp_path / "out.zip")
    assert [label for _, label in labels] == [0, 1]


@pytest.mark.parametrize("name", ["src", "src.zip"])
def test_a_dataset_json_one_folder_down_is_found(tmp_path, name):
    labels = {"labels": [["0.png", 4], ["sub/1.png", 2]], "class_names": list("abcde")}
    files = {"ds/0.png": flat(1), "ds/sub/1.png": flat(2),
             "ds/dataset.json": json.dumps(labels).encode()}
    result = run(write_source(tmp_path / name, files), tmp_path / "out.zip")
    assert "  class 2 (c): 1\n  class 4 (e): 1\n" in result.output
    assert "3 class numbers have no images, the first 0" in result.output
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        there = json.loads(archive.read("dataset.json"))
    assert [label for _, label in there["labels"]] == [4, 2]
    assert there["class_names"] == list("abcde")


def test_class_names_are_kept_chosen_and_shown(tmp_path, invoke):
    files = {f"{name}/{i}.png": random_pixels(8, 8, 3) for name in ("cat", "dog", "eel")
             for i in range(2)}
    path = write_source(tmp_path / "src", files)
    convert(path, tmp_path / "out.zip", "--classes=2,0")
    assert ImageFolderDataset(tmp_path / "out.zip", use_labels=True).class_names == ["eel", "cat"]
    assert "class 0 (eel): 2\n  class 1 (cat): 2" in invoke(
        dataset_tool.main, "check", str(tmp_path / "out.zip")).stdout
    widths = []
    for names in (["a", "b"], ["a long name", "b"], ["a very long name, longer", "b"]):
        with zipfile.ZipFile(tmp_path / f"{len(names[0])}.zip", "w") as archive:
            for i in range(2):
                archive.writestr(f"{i}.png", encode(files["cat/0.png"]))
            archive.writestr("dataset.json", json.dumps(
                {"labels": [["0.png", 0], ["1.png", 1]], "class_names": names}))
        assert invoke(dataset_tool.main, "show", archive.filename).exit_code == 0
        widths.append(PIL.Image.open(archive.filename.replace(".zip", "-show.png")).width)
    assert widths[0] < widths[1] < widths[2] < 2 * widths[1]


def test_folders_of_splits_are_told(tmp_path):
    files = {"train/a/1.png": flat(1), "val/a/1.png": flat(2)}
    assert "Warning: the folders train and val became classes" in run(
        write_source(tmp_path / "src", files), tmp_path / "out.zip").stderr


def test_names_that_are_not_utf8_are_read(tmp_path):
    path = write_source(tmp_path / "src", {"a.png": flat(1)})
    with open(os.fsencode(path) + b"/\xff\xfe.png", "wb") as file:
        file.write(encode(flat(2)))
    images, _ = convert(path, tmp_path / "out.zip")
    assert sorted(gray_value(pixels) for _, pixels in images) == [1, 2]
    dataset = ImageFolderDataset(path)
    assert len(dataset) == 2 and len(dataset.fingerprint) == 64


# --------------------------------------------------------------------------- how it is read

@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp"])
def test_all_readers_turn_pictures_as_exif_says(tmp_path, suffix, invoke):
    content = turned(RED, suffix)
    path = write_source(tmp_path / "src", {f"{i}.{suffix}": content for i in range(2)})
    convert(path, tmp_path / "out.zip")
    raw, made = (ImageFolderDataset(source) for source in (path, tmp_path / "out.zip"))
    assert raw.image_shape == made.image_shape == [3, 6, 4]
    assert np.array_equal(raw[0][0], made[0][0])
    assert "2 images, 4x6" in invoke(dataset_tool.main, "check", str(path)).stdout
    assert invoke(dataset_tool.main, "show", str(path)).exit_code == 0


def test_a_mix_of_turned_and_upright_pictures_is_read_if_it_fits(tmp_path):
    files = {"0.jpg": turned(RED, "jpeg"), "1.jpg": encode(RED.swapaxes(0, 1), "jpeg", quality=100)}
    dataset = ImageFolderDataset(write_source(tmp_path / "src", files))
    dataset.check_uniform()
    images = dataset.get_batch([0, 1])[0].astype(int)
    assert np.abs(images[0] - images[1]).max() <= 3


@pytest.mark.parametrize("content, problem", [
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", "PostScript"),
    (b"\0\0\0\x18ftypheic" + b"\0" * 64, "HEIC"), (b"<!DOCTYPE html>404", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"", "empty"),
    (b"SIMPLE  =                    T", "not an image")])
@pytest.mark.parametrize("how", ["convert", "check", "score"])
def test_only_formats_of_the_list_are_opened(tmp_path, content, problem, how, monkeypatch, invoke):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("started"))
    path = write_source(tmp_path / "src", {"a.png": content, "b.png": flat(1)})
    done = {"convert": lambda: run(path, tmp_path / "out.zip"),
            "check": lambda: invoke(dataset_tool.main, "check", str(path)),
            "score": lambda: invoke(fid.main, "ref", f"--data={path}", "--detector=pixels",
                                    f"--dest={tmp_path}/r.npz", "--device=cpu")}[how]()
    assert done.exit_code == 1 and "a.png" in done.output and problem in done.output
    assert not (tmp_path / "out.zip").exists() and not (tmp_path / "r.npz").exists()


def test_text_in_pngs_is_passed_over(tmp_path):
    def chunk(kind, data, crc=None):
        crc = zlib.crc32(kind + data) if crc is None else crc
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    plain = encode(random_pixels(4, 4, 3))
    much = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"v" * (4 << 20)))
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(b"v" * (4 << 20)))
    for text in (much, chunk(b"tEXt", b"a\0b", crc=1), profile):
        picture = read_picture(plain[:33] + text + plain[33:], verify=True)
        assert np.array_equal(np.asarray(picture), np.asarray(PIL.Image.open(io.BytesIO(plain))))
    with pytest.raises(DamagedImageError, match="can't be read"):
        read_picture(plain[:40] + much + plain[45:])


def test_large_pictures_are_read_and_larger_ones_refused(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    assert read_picture(encode(flat(1, 14))).size == (14, 14)
    with pytest.raises(DamagedImageError, match="more pixels than the 200 allowed"):
        read_picture(encode(flat(1, 15)))


# ------------------------------------------------------------------------------- 16 bits

DEEP = {
    "12 bits in a PNG": ("x.png", np.uint16([[0, 4095]]), "--scale=0,4095"),
    "8 bits in a PNG": ("x.png", np.uint16([[0, 255]]), "--scale=0,255"),
    "8 bits in an integer TIFF": ("x.tif", np.int32([[0, 200]]), "--scale=0,255"),
}


@pytest.mark.parametrize("case", DEEP)
def test_16_bits_that_would_be_nearly_black_are_refused(tmp_path, case):
    name, pixels, way_out = DEEP[case]
    data = encode(PIL.Image.fromarray(pixels), "tiff" if name.endswith("tif") else "png")
    path = write_source(tmp_path / "src", {name: data})
    result = run(path, tmp_path / "out.zip")
    assert result.exit_code == 1 and way_out in result.output and "nearly black" in result.output
    assert not (tmp_path / "out.zip").exists()
    run(path, tmp_path / "out.zip", way_out)
    image = ImageFolderDataset(tmp_path / "out.zip")
    assert np.array_equal(image[0][0][0], pixels)


@pytest.mark.parametrize("unsigned", [3_851_800_253, 70_000, 5])
def test_integer_tiffs_are_unsigned_unless_they_say_otherwise(tmp_path, unsigned):
    content = encode(PIL.Image.fromarray(np.uint32([[1, unsigned]]).view(np.int32)), "tiff")
    sample_format = b"\x53\x01\x03\x00\x01\x00\x00\x00"  # the tag, which says signed, 2
    assert content.count(sample_format + b"\x02") == 1
    content = content.replace(sample_format + b"\x02", sample_format + b"\x01")
    path = write_source(tmp_path / "src", {"x.tif": content})
    assert run(path, tmp_path / "out.zip", "--scale=minmax").exit_code == 0
    values = ImageFolderDataset(tmp_path / "out.zip")[0][0]
    assert values.flatten().tolist() == [1.0, np.float32(unsigned)]


def test_tiffs_whose_least_value_is_white_are_turned_round(tmp_path):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[262] = 0
    image = PIL.Image.fromarray(np.uint16([[0, 65_535, 40_000]]))
    content = encode(image, "tiff", tiffinfo=info)
    path = write_source(tmp_path / "src", {"x.tif": content})
    assert PIL.Image.open(io.BytesIO(content)).tag_v2[262] == 0
    assert run(path, tmp_path / "out.zip", "--scale=0,65535").exit_code == 0
    assert ImageFolderDataset(tmp_path / "out.zip")[0][0].flatten().tolist() == [65_535, 0, 25_535]


def test_one_bright_image_makes_16_bits_what_they_are(tmp_path):
    files = {f"{i}.png": encode(PIL.Image.fromarray(np.uint16([[value]])))
             for i, value in enumerate([100, 40_000])}
    images, _ = convert(write_source(tmp_path / "src", files), tmp_path / "out.zip")
    assert [gray_value(pixels) for _, pixels in images] == [0, 40_000 >> 8]


def test_deep_colour_that_would_be_nearly_black_is_refused(tmp_path):
    def rgb16(value):
        rows = b"\0" + struct.pack(">3H", value, 0, 0)
        header = struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0)
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in parts)

    path = write_source(tmp_path / "a", {"x.png": rgb16(4095)})
    result = run(path, tmp_path / "out.zip")
    assert result.exit_code == 1 and "nearly black" in result.output
    assert "--scale=0" not in result.output and "as .npy arrays" in result.output
    with pytest.raises(ValueError, match="is RGB;16 1x1; images must be gray"):  # raw folders
        ImageFolderDataset(path)
    images, _ = convert(write_source(tmp_path / "b", {"x.png": rgb16(65535)}), tmp_path / "o.zip")
    assert images[0][1].tolist() == [[[255, 0, 0]]]


# ------------------------------------------------------------------------------- damage

@pytest.mark.parametrize("name", ["src", "src.zip"])
@pytest.mark.parametrize("workers", [1, 3])
def test_damaged_images_are_left_out_if_asked(tmp_path, name, workers):
    labels = [[f"{i}.png", i] for i in range(6)] + [["5.npy", 5]]
    files = {f"{i}.png": flat(i) for i in range(6)} | {
        "0.png": b"", "2.png": encode(random_pixels(9, 9, 3))[:100], "5.npy": b"\x93NUMPY",
        "dataset.json": json.dumps({"labels": labels}).encode()}
    path = write_source(tmp_path / name, files)
    result = run(path, tmp_path / "out.zip", f"--workers={workers}")
    assert result.exit_code == 1 and "0.png" in result.output
    assert "'dataset_tool.py check' lists all" in result.output
    assert "--skip-damaged" in result.output
    result = run(path, tmp_path / "out.zip", "--skip-damaged", f"--workers={workers}")
    assert result.exit_code == 0 and "Left out: 3 damaged images\n" in result.stdout
    assert [line.split(":")[1] for line in result.stderr.splitlines()] == [
        " 0.png", " 2.png", " 5.npy"]
    dataset = ImageFolderDataset(tmp_path / "out.zip", use_labels=True)
    assert [int(image[0, 0, 0]) for image, _ in map(dataset.__getitem__, range(4))] == [1, 3, 4, 5]
    assert dataset.class_numbers.tolist() == [1, 3, 4, 5]


def test_an_image_whose_condition_is_damaged_is_left_out_too(tmp_path):
    images = write_source(tmp_path / "src", {f"{i}.png": flat(i) for i in range(3)})
    conditions = write_source(tmp_path / "cond", {"0.png": flat(7), "1.png": b"", "2.png": flat(9)})
    result = run(images, tmp_path / "out.zip", f"--cond-source={conditions}", "--skip-damaged")
    assert result.exit_code == 0 and "Damaged: 1.png" in result.stderr
    dataset = ImageFolderDataset(tmp_path / "out.zip", use_conditions=True)
    assert [int(a[0, 0, 0]) for _, _, a in map(dataset.__getitem__, range(2))] == [7, 9]


def test_nothing_but_damage_is_an_error(tmp_path):
    path = write_source(tmp_path / "src", {"0.png": b"", "1.png": b"x"})
    result = run(path, tmp_path / "out.zip", "--skip-damaged")
    assert result.exit_code == 1 and "all 2 images are damaged; the first is 0.png" in result.output
    assert not (tmp_path / "out.zip").exists()


# --------------------------------------------------------------------- channels and layout

@pytest.mark.parametrize("kind, shape", [("rgb", [3, 4, 6]), ("gray", [1, 4, 6])])
def test_gray_and_rgb_are_made_alike_if_asked(tmp_path, kind, shape):
    path = write_source(tmp_path / "src", {"0.png": np.full([4, 6], 7, np.uint8), "1.png": RED})
    assert "--channels=rgb" in run(path, tmp_path / "out.zip").output
    convert(path, tmp_path / "out.zip", f"--channels={kind}")
    dataset = ImageFolderDataset(tmp_path / "out.zip")
    assert dataset.image_shape == shape and (dataset[0][0] == 7).all()
    if kind == "rgb":
        assert dataset[1][0][:, 0, 0].tolist() == [200, 10, 10]


@pytest.mark.parametrize("shape, last", [
    ((5, 4), False), ((3, 16, 16), False), ((16, 16, 3), True), ((16, 24, 1), True),
    ((24, 16, 2), True), ((16, 16, 4), True), ((5, 4, 4), False), ((64, 8, 8), False),
    ((1, 4, 4), False), ((3, 16, 24), False), ((4, 4, 1), None), ((1, 1, 2), None),
    ((4, 4, 4), None), ((3, 16, 3), None), ((16, 16, 16), None), ((13, 20, 30), False),
    ((20, 30, 13), None), ((16, 16, 32), None)])
def test_channels_last_are_recognised_by_the_shape(shape, last):
    assert array_files.is_channels_last(shape) is last


def convert_arrays(source, dest, *args):
    result = run(source, dest, *args)
    assert result.exit_code == 0, result.output


def values_of(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_channels_last_are_read_as_such_by_all(tmp_path):
    values = values_of(6, 8, 2)
    path = write_source(tmp_path / "src", {f"{i}.npy": array_files.encode(values)
                                           for i in range(2)})
    raw = ImageFolderDataset(path)
    assert raw.image_shape == [2, 6, 8]
    assert np.array_equal(raw[0][0], values.transpose(2, 0, 1))
    convert_arrays(path, tmp_path / "out.zip", "--scale=-1,1")
    assert np.array_equal(ImageFolderDataset(tmp_path / "out.zip")[1][0], raw[1][0])
    np.save(tmp_path / "stack.npy", np.stack([values] * 3))
    convert_arrays(tmp_path / "stack.npy", tmp_path / "out.zip", "--scale=-1,1")
    made = ImageFolderDataset(tmp_path / "out.zip")
    assert len(made) == 3 and np.array_equal(made[2][0], raw[0][0])


@pytest.mark.parametrize("is_stack", [False, True])
def test_a_shape_with_two_readings_needs_a_layout(tmp_path, is_stack):
    values = values_of(30, 20, 13)
    if is_stack:
        path = tmp_path / "x.npy"
        np.save(path, values[None])
    else:
        path = write_source(tmp_path / "src", {"x.npy": array_files.encode(values)})
    result = run(path, tmp_path / "out.zip", "--scale=-1,1")
    assert result.exit_code == 1 and "give --layout=chw or --layout=hwc" in result.output
    for layout, expected in (("chw", values), ("hwc", values.transpose(2, 0, 1))):
        convert_arrays(path, tmp_path / f"{layout}.zip", "--scale=-1,1", f"--layout={layout}")
        with zipfile.ZipFile(tmp_path / f"{layout}.zip") as archive:
            name = next(name for name in archive.namelist() if name.endswith(".npy"))
            stored = np.load(io.BytesIO(archive.read(name)))
        assert np.array_equal(stored, expected)


def test_one_image_is_not_taken_for_several(tmp_path):
    np.save(tmp_path / "x.npy", values_of(16, 16, 3))
    result = run(tmp_path / "x.npy", tmp_path / "out.zip")
    assert result.exit_code == 1 and "which is one image" in result.output


# -------------------------------------------------------------------------------- keys

def test_what_is_made_of_images_is_kept_by_what_was_read(tmp_path):
    path = write_source(tmp_path / "src", {f"{i}.png": flat(i) for i in range(8)})
    keys = [ImageFolderDataset(path, **how).content_key for how in (
        {}, {"max_size": 5}, {"max_size": 5, "random_seed": 1}, {"max_size": 4}, {"xflip": True})]
    assert len(set(keys)) == 5
    assert keys[0] == ImageFolderDataset(path).content_key


@pytest.mark.parametrize("text, size", [("4", (4, 4)), ("6x4", (6, 4)), ("6,4", (6, 4))])
def test_one_number_is_the_side_of_a_square(tmp_path, text, size):
    path = write_source(tmp_path / "src", {"0.png": random_pixels(8, 8, 3)})
    images, _ = convert(path, tmp_path / "out.zip", f"--resolution={text}")
    assert images[0][1].shape == (*size[::-1], 3)
    assert run(path, tmp_path / "out.zip", "--resolution=0").exit_code == 2


# ------------------------------------------------------------------ whether a PNG is whole

@pytest.mark.parametrize("mode, channels", [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
def test_a_whole_png_has_its_shape_and_no_changed_or_missing_byte_goes_unnoticed(mode, channels):
    rng = np.random.default_rng(channels)
    pixels = rng.integers(0, 256, [6, 5, channels], np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.squeeze(), mode).save(file, "PNG")
    content = file.getvalue()
    assert png_shape(content) == (channels, 6, 5)
    for size in range(len(content)):
        with pytest.raises(ValueError):
            png_shape(content[:size])
        with pytest.raises(ValueError):
            png_shape(content[:size] + bytes([content[size] ^ 16]) + content[size + 1:])


@pytest.mark.parametrize("mode", ["P", "1", "I;16"])
def test_a_png_of_a_palette_or_of_other_than_8_bits_has_no_shape(mode):
    file = io.BytesIO()
    PIL.Image.new(mode, (5, 6)).save(file, "PNG")
    with pytest.raises(ValueError, match="colour type"):
        png_shape(file.getvalue())


def test_a_png_without_pixels_has_no_shape():
    def chunk(kind, data=b""):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))
    with pytest.raises(ValueError, match="no header or no pixels"):
        png_shape(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(b"IEND"))
