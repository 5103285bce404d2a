"""The back-projection loss of BebyGAN: the prediction, reduced again, is the low-resolution picture that it was made from."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from sslsr_diffusion.imresize import matlab_bicubic
from sslsr_diffusion.losses.base import NoiseGate, SampleLoss, pixels
from sslsr_diffusion.types import Outputs


class BackProjectionSettings(NoiseGate):
    """L1 of the reduced prediction to the low-resolution picture; for pairs that a bicubic reduction made (BebyGAN)."""

    kind: Literal["back_projection"] = "back_projection"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum (BebyGAN: 1).")


class BackProjectionLoss(SampleLoss):
    """mean |bicubic(sr) - lr|, reduced as MATLAB does and not clamped   (Li et al., AAAI 2022, equation 5)"""

    settings_class = BackProjectionSettings
    reads = frozenset({"sr", "lr"})

    def errors(self, outputs: Outputs) -> Tensor:
        sr, _ = pixels(outputs)
        assert outputs.lr is not None
        return (matlab_bicubic(sr, outputs.lr.shape[-1] / sr.shape[-1]) - outputs.lr).abs().flatten(1).mean(dim=1)
