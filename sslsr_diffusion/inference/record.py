"""What an output folder remembers of how its pictures were made: one JSON line per event, so a crash costs at most the last."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

RECORD_NAME = ".sslsr-infer.jsonl"


class Record:
    """The events of one output folder; the last one of each output counts.

    `begin` is written before the picture and `finish` after it: one without the other was interrupted and is done again.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / RECORD_NAME
        self._last: dict[str, dict[str, Any]] = {}
        for line in self.file.read_bytes().splitlines() if self.file.exists() else ():
            try:
                event = json.loads(line)
            except ValueError:  # cut off by a crash
                continue
            if isinstance(event, dict) and isinstance(event.get("output"), str):
                self._last[event["output"]] = event

    def knows(self, output: str) -> bool:
        return output in self._last

    def is_done(self, output: str, settings: str, source: Path, target: Path) -> bool:
        """Was `output` finished from the same bytes with the same settings, and is all of it still in its file `target`?

        Hashes only if the source's size or time differ.
        """
        event = self._last.get(output, {})
        if event.get("state") != "done" or event.get("settings") != settings or event.get("bytes") != target.stat().st_size:
            return False
        status = source.stat()
        if [status.st_size, status.st_mtime_ns] == event.get("stat"):
            return True
        return sha256(source) == event.get("input")

    def source(self, output: str) -> str | None:
        """The file that `output` was made from."""
        return self._last.get(output, {}).get("source")

    def begin(self, output: str, source: Path) -> None:
        self._append({"output": output, "state": "begun", "source": str(source.resolve())})

    def finish(self, output: str, settings: str, source: Path, input_hash: str, stat: os.stat_result, size: int) -> None:
        known = {"settings": settings, "input": input_hash, "stat": [stat.st_size, stat.st_mtime_ns], "bytes": size}
        self._append({"output": output, "state": "done", "source": str(source.resolve()), **known})

    def _append(self, event: dict[str, Any]) -> None:
        # one write of one line, begun on a fresh line: several processes may share the folder, and one may have been cut off
        line = b"\n" + json.dumps(event).encode() + b"\n"  # ASCII: surrogates of odd names survive as \udc..
        with self.file.open("ab", buffering=0) as file:
            file.write(line)
        self._last[event["output"]] = event


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
