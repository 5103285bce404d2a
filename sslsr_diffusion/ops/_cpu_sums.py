"""The CPU backend's sums over rectangles, each a kernel on sixteen pixels of a row at a time (see `_simd`).

Names: c channels and w window size, known at compile time; count the number of window positions inside the search square
(w for inner offsets, down to w // 2 + 1 at the rim), chosen at run time among unrolled variants.
A rectangle is a vertical and a horizontal pass of binary doubling (9 = 8 + 1 needs 4 additions) whose partial sums travel
through the loop in registers. Only additions: a running sum with subtraction would lose float32 digits.
"""

from collections.abc import Callable

from llvmlite import ir

from sslsr_diffusion.ops._simd import LANES, Pointer, Value, each, each_vector, kernel, loop, window, zeros

_ROWS = 8  # rows per step of the vertical sums


def _parts(count: int) -> list[tuple[int, int]]:
    """(level, offset) of the partial sums of 2^level neighbours that add up to `count` neighbours: shortest first looks back least."""
    found, offset = [], 0
    for level in range(count.bit_length()):
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


def _for_each_count(w: int, count: Value, write: Callable[[int], None]) -> None:
    """A switch over the possible counts; each case is unrolled for its own."""
    builder = count.b
    done = builder.append_basic_block("done")
    switch = builder.switch(count.v, done)
    for possible in range(w // 2 + 1, w + 1):
        block = builder.append_basic_block(f"count{possible}")
        switch.add_case(ir.Constant(ir.IntType(64), possible), block)
        builder.position_at_end(block)
        write(possible)
        builder.branch(done)
    builder.position_at_end(done)


def _vertical(count: int, steps: Value, read: Callable[[Value], Value], write: Callable[[Value, Value], None]) -> None:
    """write(row, sum of read(row) .. read(row + count - 1)) for 8 * steps rows; may read up to 7 rows above row 0."""
    warm = -(-(count - 1) // _ROWS)

    def step(first: Value, history: list[Value], store: bool) -> list[Value]:
        running = _Running(count, history)
        for row in range(_ROWS):
            total = running.feed(read(first + (row + count - 1)))
            if store:
                write(first + row, total)
        return running.history()

    history = zeros(steps, _Running.size(count))
    history = loop(steps.like(warm), history, lambda i, past: step((i - warm) * _ROWS, past, store=False))
    loop(steps, history, lambda i, past: step(i * _ROWS, past, store=True))


@kernel
def vertical_differences(
    blocks: Pointer, base: Value, moved: Value, out: Pointer, at: Value, out_stride: Value, steps: Value, count: Value, c: int, w: int
) -> None:
    """out[at + row * out_stride] = sum of `count` rows of sum_c (moved - base)^2, for 8 * steps rows of two blocks of `gather`."""

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

    _for_each_count(w, count, lambda possible: _vertical(possible, steps, squared, write))


@kernel
def vertical_sums(
    source: Pointer, start: Value, stride: Value, out: Pointer, at: Value, out_stride: Value, steps: Value, count: Value, w: int
) -> None:
    """out[at + row * out_stride] = sum of `count` rows of source from row on, for 8 * steps rows."""

    def write(row: Value, total: Value) -> None:
        out.store(at + row * out_stride, total)

    def variant(possible: int) -> None:
        _vertical(possible, steps, lambda row: source.load(start + row * stride), write)

    _for_each_count(w, count, variant)


@kernel
def horizontal_sums(
    source: Pointer, start: Value, stride: Value, out: Pointer, at: Value, out_stride: Value,
    rows: Value, vectors: Value, count: Value, w: int,
) -> None:  # fmt: skip
    """out[at + x] = source[start + x] + ... + source[start + x + count - 1] along `rows` rows of 16 * vectors floats."""

    def variant(possible: int) -> None:
        each(rows, lambda row: _sum_row(source, start + row * stride, out, at + row * out_stride, vectors, possible))

    _for_each_count(w, count, variant)


def _sum_row(source: Pointer, start: Value, out: Pointer, at: Value, vectors: Value, count: int) -> None:
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

    loop(vectors, zeros(vectors, sum(reach)), step)


def _lost(values: list[Value]) -> tuple[list[Value], Value]:
    """For every cut -half .. half the sum of the values that it loses (the last ones for cut > 0), and the sum of all.

    Value u is lost where |u + cut| > half, which is symmetric in u and cut: the map is its own adjoint.
    """
    half = len(values) // 2
    left, right = _sums_from(values), _sums_from(values[::-1])
    return [right[cut] if cut > 0 else left[-cut] for cut in range(-half, half + 1)], left[-1]


def _sums_from(values: list[Value]) -> list[Value]:
    """Sums of the first 0, 1, 2, ... values."""
    sums = zeros(values[0], 1)
    for value in values:
        sums.append(sums[-1] + value)
    return sums


@kernel
def lost_columns(values: Pointer, whole: Pointer, length: Value, vectors: Value, w: int) -> None:
    """[w][w][length], in place: each row of window columns becomes, for each horizontal cut, what it loses; whole [w][length]: all."""

    def step(uy: Value, x: Value) -> None:
        first = uy * length * w + x
        lost, everything = _lost([values.load(first + length * ux) for ux in range(w)])
        for cut, part in enumerate(lost):
            values.store(first + length * cut, part)
        whole.store(uy * length + x, everything)

    each_vector(vectors.like(w), vectors, step)


@kernel
def lost_rows(values: Pointer, whole: Pointer, length: Value, vectors: Value, w: int) -> None:
    """After `lost_columns`, in place: for each vertical cut, the lost columns of the rows it keeps and the whole of those it loses."""
    half = w // 2

    def step(cut_x: Value, x: Value) -> None:
        first = cut_x * length + x
        part = [values.load(first + length * (uy * w)) for uy in range(w)]
        lost = _lost([whole.load(x + length * uy) for uy in range(w)])[0]
        top, end = _sums_from(part), _sums_from(part[::-1])
        for cut in range(-half, half + 1):
            kept = top[w - cut] if cut >= 0 else end[w + cut]
            values.store(first + length * ((cut + half) * w), kept + lost[cut + half])

    each_vector(vectors.like(w), vectors, step)
