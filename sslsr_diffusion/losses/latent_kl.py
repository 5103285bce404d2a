"""The autoencoder's latent loss: keeps the latents close to a unit Gaussian (task autoencoder)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from sslsr_diffusion.losses.base import LatentLoss, LossSettings, share
from sslsr_diffusion.types import Outputs


class LatentKLSettings(LossSettings):
    """Kullback-Leibler divergence of the latents from a unit Gaussian, per latent value."""

    kind: Literal["latent_kl"] = "latent_kl"
    weight: float = Field(1e-4, ge=0, description="Factor of this term in the sum; the mean runs over all latent values.")


class LatentKLLoss(LatentLoss):
    """mean 0.5 (mean^2 + var - 1 - ln var) over all latent values   (Kingma and Welling, 2014)"""

    settings_class = LatentKLSettings
    reads = frozenset({"moments"})

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        if outputs.moments is None:
            raise ValueError("the latent_kl loss needs Outputs.moments, which only the task autoencoder computes")
        mean, log_variance = outputs.moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(dim=1)  # [B]
        value = share(divergence.sum(), count, self.count(outputs))
        return self.settings.weight * value, {self.name: value.detach()}
