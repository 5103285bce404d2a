"""The CUDA backend: kernels/*.cu behind torch custom ops, so that autograd, torch.compile and opcheck know them.

Both ops compute in float32 and give the same bits for the same input. The loss forms its gradient in the forward pass, while
a row is in a block's registers: nothing of size N x search^2 is written, backward is one multiplication, and the host never
waits for the GPU. The graph keeps its own output for backward.
"""

import torch
from torch import Tensor

from sslsr_diffusion.ops import saved_gradient
from sslsr_diffusion.ops import ssg_cuda_launch as geometry
from sslsr_diffusion.ops.cupy_loader import CupyLauncher, shared_memory_limit, unavailable
from sslsr_diffusion.ops.settings import GraphSettings

__all__ = ["graph", "loss", "unavailable"]


def graph(image: Tensor, mask: Tensor, settings: GraphSettings) -> Tensor:
    """The graph [N, search_size^2], differentiable in image; arguments as in `self_similarity_graph`, already checked."""
    pixels = mask.flatten().nonzero().squeeze(1)
    return _graph_op(image, mask, pixels, *settings)


def loss(
    sr: Tensor, gt: Tensor, mask: Tensor, settings: GraphSettings, weights: tuple[float, float], num_rows: float | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, l1, kl) without ever holding the graph or waiting for the GPU; total is differentiable in sr, once."""
    with_gradient = sr.requires_grad and torch.is_grad_enabled()
    weighted, sums, _ = _loss_op(sr, gt, mask, *settings, *weights, with_gradient)
    rows = mask.sum() if num_rows is None else num_rows
    # a number stays on the host: as a tensor its copy would be waited for
    share = settings.per_entry(rows.detach().double() if isinstance(rows, Tensor) else rows)
    l1, kl = (sums * share).float().unbind()
    return (weighted * share).float(), l1.detach(), kl.detach()


def _launcher(device: torch.device) -> tuple[geometry.Launcher, int]:
    return CupyLauncher(device), shared_memory_limit(device)


@torch.library.custom_op(
    "sslsr::ssg_loss",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor sr, Tensor gt, Tensor mask, int search_size, int window_size, float sigma, bool normalize, float l1_weight, "
    "float kl_weight, bool with_gradient) -> (Tensor, Tensor, Tensor)",
)
def _loss_op(
    sr: Tensor,
    gt: Tensor,
    mask: Tensor,
    search_size: int,
    window_size: int,
    sigma: float,
    normalize: bool,
    l1_weight: float,
    kl_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over rows and offsets in float64: weighted total (0-dim), [L1, KL]; and d total / d sr in float32, or [0]."""
    launch, shared_limit = _launcher(sr.device)
    sums, gradient = geometry.run_loss(
        launch,
        sr.contiguous(),
        gt.contiguous(),
        mask.contiguous(),
        GraphSettings(search_size, window_size, sigma, normalize),
        (l1_weight, kl_weight),
        with_gradient=with_gradient,
        shared_limit=shared_limit,
    )
    return l1_weight * sums[0] + kl_weight * sums[1], sums, gradient


@_loss_op.register_fake
def _(sr: Tensor, gt: Tensor, mask: Tensor, *settings: object) -> tuple[Tensor, Tensor, Tensor]:
    with_gradient = settings[-1]
    wide = torch.float64
    return sr.new_empty((), dtype=wide), sr.new_empty(2, dtype=wide), sr.new_empty(sr.shape if with_gradient else (0,))


_loss_op.register_autograd(saved_gradient.backward, setup_context=saved_gradient.save_gradient)


@torch.library.custom_op(
    "sslsr::ssg_graph",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor image, Tensor mask, Tensor pixels, int search_size, int window_size, float sigma, bool normalize) -> Tensor",
)
def _graph_op(image: Tensor, mask: Tensor, pixels: Tensor, search_size: int, window_size: int, sigma: float, normalize: bool) -> Tensor:
    """Rows [N, search_size^2] for int64 `pixels` [N], the flat indices of the mask's true entries."""
    launch, shared_limit = _launcher(image.device)
    settings = GraphSettings(search_size, window_size, sigma, normalize)
    return geometry.run_graph(launch, image.contiguous(), pixels.contiguous(), settings, shared_limit=shared_limit)


@_graph_op.register_fake
def _(image: Tensor, mask: Tensor, pixels: Tensor, search_size: int, *_: object) -> Tensor:
    return image.new_empty(pixels.shape[0], search_size**2)


@torch.library.custom_op(
    "sslsr::ssg_graph_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor image, Tensor mask, Tensor rows, Tensor grad_rows, int search_size, int window_size, float sigma, bool normalize) "
    "-> Tensor",
)
def _graph_backward_op(
    image: Tensor, mask: Tensor, rows: Tensor, grad_rows: Tensor, search_size: int, window_size: int, sigma: float, normalize: bool
) -> Tensor:
    """d / d image from d / d rows."""
    launch, shared_limit = _launcher(image.device)
    settings = GraphSettings(search_size, window_size, sigma, normalize)
    tensors = (image.contiguous(), mask.contiguous(), rows.contiguous(), grad_rows.contiguous())
    return geometry.run_graph_backward(launch, *tensors, settings, shared_limit=shared_limit)


@_graph_backward_op.register_fake
def _(image: Tensor, *_: object) -> Tensor:
    return image.new_empty(image.shape)


def _save_rows(ctx: saved_gradient.Context, inputs: tuple[Tensor, Tensor, Tensor, int, int, float, bool], output: Tensor) -> None:
    image, mask, _, *ctx.settings = inputs
    ctx.save_for_backward(image, mask, output)


def _graph_backward(ctx: saved_gradient.Context, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    return _graph_backward_op(*ctx.saved_tensors, grad_rows, *ctx.settings), *(None,) * 6


_graph_backward_op.register_autograd(saved_gradient.no_second_derivative)
_graph_op.register_autograd(_graph_backward, setup_context=_save_rows)
