"""Settings to networks: from a base model's folder or hub id, or drawn at random from a shipped architecture."""

import logging
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from sslsr_diffusion.errors import Refused, UserError
from sslsr_diffusion.models.base import Base, find_base
from sslsr_diffusion.models.clip_text import check_tokenizer, empty_context, encode_prompt
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.loading import drawn, loaded
from sslsr_diffusion.models.process import DDPM, Process
from sslsr_diffusion.models.stablesr.cfw import AutoencoderKLCFW
from sslsr_diffusion.models.stablesr.denoiser import Denoiser
from sslsr_diffusion.models.stablesr.near_identity import can_start_near_identity, start_near_identity
from sslsr_diffusion.models.stablesr.networks import AutoencoderNetworks, StableSRNetworks
from sslsr_diffusion.models.stablesr.settings import SFT_ARGUMENTS, StableSRSettings, load_preset
from sslsr_diffusion.models.stablesr.structural_encoder import StructuralEncoder
from sslsr_diffusion.models.stablesr.unet import SFTUNet2DConditionModel
from sslsr_diffusion.models.tensor_names import check_tensors
from sslsr_diffusion.seeding import derive_seed, seeded
from sslsr_diffusion.shipped_model import local_folder

log = logging.getLogger(__name__)


def build_networks(
    settings: StableSRSettings, *, plain: bool = False, train: str = "sft", meta: bool = False, seed: int = 0
) -> StableSRNetworks:
    """Codec, denoiser and process; the VAE is frozen and in eval mode, `train` decides what of the denoiser trains.

    Args:
        plain: a base instead of an upscaler: no structural encoder, no SFT layers.
        train: "sft" (structural encoder and SFT layers, as StableSR) or "all".
        meta: shapes only (the dry run): no weights are read and, unless `base` is a folder, no network is used.
        seed: of freshly drawn layers.

    UserError where the base or the autoencoder cannot be found, or does not fit.
    """
    if settings.init == "random" or (meta and not local_folder(settings.base).is_dir()):
        networks = _from_preset(settings, plain=plain, meta=meta, seed=seed)
    else:
        networks = _from_base(settings, find_base(settings.base, settings.revision), plain=plain, meta=meta, seed=seed)
    networks.check_fit()
    networks.codec.requires_grad_(False).eval()
    networks.set_trainable(train)
    return networks


def build_autoencoder(settings: StableSRSettings, *, meta: bool = False, seed: int = 0) -> AutoencoderNetworks:
    """Only the autoencoder, trainable: from `settings.vae`, the base, or drawn at random from the preset."""
    own = _own_vae(settings, meta)
    if own is not None:
        vae = own
    elif settings.init == "random" or meta:
        vae = drawn(AutoencoderKL, load_preset(settings.preset)["vae"], meta, seed)
        if not meta and can_start_near_identity(vae):
            start_near_identity(vae)
    else:
        vae = _loaded_vae(find_base(settings.base, settings.revision, parts=["vae/*"]), meta=False)
    vae.train()
    return AutoencoderNetworks(Codec(vae), settings.base if settings.init == "pretrained" else f"random:{settings.preset}")


def read_pipeline(folder: Path, *, meta: bool = False) -> StableSRNetworks:
    """The networks of a pipeline folder, frozen; with `meta` their shapes alone."""
    return build_networks(StableSRSettings(base=str(folder)), meta=meta).requires_grad_(False).eval()


def load_vae(folder: str | Path, *, meta: bool = False) -> AutoencoderKL:
    """An autoencoder from its own folder or from a pipeline folder that holds one in vae/; UserError where neither is there."""
    base, part = _find_vae(str(folder))
    return _loaded_vae(base, meta, part)


def check_vae_folder(folder: str) -> str:
    """What a run would find in the folder of its own autoencoder, from config and headers alone; UserErrors as in `load_vae`."""
    base, part = _find_vae(folder)
    check_tensors(base.folder / part, _loaded_vae(base, True, part), base.part(part))
    return folder


def _find_vae(folder: str) -> tuple[Base, str]:
    path = local_folder(folder)
    for candidate in (path / "vae", path):
        if (candidate / "config.json").is_file():
            return Base(folder, candidate.parent, key="model.vae"), candidate.name
    raise UserError(f"model.vae: {folder} holds no autoencoder (config.json, or vae/config.json); train one first or leave model.vae out.")


def _own_vae(settings: StableSRSettings, meta: bool) -> AutoencoderKL | None:
    """The autoencoder that the recipe names; for shapes alone, one that is not there yet is left out."""
    if settings.vae is None:
        return None
    try:
        return load_vae(settings.vae, meta=meta)
    except UserError:
        if meta:
            return None
        raise


def _loaded_vae(base: Base, meta: bool, part: str = "vae") -> AutoencoderKL:
    return loaded(_vae_class(base, part), base, part, meta)


def _vae_class(base: Base, part: str) -> type[AutoencoderKL]:
    kind = base.config(part).get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderKLCFW"):
        raise UserError(f"{base.key}: expected an AutoencoderKL, {base.name} holds a {kind}.")
    return AutoencoderKLCFW if kind == "AutoencoderKLCFW" else AutoencoderKL


def _from_preset(settings: StableSRSettings, *, plain: bool, meta: bool, seed: int) -> StableSRNetworks:
    preset = load_preset(settings.preset, plain=plain)
    if settings.prompt and not meta:
        raise UserError("model.prompt: a model with init: random has no text encoder; leave the prompt empty, or train from a base.")
    vae = _own_vae(settings, meta) or drawn(AutoencoderKL, preset["vae"], meta, seed)
    if plain:
        denoiser = Denoiser(drawn(UNet2DConditionModel, preset["unet"], meta, seed), None)
    else:
        encoder = drawn(StructuralEncoder, preset["structural_encoder"], meta, seed)
        denoiser = Denoiser(drawn(SFTUNet2DConditionModel, preset["unet"], meta, seed), encoder)
    return StableSRNetworks(
        Codec(vae),
        denoiser,
        Process.of(preset["scheduler"]),
        empty_context(denoiser.unet),
        base=settings.base if settings.init == "pretrained" else f"random:{settings.preset}",
        text_config=preset.get("text_encoder") if settings.init == "pretrained" else None,
    )


def _from_base(settings: StableSRSettings, base: Base, *, plain: bool, meta: bool, seed: int) -> StableSRNetworks:
    ours = base.has("structural_encoder")
    if plain and ours:
        raise UserError(f"model.base: task base wants a plain latent-diffusion model, {base.name} is an upscaler; use task diffusion.")
    denoiser = _upscaler(settings, base, meta, seed) if not plain else Denoiser(loaded(UNet2DConditionModel, base, "unet", meta), None)
    if base.has("text_encoder") and not meta:
        text = encode_prompt(base, settings.prompt)
    elif settings.prompt and not meta:
        raise UserError(f"model.prompt: {base.name} has no text encoder; leave the prompt empty.")
    else:
        text = empty_context(denoiser.unet)
    return StableSRNetworks(
        Codec(_own_vae(settings, meta) or _loaded_vae(base, meta)),
        denoiser,
        process_of(base),
        text,
        prompt=settings.prompt,
        base=base.name,
        source=base,
        text_config=base.config("text_encoder") if base.has("text_encoder") else None,
        call_defaults=None if plain else base.call_defaults(),
    )


def process_of(base: Base) -> Process:
    """The noise process of a base's scheduler; Refused where it is not the one that this family's networks are made for."""
    config = base.config("scheduler")
    try:
        process = Process.of(config)
    except UserError as error:
        raise Refused(f"model.base: {base.name}: {error}") from None
    if not isinstance(process, DDPM):
        raise Refused(
            f"model.base: {base.name}: expected a scheduler of the DDPM family, which StableSR's networks are made for, got "
            f"{config.get('_class_name')}, a flow; choose a Stable Diffusion 2.1 base."
        )
    return process


def _upscaler(settings: StableSRSettings, base: Base, meta: bool, seed: int) -> Denoiser:
    """The base's UNet with structural encoder and SFT layers: its own, or drawn new, as wide as the preset of the same UNet has them."""
    if base.has("structural_encoder"):
        return Denoiser(loaded(SFTUNet2DConditionModel, base, "unet", meta), loaded(StructuralEncoder, base, "structural_encoder", meta))
    log.info("%s has no structural encoder: it and the SFT layers are drawn new", base.name)
    plain, preset = loaded(UNet2DConditionModel, base, "unet", meta), load_preset(settings.preset)
    same = plain.config.in_channels == preset["unet"]["in_channels"] and all(
        list(plain.config[name]) == preset["unet"][name] for name in ("block_out_channels", "down_block_types")
    )
    widths = {name: preset["unet"][name] for name in SFT_ARGUMENTS if same and name in preset["unet"]}
    try:
        with seeded(derive_seed(seed, "init"), meta=meta):
            unet = SFTUNet2DConditionModel.from_unet(plain, **widths)
    except ValueError as error:
        raise UserError(f"model.base: {base.name}: {str(error).rstrip('.')}; choose another base.") from None
    return Denoiser(unet, drawn(StructuralEncoder, preset["structural_encoder"] if same else _encoder_config(unet), meta, seed))


def _encoder_config(unet: SFTUNet2DConditionModel) -> dict[str, Any]:
    """StableSR's encoder for a Stable Diffusion UNet; a narrower one, in proportion, for a narrower UNet."""
    widths = unet.config.block_out_channels
    config = load_preset("sd21")["structural_encoder"]
    config |= {"in_channels": unet.config.in_channels, "out_channels": unet.config.feature_channels}
    if tuple(widths) != (320, 640, 1280, 1280):
        config |= {"block_out_channels": list(widths), "attention_levels": [*[True] * (len(widths) - 1), False]}
        config["norm_num_groups"] = unet.config.norm_num_groups
    return config


def check_base_folder(settings: StableSRSettings) -> str:
    """What a run would find in the base's folder, from configs and headers alone.

    UserError where a component is missing, its weights are not there or not whole, or the scheduler is of another process.
    """
    base = Base(settings.base, local_folder(settings.base))
    has = [part for part in ("unet", "vae", "scheduler") if base.has(part)]
    if len(has) < 3:
        raise UserError(f"{base.name}: found {', '.join(has) or 'no unet, vae or scheduler'}; expected unet, vae and scheduler.")
    process_of(base)
    ours = base.has("structural_encoder")
    parts = {"unet": SFTUNet2DConditionModel, "structural_encoder": StructuralEncoder} if ours else {"unet": UNet2DConditionModel}
    parts |= {} if settings.vae else {"vae": _vae_class(base, "vae")}
    for part, cls in parts.items():
        check_tensors(base.folder / part, loaded(cls, base, part, meta=True), base.part(part))
    if base.has("text_encoder"):
        check_tensors(base.folder / "text_encoder", None, base.part("text_encoder"))
        if base.has("tokenizer"):
            check_tokenizer(base)
    return f"{base.name}: found {', '.join(has)}"
