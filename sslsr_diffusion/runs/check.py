"""`--dry-run`: the resolved recipe, a line per check, parameters and memory on the meta device; no weights are read."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import yaml

from sslsr_diffusion import hub
from sslsr_diffusion.data.sources import open_source
from sslsr_diffusion.devices import device_bytes, training_device
from sslsr_diffusion.errors import MissingDependency, Refused, UserError
from sslsr_diffusion.inference.open import find_model
from sslsr_diffusion.losses import LOSSES
from sslsr_diffusion.models.base import IGNORED, WANTED
from sslsr_diffusion.runs.memory import describe_memory, describe_parameters
from sslsr_diffusion.runs.pin import pinned, recorded_state, with_precision
from sslsr_diffusion.runs.presets import Preset, describe_presets
from sslsr_diffusion.runs.recipe import Recipe, resolved, run_folder
from sslsr_diffusion.runs.start import check_one_way, check_patience, check_stands_elsewhere, lacking_metrics, validation_metric
from sslsr_diffusion.runs.task import build_task
from sslsr_diffusion.shipped_model import local_folder
from sslsr_diffusion.tasks.task import Task
from sslsr_diffusion.training.checkpoints import find_checkpoint, published_step
from sslsr_diffusion.training.processes import check_precision, check_trackers, slow_precision
from sslsr_diffusion.training.resume import check_same_recipe
from sslsr_diffusion.training.run_folder import RunFolder

Verdict = Literal["ok", "missing", "refused", "not reachable"]


class Check(NamedTuple):
    what: str
    verdict: Verdict
    detail: str


def dry_run(
    recipe: Recipe,
    say: Callable[[str], None],
    *,
    presets: Mapping[int, Preset] = MappingProxyType({}),
    memory_budget: int | None = None,
    resume: str | None = None,
    restart: bool = False,
    allow_recipe_change: bool = False,
) -> bool:
    """Say everything about a run that can be known without starting it; False if something that the recipe asks for is not there or
    cannot be used.

    Args:
        presets: of the recipe, by GB of a card.
        memory_budget: bytes that the run may take; None: what the device has.
        resume: what the run would go on from: `latest`, a checkpoint, a run folder or a hub id.
        restart: whether an earlier run in the output folder would be moved aside.
        allow_recipe_change: whether the run would go on from a checkpoint of another recipe.
    """
    check_one_way(resume, restart)
    if restart:
        check_stands_elsewhere(recipe)
    say(yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True).rstrip())
    checks = []
    if resume is not None:
        checks.append(check_resume(recipe, resume, allow_recipe_change))
        recipe = _as_recorded(recipe, resume)
    checks = run_checks(recipe, empty=not restart, resumed=resume is not None) + checks
    built: list[Task] = []
    known = {check.detail for check in checks}  # a base that is not whole is said once
    checks += [check for check in _checked("task", lambda: _task(recipe, built), "refused") if check.detail not in known]
    say("\nchecks")
    for check in checks:
        say(f"  {check.what:<12} {check.verdict:<14} {check.detail}")
    for text in recipe.without_effect():
        say(f"  note: {text}")
    say("")
    available = memory_budget or device_bytes(training_device())
    for task in built:
        lines = [*describe_parameters(task), *describe_memory(recipe, available, savings=not presets)]
        for line in lines + (describe_presets(presets, available) if presets else []):
            say(line)
    if not built:
        say("parameters and memory cannot be counted")
    return all(check.verdict == "ok" for check in checks)


def run_checks(recipe: Recipe, *, empty: bool = True, resumed: bool = False) -> list[Check]:
    """Data, model, losses, metrics, optimizer, trackers and output; `empty`: the output folder must hold no run, unless it is `resumed`."""
    checks = [*_data(recipe), *_model(recipe), *_losses(recipe)]
    for what, say, verdict in (
        ("teacher", _teacher, "missing"),
        ("metrics", _metrics, "missing"),
        ("patience", _patience, "refused"),
        ("precision", lambda recipe: _precision(recipe, resumed), "refused"),
        ("optimizer", _optimizer, "missing"),
        ("trackers", _trackers, "missing"),
        ("output", lambda recipe: _output(recipe, empty and not resumed), "refused"),
    ):
        checks += _checked(what, lambda say=say: say(recipe), verdict)  # type: ignore[misc, arg-type]  # bound in this round
    return checks


def _checked(what: str, say: Callable[[], str | None], verdict: Verdict = "missing") -> list[Check]:
    """What a check says; none where it has nothing to say, and `verdict` where it raises an error that has none of its own."""
    try:
        said = say()
    except hub.HubError as error:
        verdicts: dict[str, Verdict] = {"unreachable": "not reachable", "gated": "refused", "refused": "refused"}
        return [Check(what, verdicts.get(error.reason, "missing"), error.said)]
    except (UserError, MissingDependency, OSError) as error:
        said = "; ".join(line.strip() for line in str(error).splitlines())
        return [Check(what, "refused" if isinstance(error, Refused) else verdict, said)]
    return [Check(what, "ok", said)] if said else []


def _data(recipe: Recipe) -> Iterator[Check]:
    looked = recipe.validation.limit
    if not recipe.data.sources:
        yield Check("data", "missing", "data.sources is empty; give at least one source")
    if not looked or not recipe.data.validation:
        none = "none: validation.limit is 0" if recipe.data.validation else "none asked for" if looked else ""
        yield from _checked("validation", lambda: none)
    for what, sources in (("data", recipe.data.sources), ("validation", recipe.data.validation if looked else [])):
        for source in sources:
            yield from _checked(what, lambda what=what, source=source: _source(source, looked if what == "validation" else None))  # type: ignore[misc]


def _patience(recipe: Recipe) -> None:
    """Whether there are enough held-out pictures; those on the hub are counted when training starts."""
    count = 0
    for source in recipe.data.validation:
        if _elsewhere(source):
            return
        with contextlib.suppress(OSError, UserError):  # that was said
            count += len(open_source(source))
    check_patience(recipe, count)


def _elsewhere(source: Any) -> bool:
    return source.kind == "hub" or "://" in str(source.path)


def _source(source: Any, limit: int | None) -> str:
    if _elsewhere(source):
        return _on_hub(str(source.path), getattr(source, "revision", None), "dataset")
    opened = open_source(source)
    said = f"{source.kind} {source.path}: {len(opened)} pictures"
    if limit is not None and limit < len(opened):
        said += f", {limit} of all are measured (validation.limit)"
    return said + (f"; {len(opened.lost)} left out, the first: {opened.lost[0]}" if opened.lost else "")


def _model(recipe: Recipe) -> Iterator[Check]:
    source, files = recipe.family.source(recipe.model), recipe.family.check_files(recipe.model)
    if source is not None and hub.repository_of(source) is not None:
        files["model"] = lambda: _on_hub(source, recipe.model.revision, "model")
    for key, check in files.items():
        yield from _checked(key, check)


def _task(recipe: Recipe, built: list[Task]) -> str | None:
    """Build the task from shapes alone, which checks the crop; say what the recipe leaves to the base."""
    task = build_task(recipe, meta=True)
    built.append(task)
    call = getattr(recipe.task, "inference", None)
    source = recipe.family.source(recipe.model)
    if call is None or task.restorer is None or source is None or not local_folder(source).exists():  # it was not read
        return None
    left = [key for key in type(call).model_fields if getattr(call, key) is None and key in task.restorer.defaults]
    said = ", ".join(f"{key} {task.restorer.defaults[key]:g}" for key in left)
    return f"the recipe leaves to the base: {said}" if left else None


def _on_hub(name: str, revision: str | None, kind: hub.Kind) -> str:
    """Whether a hub id, or a file of one, is cached, or exists as far as the network can tell; asks for no files. Raises HubError."""
    if "://" in name:
        return f"{name} (a URL; it is opened when training starts)"
    where, file = hub.split_file(name) if kind == "model" else (name, None)
    patterns = [file] if file else ["*.json", *WANTED] if kind == "model" else []
    folder = hub.cached(where, revision, patterns=patterns, ignore=IGNORED, kind=kind)
    if folder and (file is None or (folder / file).is_file()):
        return f"{name} (in the local cache)"
    found = hub.look_up(where, kind, revision)
    if file is not None and file not in found.files:
        raise UserError(f"{where} on the hub holds no file {file}")
    return f"{name} on the hub, commit {found.commit[:12]}; it is downloaded when training starts"


def _losses(recipe: Recipe) -> Iterator[Check]:
    for loss in recipe.losses:
        yield from _checked("losses", lambda loss=loss: LOSSES[loss.kind].check(loss))  # type: ignore[misc]  # bound in this round


def _teacher(recipe: Recipe) -> str | None:
    model = recipe.data.teacher
    if model is None:
        return None
    return _on_hub(model, None, "model") if hub.repository_of(model) is not None else str(find_model(model).path)


def _optimizer(recipe: Recipe) -> str | None:
    if recipe.training.optimizer.kind != "adamw8bit":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependency("adamw8bit needs: pip install 'sslsr-diffusion[adam8bit]'")
    return "bitsandbytes"


def _precision(recipe: Recipe, resumed: bool) -> str | None:
    asked, device = recipe.training.mixed_precision, training_device()
    check_precision(asked, device)
    if slow := slow_precision(asked, device, resumed=resumed):
        return slow
    if resumed:  # of a run on the hub it is not known here
        return "auto: what the run began with" if asked == "auto" else "float32" if asked == "no" else asked
    chosen = with_precision(recipe, device).training.mixed_precision
    arithmetic = "bf16" if chosen == "bf16" else "float32, the faster one"
    return f"auto: {arithmetic} on this device" if asked == "auto" else None


def _metrics(recipe: Recipe) -> str | None:
    names = recipe.validation.metrics if recipe.validation.limit else ()
    for name in names:
        validation_metric(name)
    lacking = lacking_metrics(recipe, download=False) if names and recipe.data.validation else {}
    if lacking:
        raise MissingDependency("; ".join(lacking.values()))
    return ", ".join(names)


def _trackers(recipe: Recipe) -> str:
    check_trackers(recipe.output.trackers)
    return ", ".join(recipe.output.trackers)


def _output(recipe: Recipe, empty: bool) -> str:
    path = standing = run_folder(recipe)
    while not standing.exists() and standing != standing.parent:
        standing = standing.parent
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise UserError(f"{path}: {standing} is not a folder that can be written")
    if empty:
        RunFolder(path).check_free()
    return str(path)


def check_resume(recipe: Recipe, where: str, allow_recipe_change: bool = False) -> Check:
    """Whether there is a whole checkpoint to go on from, on this machine or on the hub, and whether this recipe may."""
    if hub.is_hub_id(where, revision=True):
        return _checked("resume", lambda: _published_state(where))[0]
    found = _checked("resume", lambda: str(find_checkpoint(where, run_folder(recipe))))[0]
    if found.verdict != "ok":
        return found
    return _checked("resume", lambda: _continued(recipe, Path(found.detail), allow_recipe_change), "refused")[0]


def _as_recorded(recipe: Recipe, where: str) -> Recipe:
    """The recipe with what `auto` was in the checkpoint that it goes on from, where that is on this machine."""
    if hub.is_hub_id(where, revision=True):
        return recipe
    with contextlib.suppress(UserError):  # that was said
        recorded = recorded_state(find_checkpoint(where, run_folder(recipe))).get("recipe", {})
        return with_precision(recipe, training_device(), recorded.get("training", {}).get("mixed_precision"))
    return recipe


def _continued(recipe: Recipe, folder: Path, allow_recipe_change: bool) -> str:
    state = recorded_state(folder)
    if "world_size" not in state:
        raise UserError(f"{folder} holds weights alone, no state to go on from")
    check_same_recipe(state, resolved(pinned(recipe, folder)), state["world_size"], allow=allow_recipe_change)
    return f"{folder}, step {state['progress']['step']} of {recipe.training.steps}"


def _published_state(where: str) -> str:
    """Whether a repository of the hub holds the state of a run; nothing is downloaded."""
    name, revision = hub.split_id(where)
    there = hub.look_up(name, revision=revision)
    step = published_step(there.files)
    if step is None:
        raise UserError(f"{where}: the repository holds no training state; output.push_state: true publishes it")
    return f"{where} on the hub, commit {there.commit[:12]}, step {step}; downloaded when training starts"
