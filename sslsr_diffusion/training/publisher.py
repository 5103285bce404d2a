"""Publishing while training goes on: one thread, one commit per publication, and a hub that is down costs a warning."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sslsr_diffusion.hub import STATE, Repository, without_tokens

log = logging.getLogger(__name__)

MANIFEST = "sslsr.json"  # which files of a repository are ours, so that only ours are ever deleted


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

    `publish` and `checkpoint` take hard links of the files (beside the folder) and return at once; they never raise. What could not be
    published is tried again at the next call of either, the newest state of things only, and once more by `close`.

    Args:
        repo_id: `user/name`; made if it is not there.
        token: a write token; None: the one that `hf auth login` stored.
        private: whether a newly made repository is private.
        endpoint: of another hub than the default.
    """

    def __init__(self, repo_id: str, *, token: str | None = None, private: bool = True, endpoint: str | None = None) -> None:
        self.repo_id = repo_id
        self.published: list[str] = []  # commit ids, oldest first
        self.failures = 0
        self._again = "tried again at the next checkpoint"
        self._token, self._private = token, private
        self._repository = Repository(repo_id, token=token, endpoint=endpoint)
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
        snapshot = folder.with_name(f".publishing-{os.getpid()}-{self._number}")
        for leftover in folder.parent.glob(".publishing-*"):  # of a run that was killed
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
            failed: Exception | None = None
            try:
                self.published.append(self._commit(mine))
                log.info("hub: published to %s: %s", self.repo_id, mine.message)
            except Exception as error:  # a refused upload is never worth a run
                failed = error
                self._warn(error)
            with self._changed:
                if failed:
                    self._waiting = self._waiting.over(mine) if self._waiting else mine
                if (
                    pause := getattr(failed, "retry_after", None)
                ) is not None:  # the hub asked for patience: try again by ourselves, not before
                    self._changed.wait_for(lambda: self._closed, pause)
                    self._wanted = True
                self._busy = False
                self._changed.notify_all()
            if not failed:
                for snapshot in mine.snapshots:
                    shutil.rmtree(snapshot, ignore_errors=True)

    def _commit(self, wanted: _Publication) -> str:
        """Everything in one commit: what is new, the list of our files, and the removal of what we no longer publish."""
        self._repository.create(private=self._private)
        there = self._repository.files()
        ours = self._ours(there)
        former = {path for paths in ours.values() for path in paths}
        additions: dict[str, Path | bytes] = {}
        for part, files in (("pipeline", wanted.pipeline), ("state", wanted.state)):
            if files is not None:
                additions.update(files)
                ours[part] = sorted(files)
        additions[MANIFEST] = json.dumps({"files": ours}, indent=1).encode()
        stale = (there & former) - set(ours["pipeline"]) - set(ours["state"]) - {MANIFEST}
        return self._repository.commit(wanted.message, additions, stale)

    def _ours(self, there: set[str]) -> dict[str, list[str]]:
        """The files of former publications, by part."""
        text = self._repository.read(MANIFEST) if MANIFEST in there else ""
        try:
            listed = json.loads(text)["files"]
            return {part: [path for path in listed.get(part, []) if isinstance(path, str)] for part in ("pipeline", "state")}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"pipeline": [], "state": []}

    def _warn(self, error: Exception) -> None:
        self.failures += 1
        text = without_tokens(next(iter(str(error).strip().splitlines()), type(error).__name__), self._token)
        log.warning("hub: not published to %s (%s); %s", self.repo_id, text[:300], self._again)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
