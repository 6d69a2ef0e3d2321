"""How the command-line scripts report mistakes: one line, an exit code, no traceback."""

import contextlib
import functools
import io
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from dnnlib import console, signals
from dnnlib.util import CACHE_DIR_ENV, cache_dir

BAD_INPUT, BAD_USAGE, DIVERGED = 1, 2, 3
HELP_NAMES = {"help_option_names": ["-h", "--help"]}
CONTEXT = {"max_content_width": 100, "show_default": True, **HELP_NAMES}  # of click commands
_MAX_FLOAT32 = 1e38  # largest value allowed; float32 ends soon after
_KIND_NAMES = {int: "whole numbers", float: "numbers"}
_KILLED = re.compile(r"killed by signal: (\w[\w ]*)")
# What PyTorch says of a lost or silent process of the group: gloo, its store, NCCL.
_LOST = re.compile(r"gloo|connection (closed|reset|was)|timed out|nccl|socket|broken pipe", re.I)


# How OpenMP's threads wait for each other, read when PyTorch is imported: they spin for a moment,
# then sleep. By default they spin for milliseconds, and if another program holds a core, the thread
# that they wait for gets none meanwhile (docs/performance.md).
_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
_RANK0_SEC = 10  # for rank 0 to show an error of all ranks; torchrun looks every 5 s or less
_COMPILED_ENV = "TORCHINDUCTOR_CACHE_DIR"  # where PyTorch keeps what it compiles


class UserError(click.ClickException):
    """An error of one line for the user.

    Under torchrun, rank 0 shows it while there is no process group. In a process group
    (torch_utils/distributed.py), the first rank that raises it shows it, even if others raise it
    too; `should_print` says whether this rank does. With `every_rank`, every process under torchrun
    that raises it shows it. `hint` is a second line that says what to do.
    """

    def __init__(self, message: str, exit_code: int = BAD_INPUT, every_rank: bool = False, *,
                 hint: str = ""):
        super().__init__(" ".join(message.split()))
        self.exit_code, self.every_rank, self._hint = exit_code, every_rank, hint
        self.should_print: bool | None = None

    def show(self, file=None) -> None:
        """Prints 'Error: ...' to stderr."""
        alone = self.every_rank or console.is_rank0()
        if alone if self.should_print is None else self.should_print:
            super().show(file)
            if self._hint:
                click.echo(self._hint, file=file, err=True)


def run(main: click.Command) -> None:
    """Runs the command of a script, with signals handled as in dnnlib/signals.py."""
    signals.install()
    if not _OPENMP.keys() & os.environ.keys():
        os.environ.update(_OPENMP)
    if _COMPILED_ENV not in os.environ:
        _set_variable(_COMPILED_ENV, _compiled_dir())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # some consoles lack most of Unicode
            stream.reconfigure(errors="backslashreplace")
    if not console.is_rank0():  # they are about the code, which is the same on every rank
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    try:
        sys.argv[1:] = map(_expand_home, sys.argv[1:])
        main() if console.is_rank0() else _run_on_other_rank(main)
    except signals.Stopped:
        if console.is_rank0():
            click.echo("Stopped by a signal", err=True)
        raise
    except Exception as error:  # a bug: its traceback is shown once, not by every rank
        if getattr(error, "should_print", None) is False:
            sys.exit(BAD_INPUT)
        raise


def _compiled_dir() -> str | None:
    """Returns the cache folder for compiled code; None if it can't be written.

    PyTorch then chooses a folder of its own. It fails if it can't make the folder that it is given,
    even if it compiles nothing.
    """
    try:
        folder = cache_dir("compiled")
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError:
        return None
    writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    return str(folder) if writable else None


def check_compiled_dir() -> None:
    """Makes the folder for compiled code; if that fails, lets PyTorch choose another one.

    Commands that compute call it before PyTorch asks for the folder.
    """
    folder = os.environ.get(_COMPILED_ENV)
    if folder is not None and folder == _compiled_dir():  # not one that the user has chosen
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError:  # full, out of inodes, over a quota
            _set_variable(_COMPILED_ENV, None)


def _set_variable(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def _expand_home(arg: str) -> str:
    """Returns an argument with its ~ expanded, if a shell has left one, as in --name=~/path."""
    name, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    if not value.startswith("~"):
        return arg
    expanded = os.path.expanduser(value)
    if expanded == value and value.partition("/")[0] != "~":
        return arg  # there is no user of this name
    if expanded == value:
        UserError(f"{arg}: this user has no home directory; give the full path",
                  BAD_USAGE).show()
        sys.exit(BAD_USAGE)
    return f"{name}{equals}{expanded}"


def _run_on_other_rank(main: click.Command) -> None:
    """Runs a command as click does, but leaves errors that rank 0 also has for rank 0 to show."""
    try:
        main(standalone_mode=False)
    except click.ClickException as error:
        if isinstance(error, UserError) and (error.every_rank or error.should_print is not None):
            error.show()
        else:  # torchrun ends this process meanwhile if rank 0 has ended
            time.sleep(_RANK0_SEC)
            click.echo(f"Error: rank {os.environ['RANK']}: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(BAD_INPUT)


def verbosity_options(function: Callable) -> Callable:
    """Adds --quiet and --verbose to the function of a click command."""
    @functools.wraps(function)
    def speaking(*args, quiet: bool, verbose: bool, **kwargs):
        if quiet and verbose:
            raise UserError("--quiet and --verbose: choose one", BAD_USAGE)
        with console.speaking(quiet=quiet, verbose=verbose):
            return function(*args, **kwargs)
    speaking = click.option("--verbose", is_flag=True,
                            help="Also print processes, devices and timings.")(speaking)
    return click.option("--quiet", is_flag=True,
                        help="Print only results, warnings and errors.")(speaking)


def cache_dir_option(function: Callable) -> Callable:
    """Adds --cache-dir to a click command: where the cache is while the command runs."""
    return click.option("--cache-dir", metavar="DIR", expose_value=False, callback=_use_cache_dir,
                        help="Folder for packed data, downloads, statistics and compiled code.  "
                        f"[default: ${CACHE_DIR_ENV}, else ~/.cache/pfgmpp]")(function)


def _use_cache_dir(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    folder = os.path.abspath(value)
    if not value or (os.path.exists(folder) and not os.path.isdir(folder)):
        raise click.BadParameter(f"{value!r}: must name a folder, which is made if needed")
    for name in (CACHE_DIR_ENV, _COMPILED_ENV):
        ctx.call_on_close(functools.partial(_set_variable, name, os.environ.get(name)))
    chosen_by_user = os.environ.get(_COMPILED_ENV) != _compiled_dir()
    os.environ[CACHE_DIR_ENV] = folder  # loader processes inherit it
    if not chosen_by_user:
        _set_variable(_COMPILED_ENV, _compiled_dir())


@contextlib.contextmanager
def user_errors(exit_code: int = BAD_INPUT) -> Iterator[None]:
    """Turns ValueError and OSError, which are about the user's input, into UserError.

    The same holds for what PyTorch raises when memory runs out, a data loader process is killed or
    another rank is gone. If a signal has ended the work, such errors only follow from it, and
    `Stopped` is raised instead.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our output has gone; click ends quietly
    except (ValueError, OSError) as error:
        signals.raise_again()
        shown = UserError(describe(error), exit_code)
        shown.should_print = getattr(error, "should_print", None)
        raise shown from error
    except (RuntimeError, MemoryError) as error:
        signals.raise_again()
        shown = _machine_error(error)
        if shown is None:
            raise
        if shown.every_rank:  # otherwise each rank words the loss of another differently
            shown.should_print = getattr(error, "should_print", None)
        raise shown from error


def _machine_error(error: Exception) -> UserError | None:
    """Returns the error to show for one of PyTorch that the machine causes; None for others."""
    text = f"{error} {error.__cause__}"
    if "DataLoader worker" in text:
        killed = _KILLED.search(text)
        return UserError(f"a data loader process was killed ({killed[1] if killed else error}), "
                         "perhaps because memory ran out; use fewer --workers", every_rank=True)
    if type(error).__name__ == "OutOfMemoryError":
        return UserError("out of GPU memory; use a smaller --batch-gpu in training or --batch "
                         f"elsewhere ({str(error).split('.')[0]})", every_rank=True)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return UserError("out of memory; use a smaller --batch-gpu in training or --batch "
                         "elsewhere, and fewer --workers", every_rank=True)
    if "RANK" in os.environ and (_LOST.search(text) or type(error).__name__.startswith("Dist")):
        return UserError("lost another process of this run: it has ended, or it did not answer in "
                         f"time; its own messages say why ({str(error)[:200]})")
    return None


def describe(error: Exception) -> str:
    """Returns an error's message, without an errno number before it."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    return error.strerror if error.filename is None else \
        f"{error.filename or repr('')}: {error.strerror}"


@contextlib.contextmanager
def flag_errors(flag: str, path: str | os.PathLike, remedy: str = "") -> Iterator[None]:
    """Puts '--flag=path: ' before a ValueError or OSError about that file or folder.

    Args:
        flag: the flag that names it.
        path: as it was given.
        remedy: what to do, for errors that don't say so.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        text = describe(error)
        for prefix in (f"{path}: ", f"{Path(path)}: "):
            text = text.removeprefix(prefix)
        more = f"; {remedy}" if remedy and ";" not in text else ""
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{flag}={path}: {text}{more}") from error


def shown_name(name: str) -> str:
    """Returns a name for a message: as it is, or in ASCII if it would not be one plain line."""
    return name if name.isprintable() and name else ascii(name)


class Range(click.ParamType):
    """LO,HI with LO < HI, both finite; becomes a pair of numbers."""

    name = "range"

    def convert(self, value, param, ctx):
        """Returns a tuple of two floats."""
        if isinstance(value, tuple):
            return value
        low, high = two_numbers(value)
        if not -_MAX_FLOAT32 <= low < high <= _MAX_FLOAT32:
            self.fail(f"{value!r}: must be LO,HI with LO < HI, such as -1024,3071", param, ctx)
        return low, high


class Window(click.ParamType):
    """CENTER,WIDTH of a display window, with a width above 0; becomes a pair of numbers."""

    name = "window"

    def convert(self, value, param, ctx):
        """Returns a tuple of two floats."""
        if isinstance(value, tuple | list):  # of a preset or a run's options
            return tuple(value)
        center, width = two_numbers(value)
        if not (abs(center) <= _MAX_FLOAT32 and 0 < width <= _MAX_FLOAT32):
            self.fail(f"{value!r}: must be a center and a width above 0, such as 40,400", param,
                      ctx)
        return center, width


def two_numbers(text: str) -> tuple[float, float]:
    """Returns two numbers with a comma between them; NaN for anything else."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        return math.nan, math.nan
    return first, second


class IntList(click.ParamType):
    """Comma-separated integers and ranges a-b, in the order given; `unique` drops repetitions.

    `empty` is the word for an empty list, if that is allowed.
    """

    name = "list"

    def __init__(self, unique: bool = True, *, empty: str | None = None):
        self._unique, self._empty = unique, empty

    def convert(self, value, param, ctx):
        """Returns a tuple of integers."""
        if isinstance(value, tuple):
            return value
        if value == self._empty:
            return ()
        numbers: list[int] = []
        try:
            for item in str(value).split(","):
                first, dash, last = item.strip().partition("-")
                start = int(first)
                stop = int(last) if dash else start
                if stop < start or stop - start > 10**8:
                    raise ValueError
                numbers.extend(range(start, stop + 1))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers and ranges such as 0,5,10-19",
                      param, ctx)
        return tuple(dict.fromkeys(numbers) if self._unique else numbers)


class NameList(click.ParamType):
    """Comma-separated names out of `names`, each once; an empty text has none."""

    name = "list"

    def __init__(self, names: Sequence[str]):
        self._names = names

    def convert(self, value, param, ctx):
        """Returns a tuple of names."""
        found = value if isinstance(value, tuple) else tuple(
            dict.fromkeys(filter(None, value.split(","))))
        if unknown := [name for name in found if name not in self._names]:
            self.fail(f"{unknown[0]!r} is not one of {', '.join(self._names)}", param, ctx)
        return found


class FiniteNumber(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value, param, ctx):
        """Returns the number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class NumberList(click.ParamType):
    """Comma-separated numbers of a `kind`, int or float, each once, in the order given."""

    name = "list"

    def __init__(self, kind: type, least: float, most: float = math.inf):
        self._kind, self._least, self._most = kind, least, most

    def convert(self, value, param, ctx):
        """Returns a tuple of numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(map(self._kind, str(value).split(",")))
        except ValueError:
            numbers = ()
        most = "" if math.isinf(self._most) else f" and at most {self._most:g}"
        if not numbers or not all(self._least <= number <= self._most and number < math.inf
                                  for number in numbers):
            self.fail(f"{value!r} is not a list of {_KIND_NAMES[self._kind]}, each at least "
                      f"{self._least:g}{most}", param, ctx)
        return tuple(dict.fromkeys(numbers))
