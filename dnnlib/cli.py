"""How the command-line scripts speak of mistakes: one line, an exit code, no traceback."""

import contextlib
import math
import os
import re
from collections.abc import Iterator

import click

from dnnlib import signals

BAD_INPUT, BAD_USAGE, DIVERGED = 1, 2, 3
_KIND_NAMES = {int: "whole numbers", float: "numbers"}
_KILLED = re.compile(r"killed by signal: (\w[\w ]*)")
# What PyTorch says of a lost or silent process of the group: gloo, its store, NCCL.
_LOST = re.compile(r"gloo|connection (closed|reset|was)|timed out|nccl|socket|broken pipe", re.I)


class UserError(click.ClickException):
    """One line for the user.

    Args:
        message: the line.
        exit_code: of the process.
        every_rank: printed by every process under torchrun that has it, not by rank 0 alone.
        hint: a second line, what to do.
    """

    def __init__(self, message: str, exit_code: int = BAD_INPUT, every_rank: bool = False, *,
                 hint: str = ""):
        super().__init__(" ".join(message.split()))
        self.exit_code, self._every_rank, self._hint = exit_code, every_rank, hint

    def show(self, file=None) -> None:
        """Prints 'Error: ...' to stderr."""
        if self._every_rank or int(os.environ.get("RANK", "0")) == 0:
            super().show(file)
            if self._hint:
                click.echo(self._hint, file=file, err=True)


def run(main: click.Command) -> None:
    """Runs a script: its command, with signals met as in dnnlib/signals.py."""
    signals.install()
    try:
        main()
    except signals.Stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            click.echo("Stopped by a signal", err=True)
        raise


@contextlib.contextmanager
def user_errors(exit_code: int = BAD_INPUT) -> Iterator[None]:
    """Turns ValueError and OSError, which speak of the user's input, into UserError.

    And what PyTorch raises when memory runs out, a data loader process is killed or another rank
    is gone. All of these follow from a signal where one has ended the work that goes on here.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our output has gone; click ends quietly
    except (ValueError, OSError) as error:
        signals.raise_again()
        raise UserError(describe(error), exit_code) from error
    except (RuntimeError, MemoryError) as error:
        signals.raise_again()
        told = _machine_error(error)
        if told is None:
            raise
        raise told from error


def _machine_error(error: Exception) -> UserError | None:
    """Returns the line for an error of PyTorch's that is the machine's; None for any other."""
    text = f"{error} {error.__cause__}"
    if "DataLoader worker" in text:
        killed = _KILLED.search(text)
        return UserError(f"a data loader process was killed ({killed[1] if killed else error}), "
                         "perhaps for want of memory; use fewer --workers", every_rank=True)
    if type(error).__name__ == "OutOfMemoryError":
        return UserError("out of GPU memory; use a smaller --batch-gpu in training, --batch "
                         f"elsewhere ({str(error).split('.')[0]})", every_rank=True)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return UserError("out of memory; use a smaller --batch-gpu in training, --batch elsewhere, "
                         "and fewer --workers", every_rank=True)
    if "RANK" in os.environ and (_LOST.search(text) or type(error).__name__.startswith("Dist")):
        return UserError("lost another process of this run: it has ended, or it did not answer in "
                         f"time; its own messages say why ({str(error)[:200]})")
    return None


def describe(error: Exception) -> str:
    """Returns the error's own words, without an errno number before them."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename or repr('')}: {error.strerror}"
    return str(error)


class IntList(click.ParamType):
    """Comma-separated integers and ranges a-b, in the order given.

    Args:
        unique: drop what was there before.
    """

    name = "list"

    def __init__(self, unique: bool = True):
        self._unique = unique

    def convert(self, value, param, ctx):
        """Returns a tuple of integers."""
        if isinstance(value, tuple):
            return value
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


class NumberList(click.ParamType):
    """Comma-separated numbers within a range, in the order given, each once.

    Args:
        kind: int or float.
        least: the smallest allowed.
        most: the largest allowed.
    """

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
