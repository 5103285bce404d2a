"""Tiles leave no seams: a 1536 x 896 picture in tiles against the same picture in one piece, with the same noise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor

from sslsr_diffusion import StableSRPipeline
from sslsr_diffusion.inference.shared_norm import SharedGroupNorm
from sslsr_diffusion.inference.tiled import TiledCodec
from sslsr_diffusion.inference.tiling import tile_offsets
from sslsr_diffusion.models import SFTUNet2DConditionModel, StructuralEncoder
from sslsr_diffusion.models.codec import Codec


class KeepingEncoder(StructuralEncoder):
    """Hands the low-resolution latent on behind its features."""

    def forward(self, latents, t):
        return (*super().forward(latents, t), latents)


class NudgingUNet(SFTUNet2DConditionModel):
    """An untrained network in the role of a trained one: the low-resolution latent plus something that depends on the whole tile."""

    def forward(self, sample, timestep, encoder_hidden_states, features, return_dict=False):
        *own, z_lr = features
        return (z_lr + 0.3 * super().forward(sample, timestep, encoder_hidden_states, features=own, return_dict=False)[0],)


def make_pipeline() -> StableSRPipeline:
    torch.manual_seed(0)
    unet = NudgingUNet(
        sample_size=64,
        down_block_types=["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        block_out_channels=[16, 16, 32],
        layers_per_block=1,
        attention_head_dim=[2, 2, 4],
        cross_attention_dim=8,
        norm_num_groups=4,
        feature_channels=16,
        spade_hidden_channels=16,
    )
    encoder = KeepingEncoder(
        out_channels=16,
        block_out_channels=[16, 16, 32],
        layers_per_block=1,
        attention_levels=[False, False, True],
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 16, 16, 16],
        norm_num_groups=4,
        layers_per_block=1,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, prediction_type="sample"
    )
    pipe = StableSRPipeline(vae=vae.eval(), unet=unet.eval(), structural_encoder=encoder.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scene(height: int, width: int) -> Tensor:
    """Smooth ground, fine texture and a hard edge; brightness drifts so much that the tiles' own statistics differ."""
    generator = torch.Generator().manual_seed(0)
    ground = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=generator), size=(height, width), mode="bicubic")[0]
    texture = 0.1 * torch.rand(3, height, width, generator=generator)
    texture[:, : height // 2] *= 0.1
    edge = 0.2 * (torch.arange(width)[None, :] > torch.arange(height)[:, None] + 11).float()
    return (0.6 * ground + texture + edge).clamp(0, 1)


def border_ratio(picture: Tensor, overlap: int, tile: int) -> float:
    """Mean absolute difference across the tiles' borders, relative to that between all other neighbours; rows and columns.

    A border is where a tile ends, and half-way through an overlap, where one tile has as much to say as the next.
    """
    across, inside = [], []
    for axis, other in ((-1, -2), (-2, -1)):
        side = picture.shape[axis]
        offsets = tile_offsets(side, tile, overlap)
        halfway = {(before + tile + after) // 2 for before, after in pairwise(offsets)}
        borders = sorted((halfway | {edge for start in offsets for edge in (start, start + tile)}) - {0, side})
        profile = picture.diff(dim=axis).abs().mean(dim=(0, 1, other))
        at = torch.zeros(len(profile), dtype=torch.bool)
        at[torch.tensor(borders) - 1] = True
        across.append(profile[at])
        inside.append(profile[~at])
    return (torch.cat(across).mean() / torch.cat(inside).mean()).item()


@pytest.mark.slow
def test_a_1536_pixel_picture_has_no_seams():
    pipe = make_pipeline()
    runs = {}
    for name, tiles in {"whole": {"tile": None, "vae_tile": None}, "tiled": {"tile": 512, "tile_overlap": 128, "vae_tile": 512}}.items():
        generator = torch.Generator().manual_seed(0)
        out = pipe(
            scene(224, 384), num_inference_steps=4, generator=generator, output_type="pt", color_fix="none", tile_batch_size=2, **tiles
        )
        runs[name] = out.images
    ratios = {name: border_ratio(picture, 128, 512) for name, picture in runs.items()}
    assert ratios["tiled"] == pytest.approx(ratios["whole"], rel=0.05)


class OwnStatistics(SharedGroupNorm):
    """What tiles do without sharing: every one takes its own mean and variance."""

    any = False


def test_shared_statistics_bring_a_tiled_autoencoder_nearer_to_the_whole_one(monkeypatch):
    codec = Codec(make_pipeline().vae)
    pixels = scene(384, 384)[None]
    noise = torch.randn(codec.noise_shape(pixels), generator=torch.Generator().manual_seed(0))
    tiled = TiledCodec(codec, tile=24, overlap=8)

    @torch.no_grad()
    def errors() -> tuple[float, float]:
        z, picture = codec.encode(pixels, noise), codec.decode(noise)
        return (z - tiled.encode(pixels, noise)).abs().mean().item(), (picture - tiled.decode(noise)).abs().mean().item()

    shared = errors()
    monkeypatch.setattr("sslsr_diffusion.inference.tiled.SharedGroupNorm", OwnStatistics)
    own = errors()
    # what remains is the middle's attention, which sees its tile only, and that the pool is one pass old
    assert shared[0] < 0.8 * own[0]
    assert shared[1] < own[1]
