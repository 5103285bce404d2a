"""Encoding and decoding of large pictures in overlapping tiles."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sslsr_diffusion.inference.shared_norm import SharedGroupNorm
from sslsr_diffusion.inference.tiling import blend, tile_boxes
from sslsr_diffusion.models.codec import Codec


class TiledCodec:
    """A Codec for pictures of any size; with `tile` None, or pictures no larger, it is the Codec itself."""

    def __init__(self, codec: Codec, tile: int | None = None, overlap: int = 0, batch_size: int = 1) -> None:
        """Tile and overlap in latent pixels; `batch_size` tiles, or whole pictures, per call of the network."""
        self.codec, self.tile, self.overlap, self.batch_size = codec, tile, overlap, batch_size

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """`Codec.encode`. Samples are linear in mean and deviation: blending those of one noise field blends both."""

        def run(tiles: list[Tensor], _: list[int]) -> Tensor:
            return self.codec.encode(*tiles)

        return self._by_picture(run, [pixels, noise], [self.codec.scale, 1], noise.shape[-2:])

    def decode(self, latents: Tensor, picture: Tensor | None = None, fidelity: float = 1.0) -> Tensor:
        """`Codec.decode`, with CFW's features taken from `picture` [B, 3, H, W] tile by tile where it is given."""
        size = latents.shape[-2:]
        if picture is None or fidelity == 0:
            return self._by_picture(lambda tiles, _: self.codec.decode(tiles[0]), [latents], [1], size)

        def run(tiles: list[Tensor], _: list[int]) -> Tensor:
            z, pixels = tiles
            _z, features = self.codec.encode_with_features(pixels, torch.zeros_like(z))
            return self.codec.decode(z, features, fidelity)

        return self._by_picture(run, [latents, picture], [1, self.codec.scale], size)

    def _by_picture(
        self, run: Callable[[list[Tensor], list[int]], Tensor], inputs: Sequence[Tensor], zooms: Sequence[int], size: Sequence[int]
    ) -> Tensor:
        """Picture by picture, because the tiles of one share their GroupNorm statistics; all together when there is nothing to tile."""
        height, width = size
        boxes = tile_boxes(height, width, self.tile or max(size), self.overlap if self.tile else 0)
        if len(boxes) == 1:
            return blend(run, inputs, boxes, zooms=zooms, batch_size=self.batch_size)
        pictures = []
        for sample in range(len(inputs[0])):
            own = [x[sample : sample + 1] for x in inputs]
            norms = SharedGroupNorm(self.codec.vae)
            with norms.recording():
                for box in boxes:
                    run([box.scaled(z).of(x) for x, z in zip(own, zooms)], [0])
            with norms.applying():
                pictures.append(blend(run, own, boxes, zooms=zooms, batch_size=self.batch_size, overlap=self.overlap))
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)
