"""How the CPU backend cuts a call into tiles, pads images, lays out buffers and shares the work between threads.

Threads are Python's own (the compiled code releases the GIL) and as many as `torch.get_num_threads()` says: no thread
pool that a fork, a data-loader worker or a second caller could upset. Tiles are dealt out by their number, so the same
input gives the same bits for a given number of threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_logger = logging.getLogger(__name__)
_TILE_BYTES = 8_000_000  # of one graph of one tile
_SLACK = 16  # rows of zeros above and below an image: vertical sums and blocks touch them
_ready: set[tuple[object, ...]] = set()
_compiling = threading.Lock()


class Plan(NamedTuple):
    """How one call is cut into tiles."""

    layout: Any
    tiles: np.ndarray  # [T, 4] int64: origin in the padded image, first position, positions, dense?
    positions: np.ndarray
    rows: np.ndarray
    workers: int

    def part(self, worker: int) -> np.ndarray:
        """One thread's tiles: every workers-th."""
        return np.ascontiguousarray(self.tiles[worker :: self.workers])


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _shape_of_tiles(height: int, width: int, images: int, search: int, window: int, workers: int, *, tight: bool) -> tuple[int, int]:
    """Even tiles that fit the caches; fewer pixels each (tight) where most of them are masked."""
    grown = 2 * (window // 2)
    widest = 88 if tight else 136
    columns = -(-width // widest)
    tile_width = _round_up(-(-width // columns), 16)
    tallest = 16 if tight else 40
    while tight and tallest > 8 and tallest * tile_width * search**2 * 4 > _TILE_BYTES:
        tallest -= 8
    while tight and tile_width > 16 and tallest * tile_width * search**2 * 4 > _TILE_BYTES:
        tile_width -= 16
        columns = -(-width // tile_width)

    def cost(tile_height: int) -> int:
        bands = -(-height // tile_height)
        return -(-bands * columns * images // workers) * (tile_height + grown)

    return min(range(tallest, 0, -8), key=cost), tile_width


def plan(mask: Tensor, channels: int, search: int, window: int, normalize: bool) -> Plan:
    from sslsr_diffusion.ops import _cpu_tiles as compiled

    batch, _, height, width = mask.shape
    reach, half = search // 2, window // 2
    marked = mask[:, 0].contiguous().numpy()
    workers = max(1, torch.get_num_threads())
    for tight in (False, True):
        tile_height, tile_width = _shape_of_tiles(height, width, batch, search, window, workers, tight=tight)
        counts, positions, rows = compiled.bucket(marked, tile_height, tile_width)
        dense = counts > 0.6 * tile_height * tile_width
        most = int(np.where(dense, tile_height * tile_width, counts).max())
        if most * search**2 * 4 <= _TILE_BYTES:
            break
    down, across = -(-height // tile_height), -(-width // tile_width)
    stride = _round_up(_lead(reach) + across * tile_width + 2 * (reach + half) + 32, 16)
    plane = stride * (down * tile_height + 2 * (reach + half + _SLACK))
    layout = compiled.Layout(
        search=search, reach=reach, half=half, height=tile_height, row=tile_width,
        vectors=-(-(tile_width + 2 * half) // 16), grown=tile_height + 2 * half, room=_round_up(most, 16), plane=plane, stride=stride,
        normalize=int(normalize),
    )  # fmt: skip
    number = np.flatnonzero(counts)
    image, band, column = number // (down * across), number // across % down, number % across
    origin = image * channels * plane + (band * tile_height + reach + _SLACK) * stride + column * tile_width + _lead(reach) + reach
    first = np.cumsum(counts) - counts
    tiles = np.stack([origin, first[number], counts[number], dense[number].astype(np.int64)], axis=1)
    return Plan(layout, tiles, positions, rows, min(workers, len(tiles)))


def _lead(reach: int) -> int:
    """Columns of zeros to the left of the padded image: tiles then begin on a cache line."""
    return -reach % 16


def _inside(buffer: Tensor, height: int, width: int, layout: Any) -> Tensor:
    """The reflect-padded image in its buffer, which has zeros around it so that no load leaves it."""
    top, left = _SLACK + layout.half, _lead(layout.reach) + layout.half
    return buffer[:, :, top : top + height + 2 * layout.reach, left : left + width + 2 * layout.reach]


def padded(image: Tensor, layout: Any) -> Tensor:
    """[B, C, rows, stride]: the image reflected by reach, in a buffer as `_inside` describes."""
    batch, channels, height, width = image.shape
    out = torch.zeros(batch, channels, layout.plane // layout.stride, layout.stride)
    _inside(out, height, width, layout).copy_(F.pad(image.detach(), (layout.reach,) * 4, mode="reflect"))
    return out


def _unpad(gradient: Tensor, height: int, width: int, layout: Any) -> Tensor:
    """The adjoint of `padded`: the border folded back onto the pixels it was reflected from."""
    reach = layout.reach
    gradient = _inside(gradient, height, width, layout)
    for dim, size in ((2, height), (3, width)):
        inner = gradient.narrow(dim, reach, size)
        if reach:
            inner.narrow(dim, 1, reach).add_(gradient.narrow(dim, 0, reach).flip(dim))
            inner.narrow(dim, size - 1 - reach, reach).add_(gradient.narrow(dim, reach + size, reach).flip(dim))
        gradient = inner
    return gradient.contiguous()


def scratch(layout: Any, channels: int, window: int) -> Any:
    """One thread's buffers, each on a cache line, in one allocation."""
    from sslsr_diffusion.ops import _cpu_tiles as compiled

    margin, area, half = layout.vectors * 16, layout.height * layout.row, window // 2
    entries, steps = layout.search**2, _round_up(layout.grown, 8)
    across = margin + _round_up(window, 16) + 16
    sizes = {
        "maps": (layout.search * (layout.height + 4 * half) + 2 * _SLACK + window) * margin + 64,
        "distance": area + margin + 16,
        "picked": layout.room,
        "outside": window * window * area,
        "chosen": window * window * layout.room,
        "columns": (window + 1) * layout.grown * margin + 64,
        "energy": layout.grown * margin + window + 16,
        "first": entries * layout.room,
        "second": entries * layout.room,
        "pixels": 9 * layout.room,
        "sums": 0,
        "dense": layout.height * across,
        "adjoint": layout.room,
        "total": layout.room,
        "force": (layout.search + 2) * steps * 16,
        "blocks": (2 * layout.grown + layout.search + 4 * _SLACK) * channels * 16,
        "partner": (layout.grown + layout.search) * channels * 16,
        "own": channels * layout.grown * margin,
        "spent": layout.grown * margin,
        "box": steps * margin,
    }
    rounded = {name: _round_up(size, 16) for name, size in sizes.items()}
    memory = np.zeros(sum(rounded.values()) + 16, np.float32)
    at = -(memory.ctypes.data // 4) % 16
    parts = {}
    for name, size in rounded.items():
        parts[name] = memory[at : at + sizes[name]]
        at += size
    parts["sums"] = np.zeros(2 * layout.room)
    return compiled.Scratch(**parts)


def _announced(key: tuple[object, ...], run: Callable[[], None]) -> None:
    """The first call for a (channels, window) pair compiles, one thread at a time, and says so."""
    if key in _ready:
        run()
        return
    with _compiling:
        started = time.perf_counter()
        _logger.info("Compiling the CPU kernels for %s; once per machine, under half a minute.", key)
        run()
        _logger.info("CPU kernels ready after %.1f s.", time.perf_counter() - started)
        _ready.add(key)


def share(plan: Plan, key: tuple[object, ...], work: Callable[[int], None]) -> None:
    """work(0) .. work(workers - 1), the first on this thread."""

    def everything() -> None:
        if plan.workers == 1:
            work(0)
            return
        with ThreadPoolExecutor(plan.workers - 1) as pool:
            others = [pool.submit(work, worker) for worker in range(1, plan.workers)]
            work(0)
            for other in others:
                other.result()

    _announced(key, everything)


def scale(channels: int, window: int, sigma: float) -> float:
    """From a distance to the base-2 exponent."""
    from sslsr_diffusion.ops._cpu_tiles import LOG2E

    return -LOG2E / (channels * window**2 * sigma)


def gradients(workers: int, image: Tensor) -> list[Tensor]:
    """A gradient image for each thread."""
    return [torch.zeros_like(image) for _ in range(workers)]


def total(parts: list[Tensor], shape: torch.Size, layout: Any) -> Tensor:
    """The threads' gradients of the padded image, added up and folded to the image's shape."""
    for other in parts[1:]:
        parts[0] += other
    return _unpad(parts[0], shape[2], shape[3], layout)
