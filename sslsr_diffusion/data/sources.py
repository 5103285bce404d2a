"""Where pictures come from. An indexed source knows its length and reads any item; `streams.py` has those that only go forward."""

from __future__ import annotations

import glob
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sslsr_diffusion.data.settings import (
    CFWSource,
    FilesSource,
    FolderSource,
    HubSource,
    PairsSource,
    ParquetSource,
    Source,
    WebdatasetSource,
)
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import IMAGE_SUFFIXES, list_images, printable

log = logging.getLogger(__name__)


class Item(NamedTuple):
    """One picture, or one real pair, not yet decoded."""

    name: str  # for messages
    hr: Path | bytes
    lr: Path | bytes | None = None  # the real low-resolution partner
    latents: Path | None = None  # what the upscaler made of it (kind cfw)
    file: str = ""  # its own file name or key, by which mask files are found; rows may have none


class Columns(NamedTuple):
    """Where a row has its pictures, and where its name if that does not stand with the picture."""

    hr: str
    lr: str | None = None
    name: str | None = None

    @classmethod
    def of(cls, settings: Any) -> Columns:
        return cls(settings.column, settings.lr_column, getattr(settings, "name_column", None))


class IndexedSource(Protocol):
    """Pickled into the loader's workers."""

    name: str
    lost: list[str]  # problems found while listing, one sentence each

    def __len__(self) -> int: ...

    def item(self, position: int) -> Item: ...


class Files:
    """Pictures, or pairs of pictures, on a local disk."""

    def __init__(
        self,
        name: str,
        hr: Sequence[Path],
        lr: Sequence[Path] | None = None,
        lost: Sequence[str] = (),
        latents: Sequence[Path] | None = None,
    ) -> None:
        self.name, self.lost = name, list(lost)
        self._hr, self._lr, self._latents = list(hr), lr and list(lr), latents and list(latents)

    def __len__(self) -> int:
        return len(self._hr)

    def item(self, position: int) -> Item:
        path = self._hr[position]
        lr, latents = self._lr[position] if self._lr else None, self._latents[position] if self._latents else None
        return Item(printable(path), path, lr, latents, str(path))


class Table:
    """Rows of a Hugging Face data set; pictures come as encoded bytes and are decoded by our own reader."""

    def __init__(self, name: str, dataset: Any, columns: Columns) -> None:
        self.name, self._dataset, self._columns = name, dataset, columns
        self.lost: list[str] = []

    def __len__(self) -> int:
        return len(self._dataset)

    def item(self, position: int) -> Item:
        return row_item(f"{self.name}[{position}]", self._dataset[position], self._columns)


class Tar:
    """Pictures in local tar files, found once by their headers and then read at random."""

    def __init__(self, name: str, shards: Sequence[Path]) -> None:
        self.name, self._shards = name, list(shards)
        self.lost: list[str] = []
        self._members: list[tuple[int, int, int, str]] = []  # shard, offset, bytes, name
        for number, shard in enumerate(self._shards):
            self._index(number, shard)

    def __len__(self) -> int:
        return len(self._members)

    def item(self, position: int) -> Item:
        shard, offset, size, name = self._members[position]
        with self._shards[shard].open("rb") as file:
            file.seek(offset)
            return Item(f"{printable(self._shards[shard].name)}/{printable(name)}", file.read(size), file=name)

    def _index(self, number: int, shard: Path) -> None:
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    if member.isreg() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                        self._members.append((number, member.offset_data, member.size, member.name))
        except (tarfile.TarError, OSError) as error:
            self.lost.append(f"{printable(shard)}: not read to its end, no whole uncompressed tar file ({error}).")


def row_item(name: str, row: dict[str, Any], columns: Columns) -> Item:
    """The encoded picture (or pair) of one row."""
    hr, path = _encoded(row.get(columns.hr))
    given = row.get(columns.name) if columns.name else None
    file = str(given or row.get("__key__") or path)
    label = f"{name} {printable(file if given or not path else Path(file).name)}" if file else name
    return Item(label, hr, _encoded(row.get(columns.lr))[0] if columns.lr else None, file=file)


def _encoded(cell: Any) -> tuple[Path | bytes, str]:
    if isinstance(cell, bytes):
        return cell, ""
    cell = cell or {}
    path = cell.get("path") or ""
    return (cell["bytes"], path) if cell.get("bytes") is not None else (Path(path) if path else b"", path)


def open_source(settings: Source) -> IndexedSource:
    """List a source.

    Raises:
        UserError: there is nothing at its path, or nothing in it that could be a picture.
    """
    source = OPENERS[settings.kind](settings)
    if not len(source):
        why = f" ({source.lost[0]})" if source.lost else ""
        raise UserError(f"{settings.kind} source {settings.path!r}: expected pictures, found none{why}.")
    return source


def _folder(settings: FolderSource) -> Files:
    return Files(settings.path, list_images(settings.path, recursive=settings.recursive))


def _files(settings: FilesSource) -> Files:
    path = Path(settings.path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"file list {printable(path)}: cannot be read ({error.strerror}).") from None
    named = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return Files(settings.path, [path.parent / Path(name).expanduser() for name in named])


def _pairs(settings: PairsSource) -> Files:
    base = Path(settings.path).expanduser()
    sides = {side: _by_stem(base / name) for side, name in (("hr", settings.hr), ("lr", settings.lr))}
    shared = sorted(sides["hr"].keys() & sides["lr"].keys())
    lost = []
    for side, other in (("hr", "lr"), ("lr", "hr")):
        lost += [
            f"{printable(sides[side][stem])}: no partner of that name in {other}/." for stem in sorted(sides[side].keys() - set(shared))
        ]
    return Files(settings.path, [sides["hr"][stem] for stem in shared], [sides["lr"][stem] for stem in shared], lost)


def _cfw(settings: CFWSource) -> Files:
    base = Path(settings.path).expanduser()
    if not (base / "latents").is_dir():
        raise UserError(
            f"cfw source {settings.path!r}: expected hr/, lr/ and latents/ in it, found no latents/; make them: sslsr prepare cfw."
        )
    hr, lr = _by_stem(base / "hr"), _by_stem(base / "lr")
    latents = {path.stem: path for path in (base / "latents").glob("*.safetensors")}
    shared = sorted(hr.keys() & lr.keys() & latents.keys())
    lost = [
        f"{printable(path)}: left out, not a whole sample." for stem, path in sorted({**hr, **lr, **latents}.items()) if stem not in shared
    ]
    return Files(settings.path, [hr[s] for s in shared], [lr[s] for s in shared], lost, [latents[s] for s in shared])


def _by_stem(folder: Path) -> dict[str, Path]:
    """Pictures by their path below the folder without suffix."""
    if not folder.is_dir():
        raise UserError(f"pairs source: expected a folder {printable(folder)}, found none; set hr and lr to the names of the two folders.")
    listed = list_images(folder)
    stems = {path: str(path.relative_to(folder).with_suffix("")) for path in listed}
    twice = [stem for stem, count in Counter(stems.values()).items() if count > 1]
    if twice:
        raise UserError(f"pairs source: {printable(folder)} has several pictures named {printable(twice[0])!r}; keep one of them.")
    return {stem: path for path, stem in stems.items()}


def _table(settings: HubSource | ParquetSource) -> Table:
    return Table(settings.path, load_rows(settings, streaming=False), Columns.of(settings))


def _webdataset(settings: WebdatasetSource) -> Tar:
    return Tar(settings.path, local_files(settings.path, ".tar"))


def local_files(path: str, suffix: str) -> list[Path]:
    """The files of that suffix at a path: itself, in a folder, or matching a pattern."""
    base = Path(path).expanduser()
    found = sorted(base.rglob(f"*{suffix}")) if base.is_dir() else [base] if base.is_file() else sorted(map(Path, glob.glob(str(base))))
    if not found:
        raise UserError(f"expected {suffix} files at {path!r}, found none.")
    return found


def load_rows(settings: HubSource | ParquetSource | WebdatasetSource, *, streaming: bool) -> Any:
    """The data set behind the settings, its pictures left encoded.

    Raises:
        UserError: it cannot be loaded, or has no such column (the message names those that it has).
    """
    import datasets

    remote = "://" in settings.path
    try:
        if isinstance(settings, HubSource):
            rows = datasets.load_dataset(
                settings.path, settings.name, split=settings.split, revision=settings.revision, streaming=streaming
            )
        else:
            kind, suffix = ("parquet", ".parquet") if isinstance(settings, ParquetSource) else ("webdataset", ".tar")
            files = settings.path if remote else [str(p) for p in local_files(settings.path, suffix)]
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # datasets raises nearly everything: network, parsing, missing files
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"{settings.kind} source {settings.path!r}: cannot be loaded ({reason}).") from error
    return _undecoded(rows, settings, datasets)


def _undecoded(rows: Any, settings: Any, datasets: Any) -> Any:
    """Bad pictures must not end an iteration, so `datasets` never decodes them."""
    columns = Columns.of(settings)
    wanted = [c for c in columns if c]
    names = list(rows.column_names or rows.resolve_column_names() if hasattr(rows, "resolve_column_names") else rows.column_names or [])
    for column in wanted:
        if names and column not in names:
            raise UserError(
                f"{settings.kind} source {settings.path!r}: expected a column {column!r}, found {', '.join(names)}; set column."
            )
        if column != columns.name:
            rows = rows.cast_column(column, datasets.Image(decode=False))
    keep = [*wanted, *(["__key__"] if "__key__" in names else [])]
    return rows.select_columns(keep) if names else rows


OPENERS: dict[str, Callable[[Any], IndexedSource]] = {
    "folder": _folder,
    "files": _files,
    "pairs": _pairs,
    "cfw": _cfw,
    "hub": _table,
    "parquet": _table,
    "webdataset": _webdataset,
}
