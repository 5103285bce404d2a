"""The training loop: build everything, load, then step, report, save, validate, until done or asked to stop."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from math import isnan
from pathlib import Path
from typing import Any

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.compiled import eagerly
from sslsr_diffusion.training.checkpoints import find_checkpoint, latest_checkpoint, read_checkpoint
from sslsr_diffusion.training.job import Event, Finished, Job, Run, StepDone, TrainResult, Validated
from sslsr_diffusion.training.looks import Looks
from sslsr_diffusion.training.outputs import keep_best, publish_best, save_checkpoint, write_result
from sslsr_diffusion.training.processes import (
    StopRequest,
    check_one_precision,
    check_precision,
    check_trackers,
    lost_process_explained,
    slow_precision,
)
from sslsr_diffusion.training.reporting import Reporter
from sslsr_diffusion.training.resume import agree_on_best, check_same_recipe, check_same_step, data_state, measured_otherwise
from sslsr_diffusion.training.run_folder import PICTURES, RunFolder
from sslsr_diffusion.training.session import Session, StepReport
from sslsr_diffusion.training.validation import Validation, validate

logger = logging.getLogger(__name__)


def train_job(
    job: Job,
    *,
    resume: str | None = None,
    restart: bool = False,
    allow_recipe_change: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> TrainResult:
    """Train until the last step or until asked to stop.

    Args:
        resume: `latest`, a checkpoint or a run folder to go on from.
        restart: move what stands in the output folder aside, once everything is there that the run needs.
        on_event: gets what happens as it happens, on the main process; what it raises ends the run and comes out here.
    Raises UserError: the checkpoint does not fit, the numbers went wrong too often (a checkpoint is left behind), or a process is gone.
    """
    settings, folder = job.training, RunFolder(Path(job.output.dir))
    check_trackers(job.output.trackers)
    checkpoint = find_checkpoint(resume, folder.path) if resume else None
    session = Session(job.task, job.losses, settings, seed=job.seed, trackers=job.output.trackers, run=folder.path)
    check_precision(settings.mixed_precision, session.device)
    if session.main and (slow := slow_precision(settings.mixed_precision, session.device, resumed=resume is not None)) is not None:
        logger.warning("%s", slow)
    tell = on_event if on_event is not None and session.main else lambda event: None
    with lost_process_explained(session.world_size, folder.path):
        result = _train(job, session, folder, checkpoint, restart, allow_recipe_change, tell)
    session.close()
    tell(Finished(result.step, settings.steps, result.stopped, result.pipeline))
    return result


def _train(
    job: Job,
    session: Session,
    folder: RunFolder,
    checkpoint: Path | None,
    restart: bool,
    allow_recipe_change: bool,
    tell: Callable[[Event], None],
) -> TrainResult:
    """What `train_job` does once all processes are there."""
    check_one_precision(session.gather([job.training.mixed_precision]))
    position = None if checkpoint is None else _load(job, session, folder, checkpoint, allow_recipe_change)
    progress = session.progress
    if session.main and session.sharded and job.validation is not None:
        left = "validation is left out, so no weights are chosen as the best and no patience ends the run"
        logger.warning("the weights are divided among the processes (FSDP): %s", left)
    with closing(job.open_data(session.rank, session.world_size, position, session.device)) as loader:
        if session.main:
            if restart:
                folder.move_aside()  # only now: what is wrong or missing leaves the earlier run where it is
            folder.start(job.recipe, -1 if checkpoint is None else progress.step)  # what begins anew has no row 0 yet
        session.barrier()
        if checkpoint is not None:
            agree_on_best(progress, folder.best, job.recipe)
        with StopRequest() as stop, Reporter(session, folder, job.training, resumed=checkpoint) as reporter:
            run = Run(job, session, folder, loader, stop, reporter, tell)
            asked = _steps(run)
            stopped = asked or (_worn_out(run) if progress.step < job.training.steps else None)
            if stopped is not None:
                onward = "; --resume latest goes on" if asked else ""
                reporter.say(f"stopped at step {progress.step} of {job.training.steps}: {stopped}{onward}")
            result = _finish(run) if asked is None else None
            problems = session.gather(loader.problems())
            reporter.problems(problems)
    return TrainResult(folder.path, progress.step, stopped, progress.best, result, problems)


def _finish(run: Run) -> Path:
    """The result, and what the run was worth."""
    progress, validation = run.session.progress, run.job.validation
    verdict = progress.looks.verdict(validation.settings.best, progress.best_step) if validation is not None else None
    if verdict is not None and run.session.main:
        logger.warning("%s", verdict)
    return write_result(run)


def _load(job: Job, session: Session, folder: RunFolder, path: Path, allow_recipe_change: bool) -> dict[str, Any]:
    """Load a checkpoint into the session; where this process's data goes on."""
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint.state:
        raise UserError(f"--resume: {path} holds weights alone, no state to go on from; give a checkpoint-N folder or latest.")
    check_same_recipe(checkpoint.state, job.recipe, session.world_size, allow=allow_recipe_change)
    session.load_state_dict(checkpoint, what=str(path))
    check_same_step(session.gather([session.progress.step]))
    _recall_looks(job, session, folder, checkpoint.state["recipe"])
    return data_state(checkpoint.state, session.rank, session.world_size, job.training.batch_size, allow=allow_recipe_change)


def _recall_looks(job: Job, session: Session, folder: RunFolder, before: dict[str, Any]) -> None:
    """Of looks that were measured otherwise nothing holds; a look at this step that came after its checkpoint is in the history."""
    progress = session.progress
    if measured_otherwise(before, job.recipe):
        progress.looks = Looks()
        return
    rows = session.gather([row for row in folder.validations() if row["step"] == progress.step] if session.main else [])
    if rows and job.validation is not None and progress.looks.newest != progress.step:
        means = {key.removeprefix("validation/"): mean for key, mean in rows[-1].items() if key.startswith("validation/")}
        progress.looks.add(progress.step, means, rows[-1].get(PICTURES, []), higher_is_better=job.validation.best_is_higher)


def _steps(run: Run) -> str | None:
    """Steps until the end (None) or until somebody asks to stop (why)."""
    job, session, settings, progress = run.job, run.session, run.job.training, run.session.progress
    batches = iter(run.loader)
    saved_at = progress.step or None
    stopped = _catch_up(run)
    while stopped is None and not _enough(run):
        began = time.perf_counter()
        report = session.step([next(batches) for _ in range(settings.accumulate)], stop=run.stop.reason() is not None)
        progress.seconds += time.perf_counter() - began
        run.reporter.step(report)
        run.tell(StepDone(progress.step, settings.steps, {**report.values(), "train/lr": session.learning_rate()}))

        stopped = (run.stop.reason() or "another process was asked to stop") if session.stop_asked else None
        failed = progress.skipped_in_a_row >= settings.non_finite_limit
        if stopped or failed or _due(progress.step, job.checkpoints.every, progress.step >= settings.steps):
            save_checkpoint(run)  # before the validation, whose troubles then cost no training
            saved_at = progress.step
        if failed:
            raise _gone_wrong(run, report)
        stopped = stopped or _validate_if_due(run)
    if saved_at != progress.step:
        save_checkpoint(run)
    return stopped if progress.step < settings.steps else None


def _enough(run: Run) -> bool:
    return run.session.progress.step >= run.job.training.steps or _worn_out(run) is not None


def _worn_out(run: Run) -> str | None:
    """Why the run ends before its last step by its own rule."""
    if run.job.validation is None:
        return None
    settings = run.job.validation.settings
    return run.session.progress.looks.worn_out(settings.patience, settings.best)


def _due(step: int, every: int, done: bool) -> bool:
    return done or (every > 0 and step % every == 0)


def _catch_up(run: Run) -> str | None:
    """What has to be there before the next step: the look at this one, row 0, the upload of a last state. A reason to stop, if there is."""
    session, looks = run.session, run.session.progress.looks
    steps = {row["step"] for row in run.folder.validations()} if session.main else set()
    if session.main and looks.base and 0 not in steps:
        run.reporter.base_again(looks.base)
    stopped = _validate_if_due(run) if any(session.gather([session.main and session.progress.step not in steps])) else None
    if _enough(run) and session.main and run.job.publisher is not None and run.job.output.push_state:
        run.job.publisher.checkpoint(run.folder.path / f"checkpoint-{session.progress.step}")
    return stopped


def _gone_wrong(run: Run, report: StepReport) -> UserError:
    progress, where = run.session.progress, latest_checkpoint(run.folder.path) or "no checkpoint yet"
    return UserError(
        f"training stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row had a loss or gradient that is "
        f"not a number (loss {report.loss:g}). The weights of the last good step are in {where}. "
        f"Lower training.optimizer.lr, use mixed_precision bf16 or no instead of fp16, or set max_grad_norm."
    )


def _validate_if_due(run: Run) -> str | None:
    """Before the first step, every so often, and at the end; the reason to stop that cut it off, if one did."""
    job, session = run.job, run.session
    step, total = session.progress.step, job.training.steps
    if job.validation is None or session.sharded or not _due(step, job.validation.settings.every, step == 0 or step >= total):
        return None
    whole = _validate(run, job.validation)
    return run.stop.reason() if not whole and session.world_size == 1 else None


def _validate(run: Run, validation: Validation) -> bool:
    """Measure the averaged weights, and keep them when they are the best so far; whether the pass came to its end."""
    job, session, progress, name = run.job, run.session, run.session.progress, validation.settings.best
    job.task.module.eval()
    with session.averaged(), eagerly(job.task.networks):  # held-out pictures have sizes of their own, each would be worth a graph
        result = validate(
            validation,
            job.task,
            rank=session.rank,
            world_size=session.world_size,
            gather=session.gather,
            should_stop=lambda: run.stop.reason() is not None,
            label=None if progress.step else "step 0",
        )
        if result is not None:
            value = result.values.get(name)
            if value is not None and isnan(value):
                logger.warning("validation.best: %s has no number for any held-out picture, so these weights cannot become the best", name)
            refusals = validation.refusals(result.values)
            best = value is not None and validation.better(value, progress.best) and not refusals and keep_best(run, value)
            if best:
                progress.best, progress.best_step = value, progress.step  # only now: the record never names weights that are not there
            if refusals and session.main:
                logger.warning("step %d: these weights cannot become the best: %s", progress.step, "; ".join(refusals))
            progress.looks.add(progress.step, result.values, result.deciding, higher_is_better=validation.best_is_higher)
            run.reporter.validated(result)  # after best/: what is in the history is not done again when the run goes on
            if best and progress.step:
                publish_best(run)
            run.tell(Validated(progress.step, job.training.steps, result.values, result.bicubic, best))
    job.task.module.train()
    return result is not None
