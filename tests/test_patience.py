"""When to stop: row 0, what counts as better, a run that ends by its patience, and what is said of a run that gained nothing."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from safetensors.torch import load_file
from tiny_runs import tiny
from toys import assert_same_checkpoint, toy_job, toy_networks, toy_validation, wave_photos

from sslsr_diffusion.cli import train as train_command
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.runs import start
from sslsr_diffusion.runs.check import run_checks
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.job import Event, Job, TrainResult, Validated
from sslsr_diffusion.training.looks import Looks
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.reporting import plot_losses
from sslsr_diffusion.training.run_folder import RunFolder
from sslsr_diffusion.training.settings import OutputSettings

BASE = [20.0, 22.0, 24.0, 26.0, 28.0, 30.0, 32.0, 34.0]
NOISE = [0.1, -0.1] * 4  # interval of its mean: about 0.07 to both sides


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Drawing its curves takes longer than a toy's training."""
    monkeypatch.setattr("sslsr_diffusion.training.outputs.plot_losses", lambda *_: None)


def looked(*rows: list[float | None], sign: int = 1) -> Looks:
    looks = Looks()
    for step, row in enumerate(rows):
        signed = [None if value is None else sign * value for value in row]
        looks.add(step, {"psnr": sign * 27.0}, signed, higher_is_better=sign > 0)
    return looks


def above(gain: float, noise: float = 1.0) -> list[float | None]:
    return [value + gain + noise * spread for value, spread in zip(BASE, NOISE)]


@pytest.mark.parametrize("sign", [1, -1])
def test_better_is_what_noise_does_not_explain(sign):
    assert looked(BASE, above(0.04), sign=sign).since == 1
    assert looked(BASE, above(-0.2), sign=sign).since == 1
    assert looked(BASE, above(0.2), sign=sign).reference_step == 1
    grown = looked(BASE, above(0.04), above(0.12, noise=-1), sign=sign)  # against the look before it, too little
    assert (grown.reference_step, grown.since) == (2, 0)
    assert looked(above(0.04), above(0.12, noise=-1), sign=sign).since == 1


def test_patience_counts_looks_since_the_last_better_one():
    looks = looked(BASE, above(0.2), above(0.2), above(0.21, noise=-1))
    assert looks.worn_out(None, "psnr") is None
    assert looks.worn_out(3, "psnr") is None
    said = "psnr has not improved by more than the noise of its 8 pictures in 2 looks, since step 1"
    assert looks.worn_out(2, "psnr") == said
    assert (looked(BASE, BASE).worn_out(1, "psnr") or "").endswith("in 1 looks, since the first step")


def test_pictures_without_a_number():
    none: list[float | None] = [None] * 8
    assert looked(none, none, BASE).reference_step == 2  # the first numbers are what others are compared with
    assert looked(BASE, none).since == 1
    assert looked(BASE, [*above(0.2)[:5], None, None, None]).reference_step == 1
    few = looked(BASE[:4], BASE[:4], BASE[:4])
    assert few.worn_out(1, "psnr") is None  # of four pictures there is no interval
    assert few.verdict("psnr", best_step=1) is None


def test_a_verdict_says_against_what():
    said = "by psnr (27 before the first step) this run is no better than what it started from"
    assert looked(BASE, BASE).verdict("psnr", best_step=0) == said
    assert looked(BASE, above(0.04)).verdict("psnr", best_step=1) == f"{said}, or by no more than its noise"
    assert looked(BASE, above(0.2)).verdict("psnr", best_step=1) is None
    assert looked(BASE).verdict("psnr", best_step=0) is None  # it was never looked at again
    assert looked(BASE, BASE).verdict("ssim", best_step=0) is None


def patient(run: Path, gain: float = 0.5, **training: object) -> Job:
    """Better until the weights are `gain` away from where they began; looks at steps 5, 10, ..., checkpoints at 10, 20, ..."""
    job = toy_job(run, steps=60, gain=gain, schedule={"kind": "cosine"}, **training)
    return replace(job, validation=toy_validation(every=5, count=5, patience=2))


class Killed(Exception):
    pass


def killed_at(step: int):
    """A listener that ends a run when a look is in its history."""

    def listen(event: Event) -> None:
        if isinstance(event, Validated) and event.step == step:
            raise Killed

    return listen


def looks_of(run: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key.startswith(("step", "validation"))} for row in RunFolder(run).validations()]


def test_a_run_ends_by_its_patience_and_a_killed_one_at_the_same_step(tmp_path):
    """Killed after a look whose checkpoint was written before it, and before one, and once more when it is done.

    The schedule is that of the whole length.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train_job(patient(whole))
    progress = read_checkpoint(whole / f"checkpoint-{result.step}").state["progress"]
    assert 0 < progress["looks"]["reference_step"] == result.step - 10 < 50
    assert result.stopped == (
        f"mse has not improved by more than the noise of its 5 pictures in 2 looks, since step {progress['looks']['reference_step']}"
    )
    assert result.pipeline is not None
    assert f"stopped at step {result.step} of 60: {result.stopped}\n" in (whole / "log.txt").read_text()
    rates = {row["step"]: row["train/lr"] for row in RunFolder(whole).history() if "train/lr" in row}
    assert rates == {step: pytest.approx(1e-2 * (1 + math.cos(math.pi * step / 60)) / 2) for step in range(5, result.step + 1, 5)}
    for resume, step in ((None, 5), ("latest", 10), ("latest", result.step - 5)):
        with pytest.raises(Killed):
            train_job(patient(parts), resume=resume if step > 10 else None, on_event=killed_at(step))
    torch.rand(3)
    assert replace(train_job(patient(parts), resume="latest"), run=whole, pipeline=result.pipeline) == result
    assert_same_checkpoint(whole / f"checkpoint-{result.step}", parts / f"checkpoint-{result.step}")
    assert looks_of(whole) == looks_of(parts)
    again = train_job(patient(parts), resume="latest")
    assert (again.step, again.stopped) == (result.step, result.stopped)
    job = patient(parts)
    assert job.validation is not None
    more = replace(job, validation=replace(job.validation, settings=job.validation.settings.model_copy(update={"patience": 3})))
    assert train_job(more, resume="latest").step == result.step + 5


def test_the_command_says_why_a_run_ended(capsys):
    said = "psnr has not improved"
    for stopped, pipeline in ((said, Path("runs/x/pipeline")), ("SIGTERM received", None), (None, Path("runs/x/pipeline"))):
        train_command._say(TrainResult(Path("runs/x"), 1200, stopped, 25.0, pipeline, []))
    patient, asked, done = capsys.readouterr().out.splitlines()
    assert patient.startswith(f"Stopped at step 1200: {said}. Pipeline: runs/x/pipeline ")
    assert asked == "Stopped at step 1200 (SIGTERM received). Go on with: --resume latest"
    assert done.startswith("Done: 1200 steps. Pipeline: runs/x/pipeline ")


def test_a_stop_while_the_start_is_measured_leaves_a_checkpoint_to_begin_with(tmp_path):
    def run(folder: Path) -> Job:
        return replace(toy_job(folder, gain=9), validation=toy_validation())

    stopping = run(tmp_path / "stopped")
    stopping.task.strength = lambda: os.kill(os.getpid(), signal.SIGTERM) or 0.1  # type: ignore[attr-defined]
    result = train_job(stopping)
    assert (result.step, result.pipeline, looks_of(tmp_path / "stopped")) == (0, None, [])
    assert "SIGTERM received" in str(result.stopped)
    train_job(run(tmp_path / "stopped"), resume="latest")
    train_job(run(tmp_path / "whole"))
    assert looks_of(tmp_path / "stopped") == looks_of(tmp_path / "whole")
    assert_same_checkpoint(tmp_path / "stopped/checkpoint-20", tmp_path / "whole/checkpoint-20")


def test_a_look_that_a_stop_cut_off_is_made_up_for(tmp_path):
    """At step 5, where no checkpoint was due."""
    job = replace(toy_job(tmp_path / "run", gain=9), validation=toy_validation(every=5))
    falling, calls = job.task.strength, []  # type: ignore[attr-defined]

    def strength() -> float:
        calls.append(1)
        if len(calls) == 4:  # the first picture of the second look
            os.kill(os.getpid(), signal.SIGTERM)
        return falling()

    job.task.strength = strength  # type: ignore[attr-defined]
    assert train_job(job).step == 5
    train_job(replace(toy_job(tmp_path / "run", gain=9), validation=toy_validation(every=5)), resume="latest")
    train_job(replace(toy_job(tmp_path / "whole", gain=9), validation=toy_validation(every=5)))
    assert looks_of(tmp_path / "run") == looks_of(tmp_path / "whole")


def test_other_pictures_begin_another_record(tmp_path, caplog):
    """A size or number that changes at a resume: row 0 is of other pictures, so nothing is compared with it."""

    def run(count: int, steps: int) -> Job:
        job = toy_job(tmp_path / "run", gain=9, steps=steps)
        return replace(job, validation=toy_validation(count=count), recipe={**job.recipe, "validation": {"limit": count}})

    train_job(run(5, 10))
    assert read_checkpoint(tmp_path / "run/checkpoint-10").state["progress"]["looks"]["base"].keys() == {"mse"}
    train_job(run(6, 20), resume="latest")
    assert read_checkpoint(tmp_path / "run/checkpoint-20").state["progress"]["looks"]["base"] == {}
    assert "what it started from" not in caplog.text


def test_a_run_that_gains_nothing_says_so_and_its_best_is_what_it_began_with(tmp_path, caplog):
    published: list[str] = []

    class Publisher:
        def publish(self, folder: Path, message: str, *, files: object = None) -> None:
            published.append(message)

        def checkpoint(self, folder: Path | None = None) -> None: ...
        def close(self) -> bool:
            return True

    strengths = iter([0.1] * 3 + [0.2] * 6)
    output = OutputSettings(dir=str(tmp_path / "run"), trackers=(), pipeline="best")
    job = toy_job(tmp_path / "run", strength=lambda: next(strengths))
    result = train_job(replace(job, validation=toy_validation(), output=output, publisher=Publisher()))
    first = looks_of(tmp_path / "run")[0]["validation/mse"]
    assert result.best == first
    assert f"by mse ({first:.4g} before the first step) this run is no better than what it started from" in caplog.text
    kept = load_file(tmp_path / "run/pipeline/weights.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in toy_networks().denoiser.named_parameters())
    assert published == ["Step 0"]  # at the end, as the recipe asks; not before anything was learned


def test_the_curves_show_where_a_run_began(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **look: lines.append((y, look["label"])))
    monkeypatch.setattr(Axes, "legend", lambda self, **look: None)
    plot_losses([{"step": 0, "validation/psnr": 24.5}, {"step": 5, "loss/total": 0.5, "validation/psnr": 25.0}], tmp_path / "loss.png")
    assert lines == [(24.5, "before training")]


def test_patience_needs_pictures_and_a_number(tmp_path, monkeypatch):
    """Told by the dry run and by the run."""
    folder = {"kind": "folder", "path": str(wave_photos(tmp_path))}
    validation = {"every": 1, "limit": 8, "size": 32, "metrics": ["psnr"], "patience": 2}

    def recipe(times: int):
        data = {"sources": [folder], "validation": [folder] * times, "degradation": {"preset": "bicubic"}, "workers": 0}
        return tiny(tmp_path, tmp_path / "run", data=data, validation=validation)

    said = "validation.patience: expected 5 held-out pictures or more, to tell progress from noise, got 3; add some to data.validation"
    checks = {check.what: check for check in run_checks(recipe(1))}
    assert checks["patience"].verdict == "refused"
    assert checks["patience"].detail.startswith(said)
    assert "patience" not in {check.what for check in run_checks(recipe(2))}
    with pytest.raises(UserError, match=said):
        start._validation(recipe(1))
    assert start._validation(recipe(2)) is not None
    monkeypatch.setattr(start, "lacking_metrics", lambda recipe: {"psnr": "psnr: gone"})
    with pytest.raises(UserError, match=r"validation.patience needs validation.best: psnr, which cannot be measured here"):
        start._validation(recipe(2))
