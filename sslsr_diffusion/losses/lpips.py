"""LPIPS of the decoded prediction and the ground truth, and the network that measures it."""

import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.losses.base import Means, NoiseGate, SampleLoss, pixels
from sslsr_diffusion.types import Outputs
from sslsr_diffusion.weights import WEIGHTS, missing

logger = logging.getLogger(__name__)
_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of torchvision's vgg16
_CHANNELS = (64, 128, 256, 512, 512)


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


class LpipsLoss(SampleLoss):
    """mean LPIPS(sr, hr) over the samples that pass the noise gate   (Zhang et al., CVPR 2018)"""

    settings_class = LpipsSettings

    def __init__(self, settings: LpipsSettings, *, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        """`distance` of pictures [K, 3, H, W] in [0, 1] -> [K], differentiable in the first."""
        super().__init__(settings)
        self.distance = distance
        self.network = distance if isinstance(distance, nn.Module) else None

    @classmethod
    def build(cls, settings: LpipsSettings, means: Means) -> Self | None:
        if means.shapes:
            shapes = _shapes()
            return None if shapes is None else cls(settings, distance=shapes)
        try:
            return cls(settings, distance=load_perceptual_distance())
        except (MissingDependency, UserError) as error:
            if not settings.optional:
                raise
            logger.warning("training goes without the optional loss: %s", error)
            return None

    @classmethod
    def check(cls, settings: LpipsSettings) -> str:
        reason = _unavailable(download=False)
        if reason is not None and not settings.optional:
            raise UserError(f"lpips {reason}")
        return f"lpips (optional) {reason}" if reason else "lpips and its weights"

    def errors(self, outputs: Outputs) -> Tensor:
        return self.distance(*pixels(outputs))


class PerceptualDistance(nn.Module):
    """LPIPS = sum_l mean_xy w_l . (a_l - b_l)^2, a_l and b_l the unit-length VGG16 features of layer l   (Zhang et al., CVPR 2018)"""

    def __init__(self, features: nn.Sequential, weights: list[Tensor]) -> None:
        """`features` are vgg16's; `weights` five times [C_l]."""
        super().__init__()
        self.features = nn.Sequential(*list(features)[: _TAPS[-1] + 1])
        for layer, weight in enumerate(weights):
            self.register_buffer(f"weight{layer}", weight.reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, restored: Tensor, reference: Tensor) -> Tensor:
        """[B, 3, H, W] about [0, 1], at least 16 pixels a side -> [B], differentiable in both."""
        a, b = (((x.float() * 2 - 1) - self.get_buffer("shift")) / self.get_buffer("scale") for x in (restored, reference))
        total = torch.zeros(len(a), device=a.device)
        for position, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if position in _TAPS:
                weight = self.get_buffer(f"weight{_TAPS.index(position)}")
                total = total + ((_unit(a) - _unit(b)).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return total


def _unit(features: Tensor) -> Tensor:
    """Unit length over the channels; without the small number under the root there is no gradient where all of them are 0."""
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-20).sqrt()


def load_perceptual_distance() -> PerceptualDistance:
    """LPIPS 0.1 with the published weights, downloaded where they are not there yet.

    Raises:
        MissingDependency: torchvision is not installed.
        UserError: the weights are missing or damaged (the message says which files belong where).
    """
    reason = _unavailable()
    if reason is not None:
        raise (MissingDependency if "pip install" in reason else UserError)(f"losses: lpips {reason}.")
    backbone, linear = (torch.load(file.path, map_location="cpu", weights_only=True) for file in WEIGHTS["lpips-vgg"])
    features = _features()
    state = {name.removeprefix("features."): tensor for name, tensor in backbone.items() if name.startswith("features.")}
    features.load_state_dict(state, assign=True)
    return PerceptualDistance(features, [linear[f"lin{layer}.model.1.weight"].float() for layer in range(len(_TAPS))])


def _features() -> Any:
    """torchvision's VGG16 on the meta device."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        return vgg16(weights=None).features


def _shapes() -> PerceptualDistance | None:
    """The network on the meta device; None where torchvision is missing or does not fit the installed torch, as training will say."""
    if _import_error() is not None:
        return None
    with torch.device("meta"):
        return PerceptualDistance(_features(), [torch.empty(channels) for channels in _CHANNELS])


def _unavailable(*, download: bool = True) -> str | None:
    """Why it cannot be computed here, with what to do about it; None when it can."""
    error = _import_error()
    if error is not None:
        return f'needs torchvision, whose import failed ({type(error).__name__}: {error}); pip install "sslsr-diffusion[lpips]"'
    return missing(WEIGHTS["lpips-vgg"], download=download)


def _import_error() -> Exception | None:
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # it fails in many ways when it does not fit the installed torch
        return error
    return None
