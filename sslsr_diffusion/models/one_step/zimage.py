"""Z-Image: an unpacked latent of 16 channels, a flow whose network counts time from noise to picture and predicts the way there."""

from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.one_step.backbone import Backbone
from sslsr_diffusion.models.one_step.zimage_traced import traced


class ZImage(Backbone):
    network_class = "ZImageTransformer2DModel"
    pipeline_class = "ZImagePipeline"
    tokens = 32  # a prompt has as many as it has words and the template; the network pads to a multiple of 32
    comfyui_text = ("CLIPLoader", {"clip_name": "the base's text encoder", "type": "lumina2"})

    @property
    def unit(self) -> int:
        return int(self.network.config.all_patch_size[0])

    @property
    def longest_side(self) -> int:
        return self.unit * int(min(self.network.config.axes_lens[1:]))

    def no_text(self, tokens: int = 1) -> Text:
        return Text(torch.zeros(1, tokens, self.network.config.cap_feat_dim))

    def encoded(self, pipe: Any, prompt: str) -> Text:
        return Text(pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0][None])

    def forward(self, zt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network sees 1 - sigma and says z_0 - n: both turned round make the velocity of the process."""
        zt, text = self.prepared(zt, condition)
        if torch.compiler.is_exporting():
            return -traced(self.network, zt, 1 - t / 1000, text.sequence, self.unit)
        pictures = list(zt.unsqueeze(2).unbind(0))  # [C, 1, h, w] each
        pred = self.network(pictures, 1 - t / 1000, list(text.sequence.unbind(0)), patch_size=self.unit, return_dict=False)[0]
        return -torch.stack(pred).squeeze(2)
