"""A contact sheet of training samples: what the model will see, with the numbers that were drawn."""

import textwrap
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw

from sslsr_diffusion.data.operations import describe
from sslsr_diffusion.data.samples import Sample
from sslsr_diffusion.images import to_array

_TEXT_LINES, _LINE, _GAP = 4, 14, 8


def contact_sheet(samples: Sequence[Sample], *, cell: int = 192, columns: int = 2) -> Image.Image:
    """HR, LR (enlarged without smoothing) and edge mask of every sample side by side, the drawn operations below; a Pillow image."""
    width, height = 3 * cell + _GAP, cell + _TEXT_LINES * _LINE + _GAP
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        for place, picture in enumerate(_pictures(sample)):
            fitted = picture.resize((cell, cell), Image.Resampling.LANCZOS if picture.width > cell else Image.Resampling.NEAREST)
            sheet.paste(fitted, (left + place * cell, top))
        density = float(sample.mask.float().mean())
        text = f"{sample.index} {sample.name.rsplit('/', 1)[-1]} mask {density:.1%}: {describe(sample.ops)}"
        for line, words in enumerate(textwrap.wrap(_plain(text), width=3 * cell * 2 // 9)[:_TEXT_LINES]):
            pen.text((left, top + cell + 2 + line * _LINE), words, fill="black")
    return sheet


def _pictures(sample: Sample) -> list[Image.Image]:
    assert sample.lr is not None
    size = sample.hr.shape[1:]
    lr = F.interpolate(sample.lr[None], size=size, mode="nearest")[0]
    mask = np.repeat(sample.mask[0].numpy().astype(np.uint8)[..., None] * 255, 3, axis=2)
    return [Image.fromarray(a) for a in (to_array(sample.hr), to_array(lr), mask)]


def _plain(text: str) -> str:
    """Pillow's built-in font knows Latin-1 only."""
    return text.replace("·", "|").encode("latin-1", "replace").decode("latin-1")
