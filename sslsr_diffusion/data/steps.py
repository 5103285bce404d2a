"""The steps of a degradation as a recipe lists them. A step draws what it will do; `operations.py` does it.

Every step has `draw(random, frame) -> list[Op]`: numbers only, no picture, so that a draw can be tested, printed and repeated.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sslsr_diffusion.config import Settings
from sslsr_diffusion.data.blur_kernels import FAMILIES, Family
from sslsr_diffusion.data.draws import Frame, OddSizes, Op, Pair, Probability, RandomNumbers, Range, Value, within

Mode = Literal["area", "bilinear", "bicubic"]
_MODES = ("bilinear", "bicubic", "area_average")  # of BSRGAN
_LEAST_VARIANCE = 1e-3  # a variance of 0 has no inverse; a kernel this narrow is the unit pulse


class BlurStep(Settings):
    """Blur with a random kernel of the Gaussian families, or now and then with a ringing sinc."""

    kind: Literal["blur"] = "blur"
    prob: Probability = Field(1.0, description="Probability that the step happens.")
    sizes: OddSizes = Field((7, 21), description="Least and most kernel size in pixels, both odd.")
    families: dict[Family, Probability] = Field(
        {"iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03, "plateau_iso": 0.12, "plateau_aniso": 0.03},
        description="Weights of the kernel families.",
    )
    sinc_prob: Probability = Field(0.1, description="Probability of a sinc kernel; its cutoff is U(pi/3, pi), from size 13 U(pi/5, pi).")
    sigma: Range = Field((0.2, 3.0), description="Standard deviations of the kernel in pixels.")
    beta_generalized: Annotated[Pair, within(0.05, 20)] = Field((0.5, 4.0), description="Shape of generalized Gaussians, half below 1.")
    beta_plateau: Annotated[Pair, within(0.05, 20)] = Field((1.0, 2.0), description="Shape of plateau kernels, half below 1.")

    @model_validator(mode="after")
    def _check(self) -> Self:
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
    cutoff: Annotated[Pair, within(0.01, 3.15)] = Field((math.pi / 3, math.pi), description="Cutoff frequency in radians per pixel.")

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        kernel: dict[str, Value] = {"family": "sinc", "size": random.odd(self.sizes), "cutoff": random.uniform(self.cutoff)}
        return [Op("blur", kernel)] if random.chance(self.prob) else []


class ResizeStep(Settings):
    """Resize up, down or not at all, without antialiasing, relative to the current size or to the low-resolution size."""

    kind: Literal["resize"] = "resize"
    to: Literal["current", "target"] = Field("current", description="What the factor multiplies: the current or the low-resolution size.")
    up_prob: Probability = Field(0.0, description="Probability of a factor above 1.")
    down_prob: Probability = Field(0.0, description="Probability of a factor below 1; otherwise the factor is 1.")
    factors: Range = Field((0.15, 1.5), description="Least and most factor.")
    modes: list[Mode] = Field(["area", "bilinear", "bicubic"], min_length=1, description="Interpolations, equally likely.")

    @model_validator(mode="after")
    def _check(self) -> Self:
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
    sigma: Annotated[Pair, within(0, 255)] = Field((1.0, 30.0), description="Standard deviation of Gaussian noise in grey levels (of 255).")
    poisson_scale: Annotated[Pair, within(0, 100)] = Field((0.05, 3.0), description="Strength of Poisson noise; 1: 256 photons for white.")
    gray_prob: Probability = Field(0.4, description="Probability that all channels get the same field.")

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        happens, gaussian = random.shared.chance(self.prob), random.shared.chance(self.gaussian_prob)
        sigma, scale, gray = random.uniform(self.sigma), random.uniform(self.poisson_scale), random.chance(self.gray_prob)
        op = Op("gaussian", {"sigma": sigma / 255, "gray": gray}) if gaussian else Op("poisson", {"scale": scale, "gray": gray})
        return [op] if happens else []


class JpegStep(Settings):
    """JPEG compression: the real-valued model of the published pipelines, or the real 8-bit codec."""

    kind: Literal["jpeg"] = "jpeg"
    prob: Probability = Field(1.0, description="Probability that the step happens.")
    quality: Annotated[Pair, within(1, 100)] = Field((30.0, 95.0), description="Least and most quality, 1 to 100.")
    codec: Literal["model", "real"] = Field("model", description="model: real-valued quality, not rounded; real: integer quality, 8 bits.")

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        quality = random.uniform(self.quality)
        op = Op("jpeg", {"quality": quality}) if self.codec == "model" else Op("jpeg_codec", {"quality": round(quality)})
        return [op] if random.chance(self.prob) else []


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
    groups: list[list["Step"]] = Field(description="The groups; each is a list of steps.", min_length=1)

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        drawn = [[op for step in group for op in step.draw(random, frame)] for group in self.groups]
        return [op for i in random.shared.order(len(drawn)) for op in drawn[i]]


class BsrganStep(Settings):
    """All of BSRGAN as one step: blur twice, two reductions, noise and JPEG in random order   (Zhang et al., ICCV 2021).

    Its parts depend on each other (the factor that is left, the order of the two reductions).
    """

    kind: Literal["bsrgan"] = "bsrgan"
    halve_prob: Probability = Field(0.25, description="Probability of halving first, at scale 4 only.")
    sizes: OddSizes = Field((3, 9), description="Least and most blur kernel size in pixels, both odd.")
    anisotropic_prob: Probability = Field(0.3, description="Probability of an anisotropic Gaussian; otherwise isotropic.")
    resize_prob: Probability = Field(0.75, description="Probability that the first reduction is a resize; otherwise blur and sub-sample.")
    factors: Annotated[Pair, within(0.01, 1)] = Field((0.85, 1.0), description="Factor of the first reduction when it is a plain resize.")
    noise: Annotated[tuple[int, int], within(0, 255)] = Field((1, 12), description="Least and most noise level in whole grey levels.")
    jpeg_prob: Probability = Field(0.9, description="Probability of the JPEG compression among the shuffled operations.")
    quality: Annotated[tuple[int, int], within(1, 100)] = Field((75, 95), description="JPEG quality; a last compression always happens.")

    def draw(self, random: RandomNumbers, frame: Frame) -> list[Op]:
        ops: list[Op] = []
        factor = frame.scale
        if frame.scale == 4 and random.chance(self.halve_prob):
            factor = 2
            size = (frame.height // 2, frame.width // 2)
            ops.append(Op("resize", {"mode": random.pick(_MODES), "size": size}) if random.chance(0.5) else Op("reduce", {"scale": 2}))
        parts = [
            [self._blur(random, factor)],
            [self._blur(random, factor)],
            self._first_reduction(random, frame, factor),
            [Op("resize", {"mode": random.pick(_MODES), "size": frame.target()}), Op("clip")],
            [self._noise(random)],
            [self._jpeg(random)] if random.chance(self.jpeg_prob) else [],
        ]
        order = random.order(len(parts))
        places = sorted((order.index(2), order.index(3)))  # the sub-sampling comes before the last resize
        for place, later in zip(places, (2, 3)):
            order[place] = later
        return [*ops, *(op for i in order for op in parts[i]), self._jpeg(random)]

    def _blur(self, random: RandomNumbers, factor: int) -> Op:
        widest = 0.2 + 0.2 * factor
        size = random.odd(self.sizes)
        if random.chance(self.anisotropic_prob):
            variances = {f"variance_{i}": max(random.uniform((0, widest)), _LEAST_VARIANCE) for i in (1, 2)}
            return Op("blur", {"family": "variance", "size": size, **variances, "theta": random.uniform((0, math.pi))})
        sigma = max(random.uniform((0, widest)), _LEAST_VARIANCE)
        return Op("blur", {"family": "iso", "size": size, "sigma_x": sigma, "sigma_y": sigma, "theta": 0.0})

    def _first_reduction(self, random: RandomNumbers, frame: Frame, factor: int) -> list[Op]:
        if random.chance(self.resize_prob):
            reduced = random.uniform(self.factors)
            start = frame.height // (frame.scale // factor), frame.width // (frame.scale // factor)
            size = max(1, int(reduced * start[0])), max(1, int(reduced * start[1]))
            return [Op("resize", {"mode": random.pick(_MODES), "size": size}), Op("clip")]
        sigma, width = random.uniform((0.1, 0.25 * factor)), random.odd(self.sizes)
        kernel: dict[str, Value] = {"family": "shifted", "size": width, "sigma": sigma, "shift": (factor - 1) / 2}
        return [Op("blur", kernel), Op("every", {"step": factor}), Op("clip")]

    def _noise(self, random: RandomNumbers) -> Op:
        level = random.integer(*self.noise) / 255
        kind = random.pick(("colour", "gray", "correlated"), (0.4, 0.4, 0.2))
        if kind == "correlated":
            return Op("correlated", {"level": self.noise[1] / 255, "seed": random.integer(0, 2**31 - 1)})
        return Op("gaussian", {"sigma": level, "gray": kind == "gray"})

    def _jpeg(self, random: RandomNumbers) -> Op:
        return Op("jpeg_codec", {"quality": random.integer(*self.quality)})


Step = Annotated[
    BlurStep | SincStep | ResizeStep | ReduceStep | NoiseStep | JpegStep | SharpenStep | QuantizeStep | ShuffleStep | BsrganStep,
    Field(discriminator="kind"),
]
ShuffleStep.model_rebuild()
Resizing = tuple[float, float, Pair]  # probabilities of a factor above and below 1, least and most factor


def second_order(
    blurs: tuple[BlurStep, BlurStep],
    resizes: tuple[Resizing, Resizing],
    noises: tuple[NoiseStep, NoiseStep],
    qualities: tuple[Pair, Pair],
    sinc: SincStep,
    *after: Step,
) -> list[Step]:
    """Real-ESRGAN's order: blur, resize, noise, JPEG; the same again; then the final sinc and JPEG in either order."""
    first, second = (
        ResizeStep(to=to, up_prob=up, down_prob=down, factors=factors) for to, (up, down, factors) in zip(("current", "target"), resizes)
    )
    jpegs = [JpegStep(quality=quality) for quality in qualities]
    last = ShuffleStep(groups=[[ResizeStep(to="target"), sinc], [jpegs[1]]])
    return [blurs[0], first, noises[0], jpegs[0], blurs[1], second, noises[1], last, *after]
