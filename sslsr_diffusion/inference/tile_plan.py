"""How a picture is padded and cut: whole where it fits, else the largest tiles that do; and what to try when memory runs out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import torch

from sslsr_diffusion.devices import is_out_of_memory, release_cached, shown_bytes
from sslsr_diffusion.errors import NotEnoughMemory, UserError
from sslsr_diffusion.inference.memory import MemoryModel, Offload
from sslsr_diffusion.inference.tiling import rounded_up
from sslsr_diffusion.models.size import SizeRequirements

log = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")
Tile = int | Literal["auto"] | None
Part = Literal["tile", "vae_tile"]  # whose tiles: the denoiser's or the autoencoder's

_VAE_SIDES = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128)
_LARGEST = 2.0  # "auto" gives the denoiser at most this many times the side it was trained at
_SHARES = (_LARGEST, 1.5, 1.0, 0.75, 0.5, 0.25)  # of that side


@dataclass(frozen=True)
class TilePlan:
    """Sides in output pixels. A tile of None is the whole picture."""

    height: int
    width: int
    tile: int | None
    tile_overlap: int
    vae_tile: int | None
    vae_overlap: int
    vae_scale: int
    size: SizeRequirements  # of the denoiser's tiles
    batch: int = 1  # samples per network call

    @property
    def tile_cells(self) -> tuple[int, int]:
        """Tile and overlap of the denoiser in latent pixels; the whole canvas is a tile as large as its longer side."""
        return (self.tile or max(self.height, self.width)) // self.vae_scale, self.tile_overlap // self.vae_scale

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.height // self.vae_scale, self.width // self.vae_scale

    @property
    def vae_cells(self) -> tuple[int | None, int]:
        return (self.vae_tile // self.vae_scale if self.vae_tile else None), self.vae_overlap // self.vae_scale

    def side(self, part: Part) -> int:
        return (self.tile if part == "tile" else self.vae_tile) or max(self.height, self.width)

    def smaller(self, part: Part) -> "TilePlan | None":
        """The next thing to try when `part` ran out of memory: one sample per call, then smaller tiles; None: nothing is left."""
        if self.batch > 1:
            return replace(self, batch=1)
        longest = max(self.height, self.width)
        sides = _sides(longest, self.size) if part == "tile" else _vae_sides(longest, self.vae_scale)
        below = [side for side in sides if side < self.side(part)]
        if not below:
            return None
        if part == "tile":
            overlap = self.tile_overlap * below[0] // self.side(part) // self.vae_scale * self.vae_scale
            return replace(self, tile=below[0], tile_overlap=overlap)
        return replace(self, vae_tile=below[0], vae_overlap=rounded_up(below[0] // 4, self.vae_scale))


@dataclass(frozen=True)
class Room:
    """The memory that a call may take: what is free beside the loaded weights, or a budget that covers the weights too."""

    bytes: int
    strict: bool = False  # a budget: refuse what does not fit; otherwise warn and try
    offload: Offload = "none"


class InBands(NamedTuple):
    """A result that is made in bands of rows."""

    rows: int  # that are worked on beside a row of the autoencoder's tiles
    held: int  # bytes of what it is made from
    latents: Literal["whole", "rows"] = "whole"  # rows: encoded and denoised row of tiles by row of tiles, too


@dataclass(frozen=True)
class _Cost:
    """Bytes at the peak, by part and side of its tiles."""

    padded: tuple[int, int]
    pictures: int
    batch: int
    guided: bool
    vae_scale: int
    memory: Callable[[], MemoryModel]
    room: Room
    beside: InBands | None
    sides: Mapping[str, int]  # of the other part's tiles, which are in memory together with these where latents are rows

    def copies(self, part: str, side: int) -> int:
        """Of the picture, beside network calls."""
        memory, beside = self.memory(), self.beside
        if beside is None:
            return memory.picture_bytes(*self.padded, self.pictures)
        if beside.latents == "rows":
            sides = {**self.sides, part: side}
            return beside.held + memory.picture_bytes(*self.padded, self.pictures, sides["vae_tile"] + beside.rows, sum(sides.values()))
        return beside.held + memory.picture_bytes(*self.padded, self.pictures, side + beside.rows if part == "vae_tile" else 0)

    def __call__(self, part: str, side: int) -> int:
        strict, offload = self.room.strict, self.room.offload
        weights = self.memory().weight_bytes(offload) if strict or offload != "none" else (0, 0)
        together = self.beside is not None and self.beside.latents == "rows"
        calls = [self._call(*each) for each in ({**self.sides, part: side}.items() if together else [(part, side)])]
        return weights[part != "tile"] + self.copies(part, side) + max(calls)

    def _call(self, part: str, side: int) -> int:
        h, w = (min(side, edge) // self.vae_scale for edge in self.padded)
        samples = self.batch if side < max(self.padded) else min(self.batch, self.pictures)
        if part == "tile":
            return self.memory().denoise_bytes(h, w, samples * (2 if self.guided else 1), steady=self.room.strict)
        return self.memory().codec_bytes(h, w, samples, steady=self.room.strict)


def plan_tiles(
    height: int,
    width: int,
    *,
    size: SizeRequirements,
    vae_scale: int,
    memory: Callable[[], MemoryModel],
    room: Room,
    tile: Tile,
    overlap: int | None,
    vae_tile: Tile,
    pictures: int = 1,
    batch: int = 1,
    guided: bool = False,
    limits: Mapping[str, int] | None = None,
    beside: InBands | None = None,
) -> TilePlan:
    """Padded size and tiles for `pictures` pictures of height x width output pixels.

    The padded sides are multiples of what the networks halve, and no smaller than what the denoiser was trained at:
    a picture that is smaller would be outside of what it has learned.

    Args:
        vae_scale: output pixels per latent pixel.
        memory: gives the estimates; called only for "auto" and for a budget.
        batch: samples per network call (the denoiser's are doubled when `guided`).
        limits: sides (by part) and "batch" above which memory ran out before.
        beside: None: pictures are whole in memory.
    Raises:
        UserError: an impossible tile or overlap.
        NotEnoughMemory: the budget is below what the smallest tiles take (the message says how much that is).
    """
    padded = size.padded(height), size.padded(width)
    longest, limits = max(padded), limits or {}
    batch = min(batch, limits.get("batch", batch))
    asked = {"tile": _asked("tile", tile, longest, size), "vae_tile": _asked("vae_tile", vae_tile, longest, vae_tiles(vae_scale))}
    sides = {"tile": _sides(longest, size), "vae_tile": _vae_sides(longest, vae_scale)}

    chosen = {part: asked[part] or sides[part][-1] for part in asked}  # the least, until it is chosen
    cost = _Cost(padded, pictures, batch, guided, vae_scale, memory, room, beside, chosen)
    for part in asked:
        chosen = {**chosen, part: _choose(part, asked[part], sides[part], limits.get(part), cost, room)}
        cost = replace(cost, sides=chosen)
    if room.strict:
        _check_budget(chosen, asked, sides, cost, room)
    side, vae_side = chosen["tile"], chosen["vae_tile"]
    if overlap is not None and side < (asked["tile"] or 0):
        overlap = overlap * side // (asked["tile"] or side) // vae_scale * vae_scale
    elif overlap is not None and side == limits.get("tile"):  # "auto", made smaller by what was found
        overlap = min(overlap, side // 2 // vae_scale * vae_scale)
    plan = TilePlan(
        *padded,
        tile=side if side < longest else None,
        tile_overlap=_overlap(overlap, side, vae_scale),
        vae_tile=vae_side if vae_side < longest else None,
        vae_overlap=rounded_up(vae_side // 4, vae_scale),
        vae_scale=vae_scale,
        size=size,
        batch=batch,
    )
    log.info("padded to %d x %d, tile %s, vae tile %s (output pixels)", *padded, plan.tile or "none", plan.vae_tile or "none")
    return plan


def _choose(part: str, asked: int | None, sides: Sequence[int], limit: int | None, cost: _Cost, room: Room) -> int:
    """The side that was asked for, or the largest that fits the room; below `limit` either way.

    Where already the picture's own copies do not fit, no tile could mend that, so they are left out of the account.
    """
    if asked is not None:
        return min(asked, limit or asked)
    beside = cost.copies(part, sides[-1])
    spared = beside if beside > room.bytes and not room.strict else 0
    for side in (side for side in sides if limit is None or side <= limit):
        if cost(part, side) - spared <= room.bytes:
            if spared:
                log.warning(
                    "the picture's own copies need about %s, free are %s; %s %d", *map(shown_bytes, (beside, room.bytes)), part, side
                )
            return side
    least = sides[-1]
    if not room.strict:
        log.warning("%s: even the smallest needs about %s, free are %s", part, shown_bytes(cost(part, least)), shown_bytes(room.bytes))
    return least


def _check_budget(
    chosen: Mapping[str, int], asked: Mapping[str, int | None], sides: Mapping[str, Sequence[int]], cost: _Cost, room: Room
) -> None:
    over = [part for part, side in chosen.items() if cost(part, side) > room.bytes]
    if not over:
        return
    needed = shown_bytes(max(cost(part, side) for part, side in chosen.items()))
    smallest = replace(cost, sides={part: each[-1] for part, each in sides.items()})
    least = max(smallest(part, side) for part, side in smallest.sides.items())
    fixed = [f"{part} {asked[part]}" for part in over if asked[part] is not None]
    advice = f"{' and '.join(fixed)} would take {needed}; 'auto' needs" if fixed else "the least is"
    raise NotEnoughMemory(
        f"memory_budget: {shown_bytes(room.bytes)} is too little for this model and picture size; {advice} {shown_bytes(least)}.", least
    )


def _sides(longest: int, size: SizeRequirements) -> list[int]:
    """Candidates of "auto", descending: the whole picture if it is not far beyond the training size, then shares of that."""
    trained = size.trained or 512
    most = min(_LARGEST * trained, size.maximum or longest)
    shares = {size.nearest(size.rounded_up(int(trained * share), size.minimum)) for share in _SHARES}
    return [longest] * (longest <= most) + sorted((side for side in shares if side < longest), reverse=True) or [longest]


def _vae_sides(longest: int, vae_scale: int) -> list[int]:
    return [longest, *(side for side in _VAE_SIDES if side < longest and side % vae_scale == 0)]


def vae_tiles(vae_scale: int) -> SizeRequirements:
    """What an autoencoder takes, with `vae_scale` pixels per latent pixel."""
    return SizeRequirements(multiple_of=4 * vae_scale)


def _asked(name: str, tile: Tile, longest: int, size: SizeRequirements) -> int | None:
    """The side of an explicit tile; None for "auto"."""
    if tile == "auto":
        return None
    if tile is None:
        if 0 < size.maximum < longest:
            most = size.nearest(longest)
            raise UserError(
                f"{name}: expected at most {most} pixels, the largest that these networks take, got none for a side of {longest}."
            )
        return longest
    check_tile(name, tile, size)
    return min(tile, longest)


def check_tile(name: str, tile: Tile, size: SizeRequirements) -> None:
    """Raises UserError unless the networks take such a tile."""
    if tile in ("auto", None):
        return
    unit = size.multiple_of
    if not isinstance(tile, int) or tile < unit or tile % unit:
        raise UserError(f"{name}: expected a multiple of {unit} pixels, 'auto' or none, got {tile!r}.")
    if not size.fits(tile):
        end, kind = ("least", "smallest") if tile < size.minimum else ("most", "largest")
        raise UserError(f"{name}: expected at {end} {size.nearest(tile)} pixels, the {kind} that these networks take, got {tile}.")


def _overlap(overlap: int | None, tile: int, vae_scale: int) -> int:
    if overlap is None:
        return tile // 2 // vae_scale * vae_scale
    if not 0 <= overlap < tile or overlap % vae_scale:
        raise UserError(f"tile_overlap: expected a multiple of {vae_scale} pixels below the tile ({tile}), got {overlap}.")
    return overlap


def within_memory(run: Callable[[P], R], plan: P, smaller: Callable[[P], P], device: torch.device) -> tuple[R, P]:
    """Run by a plan, or by smaller and smaller ones while memory runs out; the result and the plan that did.

    `smaller` gives the plan to try next, or raises NotEnoughMemory where there is none.
    """
    while True:
        try:
            return run(plan), plan
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release_cached(device)  # outside of the handler, where the traceback would keep the failed call's tensors
        plan = smaller(plan)
