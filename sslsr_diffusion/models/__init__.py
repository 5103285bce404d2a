"""Networks and what surrounds them. Names are resolved at first use: reading a recipe does not import diffusers.

Published pipelines name their classes under `sslsr_diffusion.models` in model_index.json, and diffusers' loader looks up
its base classes here too; so these names must stay, wherever the files move.
"""

from typing import TYPE_CHECKING

from sslsr_diffusion.tables import lazily

_HOME = {
    "FAMILIES": "sslsr_diffusion.models.families",
    "AutoencoderKLCFW": "sslsr_diffusion.models.stablesr.cfw",
    "ModelMixin": "diffusers",
    "SFTUNet2DConditionModel": "sslsr_diffusion.models.stablesr.unet",
    "ShuffleAutoencoder": "sslsr_diffusion.models.shuffle_autoencoder",
    "StructuralEncoder": "sslsr_diffusion.models.stablesr.structural_encoder",
}

__all__ = ["FAMILIES", "AutoencoderKLCFW", "ModelMixin", "SFTUNet2DConditionModel", "ShuffleAutoencoder", "StructuralEncoder"]

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from sslsr_diffusion.models.families import FAMILIES
    from sslsr_diffusion.models.shuffle_autoencoder import ShuffleAutoencoder
    from sslsr_diffusion.models.stablesr.cfw import AutoencoderKLCFW
    from sslsr_diffusion.models.stablesr.structural_encoder import StructuralEncoder
    from sslsr_diffusion.models.stablesr.unet import SFTUNet2DConditionModel

__getattr__, __dir__ = lazily(__name__, _HOME)
