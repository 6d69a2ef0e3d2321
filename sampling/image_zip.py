"""Generated images in one ZIP instead of a folder, for file systems that limit files.

    X.zip                      what a folder of images holds (image_writer.py), uncompressed
    X.zip.parts/               exists while images are being made
        generate.json          as it will be in the ZIP; so is dataset.json
        TTTTT-RRRRR.part       the images that rank R has made in start T, one after another

A part is a ZIP without a central directory. A killed process therefore leaves every image that it
has written, and only the last image may be truncated. The next start writes new parts. At the end,
rank 0 writes a new X.zip from the existing X.zip and the parts, sorted by name, and removes the
parts. X.zip is therefore always complete, and does not depend on the number of ranks or on kills.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dnnlib.atomic import atomic_write, remove_stale, write_json
from dnnlib.cli import describe
from dnnlib.progress import FIRST_LINE_SEC, Progress
from dnnlib.run_lock import LOCK_NAME, run_lock
from dnnlib.stored_zip import Place, StoredZip, places, written_places
from images.image_files import GENERATE_RECORD, LABELS_NAME, PARTS_SUFFIX
from sampling.image_writer import ImageFolder
from torch_utils import distributed

_RECORDS = (GENERATE_RECORD, LABELS_NAME)


class ImageZip(ImageFolder):
    """Images in one ZIP. `path` is the path of the ZIP, and paths of images begin with it."""

    def __init__(self, path: Path, *args, **kwargs):
        super().__init__(path, *args, **kwargs)
        self._records = path.with_name(path.name + PARTS_SUFFIX)
        self._places: dict[str, Place] = {}  # what existed when it was opened
        self._turn = 0

    @contextlib.contextmanager
    def being_filled(self, settings: dict[str, Any]) -> Iterator[None]:
        """Opens the ZIP, and removes records without images afterwards. All ranks must call this.

        Raises:
            ValueError: the ZIP holds images made with other or unknown settings, or another run is
                writing it.
            OSError: the ZIP can't be read, or its folder can't be written.
        """
        with contextlib.ExitStack() as on_exit:
            self._places, self._turn = distributed.run_on_rank0(self._open, settings, on_exit)
            yield

    def _open(self, settings: dict[str, Any], on_exit: contextlib.ExitStack
              ) -> tuple[dict[str, Place], int]:
        """Returns the places of existing files, and the number of this start."""
        self._check_stems()
        if self.path.is_dir():
            raise ValueError(f"--outdir={self.path}: is a folder, but a ZIP of this name would be "
                             "written; name another ZIP")
        self._records.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.enter_context(run_lock(self._records))
            on_exit.callback(self._remove_empty_folder)  # once it is no longer locked
            on_exit.enter_context(held.pop_all())
        on_exit.callback(self._remove_unless_needed)
        self._remove_unless_needed()  # left by a run that was killed before its first image
        remove_stale(self._records)
        zipped = self._zipped()
        self._open_record(settings, zipped)
        labels = self._records / LABELS_NAME
        if LABELS_NAME in zipped and not labels.exists():
            labels.write_bytes(self._read(LABELS_NAME, zipped[LABELS_NAME]))
        turns = [int(part.name.partition("-")[0]) for part in self._parts()]
        return zipped | self._written(), 1 + max(turns, default=0)

    def _open_record(self, settings: dict[str, Any], zipped: dict[str, Place]) -> None:
        """Compares the settings with the records in the ZIP and its parts, and records them."""
        record, text = self._records / GENERATE_RECORD, None
        if GENERATE_RECORD in zipped:
            text = self._read(GENERATE_RECORD, zipped[GENERATE_RECORD])
            self._check_settings(settings, text, f"{self.path}: {GENERATE_RECORD}", self.path)
        elif self.path.exists():
            raise ValueError(f"{self.path}: exists, but holds no {GENERATE_RECORD} that says how "
                             "its images were made; name another --outdir")
        if record.exists():
            self._check_settings(settings, record.read_bytes(), str(record), self._records)
        elif text is not None:
            record.write_bytes(text)
        else:
            write_json(record, settings)

    def finish(self, made: Sequence[int]) -> None:
        """Writes the ZIP, which includes the images of the seeds `made`, and removes the parts.

        Raises:
            OSError: the ZIP can't be written, or the images of another rank are not visible.
            ValueError: a member of the ZIP is damaged and was not made again.
        """
        zipped, written = self._zipped(), self._written()
        unseen = [seed for seed in made if self._name_of(self.image_path(seed)) not in written]
        if unseen:
            raise OSError(f"{self._records}: {len(unseen)} of the {len(made)} images written are "
                          "not visible on the machine of rank 0; run the command again")
        records = {name: (self._records / name).read_bytes() for name in _RECORDS
                   if (self._records / name).exists()}
        is_new = any(self._differs(zipped.get(name), place.read) for name, place in written.items()
                     ) or any(self._differs(zipped.get(name), lambda data=data: data)
                              for name, data in records.items())
        if is_new:
            try:
                self._pack(zipped | written, records)
            except OSError as error:
                raise OSError(f"{self.path}: can't be written ({error.strerror or error}); its "
                              f"images are kept in {self._records}: free space for a second copy "
                              "of them and run the command again") from error
        self._remove()

    def _pack(self, members: dict[str, Place], records: dict[str, bytes]) -> None:
        names = sorted(members | records)
        with atomic_write(self.path) as file, \
                Progress(len(names), f"Packing {self.path.name}", unit="files", delay=1,
                         first_line_sec=FIRST_LINE_SEC) as progress:
            archive = StoredZip(file)
            for name in progress.over(names):
                archive.write(name, records[name] if name in records
                              else self._read(name, members[name]))
            archive.close()

    @staticmethod
    def _differs(place: Place | None, read: Callable[[], bytes]) -> bool:
        """Whether a member of the ZIP is missing, damaged, or not what `read` returns."""
        try:
            return place is None or place.read() != read()
        except ValueError:
            return True

    def _read(self, name: str, place: Place) -> bytes:
        try:
            return place.read()
        except ValueError as error:
            seed = Path(name).stem
            remedy = f"make it again with --seeds={int(seed)}" if seed.isdecimal() \
                else "remove it or name another --outdir"
            raise ValueError(f"{self.path}: {name}: {error}; {remedy}") from error

    def _zipped(self) -> dict[str, Place]:
        """Returns the places of the ZIP's members, or none if there is no ZIP yet."""
        if not self.path.exists():
            return {}
        try:
            return places(self.path)
        except ValueError as error:
            raise ValueError(f"{self.path}: {describe(error)}; remove it or name another --outdir"
                             ) from error

    def _parts(self) -> list[Path]:
        """Returns the parts in the order of starts. A file system may not list new ones yet."""
        own = {self._part(rank) for rank in range(distributed.get_world_size())}
        return sorted({*self._records.glob("*.part"), *filter(Path.exists, own)})

    def _part(self, rank: int) -> Path:
        return self._records / f"{self._turn:05d}-{rank:05d}.part"

    def _written(self) -> dict[str, Place]:
        """Returns the places of the files in the parts. A later file replaces one of its name."""
        return {name: place for part in self._parts()
                for name, place in written_places(part).items()}

    def _names(self) -> list[str]:
        return list({**self._zipped(), **self._written(), GENERATE_RECORD: None})

    def _name_of(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _is_there(self, path: Path) -> bool:
        return self._name_of(path) in self._places

    def _content(self, path: Path) -> bytes:
        if not self._is_there(path):
            raise FileNotFoundError(f"{path}: does not exist")
        return self._places[self._name_of(path)].read()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Path, bytes], None]]:
        """Yields a thread-safe function that adds a file to this rank's part."""
        with contextlib.ExitStack() as on_exit:
            part = _Part(self._part(distributed.get_rank()), on_exit)
            yield lambda path, data: part.write(self._name_of(path), data)

    def _remove_unless_needed(self) -> None:
        if not self._written():
            self._remove()

    def _remove(self) -> None:
        """Removes the parts first and then the records that describe them."""
        for path in (*self._parts(), *(self._records / name for name in _RECORDS)):
            path.unlink(missing_ok=True)

    def _remove_empty_folder(self) -> None:
        with contextlib.suppress(OSError):  # another run is using it, or has removed it
            if [path.name for path in self._records.iterdir()] == [LOCK_NAME]:
                (self._records / LOCK_NAME).unlink()
                self._records.rmdir()


class _Part:
    """A part, which is created with its first image. Each image is written to the file at once."""

    def __init__(self, path: Path, on_exit: contextlib.ExitStack):
        self._path, self._on_exit, self._lock = path, on_exit, threading.Lock()
        self._file = self._archive = None

    def write(self, name: str, data: bytes) -> None:
        with self._lock:
            if self._file is None:
                file = open(self._path, "xb")  # noqa: SIM115 - closed on exit
                self._file = self._on_exit.enter_context(file)
                self._archive = StoredZip(self._file)
            self._archive.write(name, data)
            self._file.flush()
