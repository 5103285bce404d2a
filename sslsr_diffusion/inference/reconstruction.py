"""A picture through an autoencoder and back, in tiles where memory is short: how an autoencoder alone is judged."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from sslsr_diffusion.devices import is_out_of_memory, release_cached
from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.inference.codec_tiles import TiledCodec
from sslsr_diffusion.models.codec import Codec

log = logging.getLogger(__name__)

_TILES = (None, 512, 256, 128)  # pixels; None: whole
_OVERLAP = 4  # a quarter of the tile is shared


class Reconstruct:
    """decode(encode(picture)), picture by picture; a tile size at which memory ran out is not tried again."""

    def __init__(self, codec: Codec) -> None:
        self._codec, self._tiles = codec, list(_TILES)

    def __call__(self, picture: Tensor, seed: int) -> Tensor:
        """[1, 3, H, W] in [0, 1] of any size -> the same size, about [0, 1]; the posterior's noise is drawn from `seed`.

        Raises:
            NotEnoughMemory: the smallest tiles are too large.
        """
        device = next(self._codec.vae.parameters()).device
        while True:
            try:
                return self._run(picture.to(device), seed)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            release_cached(device)
            failed = self._tiles[0]
            if len(self._tiles) == 1:
                raise NotEnoughMemory(f"out of memory even with tiles of {failed} pixels; lower validation.size.")
            self._tiles.pop(0)
            log.warning("out of memory with tiles of %s pixels: going on with %s", failed or "all", self._tiles[0])

    def _run(self, picture: Tensor, seed: int) -> Tensor:
        height, width = picture.shape[-2:]
        scale, tile = self._codec.scale, self._tiles[0]
        padded = F.pad(picture, (0, -width % scale, 0, -height % scale), mode="replicate")
        noise = torch.randn(self._codec.noise_shape(padded), generator=torch.Generator().manual_seed(seed)).to(picture)
        cells = (None, 0) if tile is None else (tile // scale, tile // scale // _OVERLAP)
        codec = TiledCodec(self._codec, *cells)
        return codec.decode(codec.encode(padded, noise))[..., :height, :width]
