"""A user's Python file that adds parts to registries: --plugin=FILE.

The file is run once, as a module of its own, when the command line is read. It is run before other
flags are checked, so that these can name what it has added. Only the command line can name the
file; checkpoints and recorded options can't.
"""

import hashlib
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from dnnlib.cli import BAD_INPUT, BAD_USAGE, UserError, describe
from dnnlib.progress import stage
from dnnlib.registry import names_of, registries
from dnnlib.signals import Stopped


class Plugin(NamedTuple):
    """A file that was run."""

    path: str  # as it was given
    sha256: str

    @property
    def flag(self) -> str:
        """The flag by which another command runs it too."""
        return f"--plugin={self.path}"


_loaded: dict[Path, Plugin] = {}


def load_plugin(path: str) -> Plugin:
    """Runs a Python file, unless this process has already run it with the same content.

    Raises:
        UserError: it can't be read or compiled, raises an exception (whose traceback is shown from
            the file on), or replaces a part of the program.
    """
    place = Path(path).resolve()
    try:
        source = place.read_bytes()
        code = compile(source, str(place), "exec", dont_inherit=True)
    except OSError as error:
        text = describe(error).removeprefix(f"{place}: ")
        raise UserError(f"--plugin={path}: {text}; name a Python file", BAD_USAGE) from error
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        raise UserError(f"--plugin={path}: not valid Python{where} "
                        f"({getattr(error, 'msg', error)})", BAD_USAGE) from error
    plugin = Plugin(path, hashlib.sha256(source).hexdigest())
    known = _loaded.get(place)
    if known is None or known.sha256 != plugin.sha256:
        if known is not None:
            _take_back(known)
        before = {id(registry): dict(registry) for registry in registries()}
        with stage(f"Running {place.name}"):
            _run(code, plugin, place)
        _take_note(plugin, before)
        _loaded[place] = plugin
    return plugin


def _run(code: types.CodeType, plugin: Plugin, place: Path) -> None:
    """Runs the code of a plugin as a module."""
    module = types.ModuleType(f"_plugin_{place.stem}_{plugin.sha256[:8]}")
    module.__file__ = str(place)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        exec(code, vars(module))
    except Stopped:  # by a signal
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        shown = error.with_traceback(_from_file(error.__traceback__, str(place)))
        raise UserError(f"--plugin={plugin.path}: {type(error).__name__}: {error}", BAD_INPUT,
                        hint="".join(traceback.format_exception(shown)).rstrip()) from error


def _from_file(trace: types.TracebackType | None, file: str) -> types.TracebackType | None:
    """Returns the part of a traceback that begins in a file."""
    while trace is not None and trace.tb_frame.f_code.co_filename != file:
        trace = trace.tb_next
    return trace


def _take_note(plugin: Plugin, before: dict[int, dict]) -> None:
    """Records which parts a plugin has added.

    Raises:
        UserError: it has replaced one of the program's own.
    """
    for registry in registries():
        if replaced := registry.replaced():
            for name in registry.added:
                del registry[name]
            registry.update(registry.own)
            raise UserError(f"--plugin={plugin.path}: replaces the {registry.kind} "
                            f"{replaced[0]!r}, which is built in; register yours under another "
                            "name", BAD_INPUT)
        known = before.get(id(registry), registry.own)
        registry.origins |= {name: plugin.sha256 for name in registry.added
                             if registry[name] is not known.get(name)}


def _take_back(plugin: Plugin) -> None:
    """Removes what an earlier version of a file has added."""
    for registry in registries():
        for name in [name for name, sha in registry.origins.items() if sha == plugin.sha256]:
            registry.pop(name, None)
            del registry.origins[name]


class Registered(click.Choice):
    """One of the program's own names, or one that a plugin added to registries of some kinds.

    Help shows only the program's own names.
    """

    def __init__(self, own: Sequence[str], *kinds: str):
        super().__init__(list(own))
        self._kinds = kinds

    def convert(self, value, param, ctx):
        """Returns the name."""
        names = names_of(self.choices, *self._kinds)
        if value not in names:
            self.fail(f"{value!r} is not one of {', '.join(map(repr, names))}; --plugin=FILE adds "
                      "others", param, ctx)
        return value


def plugin_option(*, is_exposed: bool = False) -> Callable:
    """Returns a decorator that adds --plugin to a click command.

    Args:
        is_exposed: whether the command's function gets `plugin`, a Plugin or None.
    """
    return click.option("--plugin", metavar="FILE.py", is_eager=True, callback=_load,
                        expose_value=is_exposed,
                        help="Python file to run first, which adds networks, losses, solvers, "
                        "metrics or detectors by name (docs/extending.md).")


def _load(ctx: click.Context, param: click.Parameter, value: str | None) -> Plugin | None:
    # A configuration file must not name code that is run.
    typed = ctx.get_parameter_source(param.name) is click.core.ParameterSource.COMMANDLINE
    return load_plugin(value) if value is not None and typed and not ctx.resilient_parsing else None
