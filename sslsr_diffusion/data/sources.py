"""Where pictures come from. An indexed source knows its length and reads any item; `sample_order.py` has streams, which only go forward.

Of hub, parquet and webdataset sources what is sound is opened, pictures stay encoded, and names stay with them.
"""

import glob
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from sslsr_diffusion.data.settings import CFWSource, FilesSource, FolderSource, PairsSource, RowSource, Source, WebdatasetSource
from sslsr_diffusion.data.shards import local_files, pictures_in, reason, sound, stream_by_builder, stream_tar_files
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import list_images, printable
from sslsr_diffusion.partners import partners

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_SHOWN, _LONGEST = 120, 1024  # characters of a name in a message, and of a name at all: a cell may hold a whole picture as text


class Encoded(TypedDict, total=False):
    bytes: bytes | None
    path: str | None


Row = Mapping[str, Encoded | bytes | str | None]


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
    def of(cls, settings: RowSource) -> "Columns":
        return cls("image") if settings.kind == "webdataset" else cls(settings.column, settings.lr_column, settings.name_column)


def row_item(name: str, row: Row, columns: Columns) -> Item:
    """The encoded picture (or pair) of one row; `name` is its source's and its number."""
    hr, path = _encoded(row.get(columns.hr))
    given = row.get(columns.name) if columns.name else None
    file = str(row.get("__key__") or path if given is None else given)
    label = f"{name} {_shown(Path(file).name if file == path else file)}" if file else name
    return Item(label, hr, _encoded(row.get(columns.lr))[0] if columns.lr else None, file=file if len(file) <= _LONGEST else "")


def _shown(text: str) -> str:
    return printable(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)")


def _encoded(cell: Encoded | bytes | str | None) -> tuple[Path | bytes, str]:
    if not isinstance(cell, dict):
        return cell if isinstance(cell, bytes) else b"", ""
    data, path = cell.get("bytes"), cell.get("path") or ""
    return data if data is not None else Path(path) if path else b"", path


@dataclass
class IndexedSource:
    """Pictures or pairs by position, made from what was listed; pickled into the loader's workers."""

    name: str
    listed: Sequence[Any]  # of Hugging Face data sets the rows, read when they are asked for
    make: Callable[[str, Any], Item]  # of a label for messages and an entry of `listed`
    lost: list[str] = field(default_factory=list)  # problems found while listing, one sentence each

    def __len__(self) -> int:
        return len(self.listed)

    def item(self, position: int) -> Item:
        return self.make(f"{self.name}[{position}]", self.listed[position])


def open_source(settings: Source) -> IndexedSource:
    """List a source. Raises UserError: there is nothing at its path, or nothing in it that could be a picture."""
    source = OPENERS[settings.kind](settings)
    if not len(source):
        why = f" ({source.lost[0]})" if source.lost else ""
        raise UserError(f"{settings.kind} source {settings.path!r}: expected pictures, found none{why}.")
    return source


def _file_item(label: str, paths: tuple[Path, ...]) -> Item:
    return Item(printable(paths[0]), file=str(paths[0]), **dict(zip(("hr", "lr", "latents"), paths)))


def _tar_item(label: str, member: tuple[Path, int, int, str]) -> Item:
    shard, offset, size, name = member
    with shard.open("rb") as file:
        file.seek(offset)
        return Item(f"{printable(shard.name)}/{printable(name)}", file.read(size), file=name)


def _folder(settings: FolderSource) -> IndexedSource:
    return IndexedSource(settings.path, [(path,) for path in list_images(settings.path, recursive=settings.recursive)], _file_item)


def _files(settings: FilesSource) -> IndexedSource:
    path = Path(settings.path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"file list {printable(path)}: cannot be read ({error.strerror}).") from None
    named = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return IndexedSource(settings.path, [(path.parent / Path(name).expanduser(),) for name in named], _file_item)


def _pairs(settings: PairsSource) -> IndexedSource:
    base = Path(settings.path).expanduser()
    hr, lr = by_stem(base / settings.hr), by_stem(base / settings.lr)
    found = partners(hr, lr)
    lost = [
        f"{printable(mine[stem])}: no partner of that name in {other}/."
        for mine, paired, other in ((hr, set(found), "lr"), (lr, set(found.values()), "hr"))
        for stem in sorted(mine.keys() - paired)
    ]
    return IndexedSource(settings.path, [(hr[mine], lr[theirs]) for mine, theirs in sorted(found.items())], _file_item, lost)


def _cfw(settings: CFWSource) -> IndexedSource:
    base = Path(settings.path).expanduser()
    if not (base / "latents").is_dir():
        raise UserError(f"cfw source {settings.path!r}: expected hr/, lr/ and latents/, found no latents/; make them: sslsr prepare cfw.")
    hr, lr = by_stem(base / "hr"), by_stem(base / "lr")
    latents = {path.stem: path for path in (base / "latents").glob("*.safetensors")}
    whole = hr.keys() & lr.keys() & latents.keys()
    halves = [path for stem, path in sorted({**hr, **lr, **latents}.items()) if stem not in whole]
    lost = [f"{printable(path)}: left out, not a whole sample." for path in halves]
    return IndexedSource(settings.path, [(hr[s], lr[s], latents[s]) for s in sorted(whole)], _file_item, lost)


def by_stem(folder: Path) -> dict[str, Path]:
    """Pictures by their path below the folder without suffix."""
    if not folder.is_dir():
        raise UserError(f"pairs source: expected a folder {printable(folder)}, found none; set hr and lr to the names of the two folders.")
    listed = list_images(folder)
    stems = [str(path.relative_to(folder).with_suffix("")) for path in listed]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise UserError(f"pairs source: {printable(folder)} has several pictures named {printable(twice[0])!r}; keep one of them.")
    return dict(zip(stems, listed))


def _rows(settings: RowSource) -> IndexedSource:
    rows, lost = load_rows(settings, streaming=False)
    return IndexedSource(settings.path, rows, partial(row_item, columns=Columns.of(settings)), lost)


def _webdataset(settings: WebdatasetSource) -> IndexedSource:
    """Local tar files, listed once by their headers and then read at random."""
    found = {shard: pictures_in(shard, settings.column) for shard in local_files(settings.path, ".tar")}
    members = [(shard, *member) for shard, (inside, _) in found.items() for member in inside]
    return IndexedSource(settings.path, members, _tar_item, [problem for _, problem in found.values() if problem])


OPENERS: dict[str, Callable[..., IndexedSource]] = {
    "folder": _folder,
    "files": _files,
    "pairs": _pairs,
    "cfw": _cfw,
    "hub": _rows,
    "parquet": _rows,
    "webdataset": _webdataset,
}


def load_rows(settings: RowSource, *, streaming: bool) -> "tuple[Dataset | IterableDataset, list[str]]":
    """The data set behind the settings, its pictures left encoded, and what was left out of it, one sentence per file.
    Raises UserError: it cannot be loaded, or has no such column of pictures (the message names those that it has).
    """
    import datasets

    lost: list[str] = []
    remote = "://" in settings.path
    try:
        if settings.kind == "hub":
            place = {"name": settings.name, "revision": settings.revision}
            if streaming:
                rows = stream_by_builder(datasets.load_dataset_builder(settings.path, **place), settings.split)
            else:
                rows = datasets.load_dataset(settings.path, split=settings.split, **place)
        elif settings.kind == "webdataset":
            return stream_tar_files(_urls(settings.path) if remote else list(map(str, _sound(settings, lost))), settings.column), lost
        else:
            # `datasets` takes paths for patterns; what is behind a URL is first looked at when it is read
            files = [settings.path] if remote else [glob.escape(str(path)) for path in _sound(settings, lost)]
            if streaming:
                rows = stream_by_builder(datasets.load_dataset_builder("parquet", data_files=files), "train")
            else:
                rows = datasets.load_dataset("parquet", data_files=files, split="train")
    except UserError:
        raise
    except Exception as error:  # datasets raises nearly everything: network, parsing, missing files
        raise UserError(f"{settings.kind} source {settings.path!r}: cannot be loaded ({reason(error)}).") from error
    return _undecoded(rows, settings), lost


def _sound(settings: RowSource, lost: list[str]) -> list[Path]:
    return sound(local_files(settings.path, ".tar" if settings.kind == "webdataset" else ".parquet"), lost)


def _urls(pattern: str) -> list[str]:
    """The URLs that a pattern with * stands for, where its storage can list."""
    import fsspec

    return [file.full_name for file in fsspec.open_files(pattern)] if "*" in pattern else [pattern]


def _undecoded(rows: "Dataset | IterableDataset", settings: RowSource) -> "Dataset | IterableDataset":
    """Bad pictures must not end an iteration, so `datasets` never decodes them."""
    from datasets import Image

    columns, where = Columns.of(settings), f"{settings.kind} source {settings.path!r}"
    wanted = [c for c in columns if c]
    names = list(rows.column_names or rows.resolve_column_names() if hasattr(rows, "resolve_column_names") else rows.column_names or [])
    for column in wanted:
        if names and column not in names:
            raise UserError(f"{where}: expected a column {column!r}, found {', '.join(names)}; set column.")
        if column != columns.name:
            kind = (rows.features or {}).get(column)
            if kind is not None and not _holds_pictures(kind):
                raise UserError(f"{where}: expected encoded pictures in column {column!r}, got {_kind(kind)}; name another column.")
            rows = rows.cast_column(column, Image(decode=False))
    keep = [*wanted, *(["__key__"] if "__key__" in names else [])]
    return rows.select_columns(keep) if names else rows


def _holds_pictures(kind: Any) -> bool:
    """Whether a column's type can be that of encoded pictures: bytes, paths, or both."""
    from datasets import Image

    if isinstance(kind, dict):
        return bool(kind.keys() & {"bytes", "path"})
    return isinstance(kind, Image) or getattr(kind, "dtype", "").removeprefix("large_") in ("string", "binary")


def _kind(kind: Any) -> str:
    return "groups of " + ", ".join(kind) if isinstance(kind, dict) else str(getattr(kind, "dtype", type(kind).__name__.lower()))
