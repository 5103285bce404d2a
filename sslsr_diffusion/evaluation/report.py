"""The self-contained HTML report: no scripts, no network, readable on a phone; and its charts, one small inline SVG per metric."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from sslsr_diffusion.evaluation.gallery import cards, pick
from sslsr_diffusion.evaluation.metrics import METRICS
from sslsr_diffusion.evaluation.scoring import Scores
from sslsr_diffusion.evaluation.spectrum import spectrum
from sslsr_diffusion.evaluation.statistics import LEAST, Mean
from sslsr_diffusion.evaluation.summary import Summary, arrow, interval, number
from sslsr_diffusion.images import printable

TEMPLATE = "report.html.j2"
WIDTH, ROW, LEFT, RIGHT, TOP = 400, 46, 8, 8, 6
MOST_DOTS = 300  # per column; beyond that only the lowest and highest are drawn


def render_report(
    summary: Summary,
    scores: Scores,
    *,
    title: str = "Evaluation",
    examples: int = 2,
    links: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """HTML with the summary table, a distribution plot per metric and the worst and best `examples` images of each.

    links: (`gallery.anchor` of an image, column) -> address of a page about that picture. Where `grid` was measured it shows a
    spectrum, too.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sslsr_diffusion.evaluation", "."),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"number": number, "interval": interval, "arrow": arrow}
    picks = pick(scores, examples)
    names = [printable(scene.name) for scene in scores.scenes]
    charts = {
        name: distribution({c: v.mean(axis=1) for c, v in by.items()}, names, summary.metrics[name].columns, METRICS[name].digits)
        for name, by in scores.values.items()
    }
    labels = {name: metric.label for name, metric in METRICS.items()}
    shown = {"charts": charts, "picks": picks, "cards": cards(scores, picks, links), "spectrum": spectrum(scores)}
    return environment.get_template(TEMPLATE).render(title=title, summary=summary, labels=labels, least=LEAST, **shown)


def distribution(values: Mapping[str, NDArray[np.float64]], names: Sequence[str], means: Mapping[str, Mean], digits: int) -> str:
    """SVG text: one row per column: every image a dot, the quartiles a box, the mean with its interval.

    `values[column]` is [images] and may hold nan and inf (left out), `means` as in the summary.
    """
    everything = np.concatenate([column[np.isfinite(column)] for column in values.values()])
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
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{height - 5}" text-anchor="{anchor}">{tick:.6g}</text>')
    for index, (column, row) in enumerate(values.items()):
        middle = TOP + ROW * index + 29
        parts.append(f'<g class="c{index % 6}"><text class="name" x="{LEFT}" y="{middle - 17}">{escape(column)}</text>')
        shown = [int(i) for i in np.flatnonzero(np.isfinite(row))]
        if shown:
            first, median, third = np.percentile(row[shown], [25, 50, 75])
            width = max(x(third) - x(first), 0.5)
            parts.append(f'<rect class="box" x="{x(first):.1f}" y="{middle - 10}" width="{width:.1f}" height="20"/>')
            parts.append(f'<line class="median" x1="{x(median):.1f}" x2="{x(median):.1f}" y1="{middle - 10}" y2="{middle + 10}"/>')
        if len(shown) > MOST_DOTS:
            ranked = sorted(shown, key=lambda i: float(row[i]))
            shown = ranked[: MOST_DOTS // 2] + ranked[-MOST_DOTS // 2 :]
        for i in shown:
            at = middle + ((i * 0.618034) % 1 - 0.5) * 14  # spread the dots evenly, the same way every time
            title = f"{escape(names[i])}: {row[i]:.{digits}f}"
            parts.append(f'<circle cx="{x(row[i]):.1f}" cy="{at:.1f}" r="2.2"><title>{title}</title></circle>')
        mean = means[column]
        if math.isfinite(mean.mean):
            if math.isfinite(mean.low):
                parts.append(f'<line class="ci" x1="{x(mean.low):.1f}" x2="{x(mean.high):.1f}" y1="{middle}" y2="{middle}"/>')
            at = x(mean.mean)
            diamond = f"M{at - 5:.1f} {middle}L{at:.1f} {middle - 5}L{at + 5:.1f} {middle}L{at:.1f} {middle + 5}Z"
            parts.append(f'<path class="mean" d="{diamond}"/>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose the data."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(s for s in (step, 2 * step, 2.5 * step, 5 * step, 10 * step) if (high - low) / s <= 4)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
