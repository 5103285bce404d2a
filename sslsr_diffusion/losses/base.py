"""What every loss is: a small callable over `Outputs` that knows its unit and how many of them a batch holds."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from sslsr_diffusion.config import Settings
from sslsr_diffusion.types import Given, Outputs


class Loss(Protocol):
    """A mean over units (samples, or rows of the self-similarity graph), split so that any partition gives the same sum.

    `count` says how many units a micro-batch holds before the networks run. Called with the count of the whole batch
    (all micro-batches of the optimizer step, all processes, divided by the number of processes), the values of the
    micro-batches add up, and average over the processes, to the mean over the whole batch.
    """

    name: str
    needs_pixels: bool

    def active(self, given: Given) -> Tensor:
        """[B] bool: the samples that this loss looks at."""

    def count(self, given: Given) -> Tensor:
        """Units in this micro-batch, 0-dim float32 on the device of `given`."""

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted scalar and the raw, detached terms; `count` None means the units of `outputs` alone."""


@runtime_checkable
class Learner(Protocol):
    """A network that learns beside the trained one, on the same batches, with an optimizer of its own: a discriminator.

    A loss that is one as well is found by its type. A checkpoint keeps `network`, `optimizer` and `step`.
    """

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    step: int  # the optimizer step that is going on, from 1

    def to(self, device: torch.device) -> None:
        """Move the network in place."""

    def learn(self, outputs: Outputs, count: Tensor | None = None) -> dict[str, Tensor]:
        """Add one micro-batch to the network's gradient, `count` as in a loss; the raw terms, detached."""

    def update(self, *, sound: bool) -> None:
        """End an optimizer step: move the network unless the step was not `sound`, forget the gradient, count on."""


class NoiseGate(Settings):
    """A pixel loss may look only at samples whose noise level lets a picture be seen at all."""

    max_timestep: int | None = Field(
        None, ge=0, description="Only samples with a timestep up to this one (0 clean .. 999 noise) count; null: all, as published."
    )
    min_snr: float | None = Field(
        None, gt=0, description="Only samples with at least this signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod); null: all."
    )

    def passes(self, given: Given) -> Tensor:
        """[B] bool: the samples that are clean enough."""
        keep = torch.ones_like(given.t, dtype=torch.bool)
        if self.max_timestep is not None:
            keep &= given.t <= self.max_timestep
        if self.min_snr is not None:
            keep &= given.snr >= self.min_snr
        return keep


def pixels(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The decoded prediction and its ground truth, both float32 [K, 3, H, W]."""
    if outputs.sr is None or outputs.hr is None:
        raise ValueError("a pixel loss needs decoded pixels (Outputs.sr and Outputs.hr), which this step did not compute")
    return outputs.sr.float(), outputs.hr.float()


def decoded_active(loss: Loss, given: Given) -> Tensor:
    """[K] bool: which of the decoded samples this loss looks at."""
    active = loss.active(given)
    return active if given.decoded is None else active[given.decoded]


def share(total: Tensor, count: Tensor | None, own: Tensor) -> Tensor:
    """`total` units' sum divided by the count of the whole batch; 0 (not NaN) where nothing counts anywhere."""
    return total / (own if count is None else count.to(total)).clamp(min=torch.finfo(torch.float32).tiny)
