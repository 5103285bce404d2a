"""The CPU backend's walk over one tile of an image, compiled by numba: distances of both images, loss, and gradient in one
visit, while everything is in the caches.

D_-d(x) = D_d(x - d), so an offset and its opposite share one map of differences and one rectangle sum S_d(q), q the window's
first sample; each picks its own masked pixels from S_d, and on the way back both place their slopes into one map. Tiles are
walked by horizontal offset dx >= 0, then 16-pixel column block, then all vertical offsets: the rows that are read again and
again stay in the first-level cache. `slide` is how far the two windows of a pair lie apart inside S_d, along one axis.
"""

import math
from typing import NamedTuple

import numba
import numpy as np

from sslsr_diffusion.ops._cpu_pixels import add_rows, adjoint, compare, copy_rows, energies, exponents, gather, hand_over, interact, settle
from sslsr_diffusion.ops._cpu_sums import horizontal_sums, lost_columns, lost_rows, vertical_differences, vertical_sums
from sslsr_diffusion.ops._simd import inner

LOG2E = 1 / math.log(2)
LN2 = math.log(2)
ROW_EPS = 1e-10
SLACK = 8  # rows above and below a tile's reach that the vertical sums touch


class Layout(NamedTuple):
    """Sizes of a call, in pixels or floats."""

    search: int
    reach: int
    half: int
    inner: int  # reach - half: the offsets up to here keep the whole window inside the search square
    height: int  # of a tile: a multiple of 8
    row: int  # width of a tile: a multiple of 16
    margin: int  # of a row of maps: the tile with its windows and those of its partners
    lines: int  # rows of maps per vertical offset, with a window of zeros below
    across: int  # of a row of the dense tile: margin and a window of zeros
    room: int  # pixels of the fullest tile, rounded up
    plane: int  # of the padded image
    stride: int
    normalize: int


class Tile(NamedTuple):
    """One tile of a call."""

    base: int  # its first pixel in the padded image
    positions: np.ndarray  # y * row + x of its masked pixels
    dense: bool  # every pixel is computed, and rows are copied instead of picked
    used: int  # pixels computed, a multiple of 16


class Scratch(NamedTuple):
    """One thread's working memory; float32 but for `place` and `sums`. What must begin as zero is cleared where it is used."""

    maps: np.ndarray  # [search][lines][margin], after rows of slack
    distance: np.ndarray  # [height + a window][across]: S of one pair of offsets; energies; e of the gradient
    picked: np.ndarray  # distances of the masked pixels
    outside: np.ndarray  # [w * w][used]: energy outside the search square by cut; on the way back the slopes by cut
    whole: np.ndarray  # [w][used]
    first: np.ndarray  # [search^2][used]: exponents of sr, then its graph
    second: np.ndarray  # [search^2][used]: exponents of gt, then G T
    pixels: np.ndarray  # [9][room]: see `compare`; 7: partial row sums, 8: factor
    dense: np.ndarray  # [height + inner][across]: slopes of one pair of offsets
    adjoint: np.ndarray
    force: np.ndarray  # [search + 2][rows][16]
    blocks: np.ndarray  # see `_take_blocks`
    partner: np.ndarray
    place: np.ndarray  # uint32: the masked pixels in a map of `across` floats per row
    sums: np.ndarray  # [2][room] float64 row sums


@numba.njit(nogil=True, inline="always")
def _slide(offset, layout):
    return min(abs(offset), layout.inner)


@numba.njit(nogil=True, inline="always")
def _top(dy, layout):
    """First row, from the tile's, that the windows of dy and -dy cover."""
    return -min(dy + layout.half, layout.reach) if dy >= 0 else -min(layout.half, layout.reach + dy)


@numba.njit(nogil=True, inline="always")
def _pair(side, dx, dy, layout):
    """Of d = (dx, dy) for side 0, of -d for side 1: number, variant of the cut, and where its first window begins in S_d."""
    slide_x, slide_y = _slide(dx, layout), _slide(dy, layout)
    number = (dy + layout.reach) * layout.search + dx + layout.reach
    w = 2 * layout.half + 1
    cut_y = layout.half + dy - (slide_y if dy >= 0 else -slide_y)
    variant = cut_y * w + layout.half + dx - slide_x
    if side == 0:
        return number, variant, (slide_y if dy >= 0 else 0) * layout.across + slide_x
    return layout.search**2 - 1 - number, w * w - 1 - variant, (0 if dy >= 0 else slide_y) * layout.across


@inner
def _pick(source, start, tile, layout, place, out, at):
    """out[at + i] = source[start + place of pixel i]."""
    if tile.dense:
        copy_rows(source, start, layout.across, out, at, layout.height, layout.row // 16)
    else:
        moved, picked = source[start:], out[at:]
        for i in range(len(tile.positions)):
            picked[i] = moved[place[i]]


@inner
def _put(values, at, target, start, tile, layout, place):
    """The adjoint of `_pick`: target[start + place of pixel i] += values[at + i]."""
    if tile.dense:
        add_rows(values, at, target, start, layout.across, layout.height, layout.row // 16)
    else:
        moved, put = target[start:], values[at:]
        for i in range(len(tile.positions)):
            moved[place[i]] += put[i]


@inner
def set_places(tile, layout, place):
    """The pixels' positions in rows of `across` floats."""
    for i in range(len(tile.positions)):
        y = tile.positions[i] // np.uint32(layout.row)
        place[i] = tile.positions[i] + y * np.uint32(layout.across - layout.row)


@inner
def _tile_outside(image, tile, layout, s, c, w):
    """Energy outside the search square at the tile's pixels, per way a window can be cut."""
    size, half = len(w), layout.half
    corner = tile.base - half * layout.stride - half
    vectors = (layout.row + 2 * half + 15) // 16
    energies(image, corner, layout.plane, layout.stride, s.distance, layout.across, layout.height + 2 * half, vectors, c)
    for u in range(size * size):
        _pick(s.distance, u // size * layout.across + u % size, tile, layout, s.place, s.outside, u * tile.used)
    lost_columns(s.outside, s.whole, tile.used, tile.used // 16, w)
    lost_rows(s.outside, s.whole, tile.used, tile.used // 16, w)


@inner
def _take_blocks(image, at, dx, layout, s, c):
    """A column block and its partners dx away, rows -reach - SLACK .. height + reach + SLACK; returns where the partners' row 0 is."""
    rows = layout.height + 2 * layout.reach + 2 * SLACK
    top = at - (layout.reach + SLACK) * layout.stride
    gather(image, top, layout.plane, layout.stride, s.blocks, rows, c)
    gather(image, top + dx, layout.plane, layout.stride, s.blocks[rows * len(c) * 16 :], rows, c)
    return (rows + layout.reach + SLACK) * len(c) * 16


@inner
def tile_exponents(image, tile, layout, s, out, sums, scale, c, w):
    """out[offset] = log2 of the un-normalised weights of the tile's pixels, sums = their row sums."""
    used, reach, line = tile.used, layout.reach, len(c) * 16
    partial = s.pixels[7 * layout.room :]
    s.picked[:used] = 0
    partial[:used] = 0
    sums[:used] = 0
    _tile_outside(image, tile, layout, s, c, w)
    start = (SLACK + 2 * layout.half) * layout.margin
    s.picked[:used] = 0
    centre = layout.search**2 // 2
    exponents(s.picked, 0, s.outside, len(w) ** 2 // 2 * used, scale, out, centre * used, partial, used // 16)
    for dx in range(reach + 1):
        slide_x = _slide(dx, layout)
        count_x = len(w) - dx + slide_x
        left = -min(dx + layout.half, reach)
        vectors = (layout.row + slide_x + count_x + 14) // 16
        first_row = reach + 1 if dx == 0 else 0
        for block in range(vectors):
            moved = _take_blocks(image, tile.base + left + block * 16, dx, layout, s, c)
            for iy in range(first_row, layout.search):
                dy = iy - reach
                slide, top = _slide(dy, layout), _top(dy, layout)
                vertical_differences(
                    s.blocks, (SLACK + reach + top) * line, moved + (top + dy) * line,
                    s.maps, start + iy * layout.lines * layout.margin + block * 16, layout.margin,
                    (layout.height + slide + 7) // 8, len(w) - abs(dy) + slide, c, w,
                )  # fmt: skip
        for iy in range(first_row, layout.search):
            horizontal_sums(
                s.maps, start + iy * layout.lines * layout.margin, layout.margin, s.distance, 0, layout.across,
                layout.height + _slide(iy - reach, layout), vectors, count_x, w,
            )  # fmt: skip
            for side in range(2):
                offset, variant, at = _pair(side, dx, iy - reach, layout)
                _pick(s.distance, at, tile, layout, s.place, s.picked, 0)
                exponents(s.picked, 0, s.outside, variant * used, scale, out, offset * used, partial, used // 16)
        for i in range(used):
            sums[i] += partial[i]
            partial[i] = 0


@inner
def tile_gradient(image, gradient, tile, layout, s, c, w):
    """Adds the pull of A = (second - q first) * factor to the gradient of the padded image."""
    used, reach, half, margin = tile.used, layout.reach, layout.half, layout.margin
    rows = layout.height + 2 * reach
    start = (SLACK + 2 * half) * margin
    force_plane = (rows + 8) * 16
    s.maps[:] = 0
    s.dense[:] = 0
    s.force[:] = 0
    s.partner[:] = 0
    s.outside[: len(w) ** 2 * used] = 0
    mean, factor = s.pixels[6 * layout.room :], s.pixels[8 * layout.room :]
    for dx in range(reach + 1):
        slide_x = _slide(dx, layout)
        count_x = len(w) - dx + slide_x
        left = -min(dx + half, reach)
        vectors = (layout.row + slide_x + count_x + 14) // 16
        first_row = reach + 1 if dx == 0 else 0
        for iy in range(first_row, layout.search):
            height = layout.height + _slide(iy - reach, layout)
            s.dense[: height * layout.across] = 0
            for side in range(2):
                offset, variant, at = _pair(side, dx, iy - reach, layout)
                adjoint(s.second, s.first, offset * used, mean, factor, s.adjoint, s.outside, variant * used, used // 16)
                _put(s.adjoint, 0, s.dense, 2 * half + at, tile, layout, s.place)
            horizontal_sums(
                s.dense, 2 * half - (count_x - 1), layout.across, s.maps, start + iy * layout.lines * margin, margin,
                height, vectors, count_x, w,
            )  # fmt: skip
        for block in range(vectors):
            for iy in range(first_row, layout.search):
                dy = iy - reach
                count = len(w) - abs(dy) + _slide(dy, layout)
                vertical_sums(
                    s.maps, start + (iy * layout.lines - (count - 1)) * margin + block * 16, margin,
                    s.force, (iy + 1) * force_plane + (reach + _top(dy, layout)) * 16, 16,
                    (layout.height + _slide(dy, layout) + count + 6) // 8, count, w,
                )  # fmt: skip
            at = tile.base - reach * layout.stride + left + block * 16
            moved = _take_blocks(image, tile.base + left + block * 16, dx, layout, s, c)
            interact(
                s.force, force_plane, s.blocks, SLACK * len(c) * 16, moved - reach * len(c) * 16, s.partner,
                gradient, at, layout.plane, layout.stride, rows, layout.search, len(w), c,
            )  # fmt: skip
            hand_over(s.partner, gradient, at + dx, layout.plane, layout.stride, rows, c)
    _outside_gradient(image, gradient, tile, layout, s, c, w)


@inner
def _outside_gradient(image, gradient, tile, layout, s, c, w):
    """The adjoint of `_tile_outside`, from the slopes by cut in s.outside; whole windows lose nothing."""
    size, half, used = len(w), layout.half, tile.used
    lost_columns(s.outside, s.whole, used, used // 16, w)
    lost_rows(s.outside, s.whole, used, used // 16, w)
    height, vectors = layout.height + 2 * half, (layout.row + 2 * half + 15) // 16
    s.distance[: height * layout.across] = 0
    for u in range(size * size):
        _put(s.outside, u * used, s.distance, u // size * layout.across + u % size, tile, layout, s.place)
    corner = tile.base - half * layout.stride - half
    settle(image, gradient, corner, layout.plane, layout.stride, s.distance, layout.across, height, vectors, c)


@inner
def set_factor(tile, room, pixels, value):
    """factor = value at masked pixels, 0 at the padding."""
    pixels[8 * room : 8 * room + tile.used] = 0
    for i in range(len(tile.positions)):
        pixels[8 * room + (np.int64(tile.positions[i]) if tile.dense else i)] = value


@inner
def tile_loss(tile, l1_weight, kl_weight, layout, s):
    """Both terms of a tile, un-normalised by M. Leaves T_sr in s.first, G T_sr in s.second, q in the pixels."""
    room, used = layout.room, tile.used
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
    for i in range(len(tile.positions)):
        p = np.int64(tile.positions[i]) if tile.dense else i
        l1 += pixels[3 * room + p]
        kl += np.float64(pixels[4 * room + p]) - s.sums[p] * pixels[5 * room + p]
    if not layout.normalize:
        pixels[6 * room : 7 * room] = 0
    return l1, kl * LN2
