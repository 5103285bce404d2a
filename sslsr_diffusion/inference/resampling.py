"""Any rows and columns of a resized picture, by themselves: what `resize_bicubic` and torch's bilinear mode make of the whole one."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Taps(NamedTuple):
    """Of each output pixel along an axis: the input pixels that it looks at, [n, K] int64, and how much, [n, K] float32."""

    pixels: Tensor
    weights: Tensor

    def at(self, first: int, last: int) -> "Taps":
        """Of the output pixels from `first` to before `last`."""
        return Taps(self.pixels[first:last], self.weights[first:last])

    @property
    def span(self) -> tuple[int, int]:
        """The first input pixel that is looked at, and the one behind the last."""
        return int(self.pixels.min()), int(self.pixels.max()) + 1

    def of(self, image: Tensor, axis: int, first: int = 0) -> Tensor:
        """`image`, which begins with input pixel `first` along the axis (-2 or -1), resampled along it."""
        result: Tensor | None = None
        for pixels, weight in zip(self.pixels.to(image.device).T - first, self.weights.to(image).T):
            seen = image.index_select(axis, pixels).mul_(weight[:, None] if axis == -2 else weight)
            result = seen if result is None else result.add_(seen)
        assert result is not None
        return result


def bicubic_taps(size: tuple[int, int], wanted: tuple[int, int], places: tuple[Tensor, Tensor] | None = None) -> tuple[Taps, Taps]:
    """Rows and columns of `resize_bicubic` from `size` to `wanted`; those at `places`, int64, where they are given, else all."""
    places = places or (torch.arange(wanted[0]), torch.arange(wanted[1]))
    make = _antialiased if any(new < old for old, new in zip(size, wanted)) else _cubic
    rows, columns = (_same(at) if old == new else make(old, new, at) for old, new, at in zip(size, wanted, places))
    return rows, columns


def linear_taps(length: int, wanted: int) -> Taps:
    """Of torch's bilinear mode without aligned corners."""
    where = _centres(length, wanted, torch.arange(wanted)).clamp(min=0)
    before = where.floor()
    share = where - before
    index = torch.stack([before, before + 1], dim=1).long()
    return Taps(index.clamp(max=length - 1), torch.stack([1 - share, share], dim=1))


def _same(places: Tensor) -> Taps:
    return Taps(places[:, None], torch.ones(len(places), 1))


def _centres(length: int, wanted: int, places: Tensor) -> Tensor:
    """Where output pixels lie on the input, rounded to float32 where torch rounds: on long axes that is seen."""
    scale = torch.tensor(length / wanted, dtype=torch.float32)
    return ((places.double() + 0.5) * scale.double() - 0.5).float()


def _cubic(length: int, wanted: int, places: Tensor) -> Taps:
    """a = -0.75, the border repeated."""
    where = _centres(length, wanted, places)
    before = where.floor()
    offsets = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    weight = _kernel((where - before)[:, None] - offsets, -0.75)
    return Taps((before[:, None] + offsets).long().clamp(0, length - 1), weight)


def _antialiased(length: int, wanted: int, places: Tensor) -> Taps:
    """a = -0.5, the kernel as wide as an output pixel where that is larger, cut off at the border and normalised, as in Pillow."""
    scale = length / wanted
    wide = max(scale, 1.0)
    centre = (places.double() + 0.5) * scale
    first = (centre - 2 * wide + 0.5).floor().clamp(min=0)
    last = (centre + 2 * wide + 0.5).floor().clamp(max=length)
    index = first[:, None] + torch.arange(math.ceil(4 * wide) + 1)
    weight = _kernel((index - centre[:, None] + 0.5) / wide, -0.5) * (index < last[:, None])
    return Taps(index.long().clamp(max=length - 1), (weight / weight.sum(dim=1, keepdim=True)).float())


def _kernel(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution (1981)."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
