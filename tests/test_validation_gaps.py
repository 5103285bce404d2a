"""Validation where a metric has no number for a picture, and a stop between a step and its validation."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from toys import toy_job, toy_task, toy_validation

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.training import loop as loop_module
from sslsr_diffusion.training import outputs
from sslsr_diffusion.training.checkpoints import latest_checkpoint, read_checkpoint
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.reporting import picture_grid
from sslsr_diffusion.training.validation import validate


def refusing(wrong):
    """A metric that has no number for pictures whose first value is one of `wrong`: an error for the first of them, nan for the others."""

    def measure(restored, reference, lr):
        place = [i for i, value in enumerate(wrong) if reference.flatten()[0] == value]
        if place == [0]:
            raise UserError("NIQE needs two blocks of 96 x 96 pixels.")
        return torch.full((1,), math.nan) if place else (restored - reference).abs().mean()[None]

    return measure


def test_a_picture_without_a_number_is_named_once_and_left_out(caplog):
    looking, task = toy_validation(), toy_task()
    task.restore = lambda lr, hr, seed: hr + 0.1
    first = [pair.hr.flatten()[0] for pair in looking.pairs]
    names = [pair.name for pair in looking.pairs]
    looking = replace(looking, metrics={**looking.metrics, "odd": refusing(first[:2]), "none": refusing(first)})
    with caplog.at_level(logging.WARNING, "sslsr_diffusion"):
        result, again = validate(looking, task), validate(looking, task)
    alone = validate(replace(looking, pairs=looking.pairs[2:]), task)
    assert result.values["odd"] == pytest.approx(alone.values["odd"])
    assert result.bicubic["odd"] == pytest.approx(alone.bicubic["odd"])
    assert math.isnan(result.values["none"])
    assert result.values["mse"] == again.values["mse"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 5  # two for odd, three for none
    assert f"validation: odd has no number for {names[0]}, which is left out of its means: NIQE needs two blocks" in said[0]


def test_a_picture_of_no_numbers_is_said_and_shown_and_ends_nothing(tmp_path, caplog):
    looking, task = toy_validation(), toy_task()
    task.restore = lambda lr, hr, seed: torch.where(torch.arange(hr.shape[-1]) < 3, math.nan, hr)
    broken = {"mse": looking.metrics["mse"], "fell": lambda restored, reference: torch.linalg.cholesky(-torch.eye(2))}
    with caplog.at_level(logging.WARNING, "sslsr_diffusion"):
        result = validate(replace(looking, metrics=broken), task)
    name = looking.pairs[0].name
    assert f"the {task.label} of {name} has values that are not numbers" in caplog.text
    assert f"fell has no number for {name}, which is left out of its means" in caplog.text
    assert math.isnan(result.values["mse"])
    assert math.isnan(result.values["fell"])
    grid = picture_grid(result.rows, result.captions)
    height, width = result.rows[0][1].shape[-2:]
    cell = grid[22 : 22 + height, 4 + width + 4 : 4 + 2 * width + 4]  # caption, gaps
    assert (cell[:, :3] == (255, 0, 255)).all()
    assert (cell[:, 3:] != (255, 0, 255)).any(axis=-1).all()


def test_what_shows_a_run_cannot_end_it(tmp_path, monkeypatch, caplog):
    """A tracker whose service fell over, a plot that cannot be drawn."""

    def broken(*_, **__):
        raise RuntimeError("the service has gone")

    monkeypatch.setattr("accelerate.Accelerator.log", broken)
    monkeypatch.setattr("sslsr_diffusion.training.outputs.plot_losses", broken)
    result = train_job(replace(toy_job(tmp_path / "run"), validation=toy_validation()))
    assert result.pipeline is not None
    assert caplog.text.count("could not be written (RuntimeError: the service has gone); training goes on") == 1
    assert "loss.png could not be drawn (RuntimeError: the service has gone)" in caplog.text


def test_a_best_that_cannot_be_measured_is_said_and_history_stays_json(tmp_path, caplog):
    looking = toy_validation()
    looking = replace(looking, metrics={"mse": refusing([pair.hr.flatten()[0] for pair in looking.pairs])})
    train_job(replace(toy_job(tmp_path / "run"), validation=looking, recipe={"validation": {"best": "mse"}}))
    assert "validation.best: mse has no number for any held-out picture" in caplog.text
    assert not (tmp_path / "run/best").exists()
    text = (tmp_path / "run/history.jsonl").read_text()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in text.splitlines()]
    assert [row["validation/mse"] for row in rows if "validation/mse" in row] == [None, None, None]


def test_trouble_while_looking_costs_no_training_and_a_resume_looks_first(tmp_path, monkeypatch):
    looking = toy_validation(every=10)
    job = replace(toy_job(tmp_path / "run", gain=9), validation=looking)
    undisturbed = train_job(replace(toy_job(tmp_path / "plain", gain=9), validation=looking))

    def broken(*given, label, **options):
        if label is None:  # not yet before the first step
            raise RuntimeError("the metric's library fell over")
        return validate(*given, label=label, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "validate", broken)
        with pytest.raises(RuntimeError, match="fell over"):
            train_job(job)
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-10"
    assert train_job(job, resume="latest").best == undisturbed.best
    histories = [
        [
            (row["step"], row["validation/mse"])
            for row in map(json.loads, (tmp_path / run / "history.jsonl").open())
            if "validation/mse" in row
        ]
        for run in ("run", "plain")
    ]
    assert histories[0] == histories[1]
    assert [step for step, _ in histories[0]] == [0, 10, 20]


def test_best_weights_that_were_lost_with_the_process_are_found_again(tmp_path, monkeypatch):
    """Killed while best/ is written: the pass is not in the history yet, so it is done again."""
    job = replace(toy_job(tmp_path / "run", gain=0.1), validation=toy_validation(every=10))
    real = outputs.write_checkpoint

    def killed(folder, tensors, state):
        if folder.name == "best" and state["progress"]["step"]:
            raise RuntimeError("killed")
        real(folder, tensors, state)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_checkpoint", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_job(job)
    train_job(job, resume="latest")
    assert read_checkpoint(tmp_path / "run/best").state["progress"]["step"] == 10
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").open()]
    assert [row["step"] for row in rows if "validation/mse" in row] == [0, 10, 20]
