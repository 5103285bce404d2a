"""Which tensor of an original StableSR checkpoint is which of ours.

Every table is made from OUR names, so it is complete in both directions: a name of ours without its original is a missing
tensor, an original that no row mentions is an unknown one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

# same: equal tensors. pointwise2d/1d: a 1x1 convolution there, a linear layer here. heads: q, k, v of each head in turn there.
# stacked: q, k, v below each other there.
Kind = Literal["same", "pointwise2d", "pointwise1d", "heads", "stacked"]


@dataclass(frozen=True)
class Row:
    """One original tensor and the one or three tensors of ours that hold its values."""

    original: str
    ours: tuple[str, ...]
    kind: Kind = "same"


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "spade.norm": "spade.param_free_norm",
    "spade.shared": "spade.mlp_shared.0",
    "spade.gamma": "spade.mlp_gamma",
    "spade.beta": "spade.mlp_beta",
}
_EMBEDDING = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
_QKV = ("to_q", "to_k", "to_v")


def unet_rows(names: Iterable[str], layers_per_block: int) -> list[Row]:
    """SFTUNet2DConditionModel <- model.diffusion_model."""
    names = list(names)
    attends = {int(m[1]) for name in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    fixed = {**_EMBEDDING, "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}

    def original(name: str) -> str:
        stem, leaf = name.rsplit(".", 1)
        if stem in fixed:
            return f"{fixed[stem]}.{leaf}"
        where, rest = _unet_place(name, layers_per_block, attends)
        if rest is None:
            return f"{where}.{leaf}"
        if ".resnets." in name:
            inside, leaf = rest.rsplit(".", 1)
            return f"{where}.{_RESNET[inside]}.{leaf}"
        return f"{where}.{rest}"

    return [Row(original(name), (name,)) for name in names]


def _unet_place(name: str, layers: int, attends: set[int]) -> tuple[str, str | None]:
    """The original's block, and the rest of our name inside it (None for a resampler, which is one convolution)."""
    if m := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.+)", name):
        first = 1 + int(m[1]) * (layers + 1)
        if m[2] == "downsamplers":
            return f"input_blocks.{first + layers}.0.op", None
        return f"input_blocks.{first + int(m[3])}.{int(m[2] == 'attentions')}", m[4]
    if m := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        return f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}", m[3]
    if m := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.+)", name):
        first = int(m[1]) * (layers + 1)
        if m[2] == "upsamplers":
            return f"output_blocks.{first + layers}.{1 + (int(m[1]) in attends)}.conv", None
        return f"output_blocks.{first + int(m[3])}.{int(m[2] == 'attentions')}", m[4]
    raise KeyError(name)


def encoder_rows(names: Iterable[str], layers_per_block: int) -> list[Row]:
    """StructuralEncoder <- structcond_stage_model."""

    def place(name: str) -> tuple[str, str | None]:
        if m := re.match(r"taps\.(\d+)\.(.+)", name):
            return f"fea_tran.{m[1]}", m[2]
        return _unet_place(name, layers_per_block, set())

    def original(name: str) -> str:
        stem, leaf = name.rsplit(".", 1)
        if stem in (fixed := {**_EMBEDDING, "conv_in": "input_blocks.0.0"}):
            return f"{fixed[stem]}.{leaf}"
        where, rest = place(name)
        return f"{where}.{leaf}" if rest is None else f"{where}.{_RESNET[rest.rsplit('.', 1)[0]]}.{leaf}"

    def attention(name: str) -> tuple[str, dict[str, str]]:
        where, rest = place(name)
        return where, {"group_norm": "norm", "to_out.0": "proj_out", "_": (rest or "").rsplit(".", 1)[0]}

    return _with_attention(names, original, attention, fuse="qkv", pointwise="pointwise1d")


def vae_rows(names: Iterable[str], levels: int) -> list[Row]:
    """AutoencoderKL or AutoencoderKLCFW <- first_stage_model., or the CFW file without prefix."""

    def original(name: str) -> str:
        if name.startswith("fusion_layers."):
            return _fusion(name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)

    def attention(name: str) -> tuple[str, dict[str, str]]:
        side, rest = name.split(".mid_block.attentions.0.")
        maps = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        return f"{side}.mid.attn_1", {**maps, "_": rest.rsplit(".", 1)[0]}

    return _with_attention(names, original, attention, fuse=None, pointwise="pointwise2d")


def _fusion(name: str) -> str:
    m = re.match(r"fusion_layers\.(\d+)\.(enter|blocks|leave)\.(.+)", name)
    if m is None:
        raise KeyError(name)
    head = f"decoder.fusion_layer_{int(m[1]) + 1}"
    if m[2] == "enter":
        return f"{head}.encode_enc_1.{m[3].replace('conv_shortcut', 'conv_out')}"
    if m[2] == "leave":
        return f"{head}.encode_enc_3.{m[3]}"
    rest = re.sub(r"dense\.(\d)", lambda d: f"rdb{int(d[1]) + 1}", m[3])
    rest = re.sub(r"grow\.(\d)", lambda d: f"conv{int(d[1]) + 1}", rest).replace("shrink", "conv5")
    return f"{head}.encode_enc_2.{rest}"


def _with_attention(
    names: Iterable[str],
    original: Callable[[str], str],
    attention: Callable[[str], tuple[str, dict[str, str]]],
    *,
    fuse: str | None,
    pointwise: Kind,
) -> list[Row]:
    """Rows for a network whose attention is made of 1x1 convolutions in the original, q, k and v as one if `fuse` says so."""
    rows = []
    for name in names:
        if ".attentions." not in name:
            rows.append(Row(original(name), (name,)))
            continue
        where, layers = attention(name)
        layer, leaf = layers["_"], name.rsplit(".", 1)[1]
        if fuse and layer in _QKV:
            if layer == "to_q":
                rows.append(Row(f"{where}.{fuse}.{leaf}", tuple(name.replace("to_q", part) for part in _QKV), "heads"))
            continue
        kind: Kind = pointwise if leaf == "weight" and layer != "group_norm" else "same"
        rows.append(Row(f"{where}.{layers[layer]}.{leaf}", (name,), kind))
    return rows


_TEXT = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_TEXT_FIXED = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def text_rows(names: Iterable[str]) -> list[Row]:
    """CLIPTextModel (names without `text_model.`) <- cond_stage_model.model., OpenCLIP's naming."""
    rows = []
    for name in names:
        if name in _TEXT_FIXED:
            rows.append(Row(_TEXT_FIXED[name], (name,)))
            continue
        m = re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)
        if m is None:
            raise KeyError(name)
        where, layer, leaf = f"transformer.resblocks.{m[1]}", m[2], m[3]
        if layer in _TEXT:
            rows.append(Row(f"{where}.{_TEXT[layer]}.{leaf}", (name,)))
        elif layer == "self_attn.q_proj":
            ours = tuple(name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj"))
            rows.append(Row(f"{where}.attn.in_proj_{leaf}", ours, "stacked"))
    return rows
