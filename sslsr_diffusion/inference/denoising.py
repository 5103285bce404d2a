"""The networks as the samplers see them: one prediction for the whole latent, from tiles, with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.inference.tiling import Box, blend


class TiledDenoiser:
    """(x_t, t) -> epsilon or v of the whole latent canvas: sum_tiles w out / sum_tiles w   (Wang et al., IJCV 2024, StableSR).

    Every tile sees its own part of the low-resolution latent; guided predictions are u + g (c - u), with the features
    of the structural encoder computed once for both.
    """

    def __init__(
        self,
        unet: Any,
        structural_encoder: Any,
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
            z_lr: [B, C, h, w] float32 latent of the upsampled low-resolution pictures.
            text: [1 or B, L, D] context; `negative_text` likewise, None: no guidance.
            boxes: tiles of equal size that cover h x w.
            batch_size: tiles per network call (twice as many samples with guidance).
            overlap: latent pixels that neighbouring tiles share.
            weights: see `tile_weights`.
        """
        self._unet, self._structural_encoder = unet, structural_encoder
        self._z_lr, self._boxes, self._batch_size = z_lr, boxes, batch_size
        self._overlap, self._weights = overlap, weights
        self._text, self._negative = text.expand(len(z_lr), -1, -1), negative_text
        if negative_text is not None:
            self._negative = negative_text.expand(len(z_lr), -1, -1)
        self._guidance_scale = guidance_scale

    def __call__(self, x: Tensor, t: float) -> Tensor:
        kind = torch.long if float(t).is_integer() else torch.float32
        timestep = torch.tensor([t], device=x.device, dtype=kind)

        def run(tiles: list[Tensor], samples: list[int]) -> Tensor:
            return self._predict(tiles[0], tiles[1], timestep, samples)

        return blend(run, [x, self._z_lr], self._boxes, batch_size=self._batch_size, overlap=self._overlap, weights=self._weights)

    def _predict(self, x: Tensor, z_lr: Tensor, timestep: Tensor, samples: list[int]) -> Tensor:
        dtype = self._unet.dtype
        features = self._structural_encoder(z_lr.to(self._structural_encoder.dtype), timestep.expand(len(x)))
        features = tuple(each.to(dtype) for each in features)
        x, text = x.to(dtype), self._text[samples]
        if self._negative is None:
            return self._unet(x, timestep.expand(len(x)), text.to(dtype), features=features, return_dict=False)[0].float()
        both = torch.cat([self._negative[samples], text]).to(dtype)
        pred = self._unet(torch.cat([x, x]), timestep.expand(2 * len(x)), both, features=features, return_dict=False)[0].float()
        unconditional, conditional = pred.chunk(2)
        return unconditional + self._guidance_scale * (conditional - unconditional)
