"""Which library writes which format, strip by strip; the blocks of metadata go in whole, what a format cannot hold comes back as a note.

PNG and TIFF are deflated here: no library takes strips without starting threads, which do not survive a fork (see `decoders.py`), and
for TIFF the EXIF block has to lie where it lay. JPEG: OpenCV, and libvips, which makes the same pixels, for what comes in strips.
"""

import itertools
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import TEMPORARY, atomic_file
from sslsr_diffusion.images.decoders import libvips
from sslsr_diffusion.images.picture import Image, Pixels
from sslsr_diffusion.listing import SUFFIXES, suffixes_of
from sslsr_diffusion.metadata import blocks, exif, heads

LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}
Strips = Iterator[Pixels]  # [n, W, C] each: gray or colour, then alpha where there is one


def write_image(path: Path | str, image: Image, *, format: str | None = None, quality: int = 95) -> tuple[str, ...]:
    """Write a picture with its alpha and all blocks of metadata: complete under its name, or not at all.

    Args:
        format: "PNG", "JPEG", "WEBP" or "TIFF"; default by the suffix of `path`.
        quality: 1 to 100, of JPEG and WebP.
    Returns:
        What the format could not keep, one phrase each ("8 of 16 bits", "alpha flattened on white").
    Raises UserError: unknown format, or larger than it allows. OSError: the file cannot be written.
    """
    return write_strips(path, [image], image.size, format=format, quality=quality)


def write_strips(
    path: Path | str, strips: Iterable[Image], size: tuple[int, int], *, format: str | None = None, quality: int = 95
) -> tuple[str, ...]:
    """`write_image` of a picture of `size` (H, W) that comes in strips, from the top down; the first one's blocks count."""
    path = Path(path)
    named = (name for name in SUFFIXES if path.suffix.lower() in suffixes_of(name))
    wanted = format or next(named, path.suffix or "no suffix")
    if wanted not in SUFFIXES:
        raise UserError(f"cannot write {wanted!r}: expected one of {', '.join(SUFFIXES)}.")
    if max(size) > LARGEST_SIDE.get(wanted, max(size)):
        raise UserError(f"{size[1]} x {size[0]} pixels are more than {wanted} can hold ({LARGEST_SIDE[wanted]} a side); use PNG.")
    images = iter(strips)
    head = next(images)
    head, notes = heads.fitted(replace(head, exif=head.exif and exif.upright_exif(head.exif, size)), wanted)
    samples = (_samples(image, wanted) for image in itertools.chain([head], images))
    with atomic_file(path) as new, new.open("xb") as file:
        notes += _ENCODERS[wanted](file, head, size, samples, quality)
    return tuple(notes)


def _samples(image: Image, wanted: str) -> Pixels:
    colour = image.rgb[..., :1] if image.gray else image.rgb
    samples = colour if image.alpha is None else np.concatenate([colour, image.alpha[..., None]], axis=2)
    if image.bits == 16 and wanted in ("JPEG", "WEBP"):
        samples = ((samples.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if image.alpha is None or wanted != "JPEG":
        return samples
    alpha = samples[..., -1:].astype(np.uint32)
    return ((samples[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _jpeg(file: BinaryIO, head: Image, size: tuple[int, int], strips: Strips, quality: int) -> list[str]:
    segments, notes = heads.jpeg_head(head)
    first = next(strips)
    if len(first) == size[0]:
        import cv2

        full = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        made = cv2.imencode(".jpg", first[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1, *full])[1].data
        file.write(b"\xff\xd8" + segments + made[20:])  # 20: the start, and a JFIF segment that ours takes the place of
        return notes
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=Path(file.name).parent) as folder:
        raw, jpeg = Path(folder) / "raw", Path(folder) / "made.jpg"
        with raw.open("wb") as out:
            for strip in itertools.chain([first], strips):
                out.write(strip.tobytes())
        whole = libvips().Image.rawload(str(raw), size[1], size[0], first.shape[2], access="sequential")
        whole = whole.copy(interpretation="srgb" if first.shape[2] == 3 else "b-w")
        whole.jpegsave(str(jpeg), Q=quality, subsample_mode="off", keep="none")
        with jpeg.open("rb") as done:
            file.write(done.read(2) + segments)
            shutil.copyfileobj(done, file, 1 << 24)
    return notes


def _webp(file: BinaryIO, head: Image, size: tuple[int, int], strips: Strips, quality: int) -> list[str]:
    from PIL import Image as Pillow

    samples, held = np.concatenate(list(strips)), {"exif": head.exif, "xmp": head.xmp, "icc_profile": head.icc_profile}
    if head.gray:  # WebP has no gray
        samples = np.concatenate([samples[..., [0, 0, 0]], samples[..., 1:]], axis=2)
    picture = Pillow.fromarray(np.ascontiguousarray(samples))
    picture.save(file, "WEBP", quality=quality, method=4, exact=True, **{name: body for name, body in held.items() if body})
    return []


def _png(file: BinaryIO, head: Image, size: tuple[int, int], strips: Strips, quality: int) -> list[str]:
    """One IDAT chunk for every band of rows."""
    file.write(heads.png_head(head, size))
    deflate, above = zlib.compressobj(5), None
    for strip in strips:
        rows = np.ascontiguousarray(strip, dtype=strip.dtype.newbyteorder(">")).view(np.uint8).reshape(len(strip), -1)
        step = strip[0, 0].nbytes
        for band in _cut(iter([rows]), max(1, (1 << 20) // rows.shape[1])):
            body = deflate.compress(_paeth(band, np.zeros_like(band[0]) if above is None else above, step).tobytes())
            above = band[-1]
            file.write(blocks.png_chunk(b"IDAT", body) if body else b"")
    file.write(blocks.png_chunk(b"IDAT", deflate.flush()) + blocks.png_chunk(b"IEND", b""))
    return []


def _paeth(rows: Pixels, before: Pixels, step: int) -> Pixels:
    """[n, bytes] -> [n, 1 + bytes]: each byte less the neighbour (left, above, above left) that is nearest to left + above - above left."""
    above = np.concatenate([before[None], rows[:-1]])
    a, c = (np.pad(x[:, :-step], ((0, 0), (step, 0))).astype(np.int16) for x in (rows, above))
    b = above.astype(np.int16)
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    guess = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c)).astype(np.uint8)
    return np.pad(rows - guess, ((0, 0), (1, 0)), constant_values=4)


def _cut(strips: Strips, rows: int) -> Strips:
    """The same rows in strips of `rows` each; the last may be shorter."""
    rest: Pixels | None = None
    for strip in strips:
        rest = strip if rest is None or not len(rest) else np.concatenate([rest, strip])
        whole = len(rest) // rows * rows
        yield from (rest[at : at + rows] for at in range(0, whole, rows))
        rest = rest[whole:]
    if rest is not None and len(rest):
        yield rest


def _tiff(file: BinaryIO, head: Image, size: tuple[int, int], strips: Strips, quality: int) -> list[str]:
    """The EXIF block where it always is, at the start of its offsets; deflated strips with the horizontal predictor; the directory."""
    first = next(strips)
    order, rows = exif.Form.of(head.exif).order if head.exif else "<", max(1, (1 << 20) // first[0].nbytes)
    file.write((head.exif or b"").ljust(16, b"\0"))
    places = {}
    for strip in _cut(itertools.chain([first], strips), rows):
        strip = np.concatenate([strip[:, :1], strip[:, 1:] - strip[:, :-1]], axis=1)
        file.write(bytes(file.tell() % 2))
        at = file.tell()
        places[at] = file.write(zlib.compress(strip.astype(strip.dtype.newbyteorder("<" if order == "<" else ">")).tobytes(), 6))
    heads.end_tiff(file, head, order, size, rows, places)
    return []


Encoder = Callable[[BinaryIO, Image, tuple[int, int], Strips, int], list[str]]
_ENCODERS: dict[str, Encoder] = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "TIFF": _tiff}
