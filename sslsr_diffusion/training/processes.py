"""What a run asks of its machine and processes: trackers, precision, signals to stop, and what to say when a process is gone."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

import torch

from sslsr_diffusion.devices import training_precision
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.training.checkpoints import latest_checkpoint

_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and by `accelerate launch` for their children
_PARENT_AT_START = os.getppid()


def check_trackers(trackers: Sequence[str]) -> None:
    """Every tracker asked for is known (else UserError) and installed (MissingDependency): accelerate at most warns and goes without."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = sorted(map(str, LOGGER_TYPE_TO_CLASS)), set(map(str, get_available_trackers()))
    for name in trackers:
        if name not in known:
            raise UserError(f"output.trackers: {name!r} is unknown; expected some of {', '.join(known)}.")
        if name not in installed:
            package = name.replace("_", "-")
            raise MissingDependency(f"output.trackers: {name} is not installed: pip install {package}, or choose another tracker.")


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """Half precision with a gradient scaler is for GPUs: on the CPU accelerate would quietly train in full precision."""
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("training.mixed_precision: fp16 needs a GPU and this run is on the CPU; use bf16 or no.")


def check_one_precision(found: Sequence[str]) -> None:
    """UserError where `training.mixed_precision: auto` is one thing to one process and another to the next."""
    if len(set(found)) > 1:
        raise UserError(
            f"training.mixed_precision: expected auto to be one and the same for all processes, got {', '.join(found)} by rank; "
            "say bf16 or no."
        )


def slow_precision(mixed_precision: str, device: torch.device, *, resumed: bool) -> str | None:
    """A sentence where the device would be faster in float32 than in the half precision of a run that begins, or goes on (`resumed`)."""
    if mixed_precision != "bf16" or training_precision(device) == "bf16":
        return None
    advice = "a run goes on in what it began with" if resumed else "training.mixed_precision=auto saves time"
    return f"bf16 is slower than float32 on this device, which has no units for it; {advice}"


class StopRequest:
    """Turns SIGTERM, SIGINT and the launcher's death into a reason that the loop asks for between two steps.

    accelerate does not forward SIGTERM to its child. A second signal ends the process at once, as usual. The parent is watched only
    when a launcher started this process: `nohup python train.py &` must survive its shell.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._parent = _PARENT_AT_START if any(name in os.environ for name in _LAUNCHED) else None

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
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


@contextlib.contextmanager
def lost_process_explained(world_size: int, run: Path) -> Iterator[None]:
    """Turn a broken connection (a process of the run has ended or cannot be reached) into one UserError; all other errors pass."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors that name its source file
        lost = world_size > 1 and (isinstance(error, torch.distributed.DistError) or "gloo/" in str(error))
        if not lost:
            raise
        checkpoint = latest_checkpoint(run)
        onward = f"--resume latest goes on from {checkpoint.name}" if checkpoint else "there is no checkpoint yet"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"another process of this run has ended or cannot be reached, so this one ends too; {onward}, "
            f"on any number of processes ({reason})"
        ) from error
