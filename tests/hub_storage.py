"""What the small Hub of the tests keeps: repositories as lists of commits, and Xet storage.

Xet: files are lists of terms, each a range of chunks in a xorb; a shard describes files and names their xorbs. The layouts follow
the public Xet protocol specification. A shard that names a xorb which was never uploaded is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any


class Refused(Exception):
    def __init__(self, status: int, headers: dict[str, str] | None = None, text: str = "refused") -> None:
        super().__init__(text)
        self.status, self.headers, self.text = status, headers or {}, text


def hash_name(raw: bytes) -> str:
    """Xet writes a hash as four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


class XetStore:
    """Xorbs as uploaded, and files as lists of terms (xorb, first chunk, last chunk + 1, bytes)."""

    def __init__(self) -> None:
        self.xorbs: dict[str, bytes] = {}
        self.offsets: dict[str, list[int]] = {}  # where each chunk begins in the serialized xorb, and the end of the last
        self.files: dict[str, list[tuple[str, int, int, int]]] = {}
        self.by_sha256: dict[str, str] = {}

    def put_xorb(self, name: str, body: bytes) -> None:
        at, offsets = 0, [0]
        while at + 8 <= len(body) and body[at] == 0:  # version 0; the footer begins with "XETBLOB"
            at += 8 + int.from_bytes(body[at + 1 : at + 4], "little")
            offsets.append(at)
        if len(offsets) == 1 or at > len(body):
            raise Refused(400, text="not a xorb")
        self.xorbs[name], self.offsets[name] = body, offsets

    def put_shard(self, body: bytes) -> None:
        version, _footer = struct.unpack_from("<QQ", body, 32)
        if version != 2:
            raise Refused(400, text=f"shard version {version}")
        at = 48
        while body[at : at + 32] != b"\xff" * 32:
            name, flags, entries = hash_name(body[at : at + 32]), *struct.unpack_from("<II", body, at + 32)
            at += 48
            terms = []
            for _ in range(entries):
                xorb, (_, size, first, last) = hash_name(body[at : at + 32]), struct.unpack_from("<IIII", body, at + 32)
                if xorb not in self.xorbs:
                    raise Refused(400, text=f"xorb {xorb} was never uploaded")
                terms.append((xorb, first, last, size))
                at += 48
            at += 48 * entries * bool(flags & 1 << 31)  # verification hashes
            if flags & 1 << 30:
                self.by_sha256[hash_name(body[at : at + 32])] = name
                at += 48
            self.files[name] = terms

    def reconstruction(self, name: str, base: str, wanted: tuple[int, int] | None) -> dict[str, Any]:
        if name not in self.files:
            raise Refused(404)
        terms, info, begin, skip, at = [], {}, None, 0, 0
        for xorb, first, last, size in self.files[name]:
            if wanted is None or (at < wanted[1] and at + size > wanted[0]):
                if begin is None:
                    begin, skip = at, (wanted[0] - at if wanted else 0)
                terms.append({"hash": xorb, "unpacked_length": size, "range": {"start": first, "end": last}})
                offsets = self.offsets[xorb]
                piece = {
                    "range": {"start": first, "end": last},
                    "url": f"{base}/xet-data/{xorb}",
                    "url_range": {"start": offsets[first], "end": offsets[last] - 1},
                }
                if piece not in info.setdefault(xorb, []):
                    info[xorb].append(piece)
            at += size
        if wanted and not terms:
            raise Refused(416)
        return {"offset_into_first_range": skip, "terms": terms, "fetch_info": info}


@dataclass
class Stored:
    size: int
    oid: str  # sha256 of large files, git blob id of small ones
    data: bytes | None = None  # None: in Xet storage
    large: bool = False


@dataclass
class Repository:
    private: bool = False
    gated: bool = False  # everybody sees its files' names, nobody has accepted its terms
    commits: list[tuple[str, str, dict[str, Stored]]] = field(default_factory=list)  # id, message, files

    @property
    def files(self) -> dict[str, Stored]:
        return self.commits[-1][2] if self.commits else {}

    def at(self, revision: str) -> tuple[str, dict[str, Stored]]:
        for oid, _, files in self.commits:
            if oid == revision:
                return oid, files
        if revision not in ("main", "HEAD"):
            raise Refused(404, {"X-Error-Code": "RevisionNotFound"})
        return (self.commits[-1][0], self.files) if self.commits else ("0" * 40, {})
