"""What the CPU backend calls: compiled entry points that pad images, sort pixels into tiles and walk the tiles of one thread."""

import hashlib
import math
from pathlib import Path

import numba
import numpy as np

from sslsr_diffusion.ops import _cpu_pixels, _cpu_sums, _cpu_tiles, _simd
from sslsr_diffusion.ops._cpu_pixels import weights
from sslsr_diffusion.ops._cpu_tiles import LN2, ROW_EPS, Tile, set_factor, set_places, tile_exponents, tile_gradient, tile_loss
from sslsr_diffusion.ops._simd import inner

# numba's cache watches the file of an entry point; the default of its last argument makes it watch all that the code is made of
_SOURCES = (__file__, _cpu_tiles.__file__, _cpu_pixels.__file__, _cpu_sums.__file__, _simd.__file__)
_STAMP = int(hashlib.sha256(b"".join(Path(source).read_bytes() for source in _SOURCES)).hexdigest()[:15], 16)
TOP = 16  # rows of zeros above and below an image: vertical sums and blocks touch them


@inner
def _tile(number, tiles, positions, layout, s):
    base, first, count, dense = tiles[number, 0], tiles[number, 1], tiles[number, 2], tiles[number, 3] > 0
    tile = Tile(base, positions[first : first + count], dense, layout.height * layout.row if dense else (count + 15) // 16 * 16)
    set_places(tile, layout, s.place)
    return tile


@numba.njit(nogil=True, cache=True)
def loss_tiles(sr, gt, gradient, sums, l1_weight, kl_weight, tiles, positions, rows, layout, s, scale, c, w, stamp=_STAMP):
    gradient[:] = 0
    for t in range(len(tiles)):
        tile = _tile(t, tiles, positions, layout, s)
        tile_exponents(sr, tile, layout, s, s.first, s.sums, scale, c, w)
        tile_exponents(gt, tile, layout, s, s.second, s.sums[layout.room :], scale, c, w)
        sums[t, 0], sums[t, 1] = tile_loss(tile, l1_weight, kl_weight, layout, s)
        if len(gradient):
            set_factor(tile, layout.room, s.pixels, 2 * scale * LN2)
            tile_gradient(sr, gradient, tile, layout, s, c, w)


@numba.njit(nogil=True, cache=True)
def graph_tiles(image, out, tiles, positions, rows, layout, s, scale, c, w, stamp=_STAMP):
    entries = layout.search**2
    for t in range(len(tiles)):
        tile = _tile(t, tiles, positions, layout, s)
        used, first = tile.used, tiles[t, 1]
        tile_exponents(image, tile, layout, s, s.first, s.sums, scale, c, w)
        for i in range(used):
            s.pixels[i] = math.log2(s.sums[i] + ROW_EPS) if layout.normalize else 0.0
        for offset in range(entries):
            weights(s.first, offset * used, s.pixels, used // 16)
        for i in range(len(tile.positions)):
            p = np.int64(tile.positions[i]) if tile.dense else i
            row = np.int64(rows[first + i])
            for offset in range(entries):
                out[row, offset] = s.first[offset * used + p]


@numba.njit(nogil=True, cache=True)
def graph_gradient_tiles(image, out, out_gradient, gradient, tiles, positions, rows, layout, s, scale, c, w, stamp=_STAMP):
    entries, room = layout.search**2, layout.room
    gradient[:] = 0
    for t in range(len(tiles)):
        tile = _tile(t, tiles, positions, layout, s)
        used, first = tile.used, tiles[t, 1]
        s.first[: entries * used] = 0
        s.second[: entries * used] = 0
        s.pixels[6 * room : 7 * room] = 0
        for i in range(len(tile.positions)):
            p = np.int64(tile.positions[i]) if tile.dense else i
            row = np.int64(rows[first + i])
            mean = 0.0
            for offset in range(entries):
                pull = out[row, offset] * out_gradient[row, offset]
                s.first[offset * used + p], s.second[offset * used + p] = out[row, offset], pull
                mean += pull
            if layout.normalize:
                s.pixels[6 * room + p] = mean
        set_factor(tile, room, s.pixels, 2 * scale * LN2)
        tile_gradient(image, gradient, tile, layout, s, c, w)


@numba.njit(nogil=True, cache=True)
def bucket(mask, height, width, stamp=_STAMP):
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


@numba.njit(nogil=True, cache=True)
def pad(image, out, lead, layout, stamp=_STAMP):
    """out: the image [B, C, H, W] reflected by reach, TOP rows and `lead` columns of zeros before it and zeros after it."""
    batch, channels, height, width = image.shape
    reach, stride = layout.reach, layout.stride
    for plane in range(batch * channels):
        for row in range(layout.plane // stride):
            line = out[plane * layout.plane + row * stride : plane * layout.plane + (row + 1) * stride]
            y = row - TOP - reach
            line[:] = 0
            if -reach <= y < height + reach:
                source = image[plane // channels, plane % channels, _reflected(y, height)]
                line[lead + reach : lead + reach + width] = source
                for x in range(1, reach + 1):
                    line[lead + reach - x] = source[x]
                    line[lead + reach + width - 1 + x] = source[width - 1 - x]


@inner
def _reflected(i, size):
    return -i if i < 0 else 2 * (size - 1) - i if i >= size else i


@numba.njit(nogil=True, cache=True)
def fold(parts, part, workers, out, lead, share, layout, stamp=_STAMP):
    """The adjoint of `pad`, times share: the threads' gradients added up, borders folded onto the pixels they were reflected from."""
    batch, channels, height, width = out.shape
    reach, stride = layout.reach, layout.stride
    line = np.empty(stride, np.float32)
    for plane in range(batch * channels):
        for y in range(height):
            line[:] = 0
            for k, source in enumerate((y, -y, 2 * (height - 1) - y)):
                if -reach <= source < height + reach and (k == 0 or source != y):
                    for worker in range(workers):
                        at = worker * part + plane * layout.plane + (TOP + reach + source) * stride
                        line += parts[at : at + stride]
            target = out[plane // channels, plane % channels, y]
            target[:] = line[lead + reach : lead + reach + width]
            for x in range(1, reach + 1):
                target[x] += line[lead + reach - x]
                target[width - 1 - x] += line[lead + reach + width - 1 + x]
            target *= share
