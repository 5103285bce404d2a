"""Runs of the x4 upscaler: what is drawn, what a resume repeats, results that diffusers loads, what a recipe may not ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline
from safetensors.torch import load_file
from test_x4 import PLAIN, low, seeded, stock
from tiny_runs import SMALL_SSL, tiny
from toys import assert_same_checkpoint, wave_photos
from x4_models import write_x4

from sslsr_diffusion import open_upscaler, train
from sslsr_diffusion.config import RecipeError
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.losses import build_losses
from sslsr_diffusion.runs.decoder_samples import make_cfw_data
from sslsr_diffusion.runs.memory import step_bytes
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.start import build_job
from sslsr_diffusion.runs.task import build_task
from sslsr_diffusion.tasks.diffusion import DiffusionTask
from sslsr_diffusion.types import Batch

LORA = {"rank": 3, "alpha": 6, "targets": ["to_q", "to_v", "conv1"]}
TRAINING = {"steps": 4, "batch_size": 2, "crop_size": 32, "log_every": 1, "optimizer": {"lr": 1e-2}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_x4(tmp_path_factory.mktemp("x4"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


def recipe(photos: Path, run: Path, base: Path | None = None, **sections: Any) -> Recipe:
    model = {"kind": "x4", "init": "random", "preset": "tiny"} if base is None else {"kind": "x4", "base": str(base)}
    given = {"training": TRAINING, "task": {"kind": "diffusion", "inference": {"steps": 2}}, **sections}
    return tiny(photos, run, **{**given, "model": {**model, **sections.get("model", {})}})


def lora(photos: Path, run: Path, base: Path, **sections: Any) -> Recipe:
    task = {"kind": "diffusion", "train": "lora", "inference": {"steps": 2}}
    training = {**TRAINING, "ema": {"decay": 0.5}, "gradient_checkpointing": True}
    return recipe(photos, run, base, **{"model": {"lora": LORA}, "task": task, "training": training, **sections})


def task_of(recipe: Recipe) -> DiffusionTask:
    task = build_task(recipe)
    assert isinstance(task, DiffusionTask)
    return task


def batches(recipe: Recipe, count: int = 1) -> list[Batch]:
    loader = build_job(recipe).open_data(0, 1, None, torch.device("cpu"))
    found = [batch for _, batch in zip(range(count), loader)]
    loader.close()
    return found


def test_a_step_is_the_published_objective(photos, base, tmp_path):
    """The velocity by diffusers' own schedulers: the latents noised by the main one, the pixels by the other, the level told."""
    made = recipe(photos, tmp_path / "run", base)
    task, batch = task_of(made), batches(made)[0]
    losses = build_losses(made.losses)
    draws, nets = task.draw(batch, losses), task.networks
    assert draws.noise["posterior_lr"].shape == batch.lr.shape == (2, 3, 8, 8)
    seen: list[Any] = []
    hook = nets.denoiser.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        outputs = task.run(task.module, batch, draws)
        z0 = nets.codec.encode(batch.hr, draws.noise["posterior_hr"])
    hook.remove()
    main, lower = (cls.from_pretrained(base / part) for cls, part in ((DDIMScheduler, "scheduler"), (DDPMScheduler, "low_res_scheduler")))
    noise, t, level = draws.noise["noise"], draws.given.t, draws.noise["level"]
    pixels = lower.add_noise(batch.lr * 2 - 1, draws.noise["posterior_lr"], level)
    (entered, told, text), options = seen[0]
    torch.testing.assert_close(entered, torch.cat([main.add_noise(z0, noise, t), pixels], dim=1), rtol=0, atol=2e-5)
    torch.testing.assert_close(outputs.target, main.get_velocity(z0, noise, t), rtol=0, atol=2e-5)
    assert torch.equal(options["class_labels"], level)
    assert torch.equal(told, t)
    assert text.shape == (2, 16, 32)


def test_the_level_is_a_sample_s_own(photos, base, tmp_path):
    """Not one for the batch, and the same whatever batch the sample is in."""
    made = recipe(photos, tmp_path / "run", base)
    task, losses, batch = task_of(made), build_losses(made.losses), batches(made)[0]

    def levels(indices: list[int]) -> list[int]:
        picked = [k % 2 for k in range(len(indices))]
        parts = {name: getattr(batch, name)[picked] for name in ("hr", "lr", "mask")}
        return task.draw(replace(batch, index=torch.tensor(indices), **parts), losses).noise["level"].tolist()

    many = levels(list(range(400)))
    assert len(set(many)) > 150
    assert min(many) < 10
    assert 340 <= max(many) <= 349
    assert levels([7, 3]) == [many[7], many[3]]


def test_the_prompt_is_dropped_per_sample(photos, base, tmp_path):
    task = {"kind": "diffusion", "prompt_dropout": 0.5, "inference": {"steps": 2}}
    made = recipe(photos, tmp_path / "run", base, model={"prompt": "a cat"}, task=task)
    run, losses, batch = task_of(made), build_losses(made.losses), batches(made)[0]
    texts, prompted = [], []
    hook = run.networks.denoiser.unet.register_forward_pre_hook(lambda _, args: texts.extend(args[2]))
    for first in range(0, 8, 2):
        drawn = replace(batch, index=torch.tensor([first, first + 1]))
        draws = run.draw(drawn, losses)
        prompted += draws.noise["prompted"].tolist()
        with torch.no_grad():
            run.run(run.module, drawn, draws)
    hook.remove()
    nets = run.networks
    cat, blank = nets.text_sequence[0], nets.blank.sequence[0]
    assert not torch.allclose(cat, blank)
    assert set(prompted) == {True, False}
    assert all(torch.equal(text, cat if kept else blank) for text, kept in zip(texts, prompted, strict=True))


def test_a_lora_run_resumes_to_the_same_bits_and_its_result_is_diffusers_own(photos, base, tmp_path):
    """Levels, noises, matrices and their average; checkpoints hold the LoRA alone."""
    losses = [{"kind": "diffusion"}, {**SMALL_SSL, "max_timestep": 600}]
    task = {"kind": "diffusion", "train": "lora", "decode_crop": 4, "inference": {"steps": 2}}
    kept = {"checkpoints": {"every": 2, "keep": 4}, "losses": losses, "task": task}
    whole = train(lora(photos, tmp_path / "whole", base, **kept))
    stopped = lora(photos, tmp_path / "parts", base, **kept)
    short = stopped.model_copy(update={"training": stopped.training.model_copy(update={"steps": 2})})
    train(short)
    train(stopped, resume="latest")
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-4", tmp_path / "parts" / "checkpoint-4")
    trained = load_file(tmp_path / "whole" / "checkpoint-4" / "trained.safetensors")
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)

    result = whole.pipeline
    assert result is not None
    merged = StableDiffusionUpscalePipeline.from_pretrained(result)
    added = StableDiffusionUpscalePipeline.from_pretrained(base)
    added.load_lora_weights(result / "lora")
    assert not list(result.glob("*lora*.safetensors")), "it would be added to weights that have it"
    ours = open_upscaler(result, device="cpu")
    assert ours.defaults["num_inference_steps"] == 2
    want = stock(merged, low(16, 16))
    torch.testing.assert_close(stock(added, low(16, 16)), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours(low(16, 16), generator=seeded(), **PLAIN).images, want, rtol=0, atol=1e-4)
    assert (stock(StableDiffusionUpscalePipeline.from_pretrained(base), low(16, 16)) - want).abs().max() > 1e-2


def test_shapes_alone_tell_what_a_lora_saves(photos, base, tmp_path):
    made = lora(photos, tmp_path / "run", base)
    networks = task_of(made).networks
    for refused in (networks.merge, lambda: networks.for_comfyui(tmp_path, 4)):
        with pytest.raises(UserError, match="the result has it in its weights already; leave it out"):
            refused()
    found, parts = step_bytes(made), networks.parameters_per_part()
    total, trained = parts["unet"]
    assert 0 < trained < 0.1 * total
    assert (found["optimizer"], found["average"]) == (8 * trained, 4 * trained)
    assert found["weights"] == 4 * (total + parts["vae"][0])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"scale": 2}, "scale: these networks enlarge 4 times, got 2; set scale: 4"),
        ({"scale": 1}, "scale: these networks enlarge 4 times, got 1; set scale: 4"),
        ({"model": {"lora": LORA}}, "model.lora: expected LoRA settings with task.train: lora and with nothing else, got some with all"),
        ({"task": {"train": "lora"}}, "model.lora: expected LoRA settings with task.train: lora and with nothing else, got none with lora"),
        ({"task": {"prompt_dropout": 0.1}}, "task.prompt_dropout: expected 0 for a model that has no model.prompt to drop, got 0.1"),
        ({"task": {"sampler_steps": 1, "start_timestep": 200, "inference": {"steps": 1}}}, "task.start_timestep: expected none for"),
        ({"model": {"prompt": "a cat"}}, "model.prompt: a model with init: random has no text encoder"),
        ({"training": {**TRAINING, "crop_size": 40}}, "training.crop_size: this model needs a multiple of 16 pixels, got 40"),
        (
            {"model": {"lora": {**LORA, "targets": ["to_z"]}}, "task": {"train": "lora"}},
            "model.lora.targets: .* got 'to_z', which none has",
        ),
    ],
)
def test_what_a_recipe_may_not_ask_for(photos, tmp_path, sections, said):
    given = {**sections, "task": {"kind": "diffusion", "inference": {"steps": 2}, **sections.get("task", {})}}
    with pytest.raises(UserError, match=said):
        build_task(recipe(photos, tmp_path / "run", **given))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"task": {"kind": "base"}}, "task.kind: base is impossible with model.kind x4; possible are diffusion"),
        ({"task": {"kind": "diffusion", "train": "sft"}}, "task.train: 'sft' is not a part of x4; expected one of all, attention, lora"),
        ({"model": {"preset": "sd21"}}, "'sd21' is not a preset; expected one of tiny, x4"),
        ({"model": {"lora": {"targets": "everything"}}}, "'everything' is unknown; expected attention, unet"),
    ],
)
def test_what_no_recipe_says(photos, tmp_path, sections, said):
    with pytest.raises(RecipeError, match=said):
        recipe(photos, tmp_path / "run", **sections)


def test_it_makes_no_samples_for_task_decoder(photos, base, tmp_path):
    with pytest.raises(UserError, match=r"model\.kind: expected a family that task decoder trains, such as stablesr, got x4"):
        next(make_cfw_data(recipe(photos, tmp_path / "run"), base, tmp_path / "out", count=1))


def test_dropout_of_a_prompt_is_not_for_others(photos, tmp_path):
    with pytest.raises(UserError, match=r"task\.prompt_dropout: expected 0 for a model that trains with one text alone, got 0\.1"):
        build_task(tiny(photos, tmp_path / "run", task={"kind": "diffusion", "prompt_dropout": 0.1}))
