"""Stage base, and an upscaler that starts from what it leaves: the chain of the small recipes, at toy width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sslsr_diffusion.inference.live import save_pipeline
from toys import wave_photos

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.sampling import build_sampler, spaced_timesteps
from sslsr_diffusion.models import AutoencoderKLCFW
from sslsr_diffusion.models.process import make_scheduler
from sslsr_diffusion.models.stablesr.build import build_autoencoder, build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.runs.memory import describe_memory, describe_parameters
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.start import build, export_checkpoint
from sslsr_diffusion.training.loop import train_job


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


def recipe(photos: Path, run: Path, **changes: Any) -> dict[str, Any]:
    plain = {
        "stage": "base",
        "model": {"init": "random", "preset": "tiny"},
        "data": {
            "sources": [{"kind": "folder", "path": str(photos)}],
            "validation": [{"kind": "folder", "path": str(photos)}],
            "degradation": {"preset": "bicubic"},
            "workers": 0,
        },
        "losses": [{"kind": "diffusion"}],
        "training": {"steps": 2, "batch_size": 2, "crop_size": 32, "optimizer": {"lr": 1e-3}},
        "validation": {"every": 0, "limit": 1, "size": 44, "steps": 4, "metrics": ["psnr"]},
        "output": {"dir": str(run), "trackers": []},
    }
    return {**plain, **changes}


@pytest.fixture(scope="module")
def base(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("base")
    result = train_job(build(parse(Recipe, recipe(photos, run))))
    assert result.step == 2
    return run


def test_a_base_is_a_plain_unet_that_learned(base: Path) -> None:
    weights = load_file(base / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert not any("spade" in name for name in weights)
    start = build_networks(StableSRSettings(init="random", preset="tiny"), plain=True, seed=42).denoiser.unet.state_dict()
    assert set(start) == set(weights)
    assert all(not torch.equal(start[name], weights[name]) for name in weights if name.endswith("conv1.weight"))


def test_the_upscaler_takes_the_base_and_leaves_it_frozen(photos: Path, base: Path, tmp_path: Path) -> None:
    model = {"base": str(base / "pipeline"), "preset": "tiny", "train": "sft"}
    result = train_job(build(parse(Recipe, recipe(photos, tmp_path, stage="diffusion", model=model))))
    assert result.pipeline is not None
    before = load_file(base / "pipeline/unet/diffusion_pytorch_model.safetensors")
    after = load_file(result.pipeline / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    new = sorted(name for name in after if name not in before)
    assert new
    assert all(".spade." in name for name in new)


def test_an_upscaler_keeps_the_defaults_of_its_base_and_writes_them_down(photos: Path, tmp_path: Path) -> None:
    networks = build_networks(StableSRSettings(init="random", preset="tiny"))
    assert networks.call_defaults == {"detail": 1.0, "antiring": 0.0}
    folder = tmp_path / "base"
    save_pipeline(networks, folder, default_detail=0.8, default_antiring=0.3)
    model = {"base": str(folder), "preset": "tiny"}
    for asked, expected in (({}, (0.8, 0.3)), ({"detail": 0.6}, (0.6, 0.3)), ({"detail": 1.0, "antiring": 0.0}, (1.0, 0.0))):
        validation = {"every": 0, "limit": 0, **asked}
        job = build(parse(Recipe, recipe(photos, tmp_path / "run", stage="diffusion", model=model, validation=validation)))
        assert (job.recipe["validation"]["detail"], job.recipe["validation"]["antiring"]) == expected
        job.save_pipeline(tmp_path / "saved")
        index = json.loads((tmp_path / "saved" / "model_index.json").read_text(encoding="utf-8"))
        assert (index["default_detail"], index["default_antiring"]) == expected
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for wrong, message in (
        ({**index, "default_antiring": 1.5}, r"default_antiring in model_index\.json of .*: expected a number from 0 to 1, got 1\.5"),
        *(({**index, "default_detail": odd}, f"from 0 to 1, got {odd!r}") for odd in (float("nan"), "0.5", True, None, 10**400)),
        ([], "cannot be read"),
    ):
        (folder / "model_index.json").write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            build_networks(StableSRSettings(**model))


def test_new_layers_are_as_wide_as_the_preset_of_the_same_unet_says(base: Path) -> None:
    networks = build_networks(StableSRSettings(base=str(base / "pipeline"), preset="tiny"))
    drawn = build_networks(StableSRSettings(init="random", preset="tiny"))
    for part in ("unet", "structural_encoder"):
        shapes = [{k: v.shape for k, v in getattr(n.denoiser, part).state_dict().items()} for n in (networks, drawn)]
        assert shapes[0] == shapes[1]


def test_a_base_must_be_plain_and_is_not_published(photos: Path, base: Path, tmp_path: Path) -> None:
    upscaler = build_networks(StableSRSettings(init="random", preset="tiny"))
    upscaler.save_parts(tmp_path / "upscaler")
    with pytest.raises(UserError, match="is an upscaler; use stage diffusion"):
        build_networks(StableSRSettings(base=str(tmp_path / "upscaler")), plain=True)
    with pytest.raises(RecipeError, match="stage base makes no upscaler"):
        parse(Recipe, recipe(photos, tmp_path, output={"dir": str(tmp_path), "push_to_hub": True, "hub_id": "a/b"}))
    with pytest.raises(RecipeError, match=r"validation\.antiring: is a default of upscalers, and stage base makes none"):
        parse(Recipe, recipe(photos, tmp_path, validation={"antiring": 0.5}))
    parse(Recipe, recipe(photos, tmp_path, validation={"detail": 1.0, "antiring": 0.0}))  # as an older run's recipe.yaml has it


def test_few_step_training_sees_the_timesteps_of_that_sampler_only(photos: Path, tmp_path: Path) -> None:
    training = {"steps": 2, "batch_size": 16, "crop_size": 32, "sampler_steps": 3}
    job = build(parse(Recipe, recipe(photos, tmp_path, stage="diffusion", training=training)))
    loader = job.open_data(0, 1, None, torch.device("cpu"))
    try:
        drawn = job.objective.draw(next(iter(loader)), job.losses).given.t.tolist()
    finally:
        loader.close()
    assert set(drawn) == set(spaced_timesteps(3)) - {0} == {500, 999}
    with pytest.raises(RecipeError, match=r"training\.sampler_steps: is for stage diffusion only"):
        parse(Recipe, recipe(photos, tmp_path, training=training))


def test_a_one_step_model_trains_and_samples_from_the_same_start(photos: Path, tmp_path: Path) -> None:
    training = {"steps": 2, "batch_size": 2, "crop_size": 32, "sampler_steps": 1, "start_timestep": 99}
    validation = {"every": 0, "limit": 1, "size": 32, "steps": 1, "detail": 0.8, "antiring": 0.3}
    job = build(parse(Recipe, recipe(photos, tmp_path, stage="diffusion", training=training, validation=validation)))
    seen: dict[str, torch.Tensor] = {}

    def record(module: torch.nn.Module, given: tuple) -> None:
        seen.update(zt=given[0], t=given[1], z_lr=given[2])

    loader = job.open_data(0, 1, None, torch.device("cpu"))
    try:
        batch = next(iter(loader))
    finally:
        loader.close()
    draws = job.objective.draw(batch, job.losses)
    hook = job.objective.module.register_forward_pre_hook(record)
    job.objective.run(job.objective.module, batch, draws)
    hook.remove()
    sampler = build_sampler(None, make_scheduler(job.objective.networks.scheduler_config), 1, device=torch.device("cpu"))
    assert seen["t"].tolist() == [99, 99] == [*sampler.timesteps] * 2
    torch.testing.assert_close(seen["zt"], sampler.start(seen["z_lr"], draws.noise["noise"], from_lr=True), rtol=0, atol=1e-4)
    result = train_job(job)
    assert result.pipeline is not None
    again = build_networks(StableSRSettings(base=str(result.pipeline)))
    assert again.schedule.num_train_timesteps == 100
    index = json.loads((result.pipeline / "model_index.json").read_text(encoding="utf-8"))
    assert (index["default_num_inference_steps"], index["default_detail"], index["default_antiring"]) == (1, 0.8, 0.3)
    assert again.call_defaults == {"detail": 0.8, "antiring": 0.3}
    assert torch.equal(again.until(99).schedule.alphas_cumprod, again.schedule.alphas_cumprod)
    with pytest.raises(UserError, match=r"training\.start_timestep: expected at most 99, .* got 199"):
        again.until(199)
    model = {"base": str(result.pipeline), "preset": "tiny"}
    with pytest.raises(UserError, match=r"set training\.sampler_steps: 1, training\.start_timestep: 99 and validation\.steps: 1"):
        build(parse(Recipe, recipe(photos, tmp_path / "again", stage="diffusion", model=model)))
    losses = [{"kind": "pixel_l1"}]
    with pytest.raises(UserError, match=r"training\.synthesis_steps: .* is a one-step model; expected 1, got 20"):
        build(parse(Recipe, recipe(photos, tmp_path / "again", stage="decoder", model=model, losses=losses)))


@pytest.mark.parametrize("changes", [{"sampler_steps": 4}, {"sampler_steps": None}])
def test_a_start_of_its_own_is_for_one_step_models(photos: Path, tmp_path: Path, changes: dict) -> None:
    training = {"steps": 2, "crop_size": 32, "start_timestep": 99, **changes}
    with pytest.raises(RecipeError, match=r"training\.start_timestep: is for one-step models"):
        parse(Recipe, recipe(photos, tmp_path, stage="diffusion", training=training))
    with pytest.raises(RecipeError, match=r"validation\.steps: expected 1 for a one-step model .* got 4"):
        parse(Recipe, recipe(photos, tmp_path, stage="diffusion", training={**training, "sampler_steps": 1}))


@pytest.mark.parametrize("latents", ["sample", "mean"])
def test_an_autoencoder_leaves_a_posterior_or_its_mean(photos: Path, tmp_path: Path, latents: str) -> None:
    model = {"init": "random", "preset": "tiny", "latents": latents}
    losses = [{"kind": "pixel_l1"}, {"kind": "latent_kl", "weight": 1e-3}]
    result = train_job(build(parse(Recipe, recipe(photos, tmp_path, stage="autoencoder", model=model, losses=losses))))
    assert result.pipeline is not None
    codec = build_autoencoder(StableSRSettings(vae=str(result.pipeline)))
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    shape = codec.noise_shape(pixels)
    with torch.no_grad():
        draws = [codec.encode(pixels, torch.randn(shape, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    difference = (draws[0] - draws[1]).std()
    assert difference < 1e-5 if latents == "mean" else difference > 1e-3
    with pytest.raises(RecipeError, match=r"model\.latents: is for stage autoencoder only"):
        parse(Recipe, recipe(photos, tmp_path, model={**model, "latents": "mean"}))


def test_stage_decoder_trains_the_decoder_alone(photos: Path, base: Path, tmp_path: Path) -> None:
    upscaler = build_networks(StableSRSettings(init="random", preset="tiny"))
    upscaler.save_parts(tmp_path / "upscaler")
    model = {"base": str(tmp_path / "upscaler"), "preset": "tiny"}
    training = {"steps": 2, "batch_size": 2, "crop_size": 32, "synthesis_steps": 2, "optimizer": {"lr": 1e-3}, "ema": {"decay": 0.5}}
    losses = [{"kind": "pixel_l1"}, {"kind": "self_similarity", "l1_weight": 10, "kl_weight": 10}]
    given = parse(Recipe, recipe(photos, tmp_path / "run", stage="decoder", model=model, losses=losses, training=training))
    result = train_job(build(given))
    assert result.pipeline is not None
    for part in ("unet", "structural_encoder", "vae"):
        before, after = (
            load_file(folder / part / "diffusion_pytorch_model.safetensors") for folder in (tmp_path / "upscaler", result.pipeline)
        )
        changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert changed == ({"decoder", "post_quant_conv"} if part == "vae" else set())
    vae = next(line for line in describe_parameters(given) if line.split()[0] == "vae")
    trained = sum(p.numel() for part in (upscaler.codec.vae.decoder, upscaler.codec.vae.post_quant_conv) for p in part.parameters())
    assert f"trained {trained / 1e6:8.2f} M" in vae
    assert "GiB" in describe_memory(given)[1]

    export_checkpoint(tmp_path / "run/checkpoint-2", tmp_path / "exported")
    files = [folder / "vae/diffusion_pytorch_model.safetensors" for folder in (result.pipeline, tmp_path / "exported")]
    first, second = (load_file(file) for file in files)
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    plain = recipe(photos, tmp_path / "plain", stage="decoder", model={"base": str(base / "pipeline"), "preset": "tiny"}, losses=losses)
    with pytest.raises(UserError, match="stage decoder needs a finished upscaler"):
        build(parse(Recipe, plain))
    AutoencoderKLCFW.from_autoencoder(upscaler.codec.vae).save_pretrained(tmp_path / "upscaler/vae")
    with pytest.raises(UserError, match="is fused with the encoder"):
        build(given)
