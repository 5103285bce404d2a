"""The artefact loss of LDL: pixels count where the prediction varies unlike the truth, and more so than the averaged weights' does."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslsr_diffusion.losses.base import NoiseGate, SampleLoss, pixels
from sslsr_diffusion.losses.local import local_variance
from sslsr_diffusion.types import Outputs

WINDOW = 7


class LDLSettings(NoiseGate):
    """Locally discriminative learning (LDL): needs `training.ema`, whose picture tells artefacts from details."""

    kind: Literal["ldl"] = "ldl"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum (LDL: 1).")

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        if side <= WINDOW // 2:
            yield "kind", f"ldl looks at windows of {WINDOW} pixels, too large for pictures of {side} pixels a side."


class LDLLoss(SampleLoss):
    """mean |A sr - A hr|, with the artefact map A of `artefact_map`, through which the gradient passes too   (Liang et al., CVPR 2022)"""

    settings_class = LDLSettings
    reads = frozenset({"sr", "sr_ema"})

    def errors(self, outputs: Outputs) -> Tensor:
        sr, hr = pixels(outputs)
        assert outputs.sr_ema is not None
        artefacts = artefact_map(sr, hr, outputs.sr_ema)
        return (artefacts * sr - artefacts * hr).abs().flatten(1).mean(dim=1)


def artefact_map(sr: Tensor, hr: Tensor, sr_ema: Tensor) -> Tensor:
    """A = (var R)^(1/5) * local var R, and 0 where R < R_ema;   R = sum_c |hr - sr|   (Liang et al., CVPR 2022, equations 2 to 5)

    The first variance is over the whole picture, the second over 7 x 7 pixels, both unbiased. Where a picture has no error the power's
    slope would be infinite; there A and its gradient are 0.

    Args:
        sr, hr, sr_ema: [B, 3, H, W]; differentiable in sr.
    Returns:
        [B, 1, H, W]
    """
    residual = (hr - sr).abs().sum(dim=1, keepdim=True)
    spread = residual.flatten(1).var(dim=1)
    power = torch.where(spread > 0, torch.where(spread > 0, spread, 1.0).pow(0.2), 0.0)
    artefacts = power[:, None, None, None] * local_variance(residual, WINDOW)
    return torch.where(residual < (hr - sr_ema).abs().sum(dim=1, keepdim=True), 0.0, artefacts)
