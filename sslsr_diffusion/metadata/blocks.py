"""What lies in a file beside its pixels: taken out whole on reading (here), put in whole on writing (`heads.py`); codecs see none of it.

| block | JPEG | PNG | TIFF | WebP |
|---|---|---|---|---|
| EXIF | APP1 | eXIf, text of ImageMagick | its tags | EXIF |
| XMP | APP1 | iTXt | tag 700 | XMP |
| IPTC, as Photoshop's resources | APP13 | text of ImageMagick | tags 34377, 33723 | - |
| profile | APP2 | iCCP | tag 34675 | ICCP |
| resolution | APP0 | pHYs | tags 282, 283, 296 | - |
| `own`, for the same format alone | comments, further APPs | colour, text, unknown chunks that are safe to copy | - | - |
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from sslsr_diffusion.listing import printable
from sslsr_diffusion.metadata import exif as tiff

LARGEST = 64 << 20  # of a block, unpacked
EXIF, XMP, ICC, PHOTOSHOP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0"
PNG_SIGNATURE, PNG_XMP = b"\x89PNG\r\n\x1a\n", b"XML:com.adobe.xmp"
COLOUR = (b"cICP", b"gAMA", b"cHRM", b"sRGB", b"mDCV", b"cLLI")
_LENGTHS = {b"cICP": 4, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"mDCV": 24, b"cLLI": 8, b"pHYs": 9}
_STALE = (b"tIME", b"bKGD", b"hIST", b"sBIT", b"acTL", b"fcTL", b"fdAT", b"tRNS")  # of the old pixels; a frame's chunks have their note


@dataclass
class Blocks:
    """One file's blocks, and what of them was lost."""

    exif: bytes | None = None  # a TIFF block without prefix
    xmp: bytes | None = None
    iptc: bytes | None = None  # Photoshop's image resources
    icc_profile: bytes | None = None
    density: tuple[float, float] | None = None  # pixels per inch, across and down
    own: list[tuple[bytes, bytes]] = field(default_factory=list)  # (kind, body)
    notes: list[str] = field(default_factory=list)

    def lose(self, what: str, why: str = "it is damaged") -> None:
        self.notes.append(f"{printable(what)} left out, {why}")

    def take_exif(self, raw: bytes) -> None:
        found = tiff.readable_exif(raw)
        if self.exif is None and found is None:
            self.lose("EXIF")
        self.exif = self.exif or found

    def take_iptc(self, raw: bytes) -> None:
        """Bare records become the resource that holds them."""
        body = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(raw)) + raw + bytes(len(raw) % 2) if raw[:1] == b"\x1c" else raw
        self.iptc = self.iptc or body.removeprefix(PHOTOSHOP)

    def profile_for(self, channels: int) -> tuple[bytes | None, bool, list[str]]:
        """The profile if it is for pixels of so many channels, whether these count as gray, and the notes, that on the profile included."""
        space = profile_space(self.icc_profile)
        gray = channels < 3 and space != "RGB"  # gray pixels with an RGB profile become colour for its sake
        if not self.icc_profile or space == ("GRAY" if gray else "RGB"):
            return self.icc_profile, gray, self.notes
        return None, gray, [*self.notes, f"colour profile left out, {f'it is for {printable(space)}' if space else 'it is damaged'}"]


def profile_space(profile: bytes | None) -> str | None:
    """The colour space that an ICC profile describes ("RGB", "GRAY", "CMYK", ...); None if it is no whole profile."""
    if profile is None or len(profile) < 132 or profile[36:40] != b"acsp":
        return None
    last = 132 + 12 * struct.unpack_from(">I", profile, 128)[0]
    whole = last <= len(profile) and all(at + size <= len(profile) for at, size in struct.iter_unpack(">4x2I", profile[132:last]))
    return profile[16:20].decode("latin-1").strip() if whole else None


def unpacked(data: bytes | memoryview) -> bytes:
    """Raises zlib.error: damaged, or a bomb."""
    stream = zlib.decompressobj()
    body = stream.decompress(data, LARGEST)
    if not stream.eof:
        raise zlib.error("too large, or cut off")
    return body


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def png_chunks(data: memoryview) -> Iterator[tuple[bytes, int, memoryview, bool]]:
    """(kind, where it begins, body, whether its checksum is right) of every chunk up to IEND. Raises ValueError: one is cut off."""
    at, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        end = at + 12 + (struct.unpack_from(">I", data, at)[0] if at + 12 <= len(data) else len(data))
        if end > len(data):
            raise ValueError("the file is cut off")
        kind, body = bytes(data[at + 4 : at + 8]), data[at + 8 : end - 4]
        yield kind, at, body, zlib.crc32(data[at + 4 : end - 4]) == struct.unpack_from(">I", data, end - 4)[0]
        at = end


def _split_png(data: memoryview) -> Blocks:
    found = Blocks()
    for kind, at, body, sound in png_chunks(data):
        if kind[:1].isupper():
            if not sound:
                raise ValueError("a checksum is wrong: the file is damaged")
            continue
        if kind == b"acTL":
            found.notes.append("the first frame of an animation")
        if not sound or len(body) != _LENGTHS.get(kind, len(body)):
            found.lose(kind.decode("latin-1"))
        else:
            try:
                _png_block(found, kind, bytes(body))
            except (zlib.error, ValueError, IndexError):
                found.lose(kind.decode("latin-1"))
        if kind != b"tRNS":  # a name that decoders pass over
            data[at + 4 : at + 8] = b"skIp"
            struct.pack_into(">I", data, at + 8 + len(body), zlib.crc32(body, zlib.crc32(b"skIp")))
    return found


def _png_block(found: Blocks, kind: bytes, body: bytes) -> None:
    if kind == b"eXIf":
        found.take_exif(body)
    elif kind == b"iCCP":
        found.icc_profile = unpacked(body[body.index(b"\0") + 2 :])
    elif kind in (b"tEXt", b"zTXt", b"iTXt"):
        word, _, rest = body.partition(b"\0")
        packed = rest[:1] == b"\1" if kind == b"iTXt" else kind == b"zTXt"
        if kind != b"tEXt" and rest[packed and kind == b"iTXt" :][:1] != b"\0" and packed:
            raise ValueError("unknown compression")
        if word == PNG_XMP and kind == b"iTXt":
            text = rest[2:].split(b"\0", 2)[2]
            found.xmp = unpacked(text) if packed else text
        elif word.startswith(b"Raw profile type "):
            text = rest if kind == b"tEXt" else rest[2:].split(b"\0", 2)[2] if kind == b"iTXt" else rest[1:]
            _raw_profile(found, word[17:].lower(), unpacked(text) if packed else text)
        else:
            found.own.append((kind, body))
    elif kind == b"pHYs":
        across, down, unit = struct.unpack(">IIB", body)
        found.density = (across * 0.0254, down * 0.0254) if unit == 1 else None
        found.own.append((kind, body))
    elif kind in COLOUR or (kind.isalpha() and kind[3:].islower()):
        found.own.append((kind, body))
    elif kind not in _STALE:
        found.lose(kind.decode("latin-1"), "it may belong to the old pixels")


def _raw_profile(found: Blocks, name: bytes, text: bytes) -> None:
    """ImageMagick's way: a name, a length and hexadecimal numbers."""
    _, _, length, numbers = text.split(b"\n", 3)
    body = bytes.fromhex(re.sub(rb"[^0-9a-fA-F]", b"", numbers)[: 2 * int(length)].decode())
    if body.startswith(XMP) or name == b"xmp":
        found.xmp = body.removeprefix(XMP)
    elif name in (b"exif", b"app1"):
        found.take_exif(body)
    elif name in (b"iptc", b"8bim"):
        found.take_iptc(body)
    elif name in (b"icc", b"icm"):
        found.icc_profile = found.icc_profile or body


def _split_jpeg(data: memoryview) -> Blocks:
    """Segments up to the first scan; those that hold no pixels get a number that decoders pass over (APP15)."""
    found, at, parts, resources = Blocks(), 2, dict[int, bytes](), b""
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        if marker == 0xFF:  # a filler
            at += 1
            continue
        if marker in (0xD9, 0xDA) or length < 2:
            break
        body, first = bytes(data[at + 4 : at + 2 + length]), at
        at += 2 + length
        if marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 12:
            unit, across, down = struct.unpack_from(">BHH", body, 7)
            if unit in (1, 2) and across and down:
                found.density = (across * (1, 2.54)[unit - 1], down * (1, 2.54)[unit - 1])
        elif marker == 0xE1 and body.startswith(EXIF):
            found.take_exif(body)
        elif marker == 0xE1 and body.startswith(XMP):
            found.xmp = found.xmp or body.removeprefix(XMP)
        elif marker == 0xE2 and body.startswith(ICC) and len(body) > 14:
            parts[body[12]] = body[14:]
        elif marker == 0xE2 and body.startswith(b"MPF\0"):
            found.lose("the second picture of the file", "its gain map or stereo partner belongs to the old pixels")
        elif marker == 0xED and body.startswith(PHOTOSHOP):
            resources += body.removeprefix(PHOTOSHOP)
        elif marker == 0xFE or (0xE1 <= marker <= 0xEF and marker not in (0xE2, 0xEB, 0xEE)):
            found.own.append((bytes([marker]), body))
        elif marker in (0xE2, 0xEB):
            found.lose(f"segment APP{marker - 0xE0}", "it may belong to the old pixels")
        if 0xE1 <= marker <= 0xED:
            data[first + 1] = 0xEF
    found.icc_profile = b"".join(parts[number] for number in sorted(parts)) or None
    if resources:
        found.take_iptc(resources)
    return found


def _split_tiff(data: memoryview) -> Blocks:
    own, exif, notes = tiff.split_tiff(data)
    found = Blocks(exif, own.get(tiff.XMP), icc_profile=own.get(tiff.PROFILE), notes=notes)
    for tag in (tiff.PHOTOSHOP, tiff.IPTC):
        if tag in own:
            found.take_iptc(own[tag])
    found.density = tiff.density(exif) if exif else None
    return found


def _split_webp(data: memoryview) -> Blocks:
    found, at = Blocks(), 12
    while at + 8 <= len(data):
        kind, (length,) = bytes(data[at : at + 4]), struct.unpack_from("<I", data, at + 4)
        body = data[at + 8 : at + 8 + length]
        if kind == b"EXIF":
            found.take_exif(bytes(body))
        elif kind == b"XMP ":
            found.xmp = bytes(body)
        elif kind == b"ICCP":
            found.icc_profile = bytes(body)
        elif kind == b"ANIM":
            found.notes.append("the first frame of an animation")
        at += 8 + length + length % 2
    return found


def _split_avif(data: memoryview) -> Blocks:
    """Its EXIF, XMP and profile come from the decoder; here is the colour that it is said to have without a profile (nclx)."""
    head = bytes(data[: 1 << 16])
    at = head.find(b"colrnclx") + 8
    if at < 8 or at + 6 > len(head) or b"colrprof" in head:  # which stands above it
        return Blocks()
    primaries, transfer = struct.unpack_from(">HH", head, at)
    if (primaries in (1, 2) and transfer in (2, 13)) or max(primaries, transfer) > 255:  # sRGB, or not said
        return Blocks()
    notes = [f"colours by code (primaries {primaries}, transfer {transfer}), which PNG alone keeps as they are"]
    return Blocks(own=[(b"cICP", bytes([primaries, transfer, 0, 1]))], notes=notes)


def _split_jp2(data: memoryview) -> Blocks:
    """The boxes at the top of a JPEG 2000 file, and the profile in its header."""
    found, at = Blocks(), 0
    while at + 24 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if length < 8 and length != 1:  # up to the end of the file, or no length, which decoders would stumble over
            length = len(data) - at
            struct.pack_into(">I", data, at, 0)
        body = bytes(data[at + 24 : at + length])
        if kind == b"uuid" and bytes(data[at + 8 : at + 24]) == b"JpgTiffExif->JP2":
            found.take_exif(body)
        elif kind == b"uuid" and bytes(data[at + 8 : at + 24]) == bytes.fromhex("be7acfcb97a942e89c71999491e3afac"):
            found.xmp = body
        elif kind == b"jp2h" and (mark := bytes(data[at : at + length]).find(b"colr\2") + at) > at:
            found.icc_profile = bytes(data[mark + 7 : mark - 4 + struct.unpack_from(">I", data, mark - 4)[0]])
        at += length if length >= 8 else len(data)
    return found


def _split_bmp(data: memoryview) -> Blocks:
    kind = bytes(data[70:74]) if len(data) >= 138 and struct.unpack_from("<I", data, 14)[0] >= 124 else b""
    if kind == b"KNIL":
        return Blocks(notes=["the colour profile left out, it lies in a file of its own"])
    at, length = struct.unpack_from("<II", data, 126) if kind == b"DEBM" else (0, 0)
    return Blocks(icc_profile=bytes(data[14 + at : 14 + at + length]) or None)


def _split_gif(data: memoryview) -> Blocks:
    found, start = Blocks(), bytes(data[: 1 << 20])
    for mark, name in ((b"ICCRGBG1012", "the colour profile"), (b"XMP DataXMP", "XMP")):
        if mark in start:
            found.lose(name, "it is not read from GIF")
    return found


SPLIT: Mapping[str, Callable[[memoryview], Blocks]] = {
    "PNG": _split_png,
    "JPEG": _split_jpeg,
    "TIFF": _split_tiff,
    "WEBP": _split_webp,
    "AVIF": _split_avif,
    "JPEG2000": _split_jp2,
    "BMP": _split_bmp,
    "GIF": _split_gif,
}
