"""State dicts of StableSR's parts, converted in memory in both directions.

Every row is made from OUR names, so it is complete in both directions: a name of ours without its original is a missing
tensor, an original that no row mentions is an unknown one.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError

State = Mapping[str, Tensor]

UNET = "model.diffusion_model."
ENCODER = "structcond_stage_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.model."


@dataclass(frozen=True)
class Row:
    """One original tensor and the one or three tensors of ours that hold its values."""

    original: str
    ours: tuple[str, ...]
    # same: equal tensors. pointwise2d/1d: a 1x1 convolution there, a linear layer here. heads: q, k, v of each head in turn there.
    # stacked: q, k, v below each other there.
    kind: Literal["same", "pointwise2d", "pointwise1d", "heads", "stacked"] = "same"


_UNET_FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_INSIDE = {
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
    # the structural encoder's attention
    "group_norm": "norm",
    "to_out.0": "proj_out",
}
_QKV = ("to_q", "to_k", "to_v")


def _unet_rows(names: Iterable[str], config: Any) -> list[Row]:
    """SFTUNet2DConditionModel and StructuralEncoder."""
    names, rows = list(names), []
    attends = {int(m[1]) for name in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    for name in names:
        stem, _, leaf = name.rpartition(".")
        if stem in _UNET_FIXED:
            rows.append(Row(f"{_UNET_FIXED[stem]}.{leaf}", (name,)))
            continue
        where, inside = _unet_place(stem, config["layers_per_block"], attends)
        if inside == "to_q":
            rows.append(Row(f"{where}.qkv.{leaf}", tuple(name.replace("to_q", part) for part in _QKV), "heads"))
        elif inside not in _QKV:
            kind: Any = "pointwise1d" if inside == "to_out.0" and leaf == "weight" else "same"
            rows.append(Row(f"{where}.{_UNET_INSIDE.get(inside, inside)}.{leaf}", (name,), kind))
    return rows


def _unet_place(stem: str, layers: int, attends: set[int]) -> tuple[str, str]:
    """The original's block, and the rest of our name inside it."""
    if m := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.+)", stem):
        first = 1 + int(m[1]) * (layers + 1)
        if m[2] == "downsamplers":
            return f"input_blocks.{first + layers}.0", "op"
        return f"input_blocks.{first + int(m[3])}.{int(m[2] == 'attentions')}", m[4]
    if m := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", stem):
        return f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}", m[3]
    if m := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.+)", stem):
        first = int(m[1]) * (layers + 1)
        if m[2] == "upsamplers":
            return f"output_blocks.{first + layers}.{1 + (int(m[1]) in attends)}", m[4]
        return f"output_blocks.{first + int(m[3])}.{int(m[2] == 'attentions')}", m[4]
    if m := re.match(r"taps\.(\d+)\.(.+)", stem):
        return f"fea_tran.{m[1]}", m[2]
    raise KeyError(stem)


# ours -> the original's, one after the other
_VAE = {
    "enter.conv_shortcut": "enter.conv_out",
    "conv_shortcut": "nin_shortcut",
    ".enter.": ".encode_enc_1.",
    ".blocks.": ".encode_enc_2.",
    ".leave.": ".encode_enc_3.",
    "shrink": "conv5",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
    "down_blocks": "down",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}
_VAE_FROM_ONE = {"mid_block.resnets.": "mid.block_", "fusion_layers.": "decoder.fusion_layer_", "dense.": "rdb", "grow.": "conv"}
_TEXT = {
    "text_model.": "",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "q_proj.": "in_proj_",
}


def _vae_rows(names: Iterable[str], config: Any) -> list[Row]:
    """AutoencoderKL or AutoencoderKLCFW."""
    finest = len(config["block_out_channels"]) - 1
    rows = []
    for name in names:
        there = re.sub(
            r"(mid_block\.resnets\.|fusion_layers\.|dense\.|grow\.)(\d+)", lambda m: f"{_VAE_FROM_ONE[m[1]]}{int(m[2]) + 1}", name
        )
        there = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{finest - int(m[1])}", _renamed(there, _VAE))
        pointwise = ".attentions." in name and name.endswith(".weight") and "group_norm" not in name
        rows.append(Row(there, (name,), "pointwise2d" if pointwise else "same"))
    return rows


def _text_rows(names: Iterable[str], config: Any) -> list[Row]:
    """CLIPTextModel <- OpenCLIP, whose last block and projection are not part of Stable Diffusion 2 and stay unknown."""
    rows = []
    for name in names:
        if ".q_proj." in name:
            rows.append(Row(_renamed(name, _TEXT), tuple(name.replace("q_proj", f"{part}_proj") for part in "qkv"), "stacked"))
        elif not any(part in name for part in (".k_proj.", ".v_proj.", "position_ids")):
            rows.append(Row(_renamed(name, _TEXT), (name,)))
    return rows


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


class Naming(NamedTuple):
    """Where a part stands in a checkpoint, and its rows, made from our names and our model's config."""

    prefix: str
    rows: Callable[[Iterable[str], Any], list[Row]]


PARTS = {
    "unet": Naming(UNET, _unet_rows),
    "structural_encoder": Naming(ENCODER, _unet_rows),
    "vae": Naming(VAE, _vae_rows),
    "text_encoder": Naming(TEXT, _text_rows),
}


class Converted(NamedTuple):
    """One converted part: our tensors, and the original's names under its prefix that no tensor of ours takes."""

    tensors: dict[str, Tensor]
    unknown: list[str]


def convert(part: str, state: State, names: Iterable[str], config: Any, *, prefix: str | None = None) -> Converted:
    """Our tensors of one part of a checkpoint.

    Args:
        part: one of PARTS.
        state: the checkpoint; tensors outside `prefix` are left alone.
        names: the names that the model has (`model.state_dict()`; a model on the meta device will do).
        config: the model's.
        prefix: of the part inside the checkpoint ("" in a CFW file); None: the usual one.

    Raises:
        UserError: a tensor that the model needs is missing.
    """
    prefix = PARTS[part].prefix if prefix is None else prefix
    rows = {prefix + row.original: row for row in PARTS[part].rows(names, config)}
    missing = [name for name in rows if name not in state]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"the checkpoint lacks {len(missing)} of the {len(rows)} tensors expected under {prefix or 'the top'!r}: {shown}.")
    tensors: dict[str, Tensor] = {}
    for name, row in rows.items():
        tensors.update(zip(row.ours, _split(row, state[name], config), strict=True))
    return Converted(tensors, sorted(name for name in state if name.startswith(prefix) and name not in rows))


def restore(part: str, tensors: State, config: Any, *, prefix: str | None = None) -> dict[str, Tensor]:
    """Our tensors under the original's names: the exact inverse of `convert` (bit-equal round trip)."""
    prefix = PARTS[part].prefix if prefix is None else prefix
    rows = PARTS[part].rows(tensors, config)
    return {prefix + row.original: _join(row, [tensors[name] for name in row.ours], config) for row in rows}


def _split(row: Row, tensor: Tensor, config: Any) -> tuple[Tensor, ...]:
    if row.kind == "pointwise2d":
        return (tensor[:, :, 0, 0],)
    if row.kind == "pointwise1d":
        return (tensor[:, :, 0],)
    if row.kind == "stacked":
        return tuple(part.contiguous() for part in tensor.chunk(3))
    if row.kind == "heads":  # [H, 3, d, C]: within a head q, then k, then v
        rest = tensor.shape[1:2]
        per_head = tensor.reshape(config["num_attention_heads"], 3, -1, *rest)
        return tuple(per_head[:, k].reshape(-1, *rest).contiguous() for k in range(3))
    return (tensor,)


def _join(row: Row, parts: list[Tensor], config: Any) -> Tensor:
    if row.kind == "pointwise2d":
        return parts[0][:, :, None, None]
    if row.kind == "pointwise1d":
        return parts[0][:, :, None]
    if row.kind == "stacked":
        return torch.cat(parts)
    if row.kind == "heads":
        rest = parts[0].shape[1:]
        joined = torch.stack([part.reshape(config["num_attention_heads"], -1, *rest) for part in parts], dim=1).reshape(-1, *rest)
        return joined[:, :, None] if row.original.endswith("weight") else joined
    return parts[0]
