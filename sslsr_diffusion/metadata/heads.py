"""What stands around the pixels in the formats that are written: headers, and the blocks of a picture; `blocks.py` has where they lie."""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

from sslsr_diffusion.metadata import exif as tiff
from sslsr_diffusion.metadata.blocks import COLOUR, EXIF, ICC, PHOTOSHOP, PNG_SIGNATURE, PNG_XMP, XMP, png_chunk, profile_space
from sslsr_diffusion.metadata.colours import profile_of

if TYPE_CHECKING:
    from sslsr_diffusion.images.picture import Image

LARGEST_TIFF = 0xFFFFFFFF  # bytes of a file whose offsets have 4 of them; a larger one is a BigTIFF
_SEGMENT = 65533
_DIRECTORIES = 1 << 16  # bytes that are kept free for what stands behind the pixels of a TIFF, beside its values


def _channels(blocks: "Image") -> int:
    return (1 if blocks.gray else 3) + (blocks.alpha is not None)


def fitted(head: "Image", wanted: str) -> tuple["Image", list[str]]:
    """A picture's head with the blocks that a format has place for, and notes of the others; colours by code become a profile."""
    notes = ["8 of 16 bits"] if head.bits == 16 and wanted in ("JPEG", "WEBP") else []
    notes += ["alpha flattened on white"] if head.alpha is not None and wanted == "JPEG" else []
    same = head.format == wanted or (head.format, wanted) == ("AVIF", "PNG")  # AVIF's own are the colours of PNG
    profile, own = head.icc_profile, {} if same else dict(head.own)
    codes = [kind for kind in (b"cICP", b"sRGB", b"gAMA", b"cHRM") if kind in own and not (profile and kind == b"cICP")]
    if codes and not profile:  # a profile stands above all of them but cICP
        told = b", ".join(codes).decode()
        try:
            profile = profile_of(own, head.gray and wanted != "WEBP")
            notes += [f"{told} written as a colour profile"] if profile else []
        except ValueError as error:
            notes.append(f"{told} left out, {error}")
    kinds = [kind for kind in own if kind not in codes and not (kind == b"pHYs" and head.density)]
    names = [kind.decode("latin-1") if len(kind) == 4 else "comments" if kind == b"\xfe" else f"APP{kind[0] - 0xE0}" for kind in kinds]
    if wanted == "WEBP":
        names += ["IPTC"] * bool(head.iptc) + ["resolution"] * bool(head.density and not head.exif)
        if profile_space(profile) == "GRAY":
            names, profile = [*names, "the gray profile"], None
    notes += [f"{', '.join(names)} left out, {wanted} has no place for it"] if names else []
    return replace(head, icc_profile=profile, own=head.own if same else ()), notes


def png_head(blocks: "Image", size: tuple[int, int]) -> bytes:
    """What stands before the pixels of a PNG of `size` (H, W)."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[_channels(blocks)]
    own = [(kind, body) for kind, body in blocks.own if not (kind == b"sRGB" and blocks.icc_profile)]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], blocks.bits, kind, 0, 0, 0))]
    parts += [(b"iCCP", b"ICC Profile\0\0" + zlib.compress(blocks.icc_profile))] if blocks.icc_profile else []
    parts += sorted(own, key=lambda chunk: chunk[0] not in COLOUR)
    if blocks.density and not any(kind == b"pHYs" for kind, _ in own):
        parts.append((b"pHYs", struct.pack(">IIB", *(round(each / 0.0254) for each in blocks.density), 1)))
    if blocks.exif:
        parts.append((b"eXIf", blocks.exif))
    if blocks.xmp:
        parts.append((b"iTXt", PNG_XMP + b"\0\0\0\0\0" + blocks.xmp))
    if blocks.iptc:
        text = b"\niptc\n%8d\n" % len(blocks.iptc) + blocks.iptc.hex().encode() + b"\n"
        parts.append((b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(text)))
    return PNG_SIGNATURE + b"".join(png_chunk(name, body) for name, body in parts)


def jpeg_head(blocks: "Image") -> tuple[bytes, list[str]]:
    """Segments for behind the start of a JPEG, and what is too large for them."""
    notes, density = [], [min(65535, round(each)) for each in blocks.density or (1, 1)]
    segments = [(0xE0, b"JFIF\0\1\1" + struct.pack(">BHH", blocks.density is not None, *density) + b"\0\0")]
    for name, prefix, block in (("EXIF", EXIF, blocks.exif), ("XMP", XMP, blocks.xmp)):
        if block and len(prefix + block) <= _SEGMENT:
            segments.append((0xE1, prefix + block))
        elif block:
            notes.append(f"{name} left out, too large for JPEG")
    for marker, prefix, block in ((0xE2, ICC, blocks.icc_profile or b""), (0xED, PHOTOSHOP, blocks.iptc or b"")):
        room = _SEGMENT - len(prefix) - 2
        pieces = [block[at : at + room] for at in range(0, len(block), room)]
        if len(pieces) > 255:
            notes.append("the colour profile left out, too large for JPEG")
            continue
        segments += [(marker, prefix + (bytes([number, len(pieces)]) if marker == 0xE2 else b"") + p) for number, p in enumerate(pieces, 1)]
    segments += [(marker[0], body) for marker, body in blocks.own]
    return b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments), notes


def end_tiff(file: BinaryIO, blocks: "Image", order: str, size: tuple[int, int], rows: int, places: Mapping[int, int]) -> None:
    """The directory of a TIFF of `size` (H, W) behind its deflated strips of `rows` each: where they stand, and how long they are.

    Where 4 GB are not enough it is a BigTIFF, which is known when the pixels are written: what they compress to counts.
    """
    channels = _channels(blocks)
    longs = {256: [size[1]], 257: [size[0]], 278: [rows], 279: [*places.values()]}
    shorts = {258: [blocks.bits] * channels, 259: [8], 262: [1 if blocks.gray else 2], 277: [channels], 284: [1], 317: [2]}
    shorts[339] = [1] * channels
    shorts |= {338: [2]} if blocks.alpha is not None else {}  # not premultiplied
    tags = {tag: tiff.numbers(order, kind, values) for kind, some in ((3, shorts), (4, longs)) for tag, values in some.items()}
    tags |= _tiff_tags(blocks, order)
    behind = sum(len(body) for _, _, body in tags.values()) + 2 * len(blocks.exif or b"") + 8 * len(places)
    big = file.tell() + behind + _DIRECTORIES > LARGEST_TIFF
    tags[273] = tiff.numbers(order, 16 if big else 4, [*places])
    tiff.write_directory(file, blocks.exif, order, tags, big)


def _tiff_tags(blocks: "Image", order: str) -> dict[int, tiff.Tag]:
    """Tags for a TIFF file's directory beside those of its pixels and its EXIF."""
    bodies = {tiff.XMP: (1, blocks.xmp), tiff.PHOTOSHOP: (1, blocks.iptc), tiff.PROFILE: (7, blocks.icc_profile)}
    tags = {tag: (kind, len(body), body) for tag, (kind, body) in bodies.items() if body}
    if blocks.density and not (blocks.exif and tiff.has(blocks.exif, 282)):
        tags |= {tag: tiff.numbers(order, 5, (round(each * 10000), 10000)) for tag, each in zip((282, 283), blocks.density)}
        tags[296] = tiff.numbers(order, 3, [2])
    return tags
