import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_write
from sslsr_diffusion.images.metadata import PNG_SIGNATURE, PREFIX, png_chunk, updated_exif

if TYPE_CHECKING:
    import PIL.Image
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    from sslsr_diffusion.images.picture import Image, Pixels

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif"}  # format -> suffix of a new file
_FURTHER = {"JPEG": (".jpeg", ".jpe", ".jfif"), "TIFF": (".tiff",)}
LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}
LARGEST_JPEG_EXIF = 65533 - len(PREFIX)


def write_image(path: Path | str, image: "Image", *, format: str | None = None, quality: int = 95) -> tuple[str, ...]:
    """Write a picture with its profile, EXIF and alpha: complete under its name, or not at all.

    Args:
        format: "PNG", "JPEG", "WEBP" or "TIFF"; default by the suffix of `path`.
        quality: 1 to 100, of JPEG and WebP.
    Returns:
        What the format could not keep, one phrase each ("8 of 16 bits", "alpha flattened on white").
    Raises:
        UserError: unknown format, or larger than the format allows.
        OSError: the file cannot be written.
    """
    path = Path(path)
    named = (name for name in SUFFIXES if path.suffix.lower() in suffixes_of(name))
    wanted = format or next(named, path.suffix or "no suffix")
    if wanted not in SUFFIXES:
        raise UserError(f"cannot write {wanted!r}: expected one of {', '.join(SUFFIXES)}.")
    if max(image.size) > LARGEST_SIDE.get(wanted, max(image.size)):
        height, width = image.size
        raise UserError(f"{width} x {height} pixels are more than {wanted} can hold ({LARGEST_SIDE[wanted]} a side); use PNG.")
    data, notes = _ENCODERS[wanted](image, quality)
    atomic_write(path, data)
    return notes


def suffixes_of(format: str) -> tuple[str, ...]:
    """The suffixes under which a format of `SUFFIXES` may be written, lower case."""
    return (SUFFIXES[format], *_FURTHER.get(format, ()))


def _samples(image: "Image") -> "Pixels":
    """[H, W, 1 to 4]: gray or colour, then alpha where there is one."""
    colour = image.rgb[..., :1] if image.gray else image.rgb
    return colour if image.alpha is None else np.concatenate([colour, image.alpha[..., None]], axis=2)


def _pillow(samples: "Pixels") -> "PIL.Image.Image":
    from PIL import Image as Pillow

    return Pillow.fromarray(np.ascontiguousarray(samples[..., 0] if samples.shape[2] == 1 else samples))


def _metadata(image: "Image") -> dict[str, bytes]:
    exif = updated_exif(image.exif, image.size) if image.exif else None
    return ({"icc_profile": image.icc_profile} if image.icc_profile else {}) | ({"exif": PREFIX + exif} if exif else {})


def _eight_bits(image: "Image") -> "tuple[Pixels, tuple[str, ...]]":
    samples = _samples(image)
    if image.bits == 8:
        return samples, ()
    return ((samples.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8), ("8 of 16 bits",)


def _jpeg(image: "Image", quality: int) -> tuple[bytes, tuple[str, ...]]:
    samples, notes = _eight_bits(image)
    if image.alpha is not None:
        alpha = samples[..., -1:].astype(np.uint32)
        samples = ((samples[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        notes += ("alpha flattened on white",)
    metadata = _metadata(image)
    if len(metadata.get("exif", b"")) - len(PREFIX) > LARGEST_JPEG_EXIF:
        del metadata["exif"]
        notes += ("EXIF left out, too large for JPEG",)
    buffer = io.BytesIO()
    _pillow(samples).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=max(image.size) < 8192, **metadata)
    return buffer.getvalue(), notes


def _webp(image: "Image", quality: int) -> tuple[bytes, tuple[str, ...]]:
    samples, notes = _eight_bits(image)
    buffer, metadata = io.BytesIO(), _metadata(image)
    if image.gray:
        samples = np.concatenate([samples[..., :1].repeat(3, axis=2), samples[..., 1:]], axis=2)  # WebP has no gray
        if metadata.pop("icc_profile", None):
            notes += ("the gray profile left out, WebP is always colour",)
    _pillow(samples).save(buffer, "WEBP", quality=quality, method=4, exact=True, **metadata)
    return buffer.getvalue(), notes


def _png(image: "Image", quality: int) -> tuple[bytes, tuple[str, ...]]:
    if image.bits == 8:
        buffer = io.BytesIO()
        _pillow(_samples(image)).save(buffer, "PNG", **_metadata(image))
        return buffer.getvalue(), ()
    samples = _samples(image)
    height, width, channels = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [PNG_SIGNATURE, png_chunk(b"IHDR", header)]
    metadata = _metadata(image)
    if "icc_profile" in metadata:
        parts.append(png_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(metadata["icc_profile"])))
    if "exif" in metadata:
        parts.append(png_chunk(b"eXIf", metadata["exif"][len(PREFIX) :]))
    parts.append(_filtered(samples))
    return b"".join([*parts, png_chunk(b"IEND", b"")]), ()


def _filtered(samples: "Pixels") -> bytes:
    """PNG scan lines through the Paeth filter, deflated: one IDAT chunk for every band of rows."""
    height, step = samples.shape[0], samples.shape[2] * 2
    rows = np.ascontiguousarray(samples, dtype=">u2").view(np.uint8).reshape(height, -1)
    deflate, chunks, band = zlib.compressobj(5), [], max(1, (1 << 22) // max(1, rows.shape[1]))
    for top in range(0, height, band):
        x = rows[top : top + band]
        above = np.concatenate([rows[top - 1 : top] if top else np.zeros_like(x[:1]), x[:-1]])
        a = np.pad(x, ((0, 0), (step, 0)))[:, : x.shape[1]].astype(np.int16)  # left
        c = np.pad(above, ((0, 0), (step, 0)))[:, : x.shape[1]].astype(np.int16)  # above left
        b = above.astype(np.int16)
        to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
        guess = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c)).astype(np.uint8)
        body = deflate.compress(np.pad(x - guess, ((0, 0), (1, 0)), constant_values=4).tobytes())
        if body:
            chunks.append(png_chunk(b"IDAT", body))
    chunks.append(png_chunk(b"IDAT", deflate.flush()))
    return b"".join(chunks)


def _tiff(image: "Image", quality: int) -> tuple[bytes, tuple[str, ...]]:
    """The directory with EXIF and profile, then one deflated strip after another, with the horizontal predictor."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    notes: tuple[str, ...] = ()
    if image.gray and image.alpha is not None and image.bits == 16:  # hardly any reader knows this kind, ours neither
        notes = ("the gray profile left out, 16-bit TIFF with alpha is colour",) if image.icc_profile else ()
        image = replace(image, gray=False, icc_profile=None)
    samples = _samples(image)
    height, width, channels = samples.shape
    samples = samples.astype(samples.dtype.newbyteorder("<"))
    rows = max(1, (1 << 20) // (width * channels * samples.itemsize))
    body, offsets, lengths = bytearray(), [], []
    for top in range(0, height, rows):
        strip = samples[top : top + rows]
        strip = np.concatenate([strip[:, :1], strip[:, 1:] - strip[:, :-1]], axis=1)
        offsets.append(len(body))
        body += zlib.compress(strip.tobytes(), 6)
        lengths.append(len(body) - offsets[-1])
        body += b"\0" * (len(body) % 2)
    if len(body) > 0xFFF00000:
        raise UserError("the picture is larger than the 4 GB that TIFF can hold; use PNG.")
    directory = ImageFileDirectory_v2(prefix=b"II")
    _tiff_exif(image, directory)
    directory[256], directory[257], directory[277] = width, height, channels
    directory[258] = (image.bits,) * channels
    directory[259], directory[317], directory[262], directory[284] = 8, 2, 1 if image.gray else 2, 1
    directory[273], directory[278], directory[279] = tuple(offsets), rows, tuple(lengths)
    directory[339] = (1,) * channels
    if image.alpha is not None:
        directory[338] = 2  # unassociated alpha
    if image.icc_profile:
        directory.tagtype[34675] = 7
        directory[34675] = image.icc_profile
    directory.tagtype[273] = directory.tagtype[279] = 4
    return b"II*\0\x08\0\0\0" + directory.tobytes(8) + bytes(body), notes  # Pillow adds the directory's own length to 273


def _tiff_exif(image: "Image", directory: "ImageFileDirectory_v2") -> None:
    from PIL import Image as Pillow

    exif = Pillow.Exif()
    updated = updated_exif(image.exif, image.size) if image.exif else None
    if updated:
        exif.load(PREFIX + updated)
    for tag, value in exif.items():
        if tag in EXIF_TAGS_OF_TIFF:
            directory[tag] = exif.get_ifd(tag) if tag in (0x8769, 0x8825) else value
    directory[274] = 1


EXIF_TAGS_OF_TIFF = frozenset(
    [270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, 0x8769, 0x8825, 0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F]
)

_ENCODERS: "dict[str, Callable[[Image, int], tuple[bytes, tuple[str, ...]]]]" = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "TIFF": _tiff}
