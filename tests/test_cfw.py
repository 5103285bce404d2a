"""models/cfw.py: golden fusion decoder, fidelity, checkpointing, save and load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from golden_models import golden_inputs, golden_outputs, golden_vae, random_like, relative_error

from sslsr_diffusion.models import AutoencoderKLCFW
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.stablesr.settings import load_preset

TOLERANCE = 1e-4  # the README's


@torch.no_grad()
def test_features_and_decodings_are_the_originals() -> None:
    inputs, want = golden_inputs("stablesr/cfw"), golden_outputs("stablesr/cfw")
    vae = golden_vae()
    posterior, features = vae.encode_with_features(inputs["image"])
    assert relative_error(posterior.parameters, want["moments"]) < TOLERANCE
    for level, feature in enumerate(features):
        assert relative_error(feature, want[f"enc_fea.{level}"]) < TOLERANCE
    for w in (0, 0.5, 1):
        got = vae.decode(inputs["z"], features=features, fidelity=w).sample
        assert relative_error(got, want[f"decoded.w{w}"]) < TOLERANCE, w


@torch.no_grad()
def test_codec_passes_features_and_fidelity_on() -> None:
    inputs, want = golden_inputs("stablesr/cfw"), golden_outputs("stablesr/cfw")
    codec = Codec(golden_vae())
    assert codec.has_fidelity
    pixels = inputs["image"] * 0.5 + 0.5
    noise = random_like(codec.noise_shape(pixels), seed=0)
    latents, features = codec.encode_with_features(pixels, noise)
    assert torch.allclose(latents, codec.encode(pixels, noise), atol=1e-6)
    got = codec.decode(inputs["z"] * codec.vae.config.scaling_factor, features, fidelity=0.5)
    assert relative_error(got * 2 - 1, want["decoded.w0.5"]) < TOLERANCE
    plain = codec.decode(inputs["z"] * codec.vae.config.scaling_factor)
    assert relative_error(plain * 2 - 1, want["decoded.w0"]) < TOLERANCE


def test_any_real_fidelity_is_linear_in_the_first_fusion() -> None:
    """w is the factor of the residual: decodings at w = -1, 2 exist and differ from the plain one."""
    vae = golden_vae()
    inputs = golden_inputs("stablesr/cfw")
    with torch.no_grad():
        _, features = vae.encode_with_features(inputs["image"])
        block = vae.fusion_layers[0]
        h = random_like(tuple(features[0].shape), seed=1)
        steps = [block(features[0], h, w) - h for w in (1.0, 2.0, -1.0)]
    assert torch.allclose(steps[1], 2 * steps[0], atol=1e-5)
    assert torch.allclose(steps[2], -steps[0], atol=1e-5)


def test_checkpointing_gives_the_same_gradients() -> None:
    inputs, grads = golden_inputs("stablesr/cfw"), []
    for checkpointing in (False, True):
        vae = golden_vae().train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        with torch.no_grad():
            _, features = vae.encode_with_features(inputs["image"])
        out = vae.decode(inputs["z"], features=features, fidelity=1.0).sample
        (out * random_like(tuple(out.shape), seed=2)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in vae.fusion_layers.parameters()]))
    assert (grads[1] - grads[0]).norm() <= 1e-6 * grads[0].norm()
    assert grads[0].norm() > 0


@torch.no_grad()
def test_every_entry_wakes_an_offload_hook() -> None:
    """Model offload moves a module when its hook is called: encode, decode and encode_with_features are called directly."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    woken = []

    class Woken(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: object, **kwargs: object) -> tuple[object, object]:
            woken.append(module)
            return args, kwargs

    vae, inputs = golden_vae(), golden_inputs("stablesr/cfw")
    add_hook_to_module(vae, Woken())
    calls = (lambda: vae.encode(inputs["image"]), lambda: vae.encode_with_features(inputs["image"]), lambda: vae.decode(inputs["z"]))
    for call in calls:
        before = len(woken)
        call()
        assert len(woken) > before


def test_save_and_load(tmp_path: Path) -> None:
    vae = golden_vae()
    vae.save_pretrained(tmp_path)
    again = AutoencoderKLCFW.from_pretrained(tmp_path)
    assert again.config.num_fuse_blocks == 1
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in vae.state_dict().items())


@torch.no_grad()
def test_a_plain_autoencoder_can_be_wrapped() -> None:
    plain = AutoencoderKL.from_config(load_preset("tiny")["vae"])
    vae = AutoencoderKLCFW.from_autoencoder(plain)
    z = random_like((1, 8, 8, 6), seed=3)
    assert torch.equal(vae.decode(z).sample, plain.decode(z).sample)
    _, features = vae.encode_with_features(random_like((1, 3, 32, 24), seed=4))
    assert len(features) == len(vae.fusion_layers) == 1
    assert not torch.allclose(vae.decode(z, features=features).sample, plain.decode(z).sample)


def test_mistakes_say_what_was_expected() -> None:
    vae = golden_vae()
    inputs = golden_inputs("stablesr/cfw")
    _, features = vae.encode_with_features(inputs["image"])
    with pytest.raises(ValueError, match="expected 2 encoder features"):
        vae.decode(inputs["z"], features=features[:1])
    with pytest.raises(ValueError, match="of the size that is decoded"):
        vae.decode(inputs["z"][..., :4], features=features)
    with pytest.raises(ValueError, match="at least 3 levels"):
        AutoencoderKLCFW(block_out_channels=(32,))


def test_full_size_parameter_count() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLCFW.from_config(load_preset("sd21")["vae"])
    fusion = sum(p.numel() for p in vae.fusion_layers.parameters())
    assert round(fusion / 1e6, 2) == 44.39
    assert round((sum(p.numel() for p in vae.parameters()) - fusion) / 1e6, 2) == 83.65
