"""models/one_step/: what a model cannot be built from, and results whose files are of another base or run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from one_step_cases import saved_bases, toy_settings, with_loras
from test_one_step import ENCODER, restorer

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.open import find_model, open_model
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.one_step.build import build_networks
from sslsr_diffusion.tasks.frame import Frame


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return saved_bases(tmp_path_factory.mktemp("bases"))


def other(base: Path, folder: Path, part: str, **changes: Any) -> Path:
    """A base with another config of one part."""
    shutil.copytree(base, folder)
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(("kind", "side"), [("sd3", 384), ("zimage", 256)])
def test_no_crop_is_larger_than_the_networks_positions(kind: str, side: int) -> None:
    def built(crop: int) -> Any:
        return Frame(FAMILIES["one_step"], toy_settings(kind), scale=4, seed=0, crop_size=crop, meta=True).build()

    assert built(side).size().maximum == side
    said = f"needs a multiple of 4 pixels of at most {side}, got {side + 4}; {side} would do"
    with pytest.raises(UserError, match=rf"^training\.crop_size: this model {said}\.$"):
        built(side + 4)


def test_what_cannot_be_built_gets_a_sentence(bases, tmp_path: Path) -> None:
    def refused(match: str, kind: str, base: Path, **values: Any) -> None:
        with pytest.raises(UserError, match=match):
            with_loras(kind, base, **values)

    def with_another(kind: str, part: str, **changes: Any) -> Path:
        return other(bases(kind), tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}", part, **changes)

    sd, sd3 = bases("sd"), bases("sd3")
    flux = with_another("sd3", "transformer", _class_name="FluxTransformer2DModel")
    refused("expected one of UNet2DConditionModel, .* got FluxTransformer2DModel; choose another base", "sd3", flux)
    ddim = with_another("sd3", "scheduler", _class_name="DDIMScheduler", beta_start=0.1, beta_end=0.2)
    refused("expected a flow's scheduler, .* got DDIMScheduler", "sd3", ddim)
    flow = with_another("sd", "scheduler", _class_name="FlowMatchEulerDiscreteScheduler")
    refused("expected a scheduler of the DDPM family, .* got FlowMatchEuler", "sd", flow)
    vae = with_another("sd3", "vae", _class_name="AutoencoderKLFlux2")
    refused("expected AutoencoderKL in vae/, got AutoencoderKLFlux2", "sd3", vae)
    refused("as SDXL's and the x4 upscaler's do", "sd", with_another("sd", "unet", addition_embed_type="text_time"))
    refused(r"model\.sigma: .* is a flow; expected model\.sigma, got timestep 200", "sd3", sd3, sigma=None, timestep=200)
    refused(r"model\.timestep: .* a process with betas; expected model\.timestep, got sigma 0\.5", "sd", sd, sigma=0.5, timestep=None)
    refused(r"model\.sigma: .* expected model\.sigma, got neither timestep nor sigma; give it", "sd3", sd3, sigma=None)
    refused(r"model\.timestep: expected at most 999", "sd", sd, timestep=1000)
    refused(r"model\.prompt: .* has no text encoder; leave the prompt empty", "sd", sd, prompt="a photo")
    refused(r"model\.full: expected names of layers .* got 'conv_inn'", "sd", sd, full=["conv_inn"])
    refused(r"model\.full: conv_in has a LoRA", "sd", sd, full=["conv_in"], lora={"rank": 1, "targets": ["conv_in"]})
    refused("nothing would train", "sd", sd, lora=None)
    (sd3 / "model_index.json").write_text(json.dumps({"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}))
    refused("lacks its text_encoder/", "sd3", sd3)
    (sd3 / "model_index.json").unlink()
    with pytest.raises(UserError, match="leave the prompt empty, or train from a base"):
        build_networks(toy_settings("zimage", prompt="a photo"))


def test_a_lora_of_another_base_is_refused(bases, tmp_path: Path) -> None:
    restorer(with_loras("sd", bases("sd"))).save(tmp_path / "sd")
    restorer(with_loras("sd3", bases("sd3"))).save(tmp_path / "sd3")
    name = "pytorch_lora_weights.safetensors"
    shutil.copy(tmp_path / "sd" / name, tmp_path / "sd3" / name)
    with pytest.raises(UserError, match=f"{name}: expected LoRA layers whose names begin with transformer"):
        open_model(find_model(str(tmp_path / "sd3")), device="cpu")
    path = tmp_path / "sd" / "one_step.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "model": {**told["model"], "rule": "x"}}))
    with pytest.raises(UserError, match=r"one_step\.json: .*rule"):
        open_model(find_model(str(path.parent)), device="cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"lora": {"rank": 4}},
            r"pytorch_lora_weights\.safetensors: unet\..*to_q\.lora_A\.weight: expected the shape \[4, 64\], got the shape \[3, 64",
        ),
        ({"lora": {"alpha": 3}}, r"pytorch_lora_weights\.safetensors: expected alpha 3, got 7\.5; is the file of another run\?"),
        (
            {"lora": {"targets": ["to_q"]}},
            r"to_k\.lora_A\.weight: expected none, got the shape \[3, 64\]; is the file of another base, or of another",
        ),
        (
            {"lora": {"targets": "unet"}},
            r"lora_A\.weight: expected the shape \[3, .*\], got none; is the file of another base, or of another run\?",
        ),
        ({"encoder_lora": {"targets": ["conv_in"]}}, r"vae_lora\.safetensors: vae\.encoder\..*: expected none, got the shape"),
        (
            {"base": "wide"},
            r"attn2\.to_k\.lora_A\.weight: expected the shape \[3, 48\], got the shape \[3, 32\]; is the file of another base",
        ),
    ],
    ids=["rank", "alpha", "fewer layers", "more layers", "encoder", "widths"],
)
def test_a_lora_beside_the_json_of_another_run_is_refused(change: dict[str, Any], said: str, bases, tmp_path: Path) -> None:
    """Of other widths, as Stable Diffusion 1.5 has beside 2.1, too: same classes, same names."""
    restorer(with_loras("sd", bases("sd"), encoder_lora=ENCODER)).save(tmp_path / "model")
    path = tmp_path / "model" / "one_step.json"
    told = json.loads(path.read_text())
    for key, value in change.items():
        told["model"][key] = {**told["model"][key], **value} if isinstance(value, dict) else str(tmp_path / value)
    path.write_text(json.dumps(told))
    if "base" in change:
        unet = UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(bases("sd") / "unet"), "cross_attention_dim": 48})
        shutil.copytree(bases("sd"), tmp_path / "wide", ignore=shutil.ignore_patterns("unet"))
        unet.save_pretrained(tmp_path / "wide" / "unet")
    with pytest.raises(UserError, match=said) as caught:
        open_model(find_model(str(path.parent)), device="cpu")
    assert "\n" not in str(caught.value)
