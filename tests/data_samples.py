"""Small photographs, and a small training loader over them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sslsr_diffusion.config import parse
from sslsr_diffusion.data import DataSettings, open_training_data
from sslsr_diffusion.types import Batch


def picture(size: tuple[int, int], seed: int) -> np.ndarray:
    """Smooth colours with a few hard edges; [H, W, 3] uint8."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC)).copy()
    pixels[size[0] // 3 : size[0] // 2, size[1] // 4 : size[1] // 2] //= 3
    return pixels


def write_photos(base: Path) -> Path:
    """Seven of them, three in a folder below."""
    (base / "below").mkdir()
    for i in range(7):
        Image.fromarray(picture((70 + 3 * i, 90 - 2 * i), i)).save(base / ("below" if i % 2 else ".") / f"p{i}.png")
    return base


def settings(*sources: dict, **more) -> DataSettings:
    return parse(DataSettings, {"sources": list(sources), "workers": 0, **more})


def from_folder(folder: Path, **more) -> DataSettings:
    return settings({"kind": "folder", "path": str(folder)}, **more)


def take(loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def open_small(data: DataSettings, **more):
    return open_training_data(data, **{"crop_size": 64, "scale": 4, "seed": 5, "batch_size": 2, **more})


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.hr, y.hr) and torch.equal(x.lr, y.lr) and torch.equal(x.mask, y.mask) and torch.equal(x.index, y.index)
        and x.names == y.names
        for x, y in zip(a, b)
    )  # fmt: skip
