"""Overlapping tiles: where they lie, how they are weighed, how their results become one picture."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.progress import piece

T = TypeVar("T")


class Box(NamedTuple):
    """A tile's rectangle."""

    top: int
    left: int
    height: int
    width: int

    def scaled(self, factor: int) -> "Box":
        return Box(*(factor * side for side in self))

    def of(self, image: Tensor) -> Tensor:
        """The view of [..., H, W] inside the rectangle."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


def tile_offsets(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one axis: every `tile - overlap`, the last flush with the end (as in StableSR)."""
    if not 0 <= overlap < tile:
        raise UserError(f"tile_overlap: expected 0 up to less than the tile ({tile}), got {overlap}; choose a smaller overlap.")
    if length <= tile:
        return [0]
    stride = tile - overlap
    return [*range(0, length - tile, stride), length - tile]


def tile_boxes(height: int, width: int, tile: int, overlap: int) -> list[Box]:
    """Tiles that cover height x width, column of tiles by column; an axis shorter than the tile has one tile of its own length."""
    return [
        Box(top, left, min(tile, height), min(tile, width))
        for left in tile_offsets(width, tile, overlap)
        for top in tile_offsets(height, tile, overlap)
    ]


def even_boxes(height: int, width: int, tile: int, overlap: int, unit: int) -> list[Box]:
    """As many tiles as `tile_boxes` has, no larger than needed, with sides and places that are multiples of `unit`."""

    def even(length: int) -> tuple[int, list[int]]:
        count = len(tile_offsets(length, tile, overlap))
        side = rounded_up(-(-(length + (count - 1) * overlap) // count), unit)
        return side, tile_offsets(length, side, overlap if count > 1 else 0)

    (tall, tops), (wide, lefts) = even(height), even(width)
    return [Box(top, left, tall, wide) for left in lefts for top in tops]


class Strip(NamedTuple):
    """Low-resolution rows: read from `top` to `bottom`, responsible from `first` to `last`."""

    top: int
    bottom: int
    first: int
    last: int


def strips_of_tiles(tops: Sequence[int], side: int, height: int, rows: int) -> list[Strip]:
    """Strips of at most `rows` rows of tiles (3 or more), whose tops are `tops`, for a picture of `height` rows."""
    strips, first, begin = list[Strip](), 0, 0
    while True:
        last = min(first + rows, len(tops)) - 1
        if last == len(tops) - 1:
            return [*strips, Strip(tops[first], height, begin, height)]
        # the next strip must know all tiles of its rows, this one, too: rows from below tile first - 1 up to above tile last + 1
        following = next(k for k in range(last, first, -1) if tops[k - 1] + side <= tops[last + 1])
        end = (tops[following - 1] + side + tops[last + 1]) // 2
        strips.append(Strip(tops[first], tops[last] + side, begin, end))
        first, begin = following, end


def tile_weights(height: int, width: int, kind: str = "smooth", overlap: int = 0) -> Tensor:
    """How much a tile has to say at each of its pixels, [height, width] float64: w[y, x] = p(y; height) p(x; width).

    smooth:   p(i; n) = sin^2(pi/2 min(1, d / overlap)), d = min(i, n-1-i) + 1/2 the way to the border: a ramp as long as the overlap
    gaussian: p(i; n) = exp(-((i - (n-1)/2) / n)^2 / 0.02) / sqrt(0.02 pi)
    original: gaussian, but the vertical centre is n/2, as in StableSR's code
    middle:   smooth, but its ramp is the middle half of the overlap (2 d / overlap - 1/2 in the place of d / overlap); in the outer
              quarter, where a border may have made the tile wrong, nothing that its neighbour says otherwise leaves a trace

    The Gaussian is so narrow that one tile takes over from the next within 0.02 tiles: a step in tone where they disagree.
    """

    def ramp(length: int) -> Tensor:
        i = torch.arange(length, dtype=torch.float64)
        way = (torch.minimum(i, length - 1 - i) + 0.5) / overlap
        if kind == "smooth":
            return torch.sin(way.clamp(max=1) * torch.pi / 2) ** 2
        return (torch.sin((2 * way - 0.5).clamp(0, 1) * torch.pi / 2) ** 2).clamp(min=_TRACE)

    def gaussian(length: int, centre: float) -> Tensor:
        i = torch.arange(length, dtype=torch.float64)
        return torch.exp(-(((i - centre) / length) ** 2) / 0.02) / (0.02 * torch.pi) ** 0.5

    if kind not in TILE_WEIGHTS:
        raise UserError(f"tile_weights: expected one of {', '.join(TILE_WEIGHTS)}, got {kind!r}.")
    if kind in ("smooth", "middle"):
        return ramp(height)[:, None] * ramp(width) if overlap else torch.ones(height, width, dtype=torch.float64)
    return gaussian(height, height / 2 if kind == "original" else (height - 1) / 2)[:, None] * gaussian(width, (width - 1) / 2)


TILE_WEIGHTS = ("smooth", "gaussian", "original", "middle")
_TRACE = 1e-9  # below float32's precision beside a weight of 1, yet a weight where no other tile is


class Parts(Protocol):
    """[1, C, H, W] that is never whole in memory."""

    def part(self, box: Box) -> Tensor:
        """[C, h, w], made when it is asked for."""


def run_tiles(
    run: Callable[[list[Tensor], list[int]], Tensor],
    inputs: Sequence[Tensor | Parts],
    boxes: Sequence[Box],
    *,
    samples: Sequence[int] = (0,),
    zooms: Sequence[int] | None = None,
    batch_size: int = 1,
) -> Iterator[tuple[int, Box, Tensor]]:
    """Place among `samples`, rectangle and result [C, h, w] float32 of each tile; arguments as `bands`."""
    zooms = zooms or [1] * len(inputs)
    chunks = list(batches([(place, box) for box in boxes for place in range(len(samples))], batch_size))
    for number, chunk in enumerate(chunks):
        tiles = [torch.stack([_part(x, samples[place], box.scaled(z)) for place, box in chunk]) for x, z in zip(inputs, zooms)]
        with piece(number, len(chunks), "tile" if batch_size == 1 else "batch of tiles"):
            made = run(tiles, [samples[place] for place, _ in chunk])
        for (place, box), result in zip(chunk, made):
            yield place, box, result.float()


def bands(
    run: Callable[[list[Tensor], list[int]], Tensor],
    inputs: Sequence[Tensor | Parts],
    boxes: Sequence[Box],
    *,
    samples: Sequence[int] = (0,),
    zooms: Sequence[int] | None = None,
    batch_size: int = 1,
    overlap: int = 0,
    weights: str = "smooth",
) -> Iterator[Tensor]:
    """`blend` from the top down, for pictures that are never whole in memory: the rows above each row of tiles once they are final.

    Arguments as `blend`; `samples` are the pictures that are made. Yields [len(samples), C, n z, W z] float32.
    """
    boxes = sorted(boxes)
    results = run_tiles(run, inputs, boxes, samples=samples, zooms=zooms, batch_size=batch_size)
    if len(boxes) == 1:
        whole = [result for _, _, result in results]
        yield whole[0][None] if len(whole) == 1 else torch.stack(whole)
        return
    yield from _weighted_mean(results, boxes, len(samples), overlap, weights)


def blend(
    run: Callable[[list[Tensor], list[int]], Tensor],
    inputs: Sequence[Tensor],
    boxes: Sequence[Box],
    *,
    zooms: Sequence[int] | None = None,
    batch_size: int = 1,
    overlap: int = 0,
    weights: str = "smooth",
) -> Tensor:
    """One picture from overlapping tiles: sum of w run(tile) over sum of w.

    Args:
        run: (the n tiles of one batch, cut from each input, [n, C_i, h_i, w_i]; their n sample numbers) -> [n, C, h, w].
        inputs: tensors [B, C_i, H zoom_i, W zoom_i] that are cut together.
        boxes: rectangles of equal size on the H x W grid; they run row by row.
        zooms: per input, how many of its pixels a cell of the grid has along a side; None: one.
        batch_size: tiles (of any sample) per call of `run`.
        overlap: cells that neighbouring tiles share at least.
        weights: see `tile_weights`.
    Returns:
        [B, C, H z, W z] float32; z is read off the first result.
    """
    samples = range(len(inputs[0]))
    return joined(bands(run, inputs, boxes, samples=samples, zooms=zooms, batch_size=batch_size, overlap=overlap, weights=weights), boxes)


def joined(parts: Iterator[Tensor], boxes: Sequence[Box]) -> Tensor:
    """What `bands` made of these boxes, as one tensor; never twice in memory."""
    first = next(parts)
    if len(boxes) == 1:
        return first
    height, width = max(b.top + b.height for b in boxes), max(b.left + b.width for b in boxes)
    whole = first.new_empty((*first.shape[:-2], height * (first.shape[-1] // width), first.shape[-1]))
    top = 0
    for part in itertools.chain([first], parts):
        whole[..., top : top + part.shape[-2], :] = part
        top += part.shape[-2]
    return whole


def _part(source: Tensor | Parts, sample: int, box: Box) -> Tensor:
    return box.of(source[sample]) if isinstance(source, Tensor) else source.part(box)


def _weighted_mean(
    results: Iterator[tuple[int, Box, Tensor]], boxes: Sequence[Box], samples: int, overlap: int, weights: str
) -> Iterator[Tensor]:
    """`boxes` and `results` row by row; a row of tiles is all that is kept."""
    width, top = max(b.left + b.width for b in boxes), 0
    total: Tensor | None = None  # sums of the row of tiles at `top`
    for sample, box, result in results:
        if total is None:
            zoom = result.shape[-1] // box.width
            weight = tile_weights(result.shape[-2], result.shape[-1], weights, overlap * zoom).to(result)
            total = result.new_zeros((samples, result.shape[0], box.height * zoom, width * zoom))
            cover = result.new_zeros(total.shape[-2:])
        if box.top > top:
            done, top = (box.top - top) * zoom, box.top
            finished = total[..., :done, :] / cover[:done]
            total, cover = (torch.cat([sums[..., done:, :], torch.zeros_like(sums[..., :done, :])], dim=-2) for sums in (total, cover))
            yield finished
        across = slice(box.left * zoom, (box.left + box.width) * zoom)
        total[sample, ..., across].add_(result * weight)
        if sample == 0:
            cover[:, across].add_(weight)
    assert total is not None
    yield total.div_(cover)


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), max(1, size)):
        yield items[start : start + max(1, size)]


def rounded_up(length: int, unit: int, least: int = 0) -> int:
    """The least multiple of `unit` that is not below `length` nor below `least`."""
    return -(-max(length, least) // unit) * unit
