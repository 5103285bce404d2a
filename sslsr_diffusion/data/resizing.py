"""The ways in which degradation pipelines resize, as small exact functions."""

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from sslsr_diffusion.data.filters import from_pixels, opencv, to_pixels


def interpolate(image: Tensor, mode: str, *, factor: float | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """Resize as torch's F.interpolate without antialiasing does; exactly one of factor and size.

    With a factor the output has floor(n * factor) pixels and the sampling step is 1 / factor. `bicubic` has a = -0.75; `area` is
    adaptive average pooling.

    Args:
        image: [B, C, H, W] float32.
        mode: "area", "bilinear" or "bicubic".
    """
    height, width = image.shape[2:]
    wanted = size if size is not None else (math.floor(height * float(factor)), math.floor(width * float(factor)))  # type: ignore[arg-type]
    if wanted == (height, width) and (factor is None or factor == 1.0):
        return image
    # Both libraries copy an axis whose size stays (torch after flooring, OpenCV after rounding): there only torch is torch.
    stays = factor is not None and any(n in (math.floor(n * factor), round(n * factor)) for n in (height, width))
    if image.device.type == "cpu" and mode != "area" and not stays:
        return _opencv(image, mode, factor, wanted)
    if mode == "area":
        return F.interpolate(image, size=wanted, mode="area")
    return F.interpolate(image, size=wanted if factor is None else None, scale_factor=factor, mode=mode, align_corners=False)


def _opencv(image: Tensor, mode: str, factor: float | None, size: tuple[int, int]) -> Tensor:
    """The same formulas in OpenCV, several times faster; it rounds the size up where torch floors it, so the edge is cut off."""
    cv2 = opencv()
    flag = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}[mode]
    if factor is None:
        return from_pixels([cv2.resize(p, size[::-1], interpolation=flag) for p in to_pixels(image)])
    resized = [cv2.resize(p, None, fx=factor, fy=factor, interpolation=flag) for p in to_pixels(image)]
    return from_pixels([np.ascontiguousarray(p[: size[0], : size[1]]) for p in resized])


def area_average(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to `size` by exact area averages (OpenCV's INTER_AREA), as BSRGAN does; [B, C, H, W] float32."""
    cv2 = opencv()
    resized = [cv2.resize(p, size[::-1], interpolation=cv2.INTER_AREA) for p in to_pixels(image.cpu())]
    return from_pixels(resized).to(image.device)
