"""The model that comes with the package, and what is promised about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from sslsr_diffusion import open_upscaler
from sslsr_diffusion.cli import app
from sslsr_diffusion.data.degradation import Degradation, DegradationSettings
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.metrics import METRICS
from sslsr_diffusion.images import read_image, resize_bicubic
from sslsr_diffusion.inference.open import find_model
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.one_step.build import build_networks
from sslsr_diffusion.models.one_step.result import read_told
from sslsr_diffusion.models.one_step.settings import OneStepSettings, load_preset
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.runs.check import dry_run
from sslsr_diffusion.runs.recipe import load_recipe
from sslsr_diffusion.shipped_model import FOLDER, SMALL, shipped_folder

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = sorted((ROOT / "examples" / "photos" / "validation").glob("*.jpg"))


def test_the_files_are_small_half_precision_and_complete() -> None:
    files = [path for path in (FOLDER / SMALL).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F16"}, path  # noqa: SIM118 - no mapping
    card = (FOLDER / SMALL / "README.md").read_text(encoding="utf-8")
    assert "licen" in card.lower()
    assert "## Limits" in card
    assert "Copyright (c) 2021 Xintao Wang" in card  # of the teacher


def test_a_folder_of_the_same_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_folder(SMALL) == FOLDER / SMALL
    assert shipped_folder("small") is None
    (tmp_path / SMALL).mkdir()
    assert shipped_folder(SMALL) is None


def test_it_is_a_base_to_fine_tune() -> None:
    networks = build_networks(OneStepSettings(base=SMALL, lora=None), train="whole")
    assert networks.base == SMALL
    assert (networks.settings.timestep, networks.settings.x0) == (200, "residual")  # as its files say
    for part in (networks.denoiser, networks.codec.vae):
        assert all(parameter.requires_grad for parameter in part.parameters())
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_its_unet_can_save_memory_though_its_autoencoder_cannot() -> None:
    networks = build_networks(OneStepSettings(base=SMALL, lora=None), train="whole", meta=True)
    networks.economize(gradient_checkpointing=True, channels_last=False)
    assert networks.denoiser.network.is_gradient_checkpointing
    assert not networks.codec.vae.is_gradient_checkpointing


@pytest.mark.parametrize("family", ["one_step", "stablesr"])
def test_an_earlier_ones_name_gets_a_sentence(family: str) -> None:
    said = rf"'small-v3' does not come with this version of the package, which has {SMALL}; use that one"
    settings = {"one_step": OneStepSettings, "stablesr": StableSRSettings}[family](base="small-v3")
    with pytest.raises(UserError, match=f"^model.base: {said}"):
        FAMILIES[family].build(settings)
    with pytest.raises(UserError, match=f"^model: {said}"):
        find_model("small-v3")


def test_as_a_base_of_another_family_it_is_refused() -> None:
    with pytest.raises(
        UserError, match=f"^model.base: {SMALL}: expected a UNet of the Stable Diffusion 2 family .*; choose another base.$"
    ):
        FAMILIES["stablesr"].build(StableSRSettings(base=SMALL), meta=True)


def test_the_dry_run_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sslsr_diffusion.runs.memory.step_bytes", lambda recipe: {"weights": 2**30})  # counting takes seconds
    lines: list[str] = []
    dry_run(load_recipe("demo", ["output.dir=runs/never"]), lines.append)
    said = {line.split()[0]: line.split() for line in lines if line.startswith("  ") and len(line.split()) > 1}
    assert said["model"][1:3] == ["ok", f"{SMALL}:"]
    assert said["unet"][1:3] == ["2.25", "M"]


def test_its_files_are_its_recipes() -> None:
    """What they say of networks and call is what `small` says; weights of another recipe would get another name."""
    recipe, told = load_recipe("small"), read_told(FOLDER / SMALL)
    assert (told.settings.timestep, told.settings.x0) == (recipe.model.timestep, recipe.model.x0)
    assert told.call == {"scale": recipe.scale, **recipe.task.inference.named}
    own = build_networks(OneStepSettings(base=SMALL, lora=None), train="whole", meta=True)
    for part, config in load_preset(recipe.model.preset).items():
        plain = {name: value for name, value in config.items() if not name.startswith("_")}
        has = own.components()[part].config
        assert {name: list(has[name]) if isinstance(has[name], tuple) else has[name] for name in plain} == plain, part


@pytest.fixture(scope="module")
def up() -> Restorer:
    return open_upscaler(SMALL, device="cpu")


def photograph(path: Path, side: int = 256) -> torch.Tensor:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return torch.from_numpy(np.array(picture.crop((left, top, left + side, top + side)))).permute(2, 0, 1) / 255


def restored(up: Restorer, picture: torch.Tensor, scale: float = 4, **call: object) -> torch.Tensor:
    """[3, h, w] in [0, 1] -> [3, H, W]."""
    images: torch.Tensor = up(picture, scale=scale, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    return images[0]


@pytest.mark.parametrize("scale", [2, 3, 4, 4.5])
def test_sizes_are_exact_and_show_the_picture(up: Restorer, scale: float) -> None:
    low = photograph(PHOTOS[0], 48)[:, :35, :46]
    picture = restored(up, low, scale)
    assert picture.shape == (3, round(scale * 35), round(scale * 46))
    coarse = resize_bicubic(low[None], size=picture.shape[-2:])[0].clamp(0, 1)
    assert (picture - coarse).abs().mean() < 0.05  # of a photograph whose pixels lie 0.15 and more from their mean


@pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (0.2, 0.5, 0.9), (0.9, 0.1, 0.1)])
def test_a_flat_picture_stays_flat(up: Restorer, colour: tuple[float, float, float]) -> None:
    """Borders included: within one grey level, whatever was learned of texture and of edges."""
    flat = torch.tensor(colour).reshape(3, 1, 1)
    picture = restored(up, flat.expand(3, 20, 28))
    assert (picture - flat).abs().max() <= 1 / 255


def test_a_gray_picture_gets_no_colour(up: Restorer) -> None:
    """Before anything takes its colour away: at most a grey level on the mean between the largest and the smallest channel."""
    low = photograph(PHOTOS[1], 64).mean(0, keepdim=True).expand(3, -1, -1)
    picture = restored(up, low)
    assert (picture.amax(0) - picture.amin(0)).mean() <= 1 / 255
    assert picture.std() > 0.05


def test_files_keep_gray_and_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    pixels = (photograph(PHOTOS[0], 32)[:, :24].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    alpha = np.zeros((24, 32), np.uint8)
    alpha[:, 16:] = 255
    Image.fromarray(pixels[..., 1]).save("in/gray.png")
    Image.fromarray(np.dstack([pixels, alpha])).save("in/cutout.png")
    done = CliRunner().invoke(app, ["infer", "--input", "in", "--model", SMALL, "--scale", "4.5", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    gray, cutout = (read_image(tmp_path / "results" / f"{name}.png") for name in ("gray", "cutout"))
    assert gray.size == cutout.size == (108, 144)
    assert (gray.gray, gray.alpha) == (True, None)
    assert np.ptp(gray.rgb) > 50
    assert cutout.alpha is not None
    assert not cutout.alpha[:, :60].any()
    assert (cutout.alpha[:, -60:] == 255).all()


def test_tiles_make_the_picture_of_one_piece(up: Restorer) -> None:
    low = photograph(PHOTOS[2], 64)
    whole, tiled = restored(up, low, tile=None, vae_tile=None), restored(up, low, tile=128, vae_tile=128)
    assert (whole - tiled).abs().mean() <= 2 / 255  # tiles of 32 low-resolution pixels have GroupNorm statistics of their own
    assert (whole - whole.mean((1, 2), keepdim=True)).abs().mean() > 10 / 255


def test_it_beats_bicubic_where_it_promises_to(up: Restorer) -> None:
    """Four held-out photographs, mild: SSG distance 5 % lower, SSIM higher; PSNR half a decibel lower at most."""
    sums: dict[tuple[str, str], float] = {}
    mild = Degradation(DegradationSettings(preset="mild"), 4)
    for index, path in enumerate(PHOTOS):
        hr = photograph(path)
        generator = torch.Generator().manual_seed(index)
        lr = mild.apply(hr[None], mild.draw(*hr.shape[-2:], generator), generator)[0]
        pictures = {"bicubic": resize_bicubic(lr[None], size=hr.shape[-2:]).clamp(0, 1), "model": restored(up, lr)[None]}
        for who, picture in pictures.items():
            for name in ("psnr", "ssim", "ssg_l1"):
                reference = hr[None] if METRICS[name].needs_reference else None
                value = float(METRICS[name].fn(picture, reference, crop_border=0, y_channel=False))
                sums[who, name] = sums.get((who, name), 0.0) + value / len(PHOTOS)
    shown = {f"{who} {name}": round(value, 6) for (who, name), value in sums.items()}
    assert sums["model", "ssg_l1"] <= 0.95 * sums["bicubic", "ssg_l1"], shown
    assert sums["model", "ssim"] > sums["bicubic", "ssim"], shown
    assert sums["model", "psnr"] >= sums["bicubic", "psnr"] - 0.5, shown
