import io
import re
import stat
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from sslsr_diffusion.images import metadata
from sslsr_diffusion.images.files import printable
from sslsr_diffusion.images.picture import Image, Pixels, UnreadableImage
from sslsr_diffusion.images.writers import EXIF_TAGS_OF_TIFF

if TYPE_CHECKING:
    import PIL.Image
    from PIL.ImageFile import ImageFile
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

MAX_PIXELS = 178_956_970  # Pillow's limit for a decompression bomb: 0.5 GB of RGB
_TOO_MANY = f"are more than the {MAX_PIXELS / 1e6:.0f} megapixels that are read; cut the picture into pieces"
MAX_BYTES = 4 << 30
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "TGA", "AVIF", "JPEG2000")  # none that runs a program


def read_image(source: Path | str | bytes, *, name: str | None = None) -> Image:
    """Read one picture whole, upright, with profile, EXIF and alpha.

    8 and 16 bits stay as they are. Gray, palette and one-bit pictures become three channels; CMYK and Lab go through their
    profile to sRGB. Of an animation the first frame counts (`notes` says so). The content decides the format, not the name.

    Args:
        source: a path, or the bytes of a file.
        name: how messages call it; default the file's name.
    Raises:
        UnreadableImage: not a picture, damaged, cut off, empty, a decompression bomb, or of a kind that would lose values.
    """
    label = name or ("image" if isinstance(source, bytes) else printable(Path(source).name))
    data = b""
    try:
        data = source if isinstance(source, bytes) else _read_bytes(Path(source))
        if not data:
            raise _Refused("the file is empty")
        return _decode(data)
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files, KeyError and struct.error included
        raise UnreadableImage(f"{label}: {_reason(error, data[:4])}.") from error


_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"GIF8": "GIF",
    b"BM": "BMP",
}


def format_of(path: Path) -> str | None:
    """The format that a file's first bytes promise, as `Image.format` would say; None for all that cannot be written anyway."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return None
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


class _Refused(Exception):
    """The message is the reason as the user reads it."""


def _reason(error: Exception, magic: bytes) -> str:
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError

    text = str(error).strip().rstrip(".").splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, UnidentifiedImageError) and magic in (b"II*\0", b"MM\0*"):
        return "damaged, or a TIFF of an unusual kind; save it as gray or RGB with 8 or 16 bits"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, damaged at the start, or of a format other than " + ", ".join(f for f in FORMATS if f not in ("DIB", "MPO"))
    if isinstance(error, DecompressionBombError):
        got = re.search(r"\d+", text)
        return f"{int(got[0]) / 1e6:.0f} megapixels {_TOO_MANY}" if got else f"its pixels {_TOO_MANY}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, _Refused):
        return text
    if "truncated" in text.lower() or "cut off" in text:
        return "the file is cut off"
    return f"damaged ({printable(text)[:120]})"


def _read_bytes(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _Refused("not a regular file")
    if status.st_size > MAX_BYTES:
        raise _Refused(f"the file has {status.st_size / 2**30:.1f} GB, more than {MAX_BYTES >> 30} GB")
    return path.read_bytes()


def _open(source: Path | BinaryIO) -> "ImageFile":
    """Pillow's lazy image of a path or a binary file, of our formats alone."""
    from PIL import Image as Pillow

    # What Pillow only warns about is either reported by us or harmless; a filter by module is safe in threads, catch_warnings is not.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Pillow.init()
    return Pillow.open(source, formats=[f for f in FORMATS if f in Pillow.OPEN])


def size_of(path: Path) -> tuple[int, int] | None:
    """(width, height) in pixels of a picture held upright, from its header alone; None where that cannot be read."""
    try:
        with _open(path) as file:
            turned = file.getexif().get(metadata.ORIENTATION, 1) >= 5
            return (file.height, file.width) if turned else (file.width, file.height)
    except Exception:  # whatever a broken file does to Pillow; reading it whole says what is wrong
        return None


def _decode(data: bytes) -> Image:
    with _open(io.BytesIO(data)) as file:
        width, height = file.size
        if width * height > MAX_PIXELS:
            raise _Refused(f"{width * height / 1e6:.0f} megapixels {_TOO_MANY}")
        kind = {"MPO": "JPEG", "DIB": "BMP"}.get(file.format or "", file.format or "")
        exif, turn = _exif(file, kind)
        notes = _notes(file, kind)
        if _bits(file, kind, data) == 16:
            image = _sixteen_bits(data, file, kind)
            image = replace(image, rgb=_upright(image.rgb, turn), alpha=None if image.alpha is None else _upright(image.alpha, turn))
        else:
            image = _eight_bits(file)
            if kind != "TIFF":  # Pillow turns TIFF pictures itself
                image = replace(image, rgb=_upright(image.rgb, turn), alpha=None if image.alpha is None else _upright(image.alpha, turn))
    image = _with_profile(image)
    return replace(image, exif=exif, format=kind, notes=(*notes, *image.notes))


def _notes(file: "ImageFile", kind: str) -> tuple[str, ...]:
    if kind == "JPEG" or not getattr(file, "is_animated", False):  # the further pictures of a JPEG are previews
        return ()
    return ("the first of several pages",) if kind == "TIFF" else ("the first frame of an animation",)


def _exif(file: "ImageFile", kind: str) -> tuple[bytes | None, int]:
    """The EXIF block without prefix, its orientation set to 1; and the orientation as it was."""
    if kind == "TIFF":
        raw, turn = _exif_of_tiff(file)
    else:
        raw = file.info.get("exif") or b""
        text = file.info.get("Raw profile type exif")  # ImageMagick's older PNG files
        if not raw and isinstance(text, str):
            raw = bytes.fromhex("".join(text.split("\n")[3:]))
        raw = raw.removeprefix(metadata.PREFIX)
        turn = metadata.orientation(raw)
    height, width = (file.width, file.height) if turn > 4 and kind != "TIFF" else (file.height, file.width)
    return metadata.updated_exif(raw, (height, width)), turn


def _exif_of_tiff(file: "ImageFile") -> tuple[bytes, int]:
    """In TIFF the EXIF entries stand among those of the picture itself."""
    from PIL import Image as Pillow

    there, kept = file.getexif(), Pillow.Exif()
    for tag, value in there.items():
        if tag in EXIF_TAGS_OF_TIFF:
            kept[tag] = there.get_ifd(tag) if tag in (0x8769, 0x8825) else value
    turn = there.get(metadata.ORIENTATION, 1)
    return (kept.tobytes().removeprefix(metadata.PREFIX) if len(kept) else b""), turn if turn in range(1, 9) else 1


def _upright(array: Pixels, turn: int) -> Pixels:
    """[H, W, ...] as EXIF orientation `turn` wants it shown."""
    if turn > 4:
        array = array.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        array = array[::-1]
    if turn in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _bits(file: "ImageFile", kind: str, data: bytes) -> int:
    """Bits per value that the file holds: 8 also for fewer, 16 where OpenCV can decode them."""
    if kind == "PNG":
        return 16 if data[24] == 16 else 8
    if kind == "PPM":
        header = re.match(rb"P[56]\s(?:\s*#[^\n]*\n)*\s*\d+\s+\d+\s+(\d+)\s", data[:4096])
        return 16 if header and int(header[1]) == 65535 else 8
    if kind != "TIFF":
        return 8
    tags = _tags(file)
    bits, sample_format = tags.get(258, (1,)), tags.get(339, (1,))
    if max(bits) <= 8:
        return 8
    if set(bits) != {16} or set(sample_format) != {1}:
        what = {2: "signed", 3: "floating point"}.get(sample_format[0], "unsigned")
        raise _Refused(f"{bits[0]}-bit {what} values; expected 8 or 16 bits unsigned")
    if tags.get(262) not in (1, 2):
        raise _Refused("16-bit TIFF of another kind than gray or RGB; save it as RGB or with 8 bits")
    if tags.get(284, 1) != 1:  # OpenCV would mix the planes up
        raise _Refused("16-bit TIFF with separate colour planes; save it interleaved")
    return 16


def _tags(file: "ImageFile") -> "ImageFileDirectory_v2":
    from PIL.TiffImagePlugin import TiffImageFile

    assert isinstance(file, TiffImageFile)
    return file.tag_v2


def _sixteen_bits(data: bytes, file: "ImageFile", kind: str) -> Image:
    """Pillow would halve the bits of colour; OpenCV keeps them, and knows nothing of metadata."""
    import cv2

    transparent = None
    if kind == "PNG":
        transparent = next((body for name, body in metadata.png_chunks(data) if name == b"tRNS"), None)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it would print every damaged file to the terminal; we report it
    unturned = metadata.updated_exif(data, file.size) if kind == "TIFF" else None  # or OpenCV turns the picture too
    pixels = cv2.imdecode(np.frombuffer(unturned or data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise _Refused("the pixels cannot be decoded; the file is cut off or damaged")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    gray = (kind != "PPM" and (data[25] in (0, 4) if kind == "PNG" else _tags(file).get(262) == 1)) or pixels.shape[2] == 1
    rgb = pixels[..., [0, 0, 0]] if pixels.shape[2] < 3 else pixels[..., 2::-1]
    alpha = pixels[..., -1] if pixels.shape[2] in (2, 4) else None
    if transparent is not None:  # one colour stands for "transparent"
        key = np.frombuffer(transparent, ">u2").astype(np.uint16)
        alpha = np.where((rgb == key).all(axis=2), 0, 65535).astype(np.uint16)
    if alpha is not None and kind == "TIFF" and tuple(_tags(file).get(338, ())) == (1,):  # premultiplied
        rgb = np.minimum(np.round(rgb * (65535.0 / np.maximum(alpha, 1))[..., None]), 65535).astype(np.uint16)
    return Image(np.ascontiguousarray(rgb), alpha, _profile(file), gray=gray)


def _eight_bits(file: "PIL.Image.Image") -> Image:
    mode = file.mode
    if mode in ("I", "F") or mode.startswith("I;"):
        raise _Refused(f"32-bit or unusual values (Pillow's mode {mode}); expected 8 or 16 bits unsigned")
    file.load()
    profile, notes = _profile(file), tuple[str, ...]()
    if mode in ("CMYK", "LAB"):
        file, profile, notes = _to_srgb(file, profile)
    gray = mode in ("1", "L", "LA", "La")
    transparent = file.has_transparency_data
    pixels = np.asarray(
        file.convert({(True, True): "LA", (True, False): "L", (False, True): "RGBA", (False, False): "RGB"}[gray, transparent])
    )
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    rgb = pixels[..., [0, 0, 0]] if gray else pixels[..., :3]
    return Image(np.ascontiguousarray(rgb), np.ascontiguousarray(pixels[..., -1]) if transparent else None, profile, gray=gray, notes=notes)


def _profile(file: "PIL.Image.Image") -> bytes | None:
    return file.info.get("icc_profile") or None


def _to_srgb(file: "PIL.Image.Image", profile: bytes | None) -> "tuple[PIL.Image.Image, bytes | None, tuple[str, ...]]":
    """CMYK and Lab cannot stay: convert through the profile, and leave the picture untagged (sRGB)."""
    from PIL import ImageCms

    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    srgb = ImageCms.createProfile("sRGB")
    try:
        if file.mode == "LAB":
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        elif profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        else:
            return file.convert("RGB"), None, ("CMYK without a profile, converted to sRGB by formula",)
        converted = ImageCms.profileToProfile(file, source, srgb, renderingIntent=intent, outputMode="RGB", flags=flags)
        assert converted is not None  # it is where the conversion is done in place
        return converted, None, (f"{file.mode} converted to sRGB",)
    except ImageCms.PyCMSError:
        return file.convert("RGB"), None, (f"{file.mode} with an unusable profile, converted to sRGB by formula",)


def _with_profile(image: Image) -> Image:
    """Keep the profile only where it describes these channels; gray pixels with an RGB profile stay RGB for its sake."""
    if image.icc_profile is None:
        return image
    space = metadata.profile_space(image.icc_profile)
    if space == "RGB":
        return replace(image, gray=False)
    if space == "GRAY" and image.gray:
        return image
    return replace(
        image,
        icc_profile=None,
        notes=(*image.notes, f"colour profile left out, it is for {printable(space) if space else 'nothing known'}"),
    )
