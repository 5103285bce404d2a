"""LPIPS as something to train on: differentiable, with VGG16 features; the metric `lpips` (AlexNet) is in learned.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.evaluation.weights import WEIGHTS, missing

INSTALL = 'pip install "sslsr-diffusion[lpips]"'
_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of torchvision's vgg16


class PerceptualDistance(nn.Module):
    """LPIPS = sum_l mean_xy w_l . (a_l - b_l)^2, a_l and b_l the unit-length VGG16 features of layer l   (Zhang et al., CVPR 2018)"""

    def __init__(self, features: nn.Sequential, weights: list[Tensor]) -> None:
        """`features` are vgg16's; `weights` five times [C_l]."""
        super().__init__()
        self.features = features[: _TAPS[-1] + 1]
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


def unavailable(*, download: bool = True) -> str | None:
    """Why LPIPS cannot be trained on here, with what to do about it; None when it can."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # torchvision fails in many ways when it does not fit the installed torch
        return f"needs torchvision, whose import failed ({type(error).__name__}: {error}); {INSTALL}"
    return missing(WEIGHTS["lpips-vgg"], download=download)


def load_perceptual_distance() -> PerceptualDistance:
    """LPIPS 0.1 with the published weights, downloaded where they are not there yet.

    Raises:
        MissingDependency: torchvision is not installed.
        UserError: the weights are missing or damaged (the message says which files belong where).
    """
    reason = unavailable()
    if reason is not None:
        raise (MissingDependency if "pip install" in reason else UserError)(f"losses: lpips {reason}.")
    from torchvision.models import vgg16

    backbone, linear = (torch.load(file.path, map_location="cpu", weights_only=True) for file in WEIGHTS["lpips-vgg"])
    with torch.device("meta"):
        features = vgg16(weights=None).features
    state = {name.removeprefix("features."): tensor for name, tensor in backbone.items() if name.startswith("features.")}
    features.load_state_dict(state, assign=True)
    return PerceptualDistance(features, [linear[f"lin{layer}.model.1.weight"].float() for layer in range(len(_TAPS))])
