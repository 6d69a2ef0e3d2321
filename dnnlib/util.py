"""Attribute dictionaries, downloads, a log file beside the console, formatting, and checks."""

import hashlib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlparse

from dnnlib.atomic import atomic_write, remove_stale
from dnnlib.progress import Progress

CACHE_DIR_ENV = "PFGMPP_CACHE_DIR"
_CHUNK_BYTES = 1 << 20
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
_CLAUSES = re.compile(r""": |, ['"(]+|\w+\(['"]""")  # what separates the clauses of an error
_HTML_STARTS = (b"<!doctype html", b"<html")


class EasyDict(dict):
    """A dict whose keys are also attributes: `d.x` is `d['x']`."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, key: str) -> Any:
        if key not in self:
            raise AttributeError(f"no key {key!r}")
        return self[key]

    def __delattr__(self, key: str) -> None:
        if self.pop(key, self) is self:
            raise AttributeError(f"no key {key!r}")


class Logger:
    """Also writes everything printed to stdout and stderr to a file, until closed.

    Use it as a context manager. Printing never raises an error: what can't be written to the file
    or the console (a full disk, a reader that has gone) is lost, with one warning.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._file: IO[bytes] | None = open(path, "ab", buffering=0)  # noqa: SIM115 - by close()
        self._stdout, self._stderr = _Tee(self, sys.stdout), _Tee(self, sys.stderr)
        sys.stdout, sys.stderr = self._stdout, self._stderr
        self._has_warned = False

    def write_file(self, text: str) -> None:
        """Appends `text` only to the file."""
        if self._file is None:
            return
        try:
            self._file.write(text.encode(errors="replace"))
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True  # first: the console may be full too
                self._stderr.write_console(f"Warning: {self._path} not written: {error}\n")

    def close(self) -> None:
        """Restores stdout and stderr and closes the file."""
        sys.stdout, sys.stderr = self._stdout.detach(), self._stderr.detach()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


class _Tee(io.TextIOBase):
    """One of the two streams that a Logger copies; progress bars only reach the console."""

    def __init__(self, logger: Logger, stream: IO[str]):
        self._logger, self._stream = logger, stream
        self._has_warned = False

    def write(self, text: str) -> int:
        self.write_console(text)
        if "\r" not in text:
            self._logger.write_file(text)
        return len(text)

    def write_log(self, text: str) -> None:
        """Writes `text` only to the file."""
        self._logger.write_file(text)

    def write_console(self, text: str) -> None:
        """Writes `text` only to the stream."""
        self._on_console(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._on_console(self._stream.flush)

    def detach(self) -> IO[str]:
        """Returns the stream; drops what can't be written, so that Python does not fail at exit."""
        if not self._on_console(self._stream.flush):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        return self._stream

    def _on_console(self, function: Callable[[], object]) -> bool:
        """Calls `function`; returns whether the stream could be written."""
        try:
            function()
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                self._logger.write_file(f"Warning: console not written: {error}\n")
            return False
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def format_time(seconds: float) -> str:
    """Returns a duration as '12s', '3m 04s', '5h 06m 07s' or '2d 03h 04m'."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 60 * 60:
        return f"{s // 60}m {s % 60:02}s"
    if s < 24 * 60 * 60:
        return f"{s // (60 * 60)}h {s // 60 % 60:02}m {s % 60:02}s"
    return f"{s // (24 * 60 * 60)}d {s // (60 * 60) % 24:02}h {s // 60 % 60:02}m"


def scaled(value: float, digits: int = 4) -> str:
    """Returns a number with a metric prefix, such as '42.79 G' for 42.79e9; a unit may follow."""
    power = 0
    while power < len(_PREFIXES) - 1 and float(f"{value / 1e3**power:.{digits}g}") >= 1000:
        power += 1
    return f"{value / 1e3**power:.{digits}g} {_PREFIXES[power]}"


def shown_bytes(count: int) -> str:
    """Returns a size as '16.1 GB'."""
    return f"{scaled(count, 3)}B"


def counted(number: int, one: str, several: str = "") -> str:
    """Returns '1 image' or '2 images'; `several` is the plural, by default `one` with an s."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def format_ranges(numbers: Iterable[int]) -> str:
    """Returns integers as text such as '0,5,10-19', in rising order, each once."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)


def format_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Returns rows of text in columns; those whose numbers are in `left` are left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(
        cell.ljust(width) if i in left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)


def json_value(value: Any, infinity: str | None = "inf") -> Any:
    """Returns plain data with NaN and infinities, which JSON lacks, replaced by `infinity`."""
    if isinstance(value, dict):
        return {key: json_value(item, infinity) for key, item in value.items()}
    return infinity if isinstance(value, float) and not math.isfinite(value) else value


def require(ok: object, problem: str, allowed: str = "") -> None:
    """Raises ValueError unless `ok`: '{problem}', or '{problem}: must be {allowed}'."""
    if not ok:
        raise ValueError(f"{problem}: must be {allowed}" if allowed else problem)


def shown(value: Any) -> str:
    """Returns a short text for any value from a file, as one line of ASCII."""
    if type(value) is str:
        return ascii(value if len(value) <= 80 else value[:77] + "...")
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    return f"a {type(value).__name__}"


def cache_dir(*parts: str) -> Path:
    """Returns a folder for downloads and packed data: $PFGMPP_CACHE_DIR or ~/.cache/pfgmpp.

    Raises:
        OSError: neither is known, as in a container whose user has no entry in /etc/passwd.
    """
    root = os.environ.get(CACHE_DIR_ENV)
    try:
        base = Path(root).expanduser() if root else Path.home() / ".cache" / "pfgmpp"
    except RuntimeError as error:
        raise OSError("this user has no home directory for the cache; set the environment variable "
                      f"{CACHE_DIR_ENV} to a folder") from error
    return base.joinpath(*parts)


def is_url(text: str) -> bool:
    """Says whether `text` is an http(s) URL."""
    return urlparse(str(text)).scheme in ("http", "https")


def file_sha256(path: str | os.PathLike) -> str:
    """Returns the sha256 of a file, which is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def open_url(url: str, sha256: str | None = None, *, verbose: bool = True) -> IO[bytes]:
    """Opens a local file or an http(s) URL for reading in binary.

    Downloads are kept in the cache folder and appear there only when complete and as expected; an
    interrupted download starts again. If no hash is expected, that of the first download is kept in
    a file .sha256 beside it. The file is compared with it whenever it is opened, and so are later
    downloads.

    Args:
        url: a path or a URL; a URL may end in '#sha256:HEX', which pins its content.
        sha256: the expected hash of the whole file, or None for no check.
        verbose: whether to show a progress bar on a terminal.

    Raises:
        OSError: the file or URL can't be read, or its hash is not the expected one.
    """
    if not is_url(url):
        if "://" in str(url):
            raise OSError(f"{url}: only http and https URLs and local files can be opened")
        return open(url, "rb")
    advice = "" if sha256 else "; try again, or download it by other means and give its path"
    url, _, pin = url.partition("#sha256:")
    sha256 = (sha256 or pin or "").lower() or None
    name = re.sub(r"[^\w.-]", "_", unquote(os.path.basename(urlparse(url).path))) or "download"
    key = hashlib.sha256(f"{url} {sha256}".encode()).hexdigest()[:16]
    target = cache_dir("downloads") / f"{key}_{name}"
    record = target.with_name(f"{target.name}.sha256")
    first = record.read_text().strip() if sha256 is None and record.is_file() else None
    if not target.is_file():
        try:
            found = _download(url, target, sha256 or first, verbose)
        except _FailedRequestError as error:
            raise OSError(f"{error}{advice}") from error
        if sha256 is None and first is None:
            with atomic_write(record) as file:
                file.write(f"{found}\n".encode())
    elif first and file_sha256(target) != first:
        raise OSError(f"{target}: is not the file that was downloaded from {url}, whose hash is in "
                      f"{record.name}; remove it to download it again")
    return open(target, "rb")


class _FailedRequestError(OSError):
    """A URL could not be downloaded."""


def _download(url: str, target: Path, sha256: str | None, verbose: bool) -> str:
    """Downloads a URL to `target`; returns the file's sha256."""
    import requests  # late: commands that download nothing start faster

    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target.parent)
    try:
        with requests.get(url, stream=True, timeout=30) as reply, atomic_write(target) as file:
            reply.raise_for_status()
            found = _receive(reply, url, file, verbose)
            if sha256 is not None and found != sha256:
                raise OSError(f"{url}: sha256 is {found}, expected {sha256}")
            return found
    except requests.exceptions.InvalidURL as error:
        raise OSError(f"{url}: not a valid address") from error
    except requests.RequestException as error:
        raise _FailedRequestError(f"{url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Returns why a request failed: the status, or the last clause of the error.

    The clauses before that repeat the URL and name the exceptions that requests and urllib3 wrap.
    """
    reply = getattr(error, "response", None)
    if reply is not None:
        return f"{reply.status_code} {reply.reason}".strip()
    clause = _CLAUSES.split(" ".join(str(error).split()))[-1].rstrip("'\")")
    clause += ")" * (clause.count("(") - clause.count(")"))
    return clause or type(error).__name__


def _receive(reply, url: str, file: IO[bytes], verbose: bool) -> str:
    """Writes the body of a reply to `file`; returns its sha256."""
    expected = None  # unknown if the body is compressed in transit
    if "Content-Encoding" not in reply.headers and "Content-Length" in reply.headers:
        expected = int(reply.headers["Content-Length"])
    digest, received = hashlib.sha256(), 0
    with Progress(expected, os.path.basename(file.name), unit="B", is_scaled=True,
                  is_shown=verbose) as progress:
        for chunk in reply.iter_content(_CHUNK_BYTES):
            if received == 0 and chunk.lstrip()[:15].lower().startswith(_HTML_STARTS):
                raise OSError(f"{url}: returned a web page instead of a file; download it by hand")
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            progress.update(len(chunk))
    if expected is not None and received != expected:
        raise OSError(f"{url}: received {received} of {expected} bytes")
    return digest.hexdigest()
