"""The perceptual loss: LPIPS of the decoded prediction and the ground truth."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from sslsr_diffusion.losses.base import Means, NoiseGate, PixelLoss, decoded_active, pixels, share
from sslsr_diffusion.types import Outputs


class LpipsSettings(NoiseGate):
    """Learned perceptual distance with VGG16 features (needs torchvision and its weights)."""

    kind: Literal["lpips"] = "lpips"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum (StableSR stage 2: 1, beside an L1 in [-1, 1]).")
    optional: bool = Field(
        False, description="Train without this term, with one line in the log, where torchvision or the weights are missing."
    )

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        if self.optional and alone:
            yield "optional", "lpips is the only loss, so the run cannot go without it; add another or set optional: false."


class LpipsLoss(PixelLoss):
    """mean LPIPS(sr, hr) over the samples that pass the noise gate   (Zhang et al., CVPR 2018)"""

    settings_class = LpipsSettings

    def __init__(self, settings: LpipsSettings, *, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        """`distance` of pictures [K, 3, H, W] in [0, 1] -> [K], differentiable in the first; a module follows the pictures' device."""
        super().__init__(settings)
        self.distance: Any = distance

    @classmethod
    def build(cls, settings: LpipsSettings, means: Means) -> Self | None:
        return None if means.distance is None else cls(settings, distance=means.distance)

    def play(self, sr: Tensor, hr: Tensor) -> Tensor:
        return self.distance(sr, hr).mean()

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        sr, hr = pixels(outputs)
        keep = decoded_active(self, outputs)
        if isinstance(self.distance, nn.Module):
            self.distance.to(sr.device)
        total = self.distance(sr[keep], hr[keep]).sum() if bool(keep.any()) else 0 * sr.sum()
        value = share(total, count, self.count(outputs))
        return self.settings.weight * value, {self.name: value.detach()}
