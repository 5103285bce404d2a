"""The pixel loss: mean absolute difference of the decoded prediction and the ground truth."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslsr_diffusion.losses.base import NoiseGate, PixelLoss, decoded_active, pixels, share
from sslsr_diffusion.types import Outputs


class PixelL1Settings(NoiseGate):
    """Mean absolute pixel difference, in the [0, 1] range."""

    kind: Literal["pixel_l1"] = "pixel_l1"
    weight: float = Field(0.1, ge=0, description="Factor of this term in the sum (StableSR-SSL: 0.1).")


class PixelL1Loss(PixelLoss):
    """mean |sr - hr| over the samples that pass the noise gate, both in [0, 1]."""

    settings_class = PixelL1Settings

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        sr, hr = pixels(outputs)
        error = torch.where(decoded_active(self, outputs), (sr - hr).abs().flatten(1).mean(dim=1), 0.0)  # [K]
        value = share(error.sum(), count, self.count(outputs))
        return self.settings.weight * value, {self.name: value.detach()}
