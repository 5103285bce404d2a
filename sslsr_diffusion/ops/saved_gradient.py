"""Autograd of the fused losses, whose operators give (total, ..., gradient of total): backward multiplies what forward has formed."""

from collections.abc import Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """What autograd hands from forward to backward, with what is set on it here."""

    saved_tensors: tuple[Tensor, ...]
    arguments: int
    settings: list[float]  # search, window, sigma, normalize

    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


@torch.library.custom_op("sslsr::scale_gradient", mutates_args=(), schema="(Tensor gradient, Tensor factor, Tensor image) -> Tensor")
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


def backward(ctx: Context, grad_total: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    """For an operator whose first argument alone is differentiable."""
    gradient, image = ctx.saved_tensors
    if grad_total is None:  # nobody asks for the total's gradient
        return (None,) * ctx.arguments
    return scale_gradient(gradient, grad_total, image), *(None,) * (ctx.arguments - 1)
