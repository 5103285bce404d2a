"""Folders that are either whole or not there: safetensors and JSON, a manifest written last, then a rename.

    checkpoint-N/   trained.safetensors  ema.safetensors  optimizer.safetensors  rng.safetensors  state.json  manifest.json

A process killed at any moment leaves a folder under a temporary name, or one whose manifest does not match: neither is ever picked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sslsr_diffusion.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = ".tmp-"


class Checkpoint(NamedTuple):
    """Everything a resume needs: tensors by file stem, and a JSON-able dict."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write a whole checkpoint folder, or nothing: temporary name, fsync, manifest last, rename.

    Raises:
        OSError: it could not be written (for example a full disk); what was there before is untouched.
    """
    from safetensors.torch import save_file

    temporary = folder.with_name(f"{_TEMPORARY}{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = {}
        for stem, group in tensors.items():
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}
            with disk_errors():
                save_file(plain, temporary / f"{stem}.safetensors", metadata={"format": "pt"})
            files[f"{stem}.safetensors"] = _sync(temporary / f"{stem}.safetensors")
        files[STATE] = _write(temporary / STATE, json.dumps(state, indent=1, allow_nan=True).encode())
        _write(temporary / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())
        sync_folder(temporary)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_checkpoint(folder: Path) -> Checkpoint:
    """Everything in a checkpoint folder, after its manifest was verified.

    Raises:
        UserError: the folder is not a whole checkpoint (the message says what is wrong with it).
    """
    from safetensors.torch import load_file

    wrong = what_is_wrong(folder)
    if wrong:
        raise UserError(f"{folder}: {wrong}; choose another checkpoint or --resume latest, which skips damaged ones.")
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return Checkpoint(tensors, json.loads((folder / STATE).read_text()))


def what_is_wrong(folder: Path) -> str | None:
    """Why this folder cannot be trusted, or None: every file of the manifest must be there with its size and hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = [(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()]
    except FileNotFoundError:
        return f"not a finished checkpoint (no {MANIFEST})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if manifest.get("format") != FORMAT:
        return f"written in format {manifest.get('format')!r}, this version reads {FORMAT}"
    for name, size, digest in entries:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, its manifest says {size}"
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                return f"{name} is damaged (its hash differs from the manifest)"
    return None


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run folder; damaged ones are named in the log and passed over."""
    for _, folder in reversed(_numbered(run)):
        wrong = what_is_wrong(folder)
        if wrong is None:
            return folder
        logger.warning("%s is passed over: %s.", folder, wrong)
    return None


def find_checkpoint(where: str, run: Path) -> Path:
    """The folder for `--resume`: `latest`, a checkpoint folder, a run folder, or a hub id with a published state.

    Raises:
        UserError: there is no whole checkpoint there.
    """
    from sslsr_diffusion.hub import is_hub_id
    from sslsr_diffusion.training.published import resolve_checkpoint_from_hub

    folder = run if where == "latest" else Path(where).expanduser()
    if where != "latest" and (folder / MANIFEST).is_file():
        return folder
    found = latest_checkpoint(folder)
    if found is None and is_hub_id(where, revision=True):
        return resolve_checkpoint_from_hub(where)
    if found is None:
        raise UserError(f"--resume {where}: no whole checkpoint in {folder}; leave --resume out to start from the beginning.")
    return found


def prune_checkpoints(run: Path, keep: int, step: int) -> None:
    """After checkpoint `step` was written: delete all but the newest `keep` up to it, and leftovers of writes that were cut off.

    Later ones are damaged, or the run went back from them: they must neither push out the new one nor be the latest.
    """
    found = _numbered(run)
    kept = [folder for number, folder in found if number <= step][-keep:]
    for _, folder in reversed(found):
        if folder in kept:
            continue
        doomed = folder.with_name(f"{_TEMPORARY}doomed-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)  # a deletion that is cut off must not leave half a checkpoint under a good name
    clear_leftovers(run)


def clear_leftovers(run: Path) -> None:
    """Delete what writes that were cut off have left."""
    for leftover in run.glob(f"{_TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a whole folder in the place of an older one; `put_back` mends what a kill between the two renames leaves."""
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(folder.parent)


def put_back(folder: Path) -> None:
    """Give the older folder its name again where its replacement was cut off."""
    if not folder.exists() and _old(folder).is_dir():
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{_TEMPORARY}old-{folder.name}")


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """safetensors reports a full disk by an error of its own; here it is an OSError like everybody's."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_atomically(path: Path, data: bytes) -> None:
    """One file, whole or not there."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    try:
        _write(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _numbered(run: Path) -> list[tuple[int, Path]]:
    if not run.is_dir():
        return []
    found = [(match, path) for path in run.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found)


def _write(path: Path, data: bytes) -> dict[str, Any]:
    path.write_bytes(data)
    return _sync(path)


def _sync(path: Path) -> dict[str, Any]:
    """Force a file to the disk; its line in the manifest."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
