"""Samplers against the published loops (tolerances of the goldens' README: error relative to the largest magnitude)."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from golden_models import golden_encoder, golden_unet
from goldens import load_golden
from torch import Tensor

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.inference.choices import SAMPLERS
from sslsr_diffusion.inference.sampling import (
    DiffusersSampler,
    OriginalDDIM,
    SamplerCall,
    SpacedDDIM,
    SpacedDDPM,
    build_sampler,
    kept_steps,
    sample,
    spaced_timesteps,
)
from sslsr_diffusion.inference.tiled import TiledDenoiser
from sslsr_diffusion.inference.tiling import tile_boxes
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.process import DDPM, Process
from sslsr_diffusion.models.stablesr.denoiser import Denoiser
from sslsr_diffusion.models.stablesr.settings import load_preset

# diffusers' schedulers convert their own tensors the way numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def ddpm(prediction_type: str = "epsilon") -> DDPM:
    process = Process.of({**load_preset("sd21")["scheduler"], "prediction_type": prediction_type})
    assert isinstance(process, DDPM)
    return process


def make_scheduler() -> DDPMScheduler:
    return ddpm().scheduler()


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@functools.cache
def golden_networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    return golden_unet(), golden_encoder()


def inputs_of(item: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    golden = load_golden(f"stablesr/{item}")
    inputs = {name[3:]: tensor.float() for name, tensor in golden.tensors.items() if name.startswith("in.")}
    outputs = {name[4:]: tensor for name, tensor in golden.tensors.items() if name.startswith("out.")}
    return inputs, outputs, golden.index["config"]


@torch.no_grad()
def run_golden(item: str, sampler, x: Tensor, *, tile: int | None = None, overlap: int = 0, batch_size: int = 1):
    """Run one stored loop; returns what each step left and the final latent."""
    inputs, outputs, config = inputs_of(item)
    height, width = x.shape[-2:]
    predict = TiledDenoiser(
        Denoiser(*golden_networks()),
        Condition(inputs["lr_latent"], Text(inputs["context"]).repeated(len(x))),
        tile_boxes(height, width, tile or max(height, width), overlap),
        negative_text=Text(inputs["negative_context"]).repeated(len(x)) if "negative_context" in inputs else None,
        guidance_scale=config.get("guidance_scale", 1.0),
        batch_size=batch_size,
        overlap=overlap,
        weights="original",
    )
    steps: list[Tensor] = []

    def keep(index: int, t: float, latents: Tensor) -> Tensor:
        steps.append(latents)
        return latents

    final = sample(sampler, predict, x, lambda index: inputs[f"noise.{index}"], keep)
    return steps, final, outputs


@pytest.mark.parametrize("steps", [200, 50, 4])
def test_schedules_golden(steps):
    _, outputs, _ = inputs_of("schedules")
    want = {name.split(".", 1)[1]: tensor for name, tensor in outputs.items() if name.startswith(f"spaced{steps}.")}
    assert spaced_timesteps(steps) == want["timesteps"].tolist()
    sampler = SpacedDDPM(ddpm("epsilon"), steps)
    assert list(sampler.timesteps) == want["timesteps"].flip(0).tolist()
    coefficients = torch.tensor([sampler.coefficients(i) for i in range(steps)], dtype=torch.float64).flip(0)
    # 2e-5: the original keeps its betas in float32
    assert error(coefficients[:, 0], want["posterior_mean_coef1"]) < 2e-5
    assert error(coefficients[:, 1], want["posterior_mean_coef2"]) < 2e-5
    assert error(coefficients[:, 2], want["posterior_log_variance_clipped"]) < 2e-5


def test_ddpm_loop_golden():
    inputs, outputs, config = inputs_of("ddpm_loop")
    sampler = SpacedDDPM(ddpm("epsilon"), config["steps"])
    x = sampler.start(inputs["start_noise"], inputs["lr_latent"])
    assert error(x, outputs["x_T"]) < 1e-6
    steps, final, _ = run_golden("ddpm_loop", sampler, x, batch_size=2)
    for k in range(config["steps"] - 1):
        assert error(steps[k], outputs[f"after_step.{k}"]) < 3e-4
    assert error(final, outputs["final"]) < 3e-4


def test_canvas_loop_golden():
    inputs, outputs, config = inputs_of("canvas_loop")
    sampler = SpacedDDPM(ddpm("epsilon"), config["steps"])
    _, final, _ = run_golden("canvas_loop", sampler, inputs["start_noise"], tile=64, overlap=32, batch_size=3)
    assert error(final, outputs["final"]) < 3e-4


def test_canvas_cfg_v_loop_golden():
    inputs, outputs, config = inputs_of("canvas_cfg_v_loop")
    sampler = SpacedDDPM(ddpm("v_prediction"), config["steps"])
    x = sampler.start(inputs["start_noise"], inputs["lr_latent"])
    assert error(x, outputs["x_T"]) < 1e-6
    steps, final, _ = run_golden("canvas_cfg_v_loop", sampler, x, tile=24, overlap=8, batch_size=2)
    for k in range(config["steps"] - 1):
        assert error(steps[k], outputs[f"after_step.{k}"]) < 3e-4
    assert error(final, outputs["final"]) < 3e-4


def test_ddim_golden_with_the_original_mismatch():
    inputs, outputs, config = inputs_of("ddim_cfg")
    sampler = OriginalDDIM(ddpm("v_prediction"), config["steps"], eta=config["eta"])
    assert list(sampler.timesteps) == outputs["model_timesteps"].flip(0).tolist()
    sigmas = torch.tensor([sampler.sigma(i) for i in range(config["steps"])], dtype=torch.float64).flip(0)
    assert error(sigmas, outputs["sigmas"]) < 2e-5
    steps, final, _ = run_golden("ddim_cfg", sampler, inputs["x_T"])
    for k in range(config["steps"] - 1):
        assert error(steps[k], outputs[f"after_step.{k}"]) < 1e-3
    assert error(final, outputs["final"]) < 1e-3


def test_spaced_timesteps_contain_both_ends():
    assert spaced_timesteps(4) == [0, 333, 666, 999]
    assert spaced_timesteps(1) == [999]
    assert spaced_timesteps(1000) == list(range(1000))
    for bad in (0, 1001):
        with pytest.raises(UserError, match="1 to 1000"):
            spaced_timesteps(bad)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_clean_and_noise_invert_the_forward_process(prediction_type):
    x0, noise, t = torch.randn(2, 4, 5, 7), torch.randn(2, 4, 5, 7), torch.tensor([500])
    process = ddpm(prediction_type)
    alpha = process.alphas_cumprod[500]
    x = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
    pred = {"epsilon": noise, "v_prediction": alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0, "sample": x0}[prediction_type]
    got_x0, got_noise = process.clean_and_noise(pred, x, t)
    torch.testing.assert_close(got_x0, x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_noise, noise, atol=1e-5, rtol=1e-5)


def oracle(x0: Tensor, prediction_type: str, sampler):
    """A perfect network: whatever x is, it answers with the epsilon or v that makes x0 the clean latent."""
    full = torch.tensor(ddpm().alphas_cumprod, dtype=torch.float64)

    def predict(x: Tensor, t: float) -> Tensor:
        a = full[round(t)].item()
        epsilon = (x - a**0.5 * x0) / (1 - a) ** 0.5
        return epsilon if prediction_type == "epsilon" else a**0.5 * epsilon - (1 - a) ** 0.5 * x0

    return predict


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("from_lr", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddim-original"])
def test_every_sampler_finds_the_clean_latent_of_a_perfect_network(name, strength, from_lr, prediction_type):
    if strength < 1 and not from_lr:
        return  # the pipeline refuses it
    x0, noise = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    sampler = build_sampler(name, ddpm(prediction_type), 10, strength=strength, eta=0.5, seeds=[1, 2])
    x = sampler.start(noise, torch.randn_like(x0) if from_lr else None)
    assert len(sampler.timesteps) == (10 if strength == 1 else 4)
    got = sample(sampler, oracle(x0, prediction_type, sampler), x, lambda _: torch.randn_like(x0))
    # the last step of the multistep solvers lands at sigma of timestep 0 or exactly at 0, hence 1e-2
    torch.testing.assert_close(got, x0, atol=2e-2, rtol=1e-2)


def test_named_samplers_begin_at_the_same_latent():
    z_lr, noise = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
    for given in (z_lr, None):
        inputs = []
        for name in SAMPLERS:
            sampler = build_sampler(name, ddpm(), 8, seeds=[0])
            assert round(sampler.timesteps[0]) == 999
            inputs.append(sampler.model_input(sampler.start(noise, given), 0))
        for other in inputs[1:]:
            torch.testing.assert_close(other, inputs[0], atol=2e-5, rtol=2e-5)


def test_the_default_sampler_is_the_scheduler_s():
    assert type(build_sampler(None, ddpm(), 4)) is SpacedDDPM
    assert type(build_sampler(None, ddpm(), 4, scheduler=DDIMScheduler.from_config(make_scheduler().config))) is SpacedDDIM
    scheduler = UniPCMultistepScheduler.from_config(make_scheduler().config)
    sampler = build_sampler(None, ddpm(), 4, scheduler=scheduler, seeds=[0])
    assert scheduler.num_inference_steps is None  # the pipeline's own object keeps no state of a run
    assert len(sampler.timesteps) == 4
    euler = EulerDiscreteScheduler.from_config(make_scheduler().config)
    assert build_sampler("EulerAncestralDiscreteScheduler", ddpm(), 4, scheduler=euler, seeds=[0])


def test_ddim_without_noise_ends_clean_and_its_pairing_is_right():
    sampler = SpacedDDIM(ddpm(), 10)
    assert sampler._at == [int(t) for t in sampler.timesteps]
    assert sampler._next(0) == ddpm().level(int(sampler.timesteps[1]))
    assert sampler._next(9) == (1.0, 0.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_straight_way_through_a_flow_is_diffusers_euler(shift):
    """The same network, start and timesteps as FlowMatchEulerDiscreteScheduler: every step gives the same latent."""
    flow = Process.of({"shift": shift}, "FlowMatchEulerDiscreteScheduler")
    sampler = build_sampler(None, flow, 4)
    assert type(sampler) is SpacedDDIM
    noise = torch.randn(2, 4, 6, 8)
    x = sampler.start(noise)
    reference = FlowMatchEulerDiscreteScheduler(shift=1.0)
    reference.set_timesteps(sigmas=[t / 1000 for t in sampler.timesteps])
    torch.testing.assert_close(reference.timesteps.tolist(), list(sampler.timesteps), rtol=1e-5, atol=1e-4)
    want = x
    for index, t in enumerate(sampler.timesteps):
        velocity = torch.tanh(x + t / 1000)
        x = sampler.step(velocity, x, index, lambda _: noise)
        want = reference.step(torch.tanh(want + t / 1000), reference.timesteps[index], want, return_dict=False)[0]
        torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim-original", "dpm++", "euler", "DDIMScheduler"])
def test_samplers_of_the_ddpm_family_refuse_a_flow(name):
    with pytest.raises(UserError, match="is of the DDPM family and this model's process is Flow"):
        build_sampler(name, Process.of({}, "FlowMatchEulerDiscreteScheduler"), 4)


def test_a_flow_has_no_fresh_noise():
    with pytest.raises(UserError, match="eta: expected 0 for a flow"):
        build_sampler("ddim", Process.of({}, "FlowMatchEulerDiscreteScheduler"), 4, eta=0.5)


@pytest.mark.parametrize(("strength", "kept"), [(1.0, 10), (0.55, 5), (0.3, 3), (0.001, 1)])
def test_strength_keeps_the_last_steps(strength, kept):
    assert kept_steps(10, strength) == kept
    assert list(SpacedDDPM(ddpm("epsilon"), 10, strength=strength).timesteps) == spaced_timesteps(10)[:kept][::-1]


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5])
def test_impossible_strength_is_refused(strength):
    with pytest.raises(UserError, match="strength"):
        kept_steps(10, strength)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_schedulers_of_other_families_are_refused(name):
    with pytest.raises(UserError, match=f"{name} is not of the DDPM family"):
        build_sampler(name, ddpm(), 4)


@pytest.mark.parametrize(
    ("name", "steps", "said"),
    [
        ("PNDMScheduler", 1, r"cannot run with num_inference_steps 1 and strength 1 \(operands could not be broadcast"),
        ("RePaintScheduler", 4, "cannot run with"),
        ("CogVideoXDPMScheduler", 4, "cannot run with"),
        ("VQDiffusionScheduler", 4, "cannot be made from this model's process"),
    ],
)
def test_a_scheduler_that_cannot_run_here_says_so_before_any_picture(name, steps, said):
    with pytest.raises(UserError, match=rf"^sampler: {name} {said}.* one of ddpm, ddim"):
        build_sampler(name, ddpm(), steps)


def call_of(steps: int) -> SamplerCall:
    return SamplerCall(ddpm(), steps, strength=1.0, eta=0.0, seeds=[0, 1], device=torch.device("cpu"))


def test_a_rehearsal_leaves_no_trace_in_the_scheduler():
    sampler = build_sampler("PNDMScheduler", ddpm(), 5, seeds=[0, 1])
    start, pred = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    plain = DiffusersSampler(type(sampler._scheduler).from_config(sampler._scheduler.config), call_of(5))
    walked = [sample(each, lambda x, t: pred, start, lambda index: start) for each in (sampler, plain)]
    assert torch.equal(*walked)


def test_a_scheduler_whose_package_is_missing_says_so(monkeypatch):
    import diffusers

    class Absent:
        @classmethod
        def from_config(cls, *args, **kwargs):
            raise ImportError("\nAbsentScheduler requires the torchsde library but it was not found: pip install torchsde\n")

    monkeypatch.setattr(diffusers, "AbsentScheduler", Absent, raising=False)
    with pytest.raises(MissingDependency, match=r"sampler: AbsentScheduler needs .* pip install torchsde$"):
        build_sampler("AbsentScheduler", ddpm(), 4)


@pytest.mark.parametrize("name", ["dpmm", "DPMUnknownScheduler", "DiffusionPipeline"])
def test_unknown_sampler_is_refused(name):
    with pytest.raises(UserError, match="ddpm, ddim"):
        build_sampler(name, ddpm(), 4)


@pytest.mark.parametrize("name", [None, *SAMPLERS, "HeunDiscreteScheduler"])
def test_one_step_starts_at_the_last_timestep(name):
    config = {"num_train_timesteps": 100, "beta_start": 0.00085, "beta_end": 0.002, "prediction_type": "v_prediction"}
    sampler = build_sampler(name, Process.of(config, "DDPMScheduler"), 1, seeds=[0])
    assert [round(float(t)) for t in sampler.timesteps[:1]] == [99]
