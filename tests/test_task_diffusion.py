"""Task diffusion: whose defaults the result has, and models of few steps or of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import base_model, save_upscaler, tiny
from toys import wave_photos

from sslsr_diffusion.config import RecipeError
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.sampling import build_sampler, spaced_timesteps
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.runs.start import build_job, train
from sslsr_diffusion.tasks.pixels import seen as as_seen
from sslsr_diffusion.training.job import Job
from sslsr_diffusion.types import Batch


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


def first_batch(job: Job) -> Batch:
    loader = job.open_data(0, 1, None, torch.device("cpu"))
    try:
        return next(iter(loader))
    finally:
        loader.close()


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_upscaler(tmp_path_factory.mktemp("bases") / "base", detail=0.8, antiring=0.3)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (0.8, 0.0, 0.3)),
        ({"detail": 0.6, "back_projection": 0.4}, (0.6, 0.4, 0.3)),
        ({"detail": 1.0, "antiring": 0.0}, (1.0, 0.0, 0.0)),
    ],
)
def test_an_upscaler_keeps_the_defaults_of_its_base_and_writes_them_down(
    photos: Path, base: Path, tmp_path: Path, asked: dict, expected: tuple
) -> None:
    job = build_job(tiny(photos, tmp_path / "run", model=base_model(base), task={"kind": "diffusion", "inference": asked}))
    written = job.recipe["task"]["inference"]
    assert (written["detail"], written["back_projection"], written["antiring"]) == expected
    (tmp_path / "saved").mkdir()
    job.task.save(tmp_path / "saved")
    index = index_of(tmp_path / "saved")
    kept = ("default_detail", "default_back_projection", "default_antiring", "default_num_inference_steps")
    assert tuple(index[name] for name in kept) == (*expected, 20)


def test_defaults_that_are_no_shares_are_refused(base: Path, tmp_path: Path) -> None:
    index, folder = index_of(base), tmp_path / "wrong"
    folder.symlink_to(base)
    for wrong, message in (
        ({**index, "default_antiring": 1.5}, r"default_antiring in model_index\.json of .*: expected a number from 0 to 1, got 1\.5"),
        *(({**index, "default_detail": odd}, f"from 0 to 1, got {odd!r}") for odd in (float("nan"), "0.5", True, None, 10**400)),
        ([], "cannot be read"),
    ):
        (folder / "model_index.json").write_text(json.dumps(wrong), encoding="utf-8")
        try:
            with pytest.raises(UserError, match=message):
                build_networks(StableSRSettings(base=str(folder)), meta=True)
        finally:
            (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def test_few_step_training_sees_the_timesteps_of_that_sampler_only(photos: Path, tmp_path: Path) -> None:
    training = {"steps": 2, "batch_size": 16, "crop_size": 32}
    job = build_job(tiny(photos, tmp_path, task={"kind": "diffusion", "sampler_steps": 3}, training=training))
    drawn = job.task.draw(first_batch(job), job.losses).given.t.tolist()
    assert set(drawn) == set(spaced_timesteps(3)) - {0} == {500, 999}
    with pytest.raises(RecipeError, match=r"task\.sampler_steps: unknown key \(value 3\); allowed .* It belongs to kind diffusion\.$"):
        tiny(photos, tmp_path, task={"kind": "base", "sampler_steps": 3})
    with pytest.raises(RecipeError, match=r"training\.sampler_steps: unknown key \(value 3\); did you mean task\.sampler_steps\?$"):
        tiny(photos, tmp_path, training={**training, "sampler_steps": 3})


ONE_STEP = {"kind": "diffusion", "sampler_steps": 1, "start_timestep": 99, "inference": {"steps": 1, "detail": 0.8, "antiring": 0.3}}


@pytest.fixture(scope="module")
def one_step(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that trains a one-step model."""
    validation = {"every": 0, "limit": 1, "size": 32, "metrics": ["psnr"]}
    result = train(tiny(photos, tmp_path_factory.mktemp("runs") / "one", task=ONE_STEP, validation=validation))
    assert result.pipeline is not None
    return result.pipeline


def test_a_one_step_model_trains_and_samples_from_the_same_start(photos: Path, tmp_path: Path) -> None:
    job = build_job(tiny(photos, tmp_path, task=ONE_STEP))
    seen: dict[str, torch.Tensor] = {}

    def record(module: torch.nn.Module, given: tuple) -> None:
        seen.update(zt=given[0], t=given[1], z_lr=given[2].z_lr)

    batch = first_batch(job)
    draws = job.task.draw(batch, job.losses)
    hook = job.task.module.register_forward_pre_hook(record)
    job.task.run(job.task.module, batch, draws)
    hook.remove()
    sampler = build_sampler(None, job.task.networks.process, 1, device=torch.device("cpu"))
    assert seen["t"].tolist() == [99, 99] == [*sampler.timesteps] * 2
    codec, noise = job.task.networks.codec, draws.noise
    drawn = [codec.encode(as_seen(batch), noise[f"posterior_{side}"]) for side in ("lr", "hr")]
    assert torch.equal(seen["z_lr"], drawn[0])
    assert not torch.equal(*drawn)
    torch.testing.assert_close(seen["zt"], sampler.start(noise["noise"], seen["z_lr"]), rtol=0, atol=1e-4)


def test_a_one_step_model_keeps_its_start_and_its_call(one_step: Path) -> None:
    again = build_networks(StableSRSettings(base=str(one_step)))
    assert again.process.last == 99
    assert again.process.starts_from_lr
    index = index_of(one_step)
    assert (index["default_num_inference_steps"], index["default_detail"], index["default_antiring"]) == (1, 0.8, 0.3)
    assert again.call_defaults == {"detail": 0.8, "back_projection": 0.0, "antiring": 0.3}
    before = again.process.alphas_cumprod
    again.start_at(99)
    assert again.process.alphas_cumprod == before
    with pytest.raises(UserError, match=r"expected a timestep of at most 99, .* got 199"):
        again.start_at(199)


def test_what_goes_on_from_a_one_step_model_must_say_so(photos: Path, one_step: Path, tmp_path: Path) -> None:
    model = base_model(one_step)
    with pytest.raises(UserError, match=r"set task\.sampler_steps: 1, task\.start_timestep: 99 and task\.inference\.steps: 1\.$"):
        build_job(tiny(photos, tmp_path, model=model))
    late = {**ONE_STEP, "start_timestep": 199}
    with pytest.raises(UserError, match=r"^task\.start_timestep: .*pipeline: expected a timestep of at most 99, .* got 199\.$"):
        build_job(tiny(photos, tmp_path, model=model, task=late))
    assert build_job(tiny(photos, tmp_path, model=model, task=ONE_STEP)).task.networks.process.last == 99
    for key, task in (
        ("synthesis_steps", {"kind": "decoder", "inference": {"steps": 1}}),
        (r"inference\.steps", {"kind": "decoder", "synthesis_steps": 1}),
    ):
        with pytest.raises(UserError, match=rf"^task\.{key}: .* is a one-step model; expected 1, got 20\.$"):
            build_job(tiny(photos, tmp_path, model=model, task=task, losses=[{"kind": "pixel_l1"}]))


@pytest.mark.parametrize("steps", [4, None])
def test_a_start_of_its_own_is_for_one_step_models(photos: Path, tmp_path: Path, steps: int | None) -> None:
    task = {"kind": "diffusion", "start_timestep": 99, "sampler_steps": steps}
    with pytest.raises(RecipeError, match=r"^task\.start_timestep: is for one-step models"):
        tiny(photos, tmp_path, task=task)
    with pytest.raises(RecipeError, match=r"^task\.inference\.steps: expected 1 for a one-step model .* got 4\.$"):
        tiny(photos, tmp_path, task={**task, "sampler_steps": 1, "inference": {"steps": 4}})
