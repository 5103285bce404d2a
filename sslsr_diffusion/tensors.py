from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike, NDArray

Pixels = NDArray[np.uint8 | np.uint16]

if TYPE_CHECKING:
    from torch import Tensor


def to_tensor(array: NDArray[np.generic]) -> "Tensor":
    """x / (2**bits - 1): whole numbers become float32 in [0, 1].

    Args:
        array: [H, W, C] or [H, W] uint8 or uint16.
    Returns:
        [C, H, W] float32 (C = 1 for [H, W]).
    Raises ValueError: another dtype or number of dimensions.
    """
    import torch

    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3):
        raise ValueError(f"expected [H, W] or [H, W, C] of uint8 or uint16, got {array.dtype} {list(array.shape)}")
    planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    values = np.ascontiguousarray(planes, dtype=np.float32)
    return torch.from_numpy(values / np.float32(255 if array.dtype == np.uint8 else 65535))


def to_array(tensor: "Tensor", dtype: DTypeLike = np.uint8) -> Pixels:
    """round(clamp(x, 0, 1) * (2**bits - 1)).

    Args:
        tensor: [C, H, W] floating point, any device.
        dtype: np.uint8 or np.uint16.
    Returns:
        [H, W, C] of that dtype.
    Raises ValueError: another dtype or shape, or a value that is not a number (NaN would become an arbitrary colour).
    """
    import torch

    if np.dtype(dtype) not in (np.uint8, np.uint16) or tensor.ndim != 3 or not tensor.is_floating_point():
        raise ValueError(f"expected a floating tensor [C, H, W] and uint8 or uint16, got {list(tensor.shape)} {tensor.dtype}, {dtype}")
    values = tensor.detach().to("cpu", torch.float32)
    if torch.isnan(values).any():
        raise ValueError("the picture has values that are not a number (NaN)")
    top = int(np.iinfo(np.dtype(dtype)).max)
    whole = (values.clamp(0, 1) * top).round().permute(1, 2, 0).contiguous().numpy()
    return whole.astype(dtype)


def resize_bicubic(image: "Tensor", size: tuple[int, int]) -> "Tensor":
    """Bicubic resampling with half-pixel centres: the one that "LR upsampled" means everywhere.

    Enlarging uses torch's kernel (a = -0.75); shrinking either side widens the kernel (antialias, a = -0.5 as in Pillow).

    Args:
        image: [B, C, H, W] floating point; differentiable.
        size: (H', W') of the result.
    Returns:
        [B, C, H', W'], not clamped: bicubic overshoots at edges.
    """
    from torch.nn.functional import interpolate

    if tuple(image.shape[-2:]) == tuple(size):
        return image
    shrinks = size[0] < image.shape[-2] or size[1] < image.shape[-1]
    if shrinks and size[1] == 1 < size[0]:  # torch 2.14 gets the rows of a single column wrong, and the columns of a single row right
        return resize_bicubic(image.mT.contiguous(), (1, size[0])).mT
    return interpolate(image, size=size, mode="bicubic", align_corners=False, antialias=shrinks)


def pad_to(image: "Tensor", height: int, width: int, *, repeat_edge: bool = False) -> "Tensor":
    """[..., H, W] continued on the right and below by reflection, folded as often as a small picture needs.

    `repeat_edge`: the last row and column come twice, as in a mirror (NumPy's "symmetric" in the place of its "reflect").
    """
    if image.shape[-2:] == (height, width):
        return image
    rows, columns = (folded(length, wanted, repeat_edge).to(image.device) for length, wanted in zip(image.shape[-2:], (height, width)))
    return image.index_select(-2, rows).index_select(-1, columns)


def folded(length: int, wanted: int, repeat_edge: bool = False) -> "Tensor":
    """Indices 0 .. length-1 .. 0 .. length-1 ..."""
    import torch

    twice = 1 if repeat_edge else 0
    period = max(1, 2 * (length - 1 + twice))
    index = torch.arange(wanted) % period
    return torch.minimum(index, period - twice - index) if length > 1 else torch.zeros_like(index)
