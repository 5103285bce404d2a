"""Text context for a batch of pictures; a model without text encoder has zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.stablesr.text import END, PAD, START, empty_context


def per_picture(prompt: str | Sequence[str] | None, count: int, name: str) -> list[str]:
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""] * count
    if len(prompt) != count:
        raise UserError(f"{name}: expected one text, or as many as there are images ({count}), got {len(prompt)}.")
    return list(prompt)


def encode_texts(texts: Sequence[str], text_encoder: Any, tokenizer: Any, unet: Any, device: torch.device) -> Tensor:
    """Context [B, L, D] for B texts.

    Raises:
        UserError: a text was given, but the pipeline has no text encoder or no tokenizer.
    """
    if text_encoder is None:
        if any(texts):
            raise UserError(f"prompt: this model has no text encoder, so {max(texts)!r} cannot be used; leave prompt out.")
        return empty_context(unet).to(device).expand(len(texts), -1, -1)
    length = text_encoder.config.max_position_embeddings
    if tokenizer is not None:
        ids = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    elif any(texts):
        raise UserError(f"prompt: this model has no tokenizer, so {max(texts)!r} cannot be used; leave prompt out.")
    else:
        ids = torch.tensor([[START, END, *[PAD] * (length - 2)]] * len(texts))
    return text_encoder(ids.to(device))[0]
