"""A folder of generated images: file names, recorded settings, missing images, and writing.

    DIR/generate.json            the settings that all images of the folder share
    DIR/dataset.json             the label of each image, for networks with labels
    DIR/[SSS000/]SSSSSS.png      the image of a seed, optionally in a subfolder per thousand
    DIR/[SSS000/]SSSSSS.npy      the same as an array [C, H, W], if a PNG can't hold it
    DIR/NAME.png|npy             the same, if images are named after the inputs they are made from
    DIR/std/...npy               standard deviation of the samples, float32, if images are means

A file gets its name only when it is complete, so running a killed command again continues it. Two
runs may fill one folder at the same time, because both produce identical images.
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

# The default that None stands for in a record. Spelling out a default does not change a setting.
_UNSET = {"solver": "heun", "order": 3, "discretization": "edm", "schedule": "linear",
          "scaling": "none"}
_NOT_IN_OLD_RECORDS = ("network", "gnet_network", "class_counts", "empty_class_numbers")
_LABELS_AT_ONCE = 256  # seeds whose labels are drawn together
_IMAGE = "[0-9]" * 6 + "*"  # the name of an image without its extension


class ImageFolder:
    """The folder for the images of one network with one setting of the sampler.

    8-bit images of 1 or 3 channels become PNGs. All others become .npy files of uint8 or float32.

    Args:
        path: the folder.
        shape: (channels, height, width) of all images, or a function that returns it for a seed.
        subdirs: make a subfolder per thousand seeds.
        is_8bit: whether the images are 8-bit.
        stems: names of the images by seed, without extensions, used instead of numbers.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int] | Callable[[int], tuple],
                 subdirs: bool, is_8bit: bool = True, stems: Sequence[str] | None = None):
        self.path, self._subdirs, self._stems = path, subdirs, stems
        self._records, self._made = path, set()  # folder of the records; folders that exist
        self._shape_of = shape if callable(shape) else lambda _: shape
        self._dtype = np.dtype("uint8" if is_8bit else "float32")
        self.has_arrays = not is_8bit or self._shape_of(0)[0] not in (1, 3)

    def open(self, settings: dict[str, Any]) -> bool:
        """Makes the folder and records `settings`, which are plain JSON data.

        Returns False if they were recorded already. Unfinished files of a killed run are removed.

        Raises:
            ValueError: the folder holds images made with other or unknown settings.
            OSError: the folder can't be made or written.
        """
        self._check_stems()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--outdir={self.path}: is a file; name a folder instead")
        self.path.mkdir(parents=True, exist_ok=True)
        # Images are looked for before the record, because the record is always written first.
        image = self._any_image() or self._any_of_stems()
        record = self.path / GENERATE_RECORD
        if image and not record.exists():
            raise ValueError(f"{self.path} holds {image}, but no {GENERATE_RECORD} that says how "
                             "its images were made; name another --outdir")
        for folder in (self.path, *self.path.glob("**/*/")):
            remove_stale(folder)
        if not record.exists():
            with contextlib.suppress(FileExistsError):  # another run was faster
                write_json(record, settings, replace=False)
                return True
        self._check_settings(settings, record.read_bytes(), str(record), self.path)
        return False

    def _check_stems(self) -> None:
        """Raises ValueError for an image name that is reserved for other files."""
        reserved = f"{DEVIATIONS}/", f"{PICTURES}/", CONDITIONS
        for stem in self._stems or ():
            if stem.startswith(reserved):
                raise ValueError(f"{stem}: an image of this name would be confused with the files "
                                 f"that are written to {stem.split('/')[0]}/; rename the folder, "
                                 "or number the images with --seeds")

    @staticmethod
    def _check_settings(settings: dict[str, Any], text: bytes, name: str, where: Path) -> None:
        """Raises ValueError unless the record `text`, called `name`, has the same settings."""
        there = parse_json(text, name)
        if not isinstance(there, dict):
            raise ValueError(f"{name}: not a record of settings; remove it or name another "
                             "--outdir")
        for key in {**settings, **there}:  # some are recorded only if they are used
            if key in ("nfe", "not_finite"):  # these follow from the others; old records lack them
                continue
            if key in _NOT_IN_OLD_RECORDS and key not in there:
                continue
            now, then = (_UNSET.get(key) if record.get(key) is None else record[key]
                         for record in (settings, there))
            if now != then and key == "weights":
                raise ValueError(f"{where} holds images of another network (the sha256 of its "
                                 f"weights is {str(then)[:8]}..., now it is {now[:8]}...); remove "
                                 "it or name another --outdir")
            if now != then:
                raise ValueError(f"{where} holds images made with another setting ({key}: {then} "
                                 f"there, {now} now); remove it or name another --outdir")

    @contextlib.contextmanager
    def being_filled(self, settings: dict[str, Any]) -> Iterator[None]:
        """Opens the folder, and removes it after an error if it is new. All ranks must call this.

        Raises:
            ValueError: see `open`.
            OSError: see `open`.
        """
        is_new = distributed.run_on_rank0(self.open, settings)
        try:
            yield
        except BaseException:
            if is_new and distributed.get_rank() == 0:
                self.withdraw()
            raise

    def finish(self, made: Sequence[int]) -> None:
        """Moves the images of the seeds `made` to their final place, unless they are there."""

    def withdraw(self) -> None:
        """Removes the record, and the folder if it is empty, unless an image has been made."""
        if self._any_image() or self._any_of_stems():
            return
        (self.path / GENERATE_RECORD).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder holds other files
            self.path.rmdir()

    def _any_image(self) -> str | None:
        """Returns the name of a file that is named like an image by its seed, or None."""
        pattern = f"[0-9]*/{_IMAGE}" if self._subdirs else _IMAGE
        path = next((path for suffix in (".png", ARRAY_SUFFIX)
                     for path in self.path.glob(pattern + suffix)), None)
        return path and path.relative_to(self.path).as_posix()

    def _any_of_stems(self) -> str | None:
        """Returns the name of an existing image that is named after an input, or None."""
        return next((self.image_path(seed).relative_to(self.path).as_posix()
                     for seed in range(len(self._stems or ())) if self.image_path(seed).exists()),
                    None)

    def image_path(self, seed: int) -> Path:
        """Returns the path of a seed's image."""
        return self.path / self._name(seed, ARRAY_SUFFIX if self.has_arrays else ".png")

    def deviation_path(self, seed: int) -> Path:
        """Returns the path of the standard deviations of a seed's image, if that is a mean."""
        return self.path / DEVIATIONS / self._name(seed, ARRAY_SUFFIX)

    def _name(self, seed: int, extension: str) -> str:
        if self._stems is not None:
            return f"{self._stems[seed]}{extension}"
        return image_name(seed, subdirs=self._subdirs, extension=extension)

    def missing(self, seeds: Sequence[int], *, deviations: bool = False) -> list[int]:
        """Returns the seeds that have no complete image of the right shape yet.

        With `deviations`, the array of deviations must be complete, too. All ranks must call this.
        Each verifies a share of the images, and all get the same answer.

        Raises:
            OSError: another rank has ended.
        """
        own = seeds[distributed.get_rank()::distributed.get_world_size()]
        found = distributed.run_by(distributed.get_rank(), self._missing_here, own, deviations)
        lost = {seed for part in distributed.gather_objects(found) for seed in part}
        return [seed for seed in seeds if seed in lost]

    def _missing_here(self, seeds: Sequence[int], deviations: bool) -> list[int]:
        """Does the work of `missing` in this process.

        Threads read files and compute checksums, which releases the GIL.
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
        """Returns the content of a file. Raises OSError or ValueError if it can't be read."""
        return read_regular(path)

    def _names(self) -> list[str]:
        """Returns the names of all files in the folder."""
        return list_files(self.path)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Path, bytes], None]]:
        """Yields a thread-safe function that writes a file of the folder."""
        yield self._write

    def _write(self, path: Path, data: bytes) -> None:
        if path.parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(path.parent)
        with atomic_write(path, sync=False) as file:
            file.write(data)

    def record_not_finite(self, seeds: Sequence[int]) -> None:
        """Adds seeds to the list in generate.json of images with values that are not finite."""
        path = self._records / GENERATE_RECORD
        record = parse_json(path.read_bytes(), str(path))
        record["not_finite"] = sorted({*record.get("not_finite", ()), *seeds})
        write_json(path, record)

    def record_labels(self, made: dict[int, Any], labels_of: Callable[[list[int]], list[Any]],
                      class_names: Sequence[str] = ()) -> None:
        """Writes dataset.json with a label for each image in the folder.

        Args:
            made: the labels, by seed, of the images made in this run.
            labels_of: returns the labels of other seeds.
            class_names: names of the classes.
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
        with contextlib.suppress(OSError, ValueError):  # it does not exist yet, or is damaged
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
            raise ValueError("has another shape or type")


class ImageWriter:
    """Encodes and writes images in threads, at most one batch behind the sampler."""

    def __init__(self, folder: ImageFolder):
        self._folder, self._end = folder, contextlib.ExitStack()
        self._put = self._end.enter_context(folder.writing())
        self._pool = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8))
        self._pending: list[concurrent.futures.Future] = []

    def write(self, seeds: list[int], images: np.ndarray,
              deviations: np.ndarray | None = None) -> None:
        """Takes images [B, C, H, W]. Returns when those of the previous call are on disk.

        Images that are means come with their standard deviations, which have the same shape.

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
        if deviation is not None:  # written first: an image without it would be made again
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
