"""Checkpoints: folders of safetensors and JSON that are whole or not there.

    checkpoint-N/   trained.safetensors  ema.safetensors  optimizer.safetensors  rng.safetensors  state.json  manifest.json

The manifest lists sizes and hashes. A folder under a temporary name, or whose manifest does not match, is never picked.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sslsr_diffusion import hub
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_folder, remove_folder, remove_leftovers

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_PUBLISHED = re.compile(rf"{hub.STATE}/checkpoint-(\d+)/{re.escape(MANIFEST)}")


class Checkpoint(NamedTuple):
    """Everything a resume needs: tensors by file stem, and a JSON-able dict."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write a whole checkpoint folder, its manifest last, or nothing: an OSError (a full disk) leaves untouched what was there before."""
    from safetensors.torch import save_file

    with atomic_folder(folder) as new:
        for stem, group in tensors.items():
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}
            save_file(plain, new / f"{stem}.safetensors", metadata={"format": "pt"})
        (new / STATE).write_text(json.dumps(state, indent=1, allow_nan=True))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(new.iterdir())}
        (new / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Everything in a checkpoint folder, after its manifest was verified; UserError says what is wrong with one that is not whole."""
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
    """The folder for `--resume`: `latest`, a checkpoint folder, a run folder, or a hub id with a published state; else a UserError."""
    folder = run if where == "latest" else Path(where).expanduser()
    if where != "latest" and (folder / MANIFEST).is_file():
        return folder
    found = latest_checkpoint(folder)
    if found is not None:
        return found
    if hub.is_hub_id(where, revision=True):
        return resolve_checkpoint_from_hub(where)
    raise UserError(f"--resume {where}: no whole checkpoint in {folder}; leave --resume out to start from the beginning.")


def published_step(files: Iterable[str]) -> int | None:
    """The step of the newest whole checkpoint among a repository's files; None: it holds no training state."""
    return max((int(match[1]) for file in files if (match := _PUBLISHED.fullmatch(file))), default=None)


def resolve_checkpoint_from_hub(repo_id: str, *, endpoint: str | None = None, cache_dir: Path | None = None) -> Path:
    """The folder of the checkpoint that a run published with `push_state`, downloaded: for `--resume user/name` or `user/name@revision`.

    UserError when there is no such repository or revision, no state in it, or the hub cannot be reached.
    """
    name, revision = hub.split_id(repo_id)
    patterns = [f"{hub.STATE}/*"]
    folder = hub.fetch(name, revision, patterns=patterns, ignore=(), field="--resume", endpoint=endpoint, cache_dir=cache_dir)
    step = published_step(path.relative_to(folder).as_posix() for path in folder.glob(f"{hub.STATE}/*/*"))
    if step is None:
        raise UserError(f"--resume: {repo_id} on the hub holds no training state; output.push_state: true publishes it.")
    return folder / hub.STATE / f"checkpoint-{step}"


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
