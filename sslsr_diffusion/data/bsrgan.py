"""The BSRGAN degradation model: blur twice, two reductions, noise and JPEG in random order (Zhang et al., ICCV 2021)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from sslsr_diffusion.config import Settings
from sslsr_diffusion.data.draws import Draws, Frame, OddSizes, Op, Probability, within

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

    def draw(self, draws: Draws, frame: Frame) -> list[Op]:
        ops: list[Op] = []
        factor = frame.scale
        if frame.scale == 4 and draws.chance(self.halve_prob):
            factor = 2
            size = (frame.height // 2, frame.width // 2)
            ops.append(Op("resize", {"mode": draws.pick(_MODES), "size": size}) if draws.chance(0.5) else Op("reduce", {"scale": 2}))
        parts = [
            [self._blur(draws, factor)],
            [self._blur(draws, factor)],
            self._first_reduction(draws, frame, factor),
            [Op("resize", {"mode": draws.pick(_MODES), "size": frame.target()}), Op("clip")],
            [self._noise(draws)],
            [self._jpeg(draws)] if draws.chance(self.jpeg_prob) else [],
        ]
        order = draws.order(len(parts))
        places = sorted((order.index(2), order.index(3)))  # the sub-sampling comes before the last resize
        for place, later in zip(places, (2, 3)):
            order[place] = later
        return [*ops, *(op for i in order for op in parts[i]), self._jpeg(draws)]

    def _blur(self, draws: Draws, factor: int) -> Op:
        widest = 0.2 + 0.2 * factor
        size = draws.odd(self.sizes)
        if draws.chance(self.anisotropic_prob):
            variances = {f"variance_{i}": max(draws.uniform((0, widest)), _LEAST_VARIANCE) for i in (1, 2)}
            return Op("blur", {"family": "variance", "size": size, **variances, "theta": draws.uniform((0, math.pi))})
        sigma = max(draws.uniform((0, widest)), _LEAST_VARIANCE)
        return Op("blur", {"family": "iso", "size": size, "sigma_x": sigma, "sigma_y": sigma, "theta": 0.0})

    def _first_reduction(self, draws: Draws, frame: Frame, factor: int) -> list[Op]:
        if draws.chance(self.resize_prob):
            reduced = draws.uniform(self.factors)
            start = frame.height // (frame.scale // factor), frame.width // (frame.scale // factor)
            size = max(1, int(reduced * start[0])), max(1, int(reduced * start[1]))
            return [Op("resize", {"mode": draws.pick(_MODES), "size": size}), Op("clip")]
        sigma, width = draws.uniform((0.1, 0.25 * factor)), draws.odd(self.sizes)
        kernel = {"family": "shifted", "size": width, "sigma": sigma, "shift": (factor - 1) / 2}
        return [Op("blur", kernel), Op("every", {"step": factor}), Op("clip")]

    def _noise(self, draws: Draws) -> Op:
        level = draws.integer(*self.noise) / 255
        kind = draws.pick(("colour", "gray", "correlated"), (0.4, 0.4, 0.2))
        if kind == "correlated":
            return Op("correlated", {"level": self.noise[1] / 255, "seed": draws.integer(0, 2**31 - 1)})
        return Op("gaussian", {"sigma": level, "gray": kind == "gray"})

    def _jpeg(self, draws: Draws) -> Op:
        return Op("jpeg_codec", {"quality": draws.integer(*self.quality)})
