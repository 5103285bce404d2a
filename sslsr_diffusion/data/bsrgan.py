"""The BSRGAN degradation model: blur twice, two reductions, noise and JPEG in random order (Zhang et al., ICCV 2021)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from sslsr_diffusion.config import Settings
from sslsr_diffusion.data.draws import Frame, OddSizes, Op, Probability, RandomNumbers, Value, within

_MODES = ("bilinear", "bicubic", "area_average")
_LEAST_VARIANCE = 1e-3  # a variance of 0 has no inverse; a kernel this narrow is the unit pulse


class BsrganStep(Settings):
    """All of BSRGAN as one step: its parts depend on each other (the factor that is left, the order of the two reductions)."""

    kind: Literal["bsrgan"] = "bsrgan"
    halve_prob: Probability = Field(0.25, description="Probability of halving first, at scale 4 only.")
    sizes: OddSizes = Field((3, 9), description="Least and most blur kernel size in pixels, both odd.")
    anisotropic_prob: Probability = Field(0.3, description="Probability of an anisotropic Gaussian; otherwise isotropic.")
    resize_prob: Probability = Field(
        0.75, description="Probability that the first reduction is a plain resize; otherwise blur and sub-sample."
    )
    factors: Annotated[tuple[float, float], within(0.01, 1)] = Field(
        (0.85, 1.0), description="Factor of the first reduction when it is a plain resize."
    )
    noise: Annotated[tuple[int, int], within(0, 255)] = Field(
        (1, 12), description="Least and most noise level in grey levels, whole numbers."
    )
    jpeg_prob: Probability = Field(0.9, description="Probability of the JPEG compression among the shuffled operations.")
    quality: Annotated[tuple[int, int], within(1, 100)] = Field(
        (75, 95), description="Least and most JPEG quality, whole numbers; a last compression always happens."
    )

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
