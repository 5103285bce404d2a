"""Losses by name: small callables over `Outputs`. A recipe lists them; a new one is a file and a line in LOSSES."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sslsr_diffusion.config import one_of
from sslsr_diffusion.losses.base import Look, Loss, LossSettings, Means
from sslsr_diffusion.tables import named

__all__ = ["LOSSES", "Look", "Loss", "LossEntry", "Means", "build_losses"]

LOSSES: dict[str, Any] = {
    kind: named(f"sslsr_diffusion.losses.{where}")
    for kind, where in {
        "diffusion": "diffusion:DiffusionLoss",
        "pixel_l1": "pixel:PixelL1Loss",
        "pixel_l2": "pixel:PixelL2Loss",
        "charbonnier": "pixel:CharbonnierLoss",
        "self_similarity": "self_similarity:SelfSimilarityLoss",
        "latent_kl": "latent_kl:LatentKLLoss",
        "lpips": "lpips:LpipsLoss",
        "perceptual": "perceptual:PerceptualLoss",
        "fdl": "fdl:FDLLoss",
        "dists": "dists:DistsLoss",
        "gan": "gan:GANLoss",
        "vsd": "vsd:VSDLoss",
        "ldl": "ldl:LDLLoss",
        "best_buddy": "best_buddy:BestBuddyLoss",
        "back_projection": "back_projection:BackProjectionLoss",
        "gradient": "gradient:GradientLoss",
        "gradient_branch": "gradient:GradientBranchLoss",
        "rank": "rank:RankLoss",
    }.items()
}

if TYPE_CHECKING:
    LossEntry = LossSettings
else:
    LossEntry = one_of([loss.settings_class for loss in LOSSES.values()])


def build_losses(entries: Sequence[Any], means: Means | None = None) -> list[Loss]:
    """The callables of a recipe's list, in its order; an optional loss that cannot be had is left out."""
    built = [LOSSES[entry.kind].build(entry, means or Means()) for entry in entries]
    return [loss for loss in built if loss is not None]
