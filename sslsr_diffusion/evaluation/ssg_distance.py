"""SSG distance: how far a restored image's self-similarity is from the ground truth's. It is what SSL optimises; no weights needed."""

from __future__ import annotations

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.fidelity import crop
from sslsr_diffusion.ops import SelfSimilarityLoss, laplacian_edge_mask


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

    Raises:
        UserError: shapes differ, or the images are too small.
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
