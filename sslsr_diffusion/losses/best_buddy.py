"""The best-buddy loss of BebyGAN: each patch of the prediction may take its target from anywhere in the ground truth."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sslsr_diffusion.losses.base import NoiseGate, SampleLoss, pixels
from sslsr_diffusion.types import Outputs

PATCH = 3
SCALES = (1.0, 0.5, 0.25)  # of the ground truth, among whose patches the buddies are looked for


class BestBuddySettings(NoiseGate):
    """L1 of each 3 x 3 patch to its best buddy among those of the ground truth at three scales (BebyGAN)."""

    kind: Literal["best_buddy"] = "best_buddy"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum (BebyGAN: 1).")

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        least = round(PATCH / min(SCALES))
        if side < least:
            yield "kind", f"best_buddy needs pictures of at least {least} pixels a side, these have {side}."


class BestBuddyLoss(SampleLoss):
    """mean |p - b(p)| over the patches p of sr,   b(p) = argmin_c |p - c|^2 + |q - c|^2   (Li et al., AAAI 2022, equations 3 and 4)

    q is the patch of hr at the same place, c any patch of hr at 1, 1/2 and 1/4 of its size. Patches stand side by side, so the last one
    or two rows and columns of a side that 3 does not divide are left out. No gradient goes through the choice.
    """

    settings_class = BestBuddySettings

    def errors(self, outputs: Outputs) -> Tensor:
        sr, hr = pixels(outputs)
        patches = _patches(sr)
        return (patches - best_buddies(sr, hr)).abs().flatten(1).mean(dim=1)


@torch.no_grad()
def best_buddies(sr: Tensor, hr: Tensor) -> Tensor:
    """[B, 3, H, W] twice -> [B, N, 27], the best buddy of each of the N patches of sr; on a tie the first."""
    smaller = [hr if scale == 1 else F.interpolate(hr, scale_factor=scale, mode="bicubic", align_corners=False) for scale in SCALES]
    candidates = torch.cat([_patches(picture) for picture in smaller], dim=1)  # [B, M, 27]
    both = _patches(sr) + _patches(hr)
    found = []
    for own, among in zip(both, candidates):  # one at a time: N x M distances are large
        # |p - c|^2 + |q - c|^2 = 2 |c|^2 - 2 c . (p + q) + what c does not change
        found.append(among[(among.square().sum(dim=1) - own @ among.T).argmin(dim=1)])
    return torch.stack(found)


def _patches(pictures: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, N, C * 9], side by side."""
    return F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2)
