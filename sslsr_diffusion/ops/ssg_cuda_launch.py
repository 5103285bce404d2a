"""What the CUDA kernels are compiled with and how they are launched. Plain Python and torch: the tests run it without a GPU.

A launcher is any callable that compiles `file`, a name in kernels/ or an absolute path, with `defines` and runs one kernel of it on
tensors and numpy scalars.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sslsr_diffusion.ops.settings import GraphSettings

Argument = Tensor | np.int32 | np.float32

_MAX_GROUP = 4  # channels in shared memory at a time: each costs an accumulator per offset of a thread
_MAX_THREADS = 512
_BANKS = 32
_TILES = ((4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # at most 256 pixels: kTileWords in ssg_rows.cuh
SLOT_BYTES = 48 * 2**20  # gradient slots in memory at a time


class Launcher(Protocol):
    def __call__(
        self, file: str, kernel: str, defines: tuple[str, ...], grid: int, block: int, shared_bytes: int, args: list[Argument]
    ) -> None: ...


@dataclass(frozen=True)
class RowGeometry:
    """How one block shares out one row of the graph; every field is a constant of the kernels."""

    search: int
    window: int
    group: int  # channels in shared memory at a time
    run: int  # neighbouring offsets of one thread
    threads: int
    stride: int  # words from line to line of the square
    plane: int  # words from channel to channel
    splits: int  # threads that share a line of the window's gradient
    shared_bytes: int

    def defines(self) -> tuple[str, ...]:
        blocks = max(1, min(16, 640 // self.threads))  # leaves a thread about 100 registers; a Turing has 16 blocks at most
        return tuple(f"SSG_{name.upper()}={value}" for name, value in {**vars(self), "min_blocks": blocks}.items())


def row_geometry(search: int, window: int, channels: int, shared_limit: int) -> RowGeometry:
    """The widest group of channels that fits into `shared_limit` bytes of shared memory; ValueError where not even one does."""
    groups = ceil(channels / _MAX_GROUP)
    for group in range(ceil(channels / groups), 0, -1):
        row = _with_group(search, window, group)
        if row.shared_bytes <= shared_limit:
            return row
    raise ValueError(
        f"search_size = {search} with window_size = {window} needs {row.shared_bytes} bytes of shared memory on the GPU, this one has "
        f'{shared_limit}; use smaller sizes or backend="torch".'
    )


def _with_group(search: int, window: int, group: int) -> RowGeometry:
    run = min((5, 7), key=lambda r: ceil(search / r) * r)
    runs = ceil(search / run)
    threads = min(_MAX_THREADS, 32 * ceil(search * runs / 32))
    lines = search + window - 1
    # thread i reads word (i % search) * stride + (i / search) * run of a line: with stride * search = run (mod 32) that is
    # stride * i (mod 32), and stride is odd because run is, so the 32 threads of a warp meet 32 banks
    stride = _at_least(runs * run + window - 1, run * pow(search, -1, _BANKS))
    plane = _at_least(lines * stride, stride * window)
    splits = max(1, min(search, threads // (group * window)))
    words = group * plane + lines * stride + splits * group * window**2 + 3 * threads + 8 + 8
    size = 16 * group * window * ceil(window / 4) + 4 * 8 + 4 * words
    return RowGeometry(search, window, group, run, threads, stride, plane, splits, 16 * ceil(size / 16))


def _at_least(smallest: int, residue: int) -> int:
    return smallest + (residue - smallest) % _BANKS


@dataclass(frozen=True)
class TileGeometry:
    """How the image is cut into tiles, one per block; each keeps the gradient of its dilated area in a slot of its own."""

    tile_h: int
    tile_w: int
    tiles_y: int
    tiles_x: int
    tiles: int  # of the whole batch
    tiles_per_launch: int
    slot_floats: int

    def launches(self) -> Iterator[range]:
        for first in range(0, self.tiles, self.tiles_per_launch):
            yield range(first, min(self.tiles, first + self.tiles_per_launch))

    def arguments(self) -> list[Argument]:
        return [np.int32(self.tile_h), np.int32(self.tile_w), np.int32(self.tiles_y), np.int32(self.tiles_x)]


def tile_geometry(shape: torch.Size, search: int, slot_bytes: int = SLOT_BYTES) -> TileGeometry:
    """The smallest tiles (the work is spread best) whose slots fit into `slot_bytes`; what does not fit is done in several launches."""
    batch, channels, height, width = shape
    for tile_h, tile_w in _TILES:
        tiles_y, tiles_x = ceil(height / tile_h), ceil(width / tile_w)
        tiles = batch * tiles_y * tiles_x
        slot_floats = channels * (tile_h + search - 1) * (tile_w + search - 1)
        if tiles * slot_floats * 4 <= slot_bytes:
            break
    per_launch = max(1, min(tiles, slot_bytes // (slot_floats * 4)))
    return TileGeometry(tile_h, tile_w, tiles_y, tiles_x, tiles, per_launch, slot_floats)


def run_loss(
    launch: Launcher, sr: Tensor, gt: Tensor, mask: Tensor, settings: GraphSettings, weights: tuple[float, float],
    *, with_gradient: bool, shared_limit: int, slot_bytes: int = SLOT_BYTES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums over all rows and offsets, float64 [L1, KL], and the gradient of weights[0] * L1 + weights[1] * KL in sr (or [0])."""
    channels, height, width = sr.shape[1:]
    row = row_geometry(settings.search, settings.window, channels, shared_limit)
    tiling = tile_geometry(sr.shape, settings.search, slot_bytes)
    if not with_gradient:
        tiling = replace(tiling, tiles_per_launch=tiling.tiles, slot_floats=0)
    sums = sr.new_empty(tiling.tiles, 2, dtype=torch.float64)
    counts = sr.new_empty(tiling.tiles, dtype=torch.int32)
    slots = sr.new_empty(tiling.tiles_per_launch * tiling.slot_floats)
    gradient = sr.new_empty(sr.shape if with_gradient else 0)
    for tiles in tiling.launches():
        args: list[Argument] = [sr, gt, mask, np.int32(channels), np.int32(height), np.int32(width), *tiling.arguments()]
        args += [np.int32(tiles.start), np.float32(1 / settings.kappa(channels)), np.float32(weights[0]), np.float32(weights[1])]
        args += [np.int32(settings.normalize), np.int32(with_gradient), sums, counts, slots]
        launch("ssg_loss.cu", "ssg_loss", row.defines(), len(tiles), row.threads, row.shared_bytes, args)
        if with_gradient:
            gather(launch, tiling, tiles, settings.search, slots, counts, gradient, overwrite=tiles.start == 0)
    return sums.sum(0), gradient


def run_graph(launch: Launcher, image: Tensor, pixels: Tensor, settings: GraphSettings, *, shared_limit: int) -> Tensor:
    """Rows [N, search^2] for int64 `pixels` [N], the flat indices into the mask."""
    channels, height, width = image.shape[1:]
    row = row_geometry(settings.search, settings.window, channels, shared_limit)
    rows = image.new_empty(len(pixels), settings.search**2)
    if len(pixels):
        args: list[Argument] = [image, pixels, np.int32(channels), np.int32(height), np.int32(width)]
        args += [np.float32(1 / settings.kappa(channels)), np.int32(settings.normalize), rows]
        launch("ssg_graph.cu", "ssg_graph", row.defines(), len(pixels), row.threads, row.shared_bytes, args)
    return rows


def run_graph_backward(
    launch: Launcher, image: Tensor, mask: Tensor, rows: Tensor, rows_gradient: Tensor, settings: GraphSettings,
    *, shared_limit: int, slot_bytes: int = SLOT_BYTES,
) -> Tensor:  # fmt: skip
    """The gradient of the image [B, C, H, W] from that of its rows [N, search^2]."""
    channels, height, width = image.shape[1:]
    row = row_geometry(settings.search, settings.window, channels, shared_limit)
    tiling = tile_geometry(image.shape, settings.search, slot_bytes)
    row_of = mask.flatten().cumsum(0)
    counts = image.new_empty(tiling.tiles, dtype=torch.int32)
    slots = image.new_empty(tiling.tiles_per_launch * tiling.slot_floats)
    gradient = torch.empty_like(image)
    for tiles in tiling.launches():
        args: list[Argument] = [image, mask, row_of, rows, rows_gradient, np.int32(channels), np.int32(height), np.int32(width)]
        args += [*tiling.arguments(), np.int32(tiles.start), np.float32(1 / settings.kappa(channels)), np.int32(settings.normalize)]
        args += [counts, slots]
        launch("ssg_graph.cu", "ssg_graph_backward", row.defines(), len(tiles), row.threads, row.shared_bytes, args)
        gather(launch, tiling, tiles, settings.search, slots, counts, gradient, overwrite=tiles.start == 0)
    return gradient


def gather(
    launch: Launcher, tiling: TileGeometry, tiles: range, search: int, slots: Tensor, counts: Tensor, gradient: Tensor,
    *, splits: int = 1, overwrite: bool,
) -> None:  # fmt: skip
    """Sums the slots of `tiles`, `splits` of each, into the gradient, or adds them to it."""
    args: list[Argument] = [slots, counts, *(np.int32(side) for side in gradient.shape), np.int32(search // 2), *tiling.arguments()]
    args += [np.int32(tiles.start), np.int32(tiles.stop), np.int32(splits), np.int32(overwrite), gradient]
    launch("ssg_gather.cu", "ssg_gather", (), ceil(gradient.numel() / 256), 256, 0, args)
