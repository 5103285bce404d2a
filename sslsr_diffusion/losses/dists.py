"""DISTS: structure and texture of the prediction and the ground truth, as VGG16 features see them."""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.losses.backbones import VGG, build_vgg, check_backbone
from sslsr_diffusion.losses.base import Means, NoiseGate, SampleLoss, pixels
from sslsr_diffusion.losses.files import read_tensors
from sslsr_diffusion.types import Outputs
from sslsr_diffusion.weights import WEIGHTS, missing

LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
LEAST = 16  # pixels: one position is left in the last of them
_STABLE = 1e-6  # the published constant of both similarities


class DistsSettings(NoiseGate):
    """Deep image structure and texture similarity (Ding et al., TPAMI 2020): textures may differ where structure may not."""

    kind: Literal["dists"] = "dists"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum.")
    weights: str | None = Field(
        None, description="File with the published tensors alpha and beta; null: DISTS_weights of pyiqa's collection, downloaded."
    )
    file: str | None = Field(None, description="VGG16's weights, by torchvision's names; null: downloaded (528 MB).")

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        if side < LEAST:
            yield "kind", f"dists needs pictures of at least {LEAST} pixels a side, these have {side}."


class DistsLoss(SampleLoss):
    """1 - sum_l sum_c (alpha_lc l(x_lc, y_lc) + beta_lc s(x_lc, y_lc)), alpha and beta divided by their sum

    l = (2 mx my + c) / (mx^2 + my^2 + c), s = (2 cov + c) / (vx + vy + c) of channel c in layer l over all positions, c = 1e-6
    (Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity", TPAMI 2020, equations 4 to 6). Layers are the
    picture itself and five of VGG16, whose poolings are L2.
    """

    settings_class = DistsSettings

    def __init__(self, settings: DistsSettings, network: "StructureAndTexture") -> None:
        super().__init__(settings)
        self.network: StructureAndTexture = network

    @classmethod
    def build(cls, settings: DistsSettings, means: Means) -> Self:
        key = f"losses: {settings.called}"
        vgg = build_vgg("vgg16", settings.file, key, shapes=means.shapes, pooling=L2Pooling)
        with torch.device("meta" if means.shapes else "cpu"):
            network = StructureAndTexture(vgg)
        if not means.shapes:
            network.load_weights(settings.weights, f"{key}.weights")
        return cls(settings, network.requires_grad_(False).eval())

    @classmethod
    def check(cls, settings: DistsSettings) -> str:
        vgg = check_backbone("vgg16", settings.file, settings.called)
        weights = _weights_file(settings.weights, f"{settings.called}.weights", download=False)
        read_tensors(weights, f"{settings.called}.weights")
        return f"{settings.called}: {vgg}; {weights}"

    def errors(self, outputs: Outputs) -> Tensor:
        distances: Tensor = self.network(*pixels(outputs))
        return distances


class L2Pooling(nn.Module):
    """y = sqrt(g * x^2) at every second position, g the 3 x 3 Hann window that sums to 1: no aliasing   (Ding et al., equation 2)"""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, ceil(h / 2), ceil(w / 2)]"""
        hann = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
        window = (hann[:, None] * hann).expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x.square(), window, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


class StructureAndTexture(nn.Module):
    """The distance, as a network with its own alpha and beta."""

    alpha: Tensor  # [1, C, 1, 1], C the channels of picture and layers together
    beta: Tensor

    def __init__(self, vgg: VGG) -> None:
        super().__init__()
        self.vgg = vgg
        channels = 3 + sum(len(vgg.get_parameter(f"features.{vgg.places[layer] - 1}.bias")) for layer in LAYERS)
        for name in ("alpha", "beta"):
            self.register_buffer(name, torch.ones(1, channels, 1, 1))

    def load_weights(self, file: str | None, key: str) -> None:
        """alpha and beta out of a file; UserError where there are none, or they belong to another network."""
        path = _weights_file(file, key)
        tensors = read_tensors(path, key)
        for name in ("alpha", "beta"):
            own, got = self.get_buffer(name), tensors.get(name)
            if got is None or got.shape != own.shape:
                shown = "none" if got is None else str(list(got.shape))
                raise UserError(f"{key}: expected {name} of shape {list(own.shape)} in {path}, got {shown}; give DISTS's published file.")
            own.copy_(got)

    def forward(self, restored: Tensor, reference: Tensor) -> Tensor:
        """[B, 3, H, W] about [0, 1], at least 16 pixels a side -> [B], differentiable in both."""
        sides = [[x, *self.vgg(x, LAYERS)] for x in (restored, reference)]
        similarities = [_similarities(x, y) for x, y in zip(*sides)]
        luminance, structure = (torch.cat(parts, dim=1) for parts in zip(*similarities))  # [B, C] each
        alpha, beta = self.alpha.flatten(), self.beta.flatten()
        return 1 - (luminance @ alpha + structure @ beta) / (alpha.sum() + beta.sum())


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """l and s of each channel, [B, C], of features [B, C, h, w]."""
    x, y = x.flatten(2), y.flatten(2)
    mx, my = x.mean(dim=2), y.mean(dim=2)
    dx, dy = x - mx[..., None], y - my[..., None]
    luminance = (2 * mx * my + _STABLE) / (mx.square() + my.square() + _STABLE)
    structure = (2 * (dx * dy).mean(dim=2) + _STABLE) / (dx.square().mean(dim=2) + dy.square().mean(dim=2) + _STABLE)
    return luminance, structure


def _weights_file(file: str | None, key: str, *, download: bool = True) -> str:
    """Where alpha and beta are; UserError where they are not."""
    if file is not None:
        return file
    own = WEIGHTS["dists"][1:]
    if reason := missing(own, download=download):
        raise UserError(f"{key}: DISTS's {reason}; or give weights.")
    return str(own[0].path)
