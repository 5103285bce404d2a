"""Publishing while training goes on: one thread, one commit per publication, and a hub that is down costs a warning."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslsr_diffusion.errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "sslsr.json"  # in the repository: which files are ours, so that only ours are ever deleted
STATE = "state"  # the folder in the repository that holds the last checkpoint
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{6,}")


@dataclass
class _Publication:
    """What the repository shall hold next: path in the repository -> bytes or a file of the snapshot."""

    message: str
    pipeline: dict[str, Path | bytes] | None = None  # None: leave as it is
    state: dict[str, Path | bytes] | None = None
    snapshots: list[Path] = field(default_factory=list)

    def over(self, older: _Publication | None) -> _Publication:
        """This one, and of an older unpublished one the part that this one does not bring."""
        if older is None:
            return self
        parts = self.pipeline or older.pipeline, self.state or older.state
        message = self.message if self.pipeline or not older.pipeline else older.message
        return _Publication(message, *parts, [*older.snapshots, *self.snapshots])


class HubPublisher:
    """Publishes folders to one repository from a thread of its own.

    `publish` and `checkpoint` take hard links of the files and return at once; they never raise. What could not be published is
    tried again at the next call of either, the newest state of things only, and once more by `close`.

    Args:
        repo_id: `user/name`; made if it is not there.
        token: a write token; None: the one that `hf auth login` stored.
        private: whether a newly made repository is private.
        endpoint: of another hub than the default.
        scratch: folder for the hard links, on the file system of the run; default: beside what is published.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool = True,
        endpoint: str | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.repo_id = repo_id
        self.published: list[str] = []  # commit ids, oldest first
        self.failures = 0
        self._again = "tried again at the next checkpoint"
        self._token, self._private, self._endpoint, self._scratch = token, private, endpoint, scratch
        self._changed = threading.Condition()
        self._waiting: _Publication | None = None
        self._wanted = self._busy = self._closed = False
        self._number = 0
        self._thread = threading.Thread(target=self._work, name="hub-publisher", daemon=True)
        self._thread.start()

    def publish(self, folder: Path, message: str, *, files: Mapping[str, Path | bytes] | None = None) -> None:
        """Publish a pipeline folder, with further files (model card, pictures) by their path in the repository."""
        try:
            snapshot, listed = self._snapshot(folder)
            given = {path: content if isinstance(content, bytes) else content.read_bytes() for path, content in (files or {}).items()}
            self._offer(_Publication(message, pipeline={**listed, **given}, snapshots=[snapshot]))
        except Exception as error:
            self._warn(error)

    def checkpoint(self, folder: Path | None = None) -> None:
        """After every checkpoint: publish it as the state to resume from (if given), and try again what failed before."""
        try:
            if folder is None:
                self._offer(None)
                return
            snapshot, listed = self._snapshot(folder)
            state = {f"{STATE}/{folder.name}/{path}": file for path, file in listed.items()}
            self._offer(_Publication(f"State at {folder.name}", state=state, snapshots=[snapshot]))
        except Exception as error:
            self._warn(error)

    def wait(self, timeout: float | None = None) -> bool:
        """Until the thread has nothing left to try; False if the time ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and not self._wanted, timeout)

    def close(self, *, timeout: float = 3600.0, attempts: int = 3, pause: float = 20.0) -> bool:
        """At the end of the run: wait for the upload, try again a few times; True if everything is published.

        What could not be published stays in the run folder; a warning says so.
        """
        end = time.monotonic() + timeout
        for attempt in range(attempts):
            self._again = f"tried again in {pause * 2**attempt:.0f} seconds, {attempts - attempt} times at most"
            if not self.wait(max(0.0, end - time.monotonic())) or self._waiting is None:
                break
            time.sleep(max(0.0, min(pause * 2**attempt, end - time.monotonic())))
            self._offer(None)
        self._again = "the run is done and waits no longer"
        self.wait(max(0.0, end - time.monotonic()))
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            done = self._waiting is None and not self._busy
        if done:
            self._thread.join(5)
        else:
            log.warning("hub: the last publication to %s did not get there; the same command with --resume latest sends it", self.repo_id)
        return done

    def _snapshot(self, folder: Path) -> tuple[Path, dict[str, Path | bytes]]:
        """Hard links of a folder's files: the run may prune, replace or delete the folder while they are being sent."""
        self._number += 1
        base = self._scratch or folder.parent
        snapshot = base / f".publishing-{os.getpid()}-{self._number}"
        for leftover in base.glob(".publishing-*"):  # of a run that was killed
            if leftover == snapshot or not leftover.name.startswith(f".publishing-{os.getpid()}-"):
                shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(folder, snapshot, copy_function=_link)
        files = sorted(path for path in snapshot.rglob("*") if path.is_file() and not path.name.startswith("."))
        return snapshot, {path.relative_to(snapshot).as_posix(): path for path in files}

    def _offer(self, publication: _Publication | None) -> None:
        with self._changed:
            if publication is not None:
                self._waiting = publication.over(self._waiting)
            self._wanted = self._waiting is not None
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                mine, self._waiting, self._wanted, self._busy = self._waiting, None, False, True
            assert mine is not None
            failed, pause = False, None
            try:
                self.published.append(self._commit(mine))
                log.info("hub: published to %s: %s", self.repo_id, mine.message)
            except Exception as error:  # a refused upload is never worth a run
                failed, pause = True, _retry_after(error)
                self._warn(error)
            with self._changed:
                if failed:
                    self._waiting = self._waiting.over(mine) if self._waiting else mine
                if pause is not None:  # the hub asked for patience: try again by ourselves, not before
                    self._changed.wait_for(lambda: self._closed, pause)
                    self._wanted = True
                self._busy = False
                self._changed.notify_all()
            if not failed:
                for snapshot in mine.snapshots:
                    shutil.rmtree(snapshot, ignore_errors=True)

    def _commit(self, wanted: _Publication) -> str:
        """Everything in one commit: what is new, the list of our files, and the removal of what we no longer publish."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        with _quiet():
            api = HfApi(endpoint=self._endpoint, token=self._token)
            api.create_repo(self.repo_id, private=self._private, exist_ok=True)
            there = set(api.list_repo_files(self.repo_id))
            ours = self._ours(api, there)
            additions: dict[str, Path | bytes] = {}
            for part, files in (("pipeline", wanted.pipeline), ("state", wanted.state)):
                if files is not None:
                    additions.update(files)
                    ours[part] = sorted(files)
            additions[MANIFEST] = json.dumps({"files": ours}, indent=1).encode()
            stale = sorted((there & self._former) - set(ours["pipeline"]) - set(ours["state"]) - {MANIFEST})
            operations: list[Any] = [CommitOperationDelete(path, is_folder=False) for path in stale]
            operations += [CommitOperationAdd(path, content) for path, content in sorted(additions.items())]
            return str(api.create_commit(self.repo_id, operations, commit_message=wanted.message).oid)

    def _ours(self, api: Any, there: set[str]) -> dict[str, list[str]]:
        """The files of former publications, by part."""
        empty: dict[str, list[str]] = {"pipeline": [], "state": []}
        self._former: set[str] = set()
        if MANIFEST not in there:
            return empty
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:
            text = Path(api.hf_hub_download(self.repo_id, MANIFEST, local_dir=scratch)).read_text(encoding="utf-8")
        try:
            listed = json.loads(text)["files"]
            found = {part: [path for path in listed.get(part, []) if isinstance(path, str)] for part in empty}
        except (ValueError, KeyError, TypeError, AttributeError):
            return empty
        self._former = {path for paths in found.values() for path in paths}
        return found

    def _warn(self, error: Exception) -> None:
        self.failures += 1
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = _without_tokens(text, self._token)
        log.warning("hub: not published to %s (%s); %s", self.repo_id, text[:300], self._again)


def _without_tokens(text: str, *known: str | None) -> str:
    """A message of the client or the hub, without the tokens that are in use and all that look like one."""
    from huggingface_hub import get_token

    for secret in (*known, get_token()):
        text = text.replace(secret, "***") if secret else text
    return _TOKEN.sub("hf_***", text)


def _retry_after(error: Exception) -> float | None:
    """Seconds that a 429 or 503 answer asks to wait (at most ten minutes); None for all else."""
    response = getattr(error, "response", None)
    if getattr(response, "status_code", None) not in (429, 503):
        return None
    try:
        return min(max(float(response.headers["Retry-After"]), 1.0), 600.0)  # type: ignore[union-attr]
    except (KeyError, ValueError):
        return None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the upload across the one of the training."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def is_hub_id(where: str) -> bool:
    """Whether a text can only be a repository: `user/name`, for `--resume` with `@revision` too, and nothing here of that name."""
    path = Path(where).expanduser()
    return where.count("/") == 1 and not where.startswith((".", "~")) and not path.is_absolute() and not path.exists()


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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    name, _, pinned = repo_id.partition("@")
    revision = revision or pinned or None
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=f"{STATE}/*", token=token, endpoint=endpoint, cache_dir=cache_dir)
        )
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UserError(f"--resume {repo_id}: no such folder, and no such repository or revision on the hub (or it is private).") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--resume {repo_id}: cannot be downloaded ({_without_tokens(reason, token)[:200]}).") from None
    found = sorted((folder / STATE).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2] or 0))
    if not found:
        raise UserError(f"--resume {repo_id}: the repository holds no training state; it is published with output.push_state: true.")
    return found[-1]
