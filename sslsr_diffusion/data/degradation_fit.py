"""A degradation that looks like the user's own low-resolution pictures: ranges from the estimates of `estimate.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sslsr_diffusion.config import parse
from sslsr_diffusion.data.degradation import DegradationSettings
from sslsr_diffusion.data.estimate import Estimate
from sslsr_diffusion.errors import UserError

_LEAST_BLUR = 0.4  # pixels: no picture is sharper than its pixel grid


def degradation_section(estimates: Sequence[Estimate], scale: int) -> dict[str, object]:
    """The `degradation` section of a recipe: blur, reduction, noise and JPEG in the ranges that were found (10th to 90th percentile).

    Blur is measured in low-resolution pixels and happens before the reduction, hence times the scale.

    Raises:
        UserError: there are no estimates.
    """
    if not estimates:
        raise UserError("fit: expected at least one readable low-resolution picture, got none.")
    steps: list[dict[str, object]] = []
    blurs = [e.blur for e in estimates if e.blur > 0]
    if blurs:
        low, high = _range([max(0.2, np.sqrt(max(b**2 - _LEAST_BLUR**2, 0.0))) * scale for b in blurs], 2)
        size = int(np.clip(2 * np.ceil(2.5 * high) + 1, 7, 51))
        steps.append({"kind": "blur", "sizes": [7, size], "sigma": [low, high], "sinc_prob": 0.05, "families": {"iso": 0.7, "aniso": 0.3}})
    steps.append({"kind": "resize", "to": "target", "modes": ["area", "bilinear", "bicubic"]})
    noise = _range([part * e.noise for e in estimates for part in _parts(e)], 1)
    if noise[1] >= 0.5:
        steps.append({"kind": "noise", "gaussian_prob": 1.0, "sigma": noise, "gray_prob": 0.0})
    qualities = [float(e.quality) for e in estimates if e.quality is not None]
    if qualities:
        steps.append({"kind": "jpeg", "prob": round(len(qualities) / len(estimates), 2), "quality": _range(qualities, 0)})
    section: dict[str, object] = {"preset": None, "steps": steps}  # the former against a preset of the recipe that this is laid over
    parse(DegradationSettings, section)
    return section


def _parts(one: Estimate) -> list[float]:
    """Unmeasured noise is anywhere below its bound, measured noise weighs as much in one place."""
    return [1.0] * 11 if one.noise_measured else np.linspace(0, 1, 11).tolist()


def _range(values: Sequence[float], digits: int) -> list[float]:
    low, high = np.quantile(values, [0.1, 0.9])
    return [round(float(low), digits), round(float(high), digits)]
