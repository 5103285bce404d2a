from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d, interpolate

from sslsr_diffusion.models.stablesr.build import build_autoencoder, load_preset
from sslsr_diffusion.models.stablesr.near_identity import can_start_near_identity
from sslsr_diffusion.models.stablesr.settings import StableSRSettings


def test_a_fresh_autoencoder_passes_colours_through_at_latent_resolution():
    """Colours of single pixels and of whole crops survive; 0.12 is what the norm's remaining dependence on the crop costs."""
    codec = build_autoencoder(StableSRSettings(init="random", preset="tiny"), seed=3).codec
    smooth = interpolate(torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), size=(64, 64), mode="bicubic").clamp(0, 1)
    flat = torch.tensor([0.9, 0.1, 0.2])[None, :, None, None].expand(1, 3, 64, 64)
    for picture in (smooth, flat):
        with torch.no_grad():
            back = codec.decode(codec.encode(picture, torch.zeros(codec.noise_shape(picture))))
        boxed = interpolate(avg_pool2d(picture, codec.scale), scale_factor=float(codec.scale), mode="bilinear")
        inside = (..., slice(8, -8), slice(8, -8))
        assert (back - boxed)[inside].abs().mean() < 0.12


def test_latent_pixels_leave_no_raster():
    """Noise in the latents comes back smooth: the borders of latent pixels hold about as much of the change as their insides."""
    codec = build_autoencoder(StableSRSettings(init="random", preset="tiny"), seed=3).codec
    latents = 0.2 * torch.randn(4, codec.vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        steps = codec.decode(latents).diff(dim=-1).abs().mean(dim=(0, 1, 2))[codec.scale - 1 :]
    steps = steps[: len(steps) // codec.scale * codec.scale].reshape(-1, codec.scale)[2:-2].mean(dim=0)  # the first crosses a border
    assert steps[0] < 2 * steps[1:].mean(), steps


def test_two_seeds_differ_and_every_weight_still_learns():
    first, second = (build_autoencoder(StableSRSettings(init="random", preset="tiny"), seed=s).codec.vae for s in (1, 2))
    assert not torch.equal(first.encoder.down_blocks[0].resnets[0].conv1.weight, second.encoder.down_blocks[0].resnets[0].conv1.weight)
    out = first(torch.rand(1, 3, 32, 32)).sample
    out.sub(0.3).abs().mean().backward()
    assert all(p.grad is not None for p in first.parameters())


def test_narrow_groups_are_left_as_drawn():
    wide = AutoencoderKL.from_config({**load_preset("tiny")["vae"], "norm_num_groups": 8})
    assert not can_start_near_identity(wide)
