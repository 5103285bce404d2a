"""The back-projection loss of BebyGAN: the prediction, reduced again, is the low-resolution picture that it was made from."""

from functools import cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslsr_diffusion.losses.base import NoiseGate, SampleLoss, pixels
from sslsr_diffusion.types import Outputs


class BackProjectionSettings(NoiseGate):
    """L1 of the reduced prediction to the low-resolution picture; for pairs that a bicubic reduction made (BebyGAN)."""

    kind: Literal["back_projection"] = "back_projection"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum (BebyGAN: 1).")


class BackProjectionLoss(SampleLoss):
    """mean |reduce(sr) - lr|, not clamped   (Li et al., AAAI 2022, equation 5)"""

    settings_class = BackProjectionSettings
    reads = frozenset({"sr", "lr"})

    def errors(self, outputs: Outputs) -> Tensor:
        sr, _ = pixels(outputs)
        if outputs.lr is None:
            raise ValueError("the back_projection loss needs Outputs.lr, which this step did not prepare")
        return (reduce(sr, sr.shape[-1] // outputs.lr.shape[-1]) - outputs.lr).abs().flatten(1).mean(dim=1)


def reduce(pictures: Tensor, scale: int) -> Tensor:
    """MATLAB's bicubic reduction: a = -0.5, widened by `scale` against aliasing, edges repeated in mirrored order.

    Args:
        pictures: [B, C, H, W], sides multiples of `scale`; differentiable.
    Returns:
        [B, C, H / scale, W / scale]
    """
    rows, columns = (_rows(side, scale).to(pictures) for side in pictures.shape[-2:])
    return rows @ pictures @ columns.T


@cache
def _rows(side: int, scale: int) -> Tensor:
    """[side / scale, side] float32: which pixels of a line make which of the reduced line."""
    made = torch.arange(side // scale, dtype=torch.float64)[:, None]
    first = torch.arange(-2 * scale, 3 * scale)[None]  # of a reduced pixel at 0: all that its kernel may reach
    weights = _cubic((first - (scale - 1) / 2).double() / scale).expand(len(made), -1)
    taken = (made * scale).long() + first
    mirrored = torch.remainder(taken, 2 * side)
    mirrored = torch.where(mirrored < side, mirrored, 2 * side - 1 - mirrored)
    rows = torch.zeros(len(made), side, dtype=torch.float64).scatter_add_(1, mirrored, weights)
    return (rows / rows.sum(dim=1, keepdim=True)).float()


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5   (Keys, 1981)"""
    x = x.abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
