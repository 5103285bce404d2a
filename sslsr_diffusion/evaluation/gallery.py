"""The worst and best images of every metric as zoomed windows side by side, with their edge masks."""

import base64
import io
from collections.abc import Mapping, Sequence
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
    link: str | None = None  # address of a page about this picture of this column


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
            Pick(kind, printable(scores.scenes[i].name), anchor(i), {c: float(v[i]) for c, v in per_column.items()}) for kind, i in chosen
        ]
    return picks


def anchor(index: int) -> str:
    """How the report calls the image of `scores.scenes[index]`."""
    return f"image-{index}"


def cards(scores: Scores, picks: dict[str, list[Pick]], links: Mapping[tuple[str, str], str] | None = None) -> list[Card]:
    """One card per picked image, in the order of the folder, however many metrics picked it; links: (anchor, column) -> address."""
    tags: dict[str, list[str]] = {}
    for metric, chosen in picks.items():
        for p in chosen:
            numbers = ", ".join(f"{column} {value:.{METRICS[metric].digits}f}" for column, value in p.values.items())
            tags.setdefault(p.anchor, []).append(f"{p.kind} {METRICS[metric].label}: {numbers}")
    return [_card(scene, anchor(i), tags[anchor(i)], links or {}) for i, scene in enumerate(scores.scenes) if anchor(i) in tags]


def _card(scene: Scene, called: str, tags: Sequence[str], links: Mapping[tuple[str, str], str]) -> Card:
    pictures = pictures_of(scene)
    restored, reference = [pictures[column] for column in scene.restored], pictures.get("reference")
    height, width = restored[0].shape[-2:]
    side = min(WINDOW, height, width)
    top, left = worst_window(restored, reference, (side, side))
    window = (..., slice(top, top + side), slice(left, left + side))
    zooms = [
        Zoom(
            title,
            data_uri(to_array(picture[window][0])),
            data_uri(laplacian_edge_mask(picture)[window][0, 0].numpy()),
            links.get((called, title)),
        )
        for title, picture in pictures.items()
    ]
    whole = restored[-1] if reference is None else reference
    scale = min(1.0, THUMBNAIL / max(height, width))
    small = resize_bicubic(whole, (max(1, round(height * scale)), max(1, round(width * scale)))).clamp(0, 1)
    box = (100 * left / width, 100 * top / height, 100 * side / width, 100 * side / height)
    return Card(printable(scene.name), called, tuple(tags), data_uri(to_array(small[0]), "JPEG"), box, side, (width, height), tuple(zooms))


def pictures_of(scene: Scene) -> dict[str, Tensor]:
    """Title -> [1, 3, H, W]: the bicubic input where there is one, every column's first seed, the reference where there is one."""
    restored = {column: load_rgb(paths[0]) for column, paths in scene.restored.items()}
    height, width = next(iter(restored.values())).shape[-2:]
    enlarged = {"LR bicubic": resize_bicubic(load_rgb(scene.lr), (height, width)).clamp(0, 1)} if scene.lr else {}
    return enlarged | restored | ({"reference": load_rgb(scene.reference)} if scene.reference else {})


def worst_window(restored: Sequence[Tensor], reference: Tensor | None, sides: tuple[int, int]) -> tuple[int, int]:
    """Where to look: the window (height, width) with the largest squared error (without a reference: the most edges); top, left."""
    if reference is not None:
        weights = [(r - reference).square().mean(dim=1, keepdim=True) for r in restored]
    else:
        weights = [laplacian_edge_mask(r).float() for r in restored]
    stride = max(1, min(sides) // 16)
    sums = functional.avg_pool2d(torch.stack(weights).mean(dim=0), sides, stride)[0, 0]
    best = int(sums.argmax())
    return best // sums.shape[1] * stride, best % sums.shape[1] * stride


def data_uri(pixels: NDArray[np.generic], kind: str = "WEBP") -> str:
    """A data URI: lossless WebP for windows, one bit per pixel for masks, JPEG for the small overview."""
    from PIL import Image

    out = io.BytesIO()
    kind = "PNG" if pixels.dtype == bool else kind
    options: dict[str, dict[str, int]] = {"PNG": {"optimize": True}, "JPEG": {"quality": 85}, "WEBP": {"lossless": True}}
    Image.fromarray(pixels).save(out, kind, **options[kind])
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
