"""The perceptual loss: features that a frozen network sees in prediction and ground truth."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor

from sslsr_diffusion.losses.backbones import reduction
from sslsr_diffusion.losses.base import pixels
from sslsr_diffusion.losses.features import FeatureLoss, FeatureSettings
from sslsr_diffusion.types import Outputs


class PerceptualSettings(FeatureSettings):
    """Mean absolute difference of features (ESRGAN, Real-ESRGAN: VGG19)."""

    kind: Literal["perceptual"] = "perceptual"
    layers: dict[str, float] = Field(
        {"conv5_4": 1.0},
        min_length=1,
        description="Layer -> weight. vgg19: conv1_1 to conv5_4 before activation (ESRGAN: conv5_4), relu1_1 to relu5_4 after it; "
        "EfficientNets: block0 to block20.",
    )
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum (ESRGAN, Real-ESRGAN: 1).")

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        if self.backbone == "vgg19" and side < reduction(self.backbone, self.deepest):
            yield "layers", f"{self.deepest} sees nothing of pictures of {side} pixels a side."


class PerceptualLoss(FeatureLoss):
    """sum_l w_l mean |phi_l(sr) - phi_l(hr)|, phi the frozen backbone's features   (Johnson et al., ECCV 2016; Wang et al., ECCVW 2018)"""

    settings_class = PerceptualSettings

    def errors(self, outputs: Outputs) -> Tensor:
        sr, hr = pixels(outputs)
        pairs = zip(self.layers, self.network(sr, self.layers), self.network(hr, self.layers))
        terms = [self.settings.layers[name] * (own - true).abs().flatten(1).mean(dim=1) for name, own, true in pairs]
        total: Tensor = sum(terms[1:], terms[0])
        return total
