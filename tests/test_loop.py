"""The loop: files of a run, stopping by signal, numbers going wrong, a full disk, automatic weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from PIL import Image
from test_two_processes import HERE, environment
from toys import toy_job, toy_losses, toy_validation

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.training import outputs
from sslsr_diffusion.training.checkpoints import latest_checkpoint, read_checkpoint
from sslsr_diffusion.training.engines import make_accelerator
from sslsr_diffusion.training.job import CheckpointWritten, Event, Finished, StepDone, Validated
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.reporting import plot_losses
from sslsr_diffusion.training.session import Session
from sslsr_diffusion.training.settings import CheckpointSettings, OutputSettings
from sslsr_diffusion.training.state import AutoWeight


@pytest.mark.usefixtures("drawn_curves")
def test_a_run_folder_explains_itself(tmp_path):
    job = replace(
        toy_job(tmp_path / "run", ema={"decay": 0.9}), validation=toy_validation(), output=OutputSettings(dir=str(tmp_path / "run"))
    )
    result = train_job(job)
    assert result.step == 20
    assert result.stopped is None
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {"recipe.yaml", "versions.json", "log.txt", "history.jsonl", "loss.png", "pictures", "pipeline", "best", "tensorboard"}
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-20"]
    assert not list((tmp_path / "run").glob(".tmp*"))
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss/diffusion" in row]
    assert [row["step"] for row in logged] == [5, 10, 15, 20]
    assert {"loss/self_similarity/kl", "train/lr", "train/seconds_per_step", "train/mask_density"} <= logged[0].keys()
    looks = {row["step"]: row for row in rows if "validation/mse" in row}
    assert list(looks) == [0, 10, 20]
    first, last = (looks[step]["validation/mse"] for step in (0, 20))
    assert sum(looks[20]["validation_pictures"]) / 3 == pytest.approx(last)
    log = (tmp_path / "run/log.txt").read_text()
    bicubic = looks[0]["validation_bicubic/mse"]
    assert f"step 0: validation before training  mse {first:.4g} (bicubic {bicubic:.4g})\n" in log
    assert f"step 20: validation  mse {last:.4g} (bicubic {bicubic:.4g}, before training {first:.4g})\n" in log
    with Image.open(tmp_path / "run/pictures/step-000020.png") as grid:
        assert grid.size[0] > 3 * 32
    with Image.open(tmp_path / "run/loss.png") as curves:
        assert curves.width == 1024  # 6.4 inches, 160 dots per inch
    assert read_checkpoint(tmp_path / "run/best").state["progress"]["best"] == pytest.approx(0.01, rel=0.3)


def test_looking_does_not_change_training(tmp_path):
    averaged = {"ema": {"decay": 0.9}}  # swapped in for a look, and out again
    train_job(toy_job(tmp_path / "blind", **averaged))
    train_job(replace(toy_job(tmp_path / "seeing", **averaged), validation=toy_validation(every=3)))
    blind, seeing = (read_checkpoint(tmp_path / n / "checkpoint-20").tensors["trained"] for n in ("blind", "seeing"))
    assert all(torch.equal(blind[name], seeing[name]) for name in blind)


def test_non_finite_steps_are_skipped_and_counted(tmp_path, caplog):
    result = train_job(toy_job(tmp_path / "run", poison=range(6, 10), ema={"decay": 0.9}))
    assert result.step == 20
    state = read_checkpoint(tmp_path / "run/checkpoint-20").state
    assert state["progress"]["skipped"] == 2
    assert state["ema"]["optimization_step"] == 18  # the average does not take the same weights twice
    assert state["progress"]["skipped_in_a_row"] == 0
    assert "step 4 skipped" in caplog.text
    assert "6.png" in caplog.text


def test_too_many_in_a_row_stop_with_the_last_good_weights(tmp_path):
    train_job(toy_job(tmp_path / "good", steps=3))
    with pytest.raises(UserError, match=r"4 steps in a row .* not a number"):
        train_job(toy_job(tmp_path / "run", poison=range(6, 99), non_finite_limit=4))
    stopped = read_checkpoint(tmp_path / "run/checkpoint-7")
    good = read_checkpoint(tmp_path / "good/checkpoint-3")
    assert all(torch.equal(stopped.tensors["trained"][name], value) for name, value in good.tensors["trained"].items())
    assert not (tmp_path / "run/pipeline").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path, caplog):
    """A step with sound numbers can still spoil the weights: the checkpoint before it is the last good one, and stays."""
    job = toy_job(tmp_path / "run", non_finite_limit=4)
    opened = job.open_data

    def open_data(*place):
        loader = opened(*place)

        class Spoiling(loader.__class__):
            def __next__(self):
                if self.position == 14 * self.batch_size:
                    job.task.networks.denoiser.trained.weight.data[0, 0, 0, 0] = float("inf")
                return super().__next__()

        loader.__class__ = Spoiling
        return loader

    with pytest.raises(UserError, match=r"last good step are in \S*checkpoint-10\."):
        train_job(replace(job, open_data=open_data, checkpoints=CheckpointSettings(every=5, keep=1)))
    assert "no checkpoint at step 15: the weights are not finite any more (trained.weight)" in caplog.text
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-10"]


def test_a_spike_is_logged_with_the_names_of_its_batch(tmp_path, caplog):
    job = toy_job(tmp_path / "run", steps=24, spike_factor=3)
    opened, loss = job.open_data, job.losses[0]

    def open_data(*place):
        loader = opened(*place)

        class Spiking(loader.__class__):
            def __next__(self):
                weight = 1e4 if self.position == 21 * self.batch_size else 1.0
                loss.settings = loss.settings.model_copy(update={"weight": weight})
                return super().__next__()

        loader.__class__ = Spiking
        return loader

    train_job(replace(job, open_data=open_data))
    (said,) = [record.getMessage() for record in caplog.records if "running mean" in record.getMessage()]
    assert said.startswith("step 22: loss")
    assert said.endswith("batch: 42.png, 43.png")


def test_fsdp_that_accelerate_leaves_out_is_refused(tmp_path, monkeypatch):
    """On the CPU accelerate ignores its FSDP plugin without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"expected FSDP2 .* is not followed on this machine \(accelerate chose NO\)"):
        train_job(toy_job(tmp_path / "run"))


def test_fsdp2_is_told_what_a_run_needs(tmp_path, monkeypatch):
    """On a stand-in for an Accelerator that has GPUs; test_two_processes.py has what comes of it."""
    plugin = SimpleNamespace()
    made = SimpleNamespace(distributed_type="DistributedType.FSDP", is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    monkeypatch.setattr("accelerate.Accelerator", lambda **given: made)
    training = toy_job(tmp_path / "run").training.model_copy(update={"mixed_precision": "bf16"})
    assert make_accelerator(training, (), tmp_path) is made
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert (policy.output_dtype, policy.cast_forward_inputs, plugin.cpu_ram_efficient_loading) == (None, False, False)


def test_a_full_disk_costs_a_warning_or_the_run_by_policy(tmp_path, monkeypatch, caplog):
    real = outputs.write_checkpoint

    def full(folder, *rest):
        if folder.name == "checkpoint-20":
            raise OSError(28, "No space left on device")
        real(folder, *rest)

    monkeypatch.setattr(outputs, "write_checkpoint", full)
    assert train_job(toy_job(tmp_path / "a")).step == 20
    assert "could not be written" in caplog.text
    assert latest_checkpoint(tmp_path / "a") == tmp_path / "a/checkpoint-10"
    with pytest.raises(UserError, match="on_failure is stop"):
        train_job(replace(toy_job(tmp_path / "b"), checkpoints=CheckpointSettings(every=10, on_failure="stop")))


def test_a_pipeline_that_cannot_be_written_names_the_checkpoint(tmp_path):
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    job = toy_job(tmp_path / "run")
    job.task.save = full
    with pytest.raises(UserError, match=r"sslsr export \S*checkpoint-20"):
        train_job(job)
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-20"


def test_auto_weight_is_the_median_ratio_then_frozen(tmp_path):
    auto = AutoWeight(steps=3)
    assert auto.value == 1.0
    for own, others in [(0.5, [1.0, 2.0]), (0.0, [1.0]), (1.0, [3.0])]:
        auto.observe(own, others)
    assert auto.frozen
    assert auto.value == 3.5
    auto.observe(1.0, [100.0])
    assert auto.value == 3.5
    train_job(toy_job(tmp_path / "run", losses=toy_losses(weight="auto", auto_steps=4)))
    kept = read_checkpoint(tmp_path / "run/checkpoint-20").state["auto_weights"]["self_similarity"]
    assert kept["seen"] == 4
    assert len(kept["ratios"]) <= 4
    assert "train/auto_weight/self_similarity" in (tmp_path / "run/history.jsonl").read_text()


def test_a_fixed_batch_is_learned(tmp_path):
    """With fixed t and noise every loss term falls: the same samples over and over."""
    job = toy_job(tmp_path / "run", steps=60, dropout=0, optimizer={"lr": 3e-2})
    opened = job.open_data

    def open_data(rank, world, state, device):
        loader = opened(rank, world, state, device)
        batch = next(loader)
        loader.__class__ = type("Fixed", (loader.__class__,), {"__next__": lambda self: batch})
        return loader

    train_job(replace(job, open_data=open_data))
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    for term in ("diffusion", "pixel_l1", "self_similarity/l1", "self_similarity/kl"):
        assert rows[-1][f"loss/{term}"] < rows[0][f"loss/{term}"], term


class Recorder:
    """A publisher that writes down what it is told; the folder must be whole when it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def publish(self, folder, message, *, files=None):
        assert (folder / "weights.safetensors").is_file()
        self.calls.append(f"publish {message} {sorted(files)}")

    def checkpoint(self, folder=None):
        self.calls.append(f"checkpoint {folder and folder.name}")

    def close(self):
        self.calls.append("close")
        return True


def test_best_and_end_are_published_and_every_checkpoint_tries_again(tmp_path):
    recorder = Recorder()
    output = OutputSettings(dir=str(tmp_path / "run"), trackers=(), push_to_hub=True, hub_id="a/b", push_state=True)
    card = lambda metrics, pictures: {"README.md": f"{metrics['validation/mse']}".encode(), **{p.name: p for p in pictures}}  # noqa: E731
    job = toy_job(tmp_path / "run", gain=0.1)  # better than before training, then no more
    train_job(replace(job, validation=toy_validation(), output=output, publisher=recorder, card=card))
    files = "['README.md', 'step-0000{}.png']"
    assert recorder.calls == [
        "checkpoint checkpoint-10",
        f"publish Best so far, step 10 {files.format(10)}",
        "checkpoint checkpoint-20",
        f"publish Step 20 {files.format(20)}",
        "close",
    ]


def test_the_card_of_the_best_weights_shows_their_numbers_and_pictures(tmp_path):
    """Two passes, the first the better one: the final publication is of step 10, so is its card."""
    recorder, shown = Recorder(), []
    output = OutputSettings(dir=str(tmp_path / "run"), trackers=(), push_to_hub=True, hub_id="a/b", pipeline="best")

    def card(metrics, pictures):
        shown.append((metrics["step"], [p.name for p in pictures], metrics["validation_base/mse"] > metrics["validation/mse"]))
        return {}

    job = toy_job(tmp_path / "run", gain=0.1)
    train_job(replace(job, validation=toy_validation(), output=output, publisher=recorder, card=card))
    assert recorder.calls[-2] == "publish Step 10 []"
    assert shown[-1] == (10, ["step-000010.png"], True)


def test_divided_weights_are_not_validated_and_the_run_says_so(tmp_path, monkeypatch, caplog):
    """FSDP: the pipeline comes from the last checkpoint, because no process holds whole weights."""
    own = Session.__init__

    def divided(self, *arguments, **options):
        own(self, *arguments, **options)
        self.sharded = True

    monkeypatch.setattr(Session, "__init__", divided)
    exported = []
    job = replace(toy_job(tmp_path / "run"), validation=toy_validation(), export=lambda *folders: exported.append(folders))
    result = train_job(job)
    assert result.best is None
    assert "validation is left out" in caplog.text
    assert exported == [(tmp_path / "run/checkpoint-20", tmp_path / "run/pipeline")]


def test_whoever_started_the_run_hears_of_it(tmp_path):
    heard: list[Event] = []
    job = replace(toy_job(tmp_path / "run"), validation=toy_validation())
    result = train_job(job, on_event=heard.append)
    steps = [event for event in heard if isinstance(event, StepDone)]
    assert [event.step for event in steps] == list(range(1, 21))
    assert {"loss/total", "loss/diffusion", "train/lr", "train/grad_norm"} <= steps[0].values.keys()
    assert {event.total for event in heard} == {20}
    others = [event for event in heard if not isinstance(event, StepDone)]
    assert [(type(event), event.step) for event in others] == [
        (Validated, 0),
        (CheckpointWritten, 10),
        (Validated, 10),
        (CheckpointWritten, 20),
        (Validated, 20),
        (Finished, 20),
    ]
    assert others[3].folder == tmp_path / "run/checkpoint-20"
    assert [event.best for event in others if isinstance(event, Validated)] == [True, False, False]  # the same number is not a better one
    assert others[0].values["mse"] == result.best
    assert (others[-1].stopped, others[-1].result) == (None, tmp_path / "run/pipeline")


def test_curves_have_each_label_once_and_no_ground_of_their_own(tmp_path, monkeypatch):
    """Of values within a decade, of several, and of some that a logarithm does not know."""
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    series = {"near": [0.31, 0.34, 0.33], "far": [3e-5, 0.09, 0.5], "decade": [0.9, 1.2, 0.09], "zero": [0.0, 0.2, 0.1]}
    plot_losses(
        [{"step": k + 1, **{f"loss/{name}": values[k] for name, values in series.items()}} for k in range(3)], tmp_path / "loss.png"
    )
    figures[0].canvas.draw()
    for axis in figures[0].axes:
        labels = [label.get_text() for label in axis.get_yticklabels(which="both") if label.get_text()]
        assert 2 <= len(labels) == len(set(labels)), labels
    assert [axis.get_yscale() for axis in figures[0].axes] == ["linear", "log", "log", "linear"]
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.getpixel((0, 0))[3] == 0  # what is behind it shows


def test_what_a_listener_raises_comes_out(tmp_path):
    def listener(event):
        if event.step == 3:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train_job(toy_job(tmp_path / "run"), on_event=listener)
    assert "ended by KeyError" in (tmp_path / "run/log.txt").read_text()


def endless(folder: Path) -> list[str]:
    return [str(HERE / "toy_run.py"), str(folder), json.dumps({"steps": 100000, "batch_size": 1, "log_every": 1})]


def wait_for(condition, seconds: float = 90) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def started(folder: Path) -> bool:
    return (folder / "history.jsonl").is_file() and (folder / "history.jsonl").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(tmp_path, number):
    where = {"cwd": tmp_path, "path": [HERE, HERE.parent], "environment": {"ACCELERATE_USE_CPU": "1"}, "said": str(tmp_path / "said")}
    process = forks.begin(*endless(tmp_path / "run"), **where)
    assert wait_for(lambda: started(tmp_path / "run"))
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 0
    assert latest_checkpoint(tmp_path / "run") is not None
    assert f"{signal.Signals(number).name} received" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "group"])
def test_the_launchers_death_leaves_a_checkpoint(tmp_path, whom):
    """`accelerate launch` does not forward SIGTERM to its child; the child notices that its parent is gone."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", *endless(tmp_path / "run")]
    process = subprocess.Popen(launcher, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    assert wait_for(lambda: started(tmp_path / "run"))
    if whom == "launcher":
        os.kill(process.pid, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    assert wait_for(lambda: latest_checkpoint(tmp_path / "run") is not None, 30)
    reason = "the launcher is gone" if whom == "launcher" else "SIGTERM received"
    assert wait_for(lambda: reason in (tmp_path / "run/log.txt").read_text(), 30)


def test_the_next_run_of_an_interpreter_has_its_own_precision(tmp_path):
    for precision in ("no", "bf16", "no"):
        assert train_job(toy_job(tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}", steps=1, mixed_precision=precision)).step == 1
