"""Stable Diffusion 3 and 3.5: an unpacked latent of 16 channels, a flow, a text of sequence and pooled vector."""

from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.one_step.backbone import Backbone


class StableDiffusion3(Backbone):
    network_class = "SD3Transformer2DModel"
    pipeline_class = "StableDiffusion3Pipeline"
    tokens = 333  # 77 of CLIP, 256 of T5
    comfyui_text = ("TripleCLIPLoader", {"clip_name1": "clip_l", "clip_name2": "clip_g", "clip_name3": "t5xxl"})

    @property
    def unit(self) -> int:
        return int(self.network.config.patch_size)

    @property
    def longest_side(self) -> int:
        return self.unit * int(self.network.config.pos_embed_max_size or 0)

    def no_text(self, tokens: int = 1) -> Text:
        config = self.network.config
        return Text(torch.zeros(1, tokens, config.joint_attention_dim), torch.zeros(1, config.pooled_projection_dim))

    def encoded(self, pipe: Any, prompt: str) -> Text:
        sequence, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return Text(sequence, pooled)

    def forward(self, zt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        zt, text = self.prepared(zt, condition)
        return self.network(
            hidden_states=zt, timestep=t, encoder_hidden_states=text.sequence, pooled_projections=text.pooled, return_dict=False
        )[0]
