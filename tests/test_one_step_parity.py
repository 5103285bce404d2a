"""models/one_step/: every base against diffusers' own pipelines, from pixels to pixels: signs, times, shifts and scales."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from golden_models import random_like, relative_error
from one_step_cases import AT, NOISED, TOYS, Stock, save_pipeline, stock, toy, with_loras
from toys import smooth

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.condition import Condition
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.one_step.networks import OneStepNetworks
from sslsr_diffusion.models.process import Flow
from sslsr_diffusion.tables import named

CLOSE = 1e-5  # float32 through the same layers in another order of sums
KINDS = pytest.mark.parametrize("kind", TOYS)


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[OneStepNetworks, Stock]]:
    found = {}
    for kind in TOYS:
        networks = toy(kind, noise=NOISED[kind])
        found[kind] = networks, stock(kind, networks)
    return found


def pictures() -> torch.Tensor:
    return torch.stack([smooth(seed, size=32)[..., :24] for seed in range(2)])  # higher than wide: axes cannot be mixed up


@KINDS
@torch.no_grad()
def test_encoding_and_noising_are_those_of_the_pipeline(kind: str, cases) -> None:
    networks, theirs = cases[kind]
    pixels = pictures()
    want = theirs.encode(pixels * 2 - 1, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    shape = networks.codec.noise_shape(pixels)
    posterior = torch.zeros(shape) if kind == "flux2" else torch.randn(shape, generator=generator)  # its pipeline takes the mean
    noise = torch.randn(shape, generator=generator)
    got = networks.start(networks.codec.encode(pixels, posterior), noise)
    assert relative_error(got, want) < CLOSE


@KINDS
@torch.no_grad()
def test_one_call_from_given_latents_is_that_of_the_pipeline(kind: str, cases) -> None:
    networks, theirs = cases[kind]
    z = random_like((2, networks.codec.latent_channels, 8, 6), seed=5)
    t = torch.full((2,), networks.timestep)
    pred = networks.denoiser(z, t, Condition(z, networks.text))
    clean = networks.clean(pred, z, z)
    assert relative_error(clean, z) > 0.01, "the call must change something, or it would prove nothing"
    want = theirs.call(z)
    got = networks.codec.decode(clean).clamp(0, 1)
    assert ((want > 0) & (want < 1)).float().mean() > 0.3
    assert (got - want).abs().max() < CLOSE


@KINDS
def test_the_network_is_told_what_the_recipe_says(kind: str, cases) -> None:
    networks, _ = cases[kind]
    assert networks.timestep == pytest.approx(AT[kind] if kind == "sd" else 1000 * AT[kind])
    assert isinstance(networks.process, Flow) == (kind != "sd")


@torch.no_grad()
def test_at_sigma_one_the_rules_of_process_and_residual_are_one() -> None:
    """TSD-SR feeds the low-resolution latents at sigma 1 and takes the prediction off them."""
    z, pred = random_like((1, 4, 8, 8), seed=0), random_like((1, 4, 8, 8), seed=1)
    made = [toy("sd3", sigma=1.0, x0=rule).clean(pred, z, z) for rule in ("process", "residual")]
    assert torch.equal(*made)
    other = toy("sd3", x0="residual")
    assert torch.equal(other.clean(pred, z, z), z - pred)


@pytest.mark.parametrize("kind", ["flux2", "zimage"])
def test_the_prompt_is_encoded_as_the_pipeline_does(kind: str, tmp_path: Path) -> None:
    base = save_pipeline(kind, tmp_path / "base")
    networks = with_loras(kind, base, drawn=False, prompt="a sharp photo", text=True)
    pipe = named(f"diffusers:{networks.denoiser.pipeline_class}").from_pretrained(base, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        (want, *_) = pipe.encode_prompt("a sharp photo", **({} if kind == "flux2" else {"do_classifier_free_guidance": False}))
    want = want if kind == "flux2" else want[0][None]
    assert torch.equal(networks.text.sequence, want.float())
    assert networks.text.sequence.abs().max() > 0.01
    prior = networks.prior(rank=1, negative_prompt="blurry", seed=0)
    z = random_like((1, networks.codec.latent_channels, 4, 4), seed=1)
    asked = [prior.predict(z, torch.tensor([500]), guidance=guidance, learned=False) for guidance in (1.0, 3.0)]
    assert not torch.equal(*asked)

    networks.save(tmp_path / "lora")
    shutil.rmtree(base / "text_encoder")  # whoever upscales does without
    opened = FAMILIES["one_step"].read(tmp_path / "lora")
    assert isinstance(opened, OneStepNetworks)
    assert torch.equal(opened.text.sequence, networks.text.sequence)
    with pytest.raises(UserError, match="lacks its text_encoder"):
        with_loras(kind, base)
