"""The noise of a picture from its 8x8 DCT coefficients, quantised or not: maximum likelihood over its calm blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_LEVELS = np.geomspace(0.35, 30.0, 26)  # grey levels of luma that are compared
_FIRST = np.array([0, 1, 2, 3, 4, 6, 9, 14, 22, 35])  # |quantised coefficient| at which each histogram bin starts
_ROUNDING = 0.447 / 12  # variance in luma of rounding three channels to 8 bits
_CALM, _MOST_BLOCKS, _ROUNDS = 0.6, 1500, 25
# The model is no exact description of photographs, so differences of log likelihood count per block, not as such
_TOLD, _EXCLUDED = 0.05, 0.1
_LEAST_OF_STEP = 0.22  # noise below this share of the finest step leaves 98 % of its coefficients at 0, whatever the picture


class NoiseLevel(NamedTuple):
    sigma: float  # standard deviation of the luma in grey levels; where it is not measured: at most this
    measured: bool


def noise_level(luma: Array, coefficients: Array, steps: Array | None = None) -> NoiseLevel:
    """The noise whose quantised coefficients look most like those of the picture.

    Coefficient f of a block of class k is N(0, sigma^2 + a_k^2 |f|^(-2 p_k)) before quantisation: white noise, and content that falls with
    frequency. Amplitudes a_k (0 among them) and slopes p_k form a fixed grid, their shares are fitted for every sigma (EM), and the sigma
    of the greatest likelihood is taken. Quantisation needs no undoing: what counts is the interval that a coefficient was rounded from.

    Args:
        luma: [H, W] grey levels.
        coefficients: [n, 8, 8] orthonormal DCT of its whole blocks, row by row.
        steps: [8, 8] quantisation table; None: it was not compressed.

    Returns:
        Not measured: no noise explains the picture as well as the best one does, or nearly all of it was quantised away.
    """
    blocks = _calm_blocks(luma)
    if not len(blocks):
        return NoiseLevel(float(luma.std()) if luma.size else 0.0, False)
    step = (np.ones((8, 8)) if steps is None else steps).ravel()[1:]
    told = _profile(_histogram(coefficients[blocks].reshape(-1, 64)[:, 1:], step), step) / len(blocks)
    best = int(told.argmax())
    sigma = _between(told, best)
    compressed = steps is not None and sigma < _LEAST_OF_STEP * step.min()
    least = 10 / len(blocks)
    if compressed or told[best] - told[0] < max(_TOLD, least):
        bound = np.flatnonzero(told > told[best] - max(_EXCLUDED, least)).max()
        return NoiseLevel(float(_LEVELS[bound]), False)
    return NoiseLevel(sigma, True)


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
    return calm[np.linspace(0, len(calm) - 1, min(len(calm), _MOST_BLOCKS)).astype(int)]


def _histogram(coefficients: Array, step: Array) -> NDArray[np.float32]:
    """[n, 63 * bins]: 1 where a coefficient falls into a bin."""
    bins = np.searchsorted(_FIRST, np.abs(np.rint(coefficients / step)), side="right") - 1
    one = np.zeros((len(bins), 63 * len(_FIRST)), dtype=np.float32)
    np.put_along_axis(one, np.arange(63) * len(_FIRST) + bins, 1, axis=1)
    return one


def _profile(one: NDArray[np.float32], step: Array) -> Array:
    """The log likelihood of every level, each with its own best shares of the classes."""
    from scipy.special import ndtr

    content = _content()
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


def _content() -> Array:
    """[classes, 63] variances of picture content: none, and amplitudes times slopes."""
    frequency = np.hypot(*np.divmod(np.arange(1, 64), 8))
    falling = [amplitude**2 * frequency ** (-2 * slope) for amplitude in np.geomspace(1, 256, 9) for slope in (1.5, 2.0, 3.0)]
    return np.array([np.zeros(63), *falling])


def _between(told: Array, best: int) -> float:
    """The top of the parabola through the best level and its neighbours."""
    if not 0 < best < len(told) - 1:
        return float(_LEVELS[best])
    before, here, after = told[best - 1 : best + 2]
    shift = 0.5 * (before - after) / (before - 2 * here + after)
    return float(_LEVELS[best] * (_LEVELS[1] / _LEVELS[0]) ** shift)
