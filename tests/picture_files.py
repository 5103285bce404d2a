"""Picture files made by hand, with the layouts and the metadata that no library of ours writes."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from sslsr_diffusion.metadata.blocks import PNG_SIGNATURE, png_chunk


def tiff(samples, *, order="<", big=False, planar=False, turn=None, extra=(), **tags):
    """[H, W, C] as an uncompressed TIFF; `tags`: t258=(kind, values) replaces or adds a tag; `extra`: raw (tag, kind, count, bytes)."""
    height, width, channels = samples.shape
    bits = samples.dtype.itemsize * 8
    planes = samples.transpose(2, 0, 1) if planar else samples[None]
    bodies = [plane.astype(plane.dtype.newbyteorder(order)).tobytes() for plane in planes]
    numbers = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * channels), 259: (3, [1]), 262: (3, [1 if channels < 3 else 2])}
    numbers |= {273: (4, [0] * len(bodies)), 277: (3, [channels]), 278: (4, [height]), 279: (4, [len(body) for body in bodies])}
    numbers |= {284: (3, [2])} if planar else {}
    numbers |= {338: (3, [2])} if channels in (2, 4) else {}
    numbers |= {274: (3, [turn])} if turn else {}
    numbers |= {int(name[1:]): value for name, value in tags.items()}
    if numbers[262] == (3, [5]):
        numbers.pop(338)  # CMYK: the fourth is no alpha
    head, width_of = (16, 20) if big else (8, 12)
    count, offset, inline = ("Q", "Q", 8) if big else ("H", "I", 4)

    def laid_out(at):
        numbers[273] = (4, [at + sum(map(len, bodies[:k])) for k in range(len(bodies))])
        entries = {t: (k, len(v), struct.pack(f"{order}{len(v)}{'H' if k == 3 else 'I'}", *v)) for t, (k, v) in numbers.items()}
        entries |= {tag: (kind, length, body) for tag, kind, length, body in extra}
        directory, values = struct.pack(order + count, len(entries)), b""
        start = head + len(directory) + width_of * len(entries) + inline
        for tag in sorted(entries):
            kind, length, body = entries[tag]
            directory += struct.pack(order + "HH" + offset, tag, kind, length)
            directory += body.ljust(inline, b"\0") if len(body) <= inline else struct.pack(order + offset, start + len(values))
            values += body if len(body) > inline else b""
        return directory + bytes(inline) + values

    first = b"II" if order == "<" else b"MM"
    first += struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8)
    return first + laid_out(len(first + laid_out(0))) + b"".join(bodies)


def png(rows, bits, kind, *chunks, width=None):
    """Packed rows [H, bytes] of a PNG of this depth and colour type; chunks lie before the pixels."""
    header = struct.pack(">IIBBBBB", width or rows.shape[1], len(rows), bits, kind, 0, 0, 0)
    body = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(name, data) for name, data in parts)


def box(kind, body, *, length=None):
    """A box of JPEG 2000 or AVIF."""
    return struct.pack(">I", 8 + len(body) if length is None else length) + kind + body


def bmp(pixels, profile=b"", kind=b"DEBM"):
    """[H, W, 3] as a BMP of version 5, the profile behind the pixels."""
    rows = np.pad(pixels[::-1, :, ::-1].reshape(len(pixels), -1), ((0, 0), (0, -3 * pixels.shape[1] % 4))).tobytes()
    header = struct.pack("<IiiHHIIiiII", 124, pixels.shape[1], len(pixels), 1, 24, 0, len(rows), 0, 0, 0, 0) + bytes(16) + kind + bytes(48)
    header += struct.pack("<IIII", 0, 124 + len(rows), len(profile), 0)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(rows) + len(profile), 0, 0, 138) + header + rows + profile


def segments(jpeg, *added):
    """A JPEG with further segments (marker, body) at its start."""
    return jpeg[:2] + b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in added) + jpeg[2:]


def exif_entries(block):
    """(directory, tag) -> (type, count, value) of all entries of an EXIF block, or of a TIFF file."""
    order = {b"II": "<", b"MM": ">"}[block[:2]]
    sizes, found = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}, {}

    def walk(name, at):
        for place in range(at + 2, at + 2 + 12 * struct.unpack_from(order + "H", block, at)[0], 12):
            tag, kind, count, value = struct.unpack_from(order + "HHII", block, place)
            size = sizes[kind] * count
            inner = {0x8769: "exif", 0x8825: "gps", 0xA005: "interop"}.get(tag)
            if inner:
                walk(inner, value)
            else:
                found[name, tag] = kind, count, block[place + 8 : place + 8 + size] if size <= 4 else block[value : value + size]

    walk("main", struct.unpack_from(order + "I", block, 4)[0])
    return found


def camera_exif(turn=1, order=">"):
    """An EXIF block with every kind of entry, a maker note that holds an offset into the block, and text that is not ASCII."""
    name, note, copyright = b"Camera\0\0", b"maker\0note\1\2", b"\xc2\xa9 2018 M\xc3\xbcller\0\0\0"
    main, inner, interop, gps = 8, 8 + 2 + 12 * 5 + 4, 8 + 66 + 2 + 12 * 6 + 4, 8 + 66 + 78 + 2 + 24 + 4
    values = gps + 2 + 12 * 2 + 4
    at = {"name": values, "copy": values + 8, "note": values + 26, "bias": values + 38, "lat": values + 46}

    def entry(tag, kind, count, value):
        return struct.pack(order + "HHI", tag, kind, count) + (
            value if isinstance(value, bytes) else struct.pack(order + "I", value)
        ).ljust(4, b"\0")

    half = lambda number: struct.pack(order + "H", number)  # noqa: E731
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", main)
    block += half(5) + entry(0x10F, 2, 8, at["name"]) + entry(0x112, 3, 1, half(turn)) + entry(0x8298, 2, 18, at["copy"])
    block += entry(0x8769, 4, 1, inner) + entry(0x8825, 4, 1, gps) + bytes(4)
    block += half(6) + entry(0x9000, 7, 4, b"0230") + entry(0x9204, 10, 1, at["bias"]) + entry(0x927C, 7, 12, at["note"])
    block += entry(0xA002, 4, 1, 31) + entry(0xA003, 3, 1, half(23)) + entry(0xA005, 4, 1, interop) + bytes(4)
    block += half(2) + entry(1, 2, 4, b"R03\0") + entry(2, 7, 4, b"0100") + bytes(4)
    block += half(2) + entry(1, 2, 2, b"N\0") + entry(2, 5, 3, at["lat"]) + bytes(4)
    assert len(block) == values, (len(block), values)
    return block + name + copyright + note + struct.pack(order + "ii", -1, 3) + struct.pack(order + "6I", 48, 1, 8, 1, 7, 2)
