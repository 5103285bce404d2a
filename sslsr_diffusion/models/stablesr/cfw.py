"""Controllable feature wrapping: an autoencoder whose decoder is fed with encoder features of the low-resolution picture."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.models.stablesr.extend import extends_signature


class DenseBlock(nn.Module):
    """Four convolutions, each fed with all earlier outputs, a fifth back to C channels; x + 0.2 times its output."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.grow = nn.ModuleList(nn.Conv2d(channels + k * growth, growth, 3, padding=1) for k in range(4))
        self.shrink = nn.Conv2d(channels + 4 * growth, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in self.grow:
            seen.append(F.leaky_relu(conv(torch.cat(seen, dim=1)), 0.2))
        return x + 0.2 * self.shrink(torch.cat(seen, dim=1))


class ResidualDenseBlock(nn.Module):
    """Three dense blocks in a row; x + 0.2 times their output."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.dense = nn.ModuleList(DenseBlock(channels, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for block in self.dense:
            h = block(h)
        return x + 0.2 * h


class FusionBlock(nn.Module):
    """dec + w R2(RRDB_n(... RRDB_1(R1([enc, dec])))): how much of the low-resolution picture's structure the decoder takes."""

    def __init__(self, channels: int, num_blocks: int, growth: int, groups: int) -> None:
        super().__init__()
        resnet: dict[str, Any] = {"out_channels": channels, "temb_channels": None, "groups": groups, "eps": 1e-6}
        self.enter = ResnetBlock2D(in_channels=2 * channels, **resnet)
        self.blocks = nn.ModuleList(ResidualDenseBlock(channels, growth) for _ in range(num_blocks))
        self.leave = ResnetBlock2D(in_channels=channels, **resnet)

    def forward(self, encoded: Tensor, decoded: Tensor, weight: float) -> Tensor:
        if encoded.shape[-2:] != decoded.shape[-2:]:
            raise ValueError(
                f"expected encoder features of size {tuple(decoded.shape[-2:])}, got {tuple(encoded.shape[-2:])}: "
                "they must come from a picture of the size that is decoded."
            )
        h = self.enter(torch.cat([encoded, decoded], dim=1), None)
        for block in self.blocks:
            h = block(h)
        return decoded + weight * self.leave(h, None)


class AutoencoderKLCFW(AutoencoderKL):
    """AutoencoderKL with one fusion block per inner level (StableSR's CFW); without features it is the plain autoencoder.

    Encoder features are taken before the level's down-sampler and enter before the same level's up-sampler.
    """

    __module__ = "sslsr_diffusion.models"  # what model_index.json stores

    @register_to_config
    @extends_signature(AutoencoderKL)
    def __init__(self, num_fuse_blocks: int = 2, fuse_growth_channels: int = 32, **autoencoder: Any) -> None:
        super().__init__(**autoencoder)
        widths = self.config.block_out_channels
        if len(widths) < 3:
            raise ValueError(f"expected at least 3 levels (the outermost ones are not fused), got block_out_channels {tuple(widths)}.")
        # fusion_layers[k] belongs to level k + 1; level 0 is full resolution
        self.fusion_layers = nn.ModuleList(
            FusionBlock(width, num_fuse_blocks, fuse_growth_channels, self.config.norm_num_groups) for width in widths[1:-1]
        )

    @classmethod
    def from_autoencoder(cls, vae: AutoencoderKL, num_fuse_blocks: int = 2) -> Self:
        """A CFW autoencoder that shares `vae`'s tensors; its fusion blocks are new."""
        model = cls(**{k: v for k, v in vae.config.items() if not k.startswith("_")}, num_fuse_blocks=num_fuse_blocks)
        for name, child in vae.named_children():
            setattr(model, name, child)
        model.fusion_layers.to(device=vae.device, dtype=vae.dtype)
        return model

    @apply_forward_hook
    def encode_with_features(self, pixels: Tensor) -> tuple[DiagonalGaussianDistribution, tuple[Tensor, ...]]:
        """The posterior of pixels [B, 3, H, W] in [-1, 1], and the features [B, C_k, H/2^k, W/2^k] of levels k = 1..n-2."""
        encoder, features = self.encoder, []
        h = encoder.conv_in(pixels)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                h = resnet(h, None)
            features.append(h)
            for downsampler in block.downsamplers or ():
                h = downsampler(h)
        h = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(h))))
        moments = self.quant_conv(h) if self.quant_conv is not None else h
        return DiagonalGaussianDistribution(moments), tuple(features[1:-1])

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        *,
        features: Sequence[Tensor] | None = None,
        fidelity: float = 1.0,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents [B, C, h, w] (not scaled); with `features`, fuse them with weight `fidelity`."""
        if features is None or fidelity == 0:
            return super().decode(z, return_dict=return_dict, generator=generator)
        if len(features) != len(self.fusion_layers):
            raise ValueError(f"expected {len(self.fusion_layers)} encoder features (encode_with_features), got {len(features)}.")
        decoded = self._decode_fused(z, features, fidelity)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)

    def _decode_fused(self, z: Tensor, features: Sequence[Tensor], fidelity: float) -> Tensor:
        decoder = self.decoder
        h = decoder.conv_in(self.post_quant_conv(z) if self.post_quant_conv is not None else z)
        h = self._run(decoder.mid_block, h)
        for position, block in enumerate(decoder.up_blocks):
            level = len(decoder.up_blocks) - 1 - position
            for resnet in block.resnets:
                h = self._run(resnet, h, None)
            if 0 < level <= len(features):
                h = self._run(self.fusion_layers[level - 1], features[level - 1], h, fidelity)
            for upsampler in block.upsamplers or ():
                h = upsampler(h)
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))

    def _run(self, module: nn.Module, *args: Any) -> Any:
        if torch.is_grad_enabled() and self.decoder.gradient_checkpointing:
            return self.decoder._gradient_checkpointing_func(module, *args)
        return module(*args)
