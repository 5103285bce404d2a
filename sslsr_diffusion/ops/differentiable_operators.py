"""What the CPU's and the torch backend's operators have in common: shapes for torch.compile, and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslsr_diffusion.ops import saved_gradient
from sslsr_diffusion.ops.settings import GraphSettings

if TYPE_CHECKING:
    from torch.library import CustomOpDef


def complete(
    graph: CustomOpDef, graph_backward: CustomOpDef, loss: CustomOpDef
) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Register fakes and derivatives of three custom operators; returns the backend's `graph` and `loss`, which call them.

    Args:
        graph: (image, mask, search, window, sigma, normalize) -> rows [N, search^2].
        graph_backward: (gradient of rows, rows, *arguments of graph) -> gradient of image.
        loss: (sr, gt, mask, rows, search, window, sigma, normalize, l1_weight, kl_weight, with_gradient) -> total, l1, kl and the
            gradient of total in sr, which is empty without with_gradient.
    """

    @graph.register_fake
    def _(image: Tensor, mask: Tensor, search: int, *_: object) -> Tensor:
        return image.new_empty(torch.library.get_ctx().new_dynamic_size(), search**2)

    @graph_backward.register_fake
    def _(grad_out: Tensor, out: Tensor, image: Tensor, *_: object) -> Tensor:
        return torch.empty_like(image, memory_format=torch.contiguous_format)

    @loss.register_fake
    def _(sr: Tensor, *more: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = sr.shape[0] if more[-1] else 0
        return sr.new_empty(()), sr.new_empty(()), sr.new_empty(()), sr.new_empty(batch, *sr.shape[1:])

    def keep(ctx: saved_gradient.Context, inputs: tuple[Tensor, Tensor, int, int, float, bool], output: Tensor) -> None:
        image, mask, *ctx.settings = inputs
        ctx.save_for_backward(output, image, mask)

    def backward(ctx: saved_gradient.Context, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return graph_backward(grad_out, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None

    graph.register_autograd(backward, setup_context=keep)
    graph_backward.register_autograd(saved_gradient.no_second_derivative)
    loss.register_autograd(saved_gradient.backward, setup_context=saved_gradient.save_gradient)

    def run_graph(image: Tensor, mask: Tensor, settings: GraphSettings) -> Tensor:
        """The graph [N, search_size^2], differentiable in image; arguments as in `self_similarity_graph`, already checked."""
        return graph(image, mask, *settings)

    def run_loss(
        sr: Tensor, gt: Tensor, mask: Tensor, settings: GraphSettings, weights: tuple[float, float], num_rows: float | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(total, l1, kl) without ever holding the graph; total is differentiable in sr, once."""
        rows = mask.sum() if num_rows is None else torch.as_tensor(num_rows, device=sr.device)
        with_gradient = sr.requires_grad and torch.is_grad_enabled()
        total, l1, kl, _ = loss(sr, gt, mask, rows, *settings, *weights, with_gradient)
        return total, l1.detach(), kl.detach()

    return run_graph, run_loss
