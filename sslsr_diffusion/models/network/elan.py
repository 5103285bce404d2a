"""ELAN, shift convolutions and attention in windows of several sizes (Zhang et al., ECCV 2022)."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.images import pad_to
from sslsr_diffusion.models.network.architecture import Architecture, Tensors, at_least, conv3, count

_PARTS = 3  # of the channels, one per window size


class _Shift(nn.Module):
    """Four fifths of the channels moved by a pixel (right, left, lower, upper neighbour; zeros outside), then a 1 x 1 convolution."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        kernel, group = torch.zeros(inside, 1, 3, 3), inside // 5
        for k, (y, x) in enumerate(((1, 2), (1, 0), (2, 1), (0, 1))):
            kernel[k * group : (k + 1) * group, 0, y, x] = 1
        kernel[4 * group :, 0, 1, 1] = 1
        self.register_buffer("weight", kernel)  # a frozen parameter in the published code
        self.conv1x1 = nn.Conv2d(inside, outside, 1)

    weight: Tensor

    def forward(self, z: Tensor) -> Tensor:
        return self.conv1x1(F.conv2d(z, self.weight.to(z), padding=1, groups=z.shape[1]))


class _ShiftConv(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.shift_conv = _Shift(inside, outside)

    def forward(self, z: Tensor) -> Tensor:
        return self.shift_conv(z)


class _LocalFeatures(nn.Module):
    """conv1(relu(conv0(z)))"""

    def __init__(self, features: int, expand: int) -> None:
        super().__init__()
        self.conv0, self.conv1 = _ShiftConv(features, expand * features), _ShiftConv(expand * features, features)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv1(F.relu(self.conv0(z)))


class _ChannelNorm(nn.Module):
    """LayerNorm over the channels of [B, C, h, w]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _WindowAttention(nn.Module):
    """softmax(q q^T) v inside windows: no scaling, no bias, no mask where the windows were rolled over the border."""

    def __init__(self, features: int, windows: Sequence[int], *, shifted: bool, shares: bool) -> None:
        """`shares`: takes over the attention of the layer before, so all of its channels are v."""
        super().__init__()
        self.windows, self.shifted, self.shares = tuple(windows), shifted, shares
        width = features if shares else 2 * features
        self.project_inp = nn.Sequential(nn.Conv2d(features, width, 1), _ChannelNorm(width))
        self.project_out = nn.Conv2d(features, features, 1)

    def forward(self, z: Tensor, maps: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """The result, and the attention of each window size."""
        found, made = [], []
        for i, (window, part) in enumerate(zip(self.windows, self.project_inp(z).chunk(_PARTS, dim=1))):
            roll = window // 2 if self.shifted else 0
            part = part.roll((-roll, -roll), dims=(-2, -1)) if roll else part
            q, v = (None, part) if self.shares else part.chunk(2, dim=1)
            attention = maps[i] if q is None else _attention(_in_windows(q, window))
            result = _out_of_windows(attention @ _in_windows(v, window), window, v.shape)
            made.append(result.roll((roll, roll), dims=(-2, -1)) if roll else result)
            found.append(attention)
        return self.project_out(torch.cat(made, dim=1)), found


def _attention(q: Tensor) -> Tensor:
    return (q @ q.transpose(-2, -1)).softmax(dim=-1)


def _in_windows(z: Tensor, window: int) -> Tensor:
    """[B, C, h, w] -> [B h/window w/window, window^2, C]"""
    batch, channels, height, width = z.shape
    split = z.view(batch, channels, height // window, window, width // window, window)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(-1, window * window, channels)


def _out_of_windows(z: Tensor, window: int, shape: Sequence[int]) -> Tensor:
    batch, channels, height, width = shape
    split = z.view(batch, height // window, width // window, window, window, channels)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


class _Block(nn.Module):
    """For each of its layers: z + local features, then z + attention; later layers may take over the first one's attention."""

    def __init__(self, features: int, expand: int, windows: Sequence[int], *, shifted: bool, n_share: int) -> None:
        super().__init__()
        layers = range(n_share + 1)
        self.modules_lfe = nn.ModuleDict({f"lfe_{j}": _LocalFeatures(features, expand) for j in layers})
        attention = {f"gmsa_{j}": _WindowAttention(features, windows, shifted=shifted, shares=j > 0) for j in layers}
        self.modules_gmsa = nn.ModuleDict(attention)

    def forward(self, z: Tensor) -> Tensor:
        maps: Sequence[Tensor] = ()
        for local, attend in zip(self.modules_lfe.values(), self.modules_gmsa.values()):
            z = z + local(z)
            made, maps = attend(z, maps)
            z = z + made
        return z


class ELAN(Architecture):
    """head, blocks of shift convolutions and window attention with a skip around them, tail with a pixel shuffle.

    `m_elan` counts attention layers, of which each block has n_share + 1. Works on (x - rgb_mean) img_range, padded on the right and
    below by reflection to a common multiple of the windows, and cut again.
    """

    takes_half: ClassVar[bool] = False  # the unscaled products of attention leave float16's range

    def __init__(
        self,
        scale: int = 4,
        colors: int = 3,
        window_sizes: Sequence[int] = (4, 8, 16),
        m_elan: int = 36,
        c_elan: int = 180,
        n_share: int = 0,
        r_expand: int = 2,
        img_range: float = 255.0,
        rgb_mean: Sequence[float] = (0.4488, 0.4371, 0.4040),
    ) -> None:
        sizes = {"m_elan": m_elan, "c_elan": c_elan, "n_share": n_share, "r_expand": r_expand}
        at_least(1, scale=scale, colors=colors, m_elan=m_elan, c_elan=c_elan, r_expand=r_expand)
        at_least(0, n_share=n_share)
        window_sizes, rgb_mean = list(window_sizes), [float(value) for value in rgb_mean]
        if len(window_sizes) != _PARTS or not all(isinstance(size, int) and 1 <= size <= 64 for size in window_sizes):
            raise ValueError(f"window_sizes: expected three whole numbers from 1 to 64, got {window_sizes}")
        if c_elan % _PARTS or len(rgb_mean) != colors:
            raise ValueError(f"expected c_elan divisible by 3 and a mean per colour, got {c_elan} and {len(rgb_mean)} means")
        others = {"window_sizes": window_sizes, "img_range": float(img_range), "rgb_mean": rgb_mean}
        super().__init__(scale=scale, colors=colors, **sizes, **others)
        self.scale, self.multiple_of, self.img_range = scale, math.lcm(*window_sizes), float(img_range)
        self.rgb_mean = rgb_mean
        self.head = nn.Sequential(conv3(colors, c_elan))
        blocks = (_Block(c_elan, r_expand, window_sizes, shifted=i % 2 == 1, n_share=n_share) for i in range(m_elan // (n_share + 1)))
        self.body = nn.Sequential(*blocks)
        self.tail = nn.Sequential(conv3(c_elan, colors * scale * scale))

    def forward(self, lr: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, 3, scale h, scale w]"""
        height, width = lr.shape[-2:]
        mean = lr.new_tensor(self.rgb_mean).view(1, -1, 1, 1)
        padded = pad_to(lr, *(-(-side // self.multiple_of) * self.multiple_of for side in (height, width)))
        first = made = self.head((padded - mean) * self.img_range)
        for block in self.body:
            made = self.step(block, made)
        picture = F.pixel_shuffle(self.tail(first + made), self.scale) / self.img_range + mean
        return picture[..., : height * self.scale, : width * self.scale]

    @classmethod
    def arguments_of(cls, tensors: Tensors) -> dict[str, Any] | None:
        first = "body.0.modules_lfe.lfe_0.conv0.shift_conv.conv1x1.weight"
        if first not in tensors or "body.0.modules_gmsa.gmsa_0.project_out.weight" not in tensors:
            return None
        features, colors = tensors["head.0.weight"].shape[:2]
        shared = sum(name.startswith("body.0.modules_lfe.") and name.endswith("conv0.shift_conv.weight") for name in tensors) - 1
        return {
            "scale": math.isqrt(tensors["tail.0.weight"].shape[0] // colors),
            "colors": colors,
            "m_elan": count(tensors, "body.") * (shared + 1),
            "c_elan": features,
            "n_share": shared,
            "r_expand": tensors[first].shape[0] // features,
        }
