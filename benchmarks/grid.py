"""What the grid meter says of photographs, of their JPEGs, and of both with a raster laid over them: its false alarms and what it finds.

The photographs are those of examples/photos. A raster is a random tile of p x p pixels of standard deviation sigma (in 8-bit steps),
repeated over the picture, which is then rounded to 8 bits. "x4" is minus the bicubic enlargement of the photograph shrunk to a quarter and
saved as JPEG, as `sslsr evaluate` does with --lr. Means of eight are of random sets, as a validation pass measures.

    python benchmarks/grid.py > benchmarks/results/grid.md
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslsr_diffusion.evaluation.grid import grid
from sslsr_diffusion.images import resize_bicubic, to_array, to_tensor

PHOTOS = sorted((Path(__file__).parents[1] / "examples" / "photos").rglob("*.jpg"))
LIMITS, SETS = (3, 4, 6), 500


def jpeg(picture: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(to_array(picture)).save(file, "JPEG", quality=quality)
    return to_tensor(np.asarray(Image.open(file)))


def rastered(picture: Tensor, period: int, sigma: float) -> Tensor:
    tile = torch.randn(1, period, period, generator=torch.Generator().manual_seed(int(picture.sum())))
    tile = (tile - tile.mean()) / tile.std() * sigma / 255
    height, width = picture.shape[-2:]
    tiles = tile.repeat(1, -(-height // period), -(-width // period))[:, :height, :width]
    return ((picture + tiles).clamp(0, 1) * 255).round() / 255


def lr_of(picture: Tensor, quality: int | None) -> Tensor:
    small = resize_bicubic(picture[None], (picture.shape[-2] // 4, picture.shape[-1] // 4))[0].clamp(0, 1)
    return small if quality is None else jpeg(small, quality)


def whole() -> list[Tensor]:
    photos = [to_tensor(np.asarray(Image.open(path).convert("RGB"))) for path in PHOTOS]
    return [photo[..., : photo.shape[-2] // 4 * 4, : photo.shape[-1] // 4 * 4] for photo in photos]


def crops(side: int) -> list[Tensor]:
    places = [(0, 0), (0.5, 0.5), (1, 1)]
    return [p[..., t : t + side, x : x + side] for p in whole() for t, x in [[int(f * (n - side)) for f, n in zip(at, p.shape[-2:])] for at in places]]  # fmt: skip  # noqa: E501


def row(name: str, found: list[float]) -> None:
    values = np.array(found)
    shares = " | ".join(f"{100 * float((values > limit).mean()):.0f} %" for limit in LIMITS)
    print(f"| {name} | {len(values)} | {np.median(values):.1f} | {values.max():.1f} | {shares} |", flush=True)


def measured(pictures: list[Tensor], change: Callable[[Tensor], Tensor] = lambda x: x, quality: int | bool | None = False) -> list[float]:
    """`quality`: of the low-resolution JPEG that is compared with; None: not compressed, False: not compared."""
    lr = (lambda x: None) if quality is False else (lambda x: lr_of(x, quality)[None])
    return [grid(change(x)[None], lr(x)).item() for x in pictures]


def main() -> None:
    photos = whole()
    print("| what | pictures | median dB | highest | " + " | ".join(f"above {limit}" for limit in LIMITS) + " |")
    print("|---" * (4 + len(LIMITS)) + "|")
    row("photographs", measured(photos))
    for quality in (95, 90, 75, 50, 30):
        row(f"their JPEGs, quality {quality}", measured(photos, lambda x, q=quality: jpeg(x, q)))  # type: ignore[misc]
    for quality in (None, 75, 50, 30):
        said = "not compressed" if quality is None else f"JPEG, quality {quality}"
        row(f"photographs, x4 ({said})", measured(photos, quality=quality))
    for period in (8, 16):
        for sigma in (0.5, 1, 2):
            change = lambda x, p=period, s=sigma: rastered(x, p, s)  # noqa: E731
            row(f"raster {period}, sigma {sigma:g}", measured(photos, change))
            row(f"raster {period}, sigma {sigma:g}, x4 (JPEG, quality 75)", measured(photos, change, 75))
    for side in (128, 256):
        small = crops(side)
        for said, change in (("", lambda x: x), (", raster 16, sigma 1", lambda x: rastered(x, 16, 1))):
            found = measured(small, change, None)
            row(f"crops of {side}, x4{said}", found)
            draws = np.random.default_rng(0).choice(found, (SETS, 8))
            row(f"means of eight of them{said}", draws.mean(axis=1).tolist())


if __name__ == "__main__":
    main()
