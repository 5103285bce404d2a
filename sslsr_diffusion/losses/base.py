"""What every loss is: a small callable over `Outputs` that knows its unit and how many of them a batch holds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from sslsr_diffusion.config import Settings
from sslsr_diffusion.types import Given, Outputs


class LossSettings(Settings):
    """What every entry of the recipe's list has."""

    kind: str
    name: str | None = Field(
        None, pattern=r"^[a-z][a-z0-9_]{0,40}$", description="What the term is called in logs and files; null: its kind. Each name once."
    )

    @property
    def called(self) -> str:
        """The name of the term."""
        return self.name or self.kind

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        """(key, what is wrong) where these settings do not go with the recipe around them.

        Args:
            side: of the pictures that pixel losses see, in pixels.
            alone: whether it is the only loss.
        """
        yield from ()


class Look(Protocol):
    """What a task asks a loss before its networks run."""

    reads: frozenset[str]  # of Outputs: "pred", "sr", "moments"; a task that gives all of them can have this loss

    def active(self, given: Given) -> Tensor:
        """[B] bool: the samples that this loss looks at."""


class Loss(Look, Protocol):
    """A mean over units (samples, or rows of the self-similarity graph), split so that any partition gives the same sum.

    `count` says how many units a micro-batch holds before the networks run. Called with the count of the whole batch
    (all micro-batches of the optimizer step, all processes, divided by the number of processes), the values of the
    micro-batches add up, and average over the processes, to the mean over the whole batch.
    """

    name: str

    def count(self, given: Given) -> Tensor:
        """Units in this micro-batch, 0-dim float32 on the device of `given`."""

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted scalar and the raw, detached terms; `count` None means the units of `outputs` alone."""


@dataclass(frozen=True)
class Means:
    """What some losses need beside their settings."""

    seed: int = 0
    distance: Callable[[Tensor, Tensor], Tensor] | None = None  # LPIPS of pictures [K, 3, H, W] -> [K]; None: it cannot be had


class LatentLoss:
    """Base of losses over latents: every sample counts."""

    settings_class: ClassVar[type[LossSettings]]
    reads: frozenset[str] = frozenset({"pred"})

    def __init__(self, settings: Any) -> None:
        self.settings, self.name = settings, settings.called

    @classmethod
    def build(cls, settings: Any, means: Means) -> Self | None:
        """The loss of a recipe's entry; None: it is optional and cannot be had."""
        return cls(settings)

    def active(self, given: Given) -> Tensor:
        return torch.ones_like(given.t, dtype=torch.bool)

    def count(self, given: Given) -> Tensor:
        return torch.tensor(float(given.t.shape[0]), device=given.t.device)


class PixelLoss(LatentLoss):
    """Base of losses over pictures: samples that pass the noise gate count."""

    reads = frozenset({"sr"})

    def active(self, given: Given) -> Tensor:
        return self.settings.passes(given)

    def count(self, given: Given) -> Tensor:
        return decoded_active(self, given).sum().float()

    def play(self, sr: Tensor, hr: Tensor) -> Tensor:
        """A scalar through the same networks and about the same tensors, on shapes alone: what the memory estimate plays."""
        return (sr - hr).abs().mean()


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


class NoiseGate(LossSettings):
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
            keep &= given.noise_level.square().reciprocal() >= self.min_snr
        return keep


def pixels(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The decoded prediction and its ground truth, both float32 [K, 3, H, W]."""
    if outputs.sr is None or outputs.hr is None:
        raise ValueError("a pixel loss needs decoded pixels (Outputs.sr and Outputs.hr), which this step did not compute")
    return outputs.sr.float(), outputs.hr.float()


def decoded_active(loss: LatentLoss, given: Given) -> Tensor:
    """[K] bool: which of the decoded samples this loss looks at."""
    active = loss.active(given)
    return active if given.decoded is None else active[given.decoded]


def share(total: Tensor, count: Tensor | None, own: Tensor) -> Tensor:
    """`total` units' sum divided by the count of the whole batch; 0 (not NaN) where nothing counts anywhere."""
    return total / (own if count is None else count.to(total)).clamp(min=torch.finfo(torch.float32).tiny)
