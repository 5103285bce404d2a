"""models/schedule.py: the forward process, its targets and their inverses."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from golden_models import golden_inputs, golden_outputs, random_like, relative_error

from sslsr_diffusion.models.process import Schedule, make_scheduler
from sslsr_diffusion.models.stablesr.settings import load_preset
from sslsr_diffusion.models.process import truncated

T = torch.tensor([0, 17, 500, 999])


def schedule(kind: str) -> Schedule:
    return Schedule.from_scheduler({**load_preset("sd21")["scheduler"], "prediction_type": kind})


def test_alphas_are_the_originals() -> None:
    want = golden_outputs("stablesr/schedules")["full1000.alphas_cumprod"]
    assert relative_error(schedule("epsilon").alphas_cumprod, want) < 2e-5  # float32 betas; the README's tolerance


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_x0_inverts_the_target(kind: str) -> None:
    process = schedule(kind)
    z0, noise = random_like((4, 4, 5, 7), seed=0), random_like((4, 4, 5, 7), seed=1)
    zt = process.add_noise(z0, noise, T)
    got = process.x0(process.target(z0, noise, T), zt, T)
    # at t=999 epsilon divides float32 rounding by sqrt(abar) = 0.068
    assert (got - z0).abs().max() < 2e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_agrees_with_diffusers(kind: str) -> None:
    process = schedule(kind)
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)
    z0, noise = random_like((4, 4, 5, 7), seed=0), random_like((4, 4, 5, 7), seed=1)
    assert torch.allclose(process.add_noise(z0, noise, T), reference.add_noise(z0, noise, T), atol=1e-6)
    if kind == "v_prediction":
        assert torch.allclose(process.target(z0, noise, T), reference.get_velocity(z0, noise, T), atol=1e-6)
    assert torch.allclose(process.snr(T), reference.alphas_cumprod[T] / (1 - reference.alphas_cumprod[T]))


def test_start_of_sampling_is_the_originals() -> None:
    inputs, want = golden_inputs("stablesr/ddpm_loop"), golden_outputs("stablesr/ddpm_loop")
    z_lr = inputs["lr_latent"]
    got = schedule("epsilon").add_noise(z_lr, inputs["start_noise"], torch.full((z_lr.shape[0],), 999))
    assert relative_error(got, want["x_T"]) < 1e-6


def test_half_precision_latents_do_not_lose_the_noise_levels() -> None:
    process = schedule("epsilon")
    z0, noise = random_like((4, 4, 5, 7), seed=0), random_like((4, 4, 5, 7), seed=1)
    got = process.add_noise(z0.bfloat16(), noise.bfloat16(), T)
    want = process.add_noise(z0.bfloat16().float(), noise.bfloat16().float(), T)
    assert torch.equal(got.float(), want)


def test_base_schedulers_become_the_samplers_one() -> None:
    base = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1)
    made = make_scheduler(base.config)
    assert (made.config.prediction_type, made.config.clip_sample, made.config.variance_type) == ("v_prediction", False, "fixed_small")
    assert torch.equal(made.alphas_cumprod, base.alphas_cumprod)


def test_other_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'sample'"):
        Schedule.from_scheduler(DDPMScheduler(prediction_type="sample"))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_from_another_start_leads_there_and_back_to_z0(kind: str) -> None:
    process, t = schedule(kind), torch.tensor([1, 17, 99, 500])
    z0, other, noise = (random_like((4, 4, 5, 7), seed=seed) for seed in range(3))
    effective = process.noise_to(z0, other, noise, t)
    zt = process.add_noise(other, noise, t)
    assert (process.add_noise(z0, effective, t) - zt).abs().max() < 1e-5
    # what a network that says the target makes of the other start is z0
    assert (process.x0(process.target(z0, effective, t), zt, t) - z0).abs().max() < 2e-5
    assert torch.equal(process.noise_to(z0, z0, noise, t), noise)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_truncated_schedule_keeps_its_timesteps(zero_snr: bool) -> None:
    config = {**load_preset("sd21")["scheduler"], "rescale_betas_zero_snr": zero_snr}
    whole, cut = Schedule.from_scheduler(config), Schedule.from_scheduler(truncated(config, 100))
    assert cut.num_train_timesteps == 100
    assert cut.prediction_type == whole.prediction_type
    assert relative_error(cut.alphas_cumprod, whole.alphas_cumprod[:100]) < 1e-6
    again = truncated(truncated(config, 100), 100)
    assert again == truncated(config, 100)
    with pytest.raises(ValueError, match="at most the 100 timesteps"):
        truncated(again, 101)
