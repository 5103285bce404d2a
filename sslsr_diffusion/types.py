"""The values that walk through the project: one training batch, and what a step computed from it."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Aligned training samples. What training draws for sample i follows from (seed, index[i]) alone."""

    hr: "Tensor"  # [B, 3, H, W] float32 in [0, 1]
    lr: "Tensor"  # [B, 3, H/scale, W/scale] float32 in [0, 1]
    mask: "Tensor"  # [B, 1, H, W] bool: the pixels whose self-similarity row enters the loss
    index: "Tensor"  # [B] int64: global sample index
    names: tuple[str, ...] = ()  # B source names, for messages
    latents: "Tensor | None" = None  # [B, c, h, w], scaled: what the upscaler made of lr before training (task decoder)

    def to(self, device: "torch.device | str") -> "Batch":
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("names", "index")}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in found.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is known of a step before any network runs: the losses count their units (samples, rows) here.

    The pixel fields hold only the K samples that some pixel loss looks at, and with `decode_crop` only a window of each.
    """

    t: "Tensor"  # [B] int64 timesteps
    noise_level: "Tensor"  # [B] float32 spread / signal at t: 0 clean, infinite pure noise; 1 / level^2 is the signal-to-noise ratio
    decoded: "Tensor | None" = None  # [K] int64: the samples that the pixel fields hold; None: no loss needs pixels
    hr: "Tensor | None" = None  # [K, 3, H, W] in [0, 1]
    mask: "Tensor | None" = None  # [K, 1, H, W] bool
    lr: "Tensor | None" = None  # [K, 3, h, w] in [0, 1]: what the prediction was made from; None: no loss reads it
    index: "Tensor | None" = None  # [B] int64: global sample index, which all that is random about a sample follows from
    origin: "Tensor | None" = None  # [K, 2] int64: row and column of the window in its crop; anchors the stride pattern

    def to(self, device: "torch.device | str") -> "Given":
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in found.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Outputs(Given):
    """What one training step computed; the losses are small callables over this."""

    pred: "Tensor | None" = None  # [B, C, h, w] the network's prediction (epsilon, v, velocity or sample)
    target: "Tensor | None" = None  # [B, C, h, w] what it should have predicted
    clean_gain: "Tensor | None" = None  # [B] |d x0 / d pred|: turns an error of the prediction into one of x0
    sr: "Tensor | None" = None  # [K, 3, H, W] the prediction in pixels, about [0, 1], not clamped, with gradient
    sr_ema: "Tensor | None" = None  # [K, 3, H, W] the same prediction by the averaged weights, without gradient; None: no loss reads it
    branch: "Tensor | None" = None  # [K, 3, H, W] a second output of the network, with gradient (SPSR: the gradient map)
    z0: "Tensor | None" = None  # [B, C, h, w] clean latents that the prediction means, with gradient; None: no loss reads them
    z0_hr: "Tensor | None" = None  # [B, C, h, w] those of the ground truth
    moments: "Tensor | None" = None  # [B, 2*c, h, w] mean and log-variance of the latents (task autoencoder)
