"""What the backends' operators have in common: shapes for torch.compile, and autograd.

A fused loss gives (total, ..., gradient of total): its backward multiplies what forward has formed.
"""

from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from torch.library import CustomOpDef

from sslsr_diffusion.ops.settings import GraphSettings


class Context(Protocol):
    """What autograd hands from forward to backward, with what is set on it here."""

    saved_tensors: tuple[Tensor, ...]
    arguments: int
    settings: list[float]  # search, window, sigma, normalize

    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def graph_call(graph: CustomOpDef, graph_backward: CustomOpDef) -> Callable[[Tensor, Tensor, GraphSettings], Tensor]:
    """Register fakes and derivatives of two operators; returns the backend's `graph`, which calls the first.

    Args:
        graph: (image, mask, search, window, sigma, normalize) -> rows [N, search^2].
        graph_backward: (gradient of rows, rows, *arguments of graph) -> gradient of image.
    """

    @graph.register_fake
    def _(image: Tensor, mask: Tensor, search: int, *_: object) -> Tensor:
        return image.new_empty(torch.library.get_ctx().new_dynamic_size(), search**2)

    @graph_backward.register_fake
    def _(grad_out: Tensor, out: Tensor, image: Tensor, *_: object) -> Tensor:
        return torch.empty_like(image, memory_format=torch.contiguous_format)

    def keep(ctx: Context, inputs: tuple[Tensor, Tensor, int, int, float, bool], output: Tensor) -> None:
        image, mask, *ctx.settings = inputs
        ctx.save_for_backward(output, image, mask)

    def backward(ctx: Context, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return graph_backward(grad_out, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None

    graph.register_autograd(backward, setup_context=keep)
    graph_backward.register_autograd(no_second_derivative)

    def run_graph(image: Tensor, mask: Tensor, settings: GraphSettings) -> Tensor:
        """The graph [N, search_size^2], differentiable in image; arguments as in `self_similarity_graph`, already checked."""
        return graph(image, mask, *settings)

    return run_graph


def loss_call(loss: CustomOpDef) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """As `graph_call`, of the loss.

    Args:
        loss: (sr, gt, mask, rows, search, window, sigma, normalize, l1_weight, kl_weight, with_gradient) -> total, l1, kl and the
            gradient of total in sr, which is empty without with_gradient.
    """

    @loss.register_fake
    def _(sr: Tensor, *more: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = sr.shape[0] if more[-1] else 0
        return sr.new_empty(()), sr.new_empty(()), sr.new_empty(()), sr.new_empty(batch, *sr.shape[1:])

    loss.register_autograd(scale_saved_gradient, setup_context=save_gradient)

    def run_loss(
        sr: Tensor, gt: Tensor, mask: Tensor, settings: GraphSettings, weights: tuple[float, float], num_rows: float | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(total, l1, kl) without ever holding the graph; total is differentiable in sr, once."""
        rows = mask.sum() if num_rows is None else torch.as_tensor(num_rows, device=sr.device)
        with_gradient = sr.requires_grad and torch.is_grad_enabled()
        total, l1, kl, _ = loss(sr, gt, mask, rows, *settings, *weights, with_gradient)
        return total, l1.detach(), kl.detach()

    return run_loss


@torch.library.custom_op("sslsr::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, factor: Tensor, image: Tensor) -> Tensor:
    """gradient * factor. `image`, of which the gradient is, is there so that a second derivative raises instead of coming out as zero."""
    return gradient * factor.to(gradient.dtype)


@scale_gradient.register_fake
def _(gradient: Tensor, factor: Tensor, image: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def no_second_derivative(*_: object) -> NoReturn:
    raise RuntimeError('The self-similarity operator has no second derivative in its fast backends; backend="reference" has one.')


scale_gradient.register_autograd(no_second_derivative)


def save_gradient(ctx: Context, inputs: Sequence[Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no image of zeros for the gradient of the gradient
    ctx.arguments = len(inputs)
    ctx.save_for_backward(output[-1], inputs[0])


def scale_saved_gradient(ctx: Context, grad_total: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    """The backward of an operator whose first argument alone is differentiable."""
    gradient, image = ctx.saved_tensors
    if grad_total is None:  # nobody asks for the total's gradient
        return (None,) * ctx.arguments
    return scale_gradient(gradient, grad_total, image), *(None,) * (ctx.arguments - 1)
