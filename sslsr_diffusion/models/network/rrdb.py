"""RRDBNet, the generator of ESRGAN, Real-ESRGAN, BSRGAN, LDL and BebyGAN (Wang et al., ECCV Workshops 2018, section 3.1)."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.images import pad_to
from sslsr_diffusion.models.network.architecture import Architecture, Tensors, at_least, conv3, count, draw_small

_SLOPE = 0.2  # of every LeakyReLU
_UNSHUFFLE = {4: 1, 2: 2, 1: 4}  # scale -> by how much the input is folded first; both steps up remain


class DenseBlock(nn.Module):
    """x_j = lrelu(conv_j([z, x_1 .. x_{j-1}])), j = 1 .. 4;  z + 0.2 conv_5([z, x_1 .. x_4])"""

    def __init__(self, features: int, growth: int, *, nested: bool = False) -> None:
        """`nested`: each convolution is named convK.0, as in the oldest files, instead of convK."""
        super().__init__()
        for k in range(5):
            conv = conv3(features + k * growth, features if k == 4 else growth)
            self.add_module(f"conv{k + 1}", nn.Sequential(conv) if nested else conv)

    def forward(self, z: Tensor) -> Tensor:
        *first, last = self.children()
        seen = [z]
        for conv in first:
            seen.append(F.leaky_relu(conv(torch.cat(seen, dim=1)), _SLOPE))
        return z + 0.2 * last(torch.cat(seen, dim=1))


class RRDB(nn.Module):
    """z + 0.2 block_3(block_2(block_1(z)))"""

    def __init__(self, features: int, growth: int, *, nested: bool = False) -> None:
        super().__init__()
        for j in (1, 2, 3):
            self.add_module(f"{'RDB' if nested else 'rdb'}{j}", DenseBlock(features, growth, nested=nested))

    def forward(self, z: Tensor) -> Tensor:
        made = z
        for block in self.children():
            made = block(made)
        return z + 0.2 * made


class RRDBNet(Architecture):
    """f = conv_first(x) + conv_body(body(conv_first(x))), two nearest-neighbour steps up with a convolution each, two convolutions.

    Scales 2 and 1 fold the input by 2 and 4 first (Real-ESRGAN). Arguments and tensor names are BasicSR's; the older names
    (RRDB_trunk, trunk_conv, upconv, HRconv) and the oldest ones (model.N) are read, too.
    """

    def __init__(
        self, num_in_ch: int = 3, num_out_ch: int = 3, scale: int = 4, num_feat: int = 64, num_block: int = 23, num_grow_ch: int = 32
    ) -> None:
        arguments = {"num_feat": num_feat, "num_block": num_block, "num_grow_ch": num_grow_ch}
        at_least(1, num_in_ch=num_in_ch, num_out_ch=num_out_ch, **arguments)
        if scale not in _UNSHUFFLE:
            raise ValueError(f"scale: expected 4, 2 or 1, got {scale!r}")
        super().__init__(num_in_ch=num_in_ch, num_out_ch=num_out_ch, scale=scale, **arguments)
        self.scale, self.multiple_of = scale, _UNSHUFFLE[scale]
        self.sees = self.multiple_of * (15 * num_block + 4)
        self.conv_first = conv3(num_in_ch * self.multiple_of**2, num_feat)
        self.body = nn.Sequential(*(RRDB(num_feat, num_grow_ch) for _ in range(num_block)))
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (conv3(num_feat, num_feat) for _ in range(4))
        self.conv_last = conv3(num_feat, num_out_ch)
        draw_small(self.body)

    def forward(self, lr: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, 3, scale h, scale w]"""
        height, width = lr.shape[-2:]
        fold = self.multiple_of
        folded = F.pixel_unshuffle(pad_to(lr, -(-height // fold) * fold, -(-width // fold) * fold), fold) if fold > 1 else lr
        features = made = self.conv_first(folded)
        for block in self.body:
            made = self.step(block, made)
        features = features + self.conv_body(made)
        for conv in (self.conv_up1, self.conv_up2):
            features = F.leaky_relu(conv(F.interpolate(features, scale_factor=2, mode="nearest")), _SLOPE)
        picture = self.conv_last(F.leaky_relu(self.conv_hr(features), _SLOPE))
        return picture[..., : height * self.scale, : width * self.scale]

    @classmethod
    def renamed(cls, tensors: Tensors) -> Tensors:
        last = count(tensors, "model.1.sub.") - 1
        outer = {f"model.1.sub.{last}": "conv_body", "trunk_conv": "conv_body", **_OLD, **_OLDEST}
        found = {}
        for name, tensor in tensors.items():
            block = _BLOCK.fullmatch(name)
            layer, dot, kind = name.rpartition(".")
            found["body.{}.rdb{}.conv{}.{}".format(*block.groups()) if block else outer.get(layer, layer) + dot + kind] = tensor
        return found

    @classmethod
    def arguments_of(cls, tensors: Tensors) -> dict[str, Any] | None:
        oldest = any(re.fullmatch(r"model\.1\.sub\.0\.RDB1\.conv1\.0\.weight", name) for name in tensors)
        if oldest and (count(tensors, "model.") != 11 or "model.9.weight" in tensors):
            return None  # another number of steps up, or SPSR
        tensors = cls.renamed(tensors)
        if not {"body.0.rdb1.conv1.weight", "conv_body.weight"} <= {*tensors} or any(".conv1x1." in name for name in tensors):
            return None  # the last: ESRGAN+
        if "conv_up1.weight" in tensors and ("conv_up2.weight" not in tensors or "conv_up3.weight" in tensors):
            return None
        growth, features = tensors["body.0.rdb1.conv1.weight"].shape[:2]
        outside, inside = tensors["conv_last.weight"].shape[0], tensors["conv_first.weight"].shape[1]
        fold = math.isqrt(inside // outside)
        scale = next((scale for scale, by in _UNSHUFFLE.items() if by == fold and inside == outside * by * by), 4)
        channels = {"num_in_ch": inside // _UNSHUFFLE[scale] ** 2, "num_out_ch": outside}
        return {**channels, "scale": scale, "num_feat": features, "num_block": count(tensors, "body."), "num_grow_ch": growth}


_BLOCK = re.compile(r"(?:body|RRDB_trunk|model\.1\.sub)\.(\d+)\.(?:rdb|RDB)([123])\.conv([1-5])(?:\.0)?\.(weight|bias)")
_OLD = {"upconv1": "conv_up1", "upconv2": "conv_up2", "HRconv": "conv_hr"}
_OLDEST = {"model.0": "conv_first", "model.3": "conv_up1", "model.6": "conv_up2", "model.8": "conv_hr", "model.10": "conv_last"}
