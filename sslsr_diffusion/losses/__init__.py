"""Losses by name: small callables over `Outputs`. A recipe lists them; this dict is where a new one is entered."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from sslsr_diffusion.losses.base import Loss
from sslsr_diffusion.losses.diffusion import DiffusionLoss, DiffusionSettings
from sslsr_diffusion.losses.latent_kl import LatentKLLoss, LatentKLSettings
from sslsr_diffusion.losses.lpips import LpipsLoss, LpipsSettings
from sslsr_diffusion.losses.patch_gan import PatchGANLoss, PatchGANSettings
from sslsr_diffusion.losses.pixel import PixelL1Loss, PixelL1Settings
from sslsr_diffusion.losses.self_similarity import SelfSimilarityLoss, SelfSimilaritySettings

__all__ = ["LOSSES", "Loss", "LossSettings", "build_losses"]

LOSSES: dict[str, tuple[type, type]] = {
    "diffusion": (DiffusionSettings, DiffusionLoss),
    "pixel_l1": (PixelL1Settings, PixelL1Loss),
    "self_similarity": (SelfSimilaritySettings, SelfSimilarityLoss),
    "latent_kl": (LatentKLSettings, LatentKLLoss),
    "lpips": (LpipsSettings, LpipsLoss),
    "patch_gan": (PatchGANSettings, PatchGANLoss),
}

LossSettings = Annotated[
    DiffusionSettings | PixelL1Settings | SelfSimilaritySettings | LatentKLSettings | LpipsSettings | PatchGANSettings,
    Field(discriminator="kind"),
]


def build_losses(settings: list[Any], *, prediction_type: str = "epsilon", distance: Any = None, seed: int = 0) -> list[Loss]:
    """The callables of a recipe's list, in its order; `distance` of two pictures is what `lpips` measures with.

    An optional loss whose means are missing (`distance` None) is left out.
    """
    extra = {"diffusion": {"prediction_type": prediction_type}, "lpips": {"distance": distance}, "patch_gan": {"seed": seed}}
    return [
        LOSSES[entry.kind][1](entry, **extra.get(entry.kind, {})) for entry in settings if entry.kind != "lpips" or distance is not None
    ]
