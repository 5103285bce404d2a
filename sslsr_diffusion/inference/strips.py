"""Pictures too large for memory, strip by strip: rows are read, upscaled and handed on to be written.

A strip has more rows than it answers for. Where tiles of a plain network are all that a result depends on, strips begin and end with
rows of tiles of the whole picture, and the result is that of one piece. Other restorers see a strip as a picture of its own; where two
strips meet, one fades into the other.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslsr_diffusion.devices import free_bytes
from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.images import Image, OpenPicture, Pixels, resize_bicubic, to_array, to_tensor
from sslsr_diffusion.inference.progress import piece
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.inference.tiling import Strip

_BYTES = 4 * 3 * 6  # per output pixel: float32 copies of a picture that exist at once, about
_SHARED = 32  # low-resolution rows in which a strip that is a picture of its own fades into the next
_LEAST = 4 * _SHARED


def whole_rows(scale: float) -> int | None:
    """The fewest rows that `scale` turns into whole rows; None where that takes more than a thousand."""
    return next((rows for rows in range(1, 1001) if math.isclose(scale * rows, round(scale * rows), abs_tol=1e-9)), None)


def upscaled(
    restorer: Restorer, picture: OpenPicture, opened: Callable[[], OpenPicture], scale: float, *, seed: int, call: Mapping[str, Any]
) -> Iterator[Image]:
    """The picture enlarged, its alpha by bicubic, with the blocks, depth and format of the original: in one piece, or in strips.

    Args:
        opened: opens the picture once more, where it is made in strips: whether it has colours is asked first.
        call: further arguments of the restorer.
    Raises ValueError where the restorer refused the picture, or answered with a wrong size.
    """
    height, width = picture.size
    budget = call.get("memory_budget")
    held = 0 if picture.streams else 4 * height * width
    room = (free_bytes(torch.device("cpu")) if budget is None else budget) - held
    taken, make = _BYTES * height * width * scale * scale, _Maker(restorer, scale, seed, call)
    fits, image = whole_rows(scale) is not None, None
    if taken <= room / 2 or not fits:
        try:
            image = make(picture.read())
        except NotEnoughMemory:
            if not fits or height <= _LEAST:
                raise
    if image is not None:
        yield image
        return
    picture, planned = opened(), restorer.strips(picture.size, scale=scale, held=held, **call)
    if planned is None:
        yield from _faded(make, picture, opened, scale, int(height * room / taken))
        return
    strips, make.call = planned
    if len(strips) > 1:
        make.gray = _colourless(opened(), strips)
    for number, strip in enumerate(strips):
        with piece(number, len(strips), "strip"):
            image = make(picture.read(strip.top, strip.bottom))
        yield _rows(image, *(round(scale * (row - strip.top)) for row in (strip.first, strip.last)))


@dataclass
class _Maker:
    restorer: Restorer
    scale: float
    seed: int
    call: Mapping[str, Any]
    gray: bool | None = None  # whether the picture has no colour; None: as what is given

    def __call__(self, image: Image) -> Image:
        generator = torch.Generator().manual_seed(self.seed)
        given = to_tensor(image.visible)
        output = self.restorer(given, scale=self.scale, generator=generator, output_type="pt", **self.call)
        answer: Tensor = output.images[0]
        height, width = (max(1, round(self.scale * side)) for side in image.size)
        if tuple(answer.shape) != (3, height, width):
            raise ValueError(f"expected {width} x {height} pixels from the model, got {list(answer.shape)}")
        dtype, alpha = image.rgb.dtype, None
        if image.colourless if self.gray is None else self.gray:
            answer = answer.mean(dim=0, keepdim=True).expand(3, -1, -1)
        if image.alpha is not None:
            alpha = to_array(resize_bicubic(to_tensor(image.alpha)[None], (height, width))[0], dtype)[..., 0]
        return replace(image, rgb=to_array(answer, dtype), alpha=alpha, notes=(*image.notes, *output.notes))


def _colourless(picture: OpenPicture, strips: Iterable[Strip]) -> bool:
    """Told from all rows, before the first strip: one that is gray may be part of a picture that is not."""
    return all(picture.read(strip.top, strip.bottom).colourless for strip in strips)


def _faded(make: _Maker, picture: OpenPicture, opened: Callable[[], OpenPicture], scale: float, rows: int) -> Iterator[Image]:
    """Strips of at most `rows` rows, or of fewer where memory does not allow them; neighbours share rows and fade into each other."""
    unit = whole_rows(scale) or 1
    height, shared = picture.size[0], -(-_SHARED // unit) * unit
    step = max(_LEAST, min(rows, height)) // unit * unit
    ramp = (np.arange(round(scale * shared), dtype=np.float32) + 0.5)[:, None, None] / round(scale * shared)
    while True:
        tops = range(0, max(1, height - shared), step)
        strips = [Strip(top, min(top + step + shared, height), top, top + step) for top in tops]
        try:
            make.gray = _colourless(opened(), strips)
            with piece(0, len(strips), "strip"):
                image = make(picture.read(0, strips[0].bottom))
            break
        except NotEnoughMemory:
            if step // 2 < _LEAST:
                raise
            step = min(step, height) // 2 // unit * unit
    if len(strips) > 1:
        note = f"made in strips of {step} rows that fade into each other: memory is too short for the picture in one piece"
        image = replace(image, notes=(*image.notes, note))
    for number, strip in enumerate(strips[1:], start=1):
        yield _rows(image, 0, len(image.rgb) - len(ramp))
        end = _rows(image, len(image.rgb) - len(ramp), len(image.rgb))
        with piece(number, len(strips), "strip"):
            below = make(picture.read(strip.top, strip.bottom))
        image = _over(end, below, ramp)
    yield image


def _over(end: Image, image: Image, ramp: NDArray[np.floating]) -> Image:
    """The first rows of a strip, over which the end of the one above it fades."""

    def mixed(above: Pixels, below: Pixels) -> Pixels:
        weight = ramp[..., 0] if below.ndim == 2 else ramp
        first = np.round(above * (1 - weight) + below[: len(ramp)] * weight).astype(below.dtype)
        return np.concatenate([first, below[len(ramp) :]])

    alpha = None if image.alpha is None or end.alpha is None else mixed(end.alpha, image.alpha)
    return replace(image, rgb=mixed(end.rgb, image.rgb), alpha=alpha)


def _rows(image: Image, top: int, bottom: int) -> Image:
    return replace(image, rgb=image.rgb[top:bottom], alpha=None if image.alpha is None else image.alpha[top:bottom])
