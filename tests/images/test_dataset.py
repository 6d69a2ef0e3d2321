import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from image_sources import EMOJI

from images.dataset import ImageFolderDataset, TrainingOrder, order_at
from images.scaling import Scaling

# Sorted as strings; '-' sorts before '/'.
NAMES = ["a-1/x.png", "a/10.png", "a/9.PNG", "b.png", "c/d/e.png"]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PFGMPP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def random_pixels(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def contents(labels=None, size=8, seed=0):
    files = {name: png(random_pixels([size, size, 3], seed + i)) for i, name in enumerate(NAMES)}
    if labels is not None:
        files["dataset.json"] = json.dumps({"labels": labels}).encode()
    return files


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in reversed(files.items()):
            archive.writestr(name, data)
    return path


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def stream(length, *args, **kwargs):
    lists = iter(TrainingOrder(*args, **kwargs))
    return list(itertools.islice(itertools.chain.from_iterable(lists), length))


@pytest.mark.parametrize("write", [write_zip, write_folder])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_pillows_in_the_order_of_sorted_names(tmp_path, write, channels):
    files = {name: png(random_pixels([8, 8, 3][:2 if channels == 1 else 3], i))
             for i, name in enumerate(NAMES)}
    dataset = ImageFolderDataset(write(tmp_path / "my.zip", {**files, "notes.txt": b"x"}))
    assert (dataset.name, dataset.image_shape) == ("my", [channels, 8, 8])
    assert (dataset.num_channels, dataset.resolution) == (channels, 8)
    assert list(dataset.all_names) == NAMES and len(dataset) == len(NAMES)
    for (image, label), data in zip(dataset, files.values(), strict=True):
        pixels = np.asarray(PIL.Image.open(io.BytesIO(data)))
        assert np.array_equal(image, pixels[None] if channels == 1 else np.moveaxis(pixels, 2, 0))
        assert image.dtype == np.uint8 and label.dtype == np.float32 and label.shape == (0,)


def test_class_numbers_become_one_hot_vectors_of_the_largest_plus_one(tmp_path):
    numbers = dict(zip(NAMES, [4, 0, 2, 2, 4], strict=True))
    path = write_zip(tmp_path / "a.zip", contents([[n, c] for n, c in reversed(numbers.items())]))
    dataset = ImageFolderDataset(path, use_labels=True)
    assert dataset.label_dim == 5 and dataset.has_labels and dataset.has_onehot_labels
    for i, name in enumerate(NAMES):
        assert np.array_equal(dataset.get_label(i), np.eye(5, dtype=np.float32)[numbers[name]])
        assert dataset.get_details(i).raw_label == numbers[name]
    assert not ImageFolderDataset(path).has_labels


@pytest.mark.parametrize("options", [{}, {"xflip": True}, {"xflip": True, "max_size": 3}], ids=str)
def test_class_numbers_are_those_of_the_labels_of_each_image(tmp_path, options):
    path = write_zip(tmp_path / "a.zip", contents([[name, k] for k, name in enumerate(NAMES)]))
    dataset = ImageFolderDataset(path, use_labels=True, **options)
    labels = dataset.get_batch(range(len(dataset)))[1]
    assert dataset.class_numbers.tolist() == labels.argmax(axis=1).tolist()


def test_label_vectors_are_kept_as_float32(tmp_path):
    vectors = np.random.default_rng(0).normal(size=[5, 3])
    files = contents([[name, v.tolist()] for name, v in zip(NAMES, vectors, strict=True)])
    dataset = ImageFolderDataset(write_zip(tmp_path / "a.zip", files), use_labels=True)
    assert dataset.label_dim == 3 and not dataset.has_onehot_labels
    assert np.array_equal(dataset.get_batch(range(5))[1], vectors.astype(np.float32))


def test_a_data_set_of_one_class_has_labels(tmp_path):
    path = write_zip(tmp_path / "a.zip", contents([[name, 0] for name in NAMES]))
    assert ImageFolderDataset(path, use_labels=True).label_dim == 1


@pytest.mark.parametrize("text", [None, b'{"labels": null}', b'{"labels": []}', b"{}"])
def test_no_labels_is_not_an_error_of_the_reader(tmp_path, text):
    files = contents() if text is None else {**contents(), "dataset.json": text}
    dataset = ImageFolderDataset(write_zip(tmp_path / "a.zip", files), use_labels=True)
    assert not dataset.has_labels and not dataset.has_onehot_labels and dataset.label_dim == 0


def test_xflip_appends_a_mirrored_copy():
    plain = ImageFolderDataset(EMOJI, use_labels=True)
    both = ImageFolderDataset(EMOJI, use_labels=True, xflip=True)
    n = len(plain)
    assert len(both) == 2 * n
    for i in (0, 7, n - 1):
        assert np.array_equal(both[i][0], plain[i][0])
        assert np.array_equal(both[n + i][0], np.flip(plain[i][0], axis=2))
        assert np.array_equal(both[n + i][1], plain[i][1])
        details = both.get_details(n + i)
        assert (details.raw_idx, details.xflip) == (i, 1)
    with pytest.raises(IndexError):
        both[2 * n]


def test_labels_of_a_subset_are_those_of_its_images():
    whole = ImageFolderDataset(EMOJI, use_labels=True)
    by_name = {name: whole.get_label(i) for i, name in enumerate(whole.all_names)}
    part = ImageFolderDataset(EMOJI, use_labels=True, max_size=20, random_seed=1)
    _, labels = part.get_batch(range(20))
    for i, label in enumerate(labels):
        assert np.array_equal(label, by_name[part.all_names[part.get_details(i).raw_idx]])
    assert len({label.argmax() for label in labels}) > 1


@pytest.mark.parametrize("seed", [0, 5, 2**31 + 5, -1])
def test_max_size_keeps_the_subset_that_numpys_legacy_generator_shuffles_first(seed):
    dataset = ImageFolderDataset(EMOJI, max_size=20, random_seed=seed)
    expected = np.random.RandomState(seed % 2**31).permutation(1906)[:20]
    assert [dataset.get_details(i).raw_idx for i in range(20)] == sorted(expected)


@pytest.mark.parametrize("cache", [False, True])
def test_a_batch_is_its_items(cache):
    dataset = ImageFolderDataset(EMOJI, use_labels=True, xflip=True, max_size=30, cache=cache)
    indices = [3, 59, 3, 0, 31]
    images, labels = dataset.get_batch(indices)
    assert images.dtype == np.uint8 and labels.dtype == np.float32
    for i, idx in enumerate(indices):
        assert np.array_equal(images[i], dataset[idx][0])
        assert np.array_equal(labels[i], dataset[idx][1])
    images[:] = 0
    assert dataset[3][0].any()


def test_a_zips_fingerprint_follows_the_content_and_not_the_file(tmp_path):
    labels = [[name, 1] for name in NAMES]
    first = ImageFolderDataset(write_zip(tmp_path / "a.zip", contents(labels))).fingerprint
    same = write_zip(tmp_path / "b.zip", dict(reversed(contents(labels).items())))
    pixels = write_zip(tmp_path / "c.zip", contents(labels, seed=1))
    relabelled = write_zip(tmp_path / "d.zip", contents([*labels[:-1], [NAMES[-1], 2]]))
    assert ImageFolderDataset(same).fingerprint == first
    assert ImageFolderDataset(pixels).fingerprint != first
    assert ImageFolderDataset(relabelled).fingerprint != first


@pytest.mark.parametrize("name", [NAMES[1], "dataset.json"])
def test_a_folders_fingerprint_changes_when_a_file_does(tmp_path, name):
    path = write_folder(tmp_path / "a", contents([[name, 1] for name in NAMES]))
    first = ImageFolderDataset(path).fingerprint
    assert ImageFolderDataset(path).fingerprint == first
    os.utime(path / name, (1, 1))
    assert ImageFolderDataset(path).fingerprint == first  # a copy elsewhere is the same data
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    assert ImageFolderDataset(path).fingerprint != first


@pytest.mark.long
def test_the_packed_copy_equals_decoding():
    direct = ImageFolderDataset(EMOJI, use_labels=True, xflip=True)
    packed = ImageFolderDataset(EMOJI, use_labels=True, xflip=True, cache=True)
    for mine, theirs in zip(packed.get_batch(range(len(packed))),
                            direct.get_batch(range(len(direct))), strict=True):
        assert np.array_equal(mine, theirs)


def test_the_packed_copy_is_built_once_and_shared_by_copies_of_the_zip(tmp_path, cache_folder):
    path = write_zip(tmp_path / "a.zip", contents())
    ImageFolderDataset(path, cache=True)
    [file] = cache_folder.iterdir()
    before = file.stat()
    shutil.copy(path, tmp_path / "b.zip")
    ImageFolderDataset(tmp_path / "b.zip", cache=True, xflip=True)
    assert [file] == list(cache_folder.iterdir())
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert np.load(file).shape == (5, 3, 8, 8)


def test_subsets_have_packed_copies_of_their_own():
    full = ImageFolderDataset(EMOJI, cache=True)
    for seed in (0, 1):
        part = ImageFolderDataset(EMOJI, max_size=10, random_seed=seed, cache=True)
        raw = [part.get_details(i).raw_idx for i in range(10)]
        assert np.array_equal(part.get_batch(range(10))[0], full.get_batch(raw)[0])


def damage_truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def damage_append(file):
    file.write_bytes(file.read_bytes() + b"x")


def damage_garbage(file):
    file.write_bytes(b"garbage")


def damage_empty(file):
    file.write_bytes(b"")


def damage_shape(file):
    np.save(file, np.zeros([4, 3, 8, 8], np.uint8))


def damage_dtype(file):
    np.save(file, np.zeros([5, 3, 8, 8], np.int8))


def damage_pickled(file):
    np.save(file, np.array([None] * 5), allow_pickle=True)


@pytest.mark.parametrize("damage", [damage_truncate, damage_append, damage_garbage, damage_empty,
                                    damage_shape, damage_dtype, damage_pickled])
def test_a_damaged_packed_copy_is_rebuilt(tmp_path, cache_folder, damage):
    path = write_zip(tmp_path / "a.zip", contents())
    expected = ImageFolderDataset(path, cache=True).get_batch(range(5))[0]
    [file] = cache_folder.iterdir()
    damage(file)
    rebuilt = ImageFolderDataset(path, cache=True)
    assert np.array_equal(rebuilt.get_batch(range(5))[0], expected)
    assert np.array_equal(np.load(file), expected)


def test_an_unwritable_cache_folder_means_reading_files_and_one_warning(tmp_path, monkeypatch,
                                                                        capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PFGMPP_CACHE_DIR", str(tmp_path / "file"))
    path = write_zip(tmp_path / "a.zip", contents())
    dataset = ImageFolderDataset(path, cache=True)
    warning, = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"Warning: {path} is not packed ({tmp_path}/file") and \
        "loader processes" in warning and "--cache-dir" in warning
    assert not dataset.is_packed and dataset._images.packed is None  # nothing is kept in memory
    expected = ImageFolderDataset(path).get_batch(range(5))[0]
    assert np.array_equal(dataset.get_batch(range(5))[0], expected)
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.get_batch(range(5))[0], expected)


def test_a_failed_packing_leaves_nothing(tmp_path, cache_folder):
    files = contents()
    files[NAMES[-1]] = files[NAMES[-1]][:60]
    with pytest.raises(ValueError, match="image 4"):
        ImageFolderDataset(write_zip(tmp_path / "a.zip", files), cache=True)
    assert list(cache_folder.iterdir()) == []


def test_a_pickled_data_set_maps_the_packed_copy_anew():
    dataset = ImageFolderDataset(EMOJI, use_labels=True, cache=True)
    data = pickle.dumps(dataset)
    assert len(data) < dataset.get_batch(range(1906))[0].nbytes / 10
    assert np.array_equal(pickle.loads(data)[5][0], dataset[5][0])



@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.long
def test_loader_workers_read_what_this_process_reads(cache, context):
    dataset = ImageFolderDataset(EMOJI, use_labels=True, xflip=True, cache=cache)
    dataset[0]  # opens the ZIP before the fork
    order = TrainingOrder(len(dataset), seed=1, batch=16)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=order, num_workers=2 if context == "fork" else 1,
        multiprocessing_context=multiprocessing.get_context(context))
    for indices, (images, labels) in itertools.islice(zip(order, loader, strict=False), 12):
        expected = dataset.get_batch(indices)
        assert np.array_equal(images.numpy(), expected[0])
        assert np.array_equal(labels.numpy(), expected[1])


def test_a_closed_data_set_reads_again(tmp_path):
    dataset = ImageFolderDataset(write_zip(tmp_path / "a.zip", contents()))
    before = dataset[1][0]
    dataset.close()
    assert np.array_equal(dataset[1][0], before)


@pytest.mark.parametrize("second,shown", [
    (random_pixels([16, 16, 3]), "RGB 16x16"), (random_pixels([8, 8]), "L 8x8"),
    (random_pixels([8, 8, 4]), "RGBA 8x8"), (random_pixels([9, 8, 3]), "RGB 8x9"),
])
def test_the_first_image_unlike_the_others_is_named_with_both_shapes(tmp_path, second, shown):
    files = contents()
    files[NAMES[2]] = png(second)
    path = write_zip(tmp_path / "a.zip", files)
    dataset = ImageFolderDataset(path)
    for fail in (dataset.check_uniform, lambda: dataset[2], lambda: dataset.get_batch([0, 2]),
                 lambda: ImageFolderDataset(path, cache=True)):
        with pytest.raises(ValueError) as error:
            fail()
        for part in (NAMES[2], shown, NAMES[0], "RGB 8x8"):
            assert part in str(error.value)
    dataset.get_batch([0, 1, 3, 4])


def test_uniform_images_pass_the_check_without_decoding_pixels(tmp_path):
    files = contents()
    files[NAMES[2]] = files[NAMES[2]][:100]  # its header is whole
    ImageFolderDataset(write_zip(tmp_path / "a.zip", files)).check_uniform()


@pytest.mark.parametrize("pixels", [random_pixels([8, 8, 4]),
                                    random_pixels([8, 8]).astype(np.uint16)])
def test_a_first_image_that_no_network_takes_is_refused(tmp_path, pixels):
    with pytest.raises(ValueError, match="x.png .*dataset_tool"):
        ImageFolderDataset(write_zip(tmp_path / "a.zip", {"x.png": png(pixels)}))


@pytest.mark.parametrize("cut", [0, 20, 120])
def test_a_corrupt_image_is_named_with_its_index(tmp_path, cut):
    files = contents()
    files[NAMES[3]] = files[NAMES[3]][:cut]
    dataset = ImageFolderDataset(write_zip(tmp_path / "a.zip", files))
    with pytest.raises(ValueError, match=r"b\.png \(image 3\) can't be read"):
        dataset[3]


def test_a_flipped_bit_in_a_stored_image_is_found(tmp_path):
    path = write_zip(tmp_path / "a.zip", contents())
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data[archive.getinfo(NAMES[1]).header_offset + 120] ^= 1
    path.write_bytes(data)
    dataset = ImageFolderDataset(path)
    with pytest.raises(ValueError, match=r"a/10\.png \(image 1\) can't be read"):
        dataset[1]


def test_a_path_that_is_no_data_set_is_refused_in_one_line(tmp_path):
    whole = write_zip(tmp_path / "a.zip", contents()).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    (tmp_path / "text.zip").write_text("not a ZIP")
    (tmp_path / "empty").mkdir()
    write_zip(tmp_path / "no_images.zip", {"readme.txt": b"x"})
    np.save(tmp_path / "one.npy", np.zeros([8, 8], np.float32))
    way_out = "single file; put it into a folder and .* dataset_tool.py --source=FILE"
    for name, error, text in [("one.npy", ValueError, way_out), ("none.zip", OSError, "no such"),
                              ("cut.zip", ValueError, "truncat"),
                              ("text.zip", ValueError, "neither folder nor ZIP"),
                              ("empty", ValueError, "no images"),
                              ("no_images.zip", ValueError, "no images")]:
        with pytest.raises(error, match=text) as caught:
            ImageFolderDataset(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_members_that_share_a_name_are_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", contents())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
        archive.writestr(NAMES[0], b"x")
    with pytest.raises(ValueError, match="must be unique"):
        ImageFolderDataset(path)


def test_a_resolution_or_max_size_that_cannot_be_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", contents())
    assert ImageFolderDataset(path, resolution=8, max_size=99)
    with pytest.raises(ValueError, match="8x8, but 16x16 is expected"):
        ImageFolderDataset(path, resolution=16)
    with pytest.raises(ValueError, match="max_size=0"):
        ImageFolderDataset(path, max_size=0)


ONES = [[name, 1] for name in NAMES]


@pytest.mark.parametrize("labels,text", [
    (ONES[:2] + ONES[3:], r"no label for a/9\.PNG; 1 of 5"),
    (ONES[:4] + [[NAMES[4], None]], r"no label for c/d/e\.png"),
    (ONES[:4] + [[NAMES[4], -1]], r"label -1 of c/d/e\.png"),
    (ONES[:4] + [[NAMES[4], 1.0]], r"label 1\.0 of c/d/e\.png"),
    (ONES[:4] + [[NAMES[4], "cat"]], r'label "cat" of c/d/e\.png'),
    (ONES[:4] + [[NAMES[4], True]], r"label true of c/d/e\.png"),
    (ONES[:4] + [[NAMES[4], 10**30]], r"of c/d/e\.png must be in 0\.\.65535"),
    (ONES[:4] + [[NAMES[4], [1]]], r"label \[1\] of c/d/e\.png must have the same form"),
    ([[n, [1, 2]] for n in NAMES[:4]] + [[NAMES[4], 1]], r"label 1 of c/d/e\.png must be a list"),
    ([[n, [1, 2]] for n in NAMES[:4]] + [[NAMES[4], [1]]], r"label \[1\] of c/d/e\.png"),
    ([[n, [1, 2]] for n in NAMES[:4]] + [[NAMES[4], [1, float("nan")]]], r"finite numbers"),
    ([[n, [1, 2]] for n in NAMES[:4]] + [[NAMES[4], [1, 10**400]]], r"finite numbers"),
    ([[n, []] for n in NAMES], r"label \[\] of a-1/x\.png"),
    (ONES + [[NAMES[0], 2]], r"a-1/x\.png is listed twice"),
    ([[1, 1]], r"entry 0"), ({"a": 1}, r"must be \{\"labels\""),
])
def test_labels_that_are_not_all_of_one_valid_kind_are_refused_by_name(tmp_path, labels, text):
    path = write_zip(tmp_path / "a.zip", contents(labels))
    with pytest.raises(ValueError, match=text) as caught:
        ImageFolderDataset(path, use_labels=True)
    assert "dataset.json" in str(caught.value)


def test_malformed_json_is_shown_by_line_and_column(tmp_path):
    files = {**contents(), "dataset.json": b'{"labels": [\n  ["a.png", 1]\n  oops]}'}
    with pytest.raises(ValueError, match=r"dataset\.json: line 3, column 3"):
        ImageFolderDataset(write_zip(tmp_path / "a.zip", files), use_labels=True)


@pytest.mark.parametrize("size,batch", [(10, 4), (12, 12), (3, 16), (1, 4), (1000, 64)])
@pytest.mark.parametrize("world_size,rounds", [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_rounds_together_read_the_stream_of_one_process(size, batch, world_size, rounds):
    alone = iter(TrainingOrder(size, 7, batch))
    ranks = [iter(TrainingOrder(size, 7, batch, rank=rank, world_size=world_size, rounds=rounds))
             for rank in range(world_size)]
    for _ in range(20):
        parts = [next(rank) for rank in ranks for _ in range(rounds)]
        assert {len(part) for part in parts} == {batch // (world_size * rounds)}
        assert sum(parts, []) == next(alone)


@pytest.mark.parametrize("start", [0, 8, 96, 104, 10**12])
def test_starting_later_gives_the_tail_of_the_stream(start):
    whole = order_at(13, 3, np.arange(start, start + 80)).tolist()
    assert stream(80, 13, 3, 8, start=start) == whole
    assert stream(72, 13, 3, 8, start=start + 8) == whole[8:]


def test_every_epoch_is_a_permutation_and_they_differ():
    epochs = np.reshape(stream(50 * 20, 50, 0, 64), [20, 50])
    assert (np.sort(epochs) == np.arange(50)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_the_stream_does_not_depend_on_the_batch_size_but_on_the_seed():
    whole = stream(300, 37, 5, 1)
    assert all(stream(300, 37, 5, batch) == whole for batch in (2, 5, 37, 50, 300))
    assert stream(300, 37, 6, 1) != whole


@pytest.mark.long
def test_permutations_are_uniform():
    # 6 orders of 3 images over 6,000 epochs: chi^2 with 5 degrees of freedom, 0.1% at 20.5.
    orders = np.reshape(order_at(3, 11, np.arange(18000)), [6000, 3])
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and ((counts - 1000) ** 2 / 1000).sum() < 20.5


def test_positions_are_looked_up_in_any_order():
    positions = np.random.default_rng(0).integers(0, 500, 100)
    assert np.array_equal(order_at(30, 2, positions), np.array(stream(500, 30, 2, 10))[positions])


@pytest.mark.parametrize("kwargs", [{"size": 0}, {"batch": 0}, {"start": -1},
                                    {"world_size": 3}, {"rounds": 3}])
def test_an_order_that_cannot_be_is_refused(kwargs):
    with pytest.raises(ValueError, match="must be"):
        TrainingOrder(**{"size": 4, "seed": 0, "batch": 8, **kwargs})


def test_pictures_beside_generated_images_are_not_samples(tmp_path):
    for name in ("000000.png", "vis/grid.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert len(ImageFolderDataset(tmp_path)) == 2  # any folder may be called vis
    (tmp_path / "generate.json").write_text("{}")
    assert len(ImageFolderDataset(tmp_path)) == 1


def test_folders_of_equal_names_sizes_and_times_are_told_apart(tmp_path):
    """Stored PNGs of one resolution have one size, and archives restore times."""
    paths = []
    for level in (10, 200):
        paths.append(tmp_path / str(level))
        paths[-1].mkdir()
        file = paths[-1] / "a.png"
        PIL.Image.new("L", (4, 4), level).save(file, compress_level=0)
        os.utime(file, (0, 0))
    assert paths[0].joinpath("a.png").stat().st_size == paths[1].joinpath("a.png").stat().st_size
    first, second = (ImageFolderDataset(path, cache=True) for path in paths)
    assert first.fingerprint != second.fingerprint
    assert first[0][0].max() == 10 and second[0][0].max() == 200


def test_pictures_of_floats_show_what_networks_see():
    values = np.array([[[3.0, 8.0], [13.0, 99.0]]], np.float32)  # -1, 0 and 1 are 3, 8 and 13
    picture = Scaling((8.0,), (5.0,)).to_picture(values)
    assert picture.dtype == np.uint8 and picture.tolist() == [[[0, 128], [255, 255]]]


@pytest.mark.parametrize("change", [b"a byte too many", -1])
def test_a_packed_copy_of_another_size_is_made_again(dataset_zip, tmp_path, change, monkeypatch):
    monkeypatch.setenv("PFGMPP_CACHE_DIR", str(tmp_path))
    ImageFolderDataset(dataset_zip).pack()
    [path] = [path for path in tmp_path.rglob("*") if path.suffix == ".npy"]
    content = path.read_bytes()
    path.write_bytes(content + change if isinstance(change, bytes) else content[:change])
    dataset = ImageFolderDataset(dataset_zip)
    dataset.pack()
    assert path.read_bytes() == content
    unpacked = ImageFolderDataset(dataset_zip)
    np.testing.assert_array_equal(dataset.get_batch(range(40))[0], unpacked.get_batch(range(40))[0])


def test_the_format_of_a_data_set_is_that_of_its_first_image_even_of_a_part(tmp_path):
    # Which images a part has depends on a seed; whether they may be used does not.
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(6):
            file = io.BytesIO()
            PIL.Image.fromarray(np.zeros([4 if i else 8] * 2, np.uint8)).save(file, "PNG")
            archive.writestr(f"{i}.png", file.getvalue())
    parts = (ImageFolderDataset(tmp_path / "x.zip", max_size=2, random_seed=k) for k in range(99))
    dataset = next(part for part in parts if 0 not in part._kept)
    with pytest.raises(ValueError, match="is L 4x4, but 0.png is L 8x8"):
        dataset.check_uniform()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_images_of_any_size_are_read_by_size(tmp_path, write):
    arrays = {f"{k}.npy": np.full([2, 4 + k % 2, 5], k, np.float32) for k in range(4)}
    path = write(tmp_path / "data", {name: npy(array) for name, array in arrays.items()})
    dataset = ImageFolderDataset(path, any_size=True)
    assert dataset.sizes == [(4, 5), (5, 5), (4, 5), (5, 5)]
    images, _ = dataset.get_batch([3, 1])
    np.testing.assert_array_equal(images, [arrays["3.npy"], arrays["1.npy"]])
    with pytest.raises(ValueError, match=r"1\.npy .* is .* 5x5, but 0\.npy is .* 5x4; all images"):
        ImageFolderDataset(path).get_batch([1])


def test_images_of_any_size_have_one_kind_and_conditions_of_their_size(tmp_path):
    small, large = np.zeros([1, 4, 4], np.float32), np.zeros([1, 6, 4], np.float32)
    mixed = write_folder(tmp_path / "mixed", {"a.npy": npy(small),
                                              "b.npy": npy(np.zeros([2, 6, 4], np.float32))})
    with pytest.raises(ValueError, match=r"b\.npy .*2 channels.*must agree but for their size"):
        ImageFolderDataset(mixed, any_size=True).sizes  # noqa: B018 - the property reads
    pairs = write_folder(tmp_path / "pairs", {"a.npy": npy(small), "b.npy": npy(large)})
    write_folder(pairs / "cond", {"a.npy": npy(small), "b.npy": npy(small)})
    with pytest.raises(ValueError, match=r"b\.npy .* is 4x6, but its condition image is 4x4"):
        ImageFolderDataset(pairs, use_conditions=True, any_size=True).sizes  # noqa: B018
