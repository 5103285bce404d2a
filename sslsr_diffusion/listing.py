"""Which files are pictures, by their names and by their first bytes."""

import fnmatch
import glob as globbing
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from sslsr_diffusion.errors import UserError

log = logging.getLogger(__name__)

_SUFFIXES = ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .tif .tiff .bmp .dib .gif .ppm .pgm .pnm .pbm .tga .avif .jp2 .j2k"
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
_UNREAD = ".heic .heif .hif .jxl .jxr .psd .psb .xcf .svg .exr .hdr .pfm .pcx .ico .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw"
UNREAD_SUFFIXES = frozenset(_UNREAD.split())  # pictures, too, of kinds that are not read

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif"}  # format -> suffix of a new file
_FURTHER = {"JPEG": (".jpeg", ".jpe", ".jfif"), "TIFF": (".tiff",)}
_MAGIC = {
    rb"\x89PNG\r\n\x1a\n": "PNG",
    rb"\xff\xd8\xff": "JPEG",
    rb"II[*+]\0|MM\0[*+]": "TIFF",
    rb"RIFF....WEBP": "WEBP",
    rb"GIF8": "GIF",
    rb"BM": "BMP",
    rb"....ftyp.*avi[fs]": "AVIF",
    rb"P[1-6][\s#]": "PPM",
    rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51": "JPEG2000",
    rb"....ftyp(hei|hev|mif|msf)": "HEIC",
    rb"8BPS": "PSD",
    rb"\xff\n|\0\0\0\x0cJXL ": "JPEG XL",
}


def kind_of(start: bytes) -> str | None:
    """The format that a file with these first 32 bytes has; None: one without a mark of its own (TGA), or no picture."""
    return next((name for magic, name in _MAGIC.items() if re.match(magic, start, re.DOTALL)), None)


def format_of(path: Path) -> str | None:
    """The format that a file's first bytes promise, as `Image.format` would say."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return kind_of(file.read(32))
    except OSError:
        return None


def suffixes_of(format: str) -> tuple[str, ...]:
    """The suffixes under which a format of `SUFFIXES` may be written, lower case."""
    return (SUFFIXES[format], *_FURTHER.get(format, ()))


def printable(name: str | os.PathLike[str]) -> str:
    """A file name for messages: control characters and bytes that are not UTF-8 come out as \\x.., never as themselves."""
    raw = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in raw)


def list_images(
    source: Path | str, *, recursive: bool = True, skip_folder: Callable[[Path], bool] | None = None, unread: bool = False
) -> list[Path]:
    """The pictures of a file, a folder or a glob pattern, sorted.

    In folders and patterns only the suffixes of `IMAGE_SUFFIXES` count, and hidden files and folders (a leading dot: also our
    temporary files) are passed over. Links to folders are followed, each real folder is listed once, so a loop ends.
    A file that is named itself is always returned.

    Args:
        source: a path, or a pattern with * ? [] and ** (any depth) if no such path exists.
        recursive: of a folder, also what lies in its sub-folders.
        skip_folder: called with each folder below the source; True leaves it out.
        unread: list pictures of `UNREAD_SUFFIXES`, too: reading them says that they are not read.
    Raises UserError: there is nothing at `source`. (A folder without pictures gives an empty list.)
    """
    path = Path(source).expanduser()
    skip, suffixes = skip_folder or (lambda _: False), IMAGE_SUFFIXES | (UNREAD_SUFFIXES if unread else frozenset())
    try:
        if path.is_dir():
            folders = _folders(path, skip) if recursive else [path]
            return sorted(file for folder in folders for file in _entries(folder) if _is_picture(file, suffixes))
        if path.exists():
            return [path]
        found = sorted(_match(path, skip, suffixes)) if globbing.has_magic(str(path)) else []
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path)}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    if not found:
        raise UserError(f"{printable(path)}: expected a picture, a folder or a pattern such as 'photos/*.jpg', found nothing there.")
    return found


def _match(pattern: Path, skip: Callable[[Path], bool], suffixes: frozenset[str]) -> set[Path]:
    """As the standard glob, which needs exponential time for ** in a tree whose links form a loop."""
    *parents, last = pattern.parts[1:] if pattern.anchor else pattern.parts
    folders = [Path(pattern.anchor or ".")]
    for part in parents:
        if part == "**":
            folders = [below for folder in folders for below in _folders(folder, skip)]
        elif globbing.has_magic(part):
            below = [path for folder in folders for path in _entries(folder) if fnmatch.fnmatchcase(path.name, part) and path.is_dir()]
            folders = [path for path in below if not path.name.startswith(".") and not skip(path)]
        else:
            folders = [folder / part for folder in folders if (folder / part).is_dir()]
    if last == "**":
        folders, last = [below for folder in folders for below in _folders(folder, skip)], "*"
    return {path for folder in folders for path in _entries(folder) if fnmatch.fnmatchcase(path.name, last) and _is_picture(path, suffixes)}


def _is_picture(path: Path, suffixes: frozenset[str]) -> bool:
    try:
        return path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    except OSError:
        return False


def _entries(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries)


def _folders(root: Path, skip: Callable[[Path], bool]) -> Iterator[Path]:
    """Each real folder once; linked ones last, so that a picture is found under its own name."""
    seen: set[tuple[int, int]] = set()
    queue, linked = [root], list[Path]()
    while queue or linked:
        folder = queue.pop() if queue else linked.pop(0)
        try:
            status, below = folder.stat(), _entries(folder)
        except OSError as error:
            if folder == root:
                raise
            log.warning("%s: left out, the folder cannot be read (%s)", printable(folder), error.strerror)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder
        for path in below:
            if not path.name.startswith(".") and path.is_dir() and not skip(path):
                (linked if path.is_symlink() else queue).append(path)
        linked.sort()
