"""The architecture of an original checkpoint, read off its tensors' shapes."""

import re
from typing import Any

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.stablesr.convert.stablesr import ENCODER, TEXT, UNET, State
from sslsr_diffusion.models.stablesr.settings import load_preset


def has_part(state: State, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _levels(state: State, prefix: str) -> tuple[list[int], list[bool], int]:
    """Widths and attention per level, and residual blocks per level, of an `input_blocks` stack."""
    numbers = {int(m[1]) for name in state if (m := re.match(re.escape(prefix) + r"input_blocks\.(\d+)\.", name))}
    samplers = sorted(n for n in numbers if f"{prefix}input_blocks.{n}.0.op.weight" in state)
    if not samplers:
        raise UserError(f"the checkpoint has no tensors {prefix}input_blocks.N.0.op.weight; is it a StableSR checkpoint?")
    layers = samplers[0] - 1
    firsts = [1 + i * (layers + 1) for i in range(len(samplers) + 1)]
    widths = [_shape(state, f"{prefix}input_blocks.{n}.0.out_layers.3.weight")[0] for n in firsts]
    attends = [has_part(state, f"{prefix}input_blocks.{n}.1.") for n in firsts]
    return widths, attends, layers


def _shape(state: State, name: str) -> tuple[int, ...]:
    if name not in state:
        raise UserError(f"the checkpoint lacks the tensor {name}; is it a complete StableSR checkpoint?")
    return tuple(state[name].shape)


def unet_config(state: State, head_channels: int = 64) -> dict[str, Any]:
    """Constructor arguments of SFTUNet2DConditionModel; channels per attention head leave no trace in the shapes."""
    spade = _shape(state, f"{UNET}input_blocks.1.0.spade.mlp_shared.0.weight")
    widths, attends, layers = _levels(state, UNET)
    return {
        **load_preset("sd21")["unet"],
        "in_channels": _shape(state, f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": _shape(state, f"{UNET}out.2.weight")[0],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
        "layers_per_block": layers,
        "attention_head_dim": [max(1, width // head_channels) for width in widths],
        "cross_attention_dim": _shape(state, f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        "spade_hidden_channels": spade[0],
        "feature_channels": spade[1],
    }


def encoder_config(state: State) -> dict[str, Any]:
    """Constructor arguments of StructuralEncoder."""
    widths, attends, layers = _levels(state, ENCODER)
    return {
        **load_preset("sd21")["structural_encoder"],
        "in_channels": _shape(state, f"{ENCODER}input_blocks.0.0.weight")[1],
        "out_channels": _shape(state, f"{ENCODER}fea_tran.0.out_layers.3.weight")[0],
        "block_out_channels": widths,
        "attention_levels": attends,
        "layers_per_block": layers,
    }


def vae_config(state: State, prefix: str) -> dict[str, Any]:
    """Constructor arguments of AutoencoderKL, with `num_fuse_blocks` where fusion blocks are present."""

    def count(pattern: str) -> int:
        return len({m[1] for name in state if (m := re.match(re.escape(prefix) + pattern, name))})

    levels = count(r"encoder\.down\.(\d+)\.")
    widths = [_shape(state, f"{prefix}encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels)]
    config = {
        **load_preset("sd21")["vae"],
        "latent_channels": _shape(state, f"{prefix}post_quant_conv.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": count(r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    blocks = count(r"decoder\.fusion_layer_1\.encode_enc_2\.(\d+)\.")
    if not blocks:
        return config
    growth = _shape(state, f"{prefix}decoder.fusion_layer_1.encode_enc_2.0.rdb1.conv1.weight")[0]
    return {**config, "num_fuse_blocks": blocks, "fuse_growth_channels": growth}


def text_config(state: State) -> dict[str, Any]:
    """Constructor arguments of CLIPTextConfig. A complete OpenCLIP (it has its projection) loses its last block: Stable Diffusion 2
    stops before it."""
    width = _shape(state, f"{TEXT}token_embedding.weight")
    blocks = {int(m[1]) for name in state if (m := re.match(re.escape(TEXT) + r"transformer\.resblocks\.(\d+)\.", name))}
    return {
        **load_preset("sd21")["text_encoder"],
        "vocab_size": width[0],
        "hidden_size": width[1],
        "intermediate_size": _shape(state, f"{TEXT}transformer.resblocks.0.mlp.c_fc.weight")[0],
        "num_hidden_layers": len(blocks) - (f"{TEXT}text_projection" in state),
        "num_attention_heads": max(1, width[1] // 64),
        "max_position_embeddings": _shape(state, f"{TEXT}positional_embedding")[0],
    }
