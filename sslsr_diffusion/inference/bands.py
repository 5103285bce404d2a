"""A latent model's picture in bands of rows, for those that are too large for memory: the pixels of one piece.

What is small stays whole: the low-resolution picture and all latents, so that sampling knows nothing of bands (four channels at an
eighth of the side, enlarged four times: 4 bytes per low-resolution pixel, where the result takes 192). What is large never is: the
enlarged picture is made where it is looked at, the decoded one and its colours row of tiles by row of tiles. One call needs no whole
latents, either: where nothing is drawn for them (`one_step.py`), they are encoded and denoised as the decoder gets to them.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sslsr_diffusion.inference.back_projection import REACH as PROJECTED
from sslsr_diffusion.inference.back_projection import BandProjection
from sslsr_diffusion.inference.color_fix import REACH, Statistics, adain_change, color_fix
from sslsr_diffusion.inference.options import CallOptions
from sslsr_diffusion.inference.progress import piece, unheard
from sslsr_diffusion.inference.resampling import bicubic_taps
from sslsr_diffusion.inference.tiling import Box
from sslsr_diffusion.tensors import folded

_ROWS = 512  # of a band that is handed on


def rows_beside(options: CallOptions, scale: float) -> int:
    """Rows that are worked on for a band, beside those of a row of tiles."""
    return _ROWS + 2 * REACH + (2 * math.ceil(PROJECTED * max(scale, 1)) if options.back_projection else 0)


class Enlarged:
    """The enlarged low-resolution picture, [1, 3, H, W] in [0, 1], continued by reflection: parts of it."""

    def __init__(self, low: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> None:
        """`low` [1, 3, h, w] in [0, 1]; `size` of the enlarged picture, and of what it is continued to."""
        rows, columns = (folded(length, wanted) for length, wanted in zip(size, padded))
        self._low = low[0]
        self._rows, self._columns = bicubic_taps((low.shape[-2], low.shape[-1]), size, (rows, columns))

    def part(self, box: Box) -> Tensor:
        rows = self._rows.at(box.top, box.top + box.height)
        columns = self._columns.at(box.left, box.left + box.width)
        (top, bottom), (left, right) = rows.span, columns.span
        seen = columns.of(self._low[..., top:bottom, left:right], -1, left)
        return rows.of(seen, -2, top).clamp_(0, 1)

    def rows(self, top: int, bottom: int) -> Tensor:
        """[1, 3, bottom - top, W]"""
        return self.part(Box(top, 0, bottom - top, len(self._columns.pixels)))[None]


class Rows:
    """Rows of a picture that is made in bands from the top down; no call begins above the one before."""

    def __init__(self, bands: Iterator[Tensor]) -> None:
        self._bands, self._top, self._kept = bands, 0, list[Tensor]()

    def __call__(self, top: int, bottom: int) -> Tensor:
        while self._kept and self._top + self._kept[0].shape[-2] <= top:
            self._top += self._kept.pop(0).shape[-2]
        while self._top + sum(band.shape[-2] for band in self._kept) < bottom:
            self._kept.append(next(self._bands))
        if len(self._kept) > 1:  # once for all tiles that are cut from these rows
            self._kept, self._top = [torch.cat(self._kept, dim=-2)[..., top - self._top :, :]], top
        return self._kept[0][..., top - self._top : bottom - self._top, :]

    def part(self, box: Box) -> Tensor:
        """[C, h, w] of one picture; how far a call is, say the tiles that are cut from it."""
        with unheard():
            rows = self(box.top, box.top + box.height)
        return rows[0, ..., box.left : box.left + box.width]


def finished(
    options: CallOptions, low: Tensor, size: tuple[int, int], decode: Callable[[], Iterator[Tensor]], decoded: tuple[int, int]
) -> Iterator[Tensor]:
    """`options.finish` of a decoded picture that is resized to `size`, band by band: [3, n, W] each, from the top down.

    Args:
        low: [1, 3, h, w], the low-resolution picture.
        size: (H, W) of the result.
        decode: gives the bands [1, 3, n, >= W'] of the decoded picture, as often as it is called.
        decoded: (H', W') of it; what lies beyond is padding.
    """
    height = size[0]
    enlarged = Enlarged(low, size, size) if options.looks_back else None
    rows, columns = bicubic_taps(decoded, size)

    def resized(made: Rows, top: int, bottom: int) -> Tensor:
        first, last = rows.at(top, bottom).span
        seen = made(first, last)[..., : decoded[1]]
        return seen if size == decoded else rows.at(top, bottom).of(columns.of(seen, -1), -2, first)

    tops = range(0, height, _ROWS)
    change = None
    if enlarged is not None and options.color_fix == "adain":  # the mean of the whole picture: it is decoded once more
        made, own, wanted = Rows(decode()), Statistics(), Statistics()
        for top in tops:
            bottom = min(top + _ROWS, height)
            own.add(resized(made, top, bottom))
            wanted.add(enlarged.rows(top, bottom))
        change = adain_change(own, wanted)
    made, reach = Rows(decode()), REACH if enlarged is not None and options.color_fix == "wavelet" else 0
    projected = BandProjection(low, size, options.back_projection)
    for number, top in enumerate(tops):
        bottom = min(top + _ROWS, height)
        above, below = projected.seen(top, bottom)
        first, last = max(0, above - reach), min(height, below + reach)
        with piece(number, len(tops), "band"):
            content, style = resized(made, first, last), None if enlarged is None else enlarged.rows(first, last)
            if change is not None:
                content = change(content)
            elif style is not None:
                content = color_fix(options.color_fix, content, style)
            style = None if style is None else style[..., top - first : bottom - first, :]
            content = projected(content[..., above - first : below - first, :].clamp(0, 1), above, top, bottom)
            band = options.mixed(content, style, low, (top, height))[0].cpu()
        yield band
