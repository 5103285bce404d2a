"""A base that is not whole, or of another noise process: the dry run and the training refuse it in the same words."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_runs import base_model, drawn, save_upscaler, tiny
from toys import wave_photos
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.runs.recipe import Recipe, resolved

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An upscaler, and a plain base with a text encoder, as diffusers saves them."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("bases")
    plain = drawn(plain=True)
    (folder / "base").mkdir()
    plain.save(folder / "base")
    width = plain.denoiser.unet.config.cross_attention_dim
    config = CLIPTextConfig(hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=49408)
    CLIPTextModel(config).save_pretrained(folder / "base/text_encoder")
    (folder / "base/tokenizer").mkdir()
    (folder / "base/tokenizer/vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    (folder / "base/tokenizer/merges.txt").write_text("#version: 0.2\n")
    return {"upscaler": save_upscaler(folder / "upscaler"), "base": folder / "base"}


def lacks_a_tensor(part: Path) -> None:
    tensors = load_file(part / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if name != "conv_in.weight"}, part / WEIGHTS)


def other_shape(part: Path) -> None:
    tensors = load_file(part / WEIGHTS)
    save_file({name: tensor[:-1].contiguous() if name == "conv_out.bias" else tensor for name, tensor in tensors.items()}, part / WEIGHTS)


def only_a_variant(part: Path) -> None:
    (part / WEIGHTS).rename(part / "diffusion_pytorch_model.fp16.safetensors")


def only_a_pickle(part: Path) -> None:
    (part / WEIGHTS).rename(part / "diffusion_pytorch_model.bin")


def a_pointer(part: Path) -> None:
    (file,) = part.glob("*.safetensors")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")


def cut_off(part: Path) -> None:
    (file,) = part.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def emptied(part: Path) -> None:
    for file in part.iterdir():
        file.unlink()


def a_missing_shard(part: Path) -> None:
    (part / WEIGHTS).unlink()
    (part / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": "model-1-of-2.safetensors"}}))


def scheduler(**changes: object) -> Callable[[Path], None]:
    def change(part: Path) -> None:
        path = part / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


LOST = r"expected diffusion_pytorch_model\.safetensors, got .*; variants and pickles are not read\."
CASES = {
    "a tensor": (
        "upscaler",
        "unet",
        lacks_a_tensor,
        r"lacks 1 of \d+ tensors, the first: conv_in\.weight; fetch or save the model again\.",
    ),
    "a shape": ("upscaler", "unet", other_shape, r"conv_out\.bias: expected the shape \[8\], got \[7\]; do config and weights belong"),
    "fp16 alone": ("upscaler", "vae", only_a_variant, LOST.replace(".*", r".*\.fp16\.safetensors.*")),
    "a pickle": ("upscaler", "structural_encoder", only_a_pickle, LOST.replace(".*", r".*model\.bin.*")),
    "a pointer": (
        "base",
        "unet",
        a_pointer,
        rf"{re.escape(WEIGHTS)} is not a whole safetensors file: it is a git-lfs pointer, run `git lfs",
    ),
    "cut off": ("base", "unet", cut_off, rf"{re.escape(WEIGHTS)} is not a whole safetensors file: .*; fetch the model again\."),
    "a shard": ("base", "vae", a_missing_shard, r"model-1-of-2\.safetensors is not a whole safetensors file: .*; fetch the model again\."),
    "the words": (
        "base",
        "tokenizer",
        emptied,
        r"expected tokenizer\.json, or vocab\.json and merges\.txt, got no files; fetch the model again\.",
    ),
    "the text": ("base", "text_encoder", cut_off, r"model\.safetensors is not a whole safetensors file: "),
}
SCHEDULERS = {
    "unknown": (
        scheduler(_class_name="EDMEulerScheduler"),
        r"scheduler: expected one of DDPMScheduler, .*, got EDMEulerScheduler; its noise",
    ),
    "a flow": (scheduler(_class_name="FlowMatchEulerDiscreteScheduler"), r"expected a scheduler of the DDPM family, .* got FlowMatchEuler"),
    "flow sigmas": (scheduler(use_flow_sigmas=True), r"scheduler: DDPMScheduler with use_flow_sigmas is a flow process; expected use_flow"),
}


def check_refused(recipe: Recipe, sentence: str, folder: Path, verdict: str = "missing") -> None:
    """By the dry run, with exit code 2, and by the training, as one line of the same words."""
    (folder / "recipe.yaml").write_text(json.dumps(resolved(recipe)))
    with pytest.raises(UserError, match=sentence) as caught:
        CliRunner().invoke(app, ["train", "--config", str(folder / "recipe.yaml")], catch_exceptions=False)
    assert "\n" not in str(caught.value)
    assert not (folder / "run").exists()
    dry = CliRunner().invoke(app, ["train", "--config", str(folder / "recipe.yaml"), "--dry-run"], catch_exceptions=False)
    assert dry.exit_code == 2
    assert re.search(rf"^  model(\.vae)? +{verdict} +{re.escape(str(caught.value))}$", dry.output, re.MULTILINE), dry.output
    assert dry.output.count(str(caught.value)) == 1


@pytest.fixture(autouse=True)
def no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslsr_diffusion.runs.memory.step_bytes", lambda recipe: {"weights": 2**30})  # counting takes seconds


@pytest.mark.parametrize("case", CASES)
def test_files_that_are_not_whole(whole: dict[str, Path], photos: Path, tmp_path: Path, case: str) -> None:
    kind, part, damage, sentence = CASES[case]
    shutil.copytree(whole[kind], tmp_path / "model")
    damage(tmp_path / "model" / part)
    recipe = tiny(photos, tmp_path / "run", model=base_model(tmp_path / "model"))
    check_refused(recipe, rf"^model\.base: {part} of .*model: {sentence}", tmp_path)


@pytest.mark.parametrize("case", SCHEDULERS)
def test_a_scheduler_of_another_process(whole: dict[str, Path], photos: Path, tmp_path: Path, case: str) -> None:
    damage, sentence = SCHEDULERS[case]
    shutil.copytree(whole["upscaler"], tmp_path / "model")
    damage(tmp_path / "model/scheduler")
    recipe = tiny(photos, tmp_path / "run", model=base_model(tmp_path / "model"))
    check_refused(recipe, rf"^model\.base: .*model: {sentence}", tmp_path, "refused")


def test_an_autoencoder_of_its_own_that_is_not_whole(whole: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    shutil.copytree(whole["base"] / "vae", tmp_path / "vae")
    a_pointer(tmp_path / "vae")
    model = {"kind": "stablesr", "init": "random", "preset": "tiny", "vae": str(tmp_path / "vae")}
    check_refused(tiny(photos, tmp_path / "run", model=model), r"^model\.vae: vae of .*: it is a git-lfs pointer", tmp_path)


def test_whole_ones_are_taken(whole: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    for kind, folder in whole.items():
        (tmp_path / "recipe.yaml").write_text(json.dumps(resolved(tiny(photos, tmp_path / "run", model=base_model(folder)))))
        dry = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "recipe.yaml"), "--dry-run"], catch_exceptions=False)
        assert dry.exit_code == 0, dry.output
        assert re.search(rf"model +ok +.*{kind}: found unet, vae, scheduler", dry.output)
