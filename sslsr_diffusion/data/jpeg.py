"""JPEG compression as a function of the picture: the real-valued model of the published pipelines, and the real 8-bit codec."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sslsr_diffusion.data.filters import opencv

# Annex K of the JPEG standard. The published model uses the luma table transposed; kept, because the pipelines were tuned with it.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
# At quality 100 the factor is 0 and the published model divides 0 by 0. Its limit is no quantisation at all; this is close enough.
_LEAST_FACTOR = 1e-3


def jpeg_model(image: Tensor, quality: float | Tensor) -> Tensor:
    """Compress and decompress with real-valued quality: 4:2:0 chroma, 8x8 DCT, tables times a factor, rounding to even.

    factor = 50/q if q < 50 else 2 - q/50; the scaled tables are neither rounded nor floored at 1   (DiffJPEG, as Real-ESRGAN uses it)

    Args:
        image: [B, 3, H, W] floating point in [0, 1]; zero-padded inside to multiples of 16.
        quality: 1 to 100, one number or [B].

    Returns:
        [B, 3, H, W] in [0, 1], not rounded to 8 bits. Quality 100 is nearly lossless, never NaN.
    """
    height, width = image.shape[2:]
    factor = quality_factor(torch.as_tensor(quality, dtype=image.dtype, device=image.device).expand(len(image)))[:, None, None, None, None]
    padded = F.pad(image, (0, -width % 16, 0, -height % 16)) * 255
    red, green, blue = padded.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue - 128  # the level shift of 128 is taken here, for chroma it cancels
    blue_difference = -0.168736 * red - 0.331264 * green + 0.5 * blue
    red_difference = 0.5 * red - 0.418688 * green - 0.081312 * blue
    chroma = torch.stack([blue_difference, red_difference], 1)
    chroma = F.avg_pool2d(chroma, 2)
    luma_table, chroma_table, dct = (m.to(image) for m in _matrices())
    luma = _quantise(luma[:, None], luma_table * factor, dct)[:, 0] + 128
    chroma = _quantise(chroma, chroma_table * factor, dct)
    cb, cr = F.interpolate(chroma, scale_factor=2, mode="nearest").unbind(1)
    restored = torch.stack([luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb], 1)
    return restored[:, :, :height, :width].clamp(0, 255) / 255


def jpeg_codec(image: Tensor, quality: int) -> Tensor:
    """Compress and decompress with the real 8-bit codec (OpenCV's), as BSRGAN does; image [B, 3, H, W] in [0, 1], quality 1 to 100."""
    cv2 = opencv()
    done = []
    for one in image.cpu():
        pixels = (one.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        _, code = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
        decoded = cv2.cvtColor(cv2.imdecode(code, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        done.append(torch.from_numpy(decoded).permute(2, 0, 1))
    return torch.stack(done).to(image) / 255


def quality_factor(quality: Tensor) -> Tensor:
    """What the standard tables are multiplied with at a quality of 1 to 100; the IJG rule, real-valued."""
    return torch.where(quality < 50, 50 / quality, 2 - quality / 50).clamp(min=_LEAST_FACTOR)


def _quantise(planes: Tensor, table: Tensor, dct: Tensor) -> Tensor:
    """[B, C, H, W] -> the same through rounded 8x8 DCT coefficients; table [B, 1, 1, 8, 1, 8] broadcastable."""
    batch, channels, height, width = planes.shape
    blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8)
    blocks = torch.einsum("ui,bcyixj,vj->bcyuxv", dct, blocks, dct)
    table = table.view(-1, 1, 1, 8, 1, 8)
    blocks = (blocks / table).round_() * table
    return torch.einsum("ui,bcyuxv,vj->bcyixj", dct, blocks, dct).reshape(batch, channels, height, width)


def dct_matrix() -> NDArray[np.float64]:
    """The orthonormal DCT-II [8, 8]: rows are frequencies."""
    n = np.arange(8)
    dct = np.cos((2 * n[None] + 1) * n[:, None] * np.pi / 16) / 2
    dct[0] /= np.sqrt(2)
    return dct


@functools.cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Luma and chroma table [8, 8] and the orthonormal DCT-II matrix [8, 8]."""
    chroma = np.full((8, 8), 99.0)
    chroma[:4, :4] = _CHROMA
    return torch.tensor(LUMA, dtype=torch.float64).T.contiguous(), torch.from_numpy(chroma), torch.from_numpy(dct_matrix())
