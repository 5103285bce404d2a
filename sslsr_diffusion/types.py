"""The values that walk through the project: one training batch, and what a step computed from it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Aligned training samples. Everything random about sample i was drawn from (seed, index[i]) alone."""

    hr: Tensor  # [B, 3, H, W] float32 in [0, 1]
    lr: Tensor  # [B, 3, H/scale, W/scale] float32 in [0, 1]
    mask: Tensor  # [B, 1, H, W] bool: the pixels whose self-similarity row enters the loss
    index: Tensor  # [B] int64: global sample index
    names: tuple[str, ...] = ()  # B source names, for messages

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self) if f.name not in ("names", "index")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Outputs:
    """What one training step computed; the losses are small callables over this.

    The pixel fields are None when no loss asked for them (decoding with gradient is the memory peak of a step).
    With `decode_crop` the pixel fields are the same random window of all three.
    """

    pred: Tensor  # [B, 4, h, w] the network's prediction (epsilon, v or sample)
    target: Tensor  # [B, 4, h, w] what it should have predicted
    t: Tensor  # [B] int64 timesteps
    snr: Tensor  # [B] float32 signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod) at t
    sr: Tensor | None = None  # [B, 3, H, W] decoded x0, about [0, 1], not clamped, with gradient
    hr: Tensor | None = None  # [B, 3, H, W] in [0, 1]
    mask: Tensor | None = None  # [B, 1, H, W] bool
