"""How the CPU backend cuts a call into tiles, lays out its memory and shares the work between threads.

Threads are Python's own (the compiled code releases the GIL) and as many as `torch.get_num_threads()` says: no thread
pool that a fork, a data-loader worker or a second caller could upset. Tiles are dealt out by their number, so the same
input gives the same bits for a given number of threads.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslsr_diffusion.ops import _cpu_calls as compiled
from sslsr_diffusion.ops._cpu_tiles import LOG2E, SLACK, Layout, Scratch
from sslsr_diffusion.ops.settings import GraphSettings

_logger = logging.getLogger(__name__)
_TILE_BYTES = 2_900_000  # of one graph of one tile: two for each thread keep a call on 512 pixels below 40 MB
_TILE_SHAPES = ((136, 64), (136, 24), (72, 16), (40, 16), (16, 8))  # at most; smaller where more pixels are masked
_MAP_BYTES = 850_000  # of one tile's maps: they stay in the second-level cache
_KEPT_BYTES = 48 * 2**20
_ready: set[tuple[object, ...]] = set()
_compiling = threading.Lock()
_kept = threading.local()


class Call(NamedTuple):
    """How one call is cut into tiles, and where in its memory things lie (in floats)."""

    layout: Layout
    lead: int  # columns of zeros to the left of the padded image
    tiles: np.ndarray  # [T, 4] int64: first pixel in the padded image, first position, positions, dense?
    positions: np.ndarray
    rows: np.ndarray
    workers: int
    image: int  # size of a padded batch
    parts: dict[str, int]  # sizes of one thread's buffers
    numbers: tuple[float, tuple[int, ...], tuple[int, ...]]  # a distance's factor to the base-2 exponent; C and w as lengths (`_simd`)


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _shape_of_tiles(height: int, width: int, images: int, s: GraphSettings, workers: int, widest: int, tallest: int) -> tuple[int, int]:
    """Even tiles of at most widest x tallest pixels whose maps fit the second-level cache."""
    border = s.reach + s.half
    tile_width = _round_up(-(-width // -(-width // widest)), 16)
    columns = -(-width // tile_width)
    lines = _MAP_BYTES // (4 * s.search * _round_up(tile_width + border, 16))
    tallest = max(8, min(tallest, (lines - border) // 8 * 8))

    def cost(tile_height: int) -> int:
        bands = -(-height // tile_height)
        return -(-bands * columns * images // workers) * (tile_height + border)

    return min(range(tallest, 0, -8), key=cost), tile_width


def lay_out(mask: Tensor, channels: int, settings: GraphSettings) -> Call:
    batch, _, height, width = mask.shape
    search, reach, half = settings.search, settings.reach, settings.half
    marked = mask[:, 0].contiguous().numpy()
    workers = max(1, torch.get_num_threads())
    for widest, tallest in _TILE_SHAPES:
        tile_height, tile_width = _shape_of_tiles(height, width, batch, settings, workers, widest, tallest)
        counts, positions, rows = compiled.bucket(marked, tile_height, tile_width)
        dense = counts > 0.6 * tile_height * tile_width
        most = int(np.where(dense, tile_height * tile_width, counts).max(initial=0))
        if most * search**2 * 4 <= _TILE_BYTES:
            break
    down, across = -(-height // tile_height), -(-width // tile_width)
    lead = -reach % 16  # tiles begin on a cache line
    stride = _round_up(lead + across * tile_width + 2 * reach + half + 16, 16)
    plane = stride * (down * tile_height + 2 * (reach + compiled.TOP))
    margin = _round_up(tile_width + reach + half, 16)
    layout = Layout(
        search=search, reach=reach, half=half, inner=reach - half, height=tile_height, row=tile_width, margin=margin,
        lines=_round_up(tile_height + reach - half, 8) + _round_up(2 * half, 8), across=margin + _round_up(2 * half, 16),
        room=_round_up(most, 16), plane=plane, stride=stride, normalize=int(settings.normalize),
    )  # fmt: skip
    number = np.flatnonzero(counts)
    image, band, column = number // (down * across), number // across % down, number % across
    origin = image * channels * plane + (band * tile_height + reach + compiled.TOP) * stride + column * tile_width + lead + reach
    first = np.cumsum(counts) - counts
    tiles = np.stack([origin, first[number], counts[number], dense[number].astype(np.int64)], axis=1)
    numbers = (-LOG2E / settings.kappa(channels), (0,) * channels, (0,) * settings.window)
    sizes = _sizes(layout, channels, settings.window)
    return Call(layout, lead, tiles, positions, rows, min(workers, len(tiles)), batch * channels * plane, sizes, numbers)


def _sizes(layout: Layout, channels: int, window: int) -> dict[str, int]:
    """Floats of one thread's buffers, in the order of `Scratch`."""
    entries, rows, half = layout.search**2, layout.height + 2 * layout.reach, layout.half
    row = channels * 16
    sizes = {
        "maps": (SLACK + 2 * half + layout.search * layout.lines + 2 * half + SLACK) * layout.margin,
        "distance": (layout.height + max(layout.inner, 2 * half)) * layout.across + 32,
        "picked": layout.room,
        "outside": window * window * layout.room,
        "whole": window * layout.room,
        "first": entries * layout.room,
        "second": entries * layout.room,
        "pixels": 9 * layout.room,
        "dense": (layout.height + layout.inner) * layout.across + 32,
        "adjoint": layout.room,
        "force": (layout.search + 2) * (rows + 8) * 16,
        "blocks": 2 * (rows + 2 * SLACK) * row,
        "partner": rows * row,
        "place": layout.room,
        "sums": 4 * layout.room,
    }
    return {name: _round_up(size, 16) for name, size in sizes.items()}


class Memory:
    """One call's memory: the padded images, then for each thread its gradient of the first and its buffers.

    The calling thread keeps it for its next call (fresh pages cost time), unless it is larger than 48 MB; it is freed when the thread
    ends, or when a larger call replaces it. Nothing is shared between threads or with a forked child. A call that is interrupted does
    not come to `keep`: its workers may still be writing.
    """

    def __init__(self, call: Call, images: tuple[Tensor, ...], with_gradient: bool):
        self.call, self.images, self.gradient = call, len(images), call.image if with_gradient else 0
        self.own = self.gradient + sum(call.parts.values())
        size = len(images) * call.image + call.workers * self.own + 16
        block, _kept.block = getattr(_kept, "block", None), None
        if block is None or len(block) < size:
            block = None  # freed before the larger one is made
            block = np.empty(size, np.float32)
        self.whole = block
        self.block = block[-(block.ctypes.data // 4) % 16 :]  # from a cache line on
        for number, image in enumerate(images):
            compiled.pad(image.detach().contiguous().numpy(), self.image(number), call.lead, call.layout)

    def keep(self) -> None:
        """The call is over and nothing of it is in use."""
        if self.whole.nbytes <= _KEPT_BYTES:
            _kept.block = self.whole

    def image(self, number: int) -> np.ndarray:
        return self.block[number * self.call.image : (number + 1) * self.call.image]

    def gradient_of(self, worker: int) -> np.ndarray:
        at = self.images * self.call.image + worker * self.own
        return self.block[at : at + self.gradient]

    def fold_gradients(self, out: np.ndarray, share: float) -> None:
        """out [B, C, H, W] = share times all threads' gradients, `own` floats apart."""
        call, parts = self.call, self.block[self.images * self.call.image :]
        compiled.fold(parts, self.own, call.workers, out, call.lead, share, call.layout)

    def tiles(self, worker: int) -> tuple[object, ...]:
        """One thread's tiles, every workers-th, and all that the compiled walks want to know beside pictures and results."""
        call, at, parts = self.call, self.images * self.call.image + worker * self.own + self.gradient, {}
        for name, size in call.parts.items():
            parts[name] = self.block[at : at + size]
            at += size
        parts["place"], parts["sums"] = parts["place"].view(np.uint32), parts["sums"].view(np.float64)
        tiles = np.ascontiguousarray(call.tiles[worker :: call.workers])
        return tiles, call.positions, call.rows, call.layout, Scratch(**parts), *call.numbers


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


def share(call: Call, kind: str, work: Callable[[int], None]) -> None:
    """work(0) .. work(workers - 1), the first on this thread."""
    failures: list[BaseException] = []

    def guarded(worker: int) -> None:
        try:
            work(worker)
        except BaseException as error:
            failures.append(error)

    def everything() -> None:
        others = [threading.Thread(target=guarded, args=(worker,), daemon=True) for worker in range(1, call.workers)]
        for other in others:
            other.start()
        guarded(0)
        for other in others:
            other.join()
        if failures:
            raise failures[0]

    _announced((kind, *map(len, call.numbers[1:])), everything)
