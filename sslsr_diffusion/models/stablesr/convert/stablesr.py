"""State dicts of StableSR's parts, converted in memory in both directions.

`convert_*` take the original's tensors and give ours; `restore_*` are their exact inverse (bit-equal round trip).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.stablesr.convert.names import Row, encoder_rows, text_rows, unet_rows, vae_rows

State = Mapping[str, Tensor]

UNET = "model.diffusion_model."
ENCODER = "structcond_stage_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.model."


@dataclass(frozen=True)
class Part:
    """One converted part: our tensors, and the original's names under its prefix that no tensor of ours takes."""

    tensors: dict[str, Tensor]
    unknown: list[str] = field(default_factory=list)


def convert_unet(state: State, names: Iterable[str], layers_per_block: int = 2, prefix: str = UNET) -> Part:
    """Tensors of SFTUNet2DConditionModel.

    Args:
        state: the checkpoint; tensors outside `prefix` are left alone.
        names: the names that the model has (`model.state_dict()`; a model on the meta device will do).
        layers_per_block: of the model's config.
        prefix: of the part inside the checkpoint.

    Raises:
        UserError: a tensor that the model needs is missing.
    """
    return _convert(unet_rows(names, layers_per_block), state, prefix)


def restore_unet(tensors: State, layers_per_block: int = 2, prefix: str = UNET) -> dict[str, Tensor]:
    """The original's naming of SFTUNet2DConditionModel's tensors."""
    return _restore(unet_rows(tensors, layers_per_block), tensors, prefix)


def convert_structural_encoder(
    state: State, names: Iterable[str], layers_per_block: int = 2, heads: int = 4, prefix: str = ENCODER
) -> Part:
    """Tensors of StructuralEncoder; arguments as in `convert_unet`, `heads`: attention heads of the model's config."""
    return _convert(encoder_rows(names, layers_per_block), state, prefix, heads)


def restore_structural_encoder(tensors: State, layers_per_block: int = 2, heads: int = 4, prefix: str = ENCODER) -> dict[str, Tensor]:
    """The original's naming of StructuralEncoder's tensors."""
    return _restore(encoder_rows(tensors, layers_per_block), tensors, prefix, heads)


def convert_vae(state: State, names: Iterable[str], levels: int = 4, prefix: str = VAE) -> Part:
    """Tensors of AutoencoderKL, or of AutoencoderKLCFW from a CFW file (prefix ""); `levels`: len(block_out_channels)."""
    return _convert(vae_rows(names, levels), state, prefix)


def restore_vae(tensors: State, levels: int = 4, prefix: str = VAE) -> dict[str, Tensor]:
    """The original's naming of AutoencoderKL's or AutoencoderKLCFW's tensors."""
    return _restore(vae_rows(tensors, levels), tensors, prefix)


def convert_text_encoder(state: State, names: Iterable[str], prefix: str = TEXT) -> Part:
    """Tensors of CLIPTextModel; OpenCLIP's last block and its projection are not part of Stable Diffusion 2 and stay unknown."""
    names = list(names)
    inner = "text_model." if names and all(name.startswith("text_model.") for name in names) else ""
    part = _convert(text_rows(name.removeprefix(inner) for name in names), state, prefix)
    return Part({inner + name: tensor for name, tensor in part.tensors.items()}, part.unknown)


def restore_text_encoder(tensors: State, prefix: str = TEXT) -> dict[str, Tensor]:
    """OpenCLIP's naming of CLIPTextModel's tensors."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    return _restore(text_rows(plain), plain, prefix)


def _convert(rows: list[Row], state: State, prefix: str, heads: int = 1) -> Part:
    missing = [prefix + row.original for row in rows if prefix + row.original not in state]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"the checkpoint lacks {len(missing)} of the {len(rows)} tensors expected under {prefix or 'the top'!r}: {shown}.")
    tensors: dict[str, Tensor] = {}
    for row in rows:
        tensors.update(zip(row.ours, _split(row, state[prefix + row.original], heads), strict=True))
    known = {prefix + row.original for row in rows}
    return Part(tensors, sorted(name for name in state if name.startswith(prefix) and name not in known))


def _restore(rows: list[Row], tensors: State, prefix: str, heads: int = 1) -> dict[str, Tensor]:
    return {prefix + row.original: _join(row, [tensors[name] for name in row.ours], heads) for row in rows}


def _split(row: Row, tensor: Tensor, heads: int) -> tuple[Tensor, ...]:
    if row.kind == "pointwise2d":
        return (tensor[:, :, 0, 0],)
    if row.kind == "pointwise1d":
        return (tensor[:, :, 0],)
    if row.kind == "stacked":
        return tuple(part.contiguous() for part in tensor.chunk(3))
    if row.kind == "heads":  # [H, 3, d, C]: within a head q, then k, then v
        rest = tensor.shape[1:2]
        per_head = tensor.reshape(heads, 3, -1, *rest)
        return tuple(per_head[:, k].reshape(-1, *rest).contiguous() for k in range(3))
    return (tensor,)


def _join(row: Row, parts: list[Tensor], heads: int) -> Tensor:
    if row.kind == "pointwise2d":
        return parts[0][:, :, None, None]
    if row.kind == "pointwise1d":
        return parts[0][:, :, None]
    if row.kind == "stacked":
        return torch.cat(parts)
    if row.kind == "heads":
        rest = parts[0].shape[1:]
        joined = torch.stack([part.reshape(heads, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)
        return joined[:, :, None] if row.original.endswith("weight") else joined
    return parts[0]
