"""Every option of `sslsr infer` on the way to the restorer: taken, refused by name before any picture is made, or off with a note."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from restorers import Nearest, ToyPixelFamily
from test_infer_cli import run

from sslsr_diffusion import StableSRPipeline
from sslsr_diffusion.cli import run as as_command
from sslsr_diffusion.cli.infer import infer
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import Image, read_image, write_image
from sslsr_diffusion.models import FAMILIES, AutoencoderKLCFW
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.models.tensor_names import variant_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every kind one: `plain` and `fused` StableSR pipelines, `twice` with a scale of its own, a `direct.toy` network."""
    folder = tmp_path_factory.mktemp("models")
    parts = build_networks(StableSRSettings(init="random", preset="tiny")).components()
    StableSRPipeline(**parts, default_num_inference_steps=1).save_pretrained(folder / "plain")
    StableSRPipeline(**parts, default_num_inference_steps=1, default_scale=2).save_pretrained(folder / "twice")
    fused = {**parts, "vae": AutoencoderKLCFW.from_autoencoder(parts["vae"])}
    StableSRPipeline(**fused, default_num_inference_steps=1).save_pretrained(folder / "fused")
    (folder / "direct.toy").write_bytes(b"")
    return folder


@pytest.fixture
def desk(tmp_path, monkeypatch, models):
    """A working folder with two pictures and the models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FAMILIES, "toy_pixels", ToyPixelFamily())
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    (tmp_path / "in").mkdir()
    for seed in range(2):
        rgb = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        write_image(tmp_path / "in" / f"{seed}.png", Image(rgb))
    return tmp_path


def made(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []


OPTIONS = [
    ("--fidelity", 0.25, "fidelity"),
    ("--sampler", "ddim", "sampler"),
    ("--strength", 0.5, "strength"),
    ("--prompt", "a cat", "prompt"),
    ("--negative-prompt", "blur", "negative_prompt"),
    ("--guidance-scale", 2.0, "guidance_scale"),
    ("--color-fix", "adain", "color_fix"),
    ("--steps", 3, "num_inference_steps"),
    ("--detail", 0.5, "detail"),
    ("--back-projection", 0.25, "back_projection"),
    ("--antiring", 0.75, "antiring"),
    ("--tile", 256, "tile"),
]


def test_all_of_them_reach_the_restorer_and_none_is_made_up(desk, monkeypatch):
    restorer = Nearest()
    monkeypatch.setattr("sslsr_diffusion.inference.open.open_model", lambda found, **where: restorer)
    given = [text for flag, value, _ in OPTIONS for text in (flag, value)]
    assert run("--input", "in", "--model", "plain", *given).exit_code == 0
    assert run("--input", "in", "--model", "plain", "--output", "other").exit_code == 0
    wanted = {keyword: value for _, value, keyword in OPTIONS}
    seen = [{name: value for name, value in call.items() if name not in ("generator", "output_type")} for call in restorer.calls]
    assert seen == [wanted, wanted, {"tile": "auto"}, {"tile": "auto"}]


@pytest.mark.parametrize(
    ("model", "flag", "value", "lacking"),
    [
        ("direct.toy", "--fidelity", 0.5, "no CFW decoder"),
        ("direct.toy", "--sampler", "ddim", "no sampling"),
        ("direct.toy", "--strength", 0.5, "no sampling from the picture"),
        ("direct.toy", "--prompt", "a cat", "no text encoder"),
        ("direct.toy", "--negative-prompt", "blur", "no text encoder"),
        ("direct.toy", "--guidance-scale", 2.0, "no text encoder"),
        ("plain", "--fidelity", 0.5, "no CFW decoder"),
        ("plain", "--prompt", "a cat", "no text encoder"),
        ("plain", "--negative-prompt", "blur", "no text encoder"),
        ("plain", "--guidance-scale", 2.0, "no text encoder"),
        ("fused", "--prompt", "a cat", "no text encoder"),
    ],
)
def test_what_a_model_lacks_is_refused_by_name_before_any_picture(desk, model, flag, value, lacking):
    result = run("--input", "in", "--model", model, flag, value, "--device", "cpu")
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(
        f"{flag}: this model does not have it, got {value!r} ({lacking}); leave it out. It has antiring,"
    )
    assert "\n" not in str(result.exception)
    assert made(desk / "results") == []


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"),
    [
        ("plain", ["--sampler", "dpm"], "^--sampler: 'dpm' is unknown; expected one of ddpm"),
        ("plain", ["--steps", "900", "--sampler", "NoScheduler"], "^--sampler: 'NoScheduler' is unknown"),
        ("plain", ["--tile", "3"], r"^--tile: expected a multiple of 16 pixels, 'auto' or none, got 3\.$"),
        ("direct.toy", ["--tile", "12"], r"^--tile: expected a multiple of 8 pixels, 'auto' or none, got 12\.$"),
        ("plain", ["--memory-budget", "20MB"], r"^--memory-budget: 20\.0 MB is too little for this model"),
        ("plain", ["--dtype", "float16", "--revision", "main"], r"^--revision main: is for a hub id, and model plain lies on this machine"),
    ],
)
def test_impossible_values_are_one_sentence_before_any_picture(desk, model, arguments, sentence):
    result = run("--input", "in", "--model", model, "--device", "cpu", *arguments)
    assert isinstance(result.exception, UserError), result.output
    assert re.search(sentence, str(result.exception)), str(result.exception)
    assert "\n" not in str(result.exception)
    assert made(desk / "results") == []


def test_a_refusal_is_one_line_and_exit_code_two(desk, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", "--input", "in", "--model", "direct.toy", "--fidelity", "0.5"])
    app = typer.Typer()
    app.command()(infer)
    with pytest.raises(SystemExit) as caught:
        as_command(app)
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: --fidelity: this model does not have it, got 0.5")


def test_what_is_off_is_taken_with_one_note_each_and_counts_as_done(desk):
    off = ["--fidelity", "0", "--strength", "1", "--prompt", "", "--negative-prompt", "", "--guidance-scale", "1", "--steps", "7"]
    arguments = ["--input", "in", "--model", "direct.toy", "--color-fix", "none", "--antiring", "0", "--detail", "1", *off]
    said = run(*arguments)
    assert said.exit_code == 0, said.output
    notes = [line for line in said.output.splitlines() if line.startswith("note: ")]
    assert sorted(note.split()[1] for note in notes) == [
        "--fidelity",
        "--guidance-scale",
        "--negative-prompt",
        "--prompt",
        "--steps",
        "--strength",
    ]
    assert "note: --steps 7 has no effect: this model makes a picture in one step" in notes
    assert "note: --fidelity 0.0 has no effect: it is off, and this model has none" in notes
    assert made(desk / "results") == ["0.png", "1.png"]
    again = run(*arguments)
    assert "0 done, 2 skipped" in again.output
    assert "note:" not in again.output


def test_what_is_off_in_a_plain_pipeline_gives_the_plain_picture(desk):
    assert run("--input", "in", "--model", "plain", "--output", "a").exit_code == 0
    said = run("--input", "in", "--model", "plain", "--output", "b", "--fidelity", "0", "--guidance-scale", "1")
    assert [line.split()[1] for line in said.output.splitlines() if line.startswith("note: ")] == ["--fidelity", "--guidance-scale"]
    assert (desk / "a" / "0.png").read_bytes() == (desk / "b" / "0.png").read_bytes()


def test_fidelity_is_taken_by_a_model_with_fusion_layers(desk):
    said = run("--input", "in", "--model", "fused", "--fidelity", "1")
    assert said.exit_code == 0, said.output
    assert "note:" not in said.output


def test_a_negative_prompt_without_guidance_is_a_note(desk, monkeypatch):
    monkeypatch.setattr("sslsr_diffusion.inference.open.open_model", lambda found, **where: Nearest())
    said = run("--input", "in", "--model", "plain", "--negative-prompt", "blur")
    assert said.output.count("note: ") == 1
    assert "note: --negative-prompt has no effect without guidance; set guidance_scale above 1" in said.output
    assert "note: " not in run("--input", "in", "--model", "plain", "--negative-prompt", "blur", "--guidance-scale", "2").output


@pytest.mark.parametrize(("model", "scale"), [("twice", 2), ("plain", 4), ("direct.toy", 2)])
def test_without_scale_the_models_own_is_taken(desk, model, scale):
    assert run("--input", "in", "--model", model).exit_code == 0
    assert read_image(desk / "results" / "0.png").size == (9 * scale, 12 * scale)
    assert run("--input", "in", "--model", model, "--scale", "1.5").exit_code == 0
    assert read_image(desk / "results" / "0.png").size == (round(9 * 1.5), 18)


def test_the_scale_in_the_index_is_the_pipelines_own(models):
    pipe = StableSRPipeline.from_pretrained(models / "twice")
    pipe.set_progress_bar_config(disable=True)
    assert '"default_scale": 2' in (models / "twice" / "model_index.json").read_text()
    assert pipe.scale == 2
    picture = np.zeros((5, 7, 3), dtype=np.uint8)
    assert pipe(picture).images[0].size == (14, 10)
    assert pipe(picture, scale=3).images[0].size == (21, 15)


def test_a_folder_of_half_precision_variants_is_opened(desk):
    """What diffusers writes with variant="fp16"; one plain component among them is no hindrance."""
    pipe = StableSRPipeline.from_pretrained("plain")
    pipe.save_pretrained("half", variant="fp16")
    assert variant_of(Path("half")) == "fp16"
    assert "2 done" in run("--input", "in", "--model", "half", "--device", "cpu").output
    (desk / "half/vae/diffusion_pytorch_model.fp16.safetensors").rename(desk / "half/vae/diffusion_pytorch_model.safetensors")
    assert "2 done" in run("--input", "in", "--model", "half", "--device", "cpu", "--output", "mixed").output
    pictures = [read_image(Path(folder, "0.png")).rgb for folder in ("results", "mixed")]
    assert np.array_equal(*pictures)
    assert variant_of(Path("plain")) is None


def test_float16_on_a_cpu_gets_a_hint(desk, caplog):
    assert "2 done" in run("--input", "in", "--model", "direct.toy", "--device", "cpu", "--dtype", "float16").output
    assert "float16 is slow on a CPU" in caplog.text
    caplog.clear()
    assert "2 done" in run("--input", "in", "--model", "direct.toy", "--device", "cpu", "--dtype", "bfloat16", "--overwrite").output
    assert "slow" not in caplog.text
