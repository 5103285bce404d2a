"""Why a run should stop early: a signal, or a launcher that is gone (accelerate does not forward SIGTERM to its child)."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and by `accelerate launch` for their children
_PARENT_AT_START = os.getppid()


class StopRequest:
    """Turns SIGTERM, SIGINT and the launcher's death into a reason that the loop asks for between two steps.

    A second signal ends the process at once, as usual. The parent is watched only when a launcher started this process:
    `nohup python train.py &` must survive its shell.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._parent = _PARENT_AT_START if any(name in os.environ for name in _LAUNCHED) else None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: the caller handles signals
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def reason(self) -> str | None:
        if self._reason is None and self._parent is not None and os.getppid() != self._parent:
            self._reason = "the launcher is gone"
        return self._reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._reason = f"{signal.Signals(number).name} received"
        self.release()

    def release(self) -> None:
        """From here on a signal ends the process at once, as without this object."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
