"""From scores to what is written: the summary, the tables for terminal and model card, and the per-image CSV."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from sslsr_diffusion import __version__
from sslsr_diffusion.evaluation.metrics import METRICS, Metric
from sslsr_diffusion.evaluation.scoring import Scores
from sslsr_diffusion.evaluation.statistics import LEAST, Difference, Mean, difference, mean_with_interval


@dataclass(frozen=True)
class MetricSummary:
    """One metric over all images of each column."""

    label: str
    higher_is_better: bool
    digits: int
    convention: str
    seconds_per_image: float | None
    columns: dict[str, Mean]
    best: list[str]  # columns; empty where there is only one


@dataclass(frozen=True)
class Spread:
    """How much a stochastic model's results vary with its seed; standard deviations with n - 1, averaged over the images."""

    seeds: int
    pixel_std: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """Everything the reports show."""

    version: str
    options: Mapping[str, object]
    images: int
    columns: tuple[str, ...]
    metrics: dict[str, MetricSummary]
    differences: dict[str, dict[str, Difference]]  # column -> metric -> that column minus the first one, image by image
    spread: dict[str, Spread]  # columns with several seeds
    unavailable: Mapping[str, str]  # metric -> reason
    problems: list[str]


def summarize(scores: Scores, *, options: Mapping[str, object], unavailable: Mapping[str, str], problems: Sequence[str] = ()) -> Summary:
    """Means, intervals, best columns, differences from the first column, spread over seeds."""
    return Summary(
        version=__version__,
        options=options,
        images=len(scores.scenes),
        columns=scores.columns,
        metrics={name: _metric(scores, name) for name in METRICS if name in scores.values or name in scores.whole_set},
        differences={column: _differences(scores, column) for column in scores.columns[1:]},
        spread={column: _spread(scores, column) for column in scores.pixel_std},
        unavailable=unavailable,
        problems=[*problems, *scores.problems],
    )


def _metric(scores: Scores, name: str) -> MetricSummary:
    metric = METRICS[name]
    if name in scores.whole_set:
        columns = {c: Mean(float(values.mean()), math.nan, math.nan, len(scores.scenes)) for c, values in scores.whole_set[name].items()}
    else:
        columns = {c: mean_with_interval(values.mean(axis=1)) for c, values in scores.values[name].items()}
    best = _best(metric, {column: found.mean for column, found in columns.items()})
    return MetricSummary(
        metric.label, metric.higher_is_better, metric.digits, scores.conventions[name], scores.seconds.get(name), columns, best
    )


def _best(metric: Metric, means: Mapping[str, float]) -> list[str]:
    extreme = (max if metric.higher_is_better else min)((mean for mean in means.values() if not math.isnan(mean)), default=None)
    return [column for column, mean in means.items() if mean == extreme] if len(means) > 1 else []


def _differences(scores: Scores, column: str) -> dict[str, Difference]:
    first = scores.columns[0]
    return {
        name: difference(by[first].mean(axis=1), by[column].mean(axis=1), higher_is_better=METRICS[name].higher_is_better)
        for name, by in scores.values.items()
    }


def _spread(scores: Scores, column: str) -> Spread:
    with np.errstate(invalid="ignore"):
        per_image = {name: mean_with_interval(by[column].std(axis=1, ddof=1)).mean for name, by in scores.values.items()}
    whole_set = {name: float(by[column].std(ddof=1)) for name, by in scores.whole_set.items()}
    return Spread(len(scores.scenes[0].restored[column]), float(scores.pixel_std[column].mean()), per_image | whole_set)


def to_json(summary: Summary) -> str:
    """Strict JSON: nan becomes null, infinity the text "inf"."""
    return json.dumps(_strict(asdict(summary)), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _strict(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def to_csv(scores: Scores) -> str:
    """One line per image, column and seed; an empty field where a metric has no number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(scores.values)
    writer.writerow(["image", "model", "seed", *names])
    for i, scene in enumerate(scores.scenes):
        for column in scores.columns:
            for seed in range(len(scene.restored[column])):
                numbers = [scores.values[name][column][i, seed] for name in names]
                name = scene.name.encode("utf-8", "backslashreplace").decode()
                writer.writerow([name, column, seed, *("" if math.isnan(x) else repr(float(x)) for x in numbers)])
    return out.getvalue()


def arrow(metric: MetricSummary | Metric) -> str:
    return "↑" if metric.higher_is_better else "↓"


def number(value: float, digits: int, *, sign: bool = False) -> str:
    return "-" if math.isnan(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def interval(found: Mean | Difference, digits: int, *, sign: bool = False) -> str:
    """`[low, high]`, empty where there is none."""
    return "" if math.isnan(found.low) else f"[{number(found.low, digits, sign=sign)}, {number(found.high, digits, sign=sign)}]"


def text_table(summary: Summary) -> str:
    """Means with 95 % intervals for the terminal; * marks the best column."""
    rows = [["", *summary.columns]]
    for metric in summary.metrics.values():
        cells = [f"{metric.label} {arrow(metric)}"]
        for column, found in metric.columns.items():
            mark = "*" if column in metric.best else " "
            few = f" ({found.count} images)" if found.count != summary.images else ""
            cells.append(f"{number(found.mean, metric.digits)}{mark} {interval(found, metric.digits)}".rstrip() + few)
        rows.append(cells)
    blocks = [_aligned(rows)]
    for column, changes in summary.differences.items():
        rows = [[f"{column} - {summary.columns[0]}", "mean [95 % interval]" if summary.images >= LEAST else "mean", "better on"]]
        for name, change in changes.items():
            metric = summary.metrics[name]
            text = f"{number(change.mean, metric.digits, sign=True)} {interval(change, metric.digits, sign=True)}".rstrip()
            rows.append([f"{metric.label} {arrow(metric)}", text, f"{change.better} of {change.count}"])
        blocks.append(_aligned(rows))
    for column, spread in summary.spread.items():
        rows = [[f"{column}, {spread.seeds} seeds", "standard deviation"], ["per pixel (0..255)", number(spread.pixel_std, 3)]]
        rows += [[METRICS[name].label, number(deviation, METRICS[name].digits)] for name, deviation in spread.metrics.items()]
        blocks.append(_aligned(rows))
    return "\n\n".join(blocks)


def markdown_table(models: Mapping[str, Mapping[str, float]]) -> str:
    """Models as rows, their metrics as columns, best in bold: for a model card. `models`: name -> metric -> mean."""
    metrics = {name: metric for name, metric in METRICS.items() if any(name in means for means in models.values())}
    lines = ["| model | " + " | ".join(f"{m.label} {arrow(m)}" for m in metrics.values()) + " |", "|---" * (len(metrics) + 1) + "|"]
    best = {name: _best(metric, {model: means.get(name, math.nan) for model, means in models.items()}) for name, metric in metrics.items()}
    for model, means in models.items():
        texts = {name: number(means.get(name, math.nan), metric.digits) for name, metric in metrics.items()}
        cells = [f"**{text}**" if model in best[name] else text for name, text in texts.items()]
        lines.append(f"| {model.replace('|', '/')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(len(line) for line in lines), *lines[1:]])
