"""Decode only a window of the latent: the window plus a margin is decoded, the losses see the interior."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sslsr_diffusion.seeding import sample_generator

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
