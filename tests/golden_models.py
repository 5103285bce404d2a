"""The golden fixtures' small StableSR networks, converted from their original names; base models and text towers in miniature."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from goldens import load_golden
from torch import Tensor

from sslsr_diffusion.models import AutoencoderKLCFW, SFTUNet2DConditionModel, StructuralEncoder
from sslsr_diffusion.models.stablesr.convert import convert, shapes
from sslsr_diffusion.models.stablesr.convert.stablesr import TEXT
from sslsr_diffusion.models.stablesr.settings import load_preset

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
    model.load_state_dict(convert("unet", state, model.state_dict(), model.config).tensors)
    return model.eval()


def golden_encoder() -> StructuralEncoder:
    state = original_state()
    model = StructuralEncoder.from_config(shapes.encoder_config(state))
    model.load_state_dict(convert("structural_encoder", state, model.state_dict(), model.config).tensors)
    return model.eval()


def golden_vae(cfw: bool = True) -> AutoencoderKL:
    state = original_state("cfw_weights")
    if not cfw:
        state = {k: v for k, v in state.items() if "fusion_layer" not in k}
    cls = AutoencoderKLCFW if cfw else AutoencoderKL
    model = cls.from_config(shapes.vae_config(state, ""))
    model.load_state_dict(convert("vae", state, model.state_dict(), model.config, prefix="").tensors)
    return model.eval()


def random_like(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_text_encoder(folder: Path, width: int = 32) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, projection_dim=width, vocab_size=49408
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def write_base(folder: Path, *, text: bool = True, prediction_type: str = "epsilon") -> Path:
    """A Stable Diffusion folder in miniature, without structural encoder."""
    torch.manual_seed(0)
    unet = {k: v for k, v in load_preset("tiny")["unet"].items() if k not in ("feature_channels", "spade_hidden_channels")}
    UNet2DConditionModel.from_config(unet).save_pretrained(folder / "unet")
    AutoencoderKL.from_config(load_preset("tiny")["vae"]).save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    if text:
        write_text_encoder(folder)
    return folder


def open_clip(width: int = 64, blocks: int = 3) -> dict[str, Tensor]:
    """An OpenCLIP text tower in miniature, as it stands in a checkpoint."""
    sizes = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (2 * width, width),
        "mlp.c_fc.bias": (2 * width,),
        "mlp.c_proj.weight": (width, 2 * width),
        "mlp.c_proj.bias": (width,),
    }
    top = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
        "logit_scale": (),
    }
    sizes = {f"transformer.resblocks.{n}.{name}": size for n in range(blocks) for name, size in sizes.items()} | top
    return {TEXT + name: random_like(size, seed) * 0.1 for seed, (name, size) in enumerate(sizes.items())}
