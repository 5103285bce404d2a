"""Shards of a data set: tar files with pictures, listed once by their headers or read as a stream; parquet files that are whole."""

import glob
import gzip
import itertools
import logging
import lzma
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import IMAGE_SUFFIXES, printable

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)
PAUSES = (1.0, 5.0)  # seconds before the second and third attempt to read


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


def stream_by_builder(builder: Any, split: str) -> "IterableDataset":
    """The rows of a builder of `datasets` as a stream in which damaged shards end where they are damaged (`_Patient`)."""
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # we report what is wrong with a file
    finer = getattr(builder, "_generate_more_gen_kwargs", None)
    for name in ("_generate_tables", "_generate_examples"):
        if hasattr(builder, name):
            setattr(builder, name, _Patient(getattr(builder, name), finer))
    if not hasattr(builder.config, "on_bad_files"):
        return builder.as_streaming_dataset(split=split)
    builder.config.on_bad_files = "skip"  # the columns are read off the first shard that has them
    rows = builder.as_streaming_dataset(split=split)
    builder.config.on_bad_files = "error"
    return rows


class _Patient:
    """Reads a shard once more where it is damaged, then again, and then ends it there, with a note: what was cut off on the way is whole
    the next time. Errors of networks and disks pass through.

    The rows before the damage are the same in each epoch and after a resume. For that a damaged shard is read by its finer parts:
    of a parquet file that is read as a whole, an error may overtake rows that stand before it.
    """

    def __init__(self, generate: Callable[..., Iterator[Any]], finer: Callable[..., Iterator[dict[str, Any]]] | None = None) -> None:
        """`generate` gives keys with rows or tables of a shard; `finer` its arguments for the parts of one."""
        self._generate, self._finer = generate, finer
        self._known = set[str]()

    def __call__(self, **shard: Any) -> Iterator[Any]:
        done, pauses, name = 0, iter(PAUSES), _name_in(shard) or "a shard"
        whole = name not in self._known
        while True:
            try:
                for key, rows in self._parts(shard, whole, done):
                    done += getattr(rows, "num_rows", 1)
                    yield key, rows
                return
            except Exception as error:  # decompression and parsing libraries raise errors of their own
                if not _is_damage(error):
                    raise
                pause = None if name in self._known else next(pauses, None)
                if pause is None:
                    if name not in self._known:
                        log.warning("%s: not read to its end, it is damaged (%s); the next one follows", printable(name), reason(error))
                    self._known.add(name)
                    return
                log.warning("%s: %s; reading it again in %g seconds", printable(name), reason(error), pause)
            time.sleep(pause)
            whole = False

    def _parts(self, shard: dict[str, Any], whole: bool, done: int) -> Iterator[Any]:
        """What follows the first `done` rows."""
        pieces = [shard] if whole or self._finer is None else self._finer(**shard)
        for key, rows in itertools.chain.from_iterable(self._generate(**piece) for piece in pieces):
            count = getattr(rows, "num_rows", 1)
            if done < count:
                yield key, rows.slice(done) if done else rows
            done = max(0, done - count)


def _is_damage(error: Exception) -> bool:
    """Whether it is the bytes that are wrong, and not the way to them: a network's OSErrors have a class or a number of their own."""
    from datasets.table import CastError
    from pyarrow import ArrowException

    if isinstance(error, CastError):  # a ValueError: sound, but with other columns than the data set's
        return False
    if isinstance(error, OSError):
        return type(error) in (OSError, gzip.BadGzipFile) and error.errno is None
    return isinstance(error, ValueError | EOFError | tarfile.TarError | zlib.error | lzma.LZMAError | zipfile.BadZipFile | ArrowException)


def _name_in(shard: Any) -> str | None:
    """The first path or URL in what a shard is made from."""
    if isinstance(shard, str):
        return shard
    inside = shard.values() if isinstance(shard, dict) else shard if isinstance(shard, list | tuple) else ()
    return next((name for part in inside if (name := _name_in(part))), None)


def _parquet_problem(path: Path) -> str:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        ParquetFile(path).close()
    except (ArrowException, OSError) as error:
        return f"{printable(path)}: left out, no whole parquet file ({reason(error)})."
    return ""
