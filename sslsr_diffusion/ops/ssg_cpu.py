"""The compiled CPU backend."""

from __future__ import annotations

import torch


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`; None: it can."""
    return "its kernels are not part of this build."
