"""Pictures by networks that enlarge pixels in one call: whole, or in tiles of the low-resolution picture where memory is short."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sslsr_diffusion.devices import free_bytes, hand_freed_blocks_back, is_out_of_memory, release_cached, shown_bytes
from sslsr_diffusion.errors import NotEnoughMemory, UserError
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.inference.memory import call_bytes, peak_activation_bytes
from sslsr_diffusion.inference.noise import Generators
from sslsr_diffusion.inference.pictures import from_tensors, to_tensors
from sslsr_diffusion.inference.placement import Placement
from sslsr_diffusion.inference.restorer import FINISHING, Finishing, Output, accepted, by_size, check_call, enlarged
from sslsr_diffusion.inference.tile_plan import Tile, check_tile
from sslsr_diffusion.inference.tiling import blend, pad_to, tile_boxes
from sslsr_diffusion.models.family import Family
from sslsr_diffusion.models.networks import PixelNetworks

log = logging.getLogger(__name__)

_SIDES = (4096, 2048, 1024, 768, 512, 384, 256, 192, 128)  # of tiles, in output pixels
_MEASURED = 64  # low-resolution pixels along a side of the shape run
_PICTURES = 5  # float32 copies of the whole output picture at once, at most


class DirectRestorer:
    """A restorer around PixelNetworks, which may still be training."""

    def __init__(self, networks: PixelNetworks, *, scale: float | None = None, defaults: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            scale: the enlargement of a call that names none; None: the networks' own.
            defaults: of `color_fix`, `antiring` and `detail`.
        """
        self.networks, self.scale = networks, float(scale or networks.scale)
        given = {**networks.call_defaults, **(defaults or {})}
        self.defaults: dict[str, Any] = {"color_fix": "none", **{name: value for name, value in given.items() if name in FINISHING}}
        self._limit: int | None = None  # side above which memory ran out in this process
        self._floats: float | None = None
        self._notes: list[str] = []

    @classmethod
    def open(cls, family: Family, path: Path, placement: Placement) -> DirectRestorer:
        """A model's files as a restorer on a device."""
        return cls(cast(PixelNetworks, family.read(path).to(placement.device, placement.dtype)))

    @property
    def options(self) -> frozenset[str]:
        return FINISHING | {"tile", "tile_overlap", "memory_budget"}

    @torch.no_grad()
    def __call__(
        self, image: Any, *, scale: float | None = None, generator: Generators = None, output_type: str = "pil", **call: Any
    ) -> Output:
        """See `Restorer`; nothing in it is random, so `generator` has no effect."""
        scale = self.scale if scale is None else scale
        check_call(scale, output_type)
        self._notes = []
        given = {**self.defaults, **{k: v for k, v in accepted(call, self.options, self._notes).items() if v is not None or k == "tile"}}
        finishing = Finishing(**{name: given.pop(name) for name in FINISHING & given.keys()})
        finishing.check()
        pictures = to_tensors(image)
        restored: list[Tensor] = []
        for group in by_size(pictures):
            batch = torch.stack([pictures[k] for k in group])
            wanted = enlarged(batch, scale)
            own = self._enlarge(batch, **given)
            if own.shape != wanted.shape:
                own = resize_bicubic(own, (wanted.shape[-2], wanted.shape[-1]))
            restored.extend(finishing(own, wanted, batch))
        return Output(from_tensors(restored, output_type), self._notes)

    def save(self, folder: Path) -> None:
        self.networks.save(folder, scale=self.scale, **self.defaults)

    def _enlarge(self, pictures: Tensor, tile: Tile = "auto", tile_overlap: int | None = None, memory_budget: int | None = None) -> Tensor:
        """[B, 3, h, w] -> [B, 3, scale h, scale w] float32 on the CPU, in tiles as large as memory allows."""
        nets, size = self.networks, self.networks.size()
        zoom, unit = nets.scale, max(1, size.multiple_of // nets.scale)
        height, width = (-(-max(side * zoom, size.minimum) // (unit * zoom)) * unit for side in pictures.shape[-2:])
        padded = pad_to(pictures, height, width)
        side = self._side(tile, max(height, width), len(pictures), memory_budget)
        while True:
            overlap = min(side // 8 if tile_overlap is None else tile_overlap // zoom, side // 2)
            try:
                return self._run(padded, side, overlap)[..., : pictures.shape[-2] * zoom, : pictures.shape[-1] * zoom]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            device = next(nets.parameters()).device  # outside of the handler, where the traceback would keep the failed call's tensors
            release_cached(device)
            smaller = self._candidates(side - 1)
            if not smaller:
                raise NotEnoughMemory(f"out of memory even with tiles of {side * zoom} pixels; lower the scale, or use another device.")
            self._notes.append(f"out of memory: tile {side * zoom} -> {smaller[0] * zoom}")
            log.warning("%s", self._notes[-1])
            side = self._limit = smaller[0]

    def _run(self, padded: Tensor, side: int, overlap: int) -> Tensor:
        parameter = next(self.networks.parameters())

        def run(tiles: list[Tensor], _: list[int]) -> Tensor:
            return self.networks(tiles[0].to(parameter.device, parameter.dtype)).float().cpu()

        boxes = tile_boxes(padded.shape[-2], padded.shape[-1], side, overlap)
        return blend(run, [padded.cpu()], boxes, overlap=overlap)

    def _candidates(self, most: int) -> list[int]:
        unit = max(1, self.networks.size().multiple_of // self.networks.scale)
        return [side for side in dict.fromkeys(s // self.networks.scale // unit * unit for s in _SIDES) if 0 < side <= most]

    def _side(self, tile: Tile, longest: int, pictures: int, budget: int | None) -> int:
        """Side of a tile in low-resolution pixels: what was asked for, or the largest that fits."""
        zoom, size = self.networks.scale, self.networks.size()
        if tile is None:
            return longest
        if tile != "auto":
            check_tile(tile, size.multiple_of * (zoom if size.multiple_of % zoom else 1), "tile")
            return min(tile // zoom, longest)
        parameter = next(self.networks.parameters())
        if budget is not None and parameter.device.type == "cpu":
            hand_freed_blocks_back()
        room = budget if budget is not None else free_bytes(parameter.device)
        beside = 4 * 3 * _PICTURES * pictures * (longest * zoom) ** 2
        beside += sum(p.numel() for p in self.networks.parameters()) * parameter.dtype.itemsize if budget is not None else 0
        sides = [side for side in (longest, *self._candidates(longest - 1)) if self._limit is None or side <= self._limit]
        for side in sides:
            if beside + self._bytes(side, parameter, steady=budget is not None) <= room:
                return side
        least = beside + self._bytes(sides[-1], parameter, steady=True)
        if budget is not None:
            raise NotEnoughMemory(
                f"memory_budget: {shown_bytes(budget)} is too little for this picture; the least is {shown_bytes(least)}.", least
            )
        return sides[-1]

    def _bytes(self, side: int, parameter: Tensor, *, steady: bool) -> int:
        """Estimated peak of a call on one tile; activations grow with the area, so one shape run is enough."""
        if self._floats is None:
            shapes = self.networks.shapes().float().eval()
            low = torch.empty(1, 3, _MEASURED, _MEASURED, device="meta")
            self._floats = peak_activation_bytes(shapes, lambda: shapes(low)) / 4 / _MEASURED**2
        largest = max(p.numel() for p in self.networks.parameters())
        return call_bytes(
            self._floats * side * side * parameter.dtype.itemsize, largest * parameter.dtype.itemsize, parameter.device.type, steady
        )


def check_scale(scale: float, networks: PixelNetworks) -> None:
    """Raises UserError where a recipe's scale is not the networks' own."""
    if scale != networks.scale:
        raise UserError(f"scale: these networks enlarge {networks.scale} times, got {scale}; set scale: {networks.scale}.")
