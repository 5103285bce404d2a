"""Task autoencoder: what its encoder says afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import DRAWN, tiny
from toys import wave_photos

from sslsr_diffusion.config import RecipeError
from sslsr_diffusion.models.stablesr.build import build_autoencoder
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.runs.start import train
from sslsr_diffusion.runs.task import training_crops

LOSSES = [{"kind": "pixel_l1"}, {"kind": "latent_kl", "weight": 1e-3}]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("latents", ["sample", "mean"])
def test_it_leaves_a_posterior_or_its_mean(photos: Path, tmp_path: Path, latents: str) -> None:
    validation = {"every": 0, "limit": 1, "size": 44, "metrics": ["psnr"]}
    recipe = tiny(photos, tmp_path / "run", task={"kind": "autoencoder", "latents": latents}, losses=LOSSES, validation=validation)
    result = train(recipe)
    assert result.pipeline is not None
    codec = build_autoencoder(StableSRSettings(vae=str(result.pipeline))).codec
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    shape = codec.noise_shape(pixels)
    with torch.no_grad():
        draws = [codec.encode(pixels, torch.randn(shape, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)]
        of_training = codec.encode(training_crops(recipe, 32), torch.zeros(codec.noise_shape(torch.zeros(32, 3, 32, 32))))
    difference = (draws[0] - draws[1]).std()
    assert difference < 1e-5 if latents == "mean" else difference > 1e-3
    if latents == "mean":
        assert of_training.std() == pytest.approx(1, rel=0.02)  # calibrated


def test_latents_are_the_autoencoders_own_setting(photos: Path, tmp_path: Path) -> None:
    for section in ({"task": {"kind": "base", "latents": "mean"}}, {"task": {"kind": "diffusion", "latents": "mean"}}):
        with pytest.raises(RecipeError, match=r"task\.latents: unknown key \(value 'mean'\); allowed .* It belongs to kind autoencoder\.$"):
            tiny(photos, tmp_path, **section)
    with pytest.raises(RecipeError, match=r"model\.latents: unknown key .* did you mean task\.latents\?$"):
        tiny(photos, tmp_path, model={**DRAWN, "latents": "mean"})
