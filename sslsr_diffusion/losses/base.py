"""What every loss is: a small callable over `Outputs` that knows its unit and how many of them a batch holds."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
            side: of the pictures that the loss sees, in pixels (of latents, in latent pixels).
            alone: whether it is the only loss.
        """
        yield from ()


class Look(Protocol):
    """What a task asks a loss before its networks run."""

    reads: frozenset[str]  # of Outputs: "pred", "sr", "sr_ema", ...; a task that gives all of them can have this loss

    def active(self, given: Given) -> Tensor:
        """[B] bool: the samples that this loss looks at."""


class Loss(Look, Protocol):
    """A mean over units (samples, or rows of the self-similarity graph), split so that any partition gives the same sum.

    `count` says how many units a micro-batch holds before the networks run. Called with the count of the whole batch
    (all micro-batches of the optimizer step, all processes, divided by the number of processes), the values of the
    micro-batches add up, and average over the processes, to the mean over the whole batch.
    """

    name: str

    @property
    def network(self) -> nn.Module | None:
        """What the loss brings along: a frozen network, or one that learns."""

    def to(self, device: torch.device) -> None:
        """Move that network in place."""

    def count(self, given: Given) -> Tensor:
        """Units in this micro-batch, 0-dim float32 on the device of `given`."""

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted scalar and the raw, detached terms; `count` None means the units of `outputs` alone."""


class Prior(Protocol):
    """The diffusion model that the networks were made from, as a loss asks it about latents: frozen, or with a LoRA that learns."""

    network: nn.Module  # only the LoRA's parameters have gradients
    process: Any  # add_noise, target, clean_and_noise, last: all levels of the base

    def to(self, device: torch.device) -> Any:
        """Move all of it in place."""

    def predict(self, zt: Tensor, t: Tensor, *, guidance: float, learned: bool) -> Tensor:
        """What the process asks of a network, [B, C, h, w] float32, at timesteps t [B]; `learned`: with the LoRA."""


@dataclass(frozen=True)
class Means:
    """What losses are built with beside their settings."""

    seed: int = 0
    side: int = 128  # of the pictures that pixel losses see, in pixels
    shapes: bool = False  # networks on the meta device: no file is read, and none has to be there
    half: torch.dtype | None = None  # what the networks of a step compute in, where that is not float32
    latent: tuple[int, int] = (4, 16)  # channels and side of the latents
    prior: Callable[..., Prior] | None = None  # (rank, negative_prompt, seed) -> one of its own; None: these networks have none


class LatentLoss:
    """Base of losses over latents: every sample counts."""

    settings_class: ClassVar[type[LossSettings]]
    reads: frozenset[str] = frozenset({"pred"})
    network: nn.Module | None = None

    def __init__(self, settings: Any) -> None:
        self.settings, self.name = settings, settings.called

    @classmethod
    def build(cls, settings: Any, means: Means) -> Self | None:
        """The loss of a recipe's entry, with the network that it brings along; None: it is optional and cannot be had.

        UserError or MissingDependency where a file or a package that it needs is missing or damaged.
        """
        return cls(settings)

    @classmethod
    def reads_of(cls, settings: Any) -> frozenset[str]:
        """What the loss of a recipe's entry reads."""
        return cls.reads

    @classmethod
    def check(cls, settings: Any) -> str | None:
        """For the dry run: what of files and packages is there; None: it needs none. It raises what `build` would; nothing is fetched."""
        return None

    def to(self, device: torch.device) -> None:
        if self.network is not None:
            self.network.to(device)

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

    def play(self, outputs: Outputs) -> Tensor:
        """A scalar through the same networks and about the same tensors, on shapes alone: what the memory estimate plays."""
        sr, hr = pixels(outputs)
        return (sr - hr).abs().mean()


class SampleLoss(PixelLoss):
    """Base of losses that are a mean over the samples that pass the noise gate: a subclass says each sample's error."""

    @abstractmethod
    def errors(self, outputs: Outputs) -> Tensor:
        """[K], of outputs that hold K >= 1 samples, all of which count; pixel fields are float32."""

    def play(self, outputs: Outputs) -> Tensor:
        return self.errors(outputs).mean()

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        kept = chosen(self, outputs)
        assert kept.sr is not None
        total = self.errors(kept).sum() if len(kept.sr) else 0 * kept.sr.sum()
        value = share(total, count, self.count(outputs))
        return self.settings.weight * value, {self.name: value.detach()}


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

    def update(self, *, sound: bool, pace: float = 1.0) -> None:
        """End an optimizer step: move the network unless the step was not `sound`, forget the gradient, count on.

        `pace`: the share of its first learning rate that the trained networks' schedule has come to.
        """


class NoiseGate(LossSettings):
    """A pixel loss may look only at samples whose noise level lets a picture be seen at all."""

    max_timestep: int | None = Field(
        None, ge=0, description="Only samples with a timestep up to this one (0 clean .. 999 noise) count; null: all, as published."
    )
    min_snr: float | None = Field(
        None, gt=0, description="Only samples with at least this signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod); null: all."
    )

    @property
    def gated(self) -> bool:
        """Whether any sample can be left out."""
        return self.max_timestep is not None or self.min_snr is not None

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


def latents(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The clean latents of the prediction and those of the ground truth, both float32 [B, C, h, w]."""
    if outputs.z0 is None or outputs.z0_hr is None:
        raise ValueError("a loss on latents needs Outputs.z0 and Outputs.z0_hr, which this step did not compute")
    return outputs.z0.float(), outputs.z0_hr.float()


_OF_SAMPLES = ("hr", "mask", "origin", "lr", "sr", "sr_ema", "branch")  # Outputs' fields that hold the K decoded samples


def chosen(loss: LatentLoss, outputs: Outputs) -> Outputs:
    """`outputs` with the samples alone that this loss looks at, pixels in float32. ValueError where the step lacks what it reads."""
    pixels(outputs)
    lacking = [name for name in sorted(loss.reads) if getattr(outputs, name) is None]
    if lacking:
        raise ValueError(f"the loss {loss.name} needs Outputs.{lacking[0]}, which this step did not compute")
    found = {name: value for name in _OF_SAMPLES if (value := getattr(outputs, name)) is not None}
    if loss.settings.gated:
        keep = decoded_active(loss, outputs)
        found = {name: value[keep.to(value.device)] for name, value in found.items()}
    return replace(outputs, **{name: value.float() if value.is_floating_point() else value for name, value in found.items()})


def decoded_active(loss: LatentLoss, given: Given) -> Tensor:
    """[K] bool: which of the decoded samples this loss looks at."""
    active = loss.active(given)
    return active if given.decoded is None else active[given.decoded]


def share(total: Tensor, count: Tensor | None, own: Tensor) -> Tensor:
    """`total` units' sum divided by the count of the whole batch; 0 (not NaN) where nothing counts anywhere."""
    return total / (own if count is None else count.to(total)).clamp(min=torch.finfo(torch.float32).tiny)
