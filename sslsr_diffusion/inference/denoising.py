"""The denoiser as the samplers see it: one prediction for the whole latent, from tiles, with guidance."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sslsr_diffusion.inference.tiling import Box, blend
from sslsr_diffusion.models.condition import Condition


class TiledDenoiser:
    """(x_t, t) -> the prediction for the whole latent canvas.

    Every tile sees its own part of the low-resolution latent; guided predictions are u + g (c - u), with the features
    of the low-resolution latent computed once for both (Condition.z_lr).
    """

    def __init__(
        self,
        denoiser: nn.Module,
        z_lr: Tensor,
        text: Tensor,
        boxes: Sequence[Box],
        *,
        negative_text: Tensor | None = None,
        guidance_scale: float = 1.0,
        batch_size: int = 1,
        overlap: int = 0,
        weights: str = "smooth",
    ) -> None:
        """
        Args:
            denoiser: (z_t, t, Condition) -> prediction.
            z_lr: [B, C, h, w] float32 latent of the enlarged low-resolution pictures.
            text: [1 or B, L, D] context; `negative_text` likewise, None: no guidance.
            boxes: tiles of equal size that cover h x w.
            batch_size: tiles per network call (twice as many samples with guidance).
            overlap: latent pixels that neighbouring tiles share; `weights`: see `tile_weights`.
        """
        self._denoiser, self._dtype, self._z_lr = denoiser, next(denoiser.parameters()).dtype, z_lr
        self._text = text.expand(len(z_lr), -1, -1)
        self._negative = None if negative_text is None else negative_text.expand(len(z_lr), -1, -1)
        self._guidance_scale = guidance_scale
        self._blend = partial(blend, boxes=boxes, batch_size=batch_size, overlap=overlap, weights=weights)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        kind = torch.long if float(t).is_integer() else torch.float32
        timestep = torch.tensor([t], device=x.device, dtype=kind)

        def run(tiles: list[Tensor], samples: list[int]) -> Tensor:
            return self._predict(tiles[0], tiles[1], timestep, samples)

        return self._blend(run, [x, self._z_lr])

    def _predict(self, x: Tensor, z_lr: Tensor, timestep: Tensor, samples: list[int]) -> Tensor:
        x, z_lr, text = x.to(self._dtype), z_lr.to(self._dtype), self._text[samples]
        if self._negative is None:
            return self._denoiser(x, timestep.expand(len(x)), Condition(z_lr, text.to(self._dtype))).float()
        both = torch.cat([self._negative[samples], text]).to(self._dtype)
        pred = self._denoiser(torch.cat([x, x]), timestep.expand(2 * len(x)), Condition(z_lr, both)).float()
        unconditional, conditional = pred.chunk(2)
        return unconditional + self._guidance_scale * (conditional - unconditional)
