"""What a caller may hand in as an image, as float32 tensors in [0, 1]; and the way back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt")
_FULL = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}


def to_tensors(image: Any) -> list[Tensor]:
    """Every picture as [3, h, w] float32 in [0, 1], on the device it came from.

    Args:
        image: a PIL image; an array [h, w, 3], [h, w] or [B, h, w, 3] (float in [0, 1], uint8 or uint16); a tensor [3, h, w] or
            [B, 3, h, w] (float in [0, 1] or uint8); or a list of these.
    UserError where something else was given, or values outside [0, 1].
    """
    if isinstance(image, Sequence) and not isinstance(image, str | bytes):
        pictures = [picture for entry in image for picture in to_tensors(entry)]
        if not pictures:
            raise UserError("image: expected at least one picture, got an empty list.")
        return pictures
    if isinstance(image, PIL.Image.Image):
        return [_from_array(_pil_array(image))]
    if isinstance(image, np.ndarray):
        return [_from_array(each) for each in image] if image.ndim == 4 else [_from_array(image)]
    if isinstance(image, Tensor):
        return [_checked(each) for each in image] if image.ndim == 4 else [_checked(image)]
    raise UserError(f"image: expected a PIL image, an array, a tensor or a list of them, got {type(image).__name__}.")


def _pil_array(image: PIL.Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit gray; convert("RGB") would clip it to 255
        return np.asarray(image).astype(np.uint16)
    return np.array(image.convert("RGB"))


def _from_array(array: np.ndarray) -> Tensor:
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise UserError(f"image: expected an array [h, w, 3], got shape {list(array.shape)}; drop alpha, put channels last.")
    full = _FULL.get(array.dtype)
    if full is None and not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"image: expected float in [0, 1], uint8 or uint16, got {array.dtype}.")
    scaled = array.astype(np.float32)
    return _checked(torch.from_numpy(np.ascontiguousarray((scaled / np.float32(full) if full else scaled).transpose(2, 0, 1))))


def _checked(picture: Tensor) -> Tensor:
    if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape:
        raise UserError(f"image: expected a tensor [3, h, w] or [B, 3, h, w], got {list(picture.shape)}.")
    picture = picture.float() / 255.0 if picture.dtype == torch.uint8 else picture.float()
    low, high = picture.aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails as well
        raise UserError(f"image: expected values in [0, 1], got {low.item():.3g} to {high.item():.3g}; scale the picture first.")
    return picture.clamp(0, 1)


def from_tensors(pictures: list[Tensor], output_type: str) -> Any:
    """[3, H, W] tensors as PIL images (list), arrays [B, H, W, 3] or a tensor [B, 3, H, W]; a list where the sizes differ."""
    same = len({picture.shape for picture in pictures}) == 1
    if output_type == "pt":
        return torch.stack(pictures) if same else pictures
    arrays = [picture.permute(1, 2, 0).cpu().numpy() for picture in pictures]
    if output_type == "np":
        return np.stack(arrays) if same else arrays
    # rounded; the original truncates, which darkens by half a step
    return [PIL.Image.fromarray((array * 255).round().astype(np.uint8)) for array in arrays]
