"""Settings to a one-step upscaler's networks: a base from a folder or hub id, or drawn at random, with fresh LoRAs."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from sslsr_diffusion.errors import MissingDependency, Refused, UserError
from sslsr_diffusion.models.base import Base, find_base
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Text
from sslsr_diffusion.models.loading import drawn, loaded
from sslsr_diffusion.models.one_step.backbone import AUTOENCODERS, BACKBONES, Backbone, backbone_class
from sslsr_diffusion.models.one_step.networks import OneStepNetworks
from sslsr_diffusion.models.one_step.result import PROMPT, read_text, read_told
from sslsr_diffusion.models.one_step.settings import RESULT, OneStepSettings, load_preset
from sslsr_diffusion.models.process import DDPM, Flow, Process
from sslsr_diffusion.models.stablesr.near_identity import can_start_near_identity, start_near_identity
from sslsr_diffusion.models.tensor_names import check_tensors
from sslsr_diffusion.shipped_model import local_folder
from sslsr_diffusion.tables import named

_CONFIGS = [f"*/{name}.json" for name in ("config", "scheduler_config")]  # of a base: what its shapes follow from


def build_networks(settings: OneStepSettings, *, train: str = "lora", meta: bool = False, seed: int = 0) -> OneStepNetworks:
    """Codec, base network and process, all frozen but for what trains.

    Args:
        train: `lora`, the settings' fresh LoRAs and whole layers; `whole`, every weight.
        meta: shapes only: no weights are read and, unless `base` is a folder, no network is used.
        seed: of what is drawn: LoRAs, and the base with init random.

    UserError where the base cannot be found, is of another class, or does not go with the rest of the settings.
    """
    given = [key for key in ("lora", "encoder_lora", "full") if getattr(settings, key)]
    if train == "whole":
        if given or settings.weights != "float32":
            wrong = f"{given[0]} to be null" if given else f"weights: float32, got {settings.weights}"
            raise UserError(f"model.{given[0] if given else 'weights'}: task.train: whole trains every weight; expected {wrong}.")
        networks = _frozen(settings, meta=meta, seed=seed)
        networks.train_whole()
        return networks
    if not given:
        raise UserError(
            "model.lora: expected lora, encoder_lora or full, got none of them, so nothing would train; give one, or set task.train: whole."
        )
    networks = _frozen(settings, meta=meta, seed=seed)
    networks.add_trained(seed)
    return networks


def read_networks(folder: Path, *, meta: bool = False) -> OneStepNetworks:
    """The networks of a result, frozen; its base is looked for where the run had it, or in the folder itself where it is merged.

    With `meta`, of a base on the hub the configs alone are fetched.
    UserError where a file is missing, damaged, or of another base.
    """
    told = read_told(folder)
    settings = told.settings.model_copy(update={"base": str(folder)}) if (folder / "vae").is_dir() else told.settings
    networks = _frozen(settings, None if meta else read_text(folder / PROMPT), meta=meta, seed=told.seed, ask=True)
    networks.call = told.call
    if meta:
        networks.add_trained(told.seed)
    else:
        networks.load(folder)
    return networks.requires_grad_(False).eval()


def _frozen(settings: OneStepSettings, text: Text | None = None, *, meta: bool, seed: int, ask: bool = False) -> OneStepNetworks:
    """The base as it is; `text`: the encoded prompt, where it is known already, and no text encoder is read.

    `ask`: the hub may be asked where shapes are wanted alone; else those of a base that is not here are the preset's.
    """
    settings, call = _called_as_its_base(settings)
    if settings.init == "random" or (meta and not ask and not local_folder(settings.base).is_dir()):
        networks = _from_preset(settings, text, meta=meta, seed=seed)
    else:
        base = find_base(settings.base, settings.revision, _CONFIGS if meta else None)
        networks = _from_base(settings, base, text, meta=meta)
    networks.check_fit()
    networks.call = call
    return networks.requires_grad_(False).eval()


def _called_as_its_base(settings: OneStepSettings) -> tuple[OneStepSettings, dict[str, Any]]:
    """The settings with the call that a base was trained for which is a one-step model itself, and the defaults of that call.
    UserError where they say another one.
    """
    folder = local_folder(settings.base)
    if settings.init == "random" or not (folder / RESULT).is_file():
        return settings, {}
    told = read_told(folder)
    own = {key: getattr(told.settings, key) for key in ("timestep", "sigma", "noise", "x0")}
    for key, field in type(settings).model_fields.items():
        value = getattr(settings, key)
        if key in own and value not in (own[key], field.default):
            raise UserError(f"model.{key}: {settings.base} is a one-step model with {key} {own[key]}, got {value}; leave it out.")
    return settings.model_copy(update=own), told.call


def _from_preset(settings: OneStepSettings, text: Text | None, *, meta: bool, seed: int) -> OneStepNetworks:
    preset = load_preset(settings.preset)
    backbone = _known(preset.get("unet") or preset["transformer"], settings.preset)
    if settings.prompt and not meta:
        raise UserError("model.prompt: a model with init: random has no text encoder; leave the prompt empty, or train from a base.")
    vae = drawn(_autoencoder_class(preset["vae"], backbone, settings.preset), preset["vae"], meta, seed)
    if not meta and vae.quant_conv is not None and can_start_near_identity(vae):
        start_near_identity(vae)  # its latents show the picture, though nobody trained it
    denoiser = backbone(drawn(_class(backbone.network_class), preset[backbone.part], meta, seed))
    if settings.weights != "float32":
        denoiser.to(torch.bfloat16)  # the shapes of integers, too: `saved_bytes` takes off what those save
    text = text or denoiser.no_text(backbone.tokens if meta and settings.init == "pretrained" else 1)
    base = settings.base if settings.init == "pretrained" else f"random:{settings.preset}"
    return OneStepNetworks(Codec(vae), denoiser, _process(preset["scheduler"], denoiser, base), text, settings, base=base, seed=seed)


def _from_base(settings: OneStepSettings, base: Base, text: Text | None, *, meta: bool) -> OneStepNetworks:
    backbone = backbone_of(base)
    vae = loaded(_autoencoder_class(base.config("vae"), backbone, base.name), base, "vae", meta)
    denoiser = backbone(loaded(_class(backbone.network_class), base, backbone.part, meta, **_held(settings.weights)))
    process = _process(base.config("scheduler"), denoiser, base.name)
    if text is None:
        text = denoiser.no_text(backbone.tokens) if meta else _encoded(denoiser, base, settings.prompt)
    return OneStepNetworks(Codec(vae), denoiser, process, text, settings, base=base.name, source=base)


def _held(weights: str) -> dict[str, Any]:
    """What from_pretrained is told of the network's precision; MissingDependency where bitsandbytes is wanted and is not there."""
    if weights in ("float32", "bfloat16"):
        return {"torch_dtype": getattr(torch, weights)}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependency(f"model.weights: {weights} needs bitsandbytes: pip install 'sslsr-diffusion[adam8bit]'")
    bits = {"load_in_8bit": True} if weights == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    compute = {} if weights == "int8" else {"bnb_4bit_compute_dtype": torch.bfloat16}
    return {"torch_dtype": torch.bfloat16, "quantization_config": _class("BitsAndBytesConfig")(**bits, **compute)}


def backbone_of(base: Base) -> type[Backbone]:
    """How the network in a pipeline folder is called; Refused where its class, or its autoencoder's, is not known here."""
    part = "unet" if base.has("unet") else "transformer"
    backbone = _known(base.config(part), base.name)
    _autoencoder_class(base.config("vae"), backbone, base.name)
    return backbone


def _autoencoder_class(config: dict[str, Any], backbone: type[Backbone], name: str) -> Any:
    kind = config.get("_class_name")
    if kind not in backbone.autoencoder_classes:
        wanted = " or ".join(backbone.autoencoder_classes)
        raise Refused(f"model.base: {name}: expected {wanted} in vae/, got {kind}; choose another base.")
    return named(AUTOENCODERS[kind])


def _known(config: dict[str, Any], name: str) -> type[Backbone]:
    kind = str(config.get("_class_name"))
    if kind not in BACKBONES:
        raise Refused(f"model.base: {name}: expected one of {', '.join(BACKBONES)}, got {kind}; choose another base.")
    backbone = backbone_class(kind)
    backbone.check(config, name)
    return backbone


def _class(name: str) -> Any:
    return named(f"diffusers:{name}")


def _process(config: dict[str, Any], denoiser: Backbone, name: str) -> Process:
    """The base's noise process; Refused where it is not of the kind that its network is made for."""
    try:
        process = Process.of(config)
    except UserError as error:
        raise Refused(f"model.base: {name}: {error}") from None
    if not isinstance(process, Flow if denoiser.flow else DDPM):
        wanted = "a flow's scheduler, such as FlowMatchEulerDiscreteScheduler" if denoiser.flow else "a scheduler of the DDPM family"
        raise Refused(
            f"model.base: {name}: expected {wanted}, for a {denoiser.network_class}, got {config.get('_class_name')}; "
            "take the scheduler of the original base."
        )
    return process


def _encoded(denoiser: Backbone, base: Base, prompt: str) -> Text:
    """The prompt's text; zeros for a base that never had a text encoder, as those that this package trains."""
    lacks = _lacking_text(base)
    if lacks:
        raise UserError(f"model.base: {base.name} lacks its {lacks}/, which model.prompt is encoded with; fetch the whole model.")
    if base.has("text_encoder"):
        try:
            return denoiser.encode(base, prompt)
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200].rstrip(".")
            raise UserError(f"model.base: the text encoder of {base.name} cannot be loaded ({reason}).") from error
    if prompt:
        raise UserError(f"model.prompt: {base.name} has no text encoder; leave the prompt empty.")
    return denoiser.no_text()


def _lacking_text(base: Base) -> str | None:
    """The first text encoder or tokenizer that the base's index has and its folder has not; Stable Diffusion 3 has three of each."""
    try:
        index = json.loads((base.folder / "model_index.json").read_text(encoding="utf-8"))
        parts = [part for part in index if part.startswith(("text_encoder", "tokenizer"))]
        listed = [part for part in parts if isinstance(index[part], list) and any(index[part])]
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return next((part for part in listed if not base.has(part)), None)


def check_base_folder(settings: OneStepSettings) -> str:
    """What a run would find in the base's folder, from configs and headers alone.

    UserError where a component is missing, its weights are not there or not whole, or it is not one for this family.
    """
    base = Base(settings.base, local_folder(settings.base))
    networks = _frozen(settings, meta=True, seed=0)
    backbone = backbone_of(base)
    for part, cls in (
        (backbone.part, _class(backbone.network_class)),
        ("vae", _autoencoder_class(base.config("vae"), backbone, base.name)),
    ):
        check_tensors(base.folder / part, loaded(cls, base, part, meta=True), base.part(part))
    encoders = [part for part in ("text_encoder", "text_encoder_2", "text_encoder_3") if base.has(part)]
    lacks = _lacking_text(base)
    if lacks:
        raise UserError(f"model.base: {base.name} lacks its {lacks}/; fetch the whole model.")
    for part in encoders:
        check_tensors(base.folder / part, None, base.part(part))
    found = [part for part in (backbone.part, "vae", "scheduler") if base.has(part)] + encoders
    return f"{networks.base}: found {', '.join(found)}"
