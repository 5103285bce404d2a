from dataclasses import dataclass

import numpy as np

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.tensors import Pixels


class UnreadableImage(UserError):
    """The bytes are no picture that we can read whole; the message is one sentence that names the file and the reason."""


@dataclass(frozen=True)
class Image:
    """One picture, upright. Colour is not managed: the numbers are those of the file, and its profile travels with them.

    The blocks of metadata are whole, as the file had them, but for what an upright picture of another size makes false: the EXIF
    orientation is 1, the size that EXIF states is the picture's, and EXIF's thumbnail is gone.
    """

    rgb: Pixels  # [H, W, 3]; three equal channels where `gray`
    alpha: Pixels | None = None  # [H, W] of the same dtype, not premultiplied
    icc_profile: bytes | None = None  # of colour space GRAY where `gray`, else RGB; None means sRGB, or what `own` says of colours
    exif: bytes | None = None  # the TIFF block without the "Exif\0\0" prefix
    format: str = "PNG"  # what the bytes were ("PNG", "JPEG", "WEBP", "TIFF", "GIF", ...), whatever the file's name said
    gray: bool = False  # the file had one colour channel, and is written with one
    notes: tuple[str, ...] = ()  # what reading could not keep, one phrase each: "the first of several pages"
    xmp: bytes | None = None
    iptc: bytes | None = None  # Photoshop's image resources, where IPTC stands
    density: tuple[float, float] | None = None  # pixels per inch, across and down
    own: tuple[tuple[bytes, bytes], ...] = ()  # further PNG chunks or JPEG segments (kind, body), which only the same format takes

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.rgb.shape[0], self.rgb.shape[1]

    @property
    def bits(self) -> int:
        return 16 if self.rgb.dtype == np.uint16 else 8

    @property
    def colourless(self) -> bool:
        """Whether all channels are equal, however the file holds them."""
        return self.gray or bool((self.rgb[..., :1] == self.rgb).all())

    @property
    def visible(self) -> Pixels:
        """`rgb` with the colour of the nearest visible pixel where alpha is 0: what is seen of a picture does not mix with what is not."""
        if self.alpha is None or self.alpha.all() or not self.alpha.any():
            return self.rgb
        from scipy.ndimage import distance_transform_edt

        rows, columns = distance_transform_edt(self.alpha == 0, return_distances=False, return_indices=True)
        return self.rgb[rows, columns]
