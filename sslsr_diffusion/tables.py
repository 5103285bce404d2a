"""Tables of parts by name: a new part is a file of its own and one line in its table."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def named(where: str) -> Any:
    """The object that `package.module:Name` names, imported now."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
