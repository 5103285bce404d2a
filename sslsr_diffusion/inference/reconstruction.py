"""A picture through an autoencoder and back, in tiles where memory is short: how an autoencoder alone is judged."""

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.inference.codec_tiles import TiledCodec
from sslsr_diffusion.inference.tile_plan import within_memory
from sslsr_diffusion.models.codec import Codec

log = logging.getLogger(__name__)

_TILES = (None, 512, 256, 128)  # pixels; None: whole
_OVERLAP = 4  # a quarter of the tile is shared


class Reconstruct:
    """decode(encode(picture)), picture by picture; a tile size at which memory ran out is not tried again."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._tile: int | None = _TILES[0]

    def __call__(self, picture: Tensor, seed: int) -> Tensor:
        """[1, 3, H, W] in [0, 1] of any size -> the same size, about [0, 1]; the posterior's noise is drawn from `seed`.

        Raises NotEnoughMemory where the smallest tiles are too large.
        """
        device = next(self._codec.vae.parameters()).device
        return within_memory(lambda tile: self._run(picture.to(device), seed, tile), self._tile, self._smaller, device)[0]

    def _smaller(self, tile: int | None) -> int | None:
        if tile == _TILES[-1]:
            raise NotEnoughMemory(f"out of memory even with tiles of {tile} pixels; lower validation.size.")
        self._tile = _TILES[_TILES.index(tile) + 1]
        log.warning("out of memory with tiles of %s pixels: going on with %s", tile or "all", self._tile)
        return self._tile

    def _run(self, picture: Tensor, seed: int, tile: int | None) -> Tensor:
        height, width = picture.shape[-2:]
        scale = self._codec.scale
        padded = F.pad(picture, (0, -width % scale, 0, -height % scale), mode="replicate")
        noise = torch.randn(self._codec.noise_shape(padded), generator=torch.Generator().manual_seed(seed)).to(picture)
        cells = (None, 0) if tile is None else (tile // scale, tile // scale // _OVERLAP)
        codec = TiledCodec(self._codec, *cells)
        return codec.decode(codec.encode(padded, noise))[..., :height, :width]
