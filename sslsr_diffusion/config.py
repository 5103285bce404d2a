"""Closed settings models, and the reading of recipes.

A part of the project declares its settings class beside its code (a subclass of `Settings`) and enters both into its
dict; `recipe.py` assembles the schema. This file only knows how to read YAML and apply overrides.
"""

import difflib
import functools
import operator
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.mistakes import explain, shorten

S = TypeVar("S", bound="Settings")
LARGEST_RECIPE, DEEPEST_RECIPE = 20_000, 50  # values, levels
LARGEST_FILE = 1 << 20  # bytes
NO_RECIPES = ("accelerate",)  # folders of configs/ that hold something else
OF_THE_FILE = ("extends", "without", "presets")  # keys of a recipe file that are no section of the recipe


class Settings(BaseModel):
    """Base of every section of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _tell_keys(cls, given: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Under `parse`, note which keys the section may have: pydantic's errors do not say it."""
        if info.context is not None:
            info.context.setdefault(id(given), set()).update(cls.model_fields)
        return handler(given)


def one_of(kinds: Sequence[type[Settings]]) -> Any:
    """The type of a section that is one of several settings classes, told apart by their `kind`."""
    return Annotated[functools.reduce(operator.or_, kinds), Field(discriminator="kind")] if len(kinds) > 1 else kinds[0]


class RecipeError(UserError):
    """Something in a recipe is wrong; one line per mistake, each with the key's full path."""


def find_recipe(name: str) -> Path:
    """The recipe file for a path, or for the name of a recipe that ships with the package, such as tiny or folder/name.
    Raises RecipeError: there is no such file and no shipped recipe of that name (the message lists the nearest ones).
    """
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        kind = "a folder" if path.is_dir() else "no regular file" if path.exists() else None
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, holds a zero byte, or ~user of nobody
        raise RecipeError(f"recipe: {shorten(name)} cannot be a file ({getattr(error, 'strerror', None) or error}).") from None
    if kind is not None:
        raise RecipeError(f"recipe: {name!r} is {kind}; give a recipe file, or the name of a shipped recipe.")
    shipped, asked = shipped_recipes(), name.removesuffix(".yaml")
    if asked in shipped:
        return shipped[asked]
    full = {known.rpartition("/")[2]: known for known in shipped} | {known: known for known in shipped}
    alike = [full[found] for part in (asked, path.stem) for found in difflib.get_close_matches(part, full, n=3, cutoff=0.4)]
    near = [known for known in shipped if known.startswith(f"{asked}/")] or list(dict.fromkeys(alike))[:3] or list(shipped)
    raise RecipeError(f"recipe: no file {name!r} and no shipped recipe of that name; the nearest shipped ones: {', '.join(near)}.")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package; `folder/name` in a folder below."""
    folder = shipped_folder("configs")
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return {name: names[name] for name in sorted(names) if name.split("/")[0] not in NO_RECIPES}


def shipped_folder(name: str) -> Path:
    """`_name` in the wheel, or `name` beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    return here / f"_{name}" if (here / f"_{name}").is_dir() else here.parent / name


class _Loader(yaml.SafeLoader):
    """YAML without Python objects, in which the same key twice is an error instead of a silent overwrite."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            twice = key in seen
        except TypeError as error:
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark) from error
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands there twice", key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _weigh(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """How many values the node stands for when every alias is written out; a few lines can stand for billions.
    Raises ConstructorError: more than LARGEST_RECIPE, deeper than DEEPEST_RECIPE, or an anchor that contains itself.
    """
    if id(node) not in known:
        known[id(node)] = LARGEST_RECIPE + 1  # what its own inside would find: an anchor that contains itself
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = inside if isinstance(node, yaml.CollectionNode) else ()
        known[id(node)] = 1 + sum(_weigh(part, known, depth + 1) for part in parts)
    if known[id(node)] > LARGEST_RECIPE:
        raise yaml.constructor.ConstructorError(
            None, None, "with its aliases written out it has no end, or too many values", node.start_mark
        )
    if depth > DEEPEST_RECIPE:
        raise yaml.constructor.ConstructorError(None, None, "it is nested too deeply", node.start_mark)
    return known[id(node)]


def parse_yaml(text: str, source: str) -> Any:
    """Plain data from YAML text; RecipeError names `source`, line and reason."""
    loader = None
    try:
        loader = _Loader(text)  # refuses control characters at once
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise RecipeError(f"{source}: not valid YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, AttributeError, LookupError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{source}{where}: not valid YAML: {_yaml_reason(error)}.") from None


def _yaml_reason(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):  # AttributeError and KeyError come from !!timestamp and !!bool
        known = isinstance(error, yaml.YAMLError) and str(error)
        return str(error).splitlines()[0] if known else "a value does not fit its tag, or a number has too many digits"
    problem, context = str(error.problem or "cannot be read"), str(error.context or "")
    if "'\\t'" in problem:
        return f"{problem}; indent with spaces, not with tabs"
    return f"{context}, {problem}" if context.startswith("expected") else problem


def read_raw(path: Path, preset: str | None = None) -> dict[str, Any]:
    """The nested dict of a recipe file, with what it builds on, and with what its `preset` for a card of that size lays over it.

    `extends: ../other.yaml` (as seen from the file's own folder) is read first, and the file laid over it key by key; a list is
    replaced as a whole. Then `without: [self_similarity]` takes entries out of the `losses` that this gives, by their `name`, or by
    their `kind` where they have no name. So a file that gives `losses` and `without` takes from its own list, and what a parent
    took out stays out.
    Raises RecipeError: a file cannot be read, `extends` goes round in a circle, `without` names a loss that is not there, there is no
    preset for so small a card.
    """
    merged: dict[str, Any] = {}
    for file, raw in reversed(read_family(path)):
        kept = {key: section for key, section in merged.items() if not _another_kind(section, raw.get(key))}
        merged = overlay(kept, {key: value for key, value in raw.items() if key not in OF_THE_FILE})
        if "without" in raw:
            merged = _without(merged, raw["without"], file.name)
    return merged if preset is None else overlay(merged, _preset_for(preset, read_presets(path), path.name))


def read_presets(path: Path) -> dict[int, dict[str, Any]]:
    """GB of a card -> what to lay over the recipe for it, smallest first: the `presets` of this file, or of the next that it extends.
    Raises RecipeError: they are not of that form.
    """
    file, section = next(((file, raw["presets"]) for file, raw in read_family(path) if "presets" in raw), (path, {}))
    right = isinstance(section, dict) and all(_gigabytes(name) and isinstance(value, dict) for name, value in section.items())
    if not right:
        form = "sections by the memory of a card, for example {8gb: {training: {batch_size: 1}}}"
        raise RecipeError(f"{file.name}: presets: expected {form}, got {shorten(section)}.")
    return dict(sorted((_gigabytes(name), changes) for name, changes in section.items()))


def _gigabytes(name: Any) -> int:
    """12 of "12gb"; 0 of anything else."""
    found = re.fullmatch(r"([1-9]\d{0,3})gb", name) if isinstance(name, str) else None
    return int(found[1]) if found else 0


def _preset_for(name: str, presets: Mapping[int, dict[str, Any]], source: str) -> dict[str, Any]:
    """The largest preset that is not above the card's size: a larger card needs no other one then."""
    size = _gigabytes(name)
    if not size:
        raise RecipeError(f"preset: expected the memory of a card, for example 12gb, got {shorten(name)}.")
    if not presets:
        raise RecipeError(f"preset: {source} has none; leave it out, and see the dry run for what saves memory.")
    if size < min(presets):
        raise RecipeError(f"preset: expected at least {min(presets)}gb, the smallest of {source}, got {name}.")
    return presets[max(known for known in presets if known <= size)]


def read_family(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe file, then the one that it extends, and so on: each with what stands in it."""
    family: dict[Path, dict[str, Any]] = {}
    path = path.resolve()
    while True:
        raw = family[path] = _read_file(path)
        parent = raw.get("extends")
        if parent is None:
            return list(family.items())
        if not isinstance(parent, str) or not os.path.isfile(path.parent / parent):  # unlike Path.is_file, False for any odd name
            raise RecipeError(f"{path.name}: extends: expected a file as seen from the folder of {path.name}, got {shorten(parent)}.")
        path = (path.parent / parent).resolve()
        if path in family:
            circle = " -> ".join(os.path.relpath(file, next(iter(family)).parent) for file in (*family, path))
            raise RecipeError(f"extends: {circle} goes round in a circle; remove one of them.")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise RecipeError(f"{path.name}: has {path.stat().st_size >> 20} MB; is this a recipe?")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{path.name}: expected UTF-8 text, found other bytes; is this a recipe?") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from None
    raw = parse_yaml(text, path.name)
    if raw is None:
        raise RecipeError(f"{path.name}: is empty; `sslsr init` copies a recipe to start from.")
    if not isinstance(raw, dict):
        raise RecipeError(f"{path.name}: expected `key: value` lines at the top level, found {shorten(raw)}.")
    odd = next((key for key in raw if not isinstance(key, str)), None)
    if odd is not None or None in raw:
        raise RecipeError(f"{path.name}: expected a word as the key at the top level, found {odd!r}.")
    return raw


def _without(raw: dict[str, Any], names: Any, source: str) -> dict[str, Any]:
    """The recipe less the losses whose name, or kind where they have no name, is among `names`."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{source}: without: expected a list of words, for example [self_similarity], got {shorten(names)}.")
    losses = raw["losses"] if isinstance(raw.get("losses"), list) else []
    named = [str(loss.get("name") or loss.get("kind")) if isinstance(loss, dict) else "?" for loss in losses]
    absent = [name for name in names if name not in named]
    if absent:
        there = ", ".join(named) or "none"
        raise RecipeError(f"{source}: without: expected names of losses that are there ({there}), got {', '.join(absent)}.")
    return {**raw, "losses": [loss for loss, name in zip(losses, named) if name not in names]} if names else raw


def _another_kind(below: Any, above: Any) -> bool:
    """Whether a section (model, task) replaces the one below, whose keys mean nothing to it."""
    return isinstance(below, dict) and isinstance(above, dict) and {"kind"} <= {*below} & {*above} and below["kind"] != above["kind"]


def overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts laid over each other key by key; anything else, a list too, is replaced as a whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`["training.steps=100", "losses.1.weight=2"]` laid over the nested dict; values are read as YAML."""
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"--set {override!r}: expected KEY.KEY=VALUE, for example --set training.steps=100.")
        raw = _set(raw, keys, parse_yaml(text, f"--set {path}"), path)
    return raw


def _set(node: Any, keys: list[str], value: Any, path: str) -> Any:
    head, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not head.isascii() or not head.isdigit() or int(head) >= len(node):
            raise RecipeError(f"--set {path}: {head!r} is not an index of a list with {len(node)} entries (0 to {len(node) - 1}).")
        copy = list(node)
        copy[int(head)] = _set(node[int(head)], rest, value, path) if rest else value
        return copy
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise RecipeError(f"--set {path}: {head!r} would be a key inside the plain value {node!r}; set that key as a whole.")
    return {**node, head: _set(node.get(head), rest, value, path) if rest else value}


def parse(model: type[S], raw: Any) -> S:
    """Validate plain data into a settings model; every mistake becomes one line of a single RecipeError."""
    keys: dict[int, set[str]] = {}
    try:
        return model.model_validate(raw, context=keys)
    except ValidationError as error:
        lines = [explain(model, raw, keys, detail) for detail in error.errors(include_url=False)]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None
