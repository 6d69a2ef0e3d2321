"""Tensors in files of torch.save as a source of images."""

import io
import random
import zipfile

import numpy as np
import pytest
import torch
from image_sources import assert_refused, run

from images import array_files, tensor_files
from images.dataset import ImageFolderDataset


def tensor(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 800


def save(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return path


def converted(source, dest, *args):
    result = run(source, dest, *args)
    assert result.exit_code == 0, result.output
    dataset = ImageFolderDataset(dest)
    return dataset.get_batch(range(len(dataset)))[0]


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("shape, layout", [
    ((4, 2, 8, 12), "chw"), ((4, 8, 12, 2), "hwc"), ((4, 8, 12), None), ((4, 16, 20, 13), "hwc"),
    ((4, 16, 20, 13), "chw")])
def test_a_tensor_is_what_an_array_of_its_values_is(tmp_path, is_zip, shape, layout):
    values = tensor(*shape)
    path = save(tmp_path / "x.pt", values, _use_new_zipfile_serialization=is_zip)
    np.save(tmp_path / "x.npy", values.numpy())
    flags = ["--scale=minmax", *([f"--layout={layout}"] if layout else [])]
    images = converted(path, tmp_path / "a.zip", *flags)
    converted(tmp_path / "x.npy", tmp_path / "b.zip", *flags)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    expected = values[:, None] if values.ndim == 3 else values
    assert np.array_equal(images, expected.movedim(3, 1) if layout == "hwc" else expected)


@pytest.mark.parametrize("name, stored", [
    ("uint8", "uint8"), ("int8", "float32"), ("uint16", "uint16"), ("int16", "float32"),
    ("int32", "float32"), ("int64", "float32"), ("float16", "float32"), ("bfloat16", "float32"),
    ("float32", "float32"), ("float64", "float32")])
def test_types_keep_their_values(tmp_path, name, stored):
    values = (tensor(3, 2, 8, 12) / 40).abs().to(getattr(torch, name))
    flags = [] if name == "uint8" else ["--scale=std"]
    images = converted(save(tmp_path / "x.pt", values), tmp_path / "a.zip", *flags)
    assert images.dtype == stored
    assert np.array_equal(images, values.to(torch.float64).numpy().astype(stored))


def test_a_view_of_a_transposed_parameter_is_read_as_it_looks(tmp_path):
    values = torch.nn.Parameter(tensor(9, 12, 8, 2))
    path = save(tmp_path / "x.pth", values.permute(0, 3, 2, 1)[2:6])
    images = converted(path, tmp_path / "a.zip", "--scale=std")
    assert np.array_equal(images, values.detach().numpy()[2:6].transpose(0, 3, 2, 1))
    converted(save(tmp_path / "y.pth", values), tmp_path / "a.zip", "--scale=std")


def test_the_channels_of_the_forks_files_are_conditions_and_images(tmp_path):
    values = tensor(5, 2, 8, 12)
    path = save(tmp_path / "train.pt", values)
    converted(path, tmp_path / "a.zip", "--channels=cond:0,image:1", "--scale=-1024,3071",
              "--cond-scale=-1024,3071", "--max-images=3", "--workers=2")
    image, _, condition = ImageFolderDataset(tmp_path / "a.zip", use_conditions=True)[2]
    assert np.array_equal(image, values[2, 1:]) and np.array_equal(condition, values[2, :1])


@pytest.mark.parametrize("content, texts", [
    ({"low": torch.zeros(2, 3), "n": 3}, ["a dict of 2: 'low' (tensor [2, 3]), 'n' (int)"]),
    ({i: 0 for i in range(9)}, ["a dict of 9: 0 (int)", "4 (int) and 4 more"]),
    ([torch.zeros(1), "x"], ["a list of 2: tensor [1], str"]), (7, ["a value of type int"]),
    (np.zeros([2, 3, 3]), ["_reconstruct", "might run code"]),
    (torch.nn.ReLU(), ["torch.nn.modules.activation.ReLU", "might run code"]),
    (torch.zeros(2, 8, 8, dtype=torch.complex64), ["complex64", "bfloat16"]),
    (torch.zeros(2, 8, 8, dtype=torch.bool), ["a tensor of bool"]),
    (torch.eye(8).expand(2, 8, 8).to_sparse(), ["sparse_coo"]),
    (torch.zeros(8, 8), ["shape [8, 8]", "[n, H, W, C]"]),
    (torch.zeros(16, 16, 3), ["which is one image"]),
    (torch.zeros(1, 30, 20, 13), ["give --layout=chw or --layout=hwc"]),
    (torch.zeros(1).expand(10**5, 1, 8, 8), ["[100000, 1, 8, 8]", "too small", "clone"]),
    (torch.full([2, 8, 8], torch.nan), ["image 0", "nan at [0, 0, 0]"]),
], ids=lambda value: "" if isinstance(value, list) else type(value).__name__)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_anything_but_a_tensor_of_images_is_one_line(tmp_path, content, texts):
    path = save(tmp_path / "x.pt", content)
    assert_refused(run(path, tmp_path / "out/a.zip", "--scale=std"), tmp_path, *texts)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\3\4", b"\x80\x02."])
def test_what_is_no_file_of_torch_save_is_refused(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    assert_refused(run(tmp_path / "x.pt", tmp_path / "out/a.zip"), tmp_path, "x.pt: is damaged, or "
                   "not a file of torch.save")


def test_compressed_members_are_not_mapped_as_numbers(tmp_path):
    save(tmp_path / "good.pt", tensor(2, 8, 12))
    with zipfile.ZipFile(tmp_path / "good.pt") as good, \
            zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name))
    assert_refused(run(tmp_path / "x.pt", tmp_path / "out/a.zip", "--scale=std"), tmp_path,
                   "damaged")


def test_a_folder_of_tensors_says_what_it_holds(tmp_path):
    (tmp_path / "src").mkdir()
    save(tmp_path / "src/a.pt", tensor(2, 8, 12))
    assert_refused(run(tmp_path / "src", tmp_path / "out/a.zip"), tmp_path, "no images found",
                   "1 file isn't an image: a.pt")


def test_the_file_is_mapped_and_not_read(tmp_path):
    values = tensor(64, 8, 12)
    path = save(tmp_path / "x.pt", values)
    num, read = tensor_files.open_stack(path)
    with open(path, "r+b") as file:
        file.seek(path.read_bytes().index(values.numpy().tobytes()) + 5 * 8 * 12 * 4)
        file.write(np.float32(7).tobytes())
    assert num == 64 and read(5)[0, 0, 0] == 7, "what is written after opening is seen"


@pytest.mark.long
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_images(tmp_path, is_zip):
    file, rng, found = io.BytesIO(), random.Random(0), 0
    torch.save(torch.ones(2, 1, 8, 12), file, _use_new_zipfile_serialization=is_zip)
    for _ in range(600):
        data = bytearray(file.getvalue())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "x.pt").write_bytes(data)
        try:
            num, read = tensor_files.open_stack(tmp_path / "x.pt")
        except (ValueError, OSError):
            continue
        for i in range(min(num, 2)):
            assert array_files.array_format(read(i).shape, read(i).dtype)
        found += 1
    assert found > 50
