"""Task decoder, part all: a plain decoder learns on what the frozen upscaler makes. Part fusion: test_cfw_data.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import SMALL_SSL, base_model, drawn, tiny
from toys import wave_photos

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models import AutoencoderKLCFW
from sslsr_diffusion.runs.memory import describe_parameters, step_bytes
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.start import build_job, train
from sslsr_diffusion.runs.task import build_task, export_checkpoint

LOSSES = [{"kind": "pixel_l1"}, {**SMALL_SSL, "l1_weight": 10, "kl_weight": 10}]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def recipe(photos: Path, tmp_path: Path) -> Recipe:
    drawn().save(tmp_path / "upscaler")
    training = {"steps": 2, "batch_size": 2, "crop_size": 32, "optimizer": {"lr": 1e-3}, "ema": {"decay": 0.5}}
    task = {"kind": "decoder", "synthesis_steps": 2}
    return tiny(photos, tmp_path / "run", task=task, model=base_model(tmp_path / "upscaler"), losses=LOSSES, training=training)


def test_the_decoder_alone_learns(recipe: Recipe, tmp_path: Path) -> None:
    result = train(recipe)
    assert result.pipeline is not None
    for part in ("unet", "structural_encoder", "vae"):
        before, after = (load_file(folder / part / WEIGHTS) for folder in (tmp_path / "upscaler", result.pipeline))
        changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert changed == ({"decoder", "post_quant_conv"} if part == "vae" else set())
    export_checkpoint(tmp_path / "run/checkpoint-2", tmp_path / "exported")
    first, second = (load_file(folder / "vae" / WEIGHTS) for folder in (result.pipeline, tmp_path / "exported"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_dry_run_counts_the_decoder(recipe: Recipe) -> None:
    task = build_task(recipe, meta=True)
    vae = next(line for line in describe_parameters(task) if line.split()[0] == "vae")
    own = drawn().codec.vae
    trained = sum(p.numel() for part in (own.decoder, own.post_quant_conv) for p in part.parameters())
    assert re.search(rf"trained +{trained / 1e6:.2f} M", vae)
    assert all(part > 0 for name, part in step_bytes(recipe).items())


def test_a_decoder_that_is_fused_already_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    AutoencoderKLCFW.from_autoencoder(drawn().codec.vae).save_pretrained(tmp_path / "upscaler/vae")
    with pytest.raises(UserError, match=r"^model\.base: the decoder of .* is fused with the encoder \(CFW\); set task\.part: fusion"):
        build_job(recipe)
