"""Whatever stands in a recipe: one clear sentence, never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from sslsr_diffusion.config import (
    RecipeError,
    Settings,
    apply_overrides,
    parse,
    parse_yaml,
    shipped_recipes,
)
from sslsr_diffusion.runs.recipe import Recipe, load_recipe, resolved

BASE = {"data": {"sources": [{"kind": "folder", "path": "photos"}]}, "losses": [{"kind": "diffusion"}]}


def complaint(attempt: Callable[[], object]) -> str | None:
    """What a RecipeError says; None when all is well; any other exception fails the test."""
    try:
        attempt()
    except RecipeError as error:
        return str(error).strip()
    return None


class Round(Settings):
    kind: Literal["round"] = "round"
    radius: float = Field(1.0, gt=0)


class Square(Settings):
    kind: Literal["square"] = "square"
    side: int = Field(1, ge=1)


class Copied(Settings):
    """Its validator hands pydantic another dict than the one that stands in the recipe."""

    size: int = 1

    @model_validator(mode="before")
    @classmethod
    def _copy(cls, given):
        return dict(given)


class Sheet(Settings):
    title: str = "none"
    shapes: list[Annotated[Round | Square, Field(discriminator="kind")]] = Field([])
    mode: Literal["fast", "slow"] = "fast"
    copied: Copied = Copied()
    speed: float | Literal["auto"] = 1.0
    shares: dict[Literal["left", "right"], float] = Field({})
    pair: tuple[int, int] = (1, 2)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"titel": "x"}, "titel: unknown key (value 'x'); did you mean title?"),
        ({"zzzz": 1}, "zzzz: unknown key (value 1); allowed here: copied, mode, pair, shapes, shares, speed, title."),
        ({"mode": "fats"}, "mode: 'fats' is not allowed; expected one of fast, slow; did you mean fast?"),
        ({"shapes": [{"kind": "sqare"}]}, "shapes.0.kind: 'sqare' is not allowed; expected one of round, square; did you mean square?"),
        ({"shapes": [{"side": 1}]}, "shapes.0: the key 'kind' is missing"),
        ({"shapes": [{"kind": "square", "radius": 2}]}, "shapes.0.radius: unknown key (value 2); allowed in shapes.0: kind, side."),
        ({"shapes": [{"kind": "round"}, {"kind": "square", "side": 0}]}, "shapes.1.side: expected greater than or equal to 1; got 0."),
        ({"title": ["a"]}, "title: expected a valid string; got ['a']."),
        ({"shapes": [{"kind": "round", "radius": float("inf")}]}, "shapes.0.radius: expected a finite number"),
        ([1], "recipe: "),
        ({"shapes": [{"kind": "round", "round": 3}]}, "shapes.0.round: unknown key (value 3); allowed in shapes.0: kind, radius."),
        ({"shapes": [{"kind": "round", "radius": 0, "round": {"radius": 0}}]}, "shapes.0.radius: expected greater than 0; got 0."),
        ({"shapes": [{"kind": "square"}, 7]}, "shapes.1: expected a section of `key: value` lines; got 7."),
        ({"shapes": [{"kind": "round", None: 1}]}, "shapes.0.None: Keys should be strings; got None."),
        ({"copied": {"sise": 1}}, "copied.sise: unknown key (value 1); did you mean copied.size?"),
        ({"speed": "atuo"}, "speed: 'atuo' is not allowed; expected one of auto; did you mean auto?"),
        ({"shares": {"lift": 1}}, "shares.lift: 'lift' is not allowed; expected one of left, right; did you mean left?"),
        ({"pair": [1]}, "pair.1: missing; this key must be given."),
        ({"pair": [1, "x"]}, "pair.1: expected a valid integer"),
    ],
)
def test_one_sentence_per_mistake(raw, message):
    with pytest.raises(RecipeError) as caught:
        parse(Sheet, raw)
    assert message in str(caught.value)


def test_a_section_that_may_be_one_of_two_classes():
    class Either(Settings):
        shape: Round | Square | None = None

    with pytest.raises(RecipeError) as caught:
        parse(Either, {"shape": {"kind": "round", "radios": 1}})
    assert "shape.radios: unknown key (value 1); did you mean shape.radius?" in str(caught.value).splitlines()


def test_a_key_that_a_validator_put_in_is_named_too():
    class Short(Settings):
        size: int = 1

        @model_validator(mode="before")
        @classmethod
        def _long(cls, given):
            return {"sizes": given}

    assert complaint(lambda: parse(Short, 3)) == "sizes: unknown key (value 3); did you mean size?"


def test_all_mistakes_come_at_once():
    with pytest.raises(RecipeError) as caught:
        parse(Sheet, {"titel": "x", "mode": "fats"})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "r.yaml line 2, column 1: not valid YAML: the key 'a' stands there twice."),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("? [1, 2]\n: 3\n", "not valid YAML"),
        ("a: !!timestamp x\n", "a value does not fit its tag"),
        ("a: !!bool x\n", "a value does not fit its tag"),
        ("a: " + "1" * 5000, "too many digits"),
        ("a:\n\tb: 1\n", "indent with spaces, not with tabs"),
        ("a: 1\n---\nb: 2\n", "expected a single document in the stream, but found another document"),
        ("a: &a [*a]\n", "with its aliases written out it has no end"),
        ("a: &a {b: *a}\n", "with its aliases written out it has no end"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a0: &a0 x\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)), "too many values"),
    ],
)
def test_bad_yaml_is_named_with_its_place(text, message):
    with pytest.raises(RecipeError, match=r"r\.yaml") as caught:
        parse_yaml(text, "r.yaml")
    assert message in str(caught.value)


def test_overrides_reach_into_lists_and_make_sections():
    raw = {"losses": [{"kind": "diffusion"}, {"kind": "pixel_l1", "weight": 1}]}
    raw = apply_overrides(raw, ["losses.1.weight=2.5", "training.optimizer.lr=1e-4", "output.trackers=[]", "seed=7"])
    assert raw["losses"][1]["weight"] == 2.5
    assert raw["training"] == {"optimizer": {"lr": "1e-4"}}  # YAML 1.1 reads it as text; the schema makes a number of it
    assert parse(Recipe, {**BASE, "training": raw["training"]}).training.optimizer.lr == 1e-4
    assert raw["output"] == {"trackers": []}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "expected KEY.KEY=VALUE"),
        ("losses.7.weight=1", "'7' is not an index of a list with 1 entries"),
        ("losses.x.weight=1", "'x' is not an index"),
        ("losses.0.kind.deep=1", "'kind' would be a key inside the plain value"),
        ("a..b=1", "expected KEY.KEY=VALUE"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_bad_overrides(override, message):
    raw = {"losses": [{"kind": "diffusion"}], "seed": 1}
    with pytest.raises(RecipeError) as caught:
        apply_overrides(raw, [override])
    assert "--set" in str(caught.value)
    assert message.replace("'kind' would", "would") in str(caught.value) or message in str(caught.value)


def test_messages_hold_no_control_characters():
    with pytest.raises(RecipeError) as caught:
        parse(Sheet, {"\x1b[31mred\u202e": 1})
    assert str(caught.value).startswith("\\x1b[31mred\\u202e: unknown key")


keys = st.sampled_from(
    [
        "stage",
        "seed",
        "scale",
        "model",
        "data",
        "losses",
        "training",
        "kind",
        "weight",
        "sources",
        "path",
        "optimizer",
        "lr",
        "extends",
        "x",
    ]
) | st.text(max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["diffusion", "self_similarity", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@hypothesis_settings(max_examples=300)
@given(st.dictionaries(keys, values, max_size=6))
def test_no_plain_data_gives_anything_but_a_recipe_error(raw):
    assert complaint(lambda: parse(Recipe, raw)) != ""


@hypothesis_settings(max_examples=300)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
def test_no_text_gives_anything_but_a_recipe_error(text):
    assert complaint(lambda: apply_overrides({"losses": [{}], "a": parse_yaml(text, "fuzz")}, [text])) != ""


@hypothesis_settings(max_examples=200)
@given(st.sampled_from(sorted(Recipe.model_fields)), values)
def test_one_wrong_section_in_a_good_recipe(key, value):
    message = complaint(lambda: parse(Recipe, {**BASE, key: value}))
    assert message is None or any(name in message for name in (key, "losses", "validation", "training"))


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_valid_and_survive_a_round_trip(name):
    recipe = load_recipe(name)
    again = parse(Recipe, yaml.safe_load(yaml.safe_dump(resolved(recipe))))
    assert again == recipe
