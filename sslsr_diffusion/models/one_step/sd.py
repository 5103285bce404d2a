"""Stable Diffusion 1.5, 2.1 and turbo: an unpacked latent of four channels, epsilon or v, timesteps as they are."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sslsr_diffusion.errors import Refused
from sslsr_diffusion.models.base import Base
from sslsr_diffusion.models.clip_text import empty_context, encode_prompt
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.one_step.backbone import Backbone


class StableDiffusion(Backbone):
    part = "unet"
    network_class = "UNet2DConditionModel"
    autoencoder_classes = ("AutoencoderKL", "ShuffleAutoencoder")
    pipeline_class = "StableDiffusionPipeline"
    flow = False
    last = "conv_out"
    tokens = 77

    @classmethod
    def check(cls, config: Mapping[str, Any], name: str) -> None:
        wants = config.get("addition_embed_type") or config.get("class_embed_type") or config.get("num_class_embeds")
        if wants:
            raise Refused(
                f"model.base: {name}: expected a Stable Diffusion 1.5, 2.1 or turbo UNet, which sees a latent and a text, got one that "
                f"wants {wants}, too, as SDXL's and the x4 upscaler's do; choose another base."
            )

    @property
    def unit(self) -> int:
        return int(2 ** (len(self.network.config.block_out_channels) - 1))

    @property
    def trained_side(self) -> int:
        return int(self.network.config.sample_size or 0)

    def no_text(self, tokens: int = 1) -> Text:
        return Text(empty_context(self.network).repeat(1, tokens, 1))

    def encode(self, base: Base, prompt: str) -> Text:
        """In float32, the one text encoder that is small."""
        return Text(encode_prompt(base, prompt))

    def forward(self, zt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        zt, text = self.prepared(zt, condition)
        return self.network(zt, t, text.sequence, return_dict=False)[0]
