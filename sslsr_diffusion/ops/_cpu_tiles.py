"""The CPU backend's walk over the tiles of an image, compiled by numba. One tile is visited once: distances of both
images, loss, and gradient, while everything is in the caches. Loops go by horizontal offset, then 16-pixel column block,
then all vertical offsets: the rows that are read again and again stay in the first-level cache.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from sslsr_diffusion.ops import _cpu_kernels as kernels
from sslsr_diffusion.ops import _simd

take_block, vertical_differences = kernels.take_block, kernels.vertical_differences
vertical_sums, horizontal_sums = kernels.vertical_sums, kernels.horizontal_sums
exponents, weights, compare, adjoint = kernels.exponents, kernels.weights, kernels.compare, kernels.adjoint
interact, hand_over, settle = kernels.interact, kernels.hand_over, kernels.settle
energies, outside_columns, outside_rows = kernels.energies, kernels.outside_columns, kernels.outside_rows

LOG2E = 1 / math.log(2)
LN2 = math.log(2)
ROW_EPS = 1e-10
_SLACK = 8  # rows above and below a tile that the vertical sums touch


class Layout(NamedTuple):
    """Sizes of a call, in pixels or floats. The grown tile is the region that the windows of its pixels cover."""

    search: int
    reach: int
    half: int
    height: int  # of a tile: a multiple of 8
    row: int  # width of a tile: a multiple of 16
    vectors: int  # of a grown tile's row
    grown: int  # rows of a grown tile
    room: int  # pixels of the fullest tile, rounded up
    plane: int  # of the padded image
    stride: int
    normalize: int


class Scratch(NamedTuple):
    """One thread's working memory; float32 but for `sums`."""

    maps: np.ndarray  # [search][half-window margins + height][vectors * 16], after 8 rows of slack
    distance: np.ndarray
    picked: np.ndarray  # distances of the masked pixels
    outside: np.ndarray  # [w * w][height * row]: energy outside the search square
    chosen: np.ndarray  # [w * w][room]: the same at the masked pixels
    columns: np.ndarray
    energy: np.ndarray
    first: np.ndarray  # [search^2][room]: exponents of sr, then its graph
    second: np.ndarray  # [search^2][room]: exponents of gt, then G T
    pixels: np.ndarray  # [9][room]: see `compare`; 7: partial row sums, 8: factor
    sums: np.ndarray  # [2][room] float64 row sums
    dense: np.ndarray  # A of one offset in the tile, with margins
    adjoint: np.ndarray
    total: np.ndarray
    force: np.ndarray  # [search + 2][rows][16]
    blocks: np.ndarray  # see `_take_blocks`
    partner: np.ndarray
    own: np.ndarray
    spent: np.ndarray
    box: np.ndarray


@numba.njit(nogil=True)
def _tile_outside(image, base, tile_pos, count, dense, layout, s, c, w):
    """Energy outside the search square, per way a window can be cut: into s.outside (dense) or s.chosen."""
    size, margin = len(w), layout.vectors * 16
    energies(image, base, layout.plane, layout.stride, s.energy, margin, layout.grown, layout.vectors, c)
    plane = layout.grown * margin
    outside_columns(s.energy, margin, s.columns, plane, layout.grown, layout.row // 16, w)
    area = layout.height * layout.row
    for column in range(size):
        outside_rows(
            s.columns, column * plane, size * plane, margin, s.outside, column * area, area, layout.row, layout.height, layout.row // 16, w
        )
    if not dense:
        for variant in range(size * size):
            for i in range(count):
                s.chosen[variant * layout.room + i] = s.outside[variant * area + tile_pos[i]]


@numba.njit(nogil=True)
def _take_blocks(image, at, dx, layout, s, c):
    """The column block of the tile and of its partners dx away, with rows of slack around; returns where the partners' row -reach is."""
    row = len(c) * 16
    own = layout.grown + 2 * _SLACK
    take_block(image, at - _SLACK * layout.stride, layout.plane, layout.stride, s.blocks, own, c)
    partners = s.blocks[own * row :]
    top = at - (layout.reach + _SLACK) * layout.stride + dx
    take_block(image, top, layout.plane, layout.stride, partners, layout.grown + layout.search + 2 * _SLACK, c)
    return (own + _SLACK) * row


@numba.njit(nogil=True)
def _tile_exponents(image, base, tile_pos, dense, layout, s, out, sums, scale, c, w):
    """out[offset] = log2 of the un-normalised weights of the tile's pixels, sums = their row sums; returns pixels per offset."""
    search, reach, half = layout.search, layout.reach, layout.half
    count = len(tile_pos)
    area = layout.height * layout.row
    used = area if dense else (count + 15) // 16 * 16
    _tile_outside(image, base, tile_pos, count, dense, layout, s, c, w)
    source, outside, step = (s.distance, s.outside, area) if dense else (s.picked, s.chosen, layout.room)
    partial = s.total
    partial[:used] = 0
    sums[:used] = 0
    margin = layout.vectors * 16
    rows = layout.height + 4 * half
    start = (_SLACK + 2 * half) * margin
    for ix in range(search):
        dx = ix - reach
        low_x, high_x = max(-half, -reach - dx), min(half, reach - dx)
        cut_x = half + dx - max(half - reach, min(reach - half, dx))
        for block in range(layout.vectors):
            moved = _take_blocks(image, base + block * 16, dx, layout, s, c)
            for iy in range(search):
                dy = iy - reach
                low, high = max(-half, -reach - dy), min(half, reach - dy)
                here = (half + low) * len(c) * 16
                vertical_differences(
                    s.blocks, _SLACK * len(c) * 16 + here, moved + here + iy * len(c) * 16,
                    s.maps, start + iy * rows * margin + block * 16, margin, layout.height // 8, high - low + 1, c, w,
                )  # fmt: skip
        for iy in range(search):
            dy = iy - reach
            cut_y = half + dy - max(half - reach, min(reach - half, dy))
            horizontal_sums(
                s.maps, start + iy * rows * margin + half + low_x, margin, s.distance, 0, layout.row,
                layout.height, layout.vectors, high_x - low_x + 1, w,
            )  # fmt: skip
            if not dense:
                for i in range(count):
                    s.picked[i] = s.distance[tile_pos[i]]
            exponents(source, 0, outside, (cut_y * len(w) + cut_x) * step, scale, out, (iy * search + ix) * used, partial, used // 16)
        for i in range(used):
            sums[i] += partial[i]
            partial[i] = 0
    return used


@numba.njit(nogil=True)
def _tile_gradient(image, gradient, base, tile_pos, dense, used, layout, s, c, w):
    """Adds the pull of A = (second - q first) * factor to the gradient of the padded image."""
    search, reach, half, room = layout.search, layout.reach, layout.half, layout.room
    margin = layout.vectors * 16
    rows = layout.height + 4 * half
    start = (_SLACK + 2 * half) * margin
    across = len(s.dense) // layout.height
    grown_steps = (layout.grown + 7) // 8
    force_plane = grown_steps * 8 * 16
    s.dense[:] = 0
    s.own[:] = 0
    s.spent[:] = 0
    s.total[:used] = 0
    mean, factor = s.pixels[6 * room : 7 * room], s.pixels[8 * room : 9 * room]
    for ix in range(search):
        dx = ix - reach
        low_x, high_x = max(-half, -reach - dx), min(half, reach - dx)
        for iy in range(search):
            adjoint(s.second, s.first, (iy * search + ix) * used, mean, factor, s.adjoint, s.total, used // 16)
            _place(s.adjoint, tile_pos, dense, s.dense, across, layout)
            horizontal_sums(
                s.dense, half - high_x, across, s.maps, start + iy * rows * margin, margin, layout.height, layout.vectors,
                high_x - low_x + 1, w,
            )  # fmt: skip
        for block in range(layout.vectors):
            for iy in range(search):
                dy = iy - reach
                low, high = max(-half, -reach - dy), min(half, reach - dy)
                place = (_SLACK + iy * rows + half - high) * margin + block * 16
                vertical_sums(s.maps, place, margin, s.force, (iy + 1) * force_plane, 16, grown_steps, high - low + 1, w)
            moved = _take_blocks(image, base + block * 16, dx, layout, s, c)
            interact(
                s.force, force_plane, s.blocks, _SLACK * len(c) * 16, moved, s.partner, s.own, block * 16,
                layout.grown * margin, margin, s.spent, layout.grown, search, c,
            )  # fmt: skip
            hand_over(
                s.partner, gradient, base - reach * layout.stride + dx + block * 16, layout.plane, layout.stride, layout.grown + search, c
            )
    _place(s.total, tile_pos, dense, s.dense, across, layout)
    horizontal_sums(s.dense, 0, across, s.maps, start, margin, layout.height, layout.vectors, len(w), w)
    for block in range(layout.vectors):
        vertical_sums(s.maps, _SLACK * margin + block * 16, margin, s.box, block * 16, margin, grown_steps, len(w), w)
    settle(
        image, gradient, base, layout.plane, layout.stride, s.own, layout.grown * margin, margin, s.box, s.spent, layout.grown,
        layout.vectors, c,
    )  # fmt: skip


@numba.njit(nogil=True)
def _place(values, tile_pos, dense, target, across, layout):
    """Per-pixel values into the tile's rows, which have a window of zeros to the left."""
    left = 2 * layout.half
    if dense:
        for y in range(layout.height):
            target[y * across + left : y * across + left + layout.row] = values[y * layout.row : (y + 1) * layout.row]
    else:
        for i in range(len(tile_pos)):
            y = tile_pos[i] // np.uint32(layout.row)
            target[tile_pos[i] + y * np.uint32(across - layout.row) + np.uint32(left)] = values[i]


@numba.njit(nogil=True)
def _tile_factor(tile_pos, dense, used, room, pixels, value):
    """factor = value at masked pixels, 0 at the padding."""
    pixels[8 * room : 8 * room + used] = 0
    for i in range(len(tile_pos)):
        pixels[8 * room + (np.int64(tile_pos[i]) if dense else i)] = value


@numba.njit(nogil=True)
def _tile_loss(used, l1_weight, kl_weight, layout, s, tile_pos, dense):
    """Both terms of a tile, un-normalised by M. Leaves T_sr in s.first, G T_sr in s.second, q in the pixels."""
    room = layout.room
    pixels = s.pixels
    pixels[: 9 * room] = 0
    if layout.normalize:
        for i in range(used):
            log_sr, log_gt = math.log2(s.sums[i] + ROW_EPS), math.log2(s.sums[room + i] + ROW_EPS)
            pixels[i], pixels[room + i], pixels[2 * room + i] = log_sr, log_gt, log_gt - log_sr
            s.sums[i] = (log_gt - log_sr) - np.float64(pixels[2 * room + i])  # what float32 could not hold
    else:
        s.sums[:used] = 0
    for offset in range(layout.search**2):
        compare(s.first, s.second, offset * used, pixels, room, l1_weight, kl_weight, used // 16)
    l1 = kl = 0.0
    for i in range(len(tile_pos)):
        p = np.int64(tile_pos[i]) if dense else i
        l1 += pixels[3 * room + p]
        kl += np.float64(pixels[4 * room + p]) - s.sums[p] * pixels[5 * room + p]
    if not layout.normalize:
        pixels[6 * room : 7 * room] = 0
    return l1, kl * LN2


@numba.njit(nogil=True)
def _loss_tiles(sr, gt, gradient, tiles, positions, layout, s, sums, scale, l1_weight, kl_weight, c, w):
    for t in range(len(tiles)):
        base, first, count, dense = tiles[t, 0], tiles[t, 1], tiles[t, 2], tiles[t, 3] > 0
        tile_pos = positions[first : first + count]
        used = _tile_exponents(sr, base, tile_pos, dense, layout, s, s.first, s.sums, scale, c, w)
        _tile_exponents(gt, base, tile_pos, dense, layout, s, s.second, s.sums[layout.room :], scale, c, w)
        sums[t, 0], sums[t, 1] = _tile_loss(used, l1_weight, kl_weight, layout, s, tile_pos, dense)
        if len(gradient):
            _tile_factor(tile_pos, dense, used, layout.room, s.pixels, 2 * scale * LN2)
            _tile_gradient(sr, gradient, base, tile_pos, dense, used, layout, s, c, w)


@numba.njit(nogil=True)
def _graph_tiles(image, out, tiles, positions, rows, layout, s, scale, c, w):
    entries = layout.search**2
    for t in range(len(tiles)):
        base, first, count, dense = tiles[t, 0], tiles[t, 1], tiles[t, 2], tiles[t, 3] > 0
        tile_pos = positions[first : first + count]
        used = _tile_exponents(image, base, tile_pos, dense, layout, s, s.first, s.sums, scale, c, w)
        for i in range(used):
            s.pixels[i] = math.log2(s.sums[i] + ROW_EPS) if layout.normalize else 0.0
        for offset in range(entries):
            weights(s.first, offset * used, s.pixels, used // 16)
        for i in range(count):
            p = np.int64(tile_pos[i]) if dense else i
            row = np.int64(rows[first + i])
            for offset in range(entries):
                out[row, offset] = s.first[offset * used + p]


@numba.njit(nogil=True)
def _graph_gradient_tiles(image, out, out_gradient, gradient, tiles, positions, rows, layout, s, scale, c, w):
    entries, room = layout.search**2, layout.room
    for t in range(len(tiles)):
        base, first, count, dense = tiles[t, 0], tiles[t, 1], tiles[t, 2], tiles[t, 3] > 0
        tile_pos = positions[first : first + count]
        used = layout.height * layout.row if dense else (count + 15) // 16 * 16
        s.first[: entries * used] = 0
        s.second[: entries * used] = 0
        s.pixels[6 * room : 7 * room] = 0
        for i in range(count):
            p = np.int64(tile_pos[i]) if dense else i
            row = np.int64(rows[first + i])
            mean = 0.0
            for offset in range(entries):
                pull = out[row, offset] * out_gradient[row, offset]
                s.first[offset * used + p], s.second[offset * used + p] = out[row, offset], pull
                mean += pull
            if layout.normalize:
                s.pixels[6 * room + p] = mean
        _tile_factor(tile_pos, dense, used, room, s.pixels, 2 * scale * LN2)
        _tile_gradient(image, gradient, base, tile_pos, dense, used, layout, s, c, w)


@numba.njit(nogil=True)
def _bucket(mask, height, width):
    """Masked pixels by tile: (counts per tile, position in the tile, row of the graph), tiles in raster order."""
    batch, rows, columns = mask.shape
    down, across = -(-rows // height), -(-columns // width)
    counts = np.zeros(batch * down * across, np.int64)
    for b in range(batch):
        for y in range(rows):
            for x in range(columns):
                counts[(b * down + y // height) * across + x // width] += mask[b, y, x]
    free = np.zeros(len(counts), np.int64)
    for t in range(1, len(counts)):
        free[t] = free[t - 1] + counts[t - 1]
    total = counts.sum()
    positions, order = np.empty(total, np.uint32), np.empty(total, np.uint32)  # unsigned: indexing needs no test for negatives
    line = 0
    for b in range(batch):
        for y in range(rows):
            for x in range(columns):
                if mask[b, y, x]:
                    t = (b * down + y // height) * across + x // width
                    positions[free[t]], order[free[t]] = y % height * width + x % width, line
                    free[t] += 1
                    line += 1
    return counts, positions, order


def _compiled(stamp: str) -> tuple[Any, ...]:
    """The entry points. numba's cache watches one file; the stamp in the closure makes it watch all that they are made of."""

    @numba.njit(nogil=True, cache=True)
    def loss_tiles(sr, gt, gradient, tiles, positions, layout, s, sums, scale, l1_weight, kl_weight, c, w):
        stamp  # noqa: B018
        _loss_tiles(sr, gt, gradient, tiles, positions, layout, s, sums, scale, l1_weight, kl_weight, c, w)

    @numba.njit(nogil=True, cache=True)
    def graph_tiles(image, out, tiles, positions, rows, layout, s, scale, c, w):
        stamp  # noqa: B018
        _graph_tiles(image, out, tiles, positions, rows, layout, s, scale, c, w)

    @numba.njit(nogil=True, cache=True)
    def graph_gradient_tiles(image, out, out_gradient, gradient, tiles, positions, rows, layout, s, scale, c, w):
        stamp  # noqa: B018
        _graph_gradient_tiles(image, out, out_gradient, gradient, tiles, positions, rows, layout, s, scale, c, w)

    @numba.njit(nogil=True, cache=True)
    def bucket(mask, height, width):
        stamp  # noqa: B018
        return _bucket(mask, height, width)

    return loss_tiles, graph_tiles, graph_gradient_tiles, bucket


_SOURCES = (__file__, kernels.__file__, _simd.__file__)
loss_tiles, graph_tiles, graph_gradient_tiles, bucket = _compiled(
    hashlib.sha256(b"".join(Path(source).read_bytes() for source in _SOURCES)).hexdigest()
)
