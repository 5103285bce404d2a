"""Base of losses that compare what a frozen network sees in prediction and ground truth."""

from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from sslsr_diffusion.errors import MissingDependency
from sslsr_diffusion.losses.backbones import LAYERS, Backbone, build_backbone, check_backbone
from sslsr_diffusion.losses.base import Means, NoiseGate, SampleLoss

JUDGE = "efficientnet_lite0"


class FeatureSettings(NoiseGate):
    """Which network, and which of its layers."""

    backbone: Backbone = Field(
        "vgg19",
        description="vgg19 (548 MB from torchvision's server, or `file`), or efficientnet_lite1, efficientnet_lite2 of the extra "
        "`perceptual`, whose weights come as packages.",
    )
    layers: dict[str, float] = Field(
        min_length=1,
        description="Layer -> weight. vgg19: conv1_1 to conv5_4 before activation, relu1_1 to relu5_4 after it; EfficientNets: block0 to "
        "block20.",
    )
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

    @property
    def deepest(self) -> str:
        """The layer that sees the largest parts of a picture."""
        return max(self.layers, key=LAYERS[self.backbone].index)


class FeatureLoss(SampleLoss):
    """A loss over the features of `layers`, in the network's order; `network(pictures, layers)` gives them."""

    def __init__(self, settings: Any, network: nn.Module, means: Means = Means()) -> None:  # noqa: B008 - it is frozen
        super().__init__(settings)
        self.seed = means.seed
        self.network: nn.Module = network
        self.layers = tuple(name for name in LAYERS[settings.backbone] if name in settings.layers)

    @classmethod
    def build(cls, settings: Any, means: Means) -> Self | None:
        key = f"losses: {settings.called}"
        try:
            return cls(settings, build_backbone(settings.backbone, settings.file, key, shapes=means.shapes), means)
        except MissingDependency:
            if means.shapes:  # whose estimate then lacks it; the dry run and training say what to install
                return None
            raise

    @classmethod
    def check(cls, settings: Any) -> str:
        return f"{settings.called}: {check_backbone(settings.backbone, settings.file, settings.called)}"
