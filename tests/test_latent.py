"""Restorers of latent networks of any family: a toy with a flow, from its folder to the picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from restorers import ToyFamily, ToyLatents
from test_pipeline import photo, seeded

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.latent import LatentOutput, LatentRestorer
from sslsr_diffusion.inference.open import find_model, open_model, restorer_of
from sslsr_diffusion.inference.progress import listening
from sslsr_diffusion.models import FAMILIES
from sslsr_diffusion.models.process import Flow

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of a family that only these tests have: a flow, two steps, twice as large."""
    monkeypatch.setitem(FAMILIES, "toy", ToyFamily())
    restorer_of(ToyLatents(FLOW), FAMILIES["toy"], scale=2, num_inference_steps=2, detail=0.75).save(tmp_path)
    return str(tmp_path)


def opened(model: str, **where) -> LatentRestorer:
    restorer = open_model(find_model(model), device="cpu", **where)
    assert isinstance(restorer, LatentRestorer)
    return restorer


def made(restorer: LatentRestorer, image=None, **call) -> torch.Tensor:
    return restorer(photo(9, 13) if image is None else image, output_type="pt", **{"generator": seeded(), **call}).images


def test_what_is_saved_is_what_a_call_takes_that_names_nothing(model):
    restorer = opened(model)
    assert isinstance(restorer.networks.process, Flow)
    assert (restorer.scale, restorer.defaults) == (2, {"num_inference_steps": 2, "detail": 0.75})
    assert made(restorer).shape == (1, 3, 18, 26)
    named = {"scale": 2, "num_inference_steps": 2, "detail": 0.75, "color_fix": "wavelet", "antiring": 0, "strength": 1}
    assert torch.equal(made(restorer), made(restorer, **named))
    assert not torch.equal(made(restorer), made(restorer, detail=1))


@pytest.mark.parametrize("scale", [1, 1.5, 4])
@pytest.mark.parametrize("size", [(8, 8), (1, 5), (30, 17)])
def test_output_is_exactly_round_scale_times_size(model, size, scale):
    got = made(opened(model), photo(*size), scale=scale)
    assert got.shape == (1, 3, *(max(1, round(scale * side)) for side in size))
    assert got.isfinite().all()


def test_the_same_generator_gives_the_same_bits_whoever_opens_it(model):
    first, second = opened(model), opened(model)
    assert torch.equal(made(first), made(second))
    assert not torch.equal(made(first), made(first, generator=seeded(1)))
    pictures = [photo(9, 13, seed=k) for k in range(2)]
    together = made(first, torch.stack(pictures), generator=[seeded(0), seeded(1)])
    for k in range(2):
        torch.testing.assert_close(together[k : k + 1], made(first, pictures[k], generator=seeded(k)), atol=1e-5, rtol=0)


def test_a_flow_is_walked_from_its_last_level_in_the_steps_that_are_asked(model):
    restorer, seen = opened(model), []

    def note(index, t, values):
        seen.append((index, round(t, 2), tuple(values["latents"].shape)))

    out = restorer(photo(9, 13), num_inference_steps=3, callback_on_step_end=note)
    assert isinstance(out, LatentOutput)
    assert out.plans[0].tile is None
    assert [index for index, _, _ in seen] == [0, 1, 2]
    assert seen[0][1:] == (1000.0, (1, 3, 8, 8))  # padded to the 32 pixels that it was trained at, shrunk four times
    assert seen[0][1] > seen[1][1] > seen[2][1]
    del seen[:]
    made(restorer, num_inference_steps=10, strength=0.3, callback_on_step_end=note)
    assert len(seen) == 3


def test_tiles_and_budgets_of_another_family(model):
    restorer = opened(model, memory_budget=10**9, tile=32)
    assert restorer.defaults["memory_budget"] == 10**9
    assert "memory_budget" not in restorer.kept_defaults
    heard: list[tuple[float, str]] = []
    with listening(lambda *told: heard.append(told)):
        out = restorer(photo(40, 30), tile=32, output_type="pt")
    shares = [share for share, _ in heard]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= 1 / 3 < shares[-1] < 1
    assert any(re.fullmatch(r"step 2 of 2, (batch of tiles|tile) 2 of \d+", text) for _, text in heard), heard
    told = len(heard)
    assert out.images.shape == (1, 3, 80, 60)
    assert out.plans[0].tile == 32
    made(restorer)
    assert len(heard) == told  # nobody listens any more
    with pytest.raises(UserError, match="tile: expected a multiple of 8"):
        restorer.check(tile=20)
    with pytest.raises(UserError, match="memory_budget: 1 MB is too little for this model"):
        opened(model, memory_budget=10**5)


def test_half_precision_leaves_the_process_alone(model):
    half = opened(model, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.networks.parameters()} == {torch.bfloat16}
    assert {table.dtype for table in half.networks.process.buffers()} == {torch.float32}
    got = made(half)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, made(opened(model)), atol=0.05, rtol=0)  # 8 bits of mantissa through two steps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"sampler": "ddpm"}, "^sampler: ddpm is of the DDPM family and this model's process is Flow; use ddim"),
        ({"sampler": "dpm++"}, "^sampler: .* is of the DDPM family"),
        ({"eta": 0.5}, "^eta: expected 0 for a flow"),
        ({"num_inference_steps": 1001}, "^num_inference_steps: expected 1 to 1000"),
        ({"prompt": "a cat"}, r"^prompt: this model does not have it, got 'a cat' \(no text encoder\)"),
        ({"fidelity": 1}, r"^fidelity: this model does not have it, got 1 \(no CFW decoder\)"),
        ({"vae_tile": 20}, "^vae_tile: expected a multiple of 16"),
        ({"strength": 0}, "^strength"),
        ({"steps": 3}, "^steps: this model has no such option; it has antiring, back_projection, callback_on_step_end"),
    ],
)
def test_what_no_picture_can_have_is_refused_by_name(model, call, message):
    restorer = opened(model)
    with pytest.raises(UserError, match=message):
        restorer.check(**call)
    with pytest.raises(UserError, match=message):
        made(restorer, **call)


def test_networks_in_memory_are_called_as_they_are_now():
    networks = ToyLatents(FLOW)
    restorer = restorer_of(networks, ToyFamily(), scale=4, num_inference_steps=1)
    before = made(restorer)
    with torch.no_grad():
        networks.denoiser.body[2].bias.add_(0.5)
    assert not torch.equal(made(restorer), before)
