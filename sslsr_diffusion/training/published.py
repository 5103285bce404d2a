"""What the repository of a published run looks like, and the way back from it: `--resume user/name`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sslsr_diffusion import hub
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.hub import STATE

MANIFEST = "sslsr.json"  # which files are ours, so that only ours are ever deleted
_WHOLE = re.compile(rf"{STATE}/checkpoint-(\d+)/manifest\.json")


def published_step(files: Iterable[str]) -> int | None:
    """The step of the newest whole checkpoint among a repository's files; None: it holds no training state."""
    return max((int(match[1]) for file in files if (match := _WHOLE.fullmatch(file))), default=None)


def resolve_checkpoint_from_hub(
    repo_id: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The folder of the checkpoint that a run published with `push_state`, downloaded: for `--resume user/name` or `user/name@revision`.

    Raises:
        UserError: no such repository or revision, no state in it, or the hub cannot be reached.
    """
    name, pinned = hub.split_id(repo_id)
    folder = hub.fetch(
        name,
        revision or pinned,
        patterns=[f"{STATE}/*"],
        ignore=(),
        field="--resume",
        token=token,
        endpoint=endpoint,
        cache_dir=cache_dir,
    )
    step = published_step(path.relative_to(folder).as_posix() for path in folder.glob(f"{STATE}/*/*"))
    if step is None:
        raise UserError(f"--resume: {repo_id} on the hub holds no training state; output.push_state: true publishes it.")
    return folder / STATE / f"checkpoint-{step}"
