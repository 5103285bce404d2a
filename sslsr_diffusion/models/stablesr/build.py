"""Settings to networks: from a base model's folder or hub id, or drawn at random from a shipped architecture."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.base import Base, find_base
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.process import Schedule, make_scheduler, truncated
from sslsr_diffusion.models.stablesr.cfw import AutoencoderKLCFW
from sslsr_diffusion.models.stablesr.denoiser import Denoiser
from sslsr_diffusion.models.stablesr.near_identity import can_start_near_identity, start_near_identity
from sslsr_diffusion.models.stablesr.settings import CALL_DEFAULTS, ModelSettings, load_preset
from sslsr_diffusion.models.stablesr.structural_encoder import StructuralEncoder
from sslsr_diffusion.models.stablesr.text import count_text_encoder, empty_context, encode_prompt, load_text_encoder, load_tokenizer
from sslsr_diffusion.models.stablesr.unet import SFTUNet2DConditionModel
from sslsr_diffusion.seeding import derive_seed
from sslsr_diffusion.shipped_model import local_folder

__all__ = ["ModelSettings", "Networks", "build_autoencoder", "build_networks", "load_vae"]

log = logging.getLogger(__name__)

SFT_ARGUMENTS = ("feature_channels", "spade_hidden_channels")  # what SFTUNet2DConditionModel takes beside the plain UNet's arguments


@dataclass(frozen=True)
class Networks:
    """Everything that a step needs, and enough to write a complete pipeline at the end."""

    codec: Codec
    denoiser: Denoiser
    schedule: Schedule
    text: Tensor  # [1, L, D] context of the recipe's prompt
    base: str
    revision: str | None = None  # commit of a base that came from the hub
    trained: list[str] = field(default_factory=list)  # names of the denoiser's trained parameters
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    source: Base | None = None  # where the text encoder is, if there is one
    text_config: dict[str, Any] | None = None  # its CLIPTextConfig
    call_defaults: dict[str, float] = field(default_factory=lambda: dict(CALL_DEFAULTS))  # of the base's pipeline

    def components(self) -> dict[str, Any]:
        """The diffusers components of the pipeline; the text encoder, freed after the prompt was encoded, is read again."""
        text = self.source is not None and self.source.has("text_encoder")
        encoder = self.denoiser.structural_encoder
        return {
            "vae": self.codec.vae,
            "unet": self.denoiser.unet,
            **({} if encoder is None else {"structural_encoder": encoder}),
            "scheduler": make_scheduler(self.scheduler_config),
            "text_encoder": load_text_encoder(self.source) if text and self.source else None,
            "tokenizer": load_tokenizer(self.source) if text and self.source else None,
        }

    def save_parts(self, folder: Path) -> None:
        """Every component in diffusers' layout, one folder each: what `model.base` takes, also without a structural encoder."""
        for name, part in self.components().items():
            if part is not None:
                part.save_pretrained(folder / name)

    def parameters_per_part(self) -> dict[str, tuple[int, int]]:
        """Part -> (all parameters, trained parameters), for the dry run; the text encoder is in memory for one prompt only."""
        parts = {"unet": self.denoiser.unet, "structural encoder": self.denoiser.structural_encoder, "vae": self.codec.vae}
        counts = {name: (_count(module), _count(module, trained=True)) for name, module in parts.items() if module is not None}
        if self.text_config is not None:
            counts["text encoder"] = (count_text_encoder(self.text_config), 0)
        return counts

    def until(self, timestep: int) -> Networks:
        """The same networks on a schedule whose last timestep is this one.

        Raises:
            UserError: the schedule ends before it.
        """
        last = self.schedule.num_train_timesteps - 1
        if timestep > last:
            raise UserError(f"training.start_timestep: expected at most {last}, the last of {self.base}; got {timestep}.")
        config = truncated(self.scheduler_config, timestep + 1)
        return replace(self, schedule=Schedule.from_scheduler(config), scheduler_config=config)

    def to(self, device: torch.device | str) -> Networks:
        """Move the modules in place; the networks that come back have text context and schedule on `device` too."""
        self.codec.vae.to(device)
        self.denoiser.to(device)
        return replace(self, text=self.text.to(device), schedule=self.schedule.to(device))


def _count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def build_networks(
    settings: ModelSettings, *, plain: bool = False, device: torch.device | str = "cpu", meta: bool = False, seed: int = 0
) -> Networks:
    """Build codec, denoiser and schedule; the VAE is frozen and in eval mode, `settings.train` decides what trains.

    Args:
        plain: a base instead of an upscaler: no structural encoder, no SFT layers, all of the UNet trains.
        device: where the networks end up; ignored with `meta`.
        meta: shapes only (the dry run): no weights are read and, unless `base` is a folder, no network is used.
        seed: of freshly drawn layers.

    Raises:
        UserError: the base or the autoencoder cannot be found, or does not fit.
    """
    if settings.init == "random" or (meta and not local_folder(settings.base).is_dir()):
        networks = _from_preset(settings, plain=plain, meta=meta, seed=seed)
    else:
        networks = _from_base(settings, find_base(settings.base, settings.revision), plain=plain, meta=meta, seed=seed)
    _check_fit(networks)
    networks.codec.vae.requires_grad_(False).eval()
    trained = networks.denoiser.set_trainable("all" if plain else settings.train)
    networks = replace(networks, trained=trained)
    return networks if meta else networks.to(device)


def build_autoencoder(settings: ModelSettings, *, device: torch.device | str = "cpu", meta: bool = False, seed: int = 0) -> Codec:
    """Only the autoencoder, trainable: from `settings.vae`, the base, or drawn at random from the preset."""
    if settings.vae is not None:
        vae = load_vae(settings.vae, meta=meta)
    elif settings.init == "random" or meta:
        vae = _drawn(AutoencoderKL, load_preset(settings.preset)["vae"], meta, seed)
        if not meta and can_start_near_identity(vae):
            start_near_identity(vae)
    else:
        vae = _load_vae_of(find_base(settings.base, settings.revision, parts=["vae/*"]), meta=False)
    vae.train()
    return Codec(vae if meta else vae.to(device))


def load_vae(folder: str | Path, *, meta: bool = False) -> AutoencoderKL:
    """An autoencoder from its own folder or from a pipeline folder that holds one in vae/.

    Raises:
        UserError: neither is there.
    """
    path = local_folder(str(folder))
    for candidate in (path / "vae", path):
        if (candidate / "config.json").is_file():
            return _load_vae_of(Base(str(folder), candidate.parent), meta=meta, part=candidate.name)
    raise UserError(f"model.vae: {folder} holds no autoencoder (config.json, or vae/config.json); train one first or leave model.vae out.")


def _load_vae_of(base: Base, *, meta: bool, part: str = "vae") -> AutoencoderKL:
    kind = base.config(part).get("_class_name")
    cls = AutoencoderKLCFW if kind == "AutoencoderKLCFW" else AutoencoderKL
    if kind not in ("AutoencoderKL", "AutoencoderKLCFW"):
        raise UserError(f"model.vae: expected an AutoencoderKL, {base.name} holds a {kind}.")
    return _loaded(cls, base, part, meta)


def _from_preset(settings: ModelSettings, *, plain: bool, meta: bool, seed: int) -> Networks:
    preset = load_preset(settings.preset)
    if settings.prompt and not meta:
        raise UserError("model.prompt: a model with init: random has no text encoder; leave the prompt empty, or train from a base.")
    vae = load_vae(settings.vae, meta=meta) if settings.vae else _drawn(AutoencoderKL, preset["vae"], meta, seed)
    if plain:
        widths = {name: value for name, value in preset["unet"].items() if name not in SFT_ARGUMENTS}
        denoiser = Denoiser(_drawn(UNet2DConditionModel, widths, meta, seed), None)
    else:
        denoiser = Denoiser(
            _drawn(SFTUNet2DConditionModel, preset["unet"], meta, seed),
            _drawn(StructuralEncoder, preset["structural_encoder"], meta, seed),
        )
    return Networks(
        codec=Codec(vae),
        denoiser=denoiser,
        schedule=Schedule.from_scheduler(preset["scheduler"]),
        text=empty_context(denoiser.unet),
        base=settings.base if settings.init == "pretrained" else f"random:{settings.preset}",
        scheduler_config=preset["scheduler"],
        text_config=preset.get("text_encoder") if settings.init == "pretrained" else None,
    )


def _from_base(settings: ModelSettings, base: Base, *, plain: bool, meta: bool, seed: int) -> Networks:
    ours = base.has("structural_encoder")
    if plain and ours:
        raise UserError(f"model.base: stage base wants a plain latent-diffusion model, {base.name} is an upscaler; use stage diffusion.")
    denoiser = _upscaler(settings, base, meta, seed) if not plain else Denoiser(_loaded(UNet2DConditionModel, base, "unet", meta), None)
    unet = denoiser.unet
    scheduler_config = base.config("scheduler")
    if base.has("text_encoder") and not meta:
        text = encode_prompt(base, settings.prompt)
    elif settings.prompt and not meta:
        raise UserError(f"model.prompt: {base.name} has no text encoder; leave the prompt empty.")
    else:
        text = empty_context(unet)
    return Networks(
        codec=Codec(load_vae(settings.vae, meta=meta) if settings.vae else _load_vae_of(base, meta=meta)),
        denoiser=denoiser,
        schedule=Schedule.from_scheduler(scheduler_config),
        text=text,
        base=base.name,
        revision=base.revision,
        scheduler_config=scheduler_config,
        source=base,
        text_config=base.config("text_encoder") if base.has("text_encoder") else None,
        call_defaults=dict(CALL_DEFAULTS) if plain else base.call_defaults(),
    )


def _upscaler(settings: ModelSettings, base: Base, meta: bool, seed: int) -> Denoiser:
    """The base's UNet with structural encoder and SFT layers: its own, or drawn new, as wide as the preset of the same UNet has them."""
    if base.has("structural_encoder"):
        return Denoiser(_loaded(SFTUNet2DConditionModel, base, "unet", meta), _loaded(StructuralEncoder, base, "structural_encoder", meta))
    log.info("%s has no structural encoder: it and the SFT layers are drawn new", base.name)
    plain, preset = _loaded(UNet2DConditionModel, base, "unet", meta), load_preset(settings.preset)
    same = plain.config.in_channels == preset["unet"]["in_channels"] and all(
        list(plain.config[name]) == preset["unet"][name] for name in ("block_out_channels", "down_block_types")
    )
    widths = {name: preset["unet"][name] for name in SFT_ARGUMENTS if same and name in preset["unet"]}
    with _seeded(seed, meta):
        unet = SFTUNet2DConditionModel.from_unet(plain, **widths)
    return Denoiser(unet, _drawn(StructuralEncoder, preset["structural_encoder"] if same else _encoder_config(unet), meta, seed))


def _encoder_config(unet: SFTUNet2DConditionModel) -> dict[str, Any]:
    """StableSR's encoder for a Stable Diffusion UNet; a narrower one, in proportion, for a narrower UNet."""
    config = dict(load_preset("sd21")["structural_encoder"])
    widths = unet.config.block_out_channels
    config.update(in_channels=unet.config.in_channels, out_channels=unet.config.feature_channels)
    if tuple(widths) != (320, 640, 1280, 1280):
        config.update(
            block_out_channels=list(widths),
            attention_levels=[*[True] * (len(widths) - 1), False],
            norm_num_groups=unet.config.norm_num_groups,
        )
    return config


def _check_fit(networks: Networks) -> None:
    unet, encoder, codec = networks.denoiser.unet, networks.denoiser.structural_encoder, networks.codec
    if codec.latent_channels != unet.config.in_channels:
        raise UserError(
            f"model.vae: the denoiser works on {unet.config.in_channels} latent channels, the autoencoder gives {codec.latent_channels}."
        )
    if encoder is not None and (encoder.config.out_channels != unet.config.feature_channels or len(encoder.taps) != len(unet.down_blocks)):
        raise UserError(
            f"model.base: the UNet of {networks.base} wants {len(unet.down_blocks)} maps of {unet.config.feature_channels} channels, its "
            f"structural encoder gives {len(encoder.taps)} of {encoder.config.out_channels}."
        )


def _loaded(cls: Any, base: Base, part: str, meta: bool) -> Any:
    config = base.config(part)
    if meta:
        with torch.device("meta"):
            return cls.from_config(config)
    try:
        return cls.from_pretrained(base.folder / part, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.base: {part} of {base.name} cannot be loaded: {str(error).splitlines()[0]}") from error


def _drawn(cls: Any, config: dict[str, Any], meta: bool, seed: int) -> Any:
    with _seeded(seed, meta):
        return cls.from_config(config)


@contextlib.contextmanager
def _seeded(seed: int, meta: bool) -> Iterator[None]:
    """Draw fresh layers from `seed` without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]), torch.device("meta") if meta else contextlib.nullcontext():
        torch.manual_seed(derive_seed(seed, "init"))
        yield
