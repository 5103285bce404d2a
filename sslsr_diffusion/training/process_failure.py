"""What a process says when another one of its run is gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.training.checkpoints import latest_checkpoint


@contextlib.contextmanager
def lost_process_explained(world_size: int, run: Path) -> Iterator[None]:
    """Turn a broken connection between the processes into one sentence; all other errors pass.

    Raises:
        UserError: a collective call failed because a process that takes part in it has ended or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size < 2 or not _connection_lost(error):
            raise
        checkpoint = latest_checkpoint(run)
        onward = f"--resume latest goes on from {checkpoint.name}" if checkpoint else "there is no checkpoint yet"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"another process of this run has ended or cannot be reached, so this one ends too; {onward}, "
            f"on any number of processes ({reason})"
        ) from error


def _connection_lost(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/" in str(error)  # gloo raises plain RuntimeErrors that name its source file
