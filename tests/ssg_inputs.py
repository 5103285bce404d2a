"""Inputs and comparisons shared by the tests of the operator's portable backends. Needs torch alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def make_pair(batch: int, channels: int, height: int, width: int, density: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """sr, gt float64 and a mask. Smooth, because on white noise the graph is one-hot and proves nothing; a corner is masked."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, channels, height + 4, width + 4, generator=generator, dtype=torch.float64)
    gt = (F.avg_pool2d(noise, 5, stride=1) - 0.5) * 2 + 0.5
    sr = gt + 0.05 * torch.randn(gt.shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, 1, height, width, generator=generator) < density
    if density > 0:
        mask[0, 0, 0, -1] = True
    if batch > 2:
        mask[1] = False
    return sr.float().double(), gt.float().double(), mask


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str, floor: float = 1e-30) -> None:
    """Element-wise against the largest element, and as vectors: a wrong direction cannot hide behind one large entry.

    `floor` is the rounding of one element that does not depend on how large the elements come out.
    """
    got, error = got.double(), (got.double() - want).abs().max()
    assert error <= tolerance * want.abs().max() + floor, f"{what}: off by {error:.3e}, largest {want.abs().max():.3e}"
    assert (got - want).norm() <= tolerance * want.norm() + floor * want.numel() ** 0.5, (
        f"{what}: vector off by {(got - want).norm() / want.norm():.3e}"
    )
