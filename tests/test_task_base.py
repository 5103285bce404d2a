"""Task base: a denoiser that sees no low-resolution picture, and upscalers that start from what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import base_model, drawn, tiny
from toys import wave_photos

from sslsr_diffusion.config import RecipeError
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.runs.start import train

UNET = "unet/diffusion_pytorch_model.safetensors"
TASK = {"kind": "base", "sampling_steps": 4}
VALIDATION = {"every": 0, "limit": 1, "size": 44, "metrics": ["psnr"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def base(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = train(tiny(photos, tmp_path_factory.mktemp("runs") / "base", task=TASK, validation=VALIDATION))
    assert result.step == 2
    assert result.best is not None
    assert result.pipeline is not None
    return result.pipeline


def test_a_base_is_a_plain_unet_that_learned(base: Path) -> None:
    weights = load_file(base / UNET)
    assert not any("spade" in name for name in weights)
    start = drawn(plain=True, seed=42).denoiser.unet.state_dict()
    assert set(start) == set(weights)
    assert all(not torch.equal(start[name], weights[name]) for name in weights if name.endswith("conv1.weight"))


def test_the_upscaler_takes_the_base_and_leaves_it_frozen(photos: Path, base: Path, tmp_path: Path) -> None:
    result = train(tiny(photos, tmp_path / "run", model=base_model(base), task={"kind": "diffusion", "train": "sft"}))
    assert result.pipeline is not None
    before, after = load_file(base / UNET), load_file(result.pipeline / UNET)
    assert all(torch.equal(after[name], before[name]) for name in before)
    new = sorted(name for name in after if name not in before)
    assert new
    assert all(".spade." in name for name in new)


def test_new_layers_are_as_wide_as_the_preset_of_the_same_unet_says(base: Path) -> None:
    networks, of_preset = build_networks(StableSRSettings(base=str(base), preset="tiny")), drawn()
    for part in ("unet", "structural_encoder"):
        shapes = [{k: v.shape for k, v in getattr(n.denoiser, part).state_dict().items()} for n in (networks, of_preset)]
        assert shapes[0] == shapes[1]


def test_a_base_must_be_plain_and_is_not_published(photos: Path, base: Path, tmp_path: Path) -> None:
    drawn().save(tmp_path / "upscaler")
    with pytest.raises(UserError, match="is an upscaler; use task diffusion"):
        build_networks(StableSRSettings(base=str(tmp_path / "upscaler")), plain=True)
    with pytest.raises(RecipeError, match="task base makes no upscaler"):
        tiny(photos, tmp_path, task=TASK, output={"push_to_hub": True, "hub_id": "a/b"})
    with pytest.raises(RecipeError, match=r"task\.inference: unknown key .* allowed in task: kind, sampling_steps\. It belongs to kind"):
        tiny(photos, tmp_path, task={**TASK, "inference": {"antiring": 0.5}})
    with pytest.raises(UserError, match="task decoder needs a finished upscaler"):
        train(tiny(photos, tmp_path / "run", task={"kind": "decoder"}, model=base_model(base), losses=[{"kind": "pixel_l1"}]))
