"""The x4 upscaler's networks: an autoencoder of 4 pixels per latent pixel, the UNet, two schedulers, a text encoder."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.base import Base
from sslsr_diffusion.models.clip_text import PromptedNetworks, count_text_encoder, load_text_encoder, load_tokenizer
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.loading import forget_folder
from sslsr_diffusion.models.lora import has_lora, merged, save_lora
from sslsr_diffusion.models.networks import Encode, count_parameters
from sslsr_diffusion.models.process import Process
from sslsr_diffusion.models.size import SizeRequirements
from sslsr_diffusion.models.x4.denoiser import Denoiser
from sslsr_diffusion.models.x4.settings import MAX_NOISE_LEVEL, SCALE, X4Call

CALL = "call_defaults.json"  # beside the pipeline of a result
LORA = "lora"  # folder in it: the weights of the pipeline have the LoRA already


class X4Networks(PromptedNetworks):
    """lr_n = add_noise(lr, n2, level) by the low-resolution scheduler;  pred = unet(cat(z_t, lr_n), t, text, class_labels = level)

    Noise on what the second model of a cascade sees, and its level told: Ho et al., JMLR 2022, section 4.2.
    """

    denoiser: Denoiser
    zoom = SCALE

    def __init__(
        self,
        codec: Codec,
        denoiser: Denoiser,
        schedulers: tuple[Any, Any],
        text: Text,
        *,
        base: str = "",
        source: Base | None = None,
        text_config: dict[str, Any] | None = None,
        max_noise_level: int = MAX_NOISE_LEVEL,
        call: X4Call | None = None,
    ) -> None:
        """
        Args:
            schedulers: diffusers' objects: of the latents, which also samples, and of the low-resolution picture.
            text: of the recipe's prompt and of the empty one, [2, L, D].
            source, text_config: see PromptedNetworks.
            call: defaults of a call.
        """
        process, low = (Process.of(each.config, type(each).__name__) for each in schedulers)
        first = text.each(lambda part: part[:1])
        super().__init__(codec, denoiser, process, first, base=base, source=source, text_config=text_config)
        self.sampling_scheduler, self.low_res_scheduler = schedulers
        self.low_res_process, self.max_noise_level = low, max_noise_level
        self.register_buffer("blank_sequence", text.sequence[-1:], persistent=False)
        self.call = call or X4Call()

    blank_sequence: Tensor

    @property
    def blank(self) -> Text:
        return Text(self.blank_sequence)

    def seen_noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (3, height // SCALE, width // SCALE)

    def see(
        self, picture: Tensor, noise: Tensor, *, level: Tensor | None = None, text: Text | None = None, encode: Encode | None = None
    ) -> Condition:
        """The low-resolution pixels, [B, 3, H/4, W/4] as the latent, noised to `level`, which must be told; nothing is encoded."""
        if level is None:
            raise ValueError("expected the noise level of each picture, got none: it is the class label that the x4 upscaler is told.")
        pixels = self.low_res_process.add_noise(picture * 2 - 1, noise, level)
        return Condition(text=text or self.text, pixels=pixels, labels=level)

    def size(self) -> SizeRequirements:
        """As the stock pipeline: low-resolution sides are multiples of 4; the UNet takes odd latents on its lower levels."""
        return SizeRequirements(SCALE * SCALE)

    @property
    def call_defaults(self) -> dict[str, Any]:
        return self.call.model_dump()

    def cast(self, dtype: torch.dtype) -> None:
        """As diffusers: an autoencoder that leaves float16's range stays float32."""
        super().cast(dtype)
        if dtype == torch.float16 and self.codec.vae.config.force_upcast:
            self.codec.float()
        if self.text_encoder is not None:
            self.text_encoder.to(dtype)

    def components(self) -> dict[str, Any]:
        """Those of diffusers' StableDiffusionUpscalePipeline; LoRA layers are added to the weights."""
        encoder, tokenizer, unet = self.text_encoder, self.tokenizer, self.denoiser.unet
        if encoder is None and self.source is not None and self.source.has("text_encoder"):
            encoder, tokenizer = load_text_encoder(self.source), load_tokenizer(self.source)
        return {
            "vae": self.codec.vae,
            "unet": merged(unet) if has_lora(unet) else unet,
            "scheduler": self.sampling_scheduler,
            "low_res_scheduler": self.low_res_scheduler,
            "text_encoder": encoder,
            "tokenizer": tokenizer,
        }

    def merge(self) -> None:
        if not has_lora(self.denoiser.unet):
            super().merge()
        raise UserError("merge: expected a LoRA beside its base; the result has it in its weights already; leave it out.")

    def for_comfyui(self, folder: Path, scale: float) -> list[str]:
        if not has_lora(self.denoiser.unet):
            return super().for_comfyui(folder, scale)
        raise UserError("comfyui: expected a LoRA beside its base; the result has it in its weights already; leave it out.")

    def save(self, folder: Path, **call: Any) -> None:
        """A folder that the stock pipeline loads, the LoRA in a folder of its own where there is one, and the defaults of a call."""
        from diffusers import StableDiffusionUpscalePipeline

        parts = self.components()
        for part in parts.values():
            forget_folder(part)
        StableDiffusionUpscalePipeline(**parts, max_noise_level=self.max_noise_level).save_pretrained(folder)
        known = {name: value for name, value in call.items() if name in X4Call.model_fields}
        (folder / CALL).write_text(json.dumps(self.call.model_copy(update=known).model_dump(), indent=1) + "\n", encoding="utf-8")
        if has_lora(self.denoiser.unet):
            (folder / LORA).mkdir()
            save_lora({"unet": self.denoiser.unet}, folder / LORA)

    def parameters_per_part(self) -> dict[str, tuple[int, int]]:
        """The text encoder is in memory for the prompts only."""
        parts = {"unet": self.denoiser.unet, "vae": self.codec.vae}
        counts = {name: (count_parameters(part), count_parameters(part, trained=True)) for name, part in parts.items()}
        return counts | ({} if self.text_config is None else {"text encoder": (count_text_encoder(self.text_config), 0)})

    def set_trainable(self, which: str) -> list[str]:
        self.codec.requires_grad_(False)
        return self.denoiser.set_trainable(which)
