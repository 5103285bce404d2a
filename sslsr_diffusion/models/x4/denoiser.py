"""The x4 upscaler's UNet behind the seam of all denoisers."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.condition import Condition

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class Denoiser(nn.Module):
    """A UNet that sees the noised low-resolution pixels beside the latent, and is told their noise level as a class label."""

    def __init__(self, unet: "UNet2DConditionModel") -> None:
        super().__init__()
        self.unet = unet

    def forward(self, zt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The velocity, [B, 4, h, w].

        Args:
            zt: [B, 4, h, w] noisy latent.
            t: [B] timestep.
            condition: `pixels` [B, 3, h, w] in about [-1, 1] and `labels` [B], or of B/k for a batch that repeats k times (guidance);
                `text`: a sequence of [1 or B, L, D].
        """
        text, pixels, labels = condition.text, condition.pixels, condition.labels
        if text is None or pixels is None or labels is None:
            raise ValueError("expected text, pixels and labels: the x4 upscaler must be told the picture and its noise level.")
        if pixels.shape[-2:] != zt.shape[-2:]:
            raise UserError(
                f"the x4 upscaler sees the low-resolution picture itself, not enlarged: expected {list(zt.shape[-2:])} pixels as the "
                f"latent has, got {list(pixels.shape[-2:])}; give pictures of a quarter of the side."
            )
        times = len(zt) // len(pixels)
        seen = torch.cat([zt, pixels.repeat(times, 1, 1, 1)], dim=1)  # [B, 7, h, w]
        return self.unet(seen, t, text.repeated(len(zt)).sequence, class_labels=labels.repeat(times), return_dict=False)[0]

    def set_trainable(self, which: str) -> list[str]:
        """Choose what trains and name it: "all", or "attention", the projections of all attention layers."""
        if which not in ("all", "attention"):
            raise ValueError(f"expected 'all' or 'attention', got {which!r}.")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(which == "all" or ".attn" in name)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]
