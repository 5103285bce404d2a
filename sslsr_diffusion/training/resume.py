"""What may change in a recipe between a checkpoint and its continuation, and what may not."""

import logging
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.state import Progress

logger = logging.getLogger(__name__)

# Changing these leaves samples, numbers and tensors of the steps to come well-defined.
_OF_TRAINING = (
    *("steps", "log_every", "non_finite_limit", "spike_factor"),
    *("cpu_threads", "tf32", "gradient_checkpointing", "channels_last", "compile"),
)
_OF_DATA = ("workers", "prefetch", "start_method", "validation")
CHANGEABLE = {f"training.{key}" for key in _OF_TRAINING} | {f"data.{key}" for key in _OF_DATA}
CHANGEABLE |= {"task.inference", "task.sampling_steps", "validation", "checkpoints", "output"}
# Changing these makes another number of the metric that chooses best/, or other weights that may not become it.
_MEASURING = ("best", "refuse", "size", "limit", "seed")
MEASURED_BY = {"task.inference", "task.sampling_steps", "data.validation"} | {f"validation.{key}" for key in _MEASURING}

WHOLE_RUN = {"linear", "cosine", "cosine_with_restarts", "polynomial"}  # schedules whose curve depends on training.steps


def differences(before: Any, now: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Key path -> (value then, value now) of everything that differs; a missing key counts as None."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return {} if before == now else {path: (before, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*before, *now]):
        found |= differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    return found


def check_same_recipe(state: Mapping[str, Any], recipe: Mapping[str, Any], world_size: int, *, allow: bool) -> None:
    """List what changed since the checkpoint; UserError where that makes the run no continuation, unless `allow`."""
    found = differences(state["recipe"], recipe)
    if _samples_per_step(state["recipe"], state["world_size"]) == _samples_per_step(recipe, world_size):
        found.pop("training.batch_size", None)
        found.pop("training.accumulate", None)
    elif state["world_size"] != world_size:
        found["number of processes"] = (state["world_size"], world_size)
    lines = [f"{key}: {before!r} -> {now!r}" for key, (before, now) in found.items()]
    refused = [line for key, line in zip(found, lines) if not _under(key, CHANGEABLE)]
    if refused and not allow:
        raise UserError(
            "--resume: the recipe is not the one of the checkpoint:\n  "
            + "\n  ".join(refused)
            + "\nUse the recipe of the run folder, or --allow-recipe-change to go on all the same (the run is then no exact continuation)."
        )
    for line in lines:
        logger.warning("recipe changed since the checkpoint: %s", line)
    kind = recipe.get("training", {}).get("schedule", {}).get("kind")
    if "training.steps" in found and kind in WHOLE_RUN:
        logger.warning(
            "the %s schedule reaches over the whole run: with training.steps %s -> %s the learning rate goes on another curve from here",
            *(kind, *found["training.steps"]),
        )


def check_same_step(steps: Sequence[int]) -> None:
    """UserError when the processes found different checkpoints to go on from."""
    if len(set(steps)) > 1:
        raise UserError(
            f"--resume: the processes found checkpoints of different steps ({', '.join(map(str, steps))} by rank); "
            "expected output.dir on a file system that all machines share."
        )


def measured_otherwise(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys by which two recipes' validation passes cannot be compared."""
    return [key for key in differences(before, now) if _under(key, MEASURED_BY)]


def agree_on_best(progress: Progress, best: Path, recipe: Mapping[str, Any]) -> None:
    """Let the record of the best value say what lies in best/, which may be newer than the checkpoint, damaged or measured otherwise."""
    if not best.exists():  # for example a run that goes on from the hub: what was published stays the best
        return
    try:
        state = read_checkpoint(best).state
        progress.best, progress.best_step = float(state["progress"]["best"]), int(state["progress"]["step"])
        changed = measured_otherwise(state["recipe"], recipe)
        trouble = f"value so far was measured otherwise ({', '.join(changed)} changed)" if changed else None
    except (UserError, KeyError, TypeError, ValueError) as error:
        trouble = f"weights so far cannot be used ({error})"
    if trouble:
        logger.warning("the best %s; the next validation chooses anew", trouble)
        progress.best = progress.best_step = None


def data_state(state: Mapping[str, Any], rank: int, world_size: int, batch_size: int, *, allow: bool) -> dict[str, Any]:
    """Where this process's data goes on; on another number of processes the global sample index decides.

    UserError where a pool or a stream is divided among the processes and cannot be divided anew, unless `allow`.
    """
    positions, before = state["data"], int(state["recipe"]["training"]["batch_size"])
    if state["world_size"] == world_size and before == batch_size:
        return dict(positions[rank])
    position = positions[0]
    if (position.get("pool") or position.get("streams")) and not allow:
        raise UserError(
            f"--resume: a pool or a stream was divided among {state['world_size']} processes; go on with as many and the same batch size, "
            f"or --allow-recipe-change to start it anew."
        )
    per_batch = world_size * batch_size
    return {"batch": -(-int(position["batch"]) * state["world_size"] * before // per_batch)}


def _samples_per_step(recipe: Mapping[str, Any], world_size: int) -> int | None:
    training = recipe.get("training", {})
    try:
        return int(training["batch_size"]) * int(training["accumulate"]) * world_size
    except (KeyError, TypeError, ValueError):
        return None


def _under(key: str, roots: Set[str]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)
