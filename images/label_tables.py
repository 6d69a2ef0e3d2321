"""Labels of images in tables: CSV, TSV or JSON Lines files with one row per image.

    file_name,label                  {"file_name": "a/1.png", "label": "cat"}
    a/1.png,cat                      {"file_name": "a/2.png", "label": "dog"}
    a/2.png,dog

The content of a single column decides the kind of labels. Whole numbers, also written as 6.0, are
class numbers. Other numbers are vectors of length 1. Texts become classes, numbered in sorted
order. Several columns make vectors. Only the standard library is needed.
"""

import collections
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from images.image_files import MAX_CLASSES, composed, stem

NAME_COLUMNS = ("file_name", "filename", "image", "path", "name")
LABEL_COLUMNS = ("label", "class", "category")
JSON_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES)
# Hugging Face's imagefolder reads these files beside images, with a column of this name.
METADATA_NAMES, METADATA_COLUMN = ("metadata.csv", "metadata.jsonl"), "file_name"
_WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_MAX_SHOWN = 20  # columns in a message


class Columns(NamedTuple):
    """The columns of tables to read. A column that is None is chosen by name or type."""

    image: str | None = None  # with images or their file names
    labels: tuple[str, ...] | None = None  # () reads no labels
    file: Path | None = None  # a table of labels for images in files


BY_DEFAULT = Columns()


class Labels(NamedTuple):
    """A label for each row: a class number, a vector of numbers, or None if it is missing."""

    values: list[Any]
    class_names: list[str] | None = None  # set if the labels were text
    how: str = ""  # how labels were derived, a text to append to the column's name


class Rows(NamedTuple):
    """The rows of a table: the names of images, and the cells of each label column."""

    names: list[str]
    cells: dict[str, list[Any]]  # by column name; {} if no column holds labels


def read_rows(text: bytes, columns: Columns, where: str, *, is_json: bool,
              is_metadata: bool = False) -> Rows:
    """Returns the names of images and the cells of their labels in a table.

    `where` is the table's name in errors. A table that was not named by the user (`is_metadata`)
    may lack the columns, unless the user chose them.

    Raises:
        ValueError: the table is malformed, or lacks the columns.
    """
    header, rows = _parse_json_lines(text, where) if is_json else _parse_csv(text, where)
    name_column = _find(header, columns.image, (METADATA_COLUMN,) if is_metadata else NAME_COLUMNS)
    if name_column is None and is_metadata and columns.image is None:
        return Rows([], {})
    if name_column is None:
        raise ValueError(f"{where}: no column {_wanted(columns.image, NAME_COLUMNS)} with file "
                         f"names among {shown_columns(header)}; choose one with --image-column")
    found = [_find(header, name, LABEL_COLUMNS) for name in columns.labels or (None,)]
    if None in found:
        if is_metadata and columns.labels is None:
            return Rows([], {})
        wanted = columns.labels[found.index(None)] if columns.labels else None
        raise ValueError(f"{where}: no column {_wanted(wanted, LABEL_COLUMNS)} with labels among "
                         f"{shown_columns(header)}; choose with --label-column")
    names, cells = [], {name: [] for name in found}
    for line, row in rows:
        name = row.get(name_column)
        if not (isinstance(name, str) and name.strip()):
            raise ValueError(f"{where}: line {line} has no text in column {name_column}")
        names.append(_normal(name))
        for column, values in cells.items():
            values.append(row.get(column))
    return Rows(names, cells)


def _find(header: Sequence[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """Returns the wanted column or, if none is wanted, the first one with a usual name."""
    if wanted is not None:
        return wanted if wanted in header else None
    by_name = {name.lower(): name for name in reversed(header)}
    return next((by_name[name] for name in usual if name in by_name), None)


def _wanted(wanted: str | None, usual: Sequence[str]) -> str:
    return repr(wanted) if wanted is not None else f"{', '.join(usual[:-1])} or {usual[-1]}"


def shown_columns(names: Sequence[str]) -> str:
    """Returns the names of columns on one line, for a message."""
    if not names:
        return "none"
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:_MAX_SHOWN])
    return shown + (f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else "")


def _normal(name: str) -> str:
    """Returns a file name with '/' between folders and without a leading './'."""
    name = name.strip().replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return name


_Parsed = tuple[list[str], Iterator[tuple[int, Mapping[str, Any]]]]  # columns; lines and rows


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8 text; save it as UTF-8") from error


def _parse_csv(text: bytes, where: str) -> _Parsed:
    """Returns the columns and rows of a CSV, which may use semicolons or tabs."""
    decoded = _decoded(text, where)
    first = decoded.partition("\n")[0]
    delimiter = next((mark for mark in "\t;" if mark in first and "," not in first), ",")
    reader = csv.reader(io.StringIO(decoded, newline=""), delimiter=delimiter, strict=True)
    lines = _csv_lines(reader, where)
    header = [cell.strip() for _, cells in [next(lines, (0, []))] for cell in cells]
    if twice := [name for name, count in collections.Counter(header).items() if count > 1]:
        raise ValueError(f"{where}: column {twice[0]!r} occurs twice")

    def rows():
        for line, cells in lines:
            if len(cells) != len(header):
                raise ValueError(f"{where}: line {line} has {len(cells)} cells, but the header has "
                                 f"{len(header)}")
            yield line, dict(zip(header, cells, strict=True))
    return header, rows()


def _csv_lines(reader: Any, where: str) -> Iterator[tuple[int, list[str]]]:
    try:
        yield from ((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        raise ValueError(f"{where}: line {reader.line_num}: {error}") from error


def _parse_json_lines(text: bytes, where: str) -> _Parsed:
    """Returns the keys of the first object in a JSON Lines file, and all objects as rows."""
    lines = [(number, line) for number, line in enumerate(_decoded(text, where).split("\n"), 1)
             if line.strip()]

    def rows():
        for number, line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f'{where}: line {number} must be {{"file_name": "NAME", '
                                 '"label": LABEL}')
            yield number, row
    return list(next(rows(), (0, {}))[1]), rows()


def labels_of(cells: Mapping[str, Sequence[Any]], where: str) -> Labels:
    """Returns the labels in one column, or vectors of the numbers in several columns.

    Raises:
        ValueError: values are neither numbers nor text, or those of vectors are not numbers.
    """
    columns = {name: list(map(_value, values)) for name, values in cells.items()}
    if len(columns) == 1:
        [(name, values)] = columns.items()
        return _labels_of_one(values, f"{where}: column {name}")
    numbers = []
    for name, values in columns.items():
        numbers.append(_numbers(values))
        if numbers[-1] is None:
            other = next(value for value in values if _numbers([value]) is None)
            raise ValueError(f"{where}: column {name} holds {_shown(other)}; label vectors must "
                             "consist of numbers")
    return Labels([None if None in row else list(row) for row in zip(*numbers, strict=True)])


def _labels_of_one(values: list[Any], where: str) -> Labels:
    numbers = _numbers(values)
    if numbers is not None:
        decimals = [value for value in numbers if isinstance(value, float)]
        if not decimals:
            return Labels(numbers)
        # pandas writes 6.0 if a column of whole numbers had gaps.
        if all(value is None or value in range(MAX_CLASSES) for value in numbers):
            return Labels([None if value is None else int(value) for value in numbers],
                          how=f", whose numbers are whole, such as {decimals[0]}, and are used as "
                              "class numbers")
        return Labels([None if value is None else [value] for value in numbers])
    there = [value for value in values if value is not None]
    examples = {type(value): value for value in reversed(there)}
    if set(examples) not in ({str}, {list}):
        raise ValueError(f"{where} holds {' and '.join(map(_shown, examples.values()))}; labels "
                         "must be all numbers, all text, or all lists of numbers")
    if list in examples:
        return Labels(values)  # checked together with all other labels
    class_names = sorted(set(there))
    classes = {name: number for number, name in enumerate(class_names)}
    return Labels([None if value is None else classes[value] for value in values], class_names,
                  ", whose texts are numbered in sorted order")


def _shown(value: Any) -> str:
    return ascii(value)[:40]


def _value(cell: Any) -> Any:
    """Returns the value of a cell; None for an empty cell or NaN."""
    if isinstance(cell, bool):
        return int(cell)
    if isinstance(cell, float) and math.isnan(cell):
        return None
    if isinstance(cell, str):
        cell = cell.strip()
    return None if cell == "" else cell


def _numbers(values: list[Any]) -> list[int | float | None] | None:
    """Returns values, numbers or text, as numbers, or None if any is something else."""
    numbers = []
    for value in values:
        if isinstance(value, str):
            if not _NUMBER.fullmatch(value):
                return None
            value = int(value) if _WHOLE.fullmatch(value) else float(value)
        elif value is not None and not isinstance(value, int | float):
            return None
        numbers.append(value)
    return numbers


class Matched(NamedTuple):
    """The row that belongs to each image."""

    rows: dict[str, int]  # row number by image name
    extra: list[str]  # names in rows that match no image


def match_rows(images: Sequence[str], top: str, rows: Sequence[str], where: str) -> Matched:
    """Returns the row of each image that has one.

    Names in rows are tried as paths in the source, then as paths in the folder `top` (a prefix of
    the names of images), then below the folder that all rows share, and then as bare file names.
    All are tried with extensions and then without. The first unambiguous way is used.

    Raises:
        ValueError: an image is listed twice, no row matches an image, or a match is ambiguous.
    """
    if twice := next((name for name, n in collections.Counter(rows).items() if n > 1), None):
        raise ValueError(f"{where}: {twice} is listed twice")
    folders = os.path.commonprefix([row.split("/")[:-1] for row in rows])
    common = "".join(f"{folder}/" for folder in folders)
    ambiguous = None
    for image_key, row_key in _ways(top, common):
        numbers, twice = _numbered(composed(row_key(row)) for row in rows)
        names, also_twice = _numbered(composed(image_key(image)) for image in images)
        shared = numbers.keys() & names.keys()
        if unclear := shared & (twice | also_twice):
            ambiguous = ambiguous or min(unclear)
        if not shared or unclear:
            continue
        found = {images[i]: numbers[key] for key, i in names.items() if key in numbers}
        there = set(found.values())
        return Matched(found, [row for i, row in enumerate(rows) if i not in there])
    if ambiguous:
        raise ValueError(f"{where}: several files are named {ambiguous}; give paths in the "
                         f"source, such as {images[0]}")
    raise ValueError(f"{where}: none of {len(rows)} rows names an image of the source; the first "
                     f"row names {rows[0] if rows else 'nothing'}, the first image is {images[0]}")


def _ways(top: str, common: str) -> Iterator[tuple[Callable[[str], str], Callable[[str], str]]]:
    """Yields the keys by which images and rows are matched, the strictest first."""
    def same(name):
        return name

    def base(name):
        return name.rpartition("/")[2]

    ways = [(same, same), (lambda name: name[len(top):], same),
            (same, lambda row: row[len(common):]),
            (lambda name: name[len(top):], lambda row: row[len(common):]), (base, base)]
    yield from ways
    for image_key, row_key in ways:
        yield lambda name, key=image_key: stem(key(name)), lambda row, key=row_key: stem(key(row))


def _numbered(keys: Iterator[str]) -> tuple[dict[str, int], set[str]]:
    """Returns the number of each key, and the keys that occur twice."""
    numbers, twice = {}, set()
    for number, key in enumerate(keys):
        if numbers.setdefault(key, number) != number:
            twice.add(key)
    return numbers, twice
