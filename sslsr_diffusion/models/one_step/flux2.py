"""FLUX.2 klein: a latent of 128 channels as a sequence of tokens with coordinates, a flow whose network is told sigma."""

from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.one_step.backbone import Backbone


class Flux2(Backbone):
    network_class = "Flux2Transformer2DModel"
    autoencoder_classes = ("AutoencoderKLFlux2",)
    pipeline_class = "Flux2KleinPipeline"
    tokens = 512
    comfyui_text = ("CLIPLoader", {"clip_name": "the base's text encoder", "type": "flux2"})

    def no_text(self, tokens: int = 1) -> Text:
        return Text(torch.zeros(1, tokens, self.network.config.joint_attention_dim))

    def encoded(self, pipe: Any, prompt: str) -> Text:
        return Text(pipe.encode_prompt(prompt)[0])

    def forward(self, zt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Tokens are the latent's pixels row by row; their coordinates are (0, row, column, 0), a text's (0, 0, 0, its place)."""
        zt, text = self.prepared(zt, condition)
        count, _, height, width = zt.shape
        zero = torch.arange(1, device=zt.device)
        rows, columns, places = (torch.arange(length, device=zt.device) for length in (height, width, text.sequence.shape[1]))
        pred = self.network(
            hidden_states=zt.flatten(2).transpose(1, 2),  # [B, C, h, w] -> [B, h w, C]
            timestep=t / 1000,
            guidance=None,
            encoder_hidden_states=text.sequence,
            img_ids=torch.cartesian_prod(zero, rows, columns, zero).expand(count, -1, -1),
            txt_ids=torch.cartesian_prod(zero, zero, zero, places).expand(count, -1, -1),
            return_dict=False,
        )[0]
        return pred.transpose(1, 2).reshape(zt.shape)
