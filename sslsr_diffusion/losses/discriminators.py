"""Networks that judge pictures or latents: three discriminators and RankSRGAN's ranker, with the published tensor names."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

from sslsr_diffusion.errors import UserError

LEAST_SIDE = 64  # of a picture for the VGG discriminator: 2 x 2 places are left at the end


class _VGGBody(nn.Module):
    """Stages of a 3x3 convolution and a 4x4 one that halves the picture, batch-normalised but for the first, leaky ReLU of 0.2."""

    def __init__(self, width: int, stages: int, *, bias: bool, channels: int = 3) -> None:
        super().__init__()
        self.stages, self.channels = stages, channels
        for stage in range(stages):
            for part, kernel in enumerate((3, 4)):
                wider = width * min(2**stage, 8)
                first = stage == part == 0
                self.add_module(f"conv{stage}_{part}", nn.Conv2d(self.channels, wider, kernel, part + 1, 1, bias=bias or first))
                if not first:
                    self.add_module(f"bn{stage}_{part}", nn.BatchNorm2d(wider))
                self.channels = wider

    def features(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, channels, H / 2^stages, W / 2^stages], rounded down."""
        for stage in range(self.stages):
            for part in (0, 1):
                pictures = self.get_submodule(f"conv{stage}_{part}")(pictures)
                if stage or part:
                    pictures = self.get_submodule(f"bn{stage}_{part}")(pictures)
                pictures = F.leaky_relu(pictures, 0.2)
        return pictures


class VGGDiscriminator(_VGGBody):
    """One logit per picture of `side` pixels (Ledig et al., CVPR 2017, as ESRGAN has it): published for 128, 192, 256 and 296.

    Five stages where four would leave too much: at multiples of 64 above 128. Batch norm works on the pictures of one call.
    """

    def __init__(self, width: int = 64, side: int = 128, *, channels: int = 3) -> None:
        super().__init__(width, 6 if side > 128 and side % 64 == 0 else 5, bias=False, channels=channels)
        self.side = side
        self.linear1 = nn.Linear(self.channels * (side >> self.stages) ** 2, 100)
        self.linear2 = nn.Linear(100, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, side, side] in [0, 1] -> [B, 1]"""
        if tuple(pictures.shape[-2:]) != (self.side, self.side):
            shape = " x ".join(map(str, pictures.shape[-2:]))
            raise UserError(f"losses: this discriminator is built for pictures of {self.side} pixels a side, got {shape}.")
        hidden: Tensor = F.leaky_relu(self.linear1(self.features(pictures).flatten(1)), 0.2)
        logits: Tensor = self.linear2(hidden)
        return logits


class Ranker(_VGGBody):
    """A score per picture that was trained to order pictures as a measure of quality does, lower is better   (Zhang et al., ICCV 2019)"""

    def __init__(self, width: int = 64) -> None:
        super().__init__(width, 5, bias=True)
        self.classifier = nn.Sequential(nn.Linear(self.channels, 100), nn.LeakyReLU(0.2), nn.Linear(100, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1], sides of at least 32 -> [B, 1]"""
        scores: Tensor = self.classifier(self.features(pictures).mean(dim=(2, 3)))
        return scores


class UNetDiscriminator(nn.Module):
    """One logit per pixel, spectrally normalised   (Wang et al., ICCVW 2021, Real-ESRGAN)

    Every call in training mode takes one step of the power iteration.
    """

    def __init__(self, width: int = 64, *, skip: bool = True, channels: int = 3) -> None:
        super().__init__()
        self.skip = skip
        self.conv0 = nn.Conv2d(channels, width, 3, 1, 1)
        for k in (1, 2, 3):
            self.add_module(f"conv{k}", _normalised(width * 2 ** (k - 1), width * 2**k, 4, 2))
        for k, (inside, outside) in enumerate(((8, 4), (4, 2), (2, 1), (1, 1), (1, 1)), start=4):
            self.add_module(f"conv{k}", _normalised(width * inside, width * outside, 3, 1))
        self.conv9 = nn.Conv2d(width, 1, 3, 1, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1], sides multiples of 8 -> [B, 1, H, W]"""
        down = [F.leaky_relu(self.conv0(pictures), 0.2)]
        for k in (1, 2, 3):
            down.append(self._layer(k, down[-1]))
        x = down.pop()
        for k in (4, 5, 6):
            x = self._layer(k, F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
            x = x + down.pop() if self.skip else x
        logits: Tensor = self.conv9(self._layer(8, self._layer(7, x)))
        return logits

    def _layer(self, k: int, x: Tensor) -> Tensor:
        return F.leaky_relu(self.get_submodule(f"conv{k}")(x), 0.2)


def _normalised(inside: int, outside: int, kernel: int, stride: int) -> Any:
    """A convolution under spectral norm, whose tensors are called weight_orig, weight_u and weight_v."""
    return spectral_norm(nn.Conv2d(inside, outside, kernel, stride, 1, bias=False))


class PatchDiscriminator(nn.Sequential):
    """Isola et al., CVPR 2017: 4x4 convolutions, `layers` of them (the first included) with stride 2, one logit per patch.

    Normalised per picture: the published batch norm at its batch of 1, and no picture's logits depend on its neighbours.
    """

    def __init__(self, width: int = 64, layers: int = 3, *, channels: int = 3, pictures: bool = True) -> None:
        """`pictures`: what it sees is in [0, 1] and judged in [-1, 1]; latents are judged as they are."""
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            wider = width * min(2**layer, 8)
            parts.append(nn.Conv2d(channels, wider, 4, 2 if layer < layers else 1, 1, bias=False))
            parts += [nn.InstanceNorm2d(wider, affine=True), nn.LeakyReLU(0.2)]
            channels = wider
        super().__init__(*parts, nn.Conv2d(channels, 1, 4, 1, 1))
        self.pictures = pictures
        for part in self:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)
            elif isinstance(part, nn.InstanceNorm2d):
                nn.init.normal_(part.weight, 1.0, 0.02)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 1, h, w]"""
        return super().forward(pictures * 2 - 1 if self.pictures else pictures)


@torch.no_grad()
def start_orthogonally(network: nn.Module, gain: float = 0.2) -> None:
    """Draw convolutions and linear layers anew, orthogonal times `gain`, biases 0, as BSRGAN's trainer does."""
    for part in network.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(getattr(part, "weight_orig", part.weight), gain)
            if part.bias is not None:
                part.bias.zero_()
