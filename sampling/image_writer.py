"""A folder of generated images: its names, its record of settings, what is missing, the writers.

    DIR/generate.json            the settings that all images of the folder share
    DIR/dataset.json             the label of each image, for networks with labels
    DIR/[SSS000/]SSSSSS.png      the image of a seed, in a subfolder per thousand if asked
    DIR/[SSS000/]SSSSSS.npy      the same, [C, H, W], where no PNG holds it
    DIR/NAME.png|npy             instead, where images are named after the inputs they are made of
    DIR/std/...npy               the deviation of samples, float32, where images are means of some

Every file appears under its name only when complete, so that a run that was killed is continued by
running it again. Two runs may fill one folder at the same time: what both make is the same.
"""

import concurrent.futures
import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dnnlib.atomic import atomic_write, remove_stale, write_json
from dnnlib.progress import FIRST_LINE_SEC, Progress
from images import array_files, pictures
from images.image_files import (
    ARRAY_SUFFIX,
    CONDITIONS,
    DEVIATIONS,
    GENERATE_RECORD,
    LABELS_NAME,
    PICTURES,
    list_files,
    parse_json,
    parse_labels,
    read_regular,
    sort_names,
)
from sampling.folders import image_name
from torch_utils import distributed

# What None stands for in a record, so that a default that is spelled out is no other setting.
_UNSET = {"solver": "heun", "order": 3, "discretization": "edm", "schedule": "linear",
          "scaling": "none"}
_NOT_IN_OLD_RECORDS = ("network", "gnet_network", "class_counts", "empty_class_numbers")
_LABELS_AT_ONCE = 256  # seeds whose labels are drawn together
_IMAGE = "[0-9]" * 6 + "*"  # the name of an image, but for its extension


class ImageFolder:
    """Where the images of one network and one setting of the sampler go.

    Images of 1 or 3 channels become PNGs if they are 8-bit. All others become .npy files, of uint8
    or float32.

    Args:
        path: the folder.
        shape: (channels, height, width) of all images, or what returns it for a seed.
        subdirs: make a subfolder per thousand seeds.
        is_8bit: whether they are.
        stems: the names of the images by seed, without extensions and in place of numbers.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int] | Callable[[int], tuple],
                 subdirs: bool, is_8bit: bool = True, stems: Sequence[str] | None = None):
        self.path, self._subdirs, self._stems = path, subdirs, stems
        self._records, self._made = path, set()  # where the records are; folders that are there
        self._shape_of = shape if callable(shape) else lambda _: shape
        self._dtype = np.dtype("uint8" if is_8bit else "float32")
        self.has_arrays = not is_8bit or self._shape_of(0)[0] not in (1, 3)

    def open(self, settings: dict[str, Any]) -> bool:
        """Makes the folder and records `settings`, plain JSON data; returns whether it did.

        They may be recorded already. Unfinished files of a killed run are removed.

        Raises:
            ValueError: the folder holds images made with other or unknown settings.
            OSError: it can't be made or written.
        """
        self._check_stems()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--outdir={self.path}: a file, but a folder is needed; name another")
        self.path.mkdir(parents=True, exist_ok=True)
        # Before looking for the record, which is older than the images.
        image = self._any_image() or self._any_of_stems()
        record = self.path / GENERATE_RECORD
        if image and not record.exists():
            raise ValueError(f"{self.path} holds {image} but no {GENERATE_RECORD}, which says how "
                             "images were made; name another --outdir")
        for folder in (self.path, *self.path.glob("**/*/")):
            remove_stale(folder)
        if not record.exists():
            with contextlib.suppress(FileExistsError):  # another run was faster
                write_json(record, settings, replace=False)
                return True
        self._check_settings(settings, record.read_bytes(), str(record), self.path)
        return False

    def _check_stems(self) -> None:
        """Raises ValueError for an image that would be taken for something else."""
        reserved = f"{DEVIATIONS}/", f"{PICTURES}/", CONDITIONS
        for stem in self._stems or ():
            if stem.startswith(reserved):
                raise ValueError(f"{stem}: an image of this name would be taken for one of the "
                                 f"pictures that this writes to {stem.split('/')[0]}/; rename the "
                                 "folder, or number the images by --seeds")

    @staticmethod
    def _check_settings(settings: dict[str, Any], text: bytes, name: str, where: Path) -> None:
        """Raises ValueError unless the record `text`, called `name`, is of the same settings."""
        there = parse_json(text, name)
        if not isinstance(there, dict):
            raise ValueError(f"{name}: not a record of settings; remove it or name another "
                             "--outdir")
        for key in {**settings, **there}:  # some are recorded only where they are used
            if key in ("nfe", "not_finite"):  # follow from the others, and older folders lack them
                continue
            if key in _NOT_IN_OLD_RECORDS and key not in there:
                continue
            now, then = (_UNSET.get(key) if record.get(key) is None else record[key]
                         for record in (settings, there))
            if now != then and key == "weights":
                raise ValueError(f"{where} holds images of another network (its weights have "
                                 f"sha256 {str(then)[:8]}..., these {now[:8]}...); name another "
                                 "--outdir or remove it")
            if now != then:
                raise ValueError(f"{where} holds images of another setting ({key}: {then} "
                                 f"there, {now} now); name another --outdir or remove it")

    @contextlib.contextmanager
    def being_filled(self, settings: dict[str, Any]) -> Iterator[None]:
        """Opens the folder; every rank must call it. After an error it is withdrawn if new.

        Raises:
            ValueError: as for `open`.
            OSError: likewise.
        """
        is_new = distributed.run_on_rank0(self.open, settings)
        try:
            yield
        except BaseException:
            if is_new and distributed.get_rank() == 0:
                self.withdraw()
            raise

    def finish(self, made: Sequence[int]) -> None:
        """Gives the images of the seeds `made` their place, where it was another one until now."""

    def withdraw(self) -> None:
        """Removes the record, and the folder, if no image has been made to which it belongs."""
        if self._any_image() or self._any_of_stems():
            return
        (self.path / GENERATE_RECORD).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is something else in it
            self.path.rmdir()

    def _any_image(self) -> str | None:
        """Returns the name of a file in the folder that has the form of an image's, if any."""
        pattern = f"[0-9]*/{_IMAGE}" if self._subdirs else _IMAGE
        path = next((path for suffix in (".png", ARRAY_SUFFIX)
                     for path in self.path.glob(pattern + suffix)), None)
        return path and path.relative_to(self.path).as_posix()

    def _any_of_stems(self) -> str | None:
        """Returns the name of an image in the folder that is named as an input is, if any."""
        return next((self.image_path(seed).relative_to(self.path).as_posix()
                     for seed in range(len(self._stems or ())) if self.image_path(seed).exists()),
                    None)

    def image_path(self, seed: int) -> Path:
        """Returns the name of the image of a seed."""
        return self.path / self._name(seed, ARRAY_SUFFIX if self.has_arrays else ".png")

    def deviation_path(self, seed: int) -> Path:
        """Returns the name of the deviations of a seed's image that is a mean."""
        return self.path / DEVIATIONS / self._name(seed, ARRAY_SUFFIX)

    def _name(self, seed: int, extension: str) -> str:
        if self._stems is not None:
            return f"{self._stems[seed]}{extension}"
        return image_name(seed, subdirs=self._subdirs, extension=extension)

    def missing(self, seeds: Sequence[int], *, deviations: bool = False) -> list[int]:
        """Returns those of `seeds` that have no whole image of the right shape yet.

        With `deviations` these must be there too. Every rank must call it, looks at a share, and
        gets the same answer.

        Raises:
            OSError: a rank has ended.
        """
        own = seeds[distributed.get_rank()::distributed.get_world_size()]
        found = distributed.run_by(distributed.get_rank(), self._missing_here, own, deviations)
        lost = {seed for part in distributed.gather_objects(found) for seed in part}
        return [seed for seed in seeds if seed in lost]

    def _missing_here(self, seeds: Sequence[int], deviations: bool) -> list[int]:
        """Returns what `missing` does, found by this process alone.

        Files are read and checksums computed by threads, which do not wait for each other there.
        """
        there = [seed for seed in seeds if self._is_there(self.image_path(seed))]
        world, whole = distributed.get_world_size(), set()
        pool = concurrent.futures.ThreadPoolExecutor(distributed.own_cores())
        try:
            with Progress(len(there) * world, f"Verifying {self.path.name}", delay=1,
                          first_line_sec=FIRST_LINE_SEC) as progress:
                for seed, is_whole in zip(there, pool.map(
                        lambda seed: self._is_whole(seed, deviations), there), strict=True):
                    whole |= {seed} if is_whole else set()
                    progress.update(world)
        finally:
            pool.shutdown(cancel_futures=True)
        return [seed for seed in seeds if seed not in whole]

    def _is_there(self, path: Path) -> bool:
        return path.exists()

    def _content(self, path: Path) -> bytes:
        """Returns a file of the folder; raises OSError or ValueError where it can't be read."""
        return read_regular(path)

    def _names(self) -> list[str]:
        """Returns the names of all files of the folder."""
        return list_files(self.path)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Path, bytes], None]]:
        """Yields a function that writes a file of the folder, which threads may call."""
        yield self._write

    def _write(self, path: Path, data: bytes) -> None:
        if path.parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(path.parent)
        with atomic_write(path, sync=False) as file:
            file.write(data)

    def record_not_finite(self, seeds: Sequence[int]) -> None:
        """Adds seeds to those that generate.json says have values that are not finite."""
        path = self._records / GENERATE_RECORD
        record = parse_json(path.read_bytes(), str(path))
        record["not_finite"] = sorted({*record.get("not_finite", ()), *seeds})
        write_json(path, record)

    def record_labels(self, made: dict[int, Any], labels_of: Callable[[list[int]], list[Any]],
                      class_names: Sequence[str] = ()) -> None:
        """Writes dataset.json, with a label for each image of the folder.

        Args:
            made: labels by seed of the images that this run has made.
            labels_of: returns the labels of other seeds.
            class_names: what the classes are called.
        """
        path = self._records / LABELS_NAME
        names = sort_names(self._names()).images
        if self._stems is not None:
            there = set(names)
            seeds = {seed: name for seed in range(len(self._stems)) if (
                name := self.image_path(seed).relative_to(self.path).as_posix()) in there}
        else:
            numbered = [(Path(name).stem, name) for name in names]
            seeds = {int(stem): name for stem, name in numbered
                     if stem.isascii() and stem.isdecimal()
                     and self.path / name == self.image_path(int(stem))}
        there = {}
        with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged
            there = parse_labels(path.read_bytes(), str(path)) or {}
        labels = {seed: there[name] for seed, name in seeds.items() if name in there} | made
        unknown = sorted(seeds.keys() - labels.keys())
        for first in range(0, len(unknown), _LABELS_AT_ONCE):
            some = unknown[first:first + _LABELS_AT_ONCE]
            labels |= zip(some, labels_of(some), strict=True)
        entries = [[seeds[seed], labels[seed]] for seed in sorted(seeds)]
        content = {"labels": entries} | ({"class_names": list(class_names)} if class_names else {})
        with atomic_write(path) as file:
            file.write(json.dumps(content).encode())

    def _is_whole(self, seed: int, deviations: bool) -> bool:
        shape = self._shape_of(seed)
        try:
            if deviations:
                self._check_array(self.deviation_path(seed), shape, np.dtype("float32"))
            if self.has_arrays:
                self._check_array(self.image_path(seed), shape, self._dtype)
                return True
            return pictures.png_shape(self._content(self.image_path(seed))) == shape
        except (OSError, ValueError):
            return False

    def _check_array(self, path: Path, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        """Raises OSError or ValueError unless the file is an array of this shape and type."""
        if array_files.decode(self._content(path))[1] != array_files.array_format(shape, dtype):
            raise ValueError("of another shape or type")


class ImageWriter:
    """Encodes and writes images in threads, at most one batch behind the sampler."""

    def __init__(self, folder: ImageFolder):
        self._folder, self._end = folder, contextlib.ExitStack()
        self._put = self._end.enter_context(folder.writing())
        self._pool = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8))
        self._pending: list[concurrent.futures.Future] = []

    def write(self, seeds: list[int], images: np.ndarray,
              deviations: np.ndarray | None = None) -> None:
        """Takes images [B, C, H, W]; returns when those of the previous call are on disk.

        Images that are means come with their deviations, of the same shape.

        Raises:
            OSError: an image of this or the previous call could not be written.
        """
        self._wait()
        paths = [(self._folder.image_path(seed), self._folder.deviation_path(seed))
                 for seed in seeds]
        self._pending = [self._pool.submit(self._write_one, *one) for one in zip(
            paths, images, [None] * len(seeds) if deviations is None else deviations, strict=True)]

    def _write_one(self, paths: tuple[Path, Path], image: np.ndarray, deviation: np.ndarray | None
                   ) -> None:
        if deviation is not None:  # first, for an image without it would be made again
            self._put(paths[1], array_files.encode(deviation))
        self._put(paths[0], self._encoded(image))

    def _encoded(self, image: np.ndarray) -> bytes:
        if self._folder.has_arrays:
            return array_files.encode(image)
        pixels, file = image.transpose(1, 2, 0), io.BytesIO()
        picture = PIL.Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        picture.save(file, "PNG")
        return file.getvalue()

    def _wait(self) -> None:
        for future in self._pending:
            future.result()
        self._pending = []

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, *exc_info) -> None:
        with self._end:
            try:
                self._wait()
            finally:
                self._pool.shutdown()
