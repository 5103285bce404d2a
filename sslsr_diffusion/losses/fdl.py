"""The frequency distribution loss: how the spectra of features are distributed, wherever in the picture they come from."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.losses.backbones import reduction
from sslsr_diffusion.losses.base import Means, pixels
from sslsr_diffusion.losses.features import FeatureLoss, FeatureSettings
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.types import Outputs

SIDE = 5  # of the patches of a spectrum that are projected


class FDLSettings(FeatureSettings):
    """Distance of the distributions of amplitude and phase of features; no pixel is held to its place."""

    kind: Literal["fdl"] = "fdl"
    layers: dict[str, float] = Field(
        {f"relu{stage}": 1.0 for stage in ("1_2", "2_2", "3_4", "4_4", "5_4")},
        min_length=1,
        description="Layer -> weight, by the names of `perceptual`; EfficientNets: block0 to block20.",
    )
    weight: float = Field(0.002, ge=0, description="Factor of this term in the sum (StrSR's second stage: 0.002).")
    phase_weight: float = Field(1.0, ge=0, description="Factor of the phases' distance beside that of the amplitudes.")
    projections: int = Field(256, ge=1, description="Random directions that the spectra are projected to, drawn once from the run's seed.")

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        least = SIDE * reduction(self.backbone, self.deepest)
        if side < least:
            yield "layers", f"{self.deepest} needs pictures of at least {least} pixels a side, these have {side}."


class FDLLoss(FeatureLoss):
    """sum_l w_l (SW(|F_l(sr)|, |F_l(hr)|) + phase_weight SW(arg F_l(sr), arg F_l(hr))), F_l the 2-D Fourier transform of layer l's features

    SW(a, b) = mean over directions and ranks of |sort(d . a) - sort(d . b)|, the sliced Wasserstein distance over all 5 x 5 patches
    (Ni et al., CVPR 2024, "Misalignment-Robust Frequency Distribution Loss"). Directions have unit length.
    """

    settings_class = FDLSettings

    def __init__(self, settings: FDLSettings, network: nn.Module, means: Means = Means()) -> None:  # noqa: B008 - it is frozen
        super().__init__(settings, network, means)
        self._directions: dict[str, Tensor] = {}

    def errors(self, outputs: Outputs) -> Tensor:
        sr, hr = pixels(outputs)
        total = sr.new_zeros(len(sr))
        for name, own, true in zip(self.layers, self.network(sr, self.layers), self.network(hr, self.layers)):
            a, b = (torch.fft.fft2(features) for features in (own, true))
            directions = self._drawn(name, own)
            distance = _sliced(a.abs(), b.abs(), directions) + self.settings.phase_weight * _sliced(a.angle(), b.angle(), directions)
            total = total + self.settings.layers[name] * distance
        return total

    def _drawn(self, layer: str, features: Tensor) -> Tensor:
        """The directions of a layer, [projections, C, 5, 5] where its features are. They follow from the seed: no checkpoint has them."""
        if layer not in self._directions:
            shape = (self.settings.projections, features.shape[1], SIDE, SIDE)
            drawn = torch.randn(shape, generator=sample_generator(self.seed, self.name, layer), device="cpu")
            self._directions[layer] = F.normalize(drawn.flatten(1)).reshape(shape)
        self._directions[layer] = self._directions[layer].to(features)
        return self._directions[layer]


def _sliced(a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
    """[K, C, h, w] twice -> [K]"""
    ranked = [F.conv2d(side, directions).flatten(2).sort(dim=-1).values for side in (a, b)]
    return (ranked[0] - ranked[1]).abs().mean(dim=(1, 2))
