"""A folder of bad pictures: every way in which a file, its name or its kind can be wrong, with good neighbours between them."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from sslsr_diffusion.metadata.blocks import PNG_SIGNATURE, png_chunk

GOOD = ("a.png", "m.jpg", "z.tif", "sub/deep.webp", "folder.png/inside.png")
NAMES = [
    b"x..png",
    b"..",
    b"...png",
    b"-rf",
    b"--model",
    b"new\nline",
    b"cr\rx",
    b"caf\xe9",
    b"\xff\xfe",
    b"tab\t",
    b"quote'\"",
    b"$(touch x)",
    b"%s%n",
    b"a" * 230,
    b"\x1b[31m",
    "\u202egnp".encode(),
    b"~",
    b"~root",
    b"..\\..\\up",
    b"C:\\x",
    b"con",
    b"name=x",
    b"a,b",
    b"*",
    b"[a]",
    b"?",
    b"<script>alert(1)<x>",
    b"{0..9}",
    b" lead",
    b"trail ",
    b"n",
    b"|x",
    b"&y",
]


def good_picture(path: Path, seed: int, size: int = 48) -> bytes:
    """A smooth random picture in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Pillow.fromarray(coarse).resize((size, size), Pillow.Resampling.BICUBIC).save(path)
    return path.read_bytes()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes whose header promises gigabytes; the first megabyte of them is there."""
    body = zlib.compress(bytes(min((1 + width * 3) * height, 1 << 20)), 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def big_exif(good: bytes) -> bytes:
    """A JPEG whose EXIF block fills its segment with entries that point behind its end."""
    entries = b"".join(struct.pack("<HHII", 0x9000 + i, 2, 0x7FFFFFFF, 0x7FFFFFF0) for i in range(5000))
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + entries
    return good[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + good[2:]


def hostile_folder(folder: Path, count: int = 200, seed: int = 0) -> int:
    """Fill a folder with the pictures of GOOD and `count` bad entries; how many of those a listing may still take for pictures varies."""
    rng = np.random.default_rng(seed)
    good = {name: good_picture(folder / name, number) for number, name in enumerate(GOOD)}
    made = _special(folder, good)
    kinds = [*good.values(), good["m.jpg"]]
    while made < count:
        data, suffix = kinds[made % len(kinds)], (".png", ".jpg", ".tif", ".webp", ".PNG", ".jpeg")[made % 6]
        name = NAMES[made % len(NAMES)][:230] + b"%d" % made + suffix.encode()
        (folder / os.fsdecode(name)).write_bytes(_broken(rng, data, made))
        made += 1
    return made


def _broken(rng: np.random.Generator, data: bytes, number: int) -> bytes:
    way = number % 5
    if way == 0:
        return data[: rng.integers(len(data) // 2)]
    if way == 1:
        return rng.bytes(int(rng.integers(1, 400)))
    if way == 2:
        return data[:24] + rng.bytes(300)
    if way == 3:
        return b"" if number % 2 else b"<html>not found</html>"
    return bomb(60_000 + number, 60_000)


def _special(folder: Path, good: dict[str, bytes]) -> int:
    """Entries that are no regular files, and pictures that only pretend."""
    files = {
        "bomb.png": bomb(30_000, 30_000),
        "promise.png": bomb(8_000, 8_000),
        "exif.jpg": big_exif(good["m.jpg"])[:-20],
        "wide.png": bomb(2_000_000_000, 1),
        "nothing.gif": b"GIF89a\0\0\0\0\0\0\0;",
        "script.svg.png": b"<svg onload=alert(1)>",
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    links = {
        "loop": folder,
        "outside.png": "/etc/passwd",
        "self.png": "self.png",
        "nowhere.png": "missing/x.png",
        "device.png": "/dev/zero",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.png")
    listening = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):  # the path may be longer than a socket's name can be
        listening.bind(os.path.relpath(folder / "socket.png"))
    listening.close()
    with contextlib.suppress(OSError):  # needs root
        os.mknod(folder / "null.png", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    return len(files) + len(links) + 3
