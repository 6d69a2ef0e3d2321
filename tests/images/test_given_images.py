"""Images in memory are the data set that files of them would be."""

import numpy as np
import PIL.Image
import pytest
import torch
from image_sources import random_pixels

from images.dataset import ImageFolderDataset
from images.given_images import GivenImages, given_images


def read(given, **options):
    dataset = ImageFolderDataset(given, **options)
    return dataset.get_batch(range(len(dataset)))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, [3, 6, 5, 3], np.uint8)  # [n, H, W, C]


def test_pictures_arrays_and_tensors_are_the_same_images(pixels, tmp_path):
    for i, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(tmp_path / f"{i}.png")
    files, _ = read(tmp_path)
    first = pixels.transpose(0, 3, 1, 2)
    for given in (list(map(PIL.Image.fromarray, pixels)), pixels, list(pixels), first,
                  torch.from_numpy(first), tuple(torch.from_numpy(first))):
        images, labels = read(GivenImages(given))
        assert images.dtype == np.uint8 and np.array_equal(images, files) and labels.size == 0
    gray = PIL.Image.fromarray(pixels[0, :, :, 0])
    assert np.array_equal(read(GivenImages(gray))[0], pixels[:1, None, :, :, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float32])
def test_floats_keep_their_values_on_any_graph(dtype):
    values = torch.linspace(-3, 40, 24).reshape(2, 3, 2, 2).to(dtype).requires_grad_()
    images, _ = read(GivenImages(values))
    assert images.dtype == np.float32 and np.array_equal(images, values.detach().float().numpy())


def test_labels_are_those_of_the_images(pixels):
    _, labels = read(GivenImages(pixels, torch.tensor([1, 0, 2])), use_labels=True)
    assert labels.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    vectors = np.array([[0.5, -1], [2, 3], [0, 0]], np.float32)
    assert np.array_equal(read(GivenImages(pixels, vectors), use_labels=True)[1], vectors)


def test_the_fingerprint_changes_with_pixels_and_labels(pixels):
    other = pixels.copy()
    other[2, 5, 4, 1] ^= 1
    sets = [GivenImages(pixels), GivenImages(other), GivenImages(pixels, [0, 1, 2]),
            GivenImages(pixels, [0, 2, 1]), GivenImages(pixels[:2])]
    found = [ImageFolderDataset(given, use_labels=True).fingerprint for given in sets]
    assert len(set(found)) == len(found)
    assert ImageFolderDataset(GivenImages(pixels.copy())).fingerprint == found[0]


def test_images_may_differ_in_size_where_a_data_set_may():
    given = GivenImages([random_pixels(4, 6), random_pixels(5, 4)])
    assert ImageFolderDataset(given, any_size=True).sizes == [(4, 6), (5, 4)]
    with pytest.raises(ValueError, match=r"given images: img00000001.npy \(image 1\)"):
        read(given)


def test_paths_stay_paths(tmp_path):
    assert given_images(tmp_path) == str(tmp_path) and given_images("a.zip") == "a.zip"
    assert given_images(None) is None
    with pytest.raises(ValueError, match="has its labels in dataset.json; leave labels out"):
        given_images("a.zip", [0])


@pytest.mark.parametrize("images, labels, words", [
    ([], None, "no images are given"),
    (np.zeros([3, 8, 8]), None, r"shape \[3, 8, 8\]; must be \[n, C, H, W\] or a list"),
    (np.zeros([2, 1, 8, 8]), [0], r"2 images, but labels of shape \[1\]; give one label for each"),
    (np.zeros([2, 1, 8, 8]), 1, r"2 images, but labels of shape \[\]; give one label for each"),
    ([PIL.Image.new("RGBA", (4, 4))], None, "image 0 has mode RGBA; make it gray or RGB"),
    (["a.png"], None, "image 0 is a str; images must be pictures, arrays or tensors"),
    (7, None, "images are of type int; must be the path of a data set, pictures, arrays")])
def test_what_are_no_images_is_refused(images, labels, words):
    with pytest.raises(ValueError, match=words):
        GivenImages(images, labels)


@pytest.mark.parametrize("values, words", [
    (np.full([1, 1, 4, 4], np.nan), "all must be finite"),
    (np.zeros([1, 1, 4, 4], bool), "a bool array of shape"),
    (np.zeros([1, 2, 1, 4, 4], np.uint8)[0], None)])
def test_the_reader_of_files_checks_the_values(values, words):
    if words is None:
        assert read(GivenImages(values))[0].shape == (2, 1, 4, 4)
        return
    with pytest.raises(ValueError, match=f"given images: img00000000.npy .*{words}") as caught:
        read(GivenImages(values))
    assert "\n" not in str(caught.value)
