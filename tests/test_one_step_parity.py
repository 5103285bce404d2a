"""models/one_step/: every base against diffusers' own pipelines, from pixels to pixels: signs, times, shifts and scales."""

from __future__ import annotations

import pytest
import torch
from golden_models import random_like, relative_error
from one_step_cases import AT, NOISED, TOYS, Stock, stock, toy
from toys import smooth

from sslsr_diffusion.models.condition import Condition
from sslsr_diffusion.models.one_step.networks import OneStepNetworks
from sslsr_diffusion.models.process import Flow

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
