"""Parts of the program by name, such as losses, to which a user's file can add others.

A `Registry` is a dict. It remembers the names that it began with, which are the program's own, and
which file has added a name (dnnlib/plugins.py runs it), so that records can say which file a part
came from.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

_HASH_DIGITS = 16  # of a sha256, as records show it
_registries: list["Registry"] = []  # all registries
Part = TypeVar("Part")


class Registry(dict[str, Part]):
    """Parts of one kind by name.

    Attributes:
        kind: what a part is called, such as 'loss'. Several registries may share a kind.
        own: the program's own parts.
        origins: for each name that a file has added, the sha256 of that file.
    """

    def __init__(self, kind: str, parts: Mapping[str, Part]):
        super().__init__(parts)
        self.kind, self.own = kind, dict(parts)
        self.origins: dict[str, str] = {}
        _registries.append(self)

    @property
    def added(self) -> list[str]:
        """The names that are not the program's own."""
        return [name for name in self if name not in self.own]

    def replaced(self) -> list[str]:
        """Returns the program's own names of this kind that now stand for other parts."""
        of_kind = {name for registry in _registries if registry.kind == self.kind
                   for name in registry.own}
        return [name for name, part in self.own.items() if self.get(name) is not part] + [
            name for name in self.added if name in of_kind]


def registries() -> list[Registry]:
    """Returns the registries of the modules that have been imported."""
    return list(_registries)


def names_of(own: Iterable[str], *kinds: str) -> tuple[str, ...]:
    """Returns the program's own names and those that were added to registries of these kinds.

    It imports nothing: modules that have not been imported have no additions.
    """
    added = [name for registry in _registries if registry.kind in kinds for name in registry.added]
    return tuple(dict.fromkeys((*own, *added)))


def origin_record(*parts: tuple[Registry, str | None], key: str = "plugin") -> dict[str, str]:
    """Returns what records say about parts, given by registry and name: the file they come from.

    It is {key: the first digits of the file's sha256}, or {} if no file has added any of them.
    """
    found = [registry.origins[name] for registry, name in parts if name in registry.origins]
    return {key: found[0][:_HASH_DIGITS]} if found else {}


def takes_keyword(maker: Callable, name: str) -> bool:
    """Says whether a class or function can be called with a keyword.

    The constructor of a class may pass it, as one of its **kwargs, to that of a base class.
    """
    made_by: Sequence[Callable] = [maker]
    if isinstance(maker, type):
        made_by = [vars(base)["__init__"] for base in maker.__mro__ if "__init__" in vars(base)]
    for function in made_by:
        parameters = inspect.signature(function).parameters
        if name in parameters:
            return True
        if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            return False
    return True
