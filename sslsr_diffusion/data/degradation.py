"""From a high-resolution crop to its low-resolution partner: presets, and the one place where a sample is degraded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslsr_diffusion.config import Settings
from sslsr_diffusion.data.blur_kernels import Family
from sslsr_diffusion.data.draws import Frame, Op, Pair, Probability, RandomNumbers
from sslsr_diffusion.data.filters import unsharp_mask
from sslsr_diffusion.data.operations import run
from sslsr_diffusion.data.steps import BlurStep, BsrganStep, NoiseStep, QuantizeStep, ReduceStep, SincStep, Step, second_order
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.imresize import matlab_bicubic


class PublishedDegradation(NamedTuple):
    """Its steps, whether the target is sharpened first, and how often nothing is done."""

    steps: Sequence[Step]
    sharpen_target: bool = False
    no_degradation_prob: float = 0.0


_SSL_BETAS: dict[str, Pair] = {"beta_generalized": (0.5, 2.0), "beta_plateau": (1.0, 1.5)}
_MILD_FAMILIES: dict[Family, float] = {"iso": 0.7, "aniso": 0.3}

DEGRADATIONS: dict[str, PublishedDegradation] = {
    "stablesr_ssl": PublishedDegradation(  # StableSR with SSL, configs/SSL/base.yaml
        second_order(
            (BlurStep(sizes=(3, 21), sigma=(0.2, 1.5), **_SSL_BETAS), BlurStep(prob=0.5, sizes=(3, 11), sigma=(0.2, 1.0), **_SSL_BETAS)),
            ((0.2, 0.7, (0.3, 1.5)), (0.3, 0.4, (0.6, 1.2))),
            (NoiseStep(sigma=(1, 15), poisson_scale=(0.05, 2.0)), NoiseStep(sigma=(1, 12), poisson_scale=(0.05, 1.0))),
            ((60, 95), (60, 100)),
            SincStep(prob=0.8, sizes=(3, 11)),
        ),
        no_degradation_prob=0.01,
    ),
    "real_esrgan": PublishedDegradation(  # Real-ESRGAN x4plus
        second_order(
            (BlurStep(sizes=(7, 21), sigma=(0.2, 3.0)), BlurStep(prob=0.8, sizes=(7, 21), sigma=(0.2, 1.5))),
            ((0.2, 0.7, (0.15, 1.5)), (0.3, 0.4, (0.3, 1.2))),
            (NoiseStep(sigma=(1, 30), poisson_scale=(0.05, 3.0)), NoiseStep(sigma=(1, 25), poisson_scale=(0.05, 2.5))),
            ((30, 95), (30, 95)),
            SincStep(prob=0.8, sizes=(7, 21)),
            QuantizeStep(),
        ),
        sharpen_target=True,
    ),
    "mild": PublishedDegradation(  # Real-ESRGAN with SSL
        second_order(
            (
                BlurStep(sizes=(3, 7), sigma=(0.1, 0.6), families=_MILD_FAMILIES, sinc_prob=0.01),
                BlurStep(prob=0.8, sizes=(3, 5), sigma=(0.1, 0.4), families=_MILD_FAMILIES, sinc_prob=0.01),
            ),
            ((0.1, 0.85, (0.9, 1.1)), (0.1, 0.85, (0.9, 1.1))),
            (
                NoiseStep(sigma=(1, 8), poisson_scale=(0.05, 0.5), gray_prob=0.2),
                NoiseStep(sigma=(0, 4), poisson_scale=(0, 0.3), gray_prob=0.2),
            ),
            ((85, 95), (87, 95)),
            SincStep(prob=0.1, sizes=(3, 5)),
            QuantizeStep(),
        )
    ),
    "bicubic": PublishedDegradation([ReduceStep()]),  # MATLAB imresize
    "bsrgan": PublishedDegradation([BsrganStep(), QuantizeStep()]),  # BSRGAN, training numbers of the SSL fork
}

if TYPE_CHECKING:
    DegradationName = str
else:  # the table's keys, so that a new entry is all that a new degradation needs
    DegradationName = Literal[tuple(DEGRADATIONS)]


class DegradationSettings(Settings):
    """How low-resolution pictures are made from high-resolution crops; what is left out is as in the preset."""

    preset: DegradationName | None = Field(None, description="A published degradation; stablesr_ssl if there are no steps.")
    steps: list[Step] | None = Field(None, description="Your own steps, in order, instead of the preset's.", min_length=1)
    sharpen_target: bool | None = Field(None, description="Unsharp mask on the high-resolution crop before all else.")
    no_degradation_prob: Probability | None = Field(None, description="Share of samples only reduced (bicubic; scale 1: untouched).")
    pool_size: int = Field(
        0,
        ge=0,
        description="Pair pool of the published training: hand out samples shuffled within this many, a multiple of the batch, and draw "
        "resize, noise kind and order once per batch. 0: no pool, everything drawn per sample.",
    )
    device: Literal["cpu", "training"] = Field(
        "cpu", description="cpu: in the loader's workers; training: on the training device, for small machines beside fast GPUs."
    )

    @model_validator(mode="before")
    @classmethod
    def _a_preset_or_own_steps(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        preset, steps = given.get("preset"), given.get("steps")
        if preset is not None and steps is not None:
            raise ValueError("degradation: expected either preset or steps, got both; remove one")
        return {**given, "preset": "stablesr_ssl"} if preset is None and steps is None else given


class Degradation:
    """Draws and carries out the degradation of one sample at a time; picklable, without state."""

    def __init__(self, settings: DegradationSettings, scale: int) -> None:
        preset = DEGRADATIONS[settings.preset] if settings.preset is not None else PublishedDegradation(())
        self.scale, self.steps = scale, settings.steps or preset.steps
        sharpen, prob = settings.sharpen_target, settings.no_degradation_prob
        self.sharpen_target = preset.sharpen_target if sharpen is None else sharpen
        self.no_degradation_prob = preset.no_degradation_prob if prob is None else prob

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
        lr = run(hr.contiguous(memory_format=torch.channels_last), ops, generator)
        if tuple(lr.shape[2:]) != size:
            whole = tuple(lr.shape[2:]) == tuple(hr.shape[2:])
            lr = matlab_bicubic(lr, 1 / self.scale) if whole else resize_bicubic(lr, size)
        return lr.clamp(0, 1).contiguous()
