"""A start for autoencoders trained from nothing: at the first step they already carry colours through, blurred.

Left to a random start, a small autoencoder learns brightness within a hundred steps and colour only after thousands:
group normalisation removes the mean of a crop, and colour is a small part of its variance. Here three latent channels
start as the picture at latent resolution (box average, bilinear on the way back) and the residual branches start at zero;
everything is trained from there. Bilinear, because latents that a denoiser predicts carry less detail than the encoder's:
what the decoder makes of missing detail should be smooth, and a nearest-neighbour start left a raster of latent pixels there.
"""

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

_CARRIED = 8  # channels: red, green, blue, each with both signs, and two constants
_CONSTANT = 4.0  # far above any signal, so that a group's norm hardly depends on the crop
_BILINEAR = {(y, x): (2 - abs(y - 1)) * (2 - abs(x - 1)) / 16 for y in range(3) for x in range(3)}  # after nearest-neighbour doubling
_BOX = {(y, x): 0.25 for y in range(2) for x in range(2)}  # stride 2 after one pixel of padding right and below
_LOG_VARIANCE = -6.0  # of the posterior at the start; 0 would drown the signal in sampling noise


def can_start_near_identity(vae: AutoencoderKL) -> bool:
    """Whether the channels that carry the picture fit into the first group of both output norms, and three into the latents."""
    norms = (vae.encoder.conv_norm_out, vae.decoder.conv_norm_out)
    return vae.config.latent_channels >= 3 and all(n.num_channels // n.num_groups >= _CARRIED for n in norms)


@torch.no_grad()
def start_near_identity(vae: AutoencoderKL) -> None:
    """Overwrite the weights named above; needs `can_start_near_identity(vae)`.

    SiLU(x) - SiLU(-x) = x: a channel carried with both signs passes the last activation unchanged.
    """
    encoder, decoder = vae.encoder, vae.decoder
    same = {c: {c: 1.0} for c in range(_CARRIED)}
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                _carry(module.conv_shortcut, same)
    for block in encoder.down_blocks:
        for sampler in block.downsamplers or ():
            _carry(sampler.conv, same, taps=_BOX)
    for block in decoder.up_blocks:
        for sampler in block.upsamplers or ():
            _carry(sampler.conv, same, taps=_BILINEAR)
    both_signs = {c: {c // 2: 1.0 if c % 2 == 0 else -1.0} for c in range(6)}
    for part in (encoder, decoder):
        _carry(part.conv_in, both_signs)
        part.conv_in.bias[6], part.conv_in.bias[7] = _CONSTANT, -_CONSTANT
        norm = part.conv_norm_out
        gain = _CONSTANT * (2 * norm.num_groups / norm.num_channels) ** 0.5  # what the two constants make the norm divide by
        _carry(part.conv_out, {c: {2 * c: gain, 2 * c + 1: -gain} for c in range(3)})
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _carry(conv, {c: {c: 1.0} for c in range(3)})
    vae.quant_conv.bias[vae.config.latent_channels :] = _LOG_VARIANCE


def _carry(conv: nn.Conv2d, rows: dict[int, dict[int, float]], taps: dict[tuple[int, int], float] | None = None) -> None:
    """Make output channel o of `conv` the given mix of input channels, at the centre tap or weighted over the taps named."""
    assert conv.bias is not None
    centre = {(conv.kernel_size[0] // 2, conv.kernel_size[1] // 2): 1.0}
    for out, mix in rows.items():
        nn.init.zeros_(conv.weight[out])
        conv.bias[out] = 0.0
        for source, factor in mix.items():
            for (y, x), share in (taps or centre).items():
                conv.weight[out, source, y, x] = factor * share
