"""models/denoiser.py: encoder and UNet together, what trains, checkpointing."""

from __future__ import annotations

import pytest
import torch
from golden_models import golden_encoder, golden_inputs, golden_outputs, golden_unet, random_like, relative_error

from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.denoiser import Denoiser
from sslsr_diffusion.models.stablesr.settings import StableSRSettings


@torch.no_grad()
@pytest.mark.parametrize("case", [0, 1])
def test_composition_is_the_originals(case: int) -> None:
    inputs, want = golden_inputs("stablesr/composed"), golden_outputs("stablesr/composed")
    denoiser = Denoiser(golden_unet(), golden_encoder())
    got = denoiser(inputs["x_t"], inputs[f"timesteps.{case}"], Condition(inputs["latent"], Text(inputs["context"])))
    assert relative_error(got, want[f"case{case}.eps"]) < 1e-4  # the README's tolerance


def tiny(train: str = "all") -> Denoiser:
    return build_networks(StableSRSettings(init="random", preset="tiny"), train=train).denoiser


def inputs(seed: int, size: tuple[int, int] = (8, 12)) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    t = torch.tensor([3, 800])
    return random_like((2, 8, *size), seed), t, Condition(random_like((2, 8, *size), seed + 1), Text(random_like((1, 1, 32), seed + 2)))


def test_sft_trains_the_encoder_and_the_spade_layers_by_name() -> None:
    denoiser = tiny()
    every = [name for name, _ in denoiser.named_parameters()]
    trained = denoiser.set_trainable("sft")
    assert set(trained) == {n for n in every if n.startswith("structural_encoder.") or ".spade." in n}
    assert {n for n, p in denoiser.named_parameters() if p.requires_grad} == set(trained)
    assert any(n.endswith("spade.norm.weight") for n in trained)  # its affine trains too
    assert denoiser.set_trainable("all") == every
    with pytest.raises(ValueError, match="'sft' or 'all'"):
        denoiser.set_trainable("spade")


@pytest.mark.parametrize("train", ["sft", "all"])
def test_checkpointing_gives_the_same_gradients_after_another_forward(train: str) -> None:
    plain, checkpointed = tiny(train), tiny(train)
    for part in (checkpointed.unet, checkpointed.structural_encoder):
        part.enable_gradient_checkpointing()
    grads = []
    for denoiser in (plain, checkpointed):
        denoiser.train()
        out = denoiser(*inputs(0))
        denoiser(*inputs(5, size=(12, 6)))  # must leave no trace
        (out * random_like(tuple(out.shape), seed=9)).sum().backward()
        missing = [n for n, p in denoiser.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        grads.append(torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None]))
    assert grads[0].shape == grads[1].shape
    assert (grads[1] - grads[0]).norm() <= 1e-5 * grads[0].norm()  # same operations, other order of accumulation


def test_one_text_context_serves_the_batch() -> None:
    denoiser = tiny()
    zt, t, condition = inputs(1)
    assert condition.text is not None
    with torch.no_grad():
        twice = condition._replace(text=condition.text.repeated(2))
        assert torch.equal(denoiser(zt, t, condition), denoiser(zt, t, twice))
