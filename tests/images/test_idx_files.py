"""MNIST and its like: IDX files by their names, packed or not, alone or in a folder."""

import gzip
import json
import zipfile

import numpy as np
import pytest
from image_sources import assert_refused, convert, encode, random_pixels, run, write_source
from published_archives import idx

from images import idx_files

NUM = 30
IMAGES = random_pixels(NUM, 28, 28)
LABELS = (np.arange(NUM) * 7 % 10).astype(np.uint8)


def write_pair(folder, name, labels_name, images=IMAGES, labels=LABELS):
    """Writes both files, compressed where their names end in .gz; returns the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, values in ((name, images), (labels_name, labels)):
        data = idx(values)
        (folder / file).write_bytes(gzip.compress(data, 1) if file.endswith(".gz") else data)
    return folder / name


def refuse(tmp_path, source, *texts):
    assert_refused(run(source, tmp_path / "out" / "a.zip"), tmp_path, *texts)


def inner(images):
    """Returns what is inside of the padding, which must be zero."""
    pixels = np.array([image for _, image in images])
    assert pixels.shape[1:] == (32, 32)
    assert pixels.sum(dtype=int) == pixels[:, 2:30, 2:30].sum(dtype=int)
    return pixels[:, 2:30, 2:30]


@pytest.mark.parametrize("name, labels_name", [
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"),
    ("train-images-idx3-ubyte.gz", "train-labels.idx1-ubyte"),
    ("t10k-images.idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    ("images-idx3-ubyte", "labels-idx1-ubyte"),
])
def test_files_are_read_packed_or_not_by_any_of_their_names(tmp_path, name, labels_name):
    path = write_pair(tmp_path / "a", name, labels_name)
    images, labels = convert(path, tmp_path / "out.zip")
    assert np.array_equal(inner(images), IMAGES)
    assert [label for _, label in labels] == LABELS.tolist()


def test_a_file_is_unpacked_by_its_content_whatever_it_is_called(tmp_path):
    path = write_pair(tmp_path / "a", "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    path.write_bytes(gzip.decompress(path.read_bytes()))  # as some browsers do
    assert np.array_equal(inner(convert(path, tmp_path / "out.zip")[0]), IMAGES)


@pytest.mark.parametrize("cut, text", [(1, "fewer"), (-1, "more")])
def test_an_unpacked_file_that_is_cut_or_too_long_is_refused(tmp_path, cut, text):
    path = write_pair(tmp_path / "a", "train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    data = path.read_bytes()
    path.write_bytes(data[:-1] if cut == 1 else data + b"x")
    refuse(tmp_path, path, path.name, f"{text} than the {NUM * 784} bytes")


def test_emnist_is_turned_upright_and_said_to_be(tmp_path):
    stored = IMAGES.transpose(0, 2, 1)  # as EMNIST stores them
    path = write_pair(tmp_path / "a", "emnist-digits-train-images-idx3-ubyte.gz",
                      "emnist-digits-train-labels-idx1-ubyte.gz", np.ascontiguousarray(stored))
    images, labels = convert(path, tmp_path / "out.zip")
    assert np.array_equal(inner(images), IMAGES)
    assert not np.array_equal(inner(images), stored)
    output = run(path, tmp_path / "out.zip").output
    assert "rows and columns exchanged; they were turned upright" in output


def test_classes_of_emnist_are_called_by_the_mapping_beside_it(tmp_path):
    labels = (np.arange(NUM) % 26 + 1).astype(np.uint8)  # letters begin at 1
    path = write_pair(tmp_path / "a", "emnist-letters-train-images-idx3-ubyte",
                      "emnist-letters-train-labels-idx1-ubyte", labels=labels)
    mapping = "".join(f"{i + 1} {65 + i} {97 + i}\n" for i in range(26))
    for with_names in (False, True):
        if with_names:
            (tmp_path / "a/emnist-letters-mapping.txt").write_text(mapping)
        _, found = convert(path, tmp_path / "out.zip")
        assert [label for _, label in found] == (labels - 1).tolist()
        with zipfile.ZipFile(tmp_path / "out.zip") as archive:
            names = json.loads(archive.read("dataset.json")).get("class_names")
        expected = [f"{chr(65 + i)}{chr(97 + i)}" for i in range(26)]
        assert names == (expected if with_names else None)
    output = run(path, tmp_path / "b.zip").output
    assert "classes 1 to 26 of the files became 0 to 25" in output


@pytest.mark.parametrize("split, most", [("balanced", 46), ("byclass", 61), ("bymerge", 46),
                                         ("digits", 9), ("mnist", 9)])
def test_each_split_of_emnist_has_its_number_of_classes(tmp_path, split, most):
    name = f"emnist-{split}-test-images-idx3-ubyte"
    labels = np.full(NUM, most, np.uint8)
    path = write_pair(tmp_path, name, name.replace("images-idx3", "labels-idx1"), labels=labels)
    _, found = convert(path, tmp_path / "out.zip")
    assert {label for _, label in found} == {most}
    write_pair(tmp_path, name, name.replace("images-idx3", "labels-idx1"), labels=labels + 1)
    refuse(tmp_path, path, f"label {most + 1} of image 0 must be in 0..{most}")


@pytest.mark.parametrize("mapping", ["0 48\n2 49\n", "0\n", "0 48\n1 7\n", "0 48\nx 49\n"])
def test_a_mapping_that_is_none_is_refused(tmp_path, mapping):
    name = "emnist-mnist-train-images-idx3-ubyte"
    path = write_pair(tmp_path, name, name.replace("images-idx3", "labels-idx1"))
    (tmp_path / "emnist-mnist-mapping.txt").write_text(mapping)
    refuse(tmp_path, path, "emnist-mnist-mapping.txt")


@pytest.mark.parametrize("folder", ["fashion", "data/FashionMNIST/raw"])
def test_classes_of_fashion_mnist_are_known(tmp_path, folder):
    path = write_pair(tmp_path / folder, "train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    output = run(path, tmp_path / "a.zip").output
    assert "class 0 (T-shirt/top): 3" in output and "class 9 (Ankle boot): 3" in output
    assert f"Fashion-MNIST is published with 60000 such images, but there are {NUM}" in output
    plain = write_pair(tmp_path / "mnist", path.name, "train-labels-idx1-ubyte")
    output = run(plain, tmp_path / "a.zip").output
    assert "T-shirt" not in output and "MNIST is published with 60000" in output


@pytest.mark.parametrize("given", ["a", "a/emnist-letters-train-images-idx3-ubyte"])
def test_without_labels_no_file_of_them_is_needed(tmp_path, given):
    path = write_pair(tmp_path / "a", "emnist-letters-train-images-idx3-ubyte", "labels")
    (path.parent / "labels").unlink()
    refuse(tmp_path, tmp_path / given, "no such file", "give --label-column=none")
    result = run(tmp_path / given, tmp_path / "out.zip", "--label-column=none")
    assert result.exit_code == 0 and "became 0 to 25" not in result.output
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["labels"] is None
        assert len(archive.namelist()) == NUM + 1


def test_a_folder_with_one_set_is_that_set(tmp_path):
    write_pair(tmp_path / "a/raw", "train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    write_pair(tmp_path / "a/raw", "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    images, labels = convert(tmp_path / "a", tmp_path / "out.zip")
    assert np.array_equal(inner(images), IMAGES)
    assert [label for _, label in labels] == LABELS.tolist()


def test_a_folder_with_several_sets_names_them_and_asks(tmp_path):
    for of in ("train", "t10k"):
        write_pair(tmp_path / "a", f"{of}-images-idx3-ubyte.gz", f"{of}-labels-idx1-ubyte.gz")
    refuse(tmp_path, tmp_path / "a", "2 sets of images: t10k-images-idx3-ubyte.gz, "
           "train-images-idx3-ubyte.gz", f"such as {tmp_path}/a/train-images-idx3-ubyte.gz")


def test_a_folder_that_has_pictures_too_is_one_of_pictures(tmp_path):
    write_pair(tmp_path / "a", "train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    write_source(tmp_path / "a", {"x.png": encode(IMAGES[0])})
    assert len(convert(tmp_path / "a", tmp_path / "out.zip")[0]) == 1


def test_a_zip_of_such_files_is_to_be_unpacked(tmp_path):
    name = "gzip/emnist-mnist-test-images-idx3-ubyte.gz"
    path = write_source(tmp_path / "gzip.zip", {name: b"x"})
    refuse(tmp_path, path, "no images found", "unpack the ZIP and name one of its files")


def test_unpacked_files_come_before_packed_ones():
    names = ["b/train-images-idx3-ubyte.gz", "a/x-images.idx3-ubyte.gz", "a/x-images.idx3-ubyte",
             "a/train-labels-idx1-ubyte", "images-idx3-ubyte.txt", "c/images.idx3-ubyte"]
    assert idx_files.find_images(names) == ["a/x-images.idx3-ubyte", "b/train-images-idx3-ubyte.gz",
                                            "c/images.idx3-ubyte"]
