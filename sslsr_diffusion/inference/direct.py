"""Pictures by networks that enlarge pixels in one call: whole, or in tiles of the low-resolution picture where memory is short."""

import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from sslsr_diffusion.devices import bfloat16_pays, free_bytes, hand_freed_blocks_back, shown_bytes
from sslsr_diffusion.errors import NotEnoughMemory, UserError
from sslsr_diffusion.files import usual_modes
from sslsr_diffusion.images import pad_to, resize_bicubic
from sslsr_diffusion.inference.memory import call_bytes, peak_activation_bytes
from sslsr_diffusion.inference.noise import Generators
from sslsr_diffusion.inference.options import CallOptions
from sslsr_diffusion.inference.pictures import from_tensors, to_tensors
from sslsr_diffusion.inference.placement import Placement
from sslsr_diffusion.inference.restorer import AroundNetworks, Described, Output, by_size, enlarged, enlarged_size, settled
from sslsr_diffusion.inference.tile_plan import check_tile, within_memory
from sslsr_diffusion.inference.tiling import Strip, blend, even_boxes, rounded_up, strips_of_tiles, tile_offsets
from sslsr_diffusion.models.compiled import compile_parts, eagerly
from sslsr_diffusion.models.family import Family
from sslsr_diffusion.models.networks import PixelNetworks
from sslsr_diffusion.models.size import SizeRequirements

log = logging.getLogger(__name__)

_SIDES = (4096, 2048, 1024, 768, 512, 384, 256, 192, 128)  # of tiles, in output pixels
_SAMPLE = 128  # output pixels along a side of the picture that precisions are compared on
_MEASURED = 64  # low-resolution pixels along a side of the shape run
FALLBACK = {"color_fix": "none"}  # what a call takes where neither it nor the model names one
_PICTURES = 5  # float32 copies of the whole output picture at once, at most


class DirectRestorer(AroundNetworks[CallOptions]):
    """A restorer around PixelNetworks, which may still be training. Whole pictures stay where they are; tiles go to the networks."""

    kind = CallOptions

    def __init__(self, networks: PixelNetworks, *, scale: float | None = None, defaults: Mapping[str, Any] | None = None) -> None:
        self.networks = networks
        super().__init__(networks, scale, defaults, {"scale": networks.scale, **FALLBACK})
        self._limit: int | None = None  # side above which memory ran out in this process
        self._floats: float | None = None

    @classmethod
    def open(cls, family: Family, path: Path, placement: Placement) -> Self:
        """A model's files as a restorer on a device."""
        networks = cast(PixelNetworks, family.read(path)).eval().requires_grad_(False)
        networks.economize(gradient_checkpointing=False, channels_last=True)
        dtype = networks.taken(placement.dtype)
        if dtype != placement.dtype:
            log.warning("these networks do not work in %s: %s takes its place", placement.dtype, dtype)
        if placement.may_be_faster and bfloat16_pays() and _same_in_bfloat16(networks):
            dtype = torch.bfloat16
            log.info("bfloat16, which this processor computes faster, makes the same picture to 1/255 on the mean")
        networks.to(placement.device, dtype)
        if placement.compile:
            compile_parts(networks.components(), placement.device, field="compile")
        return cls(networks, defaults=placement.defaults)

    @classmethod
    def describe(cls, family: Family, path: Path) -> Described:
        """No file of these tells the shapes of its networks without its weights, and no option depends on them."""
        own = {**FALLBACK, **family.call_defaults(path)}
        options = cls.kind.names()
        return Described(options, {name: value for name, value in own.items() if name in options})

    def check(self, **call: Any) -> list[str]:
        options, notes = settled(CallOptions, call, self.options, self.defaults)
        self._check_tiles(options)
        return notes

    @torch.no_grad()
    def __call__(
        self, image: Any, *, scale: float | None = None, generator: Generators = None, output_type: str = "pil", **call: Any
    ) -> Output:
        """See `Restorer`; nothing in it is random, so `generator` has no effect. `call` are fields of CallOptions."""
        scale, options, notes = self._settled(call, scale, output_type)
        self._check_tiles(options)
        pictures = to_tensors(image)
        restored: list[Tensor] = []
        for group in by_size(pictures):
            batch = torch.stack([pictures[k] for k in group])
            made = resize_bicubic(self._enlarge(batch, options, notes), enlarged_size(batch, scale))
            restored.extend(options.finish(made, enlarged(batch, scale) if options.looks_back else None, batch))
        return Output(from_tensors(restored, output_type), notes)

    def strips(self, size: tuple[int, int], *, scale: float, held: int, **call: Any) -> tuple[list[Strip], dict[str, Any]]:
        """Strips that begin and end with rows of tiles of the whole picture; colours that are fixed by its mean need it in one piece."""
        options, _ = settled(CallOptions, call, self.options, self.defaults)
        whole = [Strip(0, size[0], 0, size[0])], dict(call)
        tops_fit = not (self._unit * scale) % 1 or scale == self.networks.scale
        if options.color_fix == "adain" or options.tile is None or not tops_fit:
            return whole
        height, width = (rounded_up(side, self._unit, self._least) for side in size)
        parameter, zoom = next(self.networks.parameters()), self.networks.scale
        shares = parameter.device.type == "cpu"
        budget = options.memory_budget if shares else None
        room = (free_bytes(torch.device("cpu")) if budget is None else budget) - held
        room -= sum(p.numel() for p in self.networks.parameters()) * parameter.dtype.itemsize if budget is not None else 0
        row = 4 * 3 * _PICTURES * width * max(zoom, scale) ** 2
        sides = self._sides(max(height, width)) if options.tile == "auto" else [options.tile // zoom]
        if not shares:
            sides = [self._side(torch.empty(1, 3, height, width, device="meta"), options)]
        beside = {side: self._bytes(side, steady=budget is not None) if shares else 0 for side in sides}
        if min(beside.values()) + row * height > room:
            for side in sides:
                tops = tile_offsets(height, side, self._overlap(side, options))
                rows = int((room - beside[side]) / row - side) // (side - self._overlap(side, options)) + 1
                if 3 <= rows < len(tops):
                    return strips_of_tiles(tops, side, size[0], rows), {**call, "tile": side * zoom}
        return whole

    def save(self, folder: Path) -> None:
        self.networks.save(folder, scale=self.scale, **self.kept_defaults)
        usual_modes(folder)

    @property
    def _unit(self) -> int:
        """Sides of what the networks see are multiples of it, in low-resolution pixels."""
        return math.lcm(self.networks.size().multiple_of, self.networks.scale) // self.networks.scale

    @property
    def _least(self) -> int:
        """The shortest side that they take, in low-resolution pixels."""
        return rounded_up(1, self._unit, -(-self.networks.size().minimum // self.networks.scale))

    def _check_tiles(self, options: CallOptions) -> None:
        zoom, tile, overlap = self.networks.scale, options.tile, options.tile_overlap
        check_tile("tile", tile, SizeRequirements(multiple_of=self._unit * zoom, minimum=self._least * zoom))
        if overlap is not None and (overlap < 0 or overlap % (self._unit * zoom) or (isinstance(tile, int) and overlap >= tile)):
            raise UserError(f"tile_overlap: expected a multiple of {self._unit * zoom} pixels below the tile, got {overlap}.")

    def _enlarge(self, pictures: Tensor, options: CallOptions, notes: list[str]) -> Tensor:
        """[B, 3, h, w] -> [B, 3, scale h, scale w] float32, in tiles as large as memory allows."""
        zoom = self.networks.scale
        device = next(self.networks.parameters()).device
        height, width = (rounded_up(side, self._unit, self._least) for side in pictures.shape[-2:])
        padded = pad_to(pictures, height, width)

        def run(side: int) -> Tensor:
            return self._run(padded, side, self._overlap(side, options))

        def smaller(side: int) -> int:
            below = self._sides(side - 1)
            if not below:
                raise NotEnoughMemory(f"out of memory even with tiles of {side * zoom} pixels; lower the scale, or use another device.")
            notes.append(f"out of memory: tile {side * zoom} -> {below[0] * zoom}")
            log.warning("%s", notes[-1])
            self._limit = below[0]
            return below[0]

        made, _ = within_memory(run, self._side(padded, options), smaller, device)
        return made[..., : pictures.shape[-2] * zoom, : pictures.shape[-1] * zoom]

    def _run(self, padded: Tensor, side: int, overlap: int) -> Tensor:
        parameter = next(self.networks.parameters())

        def run(tiles: list[Tensor], _: list[int]) -> Tensor:
            return self.networks(tiles[0].to(parameter.device, parameter.dtype)).to(padded.device, torch.float32)

        boxes = even_boxes(padded.shape[-2], padded.shape[-1], side, overlap, self._unit)
        return blend(run, [padded], boxes, overlap=overlap, weights="middle")

    def _overlap(self, side: int, options: CallOptions) -> int:
        """Low-resolution pixels; whole units, so that every tile begins where the networks would begin a new one."""
        asked = self.networks.shared(side) if options.tile_overlap is None else options.tile_overlap // self.networks.scale
        return min(rounded_up(asked, self._unit), side // 2 // self._unit * self._unit)

    def _sides(self, most: int) -> list[int]:
        """Sides that "auto" may choose, in low-resolution pixels, descending."""
        sides = dict.fromkeys(max(self._least, side // self.networks.scale // self._unit * self._unit) for side in _SIDES)
        return [side for side in sides if side <= most]

    def _side(self, padded: Tensor, options: CallOptions) -> int:
        """Side of a tile in low-resolution pixels: what was asked for, or the largest that fits."""
        zoom, longest, budget = self.networks.scale, max(padded.shape[-2:]), options.memory_budget
        parameter = next(self.networks.parameters())
        if budget is not None and parameter.device.type == "cpu":
            hand_freed_blocks_back()
        room = budget if budget is not None else free_bytes(parameter.device)
        weights = sum(p.numel() for p in self.networks.parameters()) * parameter.dtype.itemsize if budget is not None else 0
        shares_device = padded.device == parameter.device
        beside = weights + (4 * 3 * _PICTURES * len(padded) * padded.shape[-2] * padded.shape[-1] * zoom**2 if shares_device else 0)
        most = min(longest, self._limit or longest)
        sides = [most, *self._sides(most - 1)]
        if options.tile != "auto":
            sides = [most if options.tile is None else min(options.tile // zoom, most)]
            if budget is None:
                return sides[0]
        spared = beside if beside > room and budget is None else 0  # no tile could mend that
        for side in sides:
            if beside - spared + self._bytes(side, steady=budget is not None) <= room:
                return side
        if budget is None:
            return sides[-1]
        least = beside + self._bytes(sides[-1], steady=True)
        what = "this picture; the least is" if options.tile == "auto" else f"tile {sides[0] * zoom}, which would take"
        raise NotEnoughMemory(f"memory_budget: {shown_bytes(budget)} is too little for {what} {shown_bytes(least)}.", least)

    def _peak(self, side: int) -> float:
        """Numbers that are alive at once in a call on a picture of this side: on shapes alone, unless the networks look at numbers."""
        shapes = self.networks.shapes().float().eval()
        low = torch.zeros(1, 3, side, side)
        try:
            return peak_activation_bytes(shapes, lambda: shapes(low.to("meta"))) / 4
        except RuntimeError:
            parameter = next(self.networks.parameters())
            real = low.to(parameter)
            with eagerly(self.networks):
                return peak_activation_bytes(self.networks, lambda: self.networks(real), parameter.device) / parameter.dtype.itemsize

    def _bytes(self, side: int, *, steady: bool) -> int:
        """Estimated peak of a call on one tile; activations grow with the area, so one shape run is enough."""
        parameter = next(self.networks.parameters())
        if self._floats is None:
            measured = rounded_up(_MEASURED, self._unit, self._least)
            self._floats = self._peak(measured) / measured**2
        largest = max(p.numel() for p in self.networks.parameters())
        width = parameter.dtype.itemsize
        return call_bytes(self._floats * side * side * width, largest * width, parameter.device.type, steady)


@torch.no_grad()
def _same_in_bfloat16(networks: PixelNetworks) -> bool:
    """Whether a picture of waves and edges differs by less than 1/255 on the mean. The networks are float32 and stay so."""
    if networks.taken(torch.bfloat16) != torch.bfloat16:
        return False
    side = rounded_up(_SAMPLE, networks.size().multiple_of, networks.size().minimum) // networks.scale
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [(x * (1 + channel) + y * y / side) / 5 for channel in range(3)]
    sample = torch.stack([0.5 + 0.3 * wave.sin() + 0.2 * wave.cos().sign() for wave in waves])[None].clamp(0, 1)
    want = networks(sample)
    got = deepcopy(networks).to(torch.bfloat16)(sample.to(torch.bfloat16))
    return bool((got.float().clamp(0, 1) - want.clamp(0, 1)).abs().mean() < 1 / 255)


def check_scale(scale: float, networks: PixelNetworks) -> None:
    """Raises UserError where a recipe's scale is not the networks' own."""
    if scale != networks.scale:
        raise UserError(f"scale: these networks enlarge {networks.scale} times, got {scale}; set scale: {networks.scale}.")
