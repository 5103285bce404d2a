"""What a run leaves behind: checkpoints, the best weights, the result. All processes call; the main one writes."""

import contextlib
import logging
import shutil
from pathlib import Path

import torch

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import TEMPORARY, atomic_folder, disk_errors
from sslsr_diffusion.training.checkpoints import MANIFEST, prune_checkpoints, read_checkpoint, write_checkpoint
from sslsr_diffusion.training.job import CheckpointWritten, Run
from sslsr_diffusion.training.reporting import plot_losses
from sslsr_diffusion.training.state import full_tensor, load_trained

logger = logging.getLogger(__name__)


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint; a failure costs a warning or the run, by the recipe's policy, never the checkpoints before."""
    job, session, folder, step = run.job, run.session, run.folder, run.session.progress.step
    tensors, state = session.state_dict(run.loader.state_dict())
    unsound = next((name for name, value in tensors["trained"].items() if not torch.isfinite(value).all()), None)
    if unsound:  # resuming from it could only fail, and pruning would cost a good one
        if session.main:
            logger.warning("no checkpoint at step %d: the weights are not finite any more (%s)", step, unsound)
        return
    errors = []
    if session.main:
        target = folder.path / f"checkpoint-{step}"
        try:
            write_checkpoint(target, tensors, {**state, "recipe": job.recipe, "base": job.base})
            if job.publisher is not None:  # also tries again what could not be published before
                job.publisher.checkpoint(target if job.output.push_state else None)
            prune_checkpoints(folder.path, job.checkpoints.keep, step)
        except OSError as error:
            errors.append(f"checkpoint at step {step} could not be written ({error}); the earlier ones are untouched")
            logger.warning("%s", errors[0])
        else:
            run.tell(CheckpointWritten(step, job.training.steps, target))
    errors = session.gather(errors)
    if errors and job.checkpoints.on_failure == "stop":
        raise UserError(f"{errors[0]}. checkpoints.on_failure is stop, so the run ends here.")


def keep_best(run: Run, value: float) -> bool:
    """Write best/; whether it is on disk, the same answer on all processes."""
    job, session, folder = run.job, run.session, run.folder
    tensors = {name: full_tensor(parameter) for name, parameter in session.parameters.items()}
    step, errors = session.progress.step, []
    if session.main:
        state = {"progress": {"step": step, "best": value}, "recipe": job.recipe, "base": job.base}
        try:
            write_checkpoint(folder.best, {"trained": tensors}, state)
        except OSError as error:
            logger.warning("the best weights could not be kept: %s", error)
            errors.append(str(error))
    return not session.gather(errors)


def publish_best(run: Run) -> None:
    """Offer the weights that have just become the best to the hub, with what validation says of them."""
    job, folder, step = run.job, run.folder, run.session.progress.step
    if run.session.main and job.publisher is not None:
        target = folder.path / f"{TEMPORARY}publish"  # the publisher links the files, so the folder may go at once
        try:
            target.mkdir()
            with disk_errors():
                job.task.save(target)
            job.publisher.publish(target, f"Best so far, step {step}", files=_card(run, step))
        except OSError as error:
            logger.warning("the best weights are kept, but could not be prepared for the hub: %s", error)
        shutil.rmtree(target, ignore_errors=True)


def write_result(run: Run) -> Path:
    """The result, the loss curves, the last publication."""
    job, session, folder = run.job, run.session, run.folder
    best = job.output.pipeline == "best" and (folder.best / MANIFEST).is_file()
    if best:
        load_trained(session.parameters, read_checkpoint(folder.best).tensors["trained"], what=str(folder.best))
        weights: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        published = session.progress.step if session.progress.best_step is None else session.progress.best_step
    else:
        weights, published = session.averaged(), session.progress.step
        if job.output.pipeline == "best" and session.main:
            logger.warning("output.pipeline is best, and no weights became the best: the result holds the last ones")
    job.task.module.eval()
    source = folder.best if best else folder.path / f"checkpoint-{session.progress.step}"
    try:
        if session.main and session.sharded:  # no process holds whole weights; a checkpoint does
            job.export(source, folder.pipeline)
        elif session.main:
            with weights, atomic_folder(folder.pipeline) as new:
                job.task.save(new)
    except OSError as error:
        raise UserError(
            f"training is done, but its pipeline could not be written ({error}). The weights are safe in {source}: "
            f"make room, then `sslsr export {source} --output {folder.pipeline}`."
        ) from error
    if session.main:
        try:
            plot_losses(folder.history(), folder.path / "loss.png")
        except Exception as error:  # a picture of the run is not worth its end
            logger.warning("loss.png could not be drawn (%s: %s)", type(error).__name__, error)
    if session.main and job.publisher is not None:
        job.publisher.publish(folder.pipeline, f"Step {published}", files=_card(run, published))
        run.stop.release()  # everything is on the disk: a signal need not wait for the hub
        job.publisher.close()
    session.barrier()
    return folder.pipeline


def _card(run: Run, step: int) -> dict[str, Path | bytes]:
    """The model card, with the numbers and sample pictures of the newest validation pass up to the published step, and the base."""
    if run.job.card is None:
        return {}
    measured = [row for row in run.folder.validations() if row["step"] <= step]
    shown = {
        int(number): path for path in run.folder.pictures.glob("step-*.png") if (number := path.stem.removeprefix("step-")).isdecimal()
    }
    pictures = [shown[number] for number in sorted(shown) if number <= step]
    base = {f"validation_base/{name}": value for name, value in run.session.progress.looks.base.items()}
    return run.job.card({**base, **measured[-1]} if measured else {}, pictures[-1:])
