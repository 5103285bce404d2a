"""Blur kernels of the real-world degradation models, in float64 numpy, each normalised to sum 1.

q = x^T Sigma^-1 x on the integer grid around the centre, Sigma = R diag(sigma_x^2, sigma_y^2) R^T   (Wang et al., Real-ESRGAN, 2021)
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import j1

from sslsr_diffusion.data.draws import Value

Kernel = NDArray[np.float64]
Family = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
FAMILIES: tuple[Family, ...] = get_args(Family)


def gaussian_like_kernel(family: Family, size: int, sigma_x: float, sigma_y: float, theta: float, beta: float = 1.0) -> Kernel:
    """One kernel of the Gaussian families.

    Gaussian exp(-q/2); generalized exp(-q^beta / 2); plateau 1 / (1 + q^beta). Isotropic members use sigma_x alone.

    Args:
        family: one of FAMILIES.
        size: odd side length in pixels.
        sigma_x, sigma_y: standard deviations in pixels along the rotated axes.
        theta: rotation in radians.
        beta: shape; ignored by `iso` and `aniso`.

    Returns:
        float64 [size, size] with sum 1.
    """
    if family not in FAMILIES:
        raise ValueError(f"blur kernel family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    sigma_y, theta = (sigma_y, theta) if family.endswith("aniso") else (sigma_x, 0.0)
    q = _quadratic_form(size, sigma_x**2, sigma_y**2, theta)
    if family.startswith("plateau"):
        kernel = 1.0 / (1.0 + q**beta)
        return kernel / kernel.sum()
    return _normal(q**beta if family.startswith("generalized") else q)


def variance_kernel(size: int, variance_1: float, variance_2: float, theta: float) -> Kernel:
    """The anisotropic Gaussian of the BSRGAN model: variances (not deviations) along axes rotated by theta; float64 [size, size]."""
    return _normal(_quadratic_form(size, variance_1, variance_2, theta))


def shifted_gaussian_kernel(size: int, sigma: float, shift: float) -> Kernel:
    """An isotropic Gaussian whose centre is `shift` pixels down and right of the middle; float64 [size, size], for correlation.

    Bilinear, clipped at the border, renormalised. BSRGAN filters with it before taking every scale-th pixel,
    shift = (scale - 1) / 2, so that the picture does not move.
    """
    kernel = _normal(_quadratic_form(size, sigma**2, sigma**2, 0.0))
    if shift:
        position = np.clip(np.arange(size) + shift, 0, size - 1)
        below = np.minimum(position.astype(int), size - 2)
        part = position - below
        kernel = kernel[below] * (1 - part)[:, None] + kernel[below + 1] * part[:, None]
        kernel = kernel[:, below] * (1 - part) + kernel[:, below + 1] * part
    return kernel[::-1, ::-1] / kernel.sum()


def sinc_kernel(size: int, cutoff: float) -> Kernel:
    """The ideal circular low-pass filter cut to a square: it rings, as over-sharpened photographs do.

    c J1(c rho) / (2 pi rho), at the centre c^2 / (4 pi), normalised to sum 1.

    Args:
        size: odd side length in pixels.
        cutoff: c, radians per pixel, up to pi.
    """
    rho = np.hypot(*_grid(size))
    centre = size // 2
    rho[centre, centre] = 1.0
    kernel = cutoff * j1(cutoff * rho) / (2 * np.pi * rho)
    kernel[centre, centre] = cutoff**2 / (4 * np.pi)
    return kernel / kernel.sum()


def pad_kernel(kernel: Kernel, size: int) -> Kernel:
    """The kernel in the middle of size x size zeros (published pipelines pad to the largest size so that a batch can be stacked)."""
    margin = (size - len(kernel)) // 2
    return np.pad(kernel, margin) if margin > 0 else kernel


def opencv_sigma(size: int) -> float:
    """The standard deviation that OpenCV takes for a Gaussian of this size when it is given none."""
    return 0.3 * ((size - 1) * 0.5 - 1) + 0.8


def gaussian_vector(size: int, sigma: float) -> NDArray[np.float64]:
    """A 1-D Gaussian with sum 1; sigma 0 means OpenCV's rule."""
    x = np.arange(size) - (size - 1) / 2
    weights = np.exp(-0.5 * (x / (sigma or opencv_sigma(size))) ** 2)
    return weights / weights.sum()


def kernel_from(values: Mapping[str, Value]) -> Kernel:
    """The kernel that drawn values describe: {"family": ..., "size": ..., ...}; `sinc` and the BSRGAN kinds included."""
    return KERNELS[str(values["family"])](**{name: value for name, value in values.items() if name != "family"})


KERNELS: dict[str, Callable[..., Kernel]] = {
    **{family: partial(gaussian_like_kernel, family) for family in FAMILIES},
    "sinc": sinc_kernel,
    "variance": variance_kernel,
    "shifted": shifted_gaussian_kernel,
}


def _normal(q: NDArray[np.float64]) -> Kernel:
    kernel = np.exp(-0.5 * q)
    return kernel / kernel.sum()


def _grid(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    axis = np.arange(size) - (size - 1) / 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def _quadratic_form(size: int, variance_x: float, variance_y: float, theta: float) -> NDArray[np.float64]:
    x, y = _grid(size)
    cos, sin = np.cos(theta), np.sin(theta)
    along, across = cos * x + sin * y, cos * y - sin * x
    return along**2 / variance_x + across**2 / variance_y
