"""`from sslsr_diffusion import train, open_upscaler, load_recipe`: a run and its pictures from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import tiny
from toys import wave_photos

import sslsr_diffusion
from sslsr_diffusion import load_recipe, open_upscaler, train
from sslsr_diffusion.config import RecipeError
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.runs import start
from sslsr_diffusion.runs.recipe import Recipe, resolved
from sslsr_diffusion.training.job import CheckpointWritten, Event, Finished, StepDone, TrainResult, Validated

VALIDATION = {"every": 0, "limit": 1, "size": 32, "metrics": ["psnr"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, list[Event]]:
    events: list[Event] = []
    task = {"kind": "diffusion", "inference": {"steps": 1, "detail": 0.5}}
    recipe = tiny(photos, tmp_path_factory.mktemp("runs") / "mine", task=task, validation=VALIDATION)
    return train(recipe, on_event=events.append), events


def test_train_says_what_it_did(run: tuple[TrainResult, list[Event]]) -> None:
    result, events = run
    assert result == TrainResult(result.run, 2, None, result.best, result.run / "pipeline", [])
    assert [type(event) for event in events] == [Validated, StepDone, StepDone, CheckpointWritten, Validated, Finished]
    assert [event.step for event in events] == [0, 1, 2, 2, 2, 2]
    base, first, _, written, validated, finished = events
    assert {"loss/diffusion", "loss/total", "train/lr"} <= set(first.values)
    assert written.folder == result.run / "checkpoint-2"
    assert base.best
    assert result.best == (validated if validated.best else base).values["psnr"]
    assert validated.best == (validated.values["psnr"] > base.values["psnr"])
    assert validated.bicubic == base.bicubic
    assert validated.bicubic.keys() == {"psnr"}
    assert finished == Finished(2, 2, None, result.pipeline)


@pytest.mark.parametrize("scale", [4, 1.5])
def test_a_run_folder_is_an_upscaler(run: tuple[TrainResult, list[Event]], scale: float) -> None:
    up = open_upscaler(run[0].run, device="cpu")
    assert {"num_inference_steps", "detail", "tile"} <= up.options
    assert (up.defaults["num_inference_steps"], up.defaults["detail"], up.scale) == (1, 0.5, 4)
    small = Image.new("RGB", (21, 13), "teal")
    picture = up(small, scale=scale, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (round(21 * scale), round(13 * scale))


def test_a_run_goes_on_and_begins_anew(run: tuple[TrainResult, list[Event]], photos: Path, tmp_path: Path) -> None:
    recipe = tiny(photos, tmp_path / "run", training={"steps": 1, "batch_size": 1, "crop_size": 32})
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 2})})
    assert train(recipe).step == 1
    with pytest.raises(UserError, match="already holds a run"):
        train(longer)
    assert train(longer, resume="latest").step == 2
    assert train(recipe, restart=True).step == 1
    with pytest.raises(UserError, match=r"^restart begins anew and resume goes on; choose one"):
        train(recipe, restart=True, resume="latest")


def test_what_an_event_raises_ends_the_run(photos: Path, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(event: Event) -> None:
        raise Enough

    with pytest.raises(Enough):
        train(tiny(photos, tmp_path / "run"), on_event=stop)


def test_a_recipe_may_be_an_object_a_file_or_a_name(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Recipe] = []

    def build(recipe: Recipe, **options: object) -> None:
        given.append(recipe)
        raise UserError("enough")

    monkeypatch.setattr(start, "build_job", build)
    monkeypatch.chdir(tmp_path)
    recipe = tiny(photos, tmp_path / "run")
    (tmp_path / "r.yaml").write_text(json.dumps(resolved(recipe)))
    for named in (recipe, "r.yaml", tmp_path / "r.yaml", "tiny_autoencoder"):
        with pytest.raises(UserError, match=r"^enough$"):
            train(named)
    assert given == [recipe, recipe, recipe, load_recipe("tiny_autoencoder")]
    with pytest.raises(
        RecipeError, match=r"^recipe: no file 'tiny_autoencodr' and no shipped recipe of that name; the nearest .*: tiny_auto"
    ):
        train("tiny_autoencodr")
    assert not (tmp_path / "runs").exists()


def test_the_names_are_public() -> None:
    assert {"train", "open_upscaler", "load_recipe"} <= set(sslsr_diffusion.__all__) <= set(dir(sslsr_diffusion))
