"""Stable Diffusion 3 and 3.5: an unpacked latent of 16 channels, a flow, a text of sequence and pooled vector."""

from contextlib import nullcontext
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
        traced = torch.compiler.is_exporting()
        with self.network.pos_embed.register_forward_hook(_traced_positions) if traced else nullcontext():
            return self.network(
                hidden_states=zt, timestep=t, encoder_hidden_states=text.sequence, pooled_projections=text.pooled, return_dict=False
            )[0]


def _traced_positions(embed: Any, given: tuple[Tensor], made: Tensor) -> Tensor:
    """What `embed` makes of latents [B, C, h, w], traced for any size: patches plus the middle of its table, [B, tokens, D].

    diffusers' first row is (table - rows) // 2, which the exporter makes table / 2 + (-rows) // 2, and ONNX rounds towards zero.
    """
    (latents,), side = given, embed.pos_embed_max_size
    rows, columns = (length // embed.patch_size for length in latents.shape[2:])
    top, left = (side // 2 - (length + 1 - side % 2) // 2 for length in (rows, columns))
    table = embed.pos_embed.unflatten(1, (side, side))[:, top : top + rows, left : left + columns]
    return embed.proj(latents).flatten(2).transpose(1, 2) + table.reshape(1, rows * columns, -1)
