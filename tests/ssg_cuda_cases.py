"""What the tests of the CUDA kernels compare, emulated and on a GPU alike; their cases are the package's (checkup/cases.py)."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_same_gradient(got: Tensor, want: Tensor) -> None:
    """Element-wise against the largest entry, and as a vector. The float32 reference itself stays below 1e-5 and 3e-6 on these cases;
    the rest is another order of summation.
    """
    got = got.double().cpu()
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 3e-5 * want.abs().max(), (got - want).abs().max() / want.abs().max()
    assert (got - want).norm() <= 1e-5 * want.norm(), (got - want).norm() / want.norm()


def golden_mask(mask: Tensor, stride: int) -> Tensor:
    """The stored mask [B, H, W] of golden/ssl/loss as bool [B, 1, H, W] with its stride applied."""
    y, x = torch.arange(mask.shape[1])[:, None], torch.arange(mask.shape[2])
    keep = (y % stride == x % stride) if stride > 1 else torch.ones_like(y == x)
    return ((mask == 1) & keep)[:, None].contiguous()
