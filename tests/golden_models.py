"""The golden fixtures' small StableSR networks, converted from their original names."""

from __future__ import annotations

import functools

import torch
from diffusers import AutoencoderKL
from goldens import load_golden
from torch import Tensor

from sslsr_diffusion.convert import convert_structural_encoder, convert_unet, convert_vae, shapes
from sslsr_diffusion.models import AutoencoderKLCFW, SFTUNet2DConditionModel, StructuralEncoder

HEAD_CHANNELS = 16  # num_head_channels of the fixtures' config


def relative_error(got: Tensor, want: Tensor) -> float:
    """max|got - want| / max|want|, the measure of the fixtures' README."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def golden_inputs(item: str) -> dict[str, Tensor]:
    return {k[3:]: v.float() if v.is_floating_point() else v for k, v in load_golden(item).tensors.items() if k.startswith("in.")}


def golden_outputs(item: str) -> dict[str, Tensor]:
    return {k[4:]: v for k, v in load_golden(item).tensors.items() if k.startswith("out.")}


@functools.cache
def original_state(name: str = "model_weights") -> dict[str, Tensor]:
    return {k: v.float() for k, v in load_golden(f"stablesr/{name}").tensors.items()}


def golden_unet() -> SFTUNet2DConditionModel:
    state = original_state()
    model = SFTUNet2DConditionModel.from_config(shapes.unet_config(state, HEAD_CHANNELS))
    model.load_state_dict(convert_unet(state, model.state_dict(), model.config.layers_per_block).tensors)
    return model.eval()


def golden_encoder() -> StructuralEncoder:
    state = original_state()
    model = StructuralEncoder.from_config(shapes.encoder_config(state))
    model.load_state_dict(convert_structural_encoder(state, model.state_dict(), model.config.layers_per_block).tensors)
    return model.eval()


def golden_vae(cfw: bool = True) -> AutoencoderKL:
    state = original_state("cfw_weights")
    if not cfw:
        state = {k: v for k, v in state.items() if "fusion_layer" not in k}
    cls = AutoencoderKLCFW if cfw else AutoencoderKL
    model = cls.from_config(shapes.vae_config(state, ""))
    model.load_state_dict(convert_vae(state, model.state_dict(), 4, prefix="").tensors)
    return model.eval()


def random_like(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
