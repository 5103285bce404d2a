"""What a recipe asks for that this machine cannot do, said before the run begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sslsr_diffusion.errors import MissingDependency, UserError


def check_trackers(trackers: Sequence[str]) -> None:
    """Every tracker asked for is known and installed; accelerate leaves out the others with at most a warning.

    Raises:
        UserError: a name that accelerate does not know.
        MissingDependency: a tracker whose package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = sorted(map(str, LOGGER_TYPE_TO_CLASS)), set(map(str, get_available_trackers()))
    for name in trackers:
        if name not in known:
            raise UserError(f"output.trackers: {name!r} is unknown; expected some of {', '.join(known)}.")
        if name not in installed:
            raise MissingDependency(
                f"output.trackers: {name} is not installed: pip install {name.replace('_', '-')}, or choose another tracker."
            )


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """Half precision with a gradient scaler is for GPUs: on the CPU accelerate would quietly train in full precision.

    Raises:
        UserError: fp16 on a device that cannot train in it.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("training.mixed_precision: fp16 needs a GPU and this run is on the CPU; use bf16 or no.")
