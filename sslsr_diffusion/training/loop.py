"""The training loop: build everything, load, then step, report, look, save, until done or asked to stop."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any, Protocol

import torch

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import TEMPORARY, atomic_folder, disk_errors
from sslsr_diffusion.losses import Loss
from sslsr_diffusion.tasks.task import Task as Objective
from sslsr_diffusion.training.checkpoints import (
    find_checkpoint,
    latest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from sslsr_diffusion.training.plots import plot_losses
from sslsr_diffusion.training.preflight import check_precision, check_trackers
from sslsr_diffusion.training.process_failure import lost_process_explained
from sslsr_diffusion.training.reporting import Reporter
from sslsr_diffusion.training.resume import agree_on_best, check_same_recipe, check_same_step, data_state
from sslsr_diffusion.training.run_folder import RunFolder
from sslsr_diffusion.training.session import Session
from sslsr_diffusion.training.settings import CheckpointSettings, OutputSettings, TrainingSettings
from sslsr_diffusion.training.state import give_trained, whole
from sslsr_diffusion.training.stop import StopWatch
from sslsr_diffusion.training.validation import Validation, ValidationResult, validate

logger = logging.getLogger(__name__)


class Publisher(Protocol):
    """Sends folders to a hub in the background and never raises."""

    def publish(self, folder: Path, message: str, *, files: Mapping[str, Path | bytes] | None = None) -> None: ...
    def checkpoint(self, folder: Path | None = None) -> None: ...
    def close(self) -> bool: ...


@dataclass(frozen=True)
class Job:
    """A run, built: objects and callables, so that the loop knows no models, data or hub."""

    objective: Objective
    losses: list[Loss]
    training: TrainingSettings
    checkpoints: CheckpointSettings
    output: OutputSettings
    open_data: Callable[[int, int, dict[str, Any] | None, torch.device], Any]  # rank, world_size, state, device -> TrainingLoader
    save_pipeline: Callable[[Path], None]  # write the networks' present weights as a folder
    export: Callable[[Path, Path], Any]  # checkpoint folder, pipeline folder: the same from a checkpoint, on a CPU
    recipe: dict[str, Any]  # resolved, kept in the run folder and in every checkpoint
    seed: int = 0
    base: dict[str, Any] = field(default_factory=dict)  # id and revision of what was fine-tuned
    validation: Validation | None = None
    publisher: Publisher | None = None
    card: Callable[[dict[str, float], list[Path]], dict[str, Path | bytes]] | None = None  # metrics, pictures -> files beside the pipeline


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    run: Path
    step: int
    stopped: str | None  # why it stopped early, or None
    best: float | None
    pipeline: Path | None
    problems: list[str]


def fit(job: Job, *, resume: str | None = None, allow_recipe_change: bool = False) -> FitResult:
    """Train until the last step or until asked to stop; `resume` is `latest`, a checkpoint or a run folder.

    Raises:
        UserError: the checkpoint does not fit, the numbers went wrong too often (a checkpoint is left behind), or another
            process of the run is gone.
    """
    settings, folder = job.training, RunFolder(Path(job.output.dir))
    check_trackers(job.output.trackers)
    checkpoint_path = find_checkpoint(resume, folder.path) if resume else None
    session = Session(job.objective, job.losses, settings, seed=job.seed, trackers=job.output.trackers, run=folder.path)
    check_precision(settings.mixed_precision, session.device)
    with lost_process_explained(session.world_size, folder.path):
        result = _train(job, session, folder, checkpoint_path, allow_recipe_change)
    session.close()
    return result


def _train(job: Job, session: Session, folder: RunFolder, checkpoint_path: Path | None, allow_recipe_change: bool) -> FitResult:
    """What `fit` does once all processes are there."""
    settings = job.training
    position = None if checkpoint_path is None else _give(job, session, checkpoint_path, allow_recipe_change)
    progress = session.progress
    if session.main and session.sharded and job.validation is not None:
        logger.warning("the weights are divided among the processes (FSDP): validation is left out, so no weights are chosen as the best")
    if session.main:
        folder.start(job.recipe, progress.step)
    session.barrier()
    if checkpoint_path is not None:
        agree_on_best(progress, folder.best, job.recipe)
    loader = job.open_data(session.rank, session.world_size, position, session.device)
    with StopWatch() as watch, Reporter(session, folder, settings, resumed=checkpoint_path) as reporter:
        try:
            stopped = _loop(job, session, folder, loader, watch, reporter)
            if stopped is None:
                pipeline = _finish(job, session, folder, watch)
            else:
                pipeline = None
                reporter.say(f"stopped at step {progress.step} of {settings.steps}: {stopped}; --resume latest goes on")
            problems = session.gather(loader.problems())
        finally:
            loader.close()
        reporter.problems(problems)
    return FitResult(folder.path, progress.step, stopped, progress.best, pipeline, problems)


def _give(job: Job, session: Session, path: Path, allow_recipe_change: bool) -> dict[str, Any]:
    """Put a checkpoint's state into the session; where this process's data goes on."""
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint.state:
        raise UserError(f"--resume: {path} holds weights alone, no state to go on from; give a checkpoint-N folder or latest.")
    check_same_recipe(checkpoint.state, job.recipe, session.world_size, allow=allow_recipe_change)
    session.give(checkpoint, what=str(path))
    check_same_step(session.gather([session.progress.step]))
    return data_state(checkpoint.state, session.rank, session.world_size, job.training.batch_size, allow=allow_recipe_change)


def _loop(job: Job, session: Session, folder: RunFolder, loader: Any, watch: StopWatch, reporter: Reporter) -> str | None:
    """Steps until the end (None) or a reason to stop."""
    settings, progress = job.training, session.progress
    batches: Iterator[Any] = iter(loader)
    saved_at = progress.step if progress.step else None
    if progress.step >= settings.steps and session.main and job.publisher is not None and job.output.push_state:
        job.publisher.checkpoint(folder.path / f"checkpoint-{progress.step}")  # its upload may have been cut off with the run
    if progress.step and any(session.gather([session.main and not folder.validated(progress.step)])):
        _look_if_due(job, session, folder, watch, reporter)  # the run was stopped before it came to this
    while progress.step < settings.steps:
        began = time.perf_counter()
        report = session.step([next(batches) for _ in range(settings.accumulate)], stop=watch.reason() is not None)
        progress.seconds += time.perf_counter() - began
        reporter.step(report, time.perf_counter() - began)

        stopped = (watch.reason() or "another process was asked to stop") if session.stop_asked else None
        failed = progress.skipped_in_a_row >= settings.non_finite_limit
        done = progress.step >= settings.steps
        if stopped or failed or _due(progress.step, job.checkpoints.every, done):
            _save(job, session, folder, loader)  # before the look, whose troubles then cost no training
            saved_at = progress.step
        if not stopped and not failed:
            _look_if_due(job, session, folder, watch, reporter)
        if failed:
            where = latest_checkpoint(folder.path) or "no checkpoint yet"
            raise UserError(
                f"training stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row had a loss or gradient that is "
                f"not a number (loss {report.loss:g}). The weights of the last good step are in {where}. "
                f"Lower training.optimizer.lr, use mixed_precision bf16 or no instead of fp16, or set max_grad_norm."
            )
        if stopped and not done:
            return stopped
    if saved_at != progress.step:
        _save(job, session, folder, loader)
    return None


def _due(step: int, every: int, done: bool) -> bool:
    return done or (every > 0 and step % every == 0)


def _look_if_due(job: Job, session: Session, folder: RunFolder, watch: StopWatch, reporter: Reporter) -> None:
    step = session.progress.step
    if job.validation is not None and not session.sharded and _due(step, job.validation.settings.every, step >= job.training.steps):
        _look(job, session, folder, watch, reporter)


def _look(job: Job, session: Session, folder: RunFolder, watch: StopWatch, reporter: Reporter) -> None:
    """Validate the averaged weights, and keep them when they are the best so far."""
    assert job.validation is not None
    progress = session.progress
    session.objective.module.eval()
    with session.averaged():
        result: ValidationResult | None = validate(
            job.validation,
            rank=session.rank,
            world_size=session.world_size,
            gather=session.gather,
            should_stop=lambda: watch.reason() is not None,
        )
        if result is not None:
            reporter.looked(result)
            value = result.values.get(job.validation.settings.best)
            if value is not None and isnan(value):
                name = job.validation.settings.best
                logger.warning("validation.best: %s has no number for any held-out picture, so these weights cannot become the best", name)
            if value is not None and job.validation.better(value, progress.best) and _keep_best(job, session, folder, value):
                progress.best, progress.best_step = value, progress.step  # only now: the record never names weights that are not there
    session.objective.module.train()


def _keep_best(job: Job, session: Session, folder: RunFolder, value: float) -> bool:
    """Write best/ and offer it to the hub; whether it is on disk, the same answer on all processes."""
    tensors = {name: whole(parameter) for name, parameter in session.parameters.items()}
    step, errors = session.progress.step, []
    if session.main:
        state = {"progress": {"step": step, "best": value}, "recipe": job.recipe, "base": job.base}
        try:
            write_checkpoint(folder.best, {"trained": tensors}, state)
        except OSError as error:
            logger.warning("the best weights could not be kept: %s", error)
            errors.append(str(error))
    if session.gather(errors):
        return False
    if session.main and job.publisher is not None:
        target = folder.path / f"{TEMPORARY}publish"  # the publisher links the files, so the folder may go at once
        try:
            target.mkdir()
            with disk_errors():
                job.save_pipeline(target)
            job.publisher.publish(target, f"Best so far, step {step}", files=_card(job, folder, step))
        except OSError as error:
            logger.warning("the best weights are kept, but could not be prepared for the hub: %s", error)
        shutil.rmtree(target, ignore_errors=True)
    return True


def _save(job: Job, session: Session, folder: RunFolder, loader: Any) -> None:
    """Write a checkpoint; a failure costs a warning or the run, by the recipe's policy, never the checkpoints before."""
    tensors, state = session.take(loader.state_dict())
    unsound = next((name for name, value in tensors["trained"].items() if not torch.isfinite(value).all()), None)
    if unsound:  # resuming from it could only fail, and pruning would cost a good one
        if session.main:
            logger.warning("no checkpoint at step %d: the weights are not finite any more (%s)", session.progress.step, unsound)
        return
    error = None
    if session.main:
        target = folder.path / f"checkpoint-{session.progress.step}"
        try:
            write_checkpoint(target, tensors, {**state, "recipe": job.recipe, "base": job.base})
            if job.publisher is not None:  # also tries again what could not be published before
                job.publisher.checkpoint(target if job.output.push_state else None)
            prune_checkpoints(folder.path, job.checkpoints.keep, session.progress.step)
        except OSError as reason:
            error = f"checkpoint at step {session.progress.step} could not be written ({reason}); the earlier ones are untouched"
            logger.warning("%s", error)
    errors = [e for e in session.gather([error]) if e]
    if errors and job.checkpoints.on_failure == "stop":
        raise UserError(f"{errors[0]}. checkpoints.on_failure is stop, so the run ends here.")


def _finish(job: Job, session: Session, folder: RunFolder, watch: StopWatch) -> Path:
    """The final pipeline, the loss curves, the last publication."""
    best = job.output.pipeline == "best" and (folder.best / "manifest.json").is_file()
    if best:
        give_trained(session.parameters, read_checkpoint(folder.best).tensors["trained"], what=str(folder.best))
        weights: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        published = session.progress.best_step or session.progress.step
    else:
        weights, published = session.averaged(), session.progress.step
    session.objective.module.eval()
    source = folder.best if best else folder.path / f"checkpoint-{session.progress.step}"
    try:
        if session.main and session.sharded:  # no process holds whole weights; a checkpoint does
            job.export(source, folder.pipeline)
        elif session.main:
            with weights, atomic_folder(folder.pipeline) as new:
                job.save_pipeline(new)
        if session.main:
            plot_losses(folder.history(), folder.path / "loss.png")
    except OSError as error:
        raise UserError(
            f"training is done, but its pipeline could not be written ({error}). The weights are safe in {source}: "
            f"make room, then `sslsr export {source} --output {folder.pipeline}`."
        ) from error
    if session.main and job.publisher is not None:
        job.publisher.publish(folder.pipeline, f"Step {published}", files=_card(job, folder, published))
        watch.let_go()  # everything is on the disk: a signal need not wait for the hub
        job.publisher.close()
    session.barrier()
    return folder.pipeline


def _card(job: Job, folder: RunFolder, step: int) -> dict[str, Path | bytes]:
    """The model card, with the numbers and sample pictures of the newest validation pass up to the published step."""
    if job.card is None:
        return {}
    measured = [row for row in folder.history() if row["step"] <= step and any(key.startswith("validation/") for key in row)]
    pictures = [picture for picture in sorted(folder.pictures.glob("step-*.png")) if int(picture.stem.removeprefix("step-")) <= step]
    return job.card(measured[-1] if measured else {}, pictures[-1:])
