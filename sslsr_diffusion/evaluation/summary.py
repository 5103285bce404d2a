"""From scores to what is written: the summary, the tables for terminal and model card, and the per-image CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sslsr_diffusion import __version__
from sslsr_diffusion.evaluation.metrics import METRICS
from sslsr_diffusion.evaluation.scoring import Scores
from sslsr_diffusion.evaluation.statistics import LEAST, difference, mean_with_interval


def summarize(
    scores: Scores, *, options: Mapping[str, Any], unavailable: Mapping[str, str], problems: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything the reports show, as plain data: means, intervals, best columns, differences from the first column, spread over seeds."""
    metrics = {name: _metric(scores, name) for name in METRICS if name in scores.values or name in scores.whole_set}
    return {
        "version": __version__,
        "options": dict(options),
        "images": len(scores.scenes),
        "columns": list(scores.columns),
        "metrics": metrics,
        "differences": {column: _differences(scores, column) for column in scores.columns[1:]},
        "spread": {column: _spread(scores, column) for column in scores.pixel_std},
        "unavailable": dict(unavailable),
        "problems": [*problems, *scores.problems],
    }


def _metric(scores: Scores, name: str) -> dict[str, Any]:
    metric = METRICS[name]
    columns: dict[str, dict[str, Any]] = {}
    for column in scores.columns:
        if metric.whole_set:
            columns[column] = {"mean": float(scores.whole_set[name][column].mean()), "count": len(scores.scenes)}
        else:
            columns[column] = asdict(mean_with_interval(scores.values[name][column].mean(axis=1)))
    means = {column: found["mean"] for column, found in columns.items() if not math.isnan(found["mean"])}
    extreme = (max if metric.higher_is_better else min)(means.values(), default=None)
    return {
        "label": metric.label,
        "higher_is_better": metric.higher_is_better,
        "digits": metric.digits,
        "convention": scores.conventions[name],
        "seconds_per_image": scores.seconds.get(name),
        "columns": columns,
        "best": [column for column, mean in means.items() if mean == extreme] if len(columns) > 1 else [],
    }


def _differences(scores: Scores, column: str) -> dict[str, Any]:
    """`column` minus the first one, image by image."""
    first = scores.columns[0]
    return {
        name: asdict(difference(by[first].mean(axis=1), by[column].mean(axis=1), higher_is_better=METRICS[name].higher_is_better))
        for name, by in scores.values.items()
    }


def _spread(scores: Scores, column: str) -> dict[str, Any]:
    """How much a stochastic model's results vary with its seed; standard deviations with n - 1, averaged over the images."""
    per_image = {name: by[column] for name, by in scores.values.items()}
    return {
        "seeds": next(iter(per_image.values())).shape[1] if per_image else len(scores.scenes[0].restored[column]),
        "pixel_std": float(scores.pixel_std[column].mean()),
        "metrics": {name: mean_with_interval(_deviation(values)).mean for name, values in per_image.items()}
        | {name: float(by[column].std(ddof=1)) for name, by in scores.whole_set.items()},
    }


def _deviation(values: Any) -> Any:
    with np.errstate(invalid="ignore"):
        return values.std(axis=1, ddof=1)


def to_json(summary: Mapping[str, Any]) -> str:
    """Strict JSON: nan becomes null, infinity the text "inf"."""
    return json.dumps(_strict(summary), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _strict(value: Any) -> Any:
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


def arrow(metric: Mapping[str, Any]) -> str:
    return "↑" if metric["higher_is_better"] else "↓"


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def interval(found: Mapping[str, Any], digits: int, *, sign: bool = False) -> str:
    """`[low, high]`, empty where there is none."""
    if found.get("low") is None or math.isnan(found["low"]):
        return ""
    return f"[{number(found['low'], digits, sign=sign)}, {number(found['high'], digits, sign=sign)}]"


def text_table(summary: Mapping[str, Any]) -> str:
    """Means with 95 % intervals for the terminal; * marks the best column."""
    rows = [["", *summary["columns"]]]
    for metric in summary["metrics"].values():
        cells = [f"{metric['label']} {arrow(metric)}"]
        for column, found in metric["columns"].items():
            mark = "*" if column in metric["best"] else " "
            few = f" ({found['count']} images)" if found["count"] != summary["images"] else ""
            cells.append(f"{number(found['mean'], metric['digits'])}{mark} {interval(found, metric['digits'])}".rstrip() + few)
        rows.append(cells)
    blocks = [_aligned(rows)]
    for column, found in summary["differences"].items():
        rows = [[f"{column} - {summary['columns'][0]}", "mean [95 % interval]" if summary["images"] >= LEAST else "mean", "better on"]]
        for name, change in found.items():
            metric = summary["metrics"][name]
            text = f"{number(change['mean'], metric['digits'], sign=True)} {interval(change, metric['digits'], sign=True)}".rstrip()
            rows.append([f"{metric['label']} {arrow(metric)}", text, f"{change['better']} of {change['count']}"])
        blocks.append(_aligned(rows))
    for column, found in summary["spread"].items():
        rows = [[f"{column}, {found['seeds']} seeds", "standard deviation"], ["per pixel (0..255)", number(found["pixel_std"], 3)]]
        rows += [[summary["metrics"][n]["label"], number(x, summary["metrics"][n]["digits"])] for n, x in found["metrics"].items()]
        blocks.append(_aligned(rows))
    return "\n\n".join(blocks)


def markdown_table(summary: Mapping[str, Any]) -> str:
    """Models as rows, metrics as columns, best in bold: for a model card."""
    metrics = list(summary["metrics"].values())
    lines = ["| model | " + " | ".join(f"{m['label']} {arrow(m)}" for m in metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for column in summary["columns"]:
        cells = []
        for metric in metrics:
            text = number(metric["columns"][column]["mean"], metric["digits"])
            cells.append(f"**{text}**" if column in metric["best"] else text)
        lines.append(f"| {column.replace('|', '/')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(len(line) for line in lines), *lines[1:]])
