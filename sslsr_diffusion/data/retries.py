"""Pictures that failed: a damaged one stays failed, one that the storage did not deliver is tried again."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

Made = TypeVar("Made")
_NAMES = "EIO ESTALE ETIMEDOUT EAGAIN EBUSY ENOTCONN ECONNRESET ECONNABORTED EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENOLINK EREMOTEIO"
_HICCUPS = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))
_PAUSES = (0.5, 2.0)  # seconds before the second and third attempt during a hiccup
_FIRST_WAIT, _LONGEST_WAIT = 30.0, 1800.0  # seconds until a picture is asked for again; doubled each time


class BadPictures:
    """What is known of the pictures that failed in this process."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[str, float, float]] = {}  # problem, when to try again, wait after that

    def problem(self, key: tuple[int, int]) -> str | None:
        """Why this picture is passed over without an attempt; None: try it."""
        problem, again, _ = self._known.get(key, ("", 0.0, 0.0))
        return problem if problem and time.monotonic() < again else None

    def note(self, key: tuple[int, int], error: Exception) -> None:
        wait = self._known[key][2] if key in self._known else _FIRST_WAIT
        again = time.monotonic() + wait if storage_error(error) else float("inf")
        self._known[key] = (str(error), again, min(2 * wait, _LONGEST_WAIT))

    def forget(self, key: tuple[int, int]) -> None:
        self._known.pop(key, None)


def patiently(make: Callable[[], Made]) -> Made:
    """What `make` returns, with two more attempts while a network share or a disk hiccups."""
    for pause in _PAUSES:
        try:
            return make()
        except (ValueError, OSError) as error:
            cause = storage_error(error)
            if cause is None or cause.errno not in _HICCUPS:
                raise
            time.sleep(pause)
    return make()


def storage_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind an error; Pillow's complaints about damaged files are OSErrors without a number."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__cause__
    return error
