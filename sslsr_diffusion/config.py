"""Closed settings models, and one clear sentence for everything that can be wrong in a recipe.

A part of the project declares its settings class beside its code (a subclass of `Settings`) and enters both into its
dict; `recipe.py` assembles the schema. This file only knows how to read YAML, apply overrides and explain mistakes.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sslsr_diffusion.errors import UserError

S = TypeVar("S", bound="Settings")
LARGEST_RECIPE, DEEPEST_RECIPE = 20_000, 50  # values, levels
LARGEST_FILE = 1 << 20  # bytes


class Settings(BaseModel):
    """Base of every section of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class RecipeError(UserError):
    """Something in a recipe is wrong; one line per mistake, each with the key's full path."""


def find_recipe(name: str) -> Path:
    """The recipe file for a path, or for the bare name of a recipe that ships with the package.

    Raises:
        RecipeError: there is no such file and no shipped recipe of that name (the message lists the nearest ones).
    """
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        kind = "a folder" if path.is_dir() else "no regular file" if path.exists() else None
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, holds a zero byte, or ~user of nobody
        raise RecipeError(f"recipe: {_short(name)} cannot be a file ({getattr(error, 'strerror', None) or error}).") from None
    if kind is not None:
        raise RecipeError(f"recipe: {name!r} is {kind}; give a recipe file, or the name of a shipped recipe.")
    shipped = shipped_recipes()
    if path.name == name and name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    near = difflib.get_close_matches(path.stem, shipped, n=3, cutoff=0.4) or sorted(shipped)
    raise RecipeError(f"recipe: no file {name!r} and no shipped recipe of that name; the nearest shipped ones: {', '.join(near)}.")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes in the wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "_configs", here.parent / "configs"):
        if folder.is_dir():
            return {p.stem: p for p in sorted(folder.glob("*.yaml"))}
    return {}


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

    Raises:
        ConstructorError: more than LARGEST_RECIPE, deeper than DEEPEST_RECIPE, or an anchor that contains itself.
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


def read_raw(path: Path, _trail: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The nested dict of a recipe file. `extends: other.yaml` (same folder) is read first and overlaid key by key."""
    path = path.resolve()
    if path in _trail:
        raise RecipeError(f"extends: {' -> '.join(p.name for p in (*_trail, path))} goes round in a circle; remove one of them.")
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
        raise RecipeError(f"{path.name}: expected `key: value` lines at the top level, found {_short(raw)}.")
    odd = next((key for key in raw if not isinstance(key, str)), None)
    if odd is not None or None in raw:
        raise RecipeError(f"{path.name}: expected a word as the key at the top level, found {odd!r}.")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str) or not (path.parent / parent).is_file():
        raise RecipeError(f"{path.name}: extends: {parent!r} is not a file beside it.")
    return _overlay(read_raw(path.parent / parent, (*_trail, path)), raw)


def _overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
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
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(model, detail) for detail in error.errors(include_url=False)]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def _explain(model: type[BaseModel], detail: Any) -> str:
    """One mistake: the key's full path, what it got, what is allowed, and the nearest key or value that exists."""
    path, holder = _locate(model, detail["loc"], detail["type"])
    kind, ctx, got = detail["type"], detail.get("ctx", {}), detail.get("input")
    if kind == "extra_forbidden":
        allowed = sorted(holder.model_fields) if holder else []
        parent, name = ".".join(path[:-1]), path[-1]
        near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*path[:-1], near[0]])}?"
            if near
            else f"allowed {'in ' + parent if parent else 'here'}: {', '.join(allowed)}."
        )
        return f"{'.'.join(path)}: unknown key (value {_short(got)}); {hint}"
    where = ".".join(path) or "recipe"
    if kind == "missing":
        return f"{where}: missing; this key must be given."
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        expected = str(ctx.get("expected") or ctx.get("expected_tags", "")).replace(" or ", ", ")
        options = [option.strip(" '\"") for option in expected.split(",")]
        value = ctx.get("tag", got)
        if kind == "union_tag_invalid":
            where = f"{where}.{str(ctx.get('discriminator', 'kind')).strip(chr(39))}"
        near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        return f"{where}: {_short(value)} is not allowed; expected one of {', '.join(options)}{hint}"
    if kind == "union_tag_not_found":
        return f"{where}: the key {ctx.get('discriminator', 'kind')} is missing; it says which kind of entry this is."
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: expected a section of `key: value` lines; got {_short(got)}."
    message = (
        str(ctx["error"]) if kind == "value_error" and "error" in ctx else detail["msg"].replace("Input should be", "expected").rstrip(".")
    )
    if kind == "value_error":
        return f"{where}: {message}" if path else message  # a rule over several sections names its keys itself
    return f"{where}: {message.rstrip('.')}; got {_short(got)}."


def _locate(model: type[BaseModel], loc: Sequence[int | str], kind: str) -> tuple[list[str], type[BaseModel] | None]:
    """The path as the user writes it (without pydantic's union tags) and the model that holds its last key."""
    path: list[str] = []
    current: Any = model
    holder: type[BaseModel] | None = model
    for position, key in enumerate(loc):
        tagged = _tagged(current).get(str(key))
        if tagged is not None and not isinstance(key, int):
            current = tagged
            continue
        path.append(str(key))
        if isinstance(current, type) and issubclass(current, BaseModel):
            holder = current
            field = current.model_fields.get(str(key))
            current = _Annotation(field.annotation, field.discriminator) if field else None
        else:
            current = _item(current)
        if position == len(loc) - 1 and kind == "extra_forbidden":
            break
        current = _single_model(current)
    return path, holder


class _Annotation(typing.NamedTuple):
    annotation: Any
    discriminator: Any = None


def _strip(annotation: Any) -> Any:
    if isinstance(annotation, _Annotation):
        annotation = annotation.annotation
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _members(annotation: Any) -> list[Any]:
    annotation = _strip(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for arg in typing.get_args(annotation) for m in _members(arg)]
    return [annotation]


def _tagged(annotation: Any) -> dict[str, type[BaseModel]]:
    """Union members by what pydantic puts into an error's location for them: the tag's value or the class name."""
    members = [m for m in _members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
    if len(_members(annotation)) < 2:
        return {}
    found: dict[str, type[BaseModel]] = {m.__name__: m for m in members}
    for member in members:
        for field in member.model_fields.values():
            if typing.get_origin(field.annotation) is typing.Literal:
                found.update({str(v): member for v in typing.get_args(field.annotation) if len(typing.get_args(field.annotation)) == 1})
    return found


def _single_model(annotation: Any) -> Any:
    members = [m for m in _members(annotation) if m is not type(None)]
    return members[0] if len(members) == 1 and isinstance(members[0], type) and issubclass(members[0], BaseModel) else annotation


def _item(annotation: Any) -> Any:
    for member in _members(annotation):
        args = typing.get_args(member)
        if args:
            return _single_model(args[-1] if typing.get_origin(member) is dict else args[0])
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
