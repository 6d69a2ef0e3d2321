"""Patches: the law of their offsets, and which pixels they have, from files and from a device."""

import io
import zipfile

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import write_dataset

from images.dataset import ImageFolderDataset, order_at
from images.patches import RandomPatches, TrainingPatches, patch_offsets
from training.device_data import DeviceData

SEED, NUM, SIZE = 5, 7, (11, 14)


@pytest.fixture(scope="module", params=["float32", "uint16", "uint8"])
def pairs(request, tmp_path_factory):
    """A ZIP of images whose pixels tell row, column and image, and of conditions that tell more."""
    path = tmp_path_factory.mktemp("pairs") / "data.zip"
    y, x = np.indices(SIZE)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(NUM):
            for folder, channels in (("", [y, x, 0 * x + i]), ("cond/", [20 * x + y])):
                file = io.BytesIO()
                kind = "uint16" if request.param == "uint8" and folder else request.param
                np.save(file, np.stack(channels).astype(kind))
                archive.writestr(f"{folder}{i}.npy", file.getvalue())
    return path


def told(batch):
    """Returns image, row and column of the first pixels of patches, once all others agree."""
    images, _, conditions = (np.asarray(array).astype(int) for array in batch)
    side = images.shape[-1]
    y, x, number = images[:, :, :1, :1].transpose(1, 0, 2, 3)
    # A mirrored image has its columns the other way round.
    way = np.where(images[:, 1, 0, 1] > images[:, 1, 0, 0], 1, -1)[:, None, None]
    along = np.arange(side)
    assert (images[:, 0] == y + along[:, None]).all()
    assert (images[:, 1] == x + way * along).all()
    assert (images[:, 2] == number).all()
    assert (conditions[:, 0] == 20 * (x + way * along) + y + along[:, None]).all()
    first = np.where(way < 0, SIZE[1] - 1 - x, x)
    return np.stack([number, y, first], axis=1)[:, :, 0, 0], way[:, 0, 0] < 0


# --------------------------------------------------------------------------------- the law


def test_offsets_are_uniform_with_both_ends():
    limits = (2, 4)
    offsets = patch_offsets(SEED, np.arange(30_000), limits)
    counts = np.zeros([3, 5], int)
    np.add.at(counts, tuple(offsets.T), 1)  # an offset beyond the limits would be an IndexError
    assert counts.sum() == 30_000 and offsets.min() == 0
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_patches_that_follow_each_other_are_independent():
    offsets = patch_offsets(SEED, np.arange(30_000), (2, 4))
    cells = offsets @ [5, 1]
    table = np.zeros([15, 15], int)
    np.add.at(table, (cells[:-1], cells[1:]), 1)
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_offsets_depend_on_the_seed_and_the_number_alone():
    whole = patch_offsets(SEED, np.arange(2000), (40, 50))
    some = np.array([1999, 3, 700, 3, 256, 255])
    assert np.array_equal(patch_offsets(SEED, some, (40, 50)), whole[some])
    others = patch_offsets(SEED + 1, np.arange(2000), (40, 50))
    # Of 2000 pairs of draws from 41 x 51 offsets, 0.96 are alike on average.
    assert (others == whole).all(1).sum() < 10
    assert len(np.unique(whole, axis=0)) > 1000  # 1279 of 2091 are expected


@pytest.mark.parametrize("limits", [(0, 0), (0, 3), (3, 0)])
def test_where_a_side_is_that_of_the_image_there_is_one_offset(limits):
    offsets = patch_offsets(SEED, np.arange(400), limits)
    for column, limit in zip(offsets.T, limits, strict=True):
        assert set(column) == set(range(limit + 1))


# ------------------------------------------------------------------------------- the pixels


@pytest.mark.parametrize("where", ["files", "packed", "device"])
@pytest.mark.parametrize("side", [4, 11])
def test_image_and_condition_are_cut_at_the_same_place(pairs, where, side):
    dataset = ImageFolderDataset(pairs, use_conditions=True, xflip=True, cache=where != "files",
                                 patch=side)
    assert dataset.image_shape == [3, side, side] and dataset.cond_shape == [1, side, side]
    assert dataset.stored_shape == [3, *SIZE] and dataset.resolution == side
    source = DeviceData(dataset, torch.device("cpu")) if where == "device" else dataset
    patches = RandomPatches(source, dataset, SEED)
    numbers = [0, 3, NUM + 3, 2 * NUM - 1, 3]
    places, mirrored = told(patches.get_batch(numbers))
    expected = patch_offsets(SEED, np.array(numbers), (SIZE[0] - side, SIZE[1] - side))
    assert np.array_equal(places[:, 1:], expected)
    assert places[:, 0].tolist() == [0, 3, 3, NUM - 1, 3]
    assert mirrored.tolist() == [False, False, True, True, False]


def test_without_offsets_patches_are_those_in_the_middle(pairs):
    for side, middle in ((4, (3, 5)), (5, (3, 4)), (11, (0, 1))):
        dataset = ImageFolderDataset(pairs, use_conditions=True, xflip=True, patch=side)
        places, _ = told(dataset.get_batch([2, NUM + 2]))
        assert (places == [2, *middle]).all()
        whole, *_ = ImageFolderDataset(pairs).get_batch([2])
        image, *_ = dataset[2]
        assert np.array_equal(image, whole[0, :, middle[0]:middle[0] + side,
                                           middle[1]:middle[1] + side])


@pytest.mark.parametrize("patches", [1, 3])
def test_the_stream_has_all_patches_of_an_image_one_after_the_other(pairs, patches):
    dataset = ImageFolderDataset(pairs, use_conditions=True, patch=4)
    stream = TrainingPatches(dataset, dataset, SEED, patches)
    numbers = np.arange(1, 50)  # from the middle of an image on, over several epochs
    places, _ = told(stream.get_batch(numbers))
    order = order_at(NUM, SEED, range(50))
    assert places[:, 0].tolist() == [order[g // patches] for g in numbers]
    assert np.array_equal(places[:, 1:], patch_offsets(SEED, numbers, (7, 10)))


def test_an_image_is_decoded_once_for_patches_that_follow_each_other(pairs, monkeypatch):
    dataset, decoded = ImageFolderDataset(pairs, patch=4), []
    decode = dataset._images._decode
    monkeypatch.setattr(dataset._images, "_decode", lambda n: decoded.append(n) or decode(n))
    TrainingPatches(dataset, dataset, SEED, 4).get_batch(range(8))
    assert decoded == order_at(NUM, SEED, [0, 1]).tolist()


def test_labels_are_those_of_the_images(tmp_path):
    path = write_dataset(tmp_path / "data.zip", num=12, classes=3)
    dataset = ImageFolderDataset(path, use_labels=True, patch=4)
    _, labels = TrainingPatches(dataset, dataset, SEED, 2).get_batch(range(24))
    assert labels.argmax(1).tolist() == [k % 3 for k in np.repeat(order_at(12, SEED, range(12)), 2)]


@pytest.mark.parametrize("side", [0, -1, 12])
def test_a_patch_that_no_image_has_is_refused(pairs, side):
    with pytest.raises(ValueError, match=f"are 14x11, .* of {side}x{side}; give --patch=11 or"):
        ImageFolderDataset(pairs, patch=side)
