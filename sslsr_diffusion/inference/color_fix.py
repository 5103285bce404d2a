"""Colour transfer from the upsampled low-resolution picture to the restored one.

Both are linear enough to run on float32 pictures of any size: no float64 copy of a whole picture is ever made.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.choices import COLOR_FIXES
from sslsr_diffusion.tables import named

_LEVELS = 5
REACH = 2**_LEVELS - 1  # pixels that the wavelet fix looks at to each side
_EPS = 1e-5 / 4  # 1e-5 is meant for the variance of pixels in [-1, 1]; ours are in [0, 1]
_ROWS = 256  # rows per block of the statistics: bounds the float64 copy


def color_fix(kind: str | None, content: Tensor, style: Tensor) -> Tensor:
    """Give `content` the colours of `style`.

    wavelet: content - low(content) + low(style), low = five dilated [1 2 1] x [1 2 1] / 16 blurs (radius 1, 2, 4, 8, 16)
    adain:   (content - mean_c) / std_c * std_s + mean_s per channel, unbiased variance      (both as in StableSR's code)
    none:    content as it is; so does None

    Both, and the result, are [B, 3, H, W] float in [0, 1] (about; not clamped). UserError for an unknown kind or different shapes.
    """
    kind = "none" if kind is None else kind
    if kind not in COLOR_FIXES:
        raise UserError(f"color_fix: expected one of {', '.join(COLOR_FIXES)}, got {kind!r}.")
    if content.shape != style.shape:
        raise UserError(f"color_fix: content {list(content.shape)} and style {list(style.shape)} must have the same shape.")
    fixed: Tensor = named(f"sslsr_diffusion.inference.{COLOR_FIXES[kind]}")(content.float(), style.float())
    return fixed


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    # the blur is linear: low(style) - low(content) = low(style - content), one cascade instead of two; a channel at a time,
    # because the cascade holds four copies of what it works on
    out = torch.empty_like(content)
    for channel in range(content.shape[1]):
        one = slice(channel, channel + 1)
        out[:, one] = content[:, one] + low_frequencies(style[:, one] - content[:, one])
    return out


def low_frequencies(image: Tensor) -> Tensor:
    """[B, C, H, W] after five dilated 3x3 binomial blurs with replicated borders."""
    for level in range(_LEVELS):
        image = _blur_axis(_blur_axis(image, 2**level, -2), 2**level, -1)
    return image


def _blur_axis(image: Tensor, radius: int, axis: int) -> Tensor:
    """[1 2 1] / 4 with dilation `radius` along one axis, borders replicated."""
    length = image.shape[axis]
    inner = max(length - radius, 0)
    out = image / 2
    quarter = image / 4
    first, last = quarter.narrow(axis, 0, 1), quarter.narrow(axis, length - 1, 1)
    out.narrow(axis, length - inner, inner).add_(quarter.narrow(axis, 0, inner))
    out.narrow(axis, 0, length - inner).add_(first)
    out.narrow(axis, 0, inner).add_(quarter.narrow(axis, length - inner, inner))
    out.narrow(axis, inner, length - inner).add_(last)
    return out


def adain(content: Tensor, style: Tensor) -> Tensor:
    own, wanted = Statistics(), Statistics()
    own.add(content)
    wanted.add(style)
    return adain_change(own, wanted)(content)


def adain_change(content: "Statistics", style: "Statistics") -> Callable[[Tensor], Tensor]:
    """`adain` of any part of pictures with these statistics."""
    gain = style.deviation / content.deviation
    shift = style.mean.float() - content.mean.float() * gain
    return lambda part: part * gain + shift


class Statistics:
    """Mean and deviation per channel of pictures [B, C, H, W] that come whole or in parts; float64, or float32 where there is none.

    Parts are joined as Chan, Golub and LeVeque (1983) do: M = M_a + M_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b).
    """

    def __init__(self) -> None:
        self._count = 0
        self.mean = self._squares = torch.zeros(())

    def add(self, part: Tensor) -> None:
        wide = torch.float32 if part.device.type == "mps" else torch.float64
        for block in part.split(_ROWS, dim=-2):
            values, count = block.to(wide), block.shape[-2] * block.shape[-1]
            mean = values.mean((-2, -1), keepdim=True)
            squares, apart = (values - mean).square().sum((-2, -1), keepdim=True), mean - self.mean.to(mean)
            share = count / (self._count + count)
            self._squares = self._squares.to(mean) + squares + apart.square() * (self._count * share)
            self.mean = self.mean.to(mean) + apart * share
            self._count += count

    @property
    def deviation(self) -> Tensor:
        """[B, C, 1, 1] float32, of the unbiased variance and a trace."""
        return (self._squares / max(self._count - 1, 1) + _EPS).sqrt().float()


def unchanged(content: Tensor, style: Tensor) -> Tensor:
    return content
