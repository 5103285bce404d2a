"""cfw_data.py, `sslsr prepare cfw` and the source of kind cfw: exact, resumable, and what training on the fly would compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from data_samples import picture
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import base_model, drawn, save_upscaler
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.data import open_training_data
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import read_image, to_tensor
from sslsr_diffusion.models.condition import Condition
from sslsr_diffusion.runs.recipe import Recipe, load_recipe
from sslsr_diffusion.runs.start import build_job
from sslsr_diffusion.runs.stored_samples import Wanted
from sslsr_diffusion.runs.task import export_checkpoint
from sslsr_diffusion.tasks import decoder
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.loop import train_job

SIZE = 64


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Photographs, an upscaler and a recipe."""
    base = tmp_path_factory.mktemp("world")
    (base / "photos").mkdir()
    for i in range(3):
        Image.fromarray(picture((SIZE + 9 * i, SIZE + 20 - 4 * i), i)).save(base / "photos" / f"p{i}.png")
    save_upscaler(base / "model", drawn(seed=1, train="all"))
    (base / "recipe.yaml").write_text(json.dumps(values(base)))
    return base


def values(world: Path, **more) -> dict:
    return {
        "task": {"kind": "decoder", "part": "fusion", "synthesis_steps": 2},
        "seed": 5,
        "model": base_model(world / "model"),
        "data": {
            "sources": [{"kind": "folder", "path": str(world / "photos")}],
            "degradation": {"preset": "mild", "no_degradation_prob": 0},  # rounds to 8 bits, so that a PNG file is exact
            "workers": 0,
        },
        "losses": [{"kind": "pixel_l1", "weight": 1.0}],
        "training": {"steps": 2, "crop_size": SIZE, "log_every": 1},
        "validation": {"limit": 0},
        "checkpoints": {"every": 1},
        **more,
    }


def prepare(world: Path, output: Path, *more: object, count: int = 3, steps: int = 2) -> str:
    arguments = ["--config", world / "recipe.yaml", "--model", world / "model", "--output", output, "--count", count, "--steps", steps]
    result = CliRunner().invoke(app, ["prepare", "cfw", *map(str, [*arguments, "--device", "cpu", *more])], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def made(world) -> Path:
    assert "3 samples in" in prepare(world, world / "made")
    return world / "made"


def latents(folder: Path, index: int) -> torch.Tensor:
    return load_file(folder / "latents" / f"{index:06d}.safetensors")["latents"]


def test_samples_are_those_of_training_on_the_fly(world, made):
    """Index for index the crops, degradations and latents that the task would make itself."""
    job = build_job(parse(Recipe, values(world)))
    loader = job.open_data(0, 1, None, torch.device("cpu"))
    for index, batch in zip(range(3), loader):
        draws = job.task.draw(batch, job.losses)
        upscaled = torch.nn.functional.interpolate(batch.lr, scale_factor=4, mode="bicubic").clamp(0, 1)
        with torch.no_grad():
            z_lr, _ = job.task.networks.codec.encode_with_features(upscaled, draws.noise["posterior_lr"])
        want = job.task.synthesize(Condition(z_lr, job.task.networks.text), [index])[0]
        assert torch.allclose(latents(made, index), want, atol=1e-5)
        for side in ("hr", "lr"):
            stored = to_tensor(read_image(made / side / f"{index:06d}.png").rgb)
            assert torch.equal(stored, getattr(batch, side)[0])
    loader.close()


def test_a_second_run_makes_what_is_missing_and_nothing_else(world, made):
    first, other = latents(made, 1), made / "latents" / "000000.safetensors"
    (made / "latents" / "000001.safetensors").unlink()
    before = other.stat().st_mtime_ns
    assert "4 samples in" in prepare(world, made, "--batch-size", 2, count=4)
    assert other.stat().st_mtime_ns == before
    assert torch.allclose(latents(made, 1), first, atol=1e-5)  # alone in its batch or not
    assert latents(made, 3).shape == first.shape
    prepare(world, made, count=4)


def test_other_settings_need_another_folder(world, made):
    with pytest.raises(UserError, match="made with steps 2, now it is 3; give another --output"):
        prepare(world, made, steps=3)
    with pytest.raises(UserError, match="made with seed 5, now it is 6"):
        prepare(world, made, "--set", "seed=6")
    aware = parse(Recipe, values(world, data={**values(world)["data"], "crop": {"kind": "edge_aware"}, "mask": {"threshold": 20}}))
    other = aware.model_copy(update={"data": aware.data.model_copy(update={"mask": aware.data.mask.model_copy(update={"threshold": 40})})})
    first, second = (Wanted(recipe.data, 64, 4, 5, count=2).settings for recipe in (aware, other))
    assert first != second  # the mask chooses the crops
    (world / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        prepare(world, world / "file")
    with pytest.raises(UserError, match="expected pictures to make samples from"):
        prepare(world, world / "new", "--set", f"data.sources=[{{kind: cfw, path: {made}}}]")


def stored_recipe(world: Path, made: Path, **more) -> dict:
    recipe = values(world, **more)
    return {**recipe, "data": {**recipe["data"], "sources": [{"kind": "cfw", "path": str(made)}]}}


def test_training_reads_the_latents_instead_of_sampling(world, made, tmp_path, monkeypatch):
    AcceleratorState._reset_state()

    def never(*args, **kwargs):
        raise AssertionError("the upscaler ran")

    monkeypatch.setattr(decoder, "sample_latents", never)
    losses = [{"kind": "pixel_l1"}, {"kind": "gan", "discriminator": "patch", "start_step": 2, "width": 4}]
    recipe = stored_recipe(world, made, output={"dir": str(tmp_path / "run"), "trackers": []}, losses=losses)
    job = build_job(parse(Recipe, recipe))
    batch = next(iter(job.open_data(0, 1, None, torch.device("cpu"))))
    index = int(Path(batch.names[0]).stem)
    assert torch.equal(batch.latents[0], latents(made, index))
    result = train_job(job)
    assert result.step == 2
    assert result.pipeline is not None
    assert (result.pipeline / "vae" / "config.json").is_file()
    assert read_checkpoint(tmp_path / "run" / "checkpoint-2").state["learners"]["gan"]["step"] == 3
    assert export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "exported")[0] == 2


def test_samples_that_cannot_be_used_are_named(world, made, tmp_path):
    data = parse(Recipe, stored_recipe(world, made)).data
    with pytest.raises(UserError, match="latents belong to whole pictures of 64x64 pixels, the crop is 32"):
        next(iter(open_training_data(data, crop_size=32, scale=4, seed=0, batch_size=1)))
    for side in ("hr", "lr", "latents"):
        (tmp_path / side).mkdir()
        for path in (made / side).iterdir():
            (tmp_path / side / path.name).write_bytes(path.read_bytes())
    (tmp_path / "latents" / "000000.safetensors").write_bytes(b"cut off")
    (tmp_path / "lr" / "000001.png").unlink()
    data = parse(Recipe, stored_recipe(world, tmp_path)).data
    loader = open_training_data(data, crop_size=SIZE, scale=4, seed=0, batch_size=4)
    assert next(iter(loader)).latents.shape[0] == 4
    problems = "\n".join(loader.problems())
    assert "000000.safetensors: cannot be read as latents" in problems
    assert "000001.safetensors: left out, not a whole sample" in problems
    with pytest.raises(UserError, match=r"found no latents/; make them: sslsr prepare cfw"):
        open_training_data(parse(Recipe, stored_recipe(world, world)).data, crop_size=SIZE, scale=4, seed=0, batch_size=1)


def test_a_check_finds_what_training_would_refuse(world, made, tmp_path):
    def check(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["prepare", "check", *map(str, arguments)], catch_exceptions=False)
        return result.exit_code, result.output

    assert check(made)[0] == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(stored_recipe(world, made)))
    assert check("--config", recipe)[0] == 0
    code, said = check("--config", recipe, "--set", "training.crop_size=32")
    assert code == 1
    assert "latents belong to whole pictures of 64x64 pixels, the crop is 32" in said
    shutil.copytree(made, tmp_path / "damaged")
    (tmp_path / "damaged/latents/000000.safetensors").write_bytes(b"cut off")
    code, said = check(tmp_path / "damaged")
    assert code == 1
    assert "000000.safetensors: cannot be read as latents" in said


def test_a_stored_target_is_not_sharpened_again(world, tmp_path):
    prepare(world, tmp_path / "made", "--set", "data.degradation.sharpen_target=true", count=1)
    recipe = stored_recipe(world, tmp_path / "made")
    recipe["data"]["degradation"]["sharpen_target"] = True
    got = next(iter(open_training_data(parse(Recipe, recipe).data, crop_size=SIZE, scale=4, seed=5, batch_size=1)))
    stored = to_tensor(read_image(tmp_path / "made/hr/000000.png").rgb)
    assert torch.equal(got.hr[0], stored)
    plain = open_training_data(parse(Recipe, values(world)).data, crop_size=SIZE, scale=4, seed=5, batch_size=1)
    assert (next(iter(plain)).hr[0] - stored).abs().max() > 2 / 255  # it was sharpened once


def test_latents_of_another_autoencoder_are_refused(world, made):
    job = build_job(parse(Recipe, stored_recipe(world, made)))
    batch = next(iter(job.open_data(0, 1, None, torch.device("cpu"))))
    small = type(batch)(**{**vars(batch), "latents": batch.latents[:, :, :4]})
    with pytest.raises(UserError, match="make them again with `sslsr prepare cfw`"):
        job.task.run(job.task.module, small, job.task.draw(batch, job.losses))


def test_the_kind_belongs_to_its_task(world, made):
    message = r"data\.sources\.0\.kind: cfw has stored latents, which task autoencoder does not read; use pairs"
    with pytest.raises(RecipeError, match=message):
        parse(Recipe, {**stored_recipe(world, made), "task": {"kind": "autoencoder"}})
    parse(Recipe, {**stored_recipe(world, made), "task": {"kind": "decoder"}})
    mixed = stored_recipe(world, made)
    mixed["data"]["sources"].append({"kind": "folder", "path": str(world / "photos")})
    with pytest.raises(RecipeError, match="cannot be mixed"):
        parse(Recipe, mixed)
    assert load_recipe("cfw_ssl").task_kind.reads_latents
