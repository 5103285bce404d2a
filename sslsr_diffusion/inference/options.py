"""What a call of the pipeline asks for, what is possible, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.color_fix import COLOR_FIXES
from sslsr_diffusion.inference.tile_plan import Plan, Tile
from sslsr_diffusion.inference.tiling import TILE_WEIGHTS
from sslsr_diffusion.models.stablesr.settings import is_share

OnStepEnd = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class Options:
    """What one call of the pipeline asks for, the same for all its pictures."""

    scale: float
    steps: int
    strength: float
    sampler: str | None
    start: str
    eta: float
    guidance_scale: float
    fidelity: float
    antiring: float
    detail: float
    tile: Tile
    tile_overlap: int | None
    tile_batch_size: int
    vae_tile: Tile
    memory_budget: int | None
    color_fix: str | None
    tile_weights: str
    on_step_end: OnStepEnd | None

    def check(self) -> None:
        """Raises UserError for an impossible value; tiles and steps are checked where they are used."""
        if (self.color_fix or "none") not in COLOR_FIXES:
            raise UserError(f"color_fix: expected one of {', '.join(COLOR_FIXES)}, got {self.color_fix!r}.")
        if self.tile_weights not in TILE_WEIGHTS:
            raise UserError(f"tile_weights: expected one of {', '.join(TILE_WEIGHTS)}, got {self.tile_weights!r}.")
        if not 0 < self.scale < float("inf"):
            raise UserError(f"scale: expected a positive number, got {self.scale}.")
        if self.start not in ("lr", "noise"):
            raise UserError(f"start: expected 'lr' or 'noise', got {self.start!r}.")
        if self.start == "noise" and self.strength < 1:
            raise UserError(f"start: pure noise needs strength 1, got {self.strength}; use start='lr' for an intermediate step.")
        if self.tile_batch_size < 1:
            raise UserError(f"tile_batch_size: expected 1 or more, got {self.tile_batch_size}.")
        if not is_share(self.antiring):
            raise UserError(f"antiring: expected 0 (off) to 1 (nothing beyond the low-resolution pixels nearby), got {self.antiring!r}.")
        if not is_share(self.detail):
            raise UserError(f"detail: expected 0 (bicubic) to 1 (all that the model adds), got {self.detail!r}.")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta: expected 0 to 1, got {self.eta}.")


@dataclass
class StableSRPipelineOutput(BaseOutput):
    """
    Args:
        images: the restored pictures, as `output_type` asked.
        plans: how each picture was cut into tiles (sides in output pixels), in the order of `images`.
        notes: a sentence for each time that memory ran out and smaller tiles took over.
    """

    images: Any
    plans: list[Plan]
    notes: list[str] = field(default_factory=list)
