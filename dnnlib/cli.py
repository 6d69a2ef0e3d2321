"""How the command-line scripts speak of mistakes: one line, an exit code, no traceback."""

import contextlib
import math
import os
import re
from collections.abc import Iterator

import click

BAD_INPUT, BAD_USAGE, DIVERGED = 1, 2, 3
_KIND_NAMES = {int: "whole numbers", float: "numbers"}
_KILLED = re.compile(r"killed by signal: (\w[\w ]*)")


class UserError(click.ClickException):
    """One line for the user; printed by rank 0 alone under torchrun."""

    def __init__(self, message: str, exit_code: int = BAD_INPUT):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code

    def show(self, file=None) -> None:
        """Prints 'Error: ...' to stderr."""
        if int(os.environ.get("RANK", "0")) == 0:
            super().show(file)


@contextlib.contextmanager
def user_errors(exit_code: int = BAD_INPUT) -> Iterator[None]:
    """Turns ValueError and OSError, which speak of the user's input, into UserError.

    And PyTorch's RuntimeError about a data loader process that was killed, which comes wherever
    this process happens to be.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our output has gone; click ends quietly
    except (ValueError, OSError) as error:
        raise UserError(describe(error), exit_code) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        killed = _KILLED.search(f"{error} {error.__cause__}")
        raise UserError(f"a data loader process was killed ({killed[1] if killed else error}), "
                        "perhaps for want of memory; use fewer --workers") from error


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
