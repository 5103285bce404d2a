"""Autograd of the fused losses, whose operators give (total, ..., gradient of total): backward multiplies what forward has formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sslsr::scale_gradient", mutates_args=(), schema="(Tensor gradient, Tensor factor) -> Tensor")
def scale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """An op of its own, without an autograd formula: a second derivative raises instead of coming out as zero."""
    return gradient * factor.to(gradient.dtype)


@scale_gradient.register_fake
def _(gradient: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no image of zeros for the gradient of the gradient
    ctx.arguments = len(inputs)
    ctx.save_for_backward(output[-1])


def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """For an operator whose first argument alone is differentiable."""
    (gradient,) = ctx.saved_tensors
    return scale_gradient(gradient, grad_total), *(None,) * (ctx.arguments - 1)
