"""The diffusion loss: how well the noise (or v) was predicted."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from sslsr_diffusion.losses.base import LatentLoss, LossSettings, share
from sslsr_diffusion.types import Outputs


class DiffusionSettings(LossSettings):
    """Mean squared error of the prediction, as in StableSR."""

    kind: Literal["diffusion"] = "diffusion"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum (StableSR: 1).")
    min_snr_gamma: float | None = Field(
        None,
        gt=0,
        description="Min-SNR weighting with this gamma (Hang et al., ICCV 2023, use 5); null: every timestep weighs 1, as in StableSR.",
    )


class DiffusionLoss(LatentLoss):
    """mean_i w(t_i) * mean (pred_i - target_i)^2;   w = min(snr, gamma) (d x0 / d pred)^2, that is min(snr, gamma) / snr for epsilon and
    min(snr, gamma) / (snr + 1) for v   (Hang et al., ICCV 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy")

    w = 1 without gamma.
    """

    settings_class = DiffusionSettings

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        if outputs.pred is None or outputs.target is None:
            raise ValueError("the diffusion loss needs Outputs.pred and Outputs.target, which this task does not compute")
        error = (outputs.pred.float() - outputs.target.float()).square().flatten(1).mean(dim=1)  # [B]
        own = self.count(outputs)
        raw = share(error.detach().sum(), count, own)
        if self.settings.min_snr_gamma is not None:
            assert outputs.clean_gain is not None
            snr = outputs.noise_level.square().reciprocal()
            error = error * snr.clamp(max=self.settings.min_snr_gamma) * outputs.clean_gain.square()
        return self.settings.weight * share(error.sum(), count, own), {self.name: raw}
