"""A whole checkpoint to the components of a pipeline, and a pipeline folder back to the original's naming."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models import AutoencoderKLCFW, SFTUNet2DConditionModel, StructuralEncoder
from sslsr_diffusion.models.base import Base, find_base
from sslsr_diffusion.models.clip_text import load_text_encoder, load_tokenizer
from sslsr_diffusion.models.process import Process
from sslsr_diffusion.models.stablesr.build import load_vae
from sslsr_diffusion.models.stablesr.convert import shapes
from sslsr_diffusion.models.stablesr.convert.stablesr import ENCODER, TEXT, UNET, VAE, Converted, State, convert, restore
from sslsr_diffusion.models.stablesr.settings import load_preset
from sslsr_diffusion.models.tensor_names import weight_files
from sslsr_diffusion.unpickle import read_checkpoint

ORIGINAL_HEADS = load_preset("sd21")["structural_encoder"]["num_attention_heads"]
FROM_BASE = ["vae/*", "text_encoder/*", "tokenizer/*"]

Variant = Literal["512", "768v", "turbo", "face"]


@dataclass(frozen=True)
class Preset:
    """What the weights do not say."""

    prediction_type: str
    sample_size: int  # latent side of the training crops, the natural tile
    steps: int  # sampling steps that the release was published with
    note: str = ""


VARIANTS: dict[str, Preset] = {
    "512": Preset("epsilon", 64, 200),
    "768v": Preset("v_prediction", 96, 200),
    "turbo": Preset("epsilon", 64, 4, "made for 4 sampling steps, which the pipeline takes by default"),
    "face": Preset("v_prediction", 64, 200, "the published face recipe says v-prediction although it starts from the epsilon model"),
}


@dataclass
class Conversion:
    """Components of a pipeline, and what is worth telling about how they came about."""

    components: dict[str, Any]
    variant: str
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # original names that no component takes


def guess_variant(checkpoint: Path | str) -> Variant:
    """By the released files' names: stablesr_768v_000139, stablesr_turbo, ...face..., everything else 512."""
    name = Path(checkpoint).stem.lower()
    for key in ("768v", "turbo", "face"):
        if key in name:
            return key
    return "512"


def components_from_checkpoint(
    checkpoint: Path | str,
    *,
    vqgan: Path | str | None = None,
    base: str | None = None,
    variant: Variant | None = None,
    head_channels: int = 64,
) -> Conversion:
    """Convert a released StableSR checkpoint.

    Args:
        checkpoint: .ckpt or .safetensors with `model.diffusion_model.` and `structcond_stage_model.` tensors.
        vqgan: the CFW file; its autoencoder replaces the checkpoint's.
        base: folder or hub id of Stable Diffusion 2.1 that gives what the checkpoint lacks (VAE, text encoder) and the tokenizer.
        variant: which release; default: by the file's name.
        head_channels: channels per attention head of the UNet (64 in Stable Diffusion 2).
    Raises UserError: a file cannot be read, a tensor is missing, or a part is in neither the checkpoint nor the base.
    """
    chosen = variant or guess_variant(checkpoint)
    preset = VARIANTS[chosen]
    read = read_checkpoint(checkpoint)
    result = Conversion({}, chosen, [preset.note] if preset.note else [])
    if read.foreign:
        result.notes.append(f"not loaded from {Path(checkpoint).name}: {', '.join(read.foreign)}")
    state, found_base = read.tensors, find_base(base, parts=FROM_BASE) if base else None
    config = {**shapes.unet_config(state, head_channels), "sample_size": preset.sample_size}
    if chosen == "768v":
        config["upcast_attention"] = True
    unet, unknown = _converted("unet", SFTUNet2DConditionModel, config, state)
    encoder, more = _converted("structural_encoder", StructuralEncoder, shapes.encoder_config(state), state)
    vae, of_vae = _autoencoder(state, vqgan, found_base, result.notes)
    text_encoder, of_text = _text_encoder(state, found_base, result.notes)
    tokenizer = load_tokenizer(found_base) if found_base else None
    if tokenizer is None:
        result.notes.append("no tokenizer: only the empty prompt works; give --base for prompts")
    scheduler = Process.of({**load_preset("sd21")["scheduler"], "prediction_type": preset.prediction_type}).scheduler()
    result.components.update(
        vae=vae, unet=unet, structural_encoder=encoder, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
    )
    if vqgan and shapes.has_part(state, VAE):
        result.notes.append(f"the checkpoint's own autoencoder gave way to {Path(vqgan).name}'s")
    taken = (UNET, ENCODER, *(() if of_vae is None else (VAE,)), *(() if of_text is None else (TEXT,)))
    result.unknown = sorted({*unknown, *more, *(of_vae or ()), *(of_text or ()), *(n for n in state if not n.startswith(taken))})
    for component in (unet, encoder, vae):
        component.eval()
    return result


def _autoencoder(state: State, vqgan: Path | str | None, base: Base | None, notes: list[str]) -> tuple[Any, list[str] | None]:
    prefix = VAE
    if vqgan:
        # the CFW file also carries the losses' networks under `loss.`
        state, prefix = {name: t for name, t in read_checkpoint(vqgan).tensors.items() if not name.startswith("loss.")}, ""
    if shapes.has_part(state, f"{prefix}encoder.") and shapes.has_part(state, f"{prefix}decoder."):
        from diffusers import AutoencoderKL

        config = shapes.vae_config(state, prefix)
        fused = "num_fuse_blocks" in config
        if vqgan and not fused:
            notes.append(f"{Path(vqgan).name} has no fusion layers: `fidelity` will have no effect")
        return _converted("vae", AutoencoderKLCFW if fused else AutoencoderKL, config, state, prefix)
    if base is None or not base.has("vae"):
        raise UserError("the checkpoint holds no autoencoder; give --vqgan with the CFW file or --base with a Stable Diffusion 2.1 folder.")
    notes.append(f"autoencoder from {base.name}")
    return load_vae(base.folder), None


def _text_encoder(state: State, base: Base | None, notes: list[str]) -> tuple[Any, list[str] | None]:
    if shapes.has_part(state, f"{TEXT}transformer."):
        from transformers import CLIPTextConfig, CLIPTextModel

        model = CLIPTextModel(CLIPTextConfig(**shapes.text_config(state)))  # its position ids are no weights: no meta device
        return model, _fill(model, convert("text_encoder", state, model.state_dict(), model.config))
    if base is None or not base.has("text_encoder"):
        raise UserError("the checkpoint holds no text encoder; give --base with a Stable Diffusion 2.1 folder or hub id.")
    notes.append(f"text encoder from {base.name}")
    return load_text_encoder(base), None


def _converted(part: str, cls: Any, config: dict[str, Any], state: State, prefix: str | None = None) -> tuple[Any, list[str]]:
    """The network that the config describes, filled, and the names that it does not take."""
    with torch.device("meta"):
        model = cls.from_config(config)
    return model, _fill(model, convert(part, state, model.state_dict(), model.config, prefix=prefix))


def _fill(model: Any, part: Converted) -> list[str]:
    own = model.state_dict()
    wrong = [f"{n} {tuple(t.shape)} instead of {tuple(own[n].shape)}" for n, t in part.tensors.items() if t.shape != own[n].shape]
    if wrong:
        raise UserError(f"the checkpoint's tensors do not fit: {'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}.")
    model.load_state_dict(part.tensors, assign=True)
    return part.unknown


def original_from_folder(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A pipeline folder's tensors under the original's names: the diffusion checkpoint, and the CFW file (empty without CFW).
    Raises UserError: the folder holds no StableSR pipeline, or one that the original's configuration cannot describe.
    """
    base = find_base(str(folder))
    configs = {part: base.config(part) for part in ("unet", "structural_encoder", "vae")}
    heads = configs["structural_encoder"]["num_attention_heads"]
    if heads != ORIGINAL_HEADS:  # the order of q, k, v in a tensor of the original follows the heads, which leave no trace in its shape
        raise UserError(
            f"{folder}: expected a structural encoder with {ORIGINAL_HEADS} attention heads, which the original's configuration has, got "
            f"{heads}; its code would read the attention of this one in another order."
        )
    if base.has("text_encoder"):
        configs["text_encoder"] = {}
    tensors = {part: _tensors(base, part) for part in configs}
    cfw = {}
    if any(name.startswith("fusion_layers.") for name in tensors["vae"]):
        cfw = restore("vae", tensors["vae"], configs["vae"], prefix="")
    tensors["vae"] = {name: tensor for name, tensor in tensors["vae"].items() if not name.startswith("fusion_layers.")}
    state: dict[str, Tensor] = {}
    for part, config in configs.items():
        state |= restore(part, tensors[part], config)
    return state, cfw


def _tensors(base: Base, part: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = base.folder / part
    try:
        return {name: tensor for file in weight_files(folder, str(folder)) for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: its weights cannot be read ({type(error).__name__}: {error}); save the pipeline again.") from None
