"""The CUDA loss where most pixels of a tile are masked: neighbours share their work (kernels/ssg_dense.cuh).

Which tiles are dense is found on the GPU, so that the host never waits; the others are left to `ssg_cuda_launch`, whose blocks work
on one row of the graph at a time.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import numpy as np
import torch
from torch import Tensor

from sslsr_diffusion.ops import ssg_cuda_launch as by_row
from sslsr_diffusion.ops.settings import GraphSettings
from sslsr_diffusion.ops.ssg_cuda_launch import SLOT_BYTES, Argument, Launcher, TileGeometry, gather

_FILE = "ssg_dense.cu"
_ROWS = 32  # of a tile; it has the columns that a warp's lanes leave when the window's reach is taken off on either side
_GROUP = 4  # kGroup in ssg_dense.cuh
_MAX_CHANNELS = 4  # each costs a register per offset that a lane walks with
_MAX_WINDOW = 15  # kLevels in ssg_dense.cuh
_WARPS = 2048  # that fill a large GPU


@dataclass(frozen=True)
class DenseGeometry:
    """How the image is cut into tiles, and how many warps share the offsets of one."""

    search: int
    window: int
    channels: int
    least: int  # masked pixels that make a tile dense
    splits: int  # warps of a tile in the passes that keep a map each
    gradient_splits: int  # and in the one that keeps a slot each
    tiling: TileGeometry

    def defines(self) -> tuple[str, ...]:
        return (f"SSG_SEARCH={self.search}", f"SSG_WINDOW={self.window}", f"SSG_CHANNELS={self.channels}", f"SSG_ROWS={_ROWS}")

    @property
    def map_bytes(self) -> int:
        """Shared memory for a sum per pixel of the tile, and what rounding takes from it."""
        return 8 * self.tiling.tile_h * self.tiling.tile_w

    @property
    def pull_bytes(self) -> int:
        return 4 * (_GROUP + 1) * _ROWS * 32

    def tile_arguments(self) -> list[Argument]:
        return [np.int32(self.tiling.tiles_y), np.int32(self.tiling.tiles_x)]


def dense_geometry(shape: torch.Size, search: int, window: int, slot_bytes: int = SLOT_BYTES) -> DenseGeometry | None:
    """None where no mask would make it faster, or the kernels are not made for the sizes."""
    batch, channels, height, width = shape
    if not 3 <= window <= _MAX_WINDOW or channels > _MAX_CHANNELS:
        return None
    columns = 33 - window
    tiles_y, tiles_x = ceil(height / _ROWS), ceil(width / columns)
    tiles, slot = batch * tiles_y * tiles_x, channels * (_ROWS + search - 1) * (columns + search - 1)
    splits = _splits(search, ceil(_WARPS / tiles))
    gradient_splits = _splits(search, max(1, min(splits, slot_bytes // (4 * slot * tiles))))
    launches = ceil(tiles / max(1, slot_bytes // (4 * slot * gradient_splits)))
    tiling = TileGeometry(_ROWS, columns, tiles_y, tiles_x, tiles, ceil(tiles / launches), slot * gradient_splits)
    return DenseGeometry(search, window, channels, ceil(crossing(window, channels) * _ROWS * columns), splits, gradient_splits, tiling)


def _splits(search: int, most: int) -> int:
    """At most so many warps of a tile, none of which has fewer columns of offsets than it must."""
    return ceil(search / ceil(search / min(most, search)))


def crossing(window: int, channels: int) -> float:
    """The share of a tile's pixels from which it is the faster path, by instructions counted in the compiled code (sm_90).

    Per offset, a masked pixel takes about 0.27 C window^2 + 10 C instructions of a warp in ssg_loss, a tile 320 + 25 C per line here.
    """
    tile = (_ROWS + window - 1) * (320 + 25 * channels)
    return tile / (0.27 * channels * window**2 + 10 * channels) / (_ROWS * (33 - window))


def run_loss(
    launch: Launcher, sr: Tensor, gt: Tensor, mask: Tensor, settings: GraphSettings, weights: tuple[float, float],
    *, with_gradient: bool, shared_limit: int, slot_bytes: int = SLOT_BYTES, least: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `ssg_cuda_launch.run_loss`, each tile by the path that its mask is for; `least` in place of the number that is best."""
    rows = partial(by_row.run_loss, launch, sr, gt, with_gradient=with_gradient, shared_limit=shared_limit, slot_bytes=slot_bytes)
    dense = dense_geometry(sr.shape, settings.search, settings.window, slot_bytes)
    if dense is None:
        return rows(mask=mask, settings=settings, weights=weights)
    if least is not None:
        dense = replace(dense, least=least)
    counts, others = sr.new_empty(dense.tiling.tiles, dtype=torch.int32), torch.empty_like(mask)
    sides: list[Argument] = [np.int32(side) for side in sr.shape[2:]]
    args: list[Argument] = [mask, *sides, *dense.tile_arguments(), np.int32(dense.least), counts, others]
    launch(_FILE, "ssg_dense_choose", dense.defines(), dense.tiling.tiles, 32, 0, args)
    sums, gradient = rows(mask=others, settings=settings, weights=weights)
    scales = _scales(launch, dense, (sr, gt), mask, counts, settings)
    values, q = _values(launch, dense, (sr, gt), counts, scales, settings, weights)
    if with_gradient:
        _add_gradient(launch, dense, (sr, gt), counts, scales, q, settings, weights, gradient)
    return sums + values, gradient


def _scales(
    launch: Launcher, dense: DenseGeometry, images: tuple[Tensor, Tensor], mask: Tensor, counts: Tensor, settings: GraphSettings
) -> tuple[Tensor, Tensor]:
    """Per pixel [1 / Z_sr, 1 / Z_gt, ln Z_sr, ln Z_gt], 0 where this path has no row, and ln(Z_sr / Z_gt)."""
    batch, channels, height, width = images[0].shape
    tiles, splits = dense.tile_arguments(), np.int32(dense.splits)
    sums = [counts, counts]  # of un-normalised rows none are needed
    if settings.normalize:
        sums = [image.new_empty(dense.splits, batch, height, width, dtype=torch.float64) for image in images]
        for image, out in zip(images, sums):
            args: list[Argument] = [
                image,
                counts,
                np.int32(height),
                np.int32(width),
                *tiles,
                splits,
                np.float32(1 / settings.kappa(channels)),
            ]
            launch(_FILE, "ssg_dense_sums", dense.defines(), dense.tiling.tiles * dense.splits, 32, dense.map_bytes, [*args, out])
    scales, ratios = images[0].new_empty(batch, height, width, 4), images[0].new_empty(batch, height, width)
    args = [*sums, mask, counts, np.int32(batch), np.int32(height), np.int32(width), *tiles, splits, np.int32(settings.normalize)]
    launch(_FILE, "ssg_dense_scales", dense.defines(), ceil(ratios.numel() / 256), 256, 0, [*args, scales, ratios])
    return scales, ratios


def _values(
    launch: Launcher, dense: DenseGeometry, images: tuple[Tensor, Tensor], counts: Tensor, scales: tuple[Tensor, Tensor],
    settings: GraphSettings, weights: tuple[float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of L1 and KL in float64, and q per pixel [B, H, W], which only dense tiles have."""
    batch, channels, height, width = images[0].shape
    blocks = dense.tiling.tiles * dense.splits
    sums = images[0].new_empty(blocks, 2, dtype=torch.float64)
    q = images[0].new_empty(dense.splits, batch, height, width)
    args: list[Argument] = [*images, counts, *scales, np.int32(height), np.int32(width), *dense.tile_arguments(), np.int32(dense.splits)]
    args += [np.float32(1 / settings.kappa(channels)), np.float32(weights[0]), np.float32(weights[1]), sums, q]
    launch(_FILE, "ssg_dense_values", dense.defines(), blocks, 32, dense.map_bytes, args)
    return sums.sum(0), q.sum(0)


def _add_gradient(
    launch: Launcher, dense: DenseGeometry, images: tuple[Tensor, Tensor], counts: Tensor, scales: tuple[Tensor, Tensor], q: Tensor,
    settings: GraphSettings, weights: tuple[float, float], gradient: Tensor,
) -> None:  # fmt: skip
    channels, height, width = gradient.shape[1:]
    tiling, splits = dense.tiling, dense.gradient_splits
    slots = gradient.new_empty(tiling.tiles_per_launch * tiling.slot_floats)
    for tiles in tiling.launches():
        args: list[Argument] = [*images, counts, *scales, q, np.int32(height), np.int32(width), *dense.tile_arguments()]
        args += [np.int32(splits), np.int32(tiles.start), np.float32(1 / settings.kappa(channels)), np.float32(weights[0])]
        args += [np.float32(weights[1]), np.int32(settings.normalize), slots]
        launch(_FILE, "ssg_dense_gradient", dense.defines(), len(tiles) * splits, 32, dense.pull_bytes, args)
        gather(launch, tiling, tiles, settings.search, slots, counts, gradient, splits=splits, overwrite=False)
