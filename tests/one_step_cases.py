"""Toy bases of every kind, with the real classes, and diffusers' own pipelines around the same networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
)
from torch import Tensor

from sslsr_diffusion.models.condition import Text
from sslsr_diffusion.models.one_step.build import build_networks
from sslsr_diffusion.models.one_step.networks import OneStepNetworks
from sslsr_diffusion.models.one_step.settings import OneStepSettings, load_preset

TOYS = {"sd": "tiny", "sd3": "tiny_sd3", "flux2": "tiny_flux2", "zimage": "tiny_zimage"}
AT = {"sd": 200, "sd3": 0.35, "flux2": 0.8, "zimage": 0.6}  # timestep or sigma of the call
WHOLE = {"sd": ["conv_in"], "sd3": ["proj_out"], "flux2": ["proj_out"], "zimage": ["all_final_layer"]}
NOISED = {"sd": 350, "sd3": 0.5, "flux2": 0.4, "zimage": 0.7}


def toy_settings(kind: str, **values: Any) -> OneStepSettings:
    at: dict[str, Any] = {"timestep": AT[kind]} if kind == "sd" else {"sigma": AT[kind]}
    return OneStepSettings.model_validate({"init": "random", "preset": TOYS[kind], **at, **values})


def toy(kind: str, **values: Any) -> OneStepNetworks:
    """Networks whose every weight matters: layers that begin at zero or one, and a batch norm's statistics, are drawn, too."""
    networks = build_networks(toy_settings(kind, **values))
    networks.text_sequence, networks.text_pooled = toy_text(kind)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for network in (networks.denoiser, networks.codec.vae):
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        norm = getattr(networks.codec.vae, "bn", None)
        if norm is not None:
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    return networks


def toy_text(kind: str) -> Text:
    config = next(part for name, part in load_preset(TOYS[kind]).items() if name in ("unet", "transformer"))
    width = next(config[key] for key in ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim") if key in config)
    generator = torch.Generator().manual_seed(1)
    pooled = torch.randn(1, config["pooled_projection_dim"], generator=generator) if kind == "sd3" else None
    return Text(torch.randn(1, 5, width, generator=generator), pooled)


@dataclass(frozen=True)
class Stock:
    """What diffusers' own code makes: encoded and noised latents, and the picture of one call from given latents."""

    encode: Callable[[Tensor, torch.Generator], Tensor]  # pixels in [-1, 1] -> latents noised to NOISED
    call: Callable[[Tensor], Tensor]  # latents -> [B, 3, H, W] in [0, 1]
    pipe: Any


def stock(kind: str, networks: OneStepNetworks) -> Stock:
    """The pipelines with these very networks; the flows' scheduler shifts nothing, so that a sigma means itself."""
    network, vae, text = networks.denoiser.network, networks.codec.vae, networks.text
    no_text: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    if kind == "sd":
        betas = {key: value for key, value in load_preset("tiny")["scheduler"].items() if key != "_class_name"}
        betas["prediction_type"] = networks.base_process.scheduler().config.prediction_type
        plain = {"clip_sample": False, "set_alpha_to_one": False}
        extra = {**no_text, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        euler = EulerDiscreteScheduler(**betas, timestep_spacing="leading")
        pipe = StableDiffusionPipeline(unet=network, vae=vae, scheduler=euler, **extra)
        image = StableDiffusionImg2ImgPipeline(unet=network, vae=vae, scheduler=DDIMScheduler(**betas, **plain), **extra)

        def encode(pixels: Tensor, generator: torch.Generator) -> Tensor:
            return image.prepare_latents(pixels, torch.tensor([NOISED[kind]]), len(pixels), 1, torch.float32, "cpu", generator)

        options: dict[str, Any] = {"timesteps": [AT[kind]], "num_inference_steps": 1, "guidance_scale": 1.0}
        texts = lambda count: {"prompt_embeds": text.repeated(count).sequence}  # noqa: E731
    else:
        flow = FlowMatchEulerDiscreteScheduler(shift=1.0)
        options = {"sigmas": [AT[kind]], "num_inference_steps": 1, "guidance_scale": 1.0 if kind != "zimage" else 0.0}
        if kind == "sd3":
            three = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
            pipe = StableDiffusion3Pipeline(transformer=network, vae=vae, scheduler=flow, **three)
            image = StableDiffusion3Img2ImgPipeline(transformer=network, vae=vae, scheduler=flow, **three)
            texts = lambda count: {"prompt_embeds": text.repeated(count).sequence, "pooled_prompt_embeds": text.repeated(count).pooled}  # noqa: E731
        elif kind == "zimage":
            pipe = ZImagePipeline(transformer=network, vae=vae, scheduler=flow, **no_text)
            image = ZImageImg2ImgPipeline(transformer=network, vae=vae, scheduler=flow, **no_text)
            texts = lambda count: {"prompt_embeds": list(text.repeated(count).sequence.unbind())}  # noqa: E731
        else:
            pipe = image = Flux2KleinPipeline(transformer=network, vae=vae, scheduler=flow, is_distilled=True, **no_text)
            texts = lambda count: {"prompt_embeds": text.repeated(count).sequence}  # noqa: E731

        def encode(pixels: Tensor, generator: torch.Generator) -> Tensor:
            flow.set_timesteps(sigmas=[NOISED[kind]])
            at, count = flow.timesteps[:1], len(pixels)
            if kind == "sd3":
                return image.prepare_latents(pixels, at, count, 1, torch.float32, "cpu", generator)
            if kind == "zimage":
                height, width = pixels.shape[-2:]
                channels = network.in_channels
                return image.prepare_latents(pixels, at, count, channels, height, width, torch.float32, "cpu", generator)
            latents = pipe._encode_vae_image(pixels, generator)
            return flow.scale_noise(latents, at, torch.randn(latents.shape, generator=generator))

    pipe.set_progress_bar_config(disable=True)

    def call(latents: Tensor) -> Tensor:
        side = {"height": latents.shape[-2] * networks.codec.scale, "width": latents.shape[-1] * networks.codec.scale}
        return pipe(latents=latents, output_type="pt", **options, **texts(len(latents)), **side).images

    return Stock(encode, call, pipe)


def save_base(kind: str, folder: Path, **scheduler: Any) -> Path:
    """The toy's base as a pipeline folder without text encoders; `scheduler`: what its config says otherwise."""
    networks = toy(kind, lora=None, full=WHOLE[kind])
    for name, part in networks.components().items():
        part.save_pretrained(folder / name)
    told = folder / "scheduler" / "scheduler_config.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), **scheduler}))
    return folder


def saved_bases(folder: Path) -> Callable[[str], Path]:
    """`save_base` once for each name: a kind, or `sd epsilon`, whose network predicts the noise where the toy's own predicts v."""

    def base(name: str) -> Path:
        kind, _, prediction = name.partition(" ")
        scheduler = {"prediction_type": prediction} if prediction else {}
        return folder / name if (folder / name).is_dir() else save_base(kind, folder / name, **scheduler)

    return base


def with_loras(kind: str, base: Path, *, drawn: bool = True, text: bool = False, **values: Any) -> OneStepNetworks:
    """Networks on a base's folder whose LoRAs, unless they are fresh, say something; alpha is not the rank. `text`: the base's own."""
    lora = {"rank": 3, "alpha": 7.5, "targets": "attention"}
    at = {"timestep": AT[kind]} if kind == "sd" else {"sigma": AT[kind]}
    plain = {"base": str(base), "preset": TOYS[kind], "lora": lora, **at}
    networks = build_networks(OneStepSettings.model_validate({**plain, **values}), seed=5)
    if not text:
        networks.text_sequence, networks.text_pooled = toy_text(kind)
    if drawn:
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in (each for each in networks.parameters() if each.requires_grad):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return networks


def save_pipeline(kind: str, folder: Path) -> Path:
    """The base as a whole pipeline, with tiny text encoders of the real classes and tokenizers that read bytes or letters."""
    networks = toy(kind, lora=None, full=WHOLE[kind])
    parts = {"vae": networks.codec.vae, networks.denoiser.part: networks.denoiser.network, "scheduler": networks.base_process.scheduler()}
    torch.manual_seed(3)
    config = networks.denoiser.network.config
    if kind == "sd":
        parts["scheduler"].register_to_config(steps_offset=1)  # the pipeline warns of another
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts, **_clip("", config.cross_attention_dim), **extra).save_pretrained(folder)
    elif kind == "sd3":
        two = {**_clip("", 8, config.pooled_projection_dim // 2), **_clip("_2", 12, config.pooled_projection_dim // 2)}
        StableDiffusion3Pipeline(**parts, **two, **_t5("_3", config.joint_attention_dim)).save_pretrained(folder)
    elif kind == "flux2":  # three layers are stacked
        Flux2KleinPipeline(**parts, **_qwen("Qwen3ForCausalLM", config.joint_attention_dim // 3)).save_pretrained(folder)
    else:
        ZImagePipeline(**parts, **_qwen("Qwen3Model", config.cap_feat_dim)).save_pretrained(folder)
    return folder


def _clip(number: str, width: int, projected: int = 0) -> dict[str, Any]:
    """A CLIP text encoder, with the projection of a pooled vector where one is asked for, and its tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": len(names)}
    config = CLIPTextConfig(hidden_size=width, projection_dim=projected, bos_token_id=len(names) - 2, eos_token_id=len(names) - 1, **small)
    tokenizer = CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)
    return {f"text_encoder{number}": (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), f"tokenizer{number}": tokenizer}


def _t5(number: str, width: int) -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    names = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    config = T5Config(vocab_size=len(names), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    tokenizer = T5TokenizerFast(vocab=[(name, -1.0) for name in names], extra_ids=0, additional_special_tokens=[], model_max_length=77)
    return {f"text_encoder{number}": T5EncoderModel(config), f"tokenizer{number}": tokenizer}


def _qwen(name: str, width: int) -> dict[str, Any]:
    """A Qwen3 of 28 tiny layers."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    names = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2TokenizerFast(vocab={name: i for i, name in enumerate(names)}, merges=[])
    tokenizer.chat_template = "{% for said in messages %}<|im_start|>{{ said.role }} {{ said.content }}<|im_end|>{% endfor %}"
    small = {"num_hidden_layers": 28, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 16}
    config = transformers.Qwen3Config(vocab_size=len(names), hidden_size=width, **small)
    return {"text_encoder": getattr(transformers, name)(config), "tokenizer": tokenizer}
