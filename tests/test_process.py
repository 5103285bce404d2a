"""models/process.py: the noise processes, their targets and inverses, and which schedulers stand for which."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from golden_models import golden_inputs, golden_outputs, random_like, relative_error

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.process import DDPM, PROCESSES, Flow, Process
from sslsr_diffusion.models.stablesr.settings import load_preset

T = torch.tensor([0, 17, 500, 999])


def ddpm(kind: str) -> DDPM:
    process = Process.of({**load_preset("sd21")["scheduler"], "prediction_type": kind})
    assert isinstance(process, DDPM)
    return process


def test_alphas_are_the_originals() -> None:
    want = golden_outputs("stablesr/schedules")["full1000.alphas_cumprod"]
    assert relative_error(torch.tensor(ddpm("epsilon").alphas_cumprod), want) < 2e-5  # float32 betas; the README's tolerance


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_x0_inverts_the_target(kind: str) -> None:
    process = ddpm(kind)
    z0, noise = random_like((4, 4, 5, 7), seed=0), random_like((4, 4, 5, 7), seed=1)
    zt = process.add_noise(z0, noise, T)
    got = process.clean_and_noise(process.target(z0, noise, T), zt, T)[0]
    # at t=999 epsilon divides float32 rounding by sqrt(abar) = 0.068
    assert (got - z0).abs().max() < 2e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_agrees_with_diffusers(kind: str) -> None:
    process = ddpm(kind)
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)
    z0, noise = random_like((4, 4, 5, 7), seed=0), random_like((4, 4, 5, 7), seed=1)
    assert torch.allclose(process.add_noise(z0, noise, T), reference.add_noise(z0, noise, T), atol=1e-6)
    if kind == "v_prediction":
        assert torch.allclose(process.target(z0, noise, T), reference.get_velocity(z0, noise, T), atol=1e-6)
    assert torch.allclose(process.noise_level(T).square().reciprocal(), reference.alphas_cumprod[T] / (1 - reference.alphas_cumprod[T]))


def test_start_of_sampling_is_the_originals() -> None:
    inputs, want = golden_inputs("stablesr/ddpm_loop"), golden_outputs("stablesr/ddpm_loop")
    z_lr = inputs["lr_latent"]
    got = ddpm("epsilon").add_noise(z_lr, inputs["start_noise"], torch.full((z_lr.shape[0],), 999))
    assert relative_error(got, want["x_T"]) < 1e-6


def test_half_precision_latents_do_not_lose_the_noise_levels() -> None:
    process = ddpm("epsilon")
    z0, noise = random_like((4, 4, 5, 7), seed=0), random_like((4, 4, 5, 7), seed=1)
    got = process.add_noise(z0.bfloat16(), noise.bfloat16(), T)
    want = process.add_noise(z0.bfloat16().float(), noise.bfloat16().float(), T)
    assert torch.equal(got.float(), want)


SD21 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_base_schedulers_become_the_samplers_one() -> None:
    base = DDIMScheduler(**SD21, prediction_type="v_prediction", steps_offset=1)
    made = Process.of(base.config, "DDIMScheduler").scheduler()
    assert (made.config.prediction_type, made.config.clip_sample, made.config.variance_type) == ("v_prediction", False, "fixed_small")
    assert torch.equal(made.alphas_cumprod, base.alphas_cumprod)


def test_a_schedule_that_ends_in_pure_noise_is_kept() -> None:
    """rescale_betas_zero_snr (Lin et al., WACV 2024): the last timestep shows nothing of the picture."""
    base = DDIMScheduler(**SD21, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    made = Process.of(base.config, "DDIMScheduler")
    assert isinstance(made, DDPM)
    assert made.alphas_cumprod[-1] < 1e-6 < Process.of(SD21, "DDIMScheduler").alphas_cumprod[-1]
    assert torch.equal(made.scheduler().alphas_cumprod, base.alphas_cumprod)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDPMScheduler", "prediction_type": "flow_prediction"}, "epsilon, v_prediction or sample, got 'flow_prediction'"),
        ({"_class_name": "EDMEulerScheduler"}, "expected one of DDPMScheduler, .* got EDMEulerScheduler"),
        ({"beta_start": 0.1}, "got None"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "UniPCMultistepScheduler with use_flow_sigmas is a flow"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.02}, "expected a flow without shift_terminal, got 0.02"),
    ],
)
def test_a_scheduler_of_another_process_is_never_read_as_this_one(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Process.of(config)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_flow_is_that_of_diffusers_scheduler(shift: float) -> None:
    """Levels, timesteps, noising and one Euler step of FlowMatchEulerDiscreteScheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = Process.of(scheduler.config, "FlowMatchEulerDiscreteScheduler")
    assert isinstance(flow, Flow)
    t = torch.tensor([999, 499, 0])
    places = 999 - t  # diffusers counts from the noise
    assert torch.allclose(flow.timestep(t), scheduler.timesteps[places])
    assert flow.timestep_of(499) == pytest.approx(float(scheduler.timesteps[500]), rel=1e-6)
    assert torch.allclose(flow.levels(t, torch.zeros(3, 1))[1].flatten(), scheduler.sigmas[places])
    z0, noise = random_like((3, 4, 5, 7), seed=0), random_like((3, 4, 5, 7), seed=1)
    zt = flow.add_noise(z0, noise, t)
    assert torch.allclose(zt, scheduler.scale_noise(z0, scheduler.timesteps[places], noise), atol=1e-6)
    clean, back = flow.clean_and_noise(flow.target(z0, noise, t), zt, t)
    assert torch.allclose(clean, z0, atol=1e-5)
    assert torch.allclose(back, noise, atol=1e-5)
    # an Euler step to sigma' is (1 - sigma') x0 + sigma' n
    velocity = random_like((1, 4, 5, 7), seed=2)
    stepper = FlowMatchEulerDiscreteScheduler()  # takes sigmas as they are
    stepper.set_timesteps(sigmas=[float(scheduler.sigmas[500]), 0.1])
    stepped = stepper.step(velocity, stepper.timesteps[0], zt[1:2], return_dict=False)[0]
    clean, back = flow.clean_and_noise(velocity, zt[1:2], t[1:2])
    after = float(stepper.sigmas[1])
    assert torch.allclose(stepped, (1 - after) * clean + after * back, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(PROCESSES)))
def test_every_process_takes_predictions_apart(name: str) -> None:
    """z0 and noise are found from the target, and clean_gain is what an error of the prediction becomes in z0."""
    process, t = Process.of({}, name), torch.tensor([3, 400, 990])
    z0, noise, error = (random_like((3, 4, 5, 7), seed=seed) for seed in range(3))
    zt, target = process.add_noise(z0, noise, t), process.target(z0, noise, t)
    clean, back = process.clean_and_noise(target, zt, t)
    assert (clean - z0).abs().max() < 1e-3
    assert (back - noise).abs().max() < 1e-3
    moved, _ = process.clean_and_noise(target + error, zt, t)
    gain = (moved - clean).flatten(1).norm(dim=1) / error.flatten(1).norm(dim=1)
    assert torch.allclose(gain, process.clean_gain(t), rtol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_from_another_start_leads_there_and_back_to_z0(kind: str) -> None:
    process, t = ddpm(kind), torch.tensor([1, 17, 99, 500])
    z0, other, noise = (random_like((4, 4, 5, 7), seed=seed) for seed in range(3))
    effective = process.noise_to(z0, other, noise, t)
    zt = process.add_noise(other, noise, t)
    assert (process.add_noise(z0, effective, t) - zt).abs().max() < 1e-5
    # what a network that says the target makes of the other start is z0
    assert (process.clean_and_noise(process.target(z0, effective, t), zt, t)[0] - z0).abs().max() < 2e-5
    assert torch.equal(process.noise_to(z0, z0, noise, t), noise)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_shortened_process_keeps_its_timesteps(zero_snr: bool) -> None:
    whole = Process.of({**load_preset("sd21")["scheduler"], "rescale_betas_zero_snr": zero_snr})
    assert isinstance(whole, DDPM)
    cut = whole.until(99)
    assert cut.last == 99
    assert cut.prediction_type == whole.prediction_type
    saved = Process.of(cut.scheduler().config, "DDPMScheduler")  # as a pipeline's folder has it
    assert isinstance(saved, DDPM)
    assert relative_error(torch.tensor(saved.alphas_cumprod), torch.tensor(whole.alphas_cumprod[:100])) < 1e-6
    assert saved.until(99).alphas_cumprod == saved.alphas_cumprod
    assert saved.until(99).scheduler_config["trained_betas"] == cut.scheduler_config["trained_betas"]
    with pytest.raises(UserError, match="at most 99, the last"):
        saved.until(100)
