"""SwinIR (Liang et al., ICCV Workshops 2021): spandrel's network, padded as the published training and test code pad it."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from spandrel.architectures.SwinIR import SwinIR as Windows
from spandrel.architectures.SwinIR import SwinIRArch
from spandrel.architectures.SwinIR.__arch.SwinIR import SwinTransformerBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sslsr_diffusion.images import pad_to

_PUBLISHED = {  # SwinIR-M, where nothing else is given
    "upscale": 4,
    "img_size": 64,
    "window_size": 8,
    "depths": [6] * 6,
    "embed_dim": 180,
    "num_heads": [6] * 6,
    "mlp_ratio": 2.0,
    "upsampler": "pixelshuffle",
}


class _Block(SwinTransformerBlock):
    """spandrel's block with a mask in its own precision, made without a loop; else bfloat16 would meet float32."""

    def calculate_mask(self, x_size: tuple[int, int]) -> Tensor:
        """[windows, window^2, window^2]: -100 between pixels that the roll brought together, else 0."""
        window, shift = self.window_size, self.shift_size
        dtype = self.norm1.weight.dtype
        if not shift:
            return torch.zeros(1, window**2, window**2, dtype=dtype)
        rows, columns = (np.digitize(np.arange(side), (side - window, side - shift)) for side in x_size)
        region = rows[:, None] * 3 + columns
        region = region.reshape(x_size[0] // window, window, x_size[1] // window, window).swapaxes(1, 2).reshape(-1, window**2)
        return torch.from_numpy(np.where(region[:, None] == region[:, :, None], 0.0, -100.0)).to(dtype)


class SwinIR(Windows):
    """Pads both sides to multiples of the window, and cuts the picture again. Arguments and tensor names are the authors'.

    Args:
        extra_window: always pad by mirroring with the edge repeated, by one more window than is needed where the sides fit already:
            what the authors' test script and the published SSL training do, so what published weights have seen. False: pad where
            the sides do not fit, by reflection. The two differ over the whole picture, because windows and masks lie elsewhere.
    """

    multiple_of: int
    has_branch: ClassVar[bool] = False
    takes_half: ClassVar[bool] = False
    sees = None

    def __init__(self, *, extra_window: bool = True, **arguments: Any) -> None:
        if not isinstance(extra_window, bool):
            raise ValueError(f"extra_window: expected true or false, got {extra_window!r}")
        with _quiet():
            super().__init__(**{**_PUBLISHED, **arguments})
        self.extra_window, self.scale, self.multiple_of = extra_window, int(self.upscale), int(self.window_size)
        for layer in self.layers:
            for block in layer.residual_group.blocks:
                block.__class__ = _Block
        self.arguments = {**self.hyperparameters, "extra_window": extra_window}

    def forward(self, lr: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, 3, scale h, scale w]"""
        window, (height, width) = self.multiple_of, lr.shape[-2:]
        more = 1 if self.extra_window else 0
        sides = [((side + (0 if more else window - 1)) // window + more) * window for side in (height, width)]
        picture = super().forward(pad_to(lr, sides[0], sides[1], repeat_edge=self.extra_window))
        return picture[..., : height * self.scale, : width * self.scale]

    def enable_gradient_checkpointing(self) -> None:
        """Each block is computed again in the backward pass."""
        for layer in self.layers:
            for block in layer.residual_group.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    @classmethod
    def renamed(cls, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors

    @classmethod
    def arguments_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """What spandrel finds by names and shapes; None also for a SwinIR that folds its input first, which spandrel reads alone."""
        if not SwinIRArch().detect(tensors) or "conv_first.1.weight" in tensors:
            return None
        with _quiet():
            return dict(SwinIRArch().load(dict(tensors)).model.hyperparameters)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's word on how the network calls meshgrid."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
        yield
