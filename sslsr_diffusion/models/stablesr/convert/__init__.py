"""Released StableSR checkpoints to diffusers components and back."""

from __future__ import annotations

from sslsr_diffusion.models.stablesr.convert.folder import VARIANTS, Conversion, components_from_checkpoint, original_from_folder
from sslsr_diffusion.models.stablesr.convert.stablesr import (
    convert_structural_encoder,
    convert_text_encoder,
    convert_unet,
    convert_vae,
    restore_structural_encoder,
    restore_text_encoder,
    restore_unet,
    restore_vae,
)
from sslsr_diffusion.models.unpickle import read_checkpoint

__all__ = [
    "VARIANTS",
    "Conversion",
    "components_from_checkpoint",
    "convert_structural_encoder",
    "convert_text_encoder",
    "convert_unet",
    "convert_vae",
    "original_from_folder",
    "read_checkpoint",
    "restore_structural_encoder",
    "restore_text_encoder",
    "restore_unet",
    "restore_vae",
]
