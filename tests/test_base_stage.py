"""Stage base, and an upscaler that starts from what it leaves: the chain of the small recipes, at toy width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import wave_photos

from sslsr_diffusion.build import build
from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.sampling import spaced_timesteps
from sslsr_diffusion.models import ModelSettings, build_networks
from sslsr_diffusion.recipe import Recipe
from sslsr_diffusion.training.fit import fit


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


def recipe(photos: Path, run: Path, **changes: Any) -> dict[str, Any]:
    plain = {
        "stage": "base",
        "model": {"init": "random", "preset": "tiny"},
        "data": {
            "sources": [{"kind": "folder", "path": str(photos)}],
            "validation": [{"kind": "folder", "path": str(photos)}],
            "degradation": {"preset": "bicubic"},
            "workers": 0,
        },
        "losses": [{"kind": "diffusion"}],
        "training": {"steps": 2, "batch_size": 2, "crop_size": 32, "optimizer": {"lr": 1e-3}},
        "validation": {"every": 0, "limit": 1, "size": 44, "steps": 4, "metrics": ["psnr"]},
        "output": {"dir": str(run), "trackers": []},
    }
    return {**plain, **changes}


@pytest.fixture(scope="module")
def base(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("base")
    result = fit(build(parse(Recipe, recipe(photos, run))))
    assert result.step == 2
    return run


def test_a_base_is_a_plain_unet_that_learned(base: Path) -> None:
    weights = load_file(base / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert not any("spade" in name for name in weights)
    start = build_networks(ModelSettings(init="random", preset="tiny"), plain=True, seed=42).denoiser.unet.state_dict()
    assert set(start) == set(weights)
    assert all(not torch.equal(start[name], weights[name]) for name in weights if name.endswith("conv1.weight"))


def test_the_upscaler_takes_the_base_and_leaves_it_frozen(photos: Path, base: Path, tmp_path: Path) -> None:
    model = {"base": str(base / "pipeline"), "preset": "tiny", "train": "sft"}
    result = fit(build(parse(Recipe, recipe(photos, tmp_path, stage="diffusion", model=model))))
    assert result.pipeline is not None
    before = load_file(base / "pipeline/unet/diffusion_pytorch_model.safetensors")
    after = load_file(result.pipeline / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    new = sorted(name for name in after if name not in before)
    assert new
    assert all(".spade." in name for name in new)


def test_new_layers_are_as_wide_as_the_preset_of_the_same_unet_says(base: Path) -> None:
    networks = build_networks(ModelSettings(base=str(base / "pipeline"), preset="tiny"))
    drawn = build_networks(ModelSettings(init="random", preset="tiny"))
    for part in ("unet", "structural_encoder"):
        shapes = [{k: v.shape for k, v in getattr(n.denoiser, part).state_dict().items()} for n in (networks, drawn)]
        assert shapes[0] == shapes[1]


def test_a_base_must_be_plain_and_is_not_published(photos: Path, base: Path, tmp_path: Path) -> None:
    upscaler = build_networks(ModelSettings(init="random", preset="tiny"))
    upscaler.save_parts(tmp_path / "upscaler")
    with pytest.raises(UserError, match="is an upscaler; use stage diffusion"):
        build_networks(ModelSettings(base=str(tmp_path / "upscaler")), plain=True)
    with pytest.raises(RecipeError, match="stage base makes no upscaler"):
        parse(Recipe, recipe(photos, tmp_path, output={"dir": str(tmp_path), "push_to_hub": True, "hub_id": "a/b"}))


def test_few_step_training_sees_the_timesteps_of_that_sampler_only(photos: Path, tmp_path: Path) -> None:
    training = {"steps": 2, "batch_size": 16, "crop_size": 32, "sampler_steps": 3}
    job = build(parse(Recipe, recipe(photos, tmp_path, stage="diffusion", training=training)))
    loader = job.open_data(0, 1, None, torch.device("cpu"))
    try:
        drawn = job.objective.draw(next(iter(loader)), job.losses).given.t.tolist()
    finally:
        loader.close()
    assert set(drawn) == set(spaced_timesteps(3)) - {0} == {500, 999}
    with pytest.raises(RecipeError, match=r"training\.sampler_steps: is for stage diffusion only"):
        parse(Recipe, recipe(photos, tmp_path, training=training))
