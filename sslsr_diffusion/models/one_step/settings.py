"""What a recipe says about a one-step upscaler, and the architectures of bases that ship with the package."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sslsr_diffusion.models.family import PresetSettings
from sslsr_diffusion.models.lora import LoRASettings
from sslsr_diffusion.models.one_step.quantised import BYTES
from sslsr_diffusion.models.size import pixels_per_latent
from sslsr_diffusion.models.stablesr.settings import DEFAULT_BASE
from sslsr_diffusion.models.stablesr.settings import load_preset as load_stable_diffusion
from sslsr_diffusion.shipped_model import local_folder

PRESETS = Path(__file__).resolve().parent / "presets"
RESULT = "one_step.json"  # beside the LoRA files of a result
STABLE_DIFFUSION = ("sd21", "tiny")  # the UNets of StableSR's presets, without what StableSR adds


class OneStepSettings(PresetSettings):
    """One call of a base with a LoRA, from the low-resolution latents to the clean ones (HYPIR, OSEDiff, StrSR and others, 2024-2026)."""

    kind: Literal["one_step"] = "one_step"
    base: str = Field(
        DEFAULT_BASE,
        description="Folder or hub id of a model in diffusers format: Stable Diffusion 1.5, 2.1 or turbo, 3 or 3.5, FLUX.2 klein, Z-Image; "
        "or of a whole one-step model, such as small-v4, which comes with the package.",
    )
    preset: str = Field(
        "sd21",
        description="Architecture for init random, and for the dry run of a base that is not on disk: sd21, sd35_medium, flux2_klein, "
        "zimage; small; tiny, tiny_sd3, tiny_flux2, tiny_zimage.",
    )
    prompt: str = Field("", description="Text of every call; encoded once, then the text encoder is freed.")
    timestep: int | None = Field(None, ge=0, description="Bases with betas (Stable Diffusion): the timestep of the call (HYPIR: 200).")
    sigma: float | None = Field(
        None, gt=0, le=1, description="Flows: the noise level of the call, as the network sees it, after any shift (StrSR: 0.8)."
    )
    noise: float | None = Field(
        None,
        gt=0,
        description="Noise the low-resolution latents to this timestep, or sigma, before the call (InvSR); null: not at all (HYPIR).",
    )
    x0: Literal["process", "residual"] = Field(
        "process",
        description="The clean latents: process, what the noise process says of the prediction; residual, the low-resolution latents less "
        "the prediction (PiSA-SR, TSD-SR).",
    )
    lora: LoRASettings | None = Field(LoRASettings(), description="What trains of the base's network; null: nothing but `full`.")
    encoder_lora: LoRASettings | None = Field(
        None,
        description="A LoRA on the autoencoder's encoder (and quant_conv, where targets name it), too (OSEDiff); encoding then has a "
        "gradient. null: it is frozen.",
    )
    weights: Literal["float32", "bfloat16", "int8", "nf4"] = Field(
        "float32",
        description="How the frozen network is held: bfloat16 takes half the memory; int8 and nf4 a quarter and an eighth, by bitsandbytes "
        "on a GPU. LoRAs stay float32.",
    )
    full: tuple[str, ...] = Field(
        (), description="Layers of the base's network that train whole, by name, for example conv_in (OSEDiff); stored beside the LoRA."
    )

    @staticmethod
    def presets() -> list[str]:
        return [*STABLE_DIFFUSION, *sorted(path.stem for path in PRESETS.glob("*.json"))]

    @model_validator(mode="after")
    def _one_level(self) -> Self:
        if self.timestep is not None and self.sigma is not None:
            raise ValueError(f"expected timestep (Stable Diffusion) or sigma (flows), got {self.timestep} and {self.sigma}; leave one out.")
        if self.noise is not None and self.timestep is not None and not self.noise.is_integer():
            raise ValueError(f"noise: expected a timestep as timestep is one, got {self.noise}.")
        if self.noise is not None and self.sigma is not None and self.noise > 1:
            raise ValueError(f"noise: expected a sigma of at most 1 as sigma is one, got {self.noise}.")
        if self.full and self.weights != "float32":
            raise ValueError(f"full: layers that train whole need weights: float32, got {self.weights}.")
        if self.init == "random" and self.weights in BYTES:
            raise ValueError(
                f"weights: expected float32 or bfloat16 with init: random, got {self.weights}, which is for weights of a base."
            )
        return self

    def codec_scale(self) -> int:
        """By the config of the base's autoencoder that lies on this machine, else by the preset's."""
        path = local_folder(self.base) / "vae" / "config.json"
        if self.init == "pretrained":
            try:
                return pixels_per_latent(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                pass  # the base is not here, or damaged, which the run will say
        return pixels_per_latent(load_preset(self.preset)["vae"])


def load_preset(name: str) -> dict[str, dict[str, Any]]:
    """The architecture of a preset: component -> constructor arguments and `_class_name`."""
    if name not in STABLE_DIFFUSION:
        return json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    parts = load_stable_diffusion(name, plain=True)
    classes = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
    return {part: {"_class_name": classes.get(part), **config} for part, config in parts.items()}
