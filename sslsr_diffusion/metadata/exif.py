"""TIFF directories: the form of EXIF blocks, and of TIFF files themselves. Entries move whole: type, count and bytes as they were."""

import re
import struct
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

Bytes = bytes | bytearray | memoryview
ORIENTATION, _EXIF, _GPS, _INTEROP, _LARGEST = 0x0112, 0x8769, 0x8825, 0xA005, 64 << 20
_SUBDIRECTORIES: tuple[tuple[int, ...], ...] = ((_EXIF, _GPS), (_INTEROP,), ())  # by depth
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # of one value, by type
_LETTERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_PIXELS = (*range(254, 260), *range(262, 267), 273, *range(277, 282), 284, *range(290, 294), 317, *range(320, 326), *range(330, 348))
PIXEL_TAGS = frozenset([*_PIXELS, *range(512, 522), *range(529, 533), *range(32995, 32999)])  # how a file holds its pixels
XMP, IPTC, PHOTOSHOP, PROFILE = 700, 33723, 34377, 34675
_OWN = {XMP: (1, 2, 7), IPTC: (1, 2, 4, 7), PHOTOSHOP: (1, 7), PROFILE: (1, 7)}  # blocks that TIFF holds outside of EXIF: their types
_MAP = frozenset([33550, 33922, 34264, 34735, 34736, 34737])  # GeoTIFF: where on the earth each pixel lies


class Entry(NamedTuple):
    tag: int
    kind: int
    length: int  # how many values
    at: int  # where the value stands
    size: int  # its bytes


class Directory(NamedTuple):
    """The entries whose values are there, the tags of the others, and where the pointer to the next directory stands."""

    entries: list[Entry]
    damaged: list[int]
    next: int


class Form(NamedTuple):
    """How the numbers of a TIFF file are written."""

    order: str  # "<" or ">"
    big: bool  # BigTIFF: offsets of 8 bytes
    first: int  # where the first directory stands

    @classmethod
    def of(cls, data: Bytes) -> "Form":
        """Raises struct.error: not a TIFF header."""
        order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
        version = struct.unpack_from(f"{order}H", data, 2)[0] if order else 0
        if order is None or version not in (42, 43):
            raise struct.error("not a TIFF header")
        return cls(order, version == 43, struct.unpack_from(order + "QI"[version == 42], data, 8 if version == 43 else 4)[0])

    def directory(self, data: Bytes, at: int) -> Directory:
        """Raises struct.error: it begins outside of the data."""
        counts, width, inline = ("Q", 20, 8) if self.big else ("H", 12, 4)
        (number,) = struct.unpack_from(self.order + counts, data, at)
        first = at + struct.calcsize("<" + counts)
        entries, damaged = [], []
        for place in range(first, min(first + width * number, len(data) - width + 1), width):
            tag, kind, count = struct.unpack_from(self.order + ("HHQ" if self.big else "HHI"), data, place)
            size = _BYTES.get(kind, 0) * count
            value = place + width - inline
            if size > inline:
                (value,) = struct.unpack_from(self.order + ("Q" if self.big else "I"), data, value)
            if size and value + size <= len(data):
                entries.append(Entry(tag, kind, count, value, size))
            else:
                damaged.append(tag)
        return Directory(entries, damaged, first + width * number)

    def number(self, data: Bytes, entry: Entry) -> int | None:
        """The value of an entry that is one whole number."""
        return self.first_number(data, entry) if entry.length == 1 and entry.kind in _LETTERS else None

    def first_number(self, data: Bytes, entry: Entry) -> int:
        """The first of an entry's whole numbers; 0 where it has none."""
        letter = _LETTERS.get(entry.kind)
        return struct.unpack_from(self.order + letter, data, entry.at)[0] if letter else 0

    def put(self, data: bytearray | memoryview, entry: Entry, value: int) -> None:
        """Change the first number in place, to the largest one where `value` does not fit."""
        letter = _LETTERS[entry.kind]
        struct.pack_into(self.order + letter, data, entry.at, min(value, 256 ** struct.calcsize("<" + letter) - 1))

    def relabel(self, data: memoryview, entry: Entry, tag: int, length: int) -> None:
        """Give an entry whose value stands in itself another tag and number of values."""
        head = entry.at - (12 if self.big else 8)
        struct.pack_into(self.order + ("HHQ" if self.big else "HHI"), data, head, tag, entry.kind, length)


def readable_exif(raw: Bytes) -> bytes | None:
    """A block without the prefix that some write twice; None where nothing of it can be read."""
    block = bytes(raw)
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    try:
        form = Form.of(block)
        return block if not form.big and form.directory(block, form.first).entries else None
    except struct.error:
        return None


def orientation(exif: bytes | None) -> int:
    """1 to 8; 1 where there is none."""
    if exif is None:
        return 1
    form = Form.of(exif)
    found = (form.number(exif, e) for e in form.directory(exif, form.first).entries if e.tag == ORIENTATION)
    value = next(found, None) or 1
    return value if value <= 8 else 1


def upright_exif(exif: bytes, size: tuple[int, int]) -> bytes:
    """The block with orientation 1, the (H, W) where it states one, and without its thumbnail, which shows the old picture.

    Changed in place: maker notes hold offsets into the block. Parts that cannot be read stay as they are.
    """
    block = bytearray(exif)
    form = Form.of(block)
    main = form.directory(block, form.first)
    if main.next + 4 <= len(block):
        struct.pack_into(form.order + "I", block, main.next, 0)
    wanted = {ORIENTATION: 1, 0x0100: size[1], 0x0101: size[0], 0xA002: size[1], 0xA003: size[0]}
    inner = []
    for entry in main.entries:
        if entry.tag == _EXIF and (at := form.number(block, entry)) and at + 2 <= len(block):
            inner = form.directory(block, at).entries
    for entry in (*main.entries, *inner):
        if entry.tag in wanted and form.number(block, entry) is not None:
            form.put(block, entry, wanted[entry.tag])
    return bytes(block)


def upright_xmp(xmp: bytes) -> bytes:
    """The packet with orientation 1 where it states one."""
    return re.sub(rb"(tiff:Orientation(?:=[\"']|>))[2-8]", rb"\g<1>1", xmp)


def density(exif: bytes) -> tuple[float, float] | None:
    """Pixels per inch, across and down, where a block's first directory states them."""
    form = Form.of(exif)
    found = {e.tag: e for e in form.directory(exif, form.first).entries}
    per_unit = {2: 1.0, 3: 2.54}.get((form.number(exif, found[296]) if 296 in found else 2) or 0)
    if per_unit is None or any(tag not in found or (found[tag].kind, found[tag].length) != (5, 1) for tag in (282, 283)):
        return None
    across, down = (struct.unpack_from(form.order + "II", exif, found[tag].at) for tag in (282, 283))
    return (per_unit * across[0] / across[1], per_unit * down[0] / down[1]) if all((*across, *down)) else None


def has(exif: bytes, tag: int) -> bool:
    """Whether a block's first directory has this tag."""
    form = Form.of(exif)
    return any(entry.tag == tag for entry in form.directory(exif, form.first).entries)


Tag = tuple[int, int, bytes]  # type, count, value


def numbers(order: str, kind: int, values: Sequence[int]) -> Tag:
    """SHORT (3), LONG (4), LONG8 (16) or RATIONAL (5, as pairs of numbers)."""
    letter = {3: "H", 16: "Q"}.get(kind, "I")
    return kind, len(values) // (2 if kind == 5 else 1), struct.pack(f"{order}{len(values)}{letter}", *values)


def write_directory(file: BinaryIO, exif: bytes | None, order: str, tags: dict[int, Tag], big: bool) -> None:
    """End a TIFF file that begins with `exif`, in whose byte order it is: the block's first directory but for the tags of its old pixels,
    `tags`, and the file's header, which takes the place of the block's.

    `big`: a BigTIFF. What the block points to stays where it is, maker notes too; its directories are written anew in the wider form.
    """
    rows = {}
    if exif:
        form = Form.of(exif)
        kept = [entry for entry in form.directory(exif, form.first).entries if entry.tag not in PIXEL_TAGS]
        rows = _wide_rows(file, exif, form, kept, 0) if big else {e.tag: _narrow_row(exif, form, e) for e in kept}
    for tag, (kind, count, body) in tags.items():
        rows[tag] = _row(file, order, tag, kind, count, body, big)
    start = _end(file, order, rows, big)
    file.seek(0)
    mark = {"<": b"II", ">": b"MM"}[order]
    file.write(mark + (struct.pack(order + "HHHQ", 43, 8, 0, start) if big else struct.pack(order + "HI", 42, start)))


def _row(file: BinaryIO, order: str, tag: int, kind: int, count: int, body: bytes, big: bool) -> bytes:
    """An entry; its value goes to the file where it does not fit into the entry."""
    inline, offset = (8, "Q") if big else (4, "I")
    if len(body) > inline:
        file.write(bytes(file.tell() % 2))
        place = file.tell()
        file.write(body)
        body = struct.pack(order + offset, place)
    return struct.pack(order + "HH" + offset, tag, kind, count) + body.ljust(inline, b"\0")


def _narrow_row(exif: bytes, form: Form, entry: Entry) -> bytes:
    """An entry as it stands."""
    value = exif[entry.at : entry.at + 4].ljust(4, b"\0") if entry.size <= 4 else struct.pack(form.order + "I", entry.at)
    return struct.pack(form.order + "HHI", entry.tag, entry.kind, entry.length) + value


def _wide_rows(file: BinaryIO, exif: bytes, form: Form, entries: Sequence[Entry], depth: int) -> dict[int, bytes]:
    """The entries of a BigTIFF that begins with the block; directories that they point to go to the file."""
    rows = {}
    for entry in entries:
        kind, count, value = entry.kind, entry.length, exif[entry.at : entry.at + entry.size]
        if entry.tag in _SUBDIRECTORIES[depth]:
            try:
                inner = form.directory(exif, form.number(exif, entry) or len(exif)).entries
            except struct.error:
                inner = []  # it leads outside
            at = _end(file, form.order, _wide_rows(file, exif, form, inner, depth + 1), True)
            kind, count, value = 16, 1, struct.pack(form.order + "Q", at)  # LONG8: more readers take it than IFD8
        if len(value) > 8 and entry.at >= 16:  # behind the header
            rows[entry.tag] = struct.pack(form.order + "HHQQ", entry.tag, kind, count, entry.at)
        else:
            rows[entry.tag] = _row(file, form.order, entry.tag, kind, count, value, True)
    return rows


def _end(file: BinaryIO, order: str, rows: dict[int, bytes], big: bool) -> int:
    """Write a directory that no other follows; where it stands."""
    file.write(bytes(-file.tell() % 8))
    start = file.tell()
    file.write(struct.pack(order + ("Q" if big else "H"), len(rows)) + b"".join(rows[tag] for tag in sorted(rows)) + bytes(8 if big else 4))
    return start


def split_tiff(data: memoryview) -> tuple[dict[int, bytes], bytes | None, list[str]]:
    """Take a TIFF file apart: its own blocks by tag, an EXIF block of its other tags, what was lost; what is left are the pixels' tags.

    Raises struct.error: no directory.
    """
    form = Form.of(data)
    main = form.directory(data, form.first)
    own = {e.tag: bytes(data[e.at : e.at + e.size]) for e in main.entries if e.kind in _OWN.get(e.tag, ())}
    rest = [e for e in main.entries if e.tag not in PIXEL_TAGS | _MAP | _OWN.keys() and (e.kind <= 13 or e.tag in _SUBDIRECTORIES[0])]
    damaged = [*main.damaged, *(e.tag for e in main.entries if e.kind not in _OWN.get(e.tag, (e.kind,)))]
    out = bytearray((b"II*\0" if form.order == "<" else b"MM\0*") + struct.pack(form.order + "I", 8))
    _place(out, data, form, rest, 0)
    notes = [f"TIFF tag {tag} left out, it is damaged" for tag in damaged if tag not in PIXEL_TAGS]
    if any(entry.tag in _MAP for entry in main.entries):
        notes.append("the map coordinates (GeoTIFF) left out, they count the old pixels")
    if any(data[main.next : main.next + (8 if form.big else 4)]):
        notes.append("the first of several pages")
    _mask(data, form, main)
    return own, bytes(out) if rest else None, notes


def _mask(data: memoryview, form: Form, main: Directory) -> None:
    """Leave the entries that pixels need: what a decoder does not see cannot disturb it, or turn the picture."""
    head, width = (8, 20) if form.big else (2, 12)
    first = form.first + head
    rows = [bytes(data[at : at + width]) for at in range(first, min(main.next, len(data)), width)]
    kept = [row for row in rows if struct.unpack_from(form.order + "H", row)[0] in PIXEL_TAGS and len(row) == width]
    body = b"".join(kept) + bytes(8 if form.big else 4)
    data[first : first + len(body)] = body
    struct.pack_into(form.order + ("Q" if form.big else "H"), data, form.first, len(kept))


def _place(out: bytearray, data: Bytes, form: Form, entries: list[Entry], depth: int) -> None:
    """Append a directory with everything that it points to."""
    at = len(out)
    out += struct.pack(form.order + "H", len(entries)) + bytes(12 * len(entries) + 4)
    for number, entry in enumerate(entries):
        kind, count, value = entry.kind, entry.length, bytes(data[entry.at : entry.at + entry.size])
        if entry.tag in _SUBDIRECTORIES[depth]:
            try:
                inner = form.directory(data, form.number(data, entry) or len(data)).entries
            except struct.error:
                inner = []  # it leads outside
            kind, count, value = 4, 1, struct.pack(form.order + "I", len(out))
            _place(out, data, form, inner, depth + 1)
        elif len(out) + len(value) > _LARGEST:  # many entries may claim the same bytes
            kind, count, value = 7, 1, b"\0"
        if len(value) > 4:
            place, padded = len(out), value + bytes(len(value) % 2)
            out += padded
            value = struct.pack(form.order + "I", place)
        struct.pack_into(form.order + "HHI4s", out, at + 2 + 12 * number, entry.tag, kind, count, value.ljust(4, b"\0"))
