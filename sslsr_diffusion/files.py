"""Files and folders that are whole or not there, at whatever moment the process or the machine stops.

What is new is written under a temporary name beside its place, forced to the disk, then renamed. A folder takes two renames: the old
one away, the new one in. A stop between them leaves the old one under a temporary name, and `restore_folder` gives it its name back.
"""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

TEMPORARY = ".tmp-"  # how the name of everything that is not whole begins


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """A new file to write; when the block ends, it takes the place of `path`: a crash leaves the old one or the new one.
    Raises OSError: it could not be written (for example a full disk); the old one is untouched.
    """
    path = Path(path)
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"  # without the file's name, which may be as long as names can be
    try:
        yield temporary
        if path.suffix == ".safetensors":
            _give_usual_mode(path.parent, [temporary])
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def atomic_write(path: Path | str, data: bytes) -> None:
    """Write one file as `atomic_file` does."""
    with atomic_file(path) as new, new.open("xb") as stream:
        stream.write(data)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; when the block ends, it takes the place of `folder`.
    Raises OSError: it could not be written (for example a full disk); the old one is untouched.
    """
    restore_folder(folder)
    new, old = _temporary(folder, "new"), _temporary(folder, "old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        with disk_errors():
            yield new
        usual_modes(new)
        for path in (*new.rglob("*"), new):
            sync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)


def restore_folder(folder: Path) -> None:
    """Give the old folder its name back where its replacement was cut off."""
    if not folder.exists() and _temporary(folder, "old").is_dir():
        _temporary(folder, "old").rename(folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder: a crash leaves all of it, or nothing under its name."""
    doomed = _temporary(folder, "doomed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Delete what writes and deletions that were cut off have left in `parent`."""
    for leftover in parent.glob(f"{TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def usual_modes(folder: Path) -> None:
    """Give the safetensors files below a folder the mode that any new file in it gets.

    From version 0.8 on, safetensors renames a private temporary file, so that nobody else could read a result.
    """
    _give_usual_mode(folder, [*folder.rglob("*.safetensors")])


def _give_usual_mode(folder: Path, files: Sequence[Path]) -> None:
    probe = folder / f"{TEMPORARY}{secrets.token_hex(8)}"  # the umask can only be asked by setting it, for all threads
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in files:
        file.chmod(mode)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """safetensors reports a full disk by an error of its own; here it is an OSError like everybody's."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{TEMPORARY}{kind}-{folder.name}")
