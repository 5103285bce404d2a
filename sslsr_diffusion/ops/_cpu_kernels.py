"""The inner loops of the CPU backend, each a kernel on sixteen pixels of a row at a time (see `_simd`).

Names: c channels and w window size, known at compile time; count the number of window positions inside the search square
(w for inner offsets, down to w // 2 + 1 at the rim), chosen at run time among unrolled variants.
Rectangle sums are two passes of `window sums`: binary doubling (9 = 8 + 1 needs 4 additions) whose partial sums travel
through the loop in registers. Only additions: a running sum with subtraction would lose float32 digits.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from sslsr_diffusion.ops._simd import LANES, Pointer, Value, kernel, loop, number, splat, window, zeros

_ROWS = 8  # rows per step of the vertical sums


def _parts(count: int) -> list[tuple[int, int]]:
    """(level, offset) of the partial sums of 2^level neighbours that add up to `count` neighbours, longest first."""
    found, offset = [], 0
    for level in reversed(range(count.bit_length())):
        if count >> level & 1:
            found.append((level, offset))
            offset += 1 << level
    return found


def _depths(count: int) -> list[int]:
    """How many earlier values of each level a running window sum over `count` neighbours looks back to."""
    depths = [0] * count.bit_length()
    for level in range(1, count.bit_length()):
        depths[level - 1] = 1 << (level - 1)
    for level, offset in _parts(count):
        depths[level] = max(depths[level], offset)
    return depths


class _Running:
    """Sums of the last `count` values of a sequence, fed one at a time while code is emitted."""

    def __init__(self, count: int, history: list[Value]):
        self.count, self.depths = count, _depths(count)
        self.past: list[list[Value]] = []  # per level, newest first
        for depth in self.depths:
            self.past.append(history[:depth])
            history = history[depth:]

    @staticmethod
    def size(count: int) -> int:
        return sum(_depths(count))

    def feed(self, value: Value) -> Value:
        levels = [value]
        for level in range(1, len(self.depths)):
            levels.append(levels[-1] + self.past[level - 1][(1 << (level - 1)) - 1])
        total = None
        for level, offset in _parts(self.count):
            piece = levels[level] if offset == 0 else self.past[level][offset - 1]
            total = piece if total is None else total + piece
        self.past = [[new, *old][:depth] for new, old, depth in zip(levels, self.past, self.depths)]
        assert total is not None
        return total

    def history(self) -> list[Value]:
        return [value for level in self.past for value in level]


def _for_each_count(builder: ir.IRBuilder, w: int, count: Value, write: Callable[[int], None]) -> None:
    """A switch over the possible counts; each case is unrolled for its own."""
    done = builder.append_basic_block("done")
    switch = builder.switch(count.v, done)
    for possible in range(w // 2 + 1, w + 1):
        block = builder.append_basic_block(f"count{possible}")
        switch.add_case(ir.Constant(ir.IntType(64), possible), block)
        builder.position_at_end(block)
        write(possible)
        builder.branch(done)
    builder.position_at_end(done)


def _vertical(
    builder: ir.IRBuilder,
    count: int,
    steps: Value,
    read: Callable[[Value], Value],
    write: Callable[[Value, Value], None],
) -> None:
    """write(row, sum of read(row) .. read(row + count - 1)) for 8 * steps rows; may read up to 7 rows above row 0."""
    warm = -(-(count - 1) // _ROWS)

    def step(first: Value, history: list[Value], store: bool) -> list[Value]:
        running = _Running(count, history)
        for row in range(_ROWS):
            total = running.feed(read(first + (row + count - 1)))
            if store:
                write(first + row, total)
        return running.history()

    history = zeros(builder, _Running.size(count))
    history = loop(builder, number(builder, warm), history, lambda i, past: step((i - warm) * _ROWS, past, store=False))
    loop(builder, steps, history, lambda i, past: step(i * _ROWS, past, store=True))


@kernel
def take_block(builder: ir.IRBuilder, image: Pointer, at: Value, plane: Value, stride: Value, out: Pointer, rows: Value, c: int) -> None:
    """Sixteen columns of the image as out[row][channel][16]: read hundreds of times, so aligned and close together."""

    def step(i: Value, _: list[Value]) -> list[Value]:
        for ch in range(c):
            out.store((i * c + ch) * LANES, image.load(at + i * stride + plane * ch))
        return []

    loop(builder, rows, [], step)


@kernel
def vertical_differences(
    builder: ir.IRBuilder, blocks: Pointer, base: Value, moved: Value, out: Pointer, at: Value, out_stride: Value, steps: Value,
    count: Value, c: int, w: int,
) -> None:  # fmt: skip
    """out[at + row * out_stride] = sum of `count` rows of sum_c (moved - base)^2, for 8 * steps rows of two blocks of `take_block`."""

    def squared(row: Value) -> Value:
        total = None
        for channel in range(c):
            step = (row * c + channel) * LANES
            difference = blocks.load(moved + step) - blocks.load(base + step)
            total = difference * difference if total is None else difference.fma(difference, total)
        assert total is not None
        return total

    def write(row: Value, total: Value) -> None:
        out.store(at + row * out_stride, total)

    _for_each_count(builder, w, count, lambda possible: _vertical(builder, possible, steps, squared, write))


@kernel
def vertical_sums(
    builder: ir.IRBuilder, source: Pointer, start: Value, stride: Value, out: Pointer, at: Value, out_stride: Value,
    steps: Value, count: Value, w: int,
) -> None:  # fmt: skip
    """out[at + row * out_stride] = sum of `count` rows of source from row on, for 8 * steps rows."""

    def write(row: Value, total: Value) -> None:
        out.store(at + row * out_stride, total)

    def variant(possible: int) -> None:
        _vertical(builder, possible, steps, lambda row: source.load(start + row * stride), write)

    _for_each_count(builder, w, count, variant)


@kernel
def horizontal_sums(
    builder: ir.IRBuilder, source: Pointer, start: Value, stride: Value, out: Pointer, at: Value, out_stride: Value,
    rows: Value, vectors: Value, count: Value, w: int,
) -> None:  # fmt: skip
    """out[at + x] = source[start + x] + ... + source[start + x + count - 1] along `rows` rows of 16 * vectors floats."""

    def variant(possible: int) -> None:
        loop(
            builder, rows, [], lambda row, _: _sum_row(builder, source, start + row * stride, out, at + row * out_stride, vectors, possible)
        )

    _for_each_count(builder, w, count, variant)


def _sum_row(builder: ir.IRBuilder, source: Pointer, start: Value, out: Pointer, at: Value, vectors: Value, count: int) -> list[Value]:
    """From right to left, so that each vector's right-hand neighbours are already there, at every doubling level."""
    parts = _parts(count)
    reach = [0] * count.bit_length()  # neighbouring vectors needed per level
    for level in range(1, count.bit_length()):
        reach[level - 1] = -(-(1 << (level - 1)) // LANES)
    for level, offset in parts:
        reach[level] = max(reach[level], -(-offset // LANES))

    def shifted(values: list[Value], shift: int) -> Value:
        whole, lanes = divmod(shift, LANES)
        return values[whole] if lanes == 0 else window(values[whole], values[whole + 1], lanes)

    def step(i: Value, carried: list[Value]) -> list[Value]:
        x = (vectors - i - 1) * LANES
        levels: list[list[Value]] = []
        for depth in reach:
            new = source.load(start + x) if not levels else levels[-1][0] + shifted(levels[-1], 1 << (len(levels) - 1))
            levels.append([new, *carried[:depth]])
            carried = carried[depth:]
        total = None
        for level, offset in parts:
            piece = shifted(levels[level], offset)
            total = piece if total is None else total + piece
        assert total is not None
        out.store(at + x, total)
        return [value for values, depth in zip(levels, reach) for value in values[:depth]]

    loop(builder, vectors, zeros(builder, sum(reach)), step)
    return []


@kernel
def exponents(
    builder: ir.IRBuilder, distance: Pointer, start: Value, outside: Pointer, extra: Value, scale: Value, out: Pointer, at: Value,
    total: Pointer, vectors: Value,
) -> None:  # fmt: skip
    """out = (distance + outside) * scale, the base-2 exponent of s; total += s. Below -100 it stays there: no denormals."""
    factor = splat(builder, scale)

    def step(i: Value, _: list[Value]) -> list[Value]:
        x = i * LANES
        exponent = ((distance.load(start + x) + outside.load(extra + x)) * factor).at_least(-100.0)
        out.store(at + x, exponent)
        total.store(x, total.load(x) + exponent.exp2())
        return []

    loop(builder, vectors, [], step)


@kernel
def weights(builder: ir.IRBuilder, exponent: Pointer, at: Value, log_total: Pointer, vectors: Value) -> None:
    """T = 2^(exponent - log_total), in place."""

    def step(i: Value, _: list[Value]) -> list[Value]:
        x = i * LANES
        exponent.store(at + x, (exponent.load(at + x) - log_total.load(x)).at_least(-120.0).exp2())
        return []

    loop(builder, vectors, [], step)


_LOG2_CLAMP = -33.219280948873624  # log2(1e-10)


@kernel
def compare(
    builder: ir.IRBuilder, sr: Pointer, gt: Pointer, at: Value, pixels: Pointer, room: Value, l1_weight: Value, kl_weight: Value,
    vectors: Value,
) -> None:  # fmt: skip
    """One offset of the loss: sums |T_sr - T_gt|, b log2(b/a), b and G T_sr per pixel; sr <- T_sr, gt <- G T_sr.

    `pixels` holds per-pixel rows of length room: log2 Z_sr, log2 Z_gt, their difference, then the four sums.
    The sign comes from the exponents: equal images cancel exactly there, whatever rounding follows.
    """
    low, one, none = splat(builder, _LOG2_CLAMP), splat(builder, 1.0), splat(builder, 0.0)
    minus = splat(builder, -1.0)
    pull_l1, pull_kl = splat(builder, l1_weight), splat(builder, kl_weight)

    def step(i: Value, _: list[Value]) -> list[Value]:
        x = i * LANES
        raw_sr, raw_gt = sr.load(at + x), gt.load(at + x)
        log_sr = (raw_sr - pixels.load(x)).at_least(-120.0)
        log_gt = (raw_gt - pixels.load(x + room)).at_least(-120.0)
        ratio = raw_gt - raw_sr - pixels.load(x + room * 2)  # log2(T_gt / T_sr), without the rounding of either logarithm
        t_sr, t_gt = log_sr.exp2(), log_gt.exp2()
        b = t_gt.at_least(1e-10)
        clamped = log_gt.at_least(low) - log_sr.at_least(low)
        log_ratio = log_sr.where(">=", low, log_gt.where(">=", low, ratio, clamped), clamped)
        sign = ratio.where("<", none, one, ratio.where(">", none, minus, none))
        pull = sign * pull_l1 * t_sr - log_sr.where(">=", low, b, none) * pull_kl  # T_sr * b / a = b above the clamp
        for row, term in ((3, (t_sr - t_gt).magnitude()), (4, b * log_ratio), (5, b), (6, pull)):
            place = x + room * row
            pixels.store(place, pixels.load(place) + term)
        sr.store(at + x, t_sr)
        gt.store(at + x, pull)
        return []

    loop(builder, vectors, [], step)


@kernel
def adjoint(
    builder: ir.IRBuilder, pull: Pointer, weight: Pointer, at: Value, mean: Pointer, factor: Pointer, out: Pointer, total: Pointer,
    vectors: Value,
) -> None:  # fmt: skip
    """out = (G T - q T) * factor = 2 dL/d dist of one offset; total += out."""

    def step(i: Value, _: list[Value]) -> list[Value]:
        x = i * LANES
        value = (pull.load(at + x) - mean.load(x) * weight.load(at + x)) * factor.load(x)
        out.store(x, value)
        total.store(x, total.load(x) + value)
        return []

    loop(builder, vectors, [], step)


@kernel
def interact(
    builder: ir.IRBuilder, force: Pointer, plane_force: Value, blocks: Pointer, base: Value, moved: Value, partner: Pointer,
    own: Pointer, at: Value, own_plane: Value, own_stride: Value, spent: Pointer, rows: Value, search: Value, c: int,
) -> None:  # fmt: skip
    """All vertical offsets of one column block: with B = force, F = B (P(x+d) - P(x)); own -= F, partner(x+d) += F, spent += B.

    Two rows y, y + 1 stay in registers while their common partner row y + dy walks down; row dy of B is plane dy + 1,
    and planes 0 and search + 1 are zero, because the two rows' offsets differ by one.
    """

    def pair(i: Value, _: list[Value]) -> list[Value]:
        y = i * 2
        here = [[blocks.load(base + ((y + r) * c + ch) * LANES) for ch in range(c)] for r in range(2)]

        def meet(t: Value, sums: list[Value]) -> list[Value]:
            pulls = [force.load((t + 1) * plane_force + y * LANES), force.load(t * plane_force + (y + 1) * LANES)]
            result = [sums[0] + pulls[0], sums[1] + pulls[1]]
            for ch in range(c):
                place = ((y + t) * c + ch) * LANES
                there = blocks.load(moved + place)
                received = partner.load(place)
                for r in range(2):
                    difference = there - here[r][ch]
                    received = pulls[r].fma(difference, received)
                    result.append(pulls[r].fma(difference, sums[2 + 2 * ch + r]))
                partner.store(place, received)
            return result

        sums = loop(builder, search + 1, zeros(builder, 2 + 2 * c), meet)
        for r in range(2):
            place = at + (y + r) * own_stride
            spent.store(place, spent.load(place) + sums[r])
            for ch in range(c):
                target = place + own_plane * ch
                own.store(target, own.load(target) - sums[2 + 2 * ch + r])
        return []

    builder_rows = Value(builder, builder.lshr(rows.v, ir.Constant(rows.v.type, 1)))
    loop(builder, builder_rows, [], pair)


@kernel
def hand_over(
    builder: ir.IRBuilder, partner: Pointer, image_gradient: Pointer, at: Value, plane: Value, stride: Value, rows: Value, c: int
) -> None:
    """Adds the partners' column block to the image gradient and clears it."""

    def step(i: Value, _: list[Value]) -> list[Value]:
        for ch in range(c):
            place, target = (i * c + ch) * LANES, at + i * stride + plane * ch
            image_gradient.store(target, image_gradient.load(target) + partner.load(place))
            partner.store(place, splat(builder, 0.0))
        return []

    loop(builder, rows, [], step)


@kernel
def energies(
    builder: ir.IRBuilder, image: Pointer, base: Value, plane: Value, stride: Value, out: Pointer, out_stride: Value, rows: Value,
    vectors: Value, c: int,
) -> None:  # fmt: skip
    """out = sum_c image^2."""

    def row(i: Value, _: list[Value]) -> list[Value]:
        def step(j: Value, _: list[Value]) -> list[Value]:
            total = splat(builder, 0.0)
            for ch in range(c):
                pixel = image.load(base + i * stride + j * LANES + plane * ch)
                total = pixel.fma(pixel, total)
            out.store(i * out_stride + j * LANES, total)
            return []

        return loop(builder, vectors, [], step)

    loop(builder, rows, [], row)


def _sums_from(values: list[Value]) -> list[Value]:
    """Sums of the first 0, 1, 2, ... values."""
    sums = [splat(values[0].b, 0.0)]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


@kernel
def outside_columns(
    builder: ir.IRBuilder, energy: Pointer, stride: Value, out: Pointer, plane: Value, rows: Value, vectors: Value, w: int
) -> None:
    """Plane v = cut + w // 2: energy of the window columns that a cut loses (right side for cut > 0); plane w: of all columns."""
    half = w // 2

    def row(i: Value, _: list[Value]) -> list[Value]:
        def step(j: Value, _: list[Value]) -> list[Value]:
            x = i * stride + j * LANES
            values = [energy.load(x + u) for u in range(w)]
            left, right = _sums_from(values), _sums_from(values[::-1])
            for cut in range(-half, half + 1):
                out.store(x + plane * (cut + half), right[cut] if cut > 0 else left[-cut])
            out.store(x + plane * w, left[w])
            return []

        return loop(builder, vectors, [], step)

    loop(builder, rows, [], row)


@kernel
def outside_rows(
    builder: ir.IRBuilder, columns: Pointer, start: Value, whole: Value, stride: Value, out: Pointer, at: Value, plane: Value,
    out_stride: Value, rows: Value, vectors: Value, w: int,
) -> None:  # fmt: skip
    """Plane v of out, every w-th: energy outside W_d: what the column cut loses in the rows kept, everything in the rows lost."""
    half = w // 2

    def row(i: Value, _: list[Value]) -> list[Value]:
        def step(j: Value, _: list[Value]) -> list[Value]:
            x = i * stride + j * LANES
            part = [columns.load(start + x + stride * u) for u in range(w)]
            full = [columns.load(whole + x + stride * u) for u in range(w)]
            part_top, part_end = _sums_from(part), _sums_from(part[::-1])
            full_top, full_end = _sums_from(full), _sums_from(full[::-1])
            for cut in range(-half, half + 1):
                total = part_top[w - cut] + full_end[cut] if cut >= 0 else part_end[w + cut] + full_top[-cut]
                out.store(at + i * out_stride + j * LANES + plane * ((cut + half) * w), total)
            return []

        return loop(builder, vectors, [], step)

    loop(builder, rows, [], row)


@kernel
def settle(
    builder: ir.IRBuilder, image: Pointer, gradient: Pointer, base: Value, plane: Value, stride: Value, own: Pointer, own_plane: Value,
    own_stride: Value, box: Pointer, spent: Pointer, rows: Value, vectors: Value, c: int,
) -> None:  # fmt: skip
    """gradient += own + P (box - spent): the forces on the tile's own pixels, and e of the formula."""

    def row(i: Value, _: list[Value]) -> list[Value]:
        def step(j: Value, _: list[Value]) -> list[Value]:
            x = i * own_stride + j * LANES
            rest = box.load(x) - spent.load(x)
            for ch in range(c):
                target = base + i * stride + j * LANES + plane * ch
                force = image.load(target).fma(rest, own.load(x + own_plane * ch))
                gradient.store(target, gradient.load(target) + force)
            return []

        return loop(builder, vectors, [], step)

    loop(builder, rows, [], row)
