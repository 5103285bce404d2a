import contextlib
import mmap
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sslsr_diffusion.images.decoders import READERS
from sslsr_diffusion.images.picture import Image, Pixels, UnreadableImage
from sslsr_diffusion.listing import UNREAD_SUFFIXES, kind_of, printable
from sslsr_diffusion.metadata import exif
from sslsr_diffusion.metadata.blocks import SPLIT, Blocks
from sslsr_diffusion.metadata.headers import Refused

MAX_PIXELS = 178_956_970  # of a picture that is read whole: 0.5 GB of RGB
_MAPPED = 64 << 20  # larger files are mapped, not read


class OpenPicture:
    """A picture file that is open: its blocks and size are known, its pixels are decoded when they are asked for."""

    def __init__(
        self,
        source: Path | str | bytes,
        *,
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
        advice: str = "cut the picture into pieces",
    ) -> None:
        """
        Args:
            source: a path, or the bytes of a file.
            name: how messages call it; default the file's name.
            max_pixels: a larger picture is refused; `advice` says what to do then.
        Raises UnreadableImage: not a picture, damaged at its start, empty, a decompression bomb, or of a kind that would lose values.
        """
        self._label = name or ("image" if isinstance(source, bytes) else printable(Path(source).name))
        with self._refusing():
            data = memoryview(bytearray(source)) if isinstance(source, bytes) else _read(Path(source))
            if not len(data):
                raise Refused("the file is empty")
            suffix = "" if isinstance(source, bytes) else Path(source).suffix.lower()
            self.format = kind = kind_of(bytes(data[:32])) or "TGA"  # which has no magic
            if kind not in READERS or (suffix in UNREAD_SUFFIXES and kind in ("TIFF", "TGA")):  # raw files of cameras look like TIFF
                raise Refused(f"{suffix.removeprefix('.') or kind} pictures are not read; save it as PNG, JPEG, TIFF or WebP")
            self.blocks = SPLIT[kind](data) if kind in SPLIT else Blocks()
            self._rows = READERS[kind](data, kind, self.blocks)
            self._turn = 1 if kind == "AVIF" else exif.orientation(self.blocks.exif)  # AVIF's decoder has turned it
            height, width = self._rows.height, self._rows.width
            if height * width > max_pixels:
                raise Refused(f"{height * width / 1e6:.4g} megapixels are more than the {max_pixels / 1e6:.4g} that are read; {advice}")
        self.size = (width, height) if self._turn > 4 else (height, width)  # upright
        self.streams = self._rows.streams and self._turn <= 2  # rows are decoded from the top down; else the first call decodes all
        self._first = 0
        self._kept: Pixels = np.empty((0, 0, 0), np.uint8)  # rows that the last call has decoded

    def read(self, top: int = 0, bottom: int | None = None) -> Image:
        """Rows of the upright picture, with all its blocks; where it streams, no call begins above the one before."""
        bottom = self.size[0] if bottom is None else bottom
        with self._refusing():
            samples = self._upright(top, bottom)
        channels, found = samples.shape[2], self.blocks
        profile, gray, notes = found.profile_for(channels)
        return Image(
            np.ascontiguousarray(samples[..., :3] if channels > 2 else samples[..., [0, 0, 0]]),
            np.ascontiguousarray(samples[..., -1]) if channels in (2, 4) else None,
            profile,
            exif.upright_exif(found.exif, self.size) if found.exif else None,
            self.format,
            gray,
            tuple(notes),
            (found.xmp if self._turn == 1 else exif.upright_xmp(found.xmp or b"")) or None,
            found.iptc,
            found.density if all(1 <= each <= 100_000 for each in found.density or (0,)) else None,
            tuple(found.own),
        )

    def _upright(self, top: int, bottom: int) -> Pixels:
        if not self.streams:
            if not len(self._kept):
                self._kept = self._rows.read(0, self._rows.height)
            array = self._kept.swapaxes(0, 1) if self._turn > 4 else self._kept
            array = array[::-1] if self._turn in (3, 4, 7, 8) else array
            return (array[:, ::-1] if self._turn in (2, 3, 6, 7) else array)[top:bottom]
        done = self._first + len(self._kept)
        known = self._kept[top - self._first :]
        self._first, self._kept = top, known
        if done < bottom:
            fresh = self._rows.read(max(top, done), bottom)
            self._kept = np.concatenate([known, fresh]) if len(known) else fresh
        return self._kept[: bottom - top, :: -1 if self._turn == 2 else 1]

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # decoders raise nearly everything on damaged files, KeyError and struct.error included
            raise UnreadableImage(f"{self._label}: {_reason(error)}.") from error


def read_image(source: Path | str | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image:
    """Read one picture whole, upright, with alpha and all blocks of metadata.

    8 and 16 bits stay, other depths become the next of them. Gray, palette and one-bit pictures become three channels; CMYK and Lab go
    through their profile to sRGB. Of an animation the first frame counts. `notes` say what was lost. The content decides the format.

    Args and errors as `OpenPicture`; UnreadableImage, too, where the pixels are damaged or cut off.
    """
    return OpenPicture(source, name=name, max_pixels=max_pixels).read()


def size_of(path: Path) -> tuple[int, int] | None:
    """(width, height) in pixels of a picture held upright, without decoding it; None where that cannot be read."""
    with contextlib.suppress(UnreadableImage):
        height, width = OpenPicture(path, max_pixels=1 << 62).size
        return width, height
    return None


def _read(path: Path) -> memoryview:
    """The bytes of a file, which may be written to: the file does not change."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Refused("not a regular file")
    if status.st_size < _MAPPED:
        data = bytearray(status.st_size)
        with path.open("rb") as file:
            return memoryview(data)[: file.readinto(data)]
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, Refused):
        return lines[0]
    text = lines[-1].strip().rstrip(".") if lines else type(error).__name__
    if isinstance(error, SyntaxError):  # Pillow's, of a header that is not TGA's
        return "not a picture, damaged at the start, or of a format other than " + ", ".join(READERS)
    if re.search("truncated|cut off|premature|end of (file|stream)|not enough", str(error), re.IGNORECASE):
        return "the file is cut off"
    return f"damaged ({printable(text)[:120]})"
