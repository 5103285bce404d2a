"""The recipes of the published GAN methods: each dry-runs at full size with nothing there, trains at toy width, and docs/gan.md is true."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gan_goldens import weights
from toys import wave_photos
from typer.testing import CliRunner

from sslsr_diffusion import train
from sslsr_diffusion.cli import app
from sslsr_diffusion.config import shipped_recipes
from sslsr_diffusion.models.network.family import FILE
from sslsr_diffusion.runs import check, memory
from sslsr_diffusion.runs.recipe import Recipe, load_recipe, resolved

NAMES = sorted(name.removeprefix("gan/") for name in shipped_recipes() if name.startswith("gan/"))
METHODS = [name for name in NAMES if f"{name}_ssl" in NAMES]
PAGE = (Path(__file__).parents[1] / "docs" / "gan.md").read_text(encoding="utf-8")
TOY: dict[str, str] = {
    "RRDBNet": "{num_feat: 4, num_block: 1, num_grow_ch: 4}",
    "SRResNet": "{nf: 4, nb: 1}",
    "SPSRNet": "{nf: 4, nb: 20, gc: 2}",
    "ELAN": "{m_elan: 2, c_elan: 12}",
    "SwinIR": "{img_size: 16, depths: [2], num_heads: [2], embed_dim: 8}",
}


def test_there_are_eleven_and_their_twins() -> None:
    assert len(METHODS) == 11
    assert len(NAMES) == 22


@pytest.mark.parametrize("name", METHODS)
def test_twins_differ_in_the_self_similarity_term_alone(name: str) -> None:
    twin, own = (resolved(load_recipe(f"gan/{which}")) for which in (name, f"{name}_ssl"))
    assert (twin.pop("output")["dir"], own.pop("output")["dir"]) == (f"runs/gan/{name}", f"runs/gan/{name}_ssl")
    own["losses"] = [loss for loss in own["losses"] if loss["kind"] != "self_similarity"]
    assert twin == own


def row(name: str) -> str:
    """What docs/gan.md says about a method."""
    return next(line for line in PAGE.splitlines() if line.startswith(f"| `gan/{name}_ssl`"))


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_at_full_size_with_nothing_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and memory are told all the same; the memory of a method is played once, as the recipe is: its twin's is the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sslsr_diffusion.runs.presets.load_presets", lambda name, overrides: {})  # test_presets.py has them
    if name.endswith("_ssl"):
        monkeypatch.setattr(memory, "_variants", lambda recipe: {"as it is": recipe})
    else:
        monkeypatch.setattr(check, "describe_memory", lambda recipe, available, savings: ["played by its twin"])
    result = CliRunner().invoke(app, ["train", "--config", f"gan/{name}", "--dry-run"])
    assert result.exit_code == 2, result.output
    recipe: Any = load_recipe(f"gan/{name}")
    assert re.search(rf"model +missing +model\.base: {recipe.model.base} is no file here", result.output), result.output
    assert re.search(r"data +missing .*data/train", result.output)
    assert "cannot be" not in result.output
    counted = re.search(rf"{recipe.model.architecture} +([\d.]+) M", result.output)
    assert counted is not None
    if name.endswith("_ssl"):
        needed = re.search(r"as it is +([\d.]+) GiB", result.output)
        assert needed is not None
        training = recipe.training
        numbers = f"{training.crop_size} / {training.batch_size} / {training.steps // 1000}k"
        for told in (f"{float(counted[1]):.1f} M", f"{float(needed[1]):.0f} GiB", numbers):
            assert told in row(name.removesuffix("_ssl")), told


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a thin VGG19 and a thin ranker."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "photos").mkdir()
    wave_photos(folder / "photos")
    save_file(weights("perceptual"), folder / "vgg19.safetensors")
    save_file(weights("ranker"), folder / "ranker.safetensors")
    return folder


def toy(name: str, files: Path, run: Path, *more: str) -> Recipe:
    """The recipe, with everything small that can be."""
    full: Any = load_recipe(f"gan/{name}")
    values = [
        "model.base=null",
        f"model.arguments={TOY[full.model.architecture]}",
        f"data.sources=[{{kind: folder, path: {files}/photos}}]",
        "data.validation=[]",
        "data.workers=0",
        "training.steps=3",
        "training.batch_size=2",
        "training.crop_size=64",
        "training.log_every=1",
        "validation.limit=0",
        "checkpoints.every=0",
        f"output.dir={run}",
        "output.trackers=[]",
    ]
    if full.data.degradation.pool_size:
        values.append("data.degradation.pool_size=4")
    for i, loss in enumerate(full.losses):
        changes = {
            "self_similarity": ["search_size=9", "window_size=3", "backend=torch"],
            "perceptual": [f"file={files}/vgg19.safetensors"],
            "rank": [f"file={files}/ranker.safetensors"],
            "gan": ["width=2"],
        }
        values += [f"losses.{i}.{change}" for change in changes.get(loss.kind, [])]
    return load_recipe(f"gan/{name}", [*values, *more])


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_at_toy_width(name: str, files: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    recipe = toy(f"{name}_ssl", files, tmp_path / "run")
    result = train(recipe, on_event=seen.append)
    assert (result.step, result.stopped) == (3, None)
    assert (tmp_path / "run" / "pipeline" / FILE).is_file()
    logged = (tmp_path / "run" / "history.jsonl").read_text()
    for loss in recipe.losses:
        assert f'"loss/{loss.called}' in logged, loss.called
    assert not any(word in logged for word in ("NaN", "Infinity"))


def test_a_run_with_milestones_goes_on_to_the_same_bits(files: Path, tmp_path: Path) -> None:
    """A discriminator whose rate falls with the network's, and an average."""
    more = ("training.schedule.milestones=[1, 2]", "training.optimizer.lr=1e-3")
    train(toy("esrgan_ssl", files, tmp_path / "whole", *more))
    train(toy("esrgan_ssl", files, tmp_path / "parts", *more, "training.steps=2"))
    train(toy("esrgan_ssl", files, tmp_path / "parts", *more), resume="latest")
    whole, parts = (load_file(tmp_path / run / "pipeline" / FILE) for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    rates = [float(rate) for rate in re.findall(r'"train/lr": ([\d.e-]+)', (tmp_path / "whole" / "history.jsonl").read_text())]
    assert rates == [5e-4, 2.5e-4, 2.5e-4]  # of the step to come


def test_init_copies_a_recipe_and_what_it_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["init", "gan/ldl"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "gan").iterdir()) == ["esrgan_ssl.yaml", "ldl.yaml", "ldl_ssl.yaml"]
    assert load_recipe("gan/ldl.yaml") == load_recipe(str(shipped_recipes()["gan/ldl"]))


def test_the_pages_numbers_of_the_schedule() -> None:
    for name in METHODS:
        schedule = load_recipe(f"gan/{name}_ssl").training.schedule
        told = re.search(r"halved at ([\d., k]+)", row(name))
        assert (told is None) == (schedule.kind == "constant"), name
        if told:
            thousands = [float(part.strip(" k")) for part in told[1].split(",")]
            assert [math.ceil(value / 500) / 2 for value in schedule.milestones] == thousands, name
