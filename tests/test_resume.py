"""20 steps equal 10 + resume + 10, bit for bit on the CPU; damaged checkpoints and changed recipes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from toys import assert_same_checkpoint, toy_job, toy_losses, toy_validation

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.training import outputs
from sslsr_diffusion.training.checkpoints import read_checkpoint, write_checkpoint
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.optimizers import build_optimizer
from sslsr_diffusion.training.resume import agree_on_best, check_same_recipe, check_same_step, data_state, differences
from sslsr_diffusion.training.run_folder import RunFolder
from sslsr_diffusion.training.session import Session
from sslsr_diffusion.training.settings import CheckpointSettings, OptimizerSettings, OutputSettings
from sslsr_diffusion.training.state import Progress, load_optimizer_state_dict, optimizer_state_dict

VARIANTS = {
    "plain": {},
    "ema": {"ema": {"decay": 0.9}},
    "accumulate": {"accumulate": 3, "batch_size": 1},
    "schedule": {"schedule": {"kind": "cosine", "warmup_steps": 3}},
    "window": {"decode_crop": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_equal_ten_and_ten(tmp_path, variant):
    options = dict(VARIANTS[variant])
    losses = lambda: toy_losses(max_timestep=600, weight="auto", auto_steps=14)  # noqa: E731 - calibration crosses the resume
    train_job(toy_job(tmp_path / "whole", losses=losses(), **options))
    first = toy_job(tmp_path / "parts", losses=losses(), **options)
    whole_schedule = first.training
    train_job(replace(first, training=whole_schedule.model_copy(update={"steps": 10})) if "schedule" not in options else stop_at_ten(first))
    torch.rand(3)  # the global stream is somewhere else now
    train_job(toy_job(tmp_path / "parts", losses=losses(), **options), resume="latest")
    assert_same_checkpoint(tmp_path / "whole/checkpoint-20", tmp_path / "parts/checkpoint-20")


def stop_at_ten(job):
    """A job whose data source asks for a stop, as SIGTERM would: the schedule still spans 20 steps."""
    import os
    import signal

    opened = job.open_data

    def open_data(rank, world, state, device):
        loader = opened(rank, world, state, device)
        original = loader.__class__.__next__

        class Stopping(loader.__class__):
            def __next__(self):
                if self.position == 9 * self.batch_size:
                    os.kill(os.getpid(), signal.SIGTERM)
                return original(self)

        loader.__class__ = Stopping
        return loader

    return replace(job, open_data=open_data)


def test_the_best_value_survives_a_resume(tmp_path):
    """Passes after the resume are worse: none takes the best one's place; history and tracker count on."""
    strengths = iter([0.4] * 3 + [0.2] * 3 + [0.1] * 3)
    job = toy_job(tmp_path / "run", steps=10, log_every=1, strength=lambda: next(strengths))
    first = replace(job, validation=toy_validation(every=5), checkpoints=CheckpointSettings(every=5))
    tracked = OutputSettings(dir=str(tmp_path / "run"))
    train_job(replace(first, output=tracked))
    worse = replace(toy_job(tmp_path / "run", log_every=1, strength=lambda: 0.3), validation=toy_validation(every=5))
    strengths = iter([0.2] * 3 + [0.3] * 9)  # the pass of step 5 is done again: its numbers are not there
    again = toy_job(tmp_path / "run", log_every=1, strength=lambda: next(strengths)).task
    elsewhere = replace(worse, task=again, output=OutputSettings(dir=str(tmp_path / "elsewhere"), trackers=()))
    result = train_job(elsewhere, resume=str(tmp_path / "run/checkpoint-5"))  # without best/, as from the hub
    assert result.best == pytest.approx(0.04, rel=0.3)
    base = [RunFolder(tmp_path / name).validations()[0] for name in ("run", "elsewhere")]
    assert [row["step"] for row in base] == [0, 0]  # measured once, kept in the checkpoint
    assert base[0]["validation/mse"] == base[1]["validation/mse"] > result.best
    result = train_job(replace(worse, output=tracked), resume=str(tmp_path / "run/checkpoint-5"))
    assert result.best == pytest.approx(0.01, rel=0.3)
    assert read_checkpoint(tmp_path / "run/best").state["progress"] == {"step": 10, "best": result.best}
    assert read_checkpoint(tmp_path / "run/checkpoint-20").state["progress"]["best_step"] == 10
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/total" in row] == list(range(1, 21))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "run/tensorboard").rglob("events.out.*")).parent)).Reload()
    assert [entry.step for entry in events.Scalars("loss/total")] == list(range(1, 21))  # what was logged after step 5 is forgotten


def test_an_allowed_change_of_settings_is_what_goes_on(tmp_path):
    """Rate, decay and averages are the new recipe's from the first step on, and the rate keeps its place on the schedule's way."""

    def job(lr, weight_decay, decay, auto_steps):
        losses = toy_losses(max_timestep=600, weight="auto", auto_steps=auto_steps)
        optimizer = {"lr": lr, "weight_decay": weight_decay}
        schedule = {"kind": "linear", "warmup_steps": 0}
        return toy_job(tmp_path / "run", losses=losses, optimizer=optimizer, ema={"decay": decay, "warmup": False}, schedule=schedule)

    train_job(stop_at_ten(job(1e-2, 0.01, 0.9, 5)))
    train_job(job(1e-4, 0.5, 0.5, 50), resume="latest", allow_recipe_change=True)
    before, after = (read_checkpoint(tmp_path / f"run/checkpoint-{step}").state for step in (10, 20))
    group, ema = after["optimizer"]["groups"][0], after["ema"]
    assert (group["initial_lr"], group["weight_decay"], after["schedule"]["base_lrs"]) == (1e-4, 0.5, [1e-4])
    assert (ema["decay"], ema["min_decay"], ema["optimization_step"]) == (0.5, 0.5, 20)
    assert [auto["steps"] for auto in after["auto_weights"].values()] == [50]
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    assert before["optimizer"]["groups"][0]["lr"] == pytest.approx(0.5e-2)
    assert rates[15] == pytest.approx(0.25e-4)


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        ({"detail": 1.0, "antiring": 0.0}, {"detail": 1.0, "antiring": 0.0}, True),
        ({"detail": 1.0, "antiring": 0.5}, {"detail": 1.0, "antiring": 0.0}, False),
        ({"detail": 1.0}, {"detail": 0.8}, False),
    ],
)
def test_best_is_kept_if_detail_and_antiring_are_the_same(tmp_path, caplog, before, now, kept):
    state = {"recipe": {"task": {"inference": before}}, "world_size": 1, "progress": {"best": 0.7, "step": 3}}
    write_checkpoint(tmp_path / "best", {}, state)
    progress = Progress(best=0.5, best_step=1)
    agree_on_best(progress, tmp_path / "best", {"task": {"inference": now}})
    assert (progress.best, progress.best_step) == ((0.7, 3) if kept else (None, None))
    check_same_recipe(state, {"task": {"inference": now}}, 1, allow=False)
    assert ("recipe changed" in caplog.text) is not kept


def test_what_lies_in_best_is_the_record(tmp_path, monkeypatch, caplog):
    """Its writing fails: nothing is recorded, and the next pass writes it. It is damaged, or measured otherwise: chosen anew."""
    real, tried = outputs.write_checkpoint, []

    def failing(folder, *rest):
        tried.append(folder.name)
        if folder.name == "best" and tried.count("best") == 2:
            raise OSError(28, "No space left on device")
        real(folder, *rest)

    monkeypatch.setattr(outputs, "write_checkpoint", failing)
    strengths = iter([0.3] * 3 + [0.1] * 3 + [0.2] * 3)
    job = toy_job(tmp_path / "run", strength=lambda: next(strengths))
    job = replace(job, validation=toy_validation(every=10), recipe={"validation": {"best": "mse"}})
    assert train_job(job).best == pytest.approx(0.04, rel=0.3)  # the better one of step 10 is not there, so it is not claimed
    assert "could not be kept" in caplog.text
    best, recipe = tmp_path / "run/best", job.recipe
    assert read_checkpoint(best).state["progress"]["step"] == 20
    progress = Progress(best=0.5, best_step=10)
    agree_on_best(progress, best, recipe)
    assert (progress.best, progress.best_step) == (pytest.approx(0.04, rel=0.3), 20)
    agree_on_best(progress, best, {"validation": {"best": "ssim"}})
    assert (progress.best, progress.best_step) == (None, None)
    (best / "trained.safetensors").write_bytes(b"")
    progress = Progress(best=0.5, best_step=10)
    agree_on_best(progress, best, recipe)
    assert (progress.best, progress.best_step) == (None, None)
    progress = Progress(best=0.5, best_step=10)
    agree_on_best(progress, tmp_path / "from the hub/best", recipe)
    assert (progress.best, progress.best_step) == (0.5, 10)


@pytest.mark.parametrize("part", ["best", "pipeline"])
def test_a_replacement_that_was_cut_off_is_put_back(tmp_path, part):
    """Killed between the two renames: the older folder has only its temporary name."""
    train_job(replace(toy_job(tmp_path / "run"), validation=toy_validation(every=20)))
    (tmp_path / "run" / part).rename(tmp_path / f"run/.tmp-old-{part}")
    (tmp_path / "run/.tmp-versions.json-7").write_text("cut off")
    RunFolder(tmp_path / "run").start({}, 20)
    assert not list((tmp_path / "run").glob(".tmp*"))
    assert any((tmp_path / "run" / part).iterdir())


def test_processes_that_found_different_checkpoints_are_told():
    check_same_step([4, 4])
    with pytest.raises(UserError, match=r"different steps \(4, 2 by rank\); expected output.dir on a file system"):
        check_same_step([4, 2])


def test_the_gradient_scaler_goes_on(tmp_path):
    """fp16 needs a GPU; its scaler is put into the session by hand."""
    job = toy_job(tmp_path)

    def session():
        made = Session(job.task, job.losses, job.training, seed=3, trackers=(), run=tmp_path)
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        return made

    first, second = session(), session()
    first.accelerator.scaler.load_state_dict({**first.accelerator.scaler.state_dict(), "scale": 512.0, "_growth_tracker": 7})
    write_checkpoint(tmp_path / "checkpoint-0", *first.state_dict({}))
    second.load_state_dict(read_checkpoint(tmp_path / "checkpoint-0"), what="test")
    assert second.accelerator.scaler.state_dict() == first.accelerator.scaler.state_dict()
    assert second.accelerator.scaler.get_scale() == 512


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    train_job(toy_job(tmp_path / "run"))
    newest = tmp_path / "run/checkpoint-20/trained.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    result = train_job(toy_job(tmp_path / "run"), resume="latest")
    assert result.step == 20
    assert "checkpoint-20 is passed over" in caplog.text
    assert "resumed from" in (tmp_path / "run/log.txt").read_text()


def test_resume_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint"):
        train_job(toy_job(tmp_path / "run"), resume="latest")


def test_differences_name_the_full_path():
    before = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": 1}
    assert differences(before, {"a": {"b": 1, "c": [1, {"d": 3}]}, "f": 2}) == {"a.c.1.d": (2, 3), "e": (1, None), "f": (None, 2)}


def test_a_changed_recipe_is_refused_unless_allowed(caplog):
    before = {"training": {"steps": 10, "batch_size": 2, "accumulate": 1}, "losses": [{"weight": 1.0}]}
    state = {"recipe": before, "world_size": 1}
    longer = {**before, "training": {**before["training"], "steps": 20}}
    check_same_recipe(state, longer, 1, allow=False)
    assert "training.steps: 10 -> 20" in caplog.text
    halved = {**before, "training": {"steps": 10, "batch_size": 1, "accumulate": 1}}
    check_same_recipe(state, halved, 2, allow=False)  # two processes with half the batch see the same samples
    with pytest.raises(UserError, match=r"training.batch_size: 2 -> 1"):
        check_same_recipe(state, halved, 1, allow=False)
    heavier = {**before, "losses": [{"weight": 2.0}]}
    with pytest.raises(UserError, match=r"losses.0.weight: 1.0 -> 2.0"):
        check_same_recipe(state, heavier, 1, allow=False)
    check_same_recipe(state, heavier, 1, allow=True)


@pytest.mark.parametrize(("kind", "said"), [("cosine", True), ("linear", True), ("constant", False), ("multistep", False)])
def test_more_steps_bend_a_schedule_and_that_is_said(caplog, kind, said):
    before = {"training": {"steps": 10, "batch_size": 2, "accumulate": 1, "schedule": {"kind": kind}}}
    check_same_recipe({"recipe": before, "world_size": 1}, {"training": {**before["training"], "steps": 20}}, 1, allow=False)
    assert (f"the {kind} schedule reaches over the whole run: with training.steps 10 -> 20 the learning rate" in caplog.text) == said


def test_data_goes_on_at_the_global_sample_index():
    recipe = {"training": {"batch_size": 4, "accumulate": 1}}
    state = {"recipe": recipe, "world_size": 2, "data": [{"batch": 6, "pool": []}, {"batch": 6, "pool": []}]}
    assert data_state(state, 1, 2, 4, allow=False) == {"batch": 6, "pool": []}
    assert data_state(state, 0, 1, 8, allow=False) == {"batch": 6}
    assert data_state(state, 0, 4, 1, allow=False) == {"batch": 12}
    state["data"] = [{"batch": 6, "pool": [1, 2]}, {"batch": 6, "pool": [3, 4]}]
    with pytest.raises(UserError, match="pool or a stream"):
        data_state(state, 0, 1, 8, allow=False)
    assert data_state(state, 0, 1, 8, allow=True) == {"batch": 6}


class NestingAdamW(torch.optim.AdamW):
    """Hands out its tensors as bitsandbytes does: in a dict within each parameter's entry."""

    def state_dict(self):
        found = super().state_dict()
        nested = {
            k: {"step": entry["step"], "packed": {n: v for n, v in entry.items() if n != "step"}} for k, entry in found["state"].items()
        }
        return {**found, "state": nested}

    def load_state_dict(self, state_dict):
        flat = {k: {"step": entry["step"], **entry["packed"]} for k, entry in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": flat})


def test_nested_optimizer_states_survive_a_checkpoint(tmp_path):
    """8-bit states come as dicts of tensors: they are saved as tensors, and go back to where they were."""

    def stepped(count: int):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = NestingAdamW(layer.parameters())
        for k in range(count):
            layer(torch.full((1, 3), k + 1.0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(layer.named_parameters()), optimizer

    (parameters, optimizer), (others, empty) = stepped(2), stepped(0)
    tensors, plain = optimizer_state_dict(optimizer, list(parameters))
    assert set(tensors) == {f"{name}|{key}" for name in parameters for key in ("step", "packed|exp_avg", "packed|exp_avg_sq")}
    write_checkpoint(tmp_path / "checkpoint-2", {"optimizer": tensors}, plain)
    read = read_checkpoint(tmp_path / "checkpoint-2")
    load_optimizer_state_dict(empty, others, read.tensors["optimizer"], read.state)
    for name, parameter in parameters.items():
        before, after = optimizer.state[parameter], empty.state[others[name]]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_states_nest_to_any_depth_and_need_not_be_tensors(tmp_path):
    """As 8-bit optimizers have them: codes, maps, an int step, flags; a parameter that never stepped has no state at all."""

    def make():
        layer = torch.nn.Linear(3, 2)
        return dict(layer.named_parameters()), torch.optim.SGD(layer.parameters())

    (parameters, optimizer), (others, empty) = make(), make()
    inner = {"absmax": torch.rand(4), "nested": {"offset": torch.rand(2), "blocksize": 256}}
    optimizer.state[parameters["weight"]] = {"step": 3, "quant": {"map": torch.rand(8), "signed": True, "maximum": None, **inner}}
    tensors, plain = optimizer_state_dict(optimizer, list(parameters))
    write_checkpoint(tmp_path / "checkpoint-3", {"optimizer": tensors}, plain)
    read = read_checkpoint(tmp_path / "checkpoint-3")
    load_optimizer_state_dict(empty, others, read.tensors["optimizer"], read.state)
    again, rest = optimizer_state_dict(empty, list(others))
    assert rest == plain
    torch.testing.assert_close(again, tensors, rtol=0, atol=0)
    quant = empty.state[others["weight"]]["quant"]
    assert (quant["nested"]["blocksize"], quant["signed"], quant["maximum"]) == (256, True, None)
    assert not empty.state.get(others["bias"])


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("stopped", [0, 2, 4])
def test_an_optimizer_goes_on_where_it_stopped(tmp_path, kind, stopped):
    """Before its first step, with a layer that has not stepped yet, and with all: the same bits as without the stop."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")

    def make():
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.Linear(70, 70), torch.nn.Linear(70, 70)])  # 8 bits from 4096 numbers on
        return model, build_optimizer(OptimizerSettings(kind=kind, lr=0.1), model.parameters())

    def train(model, optimizer, steps):
        for k in steps:
            hidden = model[0](torch.randn(4, 70, generator=torch.Generator().manual_seed(k)))
            (model[1](hidden) if k >= 3 else hidden).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, first, second = make(), make(), make()
    train(*whole, range(6))
    train(*first, range(stopped))
    tensors, plain = optimizer_state_dict(first[1], [name for name, _ in first[0].named_parameters()])
    write_checkpoint(tmp_path / "checkpoint", {"optimizer": tensors}, plain)
    read = read_checkpoint(tmp_path / "checkpoint")
    second[0].load_state_dict(first[0].state_dict())
    load_optimizer_state_dict(second[1], dict(second[0].named_parameters()), read.tensors["optimizer"], read.state)
    train(*second, range(stopped, 6))
    for name, value in whole[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[name], value), name
