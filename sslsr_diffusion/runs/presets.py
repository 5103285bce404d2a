"""Presets by memory, as the dry run shows them: what each takes by the estimate, and which one is for this device."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import yaml

from sslsr_diffusion.config import RecipeError, find_recipe, read_presets
from sslsr_diffusion.runs.memory import told
from sslsr_diffusion.runs.recipe import Recipe, load_recipe

SIZES = (8, 12, 16, 24, 48)  # GB of the cards that people have


class Preset(NamedTuple):
    recipe: Recipe  # with it
    changes: str  # what it lays over the recipe, in a line


def load_presets(name: str, overrides: Sequence[str] = ()) -> dict[int, Preset]:
    """GB of a card -> the preset of the recipe for it, smallest first; `overrides` win over each.
    Raises RecipeError: one of them does not fit the recipe.
    """
    found: dict[int, Preset] = {}
    for size, changes in read_presets(find_recipe(name)).items():
        line = yaml.safe_dump(changes, default_flow_style=True, sort_keys=False, width=1000).strip()[1:-1]
        try:
            found[size] = Preset(load_recipe(name, overrides, preset=f"{size}gb"), line or "the recipe as it is")
        except RecipeError as error:
            raise RecipeError("\n".join(f"with its preset {size}gb, {text}" for text in str(error).splitlines())) from None
    return found


def describe_presets(presets: Mapping[int, Preset], available: int) -> list[str]:
    """Two lines per size of card, what its preset takes and what it changes, then the largest preset that fits `available` bytes."""
    lines: list[str] = []
    fitting: int | None = None
    for size in sorted({*SIZES, *presets}):
        smaller = [known for known in presets if known < size]
        text = f"as {max(smaller)}gb" if smaller else f"too small: the smallest is {min(presets)}gb"
        if size in presets:
            text, fits = told(presets[size].recipe, available)
            fitting = size if fits else fitting
        lines.append(f"  {f'--preset {size}gb':<34} {text}")
        lines += [f"      {presets[size].changes}"] if size in presets else []
    return [*lines, "no preset fits this device" if fitting is None else f"this device takes --preset {fitting}gb"]
