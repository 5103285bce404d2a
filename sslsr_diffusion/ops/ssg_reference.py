"""The self-similarity graph by its definition: unfold, subtract, sum. Any dtype, any device, gradients by autograd.

It is the oracle of the tests and the baseline of the benchmark. It keeps C * window^2 * search^2 numbers per masked
pixel (608 kB at the published sizes, and several copies of it for autograd): use it on small crops.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sslsr_diffusion.ops.settings import GraphSettings

ROW_EPS = 1e-10  # added to the row sum, which is at least 1
CLAMP = 1e-10  # both graphs are clamped here before the logarithm; below it the KL term has no gradient


def graph(image: Tensor, mask: Tensor, settings: GraphSettings) -> Tensor:
    """T[n, d] = exp(-dist(n, d) / (C window^2 sigma)), divided by its row sum: [N, search_size^2].

    The search square around each masked pixel is cut out BEFORE the window slides over it, so window samples
    outside the square count as 0, as in the published code (Chen et al., ACM MM 2024).
    """
    channels = image.shape[1]
    search, reach, half = settings.search, settings.reach, settings.half
    padded = F.pad(image, (reach, reach, reach, reach), mode="reflect")
    squares = F.unfold(padded, search).transpose(1, 2)  # [B, H*W, C*k*k]
    squares = squares[mask.flatten(1)].reshape(-1, channels, search, search)  # [N, C, k, k]
    if len(squares) == 0:
        return squares.reshape(0, search**2)
    patches = F.unfold(squares, settings.window, padding=half)  # [N, C*w*w, k*k]
    centre = patches[:, :, search**2 // 2, None]
    distance = (patches - centre).square().sum(1)  # [N, k*k]
    weights = torch.exp(-distance / settings.kappa(channels))
    return weights / (weights.sum(1, keepdim=True) + ROW_EPS) if settings.normalize else weights


def loss(
    sr: Tensor, gt: Tensor, mask: Tensor, settings: GraphSettings, weights: tuple[float, float], num_rows: float | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """L1 = sum |T_sr - T_gt| / M, KL = sum b (ln b - ln a) / M with a, b the clamped graphs and M = num_rows * search_size^2."""
    graph_sr = graph(sr, mask, settings)
    with torch.no_grad():
        graph_gt = graph(gt, mask, settings)
    if len(graph_sr) == 0:
        zero = sr.flatten()[:0].sum()  # zero with a graph, whatever sr holds
        return zero, zero.detach(), zero.detach()
    return compare(graph_sr, graph_gt, weights, settings.per_entry(len(graph_sr) if num_rows is None else num_rows))


def compare(graph_sr: Tensor, graph_gt: Tensor, weights: tuple[float, float], share: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(total, l1, kl) of two graphs [N, search_size^2]; share = 1 / M."""
    l1 = (graph_sr - graph_gt).abs().sum() * share
    target = graph_gt.clamp_min(CLAMP)
    kl = (target * (target.log() - graph_sr.clamp_min(CLAMP).log())).sum() * share
    return weights[0] * l1 + weights[1] * kl, l1.detach(), kl.detach()


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`; None: it can."""
    return None
