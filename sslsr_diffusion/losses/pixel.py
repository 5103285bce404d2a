"""The pixel losses: how far the decoded prediction is from the ground truth, pixel by pixel."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from sslsr_diffusion.losses.base import NoiseGate, SampleLoss, pixels
from sslsr_diffusion.types import Outputs


class PixelL1Settings(NoiseGate):
    """Mean absolute pixel difference, in the [0, 1] range."""

    kind: Literal["pixel_l1"] = "pixel_l1"
    weight: float = Field(0.1, ge=0, description="Factor of this term in the sum (StableSR-SSL: 0.1).")


class PixelL2Settings(NoiseGate):
    """Mean squared pixel difference, in the [0, 1] range."""

    kind: Literal["pixel_l2"] = "pixel_l2"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum.")


class CharbonnierSettings(NoiseGate):
    """A smooth form of the mean absolute pixel difference, in the [0, 1] range."""

    kind: Literal["charbonnier"] = "charbonnier"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum.")
    epsilon: float = Field(1e-3, gt=0, description="Differences well below it count squared, those above it plain (LapSRN: 1e-3).")


class PixelL1Loss(SampleLoss):
    """mean |sr - hr|, both in [0, 1]."""

    settings_class = PixelL1Settings

    def errors(self, outputs: Outputs) -> Tensor:
        return _difference(outputs).abs().flatten(1).mean(dim=1)


class PixelL2Loss(SampleLoss):
    """mean (sr - hr)^2, both in [0, 1]."""

    settings_class = PixelL2Settings

    def errors(self, outputs: Outputs) -> Tensor:
        return _difference(outputs).square().flatten(1).mean(dim=1)


class CharbonnierLoss(SampleLoss):
    """mean sqrt((sr - hr)^2 + epsilon^2), both in [0, 1]   (Lai et al., CVPR 2017, equation 2)"""

    settings_class = CharbonnierSettings

    def errors(self, outputs: Outputs) -> Tensor:
        return (_difference(outputs).square() + self.settings.epsilon**2).sqrt().flatten(1).mean(dim=1)


def _difference(outputs: Outputs) -> Tensor:
    sr, hr = pixels(outputs)
    return sr - hr
