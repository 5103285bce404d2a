"""Gaussian, correlated and Poisson noise, added to images in [0, 1]; every field is drawn from a generator on the image's device."""

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy
from torch import Tensor

from sslsr_diffusion.data.filters import opencv

_COLUMNS = 256  # entries per alias table: 8 standard deviations either side of the largest mean (256)


def gaussian_noise(image: Tensor, generator: torch.Generator, sigma: float, gray: bool = False) -> Tensor:
    """clip(I + sigma * n, 0, 1), n standard normal; sigma in [0, 1] units; `gray` draws one field for all channels."""
    return (image + sigma * _field(image, generator, gray)).clamp_(0, 1)


def correlated_noise(image: Tensor, generator: torch.Generator, level: float, seed: int) -> Tensor:
    """Gaussian noise whose channels are correlated: covariance |level^2 U^T D U|, D diagonal U(0, 1), U random orthonormal   (BSRGAN)."""
    random = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(random.random((3, 3)))
    covariance = np.abs(level**2 * rotation.T @ np.diag(random.random(3)) @ rotation)
    values, vectors = np.linalg.eigh(covariance)  # the absolute value may leave it slightly indefinite
    root = torch.from_numpy(vectors * np.sqrt(np.clip(values, 0, None))).to(image)
    field = torch.einsum("cd,bdyx->bcyx", root, _field(image, generator, gray=False))
    return (image + field).clamp_(0, 1)


def poisson_noise(image: Tensor, generator: torch.Generator, scale: float, gray: bool = False) -> Tensor:
    """clip(I + scale * (poisson(v J) / v - J), 0, 1), J the image (or its luma) at 8-bit levels, v = 2^ceil(log2 #levels)   (Real-ESRGAN)

    Args:
        image: [B, 3, H, W] in [0, 1]; v is taken per image.
        scale: strength; 1 is photon noise at v photons for white.
        gray: one field for all channels, from the luma.
    """
    source = image
    if gray:
        red, green, blue = image.split(1, dim=1)
        source = 0.2989 * red + 0.587 * green + 0.114 * blue
    levels = (source * 255).round().clamp(0, 255)
    fields = [_poisson_field(one, generator) for one in levels]
    return (image + scale * torch.stack(fields)).clamp_(0, 1)


def _field(image: Tensor, generator: torch.Generator, gray: bool) -> Tensor:
    batch, channels, height, width = image.shape
    shape = (batch, height, width, 1 if gray else channels)  # channels last, as the image lies in memory
    return torch.randn(shape, generator=generator, device=image.device, dtype=image.dtype).permute(0, 3, 1, 2)


def _poisson_field(levels: Tensor, generator: torch.Generator) -> Tensor:
    """poisson(v J) / v - J for one image; levels [C, H, W] whole numbers 0..255 as floats."""
    if levels.device.type != "cpu":
        rate = _rate(len(levels.unique()))
        return torch.poisson(levels * (rate / 255), generator=generator) / rate - levels / 255
    whole = levels.permute(1, 2, 0).contiguous().to(torch.uint8)
    rate = _rate(int(np.count_nonzero(opencv().calcHist([whole.numpy().reshape(-1, 1)], [0], None, [256], [0, 256]))))
    counts = _draw_poisson(whole.numpy(), rate, generator)
    return (counts.to(levels.dtype) / rate - whole.to(levels.dtype) / 255).permute(2, 0, 1)


def _rate(distinct: int) -> float:
    return 2.0 ** math.ceil(math.log2(max(distinct, 1)))


def _draw_poisson(levels: NDArray[np.uint8], rate: float, generator: torch.Generator) -> Tensor:
    """Exact Poisson counts of mean levels / 255 * rate, by Walker's alias method: there are 256 means only, so a table replaces rejection.

    One gather per value: a table entry holds the coin's threshold (23 bits) and the other column (8 bits).
    """
    first, entries = _alias_tables(rate)
    drawn = torch.empty(levels.shape, dtype=torch.int32).random_(generator=generator)  # 31 random bits: 8 for the column, 23 for the coin
    column = drawn & (_COLUMNS - 1)
    level = torch.from_numpy(levels).to(torch.int32)
    entry = entries.index_select(0, (level * _COLUMNS + column).view(-1)).view(level.shape)
    column = torch.where((drawn >> 8) < (entry >> 8), column, entry & (_COLUMNS - 1))
    return column + first.index_select(0, level.view(-1)).view(level.shape)


@functools.lru_cache(maxsize=9)
def _alias_tables(rate: float) -> tuple[Tensor, Tensor]:
    """The first count of each level's window int32 [256], and the packed entries int32 [256 * COLUMNS]."""
    means = np.arange(256)[:, None] / 255 * rate
    first = np.clip(np.floor(means - 8 * np.sqrt(means)), 0, None)
    counts = first + np.arange(_COLUMNS)
    mass = np.exp(xlogy(counts, means) - means - gammaln(counts + 1))
    mass *= _COLUMNS / mass.sum(axis=1, keepdims=True)
    coin, alias = np.ones_like(mass), np.tile(np.arange(_COLUMNS), (256, 1))
    for level in range(256):
        _fill(mass[level], coin[level], alias[level])
    threshold = np.round(coin * (2**23 - 1)).astype(np.int32)
    return torch.from_numpy(first[:, 0].astype(np.int32)), torch.from_numpy((threshold << 8 | alias.astype(np.int32)).ravel())


def _fill(mass: NDArray[np.float64], coin: NDArray[np.float64], alias: NDArray[np.int64]) -> None:
    left = mass.tolist()
    small = [i for i, m in enumerate(left) if m < 1]
    large = [i for i, m in enumerate(left) if m >= 1]
    while small and large:
        poor, rich = small.pop(), large[-1]
        coin[poor], alias[poor] = left[poor], rich
        left[rich] -= 1 - left[poor]
        if left[rich] < 1:
            small.append(large.pop())
