"""What some losses see of a picture's surroundings: local variance, flat areas, gradients."""

import torch
from torch import Tensor
from torch.nn import functional as F


def local_variance(maps: Tensor, size: int) -> Tensor:
    """Unbiased variance over the size x size window around each pixel, borders reflected.

    Args:
        maps: [B, 1, H, W] float, sides above size // 2; differentiable.
        size: odd.
    Returns:
        [B, 1, H, W]
    """
    padded = F.pad(maps, [size // 2] * 4, mode="reflect")
    return padded.unfold(-2, size, 1).unfold(-2, size, 1).flatten(-2).var(dim=-1)


def flat_areas(pictures: Tensor, *, size: int = 11, threshold: float = 0.025) -> Tensor:
    """[B, 1, H, W] bool: where the luma's deviation over size x size pixels stays below `threshold`   (Li et al., AAAI 2022, equation 6)

    `pictures`: [B, 3, H, W] in [0, 1].
    """
    luma = torch.tensor([0.2989, 0.587, 0.114], device=pictures.device, dtype=pictures.dtype)
    gray = (pictures * luma[:, None, None]).sum(dim=1, keepdim=True)
    return local_variance(gray, size).sqrt() < threshold


def gradient_map(pictures: Tensor) -> Tensor:
    """M = sqrt((I(y+1, x) - I(y-1, x))^2 + (I(y, x+1) - I(y, x-1))^2 + 1e-6) per channel   (Ma et al., CVPR 2020, equation 1)

    Outside of the picture there is 0, as in the published code, so borders are edges.

    Args:
        pictures: [B, C, H, W]; differentiable.
    Returns:
        [B, C, H, W]
    """
    padded = F.pad(pictures, [1, 1, 1, 1])
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    right = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    return (down.square() + right.square() + 1e-6).sqrt()
