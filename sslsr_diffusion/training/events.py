"""What a run tells whoever started it (Python, command line, page), on its main process only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepDone:
    """One optimizer step; `values` by the names of history.jsonl (`loss/total`, `train/lr`, ...), not numbers where it was skipped."""

    step: int
    total: int
    values: dict[str, float]


@dataclass(frozen=True)
class Validated:
    """One validation pass; `values` and `bicubic` are means by metric, `best` says whether these weights became the best."""

    step: int
    total: int
    values: dict[str, float]
    bicubic: dict[str, float]
    best: bool


@dataclass(frozen=True)
class CheckpointWritten:
    """A whole checkpoint that `resume` can go on from."""

    step: int
    total: int
    folder: Path


@dataclass(frozen=True)
class Finished:
    """The end, unless an error ended it: `stopped` says why it came early, else `result` is the folder of the result."""

    step: int
    total: int
    stopped: str | None
    result: Path | None


Event = StepDone | Validated | CheckpointWritten | Finished
