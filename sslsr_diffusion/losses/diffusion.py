"""The diffusion loss: how well the noise (or v) was predicted."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslsr_diffusion.config import Settings
from sslsr_diffusion.losses.base import share
from sslsr_diffusion.types import Given, Outputs


class DiffusionSettings(Settings):
    """Mean squared error of the prediction, as in StableSR."""

    kind: Literal["diffusion"] = "diffusion"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum (StableSR: 1).")
    min_snr_gamma: float | None = Field(
        None,
        gt=0,
        description="Min-SNR weighting with this gamma (Hang et al., ICCV 2023, use 5); null: every timestep weighs 1, as in StableSR.",
    )


class DiffusionLoss:
    """mean_i w(t_i) * mean (pred_i - target_i)^2;   w = min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v

    (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy"; w = 1 without gamma.)
    """

    name = "diffusion"
    needs_pixels = False

    def __init__(self, settings: DiffusionSettings, *, prediction_type: str = "epsilon") -> None:
        self.settings = settings
        self.prediction_type = prediction_type

    def active(self, given: Given) -> Tensor:
        return torch.ones_like(given.t, dtype=torch.bool)

    def count(self, given: Given) -> Tensor:
        return torch.tensor(float(given.t.shape[0]), device=given.t.device)

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        if outputs.pred is None or outputs.target is None:
            raise ValueError("the diffusion loss needs Outputs.pred and Outputs.target, which this stage does not compute")
        error = (outputs.pred.float() - outputs.target.float()).square().flatten(1).mean(dim=1)  # [B]
        own = self.count(outputs)
        raw = share(error.detach().sum(), count, own)
        if self.settings.min_snr_gamma is not None:
            below = outputs.snr + (1 if self.prediction_type == "v_prediction" else 0)
            error = error * outputs.snr.clamp(max=self.settings.min_snr_gamma) / below
        return self.settings.weight * share(error.sum(), count, own), {self.name: raw}
