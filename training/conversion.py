"""From a folder or ZIP of any images to a data set: gray or RGB PNGs of one size, with labels.

Each image is turned upright, made 8-bit gray or RGB, cropped and resized as asked, and stored as
an uncompressed PNG under its number; `dataset.json` with the labels comes last. Everything past
reading is a pure function of one image's bytes, so the result does not depend on the number of
worker processes. No PyTorch is needed.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import PIL.Image
from tqdm import tqdm

from torch_utils.atomic import atomic_write
from training.image_files import DAMAGE, LABELS_NAME, label_array, parse_labels

T = TypeVar("T")
R = TypeVar("R")

_MAX_FILE_BYTES = 1 << 30  # one image file, unpacked from its ZIP
_WINDOW = 8  # images in flight per worker
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a ZIP can hold: equal images, equal files



@dataclasses.dataclass
class Source:
    """Images to convert: their names in order, their labels by name, and how to read them."""

    names: list[str]
    read: Callable[[str], bytes]
    labels: dict[str, Any] | None = None
    labels_file: str | None = None  # where the labels were read; None if they are folder names
    class_names: list[str] | None = None
    num_others: int = 0  # files that aren't images


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Opens what `--source` names.

    Raises:
        OSError: it isn't there or can't be read.
        ValueError: it is of no supported kind, or malformed.
    """
    if not path.exists():
        raise FileNotFoundError(f"--source={path}: no such file or folder")
    kind = "folder" if path.is_dir() else path.suffix.lower()
    if kind not in _OPENERS:
        raise ValueError(f"--source={path}: not supported; allowed: {', '.join(_OPENERS)}")
    with _OPENERS[kind](path) as source:
        if not source.names:
            raise ValueError(f"--source={path}: no images found")
        yield source


@contextlib.contextmanager
def _open_folder(path: Path) -> Iterator[Source]:
    def refuse(error):
        raise error

    def read(name):
        _check_file_size(name, (path / name).stat().st_size)
        return (path / name).read_bytes()

    files = []
    for folder, _, names in os.walk(path, onerror=refuse):
        inside = Path(folder).relative_to(path)
        files += [(inside / name).as_posix() for name in names]
    files.sort(key=lambda name: name.split("/"))
    source = _source(path, files, read)
    if source.labels is None:
        top = {name: name.split("/")[0] if "/" in name else "" for name in source.names}
        class_names = sorted(set(top.values()))
        if len(class_names) > 1:
            numbers = {name: i for i, name in enumerate(class_names)}
            source.labels = {name: numbers[folder] for name, folder in top.items()}
            source.class_names = class_names
    yield source


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[Source]:
    def read(name):
        _check_file_size(name, archive.getinfo(name).file_size)
        try:
            return archive.read(name)
        except DAMAGE as error:
            raise ValueError(f"{path}: {name} can't be read: {error}") from error

    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"--source={path}: not a ZIP, or a damaged one ({error})") from error
    with archive:
        files = sorted(info.filename for info in archive.infolist() if not info.is_dir())
        for name, count in collections.Counter(files).items():
            slashed = PurePosixPath(name.replace("\\", "/"))
            if slashed.is_absolute() or ".." in slashed.parts or re.match("[A-Za-z]:", name):
                raise ValueError(f"{path}: {name} leads out of the ZIP")
            if count > 1:
                raise ValueError(f"{path}: {name} is there {count} times")
        yield _source(path, files, read)


def _source(path: Path, files: list[str], read: Callable[[str], bytes]) -> Source:
    """Returns the images among `files`, with labels from dataset.json where there are any."""
    PIL.Image.init()  # fills EXTENSION
    names = [name for name in files
             if os.path.splitext(name)[1].lower() in PIL.Image.EXTENSION]
    source = Source(names, read, num_others=len(files) - len(names))
    if LABELS_NAME in files:
        source.num_others -= 1
        where = f"{path}: {LABELS_NAME}"
        source.labels = parse_labels(read(LABELS_NAME), where)
        source.labels_file = where if source.labels else None
    return source


def _check_file_size(name: str, size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise ValueError(f"{name}: {size} bytes are more than the {_MAX_FILE_BYTES} allowed")


_OPENERS = {"folder": _open_folder, ".zip": _open_zip}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How every image is converted."""

    transform: str | None
    size: tuple[int, int] | None  # width, height
    background: tuple[int, int, int]
    first_frame: bool


class Converted(NamedTuple):
    """One image: its PNG, or None where the transform leaves it out."""

    png: bytes | None
    kind: tuple[str, int, int] | None  # mode, width, height
    was_cmyk: bool


def convert_image(item: tuple[str, bytes], settings: Settings) -> Converted:
    """Returns one image as a PNG.

    Args:
        item: its name, for errors, and the bytes of its file.
        settings: how to convert it.

    Raises:
        ValueError: naming the image: it is damaged, or of a kind that isn't converted.
    """
    name, data = item
    image, was_cmyk = _decode(name, data, settings)
    image = _TRANSFORMS[settings.transform](image, settings.size)
    if image is None:
        return Converted(None, None, was_cmyk)
    image.info.clear()  # colour profiles and the like
    png = io.BytesIO()
    image.save(png, format="png", compress_level=0, optimize=False)
    return Converted(png.getvalue(), (image.mode, *image.size), was_cmyk)


def _decode(name: str, data: bytes, settings: Settings) -> tuple[PIL.Image.Image, bool]:
    """Returns the image upright in mode L or RGB, and whether it was CMYK."""
    import PIL.ImageOps

    bombs = (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(io.BytesIO(data))
        # MPO is a photograph with a preview behind it, not an animation.
        is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
        if not is_animated or settings.first_frame:
            image = PIL.ImageOps.exif_transpose(image)
    except bombs as error:
        raise ValueError(f"{name}: more pixels than the {PIL.Image.MAX_IMAGE_PIXELS} "
                         "allowed") from error
    except DAMAGE as error:
        problem = "not an image" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise ValueError(f"{name}: can't be read: {problem}") from error
    if is_animated and not settings.first_frame:
        raise ValueError(f"{name}: has several frames; --first-frame takes the first")
    try:
        return _to_8bit(image, settings.background), image.mode == "CMYK"
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _to_8bit(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    """Returns the image as L or RGB.

    Transparent images are composited on `background` and gray ones stay gray if it is gray. Of 16
    bits the upper 8 are kept, as Pillow does on its own for RGB; 1 bit becomes 0 and 255.
    """
    mode = image.mode
    if mode in ("LA", "PA", "RGBA", "RGBa") or (mode in ("1", "L", "P", "RGB")
                                                and "transparency" in image.info):
        return _composite(image, background)
    if mode in ("L", "RGB"):
        return image
    if mode == "1":
        return image.convert("L")
    if mode in ("P", "CMYK", "YCbCr", "RGBX"):
        return image.convert("RGB")
    if mode in ("I", "I;16", "I;16L", "I;16B") and "transparency" not in image.info:
        return _upper_byte(image)
    raise ValueError(f"mode {mode} isn't supported; convert it to RGB")


def _composite(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    canvas = PIL.Image.new("RGBA", image.size, (*background, 255))
    rgb = PIL.Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    is_gray = image.mode in ("1", "L", "LA") and len(set(background)) == 1
    return rgb.getchannel("R") if is_gray else rgb


def _upper_byte(image: PIL.Image.Image) -> PIL.Image.Image:
    import numpy as np
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError("values beyond 16 bits aren't supported")
    return PIL.Image.fromarray((pixels >> 8).astype(np.uint8))


def _resize(image: PIL.Image.Image, size: tuple[int, int] | None) -> PIL.Image.Image:
    """Returns the image at `size` whatever its aspect, untouched if it has that size."""
    if size is None or image.size == size:
        return image
    return image.resize(size, PIL.Image.Resampling.LANCZOS)


def _center_crop(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """Returns the largest central square as RGB, resized."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return _resize(image.crop((left, top, left + side, top + side)).convert("RGB"), size)


def _center_crop_wide(image: PIL.Image.Image,
                      size: tuple[int, int]) -> "PIL.Image.Image | None":
    """Returns the central rows at the aspect of `size` as RGB, resized, on a black square.

    None for an image that would have to be enlarged.
    """
    width, height = image.size
    rows = round(size[0] * height / width)  # half to even, as EDM rounds
    if width < size[0] or rows < size[1]:
        return None
    top = (height - rows) // 2
    band = _resize(image.crop((0, top, width, top + rows)).convert("RGB"), size)
    canvas = PIL.Image.new("RGB", (size[0], size[0]))
    canvas.paste(band, (0, (size[0] - size[1]) // 2))
    return canvas


_TRANSFORMS = {None: _resize, "center-crop": _center_crop, "center-crop-wide": _center_crop_wide}


def select_images(source: Source, max_images: int | None,
                  classes: list[int] | None) -> tuple[list[str], list[Any] | None]:
    """Returns the names to convert and their new labels, or None without labels.

    Raises:
        ValueError: the labels aren't of one valid kind, or have none of the `classes`.
    """
    names = source.names[:max_images]
    if source.labels is None:
        if classes:
            raise ValueError("--classes: the source has no labels")
        return names, None
    if source.labels_file:
        label_array(names, source.labels, source.labels_file)
    labels = [source.labels[name] for name in names]
    if classes is None:
        return names, labels
    if isinstance(labels[0], list):
        raise ValueError("--classes: the source's labels are vectors, not classes")
    present = set(labels)
    for number in classes:
        if number not in present:
            raise ValueError(f"--classes: no image has class {number}; there are "
                             f"{min(present)}..{max(present)}")
    numbers = {old: new for new, old in enumerate(classes)}
    kept = [(name, numbers[label]) for name, label in zip(names, labels, strict=True)
            if label in numbers]
    return [name for name, _ in kept], [label for _, label in kept]


@dataclasses.dataclass
class Outcome:
    """What a conversion wrote and what it left out."""

    entries: list[tuple[str, Any]] = dataclasses.field(default_factory=list)  # name, label
    kind: tuple[str, int, int] | None = None  # mode, width, height
    too_small: list[str] = dataclasses.field(default_factory=list)  # names in the source
    cmyk: list[str] = dataclasses.field(default_factory=list)


def convert_all(source: Source, names: list[str], labels: list[Any] | None, settings: Settings,
                write: Callable[[str, bytes], None], workers: int) -> Outcome:
    """Converts and writes `names`, then dataset.json."""
    outcome, first = Outcome(), None
    items = ((name, source.read(name)) for name in names)
    function = functools.partial(convert_image, settings=settings)
    with contextlib.closing(_ordered_map(function, items, min(workers, len(names)))) as results:
        bar = tqdm(results, total=len(names), unit="img", disable=None, leave=False)
        for i, result in enumerate(bar):
            if result.was_cmyk:
                outcome.cmyk.append(names[i])
            if result.png is None:
                outcome.too_small.append(names[i])
                continue
            if first is None:
                first, outcome.kind = names[i], result.kind
            _check_kind(names[i], result.kind, first, outcome.kind)
            name = f"{i // 1000:05d}/img{i:08d}.png"
            write(name, result.png)
            outcome.entries.append((name, labels[i] if labels else None))
    if not outcome.entries:
        raise ValueError(f"all {len(names)} images are smaller than --resolution; "
                         "--transform=center-crop enlarges")
    write(LABELS_NAME, json.dumps({"labels": outcome.entries if labels else None}).encode())
    return outcome


def _check_kind(name: str, kind: tuple[str, int, int], first: str,
                first_kind: tuple[str, int, int]) -> None:
    mode, width, height = kind
    if kind != first_kind:
        raise ValueError("{} is {} {}x{}, but {} is {} {}x{}; --transform=center-crop with "
                         "--resolution makes all alike".format(name, *kind, first, *first_kind))
    if width != height:
        raise ValueError(f"{name} is {width}x{height} and must be square: give --resolution, "
                         "with --transform=center-crop to keep the aspect")


def _ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yields function(item) in order, computed by processes that are a bounded window ahead."""
    if workers == 1:
        yield from map(function, items)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    pending = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > _WINDOW * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed, perhaps for want of memory; "
                      "try --workers=1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent and makes this process end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def open_dest(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Yields a function that writes a file by name; `path` appears when the block ends well.

    An earlier ZIP is replaced, an earlier folder must be empty.

    Raises:
        OSError: the destination can't be written, or is there already.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = _write_zip if path.suffix.lower() == ".zip" else _write_folder
    with opener(path) as write:
        yield write


@contextlib.contextmanager
def _write_zip(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    def write(name, data):
        info = zipfile.ZipInfo(name, _ZIP_DATE)
        info.external_attr = 0o644 << 16
        archive.writestr(info, data)

    if path.is_dir():
        raise IsADirectoryError(f"--dest={path}: is a folder")
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        yield write


@contextlib.contextmanager
def _write_folder(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    def write(name, data):
        (tmp / name).parent.mkdir(exist_ok=True)
        (tmp / name).write_bytes(data)

    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"--dest={path}: is there already and not an empty folder")
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tmp.mkdir()
    try:
        yield write
        tmp.rename(path)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
