"""The CUDA backend: kernels/*.cu behind torch custom ops, so that autograd, torch.compile and opcheck know them.

Both ops compute in float32 and give the same bits for the same input. The loss forms its gradient in the forward pass, row by
row where the mask is thin and tile by tile where it is dense: nothing of size N x search^2 is written, backward is one
multiplication, and the host never waits for the GPU. The graph keeps its own output for backward.
"""

import torch
from torch import Tensor

from sslsr_diffusion.ops import differentiable_operators, ssg_cuda_dense
from sslsr_diffusion.ops import ssg_cuda_launch as geometry
from sslsr_diffusion.ops.cupy_loader import CupyLauncher, shared_memory_limit, unavailable
from sslsr_diffusion.ops.settings import GraphSettings

__all__ = ["graph", "loss", "too_large", "unavailable"]


def too_large(device: torch.device, search: int, window: int, channels: int) -> str | None:
    """Why a row of these sizes does not fit into a block of this GPU; None: it does."""
    try:
        geometry.row_geometry(search, window, channels, shared_memory_limit(device))
    except ValueError as error:
        return str(error)
    return None


too_large._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `unavailable`: torch.compile asks once


def loss(
    sr: Tensor, gt: Tensor, mask: Tensor, settings: GraphSettings, weights: tuple[float, float], num_rows: float | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, l1, kl) without ever holding the graph or waiting for the GPU; total is differentiable in sr, once."""
    with_gradient = sr.requires_grad and torch.is_grad_enabled()
    weighted, sums, _ = _loss(sr, gt, mask, *settings, *weights, with_gradient)
    rows = mask.sum() if num_rows is None else num_rows
    # a number stays on the host: as a tensor its copy would be waited for
    share = settings.per_entry(rows.detach().double() if isinstance(rows, Tensor) else rows)
    l1, kl = (sums * share).float().unbind()
    return (weighted * share).float(), l1.detach(), kl.detach()


def launcher(device: torch.device) -> tuple[geometry.Launcher, int]:
    """What runs the kernels on a GPU, and the bytes of shared memory that a block may have there."""
    return CupyLauncher(device), shared_memory_limit(device)


@torch.library.custom_op("sslsr::ssg_loss", mutates_args=(), device_types="cuda")
def _loss(
    sr: Tensor, gt: Tensor, mask: Tensor, search: int, window: int, sigma: float, normalize: bool,
    l1_weight: float, kl_weight: float, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums over rows and offsets in float64: weighted total (0-dim), [L1, KL]; and d total / d sr in float32, or [0]."""
    launch, shared_limit = launcher(sr.device)
    settings, weights = GraphSettings(search, window, sigma, normalize), (l1_weight, kl_weight)
    images = (sr.contiguous(), gt.contiguous(), mask.contiguous())
    sums, gradient = ssg_cuda_dense.run_loss(launch, *images, settings, weights, with_gradient=with_gradient, shared_limit=shared_limit)
    return l1_weight * sums[0] + kl_weight * sums[1], sums, gradient


@_loss.register_fake
def _(sr: Tensor, gt: Tensor, mask: Tensor, *settings: object) -> tuple[Tensor, Tensor, Tensor]:
    with_gradient = settings[-1]
    wide = torch.float64
    return sr.new_empty((), dtype=wide), sr.new_empty(2, dtype=wide), sr.new_empty(sr.shape if with_gradient else (0,))


_loss.register_autograd(differentiable_operators.scale_saved_gradient, setup_context=differentiable_operators.save_gradient)


@torch.library.custom_op("sslsr::ssg_graph", mutates_args=(), device_types="cuda")
def _graph(image: Tensor, mask: Tensor, search: int, window: int, sigma: float, normalize: bool) -> Tensor:
    launch, shared_limit = launcher(image.device)
    settings = GraphSettings(search, window, sigma, normalize)
    return geometry.run_graph(launch, image.contiguous(), mask.flatten().nonzero().squeeze(1), settings, shared_limit=shared_limit)


@torch.library.custom_op("sslsr::ssg_graph_backward", mutates_args=(), device_types="cuda")
def _graph_backward(
    grad_out: Tensor, out: Tensor, image: Tensor, mask: Tensor, search: int, window: int, sigma: float, normalize: bool
) -> Tensor:
    launch, shared_limit = launcher(image.device)
    settings = GraphSettings(search, window, sigma, normalize)
    tensors = (image.contiguous(), mask.contiguous(), out.contiguous(), grad_out.contiguous())
    return geometry.run_graph_backward(launch, *tensors, settings, shared_limit=shared_limit)


graph = differentiable_operators.graph_call(_graph, _graph_backward)
