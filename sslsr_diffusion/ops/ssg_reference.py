"""The self-similarity graph by its definition: unfold, subtract, sum. Any dtype, any device, gradients by autograd.

It is the oracle of the tests and the baseline of the benchmark. It keeps C * window^2 * search^2 numbers per masked
pixel (608 kB at the published sizes, and several copies of it for autograd): use it on small crops.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_EPS = 1e-10  # added to the row sum, which is at least 1
CLAMP = 1e-10  # both graphs are clamped here before the logarithm; below it the KL term has no gradient


def graph(image: Tensor, mask: Tensor, *, search_size: int, window_size: int, sigma: float, normalize: bool) -> Tensor:
    """T[n, d] = exp(-dist(n, d) / (C window^2 sigma)), divided by its row sum: [N, search_size^2].

    The search square around each masked pixel is cut out BEFORE the window slides over it, so window samples
    outside the square count as 0 (published code; eq. 1.1 of the specification).
    """
    batch, channels = image.shape[:2]
    reach, half = search_size // 2, window_size // 2
    padded = F.pad(image, (reach, reach, reach, reach), mode="reflect")
    squares = F.unfold(padded, search_size).transpose(1, 2)  # [B, H*W, C*k*k]
    squares = squares[mask.reshape(batch, -1)].reshape(-1, channels, search_size, search_size)  # [N, C, k, k]
    if len(squares) == 0:
        return squares.reshape(0, search_size**2)
    patches = F.unfold(squares, window_size, padding=half)  # [N, C*w*w, k*k]
    centre = patches[:, :, search_size**2 // 2, None]
    distance = (patches - centre).square().sum(1)  # [N, k*k]
    weights = torch.exp(-distance / (channels * window_size**2 * sigma))
    return weights / (weights.sum(1, keepdim=True) + ROW_EPS) if normalize else weights


def loss(
    sr: Tensor,
    gt: Tensor,
    mask: Tensor,
    *,
    num_rows: float | Tensor | None,
    search_size: int,
    window_size: int,
    sigma: float,
    normalize: bool,
    l1_weight: float,
    kl_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """L1 = sum |T_sr - T_gt| / M, KL = sum b (ln b - ln a) / M with a, b the clamped graphs and M = num_rows * search_size^2."""
    draw = partial(graph, mask=mask, search_size=search_size, window_size=window_size, sigma=sigma, normalize=normalize)
    graph_sr = draw(sr)
    with torch.no_grad():
        graph_gt = draw(gt)
    if len(graph_sr) == 0:
        zero = sr.flatten()[:0].sum()  # zero with a graph, whatever sr holds
        return zero, zero.detach(), zero.detach()
    count = (len(graph_sr) if num_rows is None else num_rows) * search_size**2
    l1 = (graph_sr - graph_gt).abs().sum() / count
    target = graph_gt.clamp_min(CLAMP)
    kl = (target * (target.log() - graph_sr.clamp_min(CLAMP).log())).sum() / count
    return l1_weight * l1 + kl_weight * kl, l1.detach(), kl.detach()


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`; None: it can."""
    return None
