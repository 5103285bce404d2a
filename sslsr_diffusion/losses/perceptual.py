"""The perceptual loss: features that a frozen network sees in prediction and ground truth."""

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from sslsr_diffusion.errors import MissingDependency
from sslsr_diffusion.losses.backbones import LAYERS, Backbone, build_backbone, check_backbone
from sslsr_diffusion.losses.base import Means, NoiseGate, SampleLoss, pixels
from sslsr_diffusion.types import Outputs

JUDGE = "efficientnet_lite0"


class PerceptualSettings(NoiseGate):
    """Mean absolute difference of features (ESRGAN, Real-ESRGAN: VGG19)."""

    kind: Literal["perceptual"] = "perceptual"
    backbone: Backbone = Field(
        "vgg19",
        description="vgg19 (548 MB from torchvision's server, or `file`), or efficientnet_lite1, efficientnet_lite2 of the extra "
        "`perceptual`, whose weights come as packages.",
    )
    layers: dict[str, float] = Field(
        {"conv5_4": 1.0},
        min_length=1,
        description="Layer -> weight. vgg19: conv1_1 to conv5_4 before activation (ESRGAN: conv5_4), relu1_1 to relu5_4 after it; "
        "EfficientNets: block0 to block20.",
    )
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum (ESRGAN, Real-ESRGAN: 1).")
    file: str | None = Field(None, description="The backbone's weights, by torchvision's or the package's names; null: as `backbone` says.")

    @field_validator("backbone", mode="before")
    @classmethod
    def _no_judge(cls, name: Any) -> Any:
        if name == JUDGE:
            raise ValueError(
                f"{JUDGE} is the judge of this project and nothing trains on it; take efficientnet_lite1 or efficientnet_lite2."
            )
        return name

    @field_validator("layers")
    @classmethod
    def _known(cls, layers: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        backbone = info.data.get("backbone")
        known = LAYERS.get(str(backbone), ())
        for name, weight in layers.items():
            if known and name not in known:
                examples = f"{known[0]} to {known[-1]}" if known[0].startswith("block") else "conv1_1 to conv5_4 or relu1_1 to relu5_4"
                raise ValueError(f"{name!r} is no layer of {backbone}; expected some of {examples}.")
            if weight < 0:
                raise ValueError(f"{name}: expected a weight of at least 0, got {weight}.")
        return layers

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        deepest = max(self.layers, key=LAYERS[self.backbone].index)
        if self.backbone == "vgg19" and side >> (int(deepest[4]) - 1) == 0:
            yield "layers", f"{deepest} sees nothing of pictures of {side} pixels a side."


class PerceptualLoss(SampleLoss):
    """sum_l w_l mean |phi_l(sr) - phi_l(hr)|, phi the frozen backbone's features   (Johnson et al., ECCV 2016; Wang et al., ECCVW 2018)"""

    settings_class = PerceptualSettings

    def __init__(self, settings: PerceptualSettings, network: nn.Module) -> None:
        super().__init__(settings)
        self.network: nn.Module = network
        self.layers = tuple(name for name in LAYERS[settings.backbone] if name in settings.layers)

    @classmethod
    def build(cls, settings: PerceptualSettings, means: Means) -> Self | None:
        key = f"losses: {settings.called}"
        try:
            return cls(settings, build_backbone(settings.backbone, settings.file, key, shapes=means.shapes))
        except MissingDependency:
            if means.shapes:  # whose estimate then lacks it; the dry run and training say what to install
                return None
            raise

    @classmethod
    def check(cls, settings: PerceptualSettings) -> str:
        return f"{settings.called}: {check_backbone(settings.backbone, settings.file, settings.called)}"

    def errors(self, outputs: Outputs) -> Tensor:
        sr, hr = pixels(outputs)
        pairs = zip(self.layers, self.network(sr, self.layers), self.network(hr, self.layers))
        terms = [self.settings.layers[name] * (own - true).abs().flatten(1).mean(dim=1) for name, own, true in pairs]
        total: Tensor = sum(terms[1:], terms[0])
        return total
