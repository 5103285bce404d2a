"""The networks in overlapping tiles: encoding and decoding of large pictures, one prediction for a whole latent, a picture through
an autoencoder and back (how an autoencoder alone is judged)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.inference.progress import piece
from sslsr_diffusion.inference.shared_norm import SharedGroupNorm
from sslsr_diffusion.inference.tile_plan import within_memory
from sslsr_diffusion.inference.tiling import Box, Parts, bands, blend, joined, run_tiles, tile_boxes
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Condition, Text, guided
from sslsr_diffusion.models.networks import working_dtype

log = logging.getLogger(__name__)

_TILES = (None, 512, 256, 128)  # of Reconstruct, in pixels; None: whole
_OVERLAP = 4  # a quarter of such a tile is shared


class TiledCodec:
    """A Codec for pictures of any size; with `tile` None, or pictures no larger, it is the Codec itself."""

    def __init__(self, codec: Codec, tile: int | None = None, overlap: int = 0, batch_size: int = 1) -> None:
        """Tile and overlap in latent pixels; `batch_size` tiles, or whole pictures, per call of the network."""
        self.codec, self.tile, self.overlap, self.batch_size = codec, tile, overlap, batch_size

    def encode(self, pixels: Tensor | Parts, noise: Tensor) -> Tensor:
        """`Codec.encode`. Samples are linear in mean and deviation: blending those of one noise field blends both."""
        return self._whole(_Job(lambda tiles, _: self.codec.encode(*tiles), [pixels, noise], [self.codec.scale, 1]), noise)

    def decode(self, latents: Tensor, picture: Tensor | None = None, fidelity: float = 1.0) -> Tensor:
        """`Codec.decode`, with CFW's features taken from `picture` [B, 3, H, W] tile by tile where it is given."""
        return self._whole(self._decoding(latents, picture, fidelity), latents)

    def decoded(self, latents: Tensor, picture: Tensor | Parts | None, fidelity: float) -> Callable[[], Iterator[Tensor]]:
        """`decode` of one picture in bands from the top down, as often as they are asked for; the statistics are taken once, now."""
        return self._bands(self._decoding(latents, picture, fidelity), 0, self._boxes(latents.shape[-2:]))

    def encoded_once(self, pixels: Parts, size: Sequence[int]) -> Iterator[Tensor]:
        """Latents [1, C, n, w] of one picture in bands from the top down, `size` (h, w) in all; of a codec that draws nothing."""

        def run(tiles: list[Tensor], _: list[int]) -> Tensor:
            return self.codec.encode(tiles[0], tiles[0].new_zeros(self.codec.noise_shape(tiles[0])))

        return self._bands(_Job(run, [pixels], [self.codec.scale]), 0, self._boxes(size))()

    def decoded_once(self, latents: Parts, size: Sequence[int]) -> Iterator[Tensor]:
        """`decode` of one picture in bands from the top down, from latents of `size` (h, w) that are never whole."""
        return self._bands(self._decoding(latents, None, 0), 0, self._boxes(size))()

    def _decoding(self, latents: Tensor | Parts, picture: Tensor | Parts | None, fidelity: float) -> "_Job":
        if picture is None or fidelity == 0:
            return _Job(lambda tiles, _: self.codec.decode(tiles[0]), [latents], [1])

        def run(tiles: list[Tensor], _: list[int]) -> Tensor:
            z, pixels = tiles
            _z, features = self.codec.encode_with_features(pixels, torch.zeros_like(z))
            return self.codec.decode(z, features, fidelity)

        return _Job(run, [latents, picture], [1, self.codec.scale])

    def _boxes(self, size: Sequence[int]) -> list[Box]:
        height, width = size
        return tile_boxes(height, width, self.tile or max(height, width), self.overlap if self.tile else 0)

    def _whole(self, job: "_Job", latents: Tensor) -> Tensor:
        """Picture by picture, because the tiles of one share their GroupNorm statistics; all together when there is nothing to tile."""
        boxes, samples = self._boxes(latents.shape[-2:]), range(len(latents))
        if len(boxes) == 1:
            return joined(bands(*job[:2], boxes, samples=samples, zooms=job.zooms, batch_size=self.batch_size), boxes)
        pictures = []
        for sample in samples:
            with piece(0, 2):
                made = self._bands(job, sample, boxes)
            with piece(1, 2):
                pictures.append(joined(made(), boxes))
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def _bands(self, job: "_Job", sample: int, boxes: list[Box]) -> Callable[[], Iterator[Tensor]]:
        norms = SharedGroupNorm(self.codec.vae)
        shared = norms.any and len(boxes) > 1
        if shared:
            with norms.recording():
                for _ in run_tiles(job.run, job.inputs, boxes, samples=[sample], zooms=job.zooms):
                    pass

        def run(tiles: list[Tensor], numbers: list[int]) -> Tensor:
            with norms.applying() if shared else nullcontext():  # tile by tile: between two bands the networks are as they were
                return job.run(tiles, numbers)

        return lambda: bands(run, job.inputs, boxes, samples=[sample], zooms=job.zooms, batch_size=self.batch_size, overlap=self.overlap)


class _Job(NamedTuple):
    """What runs on tiles, what they are cut from, and how many pixels of that lie along a side of a latent one."""

    run: Callable[[list[Tensor], list[int]], Tensor]
    inputs: list[Tensor | Parts]
    zooms: list[int]


class TiledDenoiser:
    """(x_t, t) -> the prediction for the whole latent canvas.

    Every tile sees its own part of the low-resolution picture; of `guided` predictions, what follows from the low-resolution picture
    is computed once for both.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        condition: Condition,
        boxes: Sequence[Box],
        *,
        negative_text: Text | None = None,
        guidance_scale: float = 1.0,
        batch_size: int = 1,
        overlap: int = 0,
        weights: str = "smooth",
    ) -> None:
        """
        Args:
            denoiser: (z_t, t, Condition) -> prediction.
            condition: of B whole pictures, float32, with one text per picture.
            boxes: tiles of equal size that cover the latent.
            negative_text: one per picture, too; None: no guidance.
            batch_size: tiles per network call (twice as many samples with guidance).
            overlap: latent pixels that neighbouring tiles share; `weights`: see `tile_weights`.
        """
        self._denoiser, self._dtype, self._condition = denoiser, working_dtype(denoiser), condition
        self._negative, self._guidance_scale = negative_text, guidance_scale
        self._boxes, self._how = boxes, dict[str, Any](batch_size=batch_size, overlap=overlap, weights=weights)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        grids = self._condition.grids

        def run(tiles: list[Tensor], samples: list[int]) -> Tensor:
            return self._predict(tiles[0], dict(zip(grids, tiles[1:])), t, samples)

        return blend(run, [x, *grids.values()], self._boxes, **self._how)

    def cleaned_once(self, z_lr: Parts, t: float, clean: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
        """clean(prediction, z_lr) for one picture that is denoised from z_lr itself, [1, C, n, w] in bands from the top down.

        `clean` is linear, so that blending what it makes of tiles blends the predictions.
        """

        def run(tiles: list[Tensor], samples: list[int]) -> Tensor:
            return clean(self._predict(tiles[0], {"z_lr": tiles[0]}, t, samples), tiles[0])

        return bands(run, [z_lr], self._boxes, **self._how)

    def _predict(self, x: Tensor, grids: dict[str, Tensor], t: float, samples: list[int]) -> Tensor:
        timestep = torch.tensor([t], device=x.device, dtype=torch.long if float(t).is_integer() else torch.float32)
        x, condition = x.to(self._dtype), self._condition.tile(grids, samples, self._dtype)
        if self._negative is None or condition.text is None:
            return self._denoiser(x, timestep.expand(len(x)), condition).float()
        negative = self._negative.each(lambda part: part[samples].to(self._dtype))
        both = condition._replace(text=negative.followed_by(condition.text))
        pred = self._denoiser(torch.cat([x, x]), timestep.expand(2 * len(x)), both).float()
        unwanted, wanted = pred.chunk(2)
        return guided(wanted, unwanted, self._guidance_scale)


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
