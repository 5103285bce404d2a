"""models/codec.py: ranges, the sampled posterior, the golden autoencoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from golden_models import golden_inputs, golden_outputs, golden_vae, random_like, relative_error

from sslsr_diffusion.models.codec import Codec

TOLERANCE = 1e-4  # of the fixtures' README; float32 on another build


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(golden_vae(cfw=False))


@torch.no_grad()
def test_autoencoder_reproduces_the_original(codec: Codec) -> None:
    inputs, want = golden_inputs("stablesr/vae"), golden_outputs("stablesr/vae")
    posterior = codec.vae.encode(inputs["image"]).latent_dist
    got = {
        "moments": posterior.parameters,
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "std": posterior.std,
        "mode": posterior.mode(),
        "decoded": codec.vae.decode(inputs["z"]).sample,
    }
    for name, tensor in got.items():
        assert relative_error(tensor, want[name]) < TOLERANCE, name


@torch.no_grad()
def test_encode_samples_the_posterior_with_the_given_noise_and_maps_ranges(codec: Codec) -> None:
    inputs, want = golden_inputs("stablesr/vae"), golden_outputs("stablesr/vae")
    pixels = inputs["image"] * 0.5 + 0.5  # the fixture is in [-1, 1]
    noise = random_like(codec.noise_shape(pixels), seed=1)
    expected = (want["mean"] + want["std"] * noise) * codec.vae.config.scaling_factor
    assert relative_error(codec.encode(pixels, noise), expected) < TOLERANCE
    decoded = codec.decode(inputs["z"] * codec.vae.config.scaling_factor)
    assert relative_error(decoded * 2 - 1, want["decoded"]) < TOLERANCE


def test_decode_is_differentiable_and_not_clamped(codec: Codec) -> None:
    z = random_like((1, 4, 4, 6), seed=2).mul(3).requires_grad_()
    pixels = codec.decode(z)
    assert pixels.shape == (1, 3, 32, 48)
    assert pixels.min() < 0 or pixels.max() > 1
    (pixels * random_like(tuple(pixels.shape), seed=3)).sum().backward()
    assert z.grad is not None
    assert z.grad.abs().min() > 0


def test_half_precision_autoencoder_takes_and_gives_float32(codec: Codec) -> None:
    half = Codec(golden_vae(cfw=False).to(torch.bfloat16))
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    noise = random_like(codec.noise_shape(pixels), seed=5)
    with torch.no_grad():
        latents = half.encode(pixels, noise)
        assert latents.dtype == half.decode(latents).dtype == torch.float32
        # bfloat16 keeps 8 bits; twenty layers of it
        assert relative_error(latents, codec.encode(pixels, noise)) < 0.05


def test_shape_mistakes_say_what_was_expected(codec: Codec) -> None:
    pixels = torch.rand(1, 3, 32, 36)
    with pytest.raises(ValueError, match="divisible by 8"):
        codec.encode(pixels, torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="posterior noise"):
        codec.encode(pixels[..., :32], torch.zeros(1, 4, 4, 5))


@torch.no_grad()
def test_calibrate_gives_latents_of_unit_variance() -> None:
    codec = Codec(golden_vae(cfw=False))
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    codec.calibrate(pixels)
    latents = codec.encode(pixels, random_like(codec.noise_shape(pixels), seed=7))
    assert 0.9 < latents.std() < 1.1  # 256 values per channel: a few percent of sampling error


@pytest.mark.parametrize("quant_conv", [True, False])
def test_without_variance_every_draw_is_the_mean(quant_conv: bool) -> None:
    vae = golden_vae()
    if not quant_conv:  # as Stable Diffusion 3 has it: the encoder's last layer says mean and log-variance
        vae.quant_conv = None
    codec = Codec(vae)
    pixels = random_like((1, 3, 16, 16), seed=3).sigmoid()
    noise = random_like(codec.noise_shape(pixels), seed=4)
    quiet = codec.without_variance()
    with torch.no_grad():
        mean, drawn = codec.encode(pixels, torch.zeros_like(noise)), codec.encode(pixels, noise)
        assert relative_error(quiet.encode(pixels, noise), mean) < 1e-5
        assert relative_error(codec.encode(pixels, noise), drawn) == 0  # the original keeps its posterior
    assert relative_error(drawn, mean) > 1e-4


def statistics(kind: str) -> tuple[AutoencoderKL, Any, dict[str, Any]]:
    """An autoencoder whose config has numbers of this kind, diffusers' own img2img pipeline around it, and its encoding's arguments."""
    numbers = {"shift": {"shift_factor": 0.6}, "mean": {"latents_mean": [0.5, -1.0, 0.25, 2.0], "latents_std": [2.0, 0.5, 4.0, 1.5]}}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=1.3, **_blocks(2), **numbers)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    if kind == "mean":
        pipe: Any = StableDiffusionXLImg2ImgPipeline(vae, **parts, unet=None, scheduler=EulerDiscreteScheduler())
        return vae, pipe, {"add_noise": False}
    more = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    pipe = StableDiffusion3Img2ImgPipeline(transformer=None, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, **parts, **more)
    pipe.scheduler.scale_noise = lambda latents, timestep, noise: latents  # what it adds afterwards
    return vae, pipe, {}


def _blocks(levels: int) -> dict[str, Any]:
    return {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["shift", "mean"])
def test_latents_are_normalised_as_diffusers_own_pipelines_do(kind: str) -> None:
    vae, pipe, more = statistics(kind)
    codec, cpu = Codec(vae), torch.device("cpu")
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    want = pipe.prepare_latents(pixels * 2 - 1, None, 2, 1, torch.float32, cpu, torch.Generator().manual_seed(2), **more)
    noise = torch.randn(codec.noise_shape(pixels), generator=torch.Generator().manual_seed(2))
    latents = codec.encode(pixels, noise)
    assert torch.allclose(latents, want, atol=1e-6)
    posterior = vae.encode(pixels * 2 - 1).latent_dist
    raw = posterior.mean + posterior.std * noise
    assert not torch.allclose(latents, raw * 1.3, atol=0.1)  # the numbers do something
    assert torch.allclose(codec.decode(latents) * 2 - 1, vae.decode(raw).sample, atol=1e-5)
    restored, moments = codec.autoencode(pixels, noise)
    assert torch.allclose(restored, codec.decode(latents), atol=1e-6)
    assert torch.equal(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
