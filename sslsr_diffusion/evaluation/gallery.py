"""The worst and best images of every metric as zoomed windows side by side, with their edge masks."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sslsr_diffusion.evaluation.metrics import METRICS
from sslsr_diffusion.evaluation.pairing import Scene
from sslsr_diffusion.evaluation.scoring import Scores, load_rgb
from sslsr_diffusion.images import printable, resize_bicubic, to_array
from sslsr_diffusion.ops import laplacian_edge_mask

WINDOW = 128  # pixels of the reference
THUMBNAIL = 240


@dataclass(frozen=True)
class Zoom:
    title: str
    crop: str  # data URI
    mask: str  # data URI


@dataclass(frozen=True)
class Card:
    name: str
    anchor: str
    tags: tuple[str, ...]  # "worst PSNR (dB): bicubic 21.30, ours 22.10"
    thumbnail: str  # data URI of the whole image
    box: tuple[float, float, float, float]  # left, top, width, height of the window, in percent
    window: int
    size: tuple[int, int]
    zooms: tuple[Zoom, ...]


@dataclass(frozen=True)
class Pick:
    """One line of a metric's section: which image, with the number of every column."""

    kind: str  # "worst" or "best"
    name: str
    anchor: str
    values: dict[str, float]


def pick(scores: Scores, examples: int) -> dict[str, list[Pick]]:
    """Metric -> its worst and best images by the mean over the columns; at most `examples` of each, none twice."""
    picks: dict[str, list[Pick]] = {}
    for name, by in scores.values.items():
        per_column = {column: values.mean(axis=1) for column, values in by.items()}
        mean = np.mean(list(per_column.values()), axis=0)
        order = [int(i) for i in np.argsort(mean if METRICS[name].higher_is_better else -mean, kind="stable") if not np.isnan(mean[i])]
        count = min(examples, (len(order) + 1) // 2)
        best = order[max(count, len(order) - count) :]
        chosen = [("worst", i) for i in order[:count]] + [("best", i) for i in reversed(best)]
        picks[name] = [
            Pick(kind, printable(scores.scenes[i].name), f"image-{i}", {c: float(v[i]) for c, v in per_column.items()})
            for kind, i in chosen
        ]
    return picks


def cards(scores: Scores, picks: dict[str, list[Pick]]) -> list[Card]:
    """One card per picked image, in the order of the folder, however many metrics picked it."""
    tags: dict[str, list[str]] = {}
    for metric, chosen in picks.items():
        for p in chosen:
            numbers = ", ".join(f"{column} {value:.{METRICS[metric].digits}f}" for column, value in p.values.items())
            tags.setdefault(p.anchor, []).append(f"{p.kind} {METRICS[metric].label}: {numbers}")
    return [_card(scene, f"image-{i}", tags[f"image-{i}"]) for i, scene in enumerate(scores.scenes) if f"image-{i}" in tags]


def _card(scene: Scene, anchor: str, tags: Sequence[str]) -> Card:
    pictures = pictures_of(scene)
    restored, reference = [pictures[column] for column in scene.restored], pictures.get("reference")
    height, width = restored[0].shape[-2:]
    side = min(WINDOW, height, width)
    top, left = _place(restored, reference, side)
    window = (..., slice(top, top + side), slice(left, left + side))
    zooms = [
        Zoom(title, _uri(to_array(picture[window][0])), _uri(laplacian_edge_mask(picture)[window][0, 0].numpy()))
        for title, picture in pictures.items()
    ]
    whole = restored[-1] if reference is None else reference
    scale = min(1.0, THUMBNAIL / max(height, width))
    small = resize_bicubic(whole, (max(1, round(height * scale)), max(1, round(width * scale)))).clamp(0, 1)
    box = (100 * left / width, 100 * top / height, 100 * side / width, 100 * side / height)
    return Card(printable(scene.name), anchor, tuple(tags), _uri(to_array(small[0]), "JPEG"), box, side, (width, height), tuple(zooms))


def pictures_of(scene: Scene) -> dict[str, Tensor]:
    """Title -> [1, 3, H, W]: the bicubic input where there is one, every column's first seed, the reference where there is one."""
    restored = {column: load_rgb(paths[0]) for column, paths in scene.restored.items()}
    height, width = next(iter(restored.values())).shape[-2:]
    enlarged = {"LR bicubic": resize_bicubic(load_rgb(scene.lr), (height, width)).clamp(0, 1)} if scene.lr else {}
    return enlarged | restored | ({"reference": load_rgb(scene.reference)} if scene.reference else {})


def _place(restored: Sequence[Tensor], reference: Tensor | None, side: int) -> tuple[int, int]:
    """Where to look: the window with the largest squared error (without a reference: with the most edge pixels); top, left."""
    if reference is not None:
        weights = [(r - reference).square().mean(dim=1, keepdim=True) for r in restored]
    else:
        weights = [laplacian_edge_mask(r).float() for r in restored]
    stride = max(1, side // 16)
    sums = functional.avg_pool2d(torch.stack(weights).mean(dim=0), side, stride)[0, 0]
    best = int(sums.argmax())
    return best // sums.shape[1] * stride, best % sums.shape[1] * stride


def _uri(pixels: NDArray[np.generic], kind: str = "WEBP") -> str:
    """A data URI: lossless WebP for windows, one bit per pixel for masks, JPEG for the small overview."""
    from PIL import Image

    out = io.BytesIO()
    kind = "PNG" if pixels.dtype == bool else kind
    options: dict[str, dict[str, int]] = {"PNG": {"optimize": True}, "JPEG": {"quality": 85}, "WEBP": {"lossless": True}}
    Image.fromarray(pixels).save(out, kind, **options[kind])
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
