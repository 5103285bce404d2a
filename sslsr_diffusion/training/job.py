"""What the loop is given, what it tells whoever started it (on the main process only), and what it says at the end."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from sslsr_diffusion.losses import Loss
from sslsr_diffusion.tasks.task import Task
from sslsr_diffusion.training.processes import StopRequest
from sslsr_diffusion.training.reporting import Reporter
from sslsr_diffusion.training.run_folder import RunFolder
from sslsr_diffusion.training.session import Session
from sslsr_diffusion.training.settings import CheckpointSettings, OutputSettings, TrainingSettings
from sslsr_diffusion.training.validation import Validation
from sslsr_diffusion.types import Batch


class Publisher(Protocol):
    """Sends folders to a hub in the background and never raises."""

    def publish(self, folder: Path, message: str, *, files: Mapping[str, Path | bytes] | None = None) -> None: ...
    def checkpoint(self, folder: Path | None = None) -> None: ...
    def close(self) -> bool: ...


class Loader(Protocol):
    """This process's batches, without end, from where its state says."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def problems(self) -> list[str]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """A run, built: objects and callables, so that the loop knows no models, data or hub."""

    task: Task
    losses: list[Loss]
    training: TrainingSettings
    checkpoints: CheckpointSettings
    output: OutputSettings
    open_data: Callable[[int, int, dict[str, Any] | None, torch.device], Loader]  # rank, world_size, state, device
    export: Callable[[Path, Path], object]  # checkpoint folder, result folder: what `task.save` writes, from a checkpoint, on a CPU
    recipe: dict[str, Any]  # resolved, kept in the run folder and in every checkpoint
    seed: int = 0
    base: dict[str, Any] = field(default_factory=dict)  # id and revision of what was fine-tuned
    validation: Validation | None = None
    publisher: Publisher | None = None
    card: Callable[[dict[str, float], list[Path]], dict[str, Path | bytes]] | None = None  # metrics, pictures -> files beside the result


@dataclass(frozen=True)
class StepDone:
    """One optimizer step; `values` by the names of history.jsonl (`loss/total`, `train/lr`, ...), not numbers where it was skipped."""

    step: int
    total: int
    values: dict[str, float]


@dataclass(frozen=True)
class Validated:
    """One validation pass, the first at step 0; `values` and `bicubic` are means by metric, `best` says whether it is the best so far."""

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
    """The end, unless an error ended it: `stopped` says why it came early, `result` is the folder of the result (None: asked to stop)."""

    step: int
    total: int
    stopped: str | None
    result: Path | None


Event = StepDone | Validated | CheckpointWritten | Finished


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    run: Path
    step: int
    stopped: str | None  # why it stopped early (asked to, or by validation.patience), or None
    best: float | None
    pipeline: Path | None  # the result, unless it was asked to stop
    problems: list[str]


@dataclass(frozen=True)
class Run:
    """A job while it runs."""

    job: Job
    session: Session
    folder: RunFolder
    loader: Loader
    stop: StopRequest
    reporter: Reporter
    tell: Callable[[Event], None]
