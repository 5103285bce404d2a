"""Rows of hub, parquet and webdataset sources: what is sound is opened, pictures stay encoded, names stay with them."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from sslsr_diffusion.data.settings import HubSource, ParquetSource, RowSource
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import IMAGE_SUFFIXES, printable

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
    def of(cls, settings: RowSource) -> Columns:
        return cls(settings.column, settings.lr_column, getattr(settings, "name_column", None))


def row_item(name: str, row: Row, columns: Columns) -> Item:
    """The encoded picture (or pair) of one row."""
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


def load_rows(settings: RowSource, *, streaming: bool) -> tuple[Dataset | IterableDataset, list[str]]:
    """The data set behind the settings, its pictures left encoded, and what was left out of it, one sentence per file.

    Raises:
        UserError: it cannot be loaded, or has no such column (the message names those that it has).
    """
    import datasets

    lost: list[str] = []
    try:
        if isinstance(settings, HubSource):
            rows = datasets.load_dataset(
                settings.path, settings.name, split=settings.split, revision=settings.revision, streaming=streaming
            )
        else:
            kind, suffix = ("parquet", ".parquet") if isinstance(settings, ParquetSource) else ("webdataset", ".tar")
            files = [settings.path] if "://" in settings.path else _sound(local_files(settings.path, suffix), lost)
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming)
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


def _undecoded(rows: Dataset | IterableDataset, settings: RowSource) -> Dataset | IterableDataset:
    """Bad pictures must not end an iteration, so `datasets` never decodes them."""
    from datasets import Image

    columns = Columns.of(settings)
    wanted = [c for c in columns if c]
    names = list(rows.column_names or rows.resolve_column_names() if hasattr(rows, "resolve_column_names") else rows.column_names or [])
    for column in wanted:
        if names and column not in names:
            raise UserError(
                f"{settings.kind} source {settings.path!r}: expected a column {column!r}, found {', '.join(names)}; set column."
            )
        if column != columns.name:
            rows = rows.cast_column(column, Image(decode=False))
    keep = [*wanted, *(["__key__"] if "__key__" in names else [])]
    return rows.select_columns(keep) if names else rows
