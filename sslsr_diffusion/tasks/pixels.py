"""Which pixels of a batch the losses of a step look at: samples, and in them a window of the latent.

The window plus a margin is decoded, the losses see the interior.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.losses import Look
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.types import Batch, Given

MARGIN = 4  # latent pixels around the window; the decoder's influence from farther away is weak


@dataclass(frozen=True)
class Windows:
    """One window per decoded sample, all in latent pixels: `size` inside a decoded patch of `patch`."""

    start: Tensor  # [K, 2] int64 on the CPU: top left corner of the interior
    patch_start: Tensor  # [K, 2] int64 on the CPU: top left corner of what is decoded
    size: tuple[int, int]
    patch: tuple[int, int]

    def cut_latents(self, latents: Tensor) -> Tensor:
        """[K, c, h, w] -> [K, c, patch_h, patch_w]"""
        return _cut(latents, self.patch_start, self.patch)

    def cut_interior(self, decoded: Tensor, scale: int) -> Tensor:
        """[K, 3, patch_h * scale, patch_w * scale] -> [K, 3, size_h * scale, size_w * scale]"""
        return _cut(decoded, self.start - self.patch_start, self.size, scale)

    def cut_pixels(self, pixels: Tensor, scale: int) -> Tensor:
        """The same window of a full crop [K, C, H, W]."""
        return _cut(pixels, self.start, self.size, scale)


def _cut(pictures: Tensor, corners: Tensor, size: tuple[int, int], scale: int = 1) -> Tensor:
    """One window per picture; corners and size in latent pixels, of `scale` pixels each."""
    height, width = size[0] * scale, size[1] * scale
    return torch.stack([x[..., top : top + height, left : left + width] for x, (top, left) in zip(pictures, (corners * scale).tolist())])


def draw_windows(indices: list[int], latent_size: tuple[int, int], side: int, seed: int) -> Windows:
    """A window of `side` latent pixels per sample, drawn from (seed, global sample index)."""
    size = tuple(min(side, full) for full in latent_size)
    patch = tuple(min(side + 2 * MARGIN, full) for full in latent_size)
    start = torch.empty(len(indices), 2, dtype=torch.int64)
    for row, index in enumerate(indices):
        generator = sample_generator(seed, index, "decode_crop")
        for axis in (0, 1):
            start[row, axis] = torch.randint(latent_size[axis] - size[axis] + 1, (), generator=generator)
    room = torch.tensor(latent_size) - torch.tensor(patch)
    patch_start = torch.minimum((start - MARGIN).clamp(min=0), room)
    return Windows(start, patch_start, (size[0], size[1]), (patch[0], patch[1]))


def seen(batch: Batch, zoom: int = 1) -> Tensor:
    """[B, 3, h, w] -> [B, 3, H / zoom, W / zoom] in [0, 1]: the low-resolution pictures as networks see them that enlarge `zoom` times."""
    return resize_bicubic(batch.lr, size=(batch.hr.shape[-2] // zoom, batch.hr.shape[-1] // zoom)).clamp(0, 1)


def all_samples(batch: Batch) -> Given:
    """For tasks without noise levels: no sample is gated out."""
    samples, device = batch.hr.shape[0], batch.hr.device
    t, level = torch.zeros(samples, dtype=torch.int64, device=device), torch.zeros(samples, device=device)
    return Given(t=t, noise_level=level, index=batch.index.to(device))


def all_pixels(batch: Batch) -> Given:
    """Of them, those that make no latents: every sample is seen, whole."""
    samples = torch.arange(len(batch.hr), device=batch.hr.device)
    return replace(all_samples(batch), decoded=samples, hr=batch.hr, lr=batch.lr, mask=batch.mask)


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


def decoded(codec: Codec, z0: Tensor, given: Given, windows: Windows | None) -> Tensor | None:
    """Pixels of the samples and windows that `choose_pixels` chose, from all clean latents [B, C, h, w]; None where no loss looks.

    Decoding with gradient is a step's memory peak.
    """
    if given.decoded is None:
        return None
    if given.decoded.numel() == 0:
        assert given.hr is not None
        return given.hr + 0 * z0.sum()
    z0 = z0[given.decoded]
    if windows is None:
        return codec.decode(z0).float()
    return windows.cut_interior(codec.decode(windows.cut_latents(z0)).float(), codec.scale)
