"""Images in tables: Parquet files, and data sets of Hugging Face's package `datasets`.

Each row is an image. Its column holds encoded pictures or .npy files, either as bytes or as records
{bytes, path}; or it holds pixels as nested lists. Another column may hold labels, see
`label_tables.labels_of`. Hugging Face's ClassLabel has the names of the classes. Columns that the
user does not name are chosen by type. Images are read in order, a few rows at a time. The packages
pyarrow and datasets are imported when such a source is opened. The contents of a table are read
only as pictures and arrays, but its format is parsed by pyarrow, a C++ library.
"""

import bisect
import contextlib
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dnnlib import console
from images import array_files
from images.label_tables import LABEL_COLUMNS, Columns, Labels, labels_of, shown_columns
from images.pictures import DamagedImageError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SUFFIX = ".parquet"
HF_PREFIX = "hf://"
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
_BATCH_ROWS = 16  # rows read at a time
_BUFFER_BYTES = 1 << 20  # read buffer of a column
_SHARD = re.compile(r"(.+?)-\d+-of-\d+")  # names such as train-00000-of-00002-3f9a.parquet
_INDEX = re.compile(r"__index_level_\d+__")  # columns that pandas adds
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){0,2}", re.ASCII)
# Exceptions that datasets has been seen to raise for damaged files, besides its own errors.
_DAMAGE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)
_DEFAULT_SPLIT = "train"
_HUB, _HUB_SEC = "https://huggingface.co", 5  # timeout of a request

Content = bytes | Path | DamagedImageError  # of an image: its file, the file's path, or its damage


class Table(NamedTuple):
    """The images and labels of a table."""

    where: str  # its name in errors
    names: Sequence[str]  # names of its rows in errors
    read: Callable[[Iterable[int]], Iterator[Content]]  # yields images by row, in rising order
    labels: Labels | None
    fact: str  # which columns these are
    note: str = ""  # a warning about something unexpected


class _Opened(NamedTuple):
    """An open table, before its images are read."""

    schema: "pa.Schema"
    features: Mapping[str, Any]  # Hugging Face's metadata of columns
    names: Sequence[str]  # of rows
    values: Callable[[str, Iterable[int]], Iterator["pa.Scalar"]]  # yields a column's values by row
    column: Callable[[str], list[Any]]  # returns all values of a column
    others: Sequence[tuple[Path, "pa.Schema"]] = ()  # further files whose schema differs


def open_parquet(path: Path, files: Sequence[str], columns: Columns) -> Table:
    """Returns the table in the Parquet files `files` below the folder `path`.

    For a single file, `path` is the file and `files` is [""].

    Raises:
        OSError: a file can't be read, or the package pyarrow is missing.
        ValueError: a file is damaged or differs from the first, or the image column is ambiguous.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise OSError(f"{path}: reading Parquet needs the package pyarrow: pip install "
                      "pyarrow") from error
    _refuse_splits(path, files)
    return _table(_open_files(path, files), columns, str(path), reads_paths=False)


def _refuse_splits(path: Path, files: Sequence[str]) -> None:
    """Raises ValueError if the names of files show that they belong to several splits."""
    found = {}
    for name in files:
        *folders, base = name.split("/")
        shard = _SHARD.match(base)
        for part in (*folders, shard[1] if shard else base[:-len(SUFFIX)]):
            if part.lower() in SPLITS:
                found.setdefault(part, name)
    if len(found) > 1:
        raise ValueError(f"{path}: holds the splits {', '.join(sorted(found))}, such as "
                         f"{found[min(found)]}; move the files of one to a folder of their own, or "
                         f"give --source={HF_PREFIX}{path}:{min(found)}")


class _Group(NamedTuple):
    """A row group of a Parquet file."""

    file: str
    number: int  # in the file
    first: int  # its first row, among those of all files
    num_rows: int


def _open_files(path: Path, files: Sequence[str]) -> _Opened:
    """Opens Parquet files, reading only the metadata at their ends."""
    import pyarrow.parquet as pq

    groups, names, others = [], [], []
    with _reading(path / files[0]):
        schema = pq.read_schema(path / files[0])
    for name in files:
        with _reading(path / name), pq.ParquetFile(path / name) as file:
            own, record = file.schema_arrow, file.metadata
            if record.num_rows and not own.equals(schema):
                others.append((path / name, own))
            sizes = [record.row_group(i).num_rows for i in range(record.num_row_groups)]
        for number, first in enumerate(itertools.accumulate([len(names), *sizes[:-1]])):
            groups.append(_Group(name, number, first, sizes[number]))
        names += [f"{name and f'{name} '}row {i}" for i in range(sum(sizes))]
    firsts = [group.first for group in groups]

    def group_of(row):
        return groups[bisect.bisect_right(firsts, row) - 1]

    def values(column, rows):
        for name, own in itertools.groupby(rows, lambda row: group_of(row).file):
            rows_of_file = list(own)
            read = sorted({group_of(row) for row in rows_of_file}, key=lambda group: group.number)
            begins = itertools.accumulate((group.num_rows for group in read), initial=0)
            shift = {group: begin - group.first for group, begin in zip(read, begins, strict=False)}
            yield from _picked(_arrays(path / name, column, [group.number for group in read]),
                               (row + shift[group_of(row)] for row in rows_of_file))

    def column(wanted):
        return [value for name in files for array in _arrays(path / name, wanted)
                for value in array.to_pylist()]
    return _Opened(schema, _features(schema), names, values, column, others)


def _arrays(path: Path, column: str, groups: Sequence[int] | None = None) -> Iterator["pa.Array"]:
    """Yields the values of a column in these row groups of a file, a few at a time."""
    import pyarrow.parquet as pq

    with _reading(path), pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        for batch in file.iter_batches(_BATCH_ROWS, groups, [column], use_threads=False):
            yield _storage(batch.column(0))


def _picked(arrays: Iterator["pa.Array"], positions: Iterator[int]) -> Iterator["pa.Scalar"]:
    """Yields the values of consecutive arrays at rising positions."""
    begin, position = 0, next(positions, None)
    for array in arrays:
        while position is not None and position < begin + len(array):
            yield array[position - begin]
            position = next(positions, None)
        if position is None:
            return
        begin += len(array)


def _storage(array: "pa.Array") -> "pa.Array":
    """Returns an array without the extension type that a package added."""
    import pyarrow as pa

    return array.storage if isinstance(array, pa.ExtensionArray) else array


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Prefixes errors with the name of a file or source, and reduces them to one line."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path}: {_first_line(error) or 'damaged'}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:400]


def _features(schema: "pa.Schema") -> Mapping[str, Any]:
    """Returns Hugging Face's metadata of columns, or {} if there are none."""
    try:
        record = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = record["info"]["features"]
        return {name: features[name] for name in schema.names if name in features}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


# ----------------------------------------------------------------------------------- Hugging Face


def open_hf(source: str, columns: Columns) -> Table:
    """Returns the table that hf://NAME[:SPLIT] names.

    NAME is OWNER/NAME or OWNER/NAME/CONFIG on the hub, or a folder: one of `save_to_disk`, or one
    of files that `datasets` can read without a script.

    Raises:
        OSError: the data set can't be read or reached, or the package datasets is missing.
        ValueError: there is no such data set or split, or the image column is ambiguous.
    """
    name, split = _name_and_split(source)
    is_folder = Path(name).expanduser().is_dir()
    if not is_folder and not _is_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"  # otherwise many attempts take half a minute
    try:
        import datasets
    except ImportError as error:
        raise OSError(f"{source}: needs the package datasets: pip install datasets") from error
    if console.bar_disabled() or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    for logger in ("datasets", "huggingface_hub"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with _described(source, is_folder):
        found = _load(name)
    data, fact = _choose_split(found, split, source)
    table = _table(_open_dataset(data, source), columns, source, reads_paths=True)
    return table._replace(fact=f"{fact}{table.fact}")


def _is_reachable() -> bool:
    """Whether the hub answers, or might answer in ways that are not tried here."""
    import requests

    try:
        requests.head(os.environ.get("HF_ENDPOINT", _HUB), timeout=_HUB_SEC)
    except requests.exceptions.SSLError:  # `datasets` may have other certificates
        return True
    except (requests.ConnectionError, requests.Timeout):
        return False
    except requests.RequestException:  # there may be a proxy that requests does not know
        return True
    return True


def _name_and_split(source: str) -> tuple[str, str | None]:
    """Returns the parts of hf://NAME[:SPLIT]. Raises ValueError for anything else."""
    text = source.removeprefix(HF_PREFIX)
    if Path(text).expanduser().is_dir() and text:
        return text, None
    name, colon, split = text.rpartition(":") if ":" in text else (text, "", "")
    is_folder = bool(name) and Path(name).expanduser().is_dir()
    name = name if is_folder else name.removeprefix("datasets/")  # as in the hub's addresses
    if colon and not split or not (is_folder or _HUB_NAME.fullmatch(name)):
        raise ValueError(f"--source={source}: must be {HF_PREFIX}NAME or {HF_PREFIX}NAME:SPLIT, "
                         "where NAME is OWNER/NAME or OWNER/NAME/CONFIG on the hub, or an existing "
                         "folder")
    return name, split or None


@contextlib.contextmanager
def _described(source: str, is_folder: bool) -> Iterator[None]:
    """Converts exceptions of `datasets`, also those of offline mode, to one line."""
    import datasets
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, pa.ArrowException, *_DAMAGE) as error:
        if not is_folder and datasets.config.HF_HUB_OFFLINE:
            raise OSError(f"{source}: the hub can't be reached or HF_HUB_OFFLINE is set, and the "
                          "cache of datasets does not hold it; give a folder of save_to_disk or "
                          "Parquet files") from error
        what = "" if isinstance(error, DatasetsError | OSError | ValueError | RuntimeError) else \
            f"damaged, or not of save_to_disk: {type(error).__name__} "
        raise ValueError(f"{source}: {what}{_first_line(error.__cause__ or error)}") from error


def _load(name: str) -> "datasets.Dataset | datasets.DatasetDict":
    """Returns a data set from a folder or the hub, which `datasets` keeps in its own cache."""
    import datasets

    folder = Path(name).expanduser()
    if not folder.is_dir():
        repository, config = re.fullmatch(r"([^/]+(?:/[^/]+)?)(?:/(.+))?", name).groups()
        return datasets.load_dataset(repository, config)
    is_saved = any((folder / record).exists() for record in ("dataset_dict.json", "state.json"))
    return (datasets.load_from_disk if is_saved else datasets.load_dataset)(str(folder))


def _choose_split(found: "datasets.Dataset | datasets.DatasetDict", split: str | None,
                  source: str) -> tuple["datasets.Dataset", str]:
    """Returns one split (the one asked for, the only one, or train) and a note on the choice."""
    splits = found if isinstance(found, dict) else {str(found.split or _DEFAULT_SPLIT): found}
    if split is not None and split not in splits:
        raise ValueError(f"{source}: has no split {split!r}; there are {', '.join(splits)}")
    if split is None and len(splits) > 1 and _DEFAULT_SPLIT not in splits:
        raise ValueError(f"{source}: has the splits {', '.join(splits)}; name one, as in "
                         f"{source}:{next(iter(splits))}")
    chosen = split or (_DEFAULT_SPLIT if _DEFAULT_SPLIT in splits else next(iter(splits)))
    fact = f"split {chosen} of {', '.join(splits)}; " if len(splits) > 1 else ""
    return splits[chosen], fact


def _open_dataset(data: "datasets.Dataset", source: str) -> _Opened:
    """Opens a split, whose tables are memory-mapped."""
    def arrays(column, rows=None):
        found = data.select_columns([column])
        found = found if rows is None else found.select(rows)
        with _reading(source):
            for table in found.with_format("arrow").iter(_BATCH_ROWS):
                yield from map(_storage, table.column(0).chunks)

    def values(column, rows):
        yield from itertools.chain.from_iterable(arrays(column, list(rows)))

    def column(wanted):
        return [value for array in arrays(wanted) for value in array.to_pylist()]
    return _Opened(data.features.arrow_schema, data.features.to_dict(),
                   [f"row {i}" for i in range(len(data))], values, column)


# ---------------------------------------------------------------------------------------- columns


# Kinds of columns as messages name them. In each tuple, earlier ones are preferred.
_IMAGE_KINDS = (("images",), ("bytes",), ("pixels",))
_CLASSES = "classes"
_LABEL_KINDS = ((_CLASSES,), ("whole numbers", "text"))
_BOOLEANS = "booleans"  # labels if the column's name says so
_OTHER_LABEL_KINDS = (_BOOLEANS, "numbers", "vectors")  # only with --label-column


def _table(opened: _Opened, columns: Columns, where: str, *, reads_paths: bool) -> Table:
    """Returns the images and labels of an open table.

    With `reads_paths`, images may be files elsewhere. Raises ValueError if the choice of columns is
    ambiguous.
    """
    kinds = {field.name: _kind(field.type, opened.features.get(field.name))
             for field in opened.schema}
    image = _image_column(kinds, columns.image, where)
    del kinds[image]
    names = _label_columns(kinds, columns.labels, where)
    _check_others(opened, (image, *names))
    fact, note, labels = f"images are column {image}", "", None
    if names:
        labels = labels_of({name: opened.column(name) for name in names}, where)
        fact += f", labels column{'s' if len(names) > 1 else ''} {', '.join(names)}{labels.how}"
        if columns.labels is None and len(labels.class_names or ()) == len(opened.names) > 2:
            note = (f"each of the {len(opened.names)} images has a class of its own in column "
                    f"{names[0]}; --label-column=none reads no labels")
        if kinds[names[0]] == _CLASSES and len(names) == 1:
            labels = labels._replace(class_names=_class_names(opened.features[names[0]]))
    if columns.labels is None:
        fact += _not_taken(kinds, names)
    return Table(where, opened.names, lambda rows: (
        _content(value, reads_paths) for value in opened.values(image, rows)), labels, fact, note)


def _check_others(opened: _Opened, names: Sequence[str]) -> None:
    """Raises ValueError for a file in which columns are missing or of another kind."""
    for path, schema in opened.others:
        for name in names:
            kinds = [_kind(own.field(name).type, opened.features.get(name))
                     for own in (opened.schema, schema) if name in own.names]
            if len(set(kinds)) != 1 or len(kinds) != 2:
                what = f"holds {kinds[1]}" if len(kinds) == 2 else "is missing"
                raise ValueError(f"{path}: column {name} {what}, but in the first file it holds "
                                 f"{kinds[0]}")


def _class_names(feature: Mapping[str, Any]) -> list[str] | None:
    names = feature.get("names")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else None


def _kind(kind: "pa.DataType", feature: Any) -> str:
    """Returns the kind of values in a column, using Hugging Face's metadata if there are any."""
    from pyarrow import types

    declared = feature.get("_type") if isinstance(feature, dict) else None
    kind = getattr(kind, "storage_type", kind)
    if declared == "Image":
        return "images"
    if declared == "ClassLabel":
        return _CLASSES
    if declared in ("Audio", "Video", "Pdf", "Nifti"):  # also records of bytes and paths
        return declared.lower()
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return "images"
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth and (types.is_integer(kind) or types.is_floating(kind)):
        return "vectors" if depth == 1 else "pixels"
    for name, tests in (("bytes", (types.is_binary, types.is_large_binary)),
                        ("whole numbers", (types.is_integer,)),
                        ("text", (types.is_string, types.is_large_string)),
                        (_BOOLEANS, (types.is_boolean,)),
                        ("numbers", (types.is_floating,))):
        if not depth and any(test(kind) for test in tests):
            return name
    return f"{depth * 'list of '}{kind}"[:40]


def _is_list(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _image_column(kinds: Mapping[str, str], wanted: str | None, where: str) -> str:
    """Returns the name of the image column. Raises ValueError if it is ambiguous."""
    there = f"the columns are {_shown_kinds(kinds)}"
    if wanted is not None:
        if not any(kinds.get(wanted) in group for group in _IMAGE_KINDS):
            raise ValueError(f"--image-column={wanted}: {where} has no such image column; {there}")
        return wanted
    found = _first_found(kinds, _IMAGE_KINDS)
    if len(found) != 1:
        how = f"may hold images: {shown_columns(found)}" if found else "holds images"
        raise ValueError(f"{where}: {'several columns' if found else 'no column'} {how}; "
                         f"choose one with --image-column; {there}")
    return found[0]


def _label_columns(kinds: Mapping[str, str], wanted: tuple[str, ...] | None,
                   where: str) -> tuple[str, ...]:
    """Returns the names of the label columns. Raises ValueError if they are ambiguous."""
    there = f"the columns are {_shown_kinds(kinds)}"
    if wanted is None:
        own = {name: "whole numbers" if kind == _BOOLEANS and _is_called_label(name) else kind
               for name, kind in kinds.items() if not _INDEX.fullmatch(name)}
        found = _first_found(own, _LABEL_KINDS)
        if len(found) > 1:
            raise ValueError(f"{where}: several columns may hold labels: {shown_columns(found)}; "
                             f"choose one, or none, with --label-column; {there}")
        return tuple(found)
    allowed = {kind for group in _LABEL_KINDS for kind in group}.union(_OTHER_LABEL_KINDS)
    for name in wanted:
        if kinds.get(name) not in allowed:
            raise ValueError(f"--label-column={name}: {where} has no such label column; {there}")
    return wanted


def _is_called_label(name: str) -> bool:
    return name.lower() in LABEL_COLUMNS


def _not_taken(kinds: Mapping[str, str], taken: Sequence[str]) -> str:
    """Returns a note on columns that are named like labels but hold other values."""
    usual = {kind for group in _LABEL_KINDS for kind in group} | {_BOOLEANS}
    return "".join(
        f"; column {name} holds {kind} and is not used for labels, which must be whole numbers, "
        f"booleans or text{f' unless --label-column={name}' * (kind in _OTHER_LABEL_KINDS)}"
        for name, kind in kinds.items()
        if _is_called_label(name) and name not in taken and kind not in usual)


def _first_found(kinds: Mapping[str, str], groups: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns the columns of the first group of kinds that occurs."""
    found = ([name for name, kind in kinds.items() if kind in group] for group in groups)
    return next(filter(None, found), [])


def _shown_kinds(kinds: Mapping[str, str]) -> str:
    return shown_columns([f"{name} ({kind})" for name, kind in kinds.items()])


def _content(value: "pa.Scalar", reads_paths: bool) -> Content:
    """Returns an image's file, as bytes or as a path, or a .npy file of its pixels."""
    if not value.is_valid:
        return DamagedImageError("has no image")
    if hasattr(value, "keys"):  # a record
        record = value.as_py()
        data, path = record["bytes"], record.get("path")
        if data is None and path and reads_paths:
            return Path(path)
        if data is None:
            elsewhere = f", only the path {ascii(path)}, which is not read" if path else ""
            return DamagedImageError(f"has no bytes{elsewhere}")
        return data
    if not _is_list(value.type):
        return value.as_py()
    try:
        return array_files.encode(_pixels(value.values))
    except ValueError as error:
        return DamagedImageError(str(error))


def _pixels(values: "pa.Array") -> np.ndarray:
    """Returns nested lists of numbers as an array. Raises ValueError if they do not form one."""
    import pyarrow.compute as pc

    shape = [len(values)]
    while _is_list(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise ValueError("lists of pixels have different lengths")
        shape.append(lengths[0])
        values = values.flatten()
    if values.null_count:
        raise ValueError("a pixel is missing")
    return values.to_numpy(zero_copy_only=False).reshape(shape)
