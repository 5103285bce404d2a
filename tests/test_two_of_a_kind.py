"""Two losses of one kind under two names: both train, are logged, kept and resumed, each as if it were alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SMALL_SSL, tiny
from toys import assert_same_checkpoint, wave_photos

from sslsr_diffusion.config import RecipeError
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.start import train
from sslsr_diffusion.training.checkpoints import read_checkpoint

GAN = {"kind": "gan", "discriminator": "patch", "layers": 1, "width": 4}
LOSSES = [
    {"kind": "pixel_l1"},
    {"kind": "pixel_l1", "name": "twice", "weight": 0.2},
    {**GAN, "name": "narrow"},
    {**GAN, "name": "wide", "width": 6, "lr": 1e-3, "start_step": 2},
    {**SMALL_SSL, "name": "fine", "weight": "auto", "auto_steps": 3},
    {**SMALL_SSL, "name": "coarse", "search_size": 13, "weight": "auto", "auto_steps": 2},
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


def recipe(photos: Path, run: Path, steps: int, losses: list[dict[str, Any]] = LOSSES) -> Recipe:
    training = {"steps": steps, "batch_size": 2, "crop_size": 32, "log_every": 1}
    data = {"sources": [{"kind": "folder", "path": str(photos)}], "degradation": {"preset": "bicubic"}, "workers": 0}
    # a threshold at which smooth pictures have edges
    return tiny(photos, run, task={"kind": "autoencoder"}, losses=losses, training=training, data={**data, "mask": {"threshold": 1}})


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe(photos, tmp_path_factory.mktemp("runs") / "whole", 4)).run


def test_both_are_logged_and_learn_apart(whole: Path) -> None:
    rows = [json.loads(line) for line in (whole / "history.jsonl").read_text().splitlines()]
    names = {"pixel_l1", "twice", "narrow", "narrow/discriminator", "wide", "wide/discriminator"}
    names |= {f"{name}/{term}" for name in ("fine", "coarse") for term in ("l1", "kl")}
    assert {f"loss/{name}" for name in names} <= set(rows[0])
    assert all(row["loss/twice"] == row["loss/pixel_l1"] for row in rows)  # the raw terms
    assert all(row["loss/fine/l1"] != row["loss/coarse/l1"] for row in rows)
    assert rows[0]["loss/wide/discriminator"] == 0 != rows[1]["loss/wide/discriminator"]
    tensors, state = read_checkpoint(whole / "checkpoint-4")
    assert [state["learners"][name]["step"] for name in ("narrow", "wide")] == [5, 5]
    assert {name: len(state["auto_weights"][name]["ratios"]) for name in ("fine", "coarse")} == {"fine": 3, "coarse": 2}
    assert tensors["learner-narrow"]["0.weight"].shape[0] == 4
    assert tensors["learner-wide"]["0.weight"].shape[0] == 6
    assert any("exp_avg" in name for name in tensors["learner-narrow-optimizer"])


def test_both_go_on_bit_by_bit(photos: Path, whole: Path, tmp_path: Path) -> None:
    train(recipe(photos, tmp_path / "parts", 2))
    train(recipe(photos, tmp_path / "parts", 4), resume="latest")
    assert_same_checkpoint(whole / "checkpoint-4", tmp_path / "parts/checkpoint-4")


def test_names_decide_where_a_discriminator_starts() -> None:
    from sslsr_diffusion.losses import Means
    from sslsr_diffusion.losses.gan import GANLoss, GANSettings

    first, second, again = (GANLoss(GANSettings(**{**GAN, "name": name}), Means(seed=3)).network for name in ("a", "b", "a"))
    assert not torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(first[0].weight, again[0].weight)


@pytest.mark.parametrize("twice", [{"kind": "pixel_l1"}, {**GAN, "name": "pixel_l1"}, {**SMALL_SSL, "name": "pixel_l1"}])
def test_a_name_stands_there_once(photos: Path, tmp_path: Path, twice: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"^losses: pixel_l1 stands there 2 times; each name once\. Give one of them another `name`\.$"):
        recipe(photos, tmp_path, 1, [{"kind": "pixel_l1"}, twice])
