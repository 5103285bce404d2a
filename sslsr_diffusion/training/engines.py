"""Who wraps the trained module, adds up gradients and moves the weights: accelerate here, DeepSpeed in `zero2.py`."""

from __future__ import annotations

import contextlib
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sslsr_diffusion.training.state import full_tensor, load_optimizer_state_dict, optimizer_state_dict, trained_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sslsr_diffusion.training.settings import TrainingSettings


class Update(NamedTuple):
    """The end of an optimizer step."""

    norm: float  # of the whole gradient, before clipping
    sound: bool  # loss and gradient are numbers, so the weights were moved
    overflow: bool = False  # not sound, but that is how fp16 finds its scale


class Engine(Protocol):
    """One optimizer step: for each micro-batch a forward and a `backward` within `accumulating`, then `update`.

    All processes call every method. State goes out whole, whoever holds which part of it.
    """

    model: Any  # the wrapped module
    parameters: dict[str, nn.Parameter]  # what is trained, by its name in the module
    optimizer: torch.optim.Optimizer  # whose groups the schedule reads and sets

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around the forward: the recipe's mixed precision."""

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch: only the last one's backward needs to exchange gradients between the processes."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch."""

    def update(self, loss: float) -> Update:
        """Clip and move the weights, unless `loss` (the same on all processes) or a gradient is not a number; forget the gradients."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of the optimizer, and `optimizer` and `scaler` as plain values."""

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, after the parameters were loaded; settings stay those of the recipe."""


class PlainEngine:
    """accelerate's own: one process, DDP or FSDP2, with a gradient scaler in fp16."""

    def __init__(self, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> None:
        self.accelerator = accelerator
        self.model, self._wrapped = accelerator.prepare(module, optimizer)
        self.parameters = trained_parameters(accelerator.unwrap_model(self.model))
        self.optimizer: torch.optim.Optimizer = self._wrapped.optimizer
        self._max_norm = settings.max_grad_norm or float("inf")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.accelerator.backward(loss)

    def update(self, loss: float) -> Update:
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self._max_norm)
        norm = float(full_tensor(torch.as_tensor(norm)))
        sound, scaler = isfinite(loss) and isfinite(norm), self.accelerator.scaler
        overflow = not sound and scaler is not None and scaler.get_scale() > 1
        if sound or scaler is not None:  # the scaler leaves the step out by itself, and learns from it
            self._wrapped.step()
        self._wrapped.zero_grad()
        return Update(norm, sound, overflow)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, plain = optimizer_state_dict(self.optimizer, list(self.parameters))
        scaler = self.accelerator.scaler
        return tensors, {"optimizer": plain, "scaler": None if scaler is None else scaler.state_dict()}

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        load_optimizer_state_dict(self.optimizer, self.parameters, tensors, state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
