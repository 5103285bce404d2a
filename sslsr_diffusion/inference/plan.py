"""How a picture is padded and cut: whole where it fits, else the largest tiles that do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.memory import MemoryModel, largest_fitting
from sslsr_diffusion.inference.tiling import rounded_up

log = logging.getLogger(__name__)

Tile = int | Literal["auto"] | None

_VAE_SIDES = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128)
_LARGEST = 2.0  # "auto" gives the denoiser at most this many times the side it was trained at


@dataclass(frozen=True)
class Plan:
    """Sides in output pixels. A tile of None is the whole picture."""

    height: int
    width: int
    tile: int | None
    tile_overlap: int
    vae_tile: int | None
    vae_overlap: int
    vae_scale: int

    @property
    def tile_cells(self) -> tuple[int, int]:
        """Tile and overlap of the denoiser in latent pixels; the whole canvas is a tile as large as its longer side."""
        return (self.tile or max(self.height, self.width)) // self.vae_scale, self.tile_overlap // self.vae_scale

    @property
    def vae_cells(self) -> tuple[int | None, int]:
        return (self.vae_tile // self.vae_scale if self.vae_tile else None), self.vae_overlap // self.vae_scale


def make_plan(
    height: int,
    width: int,
    *,
    unet: Any,
    vae_scale: int,
    memory: Callable[[], MemoryModel],
    budget: int,
    tile: Tile,
    overlap: int | None,
    vae_tile: Tile,
    batch: int,
) -> Plan:
    """Padded size and tiles for a picture of height x width output pixels.

    The padded sides are multiples of what the networks halve, and no smaller than what the denoiser was trained at
    (its config's sample_size): a picture that is smaller would be outside of what it has learned.

    Args:
        unet: the UNet's config.
        memory: gives the estimates; called only for "auto".
        budget: bytes that the activations of one network call may take.
        batch: samples per network call.
    """
    unit = vae_scale * 2 ** (len(unet.block_out_channels) - 1)
    trained = rounded_up(int(unet.sample_size or 0) * vae_scale, unit)
    padded = rounded_up(height, unit, trained), rounded_up(width, unit, trained)

    def whole_or(side: int) -> tuple[int, int]:
        return min(side, padded[0]) // vae_scale, min(side, padded[1]) // vae_scale

    if tile == "auto":
        sides = _sides(max(padded), trained or 512, unit)
        chosen = largest_fitting(sides, lambda s: memory().denoise_bytes(*whole_or(s), batch), budget, "tile")
    else:
        chosen = _asked(tile, max(padded), unit, "tile")
    if vae_tile == "auto":
        sides = [max(padded), *(s for s in _VAE_SIDES if s < max(padded) and s % vae_scale == 0)]
        vae_chosen = largest_fitting(sides, lambda s: memory().codec_bytes(*whole_or(s), batch), budget, "vae_tile")
    else:
        vae_chosen = _asked(vae_tile, max(padded), 4 * vae_scale, "vae_tile")
    plan = Plan(
        *padded,
        tile=chosen if chosen < max(padded) else None,
        tile_overlap=_overlap(chosen if overlap is None else overlap, chosen, overlap is None, vae_scale),
        vae_tile=vae_chosen if vae_chosen < max(padded) else None,
        vae_overlap=rounded_up(vae_chosen // 4, vae_scale),
        vae_scale=vae_scale,
    )
    log.info("padded to %d x %d, tile %s, vae tile %s (output pixels)", *padded, plan.tile or "none", plan.vae_tile or "none")
    return plan


def _sides(longest: int, trained: int, unit: int) -> list[int]:
    """Candidates of "auto", descending: the whole picture if it is not far beyond the training size, then shares of that."""
    whole = [longest] if longest <= _LARGEST * trained else []
    shares = {rounded_up(int(trained * share), unit) for share in (_LARGEST, 1.5, 1.0, 0.75, 0.5, 0.25)}
    return whole + sorted((side for side in shares if side < longest), reverse=True)


def _asked(tile: Tile, longest: int, unit: int, name: str) -> int:
    if tile is None:
        return longest
    if not isinstance(tile, int) or tile < unit or tile % unit:
        raise UserError(f"{name}: expected a multiple of {unit} pixels, 'auto' or None, came {tile!r}.")
    return min(tile, longest)


def _overlap(overlap: int, tile: int, default: bool, vae_scale: int) -> int:
    if default:
        return tile // 2 // vae_scale * vae_scale
    if not 0 <= overlap < tile or overlap % vae_scale:
        raise UserError(f"tile_overlap: expected a multiple of {vae_scale} pixels below the tile ({tile}), came {overlap}.")
    return overlap
