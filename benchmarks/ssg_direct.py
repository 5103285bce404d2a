"""The direct formulation on the GPU, as the published extension does it: the baseline of benchmarks/ssg.py and a cross-check.

It holds several [N, search^2] matrices per image, computes every product again for every entry and scatters with atomics.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sslsr_diffusion.ops.cupy_loader import CupyLauncher
from sslsr_diffusion.ops.settings import GraphSettings
from sslsr_diffusion.ops.ssg_cuda_launch import Argument, Launcher
from sslsr_diffusion.ops.ssg_reference import ROW_EPS, compare

SOURCE = str(Path(__file__).with_suffix(".cu").resolve())
PUBLISHED_BLOCK = 16  # threads of a block in the published extension; a full warp is 32


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, pixels: Tensor, sizes: tuple[int, int], block: int, launch: Launcher) -> Tensor:
        search, _ = sizes
        out = padded.new_empty(len(pixels), search**2)
        ctx.save_for_backward(padded, pixels)
        ctx.sizes, ctx.block, ctx.launch = sizes, block, launch
        _run(launch, "ssg_direct", block, [padded, pixels], padded, len(pixels), sizes, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        padded, pixels = ctx.saved_tensors
        gradient = torch.zeros_like(padded)
        _run(ctx.launch, "ssg_direct_backward", ctx.block, [padded, pixels, slopes.contiguous()], padded, len(pixels), ctx.sizes, gradient)
        return gradient, None, None, None, None


def _run(
    launch: Launcher, kernel: str, block: int, tensors: list[Argument], padded: Tensor, count: int, sizes: tuple[int, int], out: Tensor
) -> None:
    search, window = sizes
    height, width = (side - search + 1 for side in padded.shape[2:])
    numbers = [np.int32(n) for n in (count, padded.shape[1], height, width, search, window)]
    if count:
        launch(SOURCE, kernel, (), ceil(count * search**2 / block), block, 0, [*tensors, *numbers, out])


def direct_loss(
    sr: Tensor,
    gt: Tensor,
    mask: Tensor,
    settings: GraphSettings,
    weights: tuple[float, float],
    num_rows: float | Tensor | None,
    *,
    block: int = PUBLISHED_BLOCK,
    launch: Launcher | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, l1, kl) as a backend's `loss`; `block` is the threads per block, `launch` what runs the kernels (CuPy by default)."""
    launch = launch or CupyLauncher(sr.device)
    pixels = mask.flatten().nonzero().squeeze(1)
    kappa = settings.kappa(sr.shape[1])

    def graph(image: Tensor) -> Tensor:
        padded = F.pad(image, (settings.reach,) * 4, mode="reflect").contiguous()
        weights = torch.exp(_Distances.apply(padded, pixels, (settings.search, settings.window), block, launch) / -kappa)
        return weights / (weights.sum(1, keepdim=True) + ROW_EPS) if settings.normalize else weights

    graph_sr = graph(sr)
    with torch.no_grad():
        graph_gt = graph(gt)
    return compare(graph_sr, graph_gt, weights, settings.per_entry(len(pixels) if num_rows is None else num_rows))
