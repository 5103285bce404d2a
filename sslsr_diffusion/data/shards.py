"""Shards of a data set: tar files with pictures, listed once by their headers or read as a stream; parquet files that are whole."""

import glob
import logging
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import IMAGE_SUFFIXES, printable

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)


def local_files(path: str, suffix: str) -> list[Path]:
    """The files of that suffix at a path: itself, in a folder, or matching a pattern."""
    base = Path(path).expanduser()
    found = sorted(base.rglob(f"*{suffix}")) if base.is_dir() else [base] if base.is_file() else sorted(map(Path, glob.glob(str(base))))
    if not found:
        raise UserError(f"expected {suffix} files at {path!r}, found none.")
    return found


def sound(files: Sequence[Path], lost: list[str]) -> list[Path]:
    """Without the files that would end every reading: a parquet file has its index at its end, a tar file is followed by its headers."""
    checks: dict[str, Callable[[Path], str]] = {".parquet": _parquet_problem, ".tar": lambda path: pictures_in(path)[1]}
    problems = {path: checks[path.suffix](path) for path in files if path.suffix in checks}
    lost += [problem for problem in problems.values() if problem]
    left = [path for path in files if not problems.get(path)]
    if not left:
        raise UserError(f"{lost[0]} No file is left.")
    return left


def reason(error: BaseException) -> str:
    """The first line of an error, of the one behind it if there is one."""
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def pictures_in(shard: Path, suffix: str | None = None) -> tuple[list[tuple[int, int, str]], str]:
    """Offset, length and name of every picture in a tar file, and what is wrong with the file ("": nothing)."""
    found: list[tuple[int, int, str]] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            found.extend((member.offset_data, member.size, member.name) for member in tar if _is_picture(member, suffix))
    except (tarfile.TarError, OSError) as error:
        return found, f"{printable(shard)}: not read to its end, no whole uncompressed tar file ({error})."
    return found, ""


def _is_picture(member: tarfile.TarInfo, suffix: str | None) -> bool:
    found = PurePath(member.name).suffix.lower()
    return member.isreg() and (found in IMAGE_SUFFIXES if suffix is None else found == f".{suffix.lower().removeprefix('.')}")


def stream_tar_files(files: Sequence[str], suffix: str | None) -> "IterableDataset":
    """The pictures of tar files (paths or URLs) one after the other, as rows with a column `image`; the same that `pictures_in` lists.

    Not by the builder of `datasets`, which takes a name's first dot for the beginning of its suffix and wants files of one suffix alone.
    """
    from datasets import Features, Image, IterableDataset

    features = Features({"image": Image(decode=False)})
    return IterableDataset.from_generator(_rows, features=features, gen_kwargs={"files": list(files), "suffix": suffix})


def _rows(files: Sequence[str], suffix: str | None) -> Iterator[dict[str, Any]]:
    import fsspec

    for url in files:
        try:
            with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    if _is_picture(member, suffix):
                        content = tar.extractfile(member)
                        assert content is not None
                        yield {"image": {"bytes": content.read(), "path": member.name}}
        except tarfile.TarError as error:  # what the network does is an error of another kind, and is met by reading again
            log.warning("%s: not read to its end, no whole uncompressed tar file (%s); the next one follows", printable(url), error)


def _parquet_problem(path: Path) -> str:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        ParquetFile(path).close()
    except (ArrowException, OSError) as error:
        return f"{printable(path)}: left out, no whole parquet file ({reason(error)})."
    return ""
