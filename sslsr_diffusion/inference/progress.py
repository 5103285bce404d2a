"""How far a call is, for people who wait: said where strips, steps and tiles are looped over, heard by who listens in the same thread."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

Told = Callable[[float, str], object]  # share that is done, and what is being done


class _Piece(NamedTuple):
    told: Told
    first: float = 0.0  # share that is done where it begins
    width: float = 1.0
    names: tuple[str, ...] = ()


_NOW: ContextVar[_Piece | None] = ContextVar("piece", default=None)


@contextlib.contextmanager
def listening(told: Told) -> Iterator[None]:
    """`told` hears of all pieces that begin inside."""
    token = _NOW.set(_Piece(told))
    try:
        yield
    finally:
        _NOW.reset(token)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Nobody hears of pieces that begin inside."""
    token = _NOW.set(None)
    try:
        yield
    finally:
        _NOW.reset(token)


@contextlib.contextmanager
def piece(number: int, of: int, name: str = "") -> Iterator[None]:
    """What happens inside is one of `of` equal pieces of what is under way; said as "NAME 2 of 5", where there are several."""
    now = _NOW.get()
    if now is None:
        yield
        return
    names = (*now.names, f"{name} {number + 1} of {of}") if name and of > 1 else now.names
    inner = now._replace(first=now.first + now.width * number / of, width=now.width / of, names=names)
    if names != now.names:
        inner.told(inner.first, ", ".join(names))
    token = _NOW.set(inner)
    try:
        yield
    finally:
        _NOW.reset(token)
