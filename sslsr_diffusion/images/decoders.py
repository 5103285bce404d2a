"""Which library reads which format: pixels out of a file in memory whose other blocks are out of the way (`metadata/blocks.py`).

libvips' own threads do not survive a fork, and data-loader workers are forked. Its regions work in the thread that asks, so rows are
fetched from one; its WebP decoder starts threads all the same, so Pillow reads WebP.
"""

import functools
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sslsr_diffusion.images.picture import Pixels
from sslsr_diffusion.metadata import headers
from sslsr_diffusion.metadata.blocks import Blocks, profile_space
from sslsr_diffusion.metadata.colours import romm_profile, srgb_of_sycc
from sslsr_diffusion.metadata.headers import Refused

if TYPE_CHECKING:
    import pyvips

_LOADERS = {"PNG": "pngload_source", "JPEG": "jpegload_source", "TIFF": "tiffload_source", "AVIF": "heifload_source"}
_BAND = 4 << 20  # bytes that are fetched at once


@dataclass(frozen=True)
class Rows:
    """Pixels of an open file, not yet upright."""

    height: int
    width: int
    read: Callable[[int, int], Pixels]  # (top, bottom) -> [bottom - top, W, C]: gray, gray with alpha, RGB or RGBA
    streams: bool = False  # decoded as they are asked for, from the top down; else the first call decodes all of them


def _of_array(height: int, width: int, decode: Callable[[], Pixels]) -> Rows:
    decoded = functools.cache(decode)
    return Rows(height, width, lambda top, bottom: decoded()[top:bottom])


@functools.cache
def libvips() -> Any:
    logging.getLogger("pyvips").setLevel(logging.ERROR)  # we report what is wrong with a file
    import pyvips

    pyvips.cache_set_max(0)  # or it would keep files open
    return pyvips


def _of_vips(image: "pyvips.Image", data: object = None, bits: int = 16) -> Rows:
    """`data` is what the image reads from: libvips keeps no reference to it. `bits`: how many of 16 are used."""
    width, bands, dtype = image.width, image.bands, np.uint16 if image.format == "ushort" else np.uint8
    region, step = libvips().Region.new(image), max(1, _BAND // (width * bands * dtype().itemsize))

    def read(top: int, bottom: int, data: object = data) -> Pixels:
        if top == 0:
            region.fetch(0, 0, width, 1)  # libvips tries each row of a fetch, although the first has failed
        out = np.empty((bottom - top, width, bands), dtype)
        for y in range(0, len(out), step):
            part = out[y : y + step]
            part[...] = np.frombuffer(region.fetch(0, top + y, width, len(part)), dtype).reshape(part.shape)
        return out if bits == 16 or dtype == np.uint8 else _scaled(np.right_shift(out, 16 - bits, dtype=np.uint16), (1 << bits) - 1)

    return Rows(image.height, width, read, streams=True)


def _scaled(values: Pixels, white: int) -> Pixels:
    """0 to `white` -> 0 to 255 or 65535, rounded."""
    kind, top = (np.uint8, 255) if white <= 255 else (np.uint16, 65535)
    return values if white == top else (values.clip(max=white) * (top / white) + 0.5).astype(kind)


def _by_vips(data: memoryview, kind: str, found: Blocks) -> Rows:
    vips = libvips()
    image = vips.Operation.call(_LOADERS[kind], vips.Source.new_from_memory(data), access="sequential", fail_on="error")
    fields, bits = set(image.get_fields()), 16
    if kind == "AVIF":  # 10 and 12 bits come filled up with zeros: white would not be white
        bits = image.get("bits-per-sample") if "bits-per-sample" in fields else 16
        found.xmp, found.icc_profile = (image.get(name) if name in fields else None for name in ("xmp-data", "icc-profile-data"))
        if "exif-data" in fields:
            found.take_exif(image.get("exif-data"))
        if image.get("n-pages") > 1:
            found.notes.append("the first of several pictures")
    if image.interpretation == "cmyk":
        image = _cmyk(image, found)
    if image.format not in ("uchar", "ushort"):
        raise Refused(f"values of the kind {image.format}; expected 8 or 16 bits unsigned")
    most = 2 if image.interpretation in ("b-w", "grey16") or image.bands < 3 else 4
    if image.bands > most:
        found.lose(f"{image.bands - most} of its channels", "they are no colour")
        image = image.extract_band(0, n=most)
    return _of_vips(image, data, bits)


def _cmyk(image: "pyvips.Image", found: Blocks) -> "pyvips.Image":
    """CMYK cannot stay: through its profile to sRGB; libvips has a general one for pictures without."""
    profile, found.icc_profile = found.icc_profile or b"", None
    usable = profile_space(profile) == "CMYK"
    if usable:
        image = image.copy()
        image.set_type(libvips().GValue.blob_type, "icc-profile-data", profile)
    which = "CMYK" if usable else f"CMYK with{' an unusable' if profile else 'out a'} profile"
    found.notes.append(f"{which} converted to sRGB")
    how = {"intent": "relative", "black_point_compensation": True, "depth": 16 if image.format == "ushort" else 8}
    return image.icc_transform("srgb", embedded=usable, input_profile="cmyk", **how)


def _by_pillow(data: memoryview, kind: str, found: Blocks) -> Rows:
    from PIL import Image as Pillow

    # What Pillow only warns about is either reported by us or harmless; a filter by module is safe in threads, catch_warnings is not.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Pillow.init()
    if kind not in Pillow.OPEN:
        raise Refused(f"the Pillow that is installed here does not read {kind}")
    file = Pillow.OPEN[kind][0](io.BytesIO(data), "")  # not Pillow.open, which has a limit of its own on pixels
    found.density = found.density or file.info.get("dpi")
    if kind != "WEBP" and getattr(file, "is_animated", False):
        found.notes.append("the first frame of an animation")
    if file.mode in ("LAB", "CMYK"):
        found.icc_profile = None
        found.notes.append(f"{file.mode} converted to sRGB")

    def decode() -> Pixels:
        file.load()
        if file.mode == "LAB":
            lab = np.asarray(file) * np.array([100 / 255, 1, 1], np.float32) - np.array([0, 128, 128], np.float32)
            return _of_vips(libvips().Image.new_from_array(lab).copy(interpretation="lab").colourspace("srgb")).read(0, file.height)
        if file.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"):
            raise Refused(f"32-bit or unusual values (Pillow's mode {file.mode}); expected 8 or 16 bits unsigned")
        mode = ("L" if file.mode in ("1", "L", "LA", "La") else "RGB") + ("A" if file.has_transparency_data else "")
        return np.atleast_3d(np.asarray(file.convert(mode)))

    return _of_array(file.height, file.width, decode)


def _tiff(data: memoryview, kind: str, found: Blocks) -> Rows:
    """libvips' wheel lacks Lab of 8 bits, Zstandard and LZMA; Pillow has them, and would make 8 bits of 16."""
    tags = headers.tiff(data)
    if tags.get(284) == 2 and tags.get(262) in (0, 1) and tags.get(277, 1) > 1:
        return _gray_and_alpha(data, tags, found)
    special = tags.get(259) in (34925, 50000) or tags.get(262) == 8
    return (_by_pillow if special and tags.get(258, 1) <= 8 else _by_vips)(data, kind, found)


def _gray_and_alpha(data: memoryview, tags: dict[int, int], found: Blocks) -> Rows:
    """libvips mixes up the rows of two separate planes; as one gray picture of twice the height they are right."""
    height = headers.stack_planes(data, tags)
    both = _by_vips(data, "TIFF", found)

    def decode() -> Pixels:
        gray, alpha = (both.read(top, top + height) for top in (0, height))
        alpha = alpha if tags[262] else np.invert(alpha)  # where white is 0, both came inverted
        if tags.get(338) == 1:  # premultiplied
            white = np.iinfo(gray.dtype).max
            gray = (gray * (white / np.maximum(alpha, 1)) + 0.5).clip(max=white).astype(gray.dtype)
        return np.concatenate([gray, alpha], axis=2)

    return _of_array(height, both.width, decode)


def _by_opencv(data: memoryview, kind: str, found: Blocks) -> Rows:
    """OpenCV keeps the numbers of the file, so what counts as white comes from its header. Pillow would make 8 bits of 16."""
    height, width, white = (headers.ppm if kind == "PPM" else headers.jp2)(data)
    if kind == "JPEG2000" and white <= 255:
        return _by_pillow(data, kind, found)

    def decode() -> Pixels:
        import cv2

        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it would print every damaged file to the terminal
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None and kind == "JPEG2000":  # gray with alpha
            found.notes.append(f"8 of {white.bit_length()} bits")
            return _by_pillow(data, kind, found).read(0, height)
        if pixels is None:
            raise Refused("the pixels cannot be decoded; the file is cut off or damaged")
        pixels = _scaled(np.atleast_3d(pixels), white)
        return pixels if pixels.shape[2] == 1 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]

    return _of_array(height, width, decode)


def _jpeg2000(data: memoryview, kind: str, found: Blocks) -> Rows:
    """By the colours that its header names by number."""
    space = headers.jp2_space(data)
    if space == "ROMM RGB":
        found.icc_profile = romm_profile()
        found.notes.append("colours by code (ROMM RGB) written as a colour profile")
    rows, white = _by_opencv(data, kind, found), headers.jp2(data)[2]
    if space != "sYCC":
        return rows
    return _of_array(rows.height, rows.width, lambda: srgb_of_sycc(rows.read(0, rows.height), (white + 1) / 2 / white))


Reader = Callable[[memoryview, str, Blocks], Rows]
_PILLOW: dict[str, Reader] = dict.fromkeys(("WEBP", "GIF", "BMP", "TGA"), _by_pillow)
READERS = {"PNG": _by_vips, "JPEG": _by_vips, "AVIF": _by_vips, "TIFF": _tiff, "PPM": _by_opencv, "JPEG2000": _jpeg2000, **_PILLOW}
