"""The prompt, encoded once; the text encoder is frozen and need not stay in memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Text
from sslsr_diffusion.models.networks import LatentNetworks
from sslsr_diffusion.models.process import Process
from sslsr_diffusion.models.tensor_names import check_tensors

if TYPE_CHECKING:
    from sslsr_diffusion.models.base import Base

START, END, PAD = 49406, 49407, 0  # of OpenCLIP's vocabulary; Stable Diffusion 2 pads with 0


def empty_context(unet: Any) -> Tensor:
    """The context of a model without text encoder: zeros [1, 1, D]."""
    return torch.zeros(1, 1, unet.config.cross_attention_dim)


@torch.no_grad()
def encode_prompt(base: "Base", prompt: str) -> Tensor:
    """Context [1, L, D] float32 of a recipe's prompt, by the base's own text encoder."""
    return encode_texts([prompt], load_text_encoder(base), load_tokenizer(base), torch.device("cpu")).float()


def encode_texts(texts: Sequence[str], text_encoder: Any, tokenizer: Any, device: torch.device) -> Tensor:
    """Last hidden states [B, L, D] of B texts; empty ones need no tokenizer.
    Raises UserError: a text was given, but there is no tokenizer.
    """
    length = text_encoder.config.max_position_embeddings
    if tokenizer is not None:
        ids = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    elif any(texts):
        raise UserError(f"prompt: this model has no tokenizer, so {max(texts)!r} cannot be used; leave prompt out.")
    else:
        ids = torch.tensor([[START, END, *[PAD] * (length - 2)]] * len(texts))
    return text_encoder(ids.to(device))[0]


def load_text_encoder(base: "Base") -> Any:
    from transformers import CLIPTextModel

    check_tensors(base.folder / "text_encoder", None, base.part("text_encoder"))
    return CLIPTextModel.from_pretrained(base.folder / "text_encoder", use_safetensors=True).float().eval().requires_grad_(False)


def count_text_encoder(config: dict[str, Any]) -> int:
    """Parameters of a CLIPTextModel with this config, without building its tensors."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**{k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}))
    return sum(p.numel() for p in model.parameters())


def check_tokenizer(base: "Base") -> None:
    """Raises UserError for a folder without a vocabulary, which transformers would take for one of two words."""
    folder = base.folder / "tokenizer"
    there = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
        got = ", ".join(sorted(there)) or "no files"
        expected = "expected tokenizer.json, or vocab.json and merges.txt"
        raise UserError(f"{base.part('tokenizer')}: {expected}, got {got}; fetch the model again.")


def load_tokenizer(base: "Base") -> Any:
    """None if the base has no tokenizer (the empty prompt does without)."""
    if not base.has("tokenizer"):
        return None
    check_tokenizer(base)
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(base.folder / "tokenizer")


class PromptedNetworks(LatentNetworks):
    """Latent networks with a CLIP text encoder, which is in memory only where any prompt is to be encoded."""

    def __init__(
        self,
        codec: Codec,
        denoiser: nn.Module,
        process: Process,
        text: Text,
        *,
        base: str,
        source: "Base | None",
        text_config: dict[str, Any] | None,
    ) -> None:
        """
        Args:
            text: of the recipe's prompt.
            source: where the text encoder lies that a result is saved with, if there is one.
            text_config: its CLIPTextConfig, which the dry run counts.
        """
        super().__init__(codec, denoiser, process, text, base=base, revision=source.revision if source else None)
        self.source, self.text_config = source, text_config
        self.text_encoder: nn.Module | None = None
        self.tokenizer: Any = None

    @property
    def takes_prompts(self) -> bool:
        """Of shapes: whether their files have what encodes a text."""
        if next(self.denoiser.parameters()).is_meta:
            return self.source is not None and self.source.has("text_encoder") and self.source.has("tokenizer")
        return self.text_encoder is not None and self.tokenizer is not None

    @property
    def text_network(self) -> nn.Module | None:
        return self.text_encoder

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Text:
        if self.text_encoder is None:
            return super().encode_prompts(prompts, device)
        return Text(encode_texts(prompts, self.text_encoder, self.tokenizer, device))
