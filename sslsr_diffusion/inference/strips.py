"""Pictures too large for memory, strip by strip: made, and handed on to be written, so that the pixels are those of one piece.

Plain networks make a strip from some rows of the input, which begin and end with rows of tiles of the whole picture. Latent ones have
the input whole, and hand their result on in bands (`bands.py`).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.devices import free_bytes
from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.images import Image, OpenPicture, resize_bicubic, to_array, to_tensor
from sslsr_diffusion.inference.progress import piece
from sslsr_diffusion.inference.resampling import bicubic_taps
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.inference.tiling import Strip

_BYTES = 4 * 3 * 6  # per output pixel: float32 copies of a picture that exist at once, about


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
    make, image = _Maker(restorer, scale, seed, call), None
    if _BYTES * height * width * scale * scale <= room / 2:
        with contextlib.suppress(NotEnoughMemory):
            image = make(picture.read())
    if image is not None:
        yield image
        return
    picture, planned = opened(), restorer.strips(picture.size, scale=scale, held=held, **call)
    if planned is None:
        yield from make.bands(picture.read())
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
        output = self.restorer(to_tensor(image.visible), scale=self.scale, generator=self._generator(), output_type="pt", **self.call)
        size = height, width = self._size(image)
        answer: Tensor = output.images[0]
        if tuple(answer.shape) != (3, height, width):
            raise ValueError(f"expected {width} x {height} pixels from the model, got {list(answer.shape)}")
        gray = image.colourless if self.gray is None else self.gray
        alpha = None if image.alpha is None else resize_bicubic(to_tensor(image.alpha)[None], size)[0]
        return _image(image, answer, alpha, gray, output.notes)

    def bands(self, image: Image) -> Iterator[Image]:
        """The same in bands of rows."""
        output = self.restorer.bands(to_tensor(image.visible), scale=self.scale, generator=self._generator(), **self.call)
        gray, top = image.colourless, 0
        rows, columns = bicubic_taps(image.size, self._size(image))
        for band in output.images:
            alpha, of_band = None, rows.at(top, top + band.shape[-2])
            if image.alpha is not None:
                first, last = of_band.span
                alpha = of_band.of(columns.of(to_tensor(image.alpha[first:last]), -1), -2, first)
            top += band.shape[-2]
            yield _image(image, band, alpha, gray, output.notes)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _size(self, image: Image) -> tuple[int, int]:
        height, width = (max(1, round(self.scale * side)) for side in image.size)
        return height, width


def _image(image: Image, rgb: Tensor, alpha: Tensor | None, gray: bool, notes: list[str]) -> Image:
    """These pixels, [3, H, W] and [1, H, W], with the depth and the blocks of the original; of one colour where `gray`."""
    rgb = rgb.mean(dim=0, keepdim=True).expand(3, -1, -1) if gray else rgb
    dtype = image.rgb.dtype
    return replace(
        image,
        rgb=to_array(rgb, dtype),
        alpha=None if alpha is None else to_array(alpha, dtype)[..., 0],
        notes=(*image.notes, *notes),
    )


def _colourless(picture: OpenPicture, strips: Iterable[Strip]) -> bool:
    """Told from all rows, before the first strip: one that is gray may be part of a picture that is not."""
    return all(picture.read(strip.top, strip.bottom).colourless for strip in strips)


def _rows(image: Image, top: int, bottom: int) -> Image:
    return replace(image, rgb=image.rgb[top:bottom], alpha=None if image.alpha is None else image.alpha[top:bottom])
