"""The SRResNet of RankSRGAN (Zhang et al., ICCV 2019), which is not BasicSR's MSRResNet: no bilinear base, another activation."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.models.network.architecture import Architecture, Tensors, at_least, conv3, count, draw_small

_STEPS = {2: (2,), 3: (3,), 4: (2, 2)}  # scale -> enlargement of each step


class Residual(nn.Module):
    """z + conv2(relu(conv1(z)))"""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3(features, features), conv3(features, features)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.conv2(F.relu(self.conv1(z)))


class SRResNet(Architecture):
    """f = conv_first(x); f + LRconv(trunk(f)); per step relu(pixel_shuffle(upconv)); conv_last(relu(HRconv))"""

    def __init__(self, in_nc: int = 3, out_nc: int = 3, nf: int = 64, nb: int = 16, upscale: int = 4) -> None:
        at_least(1, in_nc=in_nc, out_nc=out_nc, nf=nf, nb=nb)
        if upscale not in _STEPS:
            raise ValueError(f"upscale: expected 2, 3 or 4, got {upscale!r}")
        super().__init__(in_nc=in_nc, out_nc=out_nc, nf=nf, nb=nb, upscale=upscale)
        self.scale, self.sees = upscale, 2 * nb + 5
        self.conv_first = conv3(in_nc, nf)
        self.recon_trunk = nn.Sequential(*(Residual(nf) for _ in range(nb)))
        self.LRconv = conv3(nf, nf)
        for i, by in enumerate(_STEPS[upscale], 1):
            self.add_module(f"upconv{i}", conv3(nf, nf * by * by))
        self.HRconv, self.conv_last = conv3(nf, nf), conv3(nf, out_nc)
        steps = [self.get_submodule(f"upconv{i + 1}") for i in range(len(_STEPS[upscale]))]
        draw_small(self.conv_first, self.recon_trunk, *steps, self.HRconv, self.conv_last)

    def forward(self, lr: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, 3, scale h, scale w]"""
        features = made = self.conv_first(lr)
        for block in self.recon_trunk:
            made = self.step(block, made)
        features = features + self.LRconv(made)
        for i, by in enumerate(_STEPS[self.scale], 1):
            features = F.relu(F.pixel_shuffle(self.get_submodule(f"upconv{i}")(features), by))
        return self.conv_last(F.relu(self.HRconv(features)))

    @classmethod
    def arguments_of(cls, tensors: Tensors) -> dict[str, Any] | None:
        if not {"recon_trunk.0.conv1.weight", "LRconv.weight"} <= {*tensors}:
            return None
        features, inside = tensors["conv_first.weight"].shape[:2]
        by = {4: 2, 9: 3}[tensors["upconv1.weight"].shape[0] // features]
        channels = {"in_nc": inside, "out_nc": tensors["conv_last.weight"].shape[0]}
        upscale = 4 if "upconv2.weight" in tensors else by
        return {**channels, "nf": features, "nb": count(tensors, "recon_trunk."), "upscale": upscale}
