"""Networks and what surrounds them. Names are resolved at first use: reading a recipe does not import diffusers.

Published pipelines name their classes under `sslsr_diffusion.models` in model_index.json, and diffusers' loader looks up
its base classes here too; so these names must stay, wherever the files move.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "AutoencoderKLCFW": "sslsr_diffusion.models.stablesr.cfw",
    "Codec": "sslsr_diffusion.models.codec",
    "Denoiser": "sslsr_diffusion.models.stablesr.denoiser",
    "ModelMixin": "diffusers",
    "ModelSettings": "sslsr_diffusion.models.stablesr.settings",
    "Networks": "sslsr_diffusion.models.stablesr.build",
    "SFTUNet2DConditionModel": "sslsr_diffusion.models.stablesr.unet",
    "Schedule": "sslsr_diffusion.models.process",
    "StructuralEncoder": "sslsr_diffusion.models.stablesr.structural_encoder",
    "build_autoencoder": "sslsr_diffusion.models.stablesr.build",
    "build_networks": "sslsr_diffusion.models.stablesr.build",
    "load_preset": "sslsr_diffusion.models.stablesr.settings",
    "make_scheduler": "sslsr_diffusion.models.process",
}

__all__ = [
    "AutoencoderKLCFW",
    "Codec",
    "Denoiser",
    "ModelMixin",
    "ModelSettings",
    "Networks",
    "SFTUNet2DConditionModel",
    "Schedule",
    "StructuralEncoder",
    "build_autoencoder",
    "build_networks",
    "load_preset",
    "make_scheduler",
]

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from sslsr_diffusion.models.codec import Codec
    from sslsr_diffusion.models.process import Schedule, make_scheduler
    from sslsr_diffusion.models.stablesr.build import Networks, build_autoencoder, build_networks
    from sslsr_diffusion.models.stablesr.cfw import AutoencoderKLCFW
    from sslsr_diffusion.models.stablesr.denoiser import Denoiser
    from sslsr_diffusion.models.stablesr.settings import ModelSettings, load_preset
    from sslsr_diffusion.models.stablesr.structural_encoder import StructuralEncoder
    from sslsr_diffusion.models.stablesr.unet import SFTUNet2DConditionModel


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
