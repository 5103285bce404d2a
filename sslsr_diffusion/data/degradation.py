"""From a high-resolution crop to its low-resolution partner: presets, and the one place where a sample is degraded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslsr_diffusion.config import Settings
from sslsr_diffusion.data import operations
from sslsr_diffusion.data.blur_kernels import Family
from sslsr_diffusion.data.bsrgan import BsrganStep
from sslsr_diffusion.data.draws import Frame, Op, Probability, RandomNumbers
from sslsr_diffusion.data.filters import unsharp_mask
from sslsr_diffusion.data.resizing import matlab_bicubic
from sslsr_diffusion.data.steps import BlurStep, JpegStep, NoiseStep, QuantizeStep, ReduceStep, ResizeStep, ShuffleStep, SincStep, Step
from sslsr_diffusion.images import resize_bicubic

T = TypeVar("T")


@dataclass(frozen=True)
class PublishedDegradation:
    """Its steps, whether the target is sharpened first, and how often nothing is done."""

    steps: Sequence[Step]
    sharpen_target: bool = False
    no_degradation_prob: float = 0.0
    source: str = ""


def _second_order(
    blurs: tuple[BlurStep, BlurStep],
    resizes: tuple[ResizeStep, ResizeStep],
    noises: tuple[NoiseStep, NoiseStep],
    jpegs: tuple[JpegStep, JpegStep],
    sinc: SincStep,
) -> list[Step]:
    """Real-ESRGAN's order: blur, resize, noise, JPEG; the same again; then the final sinc and JPEG in either order."""
    last = ShuffleStep(groups=[[ResizeStep(to="target"), sinc], [jpegs[1]]])
    return [blurs[0], resizes[0], noises[0], jpegs[0], blurs[1], resizes[1], noises[1], last]


_SSL_BETAS: dict[str, tuple[float, float]] = {"beta_generalized": (0.5, 2.0), "beta_plateau": (1.0, 1.5)}
_MILD_FAMILIES: dict[Family, float] = {"iso": 0.7, "aniso": 0.3}

DEGRADATIONS: dict[str, PublishedDegradation] = {
    "stablesr_ssl": PublishedDegradation(
        _second_order(
            (
                BlurStep(sizes=(3, 21), sigma=(0.2, 1.5), **_SSL_BETAS),
                BlurStep(prob=0.5, sizes=(3, 11), sigma=(0.2, 1.0), **_SSL_BETAS),
            ),
            (
                ResizeStep(up_prob=0.2, down_prob=0.7, factors=(0.3, 1.5)),
                ResizeStep(to="target", up_prob=0.3, down_prob=0.4, factors=(0.6, 1.2)),
            ),
            (NoiseStep(sigma=(1, 15), poisson_scale=(0.05, 2.0)), NoiseStep(sigma=(1, 12), poisson_scale=(0.05, 1.0))),
            (JpegStep(quality=(60, 95)), JpegStep(quality=(60, 100))),
            SincStep(prob=0.8, sizes=(3, 11)),
        ),
        no_degradation_prob=0.01,
        source="StableSR with SSL, configs/SSL/base.yaml",
    ),
    "real_esrgan": PublishedDegradation(
        [
            *_second_order(
                (BlurStep(sizes=(7, 21), sigma=(0.2, 3.0)), BlurStep(prob=0.8, sizes=(7, 21), sigma=(0.2, 1.5))),
                (
                    ResizeStep(up_prob=0.2, down_prob=0.7, factors=(0.15, 1.5)),
                    ResizeStep(to="target", up_prob=0.3, down_prob=0.4, factors=(0.3, 1.2)),
                ),
                (NoiseStep(sigma=(1, 30), poisson_scale=(0.05, 3.0)), NoiseStep(sigma=(1, 25), poisson_scale=(0.05, 2.5))),
                (JpegStep(quality=(30, 95)), JpegStep(quality=(30, 95))),
                SincStep(prob=0.8, sizes=(7, 21)),
            ),
            QuantizeStep(),
        ],
        sharpen_target=True,
        source="Real-ESRGAN x4plus",
    ),
    "mild": PublishedDegradation(
        [
            *_second_order(
                (
                    BlurStep(sizes=(3, 7), sigma=(0.1, 0.6), families=_MILD_FAMILIES, sinc_prob=0.01),
                    BlurStep(prob=0.8, sizes=(3, 5), sigma=(0.1, 0.4), families=_MILD_FAMILIES, sinc_prob=0.01),
                ),
                (
                    ResizeStep(up_prob=0.1, down_prob=0.85, factors=(0.9, 1.1)),
                    ResizeStep(to="target", up_prob=0.1, down_prob=0.85, factors=(0.9, 1.1)),
                ),
                (
                    NoiseStep(sigma=(1, 8), poisson_scale=(0.05, 0.5), gray_prob=0.2),
                    NoiseStep(sigma=(0, 4), poisson_scale=(0, 0.3), gray_prob=0.2),
                ),
                (JpegStep(quality=(85, 95)), JpegStep(quality=(87, 95))),
                SincStep(prob=0.1, sizes=(3, 5)),
            ),
            QuantizeStep(),
        ],
        source="Real-ESRGAN with SSL",
    ),
    "bicubic": PublishedDegradation([ReduceStep()], source="MATLAB imresize"),
    "bsrgan": PublishedDegradation([BsrganStep(), QuantizeStep()], source="BSRGAN, training numbers of the SSL fork"),
}

if TYPE_CHECKING:
    DegradationName = str
else:  # the table's keys, so that a new entry is all that a new degradation needs
    DegradationName = Literal[tuple(DEGRADATIONS)]


class DegradationSettings(Settings):
    """How low-resolution pictures are made from high-resolution crops."""

    preset: DegradationName | None = Field(
        None, description="A published degradation, which also gives the values that are left out below; stablesr_ssl without steps."
    )
    steps: list[Step] | None = Field(None, description="Your own steps, in order, instead of the preset's.", min_length=1)
    sharpen_target: bool | None = Field(
        None, description="Unsharp mask on the high-resolution crop before anything else; default: the preset's."
    )
    no_degradation_prob: Probability | None = Field(
        None, description="Probability that a sample is only reduced (bicubic; at scale 1 untouched); default: the preset's."
    )
    pool_size: int = Field(
        0,
        ge=0,
        description="Pair pool of the published training: hand out samples shuffled within this many, and draw resize, noise kind, order "
        "once per batch; a multiple of the batch. 0: no pool, everything drawn per sample.",
    )
    device: Literal["cpu", "training"] = Field(
        "cpu",
        description="cpu: in the loader's workers; training: on the training device, after loading (small machines beside fast GPUs).",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_preset_or_own_steps(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        if given.get("preset") is not None and given.get("steps") is not None:
            raise ValueError("degradation: expected either preset or steps, got both; remove one")
        neither = given.get("preset") is None and given.get("steps") is None
        return {**given, "preset": "stablesr_ssl"} if neither else given


class Degradation:
    """Draws and carries out the degradation of one sample at a time; picklable, without state."""

    def __init__(self, settings: DegradationSettings, scale: int) -> None:
        preset = DEGRADATIONS[settings.preset] if settings.preset is not None else PublishedDegradation(())
        self.scale = scale
        self.steps = _first(settings.steps, preset.steps)
        self.sharpen_target = _first(settings.sharpen_target, preset.sharpen_target)
        self.no_degradation_prob = _first(settings.no_degradation_prob, preset.no_degradation_prob)

    def draw(self, height: int, width: int, own: torch.Generator, shared: torch.Generator | None = None) -> list[Op]:
        """What will happen to a crop of that size; `shared` gives the draws that are the same for a batch (pair pool)."""
        random, frame = RandomNumbers(own, shared), Frame(height, width, self.scale)
        if random.shared.chance(self.no_degradation_prob):
            return [Op("reduce", {"scale": self.scale})]
        return [op for step in self.steps for op in step.draw(random, frame)]

    def target(self, hr: Tensor) -> Tensor:
        """The high-resolution crop that training aims at: sharpened if the settings say so; [B, 3, H, W] in [0, 1]."""
        return unsharp_mask(hr, weight=0.5, radius=50, threshold=10.0) if self.sharpen_target else hr

    def apply(self, hr: Tensor, ops: Sequence[Op], generator: torch.Generator) -> Tensor:
        """Carry out what was drawn.

        Args:
            hr: [B, 3, H, W] float32 in [0, 1].
            ops: from `draw`.
            generator: for noise fields, on hr's device.

        Returns:
            [B, 3, H // scale, W // scale] in [0, 1]. Steps that end at another size are followed by a bicubic reduction.
        """
        size = hr.shape[2] // self.scale, hr.shape[3] // self.scale
        lr = operations.run(hr.contiguous(memory_format=torch.channels_last), ops, generator)
        if tuple(lr.shape[2:]) != size:
            whole = tuple(lr.shape[2:]) == tuple(hr.shape[2:])
            lr = matlab_bicubic(lr, 1 / self.scale) if whole else resize_bicubic(lr, size)
        return lr.clamp(0, 1).contiguous()


def _first(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value
