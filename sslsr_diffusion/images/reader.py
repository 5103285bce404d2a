import contextlib
import mmap
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sslsr_diffusion.images import exif
from sslsr_diffusion.images.blocks import SPLIT, Blocks
from sslsr_diffusion.images.decoders import READERS, Refused, Rows, profile_space
from sslsr_diffusion.images.files import UNREAD_SUFFIXES, printable
from sslsr_diffusion.images.picture import Image, Pixels, UnreadableImage

MAX_PIXELS = 178_956_970  # of a picture that is read whole: 0.5 GB of RGB
_MAPPED = 64 << 20  # larger files are mapped, not read
_MAGIC = {
    rb"\x89PNG\r\n\x1a\n": "PNG",
    rb"\xff\xd8\xff": "JPEG",
    rb"II[*+]\0|MM\0[*+]": "TIFF",
    rb"RIFF....WEBP": "WEBP",
    rb"GIF8": "GIF",
    rb"BM": "BMP",
    rb"....ftypavi[fs]": "AVIF",
    rb"P[1-6][\s#]": "PPM",
    rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51": "JPEG2000",
    rb"....ftyp(hei|hev|mif|msf)": "HEIC",
    rb"8BPS": "PSD",
    rb"\xff\n|\0\0\0\x0cJXL ": "JPEG XL",
}


def _kind(start: bytes) -> str | None:
    return next((name for magic, name in _MAGIC.items() if re.match(magic, start, re.DOTALL)), None)


def format_of(path: Path) -> str | None:
    """The format that a file's first bytes promise, as `Image.format` would say."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return _kind(file.read(16))
    except OSError:
        return None


class OpenPicture:
    """A picture file that is open: its blocks and size are known, its pixels come as they are asked for."""

    def __init__(self, data: memoryview, label: str, max_pixels: int, advice: str, suffix: str = "") -> None:
        self._label = label
        with self._refusing():
            kind = _kind(bytes(data[:16])) or "TGA"  # which has no magic
            if kind not in READERS or (suffix in UNREAD_SUFFIXES and kind in ("TIFF", "TGA")):  # raw files of cameras look like TIFF
                raise Refused(f"{suffix.removeprefix('.') or kind} pictures are not read; save it as PNG, JPEG, TIFF or WebP")
            self.blocks = SPLIT[kind](data) if kind in SPLIT else Blocks()
            self._rows: Rows = READERS[kind](data, kind, self.blocks)
            if self._rows.height * self._rows.width > max_pixels:
                pixels, most = (f"{count / 1e6:.0f}" for count in (self._rows.height * self._rows.width, max_pixels))
                raise Refused(f"{pixels} megapixels are more than the {most} megapixels that are read; {advice}")
        self.kind = kind
        self._turn = 1 if kind == "AVIF" else exif.orientation(self.blocks.exif)  # AVIF's decoder has turned it
        self.size = (self._rows.width, self._rows.height) if self._turn > 4 else (self._rows.height, self._rows.width)
        self._kept: tuple[int, Pixels] | None = None

    @property
    def streams(self) -> bool:
        """Whether rows are decoded from the top down; else the first call decodes all of them."""
        return self._rows.streams and self._turn <= 2

    @property
    def held(self) -> int:
        """Bytes that the decoded picture takes beside the rows that are asked for."""
        return 0 if self.streams else 4 * self.size[0] * self.size[1]

    def read(self, top: int = 0, bottom: int | None = None) -> Image:
        """Rows of the upright picture, with all its blocks; where it streams, ranges may overlap the one before, and begin no earlier."""
        bottom = self.size[0] if bottom is None else bottom
        with self._refusing():
            samples = self._upright(top, bottom)
            channels = samples.shape[2]
            rgb = np.ascontiguousarray(samples[..., :3] if channels > 2 else samples[..., [0, 0, 0]])
            alpha = np.ascontiguousarray(samples[..., -1]) if channels in (2, 4) else None
            return self._image(rgb, alpha, channels < 3)

    def _upright(self, top: int, bottom: int) -> Pixels:
        if self.streams:
            first, kept = self._kept or (top, self._rows.read(top, bottom))
            kept, done = kept[top - first :], first + len(kept)
            if done < bottom:
                kept = np.concatenate([kept, self._rows.read(done, bottom)])
            self._kept = top, kept
            return kept[: bottom - top, ::-1] if self._turn == 2 else kept[: bottom - top]
        array = self._rows.whole()
        if self._turn > 4:
            array = array.swapaxes(0, 1)
        if self._turn in (3, 4, 7, 8):
            array = array[::-1]
        return (array[:, ::-1] if self._turn in (2, 3, 6, 7) else array)[top:bottom]

    def _image(self, rgb: Pixels, alpha: Pixels | None, gray: bool) -> Image:
        """The profile stays only where it describes these channels; gray pixels with an RGB profile become colour for its sake."""
        found, notes = self.blocks, list(self.blocks.notes)
        profile, space = found.icc_profile, profile_space(found.icc_profile or b"")
        if profile and space != "RGB" and not (space == "GRAY" and gray):
            profile = None
            notes.append(f"colour profile left out, it is for {printable(space) if space else 'nothing known'}")
        block, xmp = found.exif and exif.upright_exif(found.exif, self.size), found.xmp
        if xmp and self._turn != 1:
            xmp = re.sub(rb"(tiff:Orientation(?:=[\"']|>))[2-8]", rb"\g<1>1", xmp)
        own = tuple(found.own)
        return Image(
            rgb, alpha, profile, block or None, self.kind, gray and space != "RGB", tuple(notes), xmp, found.iptc, found.density, own
        )

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # decoders raise nearly everything on damaged files, KeyError and struct.error included
            raise UnreadableImage(f"{self._label}: {_reason(error)}.") from error


def open_picture(
    source: Path | str | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS, advice: str = "cut the picture into pieces"
) -> OpenPicture:
    """Open one picture; its pixels are not decoded yet.

    Args:
        source: a path, or the bytes of a file.
        name: how messages call it; default the file's name.
        max_pixels: a larger picture is refused; `advice` says what to do then.
    Raises UnreadableImage: not a picture, damaged at its start, empty, a decompression bomb, or of a kind that would lose values.
    """
    label = name or ("image" if isinstance(source, bytes) else printable(Path(source).name))
    try:
        data = memoryview(bytearray(source)) if isinstance(source, bytes) else _read(Path(source))
        if not len(data):
            raise Refused("the file is empty")
    except (OSError, Refused) as error:
        raise UnreadableImage(f"{label}: {_reason(error)}.") from error
    return OpenPicture(data, label, max_pixels, advice, "" if isinstance(source, bytes) else Path(source).suffix.lower())


def read_image(source: Path | str | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image:
    """Read one picture whole, upright, with alpha and all blocks of metadata.

    8 and 16 bits stay as they are, other depths become the next of them. Gray, palette and one-bit pictures become three channels;
    CMYK and Lab go through their profile to sRGB. Of an animation the first frame counts. `notes` say what was lost. The content decides
    the format, not the name.

    Args and errors as `open_picture`; UnreadableImage, too, where the pixels are damaged or cut off.
    """
    return open_picture(source, name=name, max_pixels=max_pixels).read()


def size_of(path: Path) -> tuple[int, int] | None:
    """(width, height) in pixels of a picture held upright, without decoding it; None where that cannot be read."""
    try:
        height, width = open_picture(path, max_pixels=1 << 62).size
    except UnreadableImage:
        return None
    return width, height


def _read(path: Path) -> memoryview:
    """The bytes of a file, which may be written to: the file does not change."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Refused("not a regular file")
    if status.st_size < _MAPPED:
        return memoryview(bytearray(path.read_bytes()))
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
