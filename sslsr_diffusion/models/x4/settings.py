"""What a recipe says about the Stable Diffusion x4 upscaler, and its architectures that ship with the package."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sslsr_diffusion.config import Settings
from sslsr_diffusion.models.family import PresetSettings
from sslsr_diffusion.models.lora import LoRASettings

PRESETS = Path(__file__).resolve().parent / "presets"
DEFAULT_BASE = "stabilityai/stable-diffusion-x4-upscaler"
SCALE = 4  # pixels per latent pixel, and of the enlargement
MAX_NOISE_LEVEL = 350  # of a base that names none


class X4Settings(PresetSettings):
    """Stability AI's x4 upscaler: a latent diffusion model that sees the noised low-resolution pixels."""

    kind: Literal["x4"] = "x4"
    base: str = Field(DEFAULT_BASE, description="Folder or hub id of a Stable Diffusion x4 upscaler in diffusers format.")
    preset: str = Field("x4", description="Architecture for init random, and for the dry run of a base that is not on disk: x4, tiny.")
    prompt: str = Field("", description="Text that every sample is trained with; encoded once.")
    lora: LoRASettings | None = Field(None, description="The layers that train where task.train is lora; null: another part trains.")

    @staticmethod
    def presets() -> list[str]:
        return sorted(path.stem for path in PRESETS.glob("*.json"))

    def codec_scale(self) -> int:
        return SCALE


class X4Call(Settings):
    """What a call takes that names nothing: of a result, what stands in its file; of other pipelines, diffusers' own defaults."""

    scale: float = Field(SCALE, gt=0, description="Enlargement; other values than 4 resize what the networks make.")
    num_inference_steps: int = Field(75, ge=1, le=1000, description="Sampling steps.")
    noise_level: int = Field(20, ge=0, description="Timestep of the low-resolution scheduler at which noise is added to the picture.")
    detail: float = Field(1.0, ge=0, le=1, description="Share of the model's picture in the result, the rest is bicubic.")
    back_projection: float = Field(
        0.0, ge=0, le=1, description="Share of what the picture, reduced again, lacks of the low-resolution one that is put back."
    )
    antiring: float = Field(0.0, ge=0, le=1, description="How much is taken back of what leaves the range of the pixels nearby.")


def load_preset(name: str) -> dict[str, dict[str, Any]]:
    """The architecture of a preset: component -> constructor arguments."""
    return json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))
