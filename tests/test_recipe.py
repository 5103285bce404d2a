"""Impossible combinations are named; what a recipe builds is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.runs.recipe import Recipe, load_recipe

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

BASE = {"data": {"sources": [{"kind": "folder", "path": "photos"}]}, "losses": [{"kind": "diffusion"}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": []}, "losses:"),
        ({"losses": [{"kind": "diffusion"}, {"kind": "diffusion"}]}, "losses: diffusion stands there twice"),
        ({"losses": [{"kind": "latent_kl"}]}, "losses.0.kind: latent_kl is impossible in stage diffusion; possible are diffusion"),
        ({"stage": "autoencoder"}, "losses.0.kind: diffusion is impossible in stage autoencoder"),
        ({"training": {"crop_size": 510}}, "training.crop_size: 510 is not a multiple of scale 4."),
        ({"scale": 16}, "scale: expected less than or equal to 8; got 16"),
        ({"validation": {"size": 130}}, "validation.size: 130 is not a multiple of scale 4."),
        ({"validation": {"best": "lpips"}}, "validation.best: 'lpips' is not measured; expected one of validation.metrics: psnr, ssim."),
        ({"output": {"push_to_hub": True}}, "output.hub_id: push_to_hub needs to know where"),
        ({"output": {"push_to_hub": True, "hub_id": "a/b/c"}}, "output.hub_id: expected user/name of letters, digits, dots, dashes and _"),
        ({"output": {"hub_id": "../x"}}, "output.hub_id: expected user/name"),
        ({"output": {"push_state": True}}, "output.push_state: has no effect without"),
        ({"losses": [{"kind": "self_similarity", "weight": "auto"}]}, "losses.0.weight: auto compares with the other losses"),
        (
            {"losses": [{"kind": "self_similarity", "search_size": 63}], "training": {"crop_size": 32, "decode_crop": 6}},
            "losses.0.search_size: 63",
        ),
        ({"losses": [{"kind": "self_similarity", "window_size": 27}]}, "losses.0: window_size 27 must not exceed search_size 25."),
        (
            {"stage": "cfw", "losses": [{"kind": "pixel_l1"}], "training": {"decode_crop": 16}},
            "training.decode_crop: is for stage diffusion only",
        ),
    ],
)
def test_impossible_combinations(changes, message):
    with pytest.raises(RecipeError) as caught:
        parse(Recipe, {**BASE, **changes})
    assert message in str(caught.value)
    assert not str(caught.value).startswith("recipe:")


def test_the_baseline_differs_from_the_mission_in_losses_and_folder_alone():
    from sslsr_diffusion.runs.recipe import resolved
    from sslsr_diffusion.training.resume import differences

    found = differences(resolved(load_recipe("sd_upscaler_ssl")), resolved(load_recipe("sd_upscaler")))
    assert set(found) == {"losses", "output.dir"}


def test_the_mission_is_the_published_setting():
    recipe = load_recipe("sd_upscaler_ssl")
    ssl = next(loss for loss in recipe.losses if loss.kind == "self_similarity")
    assert (ssl.l1_weight, ssl.kl_weight, ssl.search_size, ssl.window_size, ssl.sigma, ssl.mask_stride) == (500, 500, 25, 9, 0.004, 3)
    assert [loss.weight for loss in recipe.losses] == [1.0, 0.1, 1.0]
    assert recipe.model.train == "sft"
    assert recipe.training.crop_size == 512
    assert recipe.training.batch_size * recipe.training.accumulate == 24


def test_every_setting_has_a_sentence():
    from pydantic import BaseModel

    def walk(model: type[BaseModel], path: str) -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            if name != "kind" and not field.description:
                missing.append(f"{path}.{name}")
            for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    missing += walk(inner, f"{path}.{name}")
        return missing

    assert walk(Recipe, "recipe") == []


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_what_a_run_writes_down_is_the_same_recipe_again(name):
    """`sslsr export` and a resume read the resolved recipe of a checkpoint."""
    from sslsr_diffusion.runs.recipe import resolved

    recipe = load_recipe(name)
    assert parse(Recipe, resolved(recipe)) == recipe
