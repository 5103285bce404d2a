"""Which pixels of a batch the losses of a step look at."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.losses import Look
from sslsr_diffusion.tasks.decode_window import Windows, draw_windows
from sslsr_diffusion.types import Batch, Given


def upsampled(batch: Batch) -> Tensor:
    """[B, 3, h, w] -> [B, 3, H, W] in [0, 1]: the low-resolution pictures at the size of the ground truth."""
    return resize_bicubic(batch.lr, size=(batch.hr.shape[-2], batch.hr.shape[-1])).clamp(0, 1)


def all_pixels(batch: Batch) -> Given:
    """For tasks without noise levels: every sample is seen, whole."""
    samples, device = batch.hr.shape[0], batch.hr.device
    return Given(
        t=torch.zeros(samples, dtype=torch.int64, device=device),
        noise_level=torch.zeros(samples, device=device),
        decoded=torch.arange(samples, device=device),
        hr=batch.hr,
        mask=batch.mask,
    )


def choose_pixels(
    given: Given, batch: Batch, losses: Sequence[Look], *, scale: int, decode_crop: int | None, seed: int
) -> tuple[Given, Windows | None]:
    """Add to `given` the pixels that some loss looks at: gated-out samples and everything outside the windows are never decoded.

    `scale` is in pixels per latent pixel, `decode_crop` the side of the window in latent pixels (None: the whole crop).
    """
    wanted = [loss.active(given) for loss in losses if "sr" in loss.reads]
    if not wanted:
        return given, None
    decoded = torch.stack(wanted).any(dim=0).nonzero()[:, 0]
    hr, mask = batch.hr[decoded], batch.mask[decoded]
    windows, origin = None, torch.zeros(len(decoded), 2, dtype=torch.int64)
    latent = (batch.hr.shape[-2] // scale, batch.hr.shape[-1] // scale)
    if decode_crop is not None and decode_crop < max(latent) and len(decoded):
        windows = draw_windows(batch.index[decoded.cpu()].tolist(), latent, decode_crop, seed)
        hr, mask, origin = windows.cut_pixels(hr, scale), windows.cut_pixels(mask, scale), windows.start * scale
    return replace(given, decoded=decoded, hr=hr, mask=mask, origin=origin), windows
