"""models/structural_encoder.py: golden features, odd sizes, initialisation, save and load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_models import golden_encoder, golden_inputs, golden_outputs, random_like, relative_error

from sslsr_diffusion.models import StructuralEncoder
from sslsr_diffusion.models.stablesr.settings import load_preset


@torch.no_grad()
def test_features_are_the_originals() -> None:
    inputs, want = golden_inputs("stablesr/struct"), golden_outputs("stablesr/struct")
    features = golden_encoder()(inputs["latent"], inputs["timesteps.0"])
    assert len(features) == 4
    for width, feature in zip((24, 12, 6, 3), features, strict=True):
        assert relative_error(feature, want[f"case0.struct.{width}"]) < 1e-4, width


def tiny() -> StructuralEncoder:
    return StructuralEncoder.from_config(load_preset("tiny")["structural_encoder"])


@torch.no_grad()
def test_any_height_and_width_and_batch_independence() -> None:
    model = tiny().eval()
    latents, t = random_like((3, 8, 13, 22), seed=0), torch.tensor([0, 400, 999])
    features = model(latents, t)
    assert [tuple(f.shape) for f in features] == [(3, 32, 13, 22), (3, 32, 7, 11), (3, 32, 4, 6)]
    for together, alone in zip(features, model(latents[1:2], 400), strict=True):
        assert torch.allclose(together[1:2], alone, atol=1e-5)  # another batch size may choose another convolution algorithm


def test_residual_branches_start_at_zero() -> None:
    state = tiny().state_dict()
    assert all(not v.any() for k, v in state.items() if ".conv2." in k or k.startswith("taps.0.conv2"))
    assert all(not v.any() for k, v in state.items() if "to_out.0" in k)
    assert state["conv_in.weight"].any()


def test_save_and_load(tmp_path: Path) -> None:
    model = golden_encoder()
    model.save_pretrained(tmp_path)
    again = StructuralEncoder.from_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert dict(again.config) | {"_name_or_path": ""} == dict(model.config) | {"_name_or_path": ""}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_full_size_parameter_count() -> None:
    with torch.device("meta"):
        model = StructuralEncoder()
    assert sum(p.numel() for p in model.parameters()) == 52_494_080


def test_levels_and_attention_must_agree() -> None:
    with pytest.raises(ValueError, match="one attention_levels entry per level"):
        StructuralEncoder(block_out_channels=(32, 32), attention_levels=(True,))
