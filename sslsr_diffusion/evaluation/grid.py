"""The grid meter: how far a raster of 8 or 16 pixels, as patch-based transformers leave it, stands out of a picture's spectrum."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.fidelity import crop, luma
from sslsr_diffusion.images import resize_bicubic

PERIOD = 16  # pixels; the lines of a raster of 8 are among those of one of 16
LEAST = 128  # pixels: lines of a shorter side fill the neighbourhood that they are measured against
_NEIGHBOURS = 12  # bins on each side; a Hann window spreads a line over one of them
_ROUNDING = 1 / 6 * 3 / 8  # power per sample of the difference of pixels rounded to 8 bits, behind a Hann window


@torch.no_grad()
def grid(restored: Tensor, lr: Tensor | None = None, *, crop_border: int = 0, y_channel: bool = False) -> Tensor:
    """The highest spectral line at k / 16 cycles per pixel, k = 1..8, of both axes, in dB over its neighbourhood; lower is better.

    With the low-resolution picture, minus the same number of its bicubic enlargement: what the model added.

    Args:
        restored: [B, 3, H, W] float in [0, 1]; at least 128 x 128 after the cut.
        lr: [B, 3, h, w] float in [0, 1], or None.
        crop_border: pixels cut from each side of the (enlarged) picture first.
        y_channel: not used: the spectrum is that of the luma in any case.

    Returns:
        [B] float64 on the CPU.
    Raises UserError: the picture is too small.
    """
    found = _highest(crop(restored, crop_border))
    if lr is None:
        return found
    bicubic = resize_bicubic(lr.float(), (restored.shape[-2], restored.shape[-1])).clamp(0, 1)
    return found - _highest(crop(bicubic, crop_border))


def line_heights(picture: Tensor, axis: int) -> Tensor:
    """10 log10 of the spectrum along an axis over the median of the 11 bins on each side of a line: a raster's lines stand out of 0.

    The spectrum is the median over the other axis of |rfft(hann * difference of the luma)|^2, plus what rounding to 8 bits would add:
    no eye sees lines below that, and bicubic enlargement leaves some.

    Args:
        picture: [3, H, W] float in [0, 1].
        axis: -1 along the rows, -2 along the columns.

    Returns:
        [n / 2 + 1] float64 on the CPU: 0 to 1/2 cycles per pixel; n is a multiple of 16, so each line is a bin.
    """
    differences = luma(picture[None].double().cpu())[0, 0].diff(dim=axis).movedim(axis, -1)  # [other axis, n]
    samples = differences.shape[-1] // PERIOD * PERIOD
    window = torch.hann_window(samples, dtype=torch.float64)
    power = torch.fft.rfft(differences[:, :samples] * window).abs().square().median(dim=0).values + samples * _ROUNDING
    around = F.pad(power[None], (_NEIGHBOURS, _NEIGHBOURS), mode="reflect")[0].unfold(0, 2 * _NEIGHBOURS + 1, 1)  # a spectrum is even
    level = torch.cat([around[:, : _NEIGHBOURS - 1], around[:, _NEIGHBOURS + 2 :]], dim=1).median(dim=1).values
    return 10 * torch.log10(power / level)


def _highest(pictures: Tensor) -> Tensor:
    height, width = pictures.shape[-2:]
    if min(height, width) < LEAST:
        raise UserError(f"grid needs at least {LEAST} x {LEAST} pixels, got {width} x {height}; cut less, or restore larger pictures.")
    lines = [torch.cat([line_heights(picture, axis)[_places(picture.shape[axis])] for axis in (-1, -2)]) for picture in pictures]
    return torch.stack(lines).amax(dim=1)


def _places(side: int) -> slice:
    """The bins of the lines k = 1..8 along a side of so many pixels."""
    step = (side - 1) // PERIOD
    return slice(step, None, step)
