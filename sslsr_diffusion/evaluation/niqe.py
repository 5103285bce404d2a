"""NIQE with the published parameters, in numpy and scipy alone: no package and no download is needed.

BasicSR scores the limited-range luma, pyiqa the full-range one. They also round differently, which matters: on exactly flat areas
(sky, black bars) the rounding of the local mean is itself what is measured, and decides up to 0.1 of the score. BasicSR filters
float32 images; pyiqa filters float64 images with a kernel of float32 numbers.
"""

import functools
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.fidelity import Convention, crop, luma

PARAMETERS = "niqe_modelparameters.mat"  # the published natural-image model; its notice lies beside it
BLOCK = 96
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
FULL_RANGE = (0.299, 0.587, 0.114)


def niqe(
    restored: Tensor, reference: object = None, *, crop_border: int = 0, y_channel: bool = False, convention: Convention = "basicsr"
) -> Tensor:
    """Distance of an image's local statistics from those of natural photographs; lower is better   (Mittal et al. 2012).

    NIQE = sqrt((m - n)^T ((S + N) / 2)^+ (m - n)): mean and covariance of 36 features over blocks of 96 x 96, at two scales

    Args:
        restored: [B, 3 or 1, H, W] float in [0, 1]; two blocks of 96 x 96 or more after the cut. Its luma is rounded to 8 bits.
        reference, y_channel: not used.
        crop_border: pixels cut from each side first.
        convention: "basicsr" scores the luma of BT.601 limited range (16..235), "pyiqa" that of full range (0..255).

    Returns:
        [B] float64 on the CPU; nan where fewer than two blocks have any texture.

    Raises:
        UserError: fewer than two blocks fit.
    """
    gray, pixels, kernel = restored.float(), "float32", "float64"  # what the filter's image and kernel are rounded to
    if convention == "basicsr":
        gray = luma(gray)
    else:
        weights = torch.tensor(FULL_RANGE, dtype=torch.float32, device=restored.device)
        gray = (gray if gray.shape[1] == 1 else torch.einsum("bchw,c->bhw", gray, weights)[:, None]) * 255
        pixels, kernel = "float64", "float32"
    planes = crop(gray, crop_border).round().squeeze(1).cpu().numpy().astype(pixels)
    return torch.tensor([_score(plane, kernel) for plane in planes], dtype=torch.float64)


def _score(plane: np.ndarray, kernel: str) -> float:
    rows, columns = plane.shape[0] // BLOCK, plane.shape[1] // BLOCK
    if rows * columns < 2:
        raise UserError(f"NIQE needs two blocks of 96 x 96 pixels, an image of {plane.shape[1]} x {plane.shape[0]} has {rows * columns}.")
    plane = plane[: rows * BLOCK, : columns * BLOCK]
    halves = (_features(_normalized(plane, kernel), BLOCK), _features(_normalized(_halve(plane), kernel), BLOCK // 2))
    features = np.concatenate(halves, axis=1)  # [blocks, 36]; a wholly flat block has no fit: NaN
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < 2:
        return float("nan")
    mean, covariance = np.nanmean(features, axis=0), np.cov(whole, rowvar=False)
    natural_mean, natural_covariance = _natural()
    away = natural_mean - mean
    return float(np.sqrt(away @ np.linalg.pinv((natural_covariance + covariance) / 2) @ away))


@functools.cache
def _natural() -> tuple[np.ndarray, np.ndarray]:
    """The published mean [36] and covariance [36, 36] of natural photographs."""
    from scipy.io import loadmat

    with resources.files("sslsr_diffusion.evaluation").joinpath(PARAMETERS).open("rb") as file:
        published = loadmat(file)
    return published["mu_prisparam"].ravel(), published["cov_prisparam"]


def _normalized(plane: np.ndarray, kernel_dtype: str) -> np.ndarray:
    """(x - local mean) / (local deviation + 1) with a 7 x 7 Gaussian of sigma 7/6, border repeated."""
    import numpy as np
    from scipy.ndimage import convolve

    at = np.arange(-3, 4)
    kernel = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * (7 / 6) ** 2))
    kernel = (kernel / kernel.sum()).astype(kernel_dtype)
    mean = convolve(plane, kernel, mode="nearest")
    deviation = np.sqrt(np.abs(convolve(np.square(plane), kernel, mode="nearest") - np.square(mean)))
    return (plane - mean) / (deviation + 1)


def _halve(plane: np.ndarray) -> np.ndarray:
    """MATLAB's imresize(x, 1/2): cubic (a = -1/2) widened to 8 taps, border mirrored with its edge, rows first; keeps the dtype."""
    distance = np.abs(np.arange(-3.5, 4)) / 2  # of the 8 taps around each output centre, in output pixels
    taps = np.where(distance <= 1, 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2)
    taps /= taps.sum()
    for _ in range(2):
        padded = np.pad(plane, ((3, 4), (0, 0)), mode="symmetric")
        size = plane.shape[0] // 2
        plane = sum(tap * padded[i : i + 2 * size : 2].astype(np.float64) for i, tap in enumerate(taps)).astype(plane.dtype).T
    return plane


def _features(plane: np.ndarray, block: int) -> np.ndarray:
    """18 parameters per block, blocks column by column: the shape of the values, and of the products with four neighbours."""
    rows, columns = plane.shape[0] // block, plane.shape[1] // block
    blocks = plane.reshape(rows, block, columns, block).swapaxes(1, 2).reshape(-1, block, block)
    shape, left, right = _asymmetric_fit(blocks)
    found = [shape, (left + right) / 2]
    for shift in SHIFTS:
        shape, left, right = _asymmetric_fit(blocks * np.roll(blocks, shift, axis=(1, 2)))
        found += [shape, (right - left) * _gamma(2 / shape) / _gamma(1 / shape), left, right]
    return np.stack(found, axis=1)


def _asymmetric_fit(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moment fit of the asymmetric generalised Gaussian: shape, left and right scale of each block   (Lasmar et al. 2009)."""
    values = blocks.reshape(len(blocks), -1).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        left, right = (np.sqrt((np.square(values) * side).sum(axis=1) / side.sum(axis=1)) for side in (values < 0, values > 0))
        ratio = left / right
        spread = np.square(np.abs(values).mean(axis=1)) / np.square(values).mean(axis=1)
        spread *= (ratio**3 + 1) * (ratio + 1) / np.square(ratio**2 + 1)
    shapes, spreads = _shape_table()
    shape = np.where(np.isfinite(spread), shapes[np.argmin(np.abs(spreads - spread[:, None]), axis=1)], np.nan)
    scale = np.sqrt(_gamma(1 / shape) / _gamma(3 / shape))
    return shape, left * scale, right * scale


@functools.cache
def _shape_table() -> tuple[np.ndarray, np.ndarray]:
    shapes = np.arange(0.2, 10.001, 0.001)
    return shapes, np.square(_gamma(2 / shapes)) / (_gamma(1 / shapes) * _gamma(3 / shapes))


def _gamma(x: np.ndarray) -> np.ndarray:
    from scipy.special import gamma

    return gamma(x)
