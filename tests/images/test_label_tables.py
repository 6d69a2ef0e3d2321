"""Labels out of tables beside images: which rows, which columns, what becomes of their cells."""

import json
import unicodedata
import zipfile

import numpy as np
import pytest
from image_sources import assert_refused, encode, flat, random_pixels, run, write_source
from published_archives import write_cifar10

from images.label_tables import BY_DEFAULT, Columns, labels_of, match_rows, read_rows

NAMES = ["zebra", "\u00e4hre", "Zebu", "\u732b"]
SORTED = ["Zebu", "zebra", "\u00e4hre", "\u732b"]  # by code points
FILES = {f"{i:02}.png": random_pixels(8, 8, 3, seed=i) for i in range(9)}
TEXTS = dict(zip(FILES, (NAMES * 3)[:9], strict=True))


def csv_of(rows, header="file_name,label", mark=","):
    lines = [header.replace(",", mark), *(mark.join(map(str, row)) for row in rows)]
    return "\n".join(lines).encode() + b"\n"


def json_lines_of(rows, name="file_name", label="label"):
    return b"".join(json.dumps({name: key, label: value}).encode() + b"\n" for key, value in rows)


def with_json(labels, class_names=None):
    record = {"labels": list(map(list, labels.items()))}
    return json.dumps(record | ({"class_names": class_names} if class_names else {})).encode()


def converted(tmp_path, source, *args):
    """Returns the bytes of a conversion, and what it said."""
    result = run(source, tmp_path / "out.zip", *args)
    assert result.exit_code == 0, result.output
    return (tmp_path / "out.zip").read_bytes(), result.output


def record_of(tmp_path, source, *args):
    converted(tmp_path, source, *args)
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        return json.loads(archive.read("dataset.json"))


def labels_in(tmp_path, source, *args):
    return [label for _, label in record_of(tmp_path, source, *args)["labels"]]


@pytest.fixture
def images(tmp_path):
    return write_source(tmp_path / "src", FILES)


def table(tmp_path, content, name="l.csv"):
    (tmp_path / name).write_bytes(content)
    return f"--labels={tmp_path / name}"


# ------------------------------------------------------------------------- the same as dataset.json

@pytest.mark.parametrize("name,content", [
    ("a.csv", csv_of(TEXTS.items())), ("a.CSV", csv_of(TEXTS.items())),
    ("bom.csv", b"\xef\xbb\xbf" + csv_of(TEXTS.items())),
    ("excel.csv", csv_of(TEXTS.items(), mark=";").replace(b"\n", b"\r\n")),
    ("a.tsv", csv_of(TEXTS.items(), mark="\t")),
    ("quoted.csv", csv_of([(f'"{key}"', f'" {value} "') for key, value in TEXTS.items()])),
    ("gaps.csv", csv_of(TEXTS.items()).replace(b"\n", b"\n\n")),
    ("any order.csv", csv_of(reversed(TEXTS.items()))),
    ("a.jsonl", json_lines_of(TEXTS.items())),
    ("a.ndjson", json_lines_of(TEXTS.items()).replace(b"\n", b"\r\n\n")),
])
def test_a_table_gives_the_data_set_that_dataset_json_gives(tmp_path, images, name, content):
    numbers = {key: SORTED.index(text) for key, text in TEXTS.items()}
    same = write_source(tmp_path / "same", {**FILES, "dataset.json": with_json(numbers, SORTED)})
    expected, _ = converted(tmp_path, same)
    made, output = converted(tmp_path, images, table(tmp_path, content, name))
    assert made == expected
    assert "class 1 (zebra): 3" in output and f"class 3 ({NAMES[3]}): 2" in output
    assert f"labels are column label of {tmp_path / name}, whose texts are numbered in sorted " \
        "order" in output


@pytest.mark.parametrize("name", ["src", "src.zip"])
@pytest.mark.parametrize("beside", [
    {"metadata.csv": csv_of((f"img/{key}", text) for key, text in TEXTS.items())},
    {"img/metadata.jsonl": json_lines_of(TEXTS.items())},
    {"img/metadata.csv": csv_of(TEXTS.items(), header="file_name,Class")},
])
def test_metadata_beside_images_is_found(tmp_path, name, beside):
    source = write_source(tmp_path / name, {f"img/{key}": x for key, x in FILES.items()} | beside)
    record = record_of(tmp_path, source)
    assert [label for _, label in record["labels"]] == list(map(SORTED.index, TEXTS.values()))
    assert record["class_names"] == SORTED
    assert "aren't images" not in run(source, tmp_path / "out.zip").output


def test_metadata_of_several_folders_count_for_what_lies_below(tmp_path):
    source = write_source(tmp_path / "src", {
        "a/1.png": flat(1), "a/2.png": flat(2), "b/c/1.png": flat(3),
        "a/metadata.csv": csv_of([("1.png", "y"), ("2.png", "x")]),
        "b/metadata.csv": csv_of([("c/1.png", "z")])})
    record = record_of(tmp_path, source)
    assert [label for _, label in record["labels"]] == [1, 0, 2]
    assert record["class_names"] == ["x", "y", "z"]


def test_what_is_named_comes_before_what_is_found(tmp_path):
    files = {"a/1.png": flat(1), "b/2.png": flat(2)}
    tables = {"metadata.csv": csv_of([("a/1.png", 5), ("b/2.png", 6)]),
              "dataset.json": with_json({"a/1.png": 3, "b/2.png": 4}, list("abcde"))}
    named = table(tmp_path, csv_of([("a/1.png", 7), ("b/2.png", 8)]))
    for kept, args, expected in [((), (), [0, 1]), (["metadata.csv"], (), [5, 6]),
                                 (["metadata.csv", "dataset.json"], (), [3, 4]),
                                 (["metadata.csv", "dataset.json"], [named], [7, 8])]:
        for name in ("src", "src.zip"):
            source = write_source(tmp_path / f"{len(kept)}{name}",
                                  files | {key: tables[key] for key in kept})
            assert labels_in(tmp_path, source, *args) == expected
            assert record_of(tmp_path, source, "--label-column=none") == {"labels": None}


@pytest.mark.parametrize("metadata", [
    csv_of([("a/1.png", "a dog"), ("b/2.png", "a cat")], header="file_name,text"),
    csv_of([("1", "x")], header="patient,label")])
def test_metadata_without_labels_leaves_the_classes_of_folders(tmp_path, metadata):
    source = write_source(tmp_path / "src", {"a/1.png": flat(1), "b/2.png": flat(2),
                                             "metadata.csv": metadata})
    record = record_of(tmp_path, source)
    assert record["class_names"] == ["a", "b"]
    assert "Note: metadata.csv: gives no labels" in run(source, tmp_path / "out.zip").output


def test_metadata_that_do_not_fit_are_refused_and_can_be_passed_over(tmp_path):
    for metadata, text in [(csv_of([("q.png", 1)]), "none of 1 rows"), (b"\xff\xfe", "UTF-8")]:
        source = write_source(tmp_path / "src", {"1.png": flat(1), "metadata.csv": metadata})
        assert_refused(run(source, tmp_path / "out/a.zip"), tmp_path, "metadata.csv", text,
                       "--label-column=none")
        assert record_of(tmp_path, source, "--label-column=none") == {"labels": None}


def test_conditions_take_no_labels(tmp_path, images):
    conditions = write_source(tmp_path / "cond", {
        **FILES, "metadata.csv": csv_of([("other.png", 1)])})
    assert record_of(tmp_path, images, f"--cond-source={conditions}") == {"labels": None}


def test_labels_go_with_images_that_a_pattern_pairs(tmp_path):
    files = {f"{i}_{kind}.png": flat(i) for i in range(3) for kind in ("low", "full")}
    rows = [(f"{i}_full.png", 5 - i) for i in range(3)]
    assert labels_in(tmp_path, write_source(tmp_path / "src", files), "--pair=(.*)_low|(.*)_full",
                     table(tmp_path, csv_of(rows))) == [5, 4, 3]


def test_max_images_and_classes_choose_as_ever(tmp_path, images):
    args = [table(tmp_path, csv_of(TEXTS.items())), "--classes=3,1", "--max-images=8"]
    record = record_of(tmp_path, images, *args)
    assert [label for _, label in record["labels"]] == [1, 0, 1, 0]
    assert record["class_names"] == [SORTED[3], SORTED[1]]


# ------------------------------------------------------------------------------------- columns

@pytest.mark.parametrize("header,columns,expected", [
    ("file_name,label", BY_DEFAULT, ("0", {"label": "1"})),
    ("Label,Image", BY_DEFAULT, ("1", {"Label": "0"})),
    ("name,image,class,category", BY_DEFAULT, ("1", {"class": "2"})),
    ("label,path,filename", BY_DEFAULT, ("2", {"label": "0"})),
    ("label,id,label2", Columns(image="id"), ("1", {"label": "0"})),
    ("label,path,breed", Columns(labels=("breed",)), ("1", {"breed": "2"})),
    ("x,path,y", Columns(labels=("y", "x")), ("1", {"y": "2", "x": "0"})),
])
def test_columns_are_found_by_their_names_or_chosen(header, columns, expected):
    cells = list(map(str, range(header.count(",") + 1)))
    names, found = read_rows(csv_of([cells], header), columns, "t", is_json=False)
    assert (names[0], {key: value[0] for key, value in found.items()}) == expected
    line = json.dumps(dict(zip(header.split(","), cells, strict=True))).encode()
    assert read_rows(line, columns, "t", is_json=True) == (names, found)


@pytest.mark.parametrize("cells,values,names", [
    (["3", "0", "12"], [3, 0, 12], None), ([3, 0, True], [3, 0, 1], None),
    (["007", " 7", "+8"], [7, 7, 8], None), (["b", "a", "B"], [2, 1, 0], ["B", "a", "b"]),
    (["10", "9", "x"], [0, 1, 2], ["10", "9", "x"]), (["0.5", "2"], [[0.5], [2]], None),
    (["1e-3"], [[0.001]], None), ([0.5, 1], [[0.5], [1]], None), (["", "a"], [None, 0], ["a"]),
    ([None, 2, float("nan")], [None, 2, None], None), ([[1, 2], [3, 4]], [[1, 2], [3, 4]], None),
    (["nan", "inf"], [1, 0], ["inf", "nan"]), (["1_0"], [0], ["1_0"]), ([], [], None),
])
def test_numbers_stay_numbers_and_text_is_numbered_in_sorted_order(cells, values, names):
    assert labels_of({"x": cells}, "t")[:2] == (values, names)


@pytest.mark.parametrize("cells, values", [
    (["6.0", "", "3.0"], [6, None, 3]), ([6.0, float("nan"), 0], [6, None, 0]),
    (["1e2", "7"], [100, 7]), (["6.0", "2.5"], [[6.0], [2.5]]), (["6.0", "-1"], [[6.0], [-1]]),
    ([65535.0], [65535]), ([65536.0], [[65536.0]]), ([[6.0]], [[6.0]])])
def test_whole_numbers_with_decimals_are_classes_where_all_are(cells, values):
    found = labels_of({"x": cells}, "t")
    assert found.values == values and found.class_names is None
    assert [type(value) for value in found.values] == [type(value) for value in values]
    are_classes = isinstance(values[0], int)
    assert ("numbers are whole" in found.how) == are_classes
    assert labels_of({"x": [6.0], "y": [3.0]}, "t").values == [[6.0, 3.0]]


def test_what_pandas_writes_of_a_column_with_gaps_is_converted_and_said(tmp_path, images):
    content = csv_of((key, f"{number}.0") for number, key in enumerate(TEXTS))
    content += b"other.png,\n"
    args = table(tmp_path, content)
    assert [label for _, label in record_of(tmp_path, images, args)["labels"]] == list(
        range(len(TEXTS)))
    assert "whose numbers are whole, such as 0.0, and are used as class numbers" in run(
        images, tmp_path / "out.zip", args).output


def test_several_columns_make_vectors_in_the_order_of_their_names_and_only_of_numbers():
    cells = {"b": ["1", "2.5", ""], "a": [3, 4, 5]}
    assert labels_of(cells, "t")[:2] == ([[1, 3], [2.5, 4], None], None)
    with pytest.raises(ValueError, match="t: column c holds 'red'; label vectors must"):
        labels_of({"b": [1, 2], "c": ["1", "red"]}, "t")
    with pytest.raises(ValueError, match="t: column c holds 1 and 'a'"):
        labels_of({"c": ["a", 1]}, "t")


def test_vectors_arrive_in_the_data_set(tmp_path, images):
    rows = [(name, i, i / 4) for i, name in enumerate(FILES)]
    args = [table(tmp_path, csv_of(rows, "file_name,x,y")), "--label-column=y,x"]
    assert labels_in(tmp_path, images, *args) == [[i / 4, i] for i in range(9)]
    assert "label vectors of 2" in converted(tmp_path, images, *args)[1]


# ---------------------------------------------------------------------------- rows and images

@pytest.mark.parametrize("names,top,rows,expected", [
    (["a/1.png", "b/1.png"], "", ["b/1.png", "a/1.png"], [1, 0]),
    (["t/a/1.png", "t/b/1.png"], "t/", ["b/1.png", "a/1.png"], [1, 0]),
    (["a/1.png", "b/1.png"], "", ["data/b/1.png", "data/a/1.png"], [1, 0]),
    (["t/a/1.png", "t/b/1.png"], "t/", ["/x/y/b/1.png", "/x/y/a/1.png"], [1, 0]),
    (["a/1.png", "b/2.png"], "", ["2.png", "1.png"], [1, 0]),
    (["1.png", "2.png"], "", ["x/b/2.png", "x/a/1.png"], [1, 0]),
    (["1.png", "2.jpg"], "", ["2", "1"], [1, 0]),
    (["a/1.png", "a/2.x.png"], "a/", ["2.x", "1.jpg"], [1, 0]),
    (["1.png", "2.png"], "", ["2.png", "3.png"], [None, 0]),
    # The strictest way that finds any image counts for all.
    (["1.png", "a/2.png"], "", ["1.png", "2.png"], [0, None]),
    # A letter with an accent may be two.
    (["e\u0301.png", "\u00fc.png"], "", ["u\u0308.png", "\u00e9.png"], [1, 0]),
])
def test_rows_find_their_images_by_paths_or_else_by_less(names, top, rows, expected):
    found, extra = match_rows(names, top, rows, "t")
    assert [found.get(name) for name in names] == expected
    assert extra == [row for i, row in enumerate(rows) if i not in expected]


@pytest.mark.parametrize("rows,text", [
    (["1.png", "2.png"], "several files are named 1.png; give paths in the source, such as a/1"),
    (["x/1.png", "y/1.png"], "several files are named 1.png"),
    (["a/1.png", "a/1.png"], "a/1.png is listed twice"),
    (["q.png"], "none of 1 rows names an image of the source; the first row names q.png, the first "
                "image is a/1.png"),
    ([], "none of 0 rows"),
])
def test_rows_without_a_certain_image_are_refused(rows, text):
    with pytest.raises(ValueError, match=f"^t: {text}"):
        match_rows(["a/1.png", "b/1.png"], "", rows, "t")


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_tables_fit_whether_accents_are_letters_of_their_own_or_not(tmp_path, form, other):
    labels = {"Évora/Zürich.png": 4, "Évora/Zug.png": 5, "Eza/é.png": 6}
    source = write_source(tmp_path / "src", {
        unicodedata.normalize(form, name): flat(label) for name, label in labels.items()})
    content = csv_of([(unicodedata.normalize(other, name), label)
                      for name, label in labels.items()])
    expected = [label for _, label in sorted(
        (unicodedata.normalize(form, name), label) for name, label in labels.items())]
    assert labels_in(tmp_path, source, table(tmp_path, content)) == expected
    (source / "metadata.csv").write_bytes(content)
    assert labels_in(tmp_path, source) == expected


def test_backslashes_and_dots_before_paths_are_those_of_paths(tmp_path):
    source = write_source(tmp_path / "src", {"a/1.png": flat(1), "b/2.png": flat(2)})
    content = csv_of([(".\\a\\1.png", 4), ("./b/2.png", 5)])
    assert labels_in(tmp_path, source, table(tmp_path, content)) == [4, 5]


def test_rows_without_an_image_are_counted_and_images_without_a_row_refused(tmp_path, images):
    rows = [*TEXTS.items(), ("x.png", "aardvark"), ("y.png", "zebra")]
    made, output = converted(tmp_path, images, table(tmp_path, csv_of(rows)))
    assert "Note: 2 of 11 rows name no image, the first x.png" in output
    assert "class 2 (zebra)" in output  # all rows number the classes, as for another part of them
    result = run(images, tmp_path / "out/a.zip", table(tmp_path, csv_of([*rows[:7], rows[9]])))
    assert_refused(result, tmp_path, "no label for 07.png; 2 of 9 images have none",
                   "1 of 8 rows names no image, the first x.png")
    assert labels_in(tmp_path, images, table(tmp_path, csv_of(rows[:7])), "--max-images=7")


# ---------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("content,texts", [
    (b"", ["no column file_name, filename, image, path or name", "names among none"]),
    (csv_of([("00.png", 1)], "file,label"), ["names among file, label", "--image-column"]),
    (csv_of([("00.png", 1)], "path,color"), ["no column label, class or category", "path, color",
                                             "--label-column"]),
    (csv_of([("00.png", 1, 2)]), ["line 2 has 3 cells, but the header has 2"]),
    (csv_of([("00.png", 1)], "path,path"), ["column 'path' occurs twice"]),
    (csv_of([("", 1)]), ["line 2 has no text in column file_name"]),
    (csv_of([("00.png", '"open')]), ["line 2"]), ("\ufffe".encode("utf-16"), ["not UTF-8"]),
    (csv_of([(name, -1) for name in FILES]), ["label -1 of 00.png must be in 0..65535"]),
    (csv_of([(name, 70000) for name in FILES]), ["label 70000 of 00.png"]),
    (csv_of([(name, "") for name in FILES]), ["no label for 00.png; 9 of 9"]),
    (csv_of([(name, "a\0") for name in FILES] + [("00.png", 1)]), ["00.png is listed twice"]),
])
def test_a_csv_that_is_not_one_is_refused_in_one_line(tmp_path, images, content, texts):
    assert_refused(run(images, tmp_path / "out/a.zip", table(tmp_path, content)), tmp_path, "l.csv",
                   *texts)


@pytest.mark.parametrize("content,texts", [
    (b"", ["names among none"]), (b"{", ["line 1 is not JSON"]), (b"\n[1]", ["line 2 must be"]),
    (b'{"path": "00.png", "label": 1}\n{"path": 5, "label": 1}', ["line 2 has no text", "path"]),
    (b'{"path": "00.png", "label": {"a": 1}}', ["column label holds"]),
    (json_lines_of((name, [1.0, float("inf")]) for name in FILES), ["finite"]),
    (json_lines_of((name, [[1]]) for name in FILES), ["finite"]), (b"[" * 100_000, ["line 1"]),
])
def test_json_lines_that_are_none_are_refused_in_one_line(tmp_path, images, content, texts):
    given = table(tmp_path, content, "l.jsonl")
    assert_refused(run(images, tmp_path / "out/a.zip", given), tmp_path, "l.jsonl", *texts)


@pytest.mark.parametrize("args,exit_code,texts", [
    (["--labels=nothere.csv"], 1, ["--labels=nothere.csv: no such file"]),
    (["--labels=l.txt"], 2, [".csv, .tsv, .jsonl"]), (["--label-column=x"], 1, ["no table"]),
    (["--image-column=x"], 1, ["--image-column", "no table"]),
    (["--label-column=x,,y"], 2, ["x,,y"]), (["--label-column=x,x"], 2, ["different column"]),
    (["--labels=l.csv", "--label-column=none"], 2, ["leave one of them out"]),
])
def test_flags_that_mean_nothing_are_refused(tmp_path, images, args, exit_code, texts):
    assert_refused(run(images, tmp_path / "out/a.zip", *args), tmp_path, *texts,
                   exit_code=exit_code)


def test_labels_that_are_not_wanted_may_be_anything(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((2, 32, 32, 3), np.uint8), np.array([0.5, 1]))
    folder = write_source(tmp_path / "src", {"1.png": flat(1), "dataset.json": b"{damaged"})
    for source in (tmp_path / "a.npz", folder):
        assert run(source, tmp_path / "out.zip").exit_code == 1
        record = record_of(tmp_path, source, "--label-column=none")
        assert record["labels"] is None


def test_sources_without_files_or_columns_say_so(tmp_path):
    path = write_cifar10(tmp_path / "cifar-10-python.tar.gz", random_pixels(5, 32, 32, 3), range(5))
    labels = table(tmp_path, csv_of([("a.png", 1)]))
    assert_refused(run(path, tmp_path / "out/a.zip", labels), tmp_path, "no file names")
    assert_refused(run(path, tmp_path / "out/a.zip", "--label-column=x"), tmp_path, "no columns")
    assert record_of(tmp_path, path, "--label-column=none") == {"labels": None}


def test_names_of_classes_are_printed_on_one_line(tmp_path):
    source = write_source(tmp_path / "src", {"1.png": encode(flat(1)), "2.png": encode(flat(2))})
    content = json_lines_of([("1.png", "a\nb"), ("2.png", "\ud800")])
    output = converted(tmp_path, source, table(tmp_path, content, "l.jsonl"))[1]
    assert "class 0 (a\\nb): 1\n  class 1 (\\ud800): 1\n" in output
