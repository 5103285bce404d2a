"""What decoders do not say, or misread, of how a file holds its pixels."""

import re
import struct
from collections.abc import Iterator

from sslsr_diffusion.metadata.exif import Form


class Refused(Exception):
    """The message is the reason why a file is not read, as the user reads it."""


def ppm(data: memoryview) -> tuple[int, int, int]:
    """Height, width and the value of white."""
    words = re.sub(rb"#[^\r\n]*", b" ", bytes(data[: 1 << 16])).split(maxsplit=4)[:4]
    white = 255 if words[0] in (b"P1", b"P4") else int(words[3])
    if not 0 < white < 1 << 16:
        raise Refused(f"white is {white}; expected 1 to 65535")
    return int(words[2]), int(words[1]), white


def jp2(data: memoryview) -> tuple[int, int, int]:
    """The same of a JPEG 2000 file, out of its codestream (ISO 15444-1, A.5.1)."""
    at = bytes(data[: 1 << 20]).find(b"\xff\x4f\xff\x51") + 8
    if at < 8 or at + 40 > len(data):
        raise Refused("the file is cut off")
    right, bottom, left, top = struct.unpack_from(">4I", data, at)
    (channels,) = struct.unpack_from(">H", data, at + 32)
    white = max((2 << (each & 0x7F)) - 1 for each in data[at + 34 : at + 34 + 3 * channels : 3])
    if white >= 1 << 16:
        raise Refused(f"{white.bit_length()}-bit values; expected up to 16 bits")
    return bottom - top, right - left, white


def jp2_space(data: memoryview) -> str:
    """The colour space of the values that decoders give of a JPEG 2000 file; sRGB where its header names none, or has a profile.

    In place, the header names sRGB or gray for what decoders would not know, or compute wrongly. sYCC of 8 bits stays: Pillow knows it.

    Raises Refused: a space that is not read (ISO 15444-1, table I.10, and ISO 15444-2, table M.25).
    """

    def boxes(at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        while at + 8 <= end:
            length, kind = struct.unpack_from(">I4s", data, at)
            yield kind, at + 8, min(end, at + length if length >= 8 else end)
            at += length if length >= 8 else end

    inside = [inner for kind, start, end in boxes(0, len(data)) if kind == b"jp2h" for inner in boxes(start, end)]
    at, last = next(((start, end) for kind, start, end in inside if kind == b"colr"), (0, 0))
    if at + 7 > last or data[at] != 1:
        return "sRGB"
    (number,) = struct.unpack_from(">I", data, at + 3)
    if number not in _READ:
        raise Refused(f"its colours are {_UNREAD.get(number, 'of a kind that we do not know')} (number {number}); save it as sRGB or gray")
    space = _READ[number]
    if space == "sYCC" and jp2(data)[2] <= 255:
        return "sRGB"
    if space in ("bi-level", "sYCC", "ROMM RGB"):
        struct.pack_into(">I", data, at + 3, 17 if space == "bi-level" else 16)
    return space


_READ = {15: "bi-level", 16: "sRGB", 17: "gray", 18: "sYCC", 21: "ROMM RGB"}
_UNREAD = {0: "bi-level with 0 as white", **dict.fromkeys((1, 3, 4), "YCbCr"), 9: "PhotoYCC", 11: "CMY", 12: "CMYK", 13: "YCCK"}
_UNREAD |= {14: "CIELab", 19: "CIEJab", 20: "e-sRGB", 22: "YPbPr", 23: "YPbPr", 24: "e-sYCC"}


def tiff(data: memoryview) -> dict[int, int]:
    """The first number of every tag of a TIFF file's first directory. Raises struct.error: there is none."""
    form = Form.of(data)
    entries = form.directory(data, form.first).entries
    tags = {entry.tag: form.first_number(data, entry) for entry in entries}
    down, across = tags.get(323, tags.get(278, 1 << 32)), tags.get(322, 1 << 32)
    pieces = max(1, -(-tags[257] // max(1, down))) * max(1, -(-tags[256] // max(1, across)))
    there = max((entry.length for entry in entries if entry.tag in (273, 324)), default=0)
    if there < pieces * (tags.get(277, 1) if tags.get(284) == 2 else 1):
        raise Refused("the file is cut off")  # libvips would look for each of a million pieces that are not there
    return tags


def stack_planes(data: memoryview, tags: dict[int, int]) -> int:
    """Make one gray picture of twice the height of gray and alpha in separate planes, in place; the height that it had."""
    form = Form.of(data)
    entries = {entry.tag: entry for entry in form.directory(data, form.first).entries}
    height, step = tags[257], min(tags.get(323, tags.get(278, 1 << 32)), tags[257])
    if tags[277] > 2 or height % step:
        raise Refused("gray in separate planes with further channels, or with strips of an odd height; save it interleaved")
    for tag, value in ((257, 2 * height), (277, 1), (278, step), (284, 1)):
        if tag in entries:
            form.put(data, entries[tag], value)
    form.relabel(data, entries[258], 258, 1)  # one value
    if 338 in entries:
        form.relabel(data, entries[338], 65000, 1)  # a tag that nobody knows
    return height
