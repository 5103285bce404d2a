"""Tables of parts by name: a new part is a file of its own and one line in its table."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def named(where: str) -> Any:
    """The object that `package.module:Name` names, imported now."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


def lazily(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names (name -> module) are imported at first use."""

    def getattr_(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = named(f"{home[name]}:{name}")
        setattr(sys.modules[package], name, value)
        return value

    return getattr_, lambda: sorted({*vars(sys.modules[package]), *home})
