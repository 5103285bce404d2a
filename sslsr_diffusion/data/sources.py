"""Where pictures come from. An indexed source knows its length and reads any item; `sample_order.py` has streams, which only go forward.

Of hub, parquet and webdataset sources what is sound is opened, pictures stay encoded, and names stay with them.
"""

import glob
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from sslsr_diffusion.data.settings import CFWSource, FilesSource, FolderSource, PairsSource, RowSource, Source, WebdatasetSource
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import IMAGE_SUFFIXES, list_images, printable

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


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
        return cls(settings.column, settings.lr_column, getattr(settings, "name_column", None))


def row_item(name: str, row: Row, columns: Columns) -> Item:
    """The encoded picture (or pair) of one row; `name` is its source's and its number."""
    hr, path = _encoded(row.get(columns.hr))
    given = row.get(columns.name) if columns.name else None
    file = str(given or row.get("__key__") or path)
    label = f"{name} {printable(file if given or not path else Path(file).name)}" if file else name
    return Item(label, hr, _encoded(row.get(columns.lr))[0] if columns.lr else None, file=file)


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
    """List a source.

    Raises:
        UserError: there is nothing at its path, or nothing in it that could be a picture.
    """
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
    hr, lr = _by_stem(base / settings.hr), _by_stem(base / settings.lr)
    lost = [
        f"{printable(mine[stem])}: no partner of that name in {other}/."
        for mine, theirs, other in ((hr, lr, "lr"), (lr, hr, "hr"))
        for stem in sorted(mine.keys() - theirs.keys())
    ]
    return IndexedSource(settings.path, [(hr[s], lr[s]) for s in sorted(hr.keys() & lr.keys())], _file_item, lost)


def _cfw(settings: CFWSource) -> IndexedSource:
    base = Path(settings.path).expanduser()
    if not (base / "latents").is_dir():
        raise UserError(f"cfw source {settings.path!r}: expected hr/, lr/ and latents/, found no latents/; make them: sslsr prepare cfw.")
    hr, lr = _by_stem(base / "hr"), _by_stem(base / "lr")
    latents = {path.stem: path for path in (base / "latents").glob("*.safetensors")}
    whole = hr.keys() & lr.keys() & latents.keys()
    halves = [path for stem, path in sorted({**hr, **lr, **latents}.items()) if stem not in whole]
    lost = [f"{printable(path)}: left out, not a whole sample." for path in halves]
    return IndexedSource(settings.path, [(hr[s], lr[s], latents[s]) for s in sorted(whole)], _file_item, lost)


def _by_stem(folder: Path) -> dict[str, Path]:
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
    found = {shard: pictures_in(shard) for shard in local_files(settings.path, ".tar")}
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


def local_files(path: str, suffix: str) -> list[Path]:
    """The files of that suffix at a path: itself, in a folder, or matching a pattern."""
    base = Path(path).expanduser()
    found = sorted(base.rglob(f"*{suffix}")) if base.is_dir() else [base] if base.is_file() else sorted(map(Path, glob.glob(str(base))))
    if not found:
        raise UserError(f"expected {suffix} files at {path!r}, found none.")
    return found


def pictures_in(shard: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Offset, length and name of every picture in a tar file, and what is wrong with the file ("": nothing)."""
    found: list[tuple[int, int, str]] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                    found.append((member.offset_data, member.size, member.name))
    except (tarfile.TarError, OSError) as error:
        return found, f"{printable(shard)}: not read to its end, no whole uncompressed tar file ({error})."
    return found, ""


def load_rows(settings: RowSource, *, streaming: bool) -> "tuple[Dataset | IterableDataset, list[str]]":
    """The data set behind the settings, its pictures left encoded, and what was left out of it, one sentence per file.

    Raises:
        UserError: it cannot be loaded, or has no such column (the message names those that it has).
    """
    import datasets

    lost: list[str] = []
    try:
        if settings.kind == "hub":
            place = {"name": settings.name, "split": settings.split, "revision": settings.revision}
            rows = datasets.load_dataset(settings.path, **place, streaming=streaming)
        else:
            suffix = ".parquet" if settings.kind == "parquet" else ".tar"
            files = [settings.path] if "://" in settings.path else _sound(local_files(settings.path, suffix), lost)
            rows = datasets.load_dataset(settings.kind, data_files=files, split="train", streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # datasets raises nearly everything: network, parsing, missing files
        raise UserError(f"{settings.kind} source {settings.path!r}: cannot be loaded ({reason(error)}).") from error
    return _undecoded(rows, settings), lost


def reason(error: BaseException) -> str:
    """The first line of an error, of the one behind it if there is one."""
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _sound(files: list[Path], lost: list[str]) -> list[str]:
    """Without the files that would end every reading: a parquet file has its index at its end, a tar file is followed by its headers."""
    checks: dict[str, Callable[[Path], str]] = {".parquet": _parquet_problem, ".tar": lambda path: pictures_in(path)[1]}
    problems = {path: checks[path.suffix](path) for path in files if path.suffix in checks}
    lost += [problem for problem in problems.values() if problem]
    sound = [glob.escape(str(path)) for path in files if not problems.get(path)]  # `datasets` takes them for patterns
    if not sound:
        raise UserError(f"{lost[0]} No file is left.")
    return sound


def _parquet_problem(path: Path) -> str:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        ParquetFile(path).close()
    except (ArrowException, OSError) as error:
        return f"{printable(path)}: left out, no whole parquet file ({reason(error)})."
    return ""


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
            rows = rows.cast_column(column, Image(decode=False))
    keep = [*wanted, *(["__key__"] if "__key__" in names else [])]
    return rows.select_columns(keep) if names else rows
