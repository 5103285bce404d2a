"""What was done to low-resolution pictures: JPEG quality, noise and blur, estimated from each alone; and a degradation that looks like it.

Noise is read off the 8x8 DCT coefficients, quantised or not: maximum likelihood over the calm blocks.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import ndtr

from sslsr_diffusion.config import parse
from sslsr_diffusion.data.degradation import DegradationSettings
from sslsr_diffusion.data.filters import opencv
from sslsr_diffusion.data.jpeg import LUMA, dct_matrix
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import Pixels, printable, read_image

Array = NDArray[np.float64]
# Luma is a weighted mean of three channels: independent colour noise of sigma leaves sigma * |(0.299, 0.587, 0.114)| in it
LUMA_SHARE = float(np.linalg.norm([0.299, 0.587, 0.114]))
_LEAST_COMB = 0.35  # mean cosine of coefficients on the multiples of a table: 0 by chance, near 1 for a compressed picture
_MOST_COMBED = 4000  # spread over the picture; more tell nothing new
_MOST_FOUND = 95  # above that the steps are as fine as 8-bit rounding
_LEVELS = np.geomspace(0.35, 30.0, 26)  # grey levels of luma that are compared
_FIRST = np.array([0, 1, 2, 3, 4, 6, 9, 14, 22, 35])  # |quantised coefficient| at which each histogram bin starts
_ROUNDING = 0.447 / 12  # variance in luma of rounding three channels to 8 bits
_CALM, _MOST_CALM, _ROUNDS = 0.6, 1500, 25
# The model is no exact description of photographs, so differences of log likelihood count per block, not as such
_TOLD, _EXCLUDED = 0.05, 0.1
_LEAST_OF_STEP = 0.22  # noise below this share of the finest step leaves 98 % of its coefficients at 0, whatever the picture
_LEAST_BLUR = 0.4  # pixels: no picture is sharper than its pixel grid


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
    """Estimate one file. Raises UnreadableImage: it is no picture."""
    data = path.read_bytes()
    image = read_image(data, name=printable(path))
    luma, table = _jpeg(data) or (_luma(image.visible), None)
    coefficients = block_dct(luma)
    quality = table_quality(table) if table is not None else blocking_quality(coefficients)
    steps = table if table is not None else None if quality is None else scaled_table(quality)
    sigma, measured = noise_level(luma, coefficients, steps)
    blur = edge_blur(luma, sigma if measured else 0.0)
    return Estimate(printable(path), sigma / LUMA_SHARE, measured, quality, table is not None, blur)


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
    values = coefficients[:: 1 + len(coefficients) // _MOST_COMBED].reshape(-1, 64)[:, 1:]
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
    once, twice = (np.hypot(*np.gradient(image)) for image in (start, cv2.GaussianBlur(start, (0, 0), 1.5)))
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


def _luma(rgb: Pixels) -> Array:
    levels = rgb.astype(np.float64) / (257 if rgb.dtype == np.uint16 else 1)
    return levels @ np.array([0.299, 0.587, 0.114])


def _jpeg(data: bytes) -> tuple[Array, Array] | None:
    """Luma as the file has it (blocks as they were coded: not turned upright, never RGB) and its table in natural order."""
    if data[:2] != b"\xff\xd8":
        return None
    with Image.open(io.BytesIO(data)) as file:
        tables = getattr(file, "quantization", None) or {}
        file.draft("L", file.size)
        luma = np.asarray(file.convert("L"), dtype=np.float64)
    return (luma, np.array(tables[0], dtype=np.float64).reshape(8, 8)) if 0 in tables else None


def noise_level(luma: Array, coefficients: Array, steps: Array | None = None) -> tuple[float, bool]:
    """The noise whose quantised coefficients look most like those of the picture.

    Coefficient f of a block of class k is N(0, sigma^2 + a_k^2 |f|^(-2 p_k)) before quantisation: white noise, and content that falls with
    frequency. Amplitudes a_k (0 among them) and slopes p_k form a fixed grid, their shares are fitted for every sigma (EM), and the sigma
    of the greatest likelihood is taken. Quantisation needs no undoing: what counts is the interval that a coefficient was rounded from.

    Args:
        luma: [H, W] grey levels.
        coefficients: [n, 8, 8] orthonormal DCT of its whole blocks, row by row.
        steps: [8, 8] quantisation table; None: it was not compressed.

    Returns:
        The standard deviation of the luma in grey levels, and whether it is measured. If not, it is at most that: no noise explains the
        picture as well as the best one does, or nearly all of it was quantised away.
    """
    blocks = _calm_blocks(luma)
    if not len(blocks):
        return float(luma.std()) if luma.size else 0.0, False
    step = (np.ones((8, 8)) if steps is None else steps).ravel()[1:]
    told = _profile(_histogram(coefficients[blocks].reshape(-1, 64)[:, 1:], step), step) / len(blocks)
    best = int(told.argmax())
    sigma = _between(told, best)
    compressed = steps is not None and sigma < _LEAST_OF_STEP * step.min()
    least = 10 / len(blocks)
    if compressed or told[best] - told[0] < max(_TOLD, least):
        bound = np.flatnonzero(told > told[best] - max(_EXCLUDED, least)).max()
        return float(_LEVELS[bound]), False
    return sigma, True


def _calm_blocks(luma: Array) -> NDArray[np.int64]:
    """The blocks whose neighbourhood is evenly lit, without those near black and white, where noise is cut off.

    Means of blocks decide and not their coefficients: choosing by what is measured would make it smaller.
    """
    rows, columns = (n // 8 for n in luma.shape)
    if not rows * columns:
        return np.zeros(0, dtype=np.int64)
    means = luma[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).mean(axis=(1, 3))
    around = np.pad(means, 1, mode="edge")
    slope = np.std([around[y : y + rows, x : x + columns] for y in range(3) for x in range(3)], axis=0).ravel()
    inside = np.flatnonzero((means.ravel() > 16) & (means.ravel() < 240))
    usable = inside if len(inside) >= 64 else np.arange(rows * columns)
    calm = usable[slope[usable] <= np.quantile(slope[usable], _CALM)]
    return calm[np.linspace(0, len(calm) - 1, min(len(calm), _MOST_CALM)).astype(int)]


def _histogram(coefficients: Array, step: Array) -> NDArray[np.float32]:
    """[n, 63 * bins]: 1 where a coefficient falls into a bin."""
    bins = np.searchsorted(_FIRST, np.abs(np.rint(coefficients / step)), side="right") - 1
    one = np.zeros((len(bins), 63 * len(_FIRST)), dtype=np.float32)
    np.put_along_axis(one, np.arange(63) * len(_FIRST) + bins, 1, axis=1)
    return one


def _profile(one: NDArray[np.float32], step: Array) -> Array:
    """The log likelihood of every level, each with its own best shares of the classes."""
    frequency = np.hypot(*np.divmod(np.arange(1, 64), 8))
    falling = [amplitude**2 * frequency ** (-2 * slope) for amplitude in np.geomspace(1, 256, 9) for slope in (1.5, 2.0, 3.0)]
    content = np.array([np.zeros(63), *falling])  # [classes, 63] variances of picture content: none, and amplitudes times slopes
    start = np.where(_FIRST > 0, _FIRST - 0.5, 0.0)
    ends = np.stack([start, np.append(start[1:], np.inf)])[:, None, :] * step[:, None]  # [2, 63, bins]
    shares = np.full(len(content), 1 / len(content))
    told = []
    for level in _LEVELS:
        deviation = np.sqrt(level**2 + content + _ROUNDING)[:, :, None]  # [classes, 63, 1]
        chance = 2 * (ndtr(-ends[0] / deviation) - ndtr(-ends[1] / deviation))
        log = one @ np.log(np.maximum(chance, 1e-12)).reshape(len(content), -1).T.astype(np.float32)  # [n, classes]
        top = log.max(axis=1, keepdims=True)
        likelihood = np.exp(log - top)
        for _ in range(_ROUNDS):
            parts = likelihood * shares
            shares = (parts / parts.sum(axis=1, keepdims=True)).mean(axis=0)
        shares = np.maximum(shares, 1e-6)
        shares /= shares.sum()
        told.append(float((np.log(likelihood @ shares) + top[:, 0]).sum()))
    return np.array(told)


def _between(told: Array, best: int) -> float:
    """The top of the parabola through the best level and its neighbours."""
    if not 0 < best < len(told) - 1:
        return float(_LEVELS[best])
    before, here, after = told[best - 1 : best + 2]
    shift = 0.5 * (before - after) / (before - 2 * here + after)
    return float(_LEVELS[best] * (_LEVELS[1] / _LEVELS[0]) ** shift)


def degradation_section(estimates: Sequence[Estimate], scale: int) -> dict[str, object]:
    """The `degradation` section of a recipe: blur, reduction, noise and JPEG in the ranges that were found (10th to 90th percentile).

    Blur is measured in low-resolution pixels and happens before the reduction, hence times the scale.
    Raises UserError: there are no estimates.
    """
    if not estimates:
        raise UserError("fit: expected at least one readable low-resolution picture, got none.")
    steps: list[dict[str, object]] = []
    blurs = [e.blur for e in estimates if e.blur > 0]
    if blurs:
        low, high = _range([max(0.2, np.sqrt(max(b**2 - _LEAST_BLUR**2, 0.0))) * scale for b in blurs], 2)
        size = int(np.clip(2 * np.ceil(2.5 * high) + 1, 7, 51))
        steps.append({"kind": "blur", "sizes": [7, size], "sigma": [low, high], "sinc_prob": 0.05, "families": {"iso": 0.7, "aniso": 0.3}})
    steps.append({"kind": "resize", "to": "target", "modes": ["area", "bilinear", "bicubic"]})
    # unmeasured noise is anywhere below its bound, measured noise weighs as much in one place
    noise = _range([part * e.noise for e in estimates for part in ([1.0] * 11 if e.noise_measured else np.linspace(0, 1, 11))], 1)
    if noise[1] >= 0.5:
        steps.append({"kind": "noise", "gaussian_prob": 1.0, "sigma": noise, "gray_prob": 0.0})
    qualities = [float(e.quality) for e in estimates if e.quality is not None]
    if qualities:
        steps.append({"kind": "jpeg", "prob": round(len(qualities) / len(estimates), 2), "quality": _range(qualities, 0)})
    section: dict[str, object] = {"preset": None, "steps": steps}  # the former against a preset of the recipe that this is laid over
    parse(DegradationSettings, section)
    return section


def _range(values: Sequence[float], digits: int) -> list[float]:
    low, high = np.quantile(values, [0.1, 0.9])
    return [round(float(low), digits), round(float(high), digits)]
