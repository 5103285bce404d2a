"""Filtering on the CPU (OpenCV, as few passes as the kernel allows) and on other devices (grouped convolution)."""

import functools
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sslsr_diffusion.data.blur_kernels import Kernel, gaussian_vector

# Entries whose absolute sum is below this share of the kernel are not visited: for an image in [0, 1] the result moves by less
# than this, an order below the rounding of a 441-term float32 sum.
_NEGLIGIBLE = 2e-7
# Beyond 11 x 11 OpenCV's direct filter switches to a DFT, which costs about as much as this many separable passes (measured).
_DIRECT_SIZE = 11


@functools.cache
def opencv() -> ModuleType:
    """The cv2 module, told to use one thread: a fork after OpenCV has started its threads leaves workers that hang at their first call."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


def filter2d(image: Tensor, kernel: Kernel) -> Tensor:
    """Correlate every channel of every image with one kernel; the border is reflected without repeating the edge.

    Args:
        image: [B, C, H, W] float32.
        kernel: [k, k], k odd; images smaller than half of it are reflected several times.

    Returns:
        [B, C, H, W] float32, channels last on the CPU.
    """
    kernel = trim_kernel(kernel)
    reach = len(kernel) // 2
    if reach == 0:
        return image * float(kernel[0, 0]) if kernel[0, 0] != 1 else image
    if image.device.type != "cpu" and min(image.shape[2:]) > reach:
        return _convolve(image, torch.from_numpy(np.ascontiguousarray(kernel)).to(image))
    if image.device.type != "cpu":  # torch reflects once only; OpenCV as often as it takes
        return filter2d(image.cpu(), kernel).to(image.device)
    return from_pixels([_filter_pixels(pixels, kernel) for pixels in to_pixels(image)])


def gaussian_blur(image: Tensor, size: int, sigma: float) -> Tensor:
    """A separable Gaussian of `size` pixels; sigma 0 means OpenCV's rule; reflected border."""
    line = gaussian_vector(size, sigma)
    if image.device.type != "cpu":
        weights = torch.from_numpy(line).to(image)
        rows = _convolve(image, weights[:, None])
        return _convolve(rows, weights[None, :])
    cv2 = opencv()
    line = line.astype(np.float32)
    return from_pixels([cv2.sepFilter2D(p, cv2.CV_32F, line, line, borderType=cv2.BORDER_REFLECT_101) for p in to_pixels(image)])


def unsharp_mask(image: Tensor, weight: float = 0.5, radius: int = 50, threshold: float = 10.0) -> Tensor:
    """Sharpen where the picture differs from its blur by more than `threshold` grey levels, with soft transitions.

    residual = I - G I; soft = G (|residual| * 255 > threshold); sharp = clip(I + weight * residual, 0, 1);
    result = soft * sharp + (1 - soft) * I   (Wang et al., Real-ESRGAN, 2021)

    Args:
        image: [B, C, H, W] float32 in [0, 1].
        weight: how much of the residual is added.
        radius: size of the Gaussian G in pixels, made odd; its sigma follows OpenCV's rule.
        threshold: grey levels.
    """
    size = radius + 1 - radius % 2
    residual = image - gaussian_blur(image, size, 0.0)
    soft = gaussian_blur((residual.abs() * 255 > threshold).to(image.dtype), size, 0.0)
    sharp = (image + weight * residual).clamp(0, 1)
    return soft * sharp + (1 - soft) * image


def trim_kernel(kernel: Kernel) -> Kernel:
    """The middle of the kernel without the border whose entries are negligible."""
    total, reach = np.abs(kernel).sum(), len(kernel) // 2
    for inner in range(reach):
        middle = kernel[reach - inner : reach + inner + 1, reach - inner : reach + inner + 1]
        if total - np.abs(middle).sum() <= _NEGLIGIBLE * total:
            return middle
    return kernel


def to_pixels(image: Tensor) -> list[NDArray[np.float32]]:
    """One [H, W, C] array per image; a view where the tensor is channels last."""
    return [np.ascontiguousarray(one.permute(1, 2, 0).numpy()) for one in image]


def from_pixels(pixels: list[NDArray[np.float32]]) -> Tensor:
    """[B, C, H, W], channels last, sharing memory for one image."""
    tensors = [torch.from_numpy(p if p.ndim == 3 else p[..., None]).permute(2, 0, 1) for p in pixels]
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _filter_pixels(pixels: NDArray[np.float32], kernel: Kernel) -> NDArray[np.float32]:
    cv2 = opencv()
    lines = _separate(kernel)
    if lines is None:
        return cv2.filter2D(pixels, cv2.CV_32F, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101)
    parts = (cv2.sepFilter2D(pixels, cv2.CV_32F, row, column, borderType=cv2.BORDER_REFLECT_101) for column, row in lines)
    return functools.reduce(lambda total, part: cv2.add(total, part, dst=total), parts)


def _separate(kernel: Kernel) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]] | None:
    """The kernel as a sum of few outer products (singular value decomposition), or None where filtering directly is cheaper."""
    size = len(kernel)
    left, values, right = np.linalg.svd(kernel)
    weights = values * np.abs(left).sum(axis=0) * np.abs(right).sum(axis=1)
    rest = np.cumsum(weights[::-1])[::-1]  # rest[r]: how far the result can move when terms r and later are dropped
    rank = int((rest > _NEGLIGIBLE).sum())
    if rank > (max(1, size // 5) if size <= _DIRECT_SIZE else 6):  # measured, see benchmarks/degradation.py
        return None
    roots = np.sqrt(values)
    return [((left[:, i] * roots[i]).astype(np.float32), (right[i] * roots[i]).astype(np.float32)) for i in range(rank)]


def _convolve(image: Tensor, weights: Tensor) -> Tensor:
    channels = image.shape[1]
    height, width = weights.shape
    padded = F.pad(image, (width // 2, width // 2, height // 2, height // 2), mode="reflect")
    return F.conv2d(padded, weights.expand(channels, 1, height, width), groups=channels)
