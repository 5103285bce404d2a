"""What a run starts from, as its recipe records it, so that it goes on from the same: commits of hub ids, call defaults of its base,
what `auto` was."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sslsr_diffusion.devices import training_device, training_precision
from sslsr_diffusion.hub import Kind, commit_of, is_hub_id, repository_of, split_file
from sslsr_diffusion.runs.recipe import Recipe, resolved
from sslsr_diffusion.training.checkpoints import STATE

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def pinned(recipe: Recipe, checkpoint: Path | None = None) -> Recipe:
    """The recipe with the commit of every hub id (base model, data sets) as its revision, and going on, with the call defaults of then
    and what `auto` was.

    A revision that is a commit already stays. Else the commit that the recipe in `checkpoint` has at the same place for the same
    id; without one, today's. An id whose commit cannot be found out is left as it is, and a warning says so.
    What `task.inference` leaves to the base is what `checkpoint` was measured with, whatever the base says by now.

    `checkpoint`: the folder that the run goes on from.
    """
    before = recorded_state(checkpoint).get("recipe") if checkpoint else None
    if before:
        recipe = _with_call_defaults(recipe, _at(before, "task.inference"))
        recipe = with_precision(recipe, training_device(), _at(before, "training").get("mixed_precision"))
    changes: dict[str, str] = {}
    for place, kind, name, revision in _hub_ids(recipe):
        if _COMMIT.fullmatch(revision or ""):
            continue
        recorded = _at(before, place)
        commit = recorded.get("revision") if recorded.get("base" if kind == "model" else "path") == name else None
        if checkpoint is not None and not _COMMIT.fullmatch(str(commit)):
            continue  # nothing was recorded: the recipe must stay what it was
        commit = commit or commit_of(split_file(name)[0] if kind == "model" else name, kind, revision)
        if commit is None:
            log.warning("%s: its commit cannot be found out now, so the run is not bound to it", name)
            continue
        log.info("%s: commit %s%s", name, commit, " as in the checkpoint" if checkpoint else "")
        changes[place] = commit
    return _with_revisions(recipe, changes) if changes else recipe


def with_precision(recipe: Recipe, device: torch.device, recorded: str | None = None) -> Recipe:
    """The recipe with what `training.mixed_precision: auto` was in the run that it goes on with, or else is on this device."""
    if recipe.training.mixed_precision != "auto":
        return recipe
    found = recorded or training_precision(device)
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"mixed_precision": found})})


def _hub_ids(recipe: Recipe) -> Iterator[tuple[str, Kind, str, str | None]]:
    """(place in the recipe, kind, id, revision)."""
    source = recipe.family.source(recipe.model)
    if source is not None and repository_of(source) is not None:
        yield "model", "model", source, recipe.model.revision
    for key in ("sources", "validation"):
        for index, source in enumerate(getattr(recipe.data, key)):
            if source.kind == "hub" and is_hub_id(source.path):
                yield f"data.{key}.{index}", "dataset", source.path, source.revision


def recorded_state(checkpoint: Path) -> dict[str, Any]:
    """What stands in a checkpoint beside its tensors; empty for a damaged one, which is reported by whoever reads it whole."""
    try:
        found = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _at(tree: Any, place: str) -> Mapping[str, Any]:
    for key in place.split("."):
        if isinstance(tree, list):
            tree = tree[int(key)] if int(key) < len(tree) else None
        else:
            tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def _with_call_defaults(recipe: Recipe, before: Mapping[str, Any]) -> Recipe:
    """Those that the recipe names none of."""
    call = getattr(recipe.task, "inference", None)
    if call is None:
        return recipe
    left = {key: before[key] for key in type(call).model_fields if getattr(call, key) is None and key in before}
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"inference": call.model_copy(update=left)})})


def _with_revisions(recipe: Recipe, changes: Mapping[str, str]) -> Recipe:
    raw = resolved(recipe)
    for place, commit in changes.items():
        _at(raw, place)["revision"] = commit  # type: ignore[index]  # our own plain data
    return Recipe.model_validate(raw)
