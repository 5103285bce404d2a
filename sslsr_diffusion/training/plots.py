"""Pictures of a run: the grid LR · prediction · ground truth, and the curves of the loss terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sslsr_diffusion.images import to_array

_BAR = 18  # pixels of caption above each picture
_GAP = 4


def picture_grid(rows: Sequence[Sequence[Tensor]], captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Rows of equally large pictures with a caption above each.

    Args:
        rows: pictures [3, H, W] in about [0, 1] (clamped here).
        captions: one per picture.

    Returns:
        [H_all, W_all, 3] uint8.
    """
    from PIL import Image, ImageDraw

    cell_h = max(p.shape[-2] for row in rows for p in row) + _BAR + _GAP
    cell_w = max(p.shape[-1] for row in rows for p in row) + _GAP
    sheet = Image.new("RGB", (cell_w * max(len(r) for r in rows) + _GAP, cell_h * len(rows) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (row, names) in enumerate(zip(rows, captions)):
        for x, (picture, name) in enumerate(zip(row, names)):
            left, top = x * cell_w + _GAP, y * cell_h + _GAP
            draw.text((left, top + 2), name, fill="black")
            sheet.paste(Image.fromarray(to_array(picture.float().cpu())), (left, top + _BAR))
    return np.asarray(sheet)


def plot_losses(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel per raw loss term and validation metric over the optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith(("loss/", "validation/")) and isinstance(value, int | float):
                steps, values = series.setdefault(key, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    if not series:
        return
    figure, axes = plt.subplots(len(series), 1, figsize=(8, 2.2 * len(series)), sharex=True, squeeze=False)
    for axis, (key, (steps, values)) in zip(axes[:, 0], series.items()):
        axis.plot(steps, values, linewidth=1, marker="." if len(steps) < 60 else None)
        axis.set_ylabel(key.split("/", 1)[1], fontsize=8)
        axis.grid(alpha=0.3)
        if key.startswith("loss/") and min(values) > 0:
            axis.set_yscale("log")
    axes[-1, 0].set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
