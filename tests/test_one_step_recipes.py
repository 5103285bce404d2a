"""The recipes of configs/one_step/: twins, dry runs at full size with nothing there, and one that trains, stops and goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import assert_same_checkpoint, smooth, wave_photos
from typer.testing import CliRunner

from sslsr_diffusion import open_upscaler, train
from sslsr_diffusion.cli import app
from sslsr_diffusion.config import parse, shipped_recipes
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.runs import memory
from sslsr_diffusion.runs.recipe import Recipe, load_recipe, resolved

NAMES = [name.removeprefix("one_step/") for name in shipped_recipes() if name.startswith("one_step/")]
METHODS = [name for name in NAMES if f"{name}_ssl" in NAMES]
PAGE = (Path(__file__).parents[1] / "docs" / "one_step.md").read_text(encoding="utf-8")
PLAYED = {"sd21_osediff"}  # its memory is estimated, which takes seconds
TRAINED = {  # millions, as published or counted on the classes
    "sd21_hypir": 259.47,
    "sd21_osediff": 4.44,
    "sd21_omgsr": 26.73,
    "sd35_medium": 37.555,
    "flux2_klein": 298.84,
    "zimage": 635.04,
}


def test_each_has_a_twin_without_the_self_similarity_term() -> None:
    assert set(METHODS) == set(TRAINED)
    assert len(NAMES) == 2 * len(METHODS) + 1
    for name in METHODS:
        twin, own = (resolved(load_recipe(f"one_step/{which}")) for which in (name, f"{name}_ssl"))
        assert (twin.pop("output")["dir"], own.pop("output")["dir"]) == (f"runs/one_step/{name}", f"runs/one_step/{name}_ssl")
        own["losses"] = [loss for loss in own["losses"] if loss["kind"] != "self_similarity"]
        assert twin == own
        assert parse(Recipe, resolved(load_recipe(f"one_step/{name}"))) == load_recipe(f"one_step/{name}")


@pytest.mark.parametrize("name", METHODS)
def test_a_dry_run_at_full_size_with_nothing_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sslsr_diffusion.runs.presets.load_presets", lambda name, overrides: {})  # test_presets.py has them
    monkeypatch.setattr(memory, "_variants", lambda recipe: {"as it is": recipe})
    if name not in PLAYED:
        monkeypatch.setattr(memory, "step_bytes", lambda recipe: {})
    recipe: Any = load_recipe(f"one_step/{name}_ssl")
    result = CliRunner().invoke(app, ["train", "--config", f"one_step/{name}_ssl", "--dry-run"])
    assert result.exit_code == 2, result.output
    assert re.search(rf"model +not reachable +{recipe.model.base} is no folder here", result.output), result.output
    assert re.search(r"data +missing .*data/train", result.output)
    counted = re.search(r"  all .*trained +([\d.]+) M", result.output)
    needed = re.search(r"as it is +([\d.]+) GiB", result.output)
    assert counted is not None
    assert needed is not None
    assert float(counted[1]) == pytest.approx(TRAINED[name], abs=0.01)
    told = next(line for line in PAGE.splitlines() if line.startswith(f"| `one_step/{name}_ssl`"))
    assert f"| {TRAINED[name]:.1f} |" in told
    assert name not in PLAYED or told.endswith(f"| {float(needed[1]):.0f} |"), needed[1]


@pytest.mark.parametrize(
    ("preset", "rank", "targets", "millions"),
    [
        ("sd21", 32, "unet", 32.43),
        ("sd21", 32, "attention", 6.6),
        ("sd35_medium", 16, None, 9.39),
        ("sd35_medium", 16, "attention", 11.9),
        ("flux2_klein", 16, ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "single_*.attn.to_out"], 16.7),
        ("zimage", 16, "attention", 16.7),
    ],
)
def test_the_loras_of_other_ranks_and_layers_are_as_large_as_published(preset: str, rank: int, targets: Any, millions: float) -> None:
    name = next(name for name in METHODS if resolved(load_recipe(f"one_step/{name}"))["model"]["preset"] == preset)
    settings: Any = load_recipe(f"one_step/{name}").model
    lora = settings.lora.model_copy(update={"rank": rank, **({"targets": targets} if targets else {})})
    settings = settings.model_copy(update={"lora": lora, "encoder_lora": None, "full": ()})
    networks = FAMILIES["one_step"].build(settings, meta=True)
    assert sum(p.numel() for p in networks.parameters() if p.requires_grad) / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_tiny_one_trains_goes_on_exactly_and_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    folder = {"kind": "folder", "path": str(wave_photos(photos))}
    raw = resolved(load_recipe("one_step/tiny"))
    raw["data"] |= {"sources": [folder], "validation": [folder], "workers": 0}
    raw["training"] |= {"steps": 4, "crop_size": 64, "log_every": 1, "ema": {"decay": 0.9}}
    raw["model"] |= {"preset": "tiny_flux2", "timestep": None, "sigma": 0.8, "full": [], "noise": 0.5}
    raw["model"]["lora"]["targets"] = "attention"
    raw["model"]["encoder_lora"] = {"rank": 2, "targets": ["conv1"]}
    raw["validation"] |= {"limit": 0}
    raw["losses"] += [{"kind": "vsd", "rank": 2}, {"kind": "gan", "space": "latent", "discriminator": "patch", "layers": 1, "width": 8}]
    raw["checkpoints"] |= {"every": 2}

    def run(where: str, **how: Any) -> Path:
        recipe = parse(Recipe, {**raw, "output": {"dir": str(tmp_path / where), "trackers": []}})
        return train(recipe, **how).run

    whole = run("whole")
    half = tmp_path / "half"
    (tmp_path / "moved").mkdir()
    run("half")
    (half / "checkpoint-4").rename(tmp_path / "moved" / "checkpoint-4")
    run("half", resume="latest")
    assert_same_checkpoint(whole / "checkpoint-4", half / "checkpoint-4")
    tensors = (whole / "checkpoint-4" / "trained.safetensors").stat().st_size
    assert tensors < 100_000, "the base is in no checkpoint"

    merged = CliRunner().invoke(app, ["export", str(whole), "--output", str(tmp_path / "merged"), "--merge"])
    assert merged.exit_code == 0, merged.output
    assert "does not load" not in merged.output
    picture = smooth(2, size=16)
    got = [
        open_upscaler(path, device="cpu")(picture, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for path in (whole, tmp_path / "merged")
    ]
    assert (got[0] - got[1]).abs().max() < 1e-4
    plain = CliRunner().invoke(app, ["export", str(whole), "--output", str(tmp_path / "lora")])
    assert "note: stock diffusers does not load vae_lora.safetensors; --merge writes a whole model" in plain.output

    monkeypatch.setattr("sslsr_diffusion.runs.task.write_onnx", lambda graph, folder: [f"{graph.name}.onnx: a graph"])
    both = CliRunner().invoke(app, ["export", str(whole), "--output", str(tmp_path / "graph"), "--onnx"])
    assert "note: upscaler.onnx: a graph" in both.output
    assert "note: stock diffusers does not load vae_lora.safetensors; --merge writes" in both.output, (
        "the graph is merged, the files are not"
    )
