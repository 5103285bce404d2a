"""Edge masks: the pixels at which the self-similarity loss looks. torch alone, batched, on any device, without gradient."""

import torch
from torch import Tensor

# 8-bit luma as PIL's convert("L") computes it: (19595 R + 38470 G + 7471 B + 32768) >> 16
_LUMA = (19595, 38470, 7471)


def laplacian_edge_mask(image: Tensor, threshold: float = 20.0) -> Tensor:
    """Mark the pixels that are darker than their four neighbours by more than `threshold` grey levels in sum.

    mask = clip(L(y-1) + L(y+1) + L(x-1) + L(x+1) - 4 L, 0, 255) > threshold on the 8-bit luma L, border reflected without
    repeating the edge; negative responses saturate to 0, so one side of each edge counts   (Chen et al., ACM MM 2024)
    Bit-exact with PIL's convert("L") followed by OpenCV's 8-bit Laplacian.

    Args:
        image: [B, 3, H, W] or [B, 1, H, W], floating point in [0, 1] (rounded to 8 bits first) or uint8.
        threshold: grey levels, 0 to 255; strict.

    Returns:
        bool [B, 1, H, W] on the image's device.

    Raises:
        ValueError: the shape or dtype is another one.
    """
    return _laplacian(grey_levels(image)).clamp(0, 255) > threshold


def laplacian_abs_edge_mask(image: Tensor, threshold: float = 20.0) -> Tensor:
    """As laplacian_edge_mask, but |response| > threshold: both sides of each edge, about twice as many pixels."""
    return _laplacian(grey_levels(image)).abs() > threshold


def sobel_edge_mask(image: Tensor, threshold: float = 20.0) -> Tensor:
    """Mark the pixels whose 3x3 Sobel gradient is longer than `threshold` grey levels.

    mask = |(Gx, Gy)| / 4 > threshold; the division makes a straight step of h grey levels answer h, as the Laplacian does.
    Args, Returns and Raises as for laplacian_edge_mask.
    """
    grey = grey_levels(image)
    left, right = _shift(grey, -1, dim=3), _shift(grey, 1, dim=3)
    up, down = _shift(grey, -1, dim=2), _shift(grey, 1, dim=2)
    across, along = right - left, down - up
    gx = _shift(across, -1, dim=2) + 2 * across + _shift(across, 1, dim=2)
    gy = _shift(along, -1, dim=3) + 2 * along + _shift(along, 1, dim=3)
    return (gx * gx + gy * gy).double() > (4 * threshold) ** 2


def full_mask(image: Tensor) -> Tensor:
    """Every pixel: bool [B, 1, H, W]."""
    _check(image)
    return torch.ones_like(image[:, :1], dtype=torch.bool)


def random_mask(image: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Each pixel with probability `density`, independently: bool [B, 1, H, W]; drawn on the CPU, so devices agree."""
    _check(image)
    drawn = torch.rand(len(image), 1, *image.shape[2:], generator=generator) < density
    return drawn.to(image.device)


def apply_mask_stride(mask: Tensor, stride: int) -> Tensor:
    """Keep the masked pixels with y mod stride == x mod stride: diagonals, 1/stride of them.

    The pattern is anchored at the top-left corner, as in the published code (an identity matrix, tiled).

    Args:
        mask: [..., H, W], bool or {0, 1}.
        stride: at least 1; 1 keeps everything.
    """
    if stride < 1:
        raise ValueError(f"mask stride: expected an integer of at least 1, got {stride}")
    if stride == 1:
        return mask
    y = torch.arange(mask.shape[-2], device=mask.device)
    x = torch.arange(mask.shape[-1], device=mask.device)
    keep = (y % stride)[:, None] == (x % stride)[None, :]
    return mask & keep if mask.dtype == torch.bool else mask * keep.to(mask.dtype)


def cap_mask(mask: Tensor, limit: int, generator: torch.Generator | None = None) -> Tensor:
    """Keep at most `limit` masked pixels of each image, chosen at random without replacement, so that memory is bounded.

    Args:
        mask: bool [B, 1, H, W].
        limit: pixels per image, at least 1.
        generator: CPU generator; the choice does not depend on the device.
    """
    if limit < 1:
        raise ValueError(f"mask cap: expected at least 1 pixel, got {limit}")
    capped = mask.clone(memory_format=torch.contiguous_format)
    for one in capped.flatten(1):
        marked = one.nonzero().squeeze(1)
        if len(marked) > limit:
            drop = torch.randperm(len(marked), generator=generator)[limit:].to(mask.device)
            one[marked[drop]] = False
    return capped


def grey_levels(image: Tensor) -> Tensor:
    """The 8-bit luma of PIL's convert("L") as int32 [B, 1, H, W]; one channel passes through."""
    _check(image)
    levels = image if image.dtype == torch.uint8 else (image.detach().float().clamp(0, 1) * 255).round()
    levels = levels.to(torch.int32)
    if levels.shape[1] == 1:
        return levels
    red, green, blue = levels.split(1, dim=1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue + 32768) >> 16


def _laplacian(grey: Tensor) -> Tensor:
    return _shift(grey, -1, dim=2) + _shift(grey, 1, dim=2) + _shift(grey, -1, dim=3) + _shift(grey, 1, dim=3) - 4 * grey


def _shift(grey: Tensor, step: int, dim: int) -> Tensor:
    """The neighbour one pixel back (-1) or on (+1) along `dim`; index -1 is 1 and index n is n - 2 (a lone pixel is its own)."""
    n = grey.shape[dim]
    if n == 1:
        return grey
    if step < 0:
        return torch.cat([grey.narrow(dim, 1, 1), grey.narrow(dim, 0, n - 1)], dim)
    return torch.cat([grey.narrow(dim, 1, n - 1), grey.narrow(dim, n - 2, 1)], dim)


def _check(image: Tensor) -> None:
    if image.dim() != 4 or image.shape[1] not in (1, 3):
        raise ValueError(f"edge mask: expected an image [B, 3, H, W] or [B, 1, H, W], got shape {list(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"edge mask: expected floating point in [0, 1] or uint8, got {image.dtype}")
