"""`--dry-run`: the resolved recipe, a line per check, parameters and memory on the meta device; no weights are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import yaml

from sslsr_diffusion import hub
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.models.base import IGNORED, WANTED
from sslsr_diffusion.runs.recipe import Recipe, resolved, run_folder
from sslsr_diffusion.runs.task import build_task
from sslsr_diffusion.shipped_model import local_folder
from sslsr_diffusion.tasks.task import Task

Verdict = Literal["ok", "missing", "refused", "not reachable"]


class Check(NamedTuple):
    what: str
    verdict: Verdict
    detail: str


def dry_run(
    recipe: Recipe, say: Callable[[str], None], *, resume: str | None = None, restart: bool = False, allow_recipe_change: bool = False
) -> bool:
    """Say everything about a run that can be known without starting it; False if something would keep it from running.

    Args:
        resume: what the run would go on from: `latest`, a checkpoint, a run folder or a hub id.
        restart: whether an earlier run in the output folder would be moved aside.
        allow_recipe_change: whether the run would go on from a checkpoint of another recipe.
    """
    from sslsr_diffusion.runs.memory import describe_memory, describe_parameters

    say(yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True).rstrip())
    checks = run_checks(recipe, empty=resume is None and not restart)
    if resume is not None:
        checks.append(check_resume(recipe, resume, allow_recipe_change))
    task, built = _task(recipe)
    checks += [built] if built is not None and built.detail not in {check.detail for check in checks} else []
    say("\nchecks")
    for check in checks:
        say(f"  {check.what:<12} {check.verdict:<14} {check.detail}")
    say("")
    for line in ["parameters and memory cannot be counted"] if task is None else [*describe_parameters(task), *describe_memory(recipe)]:
        say(line)
    return all(check.verdict == "ok" for check in checks)


def run_checks(recipe: Recipe, *, empty: bool = True) -> list[Check]:
    """Data, model and output, one entry each; `empty`: the output folder must hold no run."""
    checks = [
        *_data(recipe),
        *_model(recipe),
        _losses(recipe),
        _metrics(recipe),
        _optimizer(recipe),
        _trackers(recipe),
        _output(recipe, empty),
    ]
    return [check for check in checks if check is not None]


def _data(recipe: Recipe) -> list[Check | None]:
    from sslsr_diffusion.data.sources import open_source

    checks: list[Check | None] = []
    groups = [("data", recipe.data.sources)] + ([("validation", recipe.data.validation)] if recipe.validation.limit else [])
    if recipe.data.validation and not recipe.validation.limit:
        checks.append(Check("validation", "ok", "none: validation.limit is 0"))
    for what, sources in groups:
        if not sources:
            missing = what == "data"
            checks.append(
                Check(what, "missing", "data.sources is empty; give at least one source")
                if missing
                else Check(what, "ok", "none asked for")
            )
        for source in sources:
            if source.kind == "hub" or "://" in str(source.path):
                checks.append(_hub(what, str(source.path), getattr(source, "revision", None), "dataset"))
                continue
            try:
                opened = open_source(source)
                said = f"{source.kind} {source.path}: {len(opened)} pictures"
                if what == "validation" and recipe.validation.limit < len(opened):
                    said += f", {recipe.validation.limit} of all are measured (validation.limit)"
                if opened.lost:
                    said += f"; {len(opened.lost)} left out, the first: {opened.lost[0]}"
                checks.append(Check(what, "ok", said))
            except (UserError, MissingDependency, OSError) as error:
                checks.append(Check(what, "missing", str(error)))
    return checks


def _model(recipe: Recipe) -> list[Check | None]:
    family, source = recipe.family, recipe.family.source(recipe.model)
    checks: list[Check | None] = []
    for key, check in family.check_files(recipe.model).items():
        if key == "model" and source is not None and not local_folder(source).exists():
            checks.append(_hub(key, source, recipe.model.revision, "model"))
            continue
        try:
            checks.append(Check(key, "ok", check()))
        except UserError as error:
            checks.append(Check(key, "missing", _one_line(error)))
    return checks


def _task(recipe: Recipe) -> tuple[Task | None, Check | None]:
    """The task from shapes alone, and whether its networks can take the recipe's crop; what the base decides is said."""
    try:
        task = build_task(recipe, meta=True)
    except UserError as error:
        return None, Check("task", "refused", _one_line(error))
    call = getattr(recipe.task, "inference", None)
    if call is None or task.restorer is None:
        return task, None
    left = [key for key in type(call).model_fields if getattr(call, key) is None and key in task.restorer.defaults]
    said = ", ".join(f"{key} {task.restorer.defaults[key]:g}" for key in left)
    return task, Check("task", "ok", f"the recipe leaves to the base: {said}") if left else None


def _hub(what: str, name: str, revision: str | None, kind: hub.Kind) -> Check:
    """Whether a hub id is cached, or exists as far as the network can tell; asks for no files."""
    if "://" in name:
        return Check(what, "ok", f"{name} (a URL; it is opened when training starts)")
    patterns = ["*.json", *WANTED] if kind == "model" else []
    if hub.cached(name, revision, patterns=patterns, ignore=IGNORED, kind=kind):
        return Check(what, "ok", f"{name} (in the local cache)")
    try:
        commit = hub.look_up(name, kind, revision).commit
    except hub.HubError as error:
        return Check(what, _verdict(error), error.said)
    return Check(what, "ok", f"{name} on the hub, commit {commit[:12]}; it is downloaded when training starts")


def _verdict(error: hub.HubError) -> Verdict:
    verdicts: dict[hub.Reason, Verdict] = {"unreachable": "not reachable", "gated": "refused", "refused": "refused"}
    return verdicts.get(error.reason, "missing")


def _losses(recipe: Recipe) -> Check | None:
    for loss in recipe.losses:
        if loss.kind == "lpips":
            from sslsr_diffusion.evaluation.perceptual import unavailable

            reason, optional = unavailable(download=False), getattr(loss, "optional", False)
            if reason is None:
                return Check("losses", "ok", "lpips and its weights")
            return Check("losses", "ok" if optional else "missing", f"lpips {'(optional) ' if optional else ''}{reason}")
    return None


def _optimizer(recipe: Recipe) -> Check | None:
    if recipe.training.optimizer.kind != "adamw8bit":
        return None
    import importlib.util

    found = importlib.util.find_spec("bitsandbytes") is not None
    return Check(
        "optimizer", "ok" if found else "missing", "bitsandbytes" if found else "adamw8bit needs: pip install 'sslsr-diffusion[adam8bit]'"
    )


def _metrics(recipe: Recipe) -> Check | None:
    from sslsr_diffusion.runs.start import validation_metric

    if not recipe.validation.limit:
        return None
    try:
        for name in recipe.validation.metrics:
            validation_metric(name)
    except UserError as error:
        return Check("metrics", "missing", str(error))
    return Check("metrics", "ok", ", ".join(recipe.validation.metrics))


def _trackers(recipe: Recipe) -> Check | None:
    from sslsr_diffusion.training.preflight import check_trackers

    try:
        check_trackers(recipe.output.trackers)
    except (UserError, MissingDependency) as error:
        return Check("trackers", "missing", str(error))
    return Check("trackers", "ok", ", ".join(recipe.output.trackers)) if recipe.output.trackers else None


def _output(recipe: Recipe, empty: bool) -> Check:
    from sslsr_diffusion.training.run_folder import RunFolder

    path = run_folder(recipe)
    standing = path
    while not standing.exists() and standing != standing.parent:
        standing = standing.parent
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        return Check("output", "refused", f"{path}: {standing} is not a folder that can be written")
    if empty:
        try:
            RunFolder(path).check_free()
        except UserError as error:
            return Check("output", "refused", str(error))
    return Check("output", "ok", str(path))


def check_resume(recipe: Recipe, where: str, allow_recipe_change: bool = False) -> Check:
    """Whether there is a whole checkpoint to go on from, and whether this recipe may."""
    from sslsr_diffusion.runs.pin import pinned, recorded_state
    from sslsr_diffusion.training.checkpoints import find_checkpoint
    from sslsr_diffusion.training.resume import check_same_recipe

    if hub.is_hub_id(where, revision=True):
        return _published_state(where)
    try:
        folder = find_checkpoint(where, run_folder(recipe))
        state = recorded_state(folder)
        if "world_size" not in state:
            return Check("resume", "refused", f"{folder} holds weights alone, no state to go on from")
    except UserError as error:
        return Check("resume", "missing", _one_line(error))
    try:
        check_same_recipe(state, resolved(pinned(recipe, folder)), state["world_size"], allow=allow_recipe_change)
    except UserError as error:
        return Check("resume", "refused", _one_line(error))
    return Check("resume", "ok", f"{folder}, step {state['progress']['step']} of {recipe.training.steps}")


def _one_line(error: UserError) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines())


def _published_state(where: str) -> Check:
    """Whether a repository of the hub holds the state of a run; nothing is downloaded."""
    from sslsr_diffusion.training.published import published_step

    name, revision = hub.split_id(where)
    try:
        found = hub.look_up(name, revision=revision)
    except hub.HubError as error:
        return Check("resume", _verdict(error), error.said)
    step = published_step(found.files)
    if step is None:
        return Check("resume", "missing", f"{where}: the repository holds no training state; output.push_state: true publishes it")
    return Check("resume", "ok", f"{where} on the hub, commit {found.commit[:12]}, step {step}; downloaded when training starts")
