"""Impossible combinations are named; what a recipe builds is what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sslsr_diffusion.config import RecipeError, parse, shipped_recipes
from sslsr_diffusion.losses import LOSSES
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.runs import memory
from sslsr_diffusion.runs.check import dry_run
from sslsr_diffusion.runs.recipe import Recipe, load_recipe, resolved
from sslsr_diffusion.tasks.kinds import TASKS
from sslsr_diffusion.training.resume import differences

ROOT = Path(__file__).resolve().parent.parent
COUNTED = {"demo", "tiny", "tiny_autoencoder"}  # their memory is estimated; test_train_cli.py: at full size

BASE = {"data": {"sources": [{"kind": "folder", "path": "photos"}]}, "losses": [{"kind": "diffusion"}]}

FINE = {"model": {"kind": "stablesr", "init": "random", "preset": "tiny"}}  # 4 pixels per latent pixel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": []}, "losses:"),
        (
            {"losses": [{"kind": "diffusion"}, {"kind": "diffusion"}]},
            "losses: diffusion stands there 2 times; each name once. Give one of them another `name`.",
        ),
        ({"losses": [{"kind": "latent_kl"}]}, "losses.0.kind: latent_kl is impossible in task diffusion; possible are diffusion, pixel_l1"),
        ({"task": {"kind": "autoencoder"}}, "losses.0.kind: diffusion is impossible in task autoencoder; possible are pixel_l1"),
        ({"task": {"kind": "network"}, "losses": [{"kind": "pixel_l1"}]}, "task.kind: network is impossible with model.kind stablesr"),
        ({"task": {"kind": "diffusion", "train": "unet"}}, "task.train: 'unet' is not a part of stablesr; expected one of sft, all."),
        ({"losses": [{"kind": "pixel_l1"}, {"kind": "lpips", "name": "pixel_l1"}]}, "losses: pixel_l1 stands there 2 times"),
        (
            {"losses": [{"kind": "pixel_l1", "name": "A b"}]},
            "losses.0.name: expected text of the form '^[a-z][a-z0-9_]{0,40}$'; got 'A b'.",
        ),
        ({"training": {"crop_size": 510}}, "training.crop_size: 510 is not a multiple of scale 4."),
        ({"scale": 16}, "scale: expected less than or equal to 8; got 16"),
        ({"validation": {"size": 130}}, "validation.size: 130 is not a multiple of scale 4."),
        ({"validation": {"best": "lpips"}}, "validation.best: 'lpips' is not measured; expected one of validation.metrics: psnr, ssim."),
        (
            {"validation": {"patience": 3, "limit": 4}},
            "validation.patience: expected validation.limit 5 or more, to tell progress from noise",
        ),
        ({"validation": {"patience": 3, "every": 0}}, "validation.patience: expected validation.every above 0, got 0"),
        ({"validation": {"patience": 3}}, "validation.patience: expected held-out pictures in data.validation, got none; name some, or"),
        ({"validation": {"patience": 0}}, "validation.patience: expected greater than or equal to 1; got 0"),
        ({"output": {"push_to_hub": True}}, "output.hub_id: push_to_hub needs to know where"),
        ({"output": {"push_to_hub": True, "hub_id": "a/b/c"}}, "output.hub_id: expected user/name of letters, digits, dots, dashes and _"),
        ({"output": {"hub_id": "../x"}}, "output.hub_id: expected user/name"),
        ({"output": {"push_state": True}}, "output.push_state: has no effect without"),
        ({"losses": [{"kind": "self_similarity", "weight": "auto"}]}, "losses.0.weight: auto compares with the other losses"),
        (
            {"losses": [{"kind": "self_similarity", "search_size": 63}], "task": {"kind": "diffusion", "decode_crop": 4}, **FINE},
            "losses.0.search_size: 63 is too large for pictures of 16 pixels a side.",
        ),
        ({"losses": [{"kind": "self_similarity", "window_size": 27}]}, "losses.0: window_size 27 must not exceed search_size 25."),
        (
            {"task": {"kind": "decoder", "decode_crop": 16}, "losses": [{"kind": "pixel_l1"}]},
            "task.decode_crop: unknown key (value 16); allowed in task: inference, kind, part, synthesis_steps. "
            "It belongs to kind diffusion, one_step.",
        ),
        ({"training": {"decode_crop": 16}}, "training.decode_crop: unknown key (value 16); did you mean task.decode_crop?"),
        ({"model": {"kind": "stablesr", "train": "all"}}, "model.train: unknown key (value 'all'); did you mean task.train?"),
        (
            {"validation": {"steps": 3}},
            "validation.steps: unknown key (value 3); did you mean task.inference.steps or data.degradation.steps or training.steps?",
        ),
        ({"training": {"lr": 1}}, "training.lr: unknown key (value 1); did you mean training.optimizer.lr?"),
        (
            {"losses": [{"kind": "diffusion", "l1_weight": 3}]},
            "losses.0.l1_weight: unknown key (value 3); allowed in losses.0: kind, min_snr_gamma, name, weight. "
            "It belongs to kind self_similarity.",
        ),
        ({"task": {"kind": "cfw"}}, "task.kind: 'cfw' is not allowed; expected one of diffusion, base, autoencoder, decoder, network"),
        (
            {"task": {"train": "all"}},
            "task: the key 'kind' is missing; expected one of diffusion, base, autoencoder, decoder, network, one_step.",
        ),
        (
            {"data": {"sources": [{"kind": "cfw", "path": "x"}]}},
            "data.sources.0.kind: cfw has stored latents, which task diffusion does not read; use pairs.",
        ),
    ],
)
def test_impossible_combinations(changes, message):
    with pytest.raises(RecipeError) as caught:
        parse(Recipe, {**BASE, **changes})
    assert message in str(caught.value)
    assert not str(caught.value).startswith("recipe:")


LOOKS = {**BASE["data"], "validation": [{"kind": "folder", "path": "held_out"}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": LOOKS}, []),
        ({}, ["no validation: data.validation names no pictures"]),
        ({"validation": {"limit": 0}}, []),
        ({"data": LOOKS, "validation": {"limit": 0}, "output": {"pipeline": "best"}}, ["output.pipeline: best has no effect without"]),
        (
            {"data": LOOKS, "training": {"steps": 50, "schedule": {"kind": "cosine", "warmup_steps": 200}}},
            ["training.schedule.warmup_steps: 200 are more than the 50 steps of the run, which ends at 25% of lr."],
        ),
        ({"data": LOOKS, "training": {"steps": 200, "schedule": {"kind": "cosine", "warmup_steps": 200}}}, []),
        (
            {"data": LOOKS, "training": {"steps": 50, "schedule": {"kind": "multistep", "milestones": [49, 50, 90]}}},
            ["training.schedule.milestones: 50, 90 lie at or behind the end"],
        ),
        (
            {"data": LOOKS, "training": {"steps": 50}, "validation": {"every": 10, "patience": 5}},
            ["validation.patience: 5 looks of 10 steps each are as long as the run of 50 steps, which ends first."],
        ),
        ({"data": LOOKS, "training": {"steps": 50}, "validation": {"every": 10, "patience": 4}}, []),
        ({"data": LOOKS, "task": {"kind": "diffusion", "decode_crop": 16}}, ["task.decode_crop has no effect"]),
        ({"data": LOOKS, "task": {"kind": "diffusion", "decode_crop": 16}, "losses": [{"kind": "pixel_l1"}]}, []),
    ],
)
def test_what_does_nothing_is_said(changes, said):
    found = list(parse(Recipe, {**BASE, **changes}).without_effect())
    assert [any(part in text for text in found) for part in said] == [True] * len(found), found


def test_the_baseline_differs_from_the_mission_in_losses_and_folder_alone():
    found = differences(resolved(load_recipe("sd_upscaler_ssl")), resolved(load_recipe("sd_upscaler")))
    assert set(found) == {"losses", "output.dir"}


def test_the_mission_is_the_published_setting():
    recipe = load_recipe("sd_upscaler_ssl")
    ssl = next(loss for loss in recipe.losses if loss.kind == "self_similarity")
    assert (ssl.l1_weight, ssl.kl_weight, ssl.search_size, ssl.window_size, ssl.sigma, ssl.mask_stride) == (500, 500, 25, 9, 0.004, 3)
    assert [loss.weight for loss in recipe.losses] == [1.0, 0.1, 1.0]
    assert recipe.task.train == "sft"
    assert recipe.training.crop_size == 512
    assert recipe.training.batch_size * recipe.training.accumulate == 24


def test_every_setting_has_a_sentence():
    from pydantic import BaseModel

    def walk(model: type[BaseModel], path: str) -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            if name != "kind" and not field.description:
                missing.append(f"{path}.{name}")
            for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    missing += walk(inner, f"{path}.{name}")
        return missing

    assert walk(Recipe, "recipe") == []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_possible_where_the_task_gives_what_it_reads(task: str, loss: str) -> None:
    try:
        parse(Recipe, {**BASE, "task": {"kind": task}, "losses": [{"kind": loss, **({"file": "ranker.pth"} if loss == "rank" else {})}]})
        said = ""
    except RecipeError as error:
        said = str(error)
    assert (f"losses.0.kind: {loss} is impossible in task {task}" not in said) == (LOSSES[loss].reads <= TASKS[task].gives)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_goes_with_the_families_that_name_it(task: str, family: str) -> None:
    losses = [{"kind": next(kind for kind, loss in LOSSES.items() if loss.reads <= TASKS[task].gives)}]
    raw = {**BASE, "model": {"kind": family}, "task": {"kind": task}, "losses": losses}
    if task in FAMILIES[family].tasks:
        assert parse(Recipe, raw).task_kind is TASKS[task]
        return
    with pytest.raises(RecipeError) as caught:
        parse(Recipe, raw)
    possible = ", ".join(sorted(FAMILIES[family].tasks))
    assert str(caught.value) == f"task.kind: {task} is impossible with model.kind {family}; possible are {possible}."


def test_another_kind_of_task_replaces_the_section_that_is_extended(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(json.dumps({**BASE, "task": {"kind": "diffusion", "decode_crop": 16, "inference": {"steps": 3}}}))
    (tmp_path / "same.yaml").write_text("extends: first.yaml\ntask: {kind: diffusion, train: all}\n")
    (tmp_path / "other.yaml").write_text("extends: first.yaml\ntask: {kind: decoder}\nlosses: [{kind: pixel_l1}]\n")
    same, other = (load_recipe(str(tmp_path / f"{name}.yaml")).task for name in ("same", "other"))
    assert (same.decode_crop, same.inference.steps, same.train) == (16, 3, "all")
    assert other == TASKS["decoder"].settings()


OTHERS = [name for name in shipped_recipes() if not name.startswith("one_step/")]  # of those: test_one_step_recipes.py


@pytest.mark.parametrize("name", [*OTHERS, "one_step/tiny"])
def test_every_shipped_recipe_can_be_planned_without_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dry run counts parameters and memory, whatever is not on this machine yet; what it writes down is the same recipe again."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(memory, "_variants", lambda recipe: {"as it is": recipe})
    if name not in COUNTED:
        monkeypatch.setattr(memory, "step_bytes", lambda recipe: {"weights": 2**30})
    recipe = load_recipe(name, [f"output.dir={tmp_path / 'run'}"])  # one of its own name may stand in the checkout
    assert parse(Recipe, resolved(recipe)) == recipe
    lines: list[str] = []
    dry_run(recipe, lines.append)
    checks = {line.split()[0]: line.split()[1] for line in lines[lines.index("\nchecks") + 1 : lines.index("")]}
    assert {"data", "model", "output"} <= set(checks)
    assert "refused" not in checks.values()
    counted = next(line for line in lines if line.startswith("  all "))
    assert float(re.search(r"trained +([\d.]+) M", counted)[1]) > 0.1
    assert re.search(r"as it is +\d+\.\d\d GiB", lines[-1])


def test_the_codecs_scale_is_known_without_its_networks(tmp_path):
    def scale(**model: object) -> int:
        return StableSRSettings(**model).codec_scale()  # type: ignore[arg-type]

    assert scale() == 8  # of a base that is not on this machine: the preset's
    assert scale(init="random", preset="tiny") == 4
    (tmp_path / "run" / "vae").mkdir(parents=True)
    (tmp_path / "run" / "vae" / "config.json").write_text('{"block_out_channels": [8, 8]}')
    assert scale(base=str(tmp_path / "run")) == 2  # its own, whatever the preset
    for folder in ("run", "run/vae"):
        assert scale(init="random", preset="tiny", vae=str(tmp_path / folder)) == 2
    (tmp_path / "run" / "vae" / "config.json").write_text('{"block_out_channels": 3}')
    assert scale(base=str(tmp_path / "run")) == 8  # damaged, which the run will say
