"""What was done to a low-resolution picture: JPEG quality, noise and blur, estimated from the picture alone."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sslsr_diffusion.data.jpeg import LUMA, dct_matrix
from sslsr_diffusion.data.noise_level import noise_level
from sslsr_diffusion.data.opencv import opencv
from sslsr_diffusion.images import Pixels, printable, read_image

Array = NDArray[np.float64]
# Luma is a weighted mean of three channels: independent colour noise of sigma leaves sigma * |(0.299, 0.587, 0.114)| in it
LUMA_SHARE = float(np.linalg.norm([0.299, 0.587, 0.114]))
_LEAST_COMB = 0.35  # mean cosine of coefficients on the multiples of a table: 0 by chance, near 1 for a compressed picture
_MOST_BLOCKS = 4000  # spread over the picture; more tell nothing new
_MOST_FOUND = 95  # above that the steps are as fine as 8-bit rounding


@dataclass(frozen=True)
class Estimate:
    """All of one picture."""

    name: str
    noise: float  # standard deviation per channel in grey levels, of noise that is drawn for each channel
    noise_measured: bool  # if not, `noise` is the most that may be there unseen
    quality: int | None  # of the last JPEG compression; None: no trace of one
    from_tables: bool  # the file itself says the quality
    blur: float  # standard deviation in pixels of the sharpest edges


def estimate(path: Path) -> Estimate:
    """Estimate one file.

    Raises:
        UnreadableImage: it is no picture.
    """
    data = path.read_bytes()
    image = read_image(data, name=printable(path))
    luma, table = _jpeg(data) or (_luma(image.rgb), None)
    coefficients = block_dct(luma)
    quality = table_quality(table) if table is not None else blocking_quality(coefficients)
    steps = table if table is not None else None if quality is None else scaled_table(quality)
    level = noise_level(luma, coefficients, steps)
    blur = edge_blur(luma, level.sigma if level.measured else 0.0)
    return Estimate(printable(path), level.sigma / LUMA_SHARE, level.measured, quality, table is not None, blur)


def scaled_table(quality: float) -> Array:
    """The luma table of the IJG encoder at a quality of 1 to 100."""
    factor = 5000 / quality if quality < 50 else 200 - 2 * quality
    return np.clip(np.floor((np.array(LUMA) * factor + 50) / 100), 1, 255)


def table_quality(table: Array) -> int:
    """The quality whose luma table is nearest (relative to the table itself)."""
    return min(range(1, 101), key=lambda q: float(np.abs(np.log(scaled_table(q) / table)).mean()))


def blocking_quality(coefficients: Array) -> int | None:
    """The quality on whose table's multiples the 8x8 DCT coefficients lie; None where they lie on none.

    A comb of step s leaves mean cos(2 pi c / s) near 1; multiples of s fit s / 2 as well, so of fits that are alike the coarsest counts.
    """
    values = coefficients[:: 1 + len(coefficients) // _MOST_BLOCKS].reshape(-1, 64)[:, 1:]
    scores = np.array([_comb(values, scaled_table(q).ravel()[1:]) for q in range(20, _MOST_FOUND + 1)])
    best = float(scores.max())
    if best < _LEAST_COMB:
        return None
    return 20 + int(np.flatnonzero(scores >= best - 0.05 * best)[0])


def _comb(values: Array, steps: Array) -> float:
    beyond = np.abs(values) > 0.5 * steps  # inside the first half step everything would fit
    fine = (steps >= 3) & (beyond.sum(axis=0) >= 8)
    if not fine.any():
        return 0.0
    cosines = np.where(beyond, np.cos(2 * np.pi * values / steps), 0.0)
    # quantised coefficients that are not 0 are at least one step: a picture that was not compressed has many between 0.5 and 1
    return float((cosines[:, fine].sum()) / beyond[:, fine].sum())


def edge_blur(luma: Array, noise: float) -> float:
    """Width of the sharpest edges as the standard deviation of a Gaussian, in pixels.

    At a step edge blurred by sigma, blurring once more by sigma_0 lowers the gradient by R = sqrt(1 + sigma_0^2 / sigma^2)
    (Zhuo and Sim, 2011); sigma is read off at strong edges.
    """
    if min(luma.shape) < 2:
        return 0.0
    cv2 = opencv()
    start = cv2.GaussianBlur(luma, (0, 0), 1.0) if noise > 2 else luma
    once, twice = (_gradient(image) for image in (start, cv2.GaussianBlur(start, (0, 0), 1.5)))
    strong = once > max(np.quantile(once, 0.97), noise, 3.0)
    if strong.sum() < 20:
        return 0.0
    # off an edge's middle the ratio is lower, and noise spreads it: look high where it is clean, in the middle where it is not
    ratio = np.quantile(once[strong] / np.maximum(twice[strong], 1e-6), 0.5 if noise > 2 else 0.9)
    sigma = 1.5 / np.sqrt(max(ratio**2 - 1, 1e-3))
    smoothed = 1 / 3 + (1.0 if noise > 2 else 0.0)  # variance that the central difference and the first blur have added
    return float(np.sqrt(max(sigma**2 - smoothed, 0.04)))


def block_dct(luma: Array) -> Array:
    """Orthonormal DCT-II of the whole 8x8 blocks that start at the top-left corner: [n, 8, 8]."""
    height, width = (n // 8 * 8 for n in luma.shape)
    blocks = luma[:height, :width].reshape(height // 8, 8, width // 8, 8).swapaxes(1, 2).reshape(-1, 8, 8) - 128
    dct = dct_matrix()
    return dct @ blocks @ dct.T


def _gradient(image: Array) -> Array:
    dy, dx = np.gradient(image)
    return np.hypot(dy, dx)


def _luma(rgb: Pixels) -> Array:
    levels = rgb.astype(np.float64) / (257 if rgb.dtype == np.uint16 else 1)
    return levels @ np.array([0.299, 0.587, 0.114])


def _jpeg(data: bytes) -> tuple[Array, Array] | None:
    """Luma as the file has it (blocks as they were coded: not turned upright, never RGB) and its table in natural order."""
    if data[:2] != b"\xff\xd8":
        return None
    from PIL import Image

    with Image.open(io.BytesIO(data)) as file:
        tables = getattr(file, "quantization", None) or {}
        file.draft("L", file.size)
        luma = np.asarray(file.convert("L"), dtype=np.float64)
    return (luma, np.array(tables[0], dtype=np.float64).reshape(8, 8)) if 0 in tables else None
