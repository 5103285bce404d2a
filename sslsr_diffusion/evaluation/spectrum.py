"""The spectrum behind the grid meter, drawn for the picture that has the most of it: one small inline SVG."""

from collections.abc import Mapping
from html import escape
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sslsr_diffusion.evaluation.gallery import pictures_of
from sslsr_diffusion.evaluation.grid import PERIOD, line_heights
from sslsr_diffusion.evaluation.scoring import Scores
from sslsr_diffusion.images import printable

WIDTH, ROW, TOP, SIDE = 640, 64, 6, 8
LOW, HIGH = -3.0, 12.0  # dB that a row shows; what is beyond is cut


class Spectrum(NamedTuple):
    name: str  # of the picture
    chart: str  # SVG


def spectrum(scores: Scores) -> Spectrum | None:
    """Of the picture with the highest grid number in any column; None where none has a number."""
    if "grid" not in scores.values:
        return None
    highest = np.max([values.max(axis=1) for values in scores.values["grid"].values()], axis=0)  # [images]
    if np.isnan(highest).all():
        return None
    scene = scores.scenes[int(np.nanargmax(highest))]
    return Spectrum(printable(scene.name), spectrum_chart(pictures_of(scene), scores.columns))


def spectrum_chart(pictures: Mapping[str, Tensor], columns: tuple[str, ...]) -> str:
    """SVG text: one row per picture [1, 3, H, W], a curve per axis over 0 to 1/2 cycles per pixel; lines at k/16 are marked.

    `columns`: those among the pictures that have a colour of their own, as in the other charts.
    """
    height = TOP + ROW * len(pictures) + 20
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="height over the neighbouring frequencies">']
    for k in range(PERIOD // 2 + 1):
        x = SIDE + (WIDTH - 2 * SIDE) * 2 * k / PERIOD
        anchor = "start" if k == 0 else "end" if 2 * k == PERIOD else "middle"
        label = f"{k}/{PERIOD}" if k else "0"
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - 18}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 5}" text-anchor="{anchor}">{label}</text>')
    for row, (title, picture) in enumerate(pictures.items()):
        top = TOP + ROW * row
        colour = columns.index(title) % 6 if title in columns else 5
        parts.append(f'<g class="c{colour}"><text class="name" x="{SIDE}" y="{top + 12}">{escape(title)}</text>')
        parts += [f'<polyline class="spectrum" points="{_points(picture, axis, top)}"/>' for axis in (-1, -2)]
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _points(picture: Tensor, axis: int, top: float) -> str:
    heights = line_heights(picture[0], axis).numpy()
    x = SIDE + (WIDTH - 2 * SIDE) * np.linspace(0, 1, len(heights))
    y = top + ROW - (ROW - 16) * (heights.clip(LOW, HIGH) - LOW) / (HIGH - LOW)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
