"""The exact fast algorithm in plain PyTorch: any device and float type, O(H W + N) memory, hand-written gradient.

For an offset d let D_d(x) = sum_c (P_c(x+d) - P_c(x))^2 on the reflect-padded image P, and E(x) = sum_c P_c(x)^2. Then

    dist(p, d) = sum_{u in W_d} D_d(p+u) + sum_{u not in W_d} E(p+u)        W_d = {u in window: d+u in the search square}

so one map per offset and sums over rectangles replace 3 * 81 products per entry. With A = dL/d dist the gradient is

    B_d(x) = sum_{u in W_d} A(x-u, d),    e(x) = sum_d sum_{u not in W_d} A(x-u, d)
    F = 2 B_d (P(.+d) - P),    gP(x) -= F(x),    gP(x+d) += F(x),    gP += 2 P e        and the adjoint of the padding.

Sums only ever add non-negative numbers (no differences of running sums), so float32 keeps its precision. The image is
walked in horizontal bands with one row of offsets at a time, and no operation here is one that TF32 or autocast lowers.
Registered as torch operators, as those of the CPU: `torch.compile` traces past them instead of unrolling thousands of slices.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sslsr_diffusion.ops import differentiable_operators
from sslsr_diffusion.ops.settings import GraphSettings
from sslsr_diffusion.ops.ssg_reference import CLAMP, ROW_EPS

LOG_CLAMP = math.log(CLAMP)
_BAND_ELEMENTS = 6_000_000  # largest buffer of a band: about 24 MB in float32


@dataclass(frozen=True)
class _Band:
    image: int  # index in the batch
    top: int  # first row
    height: int
    pixels: Tensor  # [n] positions of the masked pixels inside the band, y * W + x
    first: int  # their first row in the graph


def _bands(mask: Tensor, settings: GraphSettings) -> Iterator[_Band]:
    """Strips of rows small enough for the buffers; strips without a masked pixel are left out."""
    width = mask.shape[3]
    counts = mask.sum((1, 3)).tolist()  # [B][H]: the one synchronisation of a call
    height, first = mask.shape[2], 0
    for index, rows in enumerate(counts):
        top = 0
        while top < height:
            bottom, masked = top, 0
            while bottom < height:
                maps = settings.search * (bottom + 1 - top + 2 * settings.half) * (width + 2 * settings.half)
                if bottom > top and max(maps, (masked + rows[bottom]) * settings.search**2) > _BAND_ELEMENTS:
                    break
                masked, bottom = masked + rows[bottom], bottom + 1
            if masked:
                yield _Band(index, top, bottom - top, mask[index, 0, top:bottom].flatten().nonzero().squeeze(1), first)
            first, top = first + masked, bottom


def _padded(image: Tensor, settings: GraphSettings) -> Tensor:
    """Reflected by reach, then zeros by half (never read into a sum): every shift of a band is a plain slice."""
    reach, half = settings.reach, settings.half
    return F.pad(F.pad(image, (reach,) * 4, mode="reflect"), (half,) * 4)


def _unpad(grad: Tensor, settings: GraphSettings) -> Tensor:
    """The adjoint of `_padded`: folds the border back onto the pixels it was reflected from."""
    half, reach = settings.half, settings.reach
    grad = grad[..., half : grad.shape[-2] - half, half : grad.shape[-1] - half]
    for dim in (-2, -1):
        size = grad.shape[dim] - 2 * reach
        inner = grad.narrow(dim, reach, size).clone()
        if reach:
            inner.narrow(dim, 1, reach).add_(grad.narrow(dim, 0, reach).flip(dim))
            inner.narrow(dim, size - 1 - reach, reach).add_(grad.narrow(dim, reach + size, reach).flip(dim))
        grad = inner
    return grad


class _BandMaths:
    """Distances of one band of one padded image, and their adjoint."""

    def __init__(self, padded: Tensor, band: _Band, width: int, settings: GraphSettings):
        self.settings, self.band, self.width = settings, band, width
        self.grown = (band.height + 2 * settings.half, width + 2 * settings.half)  # the region the windows of the band cover
        self.area = padded[
            band.image, :, band.top : band.top + band.height + 2 * (settings.reach + settings.half)
        ]  # [C, h + 2 margin, W + 2 margin]
        reach = settings.reach
        self.base = self.area[:, reach : reach + self.grown[0], reach : reach + self.grown[1]]  # [C, h', w']

    def _difference(self, dy: int, channel: int) -> Tensor:
        """P(x+d) - P(x) for one row of offsets: [k, h', w']."""
        top = self.settings.reach + dy
        shifted = self.area[channel, top : top + self.grown[0]].unfold(1, self.grown[1], 1)  # [h', k, w']
        return shifted.transpose(0, 1) - self.base[channel]

    def _vertical(self, dy: int) -> range:
        half, reach = self.settings.half, self.settings.reach
        return range(max(-half, -reach - dy), min(half, reach - dy) + 1)

    def _columns(self, ux: int) -> slice:
        """The offsets dx for which window column ux lies inside the search square."""
        return slice(max(0, -ux), self.settings.search - max(0, ux))

    def distances(self) -> Tensor:
        """[k*k, n] distances of the band's masked pixels."""
        search, half = self.settings.search, self.settings.half
        height, width = self.band.height, self.width
        out = self.base.new_empty(search, search, len(self.band.pixels))
        outside = self._outside()
        for dy in range(-self.settings.reach, self.settings.reach + 1):
            difference = self._difference(dy, 0).square_()
            for channel in range(1, len(self.area)):
                difference.add_(self._difference(dy, channel).square_())
            rows = self._vertical(dy)
            summed = difference[:, half + rows[0] : half + rows[0] + height].clone()
            for uy in rows[1:]:
                summed.add_(difference[:, half + uy : half + uy + height])
            total = outside[self._variants(dy)]  # [k, h, W], a copy: one index per dx
            for ux in range(-half, half + 1):
                columns = self._columns(ux)
                total[columns].add_(summed[columns, :, half + ux : half + ux + width])
            out[dy + self.settings.reach] = total.flatten(1)[:, self.band.pixels]
        return out.flatten(0, 1)

    def _variants(self, dy: int) -> tuple[int, Tensor]:
        """How W_d is cut, 0 .. 2 half with half for "not at all": of this row of offsets, and of each of its columns."""
        inner, half = self.settings.reach - self.settings.half, self.settings.half
        dx = torch.arange(-self.settings.reach, self.settings.reach + 1, device=self.area.device)
        cut = (dx - dx.clamp(-inner, inner)) + half
        return dy - max(-inner, min(inner, dy)) + half, cut

    def _cut(self, variant: int) -> range:
        """Window positions that stay inside the search square for a variant of `_variants`."""
        half = self.settings.half
        cut = variant - half
        return range(max(-half, -half - cut), min(half, half - cut) + 1)

    def _outside(self) -> Tensor:
        """sum_{u not in W_d} E(p+u) for every way a window can be cut: [w, w, h, W]."""
        half, window = self.settings.half, self.settings.window
        energy = self.base.square().sum(0)
        height, width = self.band.height, self.width
        columns = energy.new_zeros(window, energy.shape[0], width)  # per horizontal cut: what falls outside
        row = energy.new_zeros(energy.shape[0], width)  # the whole window row
        for ux in range(-half, half + 1):
            piece = energy[:, half + ux : half + ux + width]
            row += piece
            for variant in range(window):
                if ux not in self._cut(variant):
                    columns[variant] += piece
        out = energy.new_zeros(window, window, height, width)
        for variant in range(window):
            for uy in range(-half, half + 1):
                source = columns if uy in self._cut(variant) else row
                out[variant] += source[..., half + uy : half + uy + height, :]
        return out

    def add_gradient(self, adjoint: Tensor, grad: Tensor) -> None:
        """Adds the pull of A = dL/d dist ([k*k, n]) to `grad`, the gradient of the padded image."""
        reach, search = self.settings.reach, self.settings.search
        height, width = self.band.height, self.width
        target = grad[self.band.image, :, self.band.top : self.band.top + len(self.area[0])]
        base = target[:, reach : reach + self.grown[0], reach : reach + self.grown[1]]
        cuts = adjoint.new_zeros(self.settings.window, self.settings.window, height, width)
        dense = adjoint.new_zeros(search, height * width)
        skewed = adjoint.new_zeros(self.grown[0], search, self.grown[1] + search)
        for dy in range(-reach, reach + 1):
            dense[:, self.band.pixels] = adjoint[(dy + reach) * search : (dy + reach + 1) * search]
            maps = dense.view(search, height, width)
            row, columns = self._variants(dy)
            cuts[row].index_add_(0, columns, maps)
            pulled = self._spread(maps, dy)
            for channel in range(len(target)):
                force = pulled * self._difference(dy, channel)  # F of the formula above
                base[channel].sub_(force.sum(0))
                # dx shifts by dx: rows one element short of the buffer's rows line the shifted maps up under each other
                skewed[:, :, : self.grown[1]] = force.transpose(0, 1)
                length = self.grown[1] + search - 1
                shifted = skewed.as_strided((self.grown[0], search, length), (search * (length + 1), length, 1)).sum(1)
                target[channel, reach + dy : reach + dy + self.grown[0]].add_(shifted)
        base.add_(2 * self.base * self._spread_outside(cuts))

    def _spread(self, maps: Tensor, dy: int) -> Tensor:
        """2 B_d for one row of offsets: [k, h', w']."""
        half, height, width = self.settings.half, self.band.height, self.width
        wide = maps.new_zeros(len(maps), height, self.grown[1])
        for ux in range(-half, half + 1):
            columns = self._columns(ux)
            wide[columns, :, half + ux : half + ux + width].add_(maps[columns], alpha=2)
        out = maps.new_zeros(len(maps), *self.grown)
        for uy in self._vertical(dy):
            out[:, half + uy : half + uy + height].add_(wide)
        return out

    def _spread_outside(self, cuts: Tensor) -> Tensor:
        """e of the formula above, the adjoint of `_outside`: [h', w']."""
        half, window = self.settings.half, self.settings.window
        height, width = self.band.height, self.width
        columns, row = cuts.new_zeros(window, self.grown[0], width), cuts.new_zeros(self.grown[0], width)
        for variant in range(window):
            for uy in range(-half, half + 1):
                if uy in self._cut(variant):
                    columns[:, half + uy : half + uy + height] += cuts[variant]
                else:
                    row[half + uy : half + uy + height] += cuts[variant].sum(0)
        out = cuts.new_zeros(self.grown)
        for ux in range(-half, half + 1):
            outside = [variant for variant in range(window) if ux not in self._cut(variant)]
            out[:, half + ux : half + ux + width] += row + columns[outside].sum(0)
        return out


@torch.library.custom_op("sslsr::graph_torch", mutates_args=())
def _graph(image: Tensor, mask: Tensor, search: int, window: int, sigma: float, normalize: bool) -> Tensor:
    settings = GraphSettings(search, window, sigma, normalize)
    padded, kappa = _padded(image, settings), settings.kappa(image.shape[1])
    out = image.new_empty(int(mask.sum()), search**2)
    for band in _bands(mask, settings):
        weights = _BandMaths(padded, band, image.shape[3], settings).distances().div_(-kappa).exp_()
        if normalize:
            weights /= weights.sum(0) + ROW_EPS
        out[band.first : band.first + len(band.pixels)] = weights.T
    return out


@torch.library.custom_op("sslsr::graph_torch_backward", mutates_args=())
def _graph_backward(
    grad_out: Tensor, out: Tensor, image: Tensor, mask: Tensor, search: int, window: int, sigma: float, normalize: bool
) -> Tensor:
    settings = GraphSettings(search, window, sigma, normalize)
    padded, kappa = _padded(image, settings), settings.kappa(image.shape[1])
    grad = torch.zeros_like(padded)
    for band in _bands(mask, settings):
        rows = slice(band.first, band.first + len(band.pixels))
        adjoint = grad_out[rows] * out[rows]
        if normalize:
            adjoint = torch.addcmul(adjoint, out[rows], adjoint.sum(1, keepdim=True), value=-1)
        _BandMaths(padded, band, image.shape[3], settings).add_gradient((adjoint / -kappa).T, grad)
    return _unpad(grad, settings)


@torch.library.custom_op("sslsr::loss_torch", mutates_args=())
def _loss(
    sr: Tensor, gt: Tensor, mask: Tensor, rows: Tensor, search: int, window: int, sigma: float, normalize: bool,
    l1_weight: float, kl_weight: float, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """total, l1, kl and the gradient of total, formed while the distances are at hand: [] without with_gradient."""
    settings, weights = GraphSettings(search, window, sigma, normalize), (l1_weight, kl_weight)
    padded_sr, padded_gt, kappa = _padded(sr, settings), _padded(gt, settings), settings.kappa(sr.shape[1])
    grad = torch.zeros_like(padded_sr) if with_gradient else None
    sums = sr.new_zeros(2, dtype=sr.dtype if sr.device.type == "mps" else torch.float64)
    for band in _bands(mask, settings):
        maths = _BandMaths(padded_sr, band, sr.shape[3], settings)
        exponent_gt = _BandMaths(padded_gt, band, sr.shape[3], settings).distances().div_(-kappa)
        terms, adjoint = _band_loss(maths.distances().div_(-kappa), exponent_gt, normalize, weights, with_gradient)
        sums += terms
        if grad is not None and adjoint is not None:
            maths.add_gradient(adjoint / -kappa, grad)
    scale = settings.per_entry(rows.to(sums.dtype))
    l1, kl = (sums * scale).to(sr.dtype)
    gradient = sr.new_empty(0, *sr.shape[1:]) if grad is None else _unpad(grad, settings) * scale.to(sr.dtype)
    return l1_weight * l1 + kl_weight * kl, l1.clone(), kl.clone(), gradient


graph, loss = differentiable_operators.graph_call(_graph, _graph_backward), differentiable_operators.loss_call(_loss)


def _band_loss(
    log_sr: Tensor, log_gt: Tensor, normalize: bool, weights: tuple[float, float], needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums of the two terms over [k*k, n] exponents, and A * -kappa * M. Both sides run through the same arithmetic."""
    if normalize:
        log_sr, log_gt = (log - torch.log(log.exp().sum(0) + ROW_EPS) for log in (log_sr, log_gt))
    graph_sr, graph_gt = log_sr.exp(), log_gt.exp()
    target = graph_gt.clamp_min(CLAMP)
    kl = target * (log_gt.clamp_min(LOG_CLAMP) - log_sr.clamp_min(LOG_CLAMP))
    wide = torch.float32 if kl.device.type == "mps" else torch.float64
    terms = torch.stack(((graph_sr - graph_gt).abs().sum(dtype=wide), kl.sum(dtype=wide)))
    if not needs_grad:
        return terms, None
    pull = weights[0] * (log_sr - log_gt).sign() * graph_sr - weights[1] * target * (log_sr >= LOG_CLAMP)  # G T_sr; T_sr / a = 1 there
    if normalize:
        pull = torch.addcmul(pull, graph_sr, pull.sum(0), value=-1)
    return terms, pull


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`; None: it can."""
    return None
