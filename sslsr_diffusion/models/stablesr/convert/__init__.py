"""Released StableSR checkpoints to diffusers components and back."""

from sslsr_diffusion.models.stablesr.convert.folder import VARIANTS, components_from_checkpoint, original_from_folder
from sslsr_diffusion.models.stablesr.convert.stablesr import convert, restore
from sslsr_diffusion.unpickle import read_checkpoint

__all__ = ["VARIANTS", "components_from_checkpoint", "convert", "original_from_folder", "read_checkpoint", "restore"]
