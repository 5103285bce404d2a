"""The few bytes of EXIF, ICC and PNG that have to be read or changed by hand, so that the rest stays as it was."""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

PREFIX = b"Exif\x00\x00"
ORIENTATION, EXIF_IFD, WIDTH, HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003
_LENGTH = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # TIFF type -> bytes of one value


class _Entry(NamedTuple):
    tag: int
    kind: int
    number: int
    at: int  # where the 4 bytes of value or offset stand


def _ifd(block: bytes | bytearray, order: str, at: int) -> tuple[list[_Entry], int]:
    """Entries of one directory, and where its pointer to the next one stands; struct.error outside the block."""
    (number,) = struct.unpack_from(order + "H", block, at)
    entries = []
    for entry in range(at + 2, at + 2 + 12 * number, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", block, entry)
        entries.append(_Entry(tag, kind, count, entry + 8))
    return entries, at + 2 + 12 * number


def _order(block: bytes | bytearray) -> str:
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(bytes(block[:4]))
    if order is None:
        raise struct.error("not a TIFF header")
    return order


def _numbers(block: bytes | bytearray, order: str, entries: list[_Entry]) -> dict[int, tuple[int, _Entry]]:
    found = {}
    for entry in entries:
        if entry.kind in (3, 4) and entry.number == 1:
            found[entry.tag] = (struct.unpack_from(order + ("H" if entry.kind == 3 else "I"), block, entry.at)[0], entry)
    return found


def orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the block is broken."""
    try:
        order = _order(exif)
        entries, _ = _ifd(exif, order, struct.unpack_from(order + "I", exif, 4)[0])
        value = _numbers(exif, order, entries).get(ORIENTATION, (1, None))[0]
    except struct.error:
        return 1
    return value if 1 <= value <= 8 else 1


def updated_exif(exif: bytes, size: tuple[int, int]) -> bytes | None:
    """The block with orientation 1, the new (H, W) where it states one, and without its thumbnail; None if it is broken.

    Changed in place: maker notes hold offsets into the block, and writing it anew would break them.
    """
    block = bytearray(exif)
    try:
        order = _order(block)
        entries, next_ifd = _ifd(block, order, struct.unpack_from(order + "I", block, 4)[0])
        numbers = _numbers(block, order, entries)
        struct.pack_into(order + "I", block, next_ifd, 0)
        if ORIENTATION in numbers:
            _set(block, order, numbers[ORIENTATION][1], 1)
        if EXIF_IFD in numbers:
            inner = _numbers(block, order, _ifd(block, order, numbers[EXIF_IFD][0])[0])
            for tag, value in ((HEIGHT, size[0]), (WIDTH, size[1])):
                if tag in inner:
                    _set(block, order, inner[tag][1], value)
    except struct.error:
        return None
    return bytes(block)


def _set(block: bytearray, order: str, entry: _Entry, value: int) -> None:
    fits = entry.kind == 4 or value <= 0xFFFF
    struct.pack_into(order + ("I" if entry.kind == 4 else "H"), block, entry.at, value if fits else 0xFFFF)


def profile_space(profile: bytes) -> str | None:
    """The colour space that an ICC profile describes ("RGB", "GRAY", "CMYK", ...); None if it is not a profile."""
    if len(profile) < 128 or profile[36:40] != b"acsp":
        return None
    return profile[16:20].decode("latin-1").strip()


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, body) of every chunk up to IEND.

    Raises:
        ValueError: a chunk is cut off, or the checksum of a critical one is wrong.
    """
    view, at, kind = memoryview(data), len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise ValueError("the file is cut off")
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = bytes(view[at + 4 : at + 8]), at + 8 + length
        if end + 4 > len(data):
            raise ValueError("the file is cut off")
        if kind[:1].isupper() and zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError("a checksum is wrong: the file is damaged")
        yield kind, view[at + 8 : end]
        at = end + 4
