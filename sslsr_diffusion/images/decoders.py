"""Which library reads which format: pixels out of a file in memory whose other blocks are out of the way (`blocks.py`).

libvips' own threads do not survive a fork, and data-loader workers are forked. Its regions work in the thread that asks, so rows are
fetched from one; its WebP decoder starts threads all the same, so Pillow reads WebP.
"""

import functools
import io
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sslsr_diffusion.images import exif as tiff
from sslsr_diffusion.images.blocks import Blocks
from sslsr_diffusion.images.picture import Pixels

if TYPE_CHECKING:
    import pyvips

_LOADERS = {"PNG": "pngload_source", "JPEG": "jpegload_source", "TIFF": "tiffload_source", "AVIF": "heifload_source"}
_BAND = 32 << 20  # bytes that are fetched at once


class Refused(Exception):
    """The message is the reason as the user reads it."""


class Rows:
    """Pixels of an open file, not yet upright."""

    streams = False  # whether rows are decoded as they are asked for, from the top down; else the whole picture is in memory

    def __init__(self, height: int, width: int, decode: Callable[[], Pixels]) -> None:
        self.height, self.width = height, width
        self._all = functools.cache(decode)

    def read(self, top: int, bottom: int) -> Pixels:
        """[bottom - top, W, C]: gray, gray with alpha, RGB or RGBA."""
        return self._all()[top:bottom]

    def whole(self) -> Pixels:
        return self._all()


class _VipsRows(Rows):
    streams = True

    def __init__(self, image: "pyvips.Image", bits: int, data: object = None) -> None:
        self._data = data  # libvips keeps no reference to the memory that it reads
        self.height, self.width, self._bits, self._bands = image.height, image.width, bits, image.bands
        self._dtype = np.uint16 if image.format == "ushort" else np.uint8
        self._region = libvips().Region.new(image)

    def read(self, top: int, bottom: int) -> Pixels:
        out = np.empty((bottom - top, self.width, self._bands), self._dtype)
        step = max(1, _BAND // max(1, out[:1].nbytes))
        for y in range(0, len(out), step):
            part = out[y : y + step]
            part[...] = np.frombuffer(self._region.fetch(0, top + y, self.width, len(part)), self._dtype).reshape(part.shape)
        if self._bits in range(9, 16):  # libvips fills 10 or 12 bits up with zeros: white would not be white
            out = scaled(np.right_shift(out, 16 - self._bits, dtype=np.uint16), (1 << self._bits) - 1)
        return out

    def whole(self) -> Pixels:
        return self.read(0, self.height)


@functools.cache
def libvips() -> Any:
    import logging

    logging.getLogger("pyvips").setLevel(logging.ERROR)  # we report what is wrong with a file
    import pyvips

    pyvips.cache_set_max(0)  # or it would keep files open
    return pyvips


def scaled(values: Pixels, most: int) -> Pixels:
    """0 to `most` -> 0 to 255 or 65535, rounded."""
    kind, top = (np.uint8, 255) if most <= 255 else (np.uint16, 65535)
    return values if most == top else ((values.astype(np.uint32) * (2 * top) + most) // (2 * most)).clip(max=top).astype(kind)


def _by_vips(data: memoryview, kind: str, found: Blocks) -> Rows:
    vips = libvips()
    image = vips.Operation.call(_LOADERS[kind], vips.Source.new_from_memory(data), access="sequential", fail_on="error")
    fields, bits = set(image.get_fields()), 0
    if kind == "AVIF":
        bits = image.get("bits-per-sample") if "bits-per-sample" in fields else 0
        found.xmp, found.icc_profile = (image.get(name) if name in fields else None for name in ("xmp-data", "icc-profile-data"))
        if "exif-data" in fields:
            found.take_exif(image.get("exif-data"))
        if image.get("n-pages") > 1:
            found.notes.append("the first of several pictures")
    if image.interpretation == "cmyk":
        image = _cmyk(image, found)
    if image.format not in ("uchar", "ushort"):
        what = {"float": "floating point", "double": "floating point"}.get(image.format, image.format)
        raise Refused(f"{what} values; expected 8 or 16 bits unsigned")
    most = 2 if image.interpretation in ("b-w", "grey16") or image.bands < 3 else 4
    if image.bands > most:
        found.lose(f"{image.bands - most} of its channels", "they are no colour")
        image = image.extract_band(0, n=most)
    return _VipsRows(image, bits, data)


def _cmyk(image: "pyvips.Image", found: Blocks) -> "pyvips.Image":
    """CMYK cannot stay: through its profile to sRGB; libvips has a general one for pictures without."""
    profile, found.icc_profile = found.icc_profile or b"", None
    usable = profile_space(profile) == "CMYK" and struct.unpack(">I", profile[:4])[0] <= len(profile)
    if usable:
        image = image.copy()
        image.set_type(libvips().GValue.blob_type, "icc-profile-data", profile)
    how = "CMYK" if usable else f"CMYK with{' an unusable' if profile else 'out a'} profile"
    found.notes.append(f"{how} converted to sRGB")
    depth = 16 if image.format == "ushort" else 8
    return image.icc_transform("srgb", embedded=usable, input_profile="cmyk", intent="relative", black_point_compensation=True, depth=depth)


def profile_space(profile: bytes) -> str | None:
    """The colour space that an ICC profile describes ("RGB", "GRAY", "CMYK", ...); None if it is not a profile."""
    if len(profile) < 128 or profile[36:40] != b"acsp":
        return None
    return profile[16:20].decode("latin-1").strip()


def _by_pillow(data: memoryview, kind: str, found: Blocks) -> Rows:
    from PIL import Image as Pillow

    # What Pillow only warns about is either reported by us or harmless; a filter by module is safe in threads, catch_warnings is not.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Pillow.init()
    if kind not in Pillow.OPEN:
        raise Refused(f"the Pillow that is installed here does not read {kind}")
    file = Pillow.OPEN[kind][0](io.BytesIO(data), "")  # not Pillow.open, which has a limit of its own on pixels
    if kind in ("BMP", "GIF", "TGA"):
        found.icc_profile, found.density = file.info.get("icc_profile"), file.info.get("dpi")
    if kind != "WEBP" and getattr(file, "is_animated", False):
        found.notes.append("the first frame of an animation")

    def decode() -> Pixels:
        file.load()
        if file.mode == "LAB":
            found.icc_profile = None
            return _lab(np.asarray(file))
        if file.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"):
            raise Refused(f"32-bit or unusual values (Pillow's mode {file.mode}); expected 8 or 16 bits unsigned")
        gray, clear = file.mode in ("1", "L", "LA", "La"), file.has_transparency_data
        mode = {(True, True): "LA", (True, False): "L", (False, True): "RGBA", (False, False): "RGB"}[gray, clear]
        return np.atleast_3d(np.asarray(file.convert(mode)))

    if file.mode in ("LAB", "CMYK"):
        found.notes.append(f"{file.mode} converted to sRGB")
    return Rows(file.height, file.width, decode)


def _lab(values: Pixels) -> Pixels:
    """[H, W, 3] uint8 of CIE Lab, a and b 128 higher, to sRGB."""
    vips = libvips()
    lab = values * np.array([100 / 255, 1, 1], np.float32) - np.array([0, 128, 128], np.float32)
    image = vips.Image.new_from_array(lab)
    return _VipsRows(image.copy(interpretation="lab").colourspace("srgb"), 0).whole()


def _by_opencv(data: memoryview, kind: str, found: Blocks) -> Rows:
    """OpenCV keeps the numbers of the file, so what counts as white comes from its header."""
    height, width, most = (_ppm_header if kind == "PPM" else _jp2_header)(data)
    if kind == "JPEG2000" and most <= 255:
        return _by_pillow(data, kind, found)

    def decode() -> Pixels:
        import cv2

        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it would print every damaged file to the terminal
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None and kind == "JPEG2000":  # gray with alpha
            found.notes.append(f"8 of {most.bit_length()} bits")
            return _by_pillow(data, kind, found).whole()
        if pixels is None:
            raise Refused("the pixels cannot be decoded; the file is cut off or damaged")
        pixels = scaled(np.atleast_3d(pixels), most)
        return pixels if pixels.shape[2] == 1 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]

    return Rows(height, width, decode)


def _ppm_header(data: memoryview) -> tuple[int, int, int]:
    """Height, width and the value of white."""
    words = re.sub(rb"#[^\r\n]*", b" ", bytes(data[: 1 << 16])).split(maxsplit=4)[:4]
    if words[0] not in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6") or not all(word.isdigit() for word in words[1:3]):
        raise Refused("a portable pixmap of an unusual kind; expected P1 to P6")
    most = 255 if words[0] in (b"P1", b"P4") else int(words[3])
    if not 0 < most < 1 << 16:
        raise Refused(f"white is {most}; expected 1 to 65535")
    return int(words[2]), int(words[1]), most


def _jp2_header(data: memoryview) -> tuple[int, int, int]:
    """The same of a JPEG 2000 file, out of its codestream (ISO 15444-1, A.5.1)."""
    at = bytes(data[: 1 << 20]).find(b"\xff\x4f\xff\x51") + 8
    if at < 8 or at + 40 > len(data):
        raise Refused("the file is cut off")
    right, bottom, left, top = struct.unpack_from(">4I", data, at)
    (channels,) = struct.unpack_from(">H", data, at + 32)
    most = max((1 << (1 + (each & 0x7F))) - 1 for each in data[at + 34 : at + 34 + 3 * channels : 3])
    if most >= 1 << 16:
        raise Refused(f"{most.bit_length()}-bit values; expected up to 16 bits")
    return bottom - top, right - left, most


def _by_either(data: memoryview, kind: str, found: Blocks) -> Rows:
    """TIFF: libvips' wheel lacks Lab of 8 bits, Zstandard and LZMA; Pillow has them, and would make 8 bits of 16."""
    form = tiff.Form.of(data)
    tags = {e.tag: struct.unpack_from(form.order + "H", data, e.at)[0] for e in form.directory(data, form.first).entries if e.kind == 3}
    if (tags.get(259) in (34925, 50000) or tags.get(262) == 8) and tags.get(258, 1) <= 8:
        return _by_pillow(data, kind, found)
    return _by_vips(data, kind, found)


READERS: Mapping[str, Callable[[memoryview, str, Blocks], Rows]] = {
    **dict.fromkeys(("PNG", "JPEG", "AVIF"), _by_vips),
    "TIFF": _by_either,
    **dict.fromkeys(("WEBP", "GIF", "BMP", "TGA"), _by_pillow),
    **dict.fromkeys(("PPM", "JPEG2000"), _by_opencv),
}
