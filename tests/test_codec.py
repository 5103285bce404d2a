"""models/codec.py: ranges, the sampled posterior, the golden autoencoder."""

from __future__ import annotations

import pytest
import torch
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


def test_without_variance_every_draw_is_the_mean() -> None:
    codec = Codec(golden_vae())
    pixels = random_like((1, 3, 16, 16), seed=3).sigmoid()
    noise = random_like(codec.noise_shape(pixels), seed=4)
    quiet = codec.without_variance()
    with torch.no_grad():
        mean, drawn = codec.encode(pixels, torch.zeros_like(noise)), codec.encode(pixels, noise)
        assert relative_error(quiet.encode(pixels, noise), mean) < 1e-5
        assert relative_error(codec.encode(pixels, noise), drawn) == 0  # the original keeps its posterior
    assert relative_error(drawn, mean) > 1e-4
