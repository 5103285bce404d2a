"""models/one_step/, tasks/one_step.py, inference/one_step.py: a LoRA on every base, and its result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step_cases import TOYS, WHOLE, saved_bases, stock, toy_settings, with_loras
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_pipeline import photo, seeded
from toys import smooth, toy_batch
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.noise import ImageNoise, image_seeds
from sslsr_diffusion.inference.one_step import OneStepRestorer
from sslsr_diffusion.inference.open import find_model, open_model, restorer_of
from sslsr_diffusion.losses import build_losses
from sslsr_diffusion.losses.pixel import PixelL2Settings
from sslsr_diffusion.models.condition import Condition
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.lora import lora_layers
from sslsr_diffusion.models.one_step.build import build_networks
from sslsr_diffusion.models.one_step.networks import OneStepNetworks
from sslsr_diffusion.tasks.one_step import OneStepTask
from sslsr_diffusion.tasks.pixels import seen
from sslsr_diffusion.types import Batch

KINDS = pytest.mark.parametrize("kind", TOYS)
CLOSE = 1e-5  # float32 through the same layers in another order of sums
ENCODER: dict[str, Any] = {"rank": 2, "alpha": 5, "targets": ["conv_in", "conv1"]}
QUANT: dict[str, Any] = {**ENCODER, "targets": [*ENCODER["targets"], "quant_conv"]}  # OSEDiff's and OMGSR's layers
ENCODERS = {"sd": QUANT, "sd3": ENCODER, "flux2": QUANT, "zimage": ENCODER}  # quant_conv where there is one


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return saved_bases(tmp_path_factory.mktemp("bases"))


def restorer(networks: OneStepNetworks) -> OneStepRestorer:
    made = restorer_of(networks, FAMILIES["one_step"], scale=4, detail=0.75)
    assert isinstance(made, OneStepRestorer)
    return made


def picture(upscale: Any, **call: Any) -> torch.Tensor:
    images: torch.Tensor = upscale(photo(9, 7), output_type="pt", generator=seeded(), **call).images
    return images


@KINDS
def test_the_result_opens_as_it_was_and_stock_diffusers_loads_its_lora(kind: str, bases, tmp_path: Path) -> None:
    networks = with_loras(kind, bases(kind), encoder_lora=ENCODERS[kind])
    restorer(networks).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "vae_lora.safetensors",
        "prompt.safetensors",
        "one_step.json",
    }
    opened = open_model(find_model(str(tmp_path)), device="cpu")
    assert (opened.scale, opened.defaults) == (4, {"detail": 0.75})
    assert torch.equal(picture(opened), picture(restorer(networks)))
    fresh = with_loras(kind, bases(kind), drawn=False, encoder_lora=ENCODERS[kind])
    assert torch.equal(picture(opened, lora_scale=0), picture(restorer(fresh)))
    assert (picture(opened) - picture(opened, lora_scale=0)).abs().max() > 0.01

    fresh.merge()  # B was zero, so this is the base
    theirs = stock(kind, fresh)
    z = torch.randn(1, networks.codec.latent_channels, 8, 6, generator=seeded(2))
    before = theirs.call(z)
    theirs.pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        pred = networks.denoiser(z, torch.tensor([networks.timestep]), Condition(z, networks.text))
        want = networks.codec.decode(networks.clean(pred, z, z)).clamp(0, 1)
    assert (theirs.call(z) - want).abs().max() < CLOSE
    assert (before - want).abs().max() > 0.01, "the LoRA must change the picture, or loading it would prove nothing"


@KINDS
def test_a_merged_result_is_a_whole_model_and_makes_the_same_picture(kind: str, bases, tmp_path: Path) -> None:
    networks = with_loras(kind, bases(kind), encoder_lora=ENCODERS[kind])
    want = picture(restorer(networks))
    networks.merge()
    restorer(networks).save(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "moved")  # the base is not needed any more
    opened = open_model(find_model(str(tmp_path / "moved")), device="cpu")
    assert (picture(opened) - want).abs().max() < 1e-4  # W + B A once, instead of W x + B (A x)
    assert not list(tmp_path.rglob("*lora*"))
    with pytest.raises(UserError, match=r"^lora_scale: this model does not have it, got 0.5 \(no LoRA\)"):
        picture(opened, lora_scale=0.5)
    part = networks.denoiser.part
    assert str(bases(kind)) not in (tmp_path / part / "config.json").read_text() + (tmp_path / "vae" / "config.json").read_text()


@pytest.mark.parametrize(("kind", "noise"), [("sd3", None), ("flux2", 0.4), ("sd", 350)])
def test_training_sees_the_picture_that_the_restorer_makes(kind: str, noise: float | None, bases) -> None:
    networks = with_loras(kind, bases(kind), encoder_lora=ENCODER, noise=noise)
    task = OneStepTask(networks, seed=3, restorer=restorer(networks))
    lr = smooth(3, size=32)[None]
    batch = Batch(torch.zeros(1, 3, 128, 128), lr, torch.ones(1, 1, 128, 128, dtype=torch.bool), torch.tensor([0]))
    noises = ImageNoise(image_seeds(seeded(4), 1), networks.codec.noise_shape(batch.hr)[1:], "cpu")
    with torch.no_grad():
        _, want, _ = task.module(seen(batch), noises("posterior"), noises("start"), lambda x0: networks.codec.decode(x0).clamp(0, 1))
    options = {"color_fix": "none", "detail": 1, "tile": None}
    got = restorer(networks)(lr, generator=seeded(4), output_type="pt", **options).images
    assert (got - want).abs().max() < CLOSE


def test_only_what_the_recipe_names_trains_and_all_of_that_gets_a_gradient(bases) -> None:
    networks = with_loras("sd", bases("sd"), encoder_lora=QUANT, full=["conv_in"])
    task = OneStepTask(networks, seed=3, decode_crop=4)
    losses = build_losses([PixelL2Settings()])
    batch = toy_batch([0, 1])
    draws = task.draw(batch, losses)
    outputs = task.run(task.module, batch, draws)
    assert outputs.sr is not None
    assert outputs.sr.shape == (2, 3, 16, 16)
    loss = losses[0](outputs)[0]
    loss.backward()
    trained = {name for name, parameter in task.module.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in task.module.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert {"denoiser.network.conv_in.weight", "denoiser.network.conv_in.bias"} < trained
    assert all(any(name.startswith(part) for name in trained) for part in ("encoder.", "quant_conv."))
    assert all(".lora_" in name or ".conv_in." in name for name in trained)
    assert not any(parameter.requires_grad for parameter in networks.codec.vae.decoder.parameters())
    again = task.draw(toy_batch([1]), losses)
    assert torch.equal(again.noise["posterior_lr"][0], draws.noise["posterior_lr"][1]), "a sample's noise is its own"


@KINDS
def test_the_prior_is_the_base_and_stands_on_its_weights(kind: str, bases) -> None:
    networks = with_loras(kind, bases(kind), drawn=False, full=WHOLE[kind])
    prior = networks.prior(rank=2, negative_prompt="", seed=4)
    fresh = with_loras(kind, bases(kind), drawn=False)
    z = torch.randn(2, networks.codec.latent_channels, 8, 6, generator=seeded(2))
    t = torch.tensor([40, 700])
    with torch.no_grad():
        want = fresh.denoiser(z, networks.base_process.timestep(t), Condition(text=networks.text))
        for parameter in (*prior.network.parameters(), *networks.parameters()):
            if parameter.requires_grad:
                parameter.add_(0.3)
        assert (prior.predict(z, t, guidance=7.5, learned=False) - want).abs().max() < CLOSE
        assert (prior.predict(z, t, guidance=7.5, learned=True) - want).abs().max() > 1e-3
    frozen = {id(parameter) for parameter in networks.denoiser.parameters() if not parameter.requires_grad}
    own = [parameter for parameter in prior.network.parameters() if id(parameter) not in frozen]
    whole = sum(parameter.numel() for parameter in networks.full_tensors().values())
    assert sum(parameter.numel() for parameter in own if not parameter.requires_grad) == whole, "a copy of that; all else is one"
    prior.predict(z, t, guidance=1, learned=True).square().mean().backward()
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in prior.network.parameters())
    with pytest.raises(UserError, match=r"vsd\.negative_prompt: .* has no text encoder, got 'blurry'"):
        networks.prior(rank=2, negative_prompt="blurry", seed=4)


def test_latents_of_the_truth_are_the_bases_own(bases) -> None:
    networks = with_loras("sd3", bases("sd3"), encoder_lora=ENCODER)
    fresh = with_loras("sd3", bases("sd3"), drawn=False)
    pixels, noise = smooth(1)[None], torch.zeros(1, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(networks.truth(pixels, noise), fresh.codec.encode(pixels, noise))
        assert not torch.equal(networks.codec.encode(pixels, noise), fresh.codec.encode(pixels, noise))


def test_whole_layers_are_stored_beside_the_lora(bases, tmp_path: Path) -> None:
    networks = with_loras("sd3", bases("sd3"), full=["proj_out"])
    restorer(networks).save(tmp_path)
    assert set(load_file(tmp_path / "full.safetensors")) == {"proj_out.weight", "proj_out.bias"}
    assert torch.equal(picture(open_model(find_model(str(tmp_path)), device="cpu")), picture(restorer(networks)))
    assert [note for note in networks.left_out() if "full.safetensors" in note]
    save_file({"proj_out.weight": torch.zeros(1)}, tmp_path / "full.safetensors")
    with pytest.raises(UserError, match=r"full\.safetensors: expected proj_out\.weight of shape \[16, 32\], got \[1\]; is it of"):
        open_model(find_model(str(tmp_path)), device="cpu")


def test_a_base_drawn_at_random_is_drawn_again_when_its_lora_is_opened(tmp_path: Path) -> None:
    networks = build_networks(toy_settings("sd3"), seed=9)
    restorer(networks).save(tmp_path)
    opened = open_model(find_model(str(tmp_path)), device="cpu")
    got = picture(opened)
    assert torch.equal(got, picture(restorer(networks)))
    told = json.loads((tmp_path / "one_step.json").read_text())
    (tmp_path / "one_step.json").write_text(json.dumps({**told, "seed": 10}))
    assert not torch.equal(picture(open_model(find_model(str(tmp_path)), device="cpu")), got)


def test_alpha_travels_in_the_file(bases, tmp_path: Path) -> None:
    restorer(with_loras("sd3", bases("sd3"))).save(tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as stream:
        told = json.loads(stream.metadata()["lora_adapter_metadata"])
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (3, 7.5)


@KINDS
def test_tiles_sizes_and_precision(kind: str, bases) -> None:
    upscale = restorer(with_loras(kind, bases(kind)))
    unit = upscale.networks.size().multiple_of
    for scale in (1, 2.5):
        assert picture(upscale, scale=scale, tile=4 * unit, tile_overlap=unit).shape == (1, 3, round(9 * scale), round(7 * scale))
    assert "num_inference_steps" not in upscale.options
    assert upscale.check(num_inference_steps=4) == ["num_inference_steps 4 has no effect: this model makes a picture in one step"]
    assert upscale.memory_model().denoise_bytes(8, 8) > 0


@KINDS
def test_half_precision(kind: str, bases, tmp_path: Path) -> None:
    networks = with_loras(kind, bases(kind))
    want = picture(restorer(networks))
    networks.cast(torch.float16)
    kept = torch.float16 if kind == "sd" else torch.bfloat16  # flow transformers leave the range of float16
    assert {parameter.dtype for parameter in networks.parameters()} == {kept}
    assert (picture(restorer(networks.float())) - want).abs().mean() < 0.02
    held = with_loras(kind, bases(kind), weights="bfloat16")
    assert {parameter.dtype for parameter in held.denoiser.parameters()} == {torch.bfloat16, torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in held.parameters() if parameter.requires_grad)
    assert (picture(restorer(held)) - want).abs().mean() < 0.02


@pytest.mark.parametrize("name", [*TOYS, "sd epsilon"])
def test_comfyui_is_told_the_same_call(name: str, bases, tmp_path: Path) -> None:
    """The workflow's numbers, put through what ComfyUI's samplers do to a start and to a prediction."""
    kind, _, prediction = name.partition(" ")
    networks = with_loras(kind, bases(name))
    notes = networks.for_comfyui(tmp_path, 4)
    assert [note.split()[0] for note in notes] == (["comfyui_offset.latent"] if kind in ("sd3", "zimage") else [])
    nodes = json.loads((tmp_path / "comfyui_workflow.json").read_text())
    (gain,) = [node["inputs"]["multiplier"] for node in nodes.values() if node["class_type"] == "LatentMultiply"]
    sigma = float(nodes["sigmas"]["inputs"]["sigmas"].split(",")[0])
    z, pred = (torch.randn(1, networks.codec.latent_channels, 4, 4, generator=seeded(seed)) for seed in (1, 2))
    config = networks.codec.vae.config
    shift, scaling = config.get("shift_factor") or 0.0, config.get("scaling_factor", 1.0)
    offset = load_file(tmp_path / "comfyui_offset.latent")["latent_tensor"] if shift else torch.zeros(1)
    assert (nodes["start"]["class_type"] == "LatentAdd") == bool(shift) == (kind in ("sd3", "zimage"))
    given = gain * (z / scaling + shift) + offset  # what the autoencoder gives, through the nodes up to the sampler
    start = (given - shift) * scaling * (1 if kind == "sd" else 1 - sigma)
    seen = start / (1 + sigma**2) ** 0.5 if kind == "sd" else start
    assert (seen - z).abs().max() < CLOSE
    if kind == "sd" and not prediction:
        clean = start / (1 + sigma**2) - pred * sigma / (1 + sigma**2) ** 0.5  # v
    else:
        clean = start - sigma * pred  # epsilon, or a velocity
    assert (clean - networks.clean(pred, z, z)).abs().max() < CLOSE

    tensors = load_file(tmp_path / "comfyui_lora.safetensors")
    layers = lora_layers(networks.denoiser.network)
    assert len(tensors) == 3 * len(layers)
    for name, (down, up, _) in layers.items():
        stem = f"lora_unet_{name.replace('.', '_')}" if kind == "sd" else f"transformer.{name}"
        ends = ("lora_down", "lora_up") if kind == "sd" else ("lora_A", "lora_B")
        assert torch.equal(tensors[f"{stem}.{ends[0]}.weight"], down)
        assert torch.equal(tensors[f"{stem}.{ends[1]}.weight"], up)
        assert tensors[f"{stem}.alpha"] / len(down) == 7.5 / 3, "the scale read back"


def test_what_comfyui_cannot_call_is_said(bases, tmp_path: Path) -> None:
    for networks, why in (
        (with_loras("flux2", bases("flux2"), noise=0.5), "noise of another level"),
        (with_loras("flux2", bases("flux2"), x0="residual"), "residual is none"),
        (with_loras("flux2", bases("flux2"), sigma=1.0), "noise alone"),
        (with_loras("sd", bases("sd"), encoder_lora=ENCODER), "it does not load vae_lora.safetensors"),
        (with_loras("sd", bases("sd"), encoder_lora=ENCODER, full=["conv_in"]), "load vae_lora.safetensors or full.safetensors"),
    ):
        (note,) = networks.for_comfyui(tmp_path, 4)
        assert why in note
        assert [path.name for path in tmp_path.iterdir()] == ["comfyui_lora.safetensors"]


def test_infer_takes_a_folder_and_a_scale_of_the_lora(bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restorer(with_loras("sd3", bases("sd3"))).save(tmp_path / "model")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 6), (90, 120, 60)).save(tmp_path / "in" / "a.png")
    common = ["infer", "--model", str(tmp_path / "model"), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*common, "--lora-scale", "0.5", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "out" / "a.png").size == (32, 24)
    refused = CliRunner().invoke(app, [*common, "--prompt", "a photo", "--device", "cpu"])
    assert str(refused.exception).startswith("--prompt: this model does not have it, got 'a photo' (no text encoder)")
