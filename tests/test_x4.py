"""The Stable Diffusion x4 upscaler: what the stock pipeline makes, sizes and tiles beyond it, the mistakes of published tries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionUpscalePipeline
from PIL import Image
from toys import smooth
from typer.testing import CliRunner
from x4_models import change, write_x4

from sslsr_diffusion import open_upscaler
from sslsr_diffusion.cli import app
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference import open as open_
from sslsr_diffusion.inference.latent import LatentRestorer
from sslsr_diffusion.inference.noise import image_seeds
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.x4.build import SCALING_FACTOR, build_networks, check_base_folder, read_pipeline
from sslsr_diffusion.models.x4.settings import X4Settings
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.shipped_model import SMALL

PLAIN: dict[str, Any] = {"color_fix": "none", "tile": None, "vae_tile": None, "output_type": "pt", "num_inference_steps": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_x4(tmp_path_factory.mktemp("x4"))


@pytest.fixture(scope="module")
def upscaler(base: Path) -> LatentRestorer:
    opened = open_upscaler(base, device="cpu")
    assert isinstance(opened, LatentRestorer)
    return opened


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "copy")
    return tmp_path / "copy"


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low(height: int, width: int, seed: int = 3) -> torch.Tensor:
    return smooth(seed, 3, 64)[None, :, :height, :width]


def stock(pipe: StableDiffusionUpscalePipeline, picture: torch.Tensor, **call: Any) -> torch.Tensor:
    """Its picture from the noises that our restorer draws for `seeded()`."""
    seed = image_seeds(seeded(), 1)[0]
    latents = torch.randn(1, 4, *picture.shape[-2:], generator=sample_generator(seed, "start"))
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": "", "num_inference_steps": 3, "guidance_scale": 1.0, **call}
    made = pipe(image=picture, latents=latents, generator=sample_generator(seed, "posterior"), output_type="pt", **given)
    return made.images


CALLS = {
    "plain": ((16, 16), {}),
    "level": ((16, 24), {"noise_level": 0}),
    "odd latents": ((20, 12), {"noise_level": 100, "prompt": "a cat", "guidance_scale": 4.0}),
    "negative": ((12, 28), {"noise_level": 350, "prompt": "a cat", "negative_prompt": "fog", "guidance_scale": 2.0}),
}


@pytest.mark.parametrize(("size", "call"), CALLS.values(), ids=CALLS.keys())
def test_without_tiles_it_is_the_stock_pipeline(base, upscaler, size, call):
    pipe = StableDiffusionUpscalePipeline.from_pretrained(base)
    want = stock(pipe, low(*size), **call)
    got = upscaler(low(*size), generator=seeded(), **{**PLAIN, **call}).images
    # the same calls in the same order; the noise level's factors are computed in another precision
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert want.std() > 0.05


def test_what_a_call_says_is_heard(upscaler):
    def made(**call: Any) -> torch.Tensor:
        return upscaler(low(16, 16), **{**PLAIN, "prompt": "a cat", "generator": seeded(), **call}).images

    first = made()
    for other in ({"noise_level": 200}, {"prompt": "fog"}, {"guidance_scale": 3.0}, {"generator": seeded(6)}, {"sampler": "ddpm"}):
        assert (made(**other) - first).abs().max() > 1e-3, other
    assert torch.equal(made(noise_level=20), first)  # diffusers' default


@pytest.mark.parametrize("scale", [4, 2.5, 6])
@pytest.mark.parametrize("size", [(1, 5), (13, 22)])
def test_output_is_exactly_round_scale_times_size(upscaler, size, scale):
    got = upscaler(low(*size), scale=scale, generator=seeded(), output_type="pt", num_inference_steps=1).images
    assert got.shape == (1, 3, *(max(1, round(scale * side)) for side in size))
    assert got.isfinite().all()


def test_tiles_leave_no_seam_and_a_picture_depends_on_its_own_generator(upscaler):
    """The stock pipeline has no tiles. Whole tiles differ from the whole picture by what the attention sees, and nowhere in a step."""
    picture = low(48, 40)
    call = {**PLAIN, "num_inference_steps": 2}
    whole = upscaler(picture, generator=seeded(), **call).images
    tiled = upscaler(picture, generator=seeded(), **{**call, "tile": 96, "vae_tile": 96}).images
    jumps = (tiled - whole).diff(dim=-1).abs().amax()
    assert jumps < 0.5 * whole.diff(dim=-1).abs().amax()
    assert (tiled - whole).norm() < 0.1 * whole.norm()
    both = upscaler(torch.cat([low(16, 16), low(16, 16, seed=9)]), generator=[seeded(1), seeded(5)], **PLAIN).images
    alone = upscaler(low(16, 16, seed=9), generator=seeded(), **PLAIN).images
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


def test_memory_is_known_before_a_call(upscaler):
    small, large = (upscaler.memory_model().denoise_bytes(side, side) for side in (32, 64))
    assert small < large
    with pytest.raises(UserError, match=r"memory_budget: .* too little"):
        upscaler(low(16, 16), memory_budget=1 << 20, num_inference_steps=1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"noise_level": 351}, "noise_level: expected a whole number from 0 to 350, got 351"),
        ({"noise_level": -1}, "noise_level: expected a whole number from 0 to 350, got -1"),
        ({"noise_level": 20.5}, "noise_level: expected a whole number from 0 to 350, got 20.5"),
        ({"strength": 0.5}, "strength: this model does not have it, got 0.5"),
        ({"start": "noise"}, "start: this model does not have it"),
        ({"fidelity": 0.5}, "no CFW decoder"),
        ({"tile": 40}, "tile: expected a multiple of 16"),
    ],
)
def test_calls_that_it_cannot_have_are_refused(upscaler, call, said):
    for ask in (upscaler.check, lambda **call: upscaler(low(8, 8), **call)):
        with pytest.raises(UserError, match=said):
            ask(**call)


def test_others_have_no_noise_level():
    with pytest.raises(UserError, match="noise_level: this model does not have it, got 20"):
        open_upscaler(SMALL, device="cpu").check(noise_level=20)


def test_the_command_takes_the_untouched_original(base, tmp_path):
    Image.fromarray((low(11, 14)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(tmp_path / "small.png")
    words = ["infer", "--input", tmp_path / "small.png", "--model", base, "--output", tmp_path / "out", "--device", "cpu", "--steps", "1"]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--noise-level", 40)])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out" / "small.png").size == (56, 44)
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--noise-level", 400)])
    assert str(result.exception) == "--noise-level: expected a whole number from 0 to 350, got 400."


def test_a_hub_id_is_fetched_without_its_copies_in_half_precision(base, monkeypatch):
    asked: dict[str, Any] = {}

    def fetch(name: str, revision: str | None, **how: Any) -> Path:
        asked.update(name=name, **how)
        return base

    monkeypatch.setattr(open_, "fetch", fetch)
    assert open_upscaler("stabilityai/stable-diffusion-x4-upscaler", device="cpu").options >= {"noise_level", "prompt"}
    assert asked["name"] == "stabilityai/stable-diffusion-x4-upscaler"
    assert {"*.fp16.*", "state/*"} <= set(asked["ignore"])
    assert {"model_index.json", "*/*.safetensors", "call_defaults.json"} <= set(asked["patterns"])


def scheduler(folder: Path, part: str, **values: Any) -> None:
    change(folder / part / "scheduler_config.json", **values)


def swap(folder: Path) -> None:
    (folder / "scheduler").rename(folder / "kept")
    (folder / "low_res_scheduler").rename(folder / "scheduler")
    (folder / "kept").rename(folder / "low_res_scheduler")


MISTAKES = {
    "swapped": (swap, "got them swapped; exchange the two folders"),
    "epsilon": (lambda f: scheduler(f, "scheduler", prediction_type="epsilon"), "expected a scheduler/ with prediction_type v_prediction"),
    "flow": (
        lambda f: scheduler(f, "scheduler", _class_name="FlowMatchEulerDiscreteScheduler", beta_start=None),
        "expected a scheduler/ with the noise that x4 upscalers are trained for",
    ),
    "unknown": (
        lambda f: scheduler(f, "scheduler", _class_name="MyScheduler"),
        "scheduler/: scheduler: expected one of .*, got MyScheduler",
    ),
    "linear": (lambda f: scheduler(f, "scheduler", beta_schedule="linear"), "got _class_name DDIMScheduler, beta_schedule linear"),
    "low": (lambda f: scheduler(f, "low_res_scheduler", beta_end=0.012), "expected a low_res_scheduler/ with the noise"),
    "no low": (lambda f: shutil.rmtree(f / "low_res_scheduler"), "low_res_scheduler"),
    "level": (lambda f: change(f / "model_index.json", max_noise_level=True), "max_noise_level .* expected a number from 1 on, got True"),
    "damaged": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json of .* cannot be read"),
    "call": (lambda f: (f / "call_defaults.json").write_text('{"detail": 3}'), "call_defaults.json of .* cannot be read .*detail"),
}


@pytest.mark.parametrize(("spoil", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_bases_with_the_mistakes_of_published_tries_are_refused(copy, spoil, said):
    spoil(copy)
    for ask in (lambda: build_networks(X4Settings(base=str(copy))), lambda: check_base_folder(X4Settings(base=str(copy)))):
        with pytest.raises(UserError, match=said):
            ask()


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("unet", {"in_channels": 4}, "expected a UNet with 7 input channels, 4 of the latent and 3 of the picture, got 4"),
        ("unet", {"num_class_embeds": None}, r"expected a UNet with class labels for 350 noise levels \(num_class_embeds\), got 0"),
        ("vae", {"latent_channels": "four"}, "their configs cannot be read"),
        ("vae", {"block_out_channels": [16, 32, 32, 32], "down_block_types": ["DownEncoderBlock2D"] * 4,
                 "up_block_types": ["UpDecoderBlock2D"] * 4}, "expected an autoencoder with 4 pixels per latent pixel, got 8"),
    ],
)  # fmt: skip
def test_networks_that_are_no_x4_upscaler_are_refused(copy, part, values, said):
    change(copy / part / "config.json", **values)
    shutil.rmtree(copy / "low_res_scheduler")  # as Stable Diffusion has none
    with pytest.raises(UserError, match=said):
        build_networks(X4Settings(base=str(copy)))


def test_a_scaling_factor_is_set_as_the_stock_pipeline_sets_it(copy, caplog):
    change(copy / "vae" / "config.json", scaling_factor=0.18215)
    assert build_networks(X4Settings(base=str(copy))).codec.vae.config.scaling_factor == SCALING_FACTOR
    assert "0.18215 becomes 0.08333" in caplog.text


def test_the_denoiser_wants_the_level_and_a_picture_of_the_latents_size(base):
    networks = read_pipeline(base)
    zt, t, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long), networks.text
    with pytest.raises(ValueError, match="expected the noise level of each picture, got none"):
        networks.see(low(8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="expected text, pixels and labels"):
        networks.denoiser(zt, t, Condition(text=text, pixels=torch.zeros(1, 3, 8, 8)))
    with pytest.raises(UserError, match=r"not enlarged: expected \[8, 8\] pixels as the latent has, got \[32, 32\]"):
        networks.denoiser(zt, t, Condition(text=text, pixels=torch.zeros(1, 3, 32, 32), labels=t))


def test_the_picture_is_noised_as_diffusers_does(base):
    networks, noise, level = read_pipeline(base), smooth(2, 3, 8)[None] - 0.5, torch.tensor([170])
    seen = networks.see(low(8, 8), noise, level=level)
    want = DDPMScheduler.from_pretrained(base / "low_res_scheduler").add_noise(low(8, 8) * 2 - 1, noise, level)
    torch.testing.assert_close(seen.pixels, want, rtol=0, atol=1e-5)
    assert seen.z_lr is None
    assert seen.labels is level


@pytest.mark.parametrize(("train", "parts"), [("all", {"conv_in", "attn1", "ff"}), ("attention", {"attn1"})])
def test_what_trains(train, parts):
    networks = build_networks(X4Settings(init="random", preset="tiny"), train=train)
    names = [name for name, parameter in networks.named_parameters() if parameter.requires_grad]
    for part in ("conv_in", "attn1", "ff"):
        assert any(f".{part}." in name for name in names) == (part in parts)
    assert not any(name.startswith("codec.") for name in names)


def test_a_random_autoencoder_begins_with_latents_as_wide_as_the_scaling_factor_expects():
    codec = build_networks(X4Settings(init="random", preset="tiny")).codec
    picture = smooth(4, 3, 64)[None]
    with torch.no_grad():
        latents = codec.encode(picture, torch.zeros(codec.noise_shape(picture)))
        assert 0.1 < float(latents[:, :3].std()) < 2
        assert (codec.decode(latents) - picture).abs().mean() < 0.05


def test_in_half_precision_the_autoencoder_stays_whole_where_its_config_asks(copy):
    change(copy / "vae" / "config.json", force_upcast=True)
    networks = read_pipeline(copy)
    networks.cast(torch.float16)
    assert networks.denoiser.unet.dtype == networks.text_encoder.dtype == torch.float16
    assert networks.codec.vae.dtype == torch.float32
    assert isinstance(networks.text, Text)


def test_the_full_size_has_the_published_number_of_parameters():
    networks = build_networks(X4Settings(preset="x4"), meta=True)
    counts = {part: round(total / 1e6, 1) for part, (total, _) in networks.parameters_per_part().items()}
    assert counts == {"unet": 473.4, "vae": 55.3, "text encoder": 340.4}


def test_a_result_knows_the_defaults_of_a_call(base, tmp_path):
    networks = read_pipeline(base)
    networks.save(tmp_path, scale=4, num_inference_steps=7, noise_level=50, detail=0.5)
    again = open_upscaler(tmp_path, device="cpu")
    assert again.defaults == {"num_inference_steps": 7, "noise_level": 50, "detail": 0.5, "back_projection": 0.0, "antiring": 0.0}
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionUpscalePipeline"
    assert str(base) not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
