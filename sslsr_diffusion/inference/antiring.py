"""Anti-ringing: the bright and dark seams that a restored picture has beside its edges, and the low-resolution one has not."""

from torch import Tensor
from torch.nn import functional as F

from sslsr_diffusion.inference.resampling import linear_taps

RADIUS = 3  # low-resolution pixels


def antiring(restored: Tensor, low: Tensor, strength: float, rows: tuple[int, int] | None = None) -> Tensor:
    """Take back a share of what leaves the range of the low-resolution pixels around it.

    restored - strength (restored - clamp(restored, min, max)), min and max per channel over the 7x7 low-resolution pixels around,
    interpolated linearly. Video players have such a filter against the overshoot of their resamplers (mpv's `scale-antiring`); the
    neighbourhood is wider here, because a restored picture should have more contrast than its blurred input.

    Args:
        restored: [B, 3, H, W] float32; changed in place and returned.
        low: [B, 3, h, w], the same pictures before.
        strength: 0 (nothing is taken back) to 1 (nothing leaves the range).
        rows: (top, H) where `restored` is rows from `top` of a picture of H rows; `low` is whole all the same.
    """
    if strength == 0:
        return restored
    if rows is not None:
        taps = linear_taps(low.shape[-2], rows[1]).at(rows[0], rows[0] + restored.shape[-2])
        first, last = taps.span
        above = min(first, RADIUS)
        low = low[..., first - above : last + RADIUS, :]
    window, low = 2 * RADIUS + 1, low.to(restored)
    for sign in (1, -1):  # above the maximum; below the minimum, which is the maximum of the negative
        bound = F.max_pool2d(sign * low, window, stride=1, padding=RADIUS)
        bound = bound if rows is None else taps.of(bound, -2, first - above)
        excess = F.interpolate(bound, size=restored.shape[-2:], mode="bilinear", align_corners=False)
        excess.neg_().add_(restored, alpha=sign).clamp_(min=0)
        restored.sub_(excess, alpha=sign * strength)
    return restored
