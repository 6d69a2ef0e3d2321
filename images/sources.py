"""The sources that `dataset_tool.py --source` accepts: folders, ZIPs, archives and others.

| source | recognised by | labels |
|---|---|---|
| CIFAR-10, CIFAR-100 | a file *.tar.gz or *.tgz, or the folder that it unpacks to | its own |
| MNIST and its like | a file *images-idx3-ubyte or .gz, or a folder with it | a file beside it |
| LSUN | a folder *_lmdb | none |
| ZIP | a file *.zip | dataset.json, else its top-level folders |
| array | a file *.npy of [n, H, W], [n, C, H, W] or [n, H, W, C] | none |
| samples | a file *.npz with such an array `arr_0` | `arr_1` |
| tensor | a file *.pt or *.pth of such an array | none |
| DICOM | a folder or ZIP of DICOM files | dataset.json |
| Parquet | a file *.parquet, or a folder of such files | a column of its own |
| Hugging Face | hf://NAME[:SPLIT], see `table_files.open_hf` | a column of its own |
| folder | any other folder | dataset.json, else its top-level folders |

For files, a table of labels may replace dataset.json: one that the user names, or metadata.csv or
metadata.jsonl among the files, see `label_tables`.

The top level is the folder that contains all images, or a parent of it that has a dataset.json.
Images are named and counted here, and each is read when it is needed. Only the images of CIFAR and
MNIST, whose size is fixed, are kept in memory.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dnnlib.progress import Progress
from dnnlib.util import counted
from images import (
    archives,
    array_files,
    dicom_files,
    idx_files,
    label_tables,
    pairing,
    table_files,
    tensor_files,
)
from images.image_files import (
    CONDITIONS,
    DAMAGE,
    GENERATE_RECORD,
    LABELS_NAME,
    check_file_size,
    check_finished,
    check_matched,
    error_prefix,
    is_array,
    label_array,
    list_files,
    match_names,
    member_problem,
    parse_class_names,
    parse_labels,
    read_regular,
    sort_names,
    stem,
)
from images.label_tables import BY_DEFAULT, Columns
from images.npz_files import Npz, is_npz
from images.pictures import DamagedImageError

_ENCRYPTED = 1  # flag bit of a ZIP member
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_MAX_SHOWN = 3  # names in a message


class Item(NamedTuple):
    """One image to convert: its name, and its file, content, pixels or damage."""

    name: str
    data: bytes | Path | np.ndarray | DamagedImageError
    layout: str | None = None  # of an array, if known
    # Converts a file that is neither picture nor .npy to values [C, H, W].
    decode: Callable[[bytes], np.ndarray] | None = None

    def content(self) -> bytes | np.ndarray:
        """Returns the content of the file or the pixels.

        Raises:
            DamagedImageError: it can't be read; the message lacks its name.
        """
        if isinstance(self.data, DamagedImageError):
            raise self.data
        if not isinstance(self.data, Path):
            return self.data
        try:
            return read_regular(self.data)
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or error
            raise DamagedImageError(f"can't be read: {problem}") from error


@dataclasses.dataclass
class Source:
    """Images to convert, numbered from 0 in their order."""

    num_images: int
    names: Sequence[str] | None  # None if they are known only after reading
    read: Callable[[Iterable[int]], Iterator[Item]]  # yields images by number, in rising order
    # Returns the labels of images by number; None without labels.
    labels: Callable[[Sequence[int]], list[Any]] | None = None
    class_names: Sequence[str] | None = None  # as in the source
    has_folder_classes: bool = False  # whether the labels are the top-level folders
    is_dicom: bool = False  # whether they are slices, whose folders are not classes
    headers: Mapping[str, dicom_files.Header] = dataclasses.field(default_factory=dict)  # of slices
    order: str = ""  # the sort criterion of slices
    has_file_names: bool = False  # whether the names are those of files
    others: Sequence[str] = ()  # files that are not images
    num_hidden: int = 0  # hidden files and system files
    num_pictures: int = 0  # grids and movies of generate.py
    top: str = ""  # the folder, '' or ending in '/', whose subfolders may be classes
    num_conditions: int = 0  # condition images, which are not converted
    unmatched: Sequence[str] = ()  # files that a pattern matches neither as image nor as condition
    note: str = ""  # a warning about something unexpected
    facts: Sequence[str] = ()  # notes for the user
    doubts: Sequence[str] = ()  # warnings that pairs may be wrong
    # Other labels that `choose_labels` can select, and the names of their classes.
    label_sets: Mapping[str, tuple[np.ndarray, Sequence[str] | None]] = dataclasses.field(
        default_factory=dict)


@contextlib.contextmanager
def open_source(path: str | Path, flag: str = "--source", layout: str | None = None,
                columns: Columns = BY_DEFAULT) -> Iterator[Source]:
    """Opens the source that `--source` or another flag names.

    `layout` is that of arrays, see `array_files.first_channels`; `columns` are those of tables.

    Raises:
        OSError: the source does not exist or can't be read.
        ValueError: it is not supported, or malformed.
    """
    if not str(path).startswith(table_files.HF_PREFIX):
        path = Path(path)
        check_finished(path)
        if not path.exists():
            raise FileNotFoundError(f"{flag}={path}: no such file or folder")
    opener = _opener(path, columns)
    if opener is None:
        raise ValueError(f"{flag}={path}: is not supported; give a folder, .zip, .npy, .npz, .pt, "
                         ".parquet, *_lmdb, cifar-10-python.tar.gz, *-images-idx3-ubyte.gz, or "
                         f"{table_files.HF_PREFIX}NAME")
    _check_columns(path, flag, columns, opener)
    with opener(path, layout) as source:
        if not source.num_images:
            hidden = counted(source.num_hidden, "hidden or system file is",
                             "hidden or system files are")
            hidden = f"; {hidden} left out" if source.num_hidden else ""
            others = counted(len(source.others), "file isn't an image", "files aren't images")
            others = f"; {others}: {shown_some(source.others)}" if source.others else ""
            if idx_files.find_images(source.others):
                others += "; unpack the ZIP and name one of its files"
            saved = f"; {flag}={table_files.HF_PREFIX}{path} reads a data set of save_to_disk" \
                if any(name.endswith(".arrow") for name in source.others) else ""
            raise ValueError(f"{flag}={path}: no images found{others}{hidden}{saved}")
        if columns.labels == ():
            source.labels, source.class_names, source.note = None, None, ""
            source.has_folder_classes = False
        yield source


def condition_numbers(source: Source, conditions: Source, *,
                      by_order: bool = False) -> Sequence[int]:
    """Returns the number of the condition image of each image, matched by name or by order.

    Evidence against the pairs is added to the source's `doubts`.

    Raises:
        ValueError: an image has no condition image or the reverse, the sources have no names, or
            slices paired by order have different positions.
    """
    if by_order:
        if source.num_images != conditions.num_images:
            raise ValueError(f"--pair=order: --source has {source.num_images} images, but "
                             f"--cond-source has {conditions.num_images}; give equal numbers")
        numbers = range(source.num_images)
        if source.names is None or conditions.names is None:
            return numbers
        if not _check_positions(source, conditions, numbers, "--pair=order"):
            _doubt_order(source, conditions)
        return numbers
    if source.names is None or conditions.names is None:
        raise ValueError("--cond-source: LMDB has no file names to match condition images by; pair "
                         "by order with --pair=order")
    found, extra = match_names(source.names, conditions.names)
    check_matched(source.names, found, extra, "--cond-source")
    of_names = {name: number for number, name in enumerate(conditions.names)}
    numbers = [of_names[name] for name in found]
    _check_positions(source, conditions, numbers, "--cond-source", is_certain=True)
    return numbers


def _check_positions(source: Source, conditions: Source, numbers: Sequence[int], flag: str, *,
                     is_certain: bool = False) -> bool:
    """Returns whether all slices are known to have the positions of their condition images.

    Different positions are an error or, if names alone made the pairs, a doubt.

    Args:
        source: the images. Doubts are added to it.
        conditions: their condition images.
        numbers: the number of the condition image of each image.
        flag: the prefix of errors.
        is_certain: whether names alone made the pairs.

    Raises:
        ValueError: two slices lie apart along the normal.
    """
    pairs = [(name, conditions.names[number])
             for name, number in zip(source.names, numbers, strict=True)]
    gaps = [pairing.distance_mm(source.headers.get(own), conditions.headers.get(other))
            for own, other in pairs]
    apart = [(pair, gap) for pair, gap in zip(pairs, gaps, strict=True)
             if gap is not None and gap > pairing.SAME_POSITION_MM]
    if apart:
        (own, other), gap = apart[0]
        problem = (f"{flag}: {len(apart)} of {len(pairs)} condition images are slices at other "
                   f"positions than their images; the first is {other}, {gap:.6g} mm from {own}")
        if not is_certain:
            raise ValueError(f"{problem}; remove slices that only one side has, or give "
                             "--pair=PATTERN whose groups distinguish each pair from all others")
        source.doubts = [*source.doubts, problem]
    return None not in gaps


def _doubt_order(source: Source, conditions: Source) -> None:
    """Adds a doubt if the numbers in names suggest other pairs than the order does."""
    sides = [[pairing.numbers_of(stem(name)) for name in part.names]
             for part in (source, conditions)]
    found = pairing.common_numbers(*sides)
    if found is None:
        return
    unlike = [i for i, (own, other) in enumerate(zip(*found, strict=True)) if own != other]
    if unlike:
        i = unlike[0]
        source.doubts = [*source.doubts, (
            f"--pair=order: by the numbers in their names, {len(unlike)} of {len(found[0])} images "
            f"have other condition images than by order, which makes {conditions.names[i]} that of "
            f"{source.names[i]}")]


def pair_by_pattern(source: Source, pattern: re.Pattern[str]) -> tuple[Source, Source]:
    """Returns the images of a source, and the condition image of each in the same order.

    The first half of the pattern's groups matches names of conditions, and the second half names of
    images. Names whose groups hold the same text belong together. If there are several, an image
    gets the condition at the same position, or the one with the same numbers in the rest of its
    name. If neither decides, the first condition belongs to the first image, in the order of the
    source. A pattern with a '/' is matched with paths. Others are matched with file names.

    Raises:
        ValueError: a partner is missing or ambiguous, or the source has no files.
    """
    if not source.has_file_names:
        raise ValueError("--pair: needs files, which are paired by name; --channels pairs channels "
                         "of an array, and --pair=order pairs two sources")
    conditions, images, unmatched = _match_halves(source.names, pattern)
    if not conditions and not images:
        raise ValueError(f"--pair: none of {len(unmatched)} names matches, such as "
                         f"{shown_some(unmatched)}")
    _check_halves(source.names, conditions, images, "/" in pattern.pattern)
    pairs, num_by_order, are_certain = [], 0, True
    for text, numbers in images.items():
        others, how = _pairs_in_group(source, pattern, numbers, conditions[text])
        pairs += zip(numbers, others, strict=True)
        num_by_order += len(numbers) if how == "order" else 0
        are_certain = are_certain and how == "groups"
    pairs.sort()
    found, partners = (_part(source, list(side)) for side in zip(*pairs, strict=True))
    found.unmatched = unmatched
    is_known = _check_positions(found, partners, range(len(pairs)), "--pair",
                                is_certain=are_certain)
    if num_by_order and not is_known:
        found.doubts = [*found.doubts, (
            f"--pair: {num_by_order} of {len(pairs)} images have the same text as others and are "
            "paired by order, because no numbers in the rest of their names are the same; check "
            f"that {partners.names[0]} is the condition image of {found.names[0]}")]
    return found, partners


def _pairs_in_group(source: Source, pattern: re.Pattern[str], images: list[int],
                    conditions: list[int]) -> tuple[list[int], str]:
    """Returns the conditions of equally many images with one text, and how they were matched.

    The latter is 'groups', 'numbers' or 'order'.

    Raises:
        ValueError: some have the same numbers, but others have no partner.
    """
    if len(images) == 1:
        return conditions, "groups"
    headers = [source.headers.get(source.names[i]) for i in (*images, *conditions)]
    if all(header and header.position and header.directions for header in headers):
        return conditions, "order"  # by position; positions are compared later
    sides = [[pairing.numbers_of(_rest(pattern, source.names[i])) for i in side]
             for side in (images, conditions)]
    if all(header and header.number is not None for header in headers):
        sides = [[(header.number,) for header in part] for part in (
            headers[:len(images)], headers[len(images):])]
    found = pairing.common_numbers(*sides)
    if found is None:
        return conditions, "order"
    by_number = dict(zip(found[1], conditions, strict=True))
    if missing := [i for i, key in zip(images, found[0], strict=True) if key not in by_number]:
        raise ValueError(
            f"--pair: {len(missing)} of {len(images)} images have no condition image with their "
            f"number, but others have; the first is {source.names[missing[0]]}; remove files that "
            "only one side has, or give two sources and --pair=order")
    return [by_number[key] for key in found[0]], "numbers"


def _rest(pattern: re.Pattern[str], name: str) -> str:
    """Returns the part of a name outside the groups of a pattern, without the extension."""
    text = name if "/" in pattern.pattern else name.rpartition("/")[2]
    match = pattern.search(text)
    held = {i for group in range(1, pattern.groups + 1) for i in range(*match.span(group))}
    return "".join(" " if i in held else text[i] for i in range(len(stem(text))))


_Half = dict[tuple[str | None, ...], list[int]]  # file numbers by the texts in the groups


def _match_halves(names: Sequence[str],
                  pattern: re.Pattern[str]) -> tuple[_Half, _Half, list[str]]:
    """Returns conditions, images, and names that do not match exactly one half of the groups."""
    halves, unmatched, middle = ({}, {}), [], pattern.groups // 2
    for number, name in enumerate(names):
        match = pattern.search(name if "/" in pattern.pattern else name.rpartition("/")[2])
        texts = (match.groups()[:middle], match.groups()[middle:]) if match else ((), ())
        is_found = [any(part is not None for part in text) for text in texts]
        if sum(is_found) == 1:
            which = is_found.index(True)
            halves[which].setdefault(texts[which], []).append(number)
        else:
            unmatched.append(name)
    return *halves, unmatched


def _check_halves(names: Sequence[str], conditions: _Half, images: _Half,
                  sees_folders: bool) -> None:
    """Raises ValueError unless each image has exactly one possible condition per text."""
    unequal = []
    for text in {**images, **conditions}:
        halves = conditions.get(text, []), images.get(text, [])
        shown = repr(text[0] if len(text) == 1 else text)
        if len(halves[0]) != len(halves[1]):
            first = names[min(itertools.chain(*halves))]
            unequal.append(f"{shown} has {len(halves[0])} and {len(halves[1])} ({first})")
        for half in halves:
            folders = sorted({names[number].rpartition("/")[0] for number in half})
            if len(folders) > 1 and not sees_folders:
                raise ValueError(f"--pair: files of {shown} are in {len(folders)} folders, such as "
                                 f"{shown_some(folders)}; give a pattern with a /, which is "
                                 "matched with paths")
    if unequal:
        raise ValueError(
            f"--pair: {len(unequal)} of {len({**images, **conditions})} groups have other numbers "
            f"of conditions than of images: {shown_some(unequal)}; in all there are "
            f"--pair: {len(unequal)} of {len({**images, **conditions})} groups have different "
            f"numbers of conditions and images: {shown_some(unequal)}; in all there are "
            f"{sum(map(len, conditions.values()))} and {sum(map(len, images.values()))}")
def shown_some(texts: Sequence[str]) -> str:
    """Returns the first few texts, and how many more there are."""
    more = f" and {len(texts) - _MAX_SHOWN} more" if len(texts) > _MAX_SHOWN else ""
    return ", ".join(texts[:_MAX_SHOWN]) + more


def _part(source: Source, numbers: Sequence[int]) -> Source:
    """Returns some of the images of a source with names, as a source of their own."""
    part = dataclasses.replace(
        source, num_images=len(numbers), names=[source.names[i] for i in numbers],
        read=lambda own: source.read(numbers[i] for i in own),
        labels=source.labels and (lambda own: source.labels([numbers[i] for i in own])))
    if source.has_folder_classes:
        part.labels, part.class_names, part.note = None, None, ""
        _label_by_folder(part)
    return part


def _opener(path: str | Path, columns: Columns) -> (
        Callable[..., contextlib.AbstractContextManager[Source]] | None):
    if isinstance(path, str):
        return functools.partial(_open_hf, columns=columns)
    name = os.path.basename(os.path.abspath(path)).lower()
    if path.is_dir():
        return _open_lmdb if name.endswith("_lmdb") else \
            functools.partial(_open_folder, columns=columns)
    if name.endswith(table_files.SUFFIX):
        return functools.partial(_open_parquet, columns=columns)
    if name.endswith((".tar.gz", ".tgz")):
        return _open_cifar
    if idx_files.is_images(path.name):
        return functools.partial(_open_idx, columns=columns)
    if is_array(name):
        return _open_array
    if is_npz(name):
        return functools.partial(_open_npz, columns=columns)
    if name.endswith(tensor_files.SUFFIXES):
        return _open_tensor
    return functools.partial(_open_zip, columns=columns) if name.endswith(".zip") else None


def _check_columns(path: str | Path, flag: str, columns: Columns, opener: Callable) -> None:
    """Raises ValueError for choices of columns that do not apply to the source."""
    of_files = (_open_folder, _open_zip)
    function = opener.func if isinstance(opener, functools.partial) else opener
    if columns.file and function not in of_files:
        raise ValueError(f"--labels={columns.file}: {flag}={path} has no file names to match; use "
                         "--labels with a folder or ZIP")
    if (columns.image or columns.labels) and function not in (*of_files, _open_parquet, _open_hf):
        raise ValueError(f"{'--image-column' if columns.image else '--label-column'}: "
                         f"{flag}={path} has no columns; leave it out")


@contextlib.contextmanager
def _open_folder(path: Path, layout: str | None, columns: Columns) -> Iterator[Source]:
    # Sorted by path component: "a/x" before "a-1/x". No name has a zero byte.
    files, order = list_files(path), lambda name: name.replace("/", "\0")
    if tables := _only_tables(files, columns):
        source = _of_table(table_files.open_parquet(path, sorted(tables, key=order), columns))
        found = sort_names(files)
        source.others = [name for name in found.others if name not in tables]
        source.num_hidden = found.num_hidden
        yield source
        return
    source = _of_files(path, files, lambda name: Item(name, path / name),
                       lambda name: (path / name).open("rb"), columns, order)
    if not source.num_images:
        source = _published(path, source.others, columns) or source
    elif source.labels is None and not source.is_dicom:  # even if there is a dataset.json
        _label_by_folder(source)
    yield source


def _of_files(path: Path, files: list[str], item: Callable[[str], Item],
              open_file: Callable[[str], IO[bytes]], columns: Columns,
              order: Callable[[str], str] | None = None) -> Source:
    """Returns the images among the files of a folder or ZIP, with labels of a table or JSON."""
    top = _top(files)
    below = [name[len(top):] for name in files if name.startswith(top)]
    outside = sort_names(name for name in files if not name.startswith(top))
    found = sort_names(below)
    names = [top + name for name in sorted(found.images, key=order)]
    source = Source(
        len(names), names, lambda numbers: (item(names[i]) for i in numbers), top=top,
        has_file_names=True,
        others=[name for name in (*(top + name for name in found.others), *outside.others)
                if name.rpartition("/")[2] not in (LABELS_NAME, GENERATE_RECORD)],
        num_hidden=found.num_hidden + outside.num_hidden,
        num_pictures=found.num_pictures + outside.num_pictures,
        num_conditions=len(found.conditions))
    _add_slices(source, path, item, open_file, order)
    tables = [name for name in source.others
              if name.rpartition("/")[2] in label_tables.METADATA_NAMES]
    if not names and not source.is_dicom:
        return source
    if columns.file:
        _label_by_file(source, path, columns)
    elif LABELS_NAME not in found.others and tables and columns.labels != ():
        _label_by_metadata(source, path, tables, item, columns)
    elif columns.image or columns.labels:
        raise ValueError(f"{'--image-column' if columns.image else '--label-column'}: {path} has "
                         "no table; give one with --labels=FILE.csv")
    elif LABELS_NAME in found.others and columns.labels != ():
        where = f"{path}: {top}{LABELS_NAME}"
        try:
            text = item(top + LABELS_NAME).content()
        except DamagedImageError as error:
            raise ValueError(f"{where}: {error}") from error
        labels = parse_labels(text, where)
        source.labels = labels and _look_up([name[len(top):] for name in source.names], labels,
                                            where)
        source.class_names = parse_class_names(text, where)
    return source


def _add_slices(source: Source, path: Path, item: Callable[[str], Item],
                open_file: Callable[[str], IO[bytes]],
                order: Callable[[str], str] | None) -> None:
    """Makes a source of the DICOM files in a folder or ZIP, if there are any.

    Raises:
        OSError: the package that reads them is missing.
        ValueError: there are other images too, or a file is of an unsupported kind.
    """
    files = {name for name in source.others
             if not name.removeprefix(source.top).startswith(CONDITIONS)
             and dicom_files.is_dicom(name, open_file)}
    if not files:
        return
    dicom_files.require_package(path)
    if source.names:
        raise ValueError(f"{path}: holds {counted(len(files), 'DICOM file')}, such as "
                         f"{min(files)}, and {counted(len(source.names), 'other image')}, such as "
                         f"{source.names[0]}; move one kind to a folder of its own")
    headers, damaged, others = {}, [], set()
    with Progress(len(files), "Reading headers", delay=1) as progress:
        for name in progress.over(sorted(files, key=order)):
            header = _dicom_header(path, name, open_file)
            if header is None:
                damaged.append(name)
            elif header.is_image:
                headers[name] = header
            else:
                others.add(name)
    names, count, source.order = dicom_files.in_order(headers)
    names += damaged  # they are reported when they are converted
    source.names, source.num_images, source.is_dicom = names, len(names), True
    source.others = [name for name in source.others if name not in files or name in others]
    source.read = lambda numbers: (item(names[i])._replace(decode=dicom_files.decode)
                                   for i in numbers)
    source.headers, source.facts = headers, [count]
    inverted = [name for name, header in headers.items() if header.is_shown_inverted]
    if inverted:
        count = counted(len(inverted), "slice is", "slices are")
        source.facts.append(f"{count} MONOCHROME1 (meant to be shown inverted), the first "
                            f"{inverted[0]}; values are kept")


def _dicom_header(path: Path, name: str,
                  open_file: Callable[[str], IO[bytes]]) -> dicom_files.Header | None:
    """Returns the header of a DICOM file, or None if it is damaged."""
    try:
        with open_file(name) as file:
            header = dicom_files.read_header(file)
    except DAMAGE:
        return None
    if header.problem:
        raise ValueError(f"{path}: {name} {header.problem}")
    return header


def _top(files: list[str]) -> str:
    """Returns the folder, '' or ending in '/', that contains all images.

    If a parent of it has a dataset.json, that parent is returned.
    """
    images = sort_names(files).images
    folders = os.path.commonprefix([name.split("/")[:-1] for name in images])
    tops = ["".join(f"{folder}/" for folder in folders[:i]) for i in range(len(folders) + 1)]
    there = set(files)
    return next((top for top in tops if top + LABELS_NAME in there), tops[-1])


def _label_by_folder(source: Source) -> None:
    """Makes the top-level folders classes, if there are at least two."""
    def top(name):
        folder, slash, _ = name[len(source.top):].partition("/")
        return folder if slash else ""

    class_names = sorted(set(map(top, source.names)))
    if len(class_names) < 2:
        return
    numbers = {name: i for i, name in enumerate(class_names)}
    source.labels = lambda own: [numbers[top(source.names[i])] for i in own]
    source.class_names = [name or "top folder" for name in class_names]
    source.has_folder_classes = True
    if {name.lower() for name in class_names} <= table_files.SPLITS:
        source.note = (f"the folders {' and '.join(class_names)} became classes; to convert one of "
                       "them, name it as --source")


def _look_up(names: Sequence[str], labels: dict[str, Any],
             where: str) -> Callable[[Sequence[int]], list[Any]]:
    """Returns a function that looks up and checks the labels of images with these names."""
    def look_up(numbers):
        own = [names[i] for i in numbers]
        label_array(own, labels, where)
        return [labels[name] for name in own]
    return look_up


def _label_by_file(source: Source, path: Path, columns: Columns) -> None:
    """Labels images with the table in `columns`."""
    where = f"--labels={columns.file}"
    if not columns.file.exists():
        raise FileNotFoundError(f"{where}: no such file")
    try:
        text = read_regular(columns.file)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    rows = label_tables.read_rows(text, columns, where, is_json=_is_json(columns.file.name))
    _label_by_rows(source, rows, where)
    if path.is_dir():
        own = os.path.realpath(columns.file)
        source.others = [name for name in source.others if os.path.realpath(path / name) != own]


def _label_by_metadata(source: Source, path: Path, tables: list[str], item: Callable[[str], Item],
                       columns: Columns) -> None:
    """Labels images with the tables among the files, if these hold labels.

    As in Hugging Face's imagefolder, each table applies to the files in and below its folder.
    """
    where = f"{path}: {shown_some(tables)}"
    try:
        parts = [_metadata_rows(path, table, item, columns) for table in tables]
        if any(part.cells.keys() != parts[0].cells.keys() for part in parts):
            raise ValueError(f"{where}: all must have the same label columns")
        if not parts[0].cells:
            source.facts = [*source.facts, f"{shown_some(tables)}: gives no labels, because it has "
                            "no columns file_name and label, class or category; choose others with "
                            "--label-column and --image-column"]
            return
        cells = {name: [cell for part in parts for cell in part.cells[name]]
                 for name in parts[0].cells}
        names = [name for part in parts for name in part.names]
        _label_by_rows(source, label_tables.Rows(names, cells), where)
    except ValueError as error:
        raise ValueError(f"{error}; --label-column=none ignores the table") from error
    source.others = [name for name in source.others if name not in tables]


def _metadata_rows(path: Path, table: str, item: Callable[[str], Item],
                   columns: Columns) -> label_tables.Rows:
    """Returns the rows of a table among the files, with image paths relative to the source."""
    where, folder = f"{path}: {table}", table[:table.rfind("/") + 1]
    try:
        text = item(table).content()
    except DamagedImageError as error:
        raise ValueError(f"{where}: {error}") from error
    rows = label_tables.read_rows(text, columns, where, is_json=_is_json(table), is_metadata=True)
    return rows._replace(names=[folder + name for name in rows.names])


def _is_json(name: str) -> bool:
    return name.lower().endswith(label_tables.JSON_SUFFIXES)


def _label_by_rows(source: Source, rows: label_tables.Rows, where: str) -> None:
    """Labels images with the rows of a table called `where`, and adds a note."""
    labels = label_tables.labels_of(rows.cells, where)
    matched = label_tables.match_rows(source.names, source.top, rows.names, where)
    found = {name: labels.values[row] for name, row in matched.rows.items()
             if labels.values[row] is not None}
    source.facts = [*source.facts, f"labels are column{'s' if len(rows.cells) > 1 else ''} "
                    f"{', '.join(rows.cells)} of {where.removeprefix('--labels=')}{labels.how}"]
    if matched.extra:
        names = "names" if len(matched.extra) == 1 else "name"
        extra = f"{len(matched.extra)} of {len(rows.names)} rows {names} no image, the first " \
                f"{matched.extra[0]}"
        source.facts.append(extra)
        where += f" ({extra})"
    source.labels, source.class_names = _look_up(source.names, found, where), labels.class_names


def _only_tables(files: list[str], columns: Columns) -> list[str]:
    """Returns the names of Parquet files, or [] if there are images too."""
    tables = [name for name in files if name.lower().endswith(table_files.SUFFIX)]
    if not tables or columns.file or sort_names(files).images:
        return []
    return [name for name in sort_names(tables).others if name in set(tables)]


@contextlib.contextmanager
def _open_parquet(path: Path, layout: str | None, columns: Columns) -> Iterator[Source]:
    yield _of_table(table_files.open_parquet(path, [""], columns))


@contextlib.contextmanager
def _open_hf(source: str, layout: str | None, columns: Columns) -> Iterator[Source]:
    yield _of_table(table_files.open_hf(source, columns))


def _of_table(table: table_files.Table) -> Source:
    """Returns the rows of a table as a source of images."""
    def read(numbers):
        numbers = list(numbers)
        for number, content in zip(numbers, table.read(numbers), strict=True):
            yield Item(table.names[number], content)

    source = Source(len(table.names), table.names, read, facts=[table.fact], note=table.note)
    if table.labels:
        labels = {name: label for name, label in zip(table.names, table.labels.values, strict=True)
                  if label is not None}
        source.labels = _look_up(table.names, labels, table.where)
        source.class_names = table.labels.class_names
    return source


@contextlib.contextmanager
def _open_zip(path: Path, layout: str | None, columns: Columns) -> Iterator[Source]:
    def item(name):
        if members[name].flag_bits & _ENCRYPTED:
            raise ValueError(f"{path}: {name} is encrypted; unpack the ZIP first")
        if members[name].compress_type not in _METHODS:
            raise ValueError(f"{path}: {name} has a compression that Python can't read; unpack the "
                             "ZIP first")
        try:
            check_file_size(members[name].file_size)
            return Item(name, archive.read(members[name]))
        except DAMAGE as error:
            return Item(name, DamagedImageError(f"can't be read: {error}"))

    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"--source={path}: is not a ZIP, or is damaged ({error})") from error
    with archive:
        _check_members(path, archive)
        # Some Windows programs write backslashes.
        members = {info.filename.replace("\\", "/"): info
                   for info in archive.infolist() if not info.is_dir()}
        source = _of_files(path, list(members), item, lambda name: archive.open(members[name]),
                           columns)
        has_record = any(name.rpartition("/")[2] == LABELS_NAME for name in members)
        if source.labels is None and not has_record and not source.is_dicom:
            _label_by_folder(source)
        yield source


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises ValueError for links and for names that leave the ZIP or occur twice."""
    for info in archive.infolist():
        if problem := member_problem(info):
            raise ValueError(f"{path}: {info.filename} {problem}")
    if len(archive.NameToInfo) != len(archive.infolist()):
        counts = collections.Counter(info.filename for info in archive.infolist())
        [(name, count)] = counts.most_common(1)
        raise ValueError(f"{path}: {name} occurs {count} times")


@contextlib.contextmanager
def _open_array(path: Path, layout: str | None) -> Iterator[Source]:
    with error_prefix(f"{path}: "):
        stack = array_files.open_stack(path, layout)
    yield _of_stack(len(stack), stack.__getitem__)


@contextlib.contextmanager
def _open_tensor(path: Path, layout: str | None) -> Iterator[Source]:
    with error_prefix(f"{path}: "):
        num, read = tensor_files.open_stack(path, layout)
    yield _of_stack(num, read)


@contextlib.contextmanager
def _open_npz(path: Path, layout: str | None, columns: Columns) -> Iterator[Source]:
    def read(number):
        with error_prefix(f"{path}: "):
            return images.read(number)

    with contextlib.closing(
            Npz(path, layout, with_labels=columns.labels != ())) as images:
        source = _of_stack(len(images), read)
        if images.labels is not None:
            source.labels = lambda own: images.labels[np.asarray(own)].tolist()
        yield source


def _of_stack(num: int, read: Callable[[int], np.ndarray]) -> Source:
    """Returns a source of images [C, H, W] that are read by number."""
    names = [f"image {i}" for i in range(num)]
    return Source(num, names, lambda numbers: (
        Item(names[i], array_files.encode(read(i)), "chw") for i in numbers))


def _of_arrays(arrays: archives.Arrays) -> Source:
    """Returns a source of images in memory."""
    num, expected = len(arrays.images), arrays.expected
    note = "" if expected in (None, num) else \
        f"{arrays.title} is published with {expected} such images, but there are {num}"
    names = [f"image {i}" for i in range(num)]

    def pixels(number):
        image, padding = arrays.images[number], arrays.padding
        return np.pad(image, padding) if padding else image

    return Source(num, names, lambda numbers: (Item(names[i], pixels(i)) for i in numbers),
                  None if arrays.labels is None else
                  lambda own: arrays.labels[np.asarray(own)].tolist(), arrays.class_names,
                  note=note, facts=arrays.facts, label_sets=arrays.label_sets)


def choose_labels(source: Source, name: str) -> None:
    """Sets a source's labels to those of this name in `label_sets`.

    Raises:
        ValueError: there are no such labels.
    """
    if name not in source.label_sets:
        raise ValueError(f"--label-set={name}: the source has no such labels; only CIFAR-100 has "
                         "fine and coarse labels")
    labels, source.class_names = source.label_sets[name]
    source.facts = ()  # they mention the choice that has now been made
    source.labels = lambda own: labels[np.asarray(own)].tolist()


@contextlib.contextmanager
def _open_cifar(path: Path, layout: str | None) -> Iterator[Source]:
    yield _of_arrays(archives.read_cifar(path))


@contextlib.contextmanager
def _open_idx(path: Path, layout: str | None, columns: Columns) -> Iterator[Source]:
    yield _of_arrays(idx_files.read(path, with_labels=columns.labels != ()))


def _published(path: Path, files: Sequence[str], columns: Columns) -> Source | None:
    """Returns the published data set whose files a folder holds, or None if there is none.

    Raises:
        ValueError: there are several.
    """
    folders, sets = archives.find_cifar(files), idx_files.find_images(files)
    if len(folders) + len(sets) > 1:
        there = ", ".join([*(folder.rstrip("/") or "." for folder in folders), *sets])
        raise ValueError(f"{path}: holds {len(folders) + len(sets)} sets of images: {there}; give "
                         f"one of them, such as {path / (sets or folders)[-1]}")
    if folders:
        return _of_arrays(archives.read_cifar_folder(path / folders[0]))
    return _of_arrays(idx_files.read(path / sets[0], with_labels=columns.labels != ())) \
        if sets else None


@contextlib.contextmanager
def _open_lmdb(path: Path, layout: str | None) -> Iterator[Source]:
    with archives.open_lmdb(path) as (num, items):
        # Without labels, no image is skipped before --max-images: the numbers are 0, 1, 2, ...
        yield Source(num, None, lambda numbers: (
            Item(f"{path.name}: {key}", value)
            for _, (key, value) in zip(numbers, items, strict=False)))
