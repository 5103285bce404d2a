from __future__ import annotations

import glob as globbing
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sslsr_diffusion.errors import UserError

log = logging.getLogger(__name__)

_SUFFIXES = ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .tif .tiff .bmp .dib .gif .ppm .pgm .pnm .pbm .tga .avif .jp2 .j2k"
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())


def printable(name: str | os.PathLike[str]) -> str:
    """A file name for messages: control characters and bytes that are not UTF-8 come out as \\x.., never as themselves."""
    raw = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in raw)


def list_images(source: Path | str, *, recursive: bool = True, skip_folder: Callable[[Path], bool] | None = None) -> list[Path]:
    """The pictures of a file, a folder or a glob pattern, sorted.

    In folders and patterns only the suffixes of `IMAGE_SUFFIXES` count, and hidden files and folders (a leading dot: also our
    temporary files) are passed over. Links to folders are followed, each real folder is listed once, so a loop ends.
    A file that is named itself is always returned.

    Args:
        source: a path, or a pattern with * ? [] (** with `recursive`) if no such path exists.
        skip_folder: called with each folder below the source; True leaves it out.
    Raises:
        UserError: there is nothing at `source`. (A folder without pictures gives an empty list.)
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return sorted(_walk(path, recursive, skip_folder))
        if path.exists():
            return [path]
        found = _match(str(path), recursive, skip_folder) if globbing.has_magic(str(path)) else []
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path)}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    if not found:
        raise UserError(f"{printable(path)}: expected a picture, a folder or a pattern such as 'photos/*.jpg', found nothing there.")
    return found


def _match(pattern: str, recursive: bool, skip_folder: Callable[[Path], bool] | None) -> list[Path]:
    found = (Path(name) for name in globbing.iglob(pattern, recursive=recursive))  # glob itself passes over hidden names
    kept: dict[tuple[Path, str], Path] = {}
    for path in sorted((p for p in found if _is_picture(p)), key=lambda p: (len(p.parts), p)):
        if not (skip_folder and any(skip_folder(parent) for parent in path.parents)):
            kept.setdefault((path.parent.resolve(), path.name), path)  # ** walks round in a loop of links
    return sorted(kept.values())


def _is_picture(path: Path) -> bool:
    try:
        return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    except OSError:
        return False


def _walk(root: Path, recursive: bool, skip_folder: Callable[[Path], bool] | None) -> Iterator[Path]:
    """Real folders first, linked ones afterwards and only if not yet seen: a picture is found under its own name."""
    seen: set[tuple[int, int]] = set()
    linked: list[Path] = []
    queue = [root]
    while queue or linked:
        folder = queue.pop() if queue else linked.pop(0)
        try:
            status = folder.stat()
            with os.scandir(folder) as entries:
                listed = sorted((Path(entry.path) for entry in entries), key=lambda p: p.name)
        except OSError as error:
            if folder == root:
                raise
            log.warning("%s: left out, the folder cannot be read (%s)", printable(folder), error.strerror)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for path in listed:
            if _is_picture(path):
                yield path
            elif recursive and not path.name.startswith(".") and path.is_dir() and not (skip_folder and skip_folder(path)):
                (linked if path.is_symlink() else queue).append(path)
        linked.sort()
