"""CIFAR-10 and CIFAR-100 in all forms in which they are published: tars, folders and records."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from image_sources import assert_refused, convert, random_pixels, run, write_source
from published_archives import CIFAR10_CLASSES, cifar10_members, pickle_of_python2, write_tar

NUM = 20
IMAGES = random_pixels(NUM, 32, 32, 3)
FINE, COARSE = np.arange(NUM) * 37 % 100, np.arange(NUM) * 7 % 20
TEN = np.arange(NUM) * 3 % 10
FINE_NAMES, COARSE_NAMES = [f"fine{i}" for i in range(100)], [f"coarse{i}" for i in range(20)]
PLANES = IMAGES.transpose(0, 3, 1, 2).reshape(NUM, -1)


def lines(names):
    return "".join(f"{name}\n" for name in names).encode() + b"\n"


def cifar100_members(dump=pickle_of_python2, **changes):
    train = {"filenames": [f"{i}.png" for i in range(NUM)], "batch_label": "training batch 1 of 1",
             "fine_labels": FINE.tolist(), "coarse_labels": COARSE.tolist(), "data": PLANES,
             **changes}
    return {"train": dump(train), "test": b"not looked at",
            "meta": dump({"fine_label_names": FINE_NAMES, "coarse_label_names": COARSE_NAMES})}


def cifar100_records():
    records = [bytes([COARSE[i], FINE[i]]) + PLANES[i].tobytes() for i in range(NUM)]
    return {"train.bin": b"".join(records), "test.bin": b"",
            "fine_label_names.txt": lines(FINE_NAMES),
            "coarse_label_names.txt": lines(COARSE_NAMES)}


def cifar10_records():
    parts = np.array_split(np.arange(NUM), 5)
    found = {f"data_batch_{i}.bin": b"".join(bytes([TEN[k]]) + PLANES[k].tobytes() for k in part)
             for i, part in enumerate(parts, 1)}
    return {**found, "test_batch.bin": b"", "batches.meta.txt": lines(CIFAR10_CLASSES)}


def cifar10_pickles():
    return {name.rpartition("/")[2]: data for name, data in cifar10_members(IMAGES, TEN).items()}


FORMS = {  # folder, members, labels, names
    "cifar-10-batches-py": (cifar10_pickles, TEN, CIFAR10_CLASSES),
    "cifar-10-batches-bin": (cifar10_records, TEN, CIFAR10_CLASSES),
    "cifar-100-python": (cifar100_members, FINE, FINE_NAMES),
    "cifar-100-binary": (cifar100_records, FINE, FINE_NAMES),
}


def class_names(dest):
    with zipfile.ZipFile(dest) as archive:
        return json.loads(archive.read("dataset.json"))["class_names"]


def assert_converts(source, tmp_path, labels, names, *args):
    images, found = convert(source, tmp_path / "out.zip", *args)
    assert np.array_equal([pixels for _, pixels in images], IMAGES)
    assert [label for _, label in found] == labels.tolist()
    assert class_names(tmp_path / "out.zip") == names


@pytest.mark.parametrize("folder", FORMS)
@pytest.mark.parametrize("packed", ["tar", "folder", "folder above", "renamed folder"])
def test_all_published_forms_are_read_with_the_names_of_their_classes(tmp_path, folder, packed):
    make, labels, names = FORMS[folder]
    if packed == "tar":
        source = write_tar(tmp_path / "a.tar.gz",
                           {f"{folder}/{name}": data for name, data in make().items()})
    else:
        where = tmp_path / "src" / ("other" if packed == "renamed folder" else folder)
        where.parent.mkdir()
        write_source(where, make())
        source = where.parent if packed == "folder above" else where
    assert_converts(source, tmp_path, labels, names)


@pytest.mark.parametrize("folder", ["cifar-100-python", "cifar-100-binary"])
def test_coarse_labels_are_taken_if_asked(tmp_path, folder):
    path = write_source(tmp_path / folder, FORMS[folder][0]())
    assert_converts(path, tmp_path, COARSE, COARSE_NAMES, "--label-set=coarse")
    assert_converts(path, tmp_path, FINE, FINE_NAMES, "--label-set=fine")
    hint = "unless --label-set=coarse takes the 20 coarse ones"
    assert hint in run(path, tmp_path / "a.zip").output
    assert hint not in run(path, tmp_path / "a.zip", "--label-set=coarse").output


def test_other_sources_have_no_sets_of_labels(tmp_path):
    path = write_source(tmp_path / "src", {"a/x.png": IMAGES[0], "b/x.png": IMAGES[1]})
    assert_refused(run(path, tmp_path / "out/a.zip", "--label-set=coarse"), tmp_path,
                   "--label-set=coarse", "CIFAR-100")
    ten = write_source(tmp_path / "ten", cifar10_pickles())
    assert_refused(run(ten, tmp_path / "out/a.zip", "--label-set=coarse"), tmp_path, "CIFAR-100")


@pytest.mark.parametrize("changes, texts", [
    ({"fine_labels": [100] + [0] * (NUM - 1)}, ["train", "label 100 of image 0", "0..99"]),
    ({"coarse_labels": [20] * NUM}, ["label 20 of image 0", "0..19"]),
    ({"coarse_labels": [0]}, [f"1 labels for {NUM} images"]),
    ({"coarse_labels": ["x"] * NUM}, ['"coarse_labels"', "integers"]),
    ({"data": "x"}, ['"data"']),
])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_100_that_is_not_as_published_is_refused(tmp_path, changes, texts, packed):
    members = cifar100_members(**changes)
    if packed:
        path = write_tar(tmp_path / "cifar-100-python.tar.gz",
                         {f"cifar-100-python/{name}": data for name, data in members.items()})
    else:
        path = write_source(tmp_path / "cifar-100-python", members)
    assert_refused(run(path, tmp_path / "out/a.zip"), tmp_path, "cifar-100-python", *texts)


def test_a_batch_of_numbers_that_are_no_bytes_is_refused(tmp_path):
    members = cifar100_members(lambda value: pickle.dumps(value, 2), data=PLANES.astype(np.int64))
    path = write_source(tmp_path / "src", members)
    assert_refused(run(path, tmp_path / "out/a.zip"), tmp_path, "train", "is not of bytes")


@pytest.mark.parametrize("data", [b"", b"x", bytes(3073 * 2)])
def test_records_of_another_size_are_refused(tmp_path, data):
    path = write_source(tmp_path / "src", {**cifar100_records(), "train.bin": data})
    assert_refused(run(path, tmp_path / "out/a.zip"), tmp_path, "train.bin",
                   f"has {len(data)} bytes, not a multiple of the record size 3074")


@pytest.mark.parametrize("name, data", [
    ("fine_label_names.txt", lines(FINE_NAMES[1:])),
    ("coarse_label_names.txt", lines([*COARSE_NAMES, "more"]))])
def test_other_numbers_of_names_are_refused(tmp_path, name, data):
    path = write_source(tmp_path / "src", {**cifar100_records(), name: data})
    assert_refused(run(path, tmp_path / "out/a.zip"), tmp_path, name, "names in lines")


def test_a_folder_of_both_asks_which(tmp_path):
    path = tmp_path / "src"
    for folder in ("cifar-10-batches-py", "cifar-100-python"):
        files = {f"{folder}/{name}": data for name, data in FORMS[folder][0]().items()}
        write_source(path, files)
    assert_refused(run(path, tmp_path / "out/a.zip"), tmp_path,
                   "holds 2 sets of images: cifar-10-batches-py, cifar-100-python",
                   f"such as {path}/cifar-100-python")


def test_a_folder_without_all_files_is_none_of_cifar(tmp_path):
    members = cifar100_members()
    del members["meta"]
    path = write_source(tmp_path / "src", members)
    assert_refused(run(path, tmp_path / "out/a.zip"), tmp_path, "no images found")
