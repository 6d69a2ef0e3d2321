"""CIFAR-10, MNIST, LSUN and ImageNet as they are published, and what hostile ones get."""

import builtins
import gzip
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import PIL.Image
import pytest
from image_sources import (
    assert_refused,
    convert,
    encode,
    flat,
    gray_value,
    random_pixels,
    run,
    write_source,
)
from published_archives import (
    CIFAR10_CLASSES,
    FOLDER,
    cifar10_members,
    idx,
    pickle_of_python2,
    write_cifar10,
    write_lmdb,
    write_mnist,
    write_tar,
)
from scripts import HANG_SEC, ROOT

from images import archives
from images.sources import condition_numbers, open_source

NUM = 23  # images: batches of 5, 5, 5, 4 and 4
IMAGES = random_pixels(NUM, 32, 32, 3)
LABELS = np.arange(NUM) * 3 % 10
DIGITS = random_pixels(NUM, 28, 28)
CIFAR10 = "cifar-10-python.tar.gz"


def refuse(tmp_path, source, *texts, args=()):
    assert_refused(run(source, tmp_path / "out" / "a.zip", *args), tmp_path, *texts)


# ------------------------------------------------------------------------------------ CIFAR-10


def of_python3(protocol):
    return lambda value: pickle.dumps(value, protocol)


@pytest.mark.parametrize("dump", [pickle_of_python2, of_python3(2), of_python3(3), of_python3(4)],
                         ids=["python2", "python3-2", "python3-3", "python3-4"])
@pytest.mark.parametrize("name", [CIFAR10, "renamed.tgz"])
def test_cifar10_is_read_pixel_by_pixel_in_the_order_of_its_batches(tmp_path, dump, name):
    path = write_tar(tmp_path / name, cifar10_members(IMAGES, LABELS, dump))
    images, labels = convert(path, tmp_path / "out.zip")
    assert np.array_equal([pixels for _, pixels in images], IMAGES)
    assert labels == [[f"00000/img{i:08d}.png", int(label)] for i, label in enumerate(LABELS)]


def test_our_pickle_of_python_2_is_one():
    value = {"labels": [1, 300, -1], "data": IMAGES[0]}
    read = pickle.loads(pickle_of_python2(value), encoding="latin1")
    assert read["labels"] == value["labels"] and np.array_equal(read["data"], value["data"])


def test_cifar10_summary_names_classes_and_tells_a_short_archive(tmp_path):
    result = run(write_cifar10(tmp_path / CIFAR10, IMAGES, LABELS), tmp_path / "out.zip")
    assert f"{NUM} images, 32x32, 3 channels, 10 classes" in result.output
    assert "class 3 (cat): 3" in result.output and "class 9 (truck): 2" in result.output
    assert (f"Warning: CIFAR-10 is published with 50000 such images, but there are {NUM}"
            in result.output)


def test_flags_work_on_arrays_as_on_files(tmp_path):
    path = write_cifar10(tmp_path / CIFAR10, IMAGES, LABELS)
    files = {f"{i:02}.png": pixels for i, pixels in enumerate(IMAGES)}
    labels = [[f"{i:02}.png", int(label)] for i, label in enumerate(LABELS)]
    files["dataset.json"] = (b'{"labels": %b}' % repr(labels).replace("'", '"').encode())
    copy = write_source(tmp_path / "copy", files)
    args = ["--resolution=16x16", "--transform=center-crop", "--classes=9,3", "--max-images=21"]
    contents = []
    for source, dest in ((path, "a.zip"), (copy, "b.zip")):
        assert run(source, tmp_path / dest, *args, "--workers=2").exit_code == 0
        with zipfile.ZipFile(tmp_path / dest) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    named, unnamed = (json.loads(content.pop("dataset.json")) for content in contents)
    assert contents[0] == contents[1] and named["labels"] == unnamed["labels"]
    assert named["class_names"] == [CIFAR10_CLASSES[9], CIFAR10_CLASSES[3]]
    output = run(path, tmp_path / "a.zip", *args).output
    assert f"class 0 ({CIFAR10_CLASSES[9]})" in output


def with_member(change):
    members = cifar10_members(IMAGES, LABELS)
    change(members)
    return members


def linked(kind):
    info = tarfile.TarInfo(f"{FOLDER}/data_batch_1")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


BATCH = f"{FOLDER}/data_batch_1"


class _Boom:
    def __reduce__(self):
        return os.system, ("touch boom",)


def batch(**changes):
    content = {"data": IMAGES[:5].reshape(5, -1), "labels": [0, 1, 2, 3, 4], **changes}
    return {BATCH: pickle_of_python2({key: x for key, x in content.items() if x is not None})}


@pytest.mark.parametrize("members,texts", [
    ({BATCH: None}, ["has no cifar-10-batches-py/data_batch_1", "CIFAR-10"]),
    ({"x": linked(tarfile.SYMTYPE)}, ["link"]),
    ({BATCH: linked(tarfile.LNKTYPE)}, ["link"]),
    ({BATCH: linked(tarfile.FIFOTYPE)}, ["special"]),
    ({"../x": b""}, ["../x leads out"]),
    ({"/etc/x": b""}, ["/etc/x leads out"]),
    ({f"{i}": b"" for i in range(120)}, ["more than 100 members"]),
    ({BATCH: b""}, ["data_batch_1", "pickle exhausted"]),
    ({BATCH: pickle_of_python2({"a": 1})[:-1]}, ["data_batch_1", "exhausted"]),
    ({BATCH: pickle.dumps(_Boom(), 2)}, ["data_batch_1", "posix.system"]),
    ({BATCH: pickle.dumps(_Boom(), 4)}, ["data_batch_1", "posix.system"]),
    ({BATCH: pickle.dumps(1.5, 2)}, ["BINFLOAT"]),
    ({BATCH: pickle.dumps([], 2)}, ["not hold a dict"]),
    ({BATCH: pickle.dumps({"data": np.zeros([2, 3072]), "labels": [0, 1]}, 2)}, ["not of bytes"]),
    (batch(labels=[0, 1]), ["2 labels for 5 images"]),
    (batch(labels=[0, 1, 2, 3, 10]), ["label 10 of image 4", "0..9"]),
    (batch(labels=[0, 1, 2, 3, -1]), ["label -1 of image 4"]),
    (batch(labels=["a"] * 5), ["integers"]),
    (batch(labels=None), ['"labels"']),
    (batch(data=IMAGES[:5].reshape(10, -1), labels=[0] * 10), ["[10, 1536]", "[n, 3072]"]),
    ({f"{FOLDER}/batches.meta": pickle_of_python2({"label_names": ["a"]})}, ["label_names"]),
])
def test_an_archive_that_is_not_as_published_is_refused_in_one_line(tmp_path, monkeypatch, members,
                                                                   texts):
    monkeypatch.chdir(tmp_path)
    merged = {**cifar10_members(IMAGES, LABELS), **members}
    path = write_tar(tmp_path / CIFAR10, {k: v for k, v in merged.items() if v is not None})
    refuse(tmp_path, path, CIFAR10, *texts)
    assert not (tmp_path / "boom").exists()


def test_members_that_are_there_twice_are_refused(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo(BATCH))
    (tmp_path / CIFAR10).write_bytes(gzip.compress(file.getvalue()))
    refuse(tmp_path, tmp_path / CIFAR10, BATCH, "twice")


def test_a_flipped_bit_or_a_cut_in_an_archive_is_found(tmp_path):
    path = write_cifar10(tmp_path / CIFAR10, IMAGES, LABELS)
    whole = path.read_bytes()
    for position in range(100, len(whole), len(whole) // 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1:])
        refuse(tmp_path, path, CIFAR10)
    for length in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        refuse(tmp_path, path, CIFAR10)
    path.write_bytes(b"no archive")
    refuse(tmp_path, path, CIFAR10)


def test_what_an_archive_unpacks_to_is_bounded(tmp_path, monkeypatch):
    path = write_cifar10(tmp_path / CIFAR10, IMAGES, LABELS)
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(1 << 20)))
    assert run(path, tmp_path / "out.zip").exit_code == 0  # zeros at the end are a tar's
    monkeypatch.setattr(archives, "_MAX_BYTES", 1 << 20)
    refuse(tmp_path, path, "1048576 bytes allowed")


# --------------------------------------------------------------------------------------- MNIST


def test_mnist_is_padded_with_zeros_and_gray(tmp_path):
    images, labels = convert(write_mnist(tmp_path / "mnist", DIGITS, LABELS), tmp_path / "out.zip")
    assert np.array_equal([pixels[2:30, 2:30] for _, pixels in images], DIGITS)
    for _, pixels in images:
        assert pixels.shape == (32, 32)
        assert pixels.sum(dtype=int) == pixels[2:30, 2:30].sum(dtype=int)
    assert [label for _, label in labels] == LABELS.tolist()


def test_mnist_without_its_labels_says_where_they_must_lie(tmp_path):
    path = write_mnist(tmp_path / "mnist", DIGITS, LABELS)
    (tmp_path / "mnist/train-labels-idx1-ubyte.gz").unlink()
    refuse(tmp_path, path, "train-labels-idx1-ubyte.gz: no such file", "beside")


@pytest.mark.parametrize("name,data,texts", [
    ("images-idx3", idx(DIGITS)[:-1], ["fewer than the 18032 bytes"]),
    ("images-idx3", idx(DIGITS) + b"x", ["more than the 18032 bytes"]),
    ("images-idx3", idx(DIGITS[:, :20]), ["28x20; must be 28x28"]),
    ("images-idx3", idx(DIGITS[0]), ["is not an IDX file of bytes with 3 dimensions"]),
    ("images-idx3", b"", ["not an IDX file"]),
    ("images-idx3", struct.pack(">4I", 0x803, 2**32 - 1, 28, 28), ["bytes allowed"]),
    ("labels-idx1", idx(LABELS[1:].astype(np.uint8)), ["22 labels for 23 images"]),
    ("labels-idx1", idx(np.full(NUM, 10, np.uint8)), ["label 10 of image 0", "0..9"]),
])
def test_idx_files_that_are_not_as_published_are_refused(tmp_path, name, data, texts):
    path = write_mnist(tmp_path / "mnist", DIGITS, LABELS)
    (tmp_path / f"mnist/train-{name}-ubyte.gz").write_bytes(gzip.compress(data))
    refuse(tmp_path, path, name, *texts)


def test_a_flipped_bit_in_mnist_is_found(tmp_path):
    path = write_mnist(tmp_path / "mnist", DIGITS, LABELS)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refuse(tmp_path, path, path.name)


# ---------------------------------------------------------------------------------------- LSUN


def lsun(tmp_path, suffix="webp"):
    pytest.importorskip("lmdb")
    sizes = [(40, 30), (30, 50), (36, 36)]
    values = {f"{i * 7919 % 13:040x}": encode(random_pixels(*sizes[i % 3], 3, seed=i), suffix)
              for i in range(12)}
    return write_lmdb(tmp_path / "lsun/cat_lmdb", values), values


@pytest.mark.parametrize("suffix", ["webp", "jpeg"])
def test_lsun_is_read_in_the_order_of_its_keys(tmp_path, suffix):
    path, values = lsun(tmp_path, suffix)
    files = {f"{key}.{suffix}": value for key, value in values.items()}
    args = ["--transform=center-crop", "--resolution=16x16", "--max-images=10"]
    images, labels = convert(path, tmp_path / "a.zip", *args)
    expected, _ = convert(write_source(tmp_path / "files", files), tmp_path / "b.zip", *args)
    assert labels is None and len(images) == 10
    for (_, pixels), (_, other) in zip(images, expected, strict=True):
        assert np.array_equal(pixels, other)
    assert sorted(os.listdir(path)) == ["data.mdb", "lock.mdb"]


def test_a_damaged_image_of_lsun_is_named_by_its_key(tmp_path):
    pytest.importorskip("lmdb")
    path = write_lmdb(tmp_path / "x_lmdb", {"a": encode(flat(0)), "b": b"broken"})
    refuse(tmp_path, path, "x_lmdb: b: can't be read: not an image")
    refuse(tmp_path, write_lmdb(tmp_path / "y_lmdb", {}), "no images found")
    (tmp_path / "z_lmdb").mkdir()
    refuse(tmp_path, tmp_path / "z_lmdb", "z_lmdb", "LMDB database")
    (tmp_path / "z_lmdb/data.mdb").write_bytes(bytes(8192))
    refuse(tmp_path, tmp_path / "z_lmdb", "z_lmdb", "LMDB database")


def test_lsun_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    def no_lmdb(name, *args, **kwargs):
        if name == "lmdb":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_lmdb)
    monkeypatch.delitem(sys.modules, "lmdb", raising=False)
    (tmp_path / "cat_lmdb").mkdir()
    refuse(tmp_path, tmp_path / "cat_lmdb", "pip install lmdb")


# ---------------------------------------------------------------------------- folders and ZIPs


def test_imagenet_with_its_odd_files_converts_and_tells_them(tmp_path):
    cmyk = PIL.Image.fromarray(random_pixels(20, 24, 4), "CMYK")
    files = {"n01/n01_1.JPEG": encode(random_pixels(20, 24, 3), "jpeg"),
             "n01/n01_2.JPEG": encode(cmyk, "jpeg"),
             "n02/n02_1.JPEG": encode(random_pixels(30, 24, 3), "png"),
             "n02/n02_2.JPEG": encode(random_pixels(30, 24), "jpeg")}
    path = write_source(tmp_path / "train", files)
    args = ["--resolution=16x16", "--transform=center-crop"]
    images, labels = convert(path, tmp_path / "a.zip", *args)
    assert [pixels.shape for _, pixels in images] == [(16, 16, 3)] * 4
    assert [label for _, label in labels] == [0, 0, 1, 1]
    output = run(path, tmp_path / "a.zip", *args).output
    assert "class 1 (n02): 2" in output
    assert "Note: 1 image has another format than its name says, the first " \
        "n02/n02_1.JPEG (PNG)" in output
    assert "1 CMYK image was converted without a colour profile, the first n01/n01_2" in output


def test_links_are_followed_but_for_those_that_lead_in_circles(tmp_path):
    path = write_source(tmp_path / "src", {"a.png": flat(1), "sub/b.png": flat(2)})
    write_source(tmp_path / "elsewhere", {"c.png": flat(3)})
    (path / "c.png").symlink_to(tmp_path / "elsewhere/c.png")
    (path / "loop").symlink_to(path, target_is_directory=True)
    images, _ = convert(path, tmp_path / "a.zip")
    assert [gray_value(pixels) for _, pixels in images] == [1, 3, 2]
    classes = tmp_path / "classes"
    classes.mkdir()
    for name in ("one", "two"):
        (classes / name).symlink_to(path, target_is_directory=True)
    images, labels = convert(classes, tmp_path / "b.zip")
    assert [gray_value(pixels) for _, pixels in images] == [1, 3, 2] * 2
    assert [label for _, label in labels] == [0] * 3 + [1] * 3
    (path / "d.png").symlink_to("nowhere")
    refuse(tmp_path, path, "d.png", "No such file")


def test_a_pipe_is_not_waited_for(tmp_path):
    path = write_source(tmp_path / "src", {"a.png": flat(1)})
    os.mkfifo(path / "b.png")
    refuse(tmp_path, path, "b.png", "not a regular file")


def test_links_in_a_zip_are_refused(tmp_path):
    path = write_source(tmp_path / "src.zip", {"a.png": flat(1)})
    info = zipfile.ZipInfo("b.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    refuse(tmp_path, path, "b.png is a symbolic link")


def test_a_corrupt_member_of_a_zip_is_named(tmp_path):
    path = write_source(tmp_path / "src.zip", {"a.png": flat(1), "b.png": random_pixels(9, 9, 3)})
    data = bytearray(path.read_bytes())
    data[data.index(b"b.png") + 90] ^= 1
    path.write_bytes(data)
    refuse(tmp_path, path, "b.png: can't be read", "CRC")


def test_postscript_is_not_run(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    refuse(tmp_path, write_source(tmp_path / "src", {"a.png": eps}), "a.png", "PostScript")


# --------------------------------------------------------------------------------------- bombs

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
import dataset_tool
dataset_tool.main(sys.argv[1:])
"""


def png_bomb():
    def chunk(kind, data):
        import zlib
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def header_bomb():
    """A tar whose header of extended attributes has 8 GiB, most of them in the archive."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    zeros = gzip.compress(bytes(16 << 20))
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + 128 * zeros


def zip_bomb(path):
    """A ZIP whose member says that it unpacks to 4 GiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 20))
    data = path.read_bytes()
    start = data.index(b"PK\1\2")
    path.write_bytes(data[:start + 24] + struct.pack("<I", 0xFFFFFFF0) + data[start + 28:])
    return path


@pytest.mark.scripts
@pytest.mark.parametrize("kind", ["png", "tar", "zip", "idx"])
def test_bombs_are_refused_within_one_gigabyte(tmp_path, kind):
    path = {"png": lambda: write_source(tmp_path / "src", {"a.png": png_bomb()}),
            "zip": lambda: zip_bomb(tmp_path / "src.zip"),
            "idx": lambda: write_mnist(tmp_path, DIGITS, LABELS),
            "tar": lambda: tmp_path / CIFAR10}[kind]()
    if kind == "tar":
        path.write_bytes(header_bomb())
    if kind == "idx":
        path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 600_000, 28, 28))
                         + 64 * gzip.compress(bytes(16 << 20)))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, f"--source={path}", f"--dest={tmp_path}/out/a.zip",
         "--workers=1"], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SEC)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("name", ["src", "src.zip"])
def test_labels_are_no_file_that_is_left_out(tmp_path, name):
    for others in ({}, {"notes.txt": b"hello"}, {"notes.txt": b"x", "a/readme": b"y"}):
        path = tmp_path / f"{len(others)}-{name}"
        labels = json.dumps({"labels": [["a/0.png", 1], ["a/1.png", 0]]}).encode()
        write_source(path, {"a/0.png": flat(1), "a/1.png": flat(2), "dataset.json": labels,
                            **others})
        with open_source(path) as source:
            assert (source.num_images, len(source.others)) == (2, len(others))
            assert source.labels(range(2)) == [1, 0]


def test_condition_images_are_found_by_name_whatever_order_their_source_has(tmp_path):
    # A folder goes by path component, a ZIP by the whole name: "a/x" and "a-1/x" change places.
    images = write_source(tmp_path / "src", {"a/x.png": flat(1), "a-1/x.png": flat(2)})
    conditions = write_source(tmp_path / "cond.zip", {"a/x.png": flat(3), "a-1/x.png": flat(4)})
    with open_source(images) as source, open_source(conditions) as others:
        numbers = condition_numbers(source, others)
        assert [others.names[k] for k in numbers] == list(source.names) == ["a/x.png", "a-1/x.png"]
        assert numbers == [1, 0]
