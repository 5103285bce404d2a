"""What the CPU's and the torch backend's operators have in common: shapes for torch.compile, and autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslsr_diffusion.ops import saved_gradient

if TYPE_CHECKING:
    from torch.library import CustomOpDef


def complete(graph: CustomOpDef, graph_backward: CustomOpDef, loss: CustomOpDef) -> None:
    """Register fakes and derivatives of three custom operators.

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
