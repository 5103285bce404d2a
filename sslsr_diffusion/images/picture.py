from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sslsr_diffusion.errors import UserError

Pixels = NDArray[np.uint8 | np.uint16]


class UnreadableImage(UserError):
    """The bytes are no picture that we can read whole; the message is one sentence that names the file and the reason."""


@dataclass(frozen=True)
class Image:
    """One picture, upright. Colour is not managed: the numbers are those of the file, and its profile travels with them."""

    rgb: Pixels  # [H, W, 3]; three equal channels where `gray`
    alpha: Pixels | None = None  # [H, W] of the same dtype, not premultiplied
    icc_profile: bytes | None = None  # of colour space GRAY where `gray`, else RGB; None means sRGB
    exif: bytes | None = None  # the TIFF block without the "Exif\0\0" prefix, orientation reset to 1
    format: str = "PNG"  # what the bytes were ("PNG", "JPEG", "WEBP", "TIFF", "GIF", ...), whatever the file's name said
    gray: bool = False  # the file had one colour channel, and is written with one
    notes: tuple[str, ...] = ()  # what reading could not keep, one phrase each: "first of 12 frames"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.rgb.shape[0], self.rgb.shape[1]

    @property
    def bits(self) -> int:
        return 16 if self.rgb.dtype == np.uint16 else 8
