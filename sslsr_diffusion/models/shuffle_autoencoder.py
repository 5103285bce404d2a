"""An autoencoder for small upscalers: all work at the size of the latents, and three latent channels that are the picture itself, small."""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F

_SLOPE = 0.2  # of the leaky rectifiers
_COLOURS = 3  # latent channels that are the small picture


class ShuffleAutoencoder(ModelMixin, ConfigMixin):
    """Encoder and decoder without norms, by pixel (un)shuffling (Shi et al., CVPR 2016), called as diffusers' AutoencoderKL is.

    z = [box average of the pixels, learned channels];  decode(z) = bicubic(z[:3]) + learned(z), whose last layer starts at zero: untrained,
    it already shows the picture, and an upscaler on it learns what a bicubic enlargement lacks. Nothing is drawn: the posterior is a point.

    Args:
        latent_channels: at least 4; the first three are red, green and blue.
        block_out_channels: widths from full resolution down; each level but the last halves the sides.
        encoder_layers, decoder_layers: residual blocks of two convolutions, at the size of the latents.
        scaling_factor: what `Codec` multiplies latents by.
    """

    draws = False  # see `Codec.draws`

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (16, 32, 64),
        encoder_layers: int = 2,
        decoder_layers: int = 6,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if latent_channels <= _COLOURS or len(block_out_channels) < 2:
            raise ValueError(
                f"expected more than {_COLOURS} latent_channels and at least 2 block_out_channels, got {latent_channels} and "
                f"{tuple(block_out_channels)}."
            )
        levels = list(block_out_channels)
        width, self._zoom = levels[-1], 2 ** (len(levels) - 1)
        self.quant_conv = None  # AutoencoderKL's names for layers on the moments; a point has none
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(self._zoom),
            nn.Conv2d(_COLOURS * self._zoom**2, width, 3, padding=1),
            *(_Residual(width) for _ in range(encoder_layers)),
            nn.Conv2d(width, latent_channels - _COLOURS, 3, padding=1),
        )
        last = nn.Conv2d(levels[0], _COLOURS, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            *(_Residual(width) for _ in range(decoder_layers)),
            *(layer for coarse, fine in zip(levels[:0:-1], levels[-2::-1]) for layer in _doubled(coarse, fine)),
            nn.Conv2d(levels[0], levels[0], 3, padding=1),
            nn.LeakyReLU(_SLOPE),
            last,
        )

    @apply_forward_hook
    def encode(self, pixels: Tensor) -> Any:
        """[B, 3, H, W] in [-1, 1], sides divisible by 2^(levels - 1) -> an output whose `latent_dist` is a point [B, C, h, w]."""
        mean = torch.cat([F.avg_pool2d(pixels, self._zoom), self.encoder(pixels)], dim=1)
        return AutoencoderKLOutput(
            latent_dist=DiagonalGaussianDistribution(torch.cat([mean, torch.zeros_like(mean)], dim=1), deterministic=True)
        )

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W], about [-1, 1]."""
        coarse = F.interpolate(z[:, :_COLOURS], scale_factor=self._zoom, mode="bicubic", align_corners=False)
        pixels = coarse + self.decoder(z)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def forward(self, pixels: Tensor) -> Tensor:
        """The reconstruction of pixels [B, 3, H, W] in [-1, 1]."""
        return self.decode(self.encode(pixels).latent_dist.mode(), return_dict=False)[0]


def _doubled(coarse: int, fine: int) -> list[nn.Module]:
    """Twice the sides; drawn so that the four pixels of one begin alike, without a raster   (ICNR; Aitken et al., 2017)"""
    conv = nn.Conv2d(coarse, 4 * fine, 3, padding=1)
    with torch.no_grad():
        for tensor in conv.parameters():
            tensor.copy_(tensor[:fine].repeat_interleave(4, dim=0))
    return [conv, nn.PixelShuffle(2), nn.LeakyReLU(_SLOPE)]


class _Residual(nn.Module):
    """x + conv(leaky(conv(x))), the second convolution drawn ten times smaller."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.second.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.leaky_relu(self.first(x), _SLOPE))
