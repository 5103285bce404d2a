"""Where pictures come from. An indexed source knows its length and reads any item; `streams.py` has those that only go forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sslsr_diffusion.data.rows import Columns, Item, load_rows, local_files, pictures_in, row_item
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
from sslsr_diffusion.images import list_images, printable

if TYPE_CHECKING:
    from datasets import Dataset


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

    def __init__(self, name: str, dataset: Dataset, columns: Columns, lost: Sequence[str]) -> None:
        self.name, self._dataset, self._columns = name, dataset, columns
        self.lost = list(lost)

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
            members, problem = pictures_in(shard)
            self._members += [(number, *member) for member in members]
            self.lost += [problem] if problem else []

    def __len__(self) -> int:
        return len(self._members)

    def item(self, position: int) -> Item:
        shard, offset, size, name = self._members[position]
        with self._shards[shard].open("rb") as file:
            file.seek(offset)
            return Item(f"{printable(self._shards[shard].name)}/{printable(name)}", file.read(size), file=name)


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
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
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
    rows, lost = load_rows(settings, streaming=False)
    return Table(settings.path, rows, Columns.of(settings), lost)


def _webdataset(settings: WebdatasetSource) -> Tar:
    return Tar(settings.path, local_files(settings.path, ".tar"))


OPENERS: dict[str, Callable[..., IndexedSource]] = {
    "folder": _folder,
    "files": _files,
    "pairs": _pairs,
    "cfw": _cfw,
    "hub": _table,
    "parquet": _table,
    "webdataset": _webdataset,
}
