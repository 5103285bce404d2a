"""One clear sentence for everything that can be wrong in a recipe."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel


def explain(model: type[BaseModel], raw: Any, keys: dict[int, set[str]], detail: Any) -> str:
    """One mistake: the key's full path, what it got, what is allowed, and the nearest key or value that exists."""
    path, holder = _locate(raw, detail["loc"], detail["type"])
    kind, ctx, got = detail["type"], detail.get("ctx", {}), detail.get("input")
    where = ".".join(path) or "recipe"
    if kind == "extra_forbidden":
        return f"{where}: unknown key (value {shorten(got)}); {_meant(model, path, sorted(keys.get(id(holder), ())))}"
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
        return f"{where}: {shorten(value)} is not allowed; expected one of {', '.join(options)}{hint}"
    if kind == "union_tag_not_found":
        return f"{where}: the key {ctx.get('discriminator', 'kind')} is missing; expected one of {_kinds(_sections_at(model, path))}."
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: expected a section of `key: value` lines; got {shorten(got)}."
    if kind == "value_error":  # a rule over several keys of a section, or over several sections, names them itself
        message = str(ctx.get("error", detail["msg"]))
        inside = message.partition(": ")[0].partition(".")[0] in keys.get(id(got), ())
        return f"{where}{'.' if inside else ': '}{message}" if path else message
    message = detail["msg"].replace("Input should be", "expected").replace("String should match pattern", "expected text of the form")
    return f"{where}: {message.rstrip('.')}; got {shorten(got)}."


def _meant(model: type[BaseModel], path: list[str], allowed: list[str]) -> str:
    """What may stand instead of an unknown key: one spelled alike, the same one elsewhere in the recipe, or those of its section."""
    *parents, name = path
    within = "".join(f"{key}." for key in parents)
    kinds = _kinds(section for section in _sections_at(model, parents) if name in section.model_fields)  # of other sections at this place
    alike, less = ([f"{within}{near}" for near in difflib.get_close_matches(name, allowed, n=1, cutoff=cutoff)] for cutoff in (0.75, 0.5))
    places = [] if alike or kinds else list(dict.fromkeys(_places(model, name)))
    meant = alike or [place for place in places if place.startswith(within)] or places or less
    if not kinds and 1 <= len(meant) <= 3:
        return f"did you mean {' or '.join(meant)}?"
    here = f"allowed {'in ' + '.'.join(parents) if parents else 'here'}: {', '.join(allowed)}."
    return f"{here} It belongs to kind {kinds}." if kinds else here


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that a value of this type may have in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _sections_at(model: type[BaseModel], path: Sequence[str]) -> list[type[BaseModel]]:
    """What may stand at a place of the recipe: several where a `kind` decides."""
    found = [model]
    for key in (key for key in path if not key.isdigit()):
        found = [inner for section in found if key in section.model_fields for inner in _sections(section.model_fields[key].annotation)]
    return found


def _places(model: type[BaseModel], name: str, trail: tuple[type[BaseModel], ...] = ()) -> Iterator[str]:
    """Where in the schema a key of this name stands."""
    for key, field in model.model_fields.items():
        yield from (name,) if key == name else ()
        for section in _sections(field.annotation):
            yield from (f"{key}.{place}" for place in (_places(section, name, (*trail, model)) if section not in trail else ()))


def _kinds(sections: Iterable[type[BaseModel]]) -> str:
    return ", ".join(get_args(section.model_fields["kind"].annotation)[0] for section in sections if "kind" in section.model_fields)


def _locate(raw: Any, loc: Sequence[int | str], kind: str) -> tuple[list[str], Any]:
    """The path as the user writes it, and the section of the raw data that holds its last key.

    pydantic puts words of its own between the keys: the tag of a union's member, `float` of `float | None`, `[key]`. They are
    told by the raw data, which has no such key at that place. A tag that is a key there too is told by the section's `kind`.
    """
    path: list[str] = []
    node = holder = raw
    tag = None
    for position, key in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(node, dict) and tag is None and key == node.get("kind") and not last:
            tag = key
        elif key in node if isinstance(node, dict) else isinstance(node, list | tuple) and isinstance(key, int) and key < len(node):
            path.append(str(key))
            holder, node, tag = node, node[key], None
        elif last and kind in ("missing", "invalid_key", "extra_forbidden"):  # a key, though not as it stands there: None is 'None'
            path.append(str(key))
    return path, holder


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
