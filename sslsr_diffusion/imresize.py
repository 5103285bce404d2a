"""Bicubic resizing as MATLAB's imresize does it: what "bicubic" pairs of the field are made with."""

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def matlab_bicubic(image: Tensor, scale: float, antialiasing: bool = True) -> Tensor:
    """Bicubic resizing as MATLAB's imresize does it: a = -0.5, kernel widened when shrinking, symmetric border, not clipped.

    Args:
        image: [..., H, W] floating point; differentiable.
        scale: output size over input size.
        antialiasing: widen the kernel when shrinking.

    Returns:
        [..., ceil(H * scale), ceil(W * scale)].
    """
    rows = _weights(image.shape[-2], scale, antialiasing).to(image)
    columns = _weights(image.shape[-1], scale, antialiasing).to(image)
    return rows @ image @ columns.T


@functools.lru_cache(maxsize=64)
def _weights(length: int, scale: float, antialiasing: bool) -> Tensor:
    """The dense matrix [ceil(length * scale), length] that resizes one axis."""
    return torch.from_numpy(cubic_matrix(length, math.ceil(length * scale), scale, antialiasing))


def cubic_matrix(length: int, wanted: int, scale: float, antialiasing: bool) -> NDArray[np.float64]:
    """Rows of cubic weights: output x looks at input x / scale + 0.5 (1 - 1 / scale), 1-based; the border is mirrored."""
    shrink = scale if scale < 1 and antialiasing else 1.0
    width = 4.0 / shrink
    centre = np.arange(1, wanted + 1) / scale + 0.5 * (1 - 1 / scale)
    first = np.floor(centre - width / 2)
    index = first[:, None] + np.arange(math.ceil(width) + 2)[None]
    weights = shrink * _cubic(shrink * (centre[:, None] - index))
    weights /= weights.sum(axis=1, keepdims=True)
    folded = np.mod(index.astype(int) - 1, 2 * length)
    folded = np.where(folded < length, folded, 2 * length - 1 - folded)
    matrix = np.zeros((wanted, length))
    np.add.at(matrix, (np.arange(wanted)[:, None], folded), weights)
    return matrix


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return near * (x <= 1) + far * ((x > 1) & (x <= 2))
