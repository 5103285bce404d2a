"""What a task is to the loop: one trained module, what is drawn, one forward, one picture restored, one result saved."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.losses import Look, Loss
from sslsr_diffusion.models.networks import Networks
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.tasks.graph import Graph
from sslsr_diffusion.tasks.pixels import Windows, all_pixels
from sslsr_diffusion.types import Batch, Given, Outputs


@dataclass(frozen=True)
class Draws:
    """Everything random about one micro-batch, and what follows from it before the networks run."""

    given: Given
    noise: dict[str, Tensor] = field(default_factory=dict)
    windows: Windows | None = None
    reads: frozenset[str] = frozenset()  # what the losses of the step read of Outputs

    def to(self, device: torch.device | str) -> Self:
        """The tensors on a device; windows are read on the CPU."""
        return replace(self, given=self.given.to(device), noise={name: value.to(device) for name, value in self.noise.items()})


class Task(Protocol):
    """What trains, from what, and which losses can read it. The loop knows these attributes and nothing else of it."""

    module: nn.Module  # all trained parameters, one forward: what DDP, FSDP2 and DeepSpeed wrap

    @property
    def gives(self) -> frozenset[str]:
        """Of "pred", "sr", "lr", "sr_ema", "branch", "z0", "z0_hr", "moments", "prior": a loss is possible where it reads some of these.

        `run` computes them, but for "sr_ema": that is the "sr" of a second run, with a `module` that has the averaged weights; and "prior",
        which is no output: `networks.prior` gives what the loss asks.
        """

    @property
    def label(self) -> str:
        """Of the restored pictures in the validation grid: "prediction", "reconstruction", ..."""

    @property
    def networks(self) -> Networks:
        """What is built, moved and saved."""

    @property
    def restorer(self) -> Restorer | None:
        """Around the same networks; None: the result enlarges nothing, other tasks begin with it."""

    def to(self, device: torch.device) -> None:
        """Move all networks in place, frozen ones included."""

    def draw(self, batch: Batch, losses: Sequence[Look]) -> Draws:
        """Timesteps, noises and windows of each sample, from (seed, global sample index) alone."""

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        """The networks' part; `module` is `self.module`, its wrapped form, or the same with other weights."""

    def restore(self, lr: Tensor, hr: Tensor, seed: int) -> Tensor:
        """[1, 3, h, w], [1, 3, H, W] -> [1, 3, H, W] in about [0, 1], from `lr` (an autoencoder: from `hr`), with the present weights."""

    def save(self, folder: Path) -> None:
        """Write the result with the present weights: what the family's own world loads."""

    def graph(self) -> Graph:
        """The one call that makes a picture, for other programs; LoRAs are merged in place. UserError where it takes several calls."""


class TaskBase:
    """What tasks have in common: networks that move, a result that is the whole upscaler."""

    makes_upscaler: ClassVar[bool] = True
    reads_latents: ClassVar[bool] = False
    label: ClassVar[str] = "prediction"
    posteriors: ClassVar[tuple[str, ...]] = ()  # the noises that encoding draws
    networks: Any
    seed: int = 0
    restorer: Restorer | None = None

    def draw(self, batch: Batch, losses: Sequence[Look]) -> Draws:
        """Every sample whole."""
        noise = {}
        for purpose in self.posteriors:
            drawn = per_sample_noise(self.seed, batch.index.tolist(), purpose, self.networks.codec.noise_shape(batch.hr)[1:])
            noise[purpose] = drawn.to(batch.hr.device)
        return Draws(all_pixels(batch), noise, reads=reads_of(losses))

    def to(self, device: torch.device) -> None:
        self.networks.to(device)

    def restore(self, lr: Tensor, hr: Tensor, seed: int) -> Tensor:
        """By the restorer, which takes smaller tiles where memory runs out."""
        assert self.restorer is not None
        images: Tensor = self.restorer(lr, generator=torch.Generator().manual_seed(seed), output_type="pt").images
        return images

    def save(self, folder: Path) -> None:
        assert self.restorer is not None
        self.restorer.save(folder)

    def graph(self) -> Graph:
        raise UserError(
            "onnx: expected a plain network, a one-step upscaler or an autoencoder, which make a picture in one call; "
            f"{self.networks.base} is sampled in several. Leave it out."
        )


@dataclass(frozen=True)
class StepResult:
    """What one micro-batch adds to the optimizer step."""

    loss: Tensor  # the scalar to go backward from
    weighted: dict[str, Tensor]  # per loss, detached, before any automatic weight
    raw: dict[str, Tensor]  # per term, detached and unweighted: what is plotted


def apply_losses(
    outputs: Outputs, losses: Sequence[Loss], counts: dict[str, Tensor] | None = None, scales: dict[str, float] | None = None
) -> StepResult:
    """The sum of all losses; `counts` are the units of the whole batch, `scales` the automatic weights."""
    total = outputs.t.new_zeros((), dtype=torch.float32)
    weighted: dict[str, Tensor] = {}
    raw: dict[str, Tensor] = {}
    for loss in losses:
        value, terms = loss(outputs, None if counts is None else counts[loss.name])
        total = total + value * (scales or {}).get(loss.name, 1.0)
        weighted[loss.name] = value.detach()
        raw.update(terms)
    return StepResult(total, weighted, raw)


def reads_of(losses: Sequence[Look]) -> frozenset[str]:
    """What any of them reads of Outputs."""
    return frozenset[str]().union(*(loss.reads for loss in losses))


def per_sample_noise(seed: int, indices: Sequence[int], purpose: str, shape: Sequence[int]) -> Tensor:
    """[B, *shape] standard normal, one generator per sample, drawn on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=sample_generator(seed, i, purpose)) for i in indices])
