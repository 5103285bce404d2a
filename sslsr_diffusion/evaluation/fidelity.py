"""PSNR and SSIM in the field's convention, the SSG distance, all with torch alone; and the cut and the luma that the others share."""

import math
from typing import Literal

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.ops import SelfSimilarityLoss, laplacian_edge_mask

Convention = Literal["basicsr", "pyiqa"]
LUMA = (65.481, 128.553, 24.966)  # BT.601 limited range: Y = 16 + LUMA . rgb, on the 0..255 scale for rgb in [0, 1]


def psnr(restored: Tensor, reference: Tensor, *, crop_border: int = 0, y_channel: bool = False) -> Tensor:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / MSE), inf for equal images   (BasicSR's convention).

    Args:
        restored: [B, 3 or 1, H, W] float in [0, 1].
        reference: the same shape.
        crop_border: pixels cut from each side first.
        y_channel: compare the unrounded luma of BT.601 limited range instead of all channels.

    Returns:
        [B] float64 (float32 where the device has no float64).
    Raises UserError: shapes differ, or nothing is left after the cut.
    """
    a, b = _prepare(restored, reference, crop_border, y_channel)
    mse = (a - b).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / mse)


def ssim(
    restored: Tensor, reference: Tensor, *, crop_border: int = 0, y_channel: bool = False, convention: Convention = "basicsr"
) -> Tensor:
    """Structural similarity, 11x11 Gaussian of sigma 1.5, valid area, mean of the channels   (Wang et al. 2004).

    SSIM = mean of (2 ma mb + C1) / (ma^2 + mb^2 + C1) * (2 sab + C2) / (sa + sb + C2), C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2

    Args:
        restored: [B, 3 or 1, H, W] float in [0, 1]; at least 11 x 11 after the cut.
        reference: the same shape.
        crop_border: pixels cut from each side first.
        y_channel: compare the luma of BT.601 limited range instead of all channels.
        convention: "basicsr" as written above; "pyiqa" rounds to 8 bits first and counts a negative second factor as 0.

    Returns:
        [B] float64 (float32 where the device has no float64).
    Raises UserError: shapes differ, or less than 11 x 11 pixels are left after the cut.
    """
    a, b = _prepare(restored, reference, crop_border, y_channel)
    if min(a.shape[-2:]) < 11:
        raise UserError(
            f"SSIM needs at least 11 x 11 pixels, {a.shape[-1]} x {a.shape[-2]} are left after cutting {crop_border} from each side."
        )
    if convention == "pyiqa":
        a, b = a.round(), b.round()
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a.square()
    var_b = _blur(b * b) - mean_b.square()
    cov = _blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    if convention == "pyiqa":
        structure = structure.clamp_min(0)
    return ((2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1) * structure).mean(dim=(1, 2, 3))


def ssg_terms(restored: Tensor, reference: Tensor, *, crop_border: int = 0, y_channel: bool = False) -> dict[str, Tensor]:
    """L1 = mean |T_sr - T_gt| and KL = mean T_gt ln(T_gt / T_sr), both T clamped at 1e-10 for KL   (Chen et al., ACM MM 2024).

    The means run over the rows of the ground truth's edge pixels (all of them, no stride) and the 625 offsets.

    Args:
        restored: [B, 3, H, W] float in [0, 1]; at least 13 x 13 after the cut.
        reference: the same shape.
        crop_border: pixels cut from each side first.
        y_channel: not used: the graph is of RGB, as in training.

    Returns:
        {"ssg_l1": [B], "ssg_kl": [B]} float64; nan where the ground truth has no edge pixel.
    Raises UserError: shapes differ, or the images are too small.
    """
    restored, reference = crop(restored, crop_border).float(), crop(reference, crop_border).float()
    distance = SelfSimilarityLoss()
    found = []
    try:
        with torch.no_grad():
            for sr, gt in zip(restored.split(1), reference.split(1)):
                mask = laplacian_edge_mask(gt)
                _, terms = distance(sr, gt, mask, return_terms=True)
                found.append([terms["l1"].item(), terms["kl"].item()] if mask.any() else [float("nan")] * 2)
    except ValueError as error:
        raise UserError(f"SSG distance: {error}") from None
    l1, kl = torch.tensor(found, dtype=torch.float64).unbind(1)
    return {"ssg_l1": l1, "ssg_kl": kl}


def ssg_l1(restored: Tensor, reference: Tensor, *, crop_border: int = 0, y_channel: bool = False) -> Tensor:
    """`ssg_terms`' L1 alone: [B]."""
    return ssg_terms(restored, reference, crop_border=crop_border)["ssg_l1"]


def ssg_kl(restored: Tensor, reference: Tensor, *, crop_border: int = 0, y_channel: bool = False) -> Tensor:
    """`ssg_terms`' KL alone: [B]."""
    return ssg_terms(restored, reference, crop_border=crop_border)["ssg_kl"]


def luma(image: Tensor) -> Tensor:
    """BT.601 limited-range luma of [B, 3, H, W] in [0, 1]: [B, 1, H, W] in 16..235, not rounded. Gray passes as 255 x."""
    if image.shape[1] == 1:
        return image * 255
    weights = torch.tensor(LUMA, dtype=image.dtype, device=image.device)
    return torch.einsum("bchw,c->bhw", image, weights).unsqueeze(1) + 16


def crop(image: Tensor, border: int) -> Tensor:
    """`border` pixels cut from each side; UserError when nothing is left."""
    if border < 0 or min(image.shape[-2:]) <= 2 * border:
        raise UserError(f"crop_border: cannot cut {border} pixels from each side of an image of {image.shape[-1]} x {image.shape[-2]}.")
    return image[..., border : image.shape[-2] - border, border : image.shape[-1] - border]


def check_pair(restored: Tensor, reference: Tensor, *, channels: int | None = None) -> None:
    """Raises UserError unless both are [B, C, H, W] of one shape, with so many channels where they are given."""
    if restored.ndim != 4 or restored.shape != reference.shape or restored.shape[1] != (channels or restored.shape[1]):
        raise UserError(
            f"expected two images [B, {channels or 'C'}, H, W] of one shape, got restored {tuple(restored.shape)} and reference "
            f"{tuple(reference.shape)}."
        )


def _prepare(restored: Tensor, reference: Tensor, border: int, y_channel: bool) -> tuple[Tensor, Tensor]:
    """Both images cut, on the 0..255 scale, in the widest float the device has."""
    check_pair(restored, reference)
    dtype = torch.float32 if restored.device.type == "mps" else torch.float64
    a, b = (crop(x.to(dtype), border) for x in (restored, reference))
    return (luma(a), luma(b)) if y_channel else (a * 255, b * 255)


def _blur(image: Tensor) -> Tensor:
    """Separable 11-tap Gaussian of sigma 1.5 over the valid area: [B, C, H, W] -> [B, C, H-10, W-10]."""
    weights = [math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-5, 6)]
    for dim in (2, 3):  # shifted sums: torch's float64 convolution takes four times as long
        size = image.shape[dim] - 10
        blurred = torch.zeros_like(image.narrow(dim, 0, size))
        for i, weight in enumerate(weights):
            blurred.add_(image.narrow(dim, i, size), alpha=weight / sum(weights))
        image = blurred
    return image
