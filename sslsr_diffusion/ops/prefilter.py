"""Gaussian smoothing of pictures before their graphs are drawn."""

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
    radius, channels = reach(sigma), image.shape[1]
    if radius == 0:
        return image
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    line = torch.exp(-0.5 * (places / sigma) ** 2)
    line = (line / line.sum()).to(image).expand(channels, 1, -1)
    padded = F.pad(image, [radius] * 4, mode="reflect")
    rows = F.conv2d(padded, line[:, :, None], groups=channels)
    return F.conv2d(rows, line[..., None], groups=channels)
