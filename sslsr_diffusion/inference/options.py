"""What one call of a restorer asks for: the fields are the keywords of the call, the same for all its pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.antiring import antiring
from sslsr_diffusion.inference.back_projection import back_projection
from sslsr_diffusion.inference.choices import COLOR_FIXES
from sslsr_diffusion.inference.color_fix import color_fix
from sslsr_diffusion.inference.tile_plan import Tile
from sslsr_diffusion.inference.tiling import TILE_WEIGHTS
from sslsr_diffusion.models.base import is_share

OnStepEnd = Callable[[int, float, dict[str, Tensor]], dict[str, Tensor] | None]
Texts = str | Sequence[str] | None
STEPS = 200  # of a model that names none, as published


@dataclass(frozen=True)
class CallOptions:
    """What every restorer has: how its networks see the picture, and what is done to their picture afterwards."""

    color_fix: str = "wavelet"
    back_projection: float = 0.0
    antiring: float = 0.0
    detail: float = 1.0
    tile: Tile = "auto"
    tile_overlap: int | None = None
    memory_budget: int | None = None

    @classmethod
    def names(cls) -> frozenset[str]:
        return frozenset(field.name for field in fields(cls))

    def check(self) -> None:
        """Raises UserError for an impossible value; tiles and steps are checked where the networks are known."""
        if self.color_fix not in COLOR_FIXES:
            raise UserError(f"color_fix: expected one of {', '.join(COLOR_FIXES)}, got {self.color_fix!r}.")
        if not is_share(self.back_projection):
            raise UserError(
                f"back_projection: expected 0 (off) to 1 (all that the reduced picture lacks of the input), got {self.back_projection!r}."
            )
        if not is_share(self.antiring):
            raise UserError(f"antiring: expected 0 (off) to 1 (nothing beyond the low-resolution pixels nearby), got {self.antiring!r}.")
        if not is_share(self.detail):
            raise UserError(f"detail: expected 0 (bicubic) to 1 (all that the model adds), got {self.detail!r}.")

    def without_effect(self) -> list[str]:
        """Sentences about what nobody will see in the picture."""
        return []

    @property
    def looks_back(self) -> bool:
        """Whether `finish` needs the enlarged low-resolution picture."""
        return self.color_fix != "none" or self.detail != 1

    def finish(self, restored: Tensor, enlarged: Tensor | None, low: Tensor) -> Tensor:
        """[B, 3, H, W]: colours of the enlarged picture, what is lacking put back, seams taken back, mixed; both are changed in place.

        `enlarged` [B, 3, H, W] may be None unless `looks_back`; `low` is [B, 3, h, w].
        """
        if enlarged is not None:
            restored = color_fix(self.color_fix, restored, enlarged)
        return self.mixed(back_projection(restored.clamp_(0, 1), low, self.back_projection), enlarged, low)

    def mixed(self, restored: Tensor, enlarged: Tensor | None, low: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """`finish` behind the back projection; `rows` (top, H): both are rows from `top` of a picture of H rows, `low` is whole always."""
        result = antiring(restored.clamp_(0, 1), low, self.antiring, rows)
        return result if enlarged is None or self.detail == 1 else enlarged.lerp_(result, self.detail)


@dataclass(frozen=True)
class LatentOptions(CallOptions):
    """What restorers of latent networks have beside: samplers, prompts, a decoder that sees the low-resolution picture."""

    num_inference_steps: int = STEPS
    strength: float = 1.0
    sampler: str | None = None
    start: str = "lr"
    eta: float = 0.0
    prompt: Texts = None
    negative_prompt: Texts = None
    guidance_scale: float = 1.0
    fidelity: float = 0.5
    noise_level: int = 0
    tile_batch_size: int = 1
    vae_tile: Tile = "auto"
    tile_weights: str = "smooth"
    callback_on_step_end: OnStepEnd | None = None

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    def check(self) -> None:
        super().check()
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

    def without_effect(self) -> list[str]:
        if self.guided or not any(self.negative_prompt or ()):
            return []
        return ["negative_prompt has no effect without guidance; set guidance_scale above 1"]


def per_picture(prompt: Texts, count: int, name: str) -> list[str]:
    """As many texts as there are pictures; one for all, or none, is repeated. UserError for another number of texts."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""] * count
    if len(prompt) != count:
        raise UserError(f"{name}: expected one text, or as many as there are images ({count}), got {len(prompt)}.")
    return list(prompt)
