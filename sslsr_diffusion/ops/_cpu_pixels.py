"""The CPU backend's work on single pixels, each a kernel on sixteen of them at a time (see `_simd`): exponents and weights of a
graph, the loss and its slope, and the forces between an image and its shifted copy. c is the number of channels, known at compile time.
"""

from sslsr_diffusion.ops._simd import LANES, Pointer, Value, each, each_vector, kernel, loop, splat, zeros


@kernel
def gather(image: Pointer, at: Value, plane: Value, stride: Value, out: Pointer, rows: Value, c: int) -> None:
    """Sixteen columns of the image as out[row][channel][16]: read hundreds of times, so aligned and close together."""

    def step(i: Value) -> None:
        for ch in range(c):
            out.store((i * c + ch) * LANES, image.load(at + i * stride + plane * ch))

    each(rows, step)


@kernel
def copy_rows(source: Pointer, start: Value, stride: Value, out: Pointer, at: Value, rows: Value, vectors: Value) -> None:
    """Rows of 16 * vectors floats, `stride` apart in source, side by side in out."""

    def step(i: Value, x: Value) -> None:
        out.store(at + i * vectors * LANES + x, source.load(start + i * stride + x))

    each_vector(rows, vectors, step)


@kernel
def add_rows(values: Pointer, at: Value, target: Pointer, start: Value, stride: Value, rows: Value, vectors: Value) -> None:
    """The adjoint of `copy_rows`."""

    def step(i: Value, x: Value) -> None:
        place = start + i * stride + x
        target.store(place, target.load(place) + values.load(at + i * vectors * LANES + x))

    each_vector(rows, vectors, step)


@kernel
def exponents(
    distance: Pointer, start: Value, outside: Pointer, extra: Value, scale: Value, out: Pointer, at: Value, total: Pointer, vectors: Value
) -> None:
    """out = (distance + outside) * scale, the base-2 exponent of s; total += s. Below -100 it stays there: no denormals."""
    factor = splat(scale)

    def step(i: Value) -> None:
        x = i * LANES
        exponent = ((distance.load(start + x) + outside.load(extra + x)) * factor).at_least(-100.0)
        out.store(at + x, exponent)
        total.store(x, total.load(x) + exponent.exp2())

    each(vectors, step)


@kernel
def weights(exponent: Pointer, at: Value, log_total: Pointer, vectors: Value) -> None:
    """T = 2^(exponent - log_total), in place."""

    def step(i: Value) -> None:
        x = i * LANES
        exponent.store(at + x, (exponent.load(at + x) - log_total.load(x)).at_least(-120.0).exp2())

    each(vectors, step)


_LOG2_CLAMP = -33.219280948873624  # log2(1e-10)


@kernel
def compare(sr: Pointer, gt: Pointer, at: Value, pixels: Pointer, room: Value, l1_weight: Value, kl_weight: Value, vectors: Value) -> None:
    """One offset of the loss: sums |T_sr - T_gt|, b log2(b/a), b and G T_sr per pixel; sr <- T_sr, gt <- G T_sr.

    `pixels` holds per-pixel rows of length room: log2 Z_sr, log2 Z_gt, their difference, then the four sums.
    The sign comes from the exponents: equal images cancel exactly there, whatever rounding follows.
    """
    pull_l1, pull_kl = splat(l1_weight), splat(kl_weight)

    def step(i: Value) -> None:
        x = i * LANES
        raw_sr, raw_gt = sr.load(at + x), gt.load(at + x)
        log_sr = (raw_sr - pixels.load(x)).at_least(-120.0)
        log_gt = (raw_gt - pixels.load(x + room)).at_least(-120.0)
        ratio = raw_gt - raw_sr - pixels.load(x + room * 2)  # log2(T_gt / T_sr), without the rounding of either logarithm
        t_sr, t_gt = log_sr.exp2(), log_gt.exp2()
        b = t_gt.at_least(1e-10)
        clamped = log_gt.at_least(_LOG2_CLAMP) - log_sr.at_least(_LOG2_CLAMP)
        log_ratio = log_sr.where(">=", _LOG2_CLAMP, log_gt.where(">=", _LOG2_CLAMP, ratio, clamped), clamped)
        sign = ratio.where("<", 0.0, 1.0, ratio.where(">", 0.0, -1.0, 0.0))
        pull = sign * pull_l1 * t_sr - log_sr.where(">=", _LOG2_CLAMP, b, 0.0) * pull_kl  # T_sr * b / a = b above the clamp
        for row, term in ((3, (t_sr - t_gt).magnitude()), (4, b * log_ratio), (5, b), (6, pull)):
            place = x + room * row
            pixels.store(place, pixels.load(place) + term)
        sr.store(at + x, t_sr)
        gt.store(at + x, pull)

    each(vectors, step)


@kernel
def adjoint(
    pull: Pointer, weight: Pointer, at: Value, mean: Pointer, factor: Pointer, out: Pointer, total: Pointer, row: Value, vectors: Value
) -> None:
    """out = (G T - q T) * factor = 2 dL/d dist of one offset; total[row ..] += out."""

    def step(i: Value) -> None:
        x = i * LANES
        value = (pull.load(at + x) - mean.load(x) * weight.load(at + x)) * factor.load(x)
        out.store(x, value)
        total.store(row + x, total.load(row + x) + value)

    each(vectors, step)


@kernel
def interact(
    force: Pointer, plane_force: Value, blocks: Pointer, base: Value, moved: Value, partner: Pointer,
    gradient: Pointer, at: Value, plane: Value, stride: Value, rows: Value, search: Value, window: Value, c: int,
) -> None:  # fmt: skip
    """All vertical offsets of one column block: with B = force, F = B (P(x+d) - P(x)); gradient -= F, partner(x+d) += F.

    Two rows y, y + 1 stay in registers while their common partner row y + dy walks down; row dy of B is plane dy + 1,
    and planes 0 and search + 1 are zero, because the two rows' offsets differ by one. Row 0 of all three is `search // 2` above
    the tile; rows that no window of the tile covers meet only the partners on the other side.
    """
    reach, half = search.halved(), window.halved()

    def pair(i: Value) -> None:
        y = i * 2
        here = [[blocks.load(base + ((y + r) * c + ch) * LANES) for ch in range(c)] for r in range(2)]
        first = (reach - half - y).where(">", 1, reach + reach - half - y, (reach - y).at_least(0))
        last = (rows - reach + half - y).where(">", 0, (search + 1).at_most(rows + reach - y), rows + half - y)

        def meet(t: Value, sums: list[Value]) -> list[Value]:
            pulls = [force.load((t + 1) * plane_force + y * LANES), force.load(t * plane_force + (y + 1) * LANES)]
            result = []
            for ch in range(c):
                place = ((y + t - reach) * c + ch) * LANES
                there = blocks.load(moved + place)
                received = partner.load(place)
                for r in range(2):
                    difference = there - here[r][ch]
                    received = pulls[r].fma(difference, received)
                    result.append(pulls[r].fma(difference, sums[2 * ch + r]))
                partner.store(place, received)
            return result

        sums = loop(last - first, zeros(rows, 2 * c), lambda t, carried: meet(first + t, carried))
        for r in range(2):
            for ch in range(c):
                target = at + (y + r) * stride + plane * ch
                gradient.store(target, gradient.load(target) - sums[2 * ch + r])

    each(rows.halved(), pair)


@kernel
def hand_over(partner: Pointer, image_gradient: Pointer, at: Value, plane: Value, stride: Value, rows: Value, c: int) -> None:
    """Adds the partners' column block to the image gradient and clears it."""

    def step(i: Value) -> None:
        for ch in range(c):
            place, target = (i * c + ch) * LANES, at + i * stride + plane * ch
            received = partner.load(place)
            image_gradient.store(target, image_gradient.load(target) + received)
            partner.store(place, received.like(0.0))

    each(rows, step)


@kernel
def energies(
    image: Pointer, base: Value, plane: Value, stride: Value, out: Pointer, out_stride: Value, rows: Value, vectors: Value, c: int
) -> None:
    """out = sum_c image^2."""

    def step(i: Value, x: Value) -> None:
        (total,) = zeros(rows, 1)
        for ch in range(c):
            pixel = image.load(base + i * stride + x + plane * ch)
            total = pixel.fma(pixel, total)
        out.store(i * out_stride + x, total)

    each_vector(rows, vectors, step)


@kernel
def settle(
    image: Pointer, gradient: Pointer, base: Value, plane: Value, stride: Value, spread: Pointer,
    spread_stride: Value, rows: Value, vectors: Value, c: int,
) -> None:  # fmt: skip
    """gradient += P e: the pull of the window samples outside the search square."""

    def step(i: Value, x: Value) -> None:
        pull = spread.load(i * spread_stride + x)
        for ch in range(c):
            target = base + i * stride + x + plane * ch
            gradient.store(target, image.load(target).fma(pull, gradient.load(target)))

    each_vector(rows, vectors, step)
