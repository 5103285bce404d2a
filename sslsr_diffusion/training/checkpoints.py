"""Checkpoints: folders of safetensors and JSON that are whole or not there.

    checkpoint-N/   trained.safetensors  ema.safetensors  optimizer.safetensors  rng.safetensors  state.json  manifest.json

The manifest lists sizes and hashes. A folder under a temporary name, or whose manifest does not match, is never picked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_folder, remove_folder, remove_leftovers

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


class Checkpoint(NamedTuple):
    """Everything a resume needs: tensors by file stem, and a JSON-able dict."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write a whole checkpoint folder, or nothing; its manifest last.

    Raises:
        OSError: it could not be written (for example a full disk); what was there before is untouched.
    """
    from safetensors.torch import save_file

    with atomic_folder(folder) as new:
        for stem, group in tensors.items():
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}
            save_file(plain, new / f"{stem}.safetensors", metadata={"format": "pt"})
        (new / STATE).write_text(json.dumps(state, indent=1, allow_nan=True))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(new.iterdir())}
        (new / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


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
        if _sha256(path) != digest:
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
        if folder not in kept:
            remove_folder(folder)
    remove_leftovers(run)


def _numbered(run: Path) -> list[tuple[int, Path]]:
    if not run.is_dir():
        return []
    found = [(match, path) for path in run.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
