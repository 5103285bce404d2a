"""The gradient losses of SPSR: the gradient map of the picture, and the one that the network's branch makes."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from sslsr_diffusion.losses.base import NoiseGate, SampleLoss, pixels
from sslsr_diffusion.losses.local import gradient_map
from sslsr_diffusion.types import Outputs


class GradientSettings(NoiseGate):
    """Squared difference of the gradient maps of prediction and ground truth (SPSR)."""

    kind: Literal["gradient"] = "gradient"
    weight: float = Field(0.01, ge=0, description="Factor of this term in the sum (SPSR: 0.01).")


class GradientBranchSettings(NoiseGate):
    """Absolute difference of the network's second output and the gradient map of the ground truth (SPSR)."""

    kind: Literal["gradient_branch"] = "gradient_branch"
    weight: float = Field(0.5, ge=0, description="Factor of this term in the sum (SPSR: 0.5).")


class GradientLoss(SampleLoss):
    """mean (M(sr) - M(hr))^2   (Ma et al., CVPR 2020)"""

    settings_class = GradientSettings

    def errors(self, outputs: Outputs) -> Tensor:
        sr, hr = pixels(outputs)
        return (gradient_map(sr) - gradient_map(hr)).square().flatten(1).mean(dim=1)


class GradientBranchLoss(SampleLoss):
    """mean |branch - M(hr)|   (Ma et al., CVPR 2020)"""

    settings_class = GradientBranchSettings
    reads = frozenset({"sr", "branch"})

    def errors(self, outputs: Outputs) -> Tensor:
        _, hr = pixels(outputs)
        assert outputs.branch is not None
        return (outputs.branch - gradient_map(hr)).abs().flatten(1).mean(dim=1)
