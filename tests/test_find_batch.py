"""`--find-batch`: which batch it finds, what it leaves behind (nothing), and what it refuses; and the forecast after ten steps."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import tiny
from toys import assert_same_checkpoint, namespace, toy_job, wave_photos
from typer.testing import CliRunner

from sslsr_diffusion import train
from sslsr_diffusion.cli import app
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.runs import find_batch as module
from sslsr_diffusion.runs.find_batch import find_batch
from sslsr_diffusion.runs.recipe import Recipe, resolved
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.reporting import _duration

GIB = 2**30
CPU = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process is read from /proc")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    photos = tmp_path / "photos"
    photos.mkdir()
    training = {"steps": 1, "batch_size": 2, "accumulate": 6, "crop_size": 32, "log_every": 1}
    gated = [{"kind": "diffusion"}, {"kind": "pixel_l1", "max_timestep": 0}]
    return tiny(wave_photos(photos), tmp_path / "run", training=training, losses=gated)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A device on which every sample takes a GiB beside two, and 12 samples are too many; what was played on it."""
    calls: list[tuple[int, int]] = []

    def peak(session: Any, recipe: Recipe, size: int, accumulate: int, device: torch.device) -> int:
        calls.append((size, accumulate))
        if size == 12:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return (2 + size) * GIB

    monkeypatch.setattr(module, "_RESET", Path("/dev/null"))
    monkeypatch.setattr(module, "_peak", peak)
    monkeypatch.setattr(module, "_added", lambda recipe, before, size: 0)
    monkeypatch.setattr(module, "build_job", lambda recipe: toy_job(Path("run")))
    monkeypatch.setattr(module, "Session", lambda *args, **kwargs: namespace(close=lambda: None))
    return calls


@pytest.mark.parametrize(
    ("budget", "batch", "tried"),
    [(6.7, 4, [1, 2, 3, 4, 6]), (5.5, 2, [1, 2, 3]), (4.4, 1, [1, 2]), (99, 6, [1, 2, 3, 4, 6, 12])],
)
def test_the_largest_that_fits_with_room_and_keeps_the_samples_of_a_step(recipe, played, budget, batch, tried):
    said: list[str] = []
    found = find_batch(recipe, said.append, memory_budget=int(budget * GIB))
    assert (found.training.batch_size, found.training.accumulate) == (batch, 12 // batch)
    assert played == [(size, min(2, 12 // size)) for size in tried]
    assert said[-1] == (
        f"the largest batch that fits is {batch}, with {2 + batch:.1f} of {budget:.1f} GiB at its peak; "
        f"--set training.batch_size={batch} --set training.accumulate={12 // batch} keeps it"
    )


def test_a_size_that_the_pool_does_not_take_is_not_tried(recipe, played):
    degradation = recipe.data.degradation.model_copy(update={"pool_size": 8})
    pooled = recipe.model_copy(update={"data": recipe.data.model_copy(update={"degradation": degradation})})
    assert find_batch(pooled, lambda text: None, memory_budget=99 * GIB).training.batch_size == 4
    assert [size for size, _ in played] == [1, 2, 4]


def test_what_the_estimate_says_is_too_much_is_not_tried(recipe, played, monkeypatch):
    monkeypatch.setattr(module, "_added", lambda recipe, before, size: (size - before) * GIB)
    said: list[str] = []
    assert find_batch(recipe, said.append, memory_budget=int(6.7 * GIB)).training.batch_size == 4
    assert [size for size, _ in played] == [1, 2, 3, 4]
    assert said[-2] == "batch_size 6: not tried, it would take about 8.00 GiB"


def test_not_even_one(recipe, played):
    with pytest.raises(UserError, match=r"^find_batch: expected one sample to stay below 2.7 GiB, 90% of the memory, got more; --dry-run"):
        find_batch(recipe, lambda text: None, memory_budget=3 * GIB)


def to(recipe: Recipe, folder: Path) -> Recipe:
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"dir": str(folder)})})


def streams() -> tuple[Any, ...]:
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - the global stream


@CPU
def test_real_steps_leave_nothing_behind(recipe, tmp_path, monkeypatch):
    """No files, the random streams where they were, and the run after it is the one without it, bit for bit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_added", lambda recipe, before, size: 0)  # counting takes seconds
    few = recipe.model_copy(update={"training": recipe.training.model_copy(update={"accumulate": 1})})
    train(to(few, tmp_path / "without"))
    before = sorted(tmp_path.rglob("*"))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = streams()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    said: list[str] = []
    found = find_batch(few, said.append, memory_budget=64 * GIB)
    assert streams() == expected
    assert sorted(tmp_path.rglob("*")) == before
    assert found.training.batch_size == 2
    peaks = [float(re.findall(r"([\d.]+) GiB", line)[0]) for line in said[:2]]
    assert 0.1 < peaks[0] < 16
    assert 0.1 < peaks[1] < 16
    assert resolved(found) == resolved(few)
    train(to(found, tmp_path / "after"))
    assert_same_checkpoint(tmp_path / "after" / "checkpoint-1", tmp_path / "without" / "checkpoint-1")


@CPU
def test_every_loss_looks_at_every_sample(recipe):
    """`max_timestep: 0` would leave nearly all out; the trial decodes them, as the worst step does."""
    worst = module._worst_case(recipe)
    assert worst.losses[1].max_timestep is None
    assert (worst.validation.limit, worst.data.workers) == (0, 0)
    assert recipe.losses[1].max_timestep == 0


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, ["train", "--config", "tiny", *arguments], catch_exceptions=False)
    return str(caught.value)


def test_what_cannot_be_done_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert refused("--find-batch", "--resume", "latest").startswith("--find-batch is for a new run, and --resume goes on with")
    assert refused("--memory-budget", "8GB").startswith("--memory-budget: expected --find-batch or --dry-run beside it")
    assert refused("--memory-budget", "much", "--find-batch") == "--memory-budget much: expected a size such as 8GB, 7.5GiB or 500MB."
    assert refused("--find-batch").startswith("--find-batch: expected ")
    monkeypatch.setattr(module, "_RESET", Path("/dev/null"))
    assert refused("--find-batch") == (
        "--find-batch: expected --memory-budget on a CPU, for example 16GB, got none; give what the run may take."
    )
    monkeypatch.setattr(module, "_RESET", tmp_path / "none")
    assert "or a CPU under Linux, got cpu" in refused("--find-batch", "--memory-budget", "8GB")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused("--find-batch").startswith("--find-batch: expected one process, got 2; run it with one")
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/recipe.yaml").write_text("")
    assert "already holds a run" in refused("--find-batch")


def test_after_ten_steps_the_run_says_how_long_it_takes(tmp_path):
    train_job(toy_job(tmp_path / "run"))
    lines = [line for line in (tmp_path / "run/log.txt").read_text().splitlines() if "s per step" in line]
    assert len(lines) == 1
    assert re.search(r"step 10: [\d.e-]+ s per step, \d+ s for the 10 to come; validation and checkpoints come on top$", lines[0])


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (59, "59 s"), (61, "1 min"), (7320, "2 h 2 min"), (90000, "1 d 1 h"), (86400 * 400, "400 d 0 h")]
)
def test_durations(seconds, said):
    assert _duration(seconds) == said
