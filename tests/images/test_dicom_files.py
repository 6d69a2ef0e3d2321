"""Series of DICOM files, written by pydicom, as a source: values, order, names, what is refused."""

import builtins
import io
import itertools
import json
import random
import sys
import zipfile

import numpy as np
import pydicom
import pytest
from dicom_slices import AXIAL, dicom, stored
from image_sources import assert_refused, encode, flat, run, write_source
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import (
    MPEG2MPML,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from images import dicom_files
from images.dataset import ImageFolderDataset
from images.inspection import DataSet
from images.pictures import DamagedImageError

SCALE = "--scale=-1024,3071"
def made(source, dest, *args):
    """Returns what was printed, and the values of the images."""
    result = run(source, dest, SCALE, *args)
    assert result.exit_code == 0, result.output
    dataset = ImageFolderDataset(dest)
    return result.output, dataset.get_batch(range(len(dataset)))[0]


def levels(images):
    """Returns the value of each image, all of whose pixels have it."""
    assert (images == images[:, :, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def slices(**each):
    """Returns flat slices of values 0, 1, 2, ...; each keyword has a value for each of them."""
    rows = [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]
    return [dicom(np.full([8, 12], i, np.uint16), RescaleIntercept=0, **row)
            for i, row in enumerate(rows)]


# ------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", ["src", "src.zip"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian,
                                    ExplicitVRBigEndian, RLELossless], ids=lambda uid: uid.name)
def test_values_are_slope_times_stored_plus_intercept(tmp_path, name, syntax):
    pixels = stored()
    path = write_source(tmp_path / name, {"a.dcm": dicom(
        pixels, syntax=syntax, RescaleSlope="2.5", RescaleIntercept="-1024.25")})
    _, images = made(path, tmp_path / "a.zip")
    assert images.dtype == np.float32 and images.shape == (1, 1, 8, 12)
    assert np.array_equal(images[0, 0], (pixels * 2.5 - 1024.25).astype(np.float32))


def test_signed_values_without_a_rescale_are_as_stored(tmp_path):
    pixels = stored().astype(np.int16) - 2000
    path = write_source(tmp_path / "src", {"a.dcm": dicom(
        pixels, BitsStored=16, HighBit=15, RescaleSlope=None, RescaleIntercept=None)})
    assert np.array_equal(made(path, tmp_path / "a.zip")[1][0, 0], pixels)


def test_our_values_are_those_of_pydicom(tmp_path):
    content = dicom(RescaleSlope="0.37", RescaleIntercept="-31.5")
    dataset = pydicom.dcmread(io.BytesIO(content))
    expected = pydicom.pixels.apply_rescale(dataset.pixel_array, dataset)
    np.testing.assert_allclose(dicom_files.decode(content)[0], expected, rtol=1e-7)


@pytest.mark.parametrize("dtype, low", [(np.uint16, 0), (np.int16, -2048)])
def test_monochrome1_is_a_matter_of_showing_and_keeps_its_values(tmp_path, dtype, low):
    pixels = np.array([[low, low + 24, low + 4095]], dtype)
    files = {name: dicom(pixels, PhotometricInterpretation=kind, RescaleSlope=2,
                         RescaleIntercept=-5)
             for name, kind in (("a", "MONOCHROME2"), ("b", "MONOCHROME1"))}
    output, images = made(write_source(tmp_path / "src", files), tmp_path / "a.zip")
    assert images[:, 0, 0].tolist() == [[2 * low - 5, 2 * low + 43, 2 * low + 8185]] * 2
    assert ("Note: 1 slice is MONOCHROME1 (meant to be shown inverted), the first b; values are "
            "kept\n") in output


def test_values_outside_of_the_reconstruction_may_be_clipped(tmp_path):
    pixels = np.array([[-2000, 0, 5000]], np.int16)
    path = write_source(tmp_path / "src", {"a.dcm": dicom(pixels, BitsStored=16, HighBit=15)})
    output, images = made(path, tmp_path / "a.zip", "--clip=-1024,3071")
    assert images[0, 0, 0].tolist() == [-1024, -1024, 3071]
    assert "clipped to -1024..3071: 66.7% of the values" in output


# -------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("name", ["src", "src.zip"])
def test_slices_go_by_position_along_their_normal(tmp_path, name):
    positions = [[5, 7, 30], [5, 7, -10], [5, 7, 9.5], [5, 7, 100]]
    files = dict(zip("cbad", slices(ImagePositionPatient=positions, InstanceNumber=[1, 2, 3, 4]),
                     strict=True))
    output, images = made(write_source(tmp_path / name, files), tmp_path / "a.zip")
    assert levels(images) == [1, 2, 0, 3]
    assert "Note: 4 slices of 1 DICOM series, in the order of their positions\n" in output


@pytest.mark.parametrize("directions", [
    [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1], [-1, 0, 0, 0, 1, 0],
    [0.8, 0.6, 0, 0, 0, 1]])
def test_positions_count_along_rows_times_columns(tmp_path, directions):
    row, column = np.array(directions[:3]), np.array(directions[3:])
    normal = [row[1] * column[2] - row[2] * column[1], row[2] * column[0] - row[0] * column[2],
              row[0] * column[1] - row[1] * column[0]]
    # What lies in the plane of the slices has no part in it.
    steps, shifts = [3.0, -4.5, 0.25, 8], [50, -70, 10, 0]
    positions = [(step * np.array(normal) + shift * row + 2 * shift * column).round(6).tolist()
                 for step, shift in zip(steps, shifts, strict=True)]
    files = dict(zip("abcd", slices(ImagePositionPatient=positions,
                                    ImageOrientationPatient=[directions] * 4), strict=True))
    _, images = made(write_source(tmp_path / "src", files), tmp_path / "a.zip")
    assert levels(images) == np.argsort(steps).tolist()


@pytest.mark.parametrize("missing", [{"ImagePositionPatient": None},
                                     {"ImageOrientationPatient": [1, 0, 0]},
                                     {"ImagePositionPatient": ""}], ids=str)
def test_without_positions_slices_go_by_their_numbers(tmp_path, missing):
    each = {key: [value] * 3 for key, value in missing.items()}
    files = dict(zip("abc", slices(InstanceNumber=[10, 9, 2], **each), strict=True))
    output, images = made(write_source(tmp_path / "src", files), tmp_path / "a.zip")
    assert levels(images) == [2, 1, 0]
    assert "in the order of InstanceNumber\n" in output


def test_without_positions_and_numbers_slices_go_by_name(tmp_path):
    files = dict(zip("bac", slices(InstanceNumber=[10, None, 2], ImagePositionPatient=[None] * 3),
                     strict=True))
    output, images = made(write_source(tmp_path / "src", files), tmp_path / "a.zip")
    assert levels(images) == [1, 0, 2] and "in the order of their names\n" in output


def test_of_one_position_the_number_decides_and_then_the_name(tmp_path):
    files = dict(zip("abcd", slices(InstanceNumber=[3, 1, 1, 2]), strict=True))
    _, images = made(write_source(tmp_path / "src", files), tmp_path / "a.zip")
    assert levels(images) == [1, 2, 3, 0]


def test_series_are_parted_by_folder_and_uid_and_follow_the_order_of_names(tmp_path):
    heights = [[0, 0, z] for z in (4, 3, 2, 1, 8, 7)]
    names = ["q/1", "p/b/2", "p/b/1", "p/a/9", "p/b/3", "q/0"]
    uids = ["1.1", "1.1", "1.2", "1.1", "1.1", "1.1"]
    files = dict(zip(names, slices(ImagePositionPatient=heights, SeriesInstanceUID=uids),
                     strict=True))
    output, images = made(write_source(tmp_path / "src", files), tmp_path / "a.zip")
    # p/a; of p/b the series of p/b/1, then that of p/b/2 and p/b/3; q.
    assert levels(images) == [3, 2, 1, 4, 0, 5]
    assert "6 slices of 4 DICOM series" in output
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["labels"] is None, "patients are no classes"


# --------------------------------------------------------------------------- files and names


def test_files_are_known_by_extension_or_by_their_beginning(tmp_path):
    names = ["a.dcm", "b.DCM", "c.IMA", "d.dicom", "IM0001", "1.2.840.113619.5"]
    files = dict(zip(names, slices(InstanceNumber=range(6)), strict=True))
    files |= {"README": b"text", "1.2.840.113619.6": b"text", "notes.txt": dicom(),
              "DICOMDIR": dicom(Rows=None), "sub/report.dcm": dicom(Rows=None)}
    output, images = made(write_source(tmp_path / "src", files), tmp_path / "a", "--keep-names")
    assert levels(images) and len(images) == 6
    assert "Left out: 5 files that aren't images" in output
    assert DataSet(tmp_path / "a").names == sorted(
        ["a.npy", "b.npy", "c.npy", "d.npy", "IM0001.npy", "1.2.840.113619.5.npy"])


def test_doses_of_patients_are_paired_as_they_are_published(tmp_path):
    files, number = {}, itertools.count()
    expected = []
    for patient in ("L067", "L096"):
        heights = [30, 10, 20]
        rows = {}
        for dose, short, second in (("full_1mm", "FD", 40), ("quarter_1mm", "QD", 10)):
            for i, z in enumerate(heights if short == "FD" else reversed(heights)):
                value = next(number)
                rows[short, z] = value
                name = f"{patient}/{dose}/{patient}_{short}_1.CT.{i:04}.2015.{second + i}.IMA"
                files[name] = dicom(np.full([8, 12], value, np.uint16), RescaleIntercept=0,
                                    SeriesInstanceUID="1.7", ImagePositionPatient=[0, 0, z])
        expected += [(rows["FD", z], rows["QD", z]) for z in sorted(heights)]
    path = write_source(tmp_path / "src", files)
    args = ["--pair=(.*)_QD_|(.*)_FD_", SCALE, "--cond-scale=-1024,3071"]
    assert run(path, tmp_path / "a.zip", *args).exit_code == 0
    dataset = ImageFolderDataset(tmp_path / "a.zip", use_conditions=True)
    images, _, conditions = dataset.get_batch(range(6))
    assert list(zip(levels(images), levels(conditions), strict=True)) == expected
    # Pairs of two sources by order are the same.
    for dose, short in (("full", "FD"), ("quarter", "QD")):
        write_source(tmp_path / dose, {name: data for name, data in files.items() if short in name})
    assert run(tmp_path / "full", tmp_path / "b.zip", f"--cond-source={tmp_path / 'quarter'}",
               "--pair=order", *args[1:]).exit_code == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def doses(heights, other_heights, **each):
    """Returns flat slices L067_FD_0, ... at these heights and L067_QD_0, ... at others."""
    return {f"L067_{dose}_{i}.IMA": dicom(
        np.full([8, 12], value + i, np.uint16), RescaleIntercept=0, SeriesInstanceUID=uid,
        **{"ImagePositionPatient": [shift, 0, z], "InstanceNumber": i + 1, **each})
        for dose, uid, shift, value, own in (("FD", "1.7", 0, 0, heights),
                                             ("QD", "1.8", 30, 100, other_heights))
        for i, z in enumerate(own)}


def both_ways(tmp_path, files):
    """Yields what a conversion of two doses prints, by a pattern and by order, and its pairs."""
    write_source(tmp_path / "src", files)
    for dose in ("FD", "QD"):
        write_source(tmp_path / dose, {name: data for name, data in files.items() if dose in name})
    for source, *args in ((tmp_path / "src", "--pair=(.*)_QD_|(.*)_FD_"),
                          (tmp_path / "FD", f"--cond-source={tmp_path / 'QD'}", "--pair=order")):
        (tmp_path / "a.zip").unlink(missing_ok=True)
        done = run(source, tmp_path / "a.zip", SCALE, "--cond-scale=-1024,3071", *args)
        if done.exit_code:
            yield done.output, None
            continue
        images, _, conditions = ImageFolderDataset(
            tmp_path / "a.zip", use_conditions=True).get_batch(range(len(files) // 2))
        yield done.output, list(zip(levels(images), levels(conditions), strict=True))


@pytest.mark.parametrize("heights, others, num_apart, gap", [
    ([0, 1, 2], [1, 2, 3], 3, 1), ([0, 2.5, 7.5], [0, 5, 7.5], 1, 2.5), ([0, 1], [0, 1.1], 1, 0.1)])
def test_slices_at_other_positions_are_no_pairs(tmp_path, heights, others, num_apart, gap):
    for output, pairs in both_ways(tmp_path, doses(heights, others)):
        assert pairs is None and not (tmp_path / "a.zip").exists()
        assert (f"{num_apart} of {len(heights)} condition images are slices at other positions "
                f"than their images; the first is ") in output
        assert f", {gap} mm from " in output and len(output.splitlines()) == 1


@pytest.mark.parametrize("directions", [AXIAL, [0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0.6, 0.8]])
def test_the_place_in_the_plane_is_no_other_position(tmp_path, directions):
    normal = np.cross(directions[:3], directions[3:])
    files = {}
    for name, i, z in (("FD", 0, 0), ("FD", 1, 5), ("QD", 0, 5.004), ("QD", 1, 0)):
        shift = 9 * (name == "QD")
        place = z * normal + shift * np.array(directions[:3]) - 3 * shift * np.array(directions[3:])
        files[f"p_{name}_{i}.IMA"] = dicom(
            np.full([8, 12], i + 100 * (name == "QD"), np.uint16), RescaleIntercept=0,
            ImagePositionPatient=place.round(6).tolist(), ImageOrientationPatient=directions,
            SeriesInstanceUID=f"1.{len(name) + shift}")
    for output, pairs in both_ways(tmp_path, files):
        assert pairs == [(0, 101), (1, 100)] and "Warning" not in output


def test_slices_without_positions_go_by_instance_number(tmp_path):
    files = doses([0] * 3, [0] * 3, ImagePositionPatient=None)
    for output, pairs in both_ways(tmp_path, files):
        assert pairs == [(0, 100), (1, 101), (2, 102)] and "Warning" not in output
    lost = doses([0] * 3, [0] * 3, ImagePositionPatient=None, InstanceNumber=None)
    lost["L067_QD_7.IMA"] = lost.pop("L067_QD_1.IMA")
    (tmp_path / "b").mkdir()
    outputs = list(both_ways(tmp_path / "b", lost))
    assert "but others have; the first is L067_FD_1.IMA" in \
        outputs[0][0] and outputs[0][1] is None
    assert "Warning: --pair=order: by the numbers in their names, 2 of 3 images" in outputs[1][0]


@pytest.mark.parametrize("args", [["--pair=(.*)_QD_(.*)|(.*)_FD_(.*)"], None])
def test_names_that_tell_all_pairs_come_before_positions_with_a_warning(tmp_path, args):
    files = doses([0, 1, 2], [1, 2, 3])
    if args is None:
        for dose in ("FD", "QD"):
            write_source(tmp_path / dose, {name.replace(dose, ""): data
                                           for name, data in files.items() if dose in name})
        args, source = [f"--cond-source={tmp_path / 'QD'}"], tmp_path / "FD"
    else:
        source = write_source(tmp_path / "src", files)
    done = run(source, tmp_path / "a.zip", SCALE, "--cond-scale=-1024,3071", *args)
    assert done.exit_code == 0
    assert "Warning: --" in done.output and ": 3 of 3 condition images are slices at other " in \
        done.output
    assert len(ImageFolderDataset(tmp_path / "a.zip", use_conditions=True)) == 3


def test_with_names_that_are_kept_the_order_is_theirs(tmp_path):
    source = write_source(tmp_path / "src", dict(zip(["a.dcm", "b.dcm", "c.dcm"], slices(
        ImagePositionPatient=[[0, 0, z] for z in (20, 10, 30)]), strict=True)))
    for args, order, expected in (([], "positions", [1, 0, 2]),
                                  (["--keep-names"], "names", [0, 1, 2])):
        output, images = made(source, tmp_path / "a.zip", *args)
        assert levels(images) == expected
        assert f"Note: 3 slices of 1 DICOM series, in the order of their {order}\n" in output


def test_conditions_of_names_that_are_uids_are_found(tmp_path):
    names = ["1.2.840.1", "1.2.840.2"]
    for name, uid in (("src", "1"), ("cond", "2")):
        write_source(tmp_path / name, dict(zip(names, slices(
            InstanceNumber=[2, 1], SeriesInstanceUID=[uid] * 2), strict=True)))
    assert run(tmp_path / "src", tmp_path / "a.zip", f"--cond-source={tmp_path / 'cond'}", SCALE,
               "--cond-scale=0,9").exit_code == 0
    images, _, conditions = ImageFolderDataset(
        tmp_path / "a.zip", use_conditions=True).get_batch(range(2))
    assert levels(images) == levels(conditions) == [1, 0]


def test_labels_of_slices_are_those_of_dataset_json(tmp_path):
    files = dict(zip("ab", slices(InstanceNumber=[2, 1]), strict=True))
    files["dataset.json"] = b'{"labels": [["a", 5], ["b", 3]]}'
    made(write_source(tmp_path / "src", files), tmp_path / "a.zip")
    dataset = ImageFolderDataset(tmp_path / "a.zip", use_labels=True)
    assert dataset.class_numbers.tolist() == [3, 5]


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("content, texts", [
    (dicom(NumberOfFrames=30), ["x.dcm is a multi-frame file (30 frames)", "export"]),
    (dicom(SharedFunctionalGroupsSequence=[Dataset()]), ["multi-frame file (1 frames)"]),
    (dicom(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0),
     ["x.dcm is RGB", "MONOCHROME2"]),
    (dicom(PhotometricInterpretation="PALETTE COLOR"), ["is PALETTE COLOR"]),
    (dicom(ModalityLUTSequence=[Dataset()]), ["a modality lookup table"]),
    (dicom(syntax=MPEG2MPML), ["MPEG2", "is not supported"]),
    (dicom(BitsAllocated=32), ["x.dcm: can't be read", "less than expected"]),
    (dicom()[:-10], ["x.dcm: can't be read", "bytes", "--skip-damaged"]),
    (b"", ["x.dcm: can't be read"]), (bytes(200), ["x.dcm: can't be read: not a DICOM file"]),
    (dicom(RescaleSlope="1.50").replace(b"1.50", b"nan "), ["x.dcm: can't be read", "nan at [0"]),
    (dicom(RescaleSlope="1.50").replace(b"1.50", b"high"), ["x.dcm: can't be read"]),
], ids=[*"abcdefghijkl"])
@pytest.mark.parametrize("name", ["src", "src.zip"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_one_slice_is_one_line(tmp_path, content, texts, name):
    path = write_source(tmp_path / name, {"x.dcm": content})
    assert_refused(run(path, tmp_path / "out/a.zip", SCALE), tmp_path, *texts)


def test_a_compression_that_needs_more_packages_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(Decoder, "is_available", property(lambda self: False))
    path = write_source(tmp_path / "src", {"x.dcm": dicom(syntax=JPEGLSLossless)})
    assert_refused(run(path, tmp_path / "out/a.zip", SCALE), tmp_path, "x.dcm is compressed as "
                   "JPEG-LS Lossless", "pip install pylibjpeg")


def test_decoders_that_all_fail_say_that_there_are_more():
    with pytest.raises(DamagedImageError, match="pip install pylibjpeg") as caught, \
            dicom_files._reading():
        raise RuntimeError("exceptions were raised by all available plugins:\n  pillow: no")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["src", "src.zip"])
@pytest.mark.parametrize("file, content", [("1.2.840.5", dicom()), ("a/b.IMA", b""),
                                           ("x.pt", b"")])
def test_a_source_that_is_no_data_set_is_sent_to_dataset_tool(tmp_path, name, file, content):
    path = write_source(tmp_path / name, {"README": b"x", file: content})
    with pytest.raises(ValueError, match="^[^;]*: no images found; convert files such as "
                       f"{file} with dataset_tool.py first$"):
        ImageFolderDataset(path)
    with pytest.raises(ValueError, match="no images found$"):
        ImageFolderDataset(write_source(tmp_path / f"other-{name}", {"README": b"x", "1.2": b""}))


def test_slices_without_a_scale_and_beside_pictures_are_refused(tmp_path):
    path = write_source(tmp_path / "src", {"a/x": dicom()})
    assert_refused(run(path, tmp_path / "out/a.zip"), tmp_path, "a/x: holds float32; give --scale")
    write_source(path, {"b.png": flat(1)})
    assert_refused(run(path, tmp_path / "out/a.zip", SCALE), tmp_path, "holds 1 DICOM file, such "
                   "as a/x, and 1 other image, such as b.png")


def test_slices_of_other_sizes_are_named(tmp_path):
    path = write_source(tmp_path / "src", {"a": dicom(), "b": dicom(stored(height=9))})
    assert_refused(run(path, tmp_path / "out/a.zip", SCALE), tmp_path, "b is 1 channel of float32 "
                   "12x9, but a is 1 channel of float32 12x8")


def test_damaged_slices_are_left_out_if_asked_and_the_others_keep_their_order(tmp_path):
    files = dict(zip("abc", slices(ImagePositionPatient=[[0, 0, z] for z in (3, 2, 1)]),
                     strict=True))
    files |= {"b": files["b"][:-9], "aa.dcm": b"junk"}
    output, images = made(write_source(tmp_path / "src", files), tmp_path / "a.zip",
                          "--skip-damaged")
    assert levels(images) == [2, 0] and "Left out: 2 damaged images\n" in output
    assert "Damaged: b: can't be read" in output and "Damaged: aa.dcm: can't be read" in output


def test_without_the_package_a_line_says_what_to_install(tmp_path, monkeypatch):
    def no_pydicom(name, *args, **kwargs):
        if name.partition(".")[0] == "pydicom":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    path = write_source(tmp_path / "src", {"a.dcm": dicom()})
    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_pydicom)
    monkeypatch.delitem(sys.modules, "pydicom")
    assert_refused(run(path, tmp_path / "out/a.zip", SCALE), tmp_path, "pip install pydicom")
    pictures = write_source(tmp_path / "pictures", {"a.png": encode(flat(1)), "README": b"x"})
    assert run(pictures, tmp_path / "a.zip").exit_code == 0


@pytest.mark.long
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless],
                         ids=lambda uid: uid.name)
def test_damaged_files_are_refused_or_finite_images(syntax):
    good, rng, found = dicom(syntax=syntax), random.Random(0), 0
    for i in range(1500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if i % 5 == 0:
            del data[rng.randrange(len(data)):]
        try:
            header, values = dicom_files.read_header(io.BytesIO(data)), dicom_files.decode(data)
        except DamagedImageError as error:
            assert "\n" not in str(error)
            continue
        assert header.is_image and values.ndim == 3 and np.isfinite(values).all()
        found += 1
    assert found > 300
