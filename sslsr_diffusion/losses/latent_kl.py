"""The autoencoder's latent loss: keeps the latents close to a unit Gaussian (stage autoencoder only)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslsr_diffusion.config import Settings
from sslsr_diffusion.losses.base import share
from sslsr_diffusion.types import Given, Outputs


class LatentKLSettings(Settings):
    """Kullback-Leibler divergence of the latents from a unit Gaussian, per latent value."""

    kind: Literal["latent_kl"] = "latent_kl"
    weight: float = Field(1e-4, ge=0, description="Factor of this term in the sum; the mean runs over all latent values.")


class LatentKLLoss:
    """mean 0.5 (mean^2 + var - 1 - ln var) over all latent values   (Kingma and Welling, 2014)"""

    name = "latent_kl"
    needs_pixels = False

    def __init__(self, settings: LatentKLSettings) -> None:
        self.settings = settings

    def active(self, given: Given) -> Tensor:
        return torch.ones_like(given.t, dtype=torch.bool)

    def count(self, given: Given) -> Tensor:
        return torch.tensor(float(given.t.shape[0]), device=given.t.device)

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        if outputs.moments is None:
            raise ValueError("the latent_kl loss needs Outputs.moments, which only the stage autoencoder computes")
        mean, log_variance = outputs.moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(dim=1)  # [B]
        value = share(divergence.sum(), count, self.count(outputs))
        return self.settings.weight * value, {self.name: value.detach()}
