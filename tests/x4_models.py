"""A Stable Diffusion x4 upscaler in miniature, as a folder that diffusers' own pipeline loads: real classes, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sslsr_diffusion.models.x4.settings import load_preset

LENGTH = 16  # tokens of a prompt


def small_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with letters in the place of forty-nine thousand pieces."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: k for k, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    known = {"model_max_length": LENGTH, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(known))
    return CLIPTokenizer.from_pretrained(folder)


def small_x4(folder: Path, *, seed: int = 0) -> StableDiffusionUpscalePipeline:
    """The stock pipeline; `folder` gets its tokenizer."""
    preset = load_preset("tiny")
    torch.manual_seed(seed)
    unet, vae = UNet2DConditionModel.from_config(preset["unet"]), AutoencoderKL.from_config(preset["vae"])
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, projection_dim=32, vocab_size=54,
        max_position_embeddings=LENGTH, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return StableDiffusionUpscalePipeline(
        vae=vae.eval(),
        unet=unet.eval(),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=small_tokenizer(folder),
        scheduler=DDIMScheduler.from_config(preset["scheduler"]),
        low_res_scheduler=DDPMScheduler.from_config(preset["low_res_scheduler"]),
    )


def write_x4(folder: Path, *, seed: int = 0) -> Path:
    """A base as it would be fetched."""
    small_x4(folder / "tokenizer", seed=seed).save_pretrained(folder)
    return folder


def change(path: Path, **values: Any) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
