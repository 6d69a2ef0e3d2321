"""Parquet files and data sets of `datasets` as sources: the images of a folder, byte for byte."""

import builtins
import io
import json
import os
import random
import subprocess
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from image_sources import assert_refused, encode, flat, random_pixels, run, write_source
from scripts import HANG_SEC, ROOT

from images import table_files
from images.label_tables import BY_DEFAULT, Columns
from images.sources import open_source

NUM = 20
PIXELS = [random_pixels(8, 6, 3, seed=i) for i in range(NUM)]
FILES = [encode(pixels) for pixels in PIXELS]
LABELS = [i * 7 % 5 % 3 for i in range(NUM)]  # of a period of 5: 0, 2, 1, 1, 0
NAMES = ["zebra", "\u00e4hre", "cat"]
TEXTS = [NAMES[k] for k in LABELS]
IN_ORDER = {"cat": 0, "zebra": 1, "\u00e4hre": 2}  # of code points
FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}
RECORDS = [{"bytes": data, "path": "x.png"} for data in FILES]


def write_parquet(path, columns, features=None, **kwargs):
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **kwargs)
    return path


def contents(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def converted(tmp_path, source, *args):
    """Returns the members of a conversion, in order, and what it said."""
    result = run(source, tmp_path / "out.zip", *args)
    assert result.exit_code == 0, result.output
    return list(contents(tmp_path / "out.zip").items()), result.output


def record_of(tmp_path, source, *args):
    return json.loads(converted(tmp_path, source, *args)[0][-1][1])


def labels_in(tmp_path, source, *args):
    labels = record_of(tmp_path, source, *args)["labels"]
    return labels and [label for _, label in labels]


def from_folder(tmp_path, *args, labels=LABELS, names=NAMES):
    """Returns what the same images make that lie in a folder."""
    record = {"labels": labels and [[f"{i:03}.png", label] for i, label in enumerate(labels)],
              "class_names": names}
    files = {f"{i:03}.png": data for i, data in enumerate(FILES)}
    return converted(tmp_path, write_source(tmp_path / "folder", files | {
        "dataset.json": json.dumps(record).encode()}), *args)[0]


@pytest.fixture
def table(tmp_path):
    """All images with the names of their classes, in row groups of seven."""
    return write_parquet(tmp_path / "a.parquet", {"image": RECORDS, "label": LABELS}, FEATURES,
                         row_group_size=7)


# -------------------------------------------------------------------------------------- Parquet

@pytest.mark.parametrize("group", [1, 3, 7, 100])
@pytest.mark.parametrize("args", [[], ["--classes=2,0", "--max-images=17"], ["--workers=2"],
                                  ["--resolution=4x4", "--transform=center-crop"]])
def test_parquet_makes_what_a_folder_makes(tmp_path, group, args):
    path = write_parquet(tmp_path / "x.PARQUET", {"image": RECORDS, "label": LABELS}, FEATURES,
                         row_group_size=group)
    assert converted(tmp_path, path, *args)[0] == from_folder(tmp_path, *args)


@pytest.mark.parametrize("column", [
    RECORDS, [{"path": None, "bytes": data} for data in FILES], FILES,
    pa.array(FILES, pa.large_binary()), [pixels.tolist() for pixels in PIXELS],
    pa.array([pixels.tolist() for pixels in PIXELS],
             pa.list_(pa.list_(pa.list_(pa.uint8(), 3), 6), 8)),
    pa.array([pixels.tolist() for pixels in PIXELS],
             pa.large_list(pa.list_(pa.list_(pa.uint8())))),
], ids=["records", "no path", "bytes", "large", "int64", "fixed", "large lists"])
def test_images_are_read_however_a_column_holds_them(tmp_path, column, request):
    path = write_parquet(tmp_path / "x.parquet", {"pic": column}, row_group_size=6)
    if "int64" in request.node.name:  # numbers that need not be of pixels keep their values
        members, _ = converted(tmp_path, path, "--scale=0,255")
        arrays = [np.load(io.BytesIO(data)) for _, data in members[:-1]]
        assert np.array_equal(arrays, [pixels.transpose(2, 0, 1) for pixels in PIXELS])
    else:
        assert converted(tmp_path, path)[0] == from_folder(tmp_path, labels=None)


def test_arrays_and_npy_files_in_columns_keep_their_values(tmp_path):
    values = np.random.default_rng(0).normal(size=[3, 2, 9, 7]).astype(np.float32)

    def npy(array):
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    for name, column in [("lists", values.tolist()), ("npy", list(map(npy, values)))]:
        path = write_parquet(tmp_path / f"{name}.parquet", {"x": column})
        members, _ = converted(tmp_path, path, "--scale=-5,5", "--layout=chw")
        found = [np.load(io.BytesIO(data)) for _, data in members[:-1]]
        np.testing.assert_allclose(found, values, rtol=1e-6)
    two = write_parquet(tmp_path / "two.parquet", {"x": values[:, 0].tolist()})
    members, _ = converted(tmp_path, two, "--scale=-5,5")
    assert np.load(io.BytesIO(members[0][1])).shape == (1, 9, 7)


def test_a_folder_of_parquet_files_goes_by_their_paths(tmp_path):
    for name, rows in [("b.parquet", slice(11, 20)), ("a/2.parquet", slice(4, 11)),
                       ("a/1.parquet", slice(0, 4)), ("a/10.parquet", slice(4, 4))]:
        write_parquet(tmp_path / "src" / name, {"image": RECORDS[rows], "label": LABELS[rows]},
                      FEATURES, row_group_size=3)
    write_source(tmp_path / "src", {"README.md": b"x", ".hidden/z.parquet": b"x"})
    members, output = converted(tmp_path, tmp_path / "src")
    assert members == from_folder(tmp_path)
    assert "Left out: 1 file that isn't an image (.md)" in output and "1 hidden" in output


def test_rows_are_those_of_their_numbers_across_groups_and_files(tmp_path):
    """Against a list, for numbers that skip rows, groups and files."""
    rng, cells, begin = random.Random(0), [b"%d" % i for i in range(60)], 0
    names = [f"{i}.parquet" for i in range(5)]
    for name, size in zip(names, (13, 0, 1, 30, 16), strict=True):
        write_parquet(tmp_path / name, {"x": pa.array(cells[begin:begin + size], pa.binary())},
                      row_group_size=rng.randint(1, 20))
        begin += size
    table = table_files.open_parquet(tmp_path, names, BY_DEFAULT)
    assert len(table.names) == 60 and table.names[13:15] == ["2.parquet row 0", "3.parquet row 0"]
    for _ in range(100):
        rows = sorted(rng.sample(range(60), rng.randint(0, 60)))
        assert list(table.read(rows)) == [cells[i] for i in rows]


def test_images_are_counted_unseen_and_read_as_they_are_needed(tmp_path):
    """One image's page is damaged: it is not read for the first sixteen, and none to count."""
    path = write_parquet(tmp_path / "x.parquet", {"image": FILES, "label": LABELS},
                         row_group_size=1, use_dictionary=False, compression="none",
                         write_statistics=False)
    content = bytearray(path.read_bytes())
    start = content.index(FILES[17])
    content[start - 18:start] = bytes(18)  # its header
    path.write_bytes(content)
    with open_source(path) as source:
        assert source.num_images == NUM and source.labels(range(NUM)) == LABELS
        assert [item.data for item in source.read([3, 8])] == [FILES[3], FILES[8]]
        items = source.read(range(NUM))
        assert [next(items).data for _ in range(16)] == FILES[:16]
        with pytest.raises(ValueError, match=r"x\.parquet: ") as error:
            next(items)
        assert "\n" not in str(error.value)
    assert_refused(run(path, tmp_path / "out/a.zip"), tmp_path, "x.parquet")


def test_damaged_rows_are_named_and_can_be_left_out(tmp_path):
    (tmp_path / "there.png").write_bytes(FILES[0])
    bad = [None, {"bytes": None, "path": str(tmp_path / "there.png")},
           {"bytes": b"", "path": None}, {"bytes": None, "path": None}]
    path = write_parquet(tmp_path / "x.parquet", {"image": [RECORDS[0], *bad, RECORDS[1]]})
    result = run(path, tmp_path / "out/a.zip")
    assert_refused(result, tmp_path, "row 1: has no image; --skip-damaged leaves them out")
    raw = write_parquet(tmp_path / "raw.parquet", {"image": [bytes(192)]})
    assert_refused(run(raw, tmp_path / "out/a.zip"), tmp_path,
                   "row 0: can't be read: not an image; --skip-damaged leaves them out")
    members, output = converted(tmp_path, path, "--skip-damaged")
    kept = dict(members)
    assert len(kept) == 3 and "Left out: 4 damaged images" in output
    assert "row 2: has no bytes, only the path" in output and "row 4: has no bytes\n" in output
    lists = write_parquet(tmp_path / "y.parquet", {"x": [[[1, 2], [3, 4]], [[1, 2], [3]],
                                                         [[1, None], [3, 4]], [[1, 2], None], []]})
    output = converted(tmp_path, lists, "--skip-damaged", "--scale=0,9")[1]
    assert "Left out: 4 damaged images" in output and "different lengths" in output


# -------------------------------------------------------------------------------------- columns

@pytest.mark.parametrize("labels,features,expected,names", [
    (LABELS, FEATURES["label"], LABELS, NAMES), (LABELS, None, LABELS, None),
    (pa.array(LABELS, pa.uint8()), None, LABELS, None),
    (TEXTS, None, [IN_ORDER[text] for text in TEXTS], list(IN_ORDER)),
    (pa.array(TEXTS).dictionary_encode(), None, [IN_ORDER[text] for text in TEXTS], list(IN_ORDER)),
    ([str(k) for k in LABELS], None, LABELS, None),
], ids=["ClassLabel", "int", "uint8", "text", "dictionary", "digits"])
def test_labels_are_found_by_their_type(tmp_path, labels, features, expected, names):
    path = write_parquet(tmp_path / "x.parquet", {
        "image": RECORDS, "what": labels, "size": [0.5] * NUM, "__index_level_0__": range(NUM)},
        features and {"what": features})
    record = record_of(tmp_path, path)
    assert [label for _, label in record["labels"]] == expected
    assert record.get("class_names") == names


def test_booleans_called_label_are_classes(tmp_path):
    flags = [i % 3 == 0 for i in range(NUM)]
    for name, expected in [("label", [int(flag) for flag in flags]), ("is_sharp", None)]:
        path = write_parquet(tmp_path / "x.parquet", {"image": RECORDS, name: flags})
        assert labels_in(tmp_path, path) == expected
    both = write_parquet(tmp_path / "x.parquet", {"image": RECORDS, "label": flags, "id": LABELS})
    assert_refused(run(both, tmp_path / "out/a.zip"), tmp_path, "may hold labels: label, id")


@pytest.mark.parametrize("name,values,other,texts", [
    ("label", [i / 2 for i in range(NUM)], {}, ["column label holds numbers and is not used",
                                                "unless --label-column=label"]),
    ("Class", [[i, 1.5] for i in range(NUM)], {"id": LABELS}, [
        "labels column id; column Class holds vectors and is not used"]),
    ("label", [None] * NUM, {}, ["column label holds null and is not used"]),
])
def test_a_column_called_label_that_is_not_taken_is_named(tmp_path, name, values, other, texts):
    path = write_parquet(tmp_path / "x.parquet", {"image": RECORDS, name: values, **other})
    output = converted(tmp_path, path)[1]
    assert all(text in output for text in texts)
    assert ("unless --label-column" in output) == (values[0] is not None)
    for column in (name, "none"):
        if column == "none" or values[0] is not None:
            assert "not used" not in converted(tmp_path, path, f"--label-column={column}")[1]


def test_refused_pixels_are_called_by_the_type_that_they_have(tmp_path):
    table = write_parquet(tmp_path / "x.parquet", {"image": [[[1, 2], [3, 4]]] * 3})
    for source in (table, *(_saved(tmp_path / f"{kind}.npz", kind) for kind in
                            ("int32", "uint16", "float64"))):
        kind = "int64" if source == table else source.stem
        hint = "LO,HI, or save pixels of 0 to 255 as uint8" if "int" in kind else "LO,HI"
        result = run(source, tmp_path / "out/a.zip")
        assert_refused(result, tmp_path, f"holds {kind}; give --scale=minmax, std or {hint}")
        assert result.output.strip().endswith(hint)


def _saved(path, kind):
    np.savez(path, np.ones([2, 8, 8], kind))
    return path


def test_columns_that_are_named_win(tmp_path):
    vectors = [[i, i / 2] for i in range(NUM)]
    path = write_parquet(tmp_path / "x.parquet", {
        "image": RECORDS, "mask": [{"bytes": encode(flat(i)), "path": None} for i in range(NUM)],
        "id": [NUM - i for i in range(NUM)], "label": LABELS, "x": [i / 4 for i in range(NUM)],
        "vector": vectors, "day": [True, False] * 10}, FEATURES)
    assert labels_in(tmp_path, path, "--image-column=image") == LABELS  # ClassLabel is certain
    members, _ = converted(tmp_path, path, "--image-column=mask", "--label-column=id,x")
    assert json.loads(members[-1][1])["labels"][3][1] == [17, 0.75]
    assert members[0][1] == converted(tmp_path, write_source(tmp_path / "one", {
        "x.png": flat(0)}))[0][0][1]
    for name, expected in [("vector", vectors), ("day", [1, 0] * 10), ("x", [[i / 4] for i in
                           range(NUM)]), ("none", None)]:
        assert labels_in(tmp_path, path, "--image-column=image",
                         f"--label-column={name}") == expected


@pytest.mark.parametrize("columns,args,texts", [
    ({"a": RECORDS, "b": RECORDS}, [], ["several columns may hold images: a, b", "--image-column"]),
    ({"a": LABELS, "b": ["x"] * NUM}, [], ["no column holds images", "a (whole numbers), b (text)",
                                           "--image-column"]),
    ({"i": RECORDS, "a": LABELS, "b": ["x"] * NUM}, [],
     ["several columns may hold labels: a, b", "--label-column", "a (whole numbers), b (text)"]),
    ({"i": RECORDS, "a": LABELS}, ["--image-column=a"], ["no such image column",
                                                         "i (images), a (whole numbers)"]),
    ({"i": RECORDS, "a": LABELS}, ["--image-column=q"], ["no such image column"]),
    ({"i": RECORDS, "a": LABELS}, ["--label-column=q"], ["no such label column"]),
    ({"i": RECORDS, "a": LABELS}, ["--label-column=a,i"], ["--label-column=i: "]),
    ({"i": RECORDS, "a": [-1, *LABELS[1:]]}, [], ["x.parquet: label -1 of row 0 must be in"]),
    ({"i": RECORDS, "a": [*LABELS[:18], None, None]}, [], ["no label for row 18; 2 of 20"]),
    ({"i": RECORDS, "a": LABELS}, ["--labels=l.csv"], ["no file names"]),
])
def test_columns_that_are_not_certain_are_asked_for(tmp_path, columns, args, texts):
    path = write_parquet(tmp_path / "x.parquet", columns)
    assert_refused(run(path, tmp_path / "out/a.zip", *args), tmp_path, *texts)


def test_sound_and_more_than_one_kind_of_image_are_told_apart(tmp_path):
    features = {"sound": {"_type": "Audio"}, "image": {"_type": "Image"}}
    path = write_parquet(tmp_path / "x.parquet", {
        "sound": RECORDS, "raw": FILES, "image": RECORDS, "pixels": [[[1]]] * NUM}, features)
    assert "images are column image" in converted(tmp_path, path)[1]


def test_text_that_tells_every_image_apart_is_warned_of(tmp_path):
    columns = {"image": RECORDS, "text": [f"a picture {i}" for i in range(NUM)]}
    path = write_parquet(tmp_path / "x.parquet", columns)
    warning = "each of the 20 images has a class of its own in column text; --label-column=none"
    assert warning in converted(tmp_path, path)[1]
    assert warning not in converted(tmp_path, path, "--label-column=text")[1]


@pytest.mark.parametrize("metadata", [b"", b"{", b"[]", b'{"info": 1}', b"\xff", b"[" * 10_000,
                                      b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
                                      b'{"info": {"features": [1]}}'])
def test_strange_metadata_are_passed_over(tmp_path, metadata):
    table = pa.table({"image": RECORDS, "label": LABELS})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}),
                   tmp_path / "x.parquet")
    assert labels_in(tmp_path, tmp_path / "x.parquet") == LABELS


# ------------------------------------------------------------------------------------ bad input

def test_files_that_do_not_belong_together_are_refused(tmp_path):
    for folder, names, texts in [
            ("splits", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
                        "data/test-00000-of-00001.parquet"],
             ["splits test, train", f"hf://{tmp_path / 'splits'}:test"]),
            ("folders", ["train/0.parquet", "val/0.parquet"], ["splits train, val"])]:
        for name in names:
            write_parquet(tmp_path / folder / name, {"image": RECORDS})
        assert_refused(run(tmp_path / folder, tmp_path / "out/a.zip"), tmp_path, *texts)
    write_parquet(tmp_path / "src/a.parquet", {"image": RECORDS})
    for columns, text in [({"picture": RECORDS}, "column image is missing, but in the first file "
                           "it holds images"), ({"image": LABELS}, "column image holds whole")]:
        write_parquet(tmp_path / "src/b.parquet", columns)
        assert_refused(run(tmp_path / "src", tmp_path / "out/a.zip"), tmp_path, "b.parquet: ", text)
    write_parquet(tmp_path / "src/b.parquet", {"more": LABELS, "image": FILES[:2] * 10})
    assert_refused(run(tmp_path / "src", tmp_path / "out/a.zip"), tmp_path, "holds bytes")
    write_parquet(tmp_path / "src/b.parquet", {"image": RECORDS, "more": pa.nulls(NUM)})
    assert len(converted(tmp_path, tmp_path / "src")[0]) == 2 * NUM + 1


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table at all", b"PAR1" + bytes(99)])
def test_what_is_no_parquet_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    assert_refused(run(tmp_path / "x.parquet", tmp_path / "out/a.zip"), tmp_path, "x.parquet: ")


def test_tables_without_rows_and_beside_images(tmp_path):
    empty = write_parquet(tmp_path / "x.parquet", {"image": pa.array([], pa.binary())})
    assert_refused(run(empty, tmp_path / "out/a.zip"), tmp_path, "no images found")
    source = write_source(tmp_path / "src", {"a.png": FILES[0], "x.parquet": b"no table"})
    assert "1 file that isn't an image (.parquet)" in converted(tmp_path, source)[1]


@pytest.mark.parametrize("package,source", [("pyarrow", "a.parquet"), ("datasets", "hf://x/y")])
def test_without_the_package_a_line_says_what_to_install(tmp_path, monkeypatch, table, package,
                                                         source):
    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table_files, "_is_reachable", lambda: True)
    monkeypatch.setattr(builtins, "__import__", without)
    assert_refused(run(source, tmp_path / "out/a.zip"), tmp_path, f"pip install {package}")


@pytest.mark.long
def test_damaged_parquet_is_refused_in_one_line_or_read(tmp_path, table):
    good, rng, refused = table.read_bytes(), random.Random(0), 0
    for i in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            place = len(data) - rng.randint(1, 2000) if i % 2 else rng.randrange(len(data))
            data[place] = rng.randrange(256)
        table.write_bytes(data[:rng.randrange(len(data))] if i % 5 == 0 else data)
        try:
            found = table_files.open_parquet(table, [""], BY_DEFAULT)
            list(found.read(range(len(found.names))))
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 900
            refused += 1
    assert refused > 200


# --------------------------------------------------------------------------------- Hugging Face

@pytest.fixture
def hf():
    """Returns the package, which takes seconds to import; its cache is a folder of the tests."""
    import datasets

    return datasets


def dataset(hf, rows=slice(None), split=None):
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=NAMES)})
    return hf.Dataset.from_dict({"image": RECORDS[rows], "label": LABELS[rows]}, features,
                                split=split)


@pytest.mark.long
def test_a_data_set_of_save_to_disk_makes_what_a_folder_makes(tmp_path, hf):
    dataset(hf).save_to_disk(tmp_path / "saved", num_shards=3)
    dataset(hf).select(range(NUM - 1, -1, -1)).save_to_disk(tmp_path / "reversed")
    for args in ([], ["--classes=2,0", "--max-images=17"], ["--workers=2"]):
        expected = from_folder(tmp_path, *args)
        assert converted(tmp_path, f"hf://{tmp_path / 'saved'}", *args)[0] == expected
    assert labels_in(tmp_path, f"hf://{tmp_path / 'reversed'}") == LABELS[::-1]
    assert_refused(run(tmp_path / "saved", tmp_path / "out/a.zip"), tmp_path, "no images",
                   f"hf://{tmp_path / 'saved'} reads a data set of save_to_disk")


@pytest.mark.long
def test_splits_are_chosen_by_name_or_are_train(tmp_path, hf, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {"test": slice(0, 5), "train": slice(5, 20)}
    hf.DatasetDict({name: dataset(hf, own) for name, own in rows.items()}).save_to_disk("d")
    write_parquet(tmp_path / "f/data/train-00000-of-00001.parquet",
                  {"image": RECORDS[5:], "label": LABELS[5:]}, FEATURES)
    write_parquet(tmp_path / "f/data/test-00000-of-00001.parquet",
                  {"image": RECORDS[:5], "label": LABELS[:5]}, FEATURES)
    for name in ("d", "f"):
        for split, own in [("", "train"), (":train", "train"), (":test", "test")]:
            assert labels_in(tmp_path, f"hf://{name}{split}") == LABELS[rows[own]]
        assert_refused(run(f"hf://{name}:val", tmp_path / "out/a.zip"), tmp_path,
                       f"hf://{name}:val: has no split 'val'; there are ", "test", "train")
    hf.DatasetDict({name: dataset(hf, rows["test"]) for name in "ab"}).save_to_disk("two")
    assert_refused(run("hf://two", tmp_path / "out/a.zip"), tmp_path, "the splits a, b",
                   "hf://two:a")
    assert labels_in(tmp_path, "hf://two:b") == LABELS[:5]


@pytest.mark.long
def test_a_folder_of_images_is_read_as_datasets_reads_it(tmp_path, hf):
    files = {f"{'cat' if i % 2 else 'dog'}/{i:02}.png": FILES[i] for i in range(6)}
    source = write_source(tmp_path / "src", files)
    assert converted(tmp_path, f"hf://{source}")[0] == converted(tmp_path, source)[0]


@pytest.mark.long
def test_arrays_of_a_data_set_keep_their_values(tmp_path, hf):
    features = hf.Features({"x": hf.Array3D((8, 6, 3), "uint8"), "y": hf.Value("string")})
    hf.Dataset.from_dict({"x": [pixels.tolist() for pixels in PIXELS],
                          "y": TEXTS}, features).save_to_disk(tmp_path / "d")
    expected = from_folder(tmp_path, labels=[IN_ORDER[text] for text in TEXTS],
                           names=list(IN_ORDER))
    assert converted(tmp_path, f"hf://{tmp_path / 'd'}")[0] == expected


@pytest.mark.long
@pytest.mark.parametrize("source,expected", [
    ("hf://owner/name", ("owner/name", None)), ("hf://name:train", ("name", None)),
    ("hf://datasets/owner/name", ("owner/name", None)),
    ("hf://owner/name/config:train", ("owner/name", "config"))])
def test_names_of_the_hub_are_those_of_datasets(tmp_path, hf, monkeypatch, source, expected):
    asked = []

    def load_dataset(*args):
        asked.append(args)
        return hf.DatasetDict({"train": dataset(hf, slice(0, 5)), "test": dataset(hf)})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    monkeypatch.setattr(table_files, "_is_reachable", lambda: True)
    record = record_of(tmp_path, source)
    assert asked == [expected] and record["class_names"] == NAMES
    assert [label for _, label in record["labels"]] == LABELS[:5]


@pytest.mark.long
@pytest.mark.parametrize("error,texts", [
    ("DatasetNotFoundError", ["Dataset 'x/y' doesn't exist"]),
    (ConnectionError, ["Couldn't"]), (RuntimeError, ["Dataset scripts are no longer supported"]),
    (ValueError, ["Config name is missing."]), (KeyError, ["damaged", "KeyError"])])
def test_what_the_hub_says_becomes_one_line(tmp_path, hf, monkeypatch, error, texts):
    def load_dataset(*args):
        kind = getattr(hf.exceptions, error) if isinstance(error, str) else error
        raise kind(f"{texts[0]}\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    monkeypatch.setattr(table_files, "_is_reachable", lambda: True)
    assert_refused(run("hf://x/y", tmp_path / "out/a.zip"), tmp_path, "hf://x/y: ", *texts)


@pytest.mark.parametrize("source", ["hf://", "hf://a:", "hf:///not/there", "hf://./x", "hf://a b",
                                    "hf://a/b/c/d", "hf://../x:train", "hf://:train"])
def test_what_is_no_name_is_refused_before_anything_is_asked(tmp_path, monkeypatch, source):
    monkeypatch.setattr(table_files, "_is_reachable", None)
    assert_refused(run(source, tmp_path / "out/a.zip"), tmp_path, "hf://NAME:SPLIT")


@pytest.mark.parametrize("error,expected", [
    (None, True), (requests.ConnectionError, False), (requests.Timeout, False),
    (requests.exceptions.SSLError, True), (requests.exceptions.InvalidSchema, True)])
def test_a_hub_that_cannot_be_reached_is_not_asked_again(monkeypatch, error, expected):
    def head(url, timeout):
        assert url == "http://hub" and timeout <= 10
        if error:
            raise error

    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub")
    assert table_files._is_reachable() is expected


@pytest.mark.scripts
@pytest.mark.long
def test_without_the_hub_a_line_comes_soon(tmp_path):
    """Port 9 of this machine answers nobody; datasets itself would try for half a minute."""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [sys.executable, ROOT / "dataset_tool.py", "--source=hf://owner/name:train",
         f"--dest={tmp_path / 'a.zip'}"], env=env, capture_output=True, text=True,
        timeout=HANG_SEC)
    assert result.returncode == 1 and not (tmp_path / "a.zip").exists()
    assert result.stderr.count("\n") == 1
    assert "Error: hf://owner/name:train: the hub can't be reached" in result.stderr


@pytest.mark.long
def test_damaged_data_sets_are_refused_in_one_line(tmp_path, hf):
    dataset(hf).save_to_disk(tmp_path / "d")
    state = json.loads((tmp_path / "d/state.json").read_text())
    for key in state:
        left = {name: value for name, value in state.items() if name != key}
        (tmp_path / "d/state.json").write_text(json.dumps(left))
        result = run(f"hf://{tmp_path / 'd'}", tmp_path / "out/a.zip")
        if result.exit_code:
            assert_refused(result, tmp_path, f"hf://{tmp_path / 'd'}: ")
    (tmp_path / "d/state.json").write_text("{")
    assert_refused(run(f"hf://{tmp_path / 'd'}", tmp_path / "out/a.zip"), tmp_path, "/d: ")
    os.makedirs(tmp_path / "empty")
    assert_refused(run(f"hf://{tmp_path / 'empty'}", tmp_path / "out/a.zip"), tmp_path, "empty")


def test_conditions_may_come_from_a_table(tmp_path, table):
    pixels = [random_pixels(8, 6, seed=50 + i) for i in range(NUM)]
    conditions = write_parquet(tmp_path / "c.parquet", {
        "x": [encode(own) for own in pixels], "a": LABELS, "b": LABELS})
    members, _ = converted(tmp_path, table, f"--cond-source={conditions}")
    folder = write_source(tmp_path / "c", {f"{i:02}.png": own for i, own in enumerate(pixels)})
    assert members == converted(tmp_path, table, f"--cond-source={folder}", "--pair=order")[0]
    assert sum(name.startswith("cond/") for name, _ in members) == NUM


def test_a_table_has_no_names_to_keep(tmp_path, table):
    assert converted(tmp_path, table, "--keep-names") == converted(tmp_path, table)
    found = table_files.open_parquet(table, [""], Columns(labels=()))
    assert found.labels is None and found.names[:2] == ["row 0", "row 1"]
