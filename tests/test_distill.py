"""Distillation: runs/teacher.py, `data.teacher`, `sslsr prepare teacher`, and one-step models all of whose weights train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from network_cases import save as save_network
from one_step_cases import TOYS, save_base, toy_settings
from test_pipeline import photo, seeded
from toys import toy_batch, wave_photos
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import read_image, resize_bicubic, to_tensor
from sslsr_diffusion.inference.open import find_model, open_model, restorer_of
from sslsr_diffusion.losses import build_losses
from sslsr_diffusion.losses.pixel import PixelL1Settings
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.one_step.build import build_networks
from sslsr_diffusion.models.one_step.networks import OneStepNetworks
from sslsr_diffusion.ops.edge_mask import laplacian_edge_mask
from sslsr_diffusion.runs.check import dry_run
from sslsr_diffusion.runs.model_card import model_card
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.start import build_job
from sslsr_diffusion.tasks.one_step import OneStepTask
from sslsr_diffusion.training.state import trained_parameters


def whole(**values: Any) -> OneStepNetworks:
    return build_networks(toy_settings("sd", lora=None, **values), train="whole")


def upscaled(upscale: Any) -> torch.Tensor:
    images: torch.Tensor = upscale(photo(9, 7), scale=4, output_type="pt", generator=seeded()).images
    return images


def test_a_drawn_residual_model_begins_with_the_picture_and_all_of_it_trains() -> None:
    networks = whole(x0="residual")
    task = OneStepTask(networks, seed=0)
    losses, batch = build_losses([PixelL1Settings(kind="pixel_l1")]), toy_batch([0, 1])
    draws = task.draw(batch, losses)
    outputs = task.run(task.module, batch, draws)
    assert torch.equal(outputs.z0, networks.see(*_looked(batch, draws)).z_lr)

    with torch.no_grad():  # branches that begin at zero would hide what lies before them
        for parameter in networks.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    outputs = task.run(task.module, batch, draws)
    (outputs.sr - outputs.hr).square().mean().backward()
    trained = trained_parameters(task.module)
    assert {id(p) for p in trained.values()} == {id(p) for p in networks.parameters()}
    idle = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert all("transformer_blocks" in name for name in idle), idle  # a text of one token leaves its queries no choice
    assert not task.gives & {"z0_hr", "prior"}  # nothing is frozen that could say them


def _looked(batch: Any, draws: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from sslsr_diffusion.tasks.pixels import seen

    return seen(batch), draws.noise["posterior_lr"]


def test_its_result_is_a_whole_model_which_others_begin_with(tmp_path: Path) -> None:
    networks = whole(x0="residual")
    with torch.no_grad():
        for parameter in networks.denoiser.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    made = restorer_of(networks, FAMILIES["one_step"], scale=4, detail=0.75)
    made.save(tmp_path / "model")
    again = open_model(find_model(str(tmp_path / "model")), device="cpu", dtype="float32")
    assert torch.equal(upscaled(made), upscaled(again))
    assert again.defaults["detail"] == 0.75

    base = {"init": "pretrained", "base": str(tmp_path / "model"), "timestep": None}
    child = whole(**base)  # the call is its base's, defaults too
    assert (child.timestep, child.settings.x0, child.call_defaults["detail"]) == (200, "residual", 0.75)
    assert torch.equal(upscaled(restorer_of(child, FAMILIES["one_step"], scale=4, detail=0.75)), upscaled(made))
    with pytest.raises(UserError, match=r"model\.timestep: .*model is a one-step model with timestep 200, got 300; leave it out"):
        whole(**{**base, "timestep": 300})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"full": ["conv_in"]}, r"model\.full: task\.train: whole trains every weight; expected full to be null\."),
        ({"lora": {"rank": 2}}, r"model\.lora: task\.train: whole trains every weight; expected lora to be null\."),
        ({"weights": "bfloat16"}, r"model\.weights: task\.train: whole trains every weight; expected weights: float32, got bfloat16\."),
    ],
)
def test_what_would_train_twice_gets_a_sentence(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_networks(toy_settings("sd", **{"lora": None, **values}), train="whole")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    (folder / "photos").mkdir()
    wave_photos(folder / "photos")
    save_network(folder, "SRResNet")
    return folder


def recipe(world: Path, **data: Any) -> Recipe:
    plain: dict[str, Any] = {
        "model": {"kind": "network", "architecture": "SRResNet", "arguments": {"nf": 4, "nb": 1}},
        "task": {"kind": "network"},
        "data": {"sources": [{"kind": "folder", "path": str(world / "photos")}], "workers": 0, **data},
        "losses": [{"kind": "pixel_l1"}],
        "training": {"steps": 1, "batch_size": 2, "crop_size": 64},
        "validation": {"limit": 0},
        "output": {"dir": str(world / "run"), "trackers": []},
    }
    return Recipe.model_validate(plain)


def batches(asked: Recipe, state: Any = None, count: int = 2) -> list[Any]:
    loader = build_job(asked).open_data(0, 1, state, torch.device("cpu"))
    taken = [batch for batch, _ in zip(loader, range(count))]
    loader.close()
    return taken


def test_a_teacher_takes_the_place_of_the_truth(world: Path) -> None:
    model = str(world / "network.safetensors")
    teacher = open_model(find_model(model), device="cpu", dtype="float32")
    plain, taught = batches(recipe(world)), batches(recipe(world, teacher=model))
    for before, after in zip(plain, taught):
        assert torch.equal(before.lr, after.lr)
        assert torch.equal(before.index, after.index)
        wanted = teacher(after.lr, output_type="pt").images.clamp(0, 1)
        torch.testing.assert_close(after.hr, wanted, rtol=0, atol=1e-5)
        assert not torch.allclose(after.hr, before.hr, atol=0.05)
        assert torch.equal(after.mask, laplacian_edge_mask(after.hr, 20.0))  # of what is trained towards
    assert torch.equal(batches(recipe(world, teacher=model), {"batch": 1}, 1)[0].hr, taught[1].hr)


def test_an_anchored_teacher_has_the_truth_where_the_low_resolution_shows_it(world: Path) -> None:
    model = str(world / "network.safetensors")
    truth, plain = batches(recipe(world), count=1)[0].hr, batches(recipe(world, teacher=model), count=1)[0]

    def reduced(picture: torch.Tensor) -> torch.Tensor:
        return resize_bicubic(picture, size=plain.lr.shape[-2:])

    def wrong(picture: torch.Tensor) -> float:
        return float((reduced(picture) - reduced(truth)).abs().mean())

    for share in (0.5, 1.0):
        anchored = batches(recipe(world, teacher=model, teacher_anchor=share), count=1)[0]
        back = resize_bicubic(reduced(truth) - reduced(plain.hr), size=truth.shape[-2:])
        torch.testing.assert_close(anchored.hr, (plain.hr + share * back).clamp(0, 1), rtol=0, atol=1e-5)
        assert torch.equal(anchored.lr, plain.lr)
        assert wrong(anchored.hr) < (1 - 0.7 * share) * wrong(plain.hr), share
    with pytest.raises(ValueError, match=r"data\.teacher_anchor: has no effect without data\.teacher; leave it out"):
        recipe(world, teacher_anchor=0.5)


def test_stored_pairs_are_what_training_would_have_asked_for(world: Path, tmp_path: Path) -> None:
    def prepare(*more: str, output: str = "pairs") -> Any:
        arguments = ["prepare", "teacher", str(world / "photos"), "--model", str(world / "network.safetensors"), "--crop-size", "64"]
        return CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / output), "--device", "cpu", *more])

    assert prepare("--count", "2", "--seed", "42").exit_code == 0
    first = (tmp_path / "pairs" / "hr" / "000001.png").read_bytes()
    done = prepare("--count", "3", "--seed", "42")
    assert done.exit_code == 0
    assert "3 pairs in" in done.output
    assert first == (tmp_path / "pairs" / "hr" / "000001.png").read_bytes()
    assert prepare("--count", "3", "--seed", "42", "--anchor", "0.7", output="anchored").exit_code == 0
    for output, anchor in (("pairs", 0.0), ("anchored", 0.7)):
        asked = recipe(world, teacher=str(world / "network.safetensors"), teacher_anchor=anchor)
        taught = [pair for batch in batches(asked) for pair in zip(batch.lr, batch.hr)]
        for number, (lr, hr) in enumerate(taught[:3]):
            stored = {side: to_tensor(read_image(tmp_path / output / side / f"{number:06d}.png").rgb) for side in ("lr", "hr")}
            torch.testing.assert_close(stored["lr"], lr, rtol=0, atol=0.51 / 255)
            torch.testing.assert_close(stored["hr"], hr, rtol=0, atol=8 / 255)  # of an input in 8 bits
    one, other = (read_image(tmp_path / output / "hr" / "000000.png").rgb for output in ("pairs", "anchored"))
    assert abs(one.astype(int) - other).max() > 16, "the anchor changes the pictures by more than the tolerance above"
    other = prepare("--count", "3", "--seed", "43")
    assert "holds samples made with seed 42, now it is 43; give another --output." in str(other.exception)
    other = prepare("--count", "3", "--seed", "42", "--anchor", "0.7")
    assert "holds samples made with teacher_anchor 0.0, now it is 0.7; give another --output." in str(other.exception)
    assert "expected either --config or an input, got both" in str(prepare("--config", "demo").exception)
    assert "expected --config beside --set, got none" in str(prepare("--set", "seed=3").exception)
    assert prepare("--anchor", "nan").exit_code != 0
    options = ["--config", "demo", "--model", "x", "--output", str(tmp_path / "other")]
    for option, value in (("--preset", "mild"), ("--scale", "2"), ("--seed", "0")):
        refused = CliRunner().invoke(app, ["prepare", "teacher", *options, option, value])
        assert f"{option}: with --config the recipe says it" in str(refused.exception)


def test_a_teacher_that_is_not_there_is_said_before_the_run(world: Path) -> None:
    said: list[str] = []
    assert not dry_run(recipe(world, teacher=str(world / "nothing")), said.append)
    assert any("teacher" in line and "missing" in line for line in said)
    text = "\n".join(said)
    assert "data.teacher is not counted" in text
    stored = {"sources": [{"kind": "cfw", "path": "x"}], "teacher": "small"}
    with pytest.raises(ValueError, match=r"data\.sources\.0\.kind: cfw has stored latents"):
        recipe(world, **stored)


def test_the_card_says_lora_of_a_lora_alone() -> None:
    section: dict[str, Any] = {"kind": "one_step", "lora": None}
    assert "- lora" not in model_card("me/mine", {"model": section})
    for kind in ("one_step", "x4"):
        assert "- lora" in model_card("me/mine", {"model": {"kind": kind, "lora": {"rank": 2}}})


@pytest.mark.parametrize("kind", TOYS)
def test_any_base_is_trained_whole_and_encodes_to_the_mean(kind: str, tmp_path: Path) -> None:
    base = save_base(kind, tmp_path / "base")
    settings = toy_settings(kind, lora={"rank": 2}, init="pretrained", base=str(base))
    frozen, networks = build_networks(settings), build_networks(settings.model_copy(update={"lora": None}), train="whole")
    made = restorer_of(networks, FAMILIES["one_step"], scale=4)
    made.save(tmp_path / "model")
    again = open_model(find_model(str(tmp_path / "model")), device="cpu", dtype="float32")
    assert torch.equal(upscaled(made), upscaled(again))

    pixels = torch.rand(1, 3, 32, 32, generator=seeded(1))
    noises = [torch.zeros(networks.codec.noise_shape(pixels)), torch.randn(networks.codec.noise_shape(pixels), generator=seeded(2))]
    with torch.no_grad():
        drawn = [frozen.codec.encode(pixels, noise) for noise in noises]
        mean = [networks.codec.encode(pixels, noise) for noise in noises]
    assert (drawn[1] - drawn[0]).abs().max() > 1e-3
    torch.testing.assert_close(mean[0], drawn[0], rtol=1e-5, atol=1e-5)
    assert (mean[1] - mean[0]).abs().max() < 1e-5  # exp(-15) of the noise is left
