"""Extend a diffusers model's constructor without repeating its fifty arguments."""

import inspect
from collections.abc import Callable
from typing import Any


def extends_signature(parent: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let `__init__(self, own=..., **parent_arguments)` advertise the parent's arguments as well.

    diffusers reads the constructor's signature to know which entries of a config.json belong to the class; with plain
    `**kwargs` it would drop all of the parent's entries.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        inherited = list(inspect.signature(parent.__init__).parameters.values())[1:]  # type: ignore[misc]
        keyword_only: list[Any] = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own[1:], *inherited)]
        init.__signature__ = inspect.Signature([own[0], *keyword_only])  # type: ignore[attr-defined]
        return init

    return decorate
