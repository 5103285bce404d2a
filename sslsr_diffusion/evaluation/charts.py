"""One small inline SVG per metric: every image a dot, the quartiles a box, the mean with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from sslsr_diffusion.evaluation.statistics import Mean

Array = NDArray[np.float64]
WIDTH, ROW, LEFT, RIGHT, TOP = 400, 46, 8, 8, 6
MOST_DOTS = 300  # per column; beyond that only the lowest and highest are drawn


def distribution(values: Mapping[str, Array], names: Sequence[str], means: Mapping[str, Mean], digits: int) -> str:
    """SVG text: one row per column; `values[column]` is [images] and may hold nan and inf (left out), `means` as in the summary."""
    finite = {column: v[np.isfinite(v)] for column, v in values.items()}
    everything = np.concatenate(list(finite.values()))
    if not len(everything):
        return ""
    ticks = _ticks(float(everything.min()), float(everything.max()))
    low, high = ticks[0], ticks[-1]

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    height = TOP + ROW * len(values) + 20
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="distribution over the images">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{height - 18}"/>')
        anchor = "start" if tick == low else "end" if tick == high else "middle"
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{height - 5}" text-anchor="{anchor}">{_short(tick)}</text>')
    for index, (column, column_values) in enumerate(values.items()):
        parts += _row(index, column, column_values, names, means[column], x, digits)
    return "".join([*parts, "</svg>"])


def _row(index: int, column: str, values: Array, names: Sequence[str], mean: Mean, x: Callable[[float], float], digits: int) -> list[str]:
    top = TOP + ROW * index
    middle = top + 29
    parts = [f'<g class="c{index % 6}"><text class="name" x="{LEFT}" y="{top + 12}">{escape(column)}</text>']
    finite = values[np.isfinite(values)]
    if len(finite):
        first, median, third = np.percentile(finite, [25, 50, 75])
        parts.append(f'<rect class="box" x="{x(first):.1f}" y="{middle - 10}" width="{max(x(third) - x(first), 0.5):.1f}" height="20"/>')
        parts.append(f'<line class="median" x1="{x(median):.1f}" x2="{x(median):.1f}" y1="{middle - 10}" y2="{middle + 10}"/>')
    for i in _shown(values):
        offset = ((i * 0.618034) % 1 - 0.5) * 14  # spread the dots evenly, the same way every time
        title = f"{escape(names[i])}: {values[i]:.{digits}f}"
        parts.append(f'<circle cx="{x(values[i]):.1f}" cy="{middle + offset:.1f}" r="2.2"><title>{title}</title></circle>')
    if math.isfinite(mean.mean):
        if math.isfinite(mean.low):
            parts.append(f'<line class="ci" x1="{x(mean.low):.1f}" x2="{x(mean.high):.1f}" y1="{middle}" y2="{middle}"/>')
        at = x(mean.mean)
        parts.append(f'<path class="mean" d="M{at - 5:.1f} {middle}L{at:.1f} {middle - 5}L{at + 5:.1f} {middle}L{at:.1f} {middle + 5}Z"/>')
    return [*parts, "</g>"]


def _shown(values: Array) -> list[int]:
    finite = [int(i) for i in np.flatnonzero(np.isfinite(values))]
    if len(finite) <= MOST_DOTS:
        return finite
    ranked = sorted(finite, key=lambda i: float(values[i]))
    return ranked[: MOST_DOTS // 2] + ranked[-MOST_DOTS // 2 :]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose the data."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(s for s in (step, 2 * step, 2.5 * step, 5 * step, 10 * step) if (high - low) / s <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def _short(value: float) -> str:
    return f"{value:.6g}"
