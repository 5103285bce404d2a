"""Hub ids are bound to one commit when a run begins, and a resume stays there although the branch has moved on."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from hub_server import HubServer
from tiny_runs import save_upscaler
from toys import toy_job
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.config import parse
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.runs.check import check_resume
from sslsr_diffusion.runs.pin import pinned, recorded_state
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.training.checkpoints import write_checkpoint
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.session import Session

PHOTOS = Path(__file__).parent.parent / "examples/photos"
FIRST, SECOND = "1a" * 20, "2b" * 20


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as server:
        server.alone(monkeypatch, tmp_path / "cache")
        yield server


def recipe(revision: str | None = None, base: str = "someone/base") -> Recipe:
    hub_source = {"kind": "hub", "path": "someone/photos", "revision": revision}
    data = {"sources": [{"kind": "folder", "path": "photos"}, hub_source], "validation": [hub_source]}
    return parse(
        Recipe, {"model": {"kind": "stablesr", "base": base, "revision": revision}, "data": data, "losses": [{"kind": "diffusion"}]}
    )


def revisions(recipe: Recipe) -> list[str | None]:
    return [recipe.model.revision, recipe.data.sources[1].revision, recipe.data.validation[0].revision]


def test_a_run_begins_at_todays_commits_and_goes_on_at_its_own(hub, tmp_path):
    for name in ("someone/base", "someone/photos"):
        hub.put(name, FIRST, {"README.md": b"first"})
    fresh = pinned(recipe())
    assert revisions(fresh) == [FIRST] * 3
    for name in ("someone/base", "someone/photos"):
        hub.put(name, SECOND, {"README.md": b"second"})
    write_checkpoint(tmp_path / "checkpoint-1", {}, {"recipe": fresh.model_dump(mode="json")})
    hub.log.clear()
    for written in (None, "main"):
        assert revisions(pinned(recipe(written), tmp_path / "checkpoint-1")) == [FIRST] * 3
    assert hub.log == []  # what is known is not asked
    assert revisions(pinned(recipe())) == [SECOND] * 3
    assert revisions(pinned(recipe(SECOND), tmp_path / "checkpoint-1")) == [SECOND] * 3  # another commit by name: the resume refuses it
    other = pinned(recipe(base="someone/else"), tmp_path / "checkpoint-1")
    assert revisions(other) == [None, FIRST, FIRST]


def test_a_hub_that_does_not_answer_binds_nothing_and_says_so(hub, monkeypatch, caplog):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING, "sslsr_diffusion"):
        assert pinned(recipe()) == recipe()
    assert "someone/base: its commit cannot be found out now" in caplog.text
    assert recorded_state(Path("nowhere")) == {}


@pytest.mark.parametrize(
    ("named", "recorded", "expected"),
    [
        ({}, {"detail": 0.8, "antiring": 0.5}, (0.8, 0.5)),
        ({"detail": 1.0}, {"detail": 0.8, "antiring": 0.5}, (1.0, 0.5)),
        ({"detail": 1.0}, None, (1.0, None)),  # the checkpoint of a task that has neither
    ],
)
def test_what_a_recipe_leaves_to_its_base_is_what_the_run_began_with(tmp_path, named, recorded, expected):
    given = recipe(FIRST)
    task = given.task.model_copy(update={"inference": given.task.inference.model_copy(update=named)})
    given = given.model_copy(update={"task": task})
    before = given.model_dump(mode="json")
    before["task"] = {"kind": "base"} if recorded is None else {**before["task"], "inference": {**before["task"]["inference"], **recorded}}
    write_checkpoint(tmp_path / "checkpoint-1", {}, {"recipe": before})
    got = pinned(given, tmp_path / "checkpoint-1").task.inference
    assert (got.detail, got.antiring) == expected
    assert pinned(given).task == given.task  # a new run asks its base


@pytest.fixture
def base(hub, tmp_path, monkeypatch):
    """A tiny pipeline as someone/base, and an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state()
    save_upscaler(tmp_path / "made")
    files = {path.relative_to("made").as_posix(): path.read_bytes() for path in Path("made").rglob("*") if path.is_file()}
    hub.put("someone/base", FIRST, files)
    return files


def train(steps: int, *more: str) -> str:
    values = {
        "model.init": "pretrained",
        "model.base": "someone/base",
        "model.vae": "null",
        "data.sources.0.path": PHOTOS / "train",
        "data.workers": 0,
        "losses": "[{kind: diffusion}]",
        "output.dir": "run",
        "output.trackers": "[]",
        "training.batch_size": 1,
        "training.crop_size": 32,
        "training.steps": steps,
        "validation.limit": 0,
    }
    arguments = ["train", "--config", "tiny", *(f"--set={k}={v}" for k, v in values.items()), *more]
    return CliRunner().invoke(app, arguments, catch_exceptions=False).output


def test_training_records_the_commit_and_resumes_from_it(hub, base):
    assert "Done: 1 steps" in train(1)
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["model"]["revision"] == FIRST
    hub.put("someone/base", SECOND, base)
    hub.put("someone/base", "3c" * 20, {**base, "unet/diffusion_pytorch_model.safetensors": b"moved on"})
    assert "Done: 2 steps" in train(2, "--resume", "latest")
    state = recorded_state(Path("run/checkpoint-2"))
    assert state["recipe"]["model"]["revision"] == state["base"]["revision"] == FIRST
    with pytest.raises(UserError, match=f"model.revision: '{FIRST}' -> '{SECOND}'"):
        train(3, "--resume", "latest", f"--set=model.revision={SECOND}")


def test_other_defaults_of_the_base_do_not_reach_a_run_that_goes_on(tmp_path, base, hub, caplog, monkeypatch):
    monkeypatch.setattr("sslsr_diffusion.runs.memory.step_bytes", lambda recipe: {"weights": 2**30})  # counting takes seconds

    def defaults(folder: str) -> tuple[float, float]:
        index = json.loads((tmp_path / folder / "model_index.json").read_text())
        return index["default_detail"], index["default_antiring"]

    def set_defaults(detail: float, antiring: float) -> None:
        path = tmp_path / "made/model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "default_detail": detail, "default_antiring": antiring}))

    here = ("--set=model.base=made",)
    set_defaults(0.9, 0.4)
    assert "Done: 1 steps" in train(1, *here)
    assert defaults("run/pipeline") == (0.9, 0.4)
    set_defaults(0.3, 1.0)
    checked = train(2, *here, "--resume", "latest", "--dry-run")
    assert re.search(r"resume +ok +run/checkpoint-1, step 1 of 2", checked)
    assert "Done: 2 steps" in train(2, *here, "--resume", "latest")
    assert defaults("run/pipeline") == (0.9, 0.4)
    assert "recipe changed since the checkpoint: task" not in caplog.text
    CliRunner().invoke(app, ["export", "run", "--output", "exported"], catch_exceptions=False)
    assert defaults("exported") == (0.9, 0.4)
    checked = train(3, *here, "--dry-run")
    assert re.search(r"output +refused +.*run already holds a run", checked)
    assert re.search(r"task +ok +the recipe leaves to the base: detail 0.3, back_projection 0, antiring 1$", checked, re.MULTILINE)
    set_defaults(0.3, 1.5)
    assert re.search(r"task +refused +model.base: default_antiring in", train(3, *here, "--dry-run"))


def test_an_automatic_precision_is_chosen_once(base, caplog, monkeypatch):
    """A run records what `auto` was on its device, and goes on in it on another one; bf16 without units for it is told."""
    monkeypatch.setattr("sslsr_diffusion.runs.memory.step_bytes", lambda recipe: {"weights": 2**30})
    here, auto = ("--set=model.base=made",), "--set=training.mixed_precision=auto"

    def chosen(folder: str) -> str:
        return recorded_state(Path(folder))["recipe"]["training"]["mixed_precision"]

    def on_a_device_for(precision: str) -> None:
        for user in ("runs.pin", "training.processes"):
            monkeypatch.setattr(f"sslsr_diffusion.{user}.training_precision", lambda device: precision)

    on_a_device_for("bf16")
    assert re.search(r"precision +ok +auto: bf16 on this device$", train(1, *here, auto, "--dry-run"), re.MULTILINE)
    assert "Done: 1 steps" in train(1, *here, auto)
    assert chosen("run/checkpoint-1") == yaml.safe_load(Path("run/recipe.yaml").read_text())["training"]["mixed_precision"] == "bf16"
    assert "bf16 is slower" not in caplog.text
    on_a_device_for("no")
    checked = train(2, *here, auto, "--resume", "latest", "--dry-run")
    assert re.search(r"resume +ok +run/checkpoint-1, step 1 of 2$", checked, re.MULTILINE)
    assert re.search(
        r"precision +ok +bf16 is slower than float32 on this device, .*; a run goes on in what it began with$", checked, re.MULTILINE
    )
    assert "Done: 2 steps" in train(2, *here, auto, "--resume", "latest")
    assert chosen("run/checkpoint-2") == "bf16"
    assert re.search("bf16 is slower than float32 on this device, .*; a run goes on in what it began with", caplog.text)
    caplog.clear()
    assert "Done: 1 steps" in train(1, *here, auto, "--restart")
    assert chosen("run/checkpoint-1") == "no"
    on_a_device_for("bf16")
    checked = train(2, *here, auto, "--resume", "latest", "--dry-run")
    assert re.search(r"precision +ok +float32$", checked, re.MULTILINE)  # as recorded
    on_a_device_for("no")
    assert "bf16 is slower" not in caplog.text
    slow = train(1, *here, "--set=training.mixed_precision=bf16", "--set=output.dir=other", "--dry-run")
    assert re.search(
        r"precision +ok +bf16 is slower than float32 on this device, .*training.mixed_precision=auto saves time$", slow, re.MULTILINE
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    refused = train(1, *here, "--set=training.mixed_precision=fp16", "--set=output.dir=other", "--dry-run")
    assert re.search(r"precision +refused +training.mixed_precision: fp16 needs a GPU", refused)


def test_processes_for_which_auto_differs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "gather", lambda self, value: [*value, "bf16"] if value == ["no"] else list(value))
    with pytest.raises(UserError, match=r"expected auto to be one and the same for all processes, got no, bf16 by rank; say bf16 or no\."):
        train_job(toy_job(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_looks_up_what_would_be_resumed(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def resume(where: str, recipe: Recipe = recipe(FIRST)) -> str:
        return f"{(check := check_resume(recipe, where)).verdict}: {check.detail}"

    assert resume("latest").startswith("missing: --resume latest: no whole checkpoint in runs/run")
    assert resume("nothing").startswith("missing: --resume nothing: no whole checkpoint")
    assert resume("someone/base").startswith("missing: someone/base is no folder here, and the hub has no such repository")
    hub.put("someone/base", FIRST, {"state/checkpoint-9/manifest.json": b"{}", "state/checkpoint-30/manifest.json": b"{}"})
    hub.put("someone/empty", SECOND, {"README.md": b""})
    assert resume("someone/base").startswith("ok: someone/base on the hub, commit 1a1a1a1a1a1a, step 30")
    assert resume(f"someone/base@{FIRST}").startswith("ok")
    assert resume("someone/empty").startswith("missing: someone/empty: the repository holds no training state")
    hub.fault("/api/models/", "cut", times=100)
    assert resume("someone/base").startswith("not reachable: someone/base is no folder here, and the hub cannot be reached")
    state = {"world_size": 2, "progress": {"step": 1}, "recipe": recipe(FIRST).model_dump(mode="json")}
    write_checkpoint(tmp_path / "runs/run/checkpoint-1", {}, state)
    assert resume("latest") == "ok: runs/run/checkpoint-1, step 1 of 20000"
    changed = recipe(FIRST).model_copy(update={"seed": 7})
    assert "the recipe is not the one of the checkpoint:; seed: 42 -> 7; Use" in resume("latest", changed)
    assert check_resume(changed, "latest", allow_recipe_change=True).verdict == "ok"
    write_checkpoint(tmp_path / "best", {}, {"progress": {"step": 1}})
    assert resume("best").startswith("refused: best holds weights alone")
