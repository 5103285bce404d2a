"""The steps of a degradation as a recipe lists them. A step draws what it will do; `operations.py` does it.

Every step has `draw(random, frame) -> list[Op]`: numbers only, no picture, so that a draw can be tested, printed and repeated.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sslsr_diffusion.config import Settings
from sslsr_diffusion.data.blur_kernels import FAMILIES, Family
from sslsr_diffusion.data.bsrgan import BsrganStep
from sslsr_diffusion.data.draws import Frame, OddSizes, Op, Probability, RandomNumbers, Range, Value, within

Mode = Literal["area", "bilinear", "bicubic"]


class BlurStep(Settings):
    """Blur with a random kernel of the Gaussian families, or now and then with a ringing sinc."""

    kind: Literal["blur"] = "blur"
    prob: Probability = Field(1.0, description="Probability that the step happens.")
    sizes: OddSizes = Field((7, 21), description="Least and most kernel size in pixels, both odd.")
    families: dict[Family, Probability] = Field(
        {"iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03, "plateau_iso": 0.12, "plateau_aniso": 0.03},
        description="Weights of the kernel families.",
    )
    sinc_prob: Probability = Field(
        0.1, description="Probability of a sinc kernel instead; its cutoff is U(pi/3, pi), from size 13 U(pi/5, pi)."
    )
    sigma: Range = Field((0.2, 3.0), description="Standard deviations of the kernel in pixels.")
    beta_generalized: Annotated[tuple[float, float], within(0.05, 20)] = Field(
        (0.5, 4.0), description="Shape of generalized Gaussians; half of the draws lie below 1, half above."
    )
    beta_plateau: Annotated[tuple[float, float], within(0.05, 20)] = Field(
        (1.0, 2.0), description="Shape of plateau kernels; half of the draws lie below 1, half above."
    )

    @model_validator(mode="after")
    def _check(self) -> BlurStep:
        if sum(self.families.values()) <= 0 or self.sigma[0] <= 0:
            raise ValueError("blur: expected a family with a weight above 0, and sigma above 0")
        return self

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        happens = random.shared.chance(self.prob)
        size = random.odd(self.sizes)
        if random.chance(self.sinc_prob):
            kernel: dict[str, Value] = {
                "family": "sinc",
                "size": size,
                "cutoff": random.uniform((math.pi / (3 if size < 13 else 5), math.pi)),
            }
        else:
            kernel = self._gaussian(random, size)
        return [Op("blur", kernel)] if happens else []

    def _gaussian(self, random: RandomNumbers, size: int) -> dict[str, Value]:
        names = [name for name in FAMILIES if name in self.families]
        family = random.pick(names, [self.families[name] for name in names])
        kernel: dict[str, Value] = {"family": family, "size": size, "sigma_x": random.uniform(self.sigma), "sigma_y": 0.0, "theta": 0.0}
        if family.endswith("aniso"):
            kernel |= {"sigma_y": random.uniform(self.sigma), "theta": random.uniform((-math.pi, math.pi))}
        if family.startswith(("generalized", "plateau")):
            low, high = self.beta_generalized if family.startswith("generalized") else self.beta_plateau
            kernel["beta"] = random.uniform((low, 1.0)) if random.chance(0.5) else random.uniform((1.0, high))
        return kernel


class SincStep(Settings):
    """The final low-pass filter: ringing and overshoot."""

    kind: Literal["sinc"] = "sinc"
    prob: Probability = Field(0.8, description="Probability that the step happens.")
    sizes: OddSizes = Field((7, 21), description="Least and most kernel size in pixels, both odd.")
    cutoff: Annotated[tuple[float, float], within(0.01, 3.15)] = Field(
        (math.pi / 3, math.pi), description="Cutoff frequency in radians per pixel."
    )

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        kernel: dict[str, Value] = {"family": "sinc", "size": random.odd(self.sizes), "cutoff": random.uniform(self.cutoff)}
        return [Op("blur", kernel)] if random.chance(self.prob) else []


class ResizeStep(Settings):
    """Resize up, down or not at all, without antialiasing, relative to the current size or to the low-resolution size."""

    kind: Literal["resize"] = "resize"
    to: Literal["current", "target"] = Field(
        "current", description="What the factor multiplies: the current size or the low-resolution size."
    )
    up_prob: Probability = Field(0.0, description="Probability of a factor above 1.")
    down_prob: Probability = Field(0.0, description="Probability of a factor below 1; otherwise the factor is 1.")
    factors: Range = Field((0.15, 1.5), description="Least and most factor.")
    modes: list[Mode] = Field(["area", "bilinear", "bicubic"], min_length=1, description="Interpolations, equally likely.")

    @model_validator(mode="after")
    def _check(self) -> ResizeStep:
        if self.up_prob + self.down_prob > 1 + 1e-9 or not 0 < self.factors[0] <= 1 <= self.factors[1]:
            raise ValueError("resize: expected up_prob + down_prob of at most 1, and factors from a number in (0, 1] to one of at least 1")
        return self

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        random = random.shared
        way = random.pick(("up", "down", "keep"), (self.up_prob, self.down_prob, max(0.0, 1 - self.up_prob - self.down_prob)))
        factor = {"up": random.uniform((1.0, self.factors[1])), "down": random.uniform((self.factors[0], 1.0)), "keep": 1.0}[way]
        where: dict[str, Value] = {"factor": factor} if self.to == "current" else {"size": frame.target(factor)}
        return [Op("resize", {"mode": random.pick(self.modes), **where})]


class ReduceStep(Settings):
    """Reduce to the low-resolution size as MATLAB's imresize does: bicubic, antialiased, clipped."""

    kind: Literal["reduce"] = "reduce"

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        return [Op("reduce", {"scale": frame.scale})]


class NoiseStep(Settings):
    """Gaussian or Poisson noise, in colour or gray."""

    kind: Literal["noise"] = "noise"
    prob: Probability = Field(1.0, description="Probability that the step happens.")
    gaussian_prob: Probability = Field(0.5, description="Probability of Gaussian noise; otherwise Poisson.")
    sigma: Annotated[tuple[float, float], within(0, 255)] = Field(
        (1.0, 30.0), description="Standard deviation of Gaussian noise in grey levels (of 255)."
    )
    poisson_scale: Annotated[tuple[float, float], within(0, 100)] = Field(
        (0.05, 3.0), description="Strength of Poisson noise; 1 is photon noise at 256 photons for white."
    )
    gray_prob: Probability = Field(0.4, description="Probability that all channels get the same field.")

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        happens, gaussian = random.shared.chance(self.prob), random.shared.chance(self.gaussian_prob)
        sigma, scale, gray = random.uniform(self.sigma), random.uniform(self.poisson_scale), random.chance(self.gray_prob)
        if not happens:
            return []
        return [Op("gaussian", {"sigma": sigma / 255, "gray": gray}) if gaussian else Op("poisson", {"scale": scale, "gray": gray})]


class JpegStep(Settings):
    """JPEG compression: the real-valued model of the published pipelines, or the real 8-bit codec."""

    kind: Literal["jpeg"] = "jpeg"
    prob: Probability = Field(1.0, description="Probability that the step happens.")
    quality: Annotated[tuple[float, float], within(1, 100)] = Field((30.0, 95.0), description="Least and most quality, 1 to 100.")
    codec: Literal["model", "real"] = Field(
        "model", description="model: real-valued quality, no 8-bit rounding; real: integer quality, 8 bits."
    )

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        quality = random.uniform(self.quality)
        if not random.chance(self.prob):
            return []
        return [Op("jpeg", {"quality": quality}) if self.codec == "model" else Op("jpeg_codec", {"quality": round(quality)})]


class SharpenStep(Settings):
    """Unsharp mask with soft transitions."""

    kind: Literal["sharpen"] = "sharpen"
    prob: Probability = Field(1.0, description="Probability that the step happens.")
    weight: float = Field(0.5, ge=0, description="Share of the residual that is added.")
    radius: int = Field(50, ge=1, description="Size of the Gaussian in pixels, made odd.")
    threshold: float = Field(10.0, ge=0, description="Grey levels below which a difference counts as flat.")

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        happens = random.chance(self.prob)
        return [Op("sharpen", {"weight": self.weight, "radius": self.radius, "threshold": self.threshold})] if happens else []


class QuantizeStep(Settings):
    """Round to 8 bits."""

    kind: Literal["quantize"] = "quantize"

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        return [Op("quantize")]


class ShuffleStep(Settings):
    """Groups of steps in random order; the steps of a group stay together."""

    kind: Literal["shuffle"] = "shuffle"
    groups: list[list[Step]] = Field(description="The groups; each is a list of steps.", min_length=1)

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        drawn = [[op for step in group for op in step.draw(random, frame)] for group in self.groups]
        return [op for i in random.shared.order(len(drawn)) for op in drawn[i]]


Step = Annotated[
    BlurStep | SincStep | ResizeStep | ReduceStep | NoiseStep | JpegStep | SharpenStep | QuantizeStep | ShuffleStep | BsrganStep,
    Field(discriminator="kind"),
]
ShuffleStep.model_rebuild()
