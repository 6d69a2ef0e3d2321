import io
import itertools
import os
import re
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from image_sources import (
    EMOJI,
    assert_refused,
    convert,
    encode,
    flat,
    gray_value,
    labels_json,
    random_pixels,
    run,
    write_source,
)
from scripts import ROOT

from dataset_tool import main
from images.dataset import ImageFolderDataset

LANCZOS = PIL.Image.Resampling.LANCZOS


def convert_one(tmp_path, data, *args, name="x.png"):
    path = write_source(tmp_path / "one", {name: data})
    [(_, pixels)], _ = convert(path, tmp_path / "one_out.zip", *args)
    return pixels


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8)])
@pytest.mark.parametrize("suffix", ["png", "bmp", "jpeg"])
def test_images_without_a_transform_are_copied_pixel_by_pixel(tmp_path, shape, suffix):
    data = encode(random_pixels(*shape), suffix)
    decoded = np.asarray(PIL.Image.open(io.BytesIO(data)))
    pixels = convert_one(tmp_path, data, name=f"x.{suffix}")
    assert pixels.shape == shape and np.array_equal(pixels, decoded)


@pytest.mark.parametrize("shape", [(20, 33, 3), (20, 33), (5, 4, 3)])
@pytest.mark.parametrize("resolution", ["12x12", "12,12"])
def test_resolution_alone_is_lanczos_without_regard_to_the_aspect(tmp_path, shape, resolution):
    image = PIL.Image.fromarray(random_pixels(*shape))
    pixels = convert_one(tmp_path, encode(image), f"--resolution={resolution}")
    assert np.array_equal(pixels, np.asarray(image.resize((12, 12), LANCZOS)))


@pytest.mark.parametrize("shape", [(20, 33, 3), (33, 20, 3), (21, 32), (12, 12), (7, 5, 3)])
def test_center_crop_is_the_central_square_as_rgb(tmp_path, shape):
    pixels = random_pixels(*shape)
    side = min(shape[:2])
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    square = pixels[top:top + side, left:left + side]
    if square.ndim == 2:
        square = np.stack([square] * 3, axis=2)
    expected = np.asarray(PIL.Image.fromarray(square).resize((12, 12), LANCZOS))
    out = convert_one(tmp_path, pixels, "--transform=center-crop", "--resolution=12x12")
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("shape", [(40, 48, 3), (41, 37), (20, 33, 3)])
@pytest.mark.parametrize("width,height", [(16, 9), (16, 16), (14, 8)])
def test_center_crop_wide_is_a_band_on_a_black_square(tmp_path, shape, width, height):
    pixels = random_pixels(*shape)
    rows = int(np.rint(width * shape[0] / shape[1]))
    top = (shape[0] - rows) // 2
    band = pixels[top:top + rows]
    if band.ndim == 2:
        band = np.stack([band] * 3, axis=2)
    expected = np.zeros([width, width, 3], np.uint8)
    offset = (width - height) // 2
    expected[offset:offset + height] = PIL.Image.fromarray(band).resize((width, height), LANCZOS)
    args = ["--transform=center-crop-wide", f"--resolution={width}x{height}"]
    if rows < height:
        path = write_source(tmp_path / "one", {"x.png": pixels})
        assert_refused(run(path, tmp_path / "out.zip", *args), tmp_path, "smaller")
    else:
        assert np.array_equal(convert_one(tmp_path, pixels, *args), expected)


def test_folders_go_by_path_component_and_zips_by_sorted_name(tmp_path):
    files = {"a-1/x.png": flat(0), "a/x.png": flat(1), "a.png": flat(2), "a/b/x.PNG": flat(3),
             "B.png": flat(4), "a/10.png": flat(5), "a/9.png": flat(6)}
    by_component = [4, 5, 6, 3, 1, 0, 2]  # B.png a/10 a/9 a/b/x a/x a-1/x a.png
    by_string = [4, 0, 2, 5, 6, 3, 1]     # B.png a-1/x a.png a/10 a/9 a/b/x a/x
    for name, expected in [("src", by_component), ("src.zip", by_string)]:
        images, _ = convert(write_source(tmp_path / name, files), tmp_path / "out.zip")
        assert [gray_value(pixels) for _, pixels in images] == expected
        assert [name for name, _ in images] == [f"00000/img{i:08d}.png" for i in range(7)]


def test_top_folders_of_a_folder_are_classes_in_the_order_of_their_names(tmp_path):
    files = {"dog/1.png": flat(0), "cat/2.png": flat(1), "3.png": flat(2), "dog/cat/4.png": flat(3)}
    images, labels = convert(write_source(tmp_path / "src", files), tmp_path / "out.zip")
    classes = {gray_value(pixels): label
               for (_, pixels), (_, label) in zip(images, labels, strict=True)}
    assert classes == {2: 0, 1: 1, 0: 2, 3: 2}  # "" < "cat" < "dog"
    assert [name for name, _ in labels] == [name for name, _ in images]
    images, labels = convert(write_source(tmp_path / "src.zip", files), tmp_path / "out.zip")
    assert {gray_value(pixels): label
            for (_, pixels), (_, label) in zip(images, labels, strict=True)} == classes


@pytest.mark.parametrize("files", [{"a.png": flat(0)}, {"only/a.png": flat(0)}])
def test_fewer_than_two_top_folders_are_no_classes(tmp_path, files):
    assert convert(write_source(tmp_path / "src", files), tmp_path / "out.zip")[1] is None


@pytest.mark.parametrize("name", ["src", "src.zip"])
@pytest.mark.parametrize("new", [[3, 0], [[0.1, 2], [1e-3, -4.5]]])
def test_labels_of_dataset_json_win_and_are_passed_on_unchanged(tmp_path, name, new):
    files = {"b/x.png": flat(0), "a/x.png": flat(1),
             "dataset.json": labels_json([["b/x.png", new[1]], ["a/x.png", new[0]]])}
    _, labels = convert(write_source(tmp_path / name, files), tmp_path / "out.zip")
    assert labels == [["00000/img00000000.png", new[0]], ["00000/img00000001.png", new[1]]]


@pytest.mark.parametrize("text", [b'{"labels": null}', b'{"labels": []}'])
def test_a_dataset_json_without_labels_leaves_them_to_the_folders(tmp_path, text):
    files = {"a/x.png": flat(0), "b/x.png": flat(0), "dataset.json": text}
    labels = convert(write_source(tmp_path / "src", files), tmp_path / "out.zip")[1]
    assert [label for _, label in labels] == [0, 1]
    assert convert(write_source(tmp_path / "src.zip", files), tmp_path / "out.zip")[1] is None


def test_images_left_out_by_the_crop_leave_gaps_in_the_numbers(tmp_path):
    sizes = {"a/0.png": 16, "a/1.png": 7, "b/2.png": 16, "b/3.png": 15, "b/4.png": 20}
    path = write_source(tmp_path / "src", {name: flat(9, size) for name, size in sizes.items()})
    args = ["--transform=center-crop-wide", "--resolution=16x10"]
    images, labels = convert(path, tmp_path / "out.zip", *args)
    kept = [f"00000/img{i:08d}.png" for i in (0, 2, 4)]
    assert [name for name, _ in images] == kept
    assert labels == [[kept[0], 0], [kept[1], 1], [kept[2], 1]]
    result = run(path, tmp_path / "out.zip", *args)
    assert "Left out: 2 images smaller than --resolution, the first a/1.png" in result.output
    assert len(convert(path, tmp_path / "out.zip", "--max-images=3", *args)[0]) == 2


def test_classes_are_kept_and_numbered_in_the_order_given(tmp_path):
    numbers = [0, 1, 2, 3, 3, 1, 0, 3]
    files = {f"{i}.png": flat(i) for i in range(8)}
    files["dataset.json"] = labels_json([[f"{i}.png", c] for i, c in enumerate(numbers)])
    path = write_source(tmp_path / "src.zip", files)
    images, labels = convert(path, tmp_path / "out.zip", "--classes=3,1")
    assert [gray_value(pixels) for _, pixels in images] == [1, 3, 4, 5, 7]
    assert labels == [[f"00000/img{i:08d}.png", c] for i, c in enumerate([1, 0, 0, 1, 0])]
    images, _ = convert(path, tmp_path / "out.zip", "--classes=3,1", "--max-images=5")
    assert [gray_value(pixels) for _, pixels in images] == [1, 3, 4]


def test_a_class_that_no_image_has_is_refused(tmp_path):
    dest = tmp_path / "out" / "a.zip"
    assert_refused(run(EMOJI, dest, "--classes=1,9"), tmp_path, "class 9", "0-8")
    path = write_source(tmp_path / "a.zip", {"x.png": flat(0)})
    assert_refused(run(path, dest, "--classes=0"), tmp_path, "no labels")
    path = write_source(tmp_path / "b.zip", {"x.png": flat(0),
                                             "dataset.json": labels_json([["x.png", [1.5]]])})
    assert_refused(run(path, dest, "--classes=0"), tmp_path, "vectors")


def test_zip_and_folder_hold_the_same_files_and_the_pngs_are_stored_raw(tmp_path):
    path = write_source(tmp_path / "src", {"a/x.png": random_pixels(4, 4, 3),
                                           "b/x.png": random_pixels(4, 4, 3, seed=1)})
    convert(path, tmp_path / "out.zip")
    assert run(path, tmp_path / "out").exit_code == 0
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            assert archive.read(info) == (tmp_path / "out" / info.filename).read_bytes()
        png = archive.read("00000/img00000000.png")
    # In deflate, block type 0 means stored: bits 1 and 2 after the two bytes of zlib's header.
    data = png[png.index(b"IDAT") + 4:]
    assert data[2] & 0b110 == 0
    assert [chunk in png for chunk in (b"IHDR", b"iCCP", b"eXIf", b"tEXt")] == [1, 0, 0, 0]


@pytest.mark.parametrize("shape", [(7, 7, 3), (7, 7), (300, 300, 3)])
def test_the_pngs_are_whole_by_their_own_checksums(tmp_path, shape):
    pixels = random_pixels(*shape)
    convert(write_source(tmp_path / "src", {"a.png": pixels}), tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        png = archive.read("00000/img00000000.png")
    PIL.Image.open(io.BytesIO(png)).verify()
    assert png.endswith(b"\0\0\0\0IEND\xae\x42\x60\x82")
    assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(png))), pixels)


def test_the_reader_reads_what_the_tool_writes(tmp_path):
    for dest in (tmp_path / "out.zip", tmp_path / "out"):
        assert run(EMOJI, dest, "--max-images=40").exit_code == 0
        source = ImageFolderDataset(EMOJI, use_labels=True)
        written = ImageFolderDataset(dest, use_labels=True)
        assert len(written) == 40
        for i in range(40):
            assert np.array_equal(written[i][0], source[i][0])
            assert written.get_details(i).raw_label == source.get_details(i).raw_label


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
    args = ["--resolution=16x16", "--max-images=100"]
    for workers in (1, 3):
        assert run(EMOJI, tmp_path / f"{workers}.zip", *args,
                   f"--workers={workers}").exit_code == 0
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "3.zip").read_bytes()


def test_a_worker_names_the_bad_image_too(tmp_path):
    files = {f"{i:02}.png": flat(0) for i in range(40)}
    files["17.png"] = files["31.png"] = b"broken"
    result = run(write_source(tmp_path / "src", files), tmp_path / "out" / "a", "--workers=2")
    assert_refused(result, tmp_path, "17.png")


@pytest.mark.parametrize("side", [3, 5, 24, 48])
def test_any_square_size_is_accepted(tmp_path, side):
    assert convert_one(tmp_path, random_pixels(side, side, 3)).shape == (side, side, 3)


def test_palettes_become_colours(tmp_path):
    pixels = np.array([[0, 1], [2, 1]], np.uint8)
    colors = np.array([[10, 20, 30], [200, 100, 0], [5, 5, 5]], np.uint8)
    image = PIL.Image.fromarray(pixels).convert("P")
    image.putdata(pixels.ravel().tolist())
    image.putpalette(colors.ravel().tolist())
    assert np.array_equal(convert_one(tmp_path, encode(image)), colors[pixels])
    transparent = encode(image, transparency=1)
    colors[1] = [0, 0, 255]
    assert np.array_equal(convert_one(tmp_path, transparent, "--background=blue"), colors[pixels])


@pytest.mark.parametrize("background,color", [(None, (255, 255, 255)), ("#102030", (16, 32, 48)),
                                              ("black", (0, 0, 0))])
def test_transparency_shows_the_background(tmp_path, background, color):
    rgba = random_pixels(16, 16, 4)
    alpha = rgba[:, :, 3:] / 255
    expected = rgba[:, :, :3] * alpha + np.array(color) * (1 - alpha)
    out = convert_one(tmp_path, rgba, *([f"--background={background}"] if background else []))
    # Pillow composites in fixed point: off by less than one level beside the rounding.
    assert out.shape == (16, 16, 3) and np.abs(out - expected).max() < 1.5


def test_gray_with_transparency_stays_gray_on_gray_alone(tmp_path):
    la = random_pixels(16, 16, 2)
    alpha = la[:, :, 1] / 255
    out = convert_one(tmp_path, encode(PIL.Image.fromarray(la, "LA")))
    assert out.shape == (16, 16)
    assert np.abs(out - (la[:, :, 0] * alpha + 255 * (1 - alpha))).max() < 1.5
    out = convert_one(tmp_path, encode(PIL.Image.fromarray(la, "LA")), "--background=red")
    assert np.abs(out[:, :, 0] - (la[:, :, 0] * alpha + 255 * (1 - alpha))).max() < 1.5
    assert np.abs(out[:, :, 1] - la[:, :, 0] * alpha).max() < 1.5


def test_a_transparent_colour_of_an_rgb_png_counts(tmp_path):
    pixels = np.array([[[1, 2, 3], [9, 9, 9]], [[4, 5, 6], [1, 2, 3]]], np.uint8)
    out = convert_one(tmp_path, encode(PIL.Image.fromarray(pixels), transparency=(1, 2, 3)))
    pixels[0, 0] = pixels[1, 1] = 255
    assert np.array_equal(out, pixels)


def test_of_16_bits_the_upper_8_are_kept_in_gray_and_in_colour(tmp_path):
    values = np.array([[0, 255, 256], [511, 32768, 65280], [65535, 4660, 257]], np.uint16)
    assert np.array_equal(convert_one(tmp_path, encode(values)), values // 256)
    # Pillow writes no 16-bit RGB, so this PNG is made by hand.
    rgb = np.stack([values, values[::-1], values.T], axis=2)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 3, 16, 2, 0, 0, 0)) \
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(convert_one(tmp_path, png), rgb // 256)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_one_bit_becomes_black_and_white(tmp_path):
    bits = random_pixels(9, 9) > 127
    assert np.array_equal(convert_one(tmp_path, encode(bits)), bits * np.uint8(255))


def test_cmyk_is_converted_with_one_warning(tmp_path):
    cmyk = PIL.Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    files = {f"{i}.tif": encode(cmyk, "tiff") for i in range(3)}
    result = run(write_source(tmp_path / "src", files), tmp_path / "a.zip")
    assert result.exit_code == 0 and result.output.count("CMYK") == 1
    assert "3 CMYK images" in result.output
    assert np.array_equal(ImageFolderDataset(tmp_path / "a.zip")[0][0][:, 0, 0], [0, 255, 255])


@pytest.mark.parametrize("mode,value", [("F", 0.5), ("LAB", 0), ("I", 70000), ("I", -1)])
def test_a_mode_without_a_plain_meaning_in_8_bits_is_refused(tmp_path, mode, value):
    data = encode(PIL.Image.new(mode, (4, 4), value), "tiff")
    result = run(write_source(tmp_path / "src", {"x.tif": data}), tmp_path / "out" / "a.zip")
    assert_refused(result, tmp_path, "x.tif", "supported" if mode == "LAB" else "--scale")


UPRIGHT = {  # what turns the stored pixels upright, by EXIF orientation
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, orientation):
    pixels = random_pixels(4, 4, 3)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    out = convert_one(tmp_path, encode(pixels, exif=exif))
    assert np.array_equal(out, UPRIGHT[orientation](pixels))


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff", "webp"])
def test_animations_are_refused_unless_the_first_frame_will_do(tmp_path, suffix):
    frames = [PIL.Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    kwargs = {"lossless": True} if suffix == "webp" else {}
    data = encode(frames[0], suffix, save_all=True, append_images=frames[1:], **kwargs)
    path = write_source(tmp_path / "src", {f"x.{suffix}": data})
    result = run(path, tmp_path / "out" / "a.zip")
    assert_refused(result, tmp_path, f"x.{suffix}", "--first-frame")
    [(_, pixels)], _ = convert(path, tmp_path / "a.zip", "--first-frame")
    assert (pixels == [255, 0, 0]).all()


@pytest.mark.parametrize("side", [14_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    result = run(write_source(tmp_path / "src", {"x.png": png}), tmp_path / "out" / "a.zip")
    assert_refused(result, tmp_path, "x.png", "pixels")


@pytest.mark.parametrize("data", [b"", b"text", encode(random_pixels(8, 8, 3))[:100],
                                  encode(random_pixels(8, 8, 3), "jpeg")[:-200]])
@pytest.mark.parametrize("name", ["src", "src.zip"])
def test_a_damaged_image_is_named(tmp_path, name, data):
    files = {"a.png": flat(0), "b.png": data}
    result = run(write_source(tmp_path / name, files), tmp_path / "out" / "a.zip")
    assert_refused(result, tmp_path, "b.png", "can't be read")


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/x.png", "C:/x.png", "..\\x.png"])
def test_zip_names_that_lead_out_are_refused(tmp_path, name):
    path = write_source(tmp_path / "src.zip", {"a.png": flat(0), name: flat(0)})
    assert_refused(run(path, tmp_path / "out" / "a.zip"), tmp_path, name, "leads out")


def test_zip_names_that_are_there_twice_are_refused(tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "src.zip", "w") as archive:
        warnings.simplefilter("ignore")
        for value in (0, 1):
            archive.writestr("a.png", encode(flat(value)))
    result = run(tmp_path / "src.zip", tmp_path / "out" / "a.zip")
    assert_refused(result, tmp_path, "a.png occurs 2 times")


@pytest.mark.parametrize("second,kinds", [
    (random_pixels(8, 8, 3), ("RGB 8x8", "RGB 4x4", "--resolution", "--transform")),
    (random_pixels(4, 4), ("L 4x4", "RGB 4x4", "--channels=rgb")),
    (random_pixels(4, 5, 3), ("RGB 5x4", "RGB 4x4", "--resolution", "--transform")),
])
@pytest.mark.parametrize("dest", ["a.zip", "a"])
def test_images_that_come_out_unlike_are_named_with_both_shapes(tmp_path, second, kinds, dest):
    path = write_source(tmp_path / "src", {"a.png": random_pixels(4, 4, 3), "b.png": second})
    assert_refused(run(path, tmp_path / "out" / dest), tmp_path, "b.png", "a.png", *kinds)
    convert(path, tmp_path / "ok.zip", "--resolution=4x4", "--transform=center-crop")


def test_images_need_not_be_square_but_for_a_crop(tmp_path):
    pixels = random_pixels(4, 5, 3)
    assert np.array_equal(convert_one(tmp_path, pixels), pixels)
    assert convert_one(tmp_path, pixels, "--resolution=10x6").shape == (6, 10, 3)
    result = run(EMOJI, tmp_path / "out/a.zip", "--resolution=8x9", "--transform=center-crop")
    assert_refused(result, tmp_path, "8x9", "square", exit_code=2)


@pytest.mark.parametrize("files", [{}, {"readme.txt": b"x"}, {"dataset.json": labels_json([])}])
@pytest.mark.parametrize("name", ["src", "src.zip"])
@pytest.mark.parametrize("dest", ["a.zip", "a"])
def test_an_empty_source_is_an_error_and_leaves_nothing(tmp_path, files, name, dest):
    path = write_source(tmp_path / name, files)
    assert_refused(run(path, tmp_path / "out" / dest), tmp_path, "no images found")


@pytest.mark.parametrize("dest", ["a.zip", "a"])
def test_a_source_of_which_nothing_is_left_is_an_error_and_leaves_nothing(tmp_path, dest):
    path = write_source(tmp_path / "src", {"a.png": flat(0)})
    result = run(path, tmp_path / "out" / dest, "--transform=center-crop-wide",
                 "--resolution=8x8")
    assert_refused(result, tmp_path, "the only image is smaller")


def test_a_source_of_no_known_kind_is_refused_with_what_is_allowed(tmp_path):
    dest = tmp_path / "out" / "a.zip"
    (tmp_path / "a.rar").write_text("x")
    (tmp_path / "b.zip").write_text("x")
    assert_refused(run(tmp_path / "a.rar", dest), tmp_path, "a.rar", "give a folder, .zip",
                   "cifar-10-python.tar.gz")
    assert_refused(run(tmp_path / "b.zip", dest), tmp_path, "b.zip", "not a ZIP")
    assert_refused(run(tmp_path / "none", dest), tmp_path, "none", "no such")
    whole = EMOJI.read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-100])
    assert_refused(run(tmp_path / "cut.zip", dest), tmp_path, "cut.zip", "damaged")


@pytest.mark.parametrize("labels,texts", [
    (b'{"labels": [["a.png", 1],\n oops]}', ["dataset.json", "line 2, column 2"]),
    (labels_json([["a.png", 1]]), ["no label for b.png; 1 of 2"]),
    (labels_json([["a.png", 1], ["b.png", -1]]), ["-1 of b.png"]),
    (labels_json([["a.png", 1], ["b.png", 0.5]]), ["0.5 of b.png"]),
    (labels_json([["a.png", 1], ["b.png", "x"]]), ['"x" of b.png']),
    (labels_json([["a.png", 1], ["b.png", [1]]]), ["[1] of b.png"]),
    (labels_json([["a.png", 1], ["b.png", 10**9]]), ["1000000000 of b.png"]),
])
@pytest.mark.parametrize("name", ["src", "src.zip"])
def test_bad_labels_are_refused_by_name(tmp_path, name, labels, texts):
    files = {"a.png": flat(0), "b.png": flat(0), "dataset.json": labels}
    path = write_source(tmp_path / name, files)
    assert_refused(run(path, tmp_path / "out" / "a.zip"), tmp_path, *texts)


def test_a_failed_conversion_keeps_the_earlier_zip_and_a_good_one_replaces_it(tmp_path):
    dest = tmp_path / "out" / "a.zip"
    good = write_source(tmp_path / "good", {"a.png": flat(1)})
    bad = write_source(tmp_path / "bad", {"a.png": flat(2), "b.png": b"broken"})
    convert(good, dest)
    before = dest.read_bytes()
    assert_refused(run(bad, dest), tmp_path, "b.png", kept=["a.zip"])
    assert dest.read_bytes() == before
    assert gray_value(convert(write_source(good, {"a.png": flat(3)}), dest)[0][0][1]) == 3


@pytest.mark.scripts
@pytest.mark.parametrize("dest", ["a.zip", "a"])
def test_a_killed_conversion_leaves_a_temporary_name_alone_and_its_workers_end(tmp_path, dest):
    path = write_source(tmp_path / "src", {f"{i:03}.png": flat(0) for i in range(400)})
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "dataset_tool.py", f"--source={path}", f"--dest={tmp_path}/out/{dest}",
         "--resolution=1024x1024", "--workers=2"], cwd=ROOT, stdout=subprocess.PIPE)
    while not os.listdir(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=120)  # ends when the last process with this pipe does
    assert [name.endswith(".tmp") for name in os.listdir(tmp_path / "out")] == [True]
    assert run(path, tmp_path / "out" / dest, "--max-images=3").exit_code == 0  # not in the way
    assert len(ImageFolderDataset(tmp_path / "out" / dest)) == 3


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    path = write_source(tmp_path / "src", {"a.png": flat(1)})
    dest = tmp_path / "out" / "a"
    write_source(tmp_path, {"out/a/mine.txt": b"x"})
    assert_refused(run(path, dest), tmp_path, "not an empty folder", kept=["a"])
    (dest / "mine.txt").unlink()
    assert run(path, dest).exit_code == 0
    assert sorted(os.listdir(dest)) == ["00000", "dataset.json"]
    (tmp_path / "out" / "b").write_text("x")
    assert_refused(run(path, tmp_path / "out" / "b"), tmp_path, "b: exists", kept=["a", "b"])
    (tmp_path / "out" / "c.zip").mkdir()
    assert_refused(run(path, tmp_path / "out" / "c.zip"), tmp_path, "is a folder",
                   kept=["a", "b", "c.zip"])


def test_the_source_is_not_overwritten(tmp_path):
    path = write_source(tmp_path / "src.zip", {"a.png": flat(1)})
    before = path.read_bytes()
    for dest in (path, tmp_path / "not there yet/../src.zip"):
        assert_refused(run(path, dest), tmp_path, "the source itself")
    assert path.read_bytes() == before


@pytest.mark.parametrize("args,text", [
    (["--transform=center-crop"], "--resolution"),
    (["--transform=other", "--resolution=8x8"], "center-crop-wide"),
    (["--resolution=8,"], "WxH"), (["--resolution=0x0"], "WxH"), (["--resolution=8x8x8"], "WxH"),
    (["--scale=5,1"], "LO < HI"), (["--scale=0,inf"], "LO < HI"), (["--scale=max"], "minmax"),
    (["--cond-scale=std"], "--cond-source"),
    (["--resolution=8x4", "--transform=center-crop"], "square"),
    (["--resolution=4x8", "--transform=center-crop-wide"], "W >= H"),
    (["--classes=a"], "6,1,3"), (["--classes=1,1"], "twice"), (["--background=nocolor"], "color"),
    (["--background=#ffffff80"], "opaque"), (["--max-images=0"], "1"), (["--workers=0"], "1"),
])
def test_a_usage_error_exits_with_2(tmp_path, args, text):
    assert_refused(run(EMOJI, tmp_path / "out" / "a.zip", *args), tmp_path, text, exit_code=2)


def test_the_summary_counts_what_was_written_and_what_was_left_out(tmp_path):
    files = {f"{folder}/{i}.png": flat(0)
             for folder, i in itertools.chain([("cat", i) for i in range(3)], [("dog", 0)],
                                              [("emu", i) for i in range(2)])}
    path = write_source(tmp_path / "src", {**files, "notes.txt": b"x"})
    lines = run(path, tmp_path / "a.zip").output.splitlines()
    assert lines == [f"{tmp_path}/a.zip: 6 images, 4x4, 1 channel, 3 classes",
                     "  class 0 (cat): 3", "  class 1 (dog): 1", "  class 2 (emu): 2",
                     "Left out: 1 file that isn't an image (.txt)"]
    lines = run(path, tmp_path / "a.zip", "--classes=1,0", "--max-images=5").output.splitlines()
    assert lines[:3] == [f"{tmp_path}/a.zip: 4 images, 4x4, 1 channel, 2 classes",
                         "  class 0 (dog): 1", "  class 1 (cat): 3"]
    assert "Left out: 1 image beyond --max-images" in lines
    assert "Left out: 1 image of other classes" in lines


def test_help_needs_neither_torch_nor_pillow_nor_numpy():
    code = ("import sys, dataset_tool\n"
            "try: dataset_tool.main(['--help'])\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'PIL', 'numpy', 'tqdm'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_a_conversion_without_dataset_json_needs_no_torch(tmp_path):
    path = write_source(tmp_path / "src", {"a/x.png": flat(0), "b/x.png": flat(0)})
    args = [f"--source={path}", f"--dest={tmp_path}/a.zip", "--resolution=8x8"]
    code = ("import sys, dataset_tool\n"
            f"dataset_tool.main({args!r}, standalone_mode=False)\n"
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_values_of_16_bits_are_resized_to_the_nearest_whole_number(tmp_path):
    values = np.random.default_rng(0).integers(0, 2000, [9, 9]).astype(np.uint16)
    np.save(tmp_path / "x.npy", values)
    source = write_source(tmp_path / "src", {"x.npy": (tmp_path / "x.npy").read_bytes()})
    result = run(source, tmp_path / "out.zip", "--resolution=5x5", "--scale=0,2000")
    assert result.exit_code == 0, result.output
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        found = np.load(io.BytesIO(archive.read("00000/img00000000.npy")))
    resized = np.asarray(PIL.Image.fromarray(values.astype(np.float32)).resize((5, 5), LANCZOS))
    np.testing.assert_array_equal(found.squeeze(), np.round(resized))
    assert (np.trunc(resized) != np.round(resized)).any()


# ------------------------------------------------------------------- how much is said


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Runs a command without and with a flag; returns the lines of stdout of both."""
    monkeypatch.setenv("PFGMPP_CACHE_DIR", str(tmp_path / "cache"))

    def lines(flag, *args):
        runs = [CliRunner().invoke(main, [*map(str, args), *more]) for more in ([], [flag])]
        assert [run.exit_code for run in runs] == [0, 0], runs[1].output
        return [run.stdout.splitlines() for run in runs]
    return lines


def _commands(tmp_path):
    """Returns the commands, of a data set with two classes, and what begins their results."""
    source = write_source(tmp_path / "src", {f"{top}/{i}.png": flat(i) for top in "ab"
                                             for i in range(4)})
    whole, parts = tmp_path / "whole.zip", [tmp_path / f"{name}.zip" for name in ("x", "y")]
    dests = [f"--dest={parts[0]}", f"--val-dest={parts[1]}"]
    return [([f"--source={source}", f"--dest={whole}"], [f"{whole}: 8 images"]),
            (["check", whole], [f"{whole}: 8 images", "fingerprint: "]),
            (["show", whole], [f"{tmp_path / 'whole-show.png'}: ", "gray ", "all "]),
            (["split", whole, "--val=2", *dests], [f"{parts[0]}: 6", f"{parts[1]}: 2"]),
            (["cache", "list"], [f"{tmp_path / 'cache'}: "])]


def test_quiet_prints_results_alone(tmp_path, said):
    for args, beginnings in _commands(tmp_path):
        usual, quiet = said("--quiet", *args)
        assert len(quiet) == len(beginnings) and set(quiet) <= set(usual), args
        assert all(map(str.startswith, quiet, beginnings)), args
        if args[0] not in ("show", "cache"):
            assert len(usual) > len(quiet)  # the classes
    assert said("--quiet", "cache", "remove", "--all") == [[], []]


def test_verbose_also_prints_who_computes_and_where_time_goes(tmp_path, said):
    for args, _ in _commands(tmp_path):
        usual, verbose = said("--verbose", *args)
        more = [line for line in verbose if line not in usual]
        assert any(re.fullmatch(r"Time       .+: \d+\.\d\d s", line) for line in more), args
        assert all(line.startswith(("Time  ", "Workers  ")) for line in more), args


def test_quiet_leaves_warnings_and_belongs_behind_the_command(tmp_path):
    source = write_source(tmp_path / "src", {"train/1.png": flat(1), "test/2.png": flat(2)})
    result = run(source, tmp_path / "a.zip", "--quiet")
    assert "Warning: the folders test and train became classes" in result.stderr
    result = CliRunner().invoke(main, ["--quiet", "check", str(tmp_path / "a.zip")])
    assert result.exit_code == 2 and "--quiet: must come after check" in result.output
    result = run(source, tmp_path / "a.zip", "--quiet", "--verbose")
    assert result.exit_code == 2 and "choose one" in result.output
