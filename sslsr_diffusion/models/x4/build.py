"""Settings to an x4 upscaler's networks: from a base's folder or hub id, or drawn at random from a shipped architecture."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import Refused, UserError
from sslsr_diffusion.models.base import Base, find_base
from sslsr_diffusion.models.clip_text import empty_context, encode_texts, load_text_encoder, load_tokenizer
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Text
from sslsr_diffusion.models.loading import drawn, loaded
from sslsr_diffusion.models.lora import add_lora
from sslsr_diffusion.models.process import DDPM, Process
from sslsr_diffusion.models.size import pixels_per_latent
from sslsr_diffusion.models.stablesr.near_identity import can_start_near_identity, start_near_identity
from sslsr_diffusion.models.tensor_names import check_tensors
from sslsr_diffusion.models.x4.denoiser import Denoiser
from sslsr_diffusion.models.x4.networks import CALL, X4Networks
from sslsr_diffusion.models.x4.settings import MAX_NOISE_LEVEL, SCALE, X4Call, X4Settings, load_preset
from sslsr_diffusion.shipped_model import local_folder

log = logging.getLogger(__name__)

SCALING_FACTOR = 0.08333  # the stock pipeline sets it, whatever the autoencoder's config says
PARTS = ("unet", "vae", "scheduler", "low_res_scheduler")


def build_networks(settings: X4Settings, *, train: str = "all", meta: bool = False, seed: int = 0, keep_text: bool = False) -> X4Networks:
    """Codec, denoiser and processes; the autoencoder is frozen, `train` decides what of the UNet trains.

    Args:
        train: "all", "attention" or "lora".
        meta: shapes only (the dry run): no weights are read and, unless `base` is a folder, no network is used.
        seed: of what is drawn.
        keep_text: keep the text encoder, so that any prompt can be encoded.

    UserError where the base cannot be found; Refused where it is no x4 upscaler, or its schedulers are not those of its weights.
    """
    if (train == "lora") != (settings.lora is not None):
        given = "none" if settings.lora is None else "some"
        raise UserError(f"model.lora: expected LoRA settings with task.train: lora and with nothing else, got {given} with {train}.")
    if settings.init == "random" or (meta and not local_folder(settings.base).is_dir()):
        networks = _from_preset(settings, meta=meta, seed=seed)
    else:
        networks = _from_base(settings, find_base(settings.base, settings.revision, advice={}), meta=meta, keep_text=keep_text)
    networks.codec.requires_grad_(False).eval()
    if settings.lora is not None:
        add_lora(networks.denoiser.unet, settings.lora, seed=seed)
    else:
        networks.set_trainable(train)
    return networks


def read_pipeline(folder: Path, *, meta: bool = False) -> X4Networks:
    """The networks of a pipeline folder, frozen, with its text encoder; with `meta` their shapes alone."""
    return build_networks(X4Settings(base=str(folder)), meta=meta, keep_text=True).requires_grad_(False).eval()


def _from_preset(settings: X4Settings, *, meta: bool, seed: int) -> X4Networks:
    preset = load_preset(settings.preset)
    if settings.prompt and not meta:
        raise UserError("model.prompt: a model with init: random has no text encoder; leave the prompt empty, or train from a base.")
    vae = drawn(AutoencoderKL, preset["vae"], meta, seed)
    if not meta and can_start_near_identity(vae):
        start_near_identity(vae)
        _spread(vae)
    unet = drawn(UNet2DConditionModel, preset["unet"], meta, seed)
    pretrained = settings.init == "pretrained"
    return X4Networks(
        Codec(vae),
        Denoiser(unet),
        (_scheduler(preset["scheduler"]), _scheduler(preset["low_res_scheduler"])),
        Text(empty_context(unet)),
        base=settings.base if pretrained else f"random:{settings.preset}",
        text_config=preset.get("text_encoder") if pretrained else None,
    )


@torch.no_grad()
def _spread(vae: AutoencoderKL) -> None:
    """Latents that start as the picture, in [-1, 1], become as wide as the scaling factor, which cannot move, expects them."""
    mean = slice(0, vae.config.latent_channels)
    for tensor in (vae.quant_conv.weight, vae.quant_conv.bias):
        tensor[mean] /= SCALING_FACTOR
    vae.post_quant_conv.weight *= SCALING_FACTOR


def _from_base(settings: X4Settings, base: Base, *, meta: bool, keep_text: bool = False) -> X4Networks:
    max_noise_level = _max_noise_level(base)
    _check_networks(base, max_noise_level)  # before gigabytes are read
    schedulers = schedulers_of(base)
    unet, vae = (loaded(cls, base, part, meta) for cls, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")))
    if vae.config.scaling_factor != SCALING_FACTOR:
        log.warning("%s: scaling_factor %s becomes %s, as in diffusers", base.part("vae"), vae.config.scaling_factor, SCALING_FACTOR)
        vae.register_to_config(scaling_factor=SCALING_FACTOR)
    has_text = base.has("text_encoder")
    if settings.prompt and not has_text and not meta:
        raise UserError(f"model.prompt: {base.name} has no text encoder; leave the prompt empty.")
    encoder, tokenizer = (load_text_encoder(base), load_tokenizer(base)) if has_text and not meta else (None, None)
    with torch.no_grad():
        device = torch.device("cpu")
        text = empty_context(unet) if encoder is None else encode_texts([settings.prompt, ""], encoder, tokenizer, device)
    networks = X4Networks(
        Codec(vae),
        Denoiser(unet),
        schedulers,
        Text(text.float()),
        base=base.name,
        source=base,
        text_config=base.config("text_encoder") if has_text else None,
        max_noise_level=max_noise_level,
        call=read_call(base),
    )
    if keep_text:
        networks.text_encoder, networks.tokenizer = encoder, tokenizer
    return networks


def _check_networks(base: Base, max_noise_level: int) -> None:
    """Raises Refused unless the configs are an x4 upscaler's."""
    unet, vae = base.config("unet"), base.config("vae")
    try:
        latent, labels = int(vae.get("latent_channels", 4)), int(unet.get("num_class_embeds") or 0)
        scale = pixels_per_latent({"block_out_channels": (64,), **vae})
    except (TypeError, ValueError, LookupError) as error:
        raise UserError(
            f"model.base: unet/ and vae/ of {base.name}: their configs cannot be read ({error}); fetch the model again."
        ) from None
    for expected, got, fits in (
        (f"a UNet with {latent + 3} input channels, {latent} of the latent and 3 of the picture", unet.get("in_channels"), latent + 3),
        (f"an autoencoder with {SCALE} pixels per latent pixel", scale, SCALE),
        (f"a UNet with class labels for {max_noise_level} noise levels (num_class_embeds)", labels, max(max_noise_level, labels)),
    ):
        if got != fits:
            raise Refused(f"model.base: {base.name}: expected {expected}, got {got}; choose a Stable Diffusion x4 upscaler.")


def _max_noise_level(base: Base) -> int:
    path = base.folder / "model_index.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("max_noise_level", MAX_NOISE_LEVEL) if path.is_file() else MAX_NOISE_LEVEL
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"model.base: model_index.json of {base.name} cannot be read ({error}); fetch the model again.") from None
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise UserError(f"model.base: max_noise_level in model_index.json of {base.name}: expected a number from 1 on, got {found!r}.")
    return found


def read_call(base: Base) -> X4Call:
    """The defaults of a call that lie beside the pipeline of a result. Raises UserError: they are damaged."""
    path = base.folder / CALL
    if not path.is_file():
        return X4Call()
    try:
        return parse(X4Call, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecipeError) as error:
        raise UserError(f"model.base: {CALL} of {base.name} cannot be read ({error}); fetch or export the model again.") from None


def schedulers_of(base: Base) -> tuple[Any, Any]:
    """The schedulers of the latents and of the low-resolution picture, as diffusers' objects.

    Refused where they are swapped, or of another process or prediction type than the weights: the mistakes of published tries, whose
    results are noise, or as smooth as if nothing had been learned.
    """
    main, low = base.config("scheduler"), base.config("low_res_scheduler")
    kinds = [str(config.get("prediction_type", "epsilon")) for config in (main, low)]
    if kinds == ["epsilon", "v_prediction"]:
        raise Refused(
            f"model.base: {base.name}: expected v_prediction in scheduler/ and epsilon in low_res_scheduler/, got them swapped; exchange "
            "the two folders."
        )
    if kinds[0] != "v_prediction":
        raise Refused(
            f"model.base: {base.name}: expected a scheduler/ with prediction_type v_prediction, which x4 upscalers are trained for, got "
            f"{kinds[0]}; take scheduler/ of the model that it was fine-tuned from."
        )
    for part, config in (("scheduler", main), ("low_res_scheduler", low)):
        _check_betas(part, config, base.name)
    return _scheduler(main), _scheduler(low)


def _check_betas(part: str, config: Mapping[str, Any], name: str) -> None:
    try:
        process = Process.of(config)
    except (UserError, ValueError, TypeError, NotImplementedError) as error:
        raise Refused(f"model.base: {name}: {part}/: {error}") from None
    want = Process.of(load_preset("x4")[part])
    same = (
        isinstance(process, DDPM) and process.signal.shape == want.signal.shape and torch.allclose(process.signal, want.signal, atol=1e-5)
    )
    if not same:
        told = ", ".join(f"{key} {config.get(key)}" for key in ("_class_name", "beta_schedule", "beta_start", "beta_end"))
        raise Refused(
            f"model.base: {name}: expected a {part}/ with the noise that x4 upscalers are trained for (1000 steps, beta_schedule "
            f"scaled_linear from 0.0001 to 0.02), got {told}; take {part}/ of the model that it was fine-tuned from."
        )


def _scheduler(config: Mapping[str, Any]) -> Any:
    return getattr(diffusers, config["_class_name"]).from_config(config)


def check_base_folder(settings: X4Settings) -> str:
    """What a run would find in the base's folder, from configs and headers alone.

    UserError where a component is missing, or its weights are not there or not whole; Refused where it is no x4 upscaler.
    """
    base = Base(settings.base, local_folder(settings.base))
    lacking = [part for part in PARTS if not base.has(part)]
    if lacking:
        raise UserError(f"{base.name}: expected the folders {', '.join(PARTS)}, got no {', '.join(lacking)}; fetch the model again.")
    networks = _from_base(settings, base, meta=True)
    for part, shapes in (("unet", networks.denoiser.unet), ("vae", networks.codec.vae)):
        check_tensors(base.folder / part, shapes, base.part(part))
    if base.has("text_encoder"):
        check_tensors(base.folder / "text_encoder", None, base.part("text_encoder"))
    return f"{base.name}: found {', '.join(PARTS)}"
