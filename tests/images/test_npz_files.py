"""Images in one .npz: a source, a data set to read and to score, and what is no such file."""

import json
import multiprocessing
import pickle
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from image_sources import assert_refused, convert, encode, random_pixels, run, write_source
from scripts import ROOT

import dataset_tool
import fid
from images import npz_files
from images.dataset import ImageFolderDataset
from images.image_files import NoImagesError
from images.npz_files import Npz, npz_contents

NUM = 12
IMAGES = random_pixels(NUM, 6, 5, 3)
LABELS = np.arange(NUM) * 5 % 4
SAVES = pytest.mark.parametrize("save", [np.savez, np.savez_compressed])


def planes(images):
    return images.transpose(0, 3, 1, 2)


def refuse(tmp_path, path, *texts, args=()):
    assert_refused(run(path, tmp_path / "out" / "a.zip", *args), tmp_path, path.name, *texts)


@SAVES
def test_samples_with_labels_become_a_data_set(tmp_path, save):
    save(tmp_path / "samples.npz", IMAGES, LABELS)
    images, labels = convert(tmp_path / "samples.npz", tmp_path / "out.zip")
    assert np.array_equal([pixels for _, pixels in images], IMAGES)
    assert labels == [[f"00000/img{i:08d}.png", int(LABELS[i])] for i in range(NUM)]
    images, labels = convert(tmp_path / "samples.npz", tmp_path / "out.zip", "--classes=3,0",
                             "--max-images=10")
    chosen = [i for i in range(10) if LABELS[i] in (3, 0)]
    assert np.array_equal([pixels for _, pixels in images], IMAGES[chosen])
    assert [label for _, label in labels] == [{3: 0, 0: 1}[LABELS[i]] for i in chosen]


@SAVES
def test_samples_without_labels_have_none(tmp_path, save):
    save(tmp_path / "samples.npz", IMAGES)
    images, labels = convert(tmp_path / "samples.npz", tmp_path / "out.zip")
    assert np.array_equal([pixels for _, pixels in images], IMAGES) and labels is None


@pytest.mark.parametrize("images, expected", [
    (IMAGES[..., 0], IMAGES[..., :1]), (planes(IMAGES), IMAGES), (IMAGES[..., :1], IMAGES[..., :1]),
    (IMAGES.astype(np.float32), IMAGES), (IMAGES.astype(">u2"), IMAGES)])
def test_arrays_of_any_layout_and_type_are_read(tmp_path, images, expected):
    np.savez(tmp_path / "a.npz", images)
    with_reader = ImageFolderDataset(tmp_path / "a.npz")
    for i in range(NUM):
        assert np.array_equal(with_reader[i][0], expected[i].transpose(2, 0, 1))
    assert with_reader.scaling.is_8bit == (images.dtype == np.uint8)


def test_a_shape_with_two_readings_needs_a_layout(tmp_path):
    values = random_pixels(2, 20, 30, 12)
    np.savez(tmp_path / "a.npz", values)
    refuse(tmp_path, tmp_path / "a.npz", "arr_0", "--layout=chw or --layout=hwc")
    assert run(tmp_path / "a.npz", tmp_path / "b.zip", "--layout=hwc").exit_code == 0
    assert ImageFolderDataset(tmp_path / "b.zip").image_shape == [12, 20, 30]
    second = ImageFolderDataset(tmp_path / "b.zip")[1][0]
    assert np.array_equal(second, values[1].transpose(2, 0, 1))


# ------------------------------------------------------------------------------- as a data set


@SAVES
def test_the_reader_takes_images_in_any_order(tmp_path, save):
    save(tmp_path / "a.npz", IMAGES, LABELS)
    dataset = ImageFolderDataset(tmp_path / "a.npz", use_labels=True, xflip=True)
    assert (len(dataset), dataset.image_shape, dataset.label_dim) == (2 * NUM, [3, 6, 5], 4)
    order = np.random.default_rng(0).permutation(2 * NUM)
    images, labels = dataset.get_batch(order)
    both = np.concatenate([planes(IMAGES), planes(IMAGES)[..., ::-1]])
    assert np.array_equal(images, both[order])
    assert np.array_equal(labels.argmax(1), LABELS[order % NUM])


@SAVES
def test_other_processes_read_at_their_own_place(tmp_path, save):
    save(tmp_path / "a.npz", IMAGES)
    files = Npz(tmp_path / "a.npz")
    files.read(3)  # opens the file here
    copy = pickle.loads(pickle.dumps(files))
    assert np.array_equal(copy.read(5), planes(IMAGES)[5])
    with multiprocessing.get_context("fork").Pool(1) as pool:  # inherits it open
        assert np.array_equal(pool.map(files.read, [8, 2, 9]), planes(IMAGES)[[8, 2, 9]])
    assert np.array_equal(files.read(4), planes(IMAGES)[4])
    files.close()
    assert np.array_equal(files.read(1), planes(IMAGES)[1])


def test_the_fingerprint_changes_with_images_and_labels_and_not_with_the_name(tmp_path):
    def fingerprint(name, *arrays):
        np.savez(tmp_path / name, *arrays)
        return ImageFolderDataset(tmp_path / name).fingerprint

    other = IMAGES.copy()
    other[-1, -1, -1, -1] ^= 1
    first = fingerprint("a.npz", IMAGES, LABELS)
    assert first == fingerprint("b.npz", IMAGES, LABELS)
    found = {first, fingerprint("a.npz", IMAGES), fingerprint("a.npz", other, LABELS),
             fingerprint("a.npz", IMAGES, LABELS[::-1])}
    assert len(found) == 4


@SAVES
def test_scores_are_those_of_the_same_images_in_a_folder(tmp_path, save, invoke):
    for name, seed in (("a", 0), ("b", 1)):
        pixels = random_pixels(NUM, 6, 6, 3, seed=seed)
        write_source(tmp_path / name, {f"{i:02}.png": encode(image)
                                       for i, image in enumerate(pixels)})
        save(tmp_path / f"{name}.npz", pixels)
    values = []
    for suffix in ("", ".npz"):
        done = invoke(fid.main, "calc", f"--images={tmp_path}/a{suffix}",
                      f"--ref={tmp_path}/b{suffix}",
                      f"--count={NUM}", "--detector=pixels", "--device=cpu", "--workers=0",
                      f"--out={tmp_path}/scores.jsonl")
        assert done.exit_code == 0, done.output
        values.append(json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[-1]))
    assert values[0]["value"] == values[1]["value"]


def test_a_reference_batch_with_statistics_is_statistics_as_a_reference(tmp_path, invoke):
    """Those of guided-diffusion hold the first images and the statistics of all."""
    pixels = random_pixels(NUM, 6, 6, 3)
    flat = planes(pixels).reshape(NUM, -1) / 127.5 - 1
    np.savez(tmp_path / "ref.npz", pixels[:3], mu=flat.mean(0) + 1, sigma=np.cov(flat.T),
             detector="pixels")
    np.savez(tmp_path / "a.npz", pixels)
    done = invoke(fid.main, "calc", f"--images={tmp_path}/a.npz", f"--ref={tmp_path}/ref.npz",
                  f"--count={NUM}", "--detector=pixels", "--device=cpu", "--workers=0")
    assert done.exit_code == 0, done.output
    # Equal covariances: what is left is the distance of the means, 1 in each of 108 features.
    assert float(done.stdout.split()[-1]) == pytest.approx(108, rel=1e-4)


def test_check_and_show_and_split_take_them(tmp_path, invoke):
    np.savez(tmp_path / "a.npz", IMAGES, LABELS)
    done = invoke(dataset_tool.main, "check", f"{tmp_path}/a.npz", "--workers=1")
    assert done.exit_code == 0 and f"{NUM} images, 5x6, 3 channels, 4 classes" in done.output
    assert invoke(dataset_tool.main, "show", f"{tmp_path}/a.npz", "--workers=1").exit_code == 0
    assert (tmp_path / "a-show.png").exists()
    done = invoke(dataset_tool.main, "split", f"{tmp_path}/a.npz", "--val=4",
                  f"--dest={tmp_path}/t.zip", f"--val-dest={tmp_path}/v.zip")
    assert done.exit_code == 0, done.output
    parts = [ImageFolderDataset(tmp_path / f"{name}.zip", use_labels=True) for name in "tv"]
    found = {part[i][0].tobytes(): int(part.get_details(i).raw_label)
             for part in parts for i in range(len(part))}
    assert found == {image.tobytes(): label for image, label in zip(
        planes(IMAGES), LABELS.tolist(), strict=True)}


def test_no_images_are_said_to_be_none(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES[:0])
    refuse(tmp_path, tmp_path / "a.npz", "no images found")
    with pytest.raises(NoImagesError):
        ImageFolderDataset(tmp_path / "a.npz")


# --------------------------------------------------------------------------- what is no such file


def test_contents_are_told_by_the_members(tmp_path):
    path = tmp_path / "a.npz"
    for arrays, expected in (
            ({"arr_0": IMAGES}, {"images"}), ({"mu": 1, "sigma": 2}, {"statistics"}),
            ({"features": 1}, {"features"}), ({"mu": 1}, set()),
            ({"arr_0": 1, "mu": 1, "sigma": 1}, {"images", "statistics"}),
            ({"mu": 1, "sigma": 1, "features": 1}, {"statistics", "features"})):
        np.savez(path, **arrays)
        assert npz_contents(path) == expected
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="a.npz: is not an .npz"):
        npz_contents(path)


def test_contents_are_told_without_torch(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES)
    code = ("import sys\nfrom images.npz_files import npz_contents\n"
            f"assert npz_contents({str(tmp_path / 'a.npz')!r}) == {{'images'}}\n"
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("arrays, texts", [
    ({"x": IMAGES, "y": LABELS}, ["holds x, y, but no images", "arr_0"]),
    ({"mu": LABELS, "sigma": LABELS}, ["holds mu, sigma, but no images"]),
    ({"arr_0": IMAGES[0, 0]}, ["arr_0: is an array of shape [5, 3]", "[n, H, W, C]"]),
    ({"arr_0": np.array([None, 1])}, ["arr_0", "shape [2]"]),
    ({"arr_0": np.zeros([2, 6, 6, 3], object)}, ["arr_0"]),
    ({"arr_0": np.zeros([2, 6, 6, 3], complex)}, ["arr_0: is a complex128 array"]),
    ({"arr_0": np.asfortranarray(IMAGES)}, ["arr_0: is stored in column order",
                                            "ascontiguousarray"]),
    ({"arr_0": IMAGES, "arr_1": LABELS[1:]}, ["arr_1: is a int64 array of shape [11]",
                                             "12 integers"]),
    ({"arr_0": IMAGES, "arr_1": LABELS / 2}, ["arr_1: is a float64 array"]),
    ({"arr_0": IMAGES, "arr_1": IMAGES}, ["arr_1: is a uint8 array of shape [12, 6, 5, 3]"]),
    ({"arr_0": IMAGES, "arr_1": LABELS - 1}, ["arr_1: label -1 of image 0", "0..65535"]),
    ({"arr_0": np.full([2, 6, 6, 3], np.nan)}, ["nan"]),
])
def test_arrays_that_are_no_images_or_labels_are_refused(tmp_path, arrays, texts):
    np.savez(tmp_path / "a.npz", **arrays)
    args = ["--scale=minmax"] if "nan" in texts else []
    result = run(tmp_path / "a.npz", tmp_path / "out" / "a.zip", *args)
    assert_refused(result, tmp_path, *texts)


def npy(shape, data=b"", dtype="|u1"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize("member, text", [
    (b"", "not a NumPy array"), (b"\x93NUMPY", "not a NumPy array"), (npy("oops"), "not a NumPy"),
    (npy("(2, 6, 6, 3)", bytes(215)), "wrong number of bytes"),
    (npy("(2, 6, 6, 3)", bytes(217)), "wrong number of bytes"),
    (npy("(1125899906842624, 6, 6, 3)", bytes(9)), "wrong number of bytes"),
    (npy("(-2, -6, 6, 3)", bytes(216)), "wrong number of bytes"),
    (npy("(2, 6, 6, 3)", bytes(1728), "|O"), "a object array"),
])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_headers_that_claim_what_is_not_there_are_refused_at_once(tmp_path, member, text, method):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("arr_0.npy", member)
    tracemalloc.start()
    try:
        refuse(tmp_path, tmp_path / "a.npz", "arr_0", text)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_small_file_that_unpacks_to_any_number_of_images_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", np.zeros([1 << 20, 5, 5], np.uint8))
    monkeypatch.setattr(npz_files, "_MAX_IMAGES", (1 << 20) - 1)
    tracemalloc.start()
    try:
        refuse(tmp_path, tmp_path / "a.npz", "1048576 images are more than the 1048575 allowed")
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@SAVES
def test_a_flipped_bit_is_found_where_images_are_read_in_order(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, random_pixels(NUM, 40, 40, 3))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    refuse(tmp_path, path, "arr_0")
    files = Npz(path)
    with pytest.raises(ValueError, match="arr_0"):
        for i in [0, 1, 0, *range(1, NUM)]:  # begins twice, as readers of formats do
            files.read(i)


@SAVES
def test_images_that_are_whole_have_the_checksum_whatever_was_read_before(tmp_path, save):
    save(tmp_path / "a.npz", IMAGES)
    files = Npz(tmp_path / "a.npz")
    for order in ([0, 5, 1], range(NUM), [11, 0], range(NUM)):
        for i in order:
            assert np.array_equal(files.read(i), planes(IMAGES)[i])


@pytest.mark.parametrize("left", [100, 300, 0.5])
def test_a_cut_file_is_refused(tmp_path, left):
    path = tmp_path / "a.npz"
    np.savez(path, IMAGES)
    data = path.read_bytes()
    path.write_bytes(data[:left if left > 1 else int(len(data) * left)])
    refuse(tmp_path, path, "damaged")


def test_a_member_of_which_the_file_holds_less_than_the_directory_says_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, IMAGES)
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\1\2")
    data[start + 42:start + 46] = (len(data) - 10).to_bytes(4, "little")  # where the member begins
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.npz"):
        Npz(path)


def test_one_image_at_a_time_is_in_memory(tmp_path):
    pixels = np.zeros([64, 128, 128, 3], np.uint8)  # 3 MB
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", pixels)
        files = Npz(tmp_path / "a.npz")
        files.read(0)
        tracemalloc.start()
        for i in range(len(files)):
            files.read(i)
        assert tracemalloc.get_traced_memory()[1] < 5 * pixels[0].nbytes
        tracemalloc.stop()
