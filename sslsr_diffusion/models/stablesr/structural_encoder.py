"""StableSR's time-aware structural encoder: the low-resolution latent, seen at every level of the UNet."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, DownBlock2D, UNetMidBlock2D
from torch import Tensor, nn

EPS = 1e-5


class StructuralEncoder(ModelMixin, ConfigMixin):
    """One feature map per UNet level, from the encoded low-resolution picture and the timestep.

    Args:
        in_channels: latent channels.
        out_channels: channels of every feature map (256 in StableSR).
        block_out_channels: widths per level, finest first; as many levels as the UNet has.
        attention_levels: whether the level's residual blocks are followed by self-attention.
    """

    __module__ = "sslsr_diffusion.models"  # what model_index.json stores
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["ResnetBlock2D"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 256,
        block_out_channels: Sequence[int] = (256, 256, 512, 512),
        layers_per_block: int = 2,
        attention_levels: Sequence[bool] = (True, True, True, False),
        num_attention_heads: int = 4,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(attention_levels) != len(block_out_channels):
            raise ValueError(f"expected one attention_levels entry per level ({len(block_out_channels)}), got {len(attention_levels)}.")
        width, deepest = block_out_channels[0], block_out_channels[-1]
        temb_channels = 4 * width
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, temb_channels)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)

        shared = {"temb_channels": temb_channels, "resnet_eps": EPS, "resnet_groups": norm_num_groups}
        self.down_blocks = nn.ModuleList()
        before = width
        for level, (channels, attends) in enumerate(zip(block_out_channels, attention_levels, strict=True)):
            last = level == len(block_out_channels) - 1
            sizes = {"in_channels": before, "out_channels": channels, "num_layers": layers_per_block}
            if attends:
                head = {"attention_head_dim": channels // num_attention_heads, "downsample_type": "none" if last else "conv"}
                self.down_blocks.append(AttnDownBlock2D(**sizes, **head, **shared))
            else:
                self.down_blocks.append(DownBlock2D(**sizes, add_downsample=not last, **shared))
            before = channels
        self.mid_block = UNetMidBlock2D(in_channels=deepest, attention_head_dim=deepest // num_attention_heads, **shared)
        self.taps = nn.ModuleList(
            ResnetBlock2D(in_channels=c, out_channels=out_channels, temb_channels=temb_channels, groups=norm_num_groups, eps=EPS)
            for c in block_out_channels
        )
        for module in self.modules():  # residual branches start at zero
            if isinstance(module, ResnetBlock2D):
                _zero(module.conv2)
            elif type(module).__name__ == "Attention":
                _zero(module.to_out[0])

    def forward(self, latents: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Features of the low-resolution latent at timestep t: [B, out_channels, h_k, w_k] per level k, finest first.

        h_{k+1} = ceil(h_k / 2)

        Args:
            latents: [B, C, h, w], scaled; any sizes.
            t: [B] (or a single number) on the 0..999 scale, also when the sampler takes fewer steps.
        """
        t = torch.as_tensor(t, device=latents.device).reshape(-1).expand(latents.shape[0])
        temb = self.time_embedding(self.time_proj(t).to(latents.dtype))
        h, taps = self.conv_in(latents), []
        for block in self.down_blocks:
            h, states = block(h, temb)
            taps.append(states[-2] if block.downsamplers is not None else h)  # what enters the down-sampler
        taps[-1] = self.mid_block(h, temb)
        return tuple(tap(x, temb) for tap, x in zip(self.taps, taps, strict=True))


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
