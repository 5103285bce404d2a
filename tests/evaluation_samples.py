"""Small smooth pictures in folders, as a model's results and their ground truths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def picture(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """[H, W, 3] uint8: a few waves and one hard edge, so that the edge mask is not empty."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 24
    waves = [np.sin(2 * np.pi * (x * a + y * b + c)) for a, b, c in rng.random((3, 3)) * [2, 2, 1]]
    image = 110 + 50 * np.stack(waves, axis=-1)
    image[height // 3 : height // 2, width // 4 : width // 2] += 70
    return image.clip(0, 255).round().astype(np.uint8)


def noisy(image: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    return (image + np.random.default_rng(seed).normal(0, sigma, image.shape)).clip(0, 255).round().astype(np.uint8)


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def folders(root: Path, count: int = 3, **sigmas: float) -> dict[str, Path]:
    """root/hr with `count` pictures, and per name a folder of the same pictures with noise of that sigma."""
    for i in range(count):
        image = picture(i)
        write(root / "hr" / f"scene{i}.png", image)
        write(root / "lr" / f"scene{i}.png", np.asarray(Image.fromarray(image).resize((12, 10), Image.Resampling.BICUBIC)))
        for name, sigma in sigmas.items():
            write(root / name / f"scene{i}.png", noisy(image, sigma, seed=i))
    return {name: root / name for name in ("hr", "lr", *sigmas)}


def as_tensor(image: np.ndarray) -> Tensor:
    from sslsr_diffusion.images import to_tensor

    return to_tensor(image)[None]
