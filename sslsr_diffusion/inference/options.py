"""What a call of a latent restorer asks for, and what is possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.restorer import Finishing
from sslsr_diffusion.inference.tile_plan import Tile
from sslsr_diffusion.inference.tiling import TILE_WEIGHTS

OnStepEnd = Callable[[int, float, dict[str, Tensor]], dict[str, Tensor] | None]
DEFAULT_FIDELITY = 0.5


@dataclass(frozen=True)
class LatentOptions:
    """What one call asks for, the same for all its pictures; the fields but `finishing` are keywords of the call."""

    finishing: Finishing
    num_inference_steps: int
    strength: float = 1.0
    sampler: str | None = None
    start: str = "lr"
    eta: float = 0.0
    guidance_scale: float = 1.0
    fidelity: float = DEFAULT_FIDELITY
    tile: Tile = "auto"
    tile_overlap: int | None = None
    tile_batch_size: int = 1
    vae_tile: Tile = "auto"
    memory_budget: int | None = None
    tile_weights: str = "smooth"
    callback_on_step_end: OnStepEnd | None = None

    def check(self) -> None:
        """Raises UserError for an impossible value; tiles and steps are checked where they are used."""
        self.finishing.check()
        if self.tile_weights not in TILE_WEIGHTS:
            raise UserError(f"tile_weights: expected one of {', '.join(TILE_WEIGHTS)}, got {self.tile_weights!r}.")
        if self.start not in ("lr", "noise"):
            raise UserError(f"start: expected 'lr' or 'noise', got {self.start!r}.")
        if self.start == "noise" and self.strength < 1:
            raise UserError(f"start: pure noise needs strength 1, got {self.strength}; use start='lr' for an intermediate step.")
        if self.tile_batch_size < 1:
            raise UserError(f"tile_batch_size: expected 1 or more, got {self.tile_batch_size}.")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta: expected 0 to 1, got {self.eta}.")
