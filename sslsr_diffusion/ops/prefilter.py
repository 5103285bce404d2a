"""Gaussian smoothing of pictures before their graphs are drawn."""

import functools
import operator

import torch
from torch import Tensor
from torch.nn import functional as F


def reach(sigma: float) -> int:
    """Pixels to either side that the kernel takes: four deviations, rounded."""
    return int(4 * sigma + 0.5)


def smoothed(image: Tensor, sigma: float) -> Tensor:
    """Each channel under a Gaussian of `sigma` pixels, borders reflected without the edge: separable, differentiable, twice too.

    Args:
        image: [B, C, H, W] floating point, sides above `reach(sigma)`.
    Returns:
        [B, C, H, W]
    """
    radius = reach(sigma)
    if radius == 0:
        return image
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    line = torch.exp(-0.5 * (places / sigma) ** 2)
    weights = (line / line.sum()).tolist()
    for axis in (-1, -2):  # sums of shifted pictures: autocast and TF32 would round a convolution, and the graph's sigma magnifies that
        padded = F.pad(image, [radius * (axis == -1)] * 2 + [radius * (axis == -2)] * 2, mode="reflect")
        length = image.shape[axis]
        image = functools.reduce(operator.add, (weight * padded.narrow(axis, k, length) for k, weight in enumerate(weights)))
    return image
