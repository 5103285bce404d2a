"""Results of one image at a time, appended as they come: an interrupted evaluation continues where it was."""

import json
from pathlib import Path
from typing import NamedTuple

from sslsr_diffusion.errors import UserError


class Key(NamedTuple):
    """What a number depends on: the files' contents and the metric with its whole convention (border, channels, weights)."""

    restored: str  # SHA-256 of the file
    reference: str  # SHA-256 of the file that it is compared with, or ""
    metric: str
    convention: str


class ResultStore:
    """Key -> value and the seconds it took, kept in a file of JSON lines."""

    def __init__(self, path: Path):
        self._known: dict[Key, tuple[float | str, float]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8", errors="replace")
            self._file.seek(0)
            text = self._file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output.") from None
        for line in text.splitlines():
            try:
                row = json.loads(line)
                self._known[Key(*(row[name] for name in Key._fields))] = (row["value"], float(row["seconds"]))
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the last run was stopped
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def __contains__(self, key: Key) -> bool:
        return key in self._known

    def value(self, key: Key) -> float | str:
        return self._known[key][0]

    def seconds(self, key: Key) -> float:
        return self._known[key][1]

    def put(self, key: Key, value: float | str, seconds: float) -> None:
        self._known[key] = (value, seconds)
        self._file.write(json.dumps({**key._asdict(), "value": value, "seconds": round(seconds, 5)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
