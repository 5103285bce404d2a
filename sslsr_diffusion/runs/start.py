"""From a recipe to a run, from a name to an upscaler: what Python, the command line and the page call."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.data import open_training_data, open_validation_pairs
from sslsr_diffusion.devices import device_bytes, is_out_of_memory, training_device
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.metrics import METRICS, unavailable
from sslsr_diffusion.evaluation.statistics import LEAST
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.losses import build_losses
from sslsr_diffusion.runs.pin import pinned, with_precision
from sslsr_diffusion.runs.recipe import Recipe, load_recipe, resolved, run_folder
from sslsr_diffusion.runs.task import build_task, export_checkpoint, means_of
from sslsr_diffusion.runs.teacher import TaughtLoader, Teacher
from sslsr_diffusion.tasks.task import Task
from sslsr_diffusion.training.checkpoints import find_checkpoint
from sslsr_diffusion.training.job import Event, Job, Loader, Publisher, TrainResult
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.run_folder import RunFolder
from sslsr_diffusion.training.validation import Pair, Validation

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe | str | Path,
    *,
    resume: str | None = None,
    restart: bool = False,
    allow_recipe_change: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> TrainResult:
    """Train as a recipe says, until its last step or until asked to stop (SIGINT, SIGTERM).

    Args:
        recipe: a Recipe (`load_recipe`), a recipe file, or the name of a shipped one.
        resume: go on from `latest`, a checkpoint folder, a run folder, or a hub id with a published state.
        restart: move an earlier run in the output folder aside and begin anew.
        allow_recipe_change: go on from a checkpoint of another recipe all the same.
        on_event: called with what happens (steps, validations, checkpoints), on the main process.
    Raises:
        UserError: something of the recipe is wrong or missing, the checkpoint does not fit, memory ran out (the message says what would
            save some), or the numbers went wrong too often.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    check_one_way(resume, restart)
    if restart:
        check_stands_elsewhere(recipe)
    main = int(os.environ.get("RANK", "0")) == 0
    folder = RunFolder(run_folder(recipe))
    for text in recipe.without_effect() if main else ():
        logger.warning("%s", text)
    if resume is None and main and not restart:
        folder.check_free()
    checkpoint = find_checkpoint(resume, folder.path) if resume is not None else None
    recipe = pinned(recipe, checkpoint)
    try:
        job = build_job(recipe, publisher=_publisher(recipe) if main else None)
        onward = str(checkpoint) if checkpoint else None
        return train_job(job, resume=onward, restart=restart, allow_recipe_change=allow_recipe_change, on_event=on_event)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_memory_advice(recipe, error)) from None


def check_one_way(resume: str | None, restart: bool) -> None:
    """UserError where a run would both go on and begin anew."""
    if restart and resume is not None:
        raise UserError("restart begins anew and resume goes on; choose one of them.")


def check_stands_elsewhere(recipe: Recipe) -> None:
    """UserError where something that the run begins from lies in the folder that `restart` moves aside."""
    folder = run_folder(recipe).resolve()
    for key, value in _texts(resolved(recipe)):
        if os.path.exists(value) and folder in Path(value).resolve().parents:
            raise UserError(f"restart: {key} is {value}, in the run that would be moved aside; choose another output.dir for the new one.")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key path, value) of every text in nested dicts and lists."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(part, f"{key}.{name}" if key else str(name))


def open_upscaler(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    compile: bool = False,
) -> Restorer:
    """A model, ready to be called: `open_upscaler("runs/mine")(image, scale=4).images[0]`.

    Args:
        model: a run or result folder, a hub id, the shipped model's name, or a file of a family that reads files; None: the newest
            finished run in runs/, else the shipped model.
        revision: branch, tag or commit of a hub id.
        device: "auto" (the first GPU, else the CPU) or a torch device.
        dtype: "auto", "float32", "float16" or "bfloat16"; see `inference.open.open_model`.
        memory_budget: bytes, or a text such as "8GB", for model and work together.
        compile: have torch.compile make the networks faster; the first call of each size waits for it.
    Raises:
        UserError: there is no such model, its files are damaged, the device is not there, or nothing can be compiled here.
        NotEnoughMemory: nothing fits the budget.
    """
    from sslsr_diffusion.devices import parse_bytes
    from sslsr_diffusion.inference.open import default_model, find_model, open_model

    found = find_model(str(model) if model is not None else default_model(Path("runs"))[0], revision)
    budget = parse_bytes(memory_budget, "memory_budget") if isinstance(memory_budget, str) else memory_budget
    return open_model(found, device=device, dtype=dtype, memory_budget=budget, compile=compile)


def build_job(recipe: Recipe, *, publisher: Publisher | None = None) -> Job:
    """Task, data, losses and callables of a recipe, ready for `train_job`.
    Raises UserError: a part cannot be built (the message says which key and why).
    """
    task = build_task(recipe)
    recipe = with_precision(_with_defaults(recipe, task), training_device())

    losses = build_losses(recipe.losses, means_of(recipe, task))
    base = {"id": task.networks.base, "revision": task.networks.revision}
    trained_with = {loss.name for loss in losses}
    return Job(
        task=task,
        losses=losses,
        training=recipe.training,
        checkpoints=recipe.checkpoints,
        output=recipe.output,
        open_data=partial(open_data, recipe),
        export=export_checkpoint,
        recipe=resolved(recipe),
        seed=recipe.seed,
        base=base,
        validation=_validation(recipe),
        publisher=publisher if recipe.task_kind.makes_upscaler else None,
        card=_card(recipe, base, trained_with) if publisher is not None else None,
    )


def open_data(recipe: Recipe, rank: int, world_size: int, state: dict[str, Any] | None, device: torch.device) -> Loader:
    """A process's training data, as its teacher sees them where there is one; `state`: of an earlier loader, to go on there."""
    loader = open_training_data(
        recipe.data,
        crop_size=recipe.training.crop_size,
        scale=recipe.scale,
        seed=recipe.seed,
        batch_size=recipe.training.batch_size,
        rank=rank,
        world_size=world_size,
        state=state,
        device=device,
    )
    data = recipe.data
    if data.teacher is None:
        return loader
    teacher = Teacher.open(data.teacher, device=device, scale=recipe.scale, seed=recipe.seed, anchor=data.teacher_anchor)
    return TaughtLoader(loader, teacher, data, seed=recipe.seed)


def _with_defaults(recipe: Recipe, task: Task) -> Recipe:
    """What the base says today is written down, so that neither a resume nor an export depends on what it says then."""
    call = getattr(recipe.task, "inference", None)
    if call is None or task.restorer is None:
        return recipe
    own = {key: task.restorer.defaults[key] for key in type(call).model_fields if key in task.restorer.defaults}
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"inference": call.model_copy(update=own)})})


def _validation(recipe: Recipe) -> Validation | None:
    settings = recipe.validation
    pairs: Sequence[Pair] = ()
    if settings.limit:
        pairs = open_validation_pairs(recipe.data, crop_size=settings.size, scale=recipe.scale, seed=settings.seed, limit=settings.limit)
    if not pairs:
        return None
    metrics = {name: validation_metric(name) for name in settings.metrics}
    for name, said in lacking_metrics(recipe).items():
        logger.warning("validation goes without %s", said)
        del metrics[name]
    deciding = [("best", settings.best), *(("refuse", name) for name in settings.refuse)]
    lacking = [f"{key}: {name}" for key, name in deciding if name not in metrics]
    if lacking and recipe.output.pipeline == "best":
        raise UserError(
            f"output.pipeline: best needs validation.{lacking[0]}, which cannot be measured here (see the warning above, or "
            "--dry-run); mend that, take another of validation.metrics, or set output.pipeline: last."
        )
    check_patience(recipe, len(pairs))
    if settings.patience is not None and settings.best not in metrics:
        raise UserError(
            f"validation.patience needs validation.best: {settings.best}, which cannot be measured here (see the warning above, or "
            "--dry-run); mend that, take another of validation.metrics, or leave patience out."
        )
    higher = {name: METRICS[name].higher_is_better for name in metrics}
    return Validation(pairs, metrics, settings, higher)


def check_patience(recipe: Recipe, pictures: int) -> None:
    """UserError for fewer held-out pictures than it takes to tell progress from noise."""
    if recipe.validation.patience is not None and pictures < LEAST:
        raise UserError(
            f"validation.patience: expected {LEAST} held-out pictures or more, to tell progress from noise, got {pictures}; "
            "add some to data.validation, or leave patience out."
        )


def validation_metric(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(restored, hr, lr), [B, 3, H, W] or [B, 3, h, w] in [0, 1] -> [B]; UserError for a name that cannot be measured per picture."""
    metric = METRICS.get(name)
    if metric is None or metric.whole_set:
        usable = [key for key, entry in METRICS.items() if not entry.whole_set]
        raise UserError(f"validation.metrics: {name!r} cannot be measured per picture; expected some of {', '.join(usable)}.")
    return lambda restored, hr, lr: metric.fn(restored, metric.against(hr, lr), crop_border=0, y_channel=False)


def lacking_metrics(recipe: Recipe, *, download: bool = True) -> dict[str, str]:
    """Those of validation.metrics that cannot be computed here: name -> a sentence with what to do, and what a run does until then.

    No other metric takes the place of `validation.best`: it would choose other weights than the recipe says (PSNR the smoothest).
    """
    found = {name: unavailable(name, download=download) for name in recipe.validation.metrics}
    said = {name: f"{name}: {reason}" for name, reason in found.items() if reason is not None}
    instead = next((name for name in found if name not in said), None)
    best, refuse = recipe.validation.best, recipe.validation.refuse
    for name in said.keys() & {best, *refuse}:
        advice = f" (--set validation.best={instead} chooses by that)" if instead and name not in refuse else ""
        said[name] += f"; without it no weights are kept as the best{advice}"
    return said


def _publisher(recipe: Recipe) -> Publisher | None:
    if not recipe.output.push_to_hub:
        return None
    from sslsr_diffusion.training.publisher import HubPublisher

    assert recipe.output.hub_id is not None
    return HubPublisher(recipe.output.hub_id, private=recipe.output.private)


def _card(
    recipe: Recipe, base: dict[str, Any], trained_with: set[str]
) -> Callable[[dict[str, float], list[Path]], dict[str, Path | bytes]]:
    """The model card of this run, with the losses that it has: an optional one that could not be had is not among them."""
    from sslsr_diffusion.runs.model_card import card_files

    drawn = str(base.get("id", "")).startswith("random:")
    about = {"base": None if drawn else base.get("id"), "base_revision": base.get("revision")}
    recipe = recipe.model_copy(update={"losses": [loss for loss in recipe.losses if loss.called in trained_with]})
    return lambda metrics, pictures: card_files(metrics, pictures, repo_id=recipe.output.hub_id, recipe=resolved(recipe), **about)


def _memory_advice(recipe: Recipe, error: Exception) -> str:
    from sslsr_diffusion.runs.memory import describe_memory

    reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    advice = "\n".join(describe_memory(recipe, device_bytes(training_device())))
    onward = "go on with --resume latest (and --allow-recipe-change where it asks for that), or begin anew with --restart."
    return f"out of memory: {reason}\n{advice}\nChange one of these and {onward}"
